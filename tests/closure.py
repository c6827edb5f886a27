"""Count the lines of the package: what a reader must open for one question, and the size of everything.

    .venv/bin/python tests/closure.py        (make size)

The closure of a question starts at named files and follows their module-level imports. Imports inside functions are not
followed, and neither are the optional folders: nobody has to read those to understand the answer.
"""

import ast
import subprocess
import tokenize
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = (  # folders that say so, and kernels of a GPU: each is a faster version of something that is counted
    "parallel", "weights", "bench", "data.prepare", "generation.cpu", "kernels.cpu.bf16", "kernels.gpu",
    "kernels.attention.cuda",
)  # fmt: skip
ENTRIES = {  # question -> the files in which its answer starts
    "tokens to update": ["packing", "transformer", "losses", "optim", "training.objective"],
    "z-loss on a CPU": ["losses", "kernels.zloss.cpu"],
    "sampling": ["generation.engine"],
}
CORE = [  # files and folders whose share of comment lines is printed
    "train.py",
    *(f"nanochameleon/{name}.py" for name in ENTRIES["tokens to update"] if "." not in name),
    *(f"nanochameleon/{name}.py" for name in ("vocab", "text_tokenizer", "documents", "training/objective")),
    *(f"nanochameleon/generation/{name}.py" for name in ("sampling", "engine", "decoder")),
    "nanochameleon/images",
]


def modules() -> dict[str, Path]:
    """Return name inside the package -> file, of Python modules alone. The package itself is ''."""
    found = {}
    for folder, prefix in ((ROOT / "nanochameleon", []), (ROOT / "kernels", ["kernels"])):
        for path in folder.rglob("*.py"):
            parts = [*prefix, *path.relative_to(folder).with_suffix("").parts]
            found[".".join(part for part in parts if part != "__init__")] = path
    return found


def module_level(tree: ast.AST) -> list[ast.stmt]:
    """Return the imports that run when a module is imported: those that are not inside a function."""
    found = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            found.append(node)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            found += module_level(node)
    return found


def imports(path: Path, known: dict[str, Path]) -> set[str]:
    """Return the modules of the package that a file imports at its module level, and the packages that hold them."""
    found = set()
    for node in module_level(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names]
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{name}" for name in names)]
        found |= {name.removeprefix("nanochameleon.") for name in names if name.startswith("nanochameleon.")}
    return {name for name in found if name in known}


def is_optional(name: str) -> bool:
    return any(name == folder or name.startswith(f"{folder}.") for folder in OPTIONAL)


def closure(names: list[str]) -> dict[str, int]:
    """Return module -> lines of everything that a reader of these modules must open."""
    known, todo, found = modules(), list(names), {}
    while todo:
        name = todo.pop()
        if name not in found:
            found[name] = lines([known[name]])
            todo += [each for each in imports(known[name], known) if not is_optional(each)]
    return found


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def comment_share(paths: list[Path]) -> float:
    """Return the share of lines with a `#` comment."""
    commented = 0
    for path in paths:
        with path.open("rb") as file:
            found = {token.start[0] for token in tokenize.tokenize(file.readline) if token.type == tokenize.COMMENT}
        commented += len(found)
    return commented / max(lines(paths), 1)


def tracked(*patterns: str) -> list[Path]:
    done = subprocess.run(["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True)
    return [path for path in (ROOT / name for name in done.stdout.split()) if path.is_file()]


def core_files() -> list[Path]:
    places = [ROOT / name for name in CORE]
    return [path for place in places for path in ([place] if place.is_file() else sorted(place.glob("*.py")))]


def report() -> str:
    rows = []
    for question, names in ENTRIES.items():
        found = closure(names)
        rows += ["", f"{question}: {sum(found.values()):,} lines in {len(found)} files"]
        rows += [f"  {n:6,}  {name}" for name, n in sorted(found.items(), key=lambda item: -item[1])]
    source = tracked("*.py", "*.cu", "*.cuh", "*.h")
    tests = [path for path in source if path.is_relative_to(ROOT / "tests")]
    kernels = [path for path in source if path.is_relative_to(ROOT / "kernels")]
    lessons = [path for path in source if path.is_relative_to(ROOT / "tutorials")]
    package = [path for path in source if path not in {*tests, *kernels, *lessons}]
    parts = {"package and scripts": package, "kernels": kernels, "tutorials": lessons, "tests": tests}
    rows += ["", ", ".join(f"{name} {lines(paths):,}" for name, paths in parts.items())]
    longest = max(source, key=lambda path: lines([path]))
    rows += [f"longest file {lines([longest]):,}: {longest.relative_to(ROOT)}"]
    rows += [f"comment lines in the core {comment_share(core_files()):.0%}"]
    return "\n".join(rows[1:])


if __name__ == "__main__":
    print(report())
