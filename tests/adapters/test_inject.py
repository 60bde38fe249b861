"""Finding layers, attaching, loading, merging and taking adapters off again."""

import dataclasses

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.adapter import AdapterSpec, with_rank
from fedlora.adapters import METHODS
from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.adapters.targets import find_targets
from fedlora.errors import AdapterError, ConfigError
from tests.adapters.cases import CASES, Case, Net, adapted, linear, only_layer, randomise
from tests.adapters.test_export import TOKENS, base, logits, make

torch.set_num_threads(1)

SETTINGS = {
    "method": "lora",
    "rank": 4,
    "alpha": None,
    "targets": "all-linear",
    "heads": (),
    "base_fingerprint": "base",
    "seed": 1,
}


def llama(**settings) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        **settings,
    )
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 14),
        (["q_proj"], 2),
        (["q_proj", "v_proj"], 4),
        (["self_attn.q_proj"], 2),
        (["model.layers.0.mlp.up_proj"], 1),
        ([r".*\.layers\.1\..*_proj"], 7),
        ([r".*\.(q|k)_proj", "q_proj"], 4),
        ("q_proj", 2),
    ],
    ids=str,
)
def test_targets_by_name_ending_or_expression(targets, count):
    found = find_targets(llama(), targets, ())
    assert len(found) == count
    assert all(isinstance(module, nn.Linear) for module in found.values())
    assert "lm_head" not in found


def test_an_ending_matches_whole_names_only():
    with pytest.raises(ConfigError, match="'proj' matches no linear layer"):
        find_targets(llama(), ["proj"], ())


def test_what_matches_nothing_is_told_with_what_exists():
    with pytest.raises(ConfigError) as e:
        find_targets(llama(), ["query", "q_proj", "(", "v_prj"], ())
    assert len(e.value.problems) == 3
    assert "'query' matches no linear layer" in str(e.value)
    for name in ("q_proj (2)", "k_proj (2)", "down_proj (2)"):
        assert name in str(e.value)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(ConfigError, match="no linear layer"):
        find_targets(nn.Sequential(nn.Embedding(3, 4)), "all-linear", ())


def test_conv1d_layers_count_as_linear():
    spec = adapt(base("gpt2"), **{**SETTINGS, "targets": ["c_attn"]}).spec
    assert [(layer.out, layer.inp) for layer in spec.layers] == [(48, 16)] * 2


def test_heads_are_trained_in_full_and_not_adapted():
    model = adapt(base("bert"), **{**SETTINGS, "heads": ("classifier",)})
    assert not any(layer.name.startswith("classifier") for layer in model.spec.layers)
    assert model.spec.head_shapes == {"classifier.weight": (3, 16), "classifier.bias": (3,)}
    assert model.model.classifier.weight.requires_grad
    assert {"classifier.weight", "classifier.bias"} < set(model.parameters())


def test_an_unknown_head_is_told_with_what_exists():
    with pytest.raises(ConfigError, match=r"'score'.*bert.*classifier"):
        adapt(base("bert"), **{**SETTINGS, "heads": ("score",)})


def test_only_factors_and_heads_are_trainable():
    model = adapt(base("bert"), **{**SETTINGS, "heads": ("classifier",)})
    trainable = {id(p) for p in model.model.parameters() if p.requires_grad}
    assert trainable == {id(p) for p in model.parameters().values()}


def test_train_only_freezes_the_other_factors():
    model = adapt(base("bert"), **{**SETTINGS, "heads": ("classifier",)})
    trained = model.train_only(["B"])
    assert all(name.endswith(".B") or name.startswith("classifier") for name in trained)
    assert all(p.requires_grad == (n in trained) for n, p in model.parameters().items())
    assert set(model.train_only(["A", "B"])) == set(model.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"d_inital": 0.1}, "did you mean"),
        ({"d_initial": "x"}, "expected a float"),
        ({"d_initial": True}, "expected a float"),
    ],
)
def test_options_are_checked(options, message):
    with pytest.raises(ConfigError, match=message):
        adapt(llama(), **{**SETTINGS, "method": "vera", "options": options})
    assert METHODS["vera"].check_options({"d_initial": 1}) == {"d_initial": 1}


def test_a_rank_that_does_not_fit_names_the_layers():
    with pytest.raises(ConfigError, match=r"k_proj of shape \(8, 16\).*larger than 8"):
        adapt(llama(), **{**SETTINGS, "rank": 9})


@pytest.mark.parametrize("case", CASES, ids=str)
def test_state_round_trip_through_a_fresh_model(case):
    model = make("llama", case)
    spec = AdapterSpec.from_json(model.spec.to_json())
    assert spec == model.spec
    assert spec.digest() == model.spec.digest()
    other = AdaptedModel.from_spec(base("llama"), spec, "")
    other.load(model.state().tensors)
    assert torch.equal(logits(other), logits(model))


def test_load_refuses_foreign_tensors_and_keeps_the_rest():
    model = adapted(Case("lora"))
    before = model.state().tensors
    with pytest.raises(AdapterError, match="not a tensor of this lora adapter"):
        model.load({"layers.0.C": torch.ones(1)})
    with pytest.raises(AdapterError, match=r"shape \(3, 8\); expected \(4, 8\)"):
        model.load({"layers.0.A": torch.ones(3, 8)})
    model.load({"layers.0.B": torch.zeros(12, 4)})
    assert torch.equal(model.state().tensors["layers.0.A"], before["layers.0.A"])
    assert not model.state().tensors["layers.0.B"].any()


def test_state_is_a_copy():
    model = adapted(Case("lora"))
    state = model.state().tensors
    state["layers.0.A"].zero_()
    assert model.state().tensors["layers.0.A"].any()


@pytest.mark.parametrize("method", ["lora", "rslora", "dora", "lora-xs", "vera", "miss"])
def test_rerank_and_load_the_cut_tensors(method):
    """Cutting, loading at the small rank and growing again keeps the function of the cut."""
    case = Case(method)
    model = make("llama", case)
    small = with_rank(model.spec, 2)
    state = model.state().tensors
    chosen = model.method

    def resized(tensors, old, new):
        return {
            f"{o.name}.{f}": chosen.resize(f, tensors[f"{o.name}.{f}"], o, n)
            for o, n in zip(old.layers, new.layers, strict=True)
            for f in chosen.factor_shapes(o)
        }

    cut = resized(state, model.spec, small)
    whole = model.spec
    model.rerank(small)
    model.model.eval()
    model.load(cut)
    at_small_rank = logits(model)
    model.rerank(whole)
    model.model.eval()
    model.load(resized(cut, small, whole))
    torch.testing.assert_close(logits(model), at_small_rank, rtol=1e-5, atol=1e-5)


def test_rerank_to_the_same_spec_keeps_the_factors():
    model = adapted(Case("lora"))
    before = model.parameters()
    model.rerank(dataclasses.replace(model.spec))
    assert all(model.parameters()[name] is p for name, p in before.items())


def test_rerank_while_merged_restores_the_base():
    model = adapted(Case("lora"))
    layer = only_layer(model)
    before = layer.weight.clone()
    layer.merge()
    model.rerank(with_rank(model.spec, 2))
    assert torch.equal(only_layer(model).weight, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_base_only_and_merged_in_a_whole_model(case):
    plain = base("gpt2")
    with torch.no_grad():
        expected = plain(input_ids=TOKENS).logits
    model = make("gpt2", case)
    weights = {n: p.clone() for n, p in model.model.named_parameters() if ".base." in n}
    with model.base_only():
        assert torch.equal(logits(model), expected)
    ours = logits(model)
    assert not torch.allclose(ours, expected, atol=1e-3)
    with model.merged():
        torch.testing.assert_close(logits(model), ours, rtol=1e-4, atol=1e-4)
    now = dict(model.model.named_parameters())
    assert all(torch.equal(now[name], weight) for name, weight in weights.items())
    assert torch.equal(logits(model), ours)


def test_merged_restores_the_base_when_the_body_raises():
    model = adapted(Case("lora"))
    before = only_layer(model).weight.clone()
    with pytest.raises(ZeroDivisionError), model.merged():
        raise ZeroDivisionError
    assert torch.equal(only_layer(model).weight, before)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_detach_returns_the_plain_model(case):
    model = make("llama", case)
    names = {name for name, _ in base("llama").named_parameters()}
    plain = model.detach()
    assert {name for name, _ in plain.named_parameters()} == names
    with torch.no_grad():
        expected = base("llama")(input_ids=TOKENS).logits
        assert torch.equal(plain(input_ids=TOKENS).logits, expected)


def test_a_second_adapter_takes_the_place_of_the_first():
    model = adapted(Case("lora"))
    again = adapt(model.model, **{**SETTINGS, "method": "dora"})
    layer = only_layer(again)
    assert isinstance(layer.base, nn.Linear)
    assert [n for n, _ in again.model.named_parameters() if ".base.base." in n] == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "loha"}, "not known"),
        ({"base_fingerprint": "other"}, "trained on base other"),
        ({"basis_digest": "0" * 64}, "frozen basis"),
    ],
)
def test_from_spec_refuses_what_does_not_fit(change, message):
    model = adapted(Case("lora"))
    spec = dataclasses.replace(model.spec, **change)
    with pytest.raises(AdapterError, match=message):
        AdaptedModel.from_spec(model.detach(), spec, "base")


@pytest.mark.parametrize("change", [{"name": "layers.1"}, {"out": 13}, {"inp": 9}], ids=str)
def test_from_spec_refuses_other_layers(change):
    model = adapted(Case("lora"))
    layer = dataclasses.replace(model.spec.layers[0], **change)
    spec = dataclasses.replace(model.spec, layers=(layer,))
    with pytest.raises(AdapterError, match="the adapter expects"):
        AdaptedModel.from_spec(model.detach(), spec, "base")


@pytest.mark.parametrize(
    "change",
    [
        {"heads": ("score",)},
        {"head_shapes": {"classifier.weight": (4, 16), "classifier.bias": (4,)}},
        {"head_shapes": {"classifier.weight": (3, 16)}},
    ],
    ids=str,
)
def test_from_spec_refuses_other_heads(change):
    spec = adapt(base("bert"), **{**SETTINGS, "heads": ("classifier",)}).spec
    with pytest.raises(AdapterError, match="head"):
        AdaptedModel.from_spec(base("bert"), dataclasses.replace(spec, **change), "base")


def test_tied_output_layer_is_not_adapted_and_survives_merging():
    model = adapt(llama(tie_word_embeddings=True), **SETTINGS)
    randomise(model)
    table = model.model.get_input_embeddings().weight
    before = table.clone()
    assert model.model.lm_head.weight is table
    with model.merged():
        assert torch.equal(table, before)


def test_a_head_tied_to_a_frozen_weight_is_refused():
    with pytest.raises(ConfigError, match=r"tied to model\.embed_tokens\.weight"):
        adapt(llama(tie_word_embeddings=True), **{**SETTINGS, "heads": ("lm_head",)})
    adapt(llama(tie_word_embeddings=False), **{**SETTINGS, "heads": ("lm_head",)})


def test_layers_that_share_a_weight_are_not_merged():
    """Merging both would add both changes to each, and unmerging would lose W0."""
    first, second = linear(8, 8), linear(8, 8)
    second.weight = first.weight
    model = adapt(Net(first, second), **SETTINGS)
    randomise(model)
    before = first.weight.clone()
    with pytest.raises(AdapterError, match=r"tied to layers\.1"), model.merged():
        pass
    assert torch.equal(first.weight, before)


def test_adapting_keeps_train_and_eval_mode():
    for training in (True, False):
        model = Net(linear(12, 8)).train(training)
        layer = only_layer(adapt(model, **SETTINGS))
        assert layer.training == training
        assert layer.dropout.training == training


def test_initial_factors_depend_on_seed_and_layer_only():
    def factors(seed, *layers):
        model = adapt(Net(*layers), **{**SETTINGS, "seed": seed})
        return model.state().tensors

    alone, both = factors(1, linear(12, 8)), factors(1, linear(12, 8), linear(12, 8))
    assert torch.equal(alone["layers.0.A"], both["layers.0.A"])
    assert not torch.equal(both["layers.0.A"], both["layers.1.A"])
    assert not torch.equal(alone["layers.0.A"], factors(2, linear(12, 8))["layers.0.A"])
