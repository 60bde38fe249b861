"""Norm cap against its formula, in both spaces."""

import statistics
from dataclasses import replace

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.errors import ConfigError, StrategyError
from fedlora.strategies.wrappers import WRAPPERS
from tests.strategies.rounds import make
from tests.strategies.wrappers.around import (
    Products,
    as_factors,
    as_products,
    check,
    crowd,
    scaled,
    wrapped,
)


@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_factor_deltas_are_scaled_to_the_cap(cap):
    chosen, state, _ = wrapped("norm-cap", options={"cap": cap})
    updates = [scaled(u, 1 + i) for i, u in enumerate(crowd(chosen, state, 5))]
    norms = [float(as_factors(u).norm()) for u in updates]
    tau = cap or statistics.median(norms)
    passed, notes = chosen.screen(state, updates)
    assert notes["cap"] == pytest.approx(tau)
    assert notes["capped"] == [f"c0{i}" for i, norm in enumerate(norms) if norm > tau]
    for before, after, norm in zip(updates, passed, norms, strict=True):
        torch.testing.assert_close(as_factors(after), as_factors(before) * min(1.0, tau / norm))
        assert (after is before) == (norm <= tau)


@pytest.mark.parametrize("cap", [0.0, 2.5])
def test_weight_changes_are_mixed_with_the_broadcast(cap):
    """Oracle: the dense mean of W_g + min(1, tau / |u|) u, u the weight change."""
    chosen, state, basis = wrapped("norm-cap", "products", options={"cap": cap, "space": "product"})
    updates = [scaled(u, 1 + i) for i, u in enumerate(crowd(chosen, state, 5))]
    points = [as_products(u, basis) for u in updates]
    tau = cap or statistics.median([float(p.norm()) for p in points])
    passed, _ = chosen.screen(state, updates)
    capped = [p * min(1.0, tau / float(p.norm())) for p in points]
    for after, point in zip(passed, capped, strict=True):
        found = []
        for layer in state.spec.layers:
            left, right = chosen.inner.product(after, layer.name)
            b, a = (state.tensors[f"{layer.name}.{f}"].double() for f in "BA")
            found.append((left @ right - layer.scale * b @ a).flatten())
        heads = [after.delta.tensors[k].double().flatten() for k in sorted(state.spec.head_shapes)]
        torch.testing.assert_close(torch.cat(found + heads), point, rtol=1e-12, atol=1e-12)
    # the stacks that a strategy merges are those of the capped changes
    stats = chosen.reduce(state, updates)
    weights = torch.tensor([u.weight for u in updates], dtype=torch.float64)
    mean = (weights[:, None] * torch.stack(capped)).sum(0) / weights.sum()
    found = []
    for layer in state.spec.layers:
        left, right = stats.stacks[layer.name]
        b, a = (state.tensors[f"{layer.name}.{f}"].double() for f in "BA")
        found.append((left @ right - layer.scale * b @ a).flatten())
    torch.testing.assert_close(torch.cat(found), mean[: len(torch.cat(found))])
    assert not torch.allclose(mean, torch.stack(points).mean(0))


def test_a_strategy_that_reads_factors_of_a_capped_product_is_stopped():
    chosen, state, _ = wrapped("norm-cap", options={"cap": 0.1, "space": "product"})
    with pytest.raises(StrategyError, match="which has no factors of its own"):
        chosen.reduce(state, crowd(chosen, state, 3))
    with pytest.raises(ConfigError, match="strategy 'fedit' merges factors"):
        check(chosen, state)


def test_wrappers_that_read_factors_do_not_stand_inside_a_cap_on_products():
    _, state, _ = make("fedit")
    capped = {"space": "product"}
    for name, options, fine in (
        ("krum", {}, True),
        ("krum", {"space": "factor"}, False),
        ("coordinate-median", {}, False),
    ):
        inner = WRAPPERS[name](Products(METHODS["lora"]), options)
        chosen = WRAPPERS["norm-cap"](inner, capped)
        if fine:
            check(chosen, state)
        else:
            with pytest.raises(ConfigError, match=f"leaves no factors for wrapper '{name}'"):
                check(chosen, state)


def test_control_variates_share_the_cap():
    chosen, state, _ = wrapped("norm-cap", options={"cap": 1.0})
    (up,) = crowd(chosen, state, 1)
    extra = {"p.A": torch.full((2, 5), 7.0)}
    (passed,), _ = chosen.screen(state, [replace(up, control=extra)])
    parts = [as_factors(up), extra["p.A"].double().flatten()]
    norm = float(torch.cat(parts).norm())
    torch.testing.assert_close(as_factors(passed), parts[0] / norm)
    torch.testing.assert_close(passed.control["p.A"].flatten(), parts[1] / norm)


def test_an_update_of_nothing_has_nothing_to_cap():
    chosen, state, _ = wrapped("norm-cap")
    updates = [scaled(u, 0.0) for u in crowd(chosen, state, 3)]
    passed, notes = chosen.screen(state, updates)
    assert passed == updates
    assert notes == {"cap": 0.0, "capped": []}


def test_a_fixed_cap_keeps_both_privacy_units_and_a_median_only_that_of_records():
    fixed, state, _ = wrapped("norm-cap", options={"cap": 1.0})
    check(fixed, state, privacy="client")
    assert fixed.linear
    median, state, _ = wrapped("norm-cap")
    check(median, state, privacy="record")
    with pytest.raises(ConfigError, match="voided by wrapper 'norm-cap'"):
        check(median, state, privacy="client")
    assert not median.linear
    with pytest.raises(ConfigError, match="cap = -1; expected a norm above 0"):
        wrapped("norm-cap", options={"cap": -1.0})


def test_unequal_ranks_are_fine_in_both_spaces():
    for strategy, space in (("rolora", "factor"), ("products", "product")):
        chosen, state, _ = wrapped("norm-cap", strategy, options={"space": space})
        check(chosen, state, ranks=[2, 1, 2])
