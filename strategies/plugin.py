"""Finds a strategy class by name, by `flwr:Class`, `file.py:Class` or `package.module:Class`."""

import importlib
import importlib.util
import sys
from pathlib import Path

from fedlora.adapter import MethodTraits
from fedlora.config.job import FederationSection
from fedlora.errors import ConfigError, near_miss
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Strategy
from fedlora.strategies.wrappers import WRAPPERS


def make_strategy(section: FederationSection, traits: MethodTraits) -> Strategy:
    """The job's strategy inside its wrappers; the first wrapper sees the updates first.

    Raises:
        ConfigError: an unknown strategy, wrapper or option.
    """
    strategy = find_strategy(section.strategy)(traits, section.strategy_options)
    for table in reversed(section.wrappers):
        options = dict(table)
        name = options.pop("name", None)
        if not isinstance(name, str) or name not in WRAPPERS:
            raise ConfigError(
                f"federation.wrappers names {name!r}, which is not known"
                f"{near_miss(str(name), WRAPPERS)}; known: {', '.join(WRAPPERS)}"
            )
        strategy = WRAPPERS[name](strategy, options)
    return strategy


def find_strategy(name: str) -> type[Strategy]:
    """The class that `federation.strategy = name` means.

    Raises:
        ConfigError: unknown name, missing file, or not a Strategy class.
    """
    if ":" not in name:
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
    except Exception as e:  # a plug-in may fail to import in any way it likes
        raise ConfigError(
            f'federation.strategy = "{name}" cannot be imported: {type(e).__name__}: {e}'
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
            f"it has {', '.join(classes) or 'none'}"
        )
    if missing := sorted(found.__abstractmethods__):
        raise ConfigError(
            f'federation.strategy = "{name}": {class_name} does not define {", ".join(missing)}'
        )
    return found


def _from_flower(name: str) -> type[Strategy]:
    try:
        from fedlora.strategies.from_flower import flower_strategy
    except ImportError as e:
        raise ConfigError(
            f'federation.strategy = "{name}" needs Flower ({e}); install it with: '
            "pip install 'fedlora[flower]'"
        ) from e
    return flower_strategy(name)


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
