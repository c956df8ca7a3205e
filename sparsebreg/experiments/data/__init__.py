"""Data sets, the file formats that they are published in, and batches of them."""
