"""The readers that the fuzzer tries (fuzz.py), each a few lines: good files, and how they are read."""

import hashlib
import json
import random
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from image_bytes import encoded, noise, odd_images
from tiny import TOKENIZER, VOCAB, nano_folder, tiny_model, tiny_run
from written import write_tar

from nanochameleon import convert
from nanochameleon.data import PackedDocuments, Shards, write_shards
from nanochameleon.data.prepare.__main__ import Args, main
from nanochameleon.data.prepared import open_prepared, sources
from nanochameleon.data.reading import Bad, ImageFile
from nanochameleon.data.sources import units
from nanochameleon.data.sources.folder import FolderSource, prepare_folder
from nanochameleon.data.sources.webdataset import captioned_images
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


@dataclass(frozen=True)
class Reader:
    """`make` writes good files into a folder; `read` reads the folder, in which the file `changed` is damaged.

    exact: the result must equal that of the good files. mend: makes checksums right again, so that damage gets past
    them. only: which files are damaged (a pattern of their paths).
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
    for found, _ in captioned_images(changed, changed.name):
        if not isinstance(found, Bad):
            pixels_of(found.doc[1])


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
        for unit in units.plan([changed], form)[0]:
            for item, _ in units.items(unit, form):
                for part in () if isinstance(item, Bad) else item.doc:
                    if isinstance(part, ImageFile):
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
    """A tiny model and its optimizer after one step."""
    model = tiny_model().train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    return model, optimizer


def make_checkpoints(folder: Path) -> None:
    """Two of the same content, so that the older one may take the place of the newer."""
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
    PackedDocuments("data", Shards(folder / "data"), 32, 0, folder / "data")


def read_shards(folder: Path, changed: Path) -> str:
    """All documents and all sequences of one source."""
    found = Shards(folder / "data", VOCAB.size)
    packed = PackedDocuments("data", found, 32, 0, folder / "data")
    return fingerprint(*(tokens for n in range(len(packed)) for tokens in found.fetch(packed.sequence(n))))


def make_prepared(folder: Path) -> None:
    tiny_run(folder / "run")
    make_tar(folder)
    main(Args((folder / "0.tar",), "pairs", folder / "prepared", "pairs", folder / "run", device="cpu"))
    shutil.rmtree(folder / "run")


def read_prepared(folder: Path, changed: Path) -> str:
    tokenizers = open_prepared(folder / "prepared")
    found = [Shards(folder / "prepared" / name, tokenizers.vocab_size) for name in sources(folder / "prepared")]
    if not found:
        raise UserError("there are no sources")  # an index was renamed: train.py reports it
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


def fits_a_line(error: UserError) -> bool:
    """Whether the programs print it as one line without control characters."""
    line = printable(short(str(error)))
    return bool(line.strip()) and len(line) <= LONGEST and "\n" not in line and not OBEYED.search(line)
