"""Strategies by name, by file and by module."""

import sys

import pytest

from fedlora.adapters import METHODS
from fedlora.config.job import FederationSection
from fedlora.errors import ConfigError
from fedlora.strategies import STRATEGIES
from fedlora.strategies.base import Conditions
from fedlora.strategies.fedit import FedIT
from fedlora.strategies.plugin import begin, check_strategy, find_strategy, make_strategy
from tests.server.cases import make_spec, random_state

GOOD = """
from __future__ import annotations

from dataclasses import dataclass

from fedlora.strategies.fedit import FedIT


@dataclass
class Note:
    text: str


class Mine(FedIT):
    name = "mine"
    options = {"power": 1.0, "steps": 2, "soft": False}
"""


@pytest.fixture
def plugin(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(GOOD)
    return path


@pytest.mark.parametrize("name", STRATEGIES)
def test_names_of_the_registry(name):
    found = find_strategy(name)
    assert found is STRATEGIES[name]
    assert found.name == name


def test_unknown_names_get_a_hint():
    with pytest.raises(ConfigError, match=r'did you mean "rolora"\?\); known: .*fedit'):
        find_strategy("rolorra")


def test_a_class_in_a_file(plugin):
    """Also with a dataclass and postponed annotations in it, which need a known module."""
    found = find_strategy(f"{plugin}:Mine")
    assert issubclass(found, FedIT)
    assert found(METHODS["lora"]).settings == {"power": 1.0, "steps": 2, "soft": False}


def test_a_class_in_a_module():
    assert find_strategy("fedlora.strategies.fedit:FedIT") is FedIT


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("{folder}/missing.py:Mine", "names the file .*missing.py, which does not exist"),
        ("{folder}/mine.py:Other", "has no strategy class 'Other'; it has FedIT, Mine"),
        ("{folder}/mine.py:Note", "has no strategy class 'Note'"),
        ("{folder}/mine.py:", "has no strategy class ''"),
        ("{folder}/broken.py:Mine", "cannot be imported: ZeroDivisionError"),
        ("{folder}/syntax.py:Mine", "cannot be imported: SyntaxError"),
        ("{folder}/half.py:Half", "Half does not define factors"),
        ("fedlora.nowhere:Mine", "cannot be imported: ModuleNotFoundError"),
        ("mine.py", 'expected "mine.py:Class"'),
        (":Mine", "cannot be imported"),
        ("..:Mine", "cannot be imported"),
        ("fedlora.strategies.base:Strategy", "does not define factors"),
    ],
)
def test_a_plug_in_that_cannot_be_used_says_why(plugin, name, message):
    folder = plugin.parent
    (folder / "broken.py").write_text("1 / 0\n")
    (folder / "syntax.py").write_text("class\n")
    (folder / "half.py").write_text(
        "from fedlora.strategies import Strategy\nclass Half(Strategy):\n    name = 'half'\n"
    )
    before = set(sys.modules)
    with pytest.raises(ConfigError, match=message):
        find_strategy(name.format(folder=folder))
    left = {m for m in set(sys.modules) - before if "broken" in m or "syntax" in m}
    assert left == set()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"powr": 2.0}, r'strategy_options.powr is not known.*\(did you mean "power"\?\)'),
        ({"power": "2"}, "strategy_options.power = '2' is a str; expected a float"),
        ({"steps": 2.5}, "strategy_options.steps = 2.5 is a float; expected a int"),
        ({"steps": True}, "strategy_options.steps = True is a bool"),
        ({"soft": 1}, "strategy_options.soft = 1 is a int; expected a bool"),
    ],
)
def test_options_of_another_name_or_type_are_refused(plugin, options, message):
    with pytest.raises(ConfigError, match=message):
        find_strategy(f"{plugin}:Mine")(METHODS["lora"], options)


def test_a_whole_number_will_do_for_a_float(plugin):
    found = find_strategy(f"{plugin}:Mine")(METHODS["lora"], {"power": 2})
    assert found.settings["power"] == 2


def raising(step):
    def fail(self, *args):
        raise ZeroDivisionError("oops")

    return type("Bad", (FedIT,), {"name": "bad", step: fail})(METHODS["lora"])


def test_what_fails_before_round_1_is_named():
    spec = make_spec()
    with pytest.raises(ConfigError, match="'bad' failed in check before round 1: ZeroDivision"):
        check_strategy(raising("check"), Conditions(spec, [2]))
    with pytest.raises(ConfigError, match="'bad' failed in init before round 1: ZeroDivision"):
        begin(raising("init"), random_state(spec))
    odd = type("Odd", (FedIT,), {"name": "odd", "init": lambda self, adapter: adapter})
    with pytest.raises(ConfigError, match="'odd': init returned AdapterState; expected a Strat"):
        begin(odd(METHODS["lora"]), random_state(spec))


def test_a_class_that_cannot_be_made_is_named(plugin):
    plugin.write_text(GOOD + "\n    def __init__(self, *args):\n        raise KeyError('x')\n")
    section = FederationSection(strategy=f"{plugin}:Mine")
    with pytest.raises(ConfigError, match=r"mine\.py:Mine' failed in __init__ before round 1: Key"):
        make_strategy(section, METHODS["lora"])
