"""Kernels for GPUs, in Triton; ``kernels.ops`` imports them where Triton is."""

LOG2_E = 1.4426950408889634  # exponentials are taken in base 2
