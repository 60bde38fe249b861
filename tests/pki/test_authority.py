"""Signing, the record of it, and revocation; OpenSSL is the second opinion."""

import ssl
import stat
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    load_ssh_private_key,
    load_ssh_public_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID
from hypothesis import given
from hypothesis import strategies as st

from fedlora.errors import CertificateError
from fedlora.pki import Authority, KeyFiles, Revoked, Subject, write_request
from fedlora.pki.files import file_name
from fedlora.pki.keys import new_key, public_bytes, read_key, read_request
from tests.pki.conftest import HOSTS, NOW, hand_out

SITE = Subject("site-0", "client")
SERVER = Subject("server", "server", HOSTS)


def signed(authority, subject, **options):
    return authority.sign(subject, new_key().public_key(), now=NOW, **options)


def test_a_certificate_says_whom_it_is_for_and_for_how_long(authority):
    issued = signed(authority, SERVER)
    found = issued.certificate
    found.verify_directly_issued_by(authority.certificate)
    assert Subject.of(found) == SERVER
    assert found.not_valid_before_utc == NOW - timedelta(minutes=5)
    assert found.not_valid_after_utc == NOW + timedelta(days=365)
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.SERVER_AUTH]
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


@pytest.mark.parametrize("role", ["client", "operator"])
def test_who_calls_cannot_pose_as_a_server(authority, role):
    found = signed(authority, Subject("x", role)).certificate
    usage = found.extensions.get_extension_for_class(x509.ExtendedKeyUsage).value
    assert list(usage) == [ExtendedKeyUsageOID.CLIENT_AUTH]


def test_lifetimes_are_options_and_never_outlive_the_authority(tmp_path):
    authority = Authority.create(tmp_path, "x", now=NOW, lifetime=timedelta(days=10))
    brief = signed(authority, SITE, lifetime=timedelta(days=3), backdate=timedelta(hours=1))
    assert brief.certificate.not_valid_before_utc == NOW - timedelta(hours=1)
    assert brief.certificate.not_valid_after_utc == NOW + timedelta(days=3)
    long = signed(authority, Subject("site-1", "client"))
    assert long.certificate.not_valid_after_utc == NOW + timedelta(days=10)
    with pytest.raises(CertificateError, match="authority's own ends at 2030-06-11"):
        authority.sign(SITE, new_key().public_key(), now=NOW + timedelta(days=11))


def test_private_files_are_for_their_owner_only(authority, tmp_path):
    files = write_request(SITE, tmp_path / "site")
    for path in (authority.folder / "ca.key", files.key, files.flower_key):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    (authority.folder / "ca.key").chmod(0o640)
    with pytest.raises(CertificateError, match="chmod 600"):
        Authority(authority.folder)


def test_flower_and_tls_read_the_same_key(tmp_path, authority):
    """Loaded as flwr 1.41 loads them: in flower_supernode.py, cli/supernode/register.py."""
    tls = hand_out(authority, tmp_path / "site", SITE)
    files = KeyFiles.of("site-0", tmp_path / "site")
    private = load_ssh_private_key(files.flower_key.read_bytes(), None)
    public = load_ssh_public_key(files.flower_public_key.read_bytes())
    assert isinstance(private, ec.EllipticCurvePrivateKey)
    assert isinstance(private.curve, ec.SECP384R1)
    own = public_bytes(read_key(files.key).public_key())
    assert public_bytes(private.public_key()) == public_bytes(public) == own
    ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).load_cert_chain(tls.certificate, tls.key)


def test_keys_and_authorities_are_never_overwritten(authority, tmp_path):
    files = write_request(SITE, tmp_path / "site")
    kept = {p: p.read_bytes() for p in (files.key, files.request, authority.folder / "ca.key")}
    with pytest.raises(CertificateError, match="exists and is not overwritten"):
        write_request(SITE, tmp_path / "site")
    with pytest.raises(CertificateError, match="exists and is not overwritten"):
        Authority.create(authority.folder, "others", now=NOW)
    assert {path: path.read_bytes() for path in kept} == kept


def test_a_name_belongs_to_one_key_until_it_is_revoked_or_expires(authority):
    first = signed(authority, SITE)
    with pytest.raises(CertificateError, match=f"another key \\(serial {first.serial}"):
        signed(authority, SITE)
    again = authority.sign(SITE, first.key, now=NOW)
    assert again.serial != first.serial
    signed(authority, SITE, renew=True)
    late = NOW + timedelta(days=366)
    assert authority.sign(SITE, new_key().public_key(), now=late).state == "valid"


def test_a_revoked_key_is_never_signed_again_under_any_name(authority):
    issued = signed(authority, SITE)
    authority.revoke("site-0", now=NOW)
    for subject in (SITE, Subject("site-1", "client")):
        with pytest.raises(CertificateError, match="was revoked"):
            authority.sign(subject, issued.key, now=NOW, renew=True)
    assert signed(authority, SITE).state == "valid"


def test_states_follow_time_and_revocation(authority):
    signed(authority, SITE)
    year = timedelta(days=365)
    for time, state in (
        (NOW - timedelta(minutes=5, seconds=1), "not yet valid"),
        (NOW - timedelta(minutes=5), "valid"),
        (NOW + year - timedelta(seconds=1), "valid"),
        (NOW + year, "expired"),
    ):
        assert [i.state for i in authority.issued(time)] == [state]
    authority.revoke("site-0", now=NOW)
    assert [i.state for i in authority.issued(NOW + year)] == ["revoked"]


def test_revoking_a_name_takes_all_its_certificates_and_a_serial_one(authority):
    one, two = signed(authority, SITE), signed(authority, SITE, renew=True)
    other = signed(authority, Subject("site-1", "client"))
    assert [i.serial for i in authority.revoke(one.serial.upper(), now=NOW)] == [one.serial]
    assert [i.serial for i in authority.revoke("site-0", now=NOW)] == [two.serial]
    assert authority.revoke("site-0", now=NOW) == []
    entries = authority.revoked()
    assert [(e.serial, e.name) for e in entries] == [(one.serial, "site-0"), (two.serial, "site-0")]
    assert entries[0].when == "2030-06-01T12:00:00+00:00"
    assert [i.subject.name for i in authority.issued(NOW) if i.state == "valid"] == ["site-1"]
    with pytest.raises(CertificateError, match='did you mean "site-1"'):
        authority.revoke("site-2", now=NOW)
    assert other.serial not in {e.serial for e in entries}


def test_signing_and_revoking_at_the_same_time_lose_nothing(authority):
    """Writers exclude each other: every certificate is recorded, every revocation kept."""

    def work(number):
        own = Authority(authority.folder)
        signed(own, Subject(f"site-{number}", "client"))
        own.revoke(f"site-{number}", now=NOW)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(work, range(6)))
    assert [i.state for i in authority.issued(NOW)] == ["revoked"] * 6
    assert len(authority.revoked()) == 6


def test_revoked_follows_the_file_and_fails_closed(authority):
    one, two = signed(authority, SITE), signed(authority, Subject("site-1", "client"))
    path = authority.folder / "revoked.json"
    revoked = Revoked(path)
    numbers = one.certificate.serial_number, two.certificate.serial_number
    assert [revoked.is_revoked(n) for n in numbers] == [False, False]
    authority.revoke("site-0", now=NOW)
    assert [revoked.is_revoked(n) for n in numbers] == [True, False]
    good = path.read_bytes()
    for damage in (b"", good[:-9], b'{"revoked": [{"serial": 5}]}', b"[]", b"[" * 100_000):
        path.write_bytes(damage)
        assert [revoked.is_revoked(n) for n in numbers] == [True, True], damage
        assert "cannot be used" in revoked.problem
    path.unlink()
    assert revoked.is_revoked(numbers[1])
    path.write_bytes(good)
    assert [revoked.is_revoked(n) for n in numbers] == [True, False]
    assert revoked.problem == ""


NAMES = st.text(st.characters(codec="utf-8"), max_size=70)


@given(NAMES, NAMES)
def test_every_name_has_files_of_its_own(one, two):
    """A name is refused, or becomes a file name that no other name has, in the same folder."""
    stems = []
    for name in (one, two):
        try:
            Subject(name, "client")
        except CertificateError:
            continue
        stem = file_name(name)
        assert "/" not in stem
        assert len(f"{stem}-{'f' * 40}.crt".encode()) <= 255
        stems.append(stem)
    assert len(set(stems)) == len({one, two}) or len(stems) < 2


@pytest.mark.parametrize(
    ("name", "role", "hosts", "message"),
    [
        ("", "client", (), "has 0 characters"),
        ("x" * 65, "client", (), "has 65 characters"),
        ("a\nb", "client", (), "printable"),
        ("ca", "client", (), "authority's files"),
        ("x", "clint", (), 'did you mean "client"'),
        ("x", "server", (), "needs at least one"),
        ("x", "client", ("localhost",), "others have none"),
        ("x", "server", ("https://x",), "without port and scheme"),
        ("x", "server", ("x:443",), "without port and scheme"),
        ("x", "server", ("-x.org",), "neither a host name"),
        ("x", "server", ("*",), "neither a host name"),
    ],
)
def test_subjects_that_no_certificate_can_carry(name, role, hosts, message):
    with pytest.raises(CertificateError, match=message):
        Subject(name, role, hosts)


def test_hosts_are_names_or_addresses(authority):
    subject = Subject("x", "server", ("::1", "10.0.0.1", "fedlora_server_1", "A.Example.org"))
    names = signed(authority, subject).certificate.extensions.get_extension_for_class(
        x509.SubjectAlternativeName
    )
    kinds = {str(name.value): type(name) for name in names.value}
    assert kinds == {
        "::1": x509.IPAddress,
        "10.0.0.1": x509.IPAddress,
        "fedlora_server_1": x509.DNSName,
        "a.example.org": x509.DNSName,
    }


def crafted(names, key=None, extension=None):
    key = key or ec.generate_private_key(ec.SECP256R1())
    builder = x509.CertificateSigningRequestBuilder().subject_name(
        x509.Name([x509.NameAttribute(oid, text) for oid, text in names])
    )
    if extension is not None:
        builder = builder.add_extension(extension, critical=False)
    algorithm = None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256()
    return builder.sign(key, algorithm).public_bytes(Encoding.PEM)


CN, OU = NameOID.COMMON_NAME, NameOID.ORGANIZATIONAL_UNIT_NAME
GOOD = [(OU, "client"), (CN, "x")]


def flipped():
    """A good request whose name was changed after it was signed."""
    der = bytearray(
        x509.load_pem_x509_csr(crafted([(OU, "client"), (CN, "site-0")])).public_bytes(Encoding.DER)
    )
    place = der.index(b"site-0")
    der[place : place + 6] = b"site-1"
    return x509.load_der_x509_csr(bytes(der)).public_bytes(Encoding.PEM)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: b"", "not a signing request"),
        (lambda: b"-----BEGIN CERTIFICATE REQUEST-----\nAAAA\n", "not a signing request"),
        (lambda: b"x" * 300_000, "more than 262144 bytes"),
        (flipped, "changed on the way"),
        (lambda: crafted([(OU, "client")]), "0 common names and 1 units"),
        (lambda: crafted([*GOOD, (CN, "y")]), "2 common names"),
        (lambda: crafted([*GOOD, (OU, "operator")]), "2 units"),
        (lambda: crafted([(OU, "root"), (CN, "x")]), "role 'root' is not known"),
        (lambda: crafted(GOOD, rsa.generate_private_key(65537, 2048)), "not an EC key"),
        (lambda: crafted(GOOD, ed25519.Ed25519PrivateKey.generate()), "not an EC key"),
        (lambda: crafted(GOOD, ec.generate_private_key(ec.SECP256K1())), "not an EC key"),
        (
            lambda: crafted(GOOD, extension=x509.SubjectAlternativeName([x509.DNSName("a.b")])),
            "others have none",
        ),
        (
            lambda: crafted(
                [(OU, "server"), (CN, "x")],
                extension=x509.SubjectAlternativeName([x509.RFC822Name("a@b.org")]),
            ),
            "neither a host name",
        ),
    ],
)
def test_requests_that_are_not_taken(tmp_path, make, message):
    path = tmp_path / "x.csr"
    path.write_bytes(make())
    with pytest.raises(CertificateError, match=message):
        read_request(path)


def test_a_request_brings_over_what_was_asked_and_nothing_of_the_key(tmp_path):
    files = write_request(SERVER, tmp_path)
    asked = read_request(files.request)
    assert asked.subject == SERVER
    assert public_bytes(asked.key) == public_bytes(read_key(files.key).public_key())
    assert b"PRIVATE" not in files.request.read_bytes()


def test_a_folder_that_is_no_authority(tmp_path, authority):
    with pytest.raises(CertificateError, match="fedlora certs init"):
        Authority(tmp_path)
    other = Authority.create(tmp_path / "other", "others", now=NOW)
    (authority.folder / "ca.crt").write_bytes(other.ca_pem)
    with pytest.raises(CertificateError, match="do not belong together"):
        Authority(authority.folder)


def test_a_damaged_record_is_named(authority):
    issued = signed(authority, SITE)
    path = authority.folder / "issued" / f"site-0-{issued.serial}.crt"
    path.write_bytes(b"nothing")
    with pytest.raises(CertificateError, match=str(path)):
        authority.issued(NOW)
