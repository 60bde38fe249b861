"""RunMetrics: the figures of runs, made of their events alone.

So they can be fed by the process that works on a run, or from its journal by another.
Names follow https://prometheus.io/docs/practices/naming/; a run's label is its name and not
its lineage id, which would make new series without end. No label names a client.
"""

from collections.abc import Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

STAGE_SECONDS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)


class RunMetrics:
    """Receives the events of any number of runs.

    Args:
        registry: where the figures are registered.
    """

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"fedlora_{name}", what, ("run", *labels), registry=registry)

        def gauge(name: str, what: str, *labels: str) -> Gauge:
            return Gauge(f"fedlora_{name}", what, ("run", *labels), registry=registry)

        self._committed = counter("rounds_committed", "Rounds committed.")
        self._abandoned = counter("rounds_abandoned", "Attempts at a round given up.")
        self._admitted = counter("updates_admitted", "Updates merged in committed rounds.")
        self._rejected = counter("updates_rejected", "Updates refused, by reason.", "code")
        self._refused = counter("nodes_refused", "Nodes that were not let in.")
        self._up = counter("up_bytes", "Bytes from clients in committed rounds.")
        self._down = counter("down_bytes", "Bytes to clients in committed rounds.")
        self._active = gauge("run_active", "1 while the run goes on, 0 once it ended or failed.")
        self._round = gauge("round_number", "Last committed round.")
        self._rounds = gauge("rounds_planned", "Rounds of the job.")
        self._present = gauge(
            "clients_present", "Clients that joined or answered, without those last missing."
        )
        self._loss = gauge("train_loss", "Mean training loss of the last round; NaN if diverged.")
        self._scores = gauge("eval_score", "Last score on the server's test data.", "metric")
        self._error = gauge(
            "aggregation_error", "Relative aggregation error of the last round that measured it."
        )
        self._epsilon = gauge("epsilon", "Privacy loss spent so far.")
        self._seconds = Histogram(
            "fedlora_stage_seconds",
            "Seconds per stage of a committed round.",
            ("run", "stage"),
            buckets=STAGE_SECONDS,
            registry=registry,
        )
        self._clients: dict[str, set[str]] = {}

    def take(self, event: Mapping[str, Any], run: str) -> None:
        """Counts one event; kinds that give no figure are passed over.

        Args:
            event: as in metrics.jsonl.
            run: the run's name, the label of its series.
        """
        kind = event.get("event")
        if not isinstance(kind, str):
            return
        if run not in self._clients:
            self._begin(run)
        clients = self._clients[run]
        if kind in ("start", "resume"):
            self._start(event, run)
            clients |= set(event.get("clients", ()))
        elif kind == "round":
            self._commit(event, run)
            clients |= set(event.get("clients", ()))
            clients -= set(event.get("missing", ()))
        elif kind == "rejected":
            self._rejected.labels(run, str(event.get("code", ""))).inc()
        elif kind == "abandoned":
            self._abandoned.labels(run).inc()
        elif kind == "refused":
            self._refused.labels(run).inc()
        elif kind == "joined":
            clients.add(str(event.get("client", "")))
        elif kind == "waiting":
            clients.clear()
            clients.update(event.get("clients", ()))
        elif kind in ("end", "failed"):
            self._score(event, run)
        self._active.labels(run).set(kind not in ("end", "failed"))
        self._present.labels(run).set(len(clients))

    def _begin(self, run: str) -> None:
        """Every series from 0: an increase can only be seen of what was there before."""
        self._clients[run] = set()
        for counter in (
            self._committed,
            self._abandoned,
            self._admitted,
            self._refused,
            self._up,
            self._down,
        ):
            counter.labels(run)

    def _start(self, event: Mapping[str, Any], run: str) -> None:
        self._round.labels(run).set(event.get("round", 0))
        if "rounds" in event:
            self._rounds.labels(run).set(event["rounds"])
        self._score(event, run)

    def _commit(self, event: Mapping[str, Any], run: str) -> None:
        self._committed.labels(run).inc()
        self._admitted.labels(run).inc(len(event.get("clients", ())))
        self._up.labels(run).inc(event.get("bytes_up", 0))
        self._down.labels(run).inc(event.get("bytes_down", 0))
        self._round.labels(run).set(event.get("round", 0))
        loss = event.get("train_loss")
        self._loss.labels(run).set(float("nan") if loss is None else loss)
        for gauge, name in ((self._error, "aggregation_error"), (self._epsilon, "epsilon")):
            if event.get(name) is not None:
                gauge.labels(run).set(event[name])
        for stage, seconds in event.get("seconds", {}).items():
            self._seconds.labels(run, stage).observe(seconds)
        self._score(event, run)

    def _score(self, event: Mapping[str, Any], run: str) -> None:
        for metric, value in event.get("eval", {}).items():
            self._scores.labels(run, metric).set(value)
