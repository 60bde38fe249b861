"""Figures against plain sums over the events, live, from a journal, and after a rewrite."""

import json
import math

import pytest
from prometheus_client import CollectorRegistry

from fedlora.telemetry.journal import JournalMetrics
from fedlora.telemetry.run import RunMetrics
from tests.ops.events import EVENTS, START, rejected, round_event


def samples(registry):
    """name{label=value} -> value, without when a series was made."""
    return {
        sample.name + "".join(f" {k}={v}" for k, v in sorted(sample.labels.items())): sample.value
        for family in registry.collect()
        for sample in family.samples
        if not sample.name.endswith("_created")
    }


def fed(events, run="demo"):
    registry = CollectorRegistry()
    metrics = RunMetrics(registry)
    for event in events:
        metrics.take(event, run)
    return samples(registry)


def same(ours, theirs):
    return ours.keys() == theirs.keys() and all(
        a == theirs[k] or (math.isnan(a) and math.isnan(theirs[k])) for k, a in ours.items()
    )


def test_the_figures_are_sums_over_the_events():
    found = fed(EVENTS)
    rounds = [event for event in EVENTS if event["event"] == "round"]

    def kinds(kind):
        return sum(event["event"] == kind for event in EVENTS)

    assert found["fedlora_rounds_committed_total run=demo"] == len(rounds)
    assert found["fedlora_rounds_abandoned_total run=demo"] == kinds("abandoned")
    assert found["fedlora_nodes_refused_total run=demo"] == kinds("refused")
    assert found["fedlora_updates_admitted_total run=demo"] == sum(
        len(event["clients"]) for event in rounds
    )
    codes = [event["code"] for event in EVENTS if event["event"] == "rejected"]
    for code in set(codes):
        assert found[f"fedlora_updates_rejected_total code={code} run=demo"] == codes.count(code)
    for name, field in (("up", "bytes_up"), ("down", "bytes_down")):
        assert found[f"fedlora_{name}_bytes_total run=demo"] == sum(e[field] for e in rounds)
    for stage in ("clients", "reduce"):
        seconds = [event["seconds"][stage] for event in rounds]
        assert found[f"fedlora_stage_seconds_sum run=demo stage={stage}"] == pytest.approx(
            sum(seconds)
        )
        for edge in ("0.01", "3.0", "+Inf"):
            count = found[f"fedlora_stage_seconds_bucket le={edge} run=demo stage={stage}"]
            assert count == sum(s <= float(edge) for s in seconds)


def test_gauges_show_the_last_value_that_was_known():
    found = fed(EVENTS)
    assert found["fedlora_round_number run=demo"] == 3
    assert found["fedlora_rounds_planned run=demo"] == 3
    assert found["fedlora_eval_score metric=accuracy run=demo"] == 0.8
    assert found["fedlora_epsilon run=demo"] == 2.5
    # round 3 measured none
    assert found["fedlora_aggregation_error run=demo"] == 0.5
    # round 3 diverged
    assert math.isnan(found["fedlora_train_loss run=demo"])
    assert "fedlora_epsilon run=demo" not in fed(EVENTS[:11])


def test_a_run_is_active_until_it_ends_or_fails_and_again_when_it_continues():
    active = [fed(EVENTS[: n + 1])["fedlora_run_active run=demo"] for n in range(len(EVENTS))]
    assert active == [float(e["event"] not in ("failed", "end")) for e in EVENTS]


def test_clients_present_joined_or_answered_and_were_not_missing():
    def present(*events):
        return fed(events)["fedlora_clients_present run=demo"]

    joined = {"event": "joined", "client": "dan", "node": "1"}
    assert present(START) == 3
    assert present(START, joined) == 4
    assert present(START, joined, joined) == 4
    assert present(START, joined, round_event(1, ["ann"], ["bob", "cyd"])) == 2
    assert present(START, {"event": "waiting", "clients": ["ann"], "wanted": 3}) == 1
    assert present({"event": "waiting", "clients": [], "wanted": 3}) == 0


def test_counters_of_a_run_begin_at_zero():
    """What appears with its first increase shows none to Prometheus."""
    found = fed(EVENTS[:1])
    for name in ("rounds_committed", "rounds_abandoned", "updates_admitted", "up_bytes"):
        assert found[f"fedlora_{name}_total run=demo"] == 0


def test_runs_do_not_mix():
    registry = CollectorRegistry()
    metrics = RunMetrics(registry)
    for event in EVENTS:
        metrics.take(event, "a")
        metrics.take(event, "b")
    alone = fed(EVENTS, "a") | fed(EVENTS, "b")
    assert same(samples(registry), alone)


@pytest.mark.parametrize("event", [{}, {"event": None}, {"event": "new-kind"}, {"event": "round"}])
def test_an_event_of_another_version_ends_nothing(event):
    fed([event, *EVENTS])


def write(path, events, mode="w"):
    with path.open(mode) as file:
        file.writelines(json.dumps(event) + "\n" for event in events)


def test_a_journal_gives_what_the_live_run_gave_however_often_it_is_read(tmp_path):
    path = tmp_path / "events.jsonl"
    registry = CollectorRegistry()
    registry.register(JournalMetrics(lambda: {path: "demo"}))
    assert samples(registry) == {}
    for count, event in enumerate(EVENTS, 1):
        write(path, [event], "a")
        for _ in range(2):
            assert same(samples(registry), fed(EVENTS[:count]))


def test_a_line_counts_once_it_is_whole(tmp_path):
    path = tmp_path / "events.jsonl"
    registry = CollectorRegistry()
    registry.register(JournalMetrics(lambda: {path: "demo"}))
    data = "".join(json.dumps(event) + "\n" for event in EVENTS).encode()
    for size in range(0, len(data), 97):
        path.write_bytes(data[:size])
        whole = data[:size].count(b"\n")
        assert same(samples(registry), fed(EVENTS[:whole]))


def test_a_journal_that_was_rewritten_is_counted_anew(tmp_path):
    """Once in place and once by a rename; the second is longer than what it replaces."""
    path, other = tmp_path / "events.jsonl", tmp_path / "new"
    registry = CollectorRegistry()
    registry.register(JournalMetrics(lambda: {path: "demo"}))
    first = [START, rejected(1), round_event(1), rejected(2), rejected(2)]
    write(path, first)
    assert same(samples(registry), fed(first))
    second = [START, rejected(1), round_event(1)]
    write(path, second)
    assert same(samples(registry), fed(second))
    third = [START, rejected(1), rejected(1), round_event(1), rejected(2), round_event(2)]
    write(other, third)
    other.rename(path)
    assert same(samples(registry), fed(third))
    path.unlink()
    assert samples(registry) == {}


def test_journals_come_and_go(tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    write(one, EVENTS)
    write(two, EVENTS[:7])
    shown = {one: "one"}
    registry = CollectorRegistry()
    registry.register(JournalMetrics(lambda: dict(shown)))
    samples(registry)
    shown[two] = "two"
    assert same(samples(registry), fed(EVENTS, "one") | fed(EVENTS[:7], "two"))
    del shown[one]
    assert same(samples(registry), fed(EVENTS[:7], "two"))


def test_lines_that_are_no_events_are_passed_over(tmp_path):
    path = tmp_path / "events.jsonl"
    path.write_bytes(b'\xff\xfe\n[1]\n{"event": 3}\nnull\n\n')
    write(path, EVENTS, "a")
    registry = CollectorRegistry()
    registry.register(JournalMetrics(lambda: {path: "demo"}))
    assert same(samples(registry), fed(EVENTS))
