"""Make the builtin model ``tiny_llama``: a byte-level Llama small enough to ship and to test with.

``python -m fedlora.models.pretrain_tiny_llama [--steps N] [--out DIR]`` trains it from nothing on
the part of the standard library that no federation reads (``fedlora.data.stdlib.PRETRAINING``),
so that fine-tuning on the other part starts from a model that knows Python but not that text.
"""

import argparse
import math
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import fmean

import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from torch.nn import functional as F
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
)

from fedlora.data.stdlib import StdlibFile, federated_files, pretraining_files
from fedlora.errors import DataError
from fedlora.seeds import generator

OUT = Path(__file__).parent / "tiny_llama"
STEPS = 3600  # 13 minutes on one core of 2023
SEED = 0

PAD, BOS, EOS = 256, 257, 258
VOCAB = 259
CONTEXT = 512
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '### ' + message['role'] + '\\n' }}"
    "{% if message['role'] == 'assistant' %}"
    "{% generation %}{{ message['content'] + eos_token }}{% endgeneration %}{{ '\\n' }}"
    "{% else %}"
    "{{ message['content'] + '\\n' }}"
    "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant\\n' }}{% endif %}"
)

BLOCK = 256
STEP_TOKENS = 8 * BLOCK
LONG_SHARE = 0.1  # the last steps see whole contexts, or positions past BLOCK would be untrained
PEAK_RATE = 4e-3
WARMUP_SHARE = 0.04
FINAL_RATE_SHARE = 0.02
BETAS = (0.9, 0.98)
WEIGHT_DECAY = 0.1
CLIP_NORM = 1.0
HELD_OUT_BLOCKS = 64
LOG_EVERY = 50


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The byte tokenizer: token id = byte of the UTF-8 text, 256..258 = ``<pad> <bos> <eos>``.

    It adds no special token by itself and gives back every text exactly; the chat template marks
    the assistant's turns for ``return_assistant_tokens_mask``.
    """
    vocab = {symbol: byte for byte, symbol in enumerate(_byte_symbols())}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    # The splitting regex only limits merges; there are none.
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in ("<pad>", "<bos>", "<eos>")]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def _byte_symbols() -> list[str]:
    # GPT-2's printable stand-ins for bytes, which the ByteLevel steps speak.
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    symbols |= {byte: chr(256 + place) for place, byte in enumerate(others)}
    return [symbols[byte] for byte in range(256)]


def build_model(seed: int = SEED) -> LlamaForCausalLM:
    """A fresh float32 model of 0.8 M parameters; the same bits for the same seed."""
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=128,
        intermediate_size=344,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=CONTEXT,
        # About 1 / sqrt(hidden_size); the default of large models learns far slower at this size.
        initializer_range=0.06,
        tie_word_embeddings=True,
        pad_token_id=PAD,
        bos_token_id=BOS,
        eos_token_id=EOS,
    )
    # Initialisation draws from torch's global stream; leave the caller's as it was.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return LlamaForCausalLM(config)


def encode_files(files: Sequence[StdlibFile]) -> torch.Tensor:
    """Token ids of all files in a row, int64 of shape (tokens,), each ``<bos> bytes <eos>``."""
    ids: list[int] = []
    for file in files:
        ids += [BOS, *file.text.encode(), EOS]
    return torch.tensor(ids)


def batches(stream: torch.Tensor, block: int, rng: torch.Generator) -> Iterator[torch.Tensor]:
    """Endless batches of shape (STEP_TOKENS // block, block) cut from the stream.

    Each pass covers the stream once, in a fresh order and cut at fresh places.

    Raises:
        DataError: the stream is too short for one batch at every place it may be cut.
    """
    size = STEP_TOKENS // block
    if len(stream) < STEP_TOKENS + block:
        raise DataError(
            f"pretraining text has {len(stream)} tokens; expected at least {STEP_TOKENS + block}. "
            "Use a Python installed with its whole standard library as .py files."
        )
    while True:
        start = int(torch.randint(block, (1,), generator=rng))
        rows = stream[start:][: (len(stream) - start) // block * block].view(-1, block)
        order = torch.randperm(len(rows), generator=rng)
        for first in range(0, len(rows) - size + 1, size):
            yield rows[order[first : first + size]]


def next_byte_loss(model: LlamaForCausalLM, ids: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of every token but the first given those before it, in nats.

    Args:
        model: the model.
        ids: token ids of shape (rows, tokens) without padding.
    """
    logits = model(input_ids=ids).logits[:, :-1].float()
    return F.cross_entropy(logits.reshape(-1, logits.shape[-1]), ids[:, 1:].reshape(-1))


@torch.no_grad()
def held_out_bits(model: LlamaForCausalLM) -> dict[str, float]:
    """Bits per byte in each federated area, on blocks spread evenly over its text.

    Raises:
        DataError: an area of the standard library has no source files.
    """
    model.eval()
    areas: dict[str, bytes] = {}
    for file in federated_files():
        areas[file.area] = areas.get(file.area, b"") + file.text.encode()
    bits: dict[str, float] = {}
    for area, text in areas.items():
        stream = torch.tensor(list(text))
        starts = torch.linspace(0, len(stream) - BLOCK, HELD_OUT_BLOCKS).long()
        rows = torch.stack([stream[start : start + BLOCK] for start in starts.tolist()])
        losses = [float(next_byte_loss(model, chunk)) for chunk in torch.split(rows, 8)]
        bits[area] = fmean(losses) / math.log(2)
    return bits


def learning_rate(step: int, steps: int) -> float:
    """Rate of one step: linear warm-up to PEAK_RATE, then a cosine to FINAL_RATE_SHARE of it."""
    warmup = max(1, round(steps * WARMUP_SHARE))
    if step < warmup:
        return PEAK_RATE * (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2
    return PEAK_RATE * (FINAL_RATE_SHARE + (1 - FINAL_RATE_SHARE) * cosine)


def pretrain(
    model: LlamaForCausalLM,
    stream: torch.Tensor,
    steps: int,
    seed: int = SEED,
    log: Callable[[str], None] = print,
) -> None:
    """Train the model in place on next-byte prediction.

    Args:
        model: a float32 model on the CPU.
        stream: token ids, int64 of shape (tokens,).
        steps: optimiser steps of STEP_TOKENS tokens each.
        seed: of the order in which text is seen.
        log: called with a line of progress every LOG_EVERY steps, losses in bits per byte.

    Raises:
        DataError: the stream is shorter than STEP_TOKENS and a context.
    """
    model.train()
    matrices = [weight for weight in model.parameters() if weight.ndim > 1]
    vectors = [weight for weight in model.parameters() if weight.ndim == 1]
    groups = [
        {"params": matrices, "weight_decay": WEIGHT_DECAY},
        {"params": vectors, "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATE, betas=BETAS)
    short = batches(stream, BLOCK, generator(seed, "pretrain", BLOCK))
    long = batches(stream, CONTEXT, generator(seed, "pretrain", CONTEXT))
    long_from = steps - round(steps * LONG_SHARE)
    recent: list[float] = []
    started = time.monotonic()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps)
        loss = next_byte_loss(model, next(short if step < long_from else long))
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
        optimizer.step()
        optimizer.zero_grad()
        recent.append(float(loss.detach()) / math.log(2))
        if len(recent) == LOG_EVERY or step + 1 == steps:
            elapsed = time.monotonic() - started
            log(f"step {step + 1}/{steps}  {fmean(recent):.3f} bits/byte  {elapsed:.0f} s")
            recent.clear()


def save(model: LlamaForCausalLM, out: Path) -> None:
    """Write model (bfloat16) and tokenizer to the folder, made if missing; casts the model."""
    out.mkdir(parents=True, exist_ok=True)
    model.to(torch.bfloat16)
    model.generation_config = GenerationConfig(pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS)
    model.save_pretrained(out)
    build_tokenizer().save_pretrained(out, save_jinja_files=False)


def main(arguments: Sequence[str] | None = None) -> None:
    """Pretrain, report held-out bits per byte before and after, and write the folder.

    Raises:
        DataError: this Python has no standard library sources.
    """
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--steps", type=int, default=STEPS, help="steps (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=OUT, help="folder (default: %(default)s)")
    options = parser.parse_args(arguments)

    torch.set_num_threads(1)  # the order of additions, hence every bit, hangs on the thread count
    files = pretraining_files()
    stream = encode_files(files)
    model = build_model()
    parameters = sum(weight.numel() for weight in model.parameters())
    print(f"{parameters:,} parameters; {len(stream):,} bytes of text in {len(files)} files")
    before = held_out_bits(model)
    pretrain(model, stream, options.steps, log=lambda line: print(line, flush=True))
    save(model, options.out)
    shipped = AutoModelForCausalLM.from_pretrained(options.out, dtype=torch.float32)
    after = held_out_bits(shipped)
    print("held-out bits/byte, before and after:")
    for area, bits in after.items():
        print(f"  {area:<12} {before[area]:.3f} {bits:.3f}")
    print(f"  {'mean':<12} {fmean(before.values()):.3f} {fmean(after.values()):.3f}")
    size = sum(path.stat().st_size for path in options.out.iterdir())
    print(f"{size:,} bytes written to {options.out}")


if __name__ == "__main__":
    main()
