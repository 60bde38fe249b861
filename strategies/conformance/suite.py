"""Runs the laws over a strategy, with every adapter method it takes."""

import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from fedlora.errors import FedloraError
from fedlora.strategies.conformance.counting import COUNTING
from fedlora.strategies.conformance.federation import MIXED, NAMES, RANK, Federation, Maker, Method
from fedlora.strategies.conformance.law import Law, LawBroken
from fedlora.strategies.conformance.outcome import OUTCOME
from fedlora.strategies.conformance.protocol import PROTOCOL
from fedlora.strategies.conformance.purity import PURITY

HERE = Path(__file__).resolve().parent
LAWS = (*PROTOCOL, *PURITY, *COUNTING, *OUTCOME)
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


def federations(make: Maker, methods: Mapping[str, Method]) -> list[Federation]:
    """One for every adapter method and set of ranks that the strategy's `check` takes."""
    found = []
    for method in methods:
        for ranks in ((RANK,) * len(NAMES), MIXED):
            federation = Federation(make, methods, method, ranks)
            try:
                strategy = federation.strategy()
                strategy.check(federation.conditions())
            except FedloraError:
                continue
            if len(set(ranks)) == 1 or strategy.hetero_rank:
                found.append(federation)
    return found


def try_law(federation: Federation, law: Law) -> Finding | None:
    """The finding of one law; None when it says nothing about this strategy."""
    place = (law, federation.method.name, federation.ranks)
    try:
        strategy = federation.strategy()
        if not law.applies(federation, strategy):
            return None
        law.run(federation)
    except LawBroken as e:
        found, expected = e.found, e.expected
    except Exception as e:  # a plug-in may fail in any way it likes
        found = f"{type(e).__name__}: {e}{_where(e)}"
        expected = "no exception"
    else:
        return Finding(*place, "kept")
    waived = law.waivable and law.name in strategy.waives
    return Finding(*place, "waived" if waived else "broken", found, expected)


def findings(federation: Federation, laws: Sequence[Law] = LAWS) -> Iterator[Finding]:
    """The findings of all laws, as they are made; none after a gate that is broken."""
    for law in laws:
        finding = try_law(federation, law)
        if finding is None:
            continue
        yield finding
        if law.gate and finding.verdict == "broken":
            return


def _where(error: BaseException) -> str:
    """The innermost line of the plug-in in a traceback, or else of what it called."""
    frames = list(traceback.extract_tb(error.__traceback__))
    outside = [f for f in frames if not Path(f.filename).resolve().is_relative_to(HERE)]
    own = [f for f in outside if not {"fedlora", "torch"} & set(Path(f.filename).parts)]
    for frame in reversed(own or outside):
        return f" ({frame.filename}, line {frame.lineno}, in {frame.name})"
    return ""
