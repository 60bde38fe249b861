"""The checker of histories: silent on a run that kept its promises, loud on every broken one."""

from dataclasses import replace

import pytest

from tests.faults.history import Found, Operation, problems

CLIENTS = ("ann", "bob")
LAST = 3


def rounds():
    found = {0: Found("r0", None, 0, (), (), ())}
    for number in range(1, LAST + 1):
        found[number] = Found(f"r{number}", f"r{number - 1}", 0, CLIENTS, (), ())
    return found


def history():
    made = []
    for number in range(1, LAST + 1):
        for client in CLIENTS:
            for what in ("trained", "accepted"):
                key = (client, number, 0)
                made += [Operation(what, done, key, f"{client}{number}") for done in (False, True)]
        made += [Operation("committed", done, (number,), f"r{number}") for done in (False, True)]
    return made


def found_in(change_history=lambda entries: entries, change_rounds=lambda found: found):
    return problems(change_history(history()), change_rounds(rounds()), LAST)


def without(what, key, done):
    return lambda entries: [e for e in entries if (e.what, e.key, e.done) != (what, key, done)]


def again(what, key, **changes):
    def change(entries):
        pair = [e for e in entries if (e.what, e.key) == (what, key)]
        return [*entries, *(replace(e, **changes) for e in pair)]

    return change


def put(number, **changes):
    return lambda found: {**found, number: replace(found[number], **changes)}


def test_a_run_that_kept_its_promises_has_no_problems():
    assert found_in() == []


@pytest.mark.parametrize("what", ["trained", "accepted", "committed"])
def test_a_kill_between_an_operation_and_its_note_is_no_problem(what):
    key = (2,) if what == "committed" else ("ann", 2, 0)
    assert found_in(without(what, key, True)) == []


def test_an_attempt_that_was_cut_off_and_done_again_is_no_problem():
    begun = Operation("committed", False, (2,), "lost with its process")
    assert found_in(lambda entries: [begun, *entries]) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda found: {n: f for n, f in found.items() if n != 3}, "round 3 was acknowledged and"),
        (put(3, digest="other"), "round 3 was acknowledged and is lost"),
        (put(2, previous="other"), "round 2 does not follow"),
        (put(2, contributions=("ann", "ann", "bob")), "counts ann 2 times"),
        (put(2, contributions=("ann",)), "lost the accepted update of ['bob']"),
        (put(2, contributions=("ann", "bob", "eve")), "counts eve, whose update never came"),
        (put(2, attempt=1), "whose update never came"),
    ],
)
def test_a_folder_that_is_not_what_was_acknowledged_is_noticed(change, message):
    assert any(message in problem for problem in found_in(change_rounds=change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (again("committed", (2,)), "round 2 was committed 2 times"),
        (again("committed", (2,), digest="other"), "round 2 was acknowledged and is lost"),
        (again("accepted", ("ann", 2, 0)), "was accepted 2 times"),
        (again("trained", ("ann", 2, 0)), "was made 2 times"),
        (again("trained", ("ann", 2, 0), digest="other"), "as 2 different ones"),
        (
            lambda entries: [e for e in entries if e.key != (2,)],
            "round 2 stands, and nobody committed it",
        ),
        (
            lambda entries: [e for e in entries if (e.what, e.key) != ("trained", ("ann", 2, 0))],
            "that its client did not make",
        ),
    ],
)
def test_a_history_that_breaks_a_promise_is_noticed(change, message):
    assert any(message in problem for problem in found_in(change))


def test_late_and_refused_updates_are_not_lost():
    assert found_in(change_rounds=put(2, contributions=("ann",), missing=("bob",))) == []
    assert found_in(change_rounds=put(2, contributions=("ann",), rejected=("bob",))) == []
