"""The linear layer."""

from typing import Any

import torch
from torch import nn

from sparsebreg.nn.layer import Fine, Frozen, SparseLayer
from sparsebreg.ops import sparse_linear


class SparseLinear(SparseLayer, nn.Linear, plain=nn.Linear):
    """A linear layer that can store and compute its active weights only; made so by :meth:`from_dense` or a swap.

    Shapes as ``torch.nn.Linear``: (..., in_features) to (..., out_features). States: see :class:`SparseLayer`.
    """

    @classmethod
    def options(cls, module: nn.Linear) -> dict[str, Any]:
        dtype = module.weight.dtype
        return {
            "in_features": module.in_features,
            "out_features": module.out_features,
            "bias": module.bias is not None,
            "dtype": dtype,
        }

    @staticmethod
    def unsupported(module: nn.Linear) -> str:
        return ""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        state, parameters = self.state, self._parameters  # past nn.Module's attributes, which take longer
        if type(state) is Frozen:
            return sparse_linear(x, state.pattern, parameters["values"], parameters["bias"])
        if type(state) is Fine and x.dim():
            values = state.values(parameters["weight"], self.training)
            if values is not None:
                return sparse_linear(x, state.pattern, values, parameters["bias"], parameters["weight"])
        return super().forward(x)
