"""The pool of large memory blocks: how much it holds, and how to give it back."""

from sparsebreg.core.memory import empty, held, release, set_limit

__all__ = ["empty", "held", "release", "set_limit"]
