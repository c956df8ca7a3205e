"""Differentiable sparse operations."""
