"""Loss, perplexity, bits per byte, accuracy and exact match of a model on examples."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.data.example import Example, collate
from fedlora.training.loss import loss_sum, token_losses


def evaluate(
    model: nn.Module, examples: Sequence[Example], *, task: str, pad_id: int, batch_size: int
) -> dict[str, float]:
    """The model's figures on `examples`, in eval mode.

    Returns:
        loss (nats per token or example), accuracy (0 to 1) and, for causal-lm, perplexity
        and bits_per_byte of the counted text. Empty where nothing counts.
    """
    if not examples:
        return {}
    device = next(model.parameters()).device
    # by length, so that a batch has little padding; sums do not depend on the order
    ordered = sorted(examples, key=lambda example: example.target.numel())
    total, count, correct = 0.0, 0, 0
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(ordered), batch_size):
            batch = collate(ordered[start : start + batch_size], pad_id).to(device)
            part = loss_sum(model, batch, task)
            total += float(part.total)
            count += part.count
            correct += part.correct
    model.train(training)
    if not count:
        return {}
    scores = {"loss": total / count, "accuracy": correct / count}
    num_bytes = sum(example.num_bytes for example in examples)
    if task == "causal-lm":
        scores["perplexity"] = math.exp(min(total / count, 700.0))
        if num_bytes:
            scores["bits_per_byte"] = total / math.log(2.0) / num_bytes
    return scores


def example_figures(
    model: nn.Module, examples: Sequence[Example], *, task: str, pad_id: int, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Each example's mean loss in nats and the part of it that the model gets right, both (n,)."""
    device = next(model.parameters()).device
    losses, right = [], []
    training = model.training
    model.eval()
    with torch.no_grad():
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_id).to(device)
            found = token_losses(model, batch, task)
            losses.append(found.means())
            right.append(found.right.double().sum(1) / found.counted.sum(1).clamp_min(1))
    model.train(training)
    return torch.cat(losses).cpu(), torch.cat(right).cpu()


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    examples: Sequence[Example],
    *,
    pad_id: int,
    max_new_tokens: int,
) -> float | None:
    """Fraction of prompts whose greedy completion equals the answer, surrounding space apart.

    Args:
        tokenizer: the model's tokenizer.
        examples: those without an answer are left out.
        pad_id: padding token.
        max_new_tokens: longest completion.

    Returns:
        None where no example has an answer.
    """
    device = next(model.parameters()).device
    asked = [example for example in examples if example.answer is not None]
    hits = 0
    training = model.training
    model.eval()
    for example in asked:
        prompt = example.prompt_ids[None].to(device)  # (1, T)
        with torch.no_grad():
            output = model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
            )
        text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
        hits += text.strip() == (example.answer or "").strip()
    model.train(training)
    return hits / len(asked) if asked else None
