"""Which weights of a model are regularised, and parameter groups for them."""

import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import nn

from sparsebreg.core.errors import check_choice, expected
from sparsebreg.optim.regularizers import NoReg, Regularizer

#: Modules whose weight is regularised by ``param_groups``.
REGULARISED = (nn.Linear, nn.modules.conv._ConvNd)

#: A regularizer by layer name, or a function of (name, module); None stands for the common one.
PerLayer = Mapping[str, Regularizer] | Callable[[str, nn.Module], "Regularizer | None"]


def is_dense(module: nn.Module) -> bool:
    """Whether a module is a linear or convolution layer with a dense weight; a frozen sparse layer is not."""
    return isinstance(module, REGULARISED) and "values" not in module._parameters


def dense_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """(qualified name, module) of every linear and convolution layer with a dense weight."""
    return ((name, m) for name, m in model.named_modules() if is_dense(m))


def check_reg(reg: Any) -> Regularizer:
    if not isinstance(reg, Regularizer):
        raise TypeError(expected("reg", "a regularizer such as sparsebreg.L1(0.05)", repr(reg)))
    return reg


def param_groups(
    model: nn.Module, reg: Regularizer, per_layer: PerLayer | None = None, scale: str | None = None
) -> list[dict[str, Any]]:
    """Parameter groups: the weights of linear and convolution layers with ``reg``, all other parameters without.

    Args:
        model: any module.
        reg: the regularizer of all layers that do not bring their own.
        per_layer: other regularizers for some layers: a mapping from qualified names, or a function called with
            (name, module) that returns a regularizer or None for ``reg``. Layers with equal ones share a group.
        scale: "fan_in" multiplies the ``lam`` of each layer by c / √fan_in, the scale of a weight at initialisation,
            with fan_in = ``weight[0].numel()`` and the c for which the factors have mean 1 over all these weights.

    Raises:
        TypeError: if ``model`` is not a module or a regularizer not one (with ``scale``: not one with a ``lam``).
        ValueError: if nothing would be regularised, ``per_layer`` names no such layer, or ``scale`` is unknown.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", type(model).__name__))
    check_reg(reg)
    layers: dict[int, tuple[str, nn.Module]] = {}
    for name, m in dense_layers(model):
        if m.weight is not None:
            layers.setdefault(id(m.weight), (name, m))  # a weight that modules share is that of the first
    parameters = list(model.parameters())
    weights = [p for p in parameters if id(p) in layers]
    if not weights:
        raise ValueError(expected("model", "linear or convolution layers to regularise", "a model without any"))
    names = [layers[id(p)][0] for p in weights]
    own: list[Regularizer | None] = [None] * len(weights)
    if isinstance(per_layer, Mapping):
        if unknown := [n for n in per_layer if n not in names]:
            raise ValueError(expected("per_layer", f"names among {', '.join(names)}", repr(unknown[0])))
        own = [per_layer.get(n) for n in names]
    elif callable(per_layer):
        own = [per_layer(*layers[id(p)]) for p in weights]
    elif per_layer is not None:
        raise TypeError(expected("per_layer", "a mapping or a function", type(per_layer).__name__))
    regs = [reg if r is None else check_reg(r) for r in own]
    if scale is not None:
        check_choice("scale", scale, ["fan_in"])
        if lazy := [n for n, p in zip(names, weights, strict=True) if nn.parameter.is_lazy(p)]:
            raise ValueError(expected("model", "initialised layers for scale='fan_in'", f"a lazy '{lazy[0]}'"))
        factors = [math.prod(p.shape[1:]) ** -0.5 if p.numel() else 1.0 for p in weights]
        sizes = [p.numel() for p in weights]
        mean = sum(f * n for f, n in zip(factors, sizes, strict=True)) / max(1, sum(sizes)) or 1.0
        regs = [r if isinstance(r, NoReg) else r.with_lam(r.lam * f / mean) for r, f in zip(regs, factors, strict=True)]
    groups: list[dict[str, Any]] = []
    for p, r in zip(weights, regs, strict=True):
        group = next((g for g in groups if g["reg"] == r), None)
        if group is None:
            groups.append(group := {"params": [], "reg": r})
        group["params"].append(p)
    rest = [p for p in parameters if id(p) not in layers]
    return [*groups, {"params": rest, "reg": NoReg()}] if rest else groups
