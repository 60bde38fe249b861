"""The digest of what all clients of a session are asked to do.

A server that has all but one client train nothing, or from a start where their gradients
vanish, reads the one update that is left off the sum: Pasquini et al., "Eluding Secure
Aggregation in Federated Learning via Model Inconsistency", https://arxiv.org/abs/2111.07380.
So every key and signature of a session is bound to the work, and clients with other work do
not meet in one.
"""

from dataclasses import replace

from fedlora.messages import Broadcast
from fedlora.wire import encode_broadcast, sha256


def work_digest(job_sha256: str, broadcast: Broadcast) -> str:
    """SHA-256 of the job and of the broadcast but for the name of its client."""
    nobodys = replace(broadcast, plan=replace(broadcast.plan, client=""))
    return sha256(job_sha256.encode() + encode_broadcast(nobodys))
