"""Kills the processes of a deployed federation, and checks what is left of its runs.

One federation serves all trials: each trial is a run of its own, in which processes are killed
outright (kill -9), each at a time that is uniform over the length of an undisturbed run. Times
count from when the server has taken the run, for nothing is promised of it before.
"""

import json
import os
import random
import signal
import subprocess
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fedlora.config.job import Job
from tests.deployed.federation import Deployed, call, digests, write_job
from tests.faults.history import Operation, problems, read_rounds, read_witness

WITNESS = Path(__file__).with_name("witness")
ROUNDS = 8
# several processes come back within a run, each when the machine has time for it
LONGEST_S = 1200.0
CLIENTS = ("client-000", "client-001")


def tiny_job() -> Job:
    """A job whose rounds take about a second, with nothing to download."""
    return Job.model_validate(
        {
            "model": {"name": "builtin:tiny-llama"},
            "data": {"max_length": 32, "max_rows": 40, "max_validation": 4},
            "partition": {"clients": len(CLIENTS)},
            "adapter": {"rank": 2, "targets": ["q_proj"]},
            "training": {"local_steps": 1, "batch_size": 2},
            "federation": {"rounds": ROUNDS, "deadline_s": 180.0},
            "evaluation": {"every": ROUNDS},
        }
    )


@dataclass(frozen=True)
class Target:
    """What is killed.

    Attributes:
        party: the server or a client.
        part: of the process's command line; empty for the supervisor itself, which is then
            started again, as an init system would.
    """

    party: str
    part: str


TARGETS = {
    "ServerApp": Target("server", "flwr-serverapp"),
    "SuperLink": Target("server", "fedlora.server.superlink"),
    "executor": Target("server", "flower-superexec"),
    "exchange": Target("server", "fedlora.server.exchange_process"),
    "server's supervisor": Target("server", ""),
    "worker": Target("client", "fedlora.client.worker_process"),
    "SuperNode": Target("client", "fedlora.client.supernode"),
    "ClientApp": Target("client", "flwr-clientapp"),
    "client's supervisor": Target("client", ""),
}


# each is killed once in a run of its own group
GROUPS = (
    ("ServerApp", "exchange", "SuperNode"),
    ("SuperLink", "worker", "server's supervisor"),
    ("executor", "ClientApp", "client's supervisor"),
)


@dataclass(frozen=True)
class Kill:
    """One kill.

    Attributes:
        target: name of what was killed.
        at_s: since the server took the run.
        recovery_s: until the next round was committed; None when none was left, or when
            something else was killed before.
    """

    target: str
    at_s: float
    recovery_s: float | None


@dataclass(frozen=True)
class Trial:
    """One disturbed run.

    Attributes:
        kills: in their order.
        exit_code: of `fedlora run`.
        equal: the adapter of every round is that of a simulation, bit for bit.
        problems: what the checker of the history found.
        seconds: of the whole run, since the server took it.
    """

    kills: Sequence[Kill]
    exit_code: int
    equal: bool
    problems: Sequence[str]
    seconds: float

    @property
    def passed(self) -> bool:
        return self.exit_code == 0 and self.equal and not self.problems


class Nemesis:
    """A federation and its trials; use as a context manager.

    Args:
        folder: for everything.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.job = write_job(folder / "job.toml", tiny_job())
        self.log = folder / "witness.jsonl"
        options = {name: ["--partition", place] for place, name in enumerate(CLIENTS)}
        self.deployed = Deployed(folder, options)
        self.expected: list[str] = []
        self.clean_s = 0.0
        self._before = {name: os.environ.get(name) for name in ("PYTHONPATH", "FEDLORA_WITNESS")}

    def __enter__(self) -> "Nemesis":
        call("simulate", self.job, "--out", self.folder / "simulated")
        self.expected = digests(self.folder / "simulated")
        paths = [str(WITNESS), *filter(None, [self._before["PYTHONPATH"]])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)
        os.environ["FEDLORA_WITNESS"] = str(self.log)
        self.deployed.__enter__()
        return self

    def __exit__(self, *details: object) -> None:
        self.deployed.__exit__(*details)
        for name, value in self._before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})

    def undisturbed(self) -> Trial:
        """A run that nothing happens to; its length is the measure of the others."""
        # the first one also waits for clients to start
        self.trial((), random.Random(0))
        done = self.trial((), random.Random(0))
        self.clean_s = done.seconds
        return done

    def trial(
        self, targets: Sequence[str], chance: random.Random, rounds: Sequence[int] = ()
    ) -> Trial:
        """One run, in which each of `targets` is killed once, unless the run is over before.

        Args:
            rounds: when, in turn: as soon as so many rounds stand; by default at random times.
        """
        out = self.folder / f"out-{len(list(self.folder.glob('out-*'))):03d}"
        codes: list[int] = []

        def follow() -> None:
            done = self.deployed.run(self.job, out, check=False, longest_s=LONGEST_S)
            codes.append(done.returncode)

        following = threading.Thread(target=follow)
        following.start()
        while following.is_alive() and not _run_of(out):
            time.sleep(0.01)
        started = time.monotonic()
        order = list(targets) if rounds else chance.sample(targets, len(targets))
        times = sorted(chance.uniform(0.0, self.clean_s) for _ in order)
        killed: list[tuple[str, float]] = []
        for place, name in enumerate(order):
            while following.is_alive() and not (
                self._standing(out) >= rounds[place]
                if rounds
                else time.monotonic() >= started + times[place]
            ):
                time.sleep(0.01)
            at = self._kill(TARGETS[name], chance, following)
            if at is not None:
                killed.append((name, at))
        following.join()
        seconds = time.monotonic() - started
        run = _run_of(out)
        history = read_witness(self.log, run)
        ended = [*(at for _, at in killed), float("inf")][1:]
        kills = [
            Kill(name, round(at - started, 1), _recovery(history, at, before))
            for (name, at), before in zip(killed, ended, strict=True)
        ]
        complete = (out / "metrics.jsonl").is_file()
        return Trial(
            kills,
            codes[0] if codes else -1,
            complete and digests(out) == self.expected,
            problems(history, read_rounds(self._folder(run)), ROUNDS),
            round(seconds, 1),
        )

    def _standing(self, out: Path) -> int:
        """Rounds that are committed of the run that `out` follows."""
        commits = [e for e in read_witness(self.log, _run_of(out)) if e.what == "committed"]
        return max((entry.key[0] for entry in commits if entry.done), default=0)

    def _folder(self, run: str) -> Path:
        return self.folder / "server" / "runs" / run / "folder"

    def _kill(
        self, target: Target, chance: random.Random, following: threading.Thread
    ) -> float | None:
        """Kills it as soon as it runs; when, or None if the run was over before that."""
        party = target.party if target.party == "server" else chance.choice(CLIENTS)
        while following.is_alive():
            if not target.part:
                process = self.deployed.processes[party]
                process.kill()
                at = time.monotonic()
                process.wait()
                self._start_again(party)
                return at
            for pid in self.deployed.children(party, target.part)[:1]:
                os.kill(pid, signal.SIGKILL)
                return time.monotonic()
            time.sleep(0.01)
        return None

    def _start_again(self, party: str) -> None:
        """Until it stays: what the killed one had started may hold a port or a lock for a while."""
        ends = time.monotonic() + 60.0
        while True:
            if party == "server":
                self.deployed.start_server()
            else:
                self.deployed.start_client(party)
            process = self.deployed.processes[party]
            try:
                process.wait(10.0)
            except subprocess.TimeoutExpired:
                return
            assert time.monotonic() < ends, f"{party} does not start again\n{self.deployed.logs()}"


def _run_of(out: Path) -> str:
    """Lineage id of the run that `out` follows; empty before it is known."""
    try:
        return str(json.loads((out / "remote.json").read_text())["run"])
    except FileNotFoundError:
        return ""


def _recovery(history: Sequence[Operation], at: float, before: float) -> float | None:
    """Seconds from a kill to the next commit, if it came before something else was killed."""
    later = [e.at for e in history if e.what == "committed" and e.done and at < e.at < before]
    return round(min(later) - at, 1) if later else None
