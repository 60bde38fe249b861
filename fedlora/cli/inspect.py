"""`fedlora inspect`"""

import json
from pathlib import Path
from typing import Any

import typer

from fedlora.errors import AdapterError


def run_inspect(path: Path, *, as_json: bool) -> None:
    """Prints what a folder or file is.

    Raises:
        AdapterError: nothing that fedlora knows.
        LedgerError: a privacy ledger that is not whole.
    """
    if (path / "HEAD").is_file():
        found = _run(path)
    elif (path / "adapter_config.json").is_file():
        found = _adapter(path)
    elif (path / "ledger").is_file() and (path / "head").is_file():
        found = _ledger(path)
    elif path.is_file() and path.suffix in (".safetensors", ".delta"):
        found = _tensor_file(path)
    else:
        raise AdapterError(
            f"{path} is not a run folder, an adapter folder, a ledger or a .safetensors file"
        )
    if as_json:
        typer.echo(json.dumps(found))
        return
    for key, value in found.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else value
        typer.echo(f"{key.replace('_', ' '):<20} {text}")


def _run(path: Path) -> dict[str, Any]:
    from fedlora.checkpoint import RunStore
    from fedlora.config.load import load_job
    from fedlora.server.results import is_finished

    job = load_job(path / "job.toml")
    store = RunStore.open(path, job.digest(), locked=False)
    try:
        committed = store.load()
    finally:
        store.close()
    rounds = [e for e in committed.record["events"] if e["event"] == "round"]
    return {
        "kind": "run",
        "name": job.run.name,
        "model": job.model.name,
        "method": job.adapter.method,
        "strategy": job.federation.strategy,
        "round": committed.round,
        "rounds": job.federation.rounds,
        "finished": is_finished(path),
        "fallback": store.fallback,
        "eval": rounds[-1]["eval"] if rounds else {},
        "adapter_sha256": rounds[-1]["adapter_sha256"] if rounds else None,
    }


def _ledger(path: Path) -> dict[str, Any]:
    from fedlora.cli.privacy_ledger import describe

    found = describe(path)
    total = found["total"]
    return {
        **{key: found[key] for key in ("kind", "dataset", "unit", "adjacency", "created")},
        **{key: found[key] for key in ("entries", "whole", "torn_tail", "follows")},
        "head_sha256": found["head"]["sha256"],
        "runs": list(found["runs"]),
        "epsilon_rdp": total["rdp"],
        "epsilon_prv": total["prv"],
        "delta": total["delta"],
        "budget_epsilon": total["budget"],
    }


def _adapter(path: Path) -> dict[str, Any]:
    try:
        config = json.loads((path / "adapter_config.json").read_text("utf-8"))
    except (OSError, ValueError) as e:
        raise AdapterError(f"{path}/adapter_config.json is not readable: {e}") from e
    if isinstance(config, dict) and "peft_type" in config:
        return {"kind": "adapter in PEFT format", **_summary(config), **_weights(path)}
    from fedlora.adapters.files import load_adapter

    adapter = load_adapter(path)
    spec = adapter.spec
    return {
        "kind": "adapter",
        "method": spec.method,
        "rank": spec.rank,
        "alpha": spec.alpha,
        "layers": len(spec.layers),
        "heads": list(spec.heads),
        "num_trained": sum(t.numel() for t in adapter.tensors.values()),
        "base_model": adapter.base_model,
        "base_fingerprint": spec.base_fingerprint,
        "task": adapter.task,
        "labels": list(adapter.labels),
        "norm_l2": _norm(adapter.tensors),
    }


def _summary(config: dict[str, Any]) -> dict[str, Any]:
    keys = ("peft_type", "r", "lora_alpha", "use_rslora", "use_dora", "base_model_name_or_path")
    return {key: config[key] for key in keys if config.get(key) is not None}


def _weights(path: Path) -> dict[str, Any]:
    weights = path / "adapter_model.safetensors"
    return _tensor_file(weights, kind=False) if weights.is_file() else {}


def _tensor_file(path: Path, *, kind: bool = True) -> dict[str, Any]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        tensors = load_file(path)
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as e:
        raise AdapterError(f"{path} is not a readable safetensors file: {e}") from e
    shapes = [f"{name} {tuple(t.shape)} {str(t.dtype)[6:]}" for name, t in tensors.items()]
    return {
        **({"kind": "safetensors file"} if kind else {}),
        "tensors": len(tensors),
        "numbers": sum(t.numel() for t in tensors.values()),
        "size_bytes": path.stat().st_size,
        "norm_l2": _norm(tensors),
        "finite": all(bool(t.isfinite().all()) for t in tensors.values()),
        "shapes": shapes[:20],
    }


def _norm(tensors: Any) -> float:
    return float(sum(float((t.double() ** 2).sum()) for t in tensors.values()) ** 0.5)
