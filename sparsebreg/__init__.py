"""Sparse training of neural networks that is faster on CPUs, not only in theory."""

from sparsebreg import flops, memory, models, nn
from sparsebreg._info import Info, info
from sparsebreg._version import __version__
from sparsebreg.backends import set_backend, use_backend
from sparsebreg.core.errors import BackendError, DataError, SparsebregError, SwapError
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.optim import AdaBreg, LinBreg, ProxSGD, param_groups
from sparsebreg.optim.initialize import erk_densities, sparse_init_, uniform_densities
from sparsebreg.optim.regularizers import L1, GroupL2, L1GroupL2, L1NonNegative, NoReg, NuclearNorm
from sparsebreg.swap import SparsifyConfig, SwapReport, calibrate, densify_, sparsify_
from sparsebreg.training.adaptive import LambdaScheduler
from sparsebreg.training.dynamic import SET, GradualPruning, Prune, RigL
from sparsebreg.training.multilevel import Multilevel
from sparsebreg.training.schedules import Level, LinearCoarse, PlateauCoarse

__all__ = [
    "L1",
    "SET",
    "AdaBreg",
    "BackendError",
    "DataError",
    "GradualPruning",
    "GroupL2",
    "Info",
    "L1GroupL2",
    "L1NonNegative",
    "LambdaScheduler",
    "Level",
    "LinBreg",
    "LinearCoarse",
    "Multilevel",
    "NoReg",
    "NuclearNorm",
    "PlateauCoarse",
    "ProxSGD",
    "Prune",
    "RigL",
    "SparsePattern",
    "SparsebregError",
    "SparsifyConfig",
    "SwapError",
    "SwapReport",
    "__version__",
    "calibrate",
    "densify_",
    "erk_densities",
    "flops",
    "info",
    "memory",
    "models",
    "nn",
    "param_groups",
    "set_backend",
    "sparse_init_",
    "sparsify_",
    "uniform_densities",
    "use_backend",
]
