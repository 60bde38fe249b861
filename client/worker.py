"""Worker: the resident process of one client, as a gRPC service on a unix socket."""

import logging
import os
import queue
import threading
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import grpc

from fedlora import __version__
from fedlora.client.duty import SEE_LOG, Answer, Duty
from fedlora.client.line import Line, LineClosed, LineFull
from fedlora.client.order import Order, Unreadable, read_order
from fedlora.errors import WorkRefused
from fedlora.protos import worker_pb2 as pb
from fedlora.protos.worker_pb2_grpc import WorkerServicer

log = logging.getLogger(__name__)

CHUNK_BYTES = 1 << 20


class Stopping(Exception):
    """The worker ends; raised between two steps of training."""


@dataclass(frozen=True)
class _Lost:
    """The last event of a call that will not be served."""


@dataclass(eq=False)
class Call:
    """One call, from its arrival to its last event."""

    order: Order
    events: "queue.SimpleQueue[pb.WorkEvent | Answer | _Lost]" = field(
        default_factory=queue.SimpleQueue
    )

    def ahead(self, count: int) -> None:
        if count:
            self.events.put(pb.WorkEvent(queued=count))

    def lost(self) -> None:
        self.events.put(_Lost())


@dataclass
class Activity:
    """What the worker does now; run and stage are empty when idle."""

    run: str = ""
    round: int = 0
    stage: str = ""


@dataclass
class Totals:
    """What the worker has done since it started, as worker.proto says."""

    answered: int = 0
    refused: int = 0
    steps: int = 0
    bytes_down: int = 0
    bytes_up: int = 0


class Worker(WorkerServicer):
    """Serves calls one at a time.

    Args:
        duty: does the work.
        most_waiting: calls that may wait.
        idle_s: after so long without work, model and data leave memory.
        ends_idle: then the worker ends, too.
    """

    def __init__(
        self, duty: Duty, *, most_waiting: int, idle_s: float, ends_idle: bool = False
    ) -> None:
        self.duty = duty
        self.idle_s = idle_s
        self.ends_idle = ends_idle
        self.activity = Activity()
        self.totals = Totals()
        self._line: Line[Call] = Line(most_waiting)
        self._stopping = threading.Event()

    def serve(self) -> None:
        """Serves until it is stopped, or was idle for too long; in the thread that computes."""
        while self.serve_one():
            pass

    def serve_one(self) -> bool:
        """Serves the next call, or frees memory when none comes; says whether to go on."""
        holds = bool(self.duty.resident.fingerprint)
        call = self._line.next(self.idle_s if holds or self.ends_idle else None)
        if self._stopping.is_set():
            if call is not None:
                call.lost()
            return False
        if call is None:
            self.duty.resident.drop()
            return not (self.ends_idle and self._line.close_if_empty())
        try:
            found = self._answer(call)
            self._count(found)
            call.events.put(found)
        except Stopping:
            call.lost()
            return False
        finally:
            self.activity = Activity()
        return True

    def stop(self) -> None:
        """Ends `serve` before the next step of training; may be called from any thread."""
        self._stopping.set()
        self._line.close()

    def _answer(self, call: Call) -> "pb.WorkEvent | Answer":
        plan = call.order.broadcast.plan

        def say(stage: str, done: int, planned: int) -> None:
            if self._stopping.is_set():
                raise Stopping
            self.activity = Activity(plan.run, plan.round, stage)
            self.totals.steps += stage == "training"
            progress = pb.Progress(stage=stage, step=done, steps=planned)
            call.events.put(pb.WorkEvent(progress=progress))

        try:
            return self.duty.do(call.order, say)
        except Stopping:
            raise
        except WorkRefused as e:
            return _refused(e.code, str(e))
        except Exception as e:  # memory that ran out, say; the next call may well succeed
            log.exception("round %d of run %s failed", plan.round, plan.run)
            # the text of an error may quote an example
            private = call.order.job.privacy is not None
            what = (str(e).splitlines() or [""])[0]
            return _refused("FAILED", f"{type(e).__name__}: {SEE_LOG if private else what}")

    def _count(self, found: "pb.WorkEvent | Answer") -> None:
        if isinstance(found, Answer):
            self.totals.answered += 1
            self.totals.bytes_down += found.bytes_down
            self.totals.bytes_up += found.bytes_up
        else:
            self.totals.refused += 1

    def Status(self, request: pb.StatusRequest, context: Any) -> pb.StatusReply:  # noqa: N802
        """See worker.proto."""
        activity = self.activity
        return pb.StatusReply(
            version=__version__,
            client=self.duty.name,
            pid=os.getpid(),
            queued=self._line.waiting,
            run=activity.run,
            round=activity.round,
            stage=activity.stage,
            base_fingerprint=self.duty.resident.fingerprint,
            memory_bytes=_resident_bytes(),
            kept_updates=len(self.duty.outbox),
            **asdict(self.totals),
        )

    def Work(  # noqa: N802
        self, request_iterator: Iterator[pb.WorkMessage], context: Any
    ) -> Iterator[pb.WorkEvent]:
        """See worker.proto."""
        try:
            call = Call(read_order(request_iterator))
        except Unreadable as e:
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, str(e))
        except WorkRefused as e:
            yield _refused(e.code, str(e))
            return
        # work that has begun goes on without its caller
        if not context.add_callback(lambda: self._line.leave(call)):
            return
        try:
            self._line.join(call)
        except LineFull:
            why = f"{self._line.most} calls wait already; try again later"
            context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, why)
        except LineClosed:
            context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is ending; try again")
        while True:
            event = call.events.get()
            if isinstance(event, _Lost):
                context.abort(grpc.StatusCode.UNAVAILABLE, "the worker is ending; try again")
            elif isinstance(event, Answer):
                yield from _answered(event)
                return
            else:
                yield event
                if event.WhichOneof("content") == "refused":
                    return


def _answered(answer: Answer) -> Iterator[pb.WorkEvent]:
    payload = answer.payload or b""
    for start in range(0, len(payload), CHUNK_BYTES):
        yield pb.WorkEvent(payload=payload[start : start + CHUNK_BYTES])
    done = pb.Done(
        manifest=answer.manifest,
        bytes_down=answer.bytes_down,
        bytes_up=answer.bytes_up,
        seconds_to_first_step=answer.seconds_to_first_step,
        seconds=answer.seconds,
        kept=answer.kept,
    )
    yield pb.WorkEvent(done=done)


def _refused(code: str, detail: str) -> pb.WorkEvent:
    return pb.WorkEvent(refused=pb.Refused(code=code, detail=detail))


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
