"""A conversion loses no bit, stays small in memory, names what is broken, and leaves nothing half written."""

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from model_folders import SHAPES, assert_same, edit_json, edit_pth, edit_safetensors, make_folders
from tiny import TOKENIZER, nano_folder, released_model

from nanochameleon.convert import Args, cli, convert
from nanochameleon.errors import UserError
from nanochameleon.weights.model_folder import open_model, open_model_files


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, Path]:
    return make_folders(tmp_path_factory.mktemp("layouts"))


@settings(max_examples=12)
@given(
    st.sampled_from(SHAPES), st.sampled_from([torch.float32, torch.bfloat16]), st.integers(0, 99),
    st.lists(st.sampled_from([("hf", None), ("nano", None), ("meta", None), ("meta", 8)]), min_size=1, max_size=4),
)  # fmt: skip
def test_any_chain_of_conversions_comes_back_bit_for_bit(tmp_path_factory, shape, dtype, seed, chain):
    place = tmp_path_factory.mktemp("chain")
    start = at = nano_folder(place / "start", released_model(seed, dtype, **shape))
    for i, (to, shards) in enumerate(chain):
        fits = (shape.get("n_kv_heads") or shape.get("n_heads", 2)) % 8 == 0
        at = convert(Args(at, place / str(i), to, shards=shards if fits else None, file_gb=1e-5))
    assert_same(start, at)


def test_a_file_that_transformers_reads_is_the_one_we_started_from(folders, tmp_path):
    """Not only our reading of it: names and bytes of Hugging Face's and Meta's files."""
    back = convert(Args(convert(Args(folders["hf"], tmp_path / "m", "meta")), tmp_path / "h", "hf"))
    for name in ("model.safetensors", "vqgan_decoder.safetensors"):
        assert (back / name).read_bytes() == (folders["hf"] / name).read_bytes()
    for name in ("config.json", "tokenizer.json", "preprocessor_config.json"):
        assert json.loads((back / name).read_text()) == json.loads((folders["hf"] / name).read_text())
    one, other = (torch.load(p / "models/nano/consolidated.00.pth") for p in (folders["meta"], tmp_path / "m"))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert one["rope.freqs"].shape == (3,) and one["layers.0.attention.q_normalization.weight"].shape == (6,)


def test_a_source_without_a_decoder_reads_and_does_not_draw(folders, tmp_path, capsys):
    hf = convert(Args(folders["nano"], tmp_path / "hf", "hf"))
    (hf / "vqgan_decoder.safetensors").unlink()
    nano = convert(Args(hf, tmp_path / "nano", "nano"))
    assert "no image decoder" in capsys.readouterr().err
    run, whole = open_model(nano, "cpu"), open_model(folders["nano"], "cpu")
    image = torch.randint(0, 256, (1, 8, 8, 3), dtype=torch.uint8).numpy()
    assert torch.equal(run.image_tokenizer.encode(image), whole.image_tokenizer.encode(image))
    with pytest.raises(UserError, match="no image decoder"):
        run.image_tokenizer.decode(torch.zeros(1, 16, dtype=torch.long))
    with pytest.raises(UserError, match=r"no image decoder.*--no-decoder"):
        convert(Args(nano, tmp_path / "meta", "meta"))
    assert_same(convert(Args(nano, tmp_path / "meta", "meta", decoder=False)), nano)
    assert "the image decoder is left out" in capsys.readouterr().err


def with_tokenizer(folders, place: Path, change) -> Path:
    shutil.copytree(folders["nano"], place)
    edit_json(place / "text_tokenizer.json", change)
    return place


def test_a_post_processor_of_ones_own_survives_the_chain(folders, tmp_path):
    own = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}], "pair": []}
    own["special_tokens"] = {"<s>": {"id": "<s>", "ids": [0], "tokens": ["<s>"]}}
    for i, change in enumerate((lambda c: c.update(post_processor=own), lambda c: c.pop("post_processor"))):
        start = with_tokenizer(folders, tmp_path / f"start{i}", change)
        back = convert(Args(convert(Args(start, tmp_path / f"hf{i}", "hf")), tmp_path / f"back{i}", "nano"))
        kept = json.loads((back / "text_tokenizer.json").read_text())["post_processor"]
        assert kept == (None if i else own)


def test_a_tokenizer_without_a_name_for_image_is_refused_before_a_weight_is_written(folders, tmp_path, monkeypatch):
    def change(content):
        name = TOKENIZER.vocab.name(TOKENIZER.vocab.eot + 1)
        del content["model"]["vocab"][name]
        content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] != name]

    start = with_tokenizer(folders, tmp_path / "start", change)
    monkeypatch.setattr("nanochameleon.convert.write_sharded", lambda *_: pytest.fail("weights were written"))
    with pytest.raises(UserError, match="no reserved name"):
        convert(Args(start, tmp_path / "hf", "hf"))


def test_a_conversion_leaves_one_that_is_running_alone(folders, tmp_path):
    """Another process's aside folder stays, a dead one's goes, and who comes second to the name says so."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    running, left = tmp_path / f".tmp-new-{os.getppid()}", tmp_path / f".tmp-new-{dead.pid}"
    running.mkdir()
    left.mkdir()
    convert(Args(folders["nano"], tmp_path / "new", "nano"))
    assert set(tmp_path.iterdir()) == {running, tmp_path / "new"}
    assert_same(tmp_path / "new", folders["nano"])


# ---------------------------------------------------------------------------------------------------------------------
# What is refused, by name; then nothing is left


class Bomb:
    def __reduce__(self):
        return os.system, (f"touch {Path('boom').absolute()}",)


@pytest.mark.parametrize(
    "layout, file, damage, words",
    [
        ("meta", "models/nano/consolidated.00.pth", lambda p: p.with_name("consolidated.pth").touch(), ["has both"]),
        (
            "meta", "models/nano/consolidated.00.pth",
            lambda p: edit_json(p.with_name("params.json"), lambda c: c["nanochameleon"].update(qk_norm_groups=5)),
            ["groups"],
        ),
        (
            "meta", "models/nano/params.json", lambda p: edit_json(p, lambda c: c["model"].update(multiple_of=0)),
            ["model.multiple_of must be at least 1, not 0"],
        ),
        (
            "meta", "models/nano/params.json",
            lambda p: edit_json(p, lambda c: c["model"].update(ffn_dim_multiplier=1e308)), ["no model has the sizes"],
        ),
        (
            "meta", "models/nano/params.json",
            lambda p: edit_json(p, lambda c: c["model"].update(ffn_dim_multiplier=1e99)), ["cannot be read as"],
        ),
        ("hf", "config.json", lambda p: edit_json(p, lambda c: c.update(intermediate_size=0)), ["intermediate_size 0"]),
        ("hf", "config.json", lambda p: p.write_text("[" * 200_000), ["config.json is damaged"]),
        ("nano", "config.json", lambda p: edit_json(p, lambda c: c["model"].update(multiple_of=0)), ["multiple_of"]),
        ("nano", "config.json", lambda p: edit_json(p, lambda c: c["model"].update(n_kv_heads=0)), ["n_kv_heads"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: p.unlink(), ["1 of 2 shards"]),
        ("meta", "models/nano/consolidated.00.pth", lambda p: p.unlink(), ["not all from 00"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: p.write_bytes(pickle.dumps(Bomb())), ["cannot read"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: torch.save({"x": Bomb()}, p), ["refused"]),
        ("meta", "models/nano/consolidated.01.pth", lambda p: p.write_bytes(p.read_bytes()[:999]), ["consolidated.01"]),
        (
            "meta", "models/nano/consolidated.01.pth", lambda p: edit_pth(p, lambda c: c.pop("norm.weight")),
            ["consolidated.01.pth lacks norm.weight"],
        ),
        (
            "meta", "models/nano/consolidated.01.pth", lambda p: edit_pth(p, lambda c: c.update(x=torch.ones(2))),
            ["unexpected tensor, x"],
        ),
        (
            "meta", "models/nano/consolidated.00.pth",
            lambda p: edit_pth(p, lambda c: c.update({"norm.weight": torch.ones(2)})), ["norm.weight is (2,)", "(24,)"],
        ),
        ("meta", "tokenizer/vqgan.yaml", lambda p: p.write_text("model:"), ["resolution"]),
        ("meta", "tokenizer/text_tokenizer.json", lambda p: p.unlink(), ["text_tokenizer.json"]),
        ("meta", "models/nano/params.json", lambda p: p.write_text('{"model": {"dim": 24}}'), ["lacks"]),
        (
            "hf", "model.safetensors", lambda p: edit_safetensors(p, lambda c: c.update({"model.x": torch.ones(2)})),
            ["unexpected tensor, model.x"],
        ),
        (
            "hf", "model.safetensors",
            lambda p: edit_safetensors(p, lambda c: c.pop("model.vqmodel.quant_conv.bias")), ["lacks quant_conv.bias"],
        ),
        ("hf", "vqgan_decoder.safetensors", lambda p: p.write_bytes(b"x"), ["vqgan_decoder.safetensors"]),
        ("hf", "model.safetensors", lambda p: p.unlink(), ["neither model.safetensors nor"]),
        ("hf", "config.json", lambda p: p.write_text("{"), ["config.json is damaged"]),
        ("nano", "config.json", lambda p: p.write_text('{"layout": "nanochameleon"}'), ["lacks 'model'"]),
        ("nano", "vqgan.safetensors", lambda p: p.unlink(), ["vqgan.safetensors"]),
    ],
)  # fmt: skip
def test_what_is_broken_is_named(layout, file, damage, words, tmp_path, monkeypatch, folders):
    monkeypatch.chdir(tmp_path)
    source = convert(Args(folders["nano"], tmp_path / "source", layout))
    damage(source / file)
    with pytest.raises(UserError) as error:
        convert(Args(source, tmp_path / "target", "nano"))
    assert all(word in str(error.value) for word in words), error.value
    assert [path.name for path in tmp_path.iterdir()] == ["source"]  # no target, no rest of one, no boom


@pytest.mark.parametrize(
    "arguments, word",
    [
        (["{place}", "new", "--to", "hf"], "not a run, or a model"), (["nowhere", "new", "--to", "hf"], "not exist"),
        (["{nano}", "{hf}", "--to", "hf"], "exists"), (["{nano}", "new", "--to", "meta", "--shards", "3"], "3 shards"),
        (["{nano}", "new", "--to", "meta", "--shards", "1"], "2 groups"), (["{run}", "new", "--to", "hf"], "n_groups"),
        (["{nano}", "new", "--to", "tar"], "tar"), (["{nano}", "new", "--to", "meta", "--shards", "-2"], "--shards"),
        (["{nano}", "new", "--to", "nano", "--file-gb", "inf"], "--file-gb"),
    ],
)  # fmt: skip
def test_a_mistake_gets_one_sentence(arguments, word, folders, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        cli([a.format(place=tmp_path, **folders) for a in arguments])
    assert end.value.code == 2 and word in capsys.readouterr().err and list(tmp_path.iterdir()) == []


def test_a_full_disk_is_called_so(folders, tmp_path):
    """By a limit on the size of files, which fails like a full disk in the middle of a file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        with pytest.raises(UserError, match=r"cannot write .*meta: .*File too large"):
            convert(Args(folders["nano"], tmp_path / "meta", "meta"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []


# ---------------------------------------------------------------------------------------------------------------------
# Killed, and large

LARGE = """
    import sys
    from pathlib import Path
    from nanochameleon import convert
    from nanochameleon.weights import tensor_files

    source, target, small, to, shards, hog = sys.argv[1:]
    convert.convert(convert.Args(Path(small), Path(target + "-small"), to, shards=2 if to == "meta" else None))
    tensor_files.REMAP = 2**22
    if hog == "hog":
        kept, read = [], tensor_files.Safetensors.__getitem__
        tensor_files.Safetensors.__getitem__ = lambda self, name: kept.append(read(self, name).clone()) or kept[-1]

    def status(field):
        return next(int(x.split()[1]) * 1024 for x in open("/proc/self/status") if x.startswith(field + ":"))

    open("/proc/self/clear_refs", "w").write("5")  # the peak begins anew: ru_maxrss is at first the parent's
    before = status("VmRSS")
    convert.convert(convert.Args(Path(source), Path(target), to, shards=int(shards) or None))
    print(status("VmHWM") - before)
"""


def memory(source: Path, target: Path, small: Path, to: str, shards: int, hog: str = "") -> int:
    """Bytes that a conversion holds at its peak beyond those of a process that has done a small one."""
    command = [sys.executable, "-c", textwrap.dedent(LARGE), *map(str, (source, target, small, to, shards, hog))]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return int(subprocess.run(command, capture_output=True, text=True, check=True, env=env).stdout)


@pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="a process's own peak is read from Linux's /proc"
)
def test_memory_stays_below_one_and_a_half_shards(tmp_path, folders):
    """A model of about 100 MB in one piece and in four; and the measurement sees a conversion that keeps all."""
    torch.manual_seed(0)
    model = released_model(dim=512, n_layers=8, n_heads=8, multiple_of=256)
    size = sum(p.nbytes for p in model.parameters())
    start = nano_folder(tmp_path / "nano", model)
    del model
    assert size > 90e6
    for source, to, shards in (("nano", "hf", 0), ("hf", "meta1", 1), ("meta1", "meta4", 4), ("meta4", "nano2", 0)):
        layout = to.rstrip("0123456789")
        used = memory(tmp_path / source, tmp_path / to, folders["nano"], layout, shards)
        bound = 1.5 * size / shards if shards else 0.3 * size  # a file that is written as it comes is never held
        assert used < bound, f"{source} to {to}: {used / 1e6:.0f} MB of {size / 1e6:.0f}"
    assert_same(start, tmp_path / "nano2")
    assert memory(tmp_path / "nano", tmp_path / "hog", folders["nano"], "hf", 0, "hog") > 0.9 * size


def test_a_killed_conversion_leaves_nothing_that_looks_whole(folders, tmp_path):
    code = """
        import sys, time
        from pathlib import Path
        from nanochameleon import convert
        written = convert.write_safetensors
        def slow(path, *rest):
            written(path, *rest)
            print("written", flush=True)
            time.sleep(60)
        convert.write_safetensors = slow
        convert.convert(convert.Args(Path(sys.argv[1]), Path(sys.argv[2]), "nano"))
    """
    command = [sys.executable, "-c", textwrap.dedent(code), str(folders["hf"]), str(tmp_path / "new")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as process:
        assert process.stdout.readline() == "written\n"
        process.send_signal(signal.SIGKILL)
    aside = tmp_path / f".tmp-new-{process.pid}"
    assert list(tmp_path.iterdir()) == [aside]
    with pytest.raises(UserError):
        open_model_files(aside)
    assert_same(convert(Args(folders["hf"], tmp_path / "new", "nano")), folders["nano"])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]
