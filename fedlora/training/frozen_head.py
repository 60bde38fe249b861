"""The output head of a language model, where its loss needs no logits of the model's own."""

from dataclasses import dataclass
from typing import Any

from torch import nn

from fedlora.adapters.leaves import is_tapped

# transformers' classes whose logits are `lm_head(body(...))` and nothing else: no scaling
# (Cohere, Granite) and no soft-capping (Gemma 2). A class that is missing here loses memory and
# speed, not exactness.
PLAIN = frozenset(
    {
        "GPT2LMHeadModel",
        "GPTNeoXForCausalLM",
        "GemmaForCausalLM",
        "LlamaForCausalLM",
        "MistralForCausalLM",
        "Olmo2ForCausalLM",
        "Phi3ForCausalLM",
        "Qwen2ForCausalLM",
        "Qwen3ForCausalLM",
        "SmolLM3ForCausalLM",
    }
)


@dataclass(frozen=True)
class FrozenHead:
    """A model cut in two: logits are `head(body(...).last_hidden_state)`."""

    body: nn.Module
    head: nn.Linear


def frozen_head(model: nn.Module) -> FrozenHead | None:
    """The two parts of a language model whose head is linear and frozen; None in any doubt."""
    kind = type(model)
    causal: Any = model
    if kind.__name__ not in PLAIN or not kind.__module__.startswith("transformers.models."):
        return None
    body = getattr(model, causal.base_model_prefix, None)
    head = causal.get_output_embeddings()
    if not isinstance(body, nn.Module) or type(head) is not nn.Linear:
        return None
    if any(parameter.requires_grad for parameter in head.parameters()):
        return None
    if is_tapped(model) or is_tapped(head):
        return None
    return FrozenHead(body, head)
