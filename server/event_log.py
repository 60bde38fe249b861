"""The events of a run as log messages, each with its level and its fields."""

import logging
from collections.abc import Callable
from dataclasses import dataclass

from fedlora.errors import EXIT_INTERRUPTED
from fedlora.server.journal import Event

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Kind:
    """How one kind of event is logged.

    Attributes:
        level: of the message.
        message: what an operator reads.
        fields: of the event that go along, where it has them.
    """

    level: int
    message: Callable[[Event], str]
    fields: tuple[str, ...] = ()


def log_event(event: Event) -> None:
    """Logs one event of a run; of an unknown kind, the event as it is. Never raises."""
    kind = event.get("event")
    known = _KINDS.get(kind) if isinstance(kind, str) else None
    try:
        if known is None:
            raise KeyError(kind)
        message = known.message(event)
    except (KeyError, TypeError, ValueError, AttributeError):
        log.info("event %s", kind, extra={"fields": event})
        return
    fields = {name: event[name] for name in ("round", "client", *known.fields) if name in event}
    level = known.level
    if event.get("exit_code") == EXIT_INTERRUPTED:
        level = logging.WARNING
    log.log(level, "%s", message, extra={"event": kind, **fields})


def _start(event: Event) -> str:
    return (
        f"run {event['name']} started: {len(event['clients'])} clients, {event['rounds']} rounds, "
        f"{event['strategy']} on {event['method']} ({event['num_trained']} trained numbers)"
    )


def _round(event: Event) -> str:
    seconds = sum(event["seconds"].values())
    # of a round that is private to clients it is not told who took part
    who = "" if event["rejected"] is None else f"{len(event['clients'])} clients, "
    return (
        f"round {event['round']} committed: {who}"
        f"{event['bytes_up']} bytes up, {event['bytes_down']} bytes down, {seconds:.2f} s"
    )


def _rejected(event: Event) -> str:
    return f"update of {event['client']} rejected ({event['code']}): {event['detail']}"


def _abandoned(event: Event) -> str:
    return f"attempt {event['attempt']} at round {event['round']} abandoned: {event['why']}"


def _waiting(event: Event) -> str:
    return f"waiting for clients: {len(event['clients'])} of {event['wanted']} are here"


_ROUND_FIELDS = (
    "clients",
    "missing",
    "rejected",
    "bytes_up",
    "bytes_down",
    "seconds",
    "train_loss",
    "eval",
    "aggregation_error",
    "epsilon",
)
_KINDS = {
    "start": _Kind(logging.INFO, _start, ("strategy", "method", "rounds", "clients", "eval")),
    "resume": _Kind(logging.INFO, lambda e: f"run continues after round {e['round']}"),
    "round": _Kind(logging.INFO, _round, _ROUND_FIELDS),
    "rejected": _Kind(logging.WARNING, _rejected, ("code", "detail")),
    "abandoned": _Kind(logging.WARNING, _abandoned, ("attempt", "why")),
    "fallback": _Kind(logging.WARNING, lambda e: str(e["why"])),
    "warning": _Kind(logging.WARNING, lambda e: str(e["why"])),
    "joined": _Kind(logging.INFO, lambda e: f"client {e['client']} joined", ("node",)),
    "refused": _Kind(
        logging.WARNING, lambda e: f"node {e['node']} refused: {e['why']}", ("node", "why")
    ),
    "not-ready": _Kind(
        logging.WARNING, lambda e: f"node {e['node']} is not ready: {e['why']}", ("node", "why")
    ),
    "waiting": _Kind(logging.INFO, _waiting, ("clients", "wanted")),
    "failed": _Kind(logging.ERROR, lambda e: f"run failed: {e['why']}", ("exit_code", "why")),
    "end": _Kind(logging.INFO, lambda e: f"run ended with round {e['round']}", ("eval",)),
}
