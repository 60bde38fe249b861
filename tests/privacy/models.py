"""Tiny models of every supported kind with an adapter, and examples of unequal length."""

from dataclasses import dataclass

import torch
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    ViTConfig,
    ViTForImageClassification,
)

from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.data.example import IGNORE, Example
from tests.adapters.cases import seeded

KINDS = ("llama", "bert", "gpt2", "vit")
HEADS = {"bert": ("classifier",), "vit": ("classifier",)}


@dataclass(frozen=True)
class Made:
    adapted: AdaptedModel
    task: str
    examples: list[Example]


def base(kind: str, layers: int = 2):
    torch.manual_seed(3)
    if kind == "llama":
        return LlamaForCausalLM(
            LlamaConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=32,
            )
        )
    if kind == "gpt2":
        return GPT2LMHeadModel(
            GPT2Config(
                vocab_size=50,
                n_embd=32,
                n_layer=layers,
                n_head=4,
                n_positions=32,
                resid_pdrop=0.0,
                embd_pdrop=0.0,
                attn_pdrop=0.0,
            )
        )
    if kind == "bert":
        return BertForSequenceClassification(
            BertConfig(
                vocab_size=50,
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=layers,
                num_attention_heads=4,
                max_position_embeddings=32,
                num_labels=3,
                hidden_dropout_prob=0.0,
                attention_probs_dropout_prob=0.0,
            )
        )
    return ViTForImageClassification(
        ViTConfig(
            image_size=8,
            patch_size=4,
            num_channels=1,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_labels=3,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
    )


def examples(kind: str, lengths=(5, 9, 12, 3)) -> list[Example]:
    found = []
    for number, length in enumerate(lengths):
        stream = seeded(100 + number)
        if kind == "vit":
            pixels = torch.randn(1, 8, 8, generator=stream)
            found.append(Example({"pixel_values": pixels}, torch.tensor(number % 3)))
            continue
        ids = torch.randint(1, 50, (length,), generator=stream)
        if kind == "bert":
            found.append(Example({"input_ids": ids}, torch.tensor(number % 3)))
            continue
        target = ids.clone()
        target[: 1 + number % 3] = IGNORE
        found.append(Example({"input_ids": ids}, target))
    return found


def make(
    kind: str = "llama",
    method: str = "lora",
    *,
    rank: int = 4,
    lengths=(5, 9, 12, 3),
    dtype: torch.dtype = torch.float32,
    seed: int = 7,
    dropout: float = 0.0,
) -> Made:
    """An adapter whose factors are all random, so that no gradient vanishes by chance."""
    adapted = adapt(
        base(kind).to(dtype),
        method=method,
        rank=rank,
        alpha=None,
        targets="all-linear",
        heads=HEADS.get(kind, ()),
        base_fingerprint="0" * 64,
        seed=seed,
        dropout=dropout,
    )
    stream = seeded(seed)
    with torch.no_grad():
        for name, parameter in adapted.parameters().items():
            noise = torch.randn(parameter.shape, generator=stream, dtype=torch.float64)
            # heads and magnitudes keep what they are
            if name.rpartition(".")[2] not in ("weight", "bias"):
                parameter.add_(0.2 * noise.to(parameter.dtype))
    task = {"bert": "sequence-classification", "vit": "image-classification"}.get(kind, "causal-lm")
    data = examples(kind, lengths)
    if dtype == torch.float64 and kind == "vit":
        data = [
            Example({"pixel_values": e.inputs["pixel_values"].double()}, e.target) for e in data
        ]
    return Made(adapted, task, data)
