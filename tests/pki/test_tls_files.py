"""The checks of one's own files, and of the clock."""

import dataclasses
from datetime import timedelta

import pytest

from fedlora.clock import check_clock
from fedlora.errors import CertificateError, ClockError
from fedlora.pki import Authority, Subject
from tests.pki.conftest import HOSTS, NOW, hand_out

SITE = Subject("site-0", "client")
YEAR = timedelta(days=365)


@pytest.fixture
def site(authority, tmp_path):
    return hand_out(authority, tmp_path / "site", SITE)


def refused(tls, role="client", now=NOW):
    with pytest.raises(CertificateError) as caught:
        tls.load(role, now=now)
    assert caught.value.exit_code == 2
    return str(caught.value)


def test_good_files_are_loaded_and_the_key_is_never_shown(site):
    loaded = site.load("client", now=NOW)
    assert loaded.key == site.key.read_bytes()
    assert loaded.certificate == site.certificate.read_bytes()
    assert loaded.ca == site.ca.read_bytes()
    assert (loaded.subject, loaded.ends) == (SITE, NOW + YEAR)
    assert "PRIVATE" not in repr(loaded)


@pytest.mark.parametrize("field", ["ca", "certificate", "key"])
def test_each_file_is_named_when_missing_or_damaged(site, tmp_path, field):
    gone = dataclasses.replace(site, **{field: tmp_path / "gone.pem"})
    assert f"{tmp_path / 'gone.pem'} does not exist" in refused(gone)
    assert "is not a file" in refused(dataclasses.replace(site, **{field: tmp_path}))
    getattr(site, field).write_text("-----BEGIN NOTHING-----\n")
    assert str(getattr(site, field)) in refused(site)


def test_files_that_do_not_belong_together(site, tmp_path):
    foreign = Authority.create(tmp_path / "foreign", "hospitals", now=NOW)
    other = hand_out(foreign, tmp_path / "other", SITE)
    assert "does not belong to certificate" in refused(dataclasses.replace(site, key=other.key))
    assert "not by the authority" in refused(dataclasses.replace(site, ca=other.ca))


def test_an_authority_file_may_hold_the_next_authority_too(site, tmp_path):
    foreign = Authority.create(tmp_path / "foreign", "hospitals", now=NOW)
    site.ca.write_bytes(foreign.ca_pem + site.ca.read_bytes())
    assert site.load("client", now=NOW).subject == SITE


def test_the_role_must_fit(site, authority, tmp_path):
    assert "in role 'client'; expected role 'server'" in refused(site, "server")
    server = hand_out(authority, tmp_path / "server", Subject("main", "server", HOSTS))
    assert "--role client" in refused(server)
    server.load("server", now=NOW)


def test_validity_is_a_matter_of_the_clock_and_the_message_says_so(site):
    early = refused(site, now=NOW - timedelta(minutes=10))
    assert "is not valid before 2030-06-01 11:55:00 UTC" in early
    assert "clock says 2030-06-01 11:50:00 UTC" in early
    assert "set the clock" in early
    late = refused(site, now=NOW + YEAR)
    assert "expired at 2031-06-01 12:00:00 UTC" in late
    assert "ask for a new certificate" in late
    for now in (NOW - timedelta(minutes=5), NOW + YEAR - timedelta(seconds=1)):
        site.load("client", now=now)


def test_an_authority_that_has_expired(tmp_path):
    brief = Authority.create(tmp_path / "ca", "x", now=NOW, lifetime=timedelta(days=1))
    site = hand_out(brief, tmp_path / "site", SITE)
    assert "authority certificate" in refused(site, now=NOW + timedelta(days=1))


@pytest.mark.parametrize("ahead", [-304.9, -10.0, 0.0, 4.9])
def test_clocks_that_flower_takes(ahead):
    check_clock(1e9 + ahead, 1e9)


@pytest.mark.parametrize(
    ("ahead", "message"),
    [
        (5.1, "5.1 s ahead of the server's"),
        (600.0, "600.0 s ahead of"),
        (-305.1, "305.1 s behind the server's"),
        (-600.0, "600.0 s behind"),
    ],
)
def test_clocks_that_flower_does_not_take(ahead, message):
    with pytest.raises(ClockError, match=message) as caught:
        check_clock(1e9 + ahead, 1e9)
    assert "from 5 s ahead to 305 s behind" in str(caught.value)


def test_the_tolerance_is_an_option_and_a_clock_is_a_number():
    check_clock(1e9 + 9, 1e9, tolerance_s=10)
    with pytest.raises(ClockError):
        check_clock(1e9 + 11, 1e9, tolerance_s=10)
    for broken in (float("nan"), float("inf")):
        with pytest.raises(ClockError, match="finite"):
            check_clock(1e9, broken)


def test_the_bounds_are_those_of_the_installed_flower():
    from flwr.common.constant import SYSTEM_TIME_TOLERANCE, TIMESTAMP_TOLERANCE

    check_clock(0.0, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE - 0.1)
    check_clock(SYSTEM_TIME_TOLERANCE - 0.1, 0.0)
    for own, server in ((0.0, TIMESTAMP_TOLERANCE + SYSTEM_TIME_TOLERANCE), (5.0, 0.0)):
        with pytest.raises(ClockError):
            check_clock(own, server)
