"""A fingerprint of the frozen base, on which server and clients must agree."""

import hashlib
import json
from collections.abc import Collection

import torch
from torch import nn

# these say where a model came from or what its head is called, not what it computes
_VOLATILE = {
    "_name_or_path",
    "architectures",
    "dtype",
    "id2label",
    "label2id",
    "num_labels",
    "pad_token_id",
    "problem_type",
    "torch_dtype",
    "transformers_version",
    "use_cache",
}


def fingerprint(model: nn.Module, heads: Collection[str] = ()) -> str:
    """SHA-256 over configuration, and name, dtype, shape and bytes of every weight.

    Args:
        model: a plain transformers model, before any adapter is attached.
        heads: modules left out, because training replaces them.
    """
    sha = hashlib.sha256()
    config = getattr(model, "config", None)
    if config is not None:
        values = {
            key: value
            for key, value in config.to_diff_dict().items()
            if key not in _VOLATILE and "drop" not in key
        }
        sha.update(json.dumps(values, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.state_dict().items()):
        if any(name.startswith(head + ".") for head in heads):
            continue
        tensor = tensor.detach().cpu().contiguous()
        sha.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()
