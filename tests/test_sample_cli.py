"""sample.py on a run folder with random weights: what it draws, writes, saves and refuses."""

import dataclasses
import os
import shutil
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from PIL import Image
from tiny import N_CODES, TOKENIZER, VOCAB, nano_folder, released_model, tiny_model, tiny_run

from nanochameleon.convert import Args as convert_args
from nanochameleon.convert import convert
from nanochameleon.documents import Text
from nanochameleon.generation.prompts import MODALITY, Mode, read_segments
from nanochameleon.images.output import ImageOutput
from nanochameleon.kernels.dispatch import requested
from nanochameleon.training.run import CONFIG, config_to_json, read_config
from nanochameleon.training.train_tokenizers import open_image_tokenizer

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import sample  # noqa: E402
from sample import Args, cli, main  # noqa: E402


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return tiny_run(tmp_path_factory.mktemp("runs") / "tiny")


@pytest.fixture
def image(tmp_path) -> str:
    path = tmp_path / "some image.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 5, 3), np.uint8)).save(path)
    return str(path)


def refused(arguments: list[str], capsys) -> str:
    """Runs the command line, which must end with code 2, and returns what it wrote to stderr."""
    with pytest.raises(SystemExit) as end:
        cli(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


# ---------------------------------------------------------------------------------------------------------------------
# What it does


def test_words_are_drawn_and_nothing_is_overwritten(run, tmp_path, capsys):
    args = Args(run, ("  a big Red/Star! ",), n=2, out=tmp_path / "new" / "out")
    first, again = main(args), main(args)
    files = [path for [path] in first + again]
    assert [path.name for path in files] == [f"a-big-red-star-{i}.png" for i in (1, 2, 3, 4)]
    looks = [np.asarray(Image.open(path)) for path in files]
    assert looks[0].shape == (256, 256, 3) and not (looks[0] == looks[1]).all()
    assert (looks[0] == looks[2]).all() and (looks[1] == looks[3]).all()  # the same seed
    assert (looks[0] == looks[0][::64, ::64].repeat(64, 0).repeat(64, 1)).all()  # 4 x 4 pixels, enlarged
    assert capsys.readouterr().out.split() == [str(path) for path in files]


def test_samplers_in_one_folder_never_overwrite_each_other(run, tmp_path, monkeypatch):
    """Each has chosen its name before any of them has written."""
    all_have_chosen = threading.Barrier(4, timeout=60)
    monkeypatch.setattr("nanochameleon.files.fsync", lambda path: all_have_chosen.wait())
    image_tokenizer = open_image_tokenizer(run, read_config(run).vqgan, torch.device("cpu"))
    output = ImageOutput(image_tokenizer, tmp_path, "ta")
    with ThreadPoolExecutor(4) as pool:
        files = list(pool.map(lambda code: output.save([code] * N_CODES), range(4)))
    assert set(files) == {tmp_path / f"ta-{number}.png" for number in (1, 2, 3, 4)} == set(tmp_path.iterdir())
    assert len({path.read_bytes() for path in files}) == 4


def test_the_folder_of_the_images_may_be_called_as_the_prompt(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(Args(run, ("ta",), out=Path("ta"))) == [[Path("ta/ta-1.png")]]


def test_a_seed_of_any_size_gives_samples_of_its_own(run, tmp_path):
    seeds = (0, 2**63, 2**64, 10**30)
    drawn = [main(Args(run, ("ta",), seed=seed, temperature=100.0, out=tmp_path)) for seed in seeds]
    assert len({files[0][0].read_bytes() for files in drawn}) == 4


def test_home_is_expanded_in_every_path(run, tmp_path, monkeypatch):
    """A shell does so for `--out ~/x`, not for `--out=~/x`."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    monkeypatch.chdir(shutil.copytree(run, tmp_path / "run"))
    Image.new("RGB", (9, 9)).save(tmp_path / "a.png")
    cli(["~/run", "~/a.png", "ta", "--mode", "draw", "--out=~/x"])
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["ta-1.png"] and not Path("~").exists()


def test_a_run_has_an_out_folder_and_scale_is_free(run):
    [[path]] = main(Args(run, ("ta",), scale=3))
    assert path.parent == run / "out" and Image.open(path).size == (12, 12)


def test_a_question_about_an_image_is_answered_in_words(run, image, capsys):
    [said, other] = main(Args(run, (image, "how many stars?"), n=2, temperature=1.0))
    assert all(isinstance(part, str) for part in said + other) and said != other
    assert capsys.readouterr().out.count("\n") >= 2
    assert main(Args(run, (image, "how many stars?"), n=2, temperature=1.0)) == [said, other]


def test_the_model_reads_the_segments_in_the_order_given(run, image, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "nanochameleon.generation.events.stream", lambda model, prompt, *rest: seen.append(prompt) or iter(())
    )
    main(Args(run, (image, "red", "a"), mode="answer"))
    main(Args(run, (" red\n", image, "", "a "), mode="text"))  # white space around words is not the model's to see
    first, second = seen
    red, a = TOKENIZER.encode("red"), TOKENIZER.encode("a")
    block = first[1 : N_CODES + 3]
    assert [block[0], block[-1]] == [VOCAB.boi, VOCAB.eoi] and all(VOCAB.is_image(token) for token in block[1:-1])
    assert first == [VOCAB.bos, *block, *red, *a, VOCAB.eot]
    assert second == [VOCAB.bos, *red, *block, *a]


def test_an_image_is_cropped_as_in_training_or_padded_on_request(image):
    [cropped], [padded] = (read_segments((image,), 4, fit) for fit in ("crop", "pad"))
    assert (padded.pixels[:, [0, -1]] == 255).all() and not (cropped.pixels[:, [0, -1]] == 255).all()  # 5 wide, 9 high
    assert Args(Path()).fit == "crop"


def test_an_image_alone_is_asked_what_it_shows(run, image):
    from nanochameleon.data.sources.questions import ASK_CAPTION

    assert main(Args(run, (image,))) == main(Args(run, (image, ASK_CAPTION)))


def test_the_modes_of_the_command_line_are_those_of_prompts():
    assert get_args(get_type_hints(Args)["mode"]) == ("auto", *get_args(Mode)) == ("auto", *MODALITY)


def test_free_mode_mixes_words_and_images(run, tmp_path):
    samples = main(Args(run, ("a",), mode="free", n=12, temperature=20.0, top_p=1.0, max_new_tokens=40, out=tmp_path))
    parts = [part for one in samples for part in one]
    files = [part for part in parts if isinstance(part, Path)]
    assert files and len(files) < len(parts) and all(path.is_file() for path in files)


def test_an_aligned_run_is_asked_and_may_answer_in_both(run, image, tmp_path, monkeypatch):
    aligned, seen = Path(shutil.copytree(run, tmp_path / "aligned")), []
    cfg = read_config(aligned)
    aligned_cfg = dataclasses.replace(cfg, train=dataclasses.replace(cfg.train, assistant_only_loss=True))
    (aligned / CONFIG).write_text(config_to_json(aligned_cfg))
    monkeypatch.setattr("nanochameleon.generation.events.stream", lambda *args: seen.append(args) or iter(()))
    main(Args(aligned, ("red", image)))
    main(Args(run, ("red",), mode="chat"))
    for _, prompt, _, _, _, mode, _, _, stops, _ in seen:
        assert prompt[:1] == [VOCAB.bos] and prompt[-1] == VOCAB.eot and mode == "both"
        assert set(stops) == {VOCAB.eos, VOCAB.eot}


@pytest.mark.parametrize("mode", ["free", "text", "answer"])
def test_several_samples_share_one_engine_and_are_shown_in_order(mode, run, tmp_path, monkeypatch):
    from nanochameleon.generation import engine

    made, start = [], engine.Engine.__post_init__
    monkeypatch.setattr(engine.Engine, "__post_init__", lambda self: made.append(self) or start(self))
    args = Args(run, ("a",), mode=mode, n=5, temperature=20.0, top_p=1.0, max_new_tokens=20, scale=1, out=tmp_path)

    def said(samples):
        return [[part.read_bytes() if isinstance(part, Path) else part for part in one] for one in samples]

    several = said(main(args))
    assert len(made) == 1 and len(several) == 5
    assert several[0] == said(main(dataclasses.replace(args, n=1)))[0]


def test_a_first_image_waits_for_no_compiler(run, tmp_path):
    """A short call runs torch's operations alone, also where nothing is cached; a long one compiles."""
    code = """if True:
        import sys
        from pathlib import Path
        from sample import Args, main
        (made,) = main(Args(Path(sys.argv[1]), ("red",), out=Path(sys.argv[2]), scale=1))
        assert made[0].is_file() and not {"numba", "torch._dynamo"} & set(sys.modules)
    """
    arguments = [sys.executable, "-c", code, str(run), str(tmp_path / "out")]
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path / "empty"), "NANOCHAMELEON_KERNELS": ""}
    subprocess.run(arguments, check=True, cwd=ROOT, env=environment)
    assert not (tmp_path / "empty").exists()


def test_a_long_call_runs_compiled_steps(run, tmp_path, monkeypatch):
    from nanochameleon.generation import fastest

    monkeypatch.setattr(fastest, "WORTH", 0.0)
    seen = []
    monkeypatch.setattr(sample, "show", lambda events, output: seen.append(requested()) or list(events))
    main(Args(run, ("red",), out=tmp_path))
    monkeypatch.setattr(fastest, "WORTH", 1e9)
    main(Args(run, ("red",), out=tmp_path))
    assert seen == ["auto", "reference"]


def test_kernels_that_the_weights_dtype_does_not_have_are_refused(tmp_path, monkeypatch, capsys):
    folder = nano_folder(tmp_path / "half", released_model(dtype=torch.float16))
    monkeypatch.setenv("NANOCHAMELEON_KERNELS", "numba")
    said = refused([str(folder), "a", "--mode", "text", "--device", "cpu"], capsys)
    assert said.startswith("error: NANOCHAMELEON_KERNELS: ") and said.endswith("bfloat16, not float16\n")
    assert said.count("\n") == 1
    monkeypatch.setenv("NANOCHAMELEON_KERNELS", "reference")
    assert main(Args(folder, ("a",), "text", device="cpu", max_new_tokens=3))


def test_int8_answers_and_draws(run, image, tmp_path, monkeypatch):
    from nanochameleon.generation import quantize

    made, start = [], quantize.QuantizedLinear.__init__
    monkeypatch.setattr(quantize.QuantizedLinear, "__init__", lambda self, w: made.append(w) or start(self, w))
    [[said]] = main(Args(run, (image, "ta?"), max_new_tokens=5, dtype="int8"))
    [[path]] = main(Args(run, ("a",), out=tmp_path, dtype="int8"))
    assert isinstance(said, str) and path.is_file() and len(made) > 2


@pytest.mark.parametrize(
    ("pieces", "shown"),
    [
        (["a\x1b[2Jb\n", "c"], "a\ufffd[2Jb\nc"),
        (["می\u200cخواهم\u00a0«نان»\u3000", "👩\u200d👧"], "می\u200cخواهم\u00a0«نان»\u3000👩\u200d👧"),
        (["a\r", "\nb\r\nc"], "a\r\nb\r\nc"),  # a line's end in two pieces
        (["a\r", "b", "\r"], "a\ufffdb\ufffd"),
    ],
)
def test_text_is_printed_unchanged_except_for_control_characters(pieces, shown, capsys):
    from nanochameleon.generation.events import End

    parts = sample.show([*map(Text, pieces), End(())], None)
    assert parts == ["".join(pieces)] and capsys.readouterr().out == f"{shown}\n"


@pytest.mark.parametrize("to", ["nano", "hf", "meta"])
def test_a_model_in_any_layout_draws_and_answers(to, tmp_path, image):
    """The same samples from each, at the size of its own image tokenizer."""
    nano = nano_folder(tmp_path / "nano")
    folder = nano if to == "nano" else convert(convert_args(nano, tmp_path / to, to))
    [[path]] = main(Args(folder, ("a red",), scale=1, out=tmp_path / "out"))
    [[expected]] = main(Args(nano, ("a red",), scale=1, out=tmp_path / "out"))
    assert Image.open(path).size == (8, 8) and path.read_bytes() == expected.read_bytes()
    [[said]] = main(Args(folder, (image, "ta?"), max_new_tokens=5, dtype="bf16"))
    assert isinstance(said, str)


def test_a_model_without_a_decoder_answers_and_says_why_it_does_not_draw(tmp_path, image, capsys):
    hf = convert(convert_args(nano_folder(tmp_path / "nano"), tmp_path / "hf", "hf"))
    decoder = (hf / "vqgan_decoder.safetensors").rename(tmp_path / "decoder.safetensors")
    assert len(main(Args(hf, (image, "ta?"), max_new_tokens=5))) == 1
    assert "no image decoder" in refused([str(hf), "ta"], capsys)
    [[drawn]] = main(Args(hf, ("ta",), vqgan=decoder))
    [[expected]] = main(Args(tmp_path / "nano", ("ta",)))
    assert drawn.read_bytes() == expected.read_bytes()


def test_a_terminal_that_can_shows_the_image_while_it_grows(run, monkeypatch, capsys):
    [[path]] = main(Args(run, ("a",)))
    capsys.readouterr()
    monkeypatch.setattr("nanochameleon.images.terminal.terminal_mode", lambda *_: "blocks")
    monkeypatch.setattr(sample, "PREVIEW", 2)
    [[live]] = main(Args(run, ("a",)))
    said = capsys.readouterr().out
    assert said.count("\x1b[2F") == 2 and said.endswith(f"{live}\n")  # 4 x 4 pixels are two lines, gone over again
    assert live.read_bytes() == path.read_bytes()


def test_image_guidance_is_that_of_text_unless_given(run):
    from nanochameleon.config import SamplingParams

    cfg = SamplingParams(guidance_scale=3.0, image_guidance_scale=1.2)
    for given, scales in (
        ({}, (3.0, 1.2)),
        ({"guidance_scale": 1.0}, (1.0, 1.0)),
        ({"image_guidance_scale": 2.0}, (3.0, 2.0)),
    ):
        params = Args(run, **given).params(cfg)
        assert (params.guidance_scale, params.image_guidance_scale) == scales


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses: one sentence, code 2


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere.png"], ["image nowhere.png"]),
        (["a", "shot.JPG", "b"], ["image shot.JPG"]),
        ([], ["prompt is empty"]),
        (["  "], ["prompt is empty"]),
        (["--mode", "answer"], ["--mode answer"]),
        (["ta " * 99], ["tokens", "context of 64"]),
        (["a", "--max-new-tokens", "4"], ["--max-new-tokens must be at least 5", "not 4"]),
        (["a", "--top-p", "0"], ["--top-p", "not 0"]),
        (["a", "--temperature", "nan"], ["--temperature", "nan"]),
        (["a", "--n", "0"], ["--n"]),
        (["a", "--seed", "-1"], ["--seed"]),
        (["a", "--top-k", "1" + "0" * 400], ["--top-k must be at most 9223372036854775807"]),
        (["a", "--n", "1" + "0" * 30], ["--n must be from 1 to 1,000,000"]),
        (["a", "--max-new-tokens", "1" + "0" * 30], ["--max-new-tokens must be at most"]),
        (["a", "--device", "toaster"], ["toaster"]),
        (["a\udcff"], ["UTF-8"]),
    ],
)
def test_a_mistake_gets_one_sentence(run, arguments, words, capsys):
    said = refused([str(run), *arguments], capsys)
    assert said.startswith("error: ") and said.count("\n") == 1
    assert all(word in said for word in words)


@pytest.mark.parametrize(
    "arguments, word",
    [(["--tempreature", "1"], "--tempreature"), (["--n", "x"], "--n"), (["--mode", "drw"], "drw")],
)
def test_an_unknown_option_or_ill_typed_value_is_refused_with_its_name(run, arguments, word, capsys):
    assert word in refused([str(run), "a", *arguments], capsys)


def test_a_folder_that_is_no_run_and_one_without_a_model(tmp_path, run, capsys):
    assert f"{tmp_path} is not a run" in refused([str(tmp_path), "a"], capsys)
    bare = tiny_run(tmp_path / "bare", tiny_model())
    for part in (bare / "step-000001").iterdir():
        part.unlink()
    said = refused([str(bare), "a"], capsys)
    assert str(bare) in said and "whole checkpoint" in said


@pytest.mark.parametrize("mode", ["draw", "free", "chat"])
def test_an_out_that_cannot_be_written_is_refused_before_anything_is_drawn(mode, run, image, monkeypatch, capsys):
    monkeypatch.setattr("nanochameleon.generation.engine.generate", None)
    words = [str(run), "a", "--n", "2", "--mode", mode, "--out", image]
    assert f"cannot save an image in {image}" in refused(words, capsys)


def test_a_word_that_names_a_folder_or_pipe_is_refused_and_not_drawn(run, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    os.symlink("nowhere", "link")
    os.mkfifo("pipe")
    for word in ("photos", "photos/", "link", "pipe", "/dev/null", "~", str(tmp_path)):
        said = refused([str(run), word, "how many?"], capsys)
        assert f"error: {word} exists and is not an image file" in said and said.count("\n") == 1
    for ending in ("heic", "HEIF", "avif", "jfif", "pgm", "jxl", "svg"):
        assert f"image nowhere.{ending} is not there" in refused([str(run), f"nowhere.{ending}", "what?"], capsys)
    assert read_segments((" photos", "photos and more"), 4, "crop") == [Text("photos"), Text("photos and more")]


def test_a_file_that_is_no_image_is_named(run, tmp_path, capsys):
    notes = tmp_path / "notes.txt"
    notes.write_text("a red star")
    assert f"{notes} is not an image" in refused([str(run), str(notes)], capsys)


def test_arguments_are_parsed_before_torch_is_imported():
    code = "import sys, sample; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_python_without_the_packages_is_told_how_to_get_them():
    done = subprocess.run([sys.executable, "-S", "sample.py", "x"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: tyro is missing: run make demo, or pip install")
