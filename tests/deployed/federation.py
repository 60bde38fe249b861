"""A deployed federation of processes on loopback, for tests: the real verbs, with TLS."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import tomli_w

from fedlora.config.job import Job

FEDLORA = [sys.executable, "-m", "fedlora.cli"]
# nothing here takes so long unless it hangs, also on a machine that does ten other things
LONGEST_S = 600.0


def free_port() -> int:
    with socket.socket() as trial:
        trial.bind(("127.0.0.1", 0))
        return trial.getsockname()[1]


def call(
    *arguments: object, check: bool = True, longest_s: float = LONGEST_S
) -> subprocess.CompletedProcess[str]:
    """One verb, to its end."""
    done = subprocess.run(
        [*FEDLORA, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=longest_s,
        check=False,
    )
    if check and done.returncode:
        raise AssertionError(f"{arguments}: exit {done.returncode}\n{done.stdout}{done.stderr}")
    return done


def write_job(path: Path, job: Job) -> Path:
    path.write_text(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)))
    return path


def digests(folder: Path) -> list[str]:
    """SHA-256 of the adapter after every round of a run folder."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    events = [json.loads(line) for line in lines]
    return [event["adapter_sha256"] for event in events if event["event"] == "round"]


class Deployed:
    """A server and clients in processes of their own; use as a context manager.

    Args:
        folder: for everything.
        clients: options of each client, by name.
        secure: mutual TLS with a CA of its own; otherwise plain text.
    """

    def __init__(
        self, folder: Path, clients: Mapping[str, Sequence[object]], *, secure: bool = True
    ) -> None:
        self.folder = folder
        self.clients = dict(clients)
        self.secure = secure
        self.port, self.flower_port = free_port(), free_port()
        self.address = f"127.0.0.1:{self.port}"
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def __enter__(self) -> "Deployed":
        if self.secure:
            ca = self.folder / "ca"
            call("certs", "init", ca)
            self._issue("server", "--role", "server", "--host", "127.0.0.1")
            self._issue("operator", "--role", "operator")
        self.start_server()
        for name in self.clients:
            self.start_client(name)
        return self

    def __exit__(self, *_: object) -> None:
        for process in self.processes.values():
            if process.poll() is None:
                process.send_signal(signal.SIGTERM)
        for process in self.processes.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def start_server(self) -> None:
        options = ["--home", self.folder / "server", "--port", self.port]
        options += ["--flower-port", self.flower_port, *self.security("server")]
        if self.secure:
            options += ["--ca", self.folder / "ca"]
        self._start("server", ["server", *options])

    def start_client(self, name: str) -> None:
        if self.secure and not (self.folder / "certs" / name).exists():
            self._issue(name, "--role", "client")
        options = ["--server", self.address, "--name", name, "--home", self.folder / "homes" / name]
        self._start(name, ["client", *options, *self.clients[name], *self.security(name)])

    def run(
        self,
        job: Path,
        out: Path,
        *options: object,
        check: bool = True,
        longest_s: float = LONGEST_S,
    ) -> subprocess.CompletedProcess[str]:
        """`fedlora run`, to its end."""
        return call(
            *("run", job, "--server", self.address, "--out", out),
            *self.security("operator"),
            *options,
            check=check,
            longest_s=longest_s,
        )

    def security(self, name: str) -> list[object]:
        return ["--certs", self.folder / "certs" / name] if self.secure else ["--insecure"]

    def logs(self) -> str:
        """The end of everything that was printed, for a failed test."""
        found = []
        for path in sorted(self.folder.rglob("*.log")):
            lines = path.read_text(errors="replace").splitlines()[-25:]
            found.append(f"== {path.relative_to(self.folder)}\n" + "\n".join(lines))
        return "\n".join(found)

    def children(self, name: str, part: str) -> list[int]:
        """Process ids below the process `name` whose command line holds `part`."""
        found = []
        below = {self.processes[name].pid}
        for _ in range(6):
            for entry in Path("/proc").iterdir():
                if not entry.name.isdigit():
                    continue
                try:
                    stat = (entry / "stat").read_text().rpartition(")")[2].split()
                    command = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
                except OSError:
                    continue
                if int(stat[1]) in below and int(entry.name) not in below:
                    below.add(int(entry.name))
                    if part in command:
                        found.append(int(entry.name))
        return found

    def wait_for(self, what: str, condition) -> None:
        """Looks again and again until `condition` holds."""
        ends = time.monotonic() + LONGEST_S
        while not condition():
            if time.monotonic() > ends:
                raise AssertionError(f"{what} did not come\n{self.logs()}")
            time.sleep(0.05)

    def _issue(self, name: str, *options: object) -> None:
        out = self.folder / "certs" / name
        call("certs", "issue", name, "--ca", self.folder / "ca", "--out", out, *options)

    def _start(self, name: str, arguments: Sequence[object]) -> None:
        log = self.folder / "logs" / f"{name}.log"
        log.parent.mkdir(exist_ok=True)
        with log.open("ab") as output:
            self.processes[name] = subprocess.Popen(
                [*FEDLORA, *map(str, arguments)],
                stdout=output,
                stderr=subprocess.STDOUT,
                stdin=subprocess.DEVNULL,
                env=os.environ,
            )
