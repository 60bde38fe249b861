"""Rounds of a simulation, message by message: what a worker is asked, and what it must answer."""

from dataclasses import dataclass

from fedlora.client.order import read_order
from fedlora.config.load import dump_job
from fedlora.models.loaded import load
from fedlora.protos.worker_pb2 import WorkHeader, WorkMessage
from fedlora.simulation.federation import Federation
from fedlora.wire import decode_broadcast


@dataclass(frozen=True)
class Exchanged:
    """One client's part of one round."""

    job: str
    client: str
    manifest: bytes
    parts: dict
    update: bytes
    payload: bytes
    base: str
    bytes_down: int

    @property
    def round(self):
        return decode_broadcast(self.manifest).plan.round

    def header(self, **fields):
        return WorkHeader(job_toml=self.job, manifest=self.manifest, **fields)

    def order(self, **fields):
        return read_order([WorkMessage(header=self.header(**fields))])


def record(job, folder):
    """What went between server and clients in a simulation of `job`."""
    federation = Federation(job, load(job))
    found = []

    class Recording:
        roster = staticmethod(federation.link.roster)
        inner = federation.link

        def exchange(self, tasks, parts, deadline_s):
            manifests = {task.client: task.manifest for task in tasks}
            for reply in self.inner.exchange(tasks, parts, deadline_s):
                assert not reply.error, reply.error
                manifest = manifests[reply.client]
                needed = set(decode_broadcast(manifest).parts.values())
                found.append(
                    Exchanged(
                        dump_job(job),
                        reply.client,
                        manifest,
                        {digest: parts[digest] for digest in needed},
                        reply.manifest,
                        reply.payload,
                        federation.loaded.base.fingerprint,
                        reply.bytes_down - len(manifest),
                    )
                )
                yield reply

    federation.link = Recording()
    store = federation.start(folder)
    try:
        federation.run(store)
    finally:
        store.close()
    return found


def of(recorded, client):
    """One client's part, in the order of rounds."""
    return [item for item in recorded if item.client == client]
