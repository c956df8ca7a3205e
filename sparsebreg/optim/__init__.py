"""Bregman optimizers."""

from sparsebreg.optim.base import BregmanOptimizer, param_groups
from sparsebreg.optim.linbreg import LinBreg

__all__ = ["BregmanOptimizer", "LinBreg", "param_groups"]
