"""Differentiable sparse operations, registered with PyTorch as ``torch.ops.sparsebreg``."""

from sparsebreg.backends import Geometry
from sparsebreg.ops.conv2d import sparse_conv2d
from sparsebreg.ops.linear import sparse_linear
from sparsebreg.ops.pattern import gather, scatter

__all__ = ["Geometry", "gather", "scatter", "sparse_conv2d", "sparse_linear"]
