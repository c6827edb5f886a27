"""Reads which CUDA kernels are proven on this GPU: those that "auto" may run. `python -m nanochameleon.bench prove`
writes it.

A proof is a JSON file, `proven-KEY.json`, in the cache folder (NANOCHAMELEON_CACHE, or see caches.py). KEY is a digest
of what the kernels' results and times depend on: their sources, the GPU, its driver, and the versions of what compiles
and launches them. After a change of any of these the file is no longer found, so the kernels have to be proven again. A
table may also be part of the repository, in `proven/`. It holds for every driver, until any source is edited.

Nothing here raises: a damaged file is no proof, and training runs on PyTorch's operations.
"""

import ctypes
import hashlib
import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache, cached_property
from importlib import metadata
from pathlib import Path

import torch

from nanochameleon.kernels.caches import cache_folder
from nanochameleon.kernels.gpu import nvrtc

COMMAND = "python -m nanochameleon.bench prove"
HEAD_DIMS = 32, 64, 128  # E that kernels are proven for: the presets' head sizes
MIN_SPEEDUP = 1.05  # a kernel that gains less is not worth being another one than PyTorch's
KERNELS = Path(__file__).parents[1]
SHIPPED = Path(__file__).parent / "proven"
MAX_BYTES = 2**20  # of a proof file

# ---------------------------------------------------------------------------------------------------------------------
# What a proof holds


@dataclass(frozen=True)
class Entry:
    """What was found about one implementation of an op, for one dtype and head size."""

    ok: bool
    why: str = ""  # it is not ok
    errors: Mapping[str, float] = field(default_factory=dict)  # of each check, relative to torch's own error
    shapes: tuple[str, ...] = ()  # that were timed
    ms: Mapping[str, tuple[float, ...]] = field(default_factory=dict)  # at each shape: "own", and "torch", its best

    @cached_property
    def speedup(self) -> float:
        """Torch's time divided by ours, at the shape where that is smallest. 0 without a proof."""
        pairs = zip(self.ms["torch"], self.ms["own"], strict=True) if self.ok else []
        return min((theirs / ours for theirs, ours in pairs), default=0.0)


@dataclass(frozen=True)
class Proofs:
    """All entries for one GPU."""

    identity: Mapping[str, str] = field(default_factory=dict)  # of the GPU and its software; empty if unknown
    entries: Mapping[str, Entry] = field(default_factory=dict)  # by entry_name
    date: str = ""
    absent: str = f"not proven on this GPU: run {COMMAND}"  # the reason where there is no entry

    @cached_property
    def _choices(self) -> dict[tuple, tuple[str, str]]:
        """Those made so far: every call of an op asks."""
        return {}

    def choose(self, op: str, dtype: torch.dtype, head_dim: int | None) -> tuple[str, str]:
        """Return the fastest proven implementation, else "reference", and the reason."""
        what = op, dtype, head_dim
        if what not in self._choices:
            self._choices[what] = self._choose(*what)
        return self._choices[what]

    def _choose(self, op: str, dtype: torch.dtype, head_dim: int | None) -> tuple[str, str]:
        if op.endswith("attention") and head_dim not in HEAD_DIMS:
            return "reference", f"no CUDA kernel is proven for heads of {head_dim} numbers"
        names = {name: entry_name(op, dtype, head_dim, name) for name in ("cuda", "vendor")}
        found = {name: self.entries[key] for name, key in names.items() if key in self.entries}
        if not found:
            return "reference", self.absent
        best, place = max(found, key=lambda name: found[name].speedup), f"on this {self.identity['gpu']} on {self.date}"
        if found[best].speedup >= MIN_SPEEDUP:
            return best, f"proven {place}: {found[best].speedup:.1f} times torch's"
        if found[best].ok:
            return "reference", f"proven {place}, but not faster than torch's"
        return "reference", f"failed {place}: {found[best].why}"


def entry_name(op: str, dtype: torch.dtype, head_dim: int | None, implementation: str) -> str:
    """Such as "qknorm_rope_attention bfloat16 128 vendor"; only attention has a head size."""
    size = [str(head_dim)] if op.endswith("attention") else []
    return " ".join([op, str(dtype).removeprefix("torch."), *size, implementation])


# ---------------------------------------------------------------------------------------------------------------------
# What a proof is for


def sources_digest() -> str:
    """Digest of all CUDA files and of the Python that launches them, without the emulator and the kernels for CPUs."""
    digest = hashlib.sha256()
    for path in sorted(path for name in ("attention", "gpu", "zloss") for path in (KERNELS / name).rglob("*")):
        if path.suffix in (".cu", ".cuh", ".py") and "emulator" not in path.parts and "cpu" not in path.name:
            digest.update(path.relative_to(KERNELS).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def driver_version() -> str:
    """The version of NVIDIA's driver, such as 580.65.06, from the library that nvidia-smi asks; "" without one."""
    try:
        library, text = ctypes.CDLL("nvml.dll" if os.name == "nt" else "libnvidia-ml.so.1"), (ctypes.c_char * 80)()
        wrong = library.nvmlInit_v2() or library.nvmlSystemGetDriverVersion(text, len(text))
    except (OSError, AttributeError):
        return ""
    return "" if wrong else text.value.decode()


def package_version(*names: str) -> str:
    """The version of the first package that is installed, else ""."""
    found = (path.version for name in names for path in metadata.distributions(name=name))
    return next(found, "")


def identity(device: torch.device) -> dict[str, str]:
    """What the kernels' results and times on this device depend on. A CPU stands for the emulator."""
    if device.type != "cuda":
        return {"sources": sources_digest(), "gpu": "emulator", "torch": torch.__version__}
    return {
        "sources": sources_digest(),
        "gpu": torch.cuda.get_device_name(device).removeprefix("NVIDIA "),
        "capability": ".".join(map(str, torch.cuda.get_device_capability(device))),
        "driver": driver_version(),
        "torch": torch.__version__,
        "nvrtc": nvrtc.version(),
        "cupy": package_version("cupy-cuda13x", "cupy-cuda12x"),
    }


def file_name(identity: Mapping[str, str]) -> str:
    return f"proven-{hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]}.json"


def any_driver(identity: Mapping[str, str]) -> dict[str, str]:
    """The identity of a table in the repository."""
    return {name: value for name, value in identity.items() if name != "driver"}


# ---------------------------------------------------------------------------------------------------------------------
# Files


def proof_folder() -> Path | None:
    """Where proofs are kept; None if no folder can be written."""
    return cache_folder("NANOCHAMELEON_CACHE", os.environ.get("NANOCHAMELEON_CACHE", ""))


def read_entry(value: dict) -> Entry:
    """Raises ValueError, KeyError or TypeError for an entry that `save` did not write."""
    entry = Entry(
        value["ok"], value["why"], dict(value["errors"]), tuple(value["shapes"]),
        {name: tuple(times) for name, times in value["ms"].items()},
    )  # fmt: skip
    times = [time for each in entry.ms.values() for time in each]
    texts = [entry.why, *entry.errors, *entry.shapes]
    numbers = [*entry.errors.values(), *times]
    right = type(entry.ok) is bool and all(type(text) is str and len(text) < 1_000 for text in texts)
    right &= all(type(number) is float and math.isfinite(number) for number in numbers) and min(times, default=1) > 0
    if entry.ok:
        right &= set(entry.ms) == {"own", "torch"} and bool(entry.shapes)
        right &= all(len(each) == len(entry.shapes) for each in entry.ms.values())
    if not right:
        raise ValueError("an entry is not as it was written")
    return entry


def read(path: Path, identity: Mapping[str, str]) -> Proofs | None:
    """The proofs in a file if they are for this identity; None where they are damaged, for another one or missing."""
    try:
        if path.stat().st_size > MAX_BYTES:
            return None
        content = json.loads(path.read_text(encoding="utf-8"))
        entries = {name: read_entry(value) for name, value in content["entries"].items()}
        if content["identity"] != dict(identity) or not re.fullmatch(r"\d{4}-\d\d-\d\d", content["date"]):
            return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    return Proofs(identity, entries, content["date"])


def save(path: Path, identity: Mapping[str, str], entries: Mapping[str, Entry], date: str) -> None:
    """Write the file, whole or not at all. Raises OSError."""
    content = {"identity": identity, "date": date, "entries": {name: asdict(entry) for name, entry in entries.items()}}
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    aside.replace(path)


def load(device: torch.device) -> Proofs:
    """What is proven on this GPU: found here, else part of the repository, else nothing. Never raises."""
    if not torch.cuda.is_available():
        return Proofs()
    return _load(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _load(index: int) -> Proofs:
    try:
        mine = identity(torch.device("cuda", index))
    except Exception as error:  # a driver in disorder must not end a run that needs no kernel of ours
        return Proofs(absent=f"not proven, since this GPU cannot be identified: {error}")
    folder, shipped = proof_folder(), any_driver(mine)
    places = [(folder / file_name(mine), mine)] if folder else []
    places.append((SHIPPED / file_name(shipped), shipped))
    absent = Proofs.absent + (", with CUDA_VISIBLE_DEVICES set to it" if index else "")  # prove takes the first GPU
    found = next(filter(None, (read(path, what) for path, what in places)), Proofs(absent=absent))
    return replace(found, identity=mine)
