"""What is known of Flower's stock strategies: which can merge adapters, and why others cannot."""

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rule:
    """What the bridge knows of a stock class.

    Attributes:
        mean: it works on the mean of the replies alone.
        kept: attributes that live from round to round: arrays by name, or in order of name.
        waives: as of a strategy, with the class's own defaults.
    """

    mean: bool = False
    kept: tuple[str, ...] = ()
    waives: Mapping[str, str] = field(default_factory=dict)


_STEP = {
    "alone": "the server's step is not the clients' mean change",
    "heads": "heads take the server's step, as every tensor",
    "same": "the server's step is not the clients' mean change",
}
_MOMENTUM = {**_STEP, "still": "momentum goes on when clients stand still"}
_ALIKE = {
    "heads": "heads are merged by the same rule as every tensor",
    "split": "the rule counts clients, not their weights",
    "zero-weight": "the rule counts clients, not their weights",
}

RULES = {
    "Bulyan": Rule(waives={**_ALIKE, "alone": "of fewer than 4 f + 3 replies nothing is merged"}),
    "FedAdagrad": Rule(True, ("m_t", "v_t"), _STEP),
    "FedAdam": Rule(True, ("m_t", "v_t"), _MOMENTUM),
    "FedAvg": Rule(True),
    "FedAvgM": Rule(True, ("momentum_vector",)),
    "FedMedian": Rule(waives=_ALIKE),
    "FedProx": Rule(True),
    "FedTrimmedAvg": Rule(waives=_ALIKE),
    "FedYogi": Rule(True, ("m_t", "v_t"), _MOMENTUM),
    "Krum": Rule(waives=_ALIKE),
    "MultiKrum": Rule(waives=_ALIKE),
}

_NOISE = (
    "clips and adds noise by what Flower sampled and sent, so that its guarantee does not hold "
    "for messages that Flower did not send; choose a strategy without it"
)
_TREES = "merges boosted trees, and an adapter has none; choose flwr:FedAvg"
_MASKS = "is a workflow of Flower's older interface and no strategy; choose flwr:FedAvg"
REFUSED = {
    "DifferentialPrivacyClientSideAdaptiveClipping": _NOISE,
    "DifferentialPrivacyClientSideFixedClipping": _NOISE,
    "DifferentialPrivacyServerSideAdaptiveClipping": _NOISE,
    "DifferentialPrivacyServerSideFixedClipping": _NOISE,
    "FedXgbBagging": _TREES,
    "FedXgbCyclic": _TREES,
    "QFedAvg": (
        "weighs each client by its loss at the model that was sent out, and clients report the "
        "mean loss along their training, which is another figure; choose flwr:FedAvg"
    ),
    "SecAggPlusWorkflow": _MASKS,
    "SecAggWorkflow": _MASKS,
}

_ROUNDS = "set federation.clients_per_round and federation.quorum"
_KEYS = "messages are not Flower's here"
_FUNCTION = "a job file holds no functions"
# parameters of Flower's constructors that the round loop, or nobody, answers for
NOT_HERE = {
    "arrayrecord_key": _KEYS,
    "configrecord_key": _KEYS,
    "eta_l": "Flower never uses it; set training.learning_rate",
    "evaluate_metrics_aggr_fn": _FUNCTION,
    "fraction_evaluate": "set evaluation.every",
    "fraction_train": _ROUNDS,
    "min_available_nodes": _ROUNDS,
    "min_evaluate_nodes": "set evaluation.every",
    "min_train_nodes": _ROUNDS,
    "selection_rule": _FUNCTION,
    "train_metrics_aggr_fn": _FUNCTION,
    "weighted_by_key": "set federation.weighting",
}
