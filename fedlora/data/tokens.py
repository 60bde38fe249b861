"""What single tokens are: the bytes they stand for, and those a tokenizer puts around text."""

import json
from typing import Any

import torch
from torch import Tensor


def token_bytes(tokenizer: Any) -> Tensor:
    """UTF-8 bytes of text that each token stands for, (vocabulary,) int64; 0 for special tokens.

    Read from the token's own spelling: byte-level BPE writes one character per byte,
    sentencepiece writes a space as "▁" and a lone byte as "<0xAB>", wordpiece marks the rest of
    a word with "##" (and its spaces are in no token).
    """
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    added = tokenizer.added_tokens_decoder
    kinds = _decoder_kinds(tokenizer)
    byte_level = "ByteLevel" in kinds or "Ġ" in vocabulary
    word_piece = "WordPiece" in kinds or (not kinds and "##s" in vocabulary)
    sizes = torch.zeros(max(vocabulary.values()) + 1, dtype=torch.int64)
    for token, number in vocabulary.items():
        if number in added:
            size = 0 if added[number].special else len(token.encode())
        elif byte_level:
            size = sum(1 if c in _BYTE_SYMBOLS else len(c.encode()) for c in token)
        elif len(token) == 6 and token.startswith("<0x") and token.endswith(">"):
            size = 1
        elif word_piece:
            size = len(token.removeprefix("##").encode())
        else:
            size = len(token.replace("▁", " ").encode())
        sizes[number] = size
    special = [number for number in tokenizer.all_special_ids if number < len(sizes)]
    sizes[special] = 0
    return sizes


def prefix_ids(tokenizer: Any) -> list[int]:
    """The special tokens that the tokenizer puts before every text, such as the start token."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    full = tokenizer("a")["input_ids"]
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return list(full[:start])
    return []


def tokenise(tokenizer: Any, texts: list[str]) -> list[list[int]]:
    """Token ids of each text alone, without special tokens around it and without a cut."""
    if not texts:
        return []
    # quiet: longer than the model allows is all right here, the caller cuts
    encoded = tokenizer(
        texts,
        add_special_tokens=False,
        return_attention_mask=False,
        return_token_type_ids=False,
        verbose=False,
    )
    ids: list[list[int]] = encoded["input_ids"]
    return ids


def _decoder_kinds(tokenizer: Any) -> frozenset[str]:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return frozenset()
    decoder = json.loads(backend.to_str()).get("decoder") or {}
    return frozenset(part["type"] for part in [decoder, *decoder.get("decoders", [])] if part)


def _byte_symbols() -> frozenset[str]:
    # GPT-2's alphabet: printable Latin-1 bytes stand for themselves, the others for U+0100 on
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    return frozenset(map(chr, [*printable, *range(0x100, 0x100 + 256 - len(printable))]))


_BYTE_SYMBOLS = _byte_symbols()
