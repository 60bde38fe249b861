"""Kernels beside their peers, and what can be counted without a GPU."""
