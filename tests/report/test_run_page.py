import json
import math
import re

import pytest

from fedlora.report.run_page import write_report

ATTACK = "<script>alert(1)</script><img src=x onerror=alert(1)>\"' &amp; \u202e$x_1$"


def test_result_and_client_tables_hold_the_scores(make_run, read_page, summary):
    page = read_page(write_report(make_run(summary=summary)))
    result = page.table("model")
    assert [row["model"] for row in result] == [
        "base model",
        "local-only (mean)",
        "federated",
        "centralised",
    ]
    assert [row["bits per byte ↓"] for row in result] == ["2.0000", "1.7500", "1.5000", "1.4000 ★"]
    ada, bob = page.table("client")
    assert ada["base, own data"] == "2.1000"
    assert ada["federated, own data"] == "1.6000"
    assert bob["alone, held-out"] == "1.8000"
    assert (ada["rounds"], ada["rejected"]) == ("3", "0")
    assert "0.5000 better than the base model (2.0000)" in page.text
    assert "0.2500 better than a client training alone (1.7500)" in page.text
    assert "gives 1.4000." in page.text
    assert "not finished" not in page.text
    assert page.count("svg") == 5


def test_a_worse_result_is_called_worse(make_run, read_page):
    page = read_page(write_report(make_run()))
    assert "worse than the base model" in page.text


def test_nothing_is_fetched_and_nothing_runs(make_run, read_page, summary):
    path = write_report(make_run(summary=summary))
    page = read_page(path)
    assert not {"script", "link", "iframe", "object", "embed", "base"} & {t for t, _ in page.tags}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "href", "xlink:href"):
                assert value.startswith(("#", "data:")), (tag, name, value)
    assert not re.search(r"url\((?!#)|@import", path.read_text())


def test_ids_are_unique_and_references_resolve(make_run, read_page, summary):
    page = read_page(write_report(make_run(summary=summary)))
    ids = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(ids) == len(set(ids))
    used = {a["xlink:href"][1:] for _, a in page.tags if a.get("xlink:href", "").startswith("#")}
    assert used <= set(ids)


def test_hostile_text_stays_text(make_run, read_page):
    def edit(events):
        start = events[0]
        start["unusable"] = {"counts": {ATTACK: 2}, "first": {ATTACK: [ATTACK]}}
        start["machine"] = {ATTACK: ATTACK}
        facts = start["clients"].pop("ada")
        start["clients"][ATTACK] = {**facts, "composition": {ATTACK: 3, "y": 1}, "hostile": ["nan"]}
        start["method"] = start["strategy"] = ATTACK
        events.insert(
            1, {"event": "rejected", "round": 1, "client": ATTACK, "code": "X", "detail": ATTACK}
        )
        events.append({"event": "abandoned", "round": 4, "attempt": 0, "why": ATTACK})

    page = read_page(write_report(make_run(edit=edit)))
    tags = {tag for tag, _ in page.tags}
    assert not {"script", "img"} & tags
    shown = ATTACK.replace("\u202e", "\\u202e")
    (rejected,) = page.table("reason")
    assert shown in rejected["first"]
    assert page.text.count(shown) >= 6
    hostile = next(row for row in page.table("client") if row["client"] == shown)
    assert hostile["rejected"] == "1"
    assert hostile["hostile"] == "nan"


def test_a_flood_of_rejections_is_summed_up(make_run, read_page):
    def edit(events):
        events[1:1] = [
            {
                "event": "rejected",
                "round": 1,
                "client": "ada",
                "code": "SHAPE",
                "detail": "d" * 5000,
            }
            for _ in range(40)
        ]

    path = write_report(make_run(edit=edit))
    (row,) = read_page(path).table("reason")
    assert row["updates"] == "40"
    assert "and 37 more" in row["first"]
    assert "d" * 400 not in path.read_text()


def test_an_unfinished_run_has_a_page(make_run, read_page):
    def edit(events):
        events[2]["eval"] = {}
        events.insert(3, {"event": "resume", "round": 2})

    page = read_page(write_report(make_run(rounds=3, planned=9, edit=edit)))
    assert "This run is not finished: round 3 of 9." in page.text
    assert "After 3 of 9 rounds" in page.text
    assert "Resumed after round 2" in page.text
    assert "alone, held-out" not in page.table("client")[0]


def test_a_run_without_rounds_has_a_page(make_run, read_page):
    page = read_page(write_report(make_run(rounds=0)))
    assert "No round is committed yet; the base model scores 0.5000 bits per byte." in page.text
    assert page.count("svg") == 1


def test_a_run_without_events_has_a_page(make_run, read_page):
    folder = make_run()
    (folder / "metrics.jsonl").unlink()
    page = read_page(write_report(folder))
    assert "No round is committed yet." in page.text
    assert "builtin:tiny-llama" in page.text


def test_a_run_that_never_evaluates_has_a_page(make_run, read_page):
    def edit(events):
        for event in events:
            event["eval"] = {}

    page = read_page(write_report(make_run(edit=edit)))
    assert "No round is evaluated yet." in page.text
    assert "Nothing is measured yet." in page.text


def test_missing_and_infinite_aggregation_error_are_explained(make_run, read_page):
    def edit_to(value):
        def edit(events):
            for event in events[1:]:
                event["aggregation_error"] = value

        return edit

    page = read_page(write_report(make_run(edit=edit_to(None), name="none")))
    assert "Not measured: the weight change of lora" in page.text
    page = read_page(write_report(make_run(edit=edit_to(math.inf), name="infinite")))
    assert "Not finite" in page.text


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e300, None])
def test_absurd_figures_from_clients_do_not_break_the_page(make_run, read_page, value):
    def edit(events):
        events[2]["train_loss"] = value
        events[2]["eval"]["bits_per_byte"] = value

    assert read_page(write_report(make_run(edit=edit))).count("svg") == 5


def test_silent_and_unused_data_are_counted(make_run, read_page):
    def edit(events):
        events[0]["unusable"] = {"counts": {"empty": 7}, "first": {"empty": ["f:1", "f:2"]}}
        events[1].update(clients=["ada"], missing=["bob"])

    page = read_page(write_report(make_run(edit=edit)))
    (unusable,) = page.table("reason")
    assert unusable["rows"] == "7"
    assert "f:2" in unusable["first"]
    assert "and 5 more" in unusable["first"]
    assert [row["no reply"] for row in page.table("client")] == ["0", "1"]


def test_bytes_and_seconds_add_up(make_run, read_page):
    page = read_page(write_report(make_run()))
    up, down = page.table("direction")
    assert (up["bytes"], down["bytes"]) == ("6,000", "9,000")
    first, second = page.table("stage")
    assert (first["stage"], first["seconds"], first["share"]) == ("clients", "4.50", "75.0 %")
    assert second["stage"] == "aggregation error"


def test_equal_runs_give_equal_pages(make_run, summary):
    wide = {f"c{i}": {f"l{j}": i + j for j in range(20)} for i in range(5)}
    pages = [
        write_report(make_run(name=name, compositions=wide, summary=summary)).read_bytes()
        for name in ("one", "two")
    ]
    assert pages[0] == pages[1]


def test_style_of_the_user_does_not_change_the_page(make_run):
    import matplotlib

    plain = write_report(make_run(name="plain")).read_bytes()
    with matplotlib.rc_context({"lines.linewidth": 9.0, "font.size": 30.0}):
        styled = write_report(make_run(name="styled")).read_bytes()
    assert plain == styled


def test_classification_is_judged_by_accuracy(make_run, read_page):
    page = read_page(write_report(make_run(task="sequence-classification")))
    assert page.table("model")[1]["accuracy ↑"] == "53.00 % ★"
    assert "3.00 points better than the base model (50.00 %)" in page.text


def test_long_runs_with_many_clients_stay_small(make_run):
    wide = {f"client-{i}": {f"label {j}": (i * j) % 7 for j in range(77)} for i in range(100)}
    path = write_report(make_run(compositions=wide, rounds=100, planned=100))
    assert path.stat().st_size < 500_000


def test_a_summary_with_null_parts_is_read(make_run, read_page):
    folder = make_run()
    found = {"task": "causal-lm", "base": {"loss": 1.0}, "global": {}, "baselines": None}
    (folder / "summary.json").write_text(json.dumps(found))
    assert "held-out loss" in str(read_page(write_report(folder)).tags)
