"""A site that is killed again and again while it trains, and an independent count of its steps.

The child is forked, kills itself (kill -9) at a random one of its next writes, syncs and
renames, and tells every step it takes, and everything it sends, to a log of the harness's own.
"""

import hashlib
import os
import random
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from fedlora.errors import BudgetExhausted
from fedlora.privacy.accounting import Event
from tests.privacy.ledger_laws import open_ledger, release

PLAN = (Event(0.05, 1.0, 6), Event(1.0, 20.0, 1, "metric"))
SPENT_OUT = 4


@dataclass
class Told:
    """What the log of the harness says.

    Attributes:
        steps: (rate, noise) -> steps that were really taken.
        asked: attempts that were begun.
        sent: (round, start) -> digests of what was sent.
        done: rounds that the server has.
    """

    steps: Counter
    asked: int
    sent: dict[tuple[int, str], set[str]]
    done: list[int]

    def events(self) -> list[Event]:
        return [Event(*pair, count) for pair, count in self.steps.items()]


def read_log(path: Path) -> Told:
    told = Told(Counter(), 0, {}, [])
    for line in path.read_text().splitlines():
        what, *rest = line.split()
        if what == "asked":
            told.asked += 1
        elif what == "step":
            told.steps[float(rest[0]), float(rest[1])] += 1
        elif what == "sent":
            told.sent.setdefault((int(rest[0]), rest[1]), set()).add(rest[2])
        elif what == "done":
            told.done.append(int(rest[0]))
    return told


def train(folder: Path, log: Path, rounds: int, budget: float) -> None:
    """Every round from the first that the server has not; as a client does after a restart."""
    done = read_log(log).done
    # not os.write, which is what dies
    with log.open("a", buffering=1) as say, open_ledger(folder, epsilon=budget) as ledger:
        for number in range(len(done) + 1, rounds + 1):
            wanted = release(number, start=hashlib.sha256(b"%d" % number).hexdigest())
            payload = ledger.cached(wanted)
            if payload is None:
                say.write("asked\n")
                ledger.reserve(wanted, PLAN)
                for event in PLAN:
                    for _ in range(event.steps):
                        say.write(f"step {event.rate!r} {event.noise!r}\n")
                payload = os.urandom(16)
                ledger.spend(wanted, PLAN, payload)
            say.write(f"sent {number} {wanted.start_sha256} {payload.hex()}\n")
            ledger.released(wanted)
            say.write(f"done {number}\n")


def deadly(point: int, moment: str) -> None:
    """Kills this process at its `point`-th write, sync or rename: before, after, or half way."""
    count = 0

    def arm(name: str) -> None:
        real = getattr(os, name)

        def call(*args):
            nonlocal count
            count += 1
            if count != point:
                return real(*args)
            if moment == "half" and name == "write":
                real(args[0], bytes(args[1])[: len(args[1]) // 2])
            elif moment == "after":
                real(*args)
            os.kill(os.getpid(), signal.SIGKILL)
            raise AssertionError("unreachable")

        setattr(os, name, call)

    for name in ("write", "fsync", "rename", "truncate"):
        arm(name)


def lives(folder: Path, log: Path, rounds: int, budget: float, chance: random.Random | None) -> str:
    """One life of the site: "killed", "finished", "exhausted" or "failed".

    Args:
        chance: of the kill; None for none.
    """
    log.touch()
    point = chance.randint(1, 90) if chance else 0
    moment = chance.choice(("before", "half", "after")) if chance else ""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            deadly(point, moment)
            train(folder, log, rounds, budget)
            code = 0
        except BudgetExhausted:
            code = SPENT_OUT
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status):
        return "killed"
    return {0: "finished", SPENT_OUT: "exhausted"}.get(os.WEXITSTATUS(status), "failed")
