"""Joining a server, starting runs and fetching what they leave, over real mutual TLS."""

import json
import time
import tomllib
from datetime import UTC, datetime, timedelta
from itertools import islice

import grpc
import pytest
import tomli_w

from fedlora import __version__
from fedlora.client import joining
from fedlora.client.joining import join, new_node_key
from fedlora.client.operator import Operator
from fedlora.client.operator import _event as decoded
from fedlora.config.job import Job
from fedlora.errors import (
    CertificateError,
    ClockError,
    ConfigError,
    JoinDelayed,
    JoinRefused,
    RunFailed,
)
from fedlora.pki.authority import Authority
from fedlora.pki.handout import equip
from fedlora.pki.revoked import Revoked
from fedlora.pki.subject import Subject
from fedlora.protos.consortium_pb2_grpc import add_ConsortiumServicer_to_server
from fedlora.server.blob_store import BlobStore
from fedlora.server.consortium import Consortium
from fedlora.server.exchange import ExchangeServer
from fedlora.server.home import Home, Outcome
from fedlora.server.journal import Journal, encode_events
from fedlora.server.run_events import FollowedFolders
from fedlora.storage import write_atomic
from fedlora.tls import TlsFiles


class Served:
    """A server's gRPC side in this process, and everybody's certificates."""

    def __init__(self, folder):
        self.folder = folder
        now = datetime.now(UTC)
        self.authority = Authority.create(
            folder / "ca", "tests", now=now, lifetime=timedelta(days=2), backdate=timedelta(hours=1)
        )
        self.home = Home(folder / "home")
        self.home.prepare()
        self.registered = []
        revoked = Revoked(folder / "ca" / "revoked.json")
        self.consortium = Consortium(
            self.home,
            flower_port=4321,
            register=lambda name, key: self.registered.append((name, key)),
            is_known=True,
            is_revoked=revoked.is_revoked,
            allow_plugins=False,
        )
        tls = self.certificate("server", "server", hosts=("127.0.0.1",)).load("server")
        credentials = grpc.ssl_server_credentials([(tls.key, tls.certificate)], tls.ca, True)
        self.exchange = ExchangeServer(
            BlobStore(self.home.exchange),
            bytes(32),
            address="127.0.0.1:0",
            credentials=credentials,
            require_identity=True,
            is_revoked=revoked.is_revoked,
            events=FollowedFolders(self.home.runs),
            services={
                "fedlora.v1.Consortium": lambda server: add_ConsortiumServicer_to_server(
                    self.consortium, server
                )
            },
        )
        self.address = f"127.0.0.1:{self.exchange.start()}"
        self.operator = Operator(self.address, self.certificate("operator", "operator"))

    def certificate(self, name, role, hosts=(), **times):
        folder = self.folder / f"{name}-{role}"
        made = {"now": datetime.now(UTC), **times}
        files, _ = equip(self.authority, Subject(name, role, hosts), folder, **made)
        return TlsFiles(files.ca, files.certificate, files.key)


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    served = Served(tmp_path_factory.mktemp("served"))
    yield served
    served.exchange.drain(0.0)


def toml(**federation):
    job = Job.model_validate({"federation": federation})
    return tomli_w.dumps(job.model_dump(mode="json", exclude_none=True))


def test_a_client_joins_and_its_key_is_registered(served, tmp_path):
    public = new_node_key(tmp_path / "node.key")
    joined = join(served.address, "ann", served.certificate("ann", "client"), public)
    assert joined.flower_port == 4321
    assert served.registered[-1] == ("ann", public)
    assert (tmp_path / "node.key").stat().st_mode & 0o777 == 0o600


def test_every_start_of_a_node_has_a_key_of_its_own(tmp_path):
    keys = {new_node_key(tmp_path / "node.key") for _ in range(3)}
    assert len(keys) == 3


@pytest.mark.parametrize(
    ("called", "why"), [("bob", "its certificate is for 'carl'"), ("", "client name ''")]
)
def test_a_name_must_be_that_of_the_certificate(served, called, why, tmp_path):
    tls = TlsFiles(*(served.folder / "carl-client" / n for n in ("ca.crt", "carl.crt", "carl.key")))
    if not tls.key.exists():
        tls = served.certificate("carl", "client")
    with pytest.raises(JoinRefused, match=why):
        join(served.address, called, tls, b"")


def test_other_versions_are_refused_by_both_names(served, monkeypatch):
    monkeypatch.setattr(joining, "__version__", "0.0.9")
    tls = served.certificate("dora", "client")
    with pytest.raises(JoinRefused, match=f"'0.0.9', the server '{__version__}'"):
        join(served.address, "dora", tls, b"")


def test_a_revoked_certificate_is_refused(served):
    tls = served.certificate("eve", "client")
    served.authority.revoke("eve", now=datetime.now(UTC))
    with pytest.raises(JoinRefused, match="was revoked"):
        join(served.address, "eve", tls, b"")


def test_an_expired_certificate_is_refused_before_anything_is_sent(served):
    long_ago = datetime.now(UTC) - timedelta(minutes=50)
    tls = served.certificate("fay", "client", now=long_ago, lifetime=timedelta(minutes=5))
    with pytest.raises(CertificateError, match="expired"):
        join(served.address, "fay", tls, b"")


@pytest.mark.parametrize("skew_s", [600.0, -600.0])
def test_clocks_ten_minutes_apart_are_named(served, skew_s):
    tls = served.certificate(f"gus{skew_s:+.0f}".replace("+", "p").replace("-", "m"), "client")
    before = list(served.registered)
    with pytest.raises(ClockError, match=r"clock is (599|600)\..*set both clocks"):
        join(served.address, tls.certificate.stem, tls, b"", lambda: time.time() + skew_s)
    # and Flower hears nothing of it
    assert served.registered == before


def test_a_server_that_is_not_there_is_waited_for(served):
    tls = served.certificate("hal", "client")
    with pytest.raises(JoinDelayed, match="refuses connections"):
        join("127.0.0.1:1", "hal", tls, b"")


def test_an_authority_of_somebody_else_is_refused_for_good(served, tmp_path):
    other = Authority.create(
        tmp_path / "ca",
        "others",
        now=datetime.now(UTC),
        lifetime=timedelta(days=1),
        backdate=timedelta(0),
    )
    files, _ = equip(other, Subject("ian", "client"), tmp_path / "ian", now=datetime.now(UTC))
    tls = TlsFiles(files.ca, files.certificate, files.key)
    with pytest.raises(JoinRefused, match="wrong CA"):
        join(served.address, "ian", tls, b"")


@pytest.mark.parametrize("call", [lambda o: o.runs(), lambda o: o.submit(toml())])
def test_only_operators_start_and_see_runs(served, call, request):
    name = f"jon{request.node.callspec.indices['call']}"
    tls = served.certificate(name, "client")
    operator = Operator(served.address, None)
    operator.tls, operator.credentials = tls, tls.load("client")
    with pytest.raises(ConfigError, match="needs one of the role 'operator'"):
        call(operator)


def test_a_run_is_kept_before_it_is_acknowledged(served):
    run = served.operator.submit(toml(rounds=7))
    place = served.home.place(run)
    assert Job.model_validate(served_job(place)).federation.rounds == 7
    summary = next(s for s in served.operator.runs() if s.run == run)
    assert (summary.state, summary.round, summary.rounds) == ("waiting", 0, 7)


def served_job(place):
    return tomllib.loads(place.job.read_text())


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("rounds = ", "not valid TOML"),
        (toml() + "\n[oops]\n", "oops is not a known key"),
        (toml(mode="async"), "runs in a simulation only"),
        (toml(strategy="mine.py:Mine"), "not started with --allow-plugins"),
        (toml(strategy="some.module:Mine"), "not started with --allow-plugins"),
        ("#" * 70_000, "more than 65536 bytes"),
    ],
)
def test_a_job_that_cannot_be_run_is_refused_with_the_reason(served, text, why):
    before = len(served.home.places())
    with pytest.raises(ConfigError, match=why):
        served.operator.submit(text)
    assert len(served.home.places()) == before


def test_a_run_is_followed_to_its_end(served):
    run = served.operator.submit(toml())
    journal = Journal(served.home.place(run).events)
    journal.append({"event": "waiting"})
    journal.append({"event": "failed", "exit_code": 3, "why": "nobody came"})
    assert [e["event"] for e in served.operator.follow(run)] == ["waiting", "failed"]


BEFORE = [{"event": "start"}, {"event": "round", "round": 1}, {"event": "rejected", "round": 2}]
AFTER = [
    *BEFORE[:2],
    {"event": "resume", "round": 1},
    {"event": "round", "round": 2},
    {"event": "end", "round": 2},
]


def followed(served, rewrite, wait=lambda seconds: None):
    """What is told of a run whose journal is written anew after three events."""
    run = served.operator.submit(toml())
    place = served.home.place(run)
    for event in BEFORE:
        Journal(place.events).append(event)
    operator = Operator(served.address, served.operator.tls, lambda seconds: wait(place))
    told = operator.follow(run)
    first = list(islice(told, len(BEFORE)))
    rewrite(place)
    return [*first, *told]


def test_each_event_of_a_run_that_is_continued_is_told_once(served):
    """The new journal has other events under the numbers that were told."""
    assert followed(served, lambda place: write_atomic(place.events, encode_events(AFTER))) == [
        *BEFORE,
        *AFTER[2:],
    ]


def test_each_event_is_told_once_also_when_the_server_was_away(served):
    def leave(place):
        write_atomic(place.events, encode_events(AFTER))
        place.path.rename(place.path.with_name("away"))

    def come_back(place):
        place.path.with_name("away").rename(place.path)

    assert followed(served, leave, come_back) == [*BEFORE, *AFTER[2:]]


def test_events_that_come_again_are_told_again(served):
    run = served.operator.submit(toml())
    journal = Journal(served.home.place(run).events)
    events = [{"event": "waiting", "clients": []}] * 3 + [{"event": "end", "round": 0}]
    for event in events:
        journal.append(event)
    assert list(served.operator.follow(run)) == events


def test_who_follows_a_run_passes_over_what_is_no_event():
    for line in ('{"event": "rou', "[1]", "{}", '{"event": 1}', '{"event": "round"}', "[" * 10**5):
        assert decoded(line) is None
    assert decoded('{"event": "round", "round": 1}') == {"event": "round", "round": 1}


def test_a_stop_between_outcome_and_journal_leaves_no_end_of_a_run_that_goes_on(
    served, monkeypatch
):
    """Whatever was written last before a crash, the journal never ends before its run."""
    run = served.operator.submit(toml())
    place, orders = served.home.place(run), []
    real = Journal.append

    def append(journal, event):
        orders.append(place.outcome())
        real(journal, event)

    monkeypatch.setattr(Journal, "append", append)
    served.operator.stop(run)
    assert [outcome.state for outcome in orders] == ["stopped"]


def test_a_failed_run_is_taken_up_again_and_a_finished_one_is_not(served):
    run = served.operator.submit(toml())
    place = served.home.place(run)
    journal = Journal(place.events)
    journal.append({"event": "failed", "exit_code": 3, "why": "nobody came"})
    place.end(Outcome("failed", 3))
    served.operator.resume(run)
    assert (place.outcome(), journal.read()) == (None, [])
    place.end(Outcome("finished", 0))
    served.operator.resume(run)
    assert place.outcome() == Outcome("finished", 0)


def test_a_run_is_stopped(served):
    run = served.operator.submit(toml())
    served.operator.stop(run)
    assert served.home.place(run).outcome().exit_code == 130


def test_what_a_run_leaves_is_fetched_and_nothing_else(served, tmp_path):
    run = served.operator.submit(toml())
    folder = served.home.place(run).folder
    (folder / "adapter").mkdir(parents=True)
    (folder / "adapter" / "weights").write_bytes(b"w" * 3_000_000)
    (folder / "summary.json").write_text(json.dumps({"a": 1}))
    (folder / "key").symlink_to(served.home.ticket_key)
    served.operator.fetch(run, tmp_path)
    found = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    assert found == {"adapter/weights", "summary.json"}
    assert (tmp_path / "adapter" / "weights").stat().st_size == 3_000_000


@pytest.mark.parametrize("path", ["../job.toml", "/etc/passwd", "key", "adapter"])
def test_no_path_leads_out_of_a_run(served, path):
    run = served.operator.submit(toml())
    folder = served.home.place(run).folder
    (folder / "adapter").mkdir(parents=True)
    with pytest.raises(ConfigError, match="has no file"), served.operator._stub() as stub:
        served.operator._read(stub, run, path)


@pytest.mark.parametrize("run", ["", "../../etc", "f" * 16, "x"])
def test_an_unknown_run_is_an_error(served, run):
    with pytest.raises((ConfigError, RunFailed)):
        served.operator.stop(run)
