"""Kills the processes of a deployed federation, one run after the other, and checks what is left.

One federation serves all trials of a target: each trial is a run of its own, in which one process
is killed outright (kill -9) at a time that is uniform over the length of an undisturbed run.
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


@dataclass(frozen=True)
class Trial:
    """One disturbed run.

    Attributes:
        target: name of what was killed.
        kills: how often.
        exit_code: of `fedlora run`.
        equal: the final adapter is that of an undisturbed run, bit for bit.
        problems: what the checker of the history found.
        recovery_s: from each kill to the next round that was committed.
        seconds: of the whole run.
    """

    target: str
    kills: int
    exit_code: int
    equal: bool
    problems: Sequence[str]
    recovery_s: Sequence[float]
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
        self.trial("none", [], random.Random(0))
        done = self.trial("none", [], random.Random(0))
        self.clean_s = done.seconds
        return done

    def trial(self, name: str, targets: Sequence[Target], chance: random.Random) -> Trial:
        """One run, with one kill of each of `targets`."""
        out = self.folder / f"out-{len(list(self.folder.glob('out-*'))):03d}"
        codes: list[int] = []
        killed: list[float] = []
        started = time.monotonic()

        def follow() -> None:
            codes.append(self.deployed.run(self.job, out, check=False).returncode)

        following = threading.Thread(target=follow)
        following.start()
        times = sorted(chance.uniform(0.0, self.clean_s) for _ in targets)
        for target, after in zip(targets, times, strict=True):
            while following.is_alive() and time.monotonic() < started + after:
                time.sleep(0.01)
            at = self._kill(target, chance, following)
            if at is not None:
                killed.append(at)
        following.join()
        seconds = time.monotonic() - started
        run = json.loads((out / "remote.json").read_text())["run"]
        history = read_witness(self.log, run)
        complete = (out / "metrics.jsonl").is_file()
        return Trial(
            name,
            len(killed),
            codes[0] if codes else -1,
            complete and digests(out) == self.expected,
            problems(history, read_rounds(self._folder(run)), ROUNDS),
            [round(found, 2) for at in killed if (found := _recovery(history, at)) is not None],
            round(seconds, 1),
        )

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


def _recovery(history: Sequence[Operation], at: float) -> float | None:
    later = [e.at for e in history if e.what == "committed" and e.done and e.at > at]
    return min(later) - at if later else None
