"""What a private LoRA step costs beside a plain one: book-keeping, Opacus' hooks, ghost clipping.

    python benchmarks/private_step.py [--repeats 20] [--device cuda]

All of them train the same adapter on the same batches in one process, taking turns, so that
a busy machine slows all alike. A step is forward, backward, clipping, noise and AdamW.
"""

import argparse
import importlib.util
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from fedlora.adapters.inject import AdaptedModel, adapt
from fedlora.data.example import Batch, Example, collate
from fedlora.privacy.grad_samplers import register_grad_samplers
from fedlora.privacy.mechanism import Mechanism
from fedlora.privacy.noise import noise_source
from fedlora.privacy.per_sample import per_sample
from fedlora.privacy.sampling import secret_uniform
from fedlora.server.machine import machine
from fedlora.training.loss import example_losses, loss_sum
from fedlora.training.mode import training_mode

BAR = 1.3
CLIP, SIGMA = 1.0, 1.0
Step = Callable[[], None]


def model(layers: int, hidden: int, rank: int, device: str) -> AdaptedModel:
    """A Llama from its configuration, with LoRA on every linear layer."""
    torch.manual_seed(0)
    made = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=512,
            hidden_size=hidden,
            intermediate_size=hidden * 11 // 4,
            num_hidden_layers=layers,
            num_attention_heads=8,
            num_key_value_heads=8,
            max_position_embeddings=256,
        )
    ).to(device)
    return adapt(
        made,
        method="lora",
        rank=rank,
        alpha=None,
        targets="all-linear",
        heads=(),
        base_fingerprint="0" * 64,
        seed=0,
    )


def examples(count: int, tokens: int) -> list[Example]:
    """Texts of one length."""
    stream = torch.Generator().manual_seed(1)
    rows = torch.randint(0, 512, (count, tokens), generator=stream)
    return [Example({"input_ids": row}, row.clone()) for row in rows]


def plain(adapted: AdaptedModel, batch: Batch) -> Step:
    """Forward, backward, norm of the whole gradient, AdamW."""
    parameters = adapted.train_only(("A", "B"))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)

    def step() -> None:
        part = loss_sum(adapted.model, batch, "causal-lm")
        (part.total / part.count).backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), CLIP)
        optimizer.step()
        optimizer.zero_grad()

    return step


def ours(adapted: AdaptedModel, batch: Batch, mode: str, noise: str) -> Step:
    """The private step with one way of per-sample gradients."""
    parameters = adapted.train_only(("A", "B"))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    count = len(batch.target)
    mechanism = Mechanism(
        count, 1.0, CLIP, SIGMA, noise_source(noise, 0), secret_uniform, per_sample=mode
    )
    listening = per_sample(mode, adapted.model, parameters)

    def step() -> None:
        with listening:
            listening.begin(count)
            example_losses(adapted.model, batch, "causal-lm").sum().backward()
            released = mechanism.released(mechanism.clipped(listening.pieces()), parameters)
            listening.begin(0)
        for name, parameter in parameters.items():
            parameter.grad = released[name]
        optimizer.step()
        optimizer.zero_grad()

    return step


def ghost(adapted: AdaptedModel, batch: Batch) -> Step:
    """Opacus' ghost clipping: norms first, then a second backward pass of weighted losses."""
    from opacus.grad_sample import GradSampleModuleFastGradientClipping

    register_grad_samplers()
    parameters = adapted.train_only(("A", "B"))
    optimizer = torch.optim.AdamW(parameters.values(), lr=1e-3)
    count = len(batch.target)
    mechanism = Mechanism(count, 1.0, CLIP, SIGMA, noise_source("os", 0), secret_uniform)
    wrapped = GradSampleModuleFastGradientClipping(
        adapted.model, loss_reduction="sum", max_grad_norm=CLIP, use_ghost_clipping=True
    )

    def step() -> None:
        losses = example_losses(adapted.model, batch, "causal-lm")
        losses.sum().backward(retain_graph=True)
        for parameter in parameters.values():
            parameter.grad = None
        weights = wrapped.get_clipping_coef().to(losses.dtype)
        wrapped.disable_hooks()
        (weights * losses).sum().backward()
        wrapped.enable_hooks()
        sums = {name: p.grad for name, p in parameters.items() if p.grad is not None}
        for name, value in mechanism.released(sums, parameters).items():
            parameters[name].grad = value
        optimizer.step()
        optimizer.zero_grad()

    return step


def measure(given: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of every step by way, in turns; each way has a model of its own."""
    batch = collate(examples(given.batch, given.tokens), 0).to(given.device)
    ways: dict[str, Callable[[AdaptedModel], Step]] = {
        "plain": lambda adapted: plain(adapted, batch),
        "book-keeping": lambda adapted: ours(adapted, batch, "bookkeeping", "os"),
        "book-keeping, secure noise": lambda adapted: ours(adapted, batch, "bookkeeping", "secure"),
    }
    if importlib.util.find_spec("opacus") is not None:
        ways["Opacus hooks"] = lambda adapted: ours(adapted, batch, "hooks", "os")
        ways["Opacus ghost"] = lambda adapted: ghost(adapted, batch)
    steps = {}
    modes = []
    for name, way in ways.items():
        adapted = model(given.layers, given.hidden, given.rank, given.device)
        entered = training_mode(adapted, checkpointing=False)
        entered.__enter__()
        modes.append(entered)
        steps[name] = way(adapted)
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for repeat in range(given.repeats + 2):
        for name, step in steps.items():
            started = time.perf_counter()
            step()
            if given.device != "cpu":
                torch.cuda.synchronize()
            if repeat >= 2:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def report(found: dict[str, object], seconds: dict[str, list[float]]) -> str:
    """The figures as markdown."""
    base = statistics.median(seconds["plain"])
    lines = [
        "# What a private step costs",
        "",
        f"`python benchmarks/private_step.py`: a Llama of {found['layers']} layers and hidden size "
        f"{found['hidden']}, LoRA of rank {found['rank']} on every linear layer, batch "
        f"{found['batch']} of {found['tokens']} tokens; all ways take turns in one process.",
        "",
        f"Machine: {found['machine']}, device {found['device']}.",
        "",
        "| step | ms, median (range) | of the plain step |",
        "| --- | ---: | ---: |",
    ]
    for name, values in seconds.items():
        middle = statistics.median(values)
        ratio = statistics.median(v / p for v, p in zip(values, seconds["plain"], strict=True))
        lines.append(
            f"| {name} | {1e3 * middle:.1f} ({1e3 * min(values):.1f} to {1e3 * max(values):.1f}) | "
            f"{ratio:.2f} |"
        )
    ratio = statistics.median(seconds["book-keeping"]) / base
    met = "met" if ratio <= BAR else "missed"
    lines += ["", f"Bar: book-keeping at most {BAR} times the plain step: {ratio:.2f}, {met}.", ""]
    return "\n".join(lines)


def main() -> None:
    """Measures and writes both files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    given = parser.parse_args()
    torch.set_num_threads(1)
    found: dict[str, object] = {**vars(given), "out": "", "machine": machine(1)}
    seconds = measure(given)
    suffix = "" if given.device == "cpu" else "_gpu"
    text = report(found, seconds)
    (given.out / f"private_step{suffix}.json").write_text(
        json.dumps({**found, "seconds": seconds}, indent=1, default=str)
    )
    (given.out / f"private_step{suffix}.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
