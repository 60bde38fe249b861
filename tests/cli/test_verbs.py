"""Every verb, on a tiny run of the builtin model."""

import json
import math

import peft
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from fedlora.config.job import Job
from fedlora.config.load import load_job
from fedlora.models.assemble import assemble
from tests.cli.command import fedlora

IDS = torch.arange(65, 97)[None]


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*words):
        done = fedlora(monkeypatch, capsys, *words)
        assert done.code == 0, done
        return done

    return call


def test_init_writes_a_job_that_loads_to_the_defaults(cli, tmp_path):
    cli("init", tmp_path / "job.toml")
    assert load_job(tmp_path / "job.toml") == Job()


def test_a_run_folder_is_the_whole_record(finished):
    names = {path.name for path in finished.iterdir()}
    assert names >= {"job.toml", "HEAD", "rounds", "metrics.jsonl", "adapter", "report.html"}
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "round", "round", "end"]
    keys = (
        "round train_loss eval clients rejected bytes_up bytes_down aggregation_error epsilon "
        "seconds adapter_sha256"
    )
    assert events[1].keys() >= set(keys.split())
    assert load_job(finished / "job.toml").federation.rounds == 2


def test_plain_lines_without_a_terminal(cli, job, tmp_path):
    out = cli("simulate", job, "--out", tmp_path / "run").out
    assert out.count("agg. error") == 2
    assert "federated" in out
    assert "\x1b" not in out


def test_evaluate_agrees_with_the_run(cli, finished):
    found = json.loads(cli("evaluate", finished, "--json").out)
    events = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert found["adapter"] == pytest.approx(events[-1]["eval"], rel=1e-6)
    assert found["base"] == pytest.approx(events[0]["eval"], rel=1e-6)


def test_evaluate_takes_another_file(cli, finished, tmp_path):
    path = tmp_path / "text.jsonl"
    path.write_text("".join(json.dumps({"text": f"import x{i}\n"}) + "\n" for i in range(4)))
    found = json.loads(cli("evaluate", finished / "adapter", "--data", path, "--json").out)
    assert found["num_examples"] >= 1
    assert math.isfinite(found["adapter"]["bits_per_byte"])


def test_merged_equals_adapter_equals_exported(cli, finished, tmp_path):
    with torch.no_grad():
        expected = assemble(finished).base.model(IDS).logits
        cli("export", finished, "--format", "merged", "--out", tmp_path / "merged")
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(merged(IDS).logits, expected, rtol=1e-5, atol=1e-5)
        assert AutoTokenizer.from_pretrained(tmp_path / "merged")("a")["input_ids"] == [97]

        cli("export", finished, "--format", "peft", "--out", tmp_path / "peft")
        config = json.loads((tmp_path / "peft" / "adapter_config.json").read_text())
        base_name = config["base_model_name_or_path"]
        assert base_name == str((tmp_path / "peft" / "base").resolve())
        base = AutoModelForCausalLM.from_pretrained(base_name, dtype=torch.float32)
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
        torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-5)


def test_inspect_knows_runs_adapters_and_files(cli, finished, tmp_path):
    assert json.loads(cli("inspect", finished, "--json").out)["round"] == 2
    adapter = json.loads(cli("inspect", finished / "adapter", "--json").out)
    assert adapter["method"] == "lora"
    assert adapter["num_trained"] == 4 * 2 * 2 * (128 + 128)
    weights = finished / "adapter" / "adapter_model.safetensors"
    assert json.loads(cli("inspect", weights, "--json").out)["tensors"] == 16
    cli("export", finished, "--out", tmp_path / "peft")
    found = json.loads(cli("inspect", tmp_path / "peft", "--json").out)
    assert found["peft_type"] == "LORA"


def test_a_run_can_start_from_an_adapter(cli, job, finished, tmp_path):
    start = f"adapter.start={finished / 'adapter'}"
    cli("simulate", job, "--out", tmp_path / "run", "-o", start)
    first = (finished / "adapter" / "adapter_model.safetensors").read_bytes()
    assert (tmp_path / "run" / "rounds" / "0000" / "global.safetensors").read_bytes() == first
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").read_bytes() != first
