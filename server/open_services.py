"""Health and reflection: for every holder of a good certificate, and for no longer than a moment.

Both are gRPC's own, https://grpc.io/docs/guides/health-checking/ and
https://grpc.io/docs/guides/reflection/, whose streams would otherwise stay open for ever.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import grpc
from grpc_health.v1 import health
from grpc_reflection.v1alpha import reflection

from fedlora.server.identity import peer_identity
from fedlora.server.refusals import refuse
from fedlora.server.transfers import Transfers

# refuses a caller on his certificate
Admit = Callable[[grpc.ServicerContext], None]


def certified(is_revoked: Callable[[int], bool]) -> Admit:
    """Admits whoever has a certificate, of whatever role, that is not revoked."""

    def admit(context: grpc.ServicerContext) -> None:
        identity = peer_identity(context)
        if identity is None:
            refuse(context, grpc.StatusCode.UNAUTHENTICATED, "a certificate is required")
        if is_revoked(identity.serial):
            refuse(
                context,
                grpc.StatusCode.PERMISSION_DENIED,
                f"the certificate of {identity.name!r} (serial {identity.serial}) is revoked",
            )

    return admit


def everybody(context: grpc.ServicerContext) -> None:
    """Admits all."""


class HealthService(health.HealthServicer):  # type: ignore[misc]  # grpc has no types
    """Health without Watch, which holds a thread for as long as the caller likes.

    Args:
        admit: whom to answer.
    """

    def __init__(self, admit: Admit) -> None:
        super().__init__()
        self._admit = admit

    def Check(self, request: Any, context: grpc.ServicerContext) -> Any:  # noqa: N802
        """See grpc.health.v1."""
        self._admit(context)
        return super().Check(request, context)

    def Watch(self, request: Any, context: grpc.ServicerContext, *_: Any) -> Any:  # noqa: N802
        """Refused."""
        refuse(context, grpc.StatusCode.UNIMPLEMENTED, "there is no Watch here; call Check")


class ReflectionService(reflection.ReflectionServicer):  # type: ignore[misc]  # grpc has no types
    """Reflection whose streams end when their place is swept.

    Args:
        names: of the services to show.
        admit: whom to answer.
        reads: places for calls whose messages are awaited.
    """

    def __init__(self, names: Sequence[str], admit: Admit, reads: Transfers) -> None:
        super().__init__(names)
        self._admit = admit
        self._reads = reads

    def ServerReflectionInfo(  # noqa: N802
        self, requests: Iterator[Any], context: grpc.ServicerContext
    ) -> Iterator[Any]:
        """See grpc.reflection.v1alpha."""
        self._admit(context)
        with self._reads.admit(context.cancel) as place:
            if place is None:
                refuse(context, grpc.StatusCode.RESOURCE_EXHAUSTED, "too many calls; try again")
            yield from super().ServerReflectionInfo(requests, context)
