"""Faults of what the ledger is charged."""

import tempfile
from dataclasses import replace
from pathlib import Path

from fedlora.privacy.audit.subject import open_ledger
from fedlora.privacy.ledger import Ledger
from fedlora.privacy.mechanism import Mechanism
from tests.privacy.mutant import MUTANTS, Mutant, ledger, mechanism


@mechanism("accounting")
class EmptyBatchesDrawnAgain(Mechanism):
    def batch(self):
        batch = Mechanism.batch(self)
        return batch or self.batch()


@ledger("accounting")
class AccountantNeverAdvanced(Ledger):
    def reserve(self, release, events, details=None):
        super().reserve(release, [replace(event, steps=0) for event in events], details)

    def spend(self, release, events_actual, payload, details=None):
        nothing = [replace(event, steps=0) for event in events_actual]
        super().spend(release, nothing, payload, details)


@ledger("accounting")
class NoiseOverstated(Ledger):
    def charged(self, run=None):
        return [replace(event, noise=1.1 * event.noise) for event in super().charged(run)]


@ledger("accounting")
class EmptyStepsNotCharged(Ledger):
    def spend(self, release, events_actual, payload, details=None):
        fewer = [replace(event, steps=event.steps - 1) for event in events_actual]
        super().spend(release, fewer, payload, details)


def afresh(folder):
    return open_ledger(Path(tempfile.mkdtemp(dir=folder)))


MUTANTS["accountant reset on restart"] = Mutant(lambda s: replace(s, ledger=afresh), "accounting")
