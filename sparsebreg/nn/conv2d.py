"""The 2-D convolution."""

from typing import Any

import torch
from torch import nn

from sparsebreg.lanes.tensor import hand_on
from sparsebreg.nn.layer import Fine, Frozen, SparseLayer, is_channels_last
from sparsebreg.ops import Geometry, sparse_conv2d


class SparseConv2d(SparseLayer, nn.Conv2d, plain=nn.Conv2d):
    """A 2-D convolution that can store and compute its active weights only; made so by :meth:`from_dense` or a swap.

    Shapes as ``torch.nn.Conv2d``: (N, IC, H, W) to (N, OC, OH, OW). Zero padding; any kernel, stride, dilation, groups.
    States: see :class:`SparseLayer`.
    """

    @classmethod
    def options(cls, module: nn.Conv2d) -> dict[str, Any]:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups")
        options = {name: getattr(module, name) for name in names}
        return {**options, "bias": module.bias is not None, "dtype": module.weight.dtype}

    @staticmethod
    def unsupported(module: nn.Conv2d) -> str:
        if module.padding_mode != "zeros":
            return f"padding_mode '{module.padding_mode}' is not supported"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "padding 'same' that differs between the sides is not supported"
        return ""

    @property
    def geometry(self) -> Geometry:
        return geometry_of(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, parameters = self.state, self._parameters
        if type(state) is Frozen:
            y = sparse_conv2d(
                x, state.pattern, parameters["values"], parameters["bias"], geometry_of(self), state.channels_last,
                state.lanes,
            )  # fmt: skip
            return y if state.unpacked is None else hand_on(state.unpacked, y)
        if type(state) is Fine:
            weight = parameters["weight"]
            values = state.values(weight, self.training)
            if values is not None:
                last = is_channels_last(weight)
                return sparse_conv2d(
                    x, state.pattern, values, parameters["bias"], geometry_of(self), last, True, weight
                )  # fmt: skip
        return super().forward(x)


def geometry_of(module: nn.Conv2d) -> Geometry:
    padding = module.padding
    if isinstance(padding, str):
        same = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        padding = same if padding == "same" else (0, 0)
    return Geometry(tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups)
