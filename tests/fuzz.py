"""Damages files of every kind that comes from outside, and looks at how their readers end.

    python tests/fuzz.py                                   a minute, all readers
    python tests/fuzz.py --inputs 100000                   so many files in all
    python tests/fuzz.py --only images --seed 7 --inputs 1    one file again, which a line of the output names

A reader may give what it reads, or raise UserError. All else is a finding: any other exception, a crash, more than
SECONDS of a processor, more than MEMORY above the start, a sentence that does not fit a line, and, where files have
checksums, content that is not what was written. The exit code is 1 if there is any finding. Files are read in processes
that a parent watches; an input is made from the reader's name and a seed alone.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import random
import re
import resource
import shutil
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

import numpy as np
import torch
from image_bytes import encoded, noise, odd_images
from mutators import mutated
from tiny import TOKENIZER, VOCAB, nano_folder, tiny_model, tiny_run
from tqdm import tqdm
from written import write_tar

from nanochameleon import convert
from nanochameleon.data import Rows, Shards, write_shards
from nanochameleon.data.prepare import units
from nanochameleon.data.prepare.__main__ import Args, main
from nanochameleon.data.prepared import open_prepared, sources
from nanochameleon.data.reading import Bad, Captioned, File
from nanochameleon.data.sources.folder import FolderSource, prepare_folder
from nanochameleon.data.sources.webdataset import captioned
from nanochameleon.errors import LONGEST, OBEYED, UserError, printable, short
from nanochameleon.images.tokenizer import load_square
from nanochameleon.training import checkpoint
from nanochameleon.training.curves import plot_curves
from nanochameleon.training.monitor import Monitor, read_metrics
from nanochameleon.training.restore import optimizer_tensors, restore
from nanochameleon.training.signals import StageTimer
from nanochameleon.weights.model_folder import open_model
from nanochameleon.weights.pth_files import load_pth
from nanochameleon.weights.tokenizer_json import load_text_tokenizer, save_text_tokenizer

SECONDS, MEMORY = 10, 300 * 2**20
STUCK = 180  # seconds after which a process that only waits is ended
FORK = multiprocessing.get_context("fork")  # what is imported and made once is there for every process


@dataclass(frozen=True)
class Reader:
    """What is tried: `make` writes good files into a folder; `read` reads the folder, of which `changed` is damaged.

    exact: whatever is returned must equal what the good files give. mend: makes checksums right again, so that damage
    comes past them. only: which files are damaged (a pattern of their paths).
    """

    name: str
    make: Callable[[Path], object]
    read: Callable[[Path, Path], object]
    exact: bool = False
    mend: Callable[[Path], None] | None = None
    only: str = "."


# ---------------------------------------------------------------------------------------------------------------------
# Readers: each a few lines


def make_images(folder: Path) -> None:
    kinds = dict(PNG=".png", JPEG=".jpg", WEBP=".webp", GIF=".gif", BMP=".bmp", TIFF=".tif", PPM=".ppm")
    for number, data in enumerate(odd_images().values()):
        (folder / f"{number}{kinds['JPEG' if data[:1] == bytes([255]) else 'PNG']}").write_bytes(data)
    for kind, ending in kinds.items():
        (folder / f"plain{ending}").write_bytes(encoded(noise(), kind))
    for number, way in enumerate(("tiff_lzw", "tiff_adobe_deflate", "jpeg", "packbits")):
        (folder / f"{number}.tif").write_bytes(encoded(noise(), "TIFF", compression=way))
    (folder / "slow.jpg").write_bytes(encoded(noise(), "JPEG", progressive=True))
    (folder / "exact.webp").write_bytes(encoded(noise("RGBA"), "WEBP", lossless=True))
    (folder / "moving.gif").write_bytes(encoded(noise(), "GIF", save_all=True, append_images=[noise("L")]))
    (folder / "moving.png").write_bytes(encoded(noise("L"), "PNG", save_all=True, append_images=[noise("L", 16)]))


def make_captions(folder: Path) -> None:
    for name in ("train", "test", "other"):
        (folder / name).mkdir()
        for number in range(3):
            (folder / name / f"{number}.png").write_bytes(encoded(noise(size=4 + number)))
    rows = [{"file_name": f"{number}.png", "text": f"an image {number}"} for number in range(3)]
    (folder / "train/captions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "other/metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "test/metadata.csv").write_text("file_name,text\n" + "".join(f"{n}.png,an image\n" for n in range(3)))


def read_captions(folder: Path, changed: Path) -> None:
    prepare_folder(folder, folder / "out", 4)
    source = FolderSource(folder / "out", "train", 0)
    source.document(1), list(source.captions(3))


def make_tar(folder: Path) -> None:
    members = [(f"{n}{end}", data) for n in range(3) for end, data in (
        (".png", encoded(noise(size=4))), (".txt", b"a caption"), (".json", b'{"caption": "another", "n": 1}')
    )]  # fmt: skip
    write_tar(folder / "0.tar", members)


def read_tar(folder: Path, changed: Path) -> None:
    for found, _ in captioned(changed, changed.name):
        if isinstance(found, Captioned):
            pixels_of(found.image)


def pixels_of(image) -> None:
    """A bad image among others is skipped."""
    try:
        image.pixels(8)
    except UserError as error:
        assert fits_a_line(error), error


def make_texts(folder: Path) -> None:
    (folder / "0.png").write_bytes(encoded(noise(size=4)))
    turns = [[{"text": "what is it?"}, {"image": "0.png"}], [{"text": "red"}]]
    rows = [{"text": "words"}, {"file_name": "0.png", "text": "red"}, {"turns": turns}, {"segments": turns[0]}]
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "b.txt").write_text("one\n\ntwo\n")
    (folder / "c.csv").write_text('file_name,text\n0.png,"a, b"\n0.png,c\n')


def read_texts(folder: Path, changed: Path) -> None:
    forms = {".jsonl": ("pairs", "interleaved", "text", "chat"), ".csv": ("pairs",), ".txt": ("text",)}
    for form in forms[changed.suffix]:
        for unit in units.plan([changed], form):
            for item, _ in units.items(unit, form):
                for part in () if isinstance(item, Bad) else item.doc:
                    if isinstance(part, File):
                        pixels_of(part)


def read_text_tokenizer(folder: Path, changed: Path) -> None:
    tokenizer = load_text_tokenizer(changed)
    ids = tokenizer.encode("a red tapir, \u00e9\U0001f600")
    assert tokenizer.decode(ids) == "a red tapir, \u00e9\U0001f600" and max(ids) < tokenizer.vocab.size


def make_layout(layout: str) -> Callable[[Path], object]:
    def make(folder: Path) -> None:
        nano_folder(folder / "nano")
        if layout != "nano":
            convert.convert(convert.Args(folder / "nano", folder / layout, layout))
            shutil.rmtree(folder / "nano")

    return make


def make_pth(folder: Path) -> None:
    torch.save({"a": torch.zeros(3, 4), "b": torch.zeros(5, dtype=torch.bfloat16)}, folder / "a.pth")
    torch.save({"state_dict": {"a": torch.zeros(2)}, "epoch": 3}, folder / "b.ckpt")
    torch.save({"a": torch.zeros(3, 4)}, folder / "old.pth", _use_new_zipfile_serialization=False)


def read_pth(folder: Path, changed: Path) -> None:
    for x in load_pth(changed, "state_dict").values():
        x.float().sum()


def trained() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A tiny model with an optimizer that has moved it once."""
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer


def make_checkpoints(folder: Path) -> None:
    """Two of the same content, so that the older one may stand for the newer."""
    tiny_run(folder)
    model, optimizer = trained()
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    groups = {"weights": model.state_dict(), "optim": optimizer_tensors(optimizer, model)}
    for step in (1, 2):
        checkpoint.save(folder, step, groups, {"step": 2, "loss": 1.5})


def read_checkpoints(folder: Path, changed: Path) -> str:
    tensors, state = checkpoint.load(folder)
    groups = {f"{group}.{name}": x for group, content in tensors.items() for name, x in content.items()}
    return fingerprint(json.dumps(state), *(part for name in sorted(groups) for part in (name, groups[name].numpy())))


def mend_manifests(folder: Path) -> None:
    for place in [path.parent for path in folder.rglob(checkpoint.MANIFEST)]:
        files = [path for path in sorted(place.iterdir()) if path.name != checkpoint.MANIFEST]
        entries = {path.name: {"size": path.stat().st_size, "sha256": checkpoint.sha256(path)} for path in files}
        (place / checkpoint.MANIFEST).write_bytes(checkpoint.render_manifest(entries))


def read_run(folder: Path, changed: Path) -> None:
    open_model(folder, "cpu")
    found = checkpoint.newest(folder)
    with checkpoint.readable(found):
        checkpoint.steps_done(restore(found, *trained()))
    checkpoint.keep_last(folder, 1)


def documents() -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(VOCAB.size) for _ in range(rng.randrange(1, 30))] for _ in range(40)]


def make_shards(folder: Path) -> None:
    write_shards(folder / "data", documents(), 200)
    Rows("data", Shards(folder / "data"), 32, 0, folder / "data")


def read_shards(folder: Path, changed: Path) -> str:
    """All documents and all rows of one source."""
    found = Shards(folder / "data", VOCAB.size)
    rows = Rows("data", found, 32, 0, folder / "data")
    return fingerprint(*(ids for n in range(len(rows)) for ids in found.fetch(rows.documents(n))))


def make_prepared(folder: Path) -> None:
    tiny_run(folder / "run")
    make_tar(folder)
    main(Args((folder / "0.tar",), "pairs", folder / "prepared", "pairs", folder / "run", device="cpu"))
    shutil.rmtree(folder / "run")


def read_prepared(folder: Path, changed: Path) -> str:
    tokenizers = open_prepared(folder / "prepared")
    found = [Shards(folder / "prepared" / name, tokenizers.vocab_size) for name in sources(folder / "prepared")]
    if not found:
        raise UserError("there are no sources")  # its index is another file's name: train.py says so
    return fingerprint(tokenizers.digest(), *(ids for each in found for ids in each.fetch(range(len(each)))))


def make_notes(folder: Path) -> None:
    with Monitor(folder, 9) as monitor:
        for step in range(9):
            monitor.log(step, loss=3.0 / (step + 1), lr=1e-3, tokens=9 * step, attention_logits=[1.0, 2.0])
    StageTimer(folder).add("transformer")


def read_notes(folder: Path, changed: Path) -> None:
    """No damage of these may stop a run."""
    metrics = read_metrics(folder / "metrics.jsonl")
    if random.random() < 0.02:  # a second each
        plot_curves(metrics, folder / "curves.png")
    with Monitor(folder, 9, start=5) as monitor:
        monitor.log(5, loss=1.0, tokens=99)
    StageTimer(folder).add("transformer")


READERS = (
    Reader("images", make_images, lambda folder, changed: load_square(changed, 8, "crop")),
    Reader("captions", make_captions, read_captions),
    Reader("tars", make_tar, read_tar),
    Reader("texts", make_texts, read_texts, only="jsonl|csv|txt"),
    Reader("text tokenizers", lambda folder: save_text_tokenizer(TOKENIZER, folder / "a.json"), read_text_tokenizer),
    Reader("nano", make_layout("nano"), lambda folder, changed: open_model(folder / "nano", "cpu")),
    Reader("hf", make_layout("hf"), lambda folder, changed: open_model(folder / "hf", "cpu")),
    Reader("meta", make_layout("meta"), lambda folder, changed: open_model(folder / "meta", "cpu")),
    Reader("pth", make_pth, read_pth),
    Reader("checkpoints", make_checkpoints, read_checkpoints, exact=True, only="^step"),
    Reader("mended checkpoints", make_checkpoints, read_run, mend=mend_manifests, only="step.*(tensors|state.json)"),
    Reader("runs", make_checkpoints, lambda folder, changed: open_model(folder, "cpu"), only="^[^/]*$"),
    Reader("shards", make_shards, read_shards, exact=True),
    Reader("prepared data", make_prepared, read_prepared, exact=True, only="^prepared"),
    Reader("notes", make_notes, read_notes),
)


def fingerprint(*parts) -> str:
    found = hashlib.sha256()
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else np.ascontiguousarray(part).tobytes() + b"|")
    return found.hexdigest()


# ---------------------------------------------------------------------------------------------------------------------
# One input


@dataclass
class Place:
    """A reader's folder: the good files, by path, which every input starts from."""

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
        """Changes one file, now and then two or removes one; returns the last."""
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
    """Makes the good files and reads them once. Raises what the reader raises."""
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


def fits_a_line(error: UserError) -> bool:
    """Whether what the programs print of it is one line that a terminal shows and does not obey."""
    line = printable(short(str(error)))
    return bool(line.strip()) and len(line) <= LONGEST and "\n" not in line and not OBEYED.search(line)


def origin(error: BaseException) -> str:
    """Kind, first line and where it was raised."""
    frames = traceback.extract_tb(error.__traceback__)
    frame = next((f for f in reversed(frames) if "nanochameleon/" in f.filename), frames[-1])
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {str(error)[:120]!a}"


def judge(place: Place, seed: int, start: int) -> tuple[str, str]:
    """Damages, reads, restores. (verdict, detail); start: bytes of the process before the first input."""
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
    """A process that judges what its parent names, until that is gone or this has grown."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    null = os.open(os.devnull, os.O_RDWR)
    for stream in (1, 2):
        os.dup2(null, stream)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if size := status("VmSize"):
        resource.setrlimit(resource.RLIMIT_AS, (size + 2**32, size + 2**32))  # before the machine has no more
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
    """A process and what it is at."""

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
        """The verdict, or None while there is none."""
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
    """Verdicts by reader of `inputs` inputs, or of what `seconds` allow; calls found(reader, seed, verdict, detail)."""
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
    parser.add_argument("--seed", type=int, help="of the first input of each reader; without it, a drawn one")
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
