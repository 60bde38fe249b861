"""A tiny model folder and a tiny labelled file, made once; nothing is downloaded."""

import csv
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import settings
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from fedlora.config.job import Job

torch.set_num_threads(1)
# the same cases in every run, and no verdict that depends on the clock
settings.register_profile("fedlora", deadline=None, derandomize=True, database=None)
settings.load_profile("fedlora")

WORDS = ["good", "bad", "fine", "poor", "film", "book", "song", "play", "very", "not", "the", "it"]
WORDS += ["a", "is", "was"]


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory):
    """A random two-layer Llama of width 16 with a word tokenizer, as saved by transformers."""
    folder = tmp_path_factory.mktemp("tiny-model")
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<unk>", "</s>", *WORDS])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )
    tokenizer.save_pretrained(folder)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = LlamaForCausalLM(
            LlamaConfig(
                vocab_size=len(vocabulary),
                hidden_size=16,
                intermediate_size=24,
                num_hidden_layers=2,
                num_attention_heads=2,
                num_key_value_heads=1,
                max_position_embeddings=32,
                initializer_range=0.3,
                pad_token_id=0,
                tie_word_embeddings=False,
            )
        )
    model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tiny_csv(tmp_path_factory):
    """40 short labelled texts; the label is the first word's mood."""
    path = tmp_path_factory.mktemp("tiny-data") / "rows.csv"
    draws = torch.Generator().manual_seed(1)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["text", "label"])
        for row in range(40):
            length = int(torch.randint(2, 7, (1,), generator=draws))
            picks = torch.randint(4, len(WORDS), (length,), generator=draws).tolist()
            mood = "good" if row % 2 else "bad"
            writer.writerow([" ".join([mood, *(WORDS[i] for i in picks)]), mood])
    return path


@pytest.fixture(scope="session")
def make_job(tiny_folder, tiny_csv):
    """A job on the tiny model and file; keyword arguments change whole sections by key."""

    def make(**sections: Mapping[str, Any]) -> Job:
        tree: dict[str, dict[str, Any]] = {
            "model": {"name": str(tiny_folder), "task": "sequence-classification"},
            "data": {"source": str(tiny_csv), "max_length": 16},
            "partition": {"kind": "iid", "clients": 3},
            "adapter": {"rank": 2, "targets": ["q_proj"]},
            "training": {"local_steps": 2, "batch_size": 4, "learning_rate": 1e-2},
            "federation": {"rounds": 3},
        }
        for name, values in sections.items():
            tree[name] = {**tree.get(name, {}), **values}
        return Job.model_validate(tree)

    return make
