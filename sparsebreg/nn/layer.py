"""The life of a layer whose weight may be sparse: its states, its transitions, and what all kinds share."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import nn

from sparsebreg import ops
from sparsebreg.core.errors import SwapError, expected
from sparsebreg.core.pattern import SparsePattern

#: The sparse layer of every kind of dense layer that has one.
KINDS: dict[type[nn.Module], type[SparseLayer]] = {}


class Fine:
    """State "fine": the pattern that a layer computes output and grad_x over while its weight gets a full gradient.

    The pattern is that of the last static phase, or a wider one of the cycle, while the nonzeros stay inside of it;
    where they do not, it is made anew. In training the values are those that the optimizer's step has gathered, unless
    something wrote to the weight since. (A write to ``weight.data``, which torch does not report, counts from the next
    step on.)

    Attributes:
        pattern: or None, before the first one is made.
        max_density: from which on the layer computes densely.
    """

    def __init__(self, pattern: SparsePattern | None, max_density: float) -> None:
        self.pattern, self.max_density = pattern, max_density
        #: Of the latest step: values, or None where a nonzero was outside; and of which pattern and weight.
        self._kept: tuple[torch.Tensor | None, SparsePattern, int, int] | None = None

    def most(self, weight: torch.Tensor) -> int:
        return int(self.max_density * weight.numel())

    def keep(self, weight: torch.Tensor, values: torch.Tensor | None) -> None:
        """Stores the weight's values on the pattern; None: the pattern does not hold all nonzeros."""
        self._kept = values, self.pattern, weight._version, weight.data_ptr()

    def _still(self, weight: torch.Tensor) -> bool:
        """Whether the stored values belong to the present weight and pattern."""
        if self._kept is None:
            return False
        _, pattern, version, place = self._kept
        return pattern is self.pattern and version == weight._version and place == weight.data_ptr()

    def kept(self, weight: torch.Tensor) -> torch.Tensor | None:
        """The values that the latest step has gathered; None where they do not hold all nonzeros of the weight."""
        return self._kept[0] if self._still(weight) else None

    def outgrown(self, weight: torch.Tensor) -> bool:
        """Whether the latest step left nonzeros outside of the pattern."""
        return self._still(weight) and self._kept[0] is None

    @torch.compiler.disable
    def values(self, weight: torch.Tensor, training: bool) -> torch.Tensor | None:
        """The weight on an up-to-date pattern; None where it is not sparse enough."""
        dense = weight.detach().contiguous()
        if self.pattern is not None and self.pattern.nnz <= self.most(weight):
            found = self._kept[0] if training and self._still(weight) else self.pattern.gather_all(dense)
            if found is not None:
                return found
        self.pattern = SparsePattern.of_at_most(dense, self.most(weight))
        return None if self.pattern is None else self.pattern.gather(dense)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has a weight of its own


class Frozen:
    """State "sparse": the pattern of a layer whose parameter is ``values``.

    Attributes:
        weight: the dense parameter, without its numbers: the very same comes back at the thaw. None if there was none.
        channels_last: whether the dense weight was in that memory format, and with it the layer's output.
        lanes: whether the output may be a lane tensor, since the layers around compute on it.
        unpacked: counts the operations of the model that had to unpack a lane tensor, by name.
    """

    def __init__(self, pattern: SparsePattern, weight: nn.Parameter | None, channels_last: bool) -> None:
        self.pattern, self.weight, self.channels_last = pattern, weight, channels_last
        self.lanes = False
        self.unpacked: Counter[str] | None = None


class SparseLayer(nn.Module):
    """A layer of torch whose weight can be frozen to its active entries, and thawed. Not for use by itself.

    It is one object for all of its life, and is in one of three states:

                  begin_fine                  freeze
          dense --------------> fine ------------------+
          |  ^                   |                     v
          |  +------ end_fine ---+                  sparse
          +---------------- freeze --------------->    |
             ^                                         |
             +------------------ thaw -----------------+

    - dense: torch's own layer; ``weight`` is a parameter.
    - fine: the same parameters; computed over the nonzero weights, with a full gradient. See :class:`Fine`.
    - sparse: the parameter ``values`` holds the active weights, in the order of ``pattern``; see :class:`Frozen`.
      ``weight`` is made of them at every access: gradients of it reach ``values``, and writing to it changes nothing.

    ``state_dict`` is that of the dense layer (``weight``, ``bias``) in every state, so checkpoints go both ways.
    """

    plain: type[nn.Module]  # torch's class
    state: Fine | Frozen | None = None

    def __init_subclass__(cls, plain: type[nn.Module] | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if plain is not None:
            cls.plain = plain
            KINDS[plain] = cls

    @property
    def frozen(self) -> bool:
        return type(self.state) is Frozen

    @property
    def fine(self) -> bool:
        return type(self.state) is Fine

    @property
    def weight(self) -> torch.Tensor:
        if self.frozen:
            return ops.scatter(self._parameters["values"], self.state.pattern)
        return nn.Module.__getattr__(self, "weight")

    @property
    def pattern(self) -> SparsePattern | None:
        return None if self.state is None else self.state.pattern

    @property
    def density(self) -> float:
        """Active weights as a fraction of all."""
        return 1.0 if self.pattern is None else self.pattern.density

    def begin_fine(self, pattern: SparsePattern | None, max_density: float) -> None:
        self.state = Fine(pattern, max_density)

    def end_fine(self) -> None:
        self.state = None

    def freeze(self, pattern: SparsePattern, values: torch.Tensor | None = None, keep_grad: bool = True) -> None:
        """From dense or fine to sparse. ``values``: the weight on the pattern, where it is known."""
        weight = self._parameters["weight"]
        values = pattern.gather(weight) if values is None else values
        grad = pattern.gather(weight.grad) if keep_grad and weight.grad is not None else None
        self._become_sparse(Frozen(pattern, weight, is_channels_last(weight)), values)
        self.values.grad = grad
        weight.grad = None
        weight.data = weight.data.new_empty(0)  # the memory is free until the thaw

    def _become_sparse(self, state: Frozen, values: torch.Tensor) -> None:
        requires_grad = self._parameters["weight"].requires_grad
        self._exchange("weight", "values", nn.Parameter(values, requires_grad=requires_grad))
        self.state = state

    def _exchange(self, old: str, new: str, parameter: nn.Parameter) -> None:
        """Puts a parameter in the place of another, in the same order: optimizers count on it."""
        renamed = [(new, parameter) if name == old else (name, p) for name, p in self._parameters.items()]
        self._parameters.clear()
        self._parameters.update(renamed)

    def thaw(self, keep_grad: bool = True) -> nn.Parameter:
        """From sparse to dense; returns the weight."""
        state, values = self.state, self._parameters["values"]
        dense = state.pattern.scatter(values)
        if state.channels_last:
            # Not contiguous(): with one input channel that would keep the plain strides, which tell torch otherwise.
            dense = dense.to(memory_format=torch.channels_last)
        grad = state.pattern.scatter(values.grad) if keep_grad and values.grad is not None else None
        weight = nn.Parameter(dense) if state.weight is None else state.weight
        weight.data = dense
        weight.requires_grad_(values.requires_grad)
        weight.grad = grad
        self._exchange("values", "weight", weight)
        self.state = None
        return weight

    @classmethod
    def options(cls, module: nn.Module) -> dict[str, Any]:
        """The constructor arguments of torch's class for a layer like ``module``."""
        raise NotImplementedError

    @classmethod
    def from_dense(cls, m: nn.Module, mask: torch.Tensor | None = None) -> SparseLayer:
        """The sparse form of a dense layer; the bias parameter is shared.

        Args:
            m: the layer; it is not changed.
            mask: boolean, of the weight's shape; the active weights. Default: the nonzero ones. Weights outside are
                dropped.

        Raises:
            SwapError: for a layer without a sparse form (padding modes other than zeros, for one). TypeError,
            ValueError: for a mask of another dtype or shape.
        """
        if not isinstance(m, cls.plain):
            raise TypeError(expected("m", f"a torch.nn.{cls.plain.__name__}", type(m).__name__))
        if why := unsupported(m):
            raise SwapError(f"m: {why}")
        if mask is None:
            pattern = SparsePattern.from_nonzeros(m.weight)
        elif not isinstance(mask, torch.Tensor) or mask.shape != m.weight.shape:
            wanted = f"shape {tuple(m.weight.shape)}"
            raise ValueError(expected("mask", wanted, tuple(getattr(mask, "shape", ()))))
        else:
            pattern = SparsePattern.from_mask(mask)
        return cls.over(m, pattern)

    @classmethod
    def over(cls, m: nn.Module, pattern: SparsePattern) -> SparseLayer:
        """As :meth:`from_dense`, for a pattern that is known already."""
        layer = cls(**cls.options(m), device="meta")
        layer.bias = m.bias
        layer._parameters["weight"].requires_grad_(m.weight.requires_grad)
        layer._become_sparse(Frozen(pattern, None, is_channels_last(m.weight)), pattern.gather(m.weight))
        return layer.train(m.training)

    def to_dense(self) -> nn.Module:
        """A dense layer with the same weights; the bias parameter is shared."""
        module = self.plain(**self.options(self), device="meta")
        parameter = self._parameters["values" if self.frozen else "weight"]
        module.weight = nn.Parameter(self.weight.detach().clone(), requires_grad=parameter.requires_grad)
        module.bias = self.bias
        return module.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self.frozen:
            return super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        destination[prefix + "weight"] = weight if keep_vars else weight.detach()
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        rest = strict, missing_keys, unexpected_keys, error_msgs
        if not self.frozen:
            return super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, *rest)
        known = {name: prefix + name for name in (["weight"] if self.bias is None else ["weight", "bias"])}
        found = {name: state_dict[key] for name, key in known.items() if key in state_dict}
        if strict:
            missing_keys += [known[name] for name in known.keys() - found.keys()]
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known.values()]
        pattern, shapes = self.state.pattern, {"weight": self.state.pattern.shape, "bias": (self.state.pattern.rows,)}
        problems = [
            expected(known[name], f"shape {shapes[name]}", tuple(t.shape))
            for name, t in found.items()
            if tuple(t.shape) != shapes[name]
        ]
        if "weight" in found and not problems:
            gathered = pattern.gather(found["weight"])
            if outside := int(found["weight"].count_nonzero()) - int(gathered.count_nonzero()):
                got = f"{outside} other weights (densify the model first)"
                problems = [expected(known["weight"], "zeros outside of the frozen pattern", got)]
        error_msgs += problems
        if problems:
            return
        with torch.no_grad():
            if "weight" in found:
                self.values.copy_(gathered)
            if "bias" in found:
                self.bias.copy_(found["bias"])

    def extra_repr(self) -> str:
        p = self.pattern
        return super().extra_repr() + ("" if p is None else f", nnz={p.nnz} of {p.rows * p.cols} ({p.density:.2%})")


def is_channels_last(weight: torch.Tensor) -> bool:
    """Whether the strides say channels_last; with one input channel or a 1x1 kernel they may fit both formats."""
    if weight.dim() != 4 or not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    return not weight.is_contiguous() or (weight.shape[1] == 1 and weight.stride(1) == 1 < weight[0, 0].numel())


def unsupported(module: nn.Module) -> str:
    """Why this module has no sparse form; an empty string where it has one."""
    kind = KINDS.get(plain_class(module))
    if kind is None:
        return f"{type(module).__name__} has no sparse form"
    if "forward" in module.__dict__:
        return "its forward was replaced"
    weight = module._parameters.get("weight")
    if weight is None:
        return "its weight is not a plain parameter (pruned or parametrized)"
    if weight.dtype not in (torch.float32, torch.float64):
        return f"weights of dtype {weight.dtype} are not supported"
    if weight.device.type != "cpu":
        return f"weights on {weight.device} are not supported"
    return kind.unsupported(module)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The module's class as the user knows it."""
    return module.plain if type(module) in KINDS.values() else type(module)


def adopt(module: nn.Module) -> SparseLayer:
    """Makes a dense module, in place, a sparse layer in the state "dense": the same object, parameters and hooks."""
    # Its class changes, as torch.nn.utils.parametrize does it: a new object in its place would leave all others that
    # hold the module (a list of layers, a tied head, a hook's handle) with a layer that is not trained any more.
    if type(module) in KINDS:
        module.__class__ = KINDS[type(module)]
    return module


def release(module: nn.Module) -> None:
    """Undoes :func:`adopt`."""
    if type(module) in KINDS.values() and not module.frozen:
        module.__class__ = module.plain
        module.__dict__.pop("state", None)


def is_frozen(module: nn.Module) -> bool:
    return isinstance(module, SparseLayer) and module.frozen
