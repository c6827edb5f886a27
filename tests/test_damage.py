"""A changed byte, a cut or an exchange in any file of a run or of prepared data: the same command comes to the same, or
says one sentence; never a traceback, and never another result without a word.

The commands' readers are called, not the commands: a whole training for each example would take too long.
"""

import hashlib
import json
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import TOKENIZER, tiny_config, tiny_model, tiny_run
from written import lines, prepare

from nanochameleon.config import DataConfig
from nanochameleon.data import write_shards
from nanochameleon.data.build import open_loader, tokenizer_checksum
from nanochameleon.data.prepared import open_prepared
from nanochameleon.errors import UserError
from nanochameleon.optim import make_optimizer
from nanochameleon.presets import mixed
from nanochameleon.training import checkpoint
from nanochameleon.training.monitor import Monitor
from nanochameleon.training.restore import optimizer_tensors, restore
from nanochameleon.training.run import CONFIG, TEXT_TOKENIZER, config_to_json
from nanochameleon.training.run_folder import start_folder
from nanochameleon.training.signals import StageTimer
from nanochameleon.training.train_tokenizers import open_image_tokenizer
from nanochameleon.weights.tokenizer_json import load_text_tokenizer

CPU = torch.device("cpu")


def digest(*values) -> str:
    """Of tensors by name, and of what JSON can hold."""
    found = hashlib.sha256()
    for value in values:
        if isinstance(value, dict):
            for name in sorted(value):
                x = value[name]
                found.update(name.encode() + (x.numpy().tobytes() if isinstance(x, torch.Tensor) else repr(x).encode()))
        else:
            found.update(json.dumps(value).encode())
    return found.hexdigest()


def trained(folder: Path):
    """The model and its optimizer as a run that goes on has them."""
    model = tiny_model()
    optimizer = make_optimizer(model, tiny_config().optim)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return model, optimizer


def config(folder: Path, **changes):
    cfg = tiny_config(out=folder, stages=mixed(pairs=0.6, text=0.4), device="cpu")
    return replace(cfg, train=replace(cfg.train, batch_size=2, seq_len=16), **changes)


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, str, str]:
    """A run with checkpoints at steps 1 and 2, and what it comes to with both and with the first. Read only."""
    folder = tiny_run(tmp_path_factory.mktemp("run") / "run")
    (folder / CONFIG).write_text(config_to_json(config(folder)))
    shutil.rmtree(folder / "step-000001")
    for name, first in (("pairs", 20), ("text", 30)):
        docs = [[first + n % 7] * (3 + n % 5) for n in range(12)]
        write_shards(folder / "data" / name, docs, 40, {TEXT_TOKENIZER: tokenizer_checksum(TOKENIZER)})
    model, optimizer = trained(folder)
    for step in (1, 2):
        torch.nn.init.constant_(model.output.weight, step)
        groups = {"weights": model.state_dict(), "optim": optimizer_tensors(optimizer, model)}
        checkpoint.save(folder, step, groups, {"step": step, "precision": "fp32"})
    with Monitor(folder, 20) as monitor:
        for step in (0, 1):
            monitor.log(step, loss=1.5, tokens=9 * step, attention_logits=[1.0, 2.0])
    StageTimer(folder).add("data")
    newest = come_to(folder)  # which packs rows
    assert newest == come_to(folder)
    step = (folder / "step-000002").rename(folder.with_name("aside"))
    before = come_to(folder)
    step.rename(folder / "step-000002")
    return folder, newest, before


def come_to(folder: Path) -> str:
    """What the same command goes on from."""
    cfg = config(folder)
    start_folder(cfg)
    StageTimer(folder)
    tokenizer = load_text_tokenizer(folder / TEXT_TOKENIZER)
    image_tokenizer = open_image_tokenizer(folder, cfg.vqgan, CPU)
    loader = open_loader(cfg, image_tokenizer, tokenizer, folder)
    batches = [loader.batch(step).tokens.tolist() for step in range(8)]
    model, optimizer = trained(folder)
    state = restore(checkpoint.locate(folder), model, optimizer)
    with Monitor(folder, 20, start=state["step"]):
        pass
    tensors = model.state_dict() | optimizer_tensors(optimizer, model)
    return digest(batches, tensors, state, image_tokenizer.vqgan.state_dict(), TOKENIZER.encode("a red ta"))


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """Prepared data of two sources. Read only."""
    place = tmp_path_factory.mktemp("data")
    model = tiny_run(place / "model")
    for name in ("pairs", "text"):
        text = lines(place / f"{name}.jsonl", *({"text": f"{name} {n}, all of it"} for n in range(9)))
        prepare(place / "data", name, text, "text", model)
    return place / "data"


def come_to_with(data: Path, folder: Path) -> str:
    """What a run in `folder` on prepared data trains on."""
    tokenizers = open_prepared(data)
    cfg = config(folder, data=DataConfig("prepared", data))
    cfg = replace(cfg, train=replace(cfg.train, seq_len=64))
    loader = open_loader(cfg, None, tokenizers.text(), folder)
    return digest([loader.batch(step).tokens.tolist() for step in range(12)], tokenizers.digest(), tokenizers.context)


def damage(draw, folder: Path) -> None:
    """Changes one file, or exchanges two."""
    files = sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)
    file, other = draw(st.sampled_from(files)), draw(st.sampled_from(files))
    content = bytearray(file.read_bytes())
    place = draw(st.integers(0, len(content) - 1))
    kind = draw(st.sampled_from(["flip", "cut", "exchange", "longer", "zeros", "swap"]))
    if kind == "flip":
        content[place] ^= draw(st.integers(1, 255))
    elif kind == "cut":
        del content[place:]
    elif kind == "exchange":
        content = content[place:] + content[:place]
    elif kind == "longer":
        content += content[place:]
    elif kind == "zeros":
        content[place : place + 512] = bytes(len(content[place : place + 512]))
    else:
        content, before = other.read_bytes(), content
        other.write_bytes(before)
    file.write_bytes(content)


@settings(max_examples=60)
@given(st.data())
def test_damage_in_a_run_is_told_or_changes_nothing(run, capsys, data):
    """Of two checkpoints the newest is passed over with a warning where it is damaged."""
    folder, newest, before = run
    with tempfile.TemporaryDirectory() as place:
        folder = Path(shutil.copytree(folder, Path(place) / "run"))
        damage(data.draw, folder)
        capsys.readouterr()
        found = told(lambda: come_to(folder))
        assert found in (None, before if "passing over" in capsys.readouterr().err else newest)


@settings(max_examples=60)
@given(st.data(), st.booleans())
def test_damage_in_prepared_data_is_told_or_changes_nothing(prepared, data, begun):
    """Before a run on it begins, and afterwards."""
    with tempfile.TemporaryDirectory() as place:
        folder, out = Path(shutil.copytree(prepared, Path(place) / "data")), Path(place) / "run"
        expected = come_to_with(folder, out if begun else Path(place) / "another")
        damage(data.draw, folder)
        assert told(lambda: come_to_with(folder, out)) in (None, expected)


def told(use: Callable[[], str]) -> str | None:
    """What it comes to; None where it says one sentence."""
    try:
        return use()
    except UserError as error:
        assert "\n" not in str(error)
        return None
