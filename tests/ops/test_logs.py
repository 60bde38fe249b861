"""What a line of the log says, what it hides, and that nothing put into it can break it."""

import contextvars
import io
import json
import logging
import re
import subprocess
import sys
import threading
from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora import logs
from fedlora.errors import ConfigError

log = logging.getLogger("fedlora.tests.ops")


@pytest.fixture
def stream():
    """The logger "fedlora" as it was before, whatever the test configures."""
    logger = logging.getLogger("fedlora")
    before = logger.handlers[:], logger.level, logger.propagate
    yield io.StringIO()
    logger.handlers[:], logger.propagate = before[0], before[2]
    logger.setLevel(before[1])


def lines(stream):
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_has_its_head_its_context_and_its_fields(stream):
    logs.configure(as_json=True, stream=stream)
    before = datetime.now(UTC)
    with logs.log_context(run="r1"), logs.log_context(round=3, client="ann"):
        log.warning("%d bytes", 7, extra={"bytes_up": 7, "client": "bob"})
    log.info("outside")
    inside, outside = lines(stream)
    time = inside.pop("time")
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", time)
    # milliseconds are cut
    assert (datetime.now(UTC) - datetime.fromisoformat(time)).total_seconds() >= 0
    assert (before - datetime.fromisoformat(time)).total_seconds() < 0.001
    assert inside == {
        "level": "WARNING",
        "logger": "fedlora.tests.ops",
        "message": "7 bytes",
        "run": "r1",
        "round": 3,
        "client": "bob",
        "bytes_up": 7,
    }
    assert outside.keys() == {"time", "level", "logger", "message"}


def test_a_second_configure_replaces_the_first_and_leaves_other_handlers(stream):
    other = logging.StreamHandler(io.StringIO())
    logging.getLogger("fedlora").addHandler(other)
    late = io.StringIO()
    logs.configure(as_json=True, stream=stream)
    logs.configure(as_json=True, level="warning", stream=late)
    log.info("quiet")
    log.warning("loud")
    assert stream.getvalue() == ""
    assert [line["message"] for line in lines(late)] == ["loud"]
    assert other.stream.getvalue() == "loud\n"


def test_the_root_logger_stays_as_it_was(stream):
    root = logging.getLogger()
    heard = io.StringIO()
    handler = logging.StreamHandler(heard)
    before = root.handlers[:], root.level
    root.addHandler(handler)
    try:
        logs.configure(as_json=False, stream=stream)
        log.error("ours")
        logging.getLogger("app").error("theirs")
        assert (root.handlers[:-1], root.level) == before
    finally:
        root.removeHandler(handler)
    assert heard.getvalue() == "theirs\n"
    assert "ours" in stream.getvalue()


def test_threads_have_contexts_of_their_own(stream):
    logs.configure(as_json=True, stream=stream)
    barrier = threading.Barrier(4)

    def work(name):
        with logs.log_context(client=name):
            barrier.wait(10)
            log.info(name)
            barrier.wait(10)

    threads = [threading.Thread(target=work, args=(f"c{i}",)) for i in range(4)]
    with logs.log_context(client="main", run="r"):
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        taken = contextvars.copy_context()
        carried = threading.Thread(target=taken.run, args=(log.info, "carried"))
        carried.start()
        carried.join()
    found = {line["message"]: line for line in lines(stream)}
    assert found.pop("carried")["client"] == "main"
    assert {message: line["client"] for message, line in found.items()} == {
        f"c{i}": f"c{i}" for i in range(4)
    }
    assert not any("run" in line for line in found.values())


@pytest.mark.parametrize("as_json", [False, True])
def test_secrets_are_masked_at_every_depth_and_counts_are_not(stream, as_json):
    logs.configure(as_json=as_json, stream=stream)
    hidden = {
        "download_ticket": "s3cret",
        "apiKey": "s3cret",
        "tokens": ["s3cret"],
        "key": b"s3cret",
        "deep": {"a": [{"fedlora-ticket": "s3cret"}]},
        "deepest": {"a": {"b": {"c": {"d": {"e": {"f": {"ticket": "s3cret"}}}}}}},
        "wide": {**{str(i): i for i in range(2000)}, "token": "s3cret"},
    }
    with logs.log_context(upload_ticket="s3cret"):
        log.info("hello", extra={**hidden, "num_tokens": 123456, "keyed": "shown", "monkey": "m"})
    text = stream.getvalue()
    assert "s3cret" not in text
    assert "123456" in text
    assert "shown" in text
    assert logs.MASK in text


class Awkward:
    def __repr__(self):
        raise RuntimeError("no repr")

    def __str__(self):
        raise RuntimeError("no str")


class AwkwardDict(dict):
    def items(self):
        raise RuntimeError("no items")


LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(alphabet=st.characters()),
    st.binary(),
    st.builds(Awkward),
    st.builds(lambda: AwkwardDict(a=1)),
    st.builds(lambda: 10**5000),
    st.complex_numbers(),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner) | st.dictionaries(st.one_of(st.text(), st.integers()), inner),
    max_leaves=8,
)


@given(message=st.text(alphabet=st.characters()), value=VALUES, name=st.text())
def test_whatever_is_logged_is_one_json_line_and_nothing_is_raised(message, value, name):
    record = logging.makeLogRecord({"name": "fedlora.x", "msg": message, "levelname": "INFO"})
    vars(record)["field"] = value
    vars(record).setdefault(name, value)
    record.args = (value,)
    line = logs.JsonFormatter().format(record)
    assert "\n" not in line

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    read = json.loads(line, parse_constant=refuse)
    assert {"time", "level", "logger", "message", "field"} <= read.keys()
    assert read["logger"] == "fedlora.x"
    text = logs.TextFormatter().format(record)
    first, *further = text.split("\n")
    assert " INFO " in first
    assert all(part.startswith("    ") for part in further)
    assert text.replace("\n", "").isprintable()


def test_a_cycle_ends(stream):
    logs.configure(as_json=True, stream=stream)
    cycle = {}
    cycle["again"] = cycle
    log.info("round and round", extra={"cycle": cycle})
    assert lines(stream)[0]["cycle"]["again"]["again"]


def test_a_message_from_a_peer_cannot_forge_a_line_or_move_the_cursor(stream):
    logs.configure(as_json=False, stream=stream)
    log.info("refused: %s", "x\n2026-01-01T00:00:00.000Z ERROR   server: forged\r\x1b[2J\x9b1A")
    text = stream.getvalue()
    assert len(re.findall(r"^\d{4}-", text, re.MULTILINE)) == 1
    assert not {"\r", "\x1b", "\x9b"} & set(text)


def test_an_exception_is_told_with_its_traceback(stream):
    logs.configure(as_json=True, stream=stream)
    try:
        raise ValueError("broken")
    except ValueError:
        log.exception("it failed")
    told = lines(stream)[0]
    assert told["message"] == "it failed"
    assert told["exception"].endswith("ValueError: broken")
    assert "Traceback" in told["exception"]


def test_a_wrong_level_or_format_is_refused_with_the_choices(stream, monkeypatch):
    with pytest.raises(ConfigError, match=r'"WARNING".*INFO'):
        logs.configure(as_json=True, level="warnin", stream=stream)
    monkeypatch.setenv(logs.FORMAT_VARIABLE, "xml")
    with pytest.raises(ConfigError, match=r"'xml'.*text, json"):
        logs.configure_from_environment(stream)


def test_a_child_logs_as_its_parent_says():
    code = (
        "import logging; from fedlora.logs import configure_from_environment as c; c(); "
        "log = logging.getLogger('fedlora.child'); log.debug('deep'); log.info('one')"
    )
    for as_json, level, count in ((True, "DEBUG", 2), (False, "INFO", 1), (True, "ERROR", 0)):
        done = subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONPATH": ":".join(sys.path), **logs.environment(as_json, level)},
            capture_output=True,
            text=True,
            check=True,
        )
        said = done.stderr.splitlines()
        assert len(said) == count
        assert all(line.startswith("{") == as_json for line in said)


def test_what_libraries_leave_in_a_record_is_no_field_of_ours(stream):
    logs.configure(as_json=True, stream=stream)
    log.info("one", extra={"_library_stamp": 1, "bytes_up": 2})
    (line,) = lines(stream)
    assert line["bytes_up"] == 2
    assert "_library_stamp" not in line
