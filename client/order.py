"""Order: what one call asks of a worker, checked before it stands in line."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from fedlora.config.job import Job
from fedlora.config.load import parse_job_text
from fedlora.errors import ConfigError, FedloraError, WorkRefused
from fedlora.messages import Broadcast
from fedlora.protos.worker_pb2 import WorkHeader, WorkMessage
from fedlora.wire import DIGEST, MAX_MANIFEST_BYTES, NAME, decode_broadcast, sha256

MAX_JOB_BYTES = 64 * 1024


class Unreadable(FedloraError):
    """A call that is not what the protocol says."""


@dataclass(frozen=True)
class Order:
    """One client's part of a round.

    Attributes:
        key: SHA-256 of the manifest; names the update that answers it.
        exchange: HOST:PORT; empty when parts and payload ride in the call.
        parts: those that rode along, by digest.
        base_fingerprint: of the server's base model; empty when it does not say.
    """

    job: Job
    manifest: bytes
    broadcast: Broadcast
    key: str
    exchange: str
    download_ticket: str
    upload_ticket: str
    acknowledged: tuple[str, ...]
    base_fingerprint: str
    parts: Mapping[str, bytes]


def read_order(messages: Iterable[WorkMessage]) -> Order:
    """The order in a call.

    Raises:
        Unreadable: no header first, a field out of its bounds, or a part that does not have
            its digest.
        WorkRefused: the job is readable but not valid here ("JOB").
    """
    stream = iter(messages)
    first = next(stream, None)
    if first is None or first.WhichOneof("content") != "header":
        raise Unreadable("the first message of a call must be its header")
    header = first.header
    if len(header.job_toml.encode()) > MAX_JOB_BYTES:
        raise Unreadable(f"the job has more than {MAX_JOB_BYTES} bytes; shorten it")
    if len(header.manifest) > MAX_MANIFEST_BYTES:
        raise Unreadable(f"the manifest has more than {MAX_MANIFEST_BYTES} bytes")
    if not all(DIGEST.fullmatch(key) for key in header.acknowledged):
        raise Unreadable("acknowledged has an entry that is not a hexadecimal SHA-256")
    try:
        broadcast = decode_broadcast(header.manifest)
    except FedloraError as e:
        raise Unreadable(str(e)) from e
    run = broadcast.plan.run
    # it names a folder
    if not NAME.fullmatch(run) or run.startswith("."):
        raise Unreadable(f"the run {run[:60]!r} is no lineage id")
    parts = _parts(stream, set(broadcast.parts.values()))
    return _order(header, broadcast, parts)


def _order(header: WorkHeader, broadcast: Broadcast, parts: Mapping[str, bytes]) -> Order:
    try:
        job = parse_job_text(header.job_toml)
    except ConfigError as e:
        raise WorkRefused("JOB", f"the server's job is not valid for this client: {e}") from e
    return Order(
        job,
        header.manifest,
        broadcast,
        sha256(header.manifest),
        header.exchange,
        header.download_ticket,
        header.upload_ticket,
        tuple(header.acknowledged),
        header.base_fingerprint,
        parts,
    )


def _parts(messages: Iterable[WorkMessage], named: set[str]) -> dict[str, bytes]:
    """The parts that ride along: whole, as named in the manifest."""
    chunks: dict[str, list[bytes]] = {}
    for message in messages:
        if message.WhichOneof("content") != "part":
            raise Unreadable("after the header of a call only parts may come")
        if message.part.sha256 not in named:
            raise Unreadable("a part came that the manifest does not name")
        chunks.setdefault(message.part.sha256, []).append(message.part.chunk)
    parts = {digest: b"".join(pieces) for digest, pieces in chunks.items()}
    for digest, data in parts.items():
        if sha256(data) != digest:
            raise Unreadable(f"part {digest[:12]} does not have its digest")
    return parts
