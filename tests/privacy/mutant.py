"""What a faulty private training is: a sound subject with one thing put in its place."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from fedlora.privacy.audit.subject import Subject, open_ledger


@dataclass(frozen=True)
class Mutant:
    """One fault.

    Attributes:
        make: the sound subject -> the faulty one.
        oracle: who must notice it; others may as well.
        kind: of the model that the fault needs, see `tests.privacy.models`.
    """

    make: Callable[[Subject], Subject]
    oracle: str
    kind: str = "llama"


def mechanism(oracle, kind="llama"):
    """Registers a faulty mechanism under its class's name."""

    def register(cls):
        faulty = dataclass(frozen=True)(cls)
        MUTANTS[_words(cls.__name__)] = Mutant(lambda s: replace(s, mechanism=faulty), oracle, kind)
        return faulty

    return register


def trainer(oracle, kind="llama"):
    def register(cls):
        MUTANTS[_words(cls.__name__)] = Mutant(lambda s: replace(s, trainer=cls), oracle, kind)
        return cls

    return register


def _words(name):
    return "".join(f" {c.lower()}" if c.isupper() else c for c in name).strip()


MUTANTS: dict[str, Mutant] = {}


def ledger(oracle):
    def register(cls):
        MUTANTS[_words(cls.__name__)] = Mutant(
            lambda s: replace(s, ledger=lambda folder: open_ledger(folder, cls)), oracle
        )
        return cls

    return register
