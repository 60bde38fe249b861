"""A history of what was acknowledged, kept by the harness, and the checker that reads it.

As Jepsen does (https://jepsen.io, "Jepsen's histories"), every operation is written down when it
begins and when it is done. One that was done has happened and must be found; one that only began
may have happened or not. The history comes from `witness/sitecustomize.py`, which looks at the
system calls of every process, or from a link of the test's own; what the run left is read here
with nothing but json and hashlib, so that neither shares a line with the code under test.
"""

import base64
import hashlib
import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

What = Literal["trained", "accepted", "committed"]


@dataclass(frozen=True)
class Operation:
    """One line of a history.

    Attributes:
        what: an update was kept by its client, a whole update by the server, a round by the server.
        done: False when it begins.
        key: (client, round, attempt), or (round,) of a commit.
        digest: of the update's payload, or of the round's record.
        at: monotonic seconds.
    """

    what: What
    done: bool
    key: tuple[Any, ...]
    digest: str
    at: float = 0.0


def read_witness(log: Path, run: str) -> list[Operation]:
    """What happened in one run, in the order in which it was written down."""
    found = []
    lines = log.read_text().splitlines() if log.is_file() else []
    for line in map(json.loads, lines):
        operation = _operation(line, run)
        if operation is not None:
            found.append(operation)
    return found


def _operation(line: dict[str, Any], run: str) -> Operation | None:
    path, data = Path(line["path"]), base64.b64decode(line["data"])
    done, at = line["kind"] == "done", line["at"]
    if path.name == "HEAD" and path.parts[-3:-1] == (run, "folder"):
        number, digest, _ = data.decode().split()
        return Operation("committed", done, (int(number),), digest, at)
    if path.parts[-3] == "inbox" and path.parts[-4] == run:
        receipt = json.loads(_content(data))
        number, attempt = map(int, path.parts[-2].split("."))
        return Operation(
            "accepted", done, (receipt["client"], number, attempt), receipt["sha256"], at
        )
    if path.parts[-2] == "outbox":
        made = json.loads(_content(data))
        if made["run"] == run:
            key = (made["client"], made["round"], made["attempt"])
            return Operation("trained", done, key, made["sha256"], at)
    return None


def _content(data: bytes) -> bytes:
    """What stands below the digest in its first line."""
    digest, _, content = data.partition(b"\n")
    assert hashlib.sha256(content).hexdigest().encode() == digest
    return content


@dataclass(frozen=True)
class Found:
    """A round as it stands in a run folder.

    Attributes:
        digest: of its record.
        previous: digest of the record before it, as the record says.
        attempt: at the round.
        contributions: clients whose updates it merged.
        missing: clients of which nothing came.
        rejected: clients whose updates were refused.
    """

    digest: str
    previous: str | None
    attempt: int
    contributions: tuple[str, ...]
    missing: tuple[str, ...]
    rejected: tuple[str, ...]


def read_rounds(folder: Path) -> dict[int, Found]:
    """The rounds of a run folder."""
    found = {}
    for path in sorted(folder.glob("rounds/[0-9]*/round.json")):
        text = path.read_bytes()
        record = json.loads(text)
        events = record["events"]
        [missing] = [e["missing"] for e in events if e["event"] == "round"] or [[]]
        found[record["round"]] = Found(
            hashlib.sha256(text).hexdigest(),
            record["previous"],
            record.get("attempt", 0),
            tuple(name for e in events if e["event"] == "round" for name in e["clients"]),
            tuple(missing),
            tuple(e["client"] for e in events if e["event"] == "rejected"),
        )
    return found


def problems(history: Iterable[Operation], rounds: dict[int, Found], last: int) -> list[str]:
    """Everything that is wrong with a run; empty when it kept its promises.

    Args:
        history: of this run.
        rounds: as they stand in its folder.
        last: number of the job's last round.
    """
    history = list(history)
    return [
        *_chain(rounds, last),
        *_commits(history, rounds),
        *_contributions(history, rounds),
        *_trainings(history),
    ]


def _chain(rounds: dict[int, Found], last: int) -> Iterable[str]:
    if sorted(rounds) != list(range(last + 1)):
        yield f"rounds {sorted(rounds)} stand; expected 0 to {last}"
    for number, found in rounds.items():
        if number and number - 1 in rounds and found.previous != rounds[number - 1].digest:
            yield f"round {number} does not follow the round {number - 1} that stands"


def _commits(history: list[Operation], rounds: dict[int, Found]) -> Iterable[str]:
    """No acknowledged round is lost, changed or done twice, and none came from nowhere."""
    commits = [entry for entry in history if entry.what == "committed" and entry.key[0]]
    begun = {(entry.key[0], entry.digest) for entry in commits}
    for (number, digest), count in Counter(
        (entry.key[0], entry.digest) for entry in commits if entry.done
    ).items():
        if number not in rounds or rounds[number].digest != digest:
            yield f"round {number} was acknowledged and is lost"
        if count != 1:
            yield f"round {number} was committed {count} times"
    for number, found in rounds.items():
        if number and (number, found.digest) not in begun:
            yield f"round {number} stands, and nobody committed it"


def _contributions(history: list[Operation], rounds: dict[int, Found]) -> Iterable[str]:
    """A round holds each client at most once, and just those whose update was accepted."""
    accepted = Counter(e.key for e in history if e.what == "accepted" and e.done)
    begun = {e.key for e in history if e.what == "accepted"}
    for key, count in accepted.items():
        if count != 1:
            yield f"the update {key} was accepted {count} times"
    for number, found in rounds.items():
        for client, count in Counter(found.contributions).items():
            if count != 1:
                yield f"round {number} counts {client} {count} times"
            if (client, number, found.attempt) not in begun:
                yield f"round {number} counts {client}, whose update never came"
        came = {
            client for client, of, attempt in accepted if (of, attempt) == (number, found.attempt)
        }
        # of a round that closed without waiting for all, an update may come too late
        if lost := came - {*found.contributions, *found.rejected, *found.missing}:
            yield f"round {number} lost the accepted update of {sorted(lost)}"


def _trainings(history: list[Operation]) -> Iterable[str]:
    """What a client made for one manifest it made once, and nothing else was accepted."""
    made: dict[tuple[Any, ...], set[str]] = defaultdict(set)
    times: Counter[tuple[Any, ...]] = Counter()
    for entry in history:
        if entry.what == "trained":
            made[entry.key].add(entry.digest)
            times[entry.key] += entry.done
    for key, digests in made.items():
        if len(digests) != 1 or times[key] > 1:
            yield f"the update {key} was made {times[key]} times, as {len(digests)} different ones"
    for entry in history:
        if entry.what == "accepted" and entry.digest not in made.get(entry.key, set()):
            yield f"an update {entry.key} was accepted that its client did not make"
