"""The worker as a service: who is served when, and what it holds meanwhile."""

import threading

import grpc
import pytest
from prometheus_client import CollectorRegistry

from fedlora.client.duty import Duty
from fedlora.client.policy import Policy
from fedlora.client.resident import Resident
from fedlora.client.worker import Worker
from fedlora.client.worker_call import WorkerCall
from fedlora.client.worker_metrics import WorkerMetrics, ask
from fedlora.client.worker_socket import listen
from fedlora.data.own import OwnData
from fedlora.errors import ConfigError
from fedlora.protos.worker_pb2 import PartChunk, StatusRequest, WorkHeader, WorkMessage
from fedlora.protos.worker_pb2_grpc import WorkerStub
from tests.client.recorded import of, record

NAME = "client-001"


@pytest.fixture(scope="module")
def rounds(make_job, tmp_path_factory):
    return of(record(make_job(), tmp_path_factory.mktemp("run") / "run"), NAME)


class Service:
    """A worker on a socket, whose turns the test takes itself."""

    def __init__(self, folder, **options):
        resident = Resident(OwnData(NAME, partition=1), "cpu")
        duty = Duty(NAME, folder / "state", resident, lambda address: None, Policy())
        self.worker = Worker(duty, **{"most_waiting": 2, "idle_s": 0.0, **options})
        self.path = folder / "socket" / "w.sock"
        self.server = listen(self.worker, self.path)
        self.channel = grpc.insecure_channel(f"unix:{self.path}")
        self.stub = WorkerStub(self.channel)

    def close(self):
        self.channel.close()
        self.server.stop(None).wait()

    def call(self, item, **fields):
        messages = [WorkMessage(header=item.header(**fields))]
        for digest, data in item.parts.items():
            messages += [WorkMessage(part=PartChunk(sha256=digest, chunk=data))]
        return self.stub.Work(iter(messages))

    def until_waiting(self, count):
        while self.stub.Status(StatusRequest()).queued != count:
            pass


@pytest.fixture
def service(tmp_path):
    service = Service(tmp_path)
    yield service
    service.close()


def kinds(events):
    return [event.WhichOneof("content") for event in events]


def test_calls_are_served_in_order_and_a_full_line_is_closed(service, rounds):
    first = service.call(rounds[0])
    service.until_waiting(1)
    second = service.call(rounds[1])
    service.until_waiting(2)
    with pytest.raises(grpc.RpcError) as refused:
        list(service.call(rounds[2]))
    assert refused.value.code() == grpc.StatusCode.RESOURCE_EXHAUSTED
    service.worker.serve_one()
    done = list(first)
    assert done[-1].done.manifest == rounds[0].update
    assert b"".join(event.payload for event in done) == rounds[0].payload
    assert next(second).queued == 1
    service.worker.serve_one()
    done = list(second)
    assert done[-1].done.manifest == rounds[1].update
    assert "queued" not in kinds(done[-4:])


def test_the_figures_of_a_site_are_what_its_worker_did(service, rounds):
    def figures():
        registry = CollectorRegistry()
        registry.register(WorkerMetrics(lambda: ask(service.path)))
        return {
            sample.name.removeprefix("fedlora_worker_"): sample.value
            for family in registry.collect()
            for sample in family.samples
        }

    assert figures()["updates_total"] == 0
    steps = 0
    # what was kept is sent again, without a step
    for base in ("another", "", ""):
        call = service.call(rounds[0], base_fingerprint=base)
        service.until_waiting(1)
        assert figures()["queued_calls"] == 1
        service.worker.serve_one()
        steps += sum(event.progress.stage == "training" for event in call)
    found = figures()
    assert (found["updates_total"], found["refusals_total"]) == (2, 1)
    assert found["steps_total"] == steps > 0
    assert found["kept_updates"] == 1
    assert found["memory_bytes"] > 2**20
    assert "busy" not in found


def test_a_worker_that_is_away_has_no_figures(tmp_path):
    assert list(WorkerMetrics(lambda: ask(tmp_path / "none.sock")).collect()) == []


def test_who_hangs_up_is_not_served_unless_work_has_begun(service, rounds):
    waiting = service.call(rounds[0])
    service.until_waiting(1)
    waiting.cancel()
    service.until_waiting(0)
    assert service.stub.Status(StatusRequest()).kept_updates == 0
    begun = service.call(rounds[0])
    service.until_waiting(1)
    computing = threading.Thread(target=service.worker.serve_one)
    computing.start()
    next(begun)
    begun.cancel()
    computing.join()
    assert service.stub.Status(StatusRequest()).kept_updates == 1
    again = service.call(rounds[0])
    service.until_waiting(1)
    service.worker.serve_one()
    done = list(again)[-1].done
    assert (done.kept, done.manifest) == (True, rounds[0].update)


def test_memory_is_given_back_when_idle_and_what_follows_has_the_same_bytes(service, rounds):
    for item in rounds[:2]:
        call = service.call(item)
        service.until_waiting(1)
        assert service.worker.serve_one()
        done = list(call)
        assert done[-1].done.manifest == item.update
        assert any(event.progress.stage == "loading" for event in done)
        assert service.stub.Status(StatusRequest()).base_fingerprint == item.base
        # nobody comes within idle_s
        assert service.worker.serve_one()
        assert service.stub.Status(StatusRequest()).base_fingerprint == ""


def test_a_worker_that_is_not_idle_loads_once(tmp_path, rounds):
    service = Service(tmp_path, idle_s=60.0)
    for item, loads in zip(rounds, (True, False, False), strict=True):
        call = service.call(item)
        service.until_waiting(1)
        service.worker.serve_one()
        done = list(call)
        assert done[-1].done.manifest == item.update
        assert any(event.progress.stage == "loading" for event in done) == loads
    service.close()


def test_a_worker_may_end_when_idle(tmp_path, rounds):
    service = Service(tmp_path, ends_idle=True)
    assert not service.worker.serve_one()
    with pytest.raises(grpc.RpcError) as refused:
        list(service.call(rounds[0]))
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    service.close()


def test_stopping_tells_those_who_wait(service, rounds):
    waiting = service.call(rounds[0])
    service.until_waiting(1)
    service.worker.stop()
    with pytest.raises(grpc.RpcError) as refused:
        list(waiting)
    assert refused.value.code() == grpc.StatusCode.UNAVAILABLE
    assert not service.worker.serve_one()


def test_a_failure_inside_is_an_answer_and_the_next_call_is_served(service, rounds):
    resident = service.worker.duty.resident
    resident.device = "cpu:none"
    call = service.call(rounds[0])
    service.until_waiting(1)
    service.worker.serve_one()
    assert list(call)[-1].refused.code == "JOB"
    resident.device = "cpu"
    # a folder where a file must go: no error of ours
    blocked = service.worker.duty.folder / "outbox"
    blocked.parent.mkdir(parents=True, exist_ok=True)
    blocked.write_text("")
    call = service.call(rounds[0])
    service.until_waiting(1)
    service.worker.serve_one()
    refused = list(call)[-1].refused
    assert refused.code == "FAILED"
    assert "outbox" in refused.detail
    blocked.unlink()
    call = service.call(rounds[0])
    service.until_waiting(1)
    service.worker.serve_one()
    assert list(call)[-1].done.manifest == rounds[0].update


def unreadable(rounds):
    item = rounds[0]
    header = WorkMessage(header=item.header())
    digest = next(iter(item.parts))
    long = WorkHeader(job_toml="#" * (64 * 1024 + 1), manifest=item.manifest)
    return {
        "no message": [],
        "no header": [WorkMessage(part=PartChunk(sha256=digest, chunk=b"x"))],
        "job too long": [WorkMessage(header=long)],
        "manifest": [WorkMessage(header=WorkHeader(job_toml=item.job, manifest=b"{}"))],
        "acknowledged": [WorkMessage(header=item.header(acknowledged=["../x"]))],
        "run": [
            WorkMessage(
                header=WorkHeader(
                    job_toml=item.job,
                    manifest=item.manifest.replace(b'"run":"', b'"run":"../'),
                )
            )
        ],
        "damaged part": [header, WorkMessage(part=PartChunk(sha256=digest, chunk=b"x"))],
        "unknown part": [header, WorkMessage(part=PartChunk(sha256="0" * 64, chunk=b"x"))],
        "second header": [header, header],
    }


def test_what_is_not_readable_never_stands_in_line(service, rounds):
    for name, messages in unreadable(rounds).items():
        with pytest.raises(grpc.RpcError) as refused:
            list(service.stub.Work(iter(messages)))
        assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT, name
    job = WorkHeader(job_toml="[model]\nnam = 1", manifest=rounds[0].manifest)
    answer = list(service.stub.Work(iter([WorkMessage(header=job)])))
    assert answer[-1].refused.code == "JOB"
    assert "model.nam" in answer[-1].refused.detail
    assert service.stub.Status(StatusRequest()).queued == 0


def test_the_socket_is_for_this_user_and_for_one_worker(service, tmp_path):
    assert service.path.stat().st_mode & 0o777 == 0o600
    assert service.path.parent.stat().st_mode & 0o777 == 0o700
    with pytest.raises(ConfigError, match="a worker is alive there"):
        listen(service.worker, service.path)
    open_to_all = tmp_path / "open"
    open_to_all.mkdir()
    open_to_all.chmod(0o777)
    with pytest.raises(ConfigError, match="others can write"):
        listen(service.worker, open_to_all / "w.sock")
    with pytest.raises(ConfigError, match="at most 107"):
        listen(service.worker, tmp_path / ("x" * 110))


def test_status_tells_who_it_is(service):
    with WorkerCall(service.path, 5.0) as call:
        status = call.status(5.0)
    assert (status.client, status.queued, status.stage) == (NAME, 0, "")
    assert status.memory_bytes > 1 << 20
