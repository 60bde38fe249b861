"""Any sequence of calls and restarts, against a plain list of what was asked for."""

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from fedlora.errors import BudgetExhausted
from fedlora.privacy.accounting import Event
from fedlora.privacy.budget import Budget
from tests.privacy.ledger_laws import KEY, cost, open_ledger, release

RUNS = st.sampled_from(("r", "s"))
ROUNDS = st.integers(1, 3)
EVENTS = st.builds(
    Event, st.sampled_from((0.05, 1.0)), st.sampled_from((1.0, 4.0)), st.integers(1, 20)
)
RUN_BUDGET, SITE_BUDGET = cost(Event(0.05, 1.0, 60)), cost(Event(0.05, 1.0, 90))


class Site(RuleBasedStateMachine):
    """The model is a list of [release, events charged, bytes or None, open?]."""

    @initialize()
    def begin(self):
        self.folder = Path(tempfile.mkdtemp())
        self.model = []
        self.mine = []
        self.open()

    def open(self):
        self.ledger = open_ledger(self.folder, epsilon=RUN_BUDGET, site=Budget(SITE_BUDGET, 1e-5))

    def charged(self, run=None):
        return [
            event
            for asked, events, *_ in self.model
            if run in (None, asked.run)
            for event in events
        ]

    def newest(self, run, number):
        for row in reversed(self.model):
            if row[0] == release(number, run=run) and row[3]:
                return row
        return None

    @rule(run=RUNS, number=ROUNDS, events=st.lists(EVENTS, min_size=1, max_size=2))
    def reserve(self, run, number, events):
        wanted = release(number, run=run)
        fits = (
            cost(*self.charged(run), *events) <= RUN_BUDGET
            and cost(*self.charged(), *events) <= SITE_BUDGET
        )
        try:
            self.ledger.reserve(wanted, events)
        except BudgetExhausted:
            assert not fits
        else:
            assert fits
            row = [wanted, events, None, True]
            self.model.append(row)
            self.mine.append(row)

    @rule(run=RUNS, number=ROUNDS, part=st.floats(0.0, 1.0), payload=st.binary(max_size=8))
    def spend(self, run, number, part, payload):
        if row := self.newest(run, number):
            done = [replace(event, steps=int(event.steps * part)) for event in row[1]]
            self.ledger.spend(row[0], done, payload)
            row[1:] = done, payload, False

    @rule(run=RUNS, number=ROUNDS)
    def void(self, run, number):
        row = self.newest(run, number)
        if row is not None and any(row is each for each in self.mine):
            self.ledger.void(row[0])
            row[1:] = [], None, False

    @rule(run=RUNS, number=ROUNDS, attempt=st.integers(1, 3))
    def send(self, run, number, attempt):
        wanted = release(number, attempt, run)
        kept = [
            row[2]
            for row in self.model
            if row[0] == release(number, run=run) and row[2] is not None
        ]
        payload = self.ledger.cached(wanted)
        assert payload == (kept[-1] if kept else None)
        if kept:
            self.ledger.released(wanted)

    @rule()
    def restart(self):
        self.ledger.__exit__(None, None, None)
        self.mine = []
        self.open()

    @precondition(lambda self: self.ledger.head[0] > 0)
    @rule(share=st.floats(0.0, 1.0, exclude_max=True))
    def tear(self, share):
        """The last line only in part on disk."""
        self.restart()
        path = self.folder / KEY / "ledger"
        data = path.read_bytes()
        last = data.rindex(b"\n", 0, -1) + 1
        path.write_bytes(data[: last + int(share * (len(data) - last))])

    @invariant()
    def it_says_what_was_charged(self):
        if hasattr(self, "ledger"):
            assert self.ledger.epsilon() == cost(*self.charged()) <= SITE_BUDGET
            for run in ("r", "s"):
                assert self.ledger.epsilon(run) == cost(*self.charged(run)) <= RUN_BUDGET

    def teardown(self):
        if hasattr(self, "ledger"):
            self.ledger.__exit__(None, None, None)
            shutil.rmtree(self.folder)
            shutil.rmtree(self.folder.with_name(self.folder.name + "-known"))


Site.TestCase.settings = settings(max_examples=20, stateful_step_count=20, deadline=None)
TestSite = Site.TestCase
