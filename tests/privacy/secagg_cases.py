"""Sessions driven from one place, as a network without faults would, and faults put into it."""

import random
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg import client as client_module
from fedlora.privacy.secagg import server as server_module
from fedlora.privacy.secagg.masks import entry_type
from fedlora.privacy.secagg.quantise import vector_size
from fedlora.privacy.secagg.session import Part, Session
from fedlora.privacy.secagg.signed import SignedSets

STEPS = ("advert", "boxes", "masked", "signature", "reveal")


def names(n):
    return tuple(f"client-{i:02d}" for i in range(n))


def make_session(n=4, threshold=None, bits=64, sizes=(5, 2), clip=1.0, **changes):
    fields = {
        "run": "run",
        "round": 3,
        "attempt": 0,
        "work_sha256": "ab" * 32,
        "clients": names(n),
        "threshold": threshold or n // 2 + 1,
        "bits": bits,
        "parts": tuple(Part(f"t{i}", size, clip) for i, size in enumerate(sizes)),
    }
    return Session(**{**fields, **changes})


def identities(clients, seed=0):
    draws = random.Random(f"identity {seed}")
    return {name: Ed25519PrivateKey.from_private_bytes(draws.randbytes(32)) for name in clients}


def roster_of(keys):
    return {name: key.public_key().public_bytes_raw() for name, key in keys.items()}


def vectors_for(session, seed=0):
    draws = np.random.default_rng(seed)
    kind = entry_type(session.bits)
    return {
        name: draws.integers(0, 2**session.bits, vector_size(session), kind)
        for name in session.clients
    }


@dataclass
class Drive:
    """One session from end to end.

    `gone` maps a step to the clients that fall silent from it on; `twist` may change any
    message, of a client (step, client, bytes) or of the server ("to " + step, client, bytes).
    """

    session: Session
    gone: dict = field(default_factory=dict)
    weights: dict = field(default_factory=dict)
    vectors: dict = None
    twist: object = None
    seed: object = 0
    signed: dict = None
    keys: dict = None

    def __post_init__(self):
        session = self.session
        self.keys = self.keys or identities(session.clients)
        self.vectors = self.vectors or vectors_for(session)
        self.signed = self.signed or {name: SignedSets() for name in session.clients}
        self.server = server_module.SecureServer(session, roster_of(self.keys), 2**40)
        self.clients = {
            name: client_module.SecureClient(
                session,
                name,
                self.keys[name],
                roster_of(self.keys),
                weight=self.weights.get(name, 1),
                signed=self.signed[name],
                entropy=random.Random(f"{self.seed} {name}").randbytes,
            )
            for name in session.clients
        }
        self.here = list(session.clients)
        self.sent = {step: {} for step in STEPS}
        self.refused = {}

    def step(self, step, call, take):
        """Each client that is still here answers; those that refuse, or are refused, are gone."""
        self.here = [name for name in self.here if name not in self.gone.get(step, ())]
        for name in list(self.here):
            try:
                data = call(self.clients[name], name)
                data = self.twist(step, name, data) if self.twist else data
                self.sent[step][name] = data
                take(name, data)
            except SecureAggregationError as e:
                self.refused[name] = e
                self.here.remove(name)

    def told(self, step, name, data):
        return self.twist(f"to {step}", name, data) if self.twist else data

    def run(self):
        server = self.server
        self.step("advert", lambda c, n: c.advertise(), server.take_advert)
        keys = server.close_adverts()
        self.step("boxes", lambda c, n: c.share(self.told("boxes", n, keys)), server.take_boxes)
        shares = server.close_boxes()
        self.step(
            "masked",
            lambda c, n: c.masked_input(self.told("masked", n, shares[n]), self.vectors[n]),
            server.take_masked,
        )
        survivors = server.close_masked()
        self.step(
            "signature",
            lambda c, n: c.sign(self.told("signature", n, survivors)),
            server.take_signature,
        )
        signatures = server.close_signatures()
        self.step(
            "reveal",
            lambda c, n: c.reveal(self.told("reveal", n, signatures)),
            server.take_reveal,
        )
        return server.close_reveals()

    def plain_sum(self, survivors):
        total = np.zeros(vector_size(self.session), entry_type(self.session.bits))
        for name in survivors:
            total = total + self.vectors[name]
        return total
