"""Replies of a Flower app, each judged by itself."""

import math

import torch
from flwr.app import Array, MetricRecord, RecordDict
from torch import Tensor

from fedlora.errors import UpdateRejected


def read_tensor(array: Array) -> Tensor:
    """A copy of an array, in its own dtype; fails in many ways on foreign bytes."""
    return torch.from_numpy(array.numpy())


def moved_square(array: Array, start: Tensor, client: str, key: str) -> float:
    """||array - start||^2 of an array that fits its start.

    Raises:
        UpdateRejected: it cannot be read, or has another shape or dtype, or is not finite.
    """
    try:
        tensor = read_tensor(array)
    except Exception as e:  # bytes of another machine may fail in any way they like
        raise UpdateRejected(client, "HEADER", f"array {key} cannot be read: {e}") from e
    if tensor.shape != start.shape or tensor.dtype != start.dtype:
        raise UpdateRejected(
            client,
            "HEADER",
            f"array {key} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}; expected "
            f"{tuple(start.shape)} and {start.dtype}",
        )
    square = float(torch.sum((tensor.double() - start.double()) ** 2))
    if not math.isfinite(square):
        raise UpdateRejected(client, "NOT_FINITE", f"array {key} holds NaN or infinity")
    return square


def comparable(contents: list[RecordDict]) -> list[RecordDict]:
    """The contents with those metrics only that all have, single or of one length."""

    def form(value: object) -> int | None:
        return len(value) if isinstance(value, list) else None

    metrics = [next(iter(content.metric_records.items())) for content in contents]
    shared = [{(key, form(value)) for key, value in record.items()} for _, record in metrics]
    common = set.intersection(*shared) if shared else set()
    reduced = []
    for content, (name, record) in zip(contents, metrics, strict=True):
        kept = MetricRecord({k: v for k, v in record.items() if (k, form(v)) in common})
        reduced.append(RecordDict({**dict(content.items()), name: kept}))
    return reduced
