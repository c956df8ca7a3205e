"""Training methods by name: how to build each, and its default options."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import nn

import sparsebreg as sb

if TYPE_CHECKING:
    from sparsebreg.experiments.config import Config


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
Build = Callable[[nn.Module, "Config", int], tuple[torch.optim.Optimizer, Cycle]]


@dataclass(frozen=True)
class Method:
    """A training method.

    Args:
        build: makes the optimizer and what takes its steps.
        defaults: options and their defaults. One that not every method has is refused for methods without it; None: the
            option is taken and has no default.
        for_model: what a model needs otherwise.
    """

    build: Build
    defaults: dict[str, Any]
    for_model: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def bregman(self) -> bool:
        """Whether λ can be adapted to a target sparsity."""
        return "target_sparsity" in self.defaults


def _sgd(model: nn.Module, c: Config, steps: int) -> tuple[torch.optim.Optimizer, Cycle]:
    optimizer = torch.optim.SGD(model.parameters(), lr=c.lr, momentum=c.momentum, weight_decay=c.weight_decay)
    return optimizer, Plain(optimizer)


def _linbreg(model: nn.Module, c: Config, steps: int) -> tuple[torch.optim.Optimizer, Cycle]:
    sb.sparse_init_(model, density=c.init_density)
    groups = sb.param_groups(model, sb.L1(c.lam))
    optimizer = sb.LinBreg(groups, lr=c.lr, momentum=c.momentum, delta=c.delta, weight_decay=c.weight_decay)
    return optimizer, Plain(optimizer)


def _multilevel(build: Build) -> Build:
    """The method with the multilevel cycle around its optimizer."""

    def multilevel(model: nn.Module, c: Config, steps: int) -> tuple[torch.optim.Optimizer, Cycle]:
        optimizer, _ = build(model, c, steps)
        return optimizer, sb.Multilevel(model, optimizer, coarse_steps=c.coarse_steps)

    return multilevel


_LINBREG = {"momentum": 0.9, "init_density": 0.02, "target_sparsity": None}

METHODS: dict[str, Method] = {
    "sgd": Method(_sgd, {"lr": 0.05, "momentum": 0.9}),
    "linbreg": Method(_linbreg, {**_LINBREG, "lr": 1.0, "lam": 0.05}),
    "ml-linbreg": Method(
        _multilevel(_linbreg),
        {**_LINBREG, "lr": 3.0, "lam": 0.06, "coarse_steps": 29},
        # Convolutions see larger gradients, so the same step is larger for them.
        for_model={"convnet": {"lr": 1.0, "lam": 0.1, "coarse_steps": 9, "init_density": 0.06}},
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
