"""Sparse layers."""

from sparsebreg.nn.layers import *  # noqa
from sparsebreg.nn.layers import (
    kind,
    sparse_form,
    to_plain,
    to_swapped,
    unsupported,
    form,
    geometry_of,
    is_channels_last,
    to_fine,
    functional,
    FineConv2d,
    FineLinear,
)
