"""Damages files of every kind that comes from outside, and checks how their readers (fuzz_readers.py) end.

    python tests/fuzz.py                                   a minute, all readers
    python tests/fuzz.py --inputs 100000                   so many files in all
    python tests/fuzz.py --only images --seed 7 --inputs 1    one file again, as a line of the output names it

A reader may return what it reads, or raise UserError. Everything else is a finding: any other exception, a crash, more
than SECONDS of a processor, more than MEMORY above the start, a sentence that does not fit a line, and, where files
have checksums, content that is not what was written. The exit code is 1 if there is a finding. Files are read in
processes that a parent watches; an input is a function of the reader's name and a seed.
"""

import argparse
import multiprocessing
import os
import random
import re
import resource
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from itertools import count
from multiprocessing.connection import Connection, wait
from pathlib import Path

import torch
from fuzz_readers import READERS, Reader, fits_a_line
from mutators import mutated
from tqdm import tqdm

from nanochameleon.errors import UserError

SECONDS, MEMORY = 10, 300 * 2**20
STUCK = 180  # seconds after which a process that only waits is ended
FORK = multiprocessing.get_context("fork")  # every process inherits what was imported and made once


# ---------------------------------------------------------------------------------------------------------------------
# One input


@dataclass
class Place:
    """A reader's folder: the good files, by path, that every input starts from."""

    reader: Reader
    folder: Path
    files: dict[Path, bytes]
    expected: object

    def restore(self) -> None:
        for path in [path for path in self.folder.rglob("*") if path not in self.files]:
            if path.is_file() or path.is_symlink():
                path.unlink()
        for path, data in self.files.items():
            if not path.is_file() or path.read_bytes() != data:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)

    def damage(self, rng: random.Random) -> Path:
        """Damage one file, sometimes two, or remove one; return the last."""
        paths = [path for path in self.files if re.search(self.reader.only, str(path.relative_to(self.folder)))]
        for _ in range(rng.choice([1, 1, 1, 2])):
            path = rng.choice(paths)
            if rng.random() < 0.02 and len(paths) > 3 and path.is_file():
                path.unlink()
            else:
                path.write_bytes(mutated(path.name, self.files[path], rng))
        if self.reader.mend:
            self.reader.mend(self.folder)
        return path


def place_of(reader: Reader, folder: Path) -> Place:
    """Make the good files and read them once. Raises what the reader raises."""
    folder.mkdir(parents=True)
    reader.make(folder)
    files = {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    place = Place(reader, folder, files, None)
    good = [path for path in files if re.search(reader.only, str(path.relative_to(folder)))]
    place.expected = reader.read(folder, good[0])
    return place


def moved(place: Place, to: Path) -> Place:
    """A copy for one process."""
    files = {to / path.relative_to(place.folder): data for path, data in place.files.items()}
    copy = Place(place.reader, to, files, place.expected)
    copy.restore()
    return copy


def status(key: str) -> int:
    """Bytes of this process, of VmRSS or VmHWM, its peak since reset_peak; 0 where the system does not say."""
    try:
        with open("/proc/self/status") as file:
            return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))
    except OSError:
        return 0


def reset_peak() -> None:
    if os.path.exists("/proc/self/clear_refs"):
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")


def origin(error: BaseException) -> str:
    """Kind, first line and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "nanochameleon/" in f.filename), frames[-1])
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:120]!a}"


def judge(place: Place, seed: int, start: int) -> tuple[str, str]:
    """Damage, read, restore: (verdict, detail). start: bytes of the process before the first input."""
    rng = random.Random(f"{place.reader.name} {seed}")
    random.seed(seed)
    reset_peak()
    try:
        changed = place.damage(rng)
        signal.setitimer(signal.ITIMER_PROF, SECONDS)  # its signal ends the process
        value = place.reader.read(place.folder, changed)
        same = not place.reader.exact or value == place.expected
        verdict = ("ok", "") if same else ("silent", "other content than was written")
    except UserError as error:
        verdict = "refused" if fits_a_line(error) else "sentence", repr(str(error)[:200])
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        verdict = "traceback", origin(error)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (grown := status("VmHWM") - start) > MEMORY:
        verdict = "memory", f"{grown / 2**20:,.0f} MiB, then {verdict}"
    place.restore()
    return verdict


# ---------------------------------------------------------------------------------------------------------------------
# Many inputs


def work(connection: Connection, places: dict[str, Place], folder: Path) -> None:
    """A process that judges the inputs its parent names, until the parent is gone or this process has grown."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size := status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))  # before the machine runs out of memory
    mine: dict[str, Place] = {}
    start, parent = status("VmRSS"), os.getppid()
    while True:
        while not connection.poll(1):
            if os.getppid() != parent:  # it was killed
                return
        name, seed = connection.recv()
        if name not in mine:
            mine[name] = moved(places[name], folder / name)
        verdict = judge(mine[name], seed, start)
        grown = status("VmRSS") - start > MEMORY // 2
        connection.send((verdict, grown))
        if grown:
            return


@dataclass
class Worker:
    """A process and its current input."""

    places: dict[str, Place]
    folder: Path
    task: tuple[str, int] | None = None
    numbers: Iterator[int] = field(default_factory=count)

    def start(self) -> None:
        self.connection, other = FORK.Pipe()
        folder = self.folder / str(next(self.numbers))
        self.process = FORK.Process(target=work, args=(other, self.places, folder), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python 3.12 warns of forks
            self.process.start()
        other.close()

    def give(self, task: tuple[str, int]) -> None:
        self.task, self.since = task, time.monotonic()
        self.connection.send(task)

    def take(self) -> tuple[str, str] | None:
        """The verdict, or None while the process is busy."""
        if self.connection.poll():
            try:
                verdict, grown = self.connection.recv()
                if grown:
                    self.end()
                    self.start()
                return verdict
            except (EOFError, OSError):
                self.process.join()
        elif time.monotonic() - self.since < STUCK:
            return None
        else:
            self.process.kill()
            self.process.join()
        code = self.process.exitcode
        self.start()
        if code in (-signal.SIGPROF, -signal.SIGKILL):
            return "slow", f"more than {SECONDS} s, or stuck"
        return "crash", f"exit code {code}"

    def end(self) -> None:
        self.process.kill()
        self.process.join()


def made(readers: Sequence[Reader], folder: Path) -> dict[str, Place]:
    torch.set_num_threads(1)
    with open(os.devnull, "w") as null, redirect_stdout(null), redirect_stderr(null):
        return {reader.name: place_of(reader, folder / reader.name) for reader in readers}


def run(
    readers: Sequence[Reader], seed: int, inputs: int | None, seconds: float, workers: int,
    found: Callable[[str, int, str, str], None] = lambda *finding: None,
) -> dict[str, Counter[str]]:  # fmt: skip
    """Count verdicts by reader, of `inputs` inputs or of `seconds`; calls found(reader, seed, verdict, detail)."""
    counts = {reader.name: Counter() for reader in readers}
    tasks = ((readers[i % len(readers)].name, seed + i // len(readers)) for i in count())
    left, until = inputs, time.monotonic() + seconds
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as name:
        places = made(readers, Path(name) / "good")
        pool = [Worker(places, Path(name) / f"worker-{n}") for n in range(workers)]
        bar = tqdm(total=left, unit=" inputs", disable=not sys.stderr.isatty())
        try:
            for worker in pool:
                worker.start()
            while True:
                for worker in pool:
                    if worker.task is None and (left > 0 if left is not None else time.monotonic() < until):
                        worker.give(next(tasks))
                        left = None if left is None else left - 1
                busy = [worker for worker in pool if worker.task]
                if not busy:
                    return counts
                wait([worker.connection for worker in busy], timeout=1)
                for worker in busy:
                    if verdict := worker.take():
                        (reader, number), worker.task = worker.task, None
                        counts[reader][verdict[0]] += 1
                        bar.update()
                        if verdict[0] not in ("ok", "refused"):
                            found(reader, number, *verdict)
        finally:
            bar.close()
            for worker in pool:
                worker.end()


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, help="how many in all; without it, as many as the minutes allow")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, help="of the first input of each reader; without it, a random one")
    parser.add_argument("--only", choices=[reader.name for reader in READERS], help="one reader")
    parser.add_argument("--workers", type=int, default=os.cpu_count())
    return parser.parse_args()


def command() -> int:
    args = options()
    seed = int.from_bytes(os.urandom(4)) if args.seed is None else args.seed
    readers = [reader for reader in READERS if args.only in (None, reader.name)]
    print(f"seed {seed}, {len(readers)} readers", flush=True)
    seen: Counter[tuple[str, str, str]] = Counter()

    def found(reader: str, number: int, verdict: str, detail: str) -> None:
        seen[kind := (reader, verdict, re.sub(r"\d+ MiB|(?<=: ).*", "", detail))] += 1
        if seen[kind] <= 3:
            print(f"{verdict}: --only {reader!r} --seed {number} --inputs 1: {detail}", flush=True)

    before = time.monotonic()
    counts = run(readers, seed, args.inputs, args.minutes * 60, args.workers, found)
    total, took = sum(each.total() for each in counts.values()), time.monotonic() - before
    for name, each in counts.items():
        print(f"{name:20} {each.total():8,}  " + ", ".join(f"{n:,} {verdict}" for verdict, n in each.most_common()))
    print(f"{total:,} inputs in {took:,.0f} s; {seen.total():,} findings of {len(seen)} kinds")
    return int(bool(seen))


if __name__ == "__main__":
    sys.exit(command())
