"""A run's folder: its configuration comes back as it was, and what is missing is said in one sentence."""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny import tiny_config, tiny_model, tiny_run

from nanochameleon.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingParams,
    StageConfig,
    TokenizerTraining,
    TrainConfig,
    VQGANConfig,
)
from nanochameleon.errors import UserError
from nanochameleon.presets import PRESETS
from nanochameleon.training.run import CONFIG, command, config_from_json, config_to_json, pick_device, read_config
from nanochameleon.training.run_folder import same_command
from nanochameleon.weights.model_folder import open_model
from nanochameleon.weights.old_names import RENAMED

paths = st.text(st.characters(exclude_characters="\x00", exclude_categories=("Cs",)), min_size=1).map(Path)
whole, real = st.integers(1, 10**9), st.floats(allow_nan=False)


def drawn(cls, **known):
    """Any value of a configuration: every field, by its annotation, unless it is given."""
    numbers = {float: real, "float": real, float | None: st.none() | real}  # NaN is not equal to itself
    known |= {f.name: numbers[f.type] for f in dataclasses.fields(cls) if f.name not in known and f.type in numbers}
    given_fields = {f.name: known.get(f.name, ...) for f in dataclasses.fields(cls)}
    return st.builds(cls, **given_fields)


optims = drawn(OptimConfig, betas=st.tuples(real, real))
models = st.builds(
    lambda kv, groups, per_kv, half, model: dataclasses.replace(
        model, n_kv_heads=kv * groups, n_heads=kv * groups * per_kv, dim=kv * groups * per_kv * 2 * half,
        qk_norm_groups=groups,
    ),
    *[st.integers(1, 4)] * 4, drawn(ModelConfig, dim=st.just(8), n_heads=st.just(2), n_kv_heads=st.none(),
                                    qk_norm_groups=st.just(1), multiple_of=whole),
)  # fmt: skip
vqgans = st.builds(
    lambda mults, grid, windows, vqgan: dataclasses.replace(
        vqgan, ch_mult=tuple(mults), resolution=grid * windows * 2 ** (len(mults) - 1),
        window=grid * 2 ** (len(mults) - 1) if windows > 1 else None,
    ),
    st.lists(st.integers(1, 8), min_size=1, max_size=5), st.integers(1, 9), st.integers(1, 3),
    drawn(VQGANConfig, resolution=st.just(512), ch_mult=st.just((1, 2)), window=st.none()),
)  # fmt: skip
stages = st.lists(drawn(StageConfig, weights=st.lists(st.tuples(st.text(), real)).map(tuple))).map(tuple)
configs = drawn(
    RunConfig, name=st.text(), stages=stages, vqgan=vqgans, model=models, optim=optims,
    tokenizers=drawn(TokenizerTraining, optim=optims), data=drawn(DataConfig, path=st.none() | paths),
    train=drawn(TrainConfig), sample=drawn(SamplingParams), evaluation=drawn(EvalConfig), out=st.none() | paths,
)  # fmt: skip


@given(configs)
def test_a_configuration_comes_back_as_it_was(cfg):
    again = config_from_json(config_to_json(cfg))
    assert again == cfg and repr(again) == repr(cfg)  # repr: 1 and 1.0, (1,) and [1] are distinguished


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_comes_back_as_it_was(preset):
    assert config_from_json(config_to_json(PRESETS[preset]())) == PRESETS[preset]()


def changed(change):
    content = json.loads(config_to_json(tiny_config()))
    change(content)
    return json.dumps(content)


NOT_A_CONFIG = {
    "an unknown field": (changed(lambda c: c.update(learning_rate=1)), "learning_rate"),
    "an unknown field inside": (changed(lambda c: c["model"].update(dims=1)), "ModelConfig has no field 'dims'"),
    "a missing field": (changed(lambda c: c.pop("model")), "model"),
    "a missing field of the model": (changed(lambda c: c["model"].pop("rope_theta")), "ModelConfig lacks 'rope_theta'"),
    "a part that is a number": (changed(lambda c: c.update(model=3)), "ModelConfig is 3"),
    "sizes that do not divide": (changed(lambda c: c["model"].update(n_heads=3)), "n_heads must divide dim"),
    "no heads": (changed(lambda c: c["model"].update(n_heads=0)), "config.json"),
    "a list": ("[]", "RunConfig"),
    "a word for a number": (changed(lambda c: c["train"].update(steps="many")), "steps is 'many'"),
    "half a step": (changed(lambda c: c["train"].update(steps=1.5)), "steps is 1.5"),
    "true for a number": (changed(lambda c: c["optim"].update(lr=True)), "lr is True"),
    "a number for a tuple": (changed(lambda c: c["vqgan"].update(ch_mult=2)), "ch_mult is 2"),
    "a word in a tuple": (changed(lambda c: c["vqgan"].update(ch_mult=[1, "2"])), "ch_mult is '2'"),
    "an unknown choice": (changed(lambda c: c["optim"].update(name="sgd")), "name is 'sgd'"),
    "a number for a path": (changed(lambda c: c.update(out=3)), "out is 3"),
    "no JSON": ("{", "config.json"),
    "no text": (b"\xff\xfe", "config.json"),
}


def test_a_field_that_an_older_version_did_not_write_has_its_default():
    older = changed(lambda c: (c.pop("init_vqgan"), c["train"].pop("keep_checkpoints")))
    assert config_from_json(older) == tiny_config()


@pytest.mark.parametrize(("content", "why"), NOT_A_CONFIG.values(), ids=NOT_A_CONFIG)
def test_a_broken_configuration_is_named(tmp_path, content, why):
    (tmp_path / CONFIG).write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=why) as error:
        read_config(tmp_path)
    assert str(tmp_path / CONFIG) in str(error.value)


def test_a_configuration_under_older_names_is_read():
    cfg, older = tiny_config(), json.loads(config_to_json(tiny_config()))
    sections = {field.name: getattr(cfg, field.name) for field in dataclasses.fields(cfg)}
    places = [(older[name], value) for name, value in sections.items()] + [
        (older["tokenizers"]["optim"], cfg.tokenizers.optim),
        *zip(older["stages"], cfg.stages, strict=True),
    ]
    changed_names = []
    for fields, value in places:
        for old, new in RENAMED.get(type(value).__name__, {}).items():
            fields[old] = fields.pop(new)
            changed_names.append((type(value).__name__, old))
    of_config = {(kind, old) for kind, names in RENAMED.items() if kind not in ("Progress", "metrics") for old in names}
    assert set(changed_names) == of_config
    assert config_from_json(json.dumps(older)) == cfg


@pytest.mark.parametrize("older, today", [(True, "on"), (False, "off"), ("auto", "auto")])
def test_compile_was_a_flag_in_older_runs(older, today):
    content = json.loads(config_to_json(PRESETS["toy"]()))
    content["parallel"]["compile"] = older
    assert config_from_json(json.dumps(content)).parallel.compile == today


def test_a_folder_that_is_no_run_is_refused(tmp_path):
    for folder, why in ((tmp_path, "is not a run"), (tmp_path / "missing", "does not exist")):
        with pytest.raises(UserError, match=f"{folder} {why}"):
            open_model(folder)


def test_a_run_opens_with_the_weights_that_were_saved(tmp_path):
    model = tiny_model(seed=3, dropout=0.1)
    run = open_model(tiny_run(tmp_path / "run", model), "cpu")
    ids = torch.tensor([[0, 5, 20, 2]])
    torch.testing.assert_close(run.model(ids), model.eval()(ids), rtol=0, atol=0)
    assert not run.model.training and run.device == torch.device("cpu") and run.cfg.model == model.cfg
    assert (
        run.vocab.size == model.cfg.vocab_size
        and run.image_tokenizer.n_codes_per_image == run.cfg.vqgan.codes_per_image
    )


def test_a_run_without_one_of_its_parts_says_which(tmp_path):
    for missing in ("text_tokenizer.json", "image_tokenizer", "step-000001"):
        folder = tiny_run(tmp_path / missing)
        part = folder / missing
        shutil.rmtree(part) if part.is_dir() else part.unlink()
        with pytest.raises(UserError, match=str(folder if missing.startswith("step") else part)):
            open_model(folder, "cpu")


def test_a_run_that_has_no_model_yet_says_so(tmp_path):
    (tmp_path / CONFIG).write_text(config_to_json(tiny_config()))
    with pytest.raises(UserError, match=f"{tmp_path} is not trained yet: resume it with .*train.py tiny"):
        open_model(tmp_path, "cpu")


def test_a_command_names_the_python_that_runs_it_as_it_is_found_from_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.executable", str(tmp_path / ".venv/bin/python"))
    monkeypatch.setattr("shutil.which", lambda name: "/usr/bin/python")
    assert command("train.py", "toy", "--out", "a b") == ".venv/bin/python train.py toy --out 'a b'"
    monkeypatch.setattr("shutil.which", lambda name: str(tmp_path / ".venv/bin/python"))
    assert command("train.py") == "python train.py"
    monkeypatch.setattr("sys.executable", "/opt/python")
    assert command("train.py") == "/opt/python train.py"


def test_a_script_is_named_by_the_folder_of_the_program_that_was_started(tmp_path, monkeypatch):
    (tmp_path / "clone").mkdir()
    for name in ("train.py", "sample.py"):
        (tmp_path / "clone" / name).touch()
    monkeypatch.chdir(tmp_path)
    for started in ("clone/train.py", str(tmp_path / "clone" / "sample.py")):
        monkeypatch.setattr("sys.argv", [started, "toy", "--overwrite"])
        for name in ("train.py", "sample.py"):
            assert Path(command(name, "x").split()[1]) == Path(started).with_name(name)
    assert same_command() == command("train.py", "toy")


def test_under_a_launcher_the_command_to_resume_is_a_phrase(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    for words, said in (["toy"], "the same command"), (["toy", "--overwrite"], "the same command, without --overwrite"):
        monkeypatch.setattr("sys.argv", ["train.py", *words])
        assert same_command() == said


def test_devices():
    assert pick_device("cpu").type == "cpu" and pick_device("auto").type in ("cpu", "cuda")
    for requested in ("gpu", "", "cuda:99", "cpu:-1", "meta", "hpu", "mps:7"):
        with pytest.raises(UserError, match=f"device {requested!r} is not available"):
            pick_device(requested)


def test_a_gpu_with_a_number_becomes_the_current_one(monkeypatch):
    """Graphs, CuPy and NCCL work on the current device, whatever device their tensors are on."""
    current = []
    monkeypatch.setattr(torch, "zeros", lambda n, device: torch.ones(n))
    monkeypatch.setattr(torch.cuda, "set_device", current.append)
    assert pick_device("cuda:1") == torch.device("cuda:1") and current == [torch.device("cuda:1")]
    assert pick_device("cuda") == torch.device("cuda") and len(current) == 1
    assert pick_device("cpu:0") == torch.device("cpu:0") and len(current) == 1
