"""`fedlora privacy plan` and `ledger`."""

import json
import shutil

import pytest

from fedlora.privacy.accounting import Event, epsilon
from fedlora.privacy.budget import Budget
from fedlora.privacy.ledger import Ledger, Release
from tests.cli.command import fedlora

KEY = "0123456789abcdef" * 4
STEP = Event(0.05, 1.0, 10)


@pytest.fixture
def call(monkeypatch, capsys):
    return lambda *words: fedlora(monkeypatch, capsys, *words)


@pytest.fixture
def site(tmp_path):
    """The folder of one ledger with two runs; the second died in training."""
    folder = tmp_path / "site" / "privacy"
    with open_ledger(folder) as ledger:
        ledger.reserve(Release("first", 1, 1, "a"), [STEP], {"clip": 0.5})
        ledger.spend(Release("first", 1, 1, "a"), [Event(0.05, 1.0, 8)], b"x")
        ledger.reserve(Release("second", 1, 1, "a"), [STEP])
    return folder


def open_ledger(folder):
    return Ledger.open(folder, KEY, unit="record", epsilon=5.0, delta=1e-5, site=Budget(9.0, 1e-6))


def test_a_plan_says_what_is_promised_and_what_is_not(call, job, tmp_path):
    out = tmp_path / "plan"
    words = ("plan", job, "--records", 200, "--epsilon", "3", "--out", out)
    done = call("privacy", *words)
    assert done.code == 0, done.err
    for promise in ("one record of 200", "add or remove one record", "delta 1e-05", "RDP", "PRV"):
        assert promise in done.out
    assert "not covered: how many examples" in done.out
    assert "free: training.optimizer" in done.out
    found = json.loads((out / "plan.json").read_text())
    [row] = found["budgets"]
    # the job: 2 rounds of 1 step, batches of 2
    assert (found["rate"], found["steps"], found["expected_batch"]) == (0.01, 2, 2.0)
    assert row["rdp"] == epsilon([Event(0.01, row["noise"], 2)], 1e-5) <= 3.0
    assert found["empty_batch_probability"] == pytest.approx(0.99**200)
    assert "13.40% of steps are expected to be empty" in done.out
    assert (out / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert json.loads(call("privacy", *words, "--json").out) == found


def test_a_plan_for_clients_warns_when_there_are_few(call, job):
    words = ["plan", job, "-o", "privacy.unit=client", "-o", "privacy.epsilon=3"]
    words += ["-o", "federation.clients_per_round=10", "-o", "federation.rounds=100"]
    found = json.loads(call("privacy", *words, "--clients", 100, "--json").out)
    [row] = found["budgets"]
    assert (found["unit"], found["rate"], found["steps"]) == ("client", 0.1, 100)
    assert row["per_coordinate"] == row["noise"] / 10
    [warning] = found["warnings"]
    assert "100 clients are few" in warning
    assert f"{row['per_coordinate'] * 1000:.3g} for 1,000,000 numbers" in warning
    many = json.loads(call("privacy", *words, "--clients", 1000, "--json").out)
    assert many["warnings"] == []
    assert many["budgets"][0]["noise"] < row["noise"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "give it: --records N"),
        (("--records", 200, "--epsilon", "one"), "expected numbers by comma"),
        (("--records", 200, "--epsilon", "-1"), "expected a finite number above 0"),
        (("--records", 200, "-o", "training.local_steps=0"), "nothing is spent"),
        (("--records", 200, "-o", "privacy.epsilon=1", "-o", "privacy.delta=0.01"), "1 / 200"),
    ],
)
def test_a_plan_that_cannot_be_made_says_why(call, job, words, message):
    done = call("privacy", "plan", job, *words)
    assert done.code == 2
    assert message in done.err
    assert "Traceback" not in done.err


def test_a_ledger_says_what_every_run_and_the_site_have_spent(call, site):
    done = call("privacy", "ledger", site, "--json")
    assert done.code == 0, done.err
    [found] = json.loads(done.out)["ledgers"]
    assert (found["dataset"], found["unit"], found["whole"]) == (KEY, "record", True)
    total, runs = found["total"], found["runs"]
    assert total["rdp"] == epsilon([Event(0.05, 1.0, 18)], 1e-6)
    assert total["prv"] == epsilon([Event(0.05, 1.0, 18)], 1e-6, "prv")
    assert runs["first"]["rdp"] == epsilon([Event(0.05, 1.0, 8)], 1e-5)
    assert runs["second"]["remaining"] == 5.0 - epsilon([STEP], 1e-5)
    assert [row["status"] for row in found["history"]] == ["SPENT", "RESERVED"]
    assert found["history"][0]["details"]["clip"] == 0.5
    text = call("privacy", "ledger", site / KEY).out
    assert f"epsilon {total['rdp']:.4g} of 9" in text
    assert "one record (add or remove one unit)" in text
    assert "10 x (q 0.05, noise 1)" in text


def test_looking_changes_nothing_and_tells_of_a_torn_tail(call, site):
    path = site / KEY / "ledger"
    path.write_bytes(path.read_bytes()[:-30])
    before = {each: each.read_bytes() for each in (site / KEY).iterdir() if each.is_file()}
    for _ in range(2):
        done = call("privacy", "ledger", site, "--json")
        assert json.loads(done.out)["ledgers"][0]["torn_tail"]
    assert "it counts, by the head file" in call("privacy", "ledger", site).out
    assert before == {each: each.read_bytes() for each in before}


def test_damaged_and_lost_ledgers_are_reported_beside_whole_ones(call, site):
    other = "f" * 64
    lost = "e" * 64
    for key in (other, lost):
        Ledger.open(site, key, unit="record", epsilon=1.0, delta=1e-5).__exit__(None, None, None)
    (site / other / "head").write_bytes(b"?")
    shutil.rmtree(site / lost)
    done = call("privacy", "ledger", site, "--json")
    assert done.code == 2
    found = {each["folder"]: each["whole"] for each in json.loads(done.out)["ledgers"]}
    assert found == {
        str(site / KEY): True,
        str(site / other): False,
        str(site / lost): False,
    }
    assert "damaged head file" in done.err
    assert "is missing" in done.err
    assert done.err.count("--new-budget") == 2


def test_a_new_budget_keeps_the_old_ledger_and_says_that_there_was_one(call, site):
    done = call("privacy", "ledger", site / KEY, "--new-budget")
    assert done.code == 0, done.err
    assert f"{KEY}.aside-1" in done.out
    with open_ledger(site) as ledger:
        assert ledger.epsilon() == 0.0
    old, new = sorted(
        json.loads(call("privacy", "ledger", site, "--json").out)["ledgers"],
        key=lambda each: each["put_aside"],
        reverse=True,
    )
    assert old["total"]["rdp"] > 0.0
    assert new["follows"] == f"{KEY}.aside-1"
    assert "whose spending is not in these figures" in call("privacy", "ledger", site).out


def test_a_lost_ledger_is_begun_anew_only_on_request(call, site):
    shutil.rmtree(site / KEY)
    assert call("privacy", "ledger", site / KEY).code == 2
    done = call("privacy", "ledger", site / KEY, "--new-budget")
    assert "nothing was left to keep" in done.out
    with open_ledger(site) as ledger:
        assert ledger.epsilon() == 0.0
    assert "follows          a ledger that was lost" in call("privacy", "ledger", site).out


def test_what_is_no_ledger_is_refused(call, tmp_path):
    for words in ((tmp_path,), (tmp_path / "none", "--new-budget")):
        done = call("privacy", "ledger", *words)
        assert done.code == 2
        assert "no privacy ledger" in done.err
    assert not list(tmp_path.iterdir())


def test_inspect_knows_a_ledger(call, site):
    found = json.loads(call("inspect", site / KEY, "--json").out)
    assert found["kind"] == "privacy ledger"
    assert found["runs"] == ["first", "second"]
    assert found["epsilon_rdp"] == epsilon([Event(0.05, 1.0, 18)], 1e-6)
