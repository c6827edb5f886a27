"""Compiled code is kept where it can be, and never where another user could have put it."""

import os
import stat
from pathlib import Path

import pytest

from nanochameleon.kernels import caches


@pytest.fixture
def places(tmp_path, monkeypatch):
    """Folders by name. Of those under `file` nothing can be made, by root neither."""
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    monkeypatch.setenv("HOME", str(tmp_path / "file" / "home"))
    monkeypatch.setattr(caches.tempfile, "tempdir", str(tmp_path / "temporary"))
    monkeypatch.delenv("RANK", raising=False)
    caches.say.cache_clear()
    return tmp_path


def chosen(wished: Path | str, usual: Path | None) -> Path | None:
    caches.cache_folder.cache_clear()
    return caches.cache_folder("SOME_DIR", str(wished), usual, "name")


def test_the_requested_folder_or_the_default_is_taken_without_a_word(places, monkeypatch, caplog):
    assert chosen(places / "wished", places / "usual") == places / "wished" / "name"
    assert chosen("", places / "usual") == places / "usual" / "name"
    monkeypatch.setenv("HOME", str(places / "home"))
    at_home = places / "home" / ".cache" / "nanochameleon" / "name"
    assert chosen("", places / "file" / "usual") == chosen("", None) == at_home
    assert at_home.is_dir() and not caplog.messages and not any((places / "temporary").iterdir())
    assert chosen(places / "file" / "wished", places / "usual") == at_home
    assert [f"{places / 'file' / 'wished'} cannot be written" in line for line in caplog.messages] == [True]


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps homes private, and has no such folder")
def test_a_private_folder_is_taken_and_logged_where_nothing_else_can_be_written(places, caplog):
    folder = chosen("", places / "file" / "usual")
    assert folder == places / "temporary" / f"nanochameleon-{os.getuid()}" / "name" and folder.is_dir()
    assert stat.S_IMODE(folder.parent.stat().st_mode) == 0o700
    assert chosen("", places / "file" / "usual") == folder  # it may be there already
    (line,) = caplog.messages
    assert f"are cached in {folder.parent}" in line and "SOME_DIR" in line and len(line) < 500


def others_can_write(folder: Path):
    folder.mkdir()
    folder.chmod(0o777)


def a_link(folder: Path):
    (folder.parent / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(folder.parent / "elsewhere")


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps homes private, and has no such folder")
@pytest.mark.parametrize("prepared", [others_can_write, a_link, Path.touch])
def test_a_folder_that_another_user_could_have_made_is_not_taken(places, caplog, prepared):
    prepared(places / "temporary" / f"nanochameleon-{os.getuid()}")
    assert chosen("", places / "file" / "usual") is None
    assert "are not cached" in caplog.text and "SOME_DIR" in caplog.text


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="Windows keeps homes private, and has no such folder")
def test_a_folder_of_another_user_is_not_taken(places, monkeypatch):
    other = os.getuid() + 1
    (places / "temporary" / f"nanochameleon-{other}").mkdir(mode=0o700)
    monkeypatch.setattr(caches.os, "getuid", lambda: other)
    assert chosen("", places / "file" / "usual") is None


def test_a_user_without_a_home_or_a_temporary_folder_runs_as_well(places, monkeypatch, caplog):
    def missing(*_):
        raise RuntimeError("Could not determine home directory.")

    def nowhere():
        raise FileNotFoundError("No usable temporary directory found")

    monkeypatch.setattr(caches.Path, "home", missing)
    monkeypatch.setattr(caches.tempfile, "gettempdir", nowhere)
    assert chosen("", None) is None and "this user has no home" in caplog.text
    assert chosen("", places / "usual") == places / "usual" / "name"


def test_a_line_is_said_once_and_by_rank_0(places, monkeypatch, caplog):
    caches.say("a line")
    caches.say("a line")
    monkeypatch.setenv("RANK", "1")
    caches.say("another line")
    assert caplog.messages == ["a line"]
