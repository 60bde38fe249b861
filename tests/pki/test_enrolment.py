"""The shared folder: clients lay requests in, the server's side answers."""

import os
from datetime import timedelta

import pytest

from fedlora.enrolment import DropBox, enrol
from fedlora.errors import CertificateError
from fedlora.pki import Authority, KeyFiles, Subject, write_request
from fedlora.pki.keys import read_key
from tests.pki.conftest import HOSTS, NOW


@pytest.fixture
def box(authority, tmp_path):
    return DropBox(authority, tmp_path / "shared")


def join(box, tmp_path, name="site-0", *, wait=None, patience_s=1.0, now=NOW):
    """`enrol` against a server that looks into the folder whenever the client waits."""
    return enrol(
        box.folder,
        name,
        tmp_path / f"own-{name}",
        patience_s=patience_s,
        wait=wait or (lambda _: box.sign_requests(now)),
        now=lambda: now,
    )


def contents(folder):
    return {p.name: (p.stat().st_ino, p.read_bytes()) for p in folder.iterdir() if p.is_file()}


def test_a_client_enrols_and_its_key_stays_at_home(box, tmp_path):
    tls = join(box, tmp_path)
    found = tls.load("client", now=NOW)
    assert found.subject == Subject("site-0", "client")
    own = KeyFiles.of("site-0", tmp_path / "own-site-0")
    assert (tls.ca, tls.certificate, tls.key) == (own.ca, own.certificate, own.key)
    assert own.flower_key.is_file()
    assert sorted(p.name for p in box.folder.iterdir()) == ["ca.crt", "site-0.crt", "site-0.csr"]
    assert not any(b"PRIVATE" in data for _, data in contents(box.folder).values())


def test_enrolling_again_asks_nobody(box, tmp_path):
    def nobody(_):
        raise AssertionError("no need to wait")

    join(box, tmp_path)
    before = contents(box.folder), contents(tmp_path / "own-site-0")
    join(box, tmp_path, wait=nobody, patience_s=0)
    assert (contents(box.folder), contents(tmp_path / "own-site-0")) == before


def test_signing_again_changes_nothing(box, tmp_path):
    for name in ("site-0", "site-1"):
        write_request(Subject(name, "client"), tmp_path / name)
        os.rename(tmp_path / name / f"{name}.csr", box.folder / f"{name}.csr")
    lines = box.sign_requests(NOW)
    assert [line.split(" ")[0] for line in lines] == ["site-0.csr", "site-1.csr"]
    before = contents(box.folder), contents(box.authority.folder / "issued")
    assert box.sign_requests(NOW) == []
    assert DropBox(box.authority, box.folder).sign_requests(NOW) == []
    assert (contents(box.folder), contents(box.authority.folder / "issued")) == before


def test_an_answer_lost_in_a_crash_is_given_again_not_signed_twice(box, tmp_path):
    join(box, tmp_path)
    answer = box.folder / "site-0.crt"
    first = answer.read_bytes()
    answer.unlink()
    box.sign_requests(NOW)
    assert answer.read_bytes() == first
    assert len(box.authority.issued(NOW)) == 1


def test_an_expired_certificate_is_renewed_for_the_same_key(box, tmp_path):
    join(box, tmp_path)
    late = NOW + timedelta(days=365)
    tls = join(box, tmp_path, now=late)
    assert tls.load("client", now=late).ends == late + timedelta(days=365)


def test_an_unfinished_enrolment_goes_on_with_its_key(box, tmp_path):
    with pytest.raises(CertificateError, match="no certificate after 1 s"):
        join(box, tmp_path, wait=lambda _: None)
    key = tmp_path / "own-site-0" / "site-0.key"
    before = key.read_bytes()
    box.sign_requests(NOW)
    join(box, tmp_path, patience_s=0)
    assert key.read_bytes() == before


def test_waiting_is_bounded_also_without_the_folder(box, tmp_path):
    waited = []
    with pytest.raises(CertificateError, match="is not there"):
        enrol(
            tmp_path / "nowhere",
            "site-0",
            tmp_path / "own",
            patience_s=3.5,
            wait=waited.append,
            now=lambda: NOW,
        )
    assert sum(waited) == pytest.approx(3.5)


def test_what_cannot_be_signed_is_named_once_and_holds_nobody_up(box, tmp_path):
    for name, role, hosts in (("boss", "operator", ()), ("main", "server", HOSTS)):
        files = write_request(Subject(name, role, hosts), tmp_path / name)
        os.rename(files.request, box.folder / f"{name}.csr")
    (box.folder / "a-mess.csr").write_bytes(b"\0" * 100)
    (box.folder / "b-folder.csr").mkdir()
    os.mkfifo(box.folder / "c-pipe.csr")
    lines = box.sign_requests(NOW)
    assert len(lines) == 5
    assert all("is not signed" in line for line in lines)
    assert "--role operator" in lines[2]
    assert box.sign_requests(NOW) == []
    join(box, tmp_path)
    assert [i.subject.name for i in box.authority.issued(NOW)] == ["site-0"]
    # another mess under the same name is another reason
    (box.folder / "a-mess.csr").write_bytes(b"x" * 300_000)
    assert len(box.sign_requests(NOW)) == 1


def test_a_name_cannot_be_taken_by_another_key(box, tmp_path):
    tls = join(box, tmp_path)
    thief = write_request(Subject("site-0", "client"), tmp_path / "thief")
    os.rename(thief.request, box.folder / "thief.csr")
    [line] = box.sign_requests(NOW)
    assert "has a valid certificate of another key" in line
    assert not (box.folder / "thief.crt").exists()
    tls.load("client", now=NOW)


def test_who_was_revoked_does_not_come_back_by_itself(box, tmp_path):
    join(box, tmp_path)
    box.authority.revoke("site-0", now=NOW)
    [line] = box.sign_requests(NOW)
    assert "was revoked" in line
    fresh = write_request(Subject("site-0", "client"), tmp_path / "fresh")
    os.rename(fresh.request, box.folder / "site-0.csr")
    box.sign_requests(NOW)
    assert len(box.authority.issued(NOW)) == 1


def test_a_client_does_not_change_its_authority(box, tmp_path):
    join(box, tmp_path)
    (tmp_path / "own-site-0" / "site-0.crt").unlink()
    other = DropBox(Authority.create(tmp_path / "other", "hospitals", now=NOW), box.folder)
    other.sign_requests(NOW)
    with pytest.raises(CertificateError, match="not the authority that this client knows"):
        join(other, tmp_path)


def test_an_answer_for_another_key_or_name_is_not_taken(box, tmp_path):
    other = write_request(Subject("site-1", "client"), tmp_path / "other")
    os.rename(other.request, box.folder / "site-1.csr")
    box.sign_requests(NOW)

    def wrong(_):
        (box.folder / "site-0.crt").write_bytes((box.folder / "site-1.crt").read_bytes())

    with pytest.raises(CertificateError, match="does not belong to certificate"):
        join(box, tmp_path, wait=wrong)
    assert not (tmp_path / "own-site-0" / "site-0.crt").exists()
    key = KeyFiles.of("site-0", tmp_path / "own-site-0").key
    alias = box.authority.sign(Subject("alias", "client"), read_key(key).public_key(), now=NOW)

    def misnamed(_):
        (box.folder / "site-0.crt").write_bytes(alias.pem)

    with pytest.raises(CertificateError, match="'alias'"):
        join(box, tmp_path, wait=misnamed)


def test_a_planted_link_is_replaced_not_followed(box, tmp_path):
    """Who can write into the shared folder cannot make the server write elsewhere."""
    precious = tmp_path / "precious"
    precious.write_bytes(b"precious")
    (box.folder / "site-0.crt").symlink_to(precious)
    (box.folder / "ca.crt").symlink_to(precious)
    join(box, tmp_path)
    assert precious.read_bytes() == b"precious"


def test_a_request_cannot_take_the_place_of_the_authority(box, tmp_path):
    """Everybody may write into the folder."""
    box.folder.mkdir(exist_ok=True)
    box.sign_requests(NOW)
    before = (box.folder / "ca.crt").read_bytes()
    write_request(Subject("mallory", "client"), tmp_path)
    (request,) = tmp_path.glob("*.csr")
    (box.folder / "ca.csr").write_bytes(request.read_bytes())
    assert box.sign_requests(NOW) == []
    assert (box.folder / "ca.crt").read_bytes() == before
