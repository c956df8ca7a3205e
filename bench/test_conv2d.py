"""Convolutions: sparse on plain and on lane tensors, dense torch in both memory formats, peers."""

SUITE = "conv"


def test_conv2d(timed):
    timed()
