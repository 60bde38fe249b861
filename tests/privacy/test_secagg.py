"""Secure sums: exact whatever drops out, or none at all."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedlora.errors import SecureAggregationError
from fedlora.privacy.secagg.messages import ADVERT_BYTES, BOX_BYTES
from fedlora.privacy.secagg.session import Session, threshold_for
from tests.privacy.secagg_cases import STEPS, Drive, make_session, names
from tests.privacy.secagg_mutants import MUTANTS
from tests.privacy.secagg_oracles import ORACLES


@pytest.mark.parametrize("oracle", ORACLES, ids=lambda oracle: oracle.__name__)
def test_oracle(oracle):
    oracle()


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.__name__)
def test_oracles_kill_mutant(mutant, monkeypatch):
    mutant(monkeypatch)
    for oracle in ORACLES:
        try:
            oracle()
        except (AssertionError, SecureAggregationError):
            return
    raise AssertionError("no oracle notices")


@st.composite
def federations(draw):
    """A session, and for some clients the step at which they fall silent."""
    n = draw(st.integers(3, 9))
    threshold = draw(st.integers(n // 2 + 1, n))
    leaves = {name: draw(st.sampled_from([*STEPS, *[None] * 8])) for name in names(n)}
    gone = {step: [name for name, at in leaves.items() if at == step] for step in STEPS}
    return make_session(n, threshold, draw(st.sampled_from([32, 64]))), gone


@settings(max_examples=25)
@given(federations(), st.integers(0, 2**20))
def test_sum_is_that_of_the_survivors_or_the_session_aborts(federation, seed):
    """Against the plain sum of those who sent a vector; below the threshold there is none."""
    session, gone = federation
    drive = Drive(session, gone=gone, seed=seed)
    here, counts = len(session.clients), []
    for step in STEPS:
        here -= len(gone[step])
        counts.append(here)
    if min(counts) < session.threshold:
        with pytest.raises(SecureAggregationError, match=f"needs {session.threshold}"):
            drive.run()
        return
    total = drive.run()
    left = {name for step in STEPS[:3] for name in gone[step]}
    assert set(total.survivors) == set(session.clients) - left
    assert total.weight == len(total.survivors)
    assert np.array_equal(total.vector, drive.plain_sum(total.survivors))
    assert not drive.refused


@pytest.mark.parametrize("n", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_many_clients(n):
    drive = Drive(make_session(n, n // 2 + 1, sizes=(3,)), gone={"masked": names(n)[::3]})
    total = drive.run()
    assert len(total.survivors) == n - len(names(n)[::3])
    assert np.array_equal(total.vector, drive.plain_sum(total.survivors))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("change", ["empty", "short", "long", "ones"])
def test_a_malformed_message_drops_its_sender_alone(step, change):
    """Whatever one client sends, the sum is that of the others, or the round aborts by name."""

    def twist(at, name, data):
        if at != step or name != "client-02":
            return data
        return {
            "empty": b"",
            "short": data[:-1],
            "long": data + b"\0",
            "ones": b"\xff" * len(data),
        }[change]

    drive = Drive(make_session(5, 3), twist=twist)
    if (step, change) == ("boxes", "ones"):
        # nobody but the receivers can tell, and they name the sender
        with pytest.raises(SecureAggregationError, match="needs 3"):
            drive.run()
        others = [name for name in names(5) if name != "client-02"]
        assert {drive.refused[name].client for name in others} == {"client-02"}
        return
    total = drive.run()
    if (step, change) == ("masked", "ones"):
        # any vector is a masked vector: secure aggregation cannot see what it adds up
        assert not drive.refused
        return
    assert list(drive.refused) == ["client-02"]
    assert drive.refused["client-02"].client == "client-02"
    assert np.array_equal(total.vector, drive.plain_sum(total.survivors))
    assert ("client-02" in total.survivors) == (step in ("signature", "reveal"))


@pytest.mark.parametrize("step", STEPS[1:])
@pytest.mark.parametrize("change", ["empty", "short", "long", "ones", "flip"])
def test_a_client_refuses_a_malformed_message_of_the_server(step, change):
    def twist(at, name, data):
        if at != f"to {step}" or name != "client-02":
            return data
        flipped = bytearray(data)
        flipped[len(data) // 2] ^= 0xFF
        return {
            "empty": b"",
            "short": data[:-1],
            "long": data + b"\0",
            "ones": b"\xff" * len(data),
            "flip": bytes(flipped),
        }[change]

    drive = Drive(make_session(5, 3), twist=twist)
    total = drive.run()
    assert list(drive.refused) == ["client-02"]
    assert np.array_equal(total.vector, drive.plain_sum(total.survivors))


@pytest.mark.parametrize(
    ("survivors", "refuses", "problem"),
    [
        (0b0111, "client-03", "expected client 'client-03' itself"),
        (0b1110, "client-00", "expected client 'client-00' itself"),
        (0b1001, "client-03", "needs 3"),
        (0b11111, "client-00", "names client 4 of 4"),
    ],
)
def test_a_client_signs_no_set_that_cannot_be(survivors, refuses, problem):
    """Without itself, below the threshold, or with a stranger."""

    def twist(at, name, data):
        return survivors.to_bytes(8, "big") if at == "to signature" else data

    drive = Drive(make_session(4, 3), twist=twist)
    with pytest.raises(SecureAggregationError):
        drive.run()
    assert problem in str(drive.refused[refuses])


def test_a_survivor_must_have_dealt_shares():
    def twist(at, name, data):
        return (0b1111).to_bytes(8, "big") if at == "to signature" else data

    drive = Drive(make_session(4, 3), twist=twist, gone={"boxes": ["client-00"]})
    with pytest.raises(SecureAggregationError):
        drive.run()
    for name in names(4)[1:]:
        assert "nobody beside those who have dealt shares" in str(drive.refused[name])


def test_weights_are_bounded_and_signed():
    session = make_session(3, sizes=(2,))
    drive = Drive(session, weights={"client-00": 2**41})
    drive.run()
    assert "at most" in str(drive.refused["client-00"])
    assert Drive(session, weights={"client-01": 7}).run().weight == 9

    def heavier(at, name, data):
        if at != "to boxes":
            return data
        place = 8 + ADVERT_BYTES + 96
        return data[:place] + (9).to_bytes(8, "big") + data[place + 8 :]

    drive = Drive(session, twist=heavier)
    with pytest.raises(SecureAggregationError):
        drive.run()
    assert len(drive.refused) == 3


def test_a_client_reveals_a_seed_or_a_key_and_never_both():
    drive = Drive(make_session(5, 3), gone={"masked": ["client-04"]})
    drive.run()
    for name, data in drive.sent["reveal"].items():
        client = drive.clients[name]
        pieces = [int.from_bytes(data[i : i + 33], "big") for i in range(0, len(data), 33)]
        for i, piece in enumerate(pieces):
            of_mask, of_seed = client._shares[i]
            assert piece == (of_mask if i == 4 else of_seed)


def test_message_sizes_are_those_that_are_documented():
    drive = Drive(make_session(5, 3, sizes=(10,)))
    drive.run()
    sizes = {step: {len(data) for data in sent.values()} for step, sent in drive.sent.items()}
    assert sizes == {
        "advert": {ADVERT_BYTES},
        "boxes": {4 * BOX_BYTES},
        "masked": {8 * 13},
        "signature": {64},
        "reveal": {5 * 33},
    }


def test_keys_are_fresh_in_every_session():
    sent = [Drive(make_session(3, round=r), seed=r).clients["client-00"] for r in range(1, 4)]
    secrets = {key for client in sent for key in (client._channel, client._mask, client._seed)}
    assert len(secrets) == 9


sessions = st.builds(
    lambda n, extra, bits, sizes, clip: make_session(
        n, min(n, n // 2 + 1 + extra), bits, sizes, clip
    ),
    st.integers(3, 64),
    st.integers(0, 40),
    st.sampled_from([32, 64]),
    st.lists(st.integers(0, 10**6), min_size=1, max_size=5),
    st.floats(1e-300, 1e300),
)


@settings(max_examples=50)
@given(sessions)
def test_a_session_survives_its_bytes(session):
    found = Session.decode(session.encode())
    assert found == session
    assert found.digest == session.digest


@settings(max_examples=200)
@given(st.data())
def test_a_changed_session_is_another_one_or_none(data):
    good = make_session(4).encode()
    at = data.draw(st.integers(0, len(good) - 1))
    changed = bytes([*good[:at], good[at] ^ data.draw(st.integers(1, 255)), *good[at + 1 :]])
    for bytes_ in (changed, good[:at], good + changed[: at + 1]):
        try:
            found = Session.decode(bytes_)
        except SecureAggregationError:
            continue
        assert found.encode() == bytes_
        assert found.digest != make_session(4).digest


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"n": 2}, "among 2 clients"),
        ({"n": 65}, "among 65 clients"),
        ({"threshold": 2}, "threshold 2 of 4"),
        ({"threshold": 5}, "threshold 5 of 4"),
        ({"bits": 16}, "16 bits"),
        ({"clip": float("nan")}, "clipped to nan"),
        ({"clip": 0.0}, "clipped to 0"),
        ({"sizes": ()}, "0 tensors"),
        ({"sizes": (2**31, 1)}, "entries"),
        ({"clients": ("b", "a", "c")}, "not sorted"),
        ({"clients": ("a", "a", "b")}, "named twice"),
        ({"run": "x" * 300}, "300 bytes"),
    ],
)
def test_a_session_out_of_bounds_is_refused(changes, problem):
    with pytest.raises(SecureAggregationError, match=problem):
        make_session(**changes)


def test_threshold_is_the_quorum_but_never_half():
    assert [threshold_for(n, 1) for n in (3, 4, 5, 64)] == [2, 3, 3, 33]
    assert threshold_for(10, 7) == 7
