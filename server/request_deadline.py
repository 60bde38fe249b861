"""Request deadline: a call whose only message does not come gives its thread back."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from fedlora.server.transfers import Transfers


class RequestDeadline(grpc.ServerInterceptor):  # type: ignore[misc]  # grpc has no types
    """Reads the message of unary calls under a deadline, for all services of a server.

    gRPC's Python server gives every call a thread at once and lets it wait for the message for
    ever. On the wire a message is a stream of one, so the handler is replaced by one that takes
    a stream, and the watchdog of `reads` can end the wait.

    Args:
        reads: places for calls whose message is awaited.
    """

    def __init__(self, reads: Transfers) -> None:
        self._reads = reads

    def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], grpc.RpcMethodHandler | None],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> grpc.RpcMethodHandler | None:
        """See grpc.ServerInterceptor."""
        handler = continuation(handler_call_details)
        if handler is None or handler.request_streaming:
            return handler
        inner = handler.unary_stream if handler.response_streaming else handler.unary_unary

        def unary(messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
            return inner(self._only(messages, context), context)

        def stream(messages: Iterator[Any], context: grpc.ServicerContext) -> Iterator[Any]:
            yield from inner(self._only(messages, context), context)

        made = (
            grpc.stream_stream_rpc_method_handler(
                stream, handler.request_deserializer, handler.response_serializer
            )
            if handler.response_streaming
            else grpc.stream_unary_rpc_method_handler(
                unary, handler.request_deserializer, handler.response_serializer
            )
        )
        return made

    def _only(self, messages: Iterator[Any], context: grpc.ServicerContext) -> Any:
        with self._reads.admit(context.cancel) as place:
            if place is None:
                context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls; try again")
            for message in messages:
                return message
        context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the call has no message")
