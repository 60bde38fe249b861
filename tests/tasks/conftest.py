"""Tiny models and data of every task, written to disk once."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image

from fedlora.config.job import ModelSection
from fedlora.models.loading import load_processor


def _save(model: torch.nn.Module, folder: Path) -> Path:
    model.save_pretrained(folder)
    load_processor(ModelSection()).tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A masked language model, so that the classification head is missing."""
    config = transformers.BertConfig(
        vocab_size=259,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=64,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.BertForMaskedLM(config)
    return _save(model, tmp_path_factory.mktemp("bert"))


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model whose linear layers are Conv1D."""
    config = transformers.GPT2Config(
        vocab_size=259, n_embd=32, n_layer=2, n_head=2, n_positions=64,
        bos_token_id=257, eos_token_id=258,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.GPT2LMHeadModel(config)
    return _save(model, tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def vit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A vision transformer and its image processor."""
    folder = tmp_path_factory.mktemp("vit")
    config = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=48,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.ViTModel(config, add_pooling_layer=False).save_pretrained(folder)
    size = {"height": 8, "width": 8}
    transformers.ViTImageProcessor(size=size).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Texts whose first word decides their class."""
    path = tmp_path_factory.mktemp("labelled") / "rows.csv"
    words = ("alpha", "beta", "gamma")
    rows = [f"{words[i % 3]} row {i},{words[i % 3]}" for i in range(90)]
    path.write_text("text,label\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="session")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder per class; the class is the colour."""
    folder = tmp_path_factory.mktemp("pictures")
    for label, colour in (("red", (200, 20, 20)), ("blue", (20, 20, 200))):
        (folder / label).mkdir()
        for i in range(20):
            shade = tuple(min(255, c + 2 * i) for c in colour)
            Image.new("RGB", (8, 8), shade).save(folder / label / f"{i}.png")
    return folder


@pytest.fixture(scope="session")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts with short completions."""
    path = tmp_path_factory.mktemp("questions") / "rows.jsonl"
    rows = [{"prompt": f"say {'ab'[i % 2]}: ", "completion": "ab"[i % 2]} for i in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
