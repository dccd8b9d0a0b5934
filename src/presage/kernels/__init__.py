"""Kernels: `reference` (plain differentiable torch, the truth), `cpu` (SIMD written in Python through numba), `triton` (GPU).

Every kernel has a twin in `reference` with the same signature of tensors; tests compare the two.
"""
