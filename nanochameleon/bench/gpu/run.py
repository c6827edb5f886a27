"""The command behind `make gpu`: every part in a process of its own, one log, and what is left of the time."""

import hashlib
import json
import math
import os
import platform
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import BinaryIO

import torch

from nanochameleon.bench.gpu import page
from nanochameleon.bench.gpu.context import ROOT
from nanochameleon.bench.gpu.machine import check_gpu
from nanochameleon.bench.gpu.plan import DRY, ON_GPU, Plan
from nanochameleon.bench.rows import Row, device_name, load
from nanochameleon.errors import UserError, say
from nanochameleon.files import check_writable, commit, read_json, write_file
from nanochameleon.kernels.gpu.packages import cuda_extra, missing_cuda_package

# Part -> seconds at most while others wait, and what it does. The first four together fit into eight minutes.
PARTS = {
    "machine": (60, "versions, the speed of memory and matmuls, compilation of all kernels"),
    "prove": (120, "values, races and times of each kernel: what auto may take"),
    "steps": (160, "training steps of the 1.4B and the 288M"),
    "generation": (135, "tokens with CUDA graphs and without, alone and in company; ms per step of the 1.3B and 7B"),
    "toy": (150, "train.py toy in few steps, stopped and resumed, in fp32 and bf16; sample.py"),
    "attention": (45, "what documents cost, by kernel"),
    "kernels": (120, "times and memory of each kernel next to torch's"),
    "sanitizer": (180, "memory accesses and races of small cases under compute-sanitizer"),
}
LEAST = 15.0  # seconds that a part needs to be worth starting
STATE, LOG = "parts.json", "log.txt"
COMMAND = [sys.executable, "-u", "-m", "nanochameleon.bench.gpu.part"]


@dataclass(frozen=True)
class GPUArgs:
    """Measure everything that the first minutes on one NVIDIA GPU should show."""

    dry: bool = False
    """Run everything at tiny sizes on the CPU, CUDA kernels in the emulator; docs/results/gpu.md stays as it is."""
    out: Path | None = None
    """Folder of the log, the rows and the page; None is runs/gpu, or runs/gpu-dry."""
    minutes: float | None = None
    """Time for all parts together; None is 8, or 40 with --dry. All parts may take 16; the same command again runs
    those that are left."""
    overwrite: bool = False
    """Run parts again that have finished."""

    @property
    def plan(self) -> Plan:
        return DRY if self.dry else ON_GPU

    @property
    def seconds(self) -> float:
        return 60 * (8 * self.plan.patience if self.minutes is None else self.minutes)

    @property
    def folder(self) -> Path:
        return self.out or Path("runs", "gpu-dry" if self.dry else "gpu")


class Log:
    """Prints lines and appends them to a file at once. The home folder's name does not get into either."""

    def __init__(self, path: Path):
        self.file = path.open("a", encoding="utf-8")

    def __call__(self, line: str = "") -> None:
        line = line.replace(str(Path.home()), "~")
        say(line)
        self.file.write(line + "\n")
        self.file.flush()

    def copy(self, stream: BinaryIO) -> None:
        """Log every line of a process; of a progress bar only its last state."""
        for line in stream:
            self(line.decode(errors="replace").rstrip().rpartition("\r")[2])


# ---------------------------------------------------------------------------------------------------------------------
# One part


def run_part(words: list[str], seconds: float, log: Log) -> str:
    """Run a process, log what it prints, and return "done", "failed" or "out of time" (then it was killed)."""
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "stdin": subprocess.DEVNULL}
    with subprocess.Popen([*COMMAND, *words], **streams, cwd=ROOT, start_new_session=True) as process:
        reader = threading.Thread(target=log.copy, args=(process.stdout,), daemon=True)
        reader.start()
        try:
            code = process.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:  # also after Ctrl-C, which does not reach a process of another session
            if process.poll() is None:
                kill(process)
        reader.join(5)
    return "out of time" if code is None else "failed" if code else "done"


def kill(process: subprocess.Popen) -> None:
    """End a process and all that it started."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL) if os.name == "posix" else process.kill()


# ---------------------------------------------------------------------------------------------------------------------
# All parts


def sources() -> str:
    """A fingerprint of everything that parts run, and of where: a part that finished with it is not run again."""
    files = sorted(path for folder in ("nanochameleon", "kernels") for path in (ROOT / folder).rglob("*.*")
                   if path.suffix in (".py", ".cu", ".cuh", ".h"))  # fmt: skip
    digest = hashlib.sha256(f"{torch.__version__} {platform.python_version()}".encode())
    for path in [*files, ROOT / "train.py", ROOT / "sample.py"]:
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def read_state(path: Path) -> dict[str, dict[str, str]]:
    """What is known of each part that has run. Raises UserError for a damaged file."""
    state = read_json(path) if path.exists() else {}
    for part in state.values():
        if not isinstance(part, dict) or {*map(type, part.values())} != {str} or set(part) != {"result", "key", "date"}:
            raise UserError(f"{path} is damaged: delete it, and all parts run again")
    return state


def saved_rows(folder: Path, state: dict) -> list[tuple[Row, str]]:
    """The rows of all parts so far, each with the day of its measurement."""
    found = [(folder / f"{name}.json", part["date"]) for name, part in state.items()]
    return [(row, day) for path, day in found if path.exists() for row in load(path)]


def write_page(args: GPUArgs, state: dict) -> None:
    """Fill in the page of results from the rows: the one in docs, or in a dry run a copy next to the log."""
    target = ROOT / "docs" / "results" / "gpu.md"
    text = page.fill(target.read_text(encoding="utf-8"), saved_rows(args.folder, state), page.figures(args.plan))
    if args.dry:
        text = page.DRY_NOTE + text
    else:
        write_file(target, text.encode())
    write_file(args.folder / "gpu.md", text.encode())


def todo(args: GPUArgs, state: dict, key: str) -> Iterator[str]:
    for name in PARTS:
        if args.overwrite or state.get(name, {}).get("key") != key or state[name]["result"] != "done":
            yield name


def run_all(args: GPUArgs, log: Log) -> list[str]:
    """Run the parts that are left; returns those that did not finish."""
    folder, deadline = args.folder, time.monotonic() + args.seconds
    device = device_name(torch.device(args.plan.device))
    state = read_state(folder / STATE)
    key = f"{sources()} {device} {'dry' * args.dry}"
    log(f"{date.today()}: {device}, torch {torch.__version__}, commit {commit()}, {args.seconds / 60:g} minutes")
    left = list(todo(args, state, key))
    if done := [name for name in PARTS if name not in left]:
        log(f"already finished with these sources: {', '.join(done)} (--overwrite runs them again)")
    unfinished = []
    for i, name in enumerate(left):
        remaining, what = deadline - time.monotonic(), PARTS[name][1]
        log(f"\n== {name}: {what} ({remaining:.0f} s left)")
        if remaining < LEAST:
            log("not started, since the time is over")
            unfinished.append(name)
            continue
        (folder / f"{name}.json").unlink(missing_ok=True)
        start = time.monotonic()
        limits = [args.plan.patience * PARTS[each][0] for each in left[i:]]
        limit = min(max(limits[0], remaining - sum(limits[1:])), remaining)  # and what the parts after it do not need
        result = run_part([name, str(folder.resolve()), *["--dry"] * args.dry], limit, log)
        log(f"== {name}: {result} after {time.monotonic() - start:.0f} s")
        unfinished += [name] * (result != "done")
        state[name] = {"result": result, "key": key, "date": str(date.today())}
        write_file(folder / STATE, (json.dumps(state, indent=1) + "\n").encode())
        write_page(args, state)
    return unfinished


def main(args: GPUArgs) -> None:
    """Raises UserError without a GPU or a folder to write to. Exits with 1 if a part did not finish."""
    if not 0 < args.seconds < math.inf:
        raise UserError(f"--minutes must be a number above 0, not {args.minutes:g}")
    if not (ROOT / "train.py").is_file():
        raise UserError("this is an installed package: run the command in a clone of the repository")
    if not args.dry:
        check_gpu()
        if missing := missing_cuda_package():
            raise UserError(f"{missing} is missing: pip install -e '.[{cuda_extra()}]', or run make gpu")
    elif shutil.which("g++") is None:
        raise UserError("a dry run compiles the CUDA kernels for the CPU: install g++ first")
    try:
        check_writable(args.folder)
    except OSError as error:
        raise UserError(f"cannot write {error.filename}: {error.strerror}; choose another --out") from None
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, lambda number, _: sys.exit(128 + number))  # so that the running part is ended, too
    log = Log(args.folder / LOG)
    unfinished = run_all(args, log)
    log(f"\n{args.folder} holds the log, the rows of each part and the filled page gpu.md; docs/install.md says how "
        "to report them. Nothing was sent to anyone.")  # fmt: skip
    if unfinished:
        log(f"not finished: {', '.join(unfinished)}; the same command runs these alone")
        raise SystemExit(1)
