"""Tickets: only what the key signed is honoured, until it expires."""

import base64
import json
import stat
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import StorageError, TicketError
from fedlora.tickets import MAX_TICKET_BYTES, Ticket, check, mint, ticket_key

KEY = bytes(range(32))
TICKET = Ticket("run-1", 3, 0, "site-0", 2**64 - 1, "up", 1000, 500.0)

tickets = st.builds(
    Ticket,
    run=st.from_regex(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}", fullmatch=True),
    round=st.integers(0, 2**31 - 1),
    attempt=st.integers(0, 2**31 - 1),
    client=st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=64),
    node=st.integers(0, 2**64 - 1),
    direction=st.sampled_from(["up", "down"]),
    max_bytes=st.integers(0, 2**40),
    expires_s=st.floats(1, 1e10),
)


@given(tickets)
def test_what_was_minted_is_read_and_is_short(ticket):
    text = mint(KEY, ticket)
    assert check(KEY, text, 0.0) == ticket
    assert text.isascii()
    assert len(text) <= MAX_TICKET_BYTES


@given(tickets, st.data())
def test_no_other_text_is_honoured(ticket, data):
    text = mint(KEY, ticket)
    place = data.draw(st.integers(0, len(text) - 1))
    other = data.draw(st.characters().filter(lambda c: c != text[place]))
    with pytest.raises(TicketError):
        check(KEY, text[:place] + other + text[place + 1 :], 0.0)
    with pytest.raises(TicketError, match="signature"):
        check(bytes(32), text, 0.0)


@given(st.text(max_size=4096) | st.binary(max_size=3072).map(lambda b: b.decode("latin-1")))
def test_any_text_raises_a_ticket_error_alone(text):
    with pytest.raises(TicketError):
        check(KEY, text, 0.0)


@given(st.recursive(st.none() | st.integers() | st.text(), st.lists, max_leaves=5) | st.binary())
def test_signed_nonsense_raises_a_ticket_error_alone(value):
    from fedlora.tickets import _signed

    body = value if isinstance(value, bytes) else json.dumps(value).encode()
    with pytest.raises(TicketError):
        check(KEY, _signed(KEY, body), 0.0)


def test_the_text_is_pinned():
    """Golden text, signed by openssl dgst: a change of format is a decision."""
    body, signature = mint(KEY, TICKET).split(".")
    assert base64.urlsafe_b64decode(body) == (
        b'{"attempt":0,"client":"site-0","direction":"up","expires_s":500.0,"max_bytes":1000,'
        b'"node":18446744073709551615,"round":3,"run":"run-1"}'
    )
    assert signature == "KRnJr28Q8NptYAHTTVGbyzmc3stRt58TYjHKwuamD2I="


def test_it_expires_at_its_second_and_both_clocks_are_named():
    assert check(KEY, mint(KEY, TICKET), 499.9) == TICKET
    with pytest.raises(TicketError, match=r"expired 100 s ago.*00:08:20 UTC.*00:10:00 UTC"):
        check(KEY, mint(KEY, TICKET), 600.0)


@pytest.mark.parametrize(
    "change",
    [
        {"run": ""},
        {"run": ".."},
        {"run": "a/b"},
        {"run": "x" * 129},
        {"round": -1},
        {"round": True},
        {"attempt": 1.0},
        {"client": ""},
        {"client": "x" * 321},
        {"client": "\ud800"},
        {"node": 2**64},
        {"direction": "both"},
        {"max_bytes": 2**40 + 1},
        {"expires_s": float("nan")},
        {"expires_s": True},
    ],
)
def test_fields_out_of_bounds_are_named(change):
    with pytest.raises(TicketError, match=next(iter(change))):
        replace(TICKET, **change)


def test_fields_of_another_version_are_refused():
    from fedlora.tickets import _signed

    for fields in ({**asdict(TICKET), "more": 1}, {"run": "run-1"}):
        with pytest.raises(TicketError, match="fields"):
            check(KEY, _signed(KEY, json.dumps(fields).encode()), 0.0)


def test_all_processes_get_one_key_that_nobody_else_can_read(tmp_path):
    path = tmp_path / "state" / "ticket.key"
    with ThreadPoolExecutor(8) as pool:
        keys = set(pool.map(lambda _: ticket_key(path), range(32)))
    assert len(keys) == 1
    assert len(keys.pop()) == 32
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert [p.name for p in path.parent.iterdir()] == ["ticket.key"]
    assert ticket_key(tmp_path / "other.key") != ticket_key(path)


def test_a_damaged_key_file_is_refused(tmp_path):
    (tmp_path / "ticket.key").write_bytes(b"short")
    with pytest.raises(StorageError, match="5 bytes"):
        ticket_key(tmp_path / "ticket.key")
