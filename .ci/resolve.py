"""Resolves what README and docs/install.md install, for each Python and system that they name: python .ci/resolve.py

A machine may hide that the pins cannot go together, since its pip is configured to find other wheels. So this asks the
public index alone, whatever is configured, and takes wheels alone, except of SOURCES. uv resolves for other Pythons and
systems than those of this machine, markers included, which pip cannot, and it reads metadata without a download. Exit
code 1, with the reason, where one does not resolve or the index cannot be reached.
"""

import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PYTHONS = "3.11", "3.12", "3.13"
SYSTEMS = {  # -> uv's name
    "Linux x86_64": "x86_64-manylinux_2_28",
    "macOS arm64": "aarch64-apple-darwin",
    "Windows amd64": "x86_64-pc-windows-msvc",
}
ENVIRONMENT = {"PIP_CONFIG_FILE": os.devnull, "MACOSX_DEPLOYMENT_TARGET": "14.0"}  # torch has no wheel for older ones
LINUX_ALONE = "cuda", "cuda12"
# each page of the index and each wheel's metadata is read once
CONFIGURATION = """
no-build-package = [{wheels}]
[[index]]
url = "https://pypi.org/simple"
default = true
cache-control = {{api = "max-age=600", files = "max-age=600"}}
"""
SOURCES = {"rouge_score", "sqlitedict", "word2number"}  # of lm-eval: no wheel exists; Python alone, so pip builds them


def configuration() -> str:
    """What uv reads: only SOURCES, among what is pinned, may lack a wheel."""
    pinned = re.findall(r"^([\w.-]+)==", (ROOT / "constraints.txt").read_text(), re.M)
    return CONFIGURATION.format(wheels=", ".join(f'"{name}"' for name in pinned if name not in SOURCES))


def alone(*command: str | Path) -> subprocess.CompletedProcess:
    """Runs it where nothing configures pip and uv."""
    own = {name: value for name, value in os.environ.items() if not name.startswith(("PIP_", "UV_"))}
    return subprocess.run(command, capture_output=True, text=True, env=own | ENVIRONMENT, cwd=ROOT)


def lines() -> list[tuple[str, str, str]]:
    """(system, Python, extra) of each; "" is no extra."""
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    every = product(SYSTEMS, PYTHONS, ["", *extras])
    return [line for line in every if line[0].startswith("Linux") or line[2] not in LINUX_ALONE]


def resolve(programs: Path, system: str, python: str, extra: str) -> str | None:
    """Prints a line, and returns the reason where it does not resolve."""
    folder, wanted = programs.parent, ["--extra", extra] if extra else []
    words = ["pip", "compile", "--quiet", "--config-file", folder / "uv.toml", "--cache-dir", folder / "cache"]
    words += ["--no-python-downloads", "--python", sys.executable]  # which runs uv, and is not what it resolves for
    words += ["--python-version", python, "--python-platform", SYSTEMS[system], "--constraints", "constraints.txt"]
    done = alone(programs / "uv", *words, "--no-header", "--no-annotate", *wanted, "pyproject.toml")
    name = f"Python {python}, {system:13} {f'.[{extra}]' if extra else '.':14}"
    found = "does not resolve" if done.returncode else f"{len(done.stdout.split())} packages"
    print(f"{name} {found}\n", end="", flush=True)  # at once, since other threads print too
    return f"{name}\n{done.stderr}" if done.returncode else None


def main() -> None:
    with tempfile.TemporaryDirectory() as name, ThreadPoolExecutor(4) as pool:  # they wait for the index
        folder = Path(name)
        (folder / "uv.toml").write_text(configuration())
        venv.create(folder, with_pip=True)
        programs = next(path.parent for path in folder.glob("*/pip*"))
        if (done := alone(programs / "pip", "install", "uv")).returncode:
            sys.exit(f"{done.stderr}\nuv, which resolves, cannot be installed from the public index")
        reasons = [reason for reason in pool.map(lambda line: resolve(programs, *line), lines()) if reason]
    sys.exit("\n" + "\n".join(reasons) if reasons else 0)


if __name__ == "__main__":
    main()
