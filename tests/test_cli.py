"""The command line: a wrong word ends with its name and code 2, before torch is imported and without a traceback."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from nanochameleon.bench import __main__ as bench
from nanochameleon.cli import parse, parse_run, sizes_come_later
from nanochameleon.convert import Args as ConvertArgs
from nanochameleon.data.prepare.__main__ import Args as DataArgs
from nanochameleon.errors import UserError, exit_on_user_error
from nanochameleon.presets import PRESETS

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))


def run_train(*words: str, cwd: Path, python: tuple[str, ...] = ()) -> subprocess.CompletedProcess:
    command = [sys.executable, *python, str(ROOT / "train.py"), *words]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=200)


WRONG = {
    "no preset": ([], "toy"),
    "an unknown preset": (["toyy"], "toyy"),
    "an unknown option": (["toy", "--train.stepz", "3"], "--train.stepz"),
    "an option of another part": (["toy", "--steps", "3"], "--steps"),
    "an option under its older name": (["toy", "--train.keep=3"], "--train.keep is now --train.keep-checkpoints"),
    "a switch under its older name": (["toy", "--data.no-live"], "--data.no-live is now --data.no-tokenize-on-the-fly"),
    "an older name with a hyphen": (["toy", "--sample.max-new=3"], "--sample.max-new is now --sample.max-new-tokens"),
    "a stage's option under its older name": (["toy", "--stages.0.share", "1"], "is now --stages.0.fraction"),
    "a word for a number": (["toy", "--train.steps", "many"], "--train.steps"),
    "half a step": (["toy", "--train.steps", "1.5"], "--train.steps"),
    "an unknown choice": (["toy", "--optim.name", "sgd"], "--optim.name"),
    "an option without its value": (["toy", "--seed"], "--seed"),
    "heads that do not divide": (["toy", "--model.n-heads", "7"], "n_heads must divide dim"),
    "no heads": (["toy", "--model.n-heads", "0"], "n_heads"),
    "a window that does not divide": (["toy", "--vqgan.window", "5"], "window"),
    "groups that do not divide": (["toy", "--vqgan.n-groups", "3"], "vqgan.n_groups"),
    "no steps": (["toy", "--train.steps", "0"], "train.steps must be at least 1, not 0"),
    "a log that is never written": (["toy", "--train.log-every", "0"], "train.log_every"),
    "no checkpoint kept": (["toy", "--train.keep-checkpoints", "0"], "train.keep_checkpoints"),
    "a negative seed": (["toy", "--seed", "-1"], "seed must be at least 0, not -1"),
    "negative merges": (["toy", "--tokenizers.n-merges", "-1"], "tokenizers.n_merges"),
    "a tokenizer that is never quantized": (["toy", "--tokenizers.steps", "100"], "tokenizers.warmup_steps"),
    "no channels": (["toy", "--vqgan.ch", "0"], "vqgan.ch must be at least 1, not 0"),
    "no levels": (["toy", "--vqgan.ch-mult"], "ch_mult must have 1 to 16 numbers"),
    "a seed beyond 32 bits": (["toy", "--seed", str(2**32)], "seed must be at most 4294967295"),
    "a seed beyond 64 bits": (["toy", "--seed", str(10**30)], "seed must be at most 4294967295"),
    "more steps than a number can count": (["toy", "--train.steps", str(10**400)], "train.steps must be at most"),
    "a rate that is no number": (["toy", "--optim.lr", "nan"], "optim.lr must be above 0, not nan"),
    "an endless rate": (["toy", "--tokenizers.optim.lr", "inf"], "tokenizers.optim.lr must be above 0, not inf"),
    "an exponential way to nothing": (
        ["toy", "--optim.schedule", "exponential", "--optim.min-lr-ratio", "0"], "optim.min_lr_ratio must be above 0"
    ),
    "a moving average of one value": (["toy", "--optim.betas", "0.9", "1"], "optim.betas must be at least 0 and less"),
    "more dropped than there is": (["toy", "--model.dropout", "2"], "model.dropout must be at least 0 and less than 1"),
    "no probability": (["toy", "--sample.top-p", "0"], "sample.top_p must be above 0 and at most 1, not 0"),
    "a negative weight": (["toy", "--stages.0.weights", "pairs", "-1"], "stages.0.weights must be sources"),
    "a source twice": (["toy", "--stages.0.weights", "text", "1", "text", "2"], "each once"),
    "no sources at all": (["toy", "--stages.0.weights"], "stages.0.weights must be sources"),
    "a stage without steps": (["toy", "--stages.0.fraction", "0"], "stages.0.fraction must give 'all' at least one"),
    "live documents of prepared data": (["125m", "--data.tokenize-on-the-fly"], "data.tokenize_on_the_fly and"),
    "fewer documents of prepared data": (["1b", "--data.n-documents", "3"], "and data.n_documents are for"),
    "no prompts to measure": (["align", "--evaluation.alignment", "0"], "evaluation.alignment must be at least 1"),
    "rows too short for an image": (["toy", "--train.seq-len", "68"], "train.seq_len must be at least 69"),
    "a fused output layer in parts": (
        ["toy", "--train.fused-output", "on", "--parallel.tensor-parallel", "2"], "train.fused_output on needs"
    ),
    "an image decoder of no model": (["toy", "--init-vqgan", "x"], "init_vqgan gives an image decoder to the model"),
    "an epsilon that hides all": (["toy", "--model.norm-eps", "1e30"], "model.norm_eps must be above 0 and at most 1"),
    "more ids than a shard can hold": (["toy", "--vqgan.n-codes", "70000"], "vqgan.n_codes"),
}  # fmt: skip


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_word_is_named_and_ends_with_code_2(kind, capsys):
    words, name = WRONG[kind]
    with pytest.raises(SystemExit) as stop:
        parse_run(words)
    said = " ".join(capsys.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and name in said


def test_the_program_itself_ends_with_code_2_and_no_traceback(tmp_path):
    done = run_train("toy", "--model.n-heads", "7", cwd=tmp_path)
    assert done.returncode == 2 and "n_heads must divide dim" in done.stderr and "Traceback" not in done.stderr
    assert done.stdout == "" and list(tmp_path.iterdir()) == []


def test_help_lists_the_presets_and_imports_no_torch(tmp_path):
    done = run_train("--help", cwd=tmp_path, python=("-X", "importtime"))
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert done.returncode == 0 and "nanochameleon.presets" in imported and "torch" not in imported
    for name in PRESETS:
        assert f"• {name} " in done.stdout


def test_help_of_a_preset_explains_its_fields_and_shows_their_values(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_run(["toy_rich", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert stop.value.code == 0
    assert "--vqgan.resolution INT pixels a side; 512 in the release (default: 48)" in text
    assert "--model.norm-order {pre,post} pre: x + f(norm(x)), 7B" in text


def test_every_option_of_a_preset_has_words_in_its_help(capsys):
    with pytest.raises(SystemExit):
        parse_run(["toy", "--help"])
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    kind = r"(?:[A-Z]+|\{\S*\}(?:\|[A-Z]+)?)"  # INT, {None}|FLOAT, {ddp,fsdp}
    without = re.findall(rf"(--[a-z][\w.-]*)(?: {kind})* \(default", text)
    assert "--seed INT" in text and without == []


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_comes_with_its_vocabulary_and_context(name):
    cfg = parse_run([name])
    assert cfg.name == name and cfg.folder == Path("runs") / name
    assert cfg.vqgan == PRESETS[name]().vqgan and cfg.optim == PRESETS[name]().optim
    if sizes_come_later(cfg):
        assert cfg.model == PRESETS[name]().model
    else:
        assert cfg.model.vocab_size == 4 + cfg.vqgan.n_codes + 8 + 256 + cfg.tokenizers.n_merges
        assert cfg.model.max_seq_len == cfg.train.seq_len


def test_any_field_can_be_overridden_and_the_others_stay():
    words = "toy --train.steps 3000 --vqgan.ch-mult 1 2 2 --vqgan.window None --optim.betas 0.5 0.6"
    words += " --out x --tokenizers.optim.lr 1"
    cfg, before = parse_run([*words.split(), "--overwrite"]), parse_run(["toy"])
    assert (cfg.train.steps, cfg.vqgan.ch_mult, cfg.vqgan.window, cfg.optim.betas) == (
        3_000,
        (1, 2, 2),
        None,
        (0.5, 0.6),
    )
    assert cfg.out == Path("x") and cfg.overwrite and cfg.tokenizers.optim.lr == 1 and cfg.optim.lr == before.optim.lr
    assert (cfg.train.batch_size, cfg.data, cfg.model) == (before.train.batch_size, before.data, before.model)


def test_home_is_expanded_in_every_path(tmp_path, monkeypatch):
    """A shell does so for `--out ~/x`, not for `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    cfg = parse_run(["folder", "--out=~/x", "--data.path=~/y", "--init-from=~", "--data.tokenize-on-the-fly"])
    assert (cfg.out, cfg.data.path, cfg.init_from) == (tmp_path / "x", tmp_path / "y", tmp_path)
    args = parse(DataArgs, ["~/a", "b~", "--form", "text", "--out=~/x", "--name", "~", "--tokenizers=~/t"])
    assert args.sources == (tmp_path / "a", Path("b~")) and args.name == "~"
    assert (args.out, args.tokenizers) == (tmp_path / "x", tmp_path / "t")
    args = parse(ConvertArgs, ["~/a", "~nobody-here/b", "--to", "hf"])
    assert (args.src, args.dst) == (tmp_path / "a", Path("~nobody-here/b"))


def test_a_folder_that_is_not_there_ends_with_one_sentence_and_leaves_no_data(tmp_path):
    done = run_train("folder", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: source folder needs --data.path, the folder with")
    done = run_train("folder", "--data.path", "photos", "--device", "cpu", cwd=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: photos is not a folder: set --data.path to")
    assert done.stderr.count("\n") == 1 and {path.name for path in tmp_path.rglob("*")} == {
        "runs",
        "folder",
        "config.json",
    }


@pytest.mark.parametrize(
    "given, why",
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2, but RANK is not set: start with torchrun"),
        ({"WORLD_SIZE": "2", "RANK": "1"}, "WORLD_SIZE is 2, but MASTER_ADDR is not set: start with torchrun"),
        ({"RANK": "1"}, "RANK is 1 in the environment, but WORLD_SIZE is not set: start with torchrun, or unset RANK"),
        ({"WORLD_SIZE": "2", "RANK": "first"}, "RANK is 'first' in the environment, not a number"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2' in the environment, not a number"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0' in the environment, not a number"),
    ],
)
def test_half_of_what_torchrun_sets_is_refused_with_a_sentence(given, why, tmp_path, monkeypatch, capsys):
    import train

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as end:
        exit_on_user_error(lambda: train.main(parse_run(["toy", "--device", "cpu"])))
    said = capsys.readouterr().err
    assert end.value.code == 2 and why in said and said.count("\n") == 1 and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "program", [["train.py", "toy"], ["sample.py", "nowhere", "a"], ["-m", "nanochameleon.bench", "kernels"]]
)
@pytest.mark.parametrize("wish, why", [("fast", "no kernels called 'fast'"), ("cuda", "the tensors are on cpu")])
def test_kernels_that_are_not_there_are_refused_at_the_start(program, wish, why, tmp_path):
    words = [ROOT / program[0] if program[0].endswith(".py") else program[0], *program[1:], "--device", "cpu"]
    environment = os.environ | {"NANOCHAMELEON_KERNELS": wish}
    done = subprocess.run([sys.executable, *words], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: NANOCHAMELEON_KERNELS: ")
    assert why in done.stderr and done.stderr.count("\n") == 1 and not list(tmp_path.iterdir())


def test_a_bench_of_two_precisions_asks_for_kernels_of_both(tmp_path, monkeypatch):
    monkeypatch.setattr("nanochameleon.kernels.cpu.bf16.matmul.why_unavailable", lambda: None)
    monkeypatch.setenv("NANOCHAMELEON_KERNELS", "bf16")
    with pytest.raises(UserError, match=r"NANOCHAMELEON_KERNELS: the bf16 .* take bfloat16, not float32"):
        list(bench.measure(bench.Args("train")))
