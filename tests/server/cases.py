"""One small adapter and what a server expects of one client's update to it."""

import json
from dataclasses import replace

import torch

from fedlora.adapter import AdapterSpec, AdapterState, LayerSpec, tensors_digest, trained_shapes
from fedlora.adapters import METHODS
from fedlora.messages import ClientUpdate
from fedlora.server.admission import Expectation, expected_size
from fedlora.wire import encode_json, encode_tensors, encode_update, sha256

LAYERS = {"p": (6, 5), "q": (4, 7)}


def draws(seed):
    return torch.Generator().manual_seed(seed)


def randn(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, generator=draws(seed), dtype=torch.float64).to(dtype)


def make_spec(method="lora", rank=2, heads=True, scale=2.0, **options):
    """A spec with two layers of other shapes and, if wanted, one head."""
    layers = METHODS[method].plan(
        LAYERS, rank, rank * scale, METHODS[method].check_options(options)
    )
    head_shapes = {"head.weight": (3, 2), "head.bias": (3,)} if heads else {}
    return AdapterSpec(
        method, rank, rank * scale, layers, ("head",) if heads else (), head_shapes, "base", 0
    )


def with_basis(spec, seed=5):
    """(spec, basis): random frozen tensors of the right shapes, for methods with a basis."""
    shapes = dict(METHODS[spec.method].basis_shapes(spec.layers))
    if spec.method == "vera":
        shapes = {"shared.A": (spec.rank, 7), "shared.B": (6, spec.rank)}
    basis = {name: randn(*shape, seed=seed + i) for i, (name, shape) in enumerate(shapes.items())}
    return replace(spec, basis_digest=tensors_digest(basis)), basis


def random_state(spec, seed=0, size=0.5, dtype=torch.float32):
    shapes = trained_shapes(spec, METHODS[spec.method])
    return AdapterState(
        spec,
        {
            k: size * randn(*v, seed=seed * 1000 + i, dtype=dtype)
            for i, (k, v) in enumerate(shapes.items())
        },
    )


def expectation(spec=None, factors=None, client="ann"):
    spec = spec or make_spec()
    shapes = trained_shapes(spec, METHODS[spec.method], factors)
    return Expectation(
        run="run",
        round=3,
        attempt=1,
        client=client,
        start=random_state(spec),
        start_sha256="start",
        spec=spec,
        spec_digest=spec.digest(),
        shapes=shapes,
        size_bytes=expected_size(shapes),
    )


def honest(expected, seed=1, num_examples=10.0, size=0.1):
    """A client's update that keeps to the protocol."""
    delta = {
        k: size * randn(*v, seed=seed * 77 + i) for i, (k, v) in enumerate(expected.shapes.items())
    }
    return ClientUpdate(
        run=expected.run,
        round=expected.round,
        attempt=expected.attempt,
        client=expected.client,
        start_sha256=expected.start_sha256,
        delta=AdapterState(expected.spec, delta),
        num_examples=num_examples,
        metrics={"train_loss": 1.5},
    )


def encoded(update, tensors=None, **fields):
    """(manifest, payload), with other tensors or other manifest fields if given."""
    manifest, payload = encode_update(update)
    value = json.loads(manifest)
    if tensors is not None:
        payload = encode_tensors(tensors)
        value |= {"size_bytes": len(payload), "sha256": sha256(payload)}
    return encode_json(value | fields), payload


def layer_of(name, d, k, rank, scale=1.0, tile=0):
    return LayerSpec(name, d, k, rank, scale, tile)
