"""Who may import whom: the ordered list in docs/architecture.md. And importing the package alone is cheap."""

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import nanochameleon
import nanochameleon.kernels

PACKAGE, KERNELS = Path(nanochameleon.__file__).parent, Path(nanochameleon.kernels.__file__).parent
LAYOUT = (Path(__file__).parents[1] / "docs" / "architecture.md").read_text(encoding="utf-8")
ORDER = re.search(r"```\n(kernels\..*?)```", LAYOUT, re.DOTALL)[1].split()[::2]  # a module imports what is before it


def modules() -> dict[str, Path]:
    """Name inside the package -> file."""
    found = {}
    for folder, start in ((PACKAGE, ""), (KERNELS, "kernels.")):
        for path in folder.rglob("*.py"):
            name = start + ".".join(path.relative_to(folder).with_suffix("").parts)
            found[name.removesuffix("__init__").removesuffix(".")] = path
    return {name: path for name, path in found.items() if name}


def imports(path: Path) -> set[str]:
    """What a file imports from the package, inside functions too; '' is the package itself."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name.removeprefix("nanochameleon.") in ORDER else node.module for name in inside}
    return {name.removeprefix("nanochameleon").removeprefix(".") for name in found if name.startswith("nanochameleon")}


def test_every_module_has_its_place_and_every_place_its_module():
    assert set(modules()) == set(ORDER) and len(ORDER) == len(set(ORDER))


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_stands_before_it(name):
    allowed = {"", *ORDER[: ORDER.index(name)]}
    assert imports(modules()[name]) - allowed == set()
    if name.startswith("kernels"):
        assert all(module.startswith("kernels") for module in imports(modules()[name]))


HEAVY = {"torch", "numpy", "matplotlib", "PIL", "cupy", "numba", "tyro", "tqdm", "regex", "safetensors"}


@pytest.mark.parametrize(
    ("imported", "allowed"),
    [
        ("nanochameleon, nanochameleon.config, nanochameleon.errors, nanochameleon.presets", set()),
        ("nanochameleon.transformer, nanochameleon.losses", {"torch", "numpy", "tqdm"}),  # torch looks for the last two
    ],
)
def test_importing_is_cheap(imported, allowed):
    code = f"import sys, {imported}; print(*sys.modules)"
    names = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert HEAVY & set(names) <= allowed


def test_an_installed_package_has_every_folder_and_the_files_of_the_page():
    setuptools = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["tool"]["setuptools"]
    folders = {name if path.name == "__init__.py" else name.rpartition(".")[0] for name, path in modules().items()}
    assert set(setuptools["packages"]) == {f"nanochameleon.{name}".removesuffix(".") for name in folders} | {
        "nanochameleon"
    }
    web = PACKAGE / "web"
    files = {path for path in web.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    assert files == {path for pattern in setuptools["package-data"]["nanochameleon.web"] for path in web.glob(pattern)}
