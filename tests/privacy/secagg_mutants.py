"""Broken variants of secure aggregation, as they occur in practice; the oracles kill each.

A mutant puts other functions into the modules that it breaks, through pytest's monkeypatch.
"""

import numpy as np

from fedlora.privacy.secagg import client, masks, messages, quantise, server, shamir, signed


def keys_of_28_bits(patch):
    """The entropy of flower's SecAgg+ masks, https://github.com/adap/flower/issues/7522."""
    true = masks.derived

    def weak(session, secret, *rest):
        folded = int.from_bytes(secret, "big") & (2**28 - 1)
        return true(session, folded.to_bytes(32, "big"), *rest)

    patch.setattr(masks, "derived", weak)


def no_self_mask(patch):
    def nothing(session, seed, index, size):
        return np.zeros(size, masks.entry_type(session.bits))

    patch.setattr(client, "self_mask", nothing)
    patch.setattr(server, "self_mask", nothing)


def one_key_for_all_sessions(patch):
    """As long as the same two clients talk, the same key and counter."""

    def constant(session, secret, kind, *pieces):
        return masks.HKDF(masks.SHA256(), 32, salt=None, info=kind.encode()).derive(secret)

    patch.setattr(masks, "derived", constant)


def same_mask_for_every_pair(patch):
    true = masks.pair_mask
    for module in (client, server, masks):
        patch.setattr(module, "pair_mask", lambda s, k, low, high, n: true(s, k, b"", b"", n))


def mask_that_misses_a_bit(patch):
    """Masks of 31 bits, as of a generator of non-negative int32."""
    true = masks.stream

    def short(key, size, bits):
        return true(key, size, bits) & masks.entry_type(bits).type(2 ** (bits - 1) - 1)

    patch.setattr(masks, "stream", short)


def mask_with_one_sign(patch):
    """Both of a pair add, so that nothing cancels."""
    true = client.pair_mask

    def flipped(session, secret, low, high, size):
        mask = true(session, secret, low, high, size)
        return mask if low < high else -mask

    patch.setattr(client, "pair_mask", flipped)


def unsigned_keys_accepted(patch):
    patch.setattr(messages, "verify", lambda *_: None)


def keys_signed_without_their_session(patch):
    patch.setattr(messages, "_advert_statement", lambda session, name, body: name.encode() + body)


def keys_signed_without_their_client(patch):
    patch.setattr(
        messages, "_advert_statement", lambda session, name, body: session.statement("advert", body)
    )
    # with one identity for all, as when a site is not told apart by its key
    true = messages.verify

    def any_client(roster, name, signature, statement):
        for other in roster:
            try:
                return true(roster, other, signature, statement)
            except Exception:
                continue
        raise messages.SecureAggregationError("of nobody", name)

    patch.setattr(messages, "verify", any_client)


def threshold_less_one(patch):
    true = shamir.split
    for module in (shamir, client):
        patch.setattr(
            module, "split", lambda secret, t, points, entropy: true(secret, t - 1, points, entropy)
        )


def no_consistency_check(patch):
    patch.setattr(client, "verify", lambda *_: None)


def signatures_not_counted(patch):
    true = client.at_least

    def lenient(session, found, what):
        if "signed" not in what:
            true(session, found, what)

    patch.setattr(client, "at_least", lenient)


def several_sums_of_a_round(patch):
    patch.setattr(signed.SignedSets, "sign", lambda *_: None)


def modulus_wraps(patch):
    """Levels for one client, not for the sum of all."""
    true = quantise.Quantiser.__init__

    def alone(self, session, total_weight):
        true(self, session, total_weight)
        self.levels = min(quantise.MAX_LEVELS, 2 ** (session.bits - 1) - 1)

    patch.setattr(quantise.Quantiser, "__init__", alone)
    patch.setattr(quantise, "MAX_LEVELS", 2**62)


def rounds_down(patch):
    patch.setattr(quantise.torch, "rand", lambda size, **kind: quantise.torch.zeros(size))


def steps_may_be_repeated(patch):
    patch.setattr(client.SecureClient, "_next", lambda self, step: None)


def boxes_not_authenticated(patch):
    class Counter:
        """AES in counter mode with the same interface, and a tag that nobody reads."""

        def __init__(self, key):
            self.key = key

        def encrypt(self, nonce, data, _):
            cipher = masks.Cipher(masks.AES256(self.key), masks.CTR(bytes(16))).encryptor()
            return cipher.update(data) + bytes(16)

        def decrypt(self, nonce, data, _):
            return self.encrypt(nonce, data[:-16], None)[:-16]

    patch.setattr(client, "AESGCM", Counter)


def seed_not_compared(patch):
    class Anything:
        def __ne__(self, other):
            return False

    patch.setattr(server, "commitment", lambda session, seed: Anything())


MUTANTS = [
    keys_of_28_bits,
    no_self_mask,
    one_key_for_all_sessions,
    same_mask_for_every_pair,
    mask_that_misses_a_bit,
    mask_with_one_sign,
    unsigned_keys_accepted,
    keys_signed_without_their_session,
    keys_signed_without_their_client,
    threshold_less_one,
    no_consistency_check,
    signatures_not_counted,
    several_sums_of_a_round,
    modulus_wraps,
    rounds_down,
    steps_may_be_repeated,
    boxes_not_authenticated,
    seed_not_compared,
]
