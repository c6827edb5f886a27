"""One small model as a folder in every layout, and edits of its files, for tests of weights/ and convert.py."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from tiny import nano_folder, released_model, tiny_run

from nanochameleon.convert import Args, convert
from nanochameleon.weights.model_folder import open_model_files

SHAPES = [  # GQA, groups, norm order, type
    dict(), dict(dim=24, n_heads=4, n_kv_heads=2, qk_norm_groups=2, norm_order="post"),
    dict(dim=32, n_heads=8, qk_norm_groups=4), dict(dim=64, n_heads=16, n_kv_heads=8, qk_norm_groups=8),
]  # fmt: skip


def make_folders(place: Path) -> dict[str, Path]:
    """Write one model in the three layouts, and a run."""
    nano = nano_folder(place / "nano", released_model(**SHAPES[1]))
    for to in ("hf", "meta"):
        convert(Args(nano, place / to, to))
    return {name: place / name for name in ("nano", "hf", "meta")} | {"run": tiny_run(place / "run")}


def assert_same(a: Path, b: Path) -> None:
    first, second = open_model_files(a), open_model_files(b)
    assert (first.model, first.vqgan, first.tokenizer_json) == (second.model, second.vqgan, second.tokenizer_json)
    for one, other in ((first.weights, second.weights), (first.vq, second.vq)):
        assert one.meta.keys() == other.meta.keys()
        for name in one.meta:
            x, y = one.get(name), other.get(name)
            assert x.dtype == y.dtype and torch.equal(x, y), name


def edit_pth(path: Path, change) -> None:
    content = torch.load(path)
    change(content)
    torch.save(content, path)


def edit_json(path: Path, change) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def edit_safetensors(path: Path, change) -> None:
    content = load_file(path)
    change(content)
    save_file(content, path)
