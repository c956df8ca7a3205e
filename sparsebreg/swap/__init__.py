"""Freezing and thawing: dense layers become sparse ones over their active weights, in place, and back."""

from sparsebreg.swap.carry_out import densify_, sparsify_
from sparsebreg.swap.costs import calibrate
from sparsebreg.swap.decide import SparsifyConfig
from sparsebreg.swap.report import LayerReport, SwapReport

__all__ = ["LayerReport", "SparsifyConfig", "SwapReport", "calibrate", "densify_", "sparsify_"]
