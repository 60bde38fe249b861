"""`fedlora merge`, end to end: adapters saved by PEFT and by fedlora, loaded again by PEFT."""

import json
import shutil
import warnings

import click
import peft
import pytest
import torch
import typer
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaForSequenceClassification,
)

from fedlora.adapters.export import CONFIG_NAME, TENSORS_NAME
from fedlora.cli.main import app
from fedlora.merging import MERGERS
from fedlora.models.assemble import assemble
from tests.cli.command import fedlora

TOKENS = torch.arange(12).view(2, 6)
SETTINGS = (
    {"r": 2, "lora_alpha": 8},
    {"r": 4, "lora_alpha": 3, "use_rslora": True},
    {"r": 3, "lora_alpha": 3, "rank_pattern": {"v_proj": 1}, "alpha_pattern": {"v_proj": 5}},
)
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def cli(monkeypatch, capsys):
    def call(*words):
        return fedlora(monkeypatch, capsys, "merge", *words)

    return call


def base(folder):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def save_peft(model, folder, seed, **settings):
    """A PEFT adapter with random factors; its dense changes, as PEFT computes them."""
    settings = {"target_modules": ["q_proj", "v_proj"], **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**settings))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    adapted.save_pretrained(folder)
    return deltas(adapted)


def deltas(adapted):
    return {
        name.removeprefix("base_model.model."): module.get_delta_weight("default").detach().double()
        for name, module in adapted.named_modules()
        if isinstance(module, peft.tuners.lora.LoraLayer)
    }


@pytest.fixture(scope="module")
def trained(tiny_folder, tmp_path_factory):
    """Three adapters of unequal rank and scale: folders, and dense changes."""
    root = tmp_path_factory.mktemp("trained")
    folders = [root / name for name in ("law", "medicine", "sport")]
    changes = [
        save_peft(base(tiny_folder), folder, seed, **settings)
        for seed, (folder, settings) in enumerate(zip(folders, SETTINGS, strict=True))
    ]
    return folders, changes


def weighted(changes, weights):
    return {
        name: sum(w * c[name] for w, c in zip(weights, changes, strict=True)) for name in changes[0]
    }


def load(tiny_folder, out):
    loaded = peft.PeftModel.from_pretrained(base(tiny_folder), out)
    return loaded.eval(), deltas(loaded)


def logits_with(tiny_folder, changes):
    """Of the base with dense changes added to its weights."""
    model = base(tiny_folder)
    with torch.no_grad():
        for name, change in changes.items():
            model.get_submodule(name).weight += change.float()
        return model(input_ids=TOKENS).logits


def same(found, expected, tol=1e-5):
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], rtol=tol, atol=tol, msg=name)


def refused(done, *parts):
    assert done.code == 2, done
    assert "Traceback" not in done.err
    for part in parts:
        assert part in done.err, done.err


@pytest.mark.parametrize(
    ("words", "rank"),
    [
        (("flora",), 9),
        (("task-arithmetic",), 9),
        (("fedex-lora",), None),
        (("dare", "--option", "drop=0"), None),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_merged_by_us_loaded_by_peft_is_the_weighted_mean(
    cli, tiny_folder, trained, tmp_path, words, rank
):
    folders, changes = trained
    out = tmp_path / "out"
    done = cli(*folders, "--strategy", *words, "--weights", "2,1,1", "--out", out)
    assert done.code == 0, done
    expected = weighted(changes, (0.5, 0.25, 0.25))
    model, found = load(tiny_folder, out)
    same(found, expected)
    with torch.no_grad():
        logits = model(input_ids=TOKENS).logits
    torch.testing.assert_close(logits, logits_with(tiny_folder, expected), rtol=1e-4, atol=1e-4)
    assert (logits - base(tiny_folder)(input_ids=TOKENS).logits).abs().max() > 1e-2
    config = json.loads((out / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == str(tiny_folder)
    if rank is not None:
        assert config["r"] == rank
        assert set(config["rank_pattern"].values()) == {7}


@pytest.mark.parametrize("strategy", ["flora", "flexlora", "task-arithmetic"])
def test_a_rank_gives_the_best_approximation(cli, tiny_folder, trained, tmp_path, strategy):
    folders, changes = trained
    out = tmp_path / "out"
    done = cli(*folders, "--strategy", strategy, "--rank", 2, "--out", out, "--json")
    assert done.code == 0, done
    expected, error, total = {}, 0.0, 0.0
    for name, mean in weighted(changes, (1 / 3,) * 3).items():
        u, sigma, vh = torch.linalg.svd(mean)
        expected[name] = (u[:, :2] * sigma[:2]) @ vh[:2]
        error += float((sigma[2:] ** 2).sum())
        total += float((sigma**2).sum())
    same(load(tiny_folder, out)[1], expected)
    report = json.loads(done.out)
    assert set(report["ranks"].values()) == {2}
    assert report["weights"] == pytest.approx([1 / 3] * 3)
    assert report["distance_from_mean"] == pytest.approx((error / total) ** 0.5, rel=1e-4)


def test_ties_over_all_layers_of_the_model(cli, tiny_folder, trained, tmp_path):
    """One threshold per adapter over all its layers, then signs and disjoint means."""
    folders, changes = trained
    out = tmp_path / "out"
    words = ["--strategy", "ties", "--option", "density=0.3", "--option", "scaling=0.5"]
    assert cli(*folders, *words, "--out", out).code == 0
    trimmed = []
    for change in changes:
        flat = torch.cat([c.flatten() for c in change.values()]).abs()
        threshold = flat.sort(descending=True).values[round(0.3 * len(flat)) - 1]
        trimmed.append({n: c * (c.abs() >= threshold) for n, c in change.items()})
    expected = {}
    for name in changes[0]:
        stacked = torch.stack([t[name] for t in trimmed])
        agree = stacked.sign() == stacked.sum(0).sign()
        mean = (stacked * agree).sum(0) / (agree & (stacked != 0)).sum(0).clamp(min=1)
        expected[name] = 0.5 * mean
    same(load(tiny_folder, out)[1], expected)


def test_lego_finds_the_units_that_adapters_share(cli, tiny_folder, trained, tmp_path):
    """Permuted ranks and flipped signs are the same units; the rank stays that of one."""
    folders, changes = trained
    other = tmp_path / "other"
    shutil.copytree(folders[1], other)
    tensors = load_file(other / TENSORS_NAME)
    order, signs = torch.tensor([2, 0, 3, 1]), torch.tensor([1.0, -1.0, -1.0, 1.0])
    for key, tensor in tensors.items():
        moved = tensor[order] * signs[:, None] if "lora_A" in key else tensor[:, order] * signs
        tensors[key] = moved.contiguous()
    save_file(tensors, other / TENSORS_NAME)
    out = tmp_path / "out"
    done = cli(folders[1], other, "--strategy", "lora-lego", "--out", out, "--json")
    assert done.code == 0, done
    assert set(json.loads(done.out)["ranks"].values()) == {4}
    same(load(tiny_folder, out)[1], changes[1])


@pytest.mark.parametrize("name", ["dare", "lora-lego"])
def test_a_seed_is_a_seed(cli, trained, tmp_path, name):
    folders, _ = trained
    contents = []
    for i, seed in enumerate((1, 1, 2)):
        out = tmp_path / str(i)
        words = ("--strategy", name, "--rank", 2, "--seed", seed, "--option")
        words += ("drop=0.5",) if name == "dare" else ("n_init=1",)
        assert cli(*folders, *words, "--out", out).code == 0
        contents.append((out / TENSORS_NAME).read_bytes())
    assert contents[0] == contents[1]
    assert name == "lora-lego" or contents[0] != contents[2]


@pytest.fixture
def texts(tmp_path):
    rows = ["the film is good", "not the book it was", "very poor play", "a song", "fine " * 9]
    paths = []
    for i in range(3):
        path = tmp_path / f"texts{i}.jsonl"
        mine = [*rows[i:], f"{rows[i]} {rows[-1 - i]}"]
        path.write_text("".join(json.dumps({"text": text}) + "\n" for text in mine))
        paths.append(path)
    return paths


@pytest.mark.parametrize("files", [1, 3])
def test_regmean_against_inputs_recorded_by_hand(cli, tiny_folder, trained, tmp_path, texts, files):
    """The Grams of PEFT's own models, one text at a time, without padding."""
    folders, changes = trained
    out = tmp_path / "out"
    words = [word for path in texts[:files] for word in ("--data", path)]
    done = cli(*folders, "--strategy", "regmean", *words, "--weights", "1,2,1", "--out", out)
    assert done.code == 0, done
    tokenizer = AutoTokenizer.from_pretrained(tiny_folder)
    weights, grams = (0.25, 0.5, 0.25), []
    for i, folder in enumerate(folders):
        model = peft.PeftModel.from_pretrained(base(tiny_folder), folder).eval()
        inputs = {name: [] for name in changes[0]}
        for name, rows in inputs.items():
            layer = model.get_submodule(f"base_model.model.{name}")
            layer.register_forward_hook(lambda m, x, y, rows=rows: rows.append(x[0][0].double()))
        for line in texts[i if files == 3 else 0].read_text().splitlines():
            ids = tokenizer(json.loads(line)["text"], return_tensors="pt")["input_ids"]
            with torch.no_grad():
                model(input_ids=ids)
        grams.append(
            {n: torch.cat(x).T @ torch.cat(x) / len(torch.cat(x)) for n, x in inputs.items()}
        )
    expected = {}
    for name in changes[0]:
        shrunk = [0.95 * g[name] + 0.05 * g[name].diagonal().diag() for g in grams]
        left = sum(w * c[name] @ g for w, c, g in zip(weights, changes, shrunk, strict=True))
        right = sum(w * g for w, g in zip(weights, shrunk, strict=True))
        expected[name] = torch.linalg.solve(right, left.T).T
    same(load(tiny_folder, out)[1], expected, tol=1e-3)
    mean = weighted(changes, weights)
    assert max((expected[n] - mean[n]).norm() / mean[n].norm() for n in mean) > 0.02


def test_runs_and_exports_of_fedlora(cli, finished, tmp_path, monkeypatch, capsys):
    """A run folder, its adapter folder and its PEFT export are three times the same adapter."""
    exported = tmp_path / "exported"
    fedlora(monkeypatch, capsys, "export", finished, "--out", exported)
    out = tmp_path / "out"
    words = ("--strategy", "flexlora", "--model", "builtin:tiny-llama", "--out", out)
    done = cli(finished, finished / "adapter", exported, *words)
    assert done.code == 0, done
    config = json.loads((out / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == str((out / "base").resolve())
    assert config["task_type"] == "CAUSAL_LM"
    ids = torch.arange(65, 97)[None]
    with torch.no_grad():
        expected = assemble(finished).base.model(ids).logits
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-5, atol=1e-5)
    # it is itself an adapter that can be merged and inspected
    again = cli(out, exported, "--strategy", "flora", "--model", "x/y", "--out", tmp_path / "again")
    assert again.code == 0, again
    assert "PEFT" in fedlora(monkeypatch, capsys, "inspect", out).out


@pytest.mark.parametrize("method", ["pissa", "vera", "miss", "dora"])
def test_other_methods_of_fedlora(cli, job, tmp_path, monkeypatch, capsys, method):
    run, out = tmp_path / "run", tmp_path / "out"
    changed = ("-o", f"adapter.method={method}", "-o", "federation.rounds=1")
    assert fedlora(monkeypatch, capsys, "simulate", job, "--out", run, *changed).code == 0
    done = cli(run, run, "--strategy", "fedex-lora", "--out", out)
    if method == "dora":
        refused(done, "dora adapter", "magnitudes", "q_proj", "without the base")
        assert not out.exists()
        return
    assert done.code == 0, done
    ids = torch.arange(65, 97)[None]
    with torch.no_grad():
        expected = assemble(run).base.model(ids).logits
        loaded = peft.AutoPeftModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_weights_stored_the_other_way_round(cli, tmp_path):
    """GPT-2's layers keep (in, out); PEFT must be told, and warns of nothing."""

    def gpt2():
        torch.manual_seed(0)
        return GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=16, n_layer=2, n_head=2)).eval()

    folders = [tmp_path / "one", tmp_path / "two"]
    settings = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}
    changes = [save_peft(gpt2(), folder, i, **settings) for i, folder in enumerate(folders)]
    out = tmp_path / "out"
    assert cli(*folders, "--strategy", "flora", "--out", out).code == 0
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing.*", FutureWarning)
        loaded = peft.PeftModel.from_pretrained(gpt2(), out)
    same(deltas(loaded), weighted(changes, (0.5, 0.5)))
    assert {tuple(change.shape) for change in deltas(loaded).values()} == {(16, 48)}


def classifier(tiny_folder, folder, seed, num_labels=3, heads=("score",), **settings):
    torch.manual_seed(0)
    model = LlamaForSequenceClassification.from_pretrained(tiny_folder, num_labels=num_labels)
    settings = {"task_type": "SEQ_CLS", "modules_to_save": list(heads) or None, **settings}
    config = {"r": 2, "lora_alpha": 2, "target_modules": ["q_proj", "v_proj"], **settings}
    adapted = peft.get_peft_model(model, peft.LoraConfig(**config))
    draws = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=draws))
    adapted.save_pretrained(folder)


def test_heads_are_averaged_by_weight(cli, tiny_folder, tmp_path, texts):
    folders = [tmp_path / "one", tmp_path / "two"]
    for seed, folder in enumerate(folders):
        classifier(tiny_folder, folder, seed)
    key = "base_model.model.score.weight"
    heads = [load_file(folder / TENSORS_NAME)[key].double() for folder in folders]
    for strategy, words in (("flora", ()), ("regmean", ("--data", texts[0]))):
        out = tmp_path / strategy
        weights = ("--weights", "3,1")
        done = cli(*folders, "--strategy", strategy, *weights, *words, "--out", out)
        assert done.code == 0, done
        merged = load_file(out / TENSORS_NAME)[key].double()
        torch.testing.assert_close(merged, 0.75 * heads[0] + 0.25 * heads[1], rtol=0, atol=1e-6)
        model = LlamaForSequenceClassification.from_pretrained(tiny_folder, num_labels=3)
        loaded = peft.PeftModel.from_pretrained(model, out)
        assert torch.equal(
            loaded.base_model.model.score.modules_to_save["default"].weight.double(), merged
        )


def test_heads_that_differ_are_refused(cli, tiny_folder, tmp_path):
    classifier(tiny_folder, tmp_path / "three", 0)
    classifier(tiny_folder, tmp_path / "four", 1, num_labels=4)
    save_peft(base(tiny_folder), tmp_path / "none", 2, r=2)
    words = ("--strategy", "flora", "--out", tmp_path / "out")
    refused(
        cli(tmp_path / "three", tmp_path / "four", *words), "score.weight", "(3, 16)", "(4, 16)"
    )
    refused(cli(tmp_path / "three", tmp_path / "none", *words), "score.weight", "missing")


def edit_config(folder, **changes):
    path = folder / CONFIG_NAME
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


@pytest.fixture
def pair(trained, tmp_path):
    """Copies of two adapters, to be damaged."""
    folders = []
    for folder in trained[0][:2]:
        folders.append(tmp_path / folder.name)
        shutil.copytree(folder, folders[-1])
    return folders


def test_other_bases_are_refused_unless_the_user_says_which(cli, pair, tmp_path):
    edit_config(pair[0], base_model_name_or_path="org/one")
    edit_config(pair[1], base_model_name_or_path="org/two")
    words = ("--strategy", "flora", "--out", tmp_path / "out")
    refused(cli(*pair, *words), "'org/one'", "'org/two'", "--model")
    assert cli(*pair, *words, "--model", "org/three").code == 0
    config = json.loads((tmp_path / "out" / CONFIG_NAME).read_text())
    assert config["base_model_name_or_path"] == "org/three"


def test_an_unknown_base_hides_no_difference_between_others(cli, pair, tmp_path):
    shutil.copytree(pair[0], tmp_path / "unknown")
    edit_config(tmp_path / "unknown", base_model_name_or_path=None)
    edit_config(pair[0], base_model_name_or_path="org/one")
    words = ("--strategy", "flora", "--out", tmp_path / "out")
    refused(cli(tmp_path / "unknown", *pair, *words), "'org/one'")
    assert cli(tmp_path / "unknown", pair[1], *words).code == 0


def test_other_fingerprints_are_refused(cli, finished, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(finished / "adapter", other)
    path = other / CONFIG_NAME
    config = json.loads(path.read_text())
    config["spec"]["base_fingerprint"] = "0123456789abcdef"
    path.write_text(json.dumps(config))
    words = ("--model", "builtin:tiny-llama", "--strategy", "flora", "--out", tmp_path / "out")
    refused(cli(finished, other, *words), "fingerprint", "0123456789ab", "builtin:tiny-llama")


def test_other_layers_and_shapes_are_refused(cli, tiny_folder, pair, tmp_path):
    words = ("--strategy", "flora", "--out", tmp_path / "out")
    save_peft(base(tiny_folder), tmp_path / "more", 3, r=2, target_modules=["q_proj", "k_proj"])
    refused(
        cli(pair[0], tmp_path / "more", *words), "different layers", "self_attn.k_proj", "4 in all"
    )
    tensors = load_file(pair[1] / TENSORS_NAME)
    key = "base_model.model.model.layers.0.self_attn.v_proj.lora_B.weight"
    tensors[key] = tensors[key][:-1].clone()
    save_file(tensors, pair[1] / TENSORS_NAME)
    refused(cli(*pair, *words), "layers.0.self_attn.v_proj", "(8, 16)", "(7, 16)")


def test_dora_of_peft_is_refused(cli, tiny_folder, tmp_path):
    save_peft(base(tiny_folder), tmp_path / "dora", 1, r=2, use_dora=True)
    done = cli(tmp_path / "dora", "--strategy", "flora", "--out", tmp_path / "out")
    refused(done, "dora adapter", "magnitudes", "without the base")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (("--strategy", "tise"), ('did you mean "ties"', "flexlora")),
        (("--strategy", "flora", "--weights", "1,2,3"), ("3 numbers for 2 adapters",)),
        (("--strategy", "flora", "--weights", "1,-2"), ("--weights holds -2",)),
        (("--strategy", "flora", "--weights", "1,nan"), ("--weights holds nan",)),
        (("--strategy", "flora", "--weights", "0,0"), ("all 0",)),
        (("--strategy", "flora", "--weights", "1;2"), ("not a list of numbers",)),
        (("--strategy", "flora", "--rank", "7"), ("together, 6",)),
        (("--strategy", "ties", "--rank", "9"), ("too large", "v_proj", "(8, 16)", "at most 8")),
        (("--strategy", "fedex-lora", "--rank", "3"), ("too small", "rank 4")),
        (("--strategy", "flora", "--rank", "0"), ("--rank",)),
        (("--strategy", "ties", "--option", "density"), ("key=value",)),
        (("--strategy", "ties", "--option", "density=2"), ("at most 1",)),
        (("--strategy", "ties", "--option", "dens=0.1"), ('did you mean "density"',)),
        (("--strategy", "flora", "--data", "x.jsonl"), ("--data has no effect",)),
        (("--strategy", "regmean"), ("one --data FILE", "found 0")),
        (("--strategy", "regmean", "--data", "/no/x.jsonl"), ("/no/x.jsonl", "check that")),
    ],
)
def test_wrong_settings_are_refused(cli, pair, tmp_path, words, parts):
    refused(cli(*pair, *words, "--out", tmp_path / "out"), *parts)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "part"),
    [('{"txt": "a"}', 'no column "text"'), ('{"text": " "}', "no text"), ("[1]", "a list")],
)
def test_data_without_text_is_refused(cli, pair, tmp_path, text, part):
    (tmp_path / "x.jsonl").write_text(text)
    words = ("--strategy", "regmean", "--data", tmp_path / "x.jsonl", "--out", tmp_path / "out")
    edit_config(pair[0], task_type="CAUSAL_LM")
    refused(cli(pair[0], *words), part)


def test_regmean_needs_a_task_on_texts(cli, pair, texts, tmp_path):
    edit_config(pair[0], task_type="FEATURE_EXTRACTION")
    words = ("--strategy", "regmean", "--data", texts[0], "--out", tmp_path / "out")
    refused(cli(pair[0], *words), "FEATURE_EXTRACTION", "CAUSAL_LM")


def test_folders_that_are_no_adapters_are_refused(cli, pair, tmp_path):
    words = ("--strategy", "flora", "--out", tmp_path / "out")
    refused(cli(tmp_path / "nothing", *words), "neither an adapter folder nor a run folder")
    (pair[0] / CONFIG_NAME).write_text("{")
    refused(cli(*pair, *words), "not readable")
    edit_config(pair[1], peft_type="LOHA")
    refused(cli(pair[1], *words), "LOHA")


def test_an_existing_folder_is_kept(cli, pair, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine").write_text("x")
    refused(cli(*pair, "--strategy", "flora", "--out", out), "exists and is not empty")
    assert [path.name for path in out.iterdir()] == ["mine"]


def test_the_card_says_what_was_merged_and_how(cli, pair, tmp_path):
    out = tmp_path / "out"
    words = ("--strategy", "ties", "--option", "density=0.4", "--rank", 3, "--weights", "3,1")
    done = cli(*pair, *words, "--seed", 5, "--out", out)
    assert "2 adapters merged by ties, rank 3" in done.out
    text = (out / "README.md").read_text()
    for part in (*map(str, pair), "| 0.75 |", "| 0.25 |", "`ties`", "density = 0.4", "3 asked for"):
        assert part in text
    assert sorted(path.name for path in out.iterdir()) == ["README.md", CONFIG_NAME, TENSORS_NAME]


def test_an_adapter_of_weight_zero_changes_nothing(cli, tiny_folder, trained, tmp_path):
    folders, changes = trained
    out = tmp_path / "out"
    words = ("--strategy", "flora", "--weights", "1,0,1", "--out", out)
    assert cli(*folders, *words).code == 0
    same(load(tiny_folder, out)[1], weighted([changes[0], changes[2]], (0.5, 0.5)))


def test_the_help_names_every_merger():
    group = typer.main.get_command(app)
    assert isinstance(group, click.Group)
    (text,) = (p.help for p in group.commands["merge"].params if p.name == "strategy")
    assert sorted(text.rstrip(".").replace(" or ", ", ").split(", ")) == sorted(MERGERS)
