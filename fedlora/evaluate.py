"""Loss, perplexity, bits per byte, accuracy and exact match of a model on examples."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fedlora.data.example import Batch, Example, collate
from fedlora.training.loss import loss_sum, token_losses


@dataclass
class Tally:
    """What is summed over the counted tokens, or examples of a classification task.

    Attributes:
        total: negative log-likelihoods in nats.
        count: how many are counted.
        correct: how many of them the model gets right.
    """

    total: float = 0.0
    count: int = 0
    correct: int = 0

    def add(self, total: float, count: int, correct: int) -> None:
        """Counts further ones."""
        self.total += total
        self.count += count
        self.correct += correct

    def figures(self, examples: Sequence[Example], task: str) -> dict[str, float]:
        """See `evaluate`; `examples` are those that were counted."""
        if not self.count:
            return {}
        loss = self.total / self.count
        scores = {"loss": loss, "accuracy": self.correct / self.count}
        num_bytes = sum(example.num_bytes for example in examples)
        if task == "causal-lm":
            scores["perplexity"] = math.exp(min(loss, 700.0))
            if num_bytes:
                scores["bits_per_byte"] = self.total / math.log(2.0) / num_bytes
        return scores


def evaluate(
    model: nn.Module, examples: Sequence[Example], *, task: str, pad_id: int, batch_size: int
) -> dict[str, float]:
    """The model's figures on `examples`, in eval mode.

    Returns:
        loss (nats per token or example), accuracy (0 to 1) and, for causal-lm, perplexity
        and bits_per_byte of the counted text. Empty where nothing counts.
    """
    device = next(model.parameters()).device
    found = Tally()
    with evaluating(model):
        for batch in batches(examples, pad_id, batch_size):
            part = loss_sum(model, batch.to(device), task)
            found.add(float(part.total), part.count, part.correct)
    return found.figures(examples, task)


def batches(examples: Sequence[Example], pad_id: int, batch_size: int) -> Iterator[Batch]:
    """The examples by length, so that a batch has little padding; sums need no order."""
    ordered = sorted(examples, key=lambda example: example.target.numel())
    for start in range(0, len(ordered), batch_size):
        yield collate(ordered[start : start + batch_size], pad_id)


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, the model is in eval mode and makes no gradients; afterwards as it was."""
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(training)


def example_figures(
    model: nn.Module, examples: Sequence[Example], *, task: str, pad_id: int, batch_size: int = 16
) -> tuple[Tensor, Tensor]:
    """Each example's mean loss in nats and the part of it that the model gets right, both (n,)."""
    device = next(model.parameters()).device
    losses, right = [], []
    with evaluating(model):
        for start in range(0, len(examples), batch_size):
            batch = collate(examples[start : start + batch_size], pad_id).to(device)
            found = token_losses(model, batch, task)
            losses.append(found.means())
            right.append(found.right.double().sum(1) / found.counted.sum(1).clamp_min(1))
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
    with evaluating(model):
        for example in asked:
            prompt = example.prompt_ids[None].to(device)  # (1, T)
            output = model.generate(  # type: ignore[operator]
                input_ids=prompt,
                attention_mask=torch.ones_like(prompt),
                do_sample=False,
                max_new_tokens=max_new_tokens,
                pad_token_id=pad_id,
            )
            text = tokenizer.decode(output[0, prompt.shape[1] :], skip_special_tokens=True)
            hits += text.strip() == (example.answer or "").strip()
    return hits / len(asked) if asked else None
