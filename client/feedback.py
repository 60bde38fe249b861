"""Error feedback: what coding takes from an update is added to the client's next one.

Seide et al., "1-Bit Stochastic Gradient Descent and its Application to Data-Parallel
Distributed Training of Speech DNNs", Interspeech 2014; Karimireddy et al., "Error Feedback
Fixes SignSGD and other Gradient Compression Schemes", https://arxiv.org/abs/1901.09847,
algorithm 1. With delta_t the change in round t and e_0 = 0,

    x_t = delta_t + e_t,    C(x_t) is sent,    e_(t+1) = x_t - C(x_t)

so that all that was sent is all that changed, but for the last e: an entry that is too small
to travel adds up until it is not. e is that of the sent tensors; one that is not sent in a
round keeps its own.
"""

import torch
from torch import Tensor

from fedlora.adapter import Tensors
from fedlora.compress import round_trip
from fedlora.messages import Coding


def add_feedback(delta: Tensors, owed: Tensors) -> dict[str, Tensor]:
    """The update with what is owed, x = delta + e.

    Args:
        delta: the change of every sent tensor.
        owed: e; a tensor that is not in it, or has another shape, owes nothing. A client that
            is given another rank forgets what it owed at the old one.
    """
    return {
        name: tensor + owed[name] if _fits(owed.get(name), tensor) else tensor
        for name, tensor in delta.items()
    }


def still_owed(change: Tensors, received: Tensors, owed: Tensors) -> dict[str, Tensor]:
    """The next e, also of tensors that are not sent in this round.

    Args:
        change: x.
        received: C(x), by name as x.
        owed: e.
    """
    left = {name: tensor - received[name] for name, tensor in change.items()}
    # the server refuses an update that is not finite; e must not keep it for ever
    if not all(bool(torch.isfinite(tensor).all()) for tensor in left.values()):
        return dict(owed)
    return {**owed, **left}


def followed(own: Tensors, change: Tensors, coding: Coding) -> dict[str, Tensor]:
    """A client's control variates after their change has travelled: as the server knows them.

    The server adds up what it decodes, so its c stays the mean of the clients' c_i, and what
    coding took is in the next round's change.
    """
    sent = round_trip(change, coding)
    return {name: own[name] + sent[name] for name in change}


def _fits(owed: Tensor | None, tensor: Tensor) -> bool:
    return owed is not None and owed.shape == tensor.shape
