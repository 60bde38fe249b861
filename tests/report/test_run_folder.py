import json
import math

import pytest

from fedlora.errors import RunFolderError
from fedlora.report.run_folder import drawable, read_run


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(RunFolderError, match=r"job\.toml is missing"):
        read_run(tmp_path)


def test_a_line_cut_off_by_a_crash_is_left_out(make_run):
    folder = make_run()
    path = folder / "metrics.jsonl"
    path.write_text(path.read_text() + '{"event": "round", "rou')
    assert read_run(folder).last_round == 3


def test_a_repeated_round_counts_once(make_run):
    def edit(events):
        events.append({**events[2], "train_loss": 9.0})

    run = read_run(make_run(edit=edit))
    assert [event["round"] for event in run.rounds] == [1, 2, 3]
    assert run.rounds[1]["train_loss"] == 9.0


def test_events_stand_in_for_a_missing_summary(make_run):
    def edit(events):
        events[3]["eval"] = {}

    run = read_run(make_run(edit=edit))
    assert run.scores["global"] == run.rounds[1]["eval"]
    assert run.scores["base"] == run.start["eval"]


def test_a_broken_summary_is_an_error(make_run):
    folder = make_run()
    for text in ("{", json.dumps([1])):
        (folder / "summary.json").write_text(text)
        with pytest.raises(RunFolderError, match=r"summary\.json"):
            read_run(folder)


@pytest.mark.parametrize("value", [None, math.nan, math.inf, 1e300, "1", True])
def test_what_would_spoil_an_axis_is_not_drawn(value):
    assert drawable(value) is None
    assert drawable(2) == 2.0
