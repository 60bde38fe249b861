"""Comparisons of real runs of the tiny model."""

import json

import pytest

from fedlora.errors import ConfigError, RunFolderError
from fedlora.report.comparison_page import write_comparison
from fedlora.simulation.comparison import compare
from fedlora.simulation.contenders import (
    Contender,
    contender_job,
    contender_jobs,
    placed,
    run_name,
    strategy_contender,
)

BROKEN = """
from fedlora.strategies.fedit import FedIT


class Broken(FedIT):
    name = "broken"

    def refactor(self, state, stats):
        if state.round == 1:
            raise ValueError("no luck")
        return super().refactor(state, stats)
"""

PAIR = [strategy_contender("fedit"), strategy_contender("ffa-lora")]


def lasting(found):
    """A comparison without what depends on the clock."""
    text = json.dumps(found)
    tree = json.loads(text)
    for entry in (*tree["runs"], *tree["summary"]):
        entry.pop("server_s")
    return tree


class Stop(BaseException):
    """Ends a comparison in the middle, as Ctrl-C would."""


def test_the_runs_are_those_that_simulate_would_make(make_job, tmp_path):
    found = compare(
        make_job(),
        tmp_path / "c",
        contenders=[*PAIR, Contender("slow", ("training.learning_rate=1e-4",))],
        baselines=["local", "centralised"],
        num_seeds=2,
    )
    assert [(r["label"], r["kind"], r["seed"]) for r in found["runs"]] == [
        (label, kind, seed)
        for seed in (0, 1)
        for label, kind in (
            ("fedit", "strategy"),
            ("ffa-lora", "strategy"),
            ("slow", "strategy"),
            ("local", "baseline"),
            ("centralised", "baseline"),
        )
    ]
    assert json.loads((tmp_path / "c" / "comparison.json").read_text()) == json.loads(
        json.dumps(found)
    )
    for run in found["runs"][:3]:
        folder = tmp_path / "c" / "runs" / f"{run['label']}-seed0"
        events = [json.loads(line) for line in (folder / "metrics.jsonl").open()]
        rounds = [e for e in events if e["event"] == "round"]
        assert [p["value"] for p in run["curve"]] == [e["eval"]["accuracy"] for e in rounds]
        sent = [e["bytes_up"] + e["bytes_down"] for e in rounds]
        assert [p["bytes"] for p in run["curve"]] == [sum(sent[: i + 1]) for i in range(3)]
        assert run["bytes_up"] + run["bytes_down"] == sum(sent)
        assert run["final"] == rounds[-1]["eval"]
    job = (tmp_path / "c" / "runs" / "slow-seed1" / "job.toml").read_text()
    assert "learning_rate = 0.0001" in job
    assert "seed = 1" in job


def test_levels_set_the_dirichlet_alpha_and_pair_the_division(make_job, tmp_path):
    found = compare(
        make_job(partition={"column": "label"}, federation={"rounds": 1}),
        tmp_path / "c",
        contenders=PAIR,
        skews=[0.3, 10],
    )
    assert [(r["skew"], r["label"]) for r in found["runs"]] == [
        (skew, label) for skew in (0.3, 10) for label in ("fedit", "ffa-lora")
    ]
    divisions = {}
    for run in found["runs"]:
        folder = tmp_path / "c" / "runs" / run_name(run["label"], run["skew"], 0)
        start = json.loads((folder / "metrics.jsonl").open().readline())
        divisions[run["skew"], run["label"]] = start["clients"]
    assert divisions[0.3, "fedit"] == divisions[0.3, "ffa-lora"]
    assert divisions[0.3, "fedit"] != divisions[10, "fedit"]
    assert sorted(p.name for p in (tmp_path / "c" / "runs").iterdir()) == [
        "fedit-alpha0.3-seed0",
        "fedit-alpha10-seed0",
        "ffa-lora-alpha0.3-seed0",
        "ffa-lora-alpha10-seed0",
    ]


@pytest.mark.parametrize("kind", ["natural", "folders", "shards", "pathological"])
def test_levels_are_refused_for_another_division(make_job, tmp_path, kind):
    with pytest.raises(ConfigError, match=rf'partition.kind = "{kind}".*leave --skew out'):
        compare(make_job(partition={"kind": kind}), tmp_path / "c", contenders=PAIR, skews=[1.0])
    assert not (tmp_path / "c").exists()


@pytest.mark.parametrize("skews", [[0.0], [-1.0], [float("inf")], [float("nan")], [1.0, 1]])
def test_levels_that_are_no_alphas_are_refused(make_job, tmp_path, skews):
    with pytest.raises(ConfigError, match="skew"):
        compare(make_job(), tmp_path / "c", contenders=PAIR, skews=skews)


@pytest.mark.parametrize("stop_at", [1, 2, 5, 8])
def test_an_interrupted_comparison_goes_on_to_the_same_figures(make_job, tmp_path, stop_at):
    """Also in the middle of a run; bytes too, which equal-bytes readings depend on."""
    job = make_job()
    words = {"contenders": PAIR, "num_seeds": 2, "equal": "bytes"}
    whole = compare(job, tmp_path / "whole", **words)
    rounds = 0

    def stop(event):
        nonlocal rounds
        rounds += event["event"] == "round"
        if rounds == stop_at:
            raise Stop

    with pytest.raises(Stop):
        compare(job, tmp_path / "pieces", emit=stop, **words)
    assert not (tmp_path / "pieces" / "comparison.json").exists()
    pieces = compare(job, tmp_path / "pieces", **words)
    assert lasting(pieces) == lasting(whole)
    for run in whole["runs"]:
        path = f"runs/{run['label']}-seed{run['seed']}/rounds/0003/global.safetensors"
        assert (tmp_path / "pieces" / path).read_bytes() == (tmp_path / "whole" / path).read_bytes()


def test_other_settings_are_refused_with_the_contender_and_what_differs(make_job, tmp_path):
    compare(make_job(), tmp_path / "c", contenders=PAIR)
    other = make_job(training={"learning_rate": 0.5})
    before = (tmp_path / "c" / "runs" / "fedit-seed0" / "HEAD").read_bytes()
    with pytest.raises(RunFolderError) as caught:
        compare(other, tmp_path / "c", contenders=PAIR)
    text = str(caught.value)
    assert "contender 'fedit'" in text
    assert "training.learning_rate = 0.01, now 0.5" in text
    assert (tmp_path / "c" / "runs" / "fedit-seed0" / "HEAD").read_bytes() == before
    changed = [PAIR[0], Contender("ffa-lora", ("federation.strategy=rolora",))]
    with pytest.raises(RunFolderError, match=r"contender 'ffa-lora'.*federation\.strategy"):
        compare(make_job(), tmp_path / "c", contenders=changed)


def test_more_seeds_and_contenders_are_added_to_what_is_there(make_job, tmp_path):
    job = make_job(federation={"rounds": 1})
    first = compare(job, tmp_path / "c", contenders=PAIR[:1])
    started = []
    second = compare(
        job, tmp_path / "c", contenders=PAIR, num_seeds=2, emit=lambda e: started.append(e["event"])
    )
    assert started.count("start") == 3
    assert second["runs"][0] == first["runs"][0]


def test_a_failing_contender_is_recorded_and_the_others_go_on(make_job, tmp_path):
    plugin = tmp_path / "broken.py"
    plugin.write_text(BROKEN)
    broken = Contender("broken", (f"federation.strategy={plugin}:Broken",))
    found = compare(make_job(), tmp_path / "c", contenders=[PAIR[0], broken, PAIR[1]], num_seeds=2)
    by_label = {
        label: [r for r in found["runs"] if r["label"] == label]
        for label in ("fedit", "broken", "ffa-lora")
    }
    for run in by_label["broken"]:
        assert run["status"] == "failed"
        assert "ValueError: no luck" in run["reason"]
        assert run["final"] == {}
        assert [point["round"] for point in run["curve"]] == [1]
    assert {r["status"] for r in by_label["fedit"] + by_label["ffa-lora"]} == {"done"}
    row = found["summary"][1]
    assert (row["label"], row["n"], row["failed"], row["mean"]) == ("broken", 0, 2, None)
    assert found["summary"][2]["equal_round"] == 3
    write_comparison(tmp_path / "c")
    # once the strategy is mended, the same command goes on from the round that stands
    plugin.write_text(BROKEN.replace("state.round == 1", "False"))
    mended = compare(make_job(), tmp_path / "c", contenders=[PAIR[0], broken, PAIR[1]], num_seeds=2)
    assert {run["status"] for run in mended["runs"]} == {"done"}
    curves = [[r["curve"] for r in mended["runs"] if r["label"] == x] for x in ("fedit", "broken")]
    assert [[p["value"] for p in c] for c in curves[0]] == [
        [p["value"] for p in c] for c in curves[1]
    ]


def test_a_run_below_its_quorum_is_recorded_as_failed(make_job, tmp_path):
    lost = Contender("lost", ("scenario.dropout=0.999", "federation.retries=0"))
    found = compare(make_job(), tmp_path / "c", contenders=[PAIR[0], lost])
    assert [run["status"] for run in found["runs"]] == ["done", "failed"]
    assert "quorum" in found["runs"][1]["reason"]
    assert found["runs"][1]["rounds"] == 0


def test_a_contender_may_have_its_own_adapter(make_job, tmp_path):
    wide = Contender("wide", ("adapter.rank=4",))
    found = compare(make_job(), tmp_path / "c", contenders=[PAIR[0], wide, PAIR[1]])
    sizes = [run["bytes_up"] for run in found["runs"]]
    assert sizes[1] > sizes[0] > sizes[2]
    alone = compare(make_job(), tmp_path / "alone", contenders=[PAIR[1]])
    assert alone["runs"][0]["curve"] == found["runs"][2]["curve"]


def test_every_problem_of_every_contender_is_reported_at_once(make_job):
    contenders = [
        Contender("one", ("federation.strategy=fedti",)),
        Contender("two", ("federation.strateg=x",)),
        Contender("three", ("run.seed=4",)),
        Contender("four", ("data.max_rows=9", "training.local_steps=-1")),
        Contender("a b"),
        Contender("a_b"),
        Contender("local"),
        Contender(" "),
    ]
    with pytest.raises(ConfigError) as caught:
        contender_jobs(make_job(), contenders, ["centralized"])
    text = str(caught.value)
    for part in (
        "contender 'one'",
        'did you mean "fedit"',
        "contender 'two': federation.strateg is not",
        "contender 'three': changes [run]",
        "contender 'four': training.local_steps",
        "'a b' and 'a_b' would share",
        "'local' is named like a baseline",
        "give it a name",
        'did you mean "centralised"',
    ):
        assert part in text


def test_options_of_the_job_stay_with_the_strategy_they_belong_to(make_job):
    job = make_job(federation={"strategy": "fedit", "strategy_options": {"power": 2.0}})
    assert contender_job(job, PAIR[0]).federation.strategy_options == {"power": 2.0}
    assert contender_job(job, PAIR[1]).federation.strategy_options == {}
    mine = Contender("x", ("federation.strategy=rolora", "federation.strategy_options.a='b'"))
    assert contender_job(job, mine).federation.strategy_options == {"a": "b"}


def test_a_strategy_alone_changes_nothing_else(make_job):
    job = make_job()
    assert contender_job(job, PAIR[0]) == job
    assert placed(job, None, job.run.seed) == job


def test_what_cannot_run_is_refused_before_anything_runs(make_job, tmp_path):
    uneven = Contender("uneven", ("scenario.ranks=[1, 2]",))
    with pytest.raises(ConfigError, match=r"contender 'uneven'.*needs equal ranks"):
        compare(make_job(), tmp_path / "c", contenders=[PAIR[1], uneven])
    assert not (tmp_path / "c").exists()
