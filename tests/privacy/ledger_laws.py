"""What a privacy ledger must keep, as functions of its class, so that broken ones can be tried.

A restart is a second `open` of the same folder: nothing is carried over in memory.
"""

import hashlib
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from fedlora.errors import BudgetExhausted, LedgerError
from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_entry import Release

KEY = hashlib.sha256(b"rows").hexdigest()
OTHER_KEY = hashlib.sha256(b"other rows").hexdigest()
DELTA = 1e-5
STEP = Event(0.05, 1.0, 10)
START = "a" * 64

Law = Callable[[Path, type[Ledger]], None]
LAWS: dict[str, Law] = {}


def law(check: Law) -> Law:
    LAWS[check.__name__] = check
    return check


def open_ledger(folder: Path, kind: type[Ledger] = Ledger, **changed) -> Ledger:
    """One with a run's budget of epsilon 50, unless changed."""
    return kind.open(
        folder, **{"key": KEY, "unit": "record", "epsilon": 50.0, "delta": DELTA, **changed}
    )


def release(number: int = 1, attempt: int = 1, run: str = "r", start: str = START) -> Release:
    return Release(run, number, attempt, start)


def cost(*events: Event) -> float:
    return epsilon(events, DELTA)


def times(count: int) -> Event:
    return replace(STEP, steps=STEP.steps * count)


@law
def a_reservation_counts_before_anything_is_trained(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
        with open_ledger(folder) as after_a_crash:
            assert after_a_crash.epsilon() == cost(STEP)


@law
def a_reservation_that_died_stays_charged(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
    with open_ledger(folder, kind) as ledger:
        assert ledger.epsilon() == ledger.epsilon("r") == cost(STEP)
        ledger.reserve(release(), [STEP])
        ledger.spend(release(), [STEP], b"x")
        assert ledger.epsilon() == ledger.epsilon("r") == cost(times(2))


@law
def rounds_attempts_and_runs_add_up_over_restarts(folder, kind):
    made = [release(1), release(2), release(2, 2), release(1, 1, "s")]
    for each in made:
        with open_ledger(folder, kind) as ledger:
            ledger.reserve(each, [STEP])
            ledger.spend(each, [STEP], b"x")
            ledger.released(each)
    with open_ledger(folder, kind) as ledger:
        assert ledger.epsilon() == cost(times(4))
        assert ledger.epsilon("r") == cost(times(3))
        assert ledger.epsilon("s") == cost(STEP)
        assert ledger.epsilon("none") == 0.0


@law
def different_noise_adds_up_as_a_list(folder, kind):
    quiet = Event(0.2, 3.0, 7, "metric")
    with open_ledger(folder, kind) as ledger:
        for number in (1, 2):
            ledger.reserve(release(number), [STEP, quiet])
            ledger.spend(release(number), [STEP, quiet], b"x")
        assert ledger.epsilon() == cost(STEP, quiet, STEP, quiet)
        assert {event.kind: event.steps for event in ledger.charged("r")} == {
            "train": 2 * STEP.steps,
            "metric": 2 * quiet.steps,
        }


@law
def what_was_not_done_is_given_back_and_no_more(folder, kind):
    done = replace(STEP, steps=4)
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
        ledger.spend(release(), [done], b"x")
        assert ledger.epsilon() == cost(done)


@law
def no_more_is_spent_than_was_reserved(folder, kind):
    worse = (
        replace(STEP, steps=11),
        replace(STEP, noise=0.99),
        replace(STEP, rate=0.06),
    )
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
        for event in worse:
            with pytest.raises(LedgerError, match="nothing may be sent"):
                ledger.spend(release(), [event], b"x")
        assert ledger.cached(release()) is None
        assert ledger.epsilon() == cost(STEP)


@law
def the_budget_of_a_run_holds_to_the_last_digit(folder, kind):
    limit = cost(times(3))
    with open_ledger(folder, kind, epsilon=limit) as ledger:
        for number in (1, 2, 3):
            ledger.reserve(release(number), [STEP])
        with pytest.raises(BudgetExhausted, match="budget of the run") as e:
            ledger.reserve(release(4), [replace(STEP, steps=1)])
        assert (e.value.budget, e.value.spent) == (limit, limit)
        assert e.value.asked > limit
        ledger.reserve(release(1, run="s"), [STEP])


@law
def the_budget_of_the_site_holds_over_all_runs(folder, kind):
    site = Budget(cost(times(3)), DELTA)
    for run in ("q", "r", "s"):
        with open_ledger(folder, kind, site=site) as ledger:
            ledger.reserve(release(run=run), [STEP])
    with open_ledger(folder, kind, site=site) as ledger:
        with pytest.raises(BudgetExhausted, match="budget of the site"):
            ledger.reserve(release(run="t"), [STEP])
        assert ledger.epsilon() == site.epsilon


@law
def each_budget_has_its_delta(folder, kind):
    tight = Budget(epsilon([STEP], DELTA / 1000), DELTA / 1000)
    assert cost(times(2)) < tight.epsilon
    with open_ledger(folder, kind, site=tight) as ledger:
        ledger.reserve(release(1), [STEP])
        with pytest.raises(BudgetExhausted, match="budget of the site"):
            ledger.reserve(release(2), [STEP])
        assert ledger.epsilon() == epsilon([STEP], tight.delta)
        assert ledger.epsilon("r") == cost(STEP)


@law
def a_refusal_spends_nothing(folder, kind):
    with open_ledger(folder, kind, epsilon=cost(STEP)) as ledger:
        before = ledger.head
        with pytest.raises(BudgetExhausted):
            ledger.reserve(release(), [times(2)])
        assert (ledger.head, ledger.epsilon()) == (before, 0.0)
        ledger.reserve(release(), [STEP])


@law
def the_same_bytes_again_are_free(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
        assert ledger.cached(release()) is None
        ledger.spend(release(), [STEP], b"the update")
    for acknowledged in (False, True):
        with open_ledger(folder, kind) as ledger:
            assert ledger.cached(release()) == b"the update"
            assert ledger.cached(release(attempt=2)) == b"the update"
            if acknowledged:
                ledger.released(release(attempt=2))
                ledger.released(release())
            assert ledger.epsilon() == cost(STEP)


@law
def another_start_round_or_run_has_no_bytes_yet(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
        ledger.spend(release(), [STEP], b"the update")
        for other in (release(start="b" * 64), release(2), release(run="s")):
            assert ledger.cached(other) is None


@law
def damaged_bytes_are_not_sent(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
        ledger.spend(release(), [STEP], b"the update")
        [kept] = (folder / KEY / "releases").iterdir()
        kept.write_bytes(b"the upgate")
        assert ledger.cached(release()) is None
        kept.unlink()
        assert ledger.cached(release()) is None


@law
def only_who_reserved_can_take_it_back(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(1), [STEP])
        ledger.reserve(release(2), [STEP])
        ledger.void(release(2))
        assert ledger.epsilon() == cost(STEP)
    with open_ledger(folder, kind) as ledger:
        with pytest.raises(LedgerError, match="another process"):
            ledger.void(release(1))
        with pytest.raises(LedgerError, match="not reserved"):
            ledger.void(release(2))
        assert ledger.epsilon() == cost(STEP)


@law
def nothing_is_spent_that_was_not_reserved(folder, kind):
    with open_ledger(folder, kind) as ledger:
        with pytest.raises(LedgerError, match="reserve it first"):
            ledger.spend(release(), [STEP], b"x")
        with pytest.raises(LedgerError, match="never spent"):
            ledger.released(release())
        ledger.reserve(release(), [STEP])
        with pytest.raises(LedgerError, match="never spent"):
            ledger.released(release())
        ledger.spend(release(), [STEP], b"x")
        with pytest.raises(LedgerError, match="reserve it first"):
            ledger.spend(release(), [STEP], b"x")


@law
def two_processes_see_what_the_other_spent(folder, kind):
    limit = cost(times(2))
    with (
        open_ledger(folder, kind, epsilon=limit) as one,
        open_ledger(folder, kind, epsilon=limit) as two,
    ):
        one.reserve(release(1), [STEP])
        two.reserve(release(2), [STEP])
        for ledger in (one, two):
            with pytest.raises(BudgetExhausted):
                ledger.reserve(release(3), [STEP])
        one.spend(release(1), [STEP], b"x")
        assert two.cached(release(1)) == b"x"
        assert one.head == two.head


@law
def a_deleted_ledger_is_not_a_new_one(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
    shutil.rmtree(folder / KEY)
    for _ in range(2):
        with pytest.raises(LedgerError, match="is missing"):
            open_ledger(folder, kind)


@law
def a_ledger_of_other_data_is_refused(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(), [STEP])
    (folder / KEY).rename(folder / OTHER_KEY)
    with pytest.raises(LedgerError, match="another data set"):
        open_ledger(folder, kind, key=OTHER_KEY)


@law
def a_rolled_back_file_is_refused(folder, kind):
    path = folder / KEY / "ledger"
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(1), [STEP])
        before = path.read_bytes()
        ledger.reserve(release(2), [STEP])
        ledger.reserve(release(3), [STEP])
    path.write_bytes(before)
    with pytest.raises(LedgerError, match="ends in line 1; its head file knows line 3"):
        open_ledger(folder, kind)


@law
def a_rolled_back_folder_is_refused_by_who_saw_more(folder, kind):
    with open_ledger(folder, kind) as ledger:
        ledger.reserve(release(1), [STEP])
        early = ledger.head
        shutil.copytree(folder / KEY, folder / "backup")
        ledger.reserve(release(2), [STEP])
        late = ledger.head
    with open_ledger(folder, kind, expected=early):
        pass
    shutil.rmtree(folder / KEY)
    (folder / "backup").rename(folder / KEY)
    with pytest.raises(LedgerError, match="rolled back"):
        open_ledger(folder, kind, expected=late)


@law
def a_unit_is_not_mixed_with_another(folder, kind):
    open_ledger(folder, kind).__exit__(None, None, None)
    with pytest.raises(LedgerError, match="protects one record, this run one client"):
        open_ledger(folder, kind, unit="client")
