"""Sparse layers: parameters and state, no maths.

A layer holds the active weights as the parameter ``values`` and their places as ``pattern``. Its ``state_dict`` is that
of the dense layer (``weight``, ``bias``), so checkpoints go both ways.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from sparsebreg.core.errors import SwapError, expected
from sparsebreg.core.pattern import SparsePattern
from sparsebreg.ops import functional
from sparsebreg.ops.functional import Geometry

__all__ = ["SparseConv2d", "SparseLayer", "SparseLinear"]


def is_channels_last(weight: torch.Tensor) -> bool:
    """Whether the weight says so by itself: with one input channel or a 1x1 kernel both formats may fit."""
    if weight.dim() != 4 or not weight.is_contiguous(memory_format=torch.channels_last):
        return False
    return not weight.is_contiguous() or (weight.shape[1] == 1 and weight.stride(1) == 1 < weight[0, 0].numel())


class SparseLayer(nn.Module):
    """What the sparse layers share. Not for use by itself."""

    pattern: SparsePattern
    values: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, module: nn.Module, pattern: SparsePattern) -> None:
        super().__init__()
        weight = module.weight
        self.pattern = pattern
        self.channels_last = is_channels_last(weight)
        self.lanes = False
        self.values = nn.Parameter(pattern.gather(weight), requires_grad=weight.requires_grad)
        self.register_parameter("bias", module.bias)
        self.train(module.training)

    def swap_for(self, module: nn.Module) -> None:
        """Takes the place of ``module``: its hooks fire here, and :meth:`give_back` gives it back."""
        # Not a submodule: its emptied weight is no parameter of the model.
        self.__dict__["_origin"] = module
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks"):
            self.__dict__[name] = module.__dict__[name]  # the same dictionary: handles given out stay valid
        for name in ("_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks_with_kwargs"):
            self.__dict__[name] = module.__dict__[name]
        self.__dict__["_is_full_backward_hook"] = module.__dict__["_is_full_backward_hook"]

    def give_back(self) -> nn.Module:
        """The dense module that this layer stood for (its weight is still empty), or a new one."""
        module = self.__dict__.pop("_origin", None)
        if module is None:
            return self.to_dense()
        from_swapped(module)
        return module

    def to_dense(self) -> nn.Module:
        raise NotImplementedError

    @property
    def weight(self) -> torch.Tensor:
        """The dense weight, made anew at every access; writing to it changes nothing."""
        return self.pattern.scatter(self.values)

    @property
    def density(self) -> float:
        return self.pattern.density

    def _dense(self, cls: type[nn.Module], *args: Any, **kwargs: Any) -> nn.Module:
        options = {"device": "meta", "dtype": self.values.dtype}
        module = cls(*args, bias=self.bias is not None, **kwargs, **options)
        module.weight = nn.Parameter(self.weight, requires_grad=self.values.requires_grad)
        if self.bias is not None:
            module.bias = self.bias
        return module.train(self.training)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        destination[prefix + "weight"] = self.weight
        if self.bias is not None:
            destination[prefix + "bias"] = self.bias if keep_vars else self.bias.detach()

    def _load_from_state_dict(
        self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
    ) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        known = {"weight": prefix + "weight", "bias": prefix + "bias"}
        if self.bias is None:
            del known["bias"]
        found = {name: state_dict[key] for name, key in known.items() if key in state_dict}
        if strict:
            missing_keys += [known[name] for name in known.keys() - found.keys()]
            unexpected_keys += [k for k in state_dict if k.startswith(prefix) and k not in known.values()]
        problems = []
        if (weight := found.get("weight")) is not None:
            if tuple(weight.shape) != self.pattern.shape:
                problems.append(expected(known["weight"], f"shape {self.pattern.shape}", tuple(weight.shape)))
            else:
                gathered = self.pattern.gather(weight)
                outside = int(weight.count_nonzero()) - int(gathered.count_nonzero())
                if outside:
                    problems.append(
                        expected(known["weight"], "zeros outside of the frozen pattern", f"{outside} other weights")
                        + " (densify the model first)"
                    )
        if (bias := found.get("bias")) is not None and bias.shape != self.bias.shape:
            problems.append(expected(known["bias"], f"shape {tuple(self.bias.shape)}", tuple(bias.shape)))
        error_msgs += problems
        if problems:
            return
        with torch.no_grad():
            if weight is not None:
                self.values.copy_(gathered)
            if bias is not None:
                self.bias.copy_(bias)

    def _sizes(self) -> str:
        raise NotImplementedError

    def extra_repr(self) -> str:
        p = self.pattern
        bias = "" if self.bias is not None else ", bias=False"
        return f"{self._sizes()}{bias}, nnz={p.nnz} of {p.rows * p.cols} ({p.density:.2%})"


def unsupported(module: nn.Module) -> str:
    """Why this module has no sparse form; an empty string where it has one."""
    if type(module) not in (nn.Linear, nn.Conv2d, FineLinear, FineConv2d):
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
    if isinstance(module, nn.Conv2d):
        if module.padding_mode != "zeros":
            return f"padding_mode '{module.padding_mode}' is not supported"
        if module.padding == "same" and any(
            d * (k - 1) % 2 for d, k in zip(module.dilation, module.kernel_size, strict=True)
        ):
            return "padding 'same' that differs between the sides is not supported"
    return ""


def geometry_of(module: nn.Conv2d) -> Geometry:
    padding = module.padding
    if isinstance(padding, str):
        same = tuple(d * (k - 1) // 2 for d, k in zip(module.dilation, module.kernel_size, strict=True))
        padding = same if padding == "same" else (0, 0)
    return Geometry(tuple(module.stride), tuple(padding), tuple(module.dilation), module.groups)


def _pattern_of(module: nn.Module, kind: type[nn.Module], mask: torch.Tensor | None) -> SparsePattern:
    if not isinstance(module, kind):
        raise TypeError(expected("m", f"a torch.nn.{kind.__name__}", type(module).__name__))
    if why := unsupported(module):
        raise SwapError(f"m: {why}")
    if mask is None:
        return SparsePattern.from_nonzeros(module.weight)
    if not isinstance(mask, torch.Tensor) or mask.shape != module.weight.shape:
        raise ValueError(expected("mask", f"shape {tuple(module.weight.shape)}", tuple(getattr(mask, "shape", ()))))
    return SparsePattern.from_mask(mask)


class SparseLinear(SparseLayer):
    """A linear layer that stores and computes its active weights only. Made by :meth:`from_dense`.

    Shapes as ``torch.nn.Linear``: (..., in_features) to (..., out_features).
    """

    def __init__(self, module: nn.Linear, pattern: SparsePattern) -> None:
        super().__init__(module, pattern)
        self.in_features, self.out_features = module.in_features, module.out_features

    @classmethod
    def from_dense(cls, m: nn.Linear, mask: torch.Tensor | None = None) -> SparseLinear:
        """The sparse form of a dense layer; the bias parameter is shared.

        Args:
            m: the layer; it is not changed.
            mask: boolean, of the weight's shape; the active weights. Default: the nonzero ones. Weights outside are
                dropped.

        Raises:
            SwapError: for a layer without a sparse form. TypeError, ValueError: for a mask of another dtype or shape.
        """
        return cls(m, _pattern_of(m, nn.Linear, mask))

    def to_dense(self) -> nn.Linear:
        """A dense layer with the same weights; the bias parameter is shared."""
        return self._dense(nn.Linear, self.in_features, self.out_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        parameters = self._parameters  # past nn.Module's attributes, which take longer
        return functional.sparse_linear(x, self.pattern, parameters["values"], parameters["bias"])

    def _sizes(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}"


class SparseConv2d(SparseLayer):
    """A 2-D convolution that stores and computes its active weights only. Made by :meth:`from_dense`.

    Shapes as ``torch.nn.Conv2d``: (N, IC, H, W) to (N, OC, OH, OW). Zero padding; any kernel, stride, dilation, groups.
    """

    def __init__(self, module: nn.Conv2d, pattern: SparsePattern) -> None:
        super().__init__(module, pattern)
        self.in_channels, self.out_channels = module.in_channels, module.out_channels
        self.kernel_size = tuple(module.kernel_size)
        self.geometry = geometry_of(module)

    @classmethod
    def from_dense(cls, m: nn.Conv2d, mask: torch.Tensor | None = None) -> SparseConv2d:
        """The sparse form of a dense convolution; the bias parameter is shared.

        Args:
            m: the layer; it is not changed.
            mask: boolean, of the weight's shape; the active weights. Default: the nonzero ones. Weights outside are
                dropped.

        Raises:
            SwapError: for a layer without a sparse form (padding modes other than zeros, for one). TypeError,
            ValueError: for a mask of another dtype or shape.
        """
        return cls(m, _pattern_of(m, nn.Conv2d, mask))

    def to_dense(self) -> nn.Conv2d:
        """A dense convolution with the same weights; the bias parameter is shared."""
        return self._dense(nn.Conv2d, self.in_channels, self.out_channels, self.kernel_size, **self.geometry._asdict())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return functional.sparse_conv2d(
            x, self.pattern, self.values, self.bias, self.geometry, self.channels_last, self.lanes
        )

    def _sizes(self) -> str:
        g = self.geometry
        text = f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, stride={g.stride}"
        for name in ("padding", "dilation", "groups"):
            if (value := getattr(g, name)) != Geometry._field_defaults[name]:
                text += f", {name}={value}"
        return text


class _Fine:
    """What a dense layer is in the fine phase: the same module and parameters, computed over a pattern.

    Output and grad_x need the active weights only; the gradient of the weight is full. The pattern is that of the last
    static phase, or a wider one of the cycle, while the nonzeros stay inside of it; where they do not, it is made anew.
    In training the values are those that the optimizer's step has gathered, unless something wrote to the weight since.
    (What is written to ``weight.data`` counts from the next step on, as torch does not tell of it.)
    """

    _pattern: SparsePattern | None
    _max_density: float
    #: Of the latest step: values, or None where a nonzero was outside of the pattern; and of which weight and pattern.
    _kept: tuple[torch.Tensor | None, SparsePattern, int, int] | None

    def keep(self, values: torch.Tensor | None) -> None:
        """Takes the weight's values on ``_pattern``; None says that the pattern does not hold all nonzeros."""
        weight = self._parameters["weight"]
        # Past nn.Module's attributes, which are looked through and checked at every access, twice a layer and step.
        self.__dict__["_kept"] = values, self.__dict__["_pattern"], weight._version, weight.data_ptr()

    def _still(self) -> bool:
        """Whether what was kept is of the present weight and pattern."""
        if self._kept is None:
            return False
        _, pattern, version, place = self._kept
        weight = self._parameters["weight"]
        return pattern is self._pattern and version == weight._version and place == weight.data_ptr()

    @property
    def kept(self) -> torch.Tensor | None:
        """The values that the latest step has gathered; None where they do not hold all nonzeros of the weight."""
        return self._kept[0] if self._still() else None

    @property
    def outgrown(self) -> bool:
        """Whether the latest step left nonzeros outside of the pattern."""
        return self._still() and self._kept[0] is None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # a copy has a weight of its own

    def _active(self) -> torch.Tensor | None:
        """Values on an up-to-date ``_pattern``; None where the layer is not sparse enough."""
        weight = self.weight.detach().contiguous()
        known, most = self._pattern, int(self._max_density * weight.numel())
        if known is not None and known.nnz <= most:
            values = self._kept[0] if self.training and self._still() else known.gather_all(weight)
            if values is not None:
                return values
        self._pattern = SparsePattern.of_at_most(weight, most)
        return None if self._pattern is None else self._pattern.gather(weight)


class FineLinear(_Fine, nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.dim() == 0 or (values := self._active()) is None:
            return super().forward(x)
        return functional.sparse_linear(x, self._pattern, values, self.bias, self.weight)


class FineConv2d(_Fine, nn.Conv2d):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if (values := self._active()) is None:
            return super().forward(x)
        return functional.sparse_conv2d(
            x, self._pattern, values, self.bias, geometry_of(self), is_channels_last(self.weight), True, self.weight
        )


_FINE: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: FineLinear, nn.Conv2d: FineConv2d}
_PLAIN = {v: k for k, v in _FINE.items()}


def to_fine(module: nn.Module, pattern: SparsePattern | None, max_density: float) -> None:
    """Makes a dense layer compute over its nonzero weights while it keeps its full gradient; in place."""
    module.__class__ = _FINE.get(type(module), type(module))
    module._pattern, module._max_density, module._kept = pattern, max_density, None


def kind(module: nn.Module) -> str:
    """The name of the module's class, as the user knows it."""
    return _PLAIN.get(type(module), type(module)).__name__


def to_plain(module: nn.Module) -> None:
    """Undoes :func:`to_fine`."""
    if type(module) in _PLAIN:
        module.__class__ = _PLAIN[type(module)]
        del module._pattern, module._max_density, module._kept


class _Swapped:
    """What a dense layer is while a sparse one stands in its place: who still holds it gets that one's results."""

    @property
    def weight(self) -> torch.Tensor:
        """As of the sparse layer: made anew at every access; writing to it changes nothing."""
        return self.__dict__["_stand_in"].weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.__dict__["_stand_in"].forward(x)

    def _save_to_state_dict(self, *args: Any) -> None:
        self.__dict__["_stand_in"]._save_to_state_dict(*args)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.__dict__["_stand_in"]._load_from_state_dict(*args)


class SwappedLinear(_Swapped, nn.Linear):
    pass


class SwappedConv2d(_Swapped, nn.Conv2d):
    pass


_SWAPPED: dict[type[nn.Module], type[nn.Module]] = {nn.Linear: SwappedLinear, nn.Conv2d: SwappedConv2d}


def to_swapped(module: nn.Module, layer: SparseLayer) -> None:
    """From now on the plain dense module is ``layer`` for whoever still holds it; in place."""
    module.__class__ = _SWAPPED[type(module)]
    module.__dict__["_stand_in"] = layer  # not a submodule


def from_swapped(module: nn.Module) -> None:
    """Undoes :func:`to_swapped`."""
    module.__class__ = next(plain for plain, swapped in _SWAPPED.items() if swapped is type(module))
    del module.__dict__["_stand_in"]


def form(module: nn.Module) -> type[SparseLayer]:
    """The class of the sparse layer that computes what ``module`` does."""
    return SparseLinear if isinstance(module, nn.Linear) else SparseConv2d


def sparse_form(module: nn.Module, pattern: SparsePattern) -> SparseLayer:
    """The sparse layer that takes the place of ``module``."""
    layer = form(module)(module, pattern)
    layer.swap_for(module)
    layer.lanes = True  # its neighbours in the model compute on what it returns
    return layer
