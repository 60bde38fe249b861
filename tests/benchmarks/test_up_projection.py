"""The race of the second factor's ways: they all compute the same."""

import torch

from benchmarks.kernels.up_projection import Race, figures


def test_every_way_has_the_same_output_and_gradients():
    race = Race(48, 20, "cpu", torch.float64)
    expected = race.after()
    x = race._normed().requires_grad_()
    a, b = race.a.clone().requires_grad_(), race.b.clone().requires_grad_()
    y = x @ race.w.T + 2.0 * (x @ a.T) @ b.T
    plain = (y, *torch.autograd.grad(y, (x, a, b), race.dy))
    for way, step in race.ways().items():
        for found, one, other in zip(step(), expected, plain, strict=True):
            torch.testing.assert_close(found, one, msg=way)
            torch.testing.assert_close(found, other, msg=way)


def test_every_way_is_timed():
    found = figures("cpu", tiny=True, repeats=1)
    assert len(found) == 3
    assert all(len(values) == 1 and values[0] > 0 for values in found.values())
