"""`fedlora client`."""

import signal
import time
from datetime import UTC, datetime
from pathlib import Path

from fedlora.cli.server import tls_files
from fedlora.client.supervisor import ClientOptions, ClientSupervisor, Seat
from fedlora.enrolment import enrol
from fedlora.errors import ConfigError
from fedlora.tls import TlsFiles

# `--partition auto` looks no further for a free place
MOST_PARTITIONS = 100_000
# seconds until the server must have signed a request
ENROL_S = 300.0


def take_seat(home: Path, name: str | None, partition: str | None, data: str | None) -> Seat:
    """Who this client is, and the lock on its folder.

    Args:
        home: folder of this client; with `partition` "auto", of all clients of this machine.
        name: as given; by default it follows from the partition as in a simulation.
        partition: a place from 0, "auto", or None.
        data: this site's own data, or None.

    Raises:
        ConfigError: the options do not go together, or the folder is in use.
    """
    if data is not None and partition is not None:
        raise ConfigError("--data and --partition were both given; leave one out")
    if partition == "auto":
        if name is not None:
            raise ConfigError("--partition auto chooses the name; leave --name out")
        for place in range(MOST_PARTITIONS):
            own = f"client-{place:03d}"
            seat = Seat.take(home / own, own, place)
            if seat is not None:
                return seat
        raise ConfigError(f"all {MOST_PARTITIONS} folders below --home {home} are in use")
    if partition is not None and not partition.isdecimal():
        raise ConfigError(f"--partition {partition!r}: expected a number from 0, or auto")
    place_given = None if partition is None else int(partition)
    if name is None:
        if place_given is None:
            raise ConfigError("give --name NAME, or --partition")
        name = f"client-{place_given:03d}"
    seat = Seat.take(home, name, place_given)
    if seat is None:
        raise ConfigError(
            f"--home {home} is in use by another client; give each client a folder of its own"
        )
    return seat


def client_tls(
    seat: Seat, certs: Path | None, enrolment: Path | None, *, insecure: bool
) -> TlsFiles | None:
    """The client's certificate, asked for by a shared folder if there is one.

    Raises:
        ConfigError: the options do not go together.
        CertificateError: the certificate cannot be used, or none came in time.
    """
    if enrolment is None:
        return tls_files(certs, "client", insecure=insecure)
    if insecure:
        raise ConfigError("--insecure and --enrol were both given; leave one out")
    return enrol(
        enrolment,
        seat.name,
        certs or seat.home / "certs",
        patience_s=ENROL_S,
        wait=time.sleep,
        now=lambda: datetime.now(UTC),
    )


def run_client(options: ClientOptions) -> None:
    """Runs a client until SIGTERM or Ctrl-C; see `ClientSupervisor`."""
    supervisor = ClientSupervisor(options)
    signal.signal(signal.SIGTERM, lambda *_: supervisor.stop())
    signal.signal(signal.SIGINT, lambda *_: supervisor.stop())
    supervisor.run()
