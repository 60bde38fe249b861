"""Whether a strategy can do with the sum of updates alone, as secure aggregation leaves it."""

from fedlora.errors import ConfigError
from fedlora.strategies.base import Conditions, Strategy
from fedlora.strategies.wrappers.base import Wrapper


def check_sums(strategy: Strategy, given: Conditions) -> None:
    """Refuses what needs more of the updates than their weighted mean.

    A linear strategy's merge of n updates is that of one update, their mean, with the sum of
    their weights; unless it counts clients, which its waiver of the law "split" says.

    Raises:
        ConfigError: with what needs more, and what to choose instead.
    """
    for part in (strategy, *(strategy.inside() if isinstance(strategy, Wrapper) else ())):
        kind = "wrapper" if isinstance(part, Wrapper) else "strategy"
        if why := _needs(part):
            cure = (
                "leave it out of federation.wrappers"
                if kind == "wrapper"
                else "choose strategy fedit, ffa-lora, rolora, fedsvd, fedsa-lora or fed-sb"
            )
            raise ConfigError(
                f"federation.secure_aggregation = true does not fit {kind} {part.name!r}, which "
                f"{why}; {cure}, or set federation.secure_aggregation = false"
            )
    odd = sorted({given.spec.rank, *given.ranks})
    if len(odd) > 1:
        raise ConfigError(
            f"federation.secure_aggregation = true sums tensors of one shape, but clients have "
            f"ranks {odd}; give all clients rank {given.spec.rank}"
        )


def _needs(part: Strategy) -> str:
    """What a strategy or wrapper needs beside the mean; of a wrapper, by itself."""
    if isinstance(part, Wrapper):
        if type(part).screen is not Wrapper.screen or not type(part).linear:
            return "looks at single updates"
        return "counts clients" if "split" in type(part).waives else ""
    if not part.linear:
        return "needs more than a weighted sum of updates"
    if part.budgets:
        return "lets every client send other slots"
    return "counts clients" if "split" in part.waives else ""
