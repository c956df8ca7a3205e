"""Training runs, comparisons of runs, and their reports."""
