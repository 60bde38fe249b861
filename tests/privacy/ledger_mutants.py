"""Ledgers with one mistake each, and the law that finds it.

Each is a mistake that such code was seen to make, or would be easy to make here.
"""

import contextlib
import shutil
from contextlib import contextmanager
from dataclasses import replace

from opacus.accountants import GaussianAccountant

from fedlora.errors import LedgerError
from fedlora.privacy.accounting import Event, epsilon, merged
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.ledger_file import LedgerFile
from fedlora.storage import sealed

# law that must fail -> the broken ledgers that must fail it
KILLED_BY: dict[str, list[type[Ledger]]] = {}


def killed_by(law):
    def note(kind):
        KILLED_BY.setdefault(law, []).append(kind)
        return kind

    return note


@killed_by("rounds_attempts_and_runs_add_up_over_restarts")
class ForgetsOnRestart(Ledger):
    """As state in the memory of a process, or an accountant made anew for every round."""

    @classmethod
    def open(cls, *args, **kwargs):
        opened = super().open(*args, **kwargs)
        opened.since = opened.head[0]
        return opened

    def charged(self, run=None):
        with self._state() as state:
            return merged(
                event
                for seq, held in state.reservations.items()
                if seq > self.since and run in (None, held.entry.release.run)
                for event in held.events
            )


@killed_by("rounds_attempts_and_runs_add_up_over_restarts")
class LastSpentReplaces(Ledger):
    def charged(self, run=None):
        with self._state() as state:
            of_run = [
                held
                for held in state.reservations.values()
                if run in (None, held.entry.release.run)
            ]
            return merged(of_run[-1].events) if of_run else []


@killed_by("a_reservation_counts_before_anything_is_trained")
class ReservesAfterSampling(Ledger):
    def reserve(self, release, events, details=None):
        self.later = (release, events)

    def spend(self, release, events_actual, payload, details=None):
        super().reserve(*self.later)
        super().spend(release, events_actual, payload)


@killed_by("rounds_attempts_and_runs_add_up_over_restarts")
class RetriesAreFree(Ledger):
    def reserve(self, release, events, details=None):
        free = [replace(event, steps=0) for event in events]
        super().reserve(release, free if release.attempt > 1 else events)

    def spend(self, release, events_actual, payload, details=None):
        free = [replace(event, steps=0) for event in events_actual]
        super().spend(release, free if release.attempt > 1 else events_actual, payload)


@killed_by("the_budget_of_the_site_holds_over_all_runs")
class PerRunOnly(Ledger):
    def __init__(self, file, budget, site):
        super().__init__(file, budget, None)


@killed_by("the_budget_of_a_run_holds_to_the_last_digit")
class PerSiteOnly(Ledger):
    def __init__(self, file, budget, site):
        super().__init__(file, Budget(None, budget.delta), site)


@killed_by("each_budget_has_its_delta")
class OneDeltaForAll(Ledger):
    def __init__(self, file, budget, site):
        super().__init__(file, budget, site and Budget(site.epsilon, budget.delta))


@killed_by("the_budget_of_a_run_holds_to_the_last_digit")
class GateLagsBehind(Ledger):
    """Asks whether the budget is spent, not whether it will be."""

    def reserve(self, release, events, details=None):
        whole, self._budget = self._budget, Budget(None, self._budget.delta)
        try:
            if epsilon(self.charged(release.run), whole.delta) > whole.epsilon:
                whole.after(self.charged(release.run), events, "run", str(release))
            super().reserve(release, events, details)
        finally:
            self._budget = whole


@killed_by("another_start_round_or_run_has_no_bytes_yet")
class CachesWithoutStart(Ledger):
    def cached(self, release):
        with self._state() as state:
            for held in state.reservations.values():
                past = held.entry.release
                if (past.run, past.round) == (release.run, release.round):
                    release = past
        return super().cached(release)


@killed_by("damaged_bytes_are_not_sent")
class SendsWhateverIsThere(Ledger):
    def cached(self, release):
        with self._state() as state:
            held = state.spent(release)
            with contextlib.suppress(OSError):
                return self._payload(held).read_bytes() if held else None


@killed_by("a_reservation_that_died_stays_charged")
class OpenReservationsAreFree(Ledger):
    def charged(self, run=None):
        with self._state() as state:
            return merged(
                event
                for held in state.reservations.values()
                if held.status != "RESERVED" and run in (None, held.entry.release.run)
                for event in held.events
            )


@killed_by("a_reservation_that_died_stays_charged")
class SecondTryReusesTheReservation(Ledger):
    def reserve(self, release, events, details=None):
        with self._state() as state:
            if state.unspent(release) is not None:
                return
        super().reserve(release, events, details)


@killed_by("only_who_reserved_can_take_it_back")
class AnyoneTakesBack(Ledger):
    @classmethod
    def open(cls, *args, **kwargs):
        opened = super().open(*args, **kwargs)
        with opened._state() as state:
            opened._mine |= set(state.reservations)
        return opened


@killed_by("two_processes_see_what_the_other_spent")
class ReadsOnce(Ledger):
    """A file that is read when it is opened, and never again."""

    @contextmanager
    def _state(self):
        if not hasattr(self, "held"):
            with super()._state() as state:
                self.held = state
        self._file._state = self.held
        yield self.held


@killed_by("a_refusal_spends_nothing")
class ChargesRefusals(Ledger):
    def reserve(self, release, events, details=None):
        whole, self._budget = self._budget, Budget(None, self._budget.delta)
        try:
            super().reserve(release, events, details)
        finally:
            self._budget = whole
        with self._state() as state:
            rest = state.charged(release.run)
        whole.after(rest, [], "run", str(release))


@killed_by("what_was_not_done_is_given_back_and_no_more")
class ChargesThePlanForEver(Ledger):
    def spend(self, release, events_actual, payload, details=None):
        with self._state() as state:
            planned = state.unspent(release).events
        super().spend(release, planned, payload, details)


@killed_by("different_noise_adds_up_as_a_list")
class StepsOfOneNoise(Ledger):
    """Counts steps, and takes the last noise for all."""

    def charged(self, run=None):
        found = super().charged(run)
        return [replace(found[-1], steps=sum(e.steps for e in found))] if found else []


@killed_by("a_deleted_ledger_is_not_a_new_one")
class MissingIsNew(Ledger):
    @classmethod
    def open(cls, folder, key, **kwargs):
        if not (folder / key / "ledger").exists():
            shutil.rmtree(folder.with_name(folder.name + "-known"), ignore_errors=True)
        return super().open(folder, key, **kwargs)


@killed_by("a_rolled_back_file_is_refused")
class TrustsTheFile(Ledger):
    """No head: whatever chain of entries is there is the whole truth."""

    @classmethod
    def open(cls, folder, key, **kwargs):
        path = folder / key
        if (path / "ledger").exists():
            last = (path / "ledger").read_bytes().splitlines(keepends=True)[-1]
            (path / "head").write_bytes(sealed(last))
        return super().open(folder, key, **kwargs)


@killed_by("a_rolled_back_folder_is_refused_by_who_saw_more")
class IgnoresWhatOthersSaw(Ledger):
    @classmethod
    def open(cls, folder, key, *, expected=None, **kwargs):
        return super().open(folder, key, **kwargs)


@killed_by("a_ledger_of_other_data_is_refused")
class AnyData(Ledger):
    @classmethod
    def open(cls, folder, key, *, unit, epsilon, delta, site=None, **kwargs):
        try:
            return super().open(
                folder, key, unit=unit, epsilon=epsilon, delta=delta, site=site, **kwargs
            )
        except LedgerError as e:
            if "another data set" not in str(e):
                raise
            return cls(LedgerFile(folder / key, 1.0), Budget(epsilon, delta), site)


@killed_by("a_unit_is_not_mixed_with_another")
class AnyUnit(Ledger):
    @classmethod
    def open(cls, folder, key, *, unit, **kwargs):
        return super().open(folder, key, unit="record", **kwargs)


@killed_by("no_more_is_spent_than_was_reserved")
class SpendsWhatItDidNotReserve(Ledger):
    def spend(self, release, events_actual, payload, details=None):
        with self._state() as state:
            planned = state.unspent(release).events
        super().spend(release, planned, payload, details)


def largest(events, delta):
    """The worst event instead of all."""
    return max((epsilon([event], delta) for event in events), default=0.0)


def one_step_each(events, delta):
    """Rounds instead of steps."""
    return epsilon([replace(event, steps=min(event.steps, 1)) for event in events], delta)


def amplified_twice(events, delta):
    """As if a secret choice of half of the clients hid them again."""
    return epsilon([replace(event, rate=event.rate / 2) for event in events], delta)


def noise_of_the_sum(events, delta):
    """As if the noise of the mean were in units of one sample's share."""
    return epsilon([replace(event, noise=event.noise * 1.5) for event in events], delta)


def central_limit(events, delta):
    """mu-GDP of Bu et al. 2020, arXiv 1911.11607, as Opacus' third accountant has it."""
    accountant = GaussianAccountant()
    [event] = merged(events)
    accountant.history = [(event.noise, event.rate, event.steps)]
    return float(accountant.get_epsilon(delta))


BROKEN_ACCOUNTING = {
    largest: [Event(0.05, 1.0, 100), Event(0.05, 1.2, 100)],
    one_step_each: [Event(0.05, 1.0, 100)],
    amplified_twice: [Event(0.05, 1.0, 100)],
    noise_of_the_sum: [Event(0.05, 1.0, 100)],
    central_limit: [Event(0.02, 1.0, 1000)],
}
