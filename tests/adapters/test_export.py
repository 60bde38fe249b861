"""Exported folders, loaded by PEFT itself, give the logits of the adapted model."""

import dataclasses
import json
import warnings

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from fedlora.adapter import with_rank
from fedlora.adapters.export import CONFIG_NAME, TENSORS_NAME, export_peft
from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.errors import AdapterError, StorageError
from tests.adapters.cases import CASES, Case, randomise

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")

TOKENS = torch.arange(12).view(2, 6)
MODELS = ("llama", "gpt2", "bert")


def base(name: str) -> torch.nn.Module:
    torch.manual_seed(0)
    if name == "llama":
        config = LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
        )
        model = LlamaForCausalLM(config)
    elif name == "gpt2":
        model = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2))
    else:
        config = BertConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_labels=3,
        )
        model = BertForSequenceClassification(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4.0) if parameter.dim() == 2 else parameter.add_(0.1)
    return model.eval()


def make(name: str, case: Case, targets="all-linear") -> AdaptedModel:
    model = adapt(
        base(name),
        method=case.method,
        rank=case.rank,
        alpha=6.0,
        targets=targets,
        heads=("classifier",) if name == "bert" else (),
        base_fingerprint="",
        seed=1,
        options=case.options,
    )
    randomise(model, size=0.2)
    model.model.eval()
    return model


def export(model: AdaptedModel, folder, name: str) -> None:
    export_peft(
        model.spec,
        model.state().tensors,
        model.basis,
        folder,
        base_model_name="tiny",
        task_type="SEQ_CLS" if name == "bert" else "CAUSAL_LM",
        conv1d=name == "gpt2",
    )


def peft_logits(name: str, folder) -> torch.Tensor:
    loaded = peft.PeftModel.from_pretrained(base(name), folder)
    with torch.no_grad():
        return loaded.eval()(input_ids=TOKENS).logits


def logits(model: AdaptedModel) -> torch.Tensor:
    with torch.no_grad():
        return model.model(input_ids=TOKENS).logits


def refused(name: str, case: Case) -> bool:
    return case.method == "bone-row" or (case.method == "bone-col" and name == "gpt2")


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_peft_computes_the_same_logits(name, case, tmp_path):
    model = make(name, case)
    if refused(name, case):
        with pytest.raises(AdapterError, match="export --format merged instead"):
            export(model, tmp_path / "out", name)
        assert not (tmp_path / "out").exists()
        return
    export(model, tmp_path, name)
    ours = logits(model)
    with model.base_only():
        assert (logits(model) - ours).abs().max() > 1e-2
    torch.testing.assert_close(peft_logits(name, tmp_path), ours, rtol=1e-5, atol=1e-5)
    assert sorted(p.name for p in tmp_path.iterdir()) == [CONFIG_NAME, TENSORS_NAME]


@pytest.mark.parametrize(
    ("method", "kind", "rank"),
    [
        ("lora", "LORA", 4),
        ("rslora", "LORA", 4),
        ("dora", "LORA", 4),
        ("pissa", "LORA", 8),
        ("lora-xs", "LORA", 4),
        ("vera", "VERA", 4),
        ("miss", "MISS", 4),
        ("bone-col", "MISS", 4),
    ],
)
def test_each_method_has_its_own_peft_form(method, kind, rank, tmp_path):
    export(make("llama", Case(method)), tmp_path, "llama")
    config = json.loads((tmp_path / CONFIG_NAME).read_text())
    assert (config["peft_type"], config["r"]) == (kind, rank)
    assert config.get("use_rslora", False) == (method == "rslora")
    assert config.get("use_dora", False) == (method == "dora")
    if method in ("lora", "rslora", "dora"):
        assert config["lora_alpha"] == 6


def test_full_names_adapt_nothing_else(tmp_path):
    """PEFT matches endings; a name of one layer must not catch its namesakes."""
    model = make("llama", Case("lora"), targets=["model.layers.1.self_attn.q_proj"])
    export(model, tmp_path, "llama")
    loaded = peft.PeftModel.from_pretrained(base("llama"), tmp_path)
    adapted = [n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert adapted == ["base_model.model.model.layers.1.self_attn.q_proj"]
    torch.testing.assert_close(peft_logits("llama", tmp_path), logits(model))


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora-xs", "vera", "miss"])
def test_layers_of_unequal_rank(method, tmp_path):
    model = make("llama", Case(method))
    layers = [
        dataclasses.replace(layer, rank=2 if "q_proj" in layer.name else 4)
        for layer in model.spec.layers
    ]
    model.rerank(dataclasses.replace(model.spec, layers=tuple(layers)))
    randomise(model, size=0.2)
    model.model.eval()
    export(model, tmp_path, "llama")
    torch.testing.assert_close(peft_logits("llama", tmp_path), logits(model), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "lora-xs", "vera"])
def test_a_client_with_fewer_slots_keeps_the_scale_of_the_whole(method, tmp_path):
    model = make("llama", Case(method))
    model.rerank(with_rank(model.spec, 2))
    randomise(model, size=0.2)
    model.model.eval()
    export(model, tmp_path, "llama")
    torch.testing.assert_close(peft_logits("llama", tmp_path), logits(model), rtol=1e-5, atol=1e-5)


def test_trained_heads_are_saved_in_full(tmp_path):
    model = make("bert", Case("lora"))
    export(model, tmp_path, "bert")
    saved = load_file(tmp_path / TENSORS_NAME)
    for part in ("weight", "bias"):
        name = f"classifier.{part}"
        assert torch.equal(saved[f"base_model.model.{name}"], model.state().tensors[name])


def test_block_sizes_that_do_not_divide_are_refused(tmp_path):
    with pytest.raises(AdapterError, match=r"no PEFT form.*export --format merged instead"):
        export(make("llama", Case("bone-col", rank=5)), tmp_path, "llama")


@pytest.mark.parametrize("how", ["missing", "extra", "shape", "basis"])
def test_tensors_that_are_not_the_adapter_are_refused(how, tmp_path):
    model = make("llama", Case("vera"))
    tensors, basis = dict(model.state().tensors), dict(model.basis)
    name = min(tensors)
    if how == "missing":
        del tensors[name]
    elif how == "extra":
        tensors["more"] = torch.ones(1)
    elif how == "shape":
        tensors[name] = tensors[name][1:]
    else:
        basis["shared.A"] = basis["shared.A"] + 1.0
    with pytest.raises(AdapterError, match="basis" if how == "basis" else "shape"):
        export_peft(model.spec, tensors, basis, tmp_path, base_model_name="tiny")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    model = make("llama", Case("lora"))
    with pytest.raises(StorageError, match="cannot be written"):
        export(model, tmp_path / "file", "llama")


def test_exporting_again_gives_the_same_bytes(tmp_path):
    model = make("bert", Case("vera"))
    contents = []
    for _ in range(2):
        export(model, tmp_path, "bert")
        contents.append([(tmp_path / n).read_bytes() for n in (CONFIG_NAME, TENSORS_NAME)])
    assert contents[0] == contents[1]


@pytest.mark.parametrize("method", ["lora", "dora", "pissa", "lora-xs", "vera"])
def test_peft_warns_of_nothing_on_loading(method, tmp_path):
    """A tensor that PEFT misses or does not know is only a warning there."""
    export(make("gpt2", Case(method)), tmp_path, "gpt2")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        peft.PeftModel.from_pretrained(base("gpt2"), tmp_path)
