"""What it costs to move adapters from clients to the server.

    python -m benchmarks.transfer [--clients 8] [--mib 160] [--repeats 3]

Clients are processes that send one reply each at the same time, over loopback with TLS, to

- the exchange, once with its store in memory (/dev/shm) and once on disk, synced;
- bare ssl sockets with a thread per client and SHA-256 on both sides, which keep nothing;
- Flower's SuperLink (see flower_path.py), which keeps the objects in memory.

All are measured in turn in the same run, so that ratios stand where seconds do not: clients and
server share the processors. The rate is all bytes over the time from the start signal to the
last client's end, digests included; server CPU is user and system time of the server process;
memory is its peak over what it held when idle. Bars: server CPU without disk at most 2.2 ms per
MiB, memory at most 160 MiB, rate at least 0.8 of the sockets and 5 times Flower's. "Without
disk" is the exchange on /dev/shm less what a bare loop of write calls to /dev/shm costs. Beside
them: an upload through a proxy that cuts it half way, and how many bytes were sent twice.
Writes transfer.md and transfer.json into --out.
"""

import argparse
import hashlib
import json
import os
import random
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc

from benchmarks.flower_path import FlowerPush
from fedlora.client.exchange import ExchangeClient
from tests.certificates import Authority
from tests.faults.exchange_process import ExchangeProcess, status_bytes
from tests.faults.proxy import Proxy, cuts

ROOT = Path(__file__).parents[1]
MIB = 1 << 20
CPU_BAR_MS, MEMORY_BAR_MIB, SOCKETS_BAR, FLOWER_BAR = 2.2, 160, 0.8, 5.0
TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def payload(seed: int, size: int) -> bytes:
    """Bytes that do not compress, the same for a seed."""
    return random.Random(seed).randbytes(size)


def certificates(folder: Path, clients: int) -> None:
    """ca.pem, and <name>.pem and <name>.key of the server and each client."""
    authority = Authority()
    (folder / "ca.pem").write_bytes(authority.pem)
    named = {f"client-{i}": "client" for i in range(clients)}
    for name, role in {"server": "server", **named}.items():
        issued = authority.issue(name, role)
        (folder / f"{name}.pem").write_bytes(issued.certificate)
        (folder / f"{name}.key").write_bytes(issued.key)


def exchange_client(folder: Path, number: int, port: int) -> ExchangeClient:
    """The client with this number."""
    files = [folder / f"client-{number}.{kind}" for kind in ("key", "pem")]
    credentials = grpc.ssl_channel_credentials(
        (folder / "ca.pem").read_bytes(), *(file.read_bytes() for file in files)
    )
    return ExchangeClient(f"127.0.0.1:{port}", credentials, patience_s=600)


def client(kind: str, folder: Path, number: int, port: int, size: int, ticket: str) -> None:
    """One client's process: gets ready, waits for a line, sends, says when it was done."""
    data = payload(number, size)
    send: Callable[[], object]
    if kind == "exchange":
        sender = exchange_client(folder, number, port)
        send = lambda: sender.send(ticket, b"{}", data)  # noqa: E731
    elif kind == "sockets":
        context = ssl.create_default_context(cafile=str(folder / "ca.pem"))
        send = lambda: send_by_socket(context, port, data)  # noqa: E731
    else:
        send = FlowerPush(f"127.0.0.1:{port}", str(folder / "ca.pem"), data).push
    print("ready", flush=True)
    sys.stdin.readline()
    send()
    print(time.time(), flush=True)
    # Flower's threads would keep the process
    sys.stdin.read()
    os._exit(0)


def send_by_socket(context: ssl.SSLContext, port: int, data: bytes) -> None:
    """Digest and bytes; comes back when the server has checked them."""
    with (
        socket.create_connection(("127.0.0.1", port)) as bare,
        context.wrap_socket(bare, server_hostname="127.0.0.1") as connection,
    ):
        connection.sendall(len(data).to_bytes(8, "big") + hashlib.sha256(data).digest())
        view = memoryview(data)
        for start in range(0, len(data), MIB):
            connection.sendall(view[start : start + MIB])
        assert connection.recv(1) == b"1"


def socket_server(folder: Path) -> None:
    """Receives from bare ssl sockets, a thread each, and keeps nothing."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(folder / "server.pem", folder / "server.key")
    listener = socket.create_server(("127.0.0.1", 0), backlog=64)
    print(listener.getsockname()[1], flush=True)

    def receive(bare: socket.socket) -> None:
        with context.wrap_socket(bare, server_side=True) as connection:
            head = b""
            while len(head) < 40:
                head += connection.recv(40 - len(head))
            left, digest = int.from_bytes(head[:8], "big"), hashlib.sha256()
            buffer = memoryview(bytearray(MIB))
            while left:
                filled = 0
                while filled < min(MIB, left):
                    filled += connection.recv_into(buffer[filled : min(MIB, left)])
                digest.update(buffer[:filled])
                left -= filled
            connection.sendall(b"1" if digest.digest() == head[8:] else b"0")

    while True:
        bare, _ = listener.accept()
        threading.Thread(target=receive, args=(bare,), daemon=True).start()


@contextmanager
def server(kind: str, folder: Path, store: Path) -> Iterator[tuple[int, int, Any]]:
    """(pid, port, exchange or None) of a server that can be called."""
    files = tuple(folder / name for name in ("server.pem", "server.key", "ca.pem"))
    if kind == "exchange":
        with ExchangeProcess(store, files) as made:
            yield made.process.pid, made.port, made
        return
    if kind == "sockets":
        command = ["benchmarks.transfer", "--role", "sockets", str(folder)]
    else:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        command = ["benchmarks.flower_path", str(port), str(files[0]), str(files[1])]
    process = subprocess.Popen(
        [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    try:
        if kind == "sockets":
            port = int(process.stdout.readline())
        else:
            await_port(port)
        yield process.pid, port, None
    finally:
        process.kill()
        process.wait()


def await_port(port: int) -> None:
    """Comes back when somebody listens."""
    while True:
        try:
            socket.create_connection(("127.0.0.1", port)).close()
            return
        except ConnectionRefusedError:
            time.sleep(0.05)


def cpu_s(pid: int) -> float:
    """User and system seconds of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS_PER_S


def measure(kind: str, folder: Path, store: Path, clients: int, size: int) -> dict[str, float]:
    """One pass: all clients at once."""
    with server(kind, folder, store) as (pid, port, exchange):
        started = []
        for number in range(clients):
            ticket = exchange.ticket(client=f"client-{number}") if exchange else ""
            command = ["--role", kind, str(folder), str(number), str(port), str(size), ticket]
            started.append(
                subprocess.Popen(
                    [sys.executable, "-m", "benchmarks.transfer", *command],
                    cwd=ROOT,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    text=True,
                )
            )
        for process in started:
            assert process.stdout.readline() == "ready\n"
        idle, cpu = status_bytes(pid, "VmRSS"), cpu_s(pid)
        Path(f"/proc/{pid}/clear_refs").write_text("5")
        begin = time.time()
        for process in started:
            process.stdin.write("go\n")
            process.stdin.flush()
        end = max(float(process.stdout.readline()) for process in started)
        found = {
            "mib_per_s": clients * size / MIB / (end - begin),
            "cpu_ms_per_mib": 1000 * (cpu_s(pid) - cpu) / (clients * size / MIB),
            "memory_mib": (status_bytes(pid, "VmHWM") - idle) / MIB,
        }
        for process in started:
            process.communicate()
        if exchange:
            assert len(exchange.store.received("run", 1, 0)) == clients
    return found


def write_ms_per_mib(place: Path) -> float:
    """CPU time of writing to a new file in `place`, 1 MiB at once."""
    block, blocks = payload(0, MIB), 256
    with tempfile.TemporaryFile(dir=place, buffering=0) as file:
        begin = time.process_time()
        for _ in range(blocks):
            file.write(block)
        return 1000 * (time.process_time() - begin) / blocks


def resent_mib(folder: Path, store: Path, size: int) -> float:
    """MiB that crossed the wire twice when an upload was cut half way; TLS's own included."""
    with server("exchange", folder, store) as (_, port, exchange):
        proxy = Proxy(port, cuts(size // 2))
        sender = exchange_client(folder, 0, proxy.port)
        sender.send(exchange.ticket(client="client-0"), b"{}", payload(0, size))
        sender.close()
        proxy.close()
        assert proxy.connections == 2
        return (proxy.forwarded - size) / MIB


def summary(given: argparse.Namespace) -> dict[str, Any]:
    """All passes."""
    size = given.mib * MIB
    passes: dict[str, list[dict[str, float]]] = {}
    with tempfile.TemporaryDirectory() as name, tempfile.TemporaryDirectory(dir="/dev/shm") as shm:
        folder = Path(name)
        certificates(folder, given.clients)
        cases = {
            "exchange": ("exchange", Path(shm)),
            "ssl sockets": ("sockets", folder),
            "exchange, disk": ("exchange", folder),
            "Flower": ("flower", folder),
        }
        for repeat in range(given.repeats):
            for case, (kind, place) in cases.items():
                if kind == "flower" and repeat:
                    continue
                with tempfile.TemporaryDirectory(dir=place) as store:
                    found = measure(kind, folder, Path(store), given.clients, size)
                if case == "exchange":
                    found["write_ms_per_mib"] = write_ms_per_mib(place)
                passes.setdefault(case, []).append(found)
                print(case, json.dumps({k: round(v, 2) for k, v in found.items()}), flush=True)
        with tempfile.TemporaryDirectory(dir=shm) as store:
            resent = resent_mib(folder, Path(store), size)
    return {
        "clients": given.clients,
        "mib": given.mib,
        "repeats": given.repeats,
        "load": given.note,
        "passes": passes,
        "resent_mib": resent,
    }


def report(record: dict[str, Any]) -> str:
    """The figures as markdown."""
    from fedlora.server.machine import machine

    def median(case: str, field: str) -> float:
        return statistics.median(found[field] for found in record["passes"][case])

    def spread(case: str, field: str, digits: int) -> str:
        values = [found[field] for found in record["passes"][case]]
        return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f} to " + (
            f"{max(values):.{digits}f})"
        )

    rate = median("exchange", "mib_per_s")
    cpu = median("exchange", "cpu_ms_per_mib") - median("exchange", "write_ms_per_mib")
    cpu_ratio = cpu / median("ssl sockets", "cpu_ms_per_mib")
    bars = [
        ("server CPU without disk, ms/MiB", cpu, CPU_BAR_MS, True),
        ("memory above idle, MiB", median("exchange", "memory_mib"), MEMORY_BAR_MIB, True),
        ("rate, of ssl sockets", rate / median("ssl sockets", "mib_per_s"), SOCKETS_BAR, False),
        ("rate, of Flower", rate / median("Flower", "mib_per_s"), FLOWER_BAR, False),
    ]
    here = machine(1)
    lines = [
        "# Moving adapters to the server",
        "",
        f"`python -m benchmarks.transfer --clients {record['clients']} --mib {record['mib']} "
        f"--repeats {record['repeats']}`: {record['clients']} client processes send "
        f"{record['mib']} MiB each over loopback with TLS; see the file for what is measured.",
        "",
        f"Machine: {here['processor']}, {os.cpu_count()} processors, {here['system']}, Python "
        f"{here['python']}, grpcio {grpc.__version__}. {record['load']}",
        "",
        "Median (range) of the passes.",
        "",
        "| server | MiB/s | server CPU, ms/MiB | memory above idle, MiB |",
        "| --- | ---: | ---: | ---: |",
    ]
    for case in record["passes"]:
        lines.append(
            f"| {case} | {spread(case, 'mib_per_s', 0)} | {spread(case, 'cpu_ms_per_mib', 2)} | "
            f"{spread(case, 'memory_mib', 0)} |"
        )
    lines += ["", "| | found | bar | |", "| --- | ---: | ---: | --- |"]
    for name, found, bar, is_most in bars:
        met = found <= bar if is_most else found >= bar
        sign = "at most" if is_most else "at least"
        lines.append(f"| {name} | {found:.2f} | {sign} {bar:g} | {'met' if met else 'missed'} |")
    lines += [
        "",
        f"Without disk, its CPU time is {cpu_ratio:.2f} times that of the sockets' server.",
        "",
        f"An upload of {record['mib']} MiB that was cut half way sent {record['resent_mib']:.1f} "
        "MiB more than an uncut one has, TLS and HTTP/2 included.",
    ]
    return "\n".join(lines) + "\n"


def main() -> None:
    if sys.argv[1:2] == ["--role"]:
        kind, folder, *rest = sys.argv[2:]
        if not rest:
            socket_server(Path(folder))
        number, port, size, ticket = rest
        client(kind, Path(folder), int(number), int(port), int(size), ticket)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--mib", type=int, default=160)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--note", default="", help="what else the machine was doing")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    given = parser.parse_args()
    record = summary(given)
    given.out.mkdir(parents=True, exist_ok=True)
    (given.out / "transfer.json").write_text(json.dumps(record, indent=1) + "\n")
    text = report(record)
    (given.out / "transfer.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
