"""Events of a run: every line once, in order, live, through an interruption."""

import threading
from itertools import islice

import pytest

from fedlora.errors import RunFolderError
from fedlora.server.run_events import FollowedFolders

LINES = ['{"event":"start"}', '{"event":"round","round":1}', '{"event":"round","round":2}']
END = '{"event":"end"}'


def run_folder(tmp_path, name="run", lines=LINES):
    folder = tmp_path / name
    folder.mkdir()
    (folder / "job.toml").touch()
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return folder / "metrics.jsonl"


def follow(tmp_path, run="run", skip=0, stop=None):
    events = FollowedFolders(tmp_path).follow(run, skip, stop or threading.Event())
    return ((event.number, event.json) for event in events)


@pytest.mark.parametrize("skip", [0, 2, 3, 4, 9])
def test_a_finished_run_is_told_from_where_one_is_and_ends(tmp_path, skip):
    """Also to one who was told of more, before the run was continued from an earlier round."""
    run_folder(tmp_path, lines=[*LINES, END])
    assert list(follow(tmp_path, skip=skip)) == list(enumerate([*LINES, END]))[min(skip, 3) :]


def test_events_come_as_they_are_written_and_never_half(tmp_path):
    path = run_folder(tmp_path)
    events = follow(tmp_path)
    assert list(islice(events, 3)) == list(enumerate(LINES))
    with path.open("a") as file:
        file.write(END[:5])
        file.flush()
        writer = threading.Timer(0.3, lambda: (file.write(END[5:] + "\n"), file.flush()))
        writer.start()
        assert list(events) == [(3, END)]


def test_a_continued_run_repeats_nothing(tmp_path):
    """Continuing replaces the file by what was committed, and drops the end."""
    path = run_folder(tmp_path)
    events = follow(tmp_path)
    list(islice(events, 3))
    other = path.with_name("other")
    other.write_text("\n".join([*LINES[:2], '{"event":"resume"}', LINES[2], END]) + "\n")
    other.rename(path)
    assert list(events) == [(3, LINES[2]), (4, END)]


def test_a_run_that_is_continued_with_fewer_events_is_told_to_its_end(tmp_path):
    """A round that was under way had events, and is done again without them."""
    path = run_folder(tmp_path, lines=[*LINES, '{"event":"rejected"}', '{"event":"rejected"}'])
    events = follow(tmp_path)
    list(islice(events, 5))
    other = path.with_name("other")
    other.write_text("\n".join(LINES) + "\n")
    other.rename(path)
    added = ['{"event":"round","round":3}', END]

    def append():
        with path.open("a") as file:
            file.write("\n".join(added) + "\n")

    writer = threading.Timer(0.5, append)
    writer.start()
    assert list(events) == [(3, added[0]), (4, END)]


def test_a_file_that_comes_later_is_waited_for(tmp_path):
    path = run_folder(tmp_path, lines=[END])
    hidden = path.rename(path.with_name("hidden"))
    writer = threading.Timer(0.1, lambda: hidden.rename(path))
    writer.start()
    assert list(follow(tmp_path)) == [(0, END)]


def test_a_run_whose_folder_goes_ends(tmp_path):
    path = run_folder(tmp_path)
    events = follow(tmp_path)
    list(islice(events, 3))
    path.parent.rename(tmp_path / "gone")
    assert list(events) == []


def test_no_name_is_the_newest_run(tmp_path):
    for name in ("b", "a"):
        run_folder(tmp_path, name, [END])
    import os

    os.utime(tmp_path / "a" / "job.toml", ns=(2, 2))
    os.utime(tmp_path / "b" / "job.toml", ns=(1, 1))
    [event] = FollowedFolders(tmp_path).follow("", 0, threading.Event())
    assert event.run == "a"


@pytest.mark.parametrize("run", ["", "none", "..", "a/b", "\0"])
def test_a_run_that_is_not_there_is_refused(tmp_path, run):
    with pytest.raises(RunFolderError, match="there is no run"):
        list(follow(tmp_path, run))


def test_a_line_without_end_is_not_read_for_ever(tmp_path):
    path = run_folder(tmp_path)
    path.write_bytes(b"x" * (2 << 20))
    with pytest.raises(RunFolderError, match="line"):
        list(follow(tmp_path))
