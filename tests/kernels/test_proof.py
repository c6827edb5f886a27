"""The proof of CUDA kernels: what its key depends on, which files count, and what "auto" makes of it on a GPU."""

import json
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest
import torch

from nanochameleon.kernels import dispatch, use_kernels
from nanochameleon.kernels.dispatch import decide, explain, same_kernels, use_proofs
from nanochameleon.kernels.gpu import proof
from nanochameleon.kernels.gpu.proof import Entry, Proofs

GPU, BF16 = torch.device("cuda"), torch.bfloat16
IDENTITY = {"sources": "ab12", "gpu": "H100", "capability": "9.0", "driver": "580.65.06", "torch": "2.13.0",
            "nvrtc": "13.0", "cupy": "14.2.0"}  # fmt: skip
ATTENTION, LOSS, DECODE = "qknorm_rope_attention", "zloss_cross_entropy", "decode_attention"


def right(own: float, torchs: float) -> Entry:
    return Entry(True, "", {"out": 0.5}, ("small", "large"), {"own": (own, 1.0), "torch": (torchs, 9.0)})


ENTRIES = {
    f"{ATTENTION} bfloat16 128 vendor": right(1.0, 1.9),
    f"{ATTENTION} bfloat16 128 cuda": right(1.0, 1.2),
    f"{ATTENTION} bfloat16 64 vendor": Entry(False, "it did not end within 180 s"),
    f"{LOSS} bfloat16 cuda": right(1.0, 1.04),
}
PROOFS = Proofs(IDENTITY, ENTRIES, "2026-12-01")


@pytest.fixture
def an_h100(tmp_path, monkeypatch):
    """torch sees a GPU, and proofs are in a folder that is returned."""
    for name, value in {"is_available": True, "current_device": 0, "get_device_name": "NVIDIA H100",
                        "get_device_capability": (9, 0)}.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, lambda *_, value=value: value)
    monkeypatch.setattr(proof, "driver_version", lambda: "580.65.06")
    monkeypatch.setattr(proof, "SHIPPED", tmp_path / "shipped")
    monkeypatch.setenv("NANOCHAMELEON_CACHE", str(tmp_path))
    proof._load.cache_clear()
    yield tmp_path
    proof._load.cache_clear()


# ---------------------------------------------------------------------------------------------------------------------
# The key


@pytest.mark.parametrize(
    ("file", "counts"),
    [("zloss/zloss.cu", True), ("gpu/tiles.cuh", True), ("gpu/launch.py", True), ("attention/cuda.py", True),
     ("zloss/cpu.py", False), ("gpu/emulator/emulator.h", False), ("dispatch.py", False)],
)  # fmt: skip
def test_an_edit_of_what_runs_on_a_gpu_changes_the_key(tmp_path, monkeypatch, file, counts):
    shutil.copytree(proof.KERNELS, tmp_path / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(proof, "KERNELS", tmp_path / "kernels")
    before = proof.sources_digest()
    with (tmp_path / "kernels" / file).open("a") as text:
        text.write("\n")
    assert (proof.sources_digest() != before) == counts


def test_the_gpu_and_each_version_are_part_of_the_key(an_h100):
    found = proof.identity(GPU)
    assert found.keys() == IDENTITY.keys() and found["gpu"] == "H100" and found["capability"] == "9.0"
    names = {proof.file_name(found | {name: "another"}) for name in found} | {proof.file_name(found)}
    assert len(names) == len(found) + 1
    assert proof.file_name(proof.any_driver(found)) == proof.file_name(proof.any_driver(found | {"driver": "other"}))


def test_the_driver_s_version_is_that_of_its_library(monkeypatch):
    class Library:
        nvmlInit_v2 = staticmethod(lambda: 0)

        @staticmethod
        def nvmlSystemGetDriverVersion(text, size):
            text.value = b"580.65.06"
            assert size == 80
            return 0

    monkeypatch.setattr(proof.ctypes, "CDLL", lambda name: Library)
    assert proof.driver_version() == "580.65.06"
    monkeypatch.setattr(Library, "nvmlInit_v2", lambda: 9)
    assert proof.driver_version() == ""
    monkeypatch.undo()
    if sys.platform != "win32":
        monkeypatch.setattr(proof.ctypes, "CDLL", lambda name: (_ for _ in ()).throw(OSError(name)))
        assert proof.driver_version() == ""


# ---------------------------------------------------------------------------------------------------------------------
# Files


def test_a_proof_is_read_as_it_was_written(tmp_path):
    proof.save(tmp_path / "proof.json", IDENTITY, ENTRIES, "2026-12-01")
    assert proof.read(tmp_path / "proof.json", IDENTITY) == PROOFS
    assert [path.name for path in tmp_path.iterdir()] == ["proof.json"]


def damage(field: str, value):
    """The content with this field of the first entry, or of the whole, changed."""

    def change(content: dict) -> None:
        (entry, *_) = content["entries"].values()
        (content if field in content else entry)[field] = value

    return change


DAMAGES = [
    damage("identity", IDENTITY | {"gpu": "A100"}), damage("identity", {}), damage("date", "today"), damage("date", 3),
    damage("entries", []), damage("entries", {"a": None}), damage("entries", {"a": {}}), damage("ok", 1),
    damage("why", None), damage("errors", {"out": "0.5"}), damage("errors", {"out": float("nan")}),
    damage("errors", 3), damage("shapes", ["small"]), damage("shapes", []), damage("shapes", [1, 2]),
    damage("ms", {"own": [1.0, 1.0]}), damage("ms", {"own": [1.0, 0.0], "torch": [1.0, 1.0]}),
    damage("ms", {"own": [1.0, -1.0], "torch": [1.0, 1.0]}), damage("ms", {"own": [1.0, 1.0], "torch": [1e999, 1.0]}),
    damage("ms", {"own": 1.0, "torch": 1.0}), damage("ms", {"own": [1.0, True], "torch": [1.0, 1.0]}),
    lambda content: content["entries"][f"{LOSS} bfloat16 cuda"].pop("ok"), lambda content: content.clear(),
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(DAMAGES)))
def test_a_damaged_file_or_another_gpu_s_is_no_proof(tmp_path, number):
    path = tmp_path / "proof.json"
    proof.save(path, IDENTITY, ENTRIES, "2026-12-01")
    content = json.loads(path.read_text())
    DAMAGES[number](content)
    path.write_text(json.dumps(content))
    assert proof.read(path, IDENTITY) is None


@pytest.mark.parametrize("data", [b"", b"{", b"\xff\xfe\x00", b"[]", b"3", b"[" * 100_000, b" " * (2**20 + 1), None])
def test_what_is_no_json_object_is_no_proof(tmp_path, data):
    path = tmp_path / "proof.json"
    if data is None:
        path.mkdir()
    else:
        path.write_bytes(data)
    assert proof.read(path, IDENTITY) is None and proof.read(tmp_path / "missing.json", IDENTITY) is None


# ---------------------------------------------------------------------------------------------------------------------
# What is proven on this GPU


def test_the_proof_of_this_gpu_is_found_and_read_once(an_h100):
    mine = proof.identity(GPU)
    path = an_h100 / proof.file_name(mine)
    proof.save(path, mine, ENTRIES, "2026-12-01")
    assert proof.load(GPU) == Proofs(mine, ENTRIES, "2026-12-01")
    path.unlink()
    assert proof.load(torch.device("cuda", 0)) == Proofs(mine, ENTRIES, "2026-12-01")


def test_a_shipped_table_holds_for_every_driver_until_the_sources_change(an_h100, monkeypatch):
    shipped = proof.any_driver(proof.identity(GPU))
    proof.SHIPPED.mkdir()
    proof.save(proof.SHIPPED / proof.file_name(shipped), shipped, ENTRIES, "2026-12-01")
    monkeypatch.setattr(proof, "driver_version", lambda: "another")
    assert proof.load(GPU).entries == ENTRIES
    proof._load.cache_clear()
    monkeypatch.setattr(proof, "sources_digest", lambda: "edited")
    assert proof.load(GPU).entries == {}


def test_every_shipped_table_is_for_the_sources_as_they_are():
    for path in proof.SHIPPED.glob("*"):
        shipped = json.loads(path.read_text())["identity"]
        assert path.name == proof.file_name(shipped) and shipped["sources"] == proof.sources_digest(), path
        assert proof.read(path, shipped)


def test_no_exception_reaches_a_run(an_h100, monkeypatch):
    def fail(device):
        raise RuntimeError("no driver")

    monkeypatch.setattr(proof, "identity", fail)
    with use_kernels("auto"):
        assert decide(LOSS, GPU, BF16) == (
            "reference", "not proven, since this GPU cannot be identified: no driver"
        )  # fmt: skip
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert proof.load(GPU) == Proofs()


# ---------------------------------------------------------------------------------------------------------------------
# Dispatch


@pytest.mark.parametrize(
    ("op", "dtype", "head_dim", "name", "reason"),
    [
        (ATTENTION, BF16, 128, "vendor", "proven on this H100 on 2026-12-01: 1.9 times torch's"),
        (ATTENTION, BF16, 64, "reference", "failed on this H100 on 2026-12-01: it did not end within 180 s"),
        (ATTENTION, BF16, 48, "reference", "no CUDA kernel is proven for heads of 48 numbers"),
        (ATTENTION, torch.float32, 128, "reference", "the CUDA kernels do not take float32"),
        (LOSS, BF16, None, "reference", "proven on this H100 on 2026-12-01, but not faster than torch's"),
        (LOSS, torch.float32, None, "reference", "not proven on this GPU: run python -m nanochameleon.bench prove"),
        (DECODE, BF16, 128, "reference", "not proven on this GPU: run python -m nanochameleon.bench prove"),
        ("swiglu", BF16, None, "reference", "it has no CUDA kernel"),
    ],
)
def test_auto_takes_on_a_gpu_what_is_proven_and_faster(op, dtype, head_dim, name, reason):
    with use_kernels("auto"), use_proofs(PROOFS):
        assert decide(op, GPU, dtype, head_dim) == (name, reason)


def test_without_a_proof_every_line_at_the_start_names_the_command(an_h100):
    with use_kernels("auto"):
        lines = {line.split()[0]: line for line in explain(GPU, BF16, 128).splitlines()}
    for op in (ATTENTION, LOSS):
        assert "reference" in lines[op] and lines[op].endswith(f"not proven on this GPU: run {proof.COMMAND}")


def test_the_reason_on_another_gpu_than_the_first_says_how_to_prove_that_one(an_h100):
    reason = f"not proven on this GPU: run {proof.COMMAND}"
    assert proof.load(torch.device("cuda", 0)).choose(LOSS, BF16, None)[1] == reason
    reason += ", with CUDA_VISIBLE_DEVICES set to it"
    assert proof.load(torch.device("cuda", 1)).choose(LOSS, BF16, None)[1] == reason


def test_recomputation_in_another_thread_takes_the_same_proofs():
    with use_kernels("auto"), use_proofs(PROOFS):
        _, again = same_kernels()

    def recompute() -> str:
        with again:
            return decide(ATTENTION, GPU, BF16, 128)[0]

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(recompute).result() == "vendor"


def test_a_compiled_graph_takes_what_is_proven_for_its_head_size(monkeypatch):
    """Sizes are symbols in it, of which the head size must become a number."""
    asked = []
    entries = Proofs(IDENTITY, {name.replace(" 64 ", " 32 "): replace(entry) for name, entry in ENTRIES.items()}, "d")
    monkeypatch.setattr(Proofs, "choose", lambda self, *what: asked.append(what) or ("vendor", ""))

    def run(x: torch.Tensor) -> torch.Tensor:
        name, _ = dispatch.proven(ATTENTION, GPU, BF16, dispatch.proven_head_dim(x))
        return x + 1 if name == "vendor" else x

    with use_proofs(entries):
        compiled = torch.compile(run, backend="eager", fullgraph=True, dynamic=True)
        for t, e in ((3, 64), (5, 64), (5, 48)):
            assert compiled(torch.zeros(1, t, 2, e)).sum() == 2 * t * e
    assert {what[2] for what in asked} == {64, None}
