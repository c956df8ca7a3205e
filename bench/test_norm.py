"""Batch norm and ReLU, forward and backward: lane tensors against torch's in both memory formats."""

SUITE = "norm"


def test_norm(timed):
    timed()
