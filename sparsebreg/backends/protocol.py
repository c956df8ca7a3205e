"""The interface of a backend. Its callers in ``ops`` check shapes, dtypes and devices."""

import functools
from enum import IntEnum
from typing import NamedTuple, Protocol

import torch

from sparsebreg.core.pattern import SparsePattern

Grads = tuple[torch.Tensor | None, torch.Tensor | None, torch.Tensor | None]


class Geometry(NamedTuple):
    """How a 2-D convolution walks over its input; pairs are (vertical, horizontal)."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1

    def sizes(self, size: tuple[int, int], kernel: tuple[int, int]) -> tuple[int, int]:
        """(OH, OW) for an input of (H, W) and a kernel of (KH, KW)."""
        high, wide = (
            (size[i] + 2 * self.padding[i] - self.dilation[i] * (kernel[i] - 1) - 1) // self.stride[i] + 1
            for i in (0, 1)
        )
        return high, wide

    #: The same for plain numbers, kept.
    output_size = functools.lru_cache(maxsize=1024)(sizes)

    def is_product(self, kernel: tuple[int, int], grad_y: torch.Tensor) -> bool:
        """Whether the gradient of the weight is a matrix product of grad_y (channels_last) as it lies in memory."""
        return tuple(kernel) == (1, 1) and self.padding == (0, 0) and self.groups == 1 and not grad_y.is_contiguous()


class Layout(IntEnum):
    """How a tensor lies in memory: row-major, in the lane layout (a ``LaneTensor``), channels_last."""

    PLAIN = 0
    LANES = 1
    CHANNELS_LAST = 2


#: The memory format of what is not in the lane layout.
FORMATS = {Layout.PLAIN: torch.contiguous_format, Layout.CHANNELS_LAST: torch.channels_last}


class Backend(Protocol):
    """Linear: x (N, in), grad_y (N, out). Conv2d: x (N, IC, H, W), grad_y (N, OC, OH, OW). values (nnz,), bias (rows,).

    All tensors are contiguous (images in the plain or the channels_last format), on the CPU, float32 or float64, of one
    dtype; x and grad_y may be lane tensors where ``lanes`` says that the backend reads them. ``*_backward`` returns
    (grad_x, grad_values, grad_bias), each None where ``needs`` says it is not wanted; x is None if grad_values is not.
    ``layout`` is that of y.
    """

    name: str
    lanes: bool

    def linear_forward(
        self, pattern: SparsePattern, x: torch.Tensor, values: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor: ...

    def linear_backward(
        self,
        pattern: SparsePattern,
        grad_y: torch.Tensor,
        x: torch.Tensor | None,
        values: torch.Tensor,
        needs: tuple[bool, bool, bool],
    ) -> Grads: ...

    def weight_grad(self, grad_y: torch.Tensor, x: torch.Tensor) -> torch.Tensor | None:
        """``grad_yᵀ x``, maybe pending, where that is faster than torch makes it; else None. Plain tensors both."""
        ...

    def conv2d_forward(
        self,
        pattern: SparsePattern,
        x: torch.Tensor,
        values: torch.Tensor,
        bias: torch.Tensor | None,
        geometry: Geometry,
        layout: Layout,
        training: bool,
    ) -> torch.Tensor: ...

    def conv2d_backward(
        self,
        pattern: SparsePattern,
        grad_y: torch.Tensor,
        x: torch.Tensor | None,
        values: torch.Tensor,
        geometry: Geometry,
        x_shape: torch.Size,
        needs: tuple[bool, bool, bool],
    ) -> Grads: ...

    def conv2d_weight_grad(
        self,
        grad_y: torch.Tensor,
        x: torch.Tensor,
        shape: tuple[int, ...],
        geometry: Geometry,
        needs: tuple[bool, bool],
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Gradients of a whole weight of that shape and of the bias, where that is faster than torch is; else None.

        ``needs`` says whether grad_x, which is not made here, and grad_bias are wanted.
        """
        ...
