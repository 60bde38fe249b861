"""Finds a strategy class by name, by `flwr:Class`, `file.py:Class` or `package.module:Class`."""

import importlib
import importlib.util
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from fedlora.adapter import AdapterState, MethodTraits
from fedlora.config.job import FederationSection
from fedlora.errors import ConfigError, FedloraError, near_miss
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Conditions, Strategy, StrategyState
from fedlora.strategies.sums import check_sums
from fedlora.strategies.wrappers import WRAPPERS


def make_strategy(section: FederationSection, traits: MethodTraits) -> Strategy:
    """The job's strategy inside its wrappers; the first wrapper sees the updates first.

    Raises:
        ConfigError: an unknown strategy, wrapper or option.
    """
    kind = find_strategy(section.strategy)
    with before_round_1(section.strategy, "__init__"):
        strategy = kind(traits, section.strategy_options)
    for table in reversed(section.wrappers):
        options = dict(table)
        name = options.pop("name", None)
        if name is None:
            raise ConfigError(
                f"federation.wrappers has {table!r}, which names no wrapper; expected e.g. "
                '{name = "krum"}'
            )
        if not isinstance(name, str) or name not in WRAPPERS:
            raise ConfigError(
                f"federation.wrappers names {name!r}, which is not known"
                f"{near_miss(str(name), WRAPPERS)}; known: {', '.join(WRAPPERS)}"
            )
        strategy = WRAPPERS[name](strategy, options)
    return strategy


def check_strategy(strategy: Strategy, given: Conditions) -> None:
    """The strategy's own `check`.

    Raises:
        ConfigError, AdapterError: it refuses, or fails.
    """
    with before_round_1(strategy.name, "check"):
        strategy.check(given)
    if given.secure:
        check_sums(strategy, given)


def begin(strategy: Strategy, adapter: AdapterState) -> StrategyState:
    """The state before round 1, made by the strategy's `init`.

    Raises:
        ConfigError: it fails, or makes something else.
    """
    with before_round_1(strategy.name, "init"):
        state = strategy.init(adapter)
        if not isinstance(state, StrategyState) or state.round != 0:
            raise ConfigError(
                f"strategy {strategy.name!r}: init returned {type(state).__name__}; expected a "
                "StrategyState of round 0"
            )
        return state


@contextmanager
def before_round_1(name: str, step: str) -> Iterator[None]:
    """Inside, whatever a strategy raises that is no refusal becomes a ConfigError.

    Args:
        name: of the strategy.
        step: name of the function that is called.
    """
    try:
        yield
    except FedloraError:
        raise
    except (Exception, SystemExit) as e:  # a plug-in may fail in any way it likes
        raise ConfigError(
            f"strategy {name!r} failed in {step} before round 1: {type(e).__name__}: {e}"
        ) from e


def find_strategy(name: str) -> type[Strategy]:
    """The class that `federation.strategy = name` means.

    Raises:
        ConfigError: unknown name, missing file, or not a Strategy class.
    """
    if ":" not in name:
        if name.endswith(".py"):
            raise ConfigError(
                f'federation.strategy = "{name}" lacks the class; expected "{name}:Class"'
            )
        if name not in STRATEGIES:
            raise ConfigError(
                f'federation.strategy = "{name}" is not known{near_miss(name, STRATEGIES)}; '
                f"known: {', '.join(STRATEGIES)}"
            )
        return STRATEGIES[name]
    if name.startswith("flwr:"):
        return _from_flower(name)
    place, _, class_name = name.rpartition(":")
    try:
        module = (
            _from_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
        )
    except ConfigError:
        raise
    except (Exception, SystemExit) as e:  # a plug-in may fail to import in any way it likes
        raise ConfigError(
            f'federation.strategy = "{name}" cannot be imported: {type(e).__name__}: {e}'
            f"{_line_of(e, place)}"
        ) from e
    found = getattr(module, class_name, None)
    if not (isinstance(found, type) and issubclass(found, Strategy)):
        classes = [
            key
            for key, value in vars(module).items()
            if isinstance(value, type) and issubclass(value, Strategy) and value is not Strategy
        ]
        raise ConfigError(
            f'federation.strategy = "{name}": {place} has no strategy class {class_name!r}; '
            f"it has {', '.join(classes) or 'none'} (a class derived from "
            "fedlora.strategies.base.Strategy)"
        )
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(
            f'federation.strategy = "{name}": {class_name} does not define {", ".join(missing)}'
        )
    return found


def _from_flower(name: str) -> type[Strategy]:
    # importing Flower takes a second, which no other strategy needs
    from fedlora.strategies.from_flower import flower_strategy

    return flower_strategy(name)


def _line_of(error: BaseException, place: str) -> str:
    """The last line of the plug-in's file that was reached; empty if it was not run."""
    frames = traceback.extract_tb(error.__traceback__)
    lines = [f.lineno for f in frames if Path(f.filename) == Path(place)]
    return f" ({place}, line {lines[-1]})" if lines else ""


def _from_file(path: Path) -> object:
    if not path.is_file():
        raise ConfigError(f"federation.strategy names the file {path}, which does not exist")
    spec = importlib.util.spec_from_file_location(f"fedlora_plugin_{path.stem}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses and pickle look a class's module up by name
    sys.modules[spec.name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module
