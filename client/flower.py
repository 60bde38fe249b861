"""The ClientApp: takes Flower's messages to the resident worker, and its answers back.

Flower starts a process for every message, so nothing that is slow to import is imported here.
"""

import os
import time
from collections.abc import Mapping
from pathlib import Path

from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp

from fedlora import __version__
from fedlora.client.own_worker import own_worker
from fedlora.client.worker_call import Worked, WorkerCall, WorkerGone, complete_address
from fedlora.flower_records import (
    CONFIG,
    NAME,
    PARTITION,
    PARTS,
    PAYLOAD,
    RANK,
    SERVER_HOST,
    STYPE,
    WORKER_SOCKET,
    data,
    text,
    texts,
)
from fedlora.protos.worker_pb2 import WorkHeader

# seconds a worker may take to come up again
CONNECT_S = 30.0
# seconds kept of a message's time for the way back
RETURN_S = 5.0

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """One client's part of a round; what keeps it from being done is said in the reply."""
    try:
        with _call(context) as call:
            worked = call.work(_header(message, context), _parts(message), _left_s(message))
    except (WorkerGone, OSError) as e:
        return _reply(message, {"error": str(e), "code": "WORKER"})
    return _answer(message, worked)


@app.query()
def query(message: Message, context: Context) -> Message:
    """Who this client is."""
    fields: dict[str, str | int] = {"version": __version__, "rank": _rank(context)}
    try:
        with _call(context) as call:
            status = call.status(min(CONNECT_S, _left_s(message)))
    except (WorkerGone, OSError) as e:
        return _reply(message, {**fields, "name": _name(context), "error": str(e)})
    fields |= {"name": status.client, "version": status.version, "pid": status.pid}
    return _reply(message, fields)


def _call(context: Context) -> WorkerCall:
    """A call to the worker of this node, which is started if it has none."""
    found = os.environ.get("FEDLORA_WORKER_SOCKET") or text(context.node_config, WORKER_SOCKET)
    if found:
        return WorkerCall(Path(found), CONNECT_S)
    partition = context.node_config.get(PARTITION)
    if not isinstance(partition, int):
        raise WorkerGone(
            f"this node has neither {WORKER_SOCKET!r} nor {PARTITION!r} in its node config; start "
            "it with: fedlora client, or give flower-supernode one of them"
        )
    worker = own_worker(context.node_id, _name(context), partition)
    return WorkerCall(worker.socket, CONNECT_S, worker.start)


def _name(context: Context) -> str:
    name = text(context.node_config, NAME)
    partition = context.node_config.get(PARTITION)
    # as a simulation calls it
    return name or (f"client-{partition:03d}" if isinstance(partition, int) else "")


def _rank(context: Context) -> int:
    rank = context.node_config.get(RANK, 0)
    return rank if isinstance(rank, int) else 0


def _left_s(message: Message) -> float:
    """Seconds until nobody waits for the reply any more."""
    meta = message.metadata
    return max(1.0, meta.created_at + meta.ttl - time.time() - RETURN_S)


def _header(message: Message, context: Context) -> WorkHeader:
    fields: Mapping[str, object] = message.content.config_records.get(CONFIG, {})
    return WorkHeader(
        job_toml=text(fields, "job"),
        manifest=data(fields, "manifest"),
        exchange=complete_address(text(fields, "exchange"), text(context.node_config, SERVER_HOST)),
        download_ticket=text(fields, "download_ticket"),
        upload_ticket=text(fields, "upload_ticket"),
        acknowledged=texts(fields, "acknowledged"),
        base_fingerprint=text(fields, "base"),
    )


def _parts(message: Message) -> dict[str, bytes]:
    arrays = message.content.array_records.get(PARTS)
    return {digest: array.data for digest, array in arrays.items()} if arrays else {}


def _answer(message: Message, worked: Worked) -> Message:
    if worked.refused is not None:
        refused = worked.refused
        return _reply(message, {"error": refused.detail, "code": refused.code})
    done = worked.done
    fields: dict[str, str | bytes | int | float] = {
        "manifest": done.manifest,
        "bytes_down": done.bytes_down,
        "bytes_up": done.bytes_up,
        "seconds_to_first_step": done.seconds_to_first_step,
        "kept": int(done.kept),
    }
    reply = _reply(message, fields)
    if worked.payload:
        reply.content[PAYLOAD] = ArrayRecord({PAYLOAD: _array(worked.payload)})
    return reply


def _array(payload: bytes) -> Array:
    return Array("uint8", (len(payload),), STYPE, payload)


def _reply(message: Message, fields: Mapping[str, str | bytes | int | float]) -> Message:
    return Message(RecordDict({CONFIG: ConfigRecord({**fields})}), reply_to=message)
