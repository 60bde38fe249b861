"""`fedlora certs` and `fedlora init --policy`."""

import json
import ssl

import pytest

from fedlora.client.policy import Policy, load_policy
from fedlora.tls import TlsFiles
from tests.cli.command import fedlora


@pytest.fixture
def call(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    return lambda *words: fedlora(monkeypatch, capsys, *words)


@pytest.fixture
def certs(call):
    def run(*words, code=0):
        done = call("certs", *words)
        assert done.code == code, done
        if code:
            assert done.err.startswith("error: ")
            assert "Traceback" not in done.err
        return done.err if code else done.out

    run("init", "ca", "--name", "hospitals")
    return run


def test_a_key_made_at_the_site_a_certificate_from_the_operator(certs, tmp_path):
    said = certs("request", "site-0", "--out", "site")
    assert "site/site-0.key" in said
    said = certs("issue", "site/site-0.csr", "--ca", "ca", "--out", "signed")
    assert "asks for: name 'site-0', role client" in said
    assert sorted(p.name for p in (tmp_path / "signed").iterdir()) == ["ca.crt", "site-0.crt"]
    signed = tmp_path / "signed"
    files = TlsFiles(signed / "ca.crt", signed / "site-0.crt", tmp_path / "site" / "site-0.key")
    assert files.load("client").subject.name == "site-0"


def test_issue_in_one_step_gives_all_files_of_a_machine(certs, tmp_path):
    certs(
        *("issue", "main", "--role", "server", "--host", "localhost", "--host", "10.0.0.1"),
        *("--ca", "ca", "--out", "server"),
    )
    folder = tmp_path / "server"
    found = TlsFiles(folder / "ca.crt", folder / "main.crt", folder / "main.key").load("server")
    # its own processes reach each other on loopback, by either name
    assert found.subject.hosts == ("10.0.0.1", "127.0.0.1", "localhost")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder / "main.crt", folder / "main.key")
    before = (folder / "main.key").read_bytes()
    said = certs("issue", "main", "--ca", "ca", "--out", "server", code=2)
    assert "main.key exists and is not overwritten" in said
    assert (folder / "main.key").read_bytes() == before


@pytest.mark.parametrize(
    ("asked", "granted", "good"),
    [
        (("--role", "operator"), (), False),
        (("--role", "operator"), ("--role", "operator"), True),
        ((), ("--role", "operator"), False),
        (("--role", "server", "--host", "a.org"), ("--role", "server"), False),
        (("--role", "server", "--host", "a.org"), ("--role", "server", "--host", "b.org"), False),
        (
            ("--role", "server", "--host", "a.org", "--host", "b.org"),
            ("--role", "server", "--host", "a.org"),
            False,
        ),
        (
            ("--role", "server", "--host", "a.org", "--host", "1.2.3.4"),
            ("--role", "server", "--host", "1.2.3.4", "--host", "A.org"),
            True,
        ),
    ],
)
def test_a_request_gets_what_the_operator_names_or_nothing(certs, tmp_path, asked, granted, good):
    certs("request", "x", "--out", "site", *asked)
    said = certs(
        *("issue", "site/x.csr", "--ca", "ca", "--out", "out", *granted), code=0 if good else 2
    )
    assert (tmp_path / "out" / "x.crt").exists() == good
    if not good:
        assert "you named role" in said
        assert json.loads(certs("list", "--ca", "ca", "--json"))["certificates"] == []


def test_revoke_and_list(certs):
    for name in ("site-0", "site-1"):
        certs("issue", name, "--ca", "ca", "--out", "out")
    assert "revoked name 'site-0'" in certs("revoke", "site-0", "--ca", "ca")
    assert "was revoked before" in certs("revoke", "site-0", "--ca", "ca")
    listed = json.loads(certs("list", "--ca", "ca", "--json"))
    assert listed["authority"]["name"] == "CN=hospitals CA,O=hospitals"
    states = {row["name"]: row["state"] for row in listed["certificates"]}
    assert states == {"site-0": "revoked", "site-1": "valid"}
    lines = certs("list", "--ca", "ca").splitlines()
    assert [line.split()[:3] for line in lines[1:]] == [
        ["site-0", "client", "revoked"],
        ["site-1", "client", "valid"],
    ]
    serial = listed["certificates"][1]["serial"]
    assert serial in certs("revoke", serial, "--ca", "ca")
    assert 'did you mean "site-1"' in certs("revoke", "site-2", "--ca", "ca", code=2)


def test_a_second_key_for_a_name_needs_a_word(certs):
    certs("issue", "site-0", "--ca", "ca", "--out", "a")
    assert "--renew" in certs("issue", "site-0", "--ca", "ca", "--out", "b", code=2)
    certs("issue", "site-0", "--ca", "ca", "--out", "c", "--renew", "--days", "3")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("init", "ca"), "exists and is not overwritten"),
        (("init", "x", "--name", ""), "has 0 characters"),
        (("request", "x", "--out", "y", "--role", "serve"), 'did you mean "server"'),
        (("request", "x", "--out", "y", "--role", "server"), "needs at least one"),
        (("request", "x", "--out", "y", "--host", "h"), "others have none"),
        (("request", "a\tb", "--out", "y"), "printable"),
        (("request", "x", "--out", "ca/ca.crt"), "cannot be made"),
        (("issue", "x", "--ca", "nowhere", "--out", "y"), "fedlora certs init nowhere"),
        (("issue", "x.csr", "--ca", "ca", "--out", "y"), "x.csr does not exist"),
        (("issue", "ca/ca.crt", "--ca", "ca", "--out", "ca/ca.key"), "cannot be made"),
        (("list", "--ca", "nowhere"), "no authority's folder"),
        (("revoke", "x", "--ca", "ca"), "was issued here"),
    ],
)
def test_bad_input_is_named(certs, words, message):
    assert message in certs(*words, code=2)


def test_a_folder_with_another_authority_is_left_alone(certs, tmp_path):
    certs("init", "other")
    certs("issue", "site-0", "--ca", "other", "--out", "out")
    before = (tmp_path / "out" / "ca.crt").read_bytes()
    assert "another authority" in certs("issue", "site-1", "--ca", "ca", "--out", "out", code=2)
    assert (tmp_path / "out" / "ca.crt").read_bytes() == before


def test_init_writes_a_policy(call, tmp_path):
    assert call("init", "--policy").code == 0
    assert load_policy(tmp_path / "policy.toml") == Policy()
    assert call("init", "--policy").code == 2
    done = call("init", "--policy", tmp_path / "mine.toml")
    assert (done.code, "--policy" in done.out) == (0, True)
