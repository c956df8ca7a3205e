"""The benchmark: what layers and networks take, sparse and dense."""
