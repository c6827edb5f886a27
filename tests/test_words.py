"""What can be checked of words: named files exist, stated line counts are right, and old words do not come back."""

import ast
import io
import os
import re
import tokenize
from collections import Counter
from pathlib import Path

import closure

ROOT = closure.ROOT
SOURCES = [path for path in closure.tracked("*.py", "*.cu", "*.cuh", "*.h", "*.md") if path.name != "log.md"]
FILES = {path.relative_to(ROOT).as_posix() for path in closure.tracked()}
FILE = re.compile(r"(?<![\w/.<*-])((?:[\w.-]+/)*[\w-]+\.(?:py|cu|cuh|h|toml|md))\b(?!\w|\()")
FOREIGN = {  # files of other projects, or that a run writes
    "runs/emoji/images/ATTRIBUTION.md", "ATTRIBUTION.md", "table.md",
    "models/chameleon/convert_chameleon_weights_to_hf.py",
}  # fmt: skip
OLD_WORDS = {
    "beside": r"\bbeside\b",
    "behind": r"\bbehind\b",
    "go on": r"\b(?:go|goes|going|went|gone) on\b",
    "told": r"\btold\b",
    "anew": r"\banew\b",
    "whoever": r"\bwhoever\b",
    "stands, lies": r"\b(?:stands?|lies?)\b",
}
MAX_OLD_WORDS = 30


def words_of(path: Path, strings: bool) -> str:
    """Return what a file says to people: a page, or the comments and docstrings of code, or all its strings."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".md":
        return text
    if path.suffix != ".py":
        return "\n".join(re.findall(r"//[^\n]*|/\*.*?\*/", text, re.DOTALL))
    nodes = list(ast.walk(ast.parse(text)))
    if strings:
        found = [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]
    else:
        kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        found = [ast.get_docstring(node, clean=False) or "" for node in nodes if isinstance(node, kinds)]
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    return "\n".join([*found, *(token.string for token in tokens if token.type == tokenize.COMMENT)])


def exists(name: str, place: Path) -> bool:
    """Is there a file whose path ends in this name, or that this name leads to from the folder of `place`?"""
    relative = os.path.normpath(os.path.join(place.relative_to(ROOT).parent, name))
    return relative in FILES or any(f"/{known}".endswith(f"/{name}") for known in FILES)


def test_every_file_that_is_named_exists():
    missing = {}
    for path in SOURCES:
        names = sorted({name for name in FILE.findall(words_of(path, strings=False)) if not exists(name, path)})
        if names := [name for name in names if name not in FOREIGN]:
            missing[path.relative_to(ROOT).as_posix()] = names
    assert missing == {}


def test_line_counts_in_the_readme_are_right_within_a_tenth():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    for name, stated in re.findall(r"((?:[\w-]+/)*[\w-]+\.py)[^\n]*?([\d,]+) lines", readme):
        lines = closure.lines([ROOT / min((known for known in FILES if f"/{known}".endswith(f"/{name}")), key=len)])
        assert abs(int(stated.replace(",", "")) - lines) <= lines / 10, f"{name} has {lines} lines, not {stated}"


def test_old_words_do_not_come_back():
    """Each of them has a plainer one: next to, after, resume, tell, again, who, is."""
    found = Counter()
    for path in SOURCES:
        if not path.is_relative_to(ROOT / "tests"):
            words = words_of(path, strings=True)
            counts = {word: len(re.findall(pattern, words, re.IGNORECASE)) for word, pattern in OLD_WORDS.items()}
            found += Counter({f"{path.relative_to(ROOT).as_posix()}: {word}": n for word, n in counts.items()})
    assert found.total() <= MAX_OLD_WORDS, "\n".join(f"{n:3} {name}" for name, n in found.most_common())
