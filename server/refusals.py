"""Refusals: what went wrong in a call, as a gRPC status."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn

import grpc

from fedlora.errors import StorageError, UploadRefused

log = logging.getLogger(__name__)

_CODES = {
    "busy": grpc.StatusCode.ABORTED,
    "taken": grpc.StatusCode.ALREADY_EXISTS,
    "closed": grpc.StatusCode.NOT_FOUND,
    "offset": grpc.StatusCode.FAILED_PRECONDITION,
    "size": grpc.StatusCode.INVALID_ARGUMENT,
    "digest": grpc.StatusCode.DATA_LOSS,
}


@contextmanager
def statuses(context: grpc.ServicerContext) -> Iterator[None]:
    """Turns what the store raises inside into a status."""
    try:
        yield
    except UploadRefused as e:
        refuse(context, _CODES[e.code], str(e))
    except StorageError as e:
        # the text names paths, which are the operator's business
        log.error("upload: %s", e)
        refuse(
            context,
            grpc.StatusCode.RESOURCE_EXHAUSTED,
            "the server cannot store the upload; its log says why",
        )


def refuse(context: grpc.ServicerContext, code: grpc.StatusCode, why: str) -> NoReturn:
    """Ends the call with this status."""
    context.abort(code, why)
    raise AssertionError("abort raises")
