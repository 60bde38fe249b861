"""The only door from a client's bytes to aggregation.

Checks run in order of cost, and each failure rejects that client's update alone, with a
typed reason. What passes has exactly the expected tensors, finite, within the norm cap, and
a weight within bounds.
"""

import math
from dataclasses import dataclass

import torch

from fedlora.adapter import AdapterSpec, AdapterState
from fedlora.adapters.slots import packed_shapes, unpack
from fedlora.config.privacy import PrivacySection
from fedlora.errors import AdapterError, CodeError, UpdateRejected
from fedlora.messages import CONTROL, PLAIN, ClientUpdate, Coding, PrivacyStatement
from fedlora.wire import Shapes, coded_layout, decode_coded, decode_update_manifest, sha256

NOISES = ("os", "secure", "test")


@dataclass(frozen=True)
class Expectation:
    """What one client's reply in one round must be.

    Attributes:
        shapes: of every tensor at full rank, control variates included.
        slots: most rank slots the reply may hold; 0 when all must be there.
        factors: factors that are sent.
        coding: how the tensors are coded.
        entry: last entry of the client's privacy ledger that is known.
    """

    run: str
    round: int
    attempt: int
    client: str
    start: AdapterState
    start_sha256: str
    spec: AdapterSpec
    spec_digest: str
    shapes: Shapes
    size_bytes: int
    slots: int = 0
    factors: tuple[str, ...] = ()
    coding: Coding = PLAIN
    entry: int = 0


@dataclass(frozen=True)
class Demand:
    """Record-level privacy that a run demands of every update.

    Attributes:
        epsilon: most that a client may have spent in the run; None leaves it to the client.
        delta: largest delta; None leaves it to the client.
        test_noise: noise that others can draw again is taken, for a run that promises nothing.
    """

    epsilon: float | None = None
    delta: float | None = None
    test_noise: bool = False


@dataclass(frozen=True)
class Limits:
    """Bounds on what a well-formed update may claim.

    Attributes:
        max_update_norm: L2 norm over all tensors of the delta.
        max_examples: examples a client may claim.
        uniform: every admitted update weighs 1, whatever it claims.
        privacy: what it must say of its privacy; None when nothing is demanded.
    """

    max_update_norm: float
    max_examples: float
    uniform: bool = False
    privacy: Demand | None = None


def demand_of(privacy: PrivacySection | None) -> Demand | None:
    """What a job demands that every update says of its privacy."""
    if privacy is None or privacy.unit != "record":
        return None
    return Demand(privacy.epsilon, privacy.delta, test_noise=privacy.noise == "test")


def expected_size(shapes: Shapes, coding: Coding = PLAIN) -> int:
    """Bytes of the canonical payload for float32 tensors of `shapes`, coded."""
    return coded_layout(shapes, coding).total


def admit(manifest: bytes, payload: bytes, expected: Expectation, limits: Limits) -> ClientUpdate:
    """The update in these bytes.

    Raises:
        UpdateRejected: with one of the codes MANIFEST, CLIENT, STALE, SPEC, SIZE, DIGEST,
            PRIVACY, SLOTS, HEADER, CODE, NOT_FINITE, NORM, WEIGHT.
    """
    client = expected.client

    def reject(code: str, detail: str) -> UpdateRejected:
        return UpdateRejected(client, code, detail)

    fits = (
        len(payload) <= expected.size_bytes
        if expected.slots
        else (len(payload) == expected.size_bytes)
    )
    if not fits:
        raise reject("SIZE", f"payload has {len(payload)} bytes; expected {expected.size_bytes}")
    try:
        fields = decode_update_manifest(manifest)
    except AdapterError as e:
        raise reject("MANIFEST", str(e)) from e
    if fields["client"] != client:
        raise reject("CLIENT", f"manifest names client {fields['client'][:64]!r}")
    for key in ("run", "round", "attempt", "start_sha256"):
        if fields[key] != getattr(expected, key):
            found = repr(fields[key])[:80]
            raise reject("STALE", f"{key} is {found}; expected {getattr(expected, key)!r}")
    if fields["base_fingerprint"] != expected.spec.base_fingerprint:
        raise reject("SPEC", "the client trained on another base model")
    if fields["spec"] != expected.spec_digest:
        raise reject("SPEC", "the client trained another adapter (method, rank, layers or basis)")
    if fields["size_bytes"] != len(payload) or fields["sha256"] != sha256(payload):
        raise reject("DIGEST", "payload does not match the digest its manifest names")
    if why := _not_private(fields["privacy"], limits.privacy, expected.entry):
        raise reject("PRIVACY", why)
    masks = fields["slots"]
    if why := _misfit(masks, expected):
        raise reject("SLOTS", why)
    try:
        if masks is None:
            tensors = decode_coded(payload, expected.shapes, expected.coding)
        else:
            shapes = packed_shapes(expected.spec, expected.factors, masks)
            packed = decode_coded(payload, shapes, expected.coding)
            tensors = unpack(packed, expected.spec, expected.factors, masks)
    except CodeError as e:
        raise reject("CODE", str(e)) from e
    except AdapterError as e:
        raise reject("HEADER", str(e)) from e
    squares = 0.0
    for name, tensor in tensors.items():
        square = float(torch.sum(tensor.double() ** 2))
        # a finite float32 tensor has a finite float64 norm, so one pass answers both
        if not math.isfinite(square):
            raise reject("NOT_FINITE", f"{name} holds NaN or infinity")
        squares += square
    if math.sqrt(squares) > limits.max_update_norm:
        raise reject(
            "NORM",
            f"L2 norm of the delta is {math.sqrt(squares):.4g}; federation.max_update_norm is "
            f"{limits.max_update_norm:g}",
        )
    examples = float(fields["num_examples"])
    if not 0 < examples <= limits.max_examples:
        raise reject(
            "WEIGHT", f"num_examples is {examples:g}; expected 0 < n <= {limits.max_examples:g}"
        )
    return ClientUpdate(
        run=expected.run,
        round=expected.round,
        attempt=expected.attempt,
        client=client,
        start_sha256=expected.start_sha256,
        delta=AdapterState(
            expected.spec, {k: t for k, t in tensors.items() if not k.startswith(CONTROL)}
        ),
        num_examples=examples,
        metrics=fields["metrics"],
        control={k.removeprefix(CONTROL): t for k, t in tensors.items() if k.startswith(CONTROL)},
        slots=masks,
        privacy=fields["privacy"],
        start=expected.start,
        weight=1.0 if limits.uniform else examples,
    )


def _not_private(found: PrivacyStatement | None, demand: Demand | None, known_entry: int) -> str:
    """Why a privacy statement is not what the run demands; empty when it is."""
    if demand is None:
        return ""
    if found is None:
        return "the update says nothing of its privacy, which the run demands; update the client"
    if found.unit != "record":
        return f"the update is private to one {found.unit}; the run demands one record"
    if found.noise not in NOISES or (found.epsilon is None) != (found.noise == "test"):
        return f"epsilon = {found.epsilon} does not go with noise = {found.noise!r}"
    if found.noise == "test" and not demand.test_noise:
        return 'the client used noise = "test", which others can draw again; use "os" or "secure"'
    if found.epsilon is not None and demand.epsilon and found.epsilon > demand.epsilon:
        return f"epsilon is {found.epsilon:.6g}; the run's budget is {demand.epsilon:g}"
    if demand.delta is not None and found.delta > demand.delta:
        return f"delta is {found.delta:g}; the run demands at most {demand.delta:g}"
    if found.entry < known_entry:
        return (
            f"the client's privacy ledger ends with entry {found.entry}, but had reached "
            f"{known_entry}: it was rolled back; restore it"
        )
    return ""


def _misfit(masks: tuple[int, ...] | None, expected: Expectation) -> str:
    """Why the slots of a reply are not those it may send; empty when they are."""
    if (masks is not None) != bool(expected.slots):
        return "names no rank slots" if masks is None else "names rank slots without being asked"
    if masks is None:
        return ""
    layers = expected.spec.layers
    if len(masks) != len(layers):
        return f"{len(masks)} slot masks; expected one for each of {len(layers)} layers"
    for mask, layer in zip(masks, layers, strict=True):
        if mask >> layer.rank:
            return f"layer {layer.name} has rank {layer.rank}, its slot mask is {mask:x}"
    count = sum(mask.bit_count() for mask in masks)
    return f"{count} slots; expected at most {expected.slots}" if count > expected.slots else ""
