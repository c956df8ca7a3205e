"""Whether a layer becomes sparse: by a rule, by what it is predicted to cost, or by a measurement."""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from sparsebreg import backends
from sparsebreg.core.errors import SwapError, check_choice, check_real, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.lanes import LANES
from sparsebreg.nn.layer import is_channels_last, unsupported
from sparsebreg.optim.groups import dense_layers
from sparsebreg.swap import costs
from sparsebreg.swap.costs import Load

Filter = Callable[[nn.Module, str], bool]

DECISIONS = ("auto", "measure", "always")

#: Weights an output channel up to which a convolution is made sparse at any density.
SMALL = 32

#: A measurement holds for densities up to this factor away from its own.
NEAR = 1.25


@dataclass(frozen=True)
class SparsifyConfig:
    """Which layers become sparse.

    Args:
        min_sparsity: layers with a smaller fraction of zeros stay dense; in [0, 1].
        decide: "auto" keeps the layers above ``min_sparsity`` dense that are predicted to be faster so, from constants
            that come with the package or that :func:`sparsebreg.calibrate` measured on this machine. Convolutions of at
            most 32 weights an output channel (the first one of most networks) become sparse at any density: a dense one
            is hardly faster, and its output would have to be converted.
            "measure" times each layer above ``min_sparsity``, sparse and dense, and again when its density has changed
            by a quarter. Decisions then depend on the machine's mood.
            "always" makes every layer that has a sparse form sparse.
        example_input: a batch as the model is called with: a tensor, or a tuple of arguments. It is run through the
            model once, in evaluation mode, to learn what shapes the layers get. "measure" needs it; for "auto" it makes
            predictions of times in ms, which count what a call costs, of comparisons of costs per sample.

    Raises:
        TypeError, ValueError: naming the option.
    """

    min_sparsity: float = 0.8
    decide: str = "auto"
    example_input: torch.Tensor | tuple[Any, ...] | None = field(default=None, repr=False, compare=False)

    def __post_init__(self) -> None:
        check_real("min_sparsity", self.min_sparsity, low=0, high=1)
        check_choice("decide", self.decide, DECISIONS)
        if self.example_input is None and self.decide == "measure":
            raise ValueError(expected("example_input", "a batch that the model takes, for decide='measure'", None))
        if not isinstance(self.example_input, (torch.Tensor, tuple, type(None))):
            got = type(self.example_input).__name__
            raise TypeError(expected("example_input", "a tensor or a tuple of the model's arguments", got))


class Input(NamedTuple):
    """The input of a layer."""

    shape: tuple[int, ...]
    channels_last: bool


def learn_inputs(model: nn.Module, example_input: torch.Tensor | tuple[Any, ...]) -> dict[str, Input]:
    """Shapes and formats of the layers' inputs by name, from one forward pass in evaluation mode.

    Of several calls of a layer the largest counts.

    Raises:
        SwapError: if the model does not take this input.
    """
    found: dict[str, Input] = {}

    def note(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            x = args[0] if args else None
            if isinstance(x, torch.Tensor) and (name not in found or math.prod(found[name].shape) < x.numel()):
                found[name] = Input(tuple(x.shape), is_channels_last(x) or is_channels_last(module.weight))

        return hook

    layers = list(dense_layers(model))
    handles = [m.register_forward_pre_hook(note(n)) for n, m in layers]
    modes = [(m, m.training) for m in model.modules()]
    arguments = example_input if isinstance(example_input, tuple) else (example_input,)
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            model.eval()(*arguments)
    except Exception as error:  # whatever a model raises
        raise SwapError(expected("example_input", "a batch that the model takes", error)) from error
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    return found


class Decider:
    """Decides for the layers of one model; keeps what it learned, so that a run decides by the same all the way.

    Attributes:
        costs: the constants that "auto" decides by.
        inputs: what the layers get, by name, as far as known; None before the first look.
        measured: by layer name, the largest density measured as faster sparse and the least as faster dense.
    """

    def __init__(self, config: SparsifyConfig) -> None:
        self.config = config
        self.costs = costs.current()[0] if config.decide == "auto" else costs.SHIPPED
        self.inputs: dict[str, Input] | None = None
        self.measured: dict[str, tuple[float, float]] = {}
        self._lanes = self._channels_last = False

    def look(self, model: nn.Module) -> None:
        """Collects once what decisions depend on from the dense model. Raises SwapError as :func:`learn_inputs`."""
        if self.inputs is not None:
            return
        example = self.config.example_input
        known = example is not None and self.config.decide != "always"
        self.inputs = learn_inputs(model, example) if known else {}
        images = [m for m in model.modules() if isinstance(m, nn.Conv2d) and not nn.parameter.is_lazy(m.weight)]
        # A sparse convolution hands its output to the next one as it is; a lone one converts to and fro.
        self._lanes = sum(not unsupported(m) for m in images) > 1 and backends.current().lanes
        self._channels_last = any(is_channels_last(m.weight) for m in images)

    def _known(self, name: str, module: nn.Module) -> tuple[tuple[int, ...] | None, str, str]:
        """The shape of the layer's input, and how it would be computed, sparse and dense."""
        shape, last = (self.inputs or {}).get(name, (None, self._channels_last))
        if not isinstance(module, nn.Conv2d):
            return shape, "sparse", "dense"
        lanes = self._lanes and (shape is None or (len(shape) == 4 and shape[0] >= LANES))
        return shape, "lanes" if lanes else "sparse", "channels_last" if last else "dense"

    def least_sparsity(self, name: str, module: nn.Module) -> float:
        """The sparsity from which on the layer is computed sparsely, by present knowledge."""
        if self.config.decide == "always":
            return 0.0
        if self.config.decide == "measure":  # above 1: not yet measured as faster
            return max(self.config.min_sparsity, 1 - NEAR * self.measured.get(name, (-1.0, math.inf))[0])
        if self.at_any_density(module):
            return 0.0
        shape, *ways = self._known(name, module)
        load = Load.of(module, shape)
        density = load.break_even(self.costs, *ways) if load else None
        return max(self.config.min_sparsity, 0.0 if density is None else 1 - density)

    def at_any_density(self, module: nn.Module) -> bool:
        """Whether the layer becomes sparse even with all of its weights active."""
        return self.config.decide == "auto" and _small(module)

    def __call__(self, name: str, module: nn.Module, pattern: SparsePattern) -> tuple[bool, str]:
        """Whether a layer that has a sparse form becomes sparse, and why."""
        sparsity, least = 1 - pattern.density, self.config.min_sparsity
        if self.config.decide == "always":
            return True, "decide='always'"
        if self.at_any_density(module):
            return True, f"at most {SMALL} weights an output channel"
        if sparsity < least:
            return False, f"sparsity {sparsity:.2%} is below {least:.2%}"
        if self.config.decide == "measure":
            return self._measure(name, module, pattern)
        shape, sparse, dense = self._known(name, module)
        threshold, load = self.least_sparsity(name, module), Load.of(module, shape)
        if load is not None and load.positions is not None:
            a = load.milliseconds(self.costs, sparse, pattern.nnz)
            b = load.milliseconds(self.costs, dense, load.weights)
            return sparsity >= threshold, f"{a:.3g} ms sparse, {b:.3g} ms dense predicted"
        if sparsity < threshold:
            return False, f"sparsity {sparsity:.2%} is below {threshold:.2%}, from where on sparse is predicted faster"
        return True, f"sparsity of at least {threshold:.2%}"

    def _measure(self, name: str, module: nn.Module, pattern: SparsePattern) -> tuple[bool, str]:
        shape, *ways = self._known(name, module)
        if shape is None:
            return False, "the example input does not pass through it"
        sparse_to, dense_from = self.measured.get(name, (-1.0, math.inf))
        if pattern.density <= NEAR * sparse_to:
            return True, f"measured faster sparse at {sparse_to:.2%} density"
        if pattern.density >= dense_from / NEAR:
            return False, f"measured faster dense at {dense_from:.2%} density"
        sparse, dense = costs.measure(module, pattern, shape, *ways)
        faster = sparse < dense
        if faster:
            sparse_to = pattern.density
        else:
            dense_from = pattern.density
        self.measured[name] = sparse_to, dense_from
        return faster, f"{sparse:.3g} ms sparse, {dense:.3g} ms dense measured"

    def state_dict(self) -> dict[str, Any]:
        """Plain data: a resumed run decides as the one that was saved, whatever has been calibrated since."""
        return {
            "costs": {kind: {how: list(t) for how, t in table.items()} for kind, table in self.costs.items()},
            "measured": {name: list(pair) for name, pair in self.measured.items()},
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ValueError for what :meth:`state_dict` did not make; nothing is changed then."""
        try:
            found = costs.checked(state["costs"])
            measured = {str(n): (float(a), float(b)) for n, (a, b) in state["measured"].items()}
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(expected("decisions", "costs and measurements as saved", repr(error))) from error
        self.costs, self.measured = found, measured


def _small(module: nn.Module) -> bool:
    weight = module.weight
    return weight.dim() == 4 and len(weight) >= 16 and weight[0].numel() <= SMALL
