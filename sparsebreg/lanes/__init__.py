"""The lane layout, and the tensor that carries it through a model.

A batch of N samples lies in blocks of 16, lanes innermost: ``[ceil(N / 16)][...][16]``. The sparse convolutions compute
in it. A :class:`LaneTensor` looks like the (N, C, H, W) tensor that it stands for; what PyTorch does with it runs on
the packed storage where an operation is known here, and on an unpacked copy where it is not: always the same result.
"""

from sparsebreg.lanes import norm, pointwise, pooling, shape  # noqa: F401  each adds the operations that it knows
from sparsebreg.lanes.layout import LANES, blocks, pack, unpack
from sparsebreg.lanes.tensor import LaneTensor, from_plain, to_plain, wrap

__all__ = ["LANES", "LaneTensor", "blocks", "from_plain", "pack", "to_plain", "unpack", "wrap"]
