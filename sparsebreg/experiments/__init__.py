"""Data sets, training runs, comparisons and the command line."""
