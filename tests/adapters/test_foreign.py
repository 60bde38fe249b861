"""PEFT's own LoRA folders, read by us, give PEFT's own logits."""

import json

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file

from fedlora.adapters.export import CONFIG_NAME, TENSORS_NAME
from fedlora.adapters.foreign import import_peft
from fedlora.adapters.inject import AdaptedModel
from fedlora.errors import AdapterError
from tests.adapters.cases import Case, draw
from tests.adapters.test_export import TOKENS, base, export, logits, make

torch.set_num_threads(1)
pytestmark = pytest.mark.filterwarnings("ignore")


def saved_by_peft(name: str, folder, **settings):
    """Logits of a PEFT adapter with random factors, saved to `folder`."""
    settings = {"r": 4, "lora_alpha": 6, "target_modules": "all-linear", **settings}
    model = peft.get_peft_model(base(name), peft.LoraConfig(**settings))
    with torch.no_grad():
        for i, parameter in enumerate(p for p in model.parameters() if p.requires_grad):
            parameter.add_(0.2 * draw(*parameter.shape, seed=i))
        expected = model.eval()(input_ids=TOKENS).logits
    model.save_pretrained(folder)
    return expected


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"use_dora": True},
        {"use_dora": True, "use_rslora": True},
        {"rank_pattern": {"1": 2}, "alpha_pattern": {r"layers\.1.*": 3}},
    ],
    ids=["lora", "rslora", "dora", "dora-rslora", "patterns"],
)
def test_we_compute_what_peft_computes(name, settings, tmp_path):
    if "rank_pattern" in settings and name == "llama":
        settings = {**settings, "rank_pattern": {r".*layers\.1.*": 2}}
    heads = {"task_type": "SEQ_CLS"} if name == "bert" else {}
    expected = saved_by_peft(name, tmp_path, **settings, **heads)
    spec, tensors = import_peft(tmp_path)
    assert spec.heads == (("classifier",) if name == "bert" else ())
    model = AdaptedModel.from_spec(base(name), spec, "")
    model.load(tensors)
    assert set(tensors) == set(model.parameters())
    torch.testing.assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_reading_what_we_exported_returns_the_adapter(method, tmp_path):
    model = make("bert", Case(method))
    export(model, tmp_path, "bert")
    spec, tensors = import_peft(tmp_path)
    state = model.state()
    assert (spec.method, spec.rank, spec.alpha) == (method, 4, 6.0)
    assert spec.layers == state.spec.layers
    assert spec.head_shapes == state.spec.head_shapes
    assert tensors.keys() == state.tensors.keys()
    assert all(torch.equal(tensors[name], state.tensors[name]) for name in tensors)


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_tensors(folder, change):
    tensors = load_file(folder / TENSORS_NAME)
    change(tensors)
    save_file(tensors, folder / TENSORS_NAME)


@pytest.mark.parametrize(
    "changes",
    [
        {"peft_type": "LOHA"},
        {"peft_type": None},
        {"bias": "all"},
        {"lora_bias": True},
        {"layer_replication": [[0, 1]]},
        {"init_lora_weights": "pissa_niter_4"},
        {"lora_alpha": "many"},
        {"lora_alpha": None},
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 10**400},
        {"alpha_pattern": [1]},
        {"alpha_pattern": {"(": 1}},
        {"alpha_pattern": {"q": "x"}},
        {"modules_to_save": "classifier"},
        {"modules_to_save": [3]},
        {"modules_to_save": None},
        {"use_dora": True},
    ],
    ids=str,
)
def test_settings_we_have_no_form_for_are_refused(changes, tmp_path):
    export(make("bert", Case("lora")), tmp_path, "bert")
    edit_config(tmp_path, **changes)
    with pytest.raises(AdapterError):
        import_peft(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "3", "{", "[" * 100_000, '"\ud800"'], ids=range(6))
def test_damaged_configs_are_refused(text, tmp_path):
    export(make("llama", Case("lora")), tmp_path, "llama")
    (tmp_path / CONFIG_NAME).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(AdapterError):
        import_peft(tmp_path)


def test_a_huge_config_is_not_read(tmp_path):
    export(make("llama", Case("lora")), tmp_path, "llama")
    (tmp_path / CONFIG_NAME).write_bytes(b" " * (1 << 21))
    with pytest.raises(AdapterError, match="larger than"):
        import_peft(tmp_path)


@pytest.mark.parametrize("name", [CONFIG_NAME, TENSORS_NAME])
def test_missing_files_are_refused(name, tmp_path):
    export(make("llama", Case("lora")), tmp_path, "llama")
    (tmp_path / name).unlink()
    with pytest.raises(AdapterError, match=name):
        import_peft(tmp_path)


def test_damaged_tensor_files_are_refused(tmp_path):
    export(make("llama", Case("lora")), tmp_path, "llama")
    path = tmp_path / TENSORS_NAME
    whole = path.read_bytes()
    for damaged in (b"", b"x" * 50, whole[:100], whole[:-1], whole + b"1"):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match="safetensors"):
            import_peft(tmp_path)


KEY = "base_model.model.model.layers.0.self_attn.q_proj"


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t.pop(f"{KEY}.lora_A.weight"),
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(3, 16)}),
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(16)}),
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.full((4, 16), float("inf"))}),
        lambda t: t.update({f"{KEY}.lora_A.weight": torch.ones(4, 16, dtype=torch.int64)}),
        lambda t: t.update({f"{KEY}.lora_magnitude_vector": torch.ones(16)}),
        lambda t: t.update({"base_model.model.model.embed_tokens.weight": torch.ones(3, 2)}),
        lambda t: t.update({f"{KEY}.lora_embedding_A": torch.ones(3, 2)}),
        lambda t: t.update({"other": torch.ones(3)}),
        lambda t: t.clear(),
    ],
)
def test_tensors_that_do_not_fit_are_refused(change, tmp_path):
    export(make("llama", Case("lora")), tmp_path, "llama")
    edit_tensors(tmp_path, change)
    with pytest.raises(AdapterError):
        import_peft(tmp_path)
