"""The cache on disk: what was written is read, what is damaged or may be somebody else's is not."""

from __future__ import annotations

import os
import stat
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest

from terrazzo.runtime import cache
from terrazzo.runtime.cache import Shelf, key

VALUE = {"source": "def call(x):\n    return (x,)\n", "sizes": [1, 16384], "why": None, "αβγ": 0.1}


@pytest.fixture
def shelf(tmp_path):
    return Shelf(tmp_path / "plans" / "of a model")


def test_what_was_written_is_read(shelf, caplog):
    assert shelf.read("k") is None
    assert shelf.write("k", VALUE)
    assert shelf.read("k") == VALUE
    assert shelf.read("other") is None
    assert shelf.write("k", [1])
    assert shelf.read("k") == [1]
    assert not caplog.records


def test_nobody_else_may_read_or_write_it(shelf):
    shelf.write("k", VALUE)
    assert stat.S_IMODE(shelf.path("k").stat().st_mode) == 0o600
    assert stat.S_IMODE(shelf.folder.stat().st_mode) == 0o700
    assert [p.name for p in shelf.folder.iterdir()] == ["k.json"]


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "binary", "digest"])
def test_a_damaged_entry_is_not_there_and_is_made_anew(shelf, damage):
    shelf.write("k", VALUE)
    path = shelf.path("k")
    whole = path.read_bytes()
    path.write_bytes(
        {
            "cut": whole[:-7],
            "changed": whole.replace(b"return", b"import"),
            "empty": b"",
            "binary": b"\xff" * 99,
            "digest": b"0" + whole[1:] if whole[:1] != b"0" else b"1" + whole[1:],
        }[damage]
    )
    assert shelf.read("k") is None
    assert shelf.write("k", VALUE)
    assert shelf.read("k") == VALUE


@pytest.mark.parametrize("what", ["file", "folder"])
@pytest.mark.parametrize("mode", [0o720, 0o702])
def test_what_others_may_write_to_is_not_read(shelf, what, mode, caplog):
    shelf.write("k", VALUE)
    (shelf.path("k") if what == "file" else shelf.folder).chmod(mode)
    assert shelf.read("k") is None
    assert "may be written by others" in caplog.text


def test_nothing_is_written_where_others_may_write(shelf, caplog):
    shelf.folder.mkdir(parents=True)
    shelf.folder.chmod(0o777)
    assert not shelf.write("k", VALUE)
    assert not list(shelf.folder.iterdir())
    assert "is not written" in caplog.text


def test_what_belongs_to_another_user_is_not_read(shelf, monkeypatch, caplog):
    shelf.write("k", VALUE)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert shelf.read("k") is None
    assert "belongs to user" in caplog.text


def test_a_link_is_not_followed(shelf, tmp_path):
    shelf.write("k", VALUE)
    elsewhere = tmp_path / "elsewhere"
    shelf.path("k").rename(elsewhere)
    shelf.path("k").symlink_to(elsewhere)
    assert shelf.read("k") is None


def test_a_place_that_cannot_be_written_is_said_and_no_error(tmp_path, caplog):
    (tmp_path / "file").write_text("in the way")
    shelf = Shelf(tmp_path / "file" / "plans")
    assert not shelf.write("k", VALUE)
    assert shelf.read("k") is None
    assert "is not written" in caplog.text


def test_a_reader_sees_all_of_an_entry_or_none(shelf):
    values = [{"n": n, "text": str(n) * 50_000} for n in range(8)]

    def look(n):
        shelf.write("k", values[n % 8])
        return shelf.read("k")

    with ThreadPoolExecutor(8) as pool:
        assert all(found in values for found in pool.map(look, range(64)))
    assert [p.name for p in shelf.folder.iterdir()] == ["k.json"]


def test_keys_are_the_same_in_every_process_and_differ_by_all_their_parts():
    code = "from terrazzo.runtime.cache import key; print(key('digest', (1, 16384), frozenset({'a'})))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    mine = key("digest", (1, 16384), frozenset({"a"}))
    assert done.stdout.strip() == mine
    others = {key("digest", (1, 16385), frozenset({"a"})), key("other", (1, 16384), frozenset({"a"})), key("digest")}
    assert mine not in others and len(others) == 3


def test_another_version_or_source_has_other_keys(monkeypatch, tmp_path):
    before = key("digest")
    changed = tmp_path / "select.py"
    changed.write_text("# another choice\n")
    monkeypatch.setattr(cache, "_sources", lambda: iter([changed]))
    cache.versions.cache_clear()
    try:
        assert key("digest") != before
    finally:
        monkeypatch.undo()
        cache.versions.cache_clear()
    assert key("digest") == before
    sources = {path.name for path in cache._sources()}
    assert {"select.py", "gemm_skinny.py", "load.py"} <= sources
