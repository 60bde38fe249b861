"""The identity of a data set, and the site's key."""

import hashlib
import hmac
import os
import stat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import LedgerError
from fedlora.privacy.dataset import dataset_id, site_key

RECORDS = st.lists(st.binary(min_size=32, max_size=32), max_size=6)


@given(RECORDS, st.randoms(use_true_random=False))
def test_the_order_of_records_does_not_matter(records, chance):
    shuffled = list(records)
    chance.shuffle(shuffled)
    assert dataset_id(b"k" * 32, shuffled) == dataset_id(b"k" * 32, iter(records))


@given(RECORDS, RECORDS)
def test_other_records_are_another_data_set(one, two):
    same = dataset_id(b"k" * 32, one) == dataset_id(b"k" * 32, two)
    assert same == (sorted(one) == sorted(two))


def test_it_is_the_keyed_digest_of_the_sorted_records():
    records = [hashlib.sha256(text).digest() for text in (b"a", b"b")]
    plain = b"".join(b"\x00\x00\x00\x20" + record for record in sorted(records))
    assert dataset_id(b"k", records) == hmac.new(b"k", plain, "sha256").hexdigest()


def test_without_the_key_nobody_can_tell_whose_data_it_is():
    assert dataset_id(b"k" * 32, [b"r" * 32]) != dataset_id(b"l" * 32, [b"r" * 32])


def test_the_key_is_made_once_and_is_the_owners(tmp_path):
    key = site_key(tmp_path / "privacy")
    assert len(key) == 32
    assert site_key(tmp_path / "privacy") == key
    assert site_key(tmp_path / "other") != key
    mode = stat.S_IMODE(os.stat(tmp_path / "privacy" / "site.key").st_mode)
    assert mode == 0o600
    assert [path.name for path in (tmp_path / "privacy").iterdir()] == ["site.key"]


def test_a_key_cut_short_is_refused(tmp_path):
    (tmp_path / "site.key").write_bytes(b"short")
    with pytest.raises(LedgerError, match="has 5 bytes, expected 32"):
        site_key(tmp_path)
