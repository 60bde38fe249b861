"""Error feedback: all that was sent is all that changed, but for what is still owed."""

import math

import pytest
import torch

from fedlora.client.feedback import add_feedback, followed, still_owed
from fedlora.compress import round_trip
from fedlora.messages import Coding

CODINGS = [Coding("bf16"), Coding("int8"), Coding("int4"), Coding("none", 0.1), Coding("int4", 0.1)]
every = pytest.mark.parametrize("coding", CODINGS, ids=lambda c: f"{c.scheme}-{c.top_k:g}")
ROUNDS = 12


def delta(number, name, seed=0):
    draws = torch.Generator().manual_seed(1000 * seed + 10 * number + len(name))
    return torch.randn(9, 10, generator=draws)


def rounds(coding, names_of):
    """Sums of what changed and of what was sent, and what is owed in the end."""
    changed, sent, owed = {}, {}, {}
    for number in range(ROUNDS):
        own = {name: delta(number, name) for name in names_of(number)}
        change = add_feedback(own, owed)
        received = round_trip(change, coding)
        before = dict(owed)
        owed = still_owed(change, received, owed)
        for name in own:
            changed[name] = changed.get(name, 0) + own[name].double()
            sent[name] = sent.get(name, 0) + received[name].double()
        for name in before.keys() - own.keys():
            assert torch.equal(owed[name], before[name])
    return changed, sent, owed


@every
@pytest.mark.parametrize("turns", [("A", "BB"), ("A",)], ids=["both", "in turn"])
def test_what_was_sent_telescopes(coding, turns):
    """Also where factors are sent in turn, and one keeps what it owes."""

    def names(number):
        return ("A", "BB") if len(turns) == 2 else (("A", "BB")[number % 2],)

    changed, sent, owed = rounds(coding, names)
    for name, total in changed.items():
        torch.testing.assert_close(sent[name] + owed[name].double(), total, rtol=0, atol=1e-5)
        # without feedback, what is lost adds up instead
        assert owed[name].norm() < total.norm() * 2


@every
def test_a_change_too_small_to_travel_arrives_in_the_end(coding):
    """One large entry sets the scale, or takes the only place, in every round."""
    change = torch.full((9, 10), 1e-3)
    change[0, 0] = 0.5
    owed, total, bare = {}, torch.zeros(9, 10).double(), torch.zeros(9, 10).double()
    count = 200
    for _ in range(count):
        x = add_feedback({"x": change}, owed)
        received = round_trip(x, coding)
        owed = still_owed(x, received, owed)
        total += received["x"].double()
        bare += round_trip({"x": change}, coding)["x"].double()
    error = (total - count * change.double()).norm() / (count * change.double()).norm()
    lost = (bare - count * change.double()).norm() / (count * change.double()).norm()
    assert error < 0.01
    assert error < lost


def test_what_does_not_fit_owes_nothing():
    own = {"x": torch.ones(2, 3), "y": torch.ones(4)}
    found = add_feedback(own, {"x": torch.ones(1, 3), "y": torch.ones(4), "z": torch.ones(1)})
    assert torch.equal(found["x"], torch.ones(2, 3))
    assert torch.equal(found["y"], torch.full((4,), 2.0))
    assert found.keys() == own.keys()


@every
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_an_update_that_is_not_finite_leaves_no_trace(coding, value):
    change = {"x": torch.ones(9, 10), "y": torch.ones(3)}
    change["x"][2, 2] = value
    owed = {"x": torch.full((9, 10), 0.25), "z": torch.ones(1)}
    assert still_owed(change, round_trip(change, coding), owed) == owed


@every
def test_control_variates_follow_what_the_server_adds(coding):
    own = {"x": delta(0, "x")}
    change = {"x": delta(1, "x")}
    expected = own["x"] + round_trip(change, coding)["x"]
    assert torch.equal(followed(own, change, coding)["x"], expected)
