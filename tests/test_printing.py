"""Nothing that happens to stdout or stderr stops a program or costs what it made; no message holds what a terminal
obeys."""

import ast
import errno
import io
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import nano_folder, tiny_run

from nanochameleon import convert
from nanochameleon.bench import __main__ as bench
from nanochameleon.bench.rows import Row
from nanochameleon.cli import parse
from nanochameleon.data.prepare.__main__ import Args as DataArgs
from nanochameleon.data.prepare.__main__ import guarded
from nanochameleon.errors import LONGEST, Stream, UserError, exit_on_user_error, printable, say, short, warn

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402

# ---------------------------------------------------------------------------------------------------------------------
# What is printed

SCRIPTS = (
    "English, Français, Ελληνικά, Русский, Հայերեն, עִבְרִית, العَرَبِيَّة, می\u200cخواهم, हिन्दी, क्\u200dष, বাংলা, தமிழ், "
    "ไทย, ລາວ, မြန်မာ, ខ្មែរ, ქართული, አማርኛ, 中文\u3000日本語 한국어, 👩\u200d👧 ❤\ufe0f 12\u00a0km \u00adsoft"
    "\u2009thin\u2060\u200e\u200f"
)


@given(st.text() | st.text("a\r\n\t\x1b\x9b\u202e"))
def test_every_character_is_printed_as_it_is_but_those_that_a_terminal_obeys(text):
    shown = printable(text)
    assert len(shown) == len(text)
    for place, (before, after) in enumerate(zip(text, shown, strict=True)):
        control = unicodedata.category(before) == "Cc" and before not in "\n\t"
        line_end = text[place : place + 2] == "\r\n"
        override = unicodedata.bidirectional(before) in ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")
        assert after == ("\ufffd" if (control and not line_end) or override else before)


def test_the_text_of_no_script_changes():
    assert printable(SCRIPTS) == SCRIPTS


LENGTHY = st.builds(str.__mul__, st.text(max_size=20), st.integers(0, 200))


@given(LENGTHY, st.text(st.characters(categories=["L", "P"]), min_size=1, max_size=100))
def test_a_warning_is_one_short_line_that_begins_with_what_is_wrong_and_ends_with_what_to_do(what, remedy):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stderr", io.StringIO())
        warn(f"{what}: {remedy}")
        said = sys.stderr.getvalue()
    line = said.removeprefix("warning: ").removesuffix("\n")
    assert len(line) <= LONGEST and line.endswith(f": {remedy}") and len(line.splitlines()) == 1
    assert line == printable(line) and line[:100] == printable(short(f"{what}: {remedy}"))[:100]
    if len(what) + len(remedy) < 290 and what.isprintable():
        assert line == f"{what}: {remedy}"


def test_an_error_with_a_hostile_name_is_one_short_line_without_its_commands(capsys):
    def main():
        raise UserError(f"has left over '\x1b]0;PWNED\x07\x1b[2J\x9b2J{'x' * 5_000}\n': take it away")

    with pytest.raises(SystemExit):
        exit_on_user_error(main)
    said = capsys.readouterr().err
    assert said.startswith("error: has left over '\ufffd]0;PWNED") and said.endswith("': take it away\n")
    assert said.count("\n") == 1 and len(said) <= len("error: \n") + LONGEST


def prints(path: Path) -> set[str]:
    """Calls in a file that print: print itself, and a write to a standard stream."""
    calls = (ast.unparse(node.func) for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Call))
    return {
        name for name in calls if name in ("print", "tqdm.write") or name.startswith(("sys.stdout.w", "sys.stderr.w"))
    }


def test_there_is_one_place_for_printing():
    """Also, images/output.py writes images. Programs that miss packages, and kernels, cannot import it."""
    files = [*(ROOT / "nanochameleon").rglob("*.py"), *(ROOT / "kernels").glob("*.py"), *ROOT.glob("*.py")]
    found = {str(path.relative_to(ROOT)): names for path in files if (names := prints(path))}
    missing_packages = {"train.py": {"print"}, "sample.py": {"print"}}
    images = {"nanochameleon/images/output.py": {"sys.stdout.write"}}
    kernels = {"kernels/emulate.py": {"print"}, "kernels/ladder.py": {"print"}}
    assert found == {"nanochameleon/errors.py": {"print", "tqdm.write"}} | missing_packages | images | kernels


# ---------------------------------------------------------------------------------------------------------------------
# Streams


class Broken(io.TextIOBase):
    """Fails as the system does, at each write or, as a pipe with a buffer, at the flush after it."""

    encoding = "utf-8"

    def __init__(self, number: int, late: bool):
        self.error, self.late = OSError(number, os.strerror(number)), late

    def write(self, text: str) -> int:
        if not self.late:
            raise self.error
        return len(text)

    def flush(self) -> None:
        if self.late:
            raise self.error


def closed() -> io.StringIO:
    stream = io.StringIO()
    stream.close()
    return stream


def encoded(name: str) -> io.TextIOWrapper:
    return io.TextIOWrapper(io.BytesIO(), name, errors="strict")


STREAMS = {
    "missing": lambda: None,
    "closed": closed,
    "full": lambda: Broken(errno.ENOSPC, False),
    "full at the flush": lambda: Broken(errno.ENOSPC, True),
    "read by no one": lambda: Broken(errno.EPIPE, False),
    "read by no one at the flush": lambda: Broken(errno.EPIPE, True),
    "of ASCII": lambda: encoded("ascii"),
    "of cp1252": lambda: encoded("cp1252"),
}
NAME = "тест 中\udcff"  # in no such encoding, and not in UTF-8


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return nano_folder(tmp_path_factory.mktemp("models") / "nano")


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


def draw(trained: Path, model: Path, folder: Path) -> None:
    sample.cli([str(trained), "ta", "--n", "2", "--out", str(folder / NAME)])


def answer(trained: Path, model: Path, folder: Path) -> None:
    sample.cli([str(trained), "ta", "--mode", "text", "--max-new-tokens", "5", "--temperature", "9"])


def convert_model(trained: Path, model: Path, folder: Path) -> None:
    convert.cli([str(model), str(folder / NAME), "--to", "nano"])


def prepare(trained: Path, model: Path, folder: Path) -> None:
    (folder / f"{NAME}.txt").write_text("words\n")
    words = [str(folder / f"{NAME}.txt"), "--form", "text", "--tokenizers", str(trained), "--name", "a"]
    exit_on_user_error(lambda: guarded(parse(DataArgs, [*words, "--out", str(folder / NAME)])), each=True)


def measure(trained: Path, model: Path, folder: Path) -> None:
    row = Row("kernels", NAME, "ours", 1.0, "ms", None, None, "cpu", "2", "0")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench, "measure", lambda args: [row, row])
        exit_on_user_error(lambda: bench.main(parse(bench.Args, ["kernels", "--json", str(folder / NAME)])))


MADE = {  # program -> what it leaves in its folder
    draw: [f"{NAME}/ta-1.png", f"{NAME}/ta-2.png"],
    answer: [],
    convert_model: [f"{NAME}/config.json", f"{NAME}/text_tokenizer.json"],
    prepare: [f"{NAME}/a/index.json"],
    measure: [NAME],
}


@pytest.mark.parametrize("state", STREAMS)
@pytest.mark.parametrize("program", MADE, ids=lambda program: program.__name__)
def test_a_program_goes_to_its_end_whatever_its_streams_are(program, state, trained, model, tmp_path, monkeypatch):
    """Stdout and stderr are both so. Only a full disk is an error, and one of the end."""
    monkeypatch.setattr(sys, "stdout", STREAMS[state]())
    monkeypatch.setattr(sys, "stderr", STREAMS[state]())
    code = 0
    try:
        program(trained, model, tmp_path)
    except SystemExit as end:
        code = end.code
    assert code == (2 if "full" in state else 0)
    assert [name for name in MADE[program] if not (tmp_path / name).is_file()] == []


def test_what_an_encoding_lacks_is_escaped_and_the_rest_is_as_it_was():
    for encoding, shown in (
        ("ascii", r"a \u0442 \ufffd \xe9"),
        ("cp1252", "a \\u0442 \\ufffd é"),
        ("utf-8", "a т \ufffd é"),
    ):
        stream = encoded(encoding)
        say("a т \x1b é", file=Stream(stream))
        assert stream.buffer.getvalue().decode(encoding) == f"{shown}\n"


def test_a_full_disk_is_said_at_the_end_and_streams_are_put_back(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdout", full := STREAMS["full"]())
    done = []
    with pytest.raises(SystemExit):
        exit_on_user_error(lambda: [say("a"), say("b"), done.append(True)])
    assert done and sys.stdout is full
    assert capsys.readouterr().err == (
        "error: stdout could not be written ([Errno 28] No space left on device): what was printed is lost, files are "
        "saved\n"
    )


def test_an_unexpected_error_is_no_less_seen_for_a_broken_stdout(monkeypatch):
    monkeypatch.setattr(sys, "stdout", STREAMS["full"]())
    with pytest.raises(ZeroDivisionError):
        exit_on_user_error(lambda: [say("a"), 1 / 0])


# ---------------------------------------------------------------------------------------------------------------------
# The same with the system's own streams, in processes that import no torch

HELP = "from nanochameleon.cli import parse_run\nparse_run(['toy', '--help'])\n"
MANY = "from nanochameleon.errors import exit_on_user_error\nfrom nanochameleon.errors import say, warn\n"
MANY += "exit_on_user_error(lambda: [say('line'), *(say('x' * 99) for _ in range(3_000)), warn('end')])\n"


def in_shell(command: str, code: str, **more) -> subprocess.CompletedProcess:
    """A shell's line in which PROGRAM is a Python that runs the code. Its pipes fail if any part of them does."""
    line = "set -o pipefail; " + command.replace("PROGRAM", '"$PYTHON" -c "$CODE"')
    environment = os.environ | {"PYTHON": sys.executable, "CODE": code, "PYTHONUNBUFFERED": ""}  # a pipe has a buffer
    return subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, capture_output=True, text=True, **more)


@pytest.mark.skipif(os.name != "posix", reason="the lines are of a POSIX shell")
@pytest.mark.parametrize(
    ("line", "out", "err"),
    [
        ("PROGRAM | head -n 1", "line\n", "warning: end\n"),
        ("PROGRAM 2>&1 | head -n 1", "line\n", ""),
        ("PROGRAM | true", "", "warning: end\n"),
        ("PROGRAM >&-", "", "warning: end\n"),
        ("PROGRAM 2>&- | head -n 1", "line\n", ""),
        ("PROGRAM >&- 2>&- <&-", "", ""),
        ("PROGRAM 2>/dev/full | tail -n 1", "x" * 99 + "\n", ""),
    ],
)
def test_a_stream_that_ends_is_quiet_and_no_failure(line, out, err):
    done = in_shell(line, MANY)
    assert (done.returncode, done.stdout, done.stderr) == (0, out, err)


@pytest.mark.skipif(os.name != "posix", reason="the lines are of a POSIX shell")
@pytest.mark.parametrize("line", ["PROGRAM | head -n 1", "PROGRAM >&- 2>&- | cat", "PROGRAM >/dev/full"])
def test_help_that_is_read_in_part_is_no_failure(line):
    done = in_shell(line, HELP)
    assert (done.returncode, done.stderr) == (0, "") and done.stdout.count("\n") <= 1


@pytest.mark.skipif(os.name != "posix", reason="a closed stream is a missing descriptor there")
def test_no_file_takes_the_place_of_a_closed_stream(tmp_path):
    """A handler of signals, or a library in C, writes to descriptor 2 whatever that is."""
    code = "import os\nfrom nanochameleon.errors import safe_streams\n"
    code += "with safe_streams(), open(os.environ['FILE'], 'w') as file:\n    os.write(1, b'x'), os.write(2, b'x')"
    subprocess.run(["bash", "-c", '"$PYTHON" -c "$CODE" <&- >&- 2>&-'], cwd=ROOT, check=True, env=os.environ | {
        "PYTHON": sys.executable, "CODE": code, "FILE": str(tmp_path / "file"),
    })  # fmt: skip
    assert (tmp_path / "file").read_bytes() == b""
