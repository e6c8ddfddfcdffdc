"""Rows in, token pairs out."""
