"""WorkerMetrics: what a client's resident worker does."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

FIRST_STEP_SECONDS = (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0, 60.0, 120.0)
WORK_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0, 10000.0)


class WorkerMetrics:
    """Told by the worker how each call ended; safe to call from any thread.

    Args:
        registry: where the figures are registered.
        queued: calls that wait in line; called at each scrape, as the next.
        memory_bytes: resident memory.
    """

    def __init__(
        self,
        registry: CollectorRegistry,
        queued: Callable[[], int],
        memory_bytes: Callable[[], int],
    ) -> None:
        self._work = Counter(
            "fedlora_worker_work",
            "Calls answered: done, kept (answered from an earlier call) or the refusal's code.",
            ("outcome",),
            registry=registry,
        )
        self._bytes = Counter(
            "fedlora_worker_bytes",
            "Bytes sent to (up) and fetched from (down) the exchange.",
            ("direction",),
            registry=registry,
        )
        self._first_step = Histogram(
            "fedlora_worker_first_step_seconds",
            "Seconds from a call's turn to its first training step.",
            buckets=FIRST_STEP_SECONDS,
            registry=registry,
        )
        self._seconds = Histogram(
            "fedlora_worker_work_seconds",
            "Seconds per call that trained, without its time in line.",
            buckets=WORK_SECONDS,
            registry=registry,
        )
        Gauge(
            "fedlora_worker_queue_length", "Calls that wait in line.", registry=registry
        ).set_function(queued)
        Gauge(
            "fedlora_worker_memory_bytes", "Resident memory of the worker.", registry=registry
        ).set_function(memory_bytes)
        for outcome in ("done", "kept"):
            self._work.labels(outcome)

    def done(
        self,
        *,
        bytes_up: int,
        bytes_down: int,
        seconds: float,
        seconds_to_first_step: float,
        kept: bool,
    ) -> None:
        """A call was answered with an update; the fields of Done in worker.proto."""
        self._work.labels("kept" if kept else "done").inc()
        self._bytes.labels("up").inc(bytes_up)
        self._bytes.labels("down").inc(bytes_down)
        if not kept:
            self._seconds.observe(seconds)
        # 0 says that nothing was trained
        if seconds_to_first_step > 0:
            self._first_step.observe(seconds_to_first_step)

    def refused(self, code: str) -> None:
        """A call was refused; `code` as in worker.proto."""
        self._work.labels(code).inc()
