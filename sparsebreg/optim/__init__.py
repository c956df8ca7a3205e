"""Bregman optimizers."""

from sparsebreg.optim.adabreg import AdaBreg
from sparsebreg.optim.base import BregmanOptimizer
from sparsebreg.optim.groups import param_groups
from sparsebreg.optim.linbreg import LinBreg
from sparsebreg.optim.proxsgd import ProxSGD

__all__ = ["AdaBreg", "BregmanOptimizer", "LinBreg", "ProxSGD", "param_groups"]
