"""Freezing and thawing: dense layers become sparse ones over their active weights, in place, and back."""
