"""The truth that the other backends are tested against: plain torch on the dense weight."""

import torch
from torch.nn import functional as F

from sparsebreg.backends.protocol import FORMATS, Geometry, Grads
from sparsebreg.core.pattern import SparsePattern

#: In the tensors' own dtype under autocast, too, as the kernels of the other backends.
_exact = torch.autocast("cpu", enabled=False)


class ReferenceBackend:
    name = "reference"
    lanes = False

    @_exact
    def linear_forward(self, pattern, x, values, bias):
        return F.linear(x, pattern.scatter(values), bias)

    @_exact
    def linear_backward(self, pattern, grad_y, x, values, needs) -> Grads:
        return (
            grad_y @ pattern.scatter(values) if needs[0] else None,
            pattern.gather(grad_y.t() @ x) if needs[1] else None,
            grad_y.sum(0) if needs[2] else None,
        )

    def weight_grad(self, grad_y, x):
        return None

    def conv2d_weight_grad(self, grad_y, x, shape, geometry, needs):
        return None

    @_exact
    def conv2d_forward(self, pattern, x, values, bias, geometry, layout, training):
        y = F.conv2d(x, pattern.scatter(values), bias, *geometry)
        return y.contiguous(memory_format=FORMATS[layout])

    @_exact
    def conv2d_backward(
        self,
        pattern: SparsePattern,
        grad_y: torch.Tensor,
        x: torch.Tensor | None,
        values: torch.Tensor,
        geometry: Geometry,
        x_shape: torch.Size,
        needs: tuple[bool, bool, bool],
    ) -> Grads:
        weight = pattern.scatter(values)
        arguments = (geometry.stride, geometry.padding, geometry.dilation, geometry.groups)
        return (
            torch.nn.grad.conv2d_input(x_shape, weight, grad_y, *arguments) if needs[0] else None,
            pattern.gather(torch.nn.grad.conv2d_weight(x, weight.shape, grad_y, *arguments)) if needs[1] else None,
            grad_y.sum((0, 2, 3)) if needs[2] else None,
        )


def load() -> ReferenceBackend:
    return ReferenceBackend()
