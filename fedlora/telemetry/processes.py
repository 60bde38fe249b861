"""ProcessMetrics: the processes of a supervisor, as its health says."""

from collections.abc import Callable, Iterable

from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, Metric

from fedlora.health import Health


class ProcessMetrics:
    """A collector to register; asks for the health at each scrape.

    Args:
        status: as given to the HealthServer.
    """

    def __init__(self, status: Callable[[], Health]) -> None:
        self._status = status

    def collect(self) -> Iterable[Metric]:
        """One series per process."""
        up = GaugeMetricFamily(
            "fedlora_process_up", "1 while the process runs.", labels=["process"]
        )
        restarts = CounterMetricFamily(
            "fedlora_process_restarts",
            "Starts of the process after its first.",
            labels=["process"],
        )
        for part in self._status().parts:
            up.add_metric([part.name], float(part.is_alive))
            restarts.add_metric([part.name], float(max(0, part.starts - 1)))
        return [up, restarts]
