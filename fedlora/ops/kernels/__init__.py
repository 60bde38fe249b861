"""Triton kernels. Imported only when one is used: Triton need not be installed."""
