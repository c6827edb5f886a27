"""Prove the CUDA kernels on this GPU, so that "auto" takes those that are right and faster than torch's operations.

    python -m nanochameleon.bench prove [--quick] [--op attention|zloss|decode]

It takes the first GPU that CUDA_VISIBLE_DEVICES shows. --quick times fewer shapes, and compares attention with torch's
operations compiled at head size 128 alone.

Each kernel is checked and timed (subjects.py) in another process with a time limit, because an illegal access ruins the
CUDA context of its process, and a deadlock waits for ever. The findings go into the proof file that dispatch reads
(kernels/gpu/proof.py) after each kernel, so what is proven stays when the command is stopped.
"""

import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from datetime import date
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from nanochameleon.bench.gpu_checks import CheckFailed
from nanochameleon.bench.subjects import DRY, FULL, QUICK, Effort, Subject, prove, subjects
from nanochameleon.errors import UserError, say, shown
from nanochameleon.kernels.dispatch import why_cuda_unavailable
from nanochameleon.kernels.gpu import proof
from nanochameleon.kernels.gpu.proof import MIN_SPEEDUP, Entry

START_LIMIT = 120.0  # seconds for the start of a process
Work = Callable[[str], Entry]  # proves the kernel of this name, or raises

# ---------------------------------------------------------------------------------------------------------------------
# A process of their own


def serve(pipe: Connection, work: Work, names: list[str]) -> None:
    """In the other process: send an entry for each name, up to the first that fails, after which nothing is sure."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the process that started this one
    threading.Thread(target=end_with_parent, daemon=True).start()
    pipe.send(None)  # it has started
    for name in names:
        entry = attempt(work, name)
        pipe.send(entry)
        if not entry.ok:
            return


def end_with_parent() -> None:
    """A kernel that hangs must not keep the GPU after the process that would have ended it."""
    multiprocessing.parent_process().join()
    os._exit(1)


def attempt(work: Work, name: str) -> Entry:
    try:
        return work(name)
    except CheckFailed as failure:
        return Entry(False, shown(failure, 300))
    except Exception as error:  # a broken kernel makes torch raise many things
        return Entry(False, shown(f"{type(error).__name__}: {error}".partition("\n")[0], 300))


def outcomes(names: list[str], work: Work, limit: float) -> Iterator[tuple[str, Entry]]:
    """Prove all of them in one process, and after a failure the others in a new one."""
    names = list(names)
    while names:
        pipe, process = start(work, names)
        try:
            entry = receive(pipe, process, START_LIMIT)
            if entry is not None:  # it did not start
                yield names.pop(0), entry
            while names and (entry is None or entry.ok):
                entry = receive(pipe, process, limit)
                yield names.pop(0), entry
        finally:
            process.kill()
            process.join()


def start(work: Work, names: list[str]) -> tuple[Connection, multiprocessing.Process]:
    context = multiprocessing.get_context("spawn")  # a fork would share this process's CUDA context
    ours, theirs = context.Pipe(duplex=False)
    process = context.Process(target=serve, args=(theirs, work, names), daemon=True)
    process.start()
    theirs.close()
    return ours, process


def receive(pipe: Connection, process: multiprocessing.Process, limit: float) -> Entry | None:
    """What the process sends next, or an entry that says how it ended."""
    if not pipe.poll(limit):
        return Entry(False, f"it did not end within {limit:g} s")
    try:
        return pipe.recv()
    except EOFError:
        process.join()
    number = -process.exitcode
    end = f"was ended by {signal.Signals(number).name}" if number > 0 else f"ended with exit code {process.exitcode}"
    return Entry(False, f"its process {end}")


# ---------------------------------------------------------------------------------------------------------------------
# The command


def work_on(device: str, effort: Effort, name: str) -> Entry:
    """In the other process."""
    return prove({subject.name: subject for subject in subjects()}[name], effort, torch.device(device))


def device_to_prove(dry: bool) -> torch.device:
    """Raises UserError where the kernels cannot run."""
    if dry:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise UserError("there is no CUDA device here: prove needs an NVIDIA GPU, or --dry for the emulator")
    device = torch.device("cuda", torch.cuda.current_device())
    if problem := why_cuda_unavailable("zloss_cross_entropy", device, torch.bfloat16):
        raise UserError(f"the CUDA kernels cannot run here: {problem}")
    return device


def main(op: str, quick: bool, dry: bool) -> None:
    """Prove the kernels of an op, or of "all". Raises UserError for a user's mistakes."""
    device, effort = device_to_prove(dry), DRY if dry else QUICK if quick else FULL
    work = partial(work_on, str(device), effort)
    if dry:  # the emulator proves nothing
        with tempfile.TemporaryDirectory() as folder:
            prove_all(op, device, work, effort.limit, Path(folder))
        say("\nno proof is kept of a dry run")
        return
    folder = proof.proof_folder()
    if folder is None:
        raise UserError("no folder for the proof can be written: set NANOCHAMELEON_CACHE to one")
    say("Ctrl-C keeps what is proven by then")
    say(f"\nthe proof is in {prove_all(op, device, work, effort.limit, folder)}")


def prove_all(op: str, device: torch.device, work: Work, limit: float, folder: Path) -> Path:
    """Add what is found to the proof file in the folder, and return the file. limit: seconds for a kernel."""
    identity = proof.identity(device)
    path, today = folder / proof.file_name(identity), date.today().isoformat()
    before = proof.read(path, identity)
    found = dict(before.entries) if before else {}
    say(f"proving the CUDA kernels on this {identity['gpu']}")
    wanted = subjects(op)
    for name, entry in progress(wanted, work, limit):
        found[name] = entry
        save(path, identity, found, today)
    say()
    show({subject.name: found[subject.name] for subject in wanted})
    return path


def progress(wanted: list[Subject], work: Work, limit: float) -> Iterator[tuple[str, Entry]]:
    """The outcomes of ops, each in a process, with a line for each kernel and the time that is left."""
    began, done = time.monotonic(), 0
    for op in dict.fromkeys(subject.op for subject in wanted):
        for name, entry in outcomes([subject.name for subject in wanted if subject.op == op], work, limit):
            done += 1
            seconds = time.monotonic() - began
            left = f"about {seconds / done * (len(wanted) - done):.0f} s left" if done < len(wanted) else "done"
            say(f"{done} of {len(wanted)}, {left:18} {name:40} {verdict(entry)}")
            yield name, entry


def verdict(entry: Entry) -> str:
    if not entry.ok:
        return f"FAILED: {entry.why}"
    slower = "" if entry.speedup >= MIN_SPEEDUP else ", so torch's own stays"
    return f"right, {entry.speedup:.2f} times as fast as torch{slower}"


def save(path: Path, identity: dict[str, str], found: dict[str, Entry], today: str) -> None:
    try:
        proof.save(path, identity, found, today)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; set NANOCHAMELEON_CACHE to another folder") from None


def show(found: dict[str, Entry]) -> None:
    """A line for each shape of each kernel: our ms, torch's best, its time over ours; and the largest error."""
    say(f"{'ms':42} {'shape':40} {'own':>9} {'torch':>9} {'ratio':>7} {'error':>7}")
    for name, entry in found.items():
        if not entry.ok:
            say(f"{name:42} FAILED: {entry.why}")
            continue
        error = max(entry.errors.values(), default=0.0)
        for shape, own, torchs in zip(entry.shapes, entry.ms["own"], entry.ms["torch"], strict=True):
            say(f"{name:42} {shape:40} {own:9.3f} {torchs:9.3f} {torchs / own:7.2f} {error:7.2f}")
    say("error: the largest one, as a share of what is allowed (twice that of torch's own operations)")
