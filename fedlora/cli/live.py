"""LiveView: a run as it goes, as a live table in a terminal and as plain lines elsewhere."""

import time
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedlora.config.job import Job
from fedlora.models.assemble import PERSONAL
from fedlora.report.headline import headline

SHOWN_ROUNDS = 12
COLUMNS = ("round", "loss", "held-out", "clients", "rejected", "up", "down", "agg. error")
PRIVATE_COLUMNS = (*COLUMNS, "epsilon")


class LiveView:
    """Receives events and shows them; use as a context manager.

    Args:
        job: the run's job.
        folder: its folder.
        quiet: show nothing (a script reads the result).
    """

    def __init__(self, job: Job, folder: Path, *, quiet: bool = False) -> None:
        self.job = job
        self.folder = folder
        self.quiet = quiet
        self.console = Console()
        self.summary: dict[str, Any] = {}
        self._rounds: list[dict[str, Any]] = []
        self._start: dict[str, Any] = {}
        self._done = 0
        self._note = "loading model and data"
        self._began = time.monotonic()
        self._first = 0
        self._live: Live | None = None

    def __enter__(self) -> "LiveView":
        if self.console.is_terminal and not self.quiet:
            self._live = Live(self._render(), console=self.console, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """Leaves the last picture on the screen."""
        if self._live is not None:
            self._note = ""
            self._live.update(self._render())
            self._live.stop()
            self._live = None

    def event(self, event: dict[str, Any]) -> None:
        """Shows one event of the run."""
        kind = event["event"]
        if kind == "start":
            self._start = event
            self._say(self._opening())
        elif kind == "round":
            self._rounds.append(event)
            self._done = event["round"]
            if not self._first:
                self._first = event["round"] - 1
            self._say(self._line(event))
        elif kind == "rejected":
            self._say(
                f"round {event['round']}: rejected {event['client']} ({event['code']}): "
                f"{event['detail']}",
                keep=True,
            )
        elif kind == "abandoned":
            self._say(f"round {event['round']} abandoned: {event['why']}", keep=True)
        elif kind == "resume":
            self._done = self._first = event["round"]
            self._began = time.monotonic()
            self._say(f"continuing after round {event['round']}")
        elif kind in ("fallback", "machine", "warning"):
            self._say(f"warning: {event['why']}", keep=True)
        elif kind == "waiting":
            here = ", ".join(event["clients"]) or "nobody"
            self._note = f"waiting for {event['wanted']} clients; here: {here}"
            self._say(self._note)
        elif kind in ("refused", "not-ready"):
            self._say(f"node {event['node']} takes no part: {event['why']}", keep=True)

    def working(self, client: str) -> None:
        """A client begins its part of a round."""
        self._note = f"round {self._done + 1}: {client} is training"
        self._refresh()

    def finishing(self) -> None:
        """All rounds are done."""
        self._note = "evaluating each client"
        self._refresh()

    def baseline_event(self, event: dict[str, Any]) -> None:
        """Shows that a baseline has begun."""
        if event["event"] == "start":
            self._note = f"baseline: {', '.join(event['clients'])} alone"
            self._say(self._note)

    def print_result(self) -> None:
        """The final table and where things are."""
        if self.quiet or not self.summary:
            return
        from fedlora.report.side_by_side import side_by_side, text_table
        from fedlora.report.text_table import result_table

        task = self.job.model.task
        self.console.print(result_table(self.summary, task))
        for found in side_by_side(self.summary, task):
            self.console.print(text_table(found))
        adapter = self.folder / (PERSONAL if self.summary.get("personal") else "adapter")
        self.console.print(
            f"adapter  {adapter}\nreport   {self.folder / 'report.html'}",
            highlight=False,
            markup=False,
            soft_wrap=True,
        )

    def _say(self, text: str, *, keep: bool = False) -> None:
        """One line; a live view has its own place for it, unless it must be kept."""
        if self.quiet:
            return
        if self._live is None or keep:
            self.console.print(text, markup=False, highlight=False, soft_wrap=True)
        self._refresh()

    def _refresh(self) -> None:
        if self._live is not None:
            self._live.update(self._render())

    def _opening(self) -> str:
        start = self._start
        metric = headline(self.job.model.task, start["eval"])
        base = f", base {metric.format(start['eval'].get(metric.key))} {metric.name}"
        dropped = start["unusable"]["counts"]
        rows = f"\nrows: {', '.join(f'{n} {why}' for why, n in dropped.items())}" if dropped else ""
        return (
            f"{start['name']}: {len(start['clients'])} clients, {start['rounds']} rounds, "
            f"{start['strategy']} on {start['method']} ({start['num_trained']:,} trained numbers)"
            f"{base}{rows}"
        )

    def _line(self, event: dict[str, Any]) -> str:
        cells = self._cells(event)
        return "  ".join(f"{name} {cell}" for name, cell in zip(self._columns, cells, strict=True))

    @property
    def _columns(self) -> tuple[str, ...]:
        return PRIVATE_COLUMNS if self.job.privacy else COLUMNS

    def _cells(self, event: dict[str, Any]) -> tuple[str, ...]:
        metric = headline(self.job.model.task, event["eval"])
        error = event["aggregation_error"]
        loss = event["train_loss"]
        # who took part in a round that is private to clients is not told, nor how many
        hidden = event["rejected"] is None
        cells = (
            f"{event['round']}/{self.job.federation.rounds}",
            "-" if loss is None else f"{loss:.4f}",
            metric.format(event["eval"].get(metric.key)),
            *(("-", "-") if hidden else (str(len(event["clients"])), str(event["rejected"]))),
            _megabytes(event["bytes_up"]),
            _megabytes(event["bytes_down"]),
            "-" if error is None else f"{error:.1e}",
        )
        if not self.job.privacy:
            return cells
        spent = event["epsilon"]
        return (*cells, "not private" if spent is None else f"{spent:.3g}")

    def _render(self) -> RenderableType:
        table = Table(box=None, pad_edge=False)
        for name in self._columns:
            table.add_column(name, justify="right")
        for event in self._rounds[-SHOWN_ROUNDS:]:
            table.add_row(*self._cells(event))
        head = Text(self._opening() if self._start else f"{self.job.run.name}")
        return Group(head, table, Text(f"{self._note}{self._eta()}", style="dim"))

    def _eta(self) -> str:
        fresh = self._done - self._first
        left = self.job.federation.rounds - self._done
        if not fresh or not left:
            return ""
        seconds = (time.monotonic() - self._began) / fresh * left
        return (
            f" (about {seconds / 60:.0f} min left)"
            if seconds > 90
            else f" (about {seconds:.0f} s left)"
        )


def _megabytes(count: int) -> str:
    return f"{count / 1e6:.2f} MB"
