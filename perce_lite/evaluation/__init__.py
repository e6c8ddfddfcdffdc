"""Held-out figures, comparisons and checks."""
