"""What federation.secure_aggregation does not go with."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fedlora.config.job import Job

KEY = "federation.secure_aggregation = true"


def secure_misfits(job: "Job") -> list[str]:
    """Everything in a job that secure aggregation cannot do, with what to choose instead."""
    federation, problems = job.federation, []
    if federation.mode == "async":
        problems.append(
            f'{KEY} sums updates of one round; federation.mode = "async" has none: set it to "sync"'
        )
    if job.compression.up != "none" or job.compression.top_k < 1:
        problems.append(
            f"{KEY} sends whole integers; compression.up and compression.top_k do not apply: "
            "leave them out, or halve the upload by federation.secure_bits = 32"
        )
    if job.privacy is not None and job.privacy.unit == "client":
        problems.append(
            f'{KEY} hides single updates, which privacy.unit = "client" clips at the server: '
            'choose privacy.unit = "record", or one of the two'
        )
    if federation.secure_bits == 32 and federation.weighting == "examples":
        problems.append(
            "federation.secure_bits = 32 leaves no room for weights: set federation.weighting = "
            '"uniform", or federation.secure_bits = 64'
        )
    most = federation.clients_per_round or job.partition.clients
    if most and not 3 <= most <= 64:
        problems.append(
            f"{KEY} needs 3 to 64 clients per round; there are {most}: set "
            "federation.clients_per_round"
        )
    return problems
