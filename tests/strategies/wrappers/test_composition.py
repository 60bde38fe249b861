"""Wrappers in wrappers, from a job, by hand and in real runs."""

import pytest
import torch

from fedlora.adapters import METHODS
from fedlora.config.job import FederationSection
from fedlora.strategies.plugin import make_strategy
from fedlora.strategies.wrappers import WRAPPERS
from tests.simulation.runs import Run
from tests.strategies.rounds import make
from tests.strategies.wrappers.around import check, crowd, next_state, scaled

CAPPED_KRUM = [{"name": "norm-cap", "cap": 3.0}, {"name": "multi-krum", "hostile": 2}]


def test_the_first_wrapper_of_a_job_sees_the_updates_first():
    section = FederationSection(strategy="fedit", wrappers=CAPPED_KRUM)
    chosen = make_strategy(section, METHODS["lora"])
    assert [s.name for s in (chosen, *chosen.inside())] == ["norm-cap", "multi-krum", "fedit"]
    inner, state, _ = make("fedit")
    check(chosen, state, n=9)
    updates = [scaled(u, 1 + i) for i, u in enumerate(crowd(inner, state, 9))]
    stats = chosen.reduce(state, updates)
    assert list(stats.notes) == ["multi-krum", "norm-cap"]
    # by hand: cap, then choose among the capped, then average
    capped, _ = WRAPPERS["norm-cap"](inner, {"cap": 3.0}).screen(state, updates)
    kept, _ = WRAPPERS["multi-krum"](inner, {"hostile": 2}).screen(state, capped)
    assert len(kept) == 7
    left, right = chosen.refactor(state, stats), next_state(inner, state, kept)
    assert all(torch.equal(left.tensors[k], right.tensors[k]) for k in left.tensors)
    # the other way round chooses among updates of their full length
    turned = make_strategy(
        FederationSection(strategy="fedit", wrappers=CAPPED_KRUM[::-1]), METHODS["lora"]
    )
    other = next_state(turned, state, updates)
    assert not all(torch.equal(left.tensors[k], other.tensors[k]) for k in left.tensors)


def test_properties_are_what_all_of_them_leave():
    section = FederationSection(strategy="ffa-lora", wrappers=[{"name": "fedprox"}, *CAPPED_KRUM])
    chosen = make_strategy(section, METHODS["lora"])
    assert (chosen.exact, chosen.linear, chosen.asynchronous) == (False, False, False)
    assert chosen.hetero_rank
    assert chosen.privacy == {"record"}
    prox = make_strategy(
        FederationSection(strategy="ffa-lora", wrappers=[{"name": "fedprox"}]), METHODS["lora"]
    )
    assert (prox.exact, prox.linear, prox.privacy) == (True, True, {"record", "client"})


CASES = [[{"name": name}] for name in WRAPPERS] + [
    CAPPED_KRUM,
    [{"name": "krum", "space": "factor"}, {"name": "fedadam"}],
    [{"name": "lodd", "action": "drop"}, {"name": "fedmomentum"}, {"name": "fedprox"}],
    [{"name": "multi-krum", "hostile": 3}, {"name": "scaffold"}],
]


@pytest.mark.parametrize("wrappers", CASES, ids=lambda w: "+".join(t["name"] for t in w))
def test_a_real_run_in_pieces_equals_a_run_in_one(make_job, tmp_path, wrappers):
    """Twelve clients, two of them hostile within bounds."""
    hostile = {"kind": "sign-flip", "clients": ["client-002", "client-007"], "strength": 3.0}
    job = make_job(
        partition={"clients": 12},
        federation={"rounds": 3, "wrappers": wrappers},
        training={"local_steps": 1, "batch_size": 2, "optimizer": "sgd", "learning_rate": 0.1},
        scenario={"hostile": [hostile]},
    )
    whole, pieces = Run(job, tmp_path / "whole"), Run(job, tmp_path / "pieces")
    whole.go()
    for until in (1, 3):
        pieces.go(until)
    assert whole.adapters() == pieces.adapters()
    assert len(set(whole.adapters())) == 3
    assert whole.file(3) == pieces.file(3)
    screens = {"geometric-median", "krum", "lodd", "multi-krum", "norm-cap"}
    noted = {t["name"] for t in wrappers} & screens
    for event in whole.of("round"):
        assert set(event.get("notes", {})) == noted
        assert event["rejected"] == 0
