"""Adapters and models in llama.cpp's format."""
