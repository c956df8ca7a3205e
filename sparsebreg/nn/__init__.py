"""Sparse layers: parameters and state, no maths."""

from sparsebreg import ops as functional
from sparsebreg.nn.conv2d import SparseConv2d
from sparsebreg.nn.layer import SparseLayer
from sparsebreg.nn.linear import SparseLinear

__all__ = ["SparseConv2d", "SparseLayer", "SparseLinear", "functional"]
