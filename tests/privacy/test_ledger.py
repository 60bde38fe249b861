"""The laws of the ledger, and what is on disk."""

import functools

import pytest
from dp_accounting.pld import privacy_loss_distribution

from fedlora.privacy.accounting import epsilon
from fedlora.privacy.ledger import Ledger
from tests.privacy.ledger_laws import DELTA, LAWS
from tests.privacy.ledger_mutants import BROKEN_ACCOUNTING, KILLED_BY

# laws about calls that no ledger would take, and about what is free
WITHOUT_MUTANT = {"the_same_bytes_again_are_free", "nothing_is_spent_that_was_not_reserved"}


def composed_pld(events):
    """Epsilon of several events by Google's privacy loss distributions."""
    parts = [
        privacy_loss_distribution.from_gaussian_mechanism(
            event.noise, sampling_prob=event.rate, value_discretization_interval=1e-3
        ).self_compose(event.steps)
        for event in events
    ]
    return functools.reduce(lambda a, b: a.compose(b), parts).get_epsilon_for_delta(DELTA)


@pytest.mark.parametrize("name", LAWS)
def test_law(name, tmp_path):
    LAWS[name](tmp_path / "privacy", Ledger)


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name, kinds in KILLED_BY.items() for kind in kinds]
)
def test_a_broken_ledger_is_found_by_its_law(name, kind, tmp_path):
    with pytest.raises((AssertionError, pytest.fail.Exception)):
        LAWS[name](tmp_path / "privacy", kind)


def test_every_law_finds_something():
    assert set(KILLED_BY) >= set(LAWS) - WITHOUT_MUTANT
    assert sum(map(len, KILLED_BY.values())) >= 20


@pytest.mark.parametrize("broken", BROKEN_ACCOUNTING, ids=lambda found: found.__name__)
@pytest.mark.filterwarnings("ignore:GDP accounting")
def test_broken_accounting_says_less_than_the_loss_distribution(broken):
    events = BROKEN_ACCOUNTING[broken]
    truth = composed_pld(events)
    assert broken(events, DELTA) < truth - 0.02
    for accountant in ("rdp", "prv"):
        assert epsilon(events, DELTA, accountant) >= truth
