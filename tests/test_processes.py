"""Child processes that are started again, and end with their supervisor."""

import os
import signal
import subprocess
import sys
import time

import pytest

from fedlora.processes import Child

PYTHON = [sys.executable, "-u", "-c"]


def wait_for(condition):
    ends = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < ends
        time.sleep(0.01)


def is_running(pid):
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.fixture
def child(tmp_path):
    def make(code, most_output=1 << 20, **environment):
        command, log = [*PYTHON, code], tmp_path / "logs" / "it.log"
        made.append(Child("it", command, log, environment, most_output))
        return made[-1]

    made = []
    yield make
    for child in made:
        child.stop()


def test_a_child_that_dies_is_started_again(child):
    it = child("import time; time.sleep(100)")
    it.start()
    first = it.pid
    assert it.tend() is False
    os.kill(first, signal.SIGKILL)
    wait_for(lambda: not it.is_alive)
    assert it.tend() is True
    wait_for(lambda: it.tend() or it.is_alive)
    assert (it.starts, it.pid != first) == (2, True)


def test_what_it_started_dies_with_it(child):
    """A successor must not find its predecessor's children at work beside it."""
    code = (
        "import subprocess, sys, time; "
        "print(subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(100)']).pid); "
        "time.sleep(100)"
    )
    it = child(code)
    it.start()
    wait_for(lambda: it.last_lines().strip())
    grandchild = int(it.last_lines().split()[-1])
    assert is_running(grandchild)
    os.kill(it.pid, signal.SIGKILL)
    wait_for(lambda: not it.is_alive)
    it.tend()
    wait_for(lambda: not is_running(grandchild))


def test_one_that_will_not_end_is_killed(child, monkeypatch):
    monkeypatch.setattr("fedlora.processes.GRACE_S", 0.2)
    it = child(
        "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
        "print('deaf'); time.sleep(100)"
    )
    it.start()
    wait_for(lambda: "deaf" in it.last_lines())
    it.stop()
    assert not is_running(it.pid)


def test_children_end_with_a_supervisor_that_is_killed(tmp_path):
    code = (
        "import sys, time; from pathlib import Path; from fedlora.processes import Child; "
        "c = Child('it', [sys.executable, '-c', 'import time; time.sleep(100)'], "
        f"Path({str(tmp_path)!r}) / 'it.log'); c.start(); print(c.pid, flush=True); "
        "time.sleep(100)"
    )
    supervisor = subprocess.Popen([*PYTHON, code], stdout=subprocess.PIPE, text=True)
    pid = int(supervisor.stdout.readline())
    assert is_running(pid)
    supervisor.kill()
    supervisor.wait()
    wait_for(lambda: not is_running(pid))


def test_it_has_its_own_variables_and_finds_programs_of_this_environment(child):
    it = child("import os, shutil; print(os.environ['SAID'], shutil.which('fedlora'))", SAID="yes")
    it.start()
    wait_for(lambda: "yes" in it.last_lines())
    assert it.last_lines().split() == [
        "yes",
        os.path.join(os.path.dirname(sys.executable), "fedlora"),
    ]


def test_what_a_child_prints_is_bounded_and_its_end_is_kept(child):
    code = (
        "import signal\n"
        "signal.signal(signal.SIGUSR1, lambda *_: print('again'))\n"
        "for i in range(1000): print(f'{i:099d}')\n"
        "print('done')\n"
        "while True: signal.pause()"
    )
    it = child(code, most_output=5000)
    it.start()
    wait_for(lambda: "done" in it.last_lines())
    it.tend()
    before = it.output.with_name("it.log.1")
    assert before.stat().st_size == 5000
    assert before.read_text().splitlines()[-2:] == [f"{999:099d}", "done"]
    # what it prints next stands at the front, without a hole
    while not it.output.stat().st_size:
        os.kill(it.pid, signal.SIGUSR1)
        time.sleep(0.01)
    assert it.output.read_text().startswith("again\n")
    assert it.output.stat().st_size <= 5000
    it.tend()
    assert before.stat().st_size == 5000
