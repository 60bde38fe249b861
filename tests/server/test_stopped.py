"""A run that was stopped stays so, whatever its ServerApp does meanwhile."""

from types import SimpleNamespace

import pytest
import tomli_w

from fedlora.config.job import Job
from fedlora.errors import FedloraError
from fedlora.server.flower import main
from fedlora.server.home import HOME_VARIABLE, Home, Outcome
from fedlora.server.hosted import work_on
from fedlora.server.journal import Journal
from fedlora.server.metrics import MetricsLog
from fedlora.server.settings import ServerSettings
from fedlora.tickets import ticket_key

STOPPED = Outcome("stopped", 130, "stopped by an operator")


@pytest.fixture
def place(tmp_path):
    home = Home(tmp_path / "home")
    home.prepare()
    ticket_key(home.ticket_key)
    ServerSettings(":0").write(home)
    place = home.place("0123456789abcdef")
    job = Job.model_validate({"partition": {"clients": 2}})
    place.submit(tomli_w.dumps(job.model_dump(mode="json", exclude_none=True)), b"")
    return place


def test_a_serverapp_that_comes_up_after_the_stop_does_nothing(place, monkeypatch):
    place.end(STOPPED)
    monkeypatch.setenv(HOME_VARIABLE, str(place.path.parent.parent))
    main(None, SimpleNamespace(run_config={"run": place.run}))
    assert place.outcome() == STOPPED
    assert not place.events.exists()
    assert not place.folder.exists()


def test_a_serverapp_that_fails_after_the_stop_does_not_say_otherwise(place):
    place.end(STOPPED)
    place.job.write_text("no job")
    with pytest.raises(FedloraError):
        work_on(Home(place.path.parent.parent), place, None)
    assert place.outcome() == STOPPED
    assert Journal(place.events).read() == []


def test_a_serverapp_that_ends_after_the_stop_does_not_say_otherwise(place, monkeypatch):
    monkeypatch.setattr("fedlora.server.hosted.deploy", lambda *args: place.end(STOPPED))
    work_on(Home(place.path.parent.parent), place, None)
    assert place.outcome() == STOPPED


def test_a_run_that_is_continued_has_not_ended(tmp_path):
    """A line that says so, left by a crash, would end the stream of all who watch."""
    log = MetricsLog(tmp_path / "metrics.jsonl")
    kept = {"event": "start", "round": 0}
    for event in (kept, {"event": "failed", "exit_code": 130}, {"event": "end", "round": 0}):
        log.append(event)
    log.reconcile(SimpleNamespace(record=lambda number: None), 0)
    assert log.read() == [kept]
