"""What the benchmark times: parts of layers' training steps and networks' whole ones; dense, sparse, other packages."""

import copy
import importlib.metadata
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb
from sparsebreg import backends, lanes
from sparsebreg.core.errors import RunError, expected
from sparsebreg.experiments.bench.shapes import NETWORKS, SUITES
from sparsebreg.models import MODELS
from sparsebreg.nn.layer import adopt

#: Parts of a layer's training step; "step" is forward and backward, "swap" a freeze and a thaw with optimizer state.
#: "grad_weight" is the gradient of all weights of a convolution, as in a fine step.
PARTS = ("forward", "grad_x", "grad_values", "step", "swap", "grad_weight")

#: Packages that are measured, too, where they are installed.
PEERS = ("sparseprop", "sparselab")

#: Implementations that are not this package's; the first is the baseline.
FOREIGN = ("torch", "torch.sparse", *PEERS)

#: Coarse steps of the cycles whose mean step is told.
CYCLES = (9, 99)

#: Largest error of a result as a part of its largest entry; sums of up to 131072 products in float32.
TOLERANCE = 1e-3

Step = Callable[[], Any]
Layout = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """Something that is done in several ways, which are timed in turns."""

    suite: str
    layer: str
    part: str
    batch: int

    def __str__(self) -> str:
        return f"{self.layer} {self.part} batch={self.batch}"


@dataclass(frozen=True)
class Candidate:
    """One way to do it. Of several variants of an implementation the fastest counts; "torch" is the dense baseline.

    ``prepare()`` verifies the result and returns the step to be timed; it raises RunError for a wrong result.
    """

    implementation: str
    density: float | None
    prepare: Callable[[], Step]
    variant: str = ""

    def __str__(self) -> str:
        words = (self.implementation, self.variant, "" if self.density is None else f"density={self.density:g}")
        return " ".join(filter(None, words))


def installed() -> dict[str, str]:
    """Versions of the peers that can be imported; they are loaded, so that their threads can be limited."""
    found = {}
    for name in PEERS:
        try:
            importlib.import_module(name)
        except ImportError:
            continue
        found[name] = importlib.metadata.version(name)
    return found


def active(shape: Sequence[int], density: float) -> int:
    """Active weights at this density; at least one."""
    return max(1, round(density * math.prod(shape)))


def _mask(shape: Sequence[int], density: float) -> torch.Tensor:
    mask = torch.zeros(math.prod(shape), dtype=torch.bool)
    mask[torch.randperm(len(mask))[: active(shape, density)]] = True
    return mask.view(*shape)


def _plain(t: torch.Tensor) -> torch.Tensor:
    return t.detach().plain if isinstance(t, lanes.LaneTensor) else t.detach()


def _channels_last(t: torch.Tensor) -> torch.Tensor:
    return t.contiguous(memory_format=torch.channels_last)


def _keep(t: Any) -> Any:
    return t


def _step(module: nn.Module, x: torch.Tensor, grad: torch.Tensor, part: str) -> Step:
    """The part of a training step of ``module``, whose first parameter is its weight.

    It returns (y,), (grad_x,) or (grad_values,), also for grad_weight, or y and the gradients of x and all parameters.
    """
    weight, *others = module.parameters()
    x = x.detach().requires_grad_(part in ("grad_x", "step"))
    weight.requires_grad_(part in ("grad_values", "grad_weight", "step"))
    for p in others:
        p.requires_grad_(part == "step")
    if part == "forward":
        return lambda: (module(x),)
    if part == "step":

        def step():
            y = module(x)
            return y, *torch.autograd.grad(y, (x, weight, *others), grad)

        return step
    y = module(x)
    return lambda: torch.autograd.grad(y, x if part == "grad_x" else weight, grad, retain_graph=True)


def _prepare(
    case: Case,
    density: float | None,
    make: Callable[[nn.Module, torch.Tensor | None], nn.Module],
    layout: Layout = _keep,
    values: Callable[[nn.Module, torch.Tensor], torch.Tensor] | None = None,
) -> Step:
    """The step of a layer, its results compared with those of the masked dense layer.

    Args:
        make: the layer to be timed from a masked dense one and its mask, neither of which it changes.
        layout: puts input and gradient into the layout that they have in a network.
        values: the entries of the dense layer's gradient that the made layer's weight has; default: not compared.
    """
    shape = SUITES[case.suite][case.layer]
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        dense = shape.module()
        mask = None
        if density is not None:
            mask = _mask(shape.weight, density)
            dense.weight.detach().mul_(mask)
        x = torch.randn(shape.sizes(case.batch))
        grad = torch.randn_like(dense(x).detach())
    layer = make(dense, mask)
    step = _step(layer, layout(x), layout(grad), case.part)
    right = [t.detach() for t in _step(copy.deepcopy(dense), x, grad, case.part)()]
    found = [_plain(t) for t in step()]
    if case.part in ("grad_values", "grad_weight", "step"):
        at = 2 if case.part == "step" else -1
        if values is not None:
            right[at] = values(layer, right[at])
        else:
            del right[at:], found[at:]
    for a, b in zip(found, right, strict=True):
        error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-30))
        if not error <= TOLERANCE:  # NaN, too
            raise RunError(expected("result", "that of the dense layer", f"one with a relative error of {error:.2g}"))
    return step


def _sparse(dense: nn.Module, mask: torch.Tensor | None) -> nn.Module:
    cls = sb.nn.SparseLinear if isinstance(dense, nn.Linear) else sb.nn.SparseConv2d
    return cls.from_dense(copy.deepcopy(dense), mask)


def _fine(dense: nn.Module, mask: torch.Tensor | None) -> nn.Module:
    layer = adopt(copy.deepcopy(dense))
    layer.begin_fine(None, 1.0)
    return layer


def _gathered(layer: nn.Module, grad: torch.Tensor) -> torch.Tensor:
    return layer.pattern.gather(grad)


def _same(layer: nn.Module, grad: torch.Tensor) -> torch.Tensor:
    return grad


class _TorchSparse(nn.Module):
    """torch's own CSR product; a forward pass only."""

    def __init__(self, dense: nn.Linear) -> None:
        super().__init__()
        self.bias = nn.Parameter(dense.bias.detach().clone())
        self.csr = dense.weight.detach().to_sparse_csr()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.sparse.mm(self.csr, x.t()).t() + self.bias


def _sparselab(dense: nn.Module, mask: torch.Tensor | None) -> nn.Module:
    import sparselab

    layer = sparselab.SparseLinear(dense.in_features, dense.out_features)
    # Its only way to a given pattern.
    layer._csr = sparselab.PaddedCSR.from_dense(dense.weight.detach())
    layer._values = nn.Parameter(torch.from_numpy(np.asarray(layer._csr.values)))
    layer.bias.data.copy_(dense.bias.detach())
    return layer


def _sparseprop(**options: Any) -> Callable[[nn.Module, torch.Tensor | None], nn.Module]:
    def make(dense: nn.Module, mask: torch.Tensor | None) -> nn.Module:
        from sparseprop import modules

        cls = modules.SparseLinear if isinstance(dense, nn.Linear) else modules.SparseConv2d
        return cls.from_dense(copy.deepcopy(dense), **options)

    return make


def _swap(case: Case, density: float) -> Step:
    """A freeze and a thaw of one layer with the state of its optimizer."""
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(0)
        model = nn.Sequential(SUITES[case.suite][case.layer].module())
        weight = model[0].weight
        weight.detach().mul_(_mask(weight.shape, density))
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.1)), lr=0.1, momentum=0.9)
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()
    optimizer.zero_grad()
    before, config = weight.detach().clone(), sb.SparsifyConfig(decide="always")

    def step():
        sb.sparsify_(model, config, optimizer=optimizer)
        sb.densify_(model, optimizer)

    step()
    if not torch.equal(before, model[0].weight.detach()):
        raise RunError(expected("result", "the weight of before the swap", "another one"))
    return step


class _Training:
    """Training steps of a model on one random batch; with a density, by ML-LinBreg."""

    def __init__(self, case: Case, density: float | None, coarse_steps: int, layout: Layout) -> None:
        shape = NETWORKS[case.layer]
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(0)
            self.model = MODELS[case.layer](shape)
            if density is not None:
                sb.sparse_init_(self.model, density)
            self.x = layout(torch.randn(case.batch, *shape))
            self.y = torch.randint(10, (case.batch,))
        if density is None:
            if layout is _channels_last:
                self.model.to(memory_format=torch.channels_last)
            self.optimizer = torch.optim.SGD(self.model.parameters(), lr=1e-3, momentum=0.9)
            self.cycle = None
        else:
            # A small step: the density stays what it is.
            self.optimizer = sb.LinBreg(sb.param_groups(self.model, sb.L1(0.1)), lr=1e-4, momentum=0.9)
            self.cycle = sb.Multilevel(self.model, self.optimizer, coarse_steps)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        F.cross_entropy(self.model(self.x), self.y).backward()
        (self.cycle or self.optimizer).step()


def _coarse(case: Case, density: float) -> Step:
    step = _Training(case, density, 10**9, _keep)
    step()  # the fine one, and the freeze
    return step


def _pair(case: Case, density: float) -> Step:
    step = _Training(case, density, 1, _keep)

    def pair():
        step()
        step()

    return pair


def candidates(case: Case, densities: Sequence[float], peers: Sequence[str] = ()) -> list[Candidate]:
    """All ways to do what the case says: first the baseline, dense torch in each of its memory formats.

    The baseline of a swap is the training step of the dense layer. Of a network, "coarse" is a coarse step and "pair" a
    cycle of a fine and a coarse one with its freeze and thaw; see :func:`derived`.
    """
    out = []

    def add(implementation: str, density: float | None, prepare: Callable[..., Step], *args: Any, variant: str = ""):
        out.append(Candidate(implementation, density, lambda: prepare(*args), variant))

    has_lanes = backends.current().lanes and case.batch >= lanes.LANES
    formats = (
        {"": _keep} if case.suite == "linear" or case.layer == "mlp" else {"": _keep, "channels_last": _channels_last}
    )
    if case.suite == "network":
        for variant, layout in formats.items():
            add("torch", None, _Training, case, None, 0, layout, variant=variant)
        for d in densities:
            add("coarse", d, _coarse, case, d)
            add("pair", d, _pair, case, d)
        return out
    baseline = Case(case.suite, case.layer, "step", case.batch) if case.part == "swap" else case
    for variant, layout in formats.items():
        kind = torch.channels_last if variant else torch.preserve_format
        make = lambda dense, mask, kind=kind: copy.deepcopy(dense).to(memory_format=kind)  # noqa: E731
        add("torch", None, _prepare, baseline, None, make, layout, _same, variant=variant)
    if case.suite == "norm":
        if has_lanes:
            add("lanes", None, _prepare, case, None, lambda m, _: copy.deepcopy(m), lanes.from_plain, _same)
        return out
    if case.part == "grad_weight":  # the same at any density
        if has_lanes:
            add("lanes", None, _prepare, case, None, _fine, lanes.from_plain, _same)
        return out
    for d in densities:
        if case.part == "swap":
            add("sparse", d, _swap, case, d)
            continue
        add("sparse", d, _prepare, case, d, _sparse, _keep, _gathered)
        if case.suite == "conv" and has_lanes:
            add("lanes", d, _prepare, case, d, _sparse, lanes.from_plain, _gathered)
        if case.suite == "linear" and case.part == "forward":
            add("torch.sparse", d, _prepare, case, d, lambda dense, mask: _TorchSparse(dense))
        if case.part not in ("forward", "step"):  # theirs come together
            continue
        if "sparseprop" in peers and case.suite == "linear":
            add("sparseprop", d, _prepare, case, d, _sparseprop())
        elif "sparseprop" in peers:
            for over in (False, True):
                make = _sparseprop(vectorizing_over_on=over)
                add("sparseprop", d, _prepare, case, d, make, variant="over_on" if over else "over_batch")
        if "sparselab" in peers and case.suite == "linear":
            add("sparselab", d, _prepare, case, d, _sparselab)
    return out


def derived(
    times: dict[tuple[str, float | None], tuple[str, np.ndarray]],
) -> dict[tuple[str, float | None], tuple[str, np.ndarray]]:
    """Of a network's coarse steps and pairs: fine steps (with freeze and thaw), and the mean step of longer cycles."""
    out = {k: v for k, v in times.items() if k[0] != "pair"}
    for (name, density), (_, pair) in times.items():
        if name == "pair":
            coarse = times["coarse", density][1]
            fine = np.maximum(pair - coarse, 0.01 * pair)  # a difference of times may come out below zero
            out["fine", density] = "", fine
            for m in CYCLES:
                out[f"cycle m={m}", density] = "", (m * coarse + fine) / (m + 1)
    return out


@dataclass(frozen=True)
class Work:
    """Floating-point operations over the active weights and over all, and bytes that have to cross the memory bus."""

    useful: float | None
    dense: float | None
    bytes: float | None


def work(case: Case, density: float | None) -> Work:
    """What a candidate has to do at least; None where that is not counted.

    A product is 2 FLOPs per weight and position. Bytes (float32, int32 index): each product reads two and writes one of
    input, output and values, and reads the index; batch norm with ReLU reads or writes its tensor eight times.
    """
    if case.suite == "network" or case.part == "swap":
        return Work(None, None, None)
    shape = SUITES[case.suite][case.layer]
    if case.suite == "norm":
        return Work(None, None, 8 * 4 * math.prod(shape.sizes(case.batch)))
    weights = math.prod(shape.weight)
    nnz = weights if density is None else active(shape.weight, density)
    positions, products = shape.positions(case.batch), 3 if case.part == "step" else 1
    images = math.prod(shape.sizes(case.batch)) + shape.weight[0] * positions
    index = 0 if density is None else nnz
    return Work(
        2.0 * products * nnz * positions, 2.0 * products * weights * positions, 4.0 * products * (images + nnz + index)
    )
