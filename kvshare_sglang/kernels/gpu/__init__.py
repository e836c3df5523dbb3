"""Kernels for GPUs, in Triton; ``kernels.ops`` imports them where Triton is."""
