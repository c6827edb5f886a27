"""Training on prepared data: sizes and tokenizers are the data's, names are its folders, what changed is refused."""

import json
import os
import platform
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from image_bytes import encoded
from PIL import Image
from tiny import TINY_VQGAN, TOKENIZER, VOCAB, tiny_config, tiny_run, training_config
from written import lines, prepare, write_tar

from nanochameleon.config import DataConfig, EvalConfig, ModelConfig, RunConfig
from nanochameleon.data.build import open_loader
from nanochameleon.data.prepared import INDEX, open_prepared, sources, store_prepared
from nanochameleon.errors import UserError
from nanochameleon.evaluate import held_out, report
from nanochameleon.presets import mixed
from nanochameleon.training import checkpoint
from nanochameleon.training.init_from import resolve_init
from nanochameleon.training.run import TEXT_TOKENIZER, read_config
from nanochameleon.weights.layouts import DECODER
from nanochameleon.weights.model_folder import open_model, open_tokenizers

sys.path.insert(0, str(Path(__file__).parents[2]))

import train


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("model") / "tiny")


@pytest.fixture(scope="module")
def data(model, tmp_path_factory) -> Path:
    """Prepared sources pairs and words, and images that are never trained on. Read only."""
    place = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    for name in ("pairs", "test"):
        images = [encoded(Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))) for _ in range(40)]
        members = [m for n, p in enumerate(images) for m in ((f"{n}.png", p), (f"{n}.txt", f"{name} {n}".encode()))]
        prepare(place / "prepared", name, write_tar(place / f"{name}.tar", members), "pairs", model)
    text = lines(place / "a.jsonl", *({"text": f"all about {n}, and more of it"} for n in range(60)))
    prepare(place / "prepared", "words", text, "text")
    return place / "prepared"


def config(out: Path, data: Path, **changes) -> RunConfig:
    cfg = training_config(out)
    small = dict(steps=6, batch_size=2, seq_len=64, sample_every=4, save_every=3)
    cfg = replace(cfg, data=DataConfig("prepared", data), train=replace(cfg.train, **small))
    cfg = replace(cfg, evaluation=EvalConfig(2, 2, 2), stages=mixed(pairs=0.7, words=0.3))
    return replace(cfg, **changes)


def test_a_run_takes_sizes_tokenizers_and_sources_of_the_data_and_reports_on_its_test_folder(data, tmp_path):
    run = train.main(config(tmp_path / "run", data))
    read = read_config(run)
    assert read.vqgan == TINY_VQGAN and (read.model.vocab_size, read.model.max_seq_len) == (VOCAB.size, 64)
    assert read.model.dim == training_config(run).model.dim
    assert open_tokenizers(run).digest() == open_prepared(data).digest()
    found = json.loads((run / "report.json").read_text())
    assert found["bits_per_code"] > 0 and found["bits_per_byte"] > 0
    assert found["tokenizer"]["mean_absolute_error"] is None and found["text_to_image"] is None
    for name in ("samples.png", "report.html", "image.png", "samples/step-000004.png"):
        assert (run / name).is_file()
    assert not any(path.name.startswith("rows-") for path in data.rglob("*"))  # it may be another's, or read only
    train.main(config(tmp_path / "run", data))  # as a run that is finished


def test_captions_and_images_of_the_report_are_those_of_the_test_folder(data, model):
    run = replace(open_model(model, "cpu"), cfg=tiny_config(data=DataConfig("prepared", data)))
    captions, images = held_out.captioned(run, Path(), 99)
    assert len(captions) == len(images) == 40 and all(caption.startswith("test ") for caption in captions)
    assert len(set(captions)) == 40 and images[0].shape == (4, 4, 3)
    _, sheet, talks = report.images_report(run, Path())
    assert {caption for caption, _, _ in sheet} <= set(captions) and talks[0]["truth"] in captions


def test_without_a_test_folder_the_report_says_so_and_claims_nothing(data, tmp_path, capsys):
    shutil.copytree(data, tmp_path / "data")
    shutil.rmtree(tmp_path / "data" / "test")
    run = train.main(config(tmp_path / "run", tmp_path / "data"))
    assert "has no source called test: no figure on unseen data is measured" in capsys.readouterr().out
    found = json.loads((run / "report.json").read_text())
    assert found["bits_per_code"] is None and found["bits_per_byte"] is None and (run / "report.html").is_file()
    assert set(found["tokenizer"].values()) == {None} and found["tokens_per_second"] > 0


def test_a_source_that_is_not_there_is_refused_with_those_that_are(data, tmp_path):
    assert sources(data) == ["pairs", "words"]
    for name in ("drawings", "test", "image_tokenizer"):
        with pytest.raises(UserError, match=rf"stages\.0\.weights names '{name}'; .*prepared has pairs, words$"):
            train.main(config(tmp_path / name, data, stages=mixed(words=0.5, **{name: 0.5})))


def test_a_model_to_go_on_from_must_have_the_datas_tokenizers(data, model, tmp_path):
    cfg = config(tmp_path / "run", data, init_from=model, model=ModelConfig(dropout=0.0))
    train.main(replace(cfg, train=replace(cfg.train, steps=1), optim=replace(cfg.optim, lr=1e-30, weight_decay=0.0)))
    weights, before = (checkpoint.load(folder)[0]["weights"] for folder in (tmp_path / "run", model))
    assert all(np.allclose(x, before[name], rtol=0, atol=1e-6) for name, x in weights.items())
    shutil.copytree(model, tmp_path / "other")
    content = json.loads((model / TEXT_TOKENIZER).read_text())
    content["model"]["merges"][:2] = content["model"]["merges"][1::-1]
    (tmp_path / "other" / TEXT_TOKENIZER).write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"other tokenizers than those of .*other: prepare it with --tokenizers"):
        resolve_init(replace(cfg, init_from=tmp_path / "other", out=tmp_path / "new"))


def test_data_that_changes_under_a_run_is_refused(data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    cfg, _ = resolve_init(config(tmp_path / "run", tmp_path / "data"))

    def opened():
        return open_loader(cfg, None, TOKENIZER, tmp_path / "run")

    first = opened().batch(3).tokens
    assert (opened().batch(3).tokens == first).all()
    shutil.rmtree(tmp_path / "data" / "words")
    prepare(tmp_path / "data", "words", lines(tmp_path / "b.jsonl", {"text": "something else"}), "text")
    with pytest.raises(UserError, match="words has changed since this run began: start over with --overwrite"):
        opened()


def test_a_run_longer_than_its_data_reads_further_epochs(data, tmp_path):
    cfg, _ = resolve_init(config(tmp_path / "run", data))
    loader = open_loader(cfg, None, TOKENIZER, tmp_path)
    words = loader.sources["words"]
    seen = [tuple(words.sequence(i)) for i in range(3 * len(words))]
    epochs = [seen[e * len(words) : (e + 1) * len(words)] for e in range(3)]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(epochs[2]) and epochs[0] != epochs[1]


def test_a_digest_depends_on_what_decides_tokens_and_nothing_else(model):
    """A model without its image decoder gives the same tokens; another encoder, codebook or merge does not."""
    whole = open_tokenizers(model)
    encoder = {name: x for name, x in whole.vq.meta.items() if not name.startswith(DECODER)}
    assert len(encoder) < len(whole.vq.meta)
    assert replace(whole, vq=whole.vq._replace(meta=encoder), context=9).digest() == whole.digest()
    for changed in ("quantize.embedding.weight", "encoder.conv_in.weight", "quant_conv.bias"):
        vq = whole.vq._replace(get=lambda name, changed=changed: whole.vq.get(name) + (name == changed))
        assert replace(whole, vq=vq).digest() != whole.digest()
    fewer = json.loads(json.dumps(whole.tokenizer_json))
    fewer["model"]["merges"].pop()
    assert replace(whole, tokenizer_json=fewer).digest() != whole.digest()


BROKEN = {
    "no folder": (lambda d: shutil.rmtree(d), "it has no readable prepared"),
    "no index": (lambda d: (d / INDEX).unlink(), "it has no readable prepared"),
    "broken index": (lambda d: (d / INDEX).write_text("{"), r"prepared\.json is broken"),
    "other sizes": (
        lambda d: (d / INDEX).write_text((d / INDEX).read_text().replace('"vocab_size": 2', '"vocab_size": 3')),
        r"prepared\.json is broken",
    ),
    "another text tokenizer": (
        lambda d: (d / TEXT_TOKENIZER).write_text((d / TEXT_TOKENIZER).read_text().replace('"re"', '"er"')),
        "are not the ones that prepared its data",
    ),
    "a damaged image tokenizer": (
        lambda d: (d / "image_tokenizer" / "step-000000" / "state.json").write_text("{}"), "no whole checkpoint"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", BROKEN)
def test_a_folder_that_is_damaged_or_none_is_one_sentence(kind, data, tmp_path):
    shutil.copytree(data, tmp_path / "data")
    damage, sentence = BROKEN[kind]
    damage(tmp_path / "data")
    with pytest.raises(UserError, match=sentence):
        train.main(config(tmp_path / "run", tmp_path / "data"))
    assert not (tmp_path / "run").exists()


def test_without_a_path_the_option_is_named(tmp_path):
    with pytest.raises(UserError, match=r"needs --data\.path"):
        train.main(config(tmp_path / "run", None))


def test_folders_that_killed_processes_left_are_removed_and_those_of_running_ones_stay(model, tmp_path):
    """Row by row: of a process that is gone, of one that runs (pytest's parent), of one on another machine."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    here = f".new-{platform.node()}"
    dead, others = f"{here}-{process.pid}", {f"{here}-{os.getppid()}", f".new-elsewhere.{process.pid}-{process.pid}"}
    for name in (dead, *others):
        (tmp_path / "data" / name / "image_tokenizer").mkdir(parents=True)
    for _ in range(2):  # when the tokenizers are written, and when they are there
        store_prepared(tmp_path / "data", open_tokenizers(model))
        left = {path.name for path in (tmp_path / "data").glob(".*")}
        assert left == others
        (tmp_path / "data" / dead).mkdir()
    assert open_prepared(tmp_path / "data").digest() == open_tokenizers(model).digest()
