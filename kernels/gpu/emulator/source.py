"""A compiled .cu file, and messages that name its lines and its kernels' arguments."""

import ctypes
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path


class EmulatorError(Exception):
    """A kernel did what a GPU would not survive."""


class NotLaunched(EmulatorError):
    """A file, a kernel's name, sizes or arguments with which nothing can run."""


def run_tool(command: list, text: str | None = None) -> str:
    """Return what a compiler prints. Raises EmulatorError with the first error of a text that does not compile."""
    try:
        ran = subprocess.run(command, input=text, capture_output=True, text=True)
    except FileNotFoundError:
        raise NotLaunched(f"{command[0]} is missing: install it, since the emulator compiles kernels with it") from None
    if ran.returncode:
        lines = ran.stderr.splitlines()
        raise NotLaunched(f"{command[0]} refuses it: {next((x for x in lines if 'error:' in x), ran.stderr)}")
    return ran.stdout


@dataclass(frozen=True)
class Library:
    code: ctypes.CDLL
    path: Path
    parameters: dict[str, list[str]]  # kernel -> names of its parameters
    file: str
    lines: list[str]  # of the file

    def explain(self, message: str, kernel: str) -> str:
        """Write names of arguments after their numbers, and source lines in place of @addresses@."""
        names = dict(enumerate(self.parameters[kernel]))
        message = re.sub(r"argument (\d+)", lambda m: f"{m[0]} ({names[int(m[1])]})", message)
        return re.sub(r"@(\w+)@", lambda m: self.line(m[1]), message)

    def line(self, address: str) -> str:
        """' (file:line `code`)' of an address in the library, or nothing without addr2line."""
        try:
            found = run_tool(["addr2line", "-e", str(self.path), address])
        except EmulatorError:
            return ""
        place = re.match(r"(?:.*/)?([^/]+):(\d+)", found)
        if place is None:
            return ""
        file, number = place[1].replace("<stdin>", self.file), int(place[2])
        lines = self.lines if file == self.file else []
        code = f" `{lines[number - 1].strip()}`" if 0 < number <= len(lines) else ""
        return f" ({file}:{number}{code})"
