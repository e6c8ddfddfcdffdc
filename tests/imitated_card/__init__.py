"""Whole paths of the program on an imitated CUDA card (`perce_lite.evaluation.bench.imitation`)."""
