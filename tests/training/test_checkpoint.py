"""A checkpoint is whole or does not count, and a run that resumes from one is the run that never stopped."""

import json
import math
import os
import resource
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from nanochameleon.config import OptimConfig
from nanochameleon.errors import UserError
from nanochameleon.optim import learning_rate, make_adamw
from nanochameleon.training import checkpoint
from nanochameleon.training.checkpoint import (
    damage,
    keep_last,
    load,
    newest,
    save,
    sweep,
)
from nanochameleon.training.restore import load_optimizer, optimizer_tensors, restore, stored_shapes

TENSORS = {
    "model": {"a.weight": torch.arange(6.0).view(2, 3).bfloat16(), "b": torch.tensor(3)},
    "optim": {"a.weight.step": torch.tensor(2.0)},
}


def save_some(run_dir, *steps):
    for step in steps:
        tensors = {**TENSORS, "model": {**TENSORS["model"], "b": torch.tensor(step)}}
        save(run_dir, step, tensors, {"step": step})


def names(run_dir):
    return sorted(path.name for path in run_dir.iterdir())


# ---------------------------------------------------------------------------------------------------------------------
# Resuming


@torch.random.fork_rng()
def train(steps, run_dir, stop_after=None, resume=False):
    """A network with dropout, whose draws are a function of the step; returns its losses and its tensors."""
    torch.manual_seed(99 if resume else 1)
    model = nn.Sequential(nn.Linear(3, 5), nn.LayerNorm(5), nn.Dropout(0.5), nn.Linear(5, 1))
    cfg = OptimConfig(lr=1e-2, warmup_steps=2)
    optimizer, start = make_adamw(model, cfg), 0
    if resume:
        tensors, state = load(run_dir)
        model.load_state_dict(tensors["model"])
        load_optimizer(optimizer, model, tensors["optim"])
        start = state["step"]
    losses = []
    for step in range(start, steps if stop_after is None else stop_after):
        torch.manual_seed(step)
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, steps, cfg)
        loss = model(torch.randn(4, 3)).pow(2).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    everything = {"model": model.state_dict(), "optim": optimizer_tensors(optimizer, model)}
    if stop_after is not None:
        save(run_dir, stop_after, everything, {"step": stop_after})
    return losses, {f"{group}.{k}": v for group, content in everything.items() for k, v in content.items()}


@settings(max_examples=15)
@given(st.integers(1, 12), st.data())
def test_stopping_and_going_on_is_bitwise_the_unbroken_run(tmp_path_factory, steps, data):
    stop = data.draw(st.integers(0, steps))
    run_dir = tmp_path_factory.mktemp("run")
    unbroken, expected = train(steps, run_dir)
    first, _ = train(steps, run_dir, stop_after=stop)
    second, reached = train(steps, run_dir, resume=True)
    assert first + second == unbroken
    assert reached.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(reached[name], tensor), name


def test_an_optimizer_of_another_model_is_refused_by_parameter_and_shape(tmp_path):
    train(3, tmp_path, stop_after=3)
    saved = load(tmp_path)[0]["optim"]
    wider, longer = nn.Sequential(nn.Linear(3, 6)), nn.Sequential(nn.Linear(3, 5))
    with pytest.raises(UserError, match=r"0\.bias\.exp_avg has shape \(5,\).*\(6,\)"):
        load_optimizer(make_adamw(wider, OptimConfig()), wider, saved)
    with pytest.raises(UserError, match=r"'1\.(weight|bias)'"):
        load_optimizer(make_adamw(longer, OptimConfig()), longer, saved)


# ---------------------------------------------------------------------------------------------------------------------
# whole or not


def test_what_is_loaded_is_what_was_saved(tmp_path):
    path = save(tmp_path, 7, TENSORS, {"step": 7, "text": "ä\u2028"})
    tensors, state = load(tmp_path)
    assert path.name == "step-000007" and state == {"step": 7, "text": "ä\u2028"}
    for group, content in TENSORS.items():
        assert tensors[group].keys() == content.keys()
        for name, tensor in content.items():
            assert tensors[group][name].dtype == tensor.dtype and torch.equal(tensors[group][name], tensor)
    assert load(path, groups=["model"])[0].keys() == {"model"}
    with pytest.raises(UserError, match=r"vqgan\.safetensors"):
        load(path, groups=["vqgan"])


@given(st.data())
def test_a_flipped_byte_or_a_cut_anywhere_is_seen_and_the_one_before_is_taken(tmp_path_factory, capsys, data):
    run_dir = tmp_path_factory.mktemp("run")
    save_some(run_dir, 1, 2)
    victim = data.draw(st.sampled_from(sorted((run_dir / "step-000002").iterdir())))
    content = bytearray(victim.read_bytes())
    offset = data.draw(st.integers(0, len(content) - 1))
    if data.draw(st.booleans()):
        content[offset] ^= data.draw(st.integers(1, 255))
    else:
        del content[offset:]
    victim.write_bytes(bytes(content))
    capsys.readouterr()
    assert newest(run_dir) == run_dir / "step-000001"
    warning = capsys.readouterr().err
    assert warning.count("\n") == 1 and "step-000002" in warning
    assert load(run_dir)[1] == {"step": 1}
    with pytest.raises(UserError, match="step-000002 is damaged"):
        load(run_dir / "step-000002")


@pytest.mark.parametrize("flip", [0x01, 0x03, 0x20, 0x29])
def test_no_byte_of_a_manifest_can_change_unseen(tmp_path, flip):
    """It guards the others and nothing guards it, so every byte is tried; 0x03 and 0x29 turn white space into a tab."""
    save_some(tmp_path, 1)
    manifest = tmp_path / "step-000001" / "manifest.json"
    content = manifest.read_bytes()
    for offset in range(len(content)):
        manifest.write_bytes(content[:offset] + bytes([content[offset] ^ flip]) + content[offset + 1 :])
        assert damage(manifest.parent), offset


def test_a_missing_file_is_seen(tmp_path):
    save_some(tmp_path, 1)
    for file in sorted((tmp_path / "step-000001").iterdir()):
        content = file.read_bytes()
        file.unlink()
        assert file.name in damage(tmp_path / "step-000001")
        file.write_bytes(content)
    assert damage(tmp_path / "step-000001") is None


@given(crash_at=st.integers(0, 40))
def test_a_crash_at_any_moment_of_a_save_leaves_a_whole_checkpoint(tmp_path_factory, crash_at):
    """The n-th call that touches the disk dies and, like a kill, cleans nothing up. Step 2 replaces an older step 2."""
    run_dir = tmp_path_factory.mktemp("run")
    save_some(run_dir, 1, 2)
    calls = 0

    def dying(function):
        def wrapper(*args, **kwargs):
            nonlocal calls
            calls += 1
            if calls > crash_at:
                raise KeyboardInterrupt
            return function(*args, **kwargs)

        return wrapper

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint.shutil, "rmtree", dying(shutil.rmtree))
        patch.setattr(checkpoint.os, "rename", dying(os.rename))
        for name in ("save_file", "fsync", "sha256"):
            patch.setattr(checkpoint, name, dying(getattr(checkpoint, name)))
        try:
            save(run_dir, 2, TENSORS, {"step": 2, "again": True})
            finished = True
        except KeyboardInterrupt:
            finished = False
    tensors, state = load(run_dir)
    assert state in ([{"step": 2, "again": True}] if finished else [{"step": 2}, {"step": 2, "again": True}])
    assert tensors["model"]["a.weight"].shape == (2, 3)
    if (run_dir / "step-000002").exists():  # once it is there it comes before the one that stepped aside
        assert newest(run_dir).name == "step-000002"
    (run_dir / ".tmp-1-metrics.jsonl").write_bytes(b"of a write_file that may be under way")
    save_some(run_dir, 3)
    assert [name for name in names(run_dir) if name.startswith(".tmp")] == [".tmp-1-metrics.jsonl"]
    sweep(run_dir)
    assert not [name for name in names(run_dir) if name.startswith(".tmp")]
    assert load(run_dir)[1] == {"step": 3}


def test_a_full_disk_is_one_sentence_and_keeps_the_older_checkpoint(tmp_path):
    """RLIMIT_FSIZE makes the kernel refuse the bytes, in safetensors' own code too."""
    save_some(tmp_path, 1)
    before, limits = names(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4_096, limits[1]))
    try:
        with pytest.raises(UserError, match="cannot save a checkpoint"):
            save(tmp_path, 2, {"model": {"big": torch.zeros(10_000)}}, {"step": 2})
        with pytest.raises(UserError, match="cannot save a checkpoint"):
            save(tmp_path, 2, TENSORS, {"step": 2, "long": "x" * 10_000})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert names(tmp_path) == before
    assert load(tmp_path)[1] == {"step": 1}


def test_the_newest_is_the_highest_number_also_past_six_digits(tmp_path):
    save_some(tmp_path, 2_000_000, 999_999, 10)
    assert newest(tmp_path).name == "step-2000000"


@settings(max_examples=20)
@given(st.sets(st.integers(0, 5)), st.integers(1, 4))
def test_old_checkpoints_go_only_once_k_newer_ones_are_whole(tmp_path_factory, broken, k):
    run_dir = tmp_path_factory.mktemp("run")
    save_some(run_dir, *range(6))
    for step in broken:
        (run_dir / f"step-{step:06d}" / "state.json").write_bytes(b"cut")
    whole = [step for step in range(6) if step not in broken]
    oldest_kept = whole[-k] if len(whole) >= k else 0
    keep_last(run_dir, k)
    assert names(run_dir) == [f"step-{step:06d}" for step in range(oldest_kept, 6)]


@given(st.lists(st.none() | st.floats(0.1, 9) | st.just(math.nan), min_size=3, max_size=6), st.integers(1, 3))
@settings(max_examples=20)
def test_the_checkpoint_of_the_least_loss_stays_with_the_last_ones(losses, k):
    with tempfile.TemporaryDirectory() as place:
        run_dir = Path(place)
        for step, loss in enumerate(losses):
            save(run_dir, step, TENSORS, {"step": step, "loss": loss})
        keep_last(run_dir, k)
        known = [(loss, -step) for step, loss in enumerate(losses) if loss is not None and math.isfinite(loss)]
        last = set(range(max(0, len(losses) - k), len(losses)))
        kept = {int(name.removeprefix("step-")) for name in names(run_dir)}
        assert last <= kept and len(kept) <= k + 1
        if known:
            assert min(loss for loss, _ in known) in {losses[step] for step in kept}
        else:
            assert kept == last


# ---------------------------------------------------------------------------------------------------------------------
# what is no checkpoint


def test_what_is_no_run_folder_is_refused_in_words(tmp_path):
    (tmp_path / "model.pt").write_bytes(b"\x80\x02.")
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    save_some(tmp_path / "broken", 1)
    (tmp_path / "broken" / "step-000001" / "manifest.json").write_bytes(b"\xff\xfe[")
    for name, words in (
        ("missing", "does not exist"),
        ("model.pt", "is a file, not a run folder"),
        ("empty", "not a run folder"),
        ("broken", "no whole checkpoint"),
    ):
        with pytest.raises(UserError, match=f"{name} .*{words}"):
            load(tmp_path / name)


def mend(path: Path, **content: bytes) -> Path:
    """Writes files and a manifest that agrees with them, as an attacker would. "__" means a dot."""
    for name, data in content.items():
        (path / name.replace("__", ".")).write_bytes(data)
    files = (file for file in path.iterdir() if file.name != "manifest.json")
    (path / "manifest.json").write_bytes(checkpoint.render_manifest(checkpoint.describe(files)))
    return path


def header(**tensors: dict) -> bytes:
    """A safetensors file of a header alone."""
    text = json.dumps(tensors).encode()
    return len(text).to_bytes(8, "little") + text


ODD_CONTENT = {
    "no JSON": {"state__json": b"{"},
    "no text": {"state__json": b"\xff\xfe{"},
    "no object": {"state__json": b"[1]"},
    "brackets": {"state__json": b"[" * 100_000},
    "a cut header": {"model__safetensors": b"\x10\x00"},
    "a header beyond the file": {"model__safetensors": b"\xff" * 8 + b"{}"},
    "tensors beyond the file": {"model__safetensors": header(a=dict(dtype="F32", shape=[9], data_offsets=[0, 36]))},
    "a header of brackets": {"model__safetensors": (50_000).to_bytes(8, "little") + b"[" * 50_000},
    "odd shards": {"model__safetensors": header(__metadata__={"DCP_SHARDING_INFO": "[" * 9_000})},
    "shards of an odd kind": {"model__safetensors": header(__metadata__={"DCP_SHARDING_INFO": '{"a": [1]}'})},
    "shards before the first number": {
        "model__safetensors": header(__metadata__={"DCP_SHARDING_INFO": '{"a": {"saved_offsets": [-1]}}'})
    },
}


@pytest.mark.parametrize("kind", ODD_CONTENT)
def test_odd_files_with_a_manifest_that_agrees_are_passed_over(kind, tmp_path, capsys):
    save_some(tmp_path, 1, 2)
    mend(tmp_path / "step-000002", **ODD_CONTENT[kind])
    assert newest(tmp_path) == tmp_path / "step-000001" and "passing over" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"step-000002 is damaged: (state|model)\.\w+ is not what belongs there"):
        load(tmp_path / "step-000002")


ODD_NAMES = ["x" * 300, "\x1b]0;title\x07\x1b[2J", "..", "a\0b", "a/b", "", " ", "\ud800"]


@pytest.mark.parametrize("name", ODD_NAMES)
def test_a_name_that_no_save_gives_is_damage(name, tmp_path):
    save_some(tmp_path, 1)
    entries = checkpoint.read_manifest(tmp_path / "step-000001")
    entries[name] = entries["model.safetensors"]
    (tmp_path / "step-000001" / "manifest.json").write_bytes(checkpoint.render_manifest(entries))
    assert damage(tmp_path / "step-000001") == "manifest.json is damaged"


def test_a_manifest_of_brackets_is_damage(tmp_path):
    save_some(tmp_path, 1)
    (tmp_path / "step-000001" / "manifest.json").write_bytes(b"[" * 100_000)
    assert damage(tmp_path / "step-000001") == "manifest.json is damaged"


def a_model() -> tuple[nn.Module, torch.optim.Optimizer]:
    """Its optimizer has a state, as after a step."""
    model = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    optimizer = make_adamw(model, OptimConfig())
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    return model, optimizer


def save_model(run_dir: Path, step: int) -> dict[str, torch.Tensor]:
    model, optimizer = a_model()
    groups = {"weights": model.state_dict(), "optim": optimizer_tensors(optimizer, model)}
    save(run_dir, step, groups, {"step": step})
    return groups["weights"] | groups["optim"]


@pytest.mark.parametrize(
    "name", ["zzz.safetensors", "._weights.safetensors", "shard-00009.safetensors", "a.safetensors"]
)
def test_tensors_in_a_file_that_the_manifest_does_not_list_are_never_read(name, tmp_path):
    expected = save_model(tmp_path, 3)
    path = tmp_path / "step-000003"
    save_file({key: torch.full_like(x, 7) for key, x in expected.items()}, path / name)
    (path / "more.safetensors").write_bytes(b"no tensors")
    model, optimizer = a_model()
    assert damage(path) is None and restore(newest(tmp_path), model, optimizer) == {"step": 3}
    found = model.state_dict() | optimizer_tensors(optimizer, model)
    assert all(torch.equal(found[key], x) for key, x in expected.items())
    assert load(path)[0].keys() == {"weights", "optim"} and stored_shapes(path).keys() == expected.keys()


def in_two(path: Path, tensors: dict[str, torch.Tensor], first: int = 1, second: int = 1) -> Path:
    """The tensors in two files, the rows from `second` on in the second one, as ranks with shards write them."""
    for number, begin, end in ((1, 0, first), (2, second, None)):
        parts = {key: x[begin:end].clone() for key, x in tensors.items() if x.ndim} | {
            key: x for key, x in tensors.items() if not x.ndim and number == 1
        }
        offsets = {key: {"saved_offsets": [begin] + [0] * (x.ndim - 1) if x.ndim else []} for key, x in parts.items()}
        save_file(parts, path / f"shard-0000{number}.safetensors", {"DCP_SHARDING_INFO": json.dumps(offsets)})
    for name in ("weights", "optim"):
        (path / f"{name}.safetensors").unlink()
    return mend(path)


def test_of_a_sharded_checkpoint_too_only_listed_files_are_read(tmp_path):
    expected = save_model(tmp_path, 3)
    path = in_two(tmp_path / "step-000003", expected)
    shutil.copy(path / "shard-00002.safetensors", path / "shard-00003.safetensors")
    save_file({key: torch.full_like(x, 7) for key, x in expected.items()}, path / "weights.safetensors")
    model, optimizer = a_model()
    restore(newest(tmp_path), model, optimizer)
    found = model.state_dict() | optimizer_tensors(optimizer, model)
    assert all(torch.equal(found[key], x) for key, x in expected.items())


@pytest.mark.parametrize("edges", [(1, 2), (2, 1)], ids=["a part is missing", "a part is there twice"])
def test_shards_that_do_not_make_whole_tensors_are_refused(edges, tmp_path):
    path = in_two(tmp_path / "step-000003", save_model(tmp_path, 3), *edges)
    assert damage(path) is None
    with pytest.raises(UserError, match=r"step-000003 has \d+ of the \d+ elements of .*: delete .*step-000003"):
        restore(path, *a_model())


def test_a_state_that_lacks_a_part_of_the_optimizer_is_refused(tmp_path):
    save_model(tmp_path, 3)
    file = tmp_path / "step-000003" / "optim.safetensors"
    content = file.read_bytes().replace(b"0.weight.exp_avg_sq", b"0.weight.exp_avg_sx")
    mend(file.parent, optim__safetensors=content)
    with pytest.raises(UserError, match="the checkpoint's optimizer lacks a part of its state"):
        restore(file.parent, *a_model())


def test_numbers_of_a_kind_that_torch_does_not_know_are_one_sentence(tmp_path):
    model = nn.Sequential(nn.Linear(4, 2, bias=False))
    optimizer = make_adamw(model, OptimConfig())
    model(torch.ones(1, 4)).sum().backward()
    optimizer.step()
    path = save(tmp_path, 3, {"optim": optimizer_tensors(optimizer, model)}, {})
    weights = {"0.weight": dict(dtype="F6_E2M3", shape=[2, 4], data_offsets=[0, 6])}
    mend(path, weights__safetensors=header(**weights) + bytes(6))
    for use in (lambda: restore(path, model, optimizer), lambda: load(path)):
        with pytest.raises(UserError, match=r"step-000003 does not hold what it should .*: delete it, and the same"):
            use()


@pytest.mark.parametrize("step", [None, -1, 1.5, "1", True])
def test_steps_that_are_no_count_are_refused(step):
    with pytest.raises(ValueError, match="not a count"):
        checkpoint.steps_done({"step": step})


def test_a_manifest_cannot_point_outside_its_folder(tmp_path):
    save_some(tmp_path, 1)
    outside = tmp_path / "outside.safetensors"
    shutil.copy(tmp_path / "step-000001" / "model.safetensors", outside)
    entries = checkpoint.read_manifest(tmp_path / "step-000001")
    entries["../outside.safetensors"] = entries["model.safetensors"]
    (tmp_path / "step-000001" / "manifest.json").write_bytes(checkpoint.render_manifest(entries))
    assert newest(tmp_path) is None
