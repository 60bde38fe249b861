"""What the privacy of a unit does not cover, and how many clients that of clients needs."""

from collections.abc import Mapping

# below it, noise that hides a client drowns what clients have in common
FEW_CLIENTS = 300

NOT_COVERED: Mapping[str, tuple[str, ...]] = {
    "record": (
        "how many examples a client has, when it takes part and how long it takes",
        "the validation and test examples that figures are measured on, unless metrics are noisy",
        "the choice of hyper-parameters by looking at runs on the same data",
        "a person with k examples: epsilon holds for one of them",
    ),
    "client": (
        "the server and whoever reads its memory, its logs or its run folder's spool",
        "who is enrolled, when clients are connected and how long a round takes",
        "the choice of hyper-parameters by looking at runs on the same clients",
        "scores on data that are a client's own",
    ),
}
