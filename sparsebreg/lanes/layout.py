"""The lane layout itself: how a batch is packed into blocks of 16 samples, and back."""

import torch

from sparsebreg.core import memory
from sparsebreg.core.extension import native
from sparsebreg.core.profiling import labelled

#: Samples side by side in a block, whatever the instruction set.
LANES = 16

#: The dtypes that kernels compute in.
FLOATS = (torch.float32, torch.float64)


def blocks(n: int) -> int:
    return -(-n // LANES)


@labelled("pack")
def pack(plain: torch.Tensor) -> torch.Tensor:
    """(N, ...) contiguous to (ceil(N / 16), ..., 16); the padding lanes are zero."""
    n, rest = plain.shape[0], tuple(plain.shape[1:])
    if plain.dtype not in FLOATS:  # masks and indices
        filled = torch.zeros((blocks(n) * LANES, *rest), dtype=plain.dtype)
        filled[:n] = plain
        return filled.view(-1, LANES, *rest).movedim(1, -1).contiguous()
    packed = memory.empty((blocks(n), *rest, LANES), plain.dtype)
    if plain.numel():
        native().repack(True, n, 1, plain[0].numel(), plain.detach().numpy(), packed.numpy(), torch.get_num_threads())
    return packed


@labelled("unpack")
def unpack(packed: torch.Tensor, n: int) -> torch.Tensor:
    """The other way: (ceil(n / 16), ..., 16) to (n, ...)."""
    rest = tuple(packed.shape[1:-1])
    if packed.dtype not in FLOATS:
        return packed.movedim(-1, 1).reshape(-1, *rest)[:n].contiguous()
    plain = memory.empty((n, *rest), packed.dtype)
    if plain.numel():
        native().repack(False, n, 1, plain[0].numel(), packed.numpy(), plain.numpy(), torch.get_num_threads())
    return plain
