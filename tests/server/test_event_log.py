"""What an operator reads of a run's events."""

import json
import logging

import pytest

from fedlora.logs import JsonFormatter
from fedlora.server.event_log import log_event
from tests.ops.events import EVENTS
from tests.server.toy import Run

LOGGER = "fedlora.server.event_log"


@pytest.fixture
def said():
    """The lines logged, as they are read back from JSON."""

    class Keep(logging.Handler):
        def emit(self, record):
            found.append(json.loads(JsonFormatter().format(record)))

    found, logger = [], logging.getLogger(LOGGER)
    handler, before = Keep(), (logger.level, logger.propagate)
    logger.addHandler(handler)
    logger.setLevel("DEBUG")
    logger.propagate = False
    yield found
    logger.removeHandler(handler)
    logger.setLevel(before[0])
    logger.propagate = before[1]


def test_every_kind_has_a_message_and_the_level_an_operator_expects(said):
    for event in EVENTS:
        log_event(event)
    levels = {line["event"]: line["level"] for line in said}
    assert levels == {
        "start": "INFO",
        "resume": "INFO",
        "round": "INFO",
        "joined": "INFO",
        "waiting": "INFO",
        "end": "INFO",
        "rejected": "WARNING",
        "abandoned": "WARNING",
        "fallback": "WARNING",
        "warning": "WARNING",
        "refused": "WARNING",
        "not-ready": "WARNING",
        "failed": "ERROR",
    }
    for event, line in zip(EVENTS, said, strict=True):
        shared = line.keys() & event.keys()
        assert {name: line[name] for name in shared} == {name: event[name] for name in shared}
        assert {"round", "client"} & event.keys() <= line.keys()
        assert not line["message"].startswith("event ")


def test_a_round_that_is_private_to_clients_does_not_say_how_many_took_part(said):
    event = next(e for e in EVENTS if e["event"] == "round")
    log_event({**event, "clients": [], "rejected": None})
    assert "clients" not in said[0]["message"]
    assert "committed" in said[0]["message"]


def test_a_run_stopped_on_purpose_is_no_error(said):
    log_event({"event": "failed", "exit_code": 130, "why": "stopped by an operator"})
    assert [line["level"] for line in said] == ["WARNING"]


@pytest.mark.parametrize(
    "event",
    [
        {},
        {"event": "new-kind", "x": 1},
        {"event": "round"},
        {"event": ["round"]},
        {"event": "start"},
    ],
)
def test_an_event_of_another_version_is_logged_as_it_is(said, event):
    log_event(event)
    assert [line["fields"] for line in said] == [event]


def test_the_events_of_a_real_run_are_understood(said, tmp_path):
    run = Run(tmp_path / "run", rounds=2)
    try:
        run.go()
    finally:
        run.store.close()
    for event in run.rounds():
        log_event(event)
    assert [line["round"] for line in said] == [1, 2]
    for line, event in zip(said, run.rounds(), strict=True):
        assert line["bytes_up"] == event["bytes_up"] > 0
        assert line["message"].startswith(
            f"round {event['round']} committed: {len(event['clients'])} clients, "
        )
