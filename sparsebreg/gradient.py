"""Full gradients that are computed when they are wanted."""

from sparsebreg.core.gradient import PendingGrad, resolve

__all__ = ["PendingGrad", "resolve"]
