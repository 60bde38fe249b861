"""Peak memory of one training step of a whole model, beside PEFT's default.

    python -m benchmarks.kernels.step [--device cuda]

Prints one JSON object of figures by bar: a Llama in the shape of 1B with random weights in
bfloat16, LoRA of rank 16 on every linear layer, 8,192 tokens, no activation checkpointing.
"""

import argparse
import importlib
import importlib.util
import json

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.kernels.timing import Run, peak_bytes
from fedlora.adapters.inject import adapt
from fedlora.data.example import Batch
from fedlora.training.loss import loss_sum


def _model(device: str, *, tiny: bool) -> LlamaForCausalLM:
    layers, hidden, words = (1, 64, 300) if tiny else (16, 2048, 128_256)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=words,
        hidden_size=hidden,
        intermediate_size=4 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 16 if tiny else 32,
        num_key_value_heads=hidden // 16 if tiny else 8,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).to(device, torch.bfloat16).requires_grad_(False).train()


def figures(device: str, *, tiny: bool = False) -> dict[str, list[float]]:
    """The figure of K8; none without PEFT, and none on a CPU, which counts no peak."""
    rows, tokens = (2, 8) if tiny else (4, 2048)
    draws = torch.Generator().manual_seed(0)
    ids = torch.randint(300, (rows, tokens), generator=draws).to(device)
    batch = Batch({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, ids)
    own = _ours(batch, device, tiny=tiny)
    if importlib.util.find_spec("peft") is None:
        return {}
    other = _peft(batch, device, tiny=tiny)
    return {"K8": [own / other]} if other else {}


def _ours(batch: Batch, device: str, *, tiny: bool) -> int:
    adapted = adapt(
        _model(device, tiny=tiny),
        method="lora",
        rank=16,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="0" * 64,
        seed=0,
    )
    adapted.train_only(("A", "B"))

    def step() -> None:
        loss_sum(adapted.model, batch, "causal-lm").total.backward()  # type: ignore[no-untyped-call]

    return _with_weights(step, device)


def _peft(batch: Batch, device: str, *, tiny: bool) -> int:
    peft = importlib.import_module("peft")
    config = peft.LoraConfig(r=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(_model(device, tiny=tiny), config)

    def step() -> None:
        model(**batch.inputs, labels=batch.target).loss.backward()

    return _with_weights(step, device)


def _with_weights(step: Run, device: str) -> int:
    """Peak bytes of a step and of the model that it is of."""
    held = torch.cuda.memory_allocated() if device == "cuda" else 0
    return held + peak_bytes(step, device)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--tiny", action="store_true", help="shapes that a CPU does in seconds")
    given = parser.parse_args()
    print(json.dumps(figures(given.device, tiny=given.tiny)))


if __name__ == "__main__":
    main()
