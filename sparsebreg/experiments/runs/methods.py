"""Training methods by name: how to build each, and its default options."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import nn

import sparsebreg as sb
from sparsebreg.optim import BregmanOptimizer
from sparsebreg.optim.groups import dense_layers
from sparsebreg.optim.initialize import DISTRIBUTIONS

#: The resolved options of a run: a ``config.Config``, which is built on this module.
Config = Any


class Cycle(Protocol):
    """What takes the steps of a run: :class:`sparsebreg.Multilevel`, or anything of its shape."""

    phase: str

    def step(self) -> Any: ...

    def state_dict(self) -> dict[str, Any]: ...

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Plain:
    """An optimizer's steps alone: every one is a fine one."""

    phase = "fine"

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> Any:
        return self.optimizer.step()

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass


#: From the dense model, the resolved options and the number of steps of the run.
Build = Callable[[nn.Module, Config, int], tuple[torch.optim.Optimizer, Cycle]]


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        build: makes the optimizer and what takes its steps.
        defaults: options and their defaults. One that not every method has is refused for methods without it; None: the
            option is taken and has no default.
        for_target: what a target sparsity needs otherwise, where λ is adapted to it.
        for_model: what a model needs otherwise.
        for_both: what a model needs otherwise where λ is adapted.
        bregman: whether a target sparsity is reached by adapting λ.
        dense: whether it trains dense weights, at first at least.
    """

    build: Build
    defaults: dict[str, Any]
    for_model: dict[str, dict[str, Any]] = field(default_factory=dict)
    bregman: bool = False
    for_target: dict[str, Any] = field(default_factory=dict)
    for_both: dict[str, dict[str, Any]] = field(default_factory=dict)
    dense: bool = False

    def options(self, model: str, target_sparsity: float | None) -> dict[str, Any]:
        """The defaults for a model and a target sparsity, if there is one."""
        if target_sparsity is None or not self.bregman:
            return {**self.defaults, **self.for_model.get(model, {})}
        # A little sparser than that, so that a λ which is far too large shows, and falls. Where every layer has a
        # target, their shares are settled already, and nothing is gained by starting further away.
        share = 0.95 if self.for_model.get(model, {}).get("per_layer") else 0.8
        start = {"init_density": round(share * (1 - target_sparsity), 12), "init_distribution": "erk"}
        own = {**self.for_model.get(model, {}), **self.for_both.get(model, {})}
        return {**self.defaults, **self.for_target, **start, **own}


def _sgd(model: nn.Module, c: Config, steps: int) -> tuple[torch.optim.Optimizer, Cycle]:
    optimizer = torch.optim.SGD(model.parameters(), lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
    return optimizer, Plain(optimizer)


def _small(model: nn.Module) -> list[str]:
    """Layers with less than one in 2000 of the weights: a pattern of their own would save nothing and cost accuracy."""
    sizes = {name: m.weight.numel() for name, m in dense_layers(model)}
    return [name for name, size in sizes.items() if 2000 * size < sum(sizes.values())]


def layer_targets(model: nn.Module, c: Config) -> dict[str, float]:
    """Target sparsities by name of layer, distributed as the start is."""
    small = _small(model)
    densities = DISTRIBUTIONS[c.init_distribution](model, 1 - c.target_sparsity, lambda m, name: name not in small)
    return {name: max(1e-3, 1 - d) for name, d in densities.items()}


def _bregman(make: Callable[..., BregmanOptimizer], *options: str) -> Build:
    """A Bregman optimizer with these options besides the common ones. Without ``coarse_steps`` every step is fine."""

    def build(model: nn.Module, c: Config, steps: int) -> tuple[torch.optim.Optimizer, Cycle]:
        own = {name: sb.NoReg() for name in _small(model)} if c.per_layer else {}
        sb.sparse_init_(model, c.init_density, lambda m, name: name not in own, distribution=c.init_distribution)
        groups = sb.param_groups(model, sb.L1(c.lam), own)
        for group in groups:
            if group["reg"].sparse:
                group["lr"] = c.lr * c.sparse_lr
        taken = {name: getattr(c, name) for name in ("lr", "weight_decay", *options)}
        optimizer = make(groups, **{name: value for name, value in taken.items() if value is not None})
        return optimizer, sb.Multilevel(model, optimizer, coarse_steps=c.coarse_steps or 0)

    return build


def _masked(make: Callable[[nn.Module, torch.optim.Optimizer, float, int], Cycle]) -> Build:
    """SGD on a pattern that ``make`` moves; called with the density and the number of steps."""

    def build(model: nn.Module, c: Config, steps: int) -> tuple[torch.optim.Optimizer, Cycle]:
        optimizer, _ = _sgd(model, c, steps)
        return optimizer, make(model, optimizer, 1 - c.target_sparsity, steps)

    return build


def _rigl(model: nn.Module, optimizer: torch.optim.Optimizer, density: float, steps: int) -> Cycle:
    sb.sparse_init_(model, density, distribution="erk")
    return sb.RigL(model, optimizer, None, stop_after=3 * steps // 4)


def _set(model: nn.Module, optimizer: torch.optim.Optimizer, density: float, steps: int) -> Cycle:
    sb.sparse_init_(model, density, distribution="erk")
    return sb.SET(model, optimizer, None, stop_after=3 * steps // 4)


def _prune(model: nn.Module, optimizer: torch.optim.Optimizer, density: float, steps: int) -> Cycle:
    return sb.Prune(model, optimizer, density, at=max(1, steps // 10))


_LINBREG = _bregman(sb.LinBreg, "delta", "momentum", "keep_momentum")
_ADABREG = _bregman(sb.AdaBreg, "delta")
_PROXSGD = _bregman(sb.ProxSGD, "momentum")
_SPARSE = {
    "init_density": 0.02,
    "init_distribution": "uniform",
    "target_sparsity": None,
    "per_layer": False,
    "ramp": 0.0,
    "sparse_lr": 1.0,
}
_SGD = {"lr": 0.05, "momentum": 0.9}
_DYNAMIC = {**_SGD, "target_sparsity": 0.95}
_WITH_NORM = ("resnet18", "vgg16", "wide_resnet28_10")
# One λ for all would wake most weights in the first layers, whose images are large: half of the time for a hundredth of
# the weights. At the start active weights are larger than dense ones by 1/√density, and under batch norm a step counts
# in proportion to the weight: hence the larger learning rate of theirs. Chosen on ResNet-18.
_NORMED = {
    "lr": 0.5,
    "sparse_lr": 4.0,
    "warmup": 0.1,
    "lam": 0.2,
    "coarse_steps": 99,
    "per_layer": True,
    "init_distribution": "uniform",
}

# A small network's weights that are active from the start stay active, whether they pay or not. Starting denser and
# putting to sleep what stays small costs half as many FLOPs again or more, and brought up to a point on the ConvNet.
_FROM_DENSER = {"init_density": 0.25, "ramp": 0.7}

METHODS: dict[str, Method] = {
    "sgd": Method(_sgd, _SGD, dense=True),
    "linbreg": Method(
        _LINBREG,
        {**_SPARSE, "momentum": 0.9, "lr": 1.0, "lam": 0.05},
        # The MLP does as well without momentum, and a step is shorter; from a λ that is far too small most weights wake
        # in the first steps, and without a warm-up it diverged. So does the ConvNet with a shorter one, and always
        # without momentum.
        for_model={"mlp": {"momentum": 0.0, "warmup": 0.2}, "convnet": {"lr": 1.5, "lam": 0.2, "warmup": 1.0}},
        bregman=True,
    ),
    "adabreg": Method(_ADABREG, {**_SPARSE, "lr": 2e-3, "lam": 0.02}, bregman=True, for_target={"lr": 4e-3}),
    "proxsgd": Method(
        _PROXSGD,
        {**_SPARSE, **_SGD, "lam": 1e-4, "init_density": 0.2},
        for_model={"convnet": {"lr": 0.1, "warmup": 0.2}},
        bregman=True,
        for_target={"lr": 0.2},
    ),
    "ml-linbreg": Method(
        _LINBREG,
        {
            **_SPARSE,
            "init_distribution": "erk",
            "momentum": 0.9,
            "keep_momentum": True,
            "lr": 3.0,
            "lam": 0.07,
            "coarse_steps": 39,
        },
        # The MLP does better, and sparser, if sleeping weights do not remember. Convolutions see larger gradients, so
        # the same step is larger for them.
        for_model={
            "mlp": {"keep_momentum": False},
            "convnet": {"lr": 1.5, "lam": 0.18, "coarse_steps": 9, "init_density": 0.08},
            **dict.fromkeys(_WITH_NORM, _NORMED),
        },
        # In the first epochs a smaller λ keeps 95 % sparsity than in the last.
        for_both={"convnet": {**_FROM_DENSER, "lam": 0.15, "weight_decay": 3e-4}}
        | {model: {"lam": 0.01} for model in _WITH_NORM},
        bregman=True,
    ),
    "ml-adabreg": Method(
        _ADABREG,
        {**_SPARSE, "lr": 2e-3, "lam": 0.02, "coarse_steps": 29},
        bregman=True,
        for_target={"lr": 6e-3, "lam": 0.05, "coarse_steps": 39},
        for_both={"convnet": {**_FROM_DENSER, "lr": 4e-3, "lam": 0.2, "coarse_steps": 9, "weight_decay": 1e-4}},
    ),
    # Sparse layers bear, and need, a larger step than dense ones. Convolutions may diverge if it is as large at first.
    "rigl": Method(_masked(_rigl), {**_DYNAMIC, "lr": 0.3}, for_model={"convnet": {"lr": 0.15, "warmup": 0.2}}),
    "set": Method(_masked(_set), {**_DYNAMIC, "lr": 0.2}),
    "prune": Method(
        _masked(_prune), {**_DYNAMIC, "lr": 0.2}, for_model={"convnet": {"lr": 0.1, "warmup": 0.2}}, dense=True
    ),
}

#: What a data set needs otherwise, where a method takes the option. CIFAR-10: as in arXiv 2602.03535.
FOR_DATA: dict[str, dict[str, Any]] = {
    "cifar10": {"epochs": 200, "augment": True, "coarse_steps": 99},
    "tiny-imagenet": {"epochs": 200, "augment": True, "coarse_steps": 99},
}


def special() -> set[str]:
    """Options that only some methods take."""
    taken = [set(m.defaults) for m in METHODS.values()]
    return set.union(*taken) - set.intersection(*taken)
