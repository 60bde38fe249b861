"""What must hold of secure aggregation; each oracle raises AssertionError where it does not."""

import random

import numpy as np
import torch
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg import masks, quantise, shamir
from fedlora.privacy.secagg.layout import members
from fedlora.privacy.secagg.messages import ADVERT_BYTES
from fedlora.privacy.secagg.signed import SignedSets
from tests.privacy.secagg_cases import Drive, identities, make_session, names

SECRET = bytes(range(32))
LOW, HIGH = b"l" * 32, b"h" * 32


def refused(call, *arguments):
    """The error with which a message is refused; a message that is taken fails the oracle."""
    try:
        call(*arguments)
    except SecureAggregationError as e:
        return e
    raise AssertionError("was taken, not refused")


def sum_is_exact():
    for bits in (32, 64):
        gone = {"masked": ["client-02", "client-05"], "reveal": ["client-04"]}
        drive = Drive(make_session(7, 4, bits), gone=gone)
        total = drive.run()
        assert not drive.refused
        assert np.array_equal(total.vector, drive.plain_sum(total.survivors))
        assert set(total.survivors) == set(names(7)) - {"client-02", "client-05"}


def every_bit_of_a_secret_counts():
    session = make_session()
    kinds = {
        "pair": lambda secret: masks.pair_mask(session, secret, LOW, HIGH, 8),
        "self": lambda secret: masks.self_mask(session, secret, 0, 8),
    }
    for kind, mask in kinds.items():
        seen = {mask(SECRET).tobytes()}
        for bit in range(256):
            flipped = (int.from_bytes(SECRET, "big") ^ 1 << bit).to_bytes(32, "big")
            seen.add(mask(flipped).tobytes())
        assert len(seen) == 257, f"{kind} masks of 257 secrets are {len(seen)} streams"


def no_mask_serves_twice():
    """Not even when the secrets are the same: every session, pair and purpose has its own."""
    sessions = [
        make_session(),
        make_session(run="other"),
        make_session(round=4),
        make_session(attempt=1),
        make_session(work_sha256="cd" * 32),
        make_session(5),
    ]
    seen = []
    for session in sessions:
        for low, high in ((LOW, HIGH), (HIGH, LOW), (LOW, LOW)):
            seen.append(masks.pair_mask(session, SECRET, low, high, 4).tobytes())
        seen += [masks.self_mask(session, SECRET, i, 4).tobytes() for i in range(4)]
    assert len(set(seen)) == len(seen)


def foreign_keys_are_refused():
    """A server that puts keys of its own in place of a client's is found out by all others."""
    own = X25519PrivateKey.from_private_bytes(SECRET).public_key().public_bytes_raw()
    earlier = Drive(make_session(attempt=1))
    earlier.run()

    def forged(data):
        at = 8 + ADVERT_BYTES
        return data[:at] + own + data[at + 32 :]

    def replayed(data):
        at = 8 + ADVERT_BYTES
        return data[:at] + earlier.sent["advert"]["client-01"] + data[at + ADVERT_BYTES :]

    def swapped(data):
        first, second = data[8 : 8 + ADVERT_BYTES], data[8 + ADVERT_BYTES : 8 + 2 * ADVERT_BYTES]
        return data[:8] + second + first + data[8 + 2 * ADVERT_BYTES :]

    for forge in (forged, replayed, swapped):
        drive = Drive(make_session())
        keys = _closed_adverts(drive)
        for client in drive.clients.values():
            refused(client.share, forge(keys))


def fewer_shares_than_the_threshold_say_nothing():
    for threshold in (2, 3, 5):
        shares = shamir.split(SECRET, threshold, range(1, 8), random.Random(1).randbytes)
        for lacking in range(1, threshold):
            few = dict(list(shares.items())[:lacking])
            assert shamir.join(few, lacking) != SECRET
        assert shamir.join(shares, threshold) == SECRET


def a_late_vector_stays_hidden():
    """Its sender was taken for gone and its pairwise masks are known: its own mask remains."""
    late = "client-01"
    drive = Drive(make_session(4, 3), gone={"signature": [late], "reveal": [late]})
    server, taken = drive.server, {}
    take = server.take_masked

    def too_late(name, data):
        if name == late:
            taken[name] = data
        else:
            take(name, data)

    server.take_masked = too_late
    drive.run()
    shares = {
        drive.session.index(name) + 1: int.from_bytes(data[33:66], "big")
        for name, data in drive.sent["reveal"].items()
    }
    key = X25519PrivateKey.from_private_bytes(shamir.join(shares, 3))
    vector = np.frombuffer(taken[late], np.uint64)
    me = drive.session.index(late)
    for name in drive.session.clients:
        if name != late:
            i, theirs = drive.session.index(name), server._adverts[drive.session.index(name)].mask
            mine = key.public_key().public_bytes_raw()
            secret = key.exchange(masks.X25519PublicKey.from_public_bytes(theirs))
            pair = (mine, theirs) if me < i else (theirs, mine)
            mask = masks.pair_mask(drive.session, secret, *pair, vector.size)
            vector = vector - mask if me < i else vector + mask
    own = masks.self_mask(drive.session, drive.clients[late]._seed, me, vector.size)
    # the recovery above is right, so that nothing but the client's own mask is in the way
    assert np.array_equal(vector - own, drive.vectors[late])
    assert not np.array_equal(vector, drive.vectors[late])


def two_sets_of_survivors_open_nothing():
    """A server that tells some that client 3 is gone, and others that it is not, gets nothing."""
    drive = Drive(make_session(4, 3))
    _until_masked(drive)
    told = {"client-00": range(4), "client-01": range(4), "client-02": range(3)}
    signed = {name: drive.clients[name].sign(members(found)) for name, found in told.items()}
    collected = members(range(3)) + b"".join(signed.values())
    for name in told:
        refused(drive.clients[name].reveal, collected)


def too_few_signatures_open_nothing():
    drive = Drive(make_session(4, 3))
    _until_masked(drive)
    found = members(range(4))
    signed = [drive.clients[name].sign(found) for name in names(2)]
    refused(drive.clients["client-00"].reveal, members(range(2)) + b"".join(signed))


def one_round_has_one_sum():
    """A server that calls a sum off after it has taken it cannot have another one."""
    session = make_session(4, 3)
    keys = identities(session.clients)
    signed = {name: SignedSets() for name in session.clients}
    first = Drive(session, keys=keys, signed=signed)
    first.run()
    again = Drive(
        make_session(4, 3, attempt=1), keys=keys, signed=signed, gone={"masked": ["client-03"]}
    )
    refused(again.run)
    assert sorted(again.refused) == ["client-00", "client-01", "client-02"]
    other = {name: vector + 1 for name, vector in first.vectors.items()}
    refused(Drive(make_session(4, 3, attempt=2), keys=keys, signed=signed, vectors=other).run)
    # the same sum, as after a crash of the server, tells it nothing new
    same = Drive(make_session(4, 3, attempt=3), keys=keys, signed=signed, seed="new")
    assert np.array_equal(same.run().vector, first.plain_sum(session.clients))


def a_sum_does_not_wrap():
    for bits, weight in ((32, 1), (32, 1000), (64, 1), (64, 10**7)):
        session = make_session(5, bits=bits, sizes=(4,), clip=2.5)
        kept = quantise.Quantiser(session, 5 * weight)
        for value in (2.5, -2.5):
            vector = kept.vector({"t0": torch.full((4,), value)}, weight, value, torch.Generator())
            total = sum([vector] * 4, vector)
            mean = kept.mean(total, 5 * weight)
            assert torch.allclose(mean.tensors["t0"], torch.full((4,), value).double()), bits
            assert abs(mean.loss - value) <= 1e3 / kept.levels


def a_masked_vector_is_uniform():
    """Of zeros and of the largest values alike: chi-square of the bytes, at every position."""
    session = make_session(3, bits=32, sizes=(40_000,))
    size = quantise.vector_size(session)
    for value in (0, 2**32 - 1):
        vectors = {name: np.full(size, value, np.uint32) for name in session.clients}
        drive = Drive(session, vectors=vectors, seed=value)
        drive.run()
        for data in drive.sent["masked"].values():
            for place in range(4):
                counts = np.bincount(np.frombuffer(data, np.uint8)[place::4], minlength=256)
                expected = size / 256
                statistic = float(((counts - expected) ** 2).sum() / expected)
                # 255 degrees of freedom: mean 255, standard deviation 22.6
                assert 255 - 6 * 22.6 < statistic < 255 + 6 * 22.6, statistic


def a_vector_is_masked_once():
    drive = Drive(make_session())
    _closed_adverts(drive)
    _, shares = _closed_boxes(drive)
    client = drive.clients["client-00"]
    client.masked_input(shares["client-00"], drive.vectors["client-00"])
    refused(client.masked_input, shares["client-00"], drive.vectors["client-01"])


def a_changed_share_names_its_sender():
    drive = Drive(make_session())
    _closed_adverts(drive)
    _, shares = _closed_boxes(drive)
    data = bytearray(shares["client-00"])
    data[8 + 30] ^= 1
    error = refused(
        drive.clients["client-00"].masked_input, bytes(data), drive.vectors["client-00"]
    )
    assert error.client == "client-01"


def rounding_has_no_bias():
    session = make_session(3, bits=32, sizes=(20_000,), clip=1.0)
    kept = quantise.Quantiser(session, 2**20)
    for fraction in (0.25, -0.4):
        exact = torch.full((20_000,), fraction / kept.levels, dtype=torch.float64)
        vector = kept.vector({"t0": exact}, 1, None, torch.Generator().manual_seed(1))
        found = vector.view(np.int32)[:20_000].astype(np.float64)
        # the standard deviation of the mean of 20 000 draws is at most 0.0036
        assert abs(found.mean() - fraction) < 0.02
        assert set(np.unique(found)) == {np.floor(fraction), np.ceil(fraction)}


def wrong_dealt_shares_are_found():
    """A client that deals shares of something else is named, whether it survives or not."""
    for gone in ({}, {"masked": ["client-01"]}):
        drive = Drive(make_session(4, 3), gone=gone)
        liar = drive.clients["client-01"]
        advertise = liar.advertise

        def lie(liar=liar, advertise=advertise):
            sent = advertise()
            liar._seed = liar._mask = bytes(32)
            return sent

        liar.advertise = lie
        error = refused(drive.run)
        assert error.client == "client-01"


def _closed_adverts(drive):
    drive.step("advert", lambda c, n: c.advertise(), drive.server.take_advert)
    return drive.server.close_adverts()


def _closed_boxes(drive):
    keys = drive.server._keys
    drive.step("boxes", lambda c, n: c.share(keys), drive.server.take_boxes)
    return keys, drive.server.close_boxes()


def _until_masked(drive):
    _closed_adverts(drive)
    _, shares = _closed_boxes(drive)
    drive.step(
        "masked", lambda c, n: c.masked_input(shares[n], drive.vectors[n]), drive.server.take_masked
    )
    assert not drive.refused


ORACLES = [
    sum_is_exact,
    every_bit_of_a_secret_counts,
    no_mask_serves_twice,
    foreign_keys_are_refused,
    fewer_shares_than_the_threshold_say_nothing,
    a_late_vector_stays_hidden,
    two_sets_of_survivors_open_nothing,
    too_few_signatures_open_nothing,
    one_round_has_one_sum,
    a_sum_does_not_wrap,
    a_masked_vector_is_uniform,
    a_vector_is_masked_once,
    a_changed_share_names_its_sender,
    rounding_has_no_bias,
    wrong_dealt_shares_are_found,
]
