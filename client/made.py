"""An update that was made once, as a client keeps it to send it again."""

import json

from fedlora.adapter import AdapterSpec, AdapterState
from fedlora.messages import CONTROL, Broadcast, ClientUpdate
from fedlora.wire import decode_own, encode_json, encode_tensors


def encode_made(update: ClientUpdate) -> bytes:
    """What of an update cannot be made again: its figures, a newline, its tensors."""
    control = {f"{CONTROL}{name}": tensor for name, tensor in update.control.items()}
    figures = encode_json({"metrics": dict(update.metrics)})
    return figures + b"\n" + encode_tensors({**update.delta.tensors, **control})


def decode_made(
    payload: bytes, broadcast: Broadcast, client: str, spec: AdapterSpec, num_examples: int
) -> ClientUpdate:
    """The update again, as the answer to a broadcast with the same start.

    Raises:
        AdapterError: not what `encode_made` writes.
    """
    head, _, data = payload.partition(b"\n")
    tensors = decode_own(data)
    delta = {name: t for name, t in tensors.items() if not name.startswith(CONTROL)}
    control = {n.removeprefix(CONTROL): t for n, t in tensors.items() if n.startswith(CONTROL)}
    plan = broadcast.plan
    return ClientUpdate(
        run=plan.run,
        round=plan.round,
        attempt=plan.attempt,
        client=client,
        start_sha256=broadcast.start_sha256,
        delta=AdapterState(spec, delta),
        num_examples=num_examples,
        metrics=json.loads(head)["metrics"],
        control=control,
        coding=plan.coding,
    )
