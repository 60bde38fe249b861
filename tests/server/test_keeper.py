"""The keeper of runs: a run without an end has a ServerApp, and at most one."""

import json
from threading import Event

import pytest

from fedlora.errors import RunFailed
from fedlora.server.home import Home, Outcome
from fedlora.server.journal import Journal
from fedlora.server.keeper import MOST_DEATHS, START_S, TELL_S, Keeper
from fedlora.server.run_events import FollowedFolders


class Control:
    """A SuperLink that counts."""

    def __init__(self):
        self.started, self.stopped, self.is_away = [], [], False

    def start_run(self, run):
        if self.is_away:
            raise RunFailed("away")
        self.started.append(run)
        return len(self.started)

    def stop_run(self, flower_run):
        self.stopped.append(flower_run)


@pytest.fixture
def kept(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    place = home.place("0123456789abcdef")
    place.submit("", b"")
    clock = [0.0]
    control = Control()
    return Keeper(home, control, lambda: clock[0]), control, place, clock


def test_a_submitted_run_gets_one_serverapp(kept):
    keeper, control, place, clock = kept
    for _ in range(5):
        keeper.tend()
        clock[0] += START_S / 10
    assert control.started == [place.run]


def test_a_run_that_is_worked_on_is_left_alone(kept):
    keeper, control, place, clock = kept
    keeper.tend()
    with place.working():
        for _ in range(3):
            clock[0] += 10 * START_S
            keeper.tend()
    assert (control.started, control.stopped) == ([place.run], [])


def test_a_dead_serverapp_is_replaced_at_once(kept):
    keeper, control, place, _ = kept
    keeper.tend()
    with place.working():
        keeper.tend()
    keeper.tend()
    assert control.started == [place.run] * 2
    assert control.stopped == [1]


def test_one_that_never_begins_is_replaced_after_a_while(kept):
    keeper, control, place, clock = kept
    keeper.tend()
    clock[0] = START_S
    keeper.tend()
    assert (control.started, control.stopped) == ([place.run] * 2, [1])


def test_an_ended_run_is_not_started_again_until_it_is_reopened(kept):
    keeper, control, place, _ = kept
    keeper.tend()
    with place.working():
        keeper.tend()
        place.end(Outcome("failed", 3, "no quorum"))
    for _ in range(3):
        keeper.tend()
    assert control.started == [place.run]
    place.reopen()
    keeper.tend()
    assert control.started == [place.run] * 2


def test_deaths_without_a_round_end_the_run(kept):
    keeper, control, place, _ = kept
    for _ in range(3 * MOST_DEATHS):
        keeper.tend()
        if place.outcome() is None:
            with place.working():
                keeper.tend()
    outcome = place.outcome()
    assert outcome.exit_code == 3
    assert "died without committing" in outcome.detail
    assert len(control.started) == MOST_DEATHS
    last = json.loads(place.events.read_text().splitlines()[-1])
    assert (last["event"], last["exit_code"]) == ("failed", 3)


def test_deaths_between_rounds_do_not(kept):
    keeper, control, place, _ = kept
    place.folder.mkdir()
    for number in range(3 * MOST_DEATHS):
        (place.folder / "HEAD").write_text(str(number))
        keeper.tend()
        with place.working():
            keeper.tend()
    assert place.outcome() is None
    assert len(control.started) == 3 * MOST_DEATHS


def test_a_superlink_that_is_away_is_asked_again(kept):
    keeper, control, place, _ = kept
    control.is_away = True
    keeper.tend()
    control.is_away = False
    keeper.tend()
    assert control.started == [place.run]


@pytest.mark.parametrize("torn", [b"", b'{"event": "fai'])
@pytest.mark.parametrize(
    ("outcome", "told"),
    [
        (Outcome("failed", 3, "why"), {"event": "failed", "exit_code": 3, "why": "why"}),
        (Outcome("finished", 0), {"event": "end", "round": 2}),
    ],
    ids=["failed", "finished"],
)
def test_a_run_whose_end_was_not_told_is_ended_for_those_who_watch(kept, outcome, told, torn):
    """Its ServerApp was killed between its outcome and its last event, or amid that event."""
    keeper, _, place, clock = kept
    before = [{"event": "round", "round": number} for number in (1, 2)]
    journal = Journal(place.events)
    for event in before:
        journal.append(event)
    with place.events.open("ab") as file:
        file.write(torn)
    with place.working():
        place.end(outcome)
        for _ in range(3):
            keeper.tend()
            clock[0] += TELL_S
    assert journal.read() == before
    for _ in range(5):
        keeper.tend()
        clock[0] += TELL_S
    assert journal.read() == [*before, told]
    followed = FollowedFolders(keeper.home.runs).follow(place.run, 0, Event())
    assert [json.loads(event.json) for event in followed] == [*before, told]


def test_an_end_that_was_told_is_not_told_again(kept):
    keeper, _, place, clock = kept
    for what in ("failed", "failed again"):
        # a run that is continued, and fails again
        place.reopen()
        Journal(place.events).reopen()
        keeper.tend()
        told = {"event": "failed", "exit_code": 3, "why": what}
        Journal(place.events).append(told)
        place.end(Outcome("failed", 3, what))
        for _ in range(3):
            clock[0] += TELL_S
            keeper.tend()
        assert Journal(place.events).read() == [told]
