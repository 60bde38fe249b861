"""Every task and every method, from the job to the exported model."""

import copy

import peft
import pytest
import torch
import transformers

from fedlora.adapters import METHODS
from fedlora.config.load import parse_job
from fedlora.models.assemble import assemble
from fedlora.models.export import export_merged, export_to_peft
from fedlora.models.loaded import load
from fedlora.server.metrics import MetricsLog
from fedlora.simulation.federation import Federation
from fedlora.simulation.results import finish

torch.set_num_threads(1)

IN_PEFT = set(METHODS) - {"bone-row"}


def job(folder, rows, **sections):
    tree = {
        "model": {"name": str(folder)},
        "data": {"source": str(rows), "max_length": 32},
        "partition": {"kind": "iid", "clients": 3},
        "adapter": {"rank": 4},
        "training": {"local_steps": 4, "batch_size": 8, "learning_rate": 1e-2},
        "federation": {"rounds": 3},
    }
    for name, values in sections.items():
        tree[name] = {**tree.get(name, {}), **values}
    return parse_job(tree)


def run(made, folder):
    federation = Federation(made, load(made))
    store = federation.start(folder)
    state = federation.run(store)
    summary = finish(federation, store, state)
    store.close()
    rounds = [e for e in MetricsLog(folder / "metrics.jsonl").read() if e["event"] == "round"]
    return summary, rounds


def logits(model, inputs):
    with torch.no_grad():
        return model.eval()(**inputs).logits


TEXT = {"input_ids": torch.tensor([[97, 108, 112, 104, 97, 32, 50]])}
TEXT["attention_mask"] = torch.ones_like(TEXT["input_ids"])


@pytest.mark.parametrize("method", METHODS)
def test_every_method_federates_classification_and_exports(bert, labelled, tmp_path, method):
    """The head is federated with the adapter; merged equals adapter equals exported."""
    made = job(
        bert,
        labelled,
        model={"task": "sequence-classification"},
        adapter={"rank": 4, "method": method},
    )
    summary, rounds = run(made, tmp_path / "run")
    assert summary["global"]["loss"] < summary["base"]["loss"]
    assert not any(event["rejected"] for event in rounds)
    error = rounds[-1]["aggregation_error"]
    if METHODS[method].affine:
        assert error < 1e-5
    elif method == "dora":
        assert error is None
    else:
        assert 0 < error < 1

    assembled = assemble(tmp_path / "run")
    assert assembled.adapter.spec.heads == ("bert.pooler.dense", "classifier")
    expected = logits(assembled.base.model, TEXT)
    if method in IN_PEFT:
        export_to_peft(assembled, tmp_path / "peft", str(bert))
        base = transformers.AutoModelForSequenceClassification.from_pretrained(
            bert, num_labels=3, dtype=torch.float32
        )
        loaded = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
        torch.testing.assert_close(logits(loaded, TEXT), expected, rtol=1e-5, atol=1e-5)
    export_merged(assembled, tmp_path / "merged")
    merged = transformers.AutoModelForSequenceClassification.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    torch.testing.assert_close(logits(merged, TEXT), expected, rtol=1e-5, atol=1e-5)
    assert merged.config.id2label == {0: "alpha", 1: "beta", 2: "gamma"}


@pytest.mark.parametrize("method", ["lora", "pissa", "lora-xs", "vera", "bone-col"])
def test_conv1d_models_federate_and_merge(gpt2, questions, tmp_path, method):
    made = job(gpt2, questions, adapter={"rank": 4, "method": method})
    summary, _ = run(made, tmp_path / "run")
    assert summary["global"]["loss"] < summary["base"]["loss"]
    assembled = assemble(tmp_path / "run")
    expected = logits(assembled.base.model, TEXT)
    export_merged(assembled, tmp_path / "merged")
    merged = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", dtype=torch.float32
    )
    torch.testing.assert_close(logits(merged, TEXT), expected, rtol=1e-5, atol=1e-5)


def test_pictures(vit, pictures, tmp_path):
    made = job(vit, pictures, model={"task": "image-classification"})
    summary, _ = run(made, tmp_path / "run")
    assert summary["global"]["loss"] < summary["base"]["loss"]


def test_exact_match_rises_on_a_task_that_can_be_learned(gpt2, questions, tmp_path):
    made = job(
        gpt2,
        questions,
        training={"local_steps": 40, "batch_size": 8, "learning_rate": 5e-3},
        evaluation={"exact_match": True, "max_new_tokens": 2, "every": 3},
    )
    summary, _ = run(made, tmp_path / "run")
    assert summary["base"]["exact_match"] == 0.0
    assert summary["global"]["exact_match"] >= 0.5


@pytest.mark.parametrize("strategy", ["fedit", "ffa-lora", "rolora"])
def test_a_bf16_base_with_checkpointing_autocast_and_dropout_trains(
    bert, labelled, tmp_path, strategy
):
    made = job(
        bert,
        labelled,
        model={"task": "sequence-classification", "dtype": "bfloat16"},
        adapter={"rank": 4, "dropout": 0.1},
        training={
            "local_steps": 4,
            "learning_rate": 1e-2,
            "precision": "bf16",
            "gradient_checkpointing": True,
            "accumulation": 2,
        },
        federation={"rounds": 2, "strategy": strategy},
    )
    summary, rounds = run(made, tmp_path / "a")
    assert summary["global"]["loss"] < summary["base"]["loss"]
    again = run(copy.deepcopy(made), tmp_path / "b")[1]
    assert [e["adapter_sha256"] for e in again] == [e["adapter_sha256"] for e in rounds]


def test_a_derived_basis_travels_once_and_is_checked(bert, labelled, tmp_path):
    """PiSSA's basis is sent in the first round only; afterwards its digest is held."""
    made = job(
        bert,
        labelled,
        model={"task": "sequence-classification"},
        adapter={"rank": 4, "method": "pissa"},
    )
    _, rounds = run(made, tmp_path / "run")
    factors = rounds[0]["bytes_up"]
    assert rounds[0]["bytes_down"] > 1.5 * factors
    assert rounds[1]["bytes_down"] < 1.1 * factors
