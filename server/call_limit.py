"""Call limit: nobody holds so many calls at once that others find no thread."""

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import grpc


class CallLimit(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Refuses a caller's further calls while `most` of his are open, for all services of a server.

    A caller is the name in his certificate, over however many connections; without certificates
    there is nothing to tell callers by, and no limit.

    Args:
        most: calls of one caller at once.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._open: Counter[bytes] = Counter()

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        if handler is None:
            return None
        kinds = {
            (False, False): (handler.unary_unary, grpc.unary_unary_rpc_method_handler),
            (False, True): (handler.unary_stream, grpc.unary_stream_rpc_method_handler),
            (True, False): (handler.stream_unary, grpc.stream_unary_rpc_method_handler),
            (True, True): (handler.stream_stream, grpc.stream_stream_rpc_method_handler),
        }
        inner, make = kinds[handler.request_streaming, handler.response_streaming]

        def one(request: Any, context: grpc.ServicerContext) -> Any:
            with self._counted(context):
                return inner(request, context)

        def many(request: Any, context: grpc.ServicerContext) -> Iterator[Any]:
            with self._counted(context):
                yield from inner(request, context)

        limited = many if handler.response_streaming else one
        return make(limited, handler.request_deserializer, handler.response_serializer)

    @contextmanager
    def _counted(self, context: grpc.ServicerContext) -> Iterator[None]:
        names = context.auth_context().get("x509_common_name")
        if not names:
            yield
            return
        name = bytes(names[0])
        with self._lock:
            has_place = self._open[name] < self._most
            if has_place:
                self._open[name] += 1
        if not has_place:
            context.abort(
                grpc.StatusCode.RESOURCE_EXHAUSTED,
                f"{self._most} calls of {name.decode(errors='replace')!r} are open; try again",
            )
        try:
            yield
        finally:
            with self._lock:
                self._open[name] -= 1
                if not self._open[name]:
                    del self._open[name]
