import sysconfig
from pathlib import Path

import pytest

from fedlora.data import stdlib
from fedlora.errors import DataError


def test_federated_and_pretraining_share_no_module_and_no_path():
    federated_names = [name for names in stdlib.FEDERATED_AREAS.values() for name in names]
    assert len(set(federated_names)) == len(federated_names)
    assert not set(federated_names) & set(stdlib.PRETRAINING)

    federated = [file.path for file in stdlib.federated_files()]
    pretraining = [file.path for file in stdlib.pretraining_files()]
    assert len(set(federated)) == len(federated)
    assert len(set(pretraining)) == len(pretraining)
    assert not set(federated) & set(pretraining)


def test_federated_and_pretraining_share_no_text():
    federated = {file.text for file in stdlib.federated_files()}
    pretraining = {file.text for file in stdlib.pretraining_files()}
    assert not federated & pretraining


def test_every_area_has_enough_text_to_be_a_client():
    sizes = dict.fromkeys(stdlib.FEDERATED_AREAS, 0)
    for file in stdlib.federated_files():
        sizes[file.area] += len(file.text.encode())
    assert len(sizes) == 8
    assert min(sizes.values()) > 150_000
    assert max(sizes.values()) < 3 * min(sizes.values())


@pytest.mark.parametrize("read", [stdlib.federated_files, stdlib.pretraining_files])
def test_files_come_back_in_one_order(read):
    first, second = read(), read()
    assert first == second
    keys = [(file.area, file.path) for file in first]
    assert keys == sorted(keys)


@pytest.mark.parametrize("read", [stdlib.federated_files, stdlib.pretraining_files])
def test_files_are_the_machine_s_own_sources(read):
    root = Path(sysconfig.get_path("stdlib"))
    for file in read():
        assert "\\" not in file.path
        assert not {"test", "tests", "site-packages"} & set(file.path.split("/"))
        raw = (root / file.path).read_bytes()
        assert len(raw) >= 200
        assert raw.decode("utf-8").replace("\r\n", "\n") == file.text


def test_short_undecodable_and_test_files_are_skipped(tmp_path, monkeypatch):
    body = "x = 1\n" * 50
    (tmp_path / "one.py").write_text(body)
    (tmp_path / "short.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(body.encode() + b"# \xe9\n")
    (tmp_path / "pack" / "tests").mkdir(parents=True)
    (tmp_path / "pack" / "inner.py").write_bytes(body.replace("\n", "\r\n").encode())
    (tmp_path / "pack" / "tests" / "case.py").write_text(body)
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    monkeypatch.setattr(
        stdlib, "FEDERATED_AREAS", {"b": ("one", "short", "latin", "absent"), "a": ("pack",)}
    )
    assert stdlib.federated_files() == [
        stdlib.StdlibFile("a", "pack/inner.py", body),
        stdlib.StdlibFile("b", "one.py", body),
    ]


def test_an_empty_area_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(stdlib.sysconfig, "get_path", lambda name: str(tmp_path))
    with pytest.raises(DataError, match=r"'asyncio'.*no Python source files"):
        stdlib.federated_files()
    with pytest.raises(DataError, match="'pretraining'"):
        stdlib.pretraining_files()
