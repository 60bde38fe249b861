"""Runs in which every client ends with an adapter of its own, and the verbs on them."""

import json
import shutil

import pytest
import torch

from fedlora.adapters.files import load_adapter
from fedlora.cli.simulate import run_simulate
from fedlora.models.assemble import assemble
from tests.cli.command import fedlora

NAMES = ["client-000", "client-001", "client-002"]


@pytest.fixture(scope="module")
def personal(job, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "personal"
    overrides = ["federation.strategy=fedsa-lora", "training.learning_rate=0.05"]
    run_simulate(job, folder, overrides, as_json=True)
    return folder


def events(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").open()]


@pytest.fixture
def cli(monkeypatch, capsys):
    return lambda *words: fedlora(monkeypatch, capsys, *words)


def test_every_client_has_the_common_a_and_its_own_b(personal):
    shared = load_adapter(personal / "adapter").tensors
    own = {name: load_adapter(personal / "personal" / name).tensors for name in NAMES}
    assert sorted(p.name for p in (personal / "personal").iterdir()) == NAMES
    for name, tensor in shared.items():
        if name.endswith(".A"):
            assert all(torch.equal(own[client][name], tensor) for client in NAMES)
        else:
            assert not bool(tensor.any())
            assert len({own[client][name].numpy().tobytes() for client in NAMES}) == 3


def test_evaluate_measures_the_adapter_of_one_client(personal, cli):
    """Which is, over all clients, what the run said of itself."""
    found = []
    for name in NAMES:
        done = cli("evaluate", personal, "--client", name, "--json")
        assert done.code == 0, done
        found.append(json.loads(done.out)["adapter"]["loss"])
        folder = personal / "personal" / name
        assert json.loads(cli("evaluate", folder, "--json").out)["adapter"]["loss"] == found[-1]
    assert len(set(found)) == 3
    summary = json.loads((personal / "summary.json").read_text())
    assert summary["global"]["loss"] == pytest.approx(sum(found) / 3, rel=1e-6)
    assert summary["personal"] is True
    scores = summary["clients"]["client-001"]
    assert scores.keys() == {"base", "global", "personal"}


def test_export_writes_the_adapter_of_one_client(personal, cli, tmp_path):
    done = cli("export", personal, "--client", "client-001", "--format", "merged", "--out",
               tmp_path / "out")  # fmt: skip
    assert done.code == 0, done
    from transformers import AutoModelForCausalLM

    ids = torch.arange(65, 97)[None]
    with torch.no_grad():
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out")(ids).logits
        expected = assemble(personal, client="client-001").base.model(ids).logits
        other = assemble(personal, client="client-002").base.model(ids).logits
    assert (merged - expected).abs().max() < 1e-4
    assert (merged - other).abs().max() > 1e-4


@pytest.mark.parametrize("verb", ["evaluate", "export"])
@pytest.mark.parametrize("place", ["", "adapter"])
def test_a_run_without_a_global_model_asks_whose(personal, cli, tmp_path, verb, place):
    out = ["--out", tmp_path / "out"] if verb == "export" else []
    done = cli(verb, personal / place, *out)
    assert done.code == 2
    assert "has no global model" in done.err
    assert "--client NAME" in done.err
    assert all(name in done.err for name in NAMES)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("verb", ["evaluate", "export"])
def test_clients_that_do_not_exist_are_refused(personal, finished, cli, tmp_path, verb):
    out = ["--out", tmp_path / "out"] if verb == "export" else []
    done = cli(verb, personal, "--client", "client-01", *out)
    assert done.code == 2
    assert "has no client 'client-01' (did you mean \"client-0" in done.err
    assert cli(verb, personal, "--client", "../adapter", *out).code == 2
    done = cli(verb, finished, "--client", "client-001", *out)
    assert done.code == 2
    assert "one adapter for all clients" in done.err


def test_a_personal_run_that_has_not_ended_says_so(personal, cli, tmp_path):
    """Also where it was cut off between its adapters."""
    shutil.copytree(personal, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "adapter")
    done = cli("evaluate", tmp_path / "run", "--client", "client-001")
    assert done.code == 2
    assert "has not ended" in done.err


def test_report_cards_and_lines_say_whose_scores_they_are(personal, cli, job, tmp_path):
    page = (personal / "report.html").read_text()
    assert "own adapters score on average" in page
    assert "Every client has an adapter of its own" in page
    assert "the shared part" in (personal / "adapter" / "README.md").read_text()
    card = (personal / "personal" / "client-001" / "README.md").read_text()
    assert "the adapter of client client-001" in card
    done = cli("simulate", job, "--out", tmp_path / "run", "-o", "federation.strategy=fedsa-lora")
    assert done.code == 0, done
    assert done.out.count("agg. error -") == 2
    assert "federated, own (mean)" in done.out
    assert str(tmp_path / "run" / "personal") in done.out
    # each client's row of the shared part and its own adapter, on page and terminal
    assert "Global and own adapter: what the strategy leaves with each client" in page
    assert "what the strategy leaves with each client" in " ".join(done.out.split())
    summary = json.loads((personal / "summary.json").read_text())
    (end,) = [e for e in events(personal) if e["event"] == "end"]
    assert end["side_by_side"] == summary["side_by_side"]
    assert [row["client"] for row in summary["side_by_side"]["personal"]] == NAMES
