"""Do the tests bite? Plants known bugs, one at a time, and expects a test to turn red: `make mutants`.

    cd tests && python -m mutants              all of them, as many at a time as there are cores
    cd tests && python -m mutants quantizer    those whose file's name holds that word

A bug is planted in a copy of package and tests, never in the tree. First the untouched copy must be green: a test that
is red anyway catches nothing. Ends with 1 if a bug survives, or if its text is no longer in its file.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from mutants import MUTANTS
from mutants.mutant import Mutant

ROOT = Path(__file__).parents[2]
SCRIPTS = ("train.py", "sample.py")


def source(mutant: Mutant, root: Path) -> Path:
    """Where its file is in a copy, where kernels lies inside the package, as installing maps it."""
    return root / mutant.file if mutant.file in SCRIPTS else root / "nanochameleon" / mutant.file


def copy(target: Path) -> None:
    """Package, kernels, scripts, tests, pages and pytest's settings, laid out so that PYTHONPATH alone finds them."""
    ignore = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "nanochameleon", target / "nanochameleon", ignore=ignore)
    shutil.copytree(ROOT / "kernels", target / "nanochameleon" / "kernels", ignore=ignore)
    shutil.copytree(ROOT / "tests", target / "tests", ignore=ignore)
    shutil.copytree(ROOT / "docs", target / "docs", ignore=shutil.ignore_patterns("*.png"))
    for name in (*SCRIPTS, "pyproject.toml"):
        shutil.copy(ROOT / name, target)
    (target / "models").symlink_to(ROOT / "models")  # megabytes, in which no bug is planted


HERE = """
import sys, pathlib, nanochameleon, nanochameleon.kernels, pytest
for module in (nanochameleon, nanochameleon.kernels):
    assert pathlib.Path(module.__file__).is_relative_to(pathlib.Path.cwd()), f"{module.__file__} is not of the copy"
sys.exit(pytest.main(sys.argv[1:]))
"""  # an installed nanochameleon must not be the one that is tested


def run_tests(folder: Path, tests: list[str]) -> subprocess.CompletedProcess:
    """pytest's exit status: 0 green, 1 a test is red; anything else is no answer."""
    env = os.environ | {"PYTHONPATH": str(folder), "NANOCHAMELEON_NO_SHRINK": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", HERE, "-x", "-q", "-p", "no:cacheprovider", *(f"tests/{name}" for name in tests)]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True)


def try_mutant(mutant: Mutant) -> str:
    """'red', or what is wrong."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy(folder)
        path = source(mutant, folder)
        text = path.read_text()
        if text.count(mutant.old) != 1:
            return f"its text stands {text.count(mutant.old)} times in {mutant.file}"
        path.write_text(text.replace(mutant.old, mutant.new))
        for test in mutant.tests.split():
            result = run_tests(folder, [test])
            if result.returncode != 1:
                return f"SURVIVED {test}" if result.returncode == 0 else f"{test} did not run: {result.stdout[-300:]}"
    return "red"


def green(mutants: list[Mutant]) -> bool:
    tests = sorted({test for mutant in mutants for test in mutant.tests.split()})
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name).resolve()
        copy(folder)
        result = run_tests(folder, tests)
    if result.returncode:
        print(f"the tests are red without a mutant:\n{result.stdout[-3000:]}{result.stderr[-1000:]}", file=sys.stderr)
    return result.returncode == 0


def main(words: list[str]) -> int:
    mutants = [m for m in MUTANTS if not words or any(word in m.file for word in words)]
    print("the tests without a mutant ...", file=sys.stderr)
    if not mutants or not green(mutants):
        return 1
    outcomes: dict[Mutant, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = {pool.submit(try_mutant, mutant): mutant for mutant in mutants}
        for job in tqdm(as_completed(jobs), total=len(jobs), desc="mutants", unit="bug"):
            outcomes[jobs[job]] = job.result()
    for mutant in mutants:
        print(f"{mutant.file:22} {mutant.bug:46} {outcomes[mutant]}")
    survivors = sum(outcome != "red" for outcome in outcomes.values())
    print(f"{len(mutants) - survivors} of {len(mutants)} turned a test red")
    return int(survivors > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
