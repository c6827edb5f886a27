"""What CI resolves from the public index is all that the pages install, and no failure passes for a success."""

import ast
import importlib.util
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = "\n".join(
    (ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "docs/install.md", "docs/presets.md")
)
EXTRAS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
spec = importlib.util.spec_from_file_location("resolve", ROOT / ".ci" / "resolve.py")
resolve = importlib.util.module_from_spec(spec)
spec.loader.exec_module(resolve)


def test_every_install_line_of_the_pages_is_resolved_on_every_system_they_name():
    commands = re.findall(r"pip install [^\n`]*", PAGES)
    named = {extra for extra in re.findall(r"'?\.\[(\w+)\]", PAGES)}
    assert commands and all("-c constraints.txt -e" in command for command in commands)
    assert named <= set(EXTRAS)
    on_linux = {(python, extra) for system, python, extra in resolve.lines() if system.startswith("Linux")}
    assert on_linux == {(python, extra) for python in resolve.PYTHONS for extra in ("", *EXTRAS)}
    elsewhere = {extra for system, _, extra in resolve.lines() if not system.startswith("Linux")}
    assert elsewhere == {"", *EXTRAS} - set(resolve.LINUX_ALONE)
    for word in [*resolve.PYTHONS, *(word for system in resolve.SYSTEMS for word in system.split())]:
        assert word in PAGES


def test_it_runs_without_what_configures_pip_on_this_machine(monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", "wheels")
    monkeypatch.setenv("UV_INDEX", "elsewhere")
    said = resolve.alone(sys.executable, "-c", "import os; print(dict(os.environ))").stdout
    environment = ast.literal_eval(said)
    assert environment["PIP_CONFIG_FILE"] == os.devnull and not {"wheels", "elsewhere"} & set(environment.values())


def test_all_that_is_pinned_must_have_a_wheel_except_three_packages_of_lm_eval():
    wheels = tomllib.loads(resolve.configuration())["no-build-package"]
    pins = re.findall(r"^(\S+)==", (ROOT / "constraints.txt").read_text(), re.M)
    assert set(pins) - set(wheels) == resolve.SOURCES and {"torch", "lm_eval", "pyarrow"} <= set(wheels)


@pytest.fixture
def answers(monkeypatch):
    """The exit codes of pip, which installs uv, and of uv for an extra."""
    codes = {}

    def answer(program, *words):
        extra = words[words.index("--extra") + 1] if "--extra" in words else Path(program).stem
        return subprocess.CompletedProcess(words, codes.get(extra, 0), "a==1", f"why {extra} fails")

    monkeypatch.setattr(resolve, "alone", answer)
    monkeypatch.setattr(resolve.venv, "create", lambda folder, with_pip: [
        (folder / "bin").mkdir(), (folder / "bin" / "pip").touch()])  # fmt: skip
    return codes


def code(capsys) -> tuple[object, list[str]]:
    with pytest.raises(SystemExit) as ended:
        resolve.main()
    return ended.value.code, capsys.readouterr().out.splitlines()


def test_each_resolution_says_a_line_and_one_that_fails_fails_all(answers, capsys):
    ended, printed = code(capsys)
    assert ended == 0 and len(printed) == len(resolve.lines()) and all("1 packages" in line for line in printed)
    answers["data"] = 1
    ended, printed = code(capsys)
    assert "why data fails" in ended and sum("does not resolve" in line for line in printed) == 9


def test_an_index_that_cannot_be_reached_is_a_failure(answers, capsys):
    answers["pip"] = 1
    ended, printed = code(capsys)
    assert "why pip fails" in ended and "cannot be installed from the public index" in ended and not printed
