"""Kernels of the LoRA linears of one Llama layer as the model runs them, counted without data."""

from typing import Any

import torch
from transformers import LlamaConfig, LlamaModel

from benchmarks.kernels.counting import LAYERS, RANK, SCALE, Counting
from fedlora.adapters.inject import AdaptedModel, adapt

HEAD = {"1B": 64, "8B": 128}


def wired(layer: str, factors: torch.dtype, rate: float, tokens: int = 1024) -> int:
    """Of all seven linears with their adapters, forward and backward.

    The layer's kernels with adapters, less those without; the frozen products are counted again.

    Args:
        layer: one of `LAYERS`.
        factors: number format of the factors; the base and what is computed are bfloat16.
        rate: of the adapters' dropout.
        tokens: of one text.
    """
    model = _model(layer)
    plain = _kernels(model, tokens)
    adapted = adapt(
        model,
        method="lora",
        rank=RANK,
        alpha=SCALE * RANK,
        targets="all-linear",
        heads=(),
        base_fingerprint="",
        seed=0,
        dropout=rate,
    )
    for part in adapted.layers.values():
        for factor in ("A", "B"):
            getattr(part, factor).to(factors)
    adapted.key_dropout(1)
    frozen = 2 * sum(len(outs) for _, outs in LAYERS[layer])
    return _kernels(model, tokens, adapted) - plain + frozen


def _model(layer: str) -> Any:
    (hidden, (_, kv, _)), _, (_, (inner, _)), _ = LAYERS[layer]
    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=inner,
        num_hidden_layers=1,
        num_attention_heads=hidden // HEAD[layer],
        num_key_value_heads=kv // HEAD[layer],
        vocab_size=8,
    )
    with torch.device("meta"):
        model = LlamaModel(config).to(torch.bfloat16)
    return model.requires_grad_(False).train()


def _kernels(model: Any, tokens: int, adapted: AdaptedModel | None = None) -> int:
    config = model.config
    head = config.hidden_size // config.num_attention_heads
    x = _meta(1, tokens, config.hidden_size).requires_grad_()
    place = _meta(1, tokens, head)
    trained = list(adapted.parameters().values()) if adapted else []
    with Counting() as mode:
        y = model.layers[0](x, position_embeddings=(place, place), attention_mask=None)
        torch.autograd.grad(y, (x, *trained), torch.empty_like(y))
    return mode.count.kernels


def _meta(*shape: int) -> torch.Tensor:
    return torch.empty(shape, dtype=torch.bfloat16, device="meta")
