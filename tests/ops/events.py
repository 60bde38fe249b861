"""Events of a made-up run, one of every kind at least, as a journal holds them."""

START = {
    "event": "start",
    "round": 0,
    "name": "demo",
    "strategy": "fedit",
    "method": "lora",
    "rounds": 3,
    "num_trained": 128,
    "clients": {"ann": {"rank": 4}, "bob": {"rank": 4}, "cyd": {"rank": 4}},
    "eval": {"accuracy": 0.25},
}


def round_event(number, clients=("ann", "bob", "cyd"), missing=(), **changes):
    return {
        "event": "round",
        "round": number,
        "train_loss": 1.0 / number,
        "eval": {"accuracy": number / 4},
        "clients": list(clients),
        "missing": list(missing),
        "rejected": 0,
        "bytes_up": 1000 * number,
        "bytes_down": 10 * number,
        "aggregation_error": 0.5,
        "epsilon": None,
        "seconds": {"clients": 2.0 * number, "reduce": 0.02},
        "adapter_sha256": "0" * 64,
        **changes,
    }


def rejected(number, client="bob", code="NORM"):
    return {
        "event": "rejected",
        "round": number,
        "client": client,
        "code": code,
        "detail": "norm 9 is above 1",
    }


EVENTS = [
    {"event": "waiting", "clients": [], "wanted": 3},
    {"event": "refused", "node": "7", "why": "it runs fedlora 0.0.1"},
    {"event": "not-ready", "node": "8", "why": "no worker"},
    {"event": "joined", "client": "ann", "node": "8"},
    START,
    {"event": "fallback", "why": "round 1 was damaged"},
    {"event": "warning", "round": 0, "why": "noise of 2 x clip"},
    round_event(1),
    rejected(2),
    {"event": "abandoned", "round": 2, "attempt": 0, "why": "1 of 3 clients"},
    rejected(2, "bob", "STALE"),
    round_event(2, ["ann"], ["cyd"]),
    {"event": "failed", "exit_code": 3, "why": "the disk is full"},
    {"event": "resume", "round": 2},
    round_event(3, epsilon=2.5, aggregation_error=None, train_loss=None),
    {"event": "end", "round": 3, "eval": {"accuracy": 0.8}},
]
