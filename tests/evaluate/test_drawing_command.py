"""`evaluate draw` writes the folders that official scorers read: byte for byte, safe names, the same after a kill."""

import io
import json
import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tiny import N_CODES, TINY_VQGAN, nano_folder, tiny_model, tiny_run

from nanochameleon.errors import UserError
from nanochameleon.evaluate.drawing import images
from nanochameleon.evaluate.drawing.command import Args, cli, main
from nanochameleon.evaluate.drawing.folder import write_whole
from nanochameleon.evaluate.drawing.layouts import Prompt, image_files, read_prompts
from nanochameleon.evaluate.task import item_seed
from nanochameleon.generation.engine import Engine
from nanochameleon.images.tokenizer import NO_DECODER
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.training import checkpoint
from nanochameleon.training.run import IMAGE_TOKENIZER
from nanochameleon.weights.model_folder import open_model

WORDS = ["a red cat", "two birds", "-x", "...", "🐦 and ë", "a dog, left of 'it'"]


@pytest.fixture(autouse=True)
def nothing_is_compiled():
    with use_kernels("reference"):
        yield


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A random model that draws many different images: flat logits, and codes that do not look alike."""
    transformer = tiny_model()
    transformer.output.weight.data.mul_(0.2)
    folder = tiny_run(tmp_path_factory.mktemp("runs") / "tiny", transformer)
    torch.manual_seed(0)
    vqgan = VQGAN(TINY_VQGAN)
    torch.nn.init.normal_(vqgan.quantize.embedding.weight, std=3.0)
    checkpoint.save(folder / IMAGE_TOKENIZER, 2, {"model": vqgan.state_dict()}, {})
    return folder


@pytest.fixture(scope="module")
def run(model):
    return open_model(model, "cpu")


def write_prompts(folder: Path, layout: str, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if layout == "dpg":
        for number, text in enumerate(texts):
            (folder / f"n{number}.txt").write_text(f"{text}\n", encoding="utf-8")
        return folder
    path = folder / "x_val.txt"
    if layout == "geneval":
        lines = [{"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": text} for text in texts]
        texts = [json.dumps(line) for line in lines]
    path.write_text("".join(f"{text}\n" for text in texts), encoding="utf-8")
    return path


def contents(folder: Path) -> dict[str, bytes]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def draw(model: Path, layout: str, prompts: Path, out: Path, **options) -> dict[str, bytes]:
    main(Args(model, layout, prompts, out, device="cpu", **options))
    return contents(out)


def pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)))


# ---------------------------------------------------------------------------------------------------------------------
# Layouts


def test_each_layout_has_the_files_that_its_scorer_reads_and_no_others(model, tmp_path):
    texts = WORDS[:2]
    geneval = draw(model, "geneval", write_prompts(tmp_path / "g", "geneval", texts), tmp_path / "o1")
    dpg = draw(model, "dpg", write_prompts(tmp_path / "d", "dpg", texts), tmp_path / "o2")
    compbench = draw(model, "compbench", write_prompts(tmp_path / "c", "compbench", texts), tmp_path / "o3")
    assert sorted(geneval) == sorted(
        name
        for folder in ("00000", "00001")
        for name in (f"{folder}/metadata.jsonl", *(f"{folder}/samples/000{i}.png" for i in range(4)))
    )
    expected = b'{"tag": "two_object", "include": [{"class": "cat", "count": 1}], "prompt": "two birds"}\n'
    assert geneval["00001/metadata.jsonl"] == expected
    assert sorted(dpg) == ["n0.png", "n1.png"]
    assert sorted(compbench) == sorted(f"samples/{text}_00000{i}.png" for text in texts for i in range(4))
    # An image depends on its prompt and the number of its sample, so all layouts show the same ones.
    for number, text in enumerate(texts):
        samples = [geneval[f"0000{number}/samples/000{i}.png"] for i in range(4)]
        assert samples == [compbench[f"samples/{text}_00000{i}.png"] for i in range(4)]
        a, b, c, d = map(pixels, samples)
        assert a.shape == (4, 4, 3)
        assert np.array_equal(pixels(dpg[f"n{number}.png"]), np.block([[[a], [b]], [[c], [d]]]))
    assert len(set(geneval.values())) == 2 + 8  # samples and prompts differ


def test_the_lines_of_geneval_are_kept_as_they_are(tmp_path):
    line = (
        '{"tag": "counting", "include": [{"class": "cat", "count": 2}], '
        '"exclude": [{"class": "cat", "count": 3}], "prompt": "two \\u00ebcats"}'
    )
    (tmp_path / "m.jsonl").write_text(f"\ufeff{line}\r\n\n", encoding="utf-8")
    (prompt,) = read_prompts("geneval", tmp_path / "m.jsonl")
    assert (prompt.line, prompt.text) == (line + "\n", "two ëcats")


def test_options_reach_the_engine(model, tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Engine, "add_request", lambda self, request, add=Engine.add_request: seen.append(request) or add(self, request)
    )
    path = write_prompts(tmp_path / "p", "compbench", WORDS)
    draw(model, "compbench", path, tmp_path / "o", samples=2, limit=3, guidance_scale=2.5, temperature=0.25, seed=7)
    assert len(seen) == 6
    for request in seen:
        params = request.params
        assert (params.guidance_scale, params.image_guidance_scale, params.image_temperature) == (2.5, 2.5, 0.25)
    assert {request.seed for request in seen} == {(item_seed(7, text, i),) for text in WORDS[:3] for i in range(2)}


# ---------------------------------------------------------------------------------------------------------------------
# Seeds


@settings(max_examples=8)
@given(
    st.lists(st.sampled_from(WORDS), min_size=1, max_size=4, unique=True),
    st.integers(1, 2),
    st.integers(1, 5),
    st.data(),
)
def test_an_image_does_not_depend_on_what_else_is_drawn(run, texts, samples, batch_size, data):
    """Any prompts in any order, any number of samples, any batch: each image equals the one that is drawn alone."""
    files = files_of(texts, samples)
    order = data.draw(st.permutations(files))
    params = Args(Path(), "compbench", Path(), Path()).params(run.cfg.sample, N_CODES)
    together = dict(images.drawn(run, order, 3, params, batch_size))
    assert together.keys() == set(files)
    for file in files:
        ((_, alone),) = images.drawn(run, files_of([file.prompt.text], samples)[file.samples[0] :][:1], 3, params, 1)
        assert np.array_equal(together[file], alone)


def files_of(texts: list[str], samples: int) -> list:
    return image_files("compbench", [Prompt("x", text, text) for text in texts], samples)


# ---------------------------------------------------------------------------------------------------------------------
# Names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("../../etc/passwd", "path separator"),
        ("/etc/passwd", "path separator"),
        ("a\\b", "path separator"),
        ("a \x00 b", "control character"),
        ("a \x1b[31m b", "control character"),
        ("a \x85 b", "control character"),
        ("x" * 245, "more than 255 bytes"),
        ("🐦" * 75, "more than 255 bytes"),
        ("a_b", 'up to the first "_"'),
    ],
)
def test_a_prompt_that_makes_no_safe_name_is_refused_with_its_line(tmp_path, text, why):
    (tmp_path / "p.txt").write_text(f"fine\n\n{text}\n", encoding="utf-8")
    with pytest.raises(UserError) as error:
        read_prompts("compbench", tmp_path / "p.txt")
    assert why in str(error.value) and "p.txt:3" in str(error.value)


@given(st.lists(st.text(st.characters(exclude_characters="\r"), max_size=300), max_size=5))
def test_no_prompt_leaves_the_folder(tmp_path_factory, texts):
    path = tmp_path_factory.mktemp("p") / "p.txt"
    path.write_bytes("\n".join(texts).encode("utf-8", "replace"))
    try:
        prompts = read_prompts("compbench", path)
    except UserError:
        return
    for file in image_files("compbench", prompts, 2):
        parts = Path(file.path).parts
        assert len(parts) == 2 and parts[0] == "samples" and ".." not in parts and "\0" not in parts[1]
        assert len(os.fsencode(parts[1])) <= 255
        assert Path("/out", file.path).resolve().parent == Path("/out/samples")


def test_the_longest_and_the_strangest_names_are_written(model, tmp_path):
    texts = ["~" * 50, "-rf *", "...", ".", "🐦 $(id) `id` %s"]
    path = write_prompts(tmp_path / "p", "compbench", texts)
    drawn = draw(model, "compbench", path, tmp_path / "o", samples=1)
    assert set(drawn) == {f"samples/{text}_000000.png" for text in texts}
    name = "x" * 251 + ".png"
    (tmp_path / "long").mkdir()
    write_whole(tmp_path / "long", Path(name), b"1")  # next to it, no temporary name would fit
    assert (tmp_path / "long" / name).read_bytes() == b"1"


def test_two_prompts_with_one_file_name_are_refused_before_any_work(tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat\na dog\n a cat \n")
    error = refused(["nowhere", "--layout", "compbench", "--prompts", str(tmp_path / "p.txt"), "--out", "o"], capsys)
    assert "p.txt:3" in error and "p.txt:1" in error and "file names" in error


@pytest.mark.parametrize(
    ("layout", "content", "why"),
    [
        ("geneval", '{"tag": "counting", "include": []}', "m:1 has no 'prompt'"),
        ("geneval", '{"tag": 3, "include": [], "prompt": "x"}', "m:1 has 3 as 'tag'"),
        ("geneval", '{"tag": "x", "prompt": "x"}', "m:1 has no 'include'"),
        ("geneval", '{"tag": "x", "include": [], "prompt": " "}', "m:1 has an empty prompt"),
        ("geneval", '{"tag": "x", "include": [], "prompt": "\\ud800"}', "m:1 has half a surrogate pair"),
        ("geneval", "{", "m:1 is not JSON"),
        ("geneval", "", "is empty"),
        ("compbench", " \n", "is empty"),
        ("compbench", "\xff", "is not UTF-8"),
        ("dpg", "x", "is not a folder"),
    ],
)
def test_a_bad_file_is_one_sentence_with_file_and_line(tmp_path, layout, content, why):
    (tmp_path / "m").write_bytes(content.encode("latin-1"))
    with pytest.raises(UserError) as error:
        read_prompts(layout, tmp_path / "m")
    assert why in str(error.value) and str(tmp_path) in str(error.value)


def test_dpg_reads_the_texts_of_a_folder_and_no_hidden_files(tmp_path):
    with pytest.raises(UserError, match=r"holds no \.txt file"):
        read_prompts("dpg", tmp_path)
    for name, data in (
        ("b 1.txt", b"\xef\xbb\xbfone\n"),
        ("-a.txt", b"two\n\nlines\n"),
        ("._b 1.txt", b"\0"),
        ("x.csv", b""),
    ):
        (tmp_path / name).write_bytes(data)
    assert [(p.name, p.text) for p in read_prompts("dpg", tmp_path)] == [("-a", "two\n\nlines"), ("b 1", "one")]
    (tmp_path / "c.txt").write_bytes(b"\n")
    with pytest.raises(UserError, match=r"c\.txt is empty"):
        read_prompts("dpg", tmp_path)


# ---------------------------------------------------------------------------------------------------------------------
# Resuming

KILLED = """
    import os, signal, sys
    from nanochameleon.evaluate.drawing import command, folder
    whole, left = folder.os.replace, [int(sys.argv[1])]
    def replace(old, new):  # dies in the middle of a file: written aside, not yet in its place
        left[0] -= not str(new).endswith("file")
        if left[0] < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        whole(old, new)
    folder.os.replace = replace
    command.cli(sys.argv[2:])
"""


def test_a_killed_run_resumes_to_the_same_bytes(model, tmp_path):
    path = write_prompts(tmp_path / "p", "geneval", WORDS)
    once = draw(model, "geneval", path, tmp_path / "once", samples=2)
    words = [str(model), "--layout", "geneval", "--prompts", str(path), "--out", str(tmp_path / "o"), "--samples", "2"]
    script = [sys.executable, "-c", textwrap.dedent(KILLED), "9", *words, "--device", "cpu"]
    env = os.environ | {"NANOCHAMELEON_KERNELS": "reference", "OMP_NUM_THREADS": "1"}
    assert subprocess.run(script, env=env, capture_output=True).returncode == -signal.SIGKILL
    killed = contents(tmp_path / "o")
    kept = {name: data for name, data in killed.items() if "unfinished" not in name}
    assert 0 < len(kept) < len(once) and kept.items() <= once.items()
    assert len(killed) == len(kept) + 1  # the file that was being written
    times = {name: (tmp_path / "o" / name).stat().st_mtime_ns for name in kept if name.endswith(".png")}
    assert draw(model, "geneval", path, tmp_path / "o", samples=2) == once
    assert times == {name: (tmp_path / "o" / name).stat().st_mtime_ns for name in times}  # kept, not drawn again
    assert not list((tmp_path / "o").glob(".*"))


def test_a_limit_can_be_raised(model, tmp_path):
    path = write_prompts(tmp_path / "p", "dpg", WORDS)
    few = draw(model, "dpg", path, tmp_path / "o", limit=2)
    more = draw(model, "dpg", path, tmp_path / "o")
    assert sorted(few) == ["n0.png", "n1.png"] and len(more) == len(WORDS) and few.items() <= more.items()


def test_the_images_of_another_run_are_kept(model, tmp_path):
    path = write_prompts(tmp_path / "p", "compbench", WORDS[:2])
    before = draw(model, "compbench", path, tmp_path / "o", samples=1)
    other = nano_folder(tmp_path / "other")
    changes = {
        "seed": dict(seed=1), "samples": dict(samples=2), "params": dict(temperature=0.1), "model": dict(model=other),
        "prompts": dict(prompts=write_prompts(tmp_path / "q", "compbench", WORDS[1:3])),
    }  # fmt: skip
    for name, change in changes.items():
        options = dict(model=model, layout="compbench", prompts=path, out=tmp_path / "o", samples=1, device="cpu")
        with pytest.raises(UserError, match=f"images of another run, with {name} "):
            main(Args(**options | change))
    (tmp_path / "o.draw.json").unlink()
    with pytest.raises(UserError, match="does not say what is in it"):
        draw(model, "compbench", path, tmp_path / "o", samples=1)
    assert contents(tmp_path / "o") == before


def test_other_weights_under_the_same_name_are_another_run(model, tmp_path):
    path = write_prompts(tmp_path / "p", "dpg", WORDS[:1])
    draw(model, "dpg", path, tmp_path / "o", samples=1)
    assert draw(model, "dpg", path, tmp_path / "o", samples=1)  # the same
    with pytest.raises(UserError, match="images of another run, with weights "):
        draw(tiny_run(tmp_path / "tiny"), "dpg", path, tmp_path / "o", samples=1)


def test_a_folder_that_cannot_be_written_is_one_sentence(model, tmp_path):
    path = write_prompts(tmp_path / "p", "dpg", WORDS[:1])
    (tmp_path / "o").write_text("a file")
    with pytest.raises(UserError, match=r"cannot write to .*o: "):
        draw(model, "dpg", path, tmp_path / "o", samples=1)
    (tmp_path / "q" / "n0.png").mkdir(parents=True)  # where a file should be
    with pytest.raises(UserError, match=r"cannot write .*n0\.png: "):
        write_whole(tmp_path / "q", Path("n0.png"), b"1")


# ---------------------------------------------------------------------------------------------------------------------
# What it refuses


def refused(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as end:
        cli(arguments)
    assert end.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("wrong", ["--samples 0", "--seed -1", "--limit 0", "--temperature -1", "--guidance-scale nan"])
def test_a_wrong_option_is_named(tmp_path, wrong, capsys):
    error = refused(["m", "--layout", "dpg", "--prompts", "p", "--out", "o", *wrong.split()], capsys)
    assert error.startswith(f"error: {wrong.split()[0]} must be ")


def test_a_mistake_is_found_without_loading_torch():
    code = "import sys, nanochameleon.evaluate.drawing.command; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_samples_that_make_no_square_are_refused(tmp_path, capsys):
    prompts = write_prompts(tmp_path / "p", "dpg", WORDS[:1])
    words = ["m", "--layout", "dpg", "--prompts", str(prompts), "--out", str(tmp_path / "o"), "--samples", "3"]
    assert "square grids of dpg" in refused(words, capsys)


def test_a_model_without_image_decoder_is_refused_before_any_work(tmp_path):
    model = nano_folder(tmp_path / "m")
    vqgan = VQGAN(open_model(model, "cpu").cfg.vqgan)
    vqgan.decoder = None
    path = write_prompts(tmp_path / "p", "compbench", WORDS[:1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nanochameleon.images.tokenizer.ImageTokenizer.can_draw", property(lambda _: False))
        with pytest.raises(UserError) as error:
            draw(model, "compbench", path, tmp_path / "o")
    assert str(error.value) == NO_DECODER and not (tmp_path / "o").exists()


def test_prompts_that_are_too_long_are_left_out_and_counted(model, tmp_path, capsys):
    long, other = "x" * 70, "y" * 57  # of a context of 64 tokens, the image takes 7 with <s>, <eoi> and </s>
    path = write_prompts(tmp_path / "p", "geneval", ["fine", long, other, "z" * 56])
    words = [str(model), "--layout", "geneval", "--prompts", str(path), "--out", str(tmp_path / "o"), "--device", "cpu"]
    error = refused([*words, "--samples", "1"], capsys)
    assert "2 of 4 prompts are too long" in error and "x_val.txt:2" in error
    assert {name.split("/")[0] for name in contents(tmp_path / "o")} == {"00000", "00003"}
