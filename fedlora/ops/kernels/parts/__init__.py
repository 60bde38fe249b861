"""Functions of Triton that kernels are made of; no kernels themselves."""
