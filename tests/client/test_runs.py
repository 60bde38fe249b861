"""What a client keeps of its runs: everything of the newest, of others what cannot be had again."""

import os

import pytest

from fedlora.client.runs import Runs

MOST = 3


@pytest.fixture
def runs(tmp_path):
    return Runs(tmp_path / "runs", MOST)


def work(runs, run, *, memory=True):
    """One round of a run."""
    own = runs.use(run)
    (own / "parts").mkdir(exist_ok=True)
    (own / "parts" / "digest").write_bytes(b"fetched")
    if memory:
        (own / "clients" / "ann").mkdir(parents=True, exist_ok=True)
        (own / "clients" / "ann" / "0001.state").write_bytes(b"remembered")


def left(runs):
    return {
        name: sorted(set(os.listdir(runs.folder / name)) - {"used"})
        for name in os.listdir(runs.folder)
    }


def others(runs):
    for number in range(MOST):
        work(runs, f"other{number}")


def test_the_newest_runs_are_left_alone(runs):
    for number in range(MOST):
        work(runs, f"run{number}")
        runs.finish(f"run{number}")
    whole = ["clients", "finished", "parts"]
    assert left(runs) == dict.fromkeys(("run0", "run1", "run2"), whole)


@pytest.mark.parametrize("memory", [True, False])
def test_of_an_old_run_that_finished_nothing_is_kept(runs, memory):
    work(runs, "run", memory=memory)
    runs.finish("run")
    others(runs)
    assert set(left(runs)) == {"other0", "other1", "other2"}


def test_an_old_run_that_may_go_on_keeps_its_memory(runs):
    work(runs, "run")
    others(runs)
    assert left(runs)["run"] == ["clients"]
    assert (runs.use("run") / "clients" / "ann" / "0001.state").read_bytes() == b"remembered"


def test_an_old_run_without_memory_is_forgotten(runs):
    work(runs, "run", memory=False)
    others(runs)
    assert "run" not in left(runs)


def test_a_run_that_goes_on_is_the_newest(runs):
    work(runs, "run")
    runs.finish("run")
    others(runs)
    work(runs, "run")
    runs.finish("run")
    work(runs, "other3")
    assert left(runs)["run"] == ["clients", "finished", "parts"]
    assert left(runs)["other1"] == ["clients"]


def test_any_number_of_runs_takes_the_space_of_a_few(runs):
    for number in range(5 * MOST):
        work(runs, f"run{number:02d}")
        runs.finish(f"run{number:02d}")
        assert len(left(runs)) <= MOST
