"""WorkerMetrics: what a client's worker does, and what it has done since it started."""

from collections.abc import Callable, Iterable
from pathlib import Path

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedlora.client.worker_call import WorkerCall, WorkerGone
from fedlora.protos.worker_pb2 import StatusReply

# a scrape waits no longer for a worker that is busy or away
ASK_S = 2.0


class WorkerMetrics:
    """A collector to register; asks the worker at each scrape.

    Args:
        status: the worker's status; None while it does not answer, which leaves its series out.
    """

    def __init__(self, status: Callable[[], StatusReply | None]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """No series has a label: a client has one worker."""
        status = self._status()
        if status is None:
            return []
        stage = GaugeMetricFamily(
            "fedlora_worker_busy", "1 for the stage that the worker is at.", labels=["stage"]
        )
        if status.stage:
            stage.add_metric([status.stage], 1.0)
        gauges = [
            ("round", "Round that the worker works on; 0 when idle.", status.round),
            ("queued_calls", "Calls that wait for the worker.", status.queued),
            ("memory_bytes", "Resident memory of the worker.", status.memory_bytes),
            ("kept_updates", "Updates kept until the server has them.", status.kept_updates),
        ]
        counters = [
            ("updates", "Updates that the worker has made or sent again.", status.answered),
            ("refusals", "Calls that the worker has refused.", status.refused),
            ("steps", "Optimiser steps that the worker has begun.", status.steps),
            ("down_bytes", "Bytes fetched from the exchange.", status.bytes_down),
            ("up_bytes", "Bytes sent to the exchange.", status.bytes_up),
        ]
        return [
            stage,
            *(GaugeMetricFamily(f"fedlora_worker_{n}", text, float(v)) for n, text, v in gauges),
            *(
                CounterMetricFamily(f"fedlora_worker_{n}", text, float(v))
                for n, text, v in counters
            ),
        ]


def ask(socket: Path) -> StatusReply | None:
    """The status of the worker at a socket; None when it does not answer soon."""
    try:
        with WorkerCall(socket, ASK_S) as call:
            return call.status(ASK_S)
    except WorkerGone:
        return None
