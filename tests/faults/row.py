"""A row of the fault matrix, and how a page shows it."""

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Case:
    """A test.

    Attributes:
        test: path below tests/, and name.
        repetitions: of `make test-long`, over seeds, times or trials; 1 for a test that walks
            through all cases there are.
    """

    test: str
    repetitions: int = 1


@dataclass(frozen=True)
class Row:
    """One fault.

    Attributes:
        fault: what happens.
        promise: what holds nevertheless.
        local: tests of the parts in question, with real processes, disks and sockets.
        deployed: tests through Flower: server and clients in processes of their own, with TLS.
        later: what is not tested yet, and with what it will be.
    """

    fault: str
    promise: str
    local: tuple[Case, ...] = ()
    deployed: tuple[Case, ...] = ()
    later: str = ""


def of(path: str, *names: str, times: int = 1) -> tuple[Case, ...]:
    """Tests of one file, without the prefix of their names."""
    return tuple(Case(f"{path}.py::test_{name}", times) for name in names)


def render(rows: Iterable[Row]) -> str:
    """The rows as a Markdown table."""
    head = ("fault", "what holds", "tests of the parts", "tests through Flower", "not yet")
    lines = [_line(head), _line("---" for _ in head)]
    for row in rows:
        cases = (_cases(row.local), _cases(row.deployed))
        lines.append(_line((row.fault, row.promise, *cases, row.later)))
    return "\n".join(lines)


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |".replace("  |", " |")


def _cases(cases: Iterable[Case]) -> str:
    return "<br>".join(map(_case, cases))


def _case(case: Case) -> str:
    path, _, name = case.test.partition("::")
    words = name.removeprefix("test_").replace("_", " ")
    times = f" ({case.repetitions} times)" if case.repetitions > 1 else ""
    return f"[{words}](../tests/{path}){times}"
