"""Sparse starting points, and how a density is distributed over layers."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import nn

from sparsebreg.core.errors import check_choice, check_real, expected
from sparsebreg.optim.groups import dense_layers

Filter = Callable[[nn.Module, str], bool]

#: What is kept or zeroed together, by name.
GROUPS = ("weights", "kernels")


def _layers(model: nn.Module, filter_fn: Filter | None) -> dict[str, nn.Module]:
    """Linear and convolution layers by name; a weight that modules share is that of the first."""
    if not isinstance(model, nn.Module):
        raise TypeError(expected("model", "a torch.nn.Module", type(model).__name__))
    layers, seen = {}, set()
    for name, m in dense_layers(model):
        if (filter_fn is None or filter_fn(m, name)) and id(m.weight) not in seen:
            seen.add(id(m.weight))
            layers[name] = m
    if not layers:
        raise ValueError(expected("model", "linear or convolution layers", "a model without any"))
    return layers


def uniform_densities(model: nn.Module, density: float, filter_fn: Filter | None = None) -> dict[str, float]:
    """The same density for every linear and convolution layer, by name. Errors as :func:`erk_densities`."""
    layers = _layers(model, filter_fn)
    return dict.fromkeys(layers, check_real("density", density, low=0, strict=True, high=1))


def erk_densities(model: nn.Module, density: float, filter_fn: Filter | None = None) -> dict[str, float]:
    """Erdős-Rényi-kernel densities: small layers are denser, and over all weights the density is ``density``.

    A layer with weight (OC, IC, KH, KW) gets a density proportional to (OC + IC + KH + KW) / (OC · IC · KH · KW), at
    most 1.

    Source: Evci et al., arXiv 1911.11134; Mocanu et al., Nature Communications 9 (2018), for linear layers.

    Args:
        density: of all these layers together, in (0, 1].
        filter_fn: called with (module, qualified name); layers for which it is false are left out.

    Raises:
        TypeError, ValueError: for another density, or a model without such layers.
    """
    layers = _layers(model, filter_fn)
    density = check_real("density", density, low=0, strict=True, high=1)
    sizes = {n: m.weight.numel() for n, m in layers.items()}
    raw = {n: sum(m.weight.shape) / max(1, sizes[n]) for n, m in layers.items()}
    budget = density * sum(sizes.values())
    full: set[str] = set()
    while True:
        rest = sum(raw[n] * sizes[n] for n in layers if n not in full)
        scale = (budget - sum(sizes[n] for n in full)) / rest if rest else 0.0
        over = {n for n in layers if n not in full and raw[n] * scale > 1}
        if not over:
            return {n: 1.0 if n in full else raw[n] * scale for n in layers}
        full |= over


#: Distributions of a density over layers.
DISTRIBUTIONS = {"uniform": uniform_densities, "erk": erk_densities}


def layer_densities(
    model: nn.Module, density: float, distribution: str | Mapping[str, float], filter_fn: Filter | None = None
) -> dict[str, float]:
    """Densities by layer name: of a distribution, or checked as given (layers that are not named are left out)."""
    if not isinstance(distribution, Mapping):
        name = check_choice("distribution", distribution, DISTRIBUTIONS)
        return DISTRIBUTIONS[name](model, density, filter_fn)
    layers = _layers(model, filter_fn)
    if unknown := [n for n in distribution if n not in layers]:
        raise ValueError(expected("distribution", f"names among {', '.join(layers)}", repr(unknown[0])))
    return {n: check_real(f"distribution['{n}']", d, low=0, strict=True, high=1) for n, d in distribution.items()}


@torch.no_grad()
def sparse_init_(
    model: nn.Module,
    density: float = 0.05,
    filter_fn: Filter | None = None,
    generator: torch.Generator | None = None,
    distribution: str | Mapping[str, float] = "uniform",
    groups: str = "weights",
    gain: float | str | None = None,
) -> nn.Module:
    """Makes the weights of linear and convolution layers sparse, in place, with the layers' output variance kept.

    Every weight is kept with probability ``density``; the kept ones are divided by √density, so that the variance of
    a weight, and with it that of the layer's output, is what the dense initialisation gave it. Biases stay.

    Source: Bungert et al., JMLR 23 (2022), section 4.1.

    Args:
        density: in (0, 1].
        filter_fn: called with (module, qualified name); layers for which it is false keep their weights.
        generator: random source; default: torch's.
        distribution: "uniform", "erk" (see :func:`erk_densities`), or densities by layer name instead of ``density``;
            layers without a name in it stay.
        groups: "weights" are kept one by one, "kernels" of convolutions (``w[o, i]``) as a whole.
        gain: the kept weights are rescaled to mean square gain² / fan_in over all the layer's weights, instead of that
            of the dense initialisation: a number, or a name for ``torch.nn.init.calculate_gain``. "relu" keeps the mean
            square from a ReLU layer to the next (He et al., arXiv 1502.01852), which torch's default does not.

    Returns:
        The model.

    Raises:
        TypeError, ValueError: naming the argument, or for a model without such layers. Nothing is changed then.
    """
    densities = layer_densities(model, density, distribution, filter_fn)
    check_choice("groups", groups, GROUPS)
    if isinstance(gain, str):
        try:
            gain = nn.init.calculate_gain(gain)
        except ValueError as error:
            wanted = "a number or a name that torch.nn.init.calculate_gain knows"
            raise ValueError(expected("gain", wanted, repr(gain))) from error
    elif gain is not None:
        gain = check_real("gain", gain, low=0, strict=True)
    for name, d in densities.items():
        w = model.get_submodule(name).weight
        shape = w.shape[:2] if groups == "kernels" else w.shape
        keep = torch.rand(shape, generator=generator) < d
        w.mul_(keep.view(*shape, *[1] * (w.dim() - len(shape))).to(w.device, w.dtype) / d**0.5)
        if gain is not None and (square := w.square().mean().item()):
            w.mul_(gain / math.sqrt(square * w[0].numel()))
    return model
