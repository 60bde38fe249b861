"""Subjects of the oracles: tiny models of every kind, and one whose leaves are called twice."""

import torch
from transformers import AlbertConfig, AlbertForSequenceClassification

from fedlora.adapters.inject import adapt
from fedlora.privacy.audit.subject import Subject
from tests.privacy.models import examples, make

LENGTHS = (5, 9, 12, 3, 7, 6)


def subject(kind="llama", **changes):
    """Sound private training of a tiny model."""
    if kind == "shared":
        adapted, data, task = *_shared(), "sequence-classification"
    else:
        made = make(kind, lengths=LENGTHS)
        adapted, data, task = made.adapted, made.examples, made.task
    factors = tuple(sorted({name for layer in adapted.layers.values() for name in layer.factors()}))
    return Subject(adapted, data, task, 0, factors, **changes)


def _shared():
    """An Albert, whose layers are one: every leaf is called twice in a forward pass."""
    torch.manual_seed(3)
    config = AlbertConfig(
        vocab_size=50,
        embedding_size=16,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_hidden_groups=1,
        num_attention_heads=4,
        max_position_embeddings=32,
        num_labels=3,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        classifier_dropout_prob=0.0,
    )
    adapted = adapt(
        AlbertForSequenceClassification(config),
        method="lora",
        rank=4,
        alpha=None,
        targets="all-linear",
        heads=("classifier",),
        base_fingerprint="0" * 64,
        seed=7,
    )
    return adapted, examples("bert", LENGTHS)
