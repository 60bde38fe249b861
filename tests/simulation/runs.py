"""Small helpers around real runs of the tiny model."""

import json

from fedlora.checkpoint import RunStore
from fedlora.models.loaded import load
from fedlora.simulation.federation import Federation

_LOADED = {}


def loaded_for(job):
    """Model and data of a job; the same objects for jobs that share them."""
    key = json.dumps(
        [job.model_dump(mode="json")[k] for k in ("model", "data", "partition", "adapter")]
        + [job.run.seed]
    )
    if key not in _LOADED:
        _LOADED[key] = load(job)
    return _LOADED[key]


class Tap:
    """A link that keeps what passes through it."""

    def __init__(self, link):
        self.link = link
        self.tasks = []
        self.replies = []
        self.parts = {}

    def roster(self):
        return self.link.roster()

    def __getattr__(self, name):
        return getattr(self.link, name)

    def exchange(self, tasks, parts, deadline_s):
        self.tasks.append(list(tasks))
        self.replies.append([])
        self.parts.update(parts)
        for reply in self.link.exchange(tasks, parts, deadline_s):
            self.replies[-1].append(reply)
            yield reply


class Run:
    """One run folder; `go` may be called again and again, each time as a new process would."""

    def __init__(self, job, folder, loaded=None, clients=None, pool=None):
        self.pool = pool
        self.job, self.folder, self.clients = job, folder, clients
        self.loaded = loaded or loaded_for(job)
        self.events = []
        self.federation = None

    def go(self, until=None, work=None, progress=None):
        self.federation = Federation(
            self.job,
            self.loaded,
            clients=self.clients,
            emit=self.events.append,
            progress=progress,
            pool=self.pool,
        )
        if work is not None:
            self.federation.link.work = work(self.federation)
        self.federation.link = self.tap = Tap(self.federation.link)
        if (self.folder / "HEAD").is_file():
            store = RunStore.open(self.folder, self.job.digest())
        else:
            store = self.federation.start(self.folder)
        try:
            return self.federation.run(store, until)
        finally:
            store.close()

    def of(self, kind):
        return [event for event in self.events if event["event"] == kind]

    def adapters(self):
        return [event["adapter_sha256"] for event in self.of("round")]

    def file(self, number):
        return (self.folder / "rounds" / f"{number:04d}" / "global.safetensors").read_bytes()

    def lines(self):
        """metrics.jsonl without what depends on the clock."""
        found = [json.loads(line) for line in (self.folder / "metrics.jsonl").open()]
        return [{k: v for k, v in e.items() if k not in ("seconds", "machine")} for e in found]
