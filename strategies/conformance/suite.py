"""Runs the laws over a strategy, with every adapter method it takes."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora.errors import FedloraError
from fedlora.strategies.conformance.counting import COUNTING
from fedlora.strategies.conformance.federation import (
    MIXED,
    NAMES,
    RANK,
    Federation,
    Maker,
    Method,
    admit,
)
from fedlora.strategies.conformance.law import Law, LawBroken, require
from fedlora.strategies.conformance.outcome import OUTCOME
from fedlora.strategies.conformance.protocol import PROTOCOL
from fedlora.strategies.conformance.purity import PURITY

HERE = Path(__file__).resolve().parent
Verdict = Literal["kept", "waived", "broken"]


@dataclass(frozen=True)
class Finding:
    """What became of one law.

    Attributes:
        law: the law.
        method: adapter method it was tried with; empty if no method could be tried.
        ranks: of the clients.
        verdict: "waived" when it is broken, but declared in `Strategy.waives`.
        found, expected: of a law that is not kept.
    """

    law: Law
    method: str
    ranks: tuple[int, ...]
    verdict: Verdict
    found: str = ""
    expected: str = ""


def _waivers(federation: Federation) -> None:
    waivable = {law.name for law in LAWS if law.waivable}
    for name, reason in dict(federation.unchecked().waives).items():
        known = ", ".join(sorted(waivable))
        require(name in waivable, f"waives names {name!r}", f"one of {known}")
        told = isinstance(reason, str) and len(reason.split()) >= 3
        require(told, f"waives[{name!r}] = {reason!r}", "the reason in a few words")


LAWS = (
    Law(
        "waivers",
        "A law is waived by its name and with the reason.",
        "the name is misspelt, or the law is one that every run relies on",
        "the class attribute waives",
        _waivers,
        gate=True,
    ),
    *PROTOCOL,
    *PURITY,
    *COUNTING,
    *OUTCOME,
)


def federations(make: Maker, methods: Mapping[str, Method]) -> list[Federation]:
    """One for every adapter method and set of ranks that the strategy's `check` takes.

    One that fails in another way than by refusing is taken, so that a law explains it.
    """
    found = []
    for method in methods:
        for ranks in ((RANK,) * len(NAMES), MIXED):
            federation = Federation(make, methods, method, ranks)
            mixed = len(set(ranks)) > 1
            try:
                strategy = federation.unchecked()
                admit(federation, strategy)
                mixed = mixed and not strategy.hetero_rank
            except FedloraError:
                continue
            except (Exception, SystemExit):  # a plug-in may fail in any way it likes
                pass
            if not mixed:
                found.append(federation)
    return found


def try_law(federation: Federation, law: Law) -> Finding | None:
    """The finding of one law; None when it says nothing about this strategy."""
    place = (law, federation.method.name, federation.ranks)
    try:
        strategy = federation.unchecked()
        if not law.applies(federation, strategy):
            return None
        law.run(federation)
    except LawBroken as e:
        found, expected = e.found, e.expected
    except (Exception, SystemExit) as e:  # a plug-in may fail in any way it likes
        found = f"{type(e).__name__}: {e}{_where(e)}"
        expected = "no exception"
    else:
        return Finding(*place, "kept")
    return Finding(*place, "waived" if _waived(federation, law) else "broken", found, expected)


def findings(federation: Federation, laws: Sequence[Law] = LAWS) -> Iterator[Finding]:
    """The findings of all laws, as they are made; none after a gate that is broken."""
    for law in laws:
        finding = try_law(federation, law)
        if finding is None:
            continue
        yield finding
        if law.gate and finding.verdict == "broken":
            return


def _waived(federation: Federation, law: Law) -> bool:
    try:
        return law.waivable and law.name in federation.unchecked().waives
    except (Exception, SystemExit):  # a plug-in may fail in any way it likes
        return False


def _where(error: BaseException) -> str:
    """The innermost line of the plug-in in a traceback, or else of what it called."""
    frames = list(traceback.extract_tb(error.__traceback__))
    outside = [f for f in frames if not Path(f.filename).resolve().is_relative_to(HERE)]
    own = [f for f in outside if not {"fedlora", "torch"} & set(Path(f.filename).parts)]
    for frame in reversed(own or outside):
        return f" ({frame.filename}, line {frame.lineno}, in {frame.name})"
    return ""
