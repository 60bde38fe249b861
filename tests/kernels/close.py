"""How close an op must come to its reference."""

import torch


def seeded(seed):
    """A stream on the device that tensors are made on."""
    return torch.Generator(torch.get_default_device()).manual_seed(seed)


def assert_close(found, expected, bound):
    """The relative Frobenius error is at most `bound`; NaN never passes."""
    assert found.shape == expected.shape
    difference = float((found.detach().double() - expected.detach().double()).norm())
    size = float(expected.detach().double().norm())
    assert difference <= bound * size, f"error {difference / max(size, 1e-300):.2e} > {bound:.1e}"
