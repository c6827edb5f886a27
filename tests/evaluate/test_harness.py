"""lm-evaluation-harness on our engine: its own tasks on local files, and its own way to run a model as the peer."""

import copy
import dataclasses
import errno
import json
import os
import random
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lm_eval.models.huggingface import HFLM
from PIL import Image as Pillow
from text_sets import ITEMS, write_authors, write_hub
from tiny import RELEASED_VQGAN, TOKENIZER, VOCAB, nano_folder, released_model
from torch.utils import collect_env
from transformers import AutoTokenizer, ChameleonForConditionalGeneration
from transformers.models.chameleon import modeling_chameleon

from nanochameleon.convert import Args as ConvertArgs
from nanochameleon.convert import convert
from nanochameleon.data import RawImage
from nanochameleon.documents import Text
from nanochameleon.errors import UserError
from nanochameleon.evaluate import scoring
from nanochameleon.evaluate.scoring import context_and_continuation, score
from nanochameleon.evaluate.text import harness
from nanochameleon.evaluate.text.harness import Args, cli, main
from nanochameleon.evaluate.text.harness_model import Harness, writing_options
from nanochameleon.evaluate.text.harness_tasks import BUILT_IN, built_in, write_tasks
from nanochameleon.evaluate.writing import write
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.weights.model_folder import open_model

CONTEXT = 256
SETS = {  # task -> the set whose items it asks
    **{name: name for name in BUILT_IN if name not in ("math", "mmlu")},
    "gsm8k_cot": "gsm8k",
    "hendrycks_math": "math",
    "minerva_math": "math",
    "mmlu": "mmlu",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random model with GQA and two groups of QK-norm, in our layout and in transformers'."""
    place = tmp_path_factory.mktemp("harness")
    model = released_model(dim=24, n_heads=4, n_kv_heads=2, qk_norm_groups=2, max_seq_len=CONTEXT)
    nano_folder(place / "nano", model)
    convert(ConvertArgs(place / "nano", place / "hf", "hf"))
    write_authors(place / "data")
    return place


@pytest.fixture(scope="module")
def run(folder):
    return open_model(folder / "nano", "cpu")


@pytest.fixture(scope="module", autouse=True)
def alone():
    """No network, an environment of their own, and no seconds in which torch lists the packages of this machine."""

    def connect(*_):
        raise AssertionError("the network was touched")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect)
        patch.setattr(collect_env, "get_pretty_env_info", str)
        patch.setattr(os, "environ", os.environ.copy())
        yield


def request(*args, doc_id: int = 0):
    """What lm-eval hands to a model."""
    return SimpleNamespace(args=args, task_name="made_up", doc_id=doc_id)


# ---------------------------------------------------------------------------------------------------------------------
# The ten sets


@pytest.fixture(scope="module")
def evaluated(folder):
    """Every set in the authors' formats, through the command."""
    results = main(Args(folder / "nano", ",".join(SETS), folder / "data", out=folder / "out"))
    return results, json.loads((folder / "out" / "results.json").read_text())


def test_all_ten_sets_run_and_ask_every_item(evaluated):
    _, written = evaluated
    for task, name in SETS.items():
        items = ITEMS[name].get("test") or ITEMS[name]["validation"]
        parts = [part for part in written["n-samples"] if part == task or (name in ("math", "mmlu") and task in part)]
        assert sum(written["n-samples"][part]["effective"] for part in parts) == len(items), task
    assert len(set(SETS.values())) == 11  # ARC has two
    assert {group: set(members) for group, members in written["group_subtasks"].items()}["mmlu"] == {
        "mmlu_stem", "mmlu_humanities",
    }  # fmt: skip
    assert written["config"]["context"] == CONTEXT and len(written["nanochameleon"]["weights"]) == 16
    assert 0 < written["requests"]["truncated"] < written["requests"]["asked"]  # the eight examples of gsm8k_cot


def test_piqa_is_right_where_the_scorer_says_so(evaluated, folder, run):
    results, _ = evaluated
    found = [json.loads(line) for line in (folder / "out" / "samples_piqa.jsonl").read_text().splitlines()]
    right = []
    for item, sample in zip(ITEMS["piqa"]["validation"], found, strict=True):
        pairs = [
            context_and_continuation(TOKENIZER, f"Question: {item['goal']}\nAnswer:", f" {item[name]}")
            for name in ("sol1", "sol2")
        ]
        log_probs = [each.log_prob for each in score(run, [([VOCAB.bos, *left], right) for left, right in pairs])]
        right.append(float(np.argmax(log_probs) == item["label"]))
        assert [response[0][0] for response in sample["resps"]] == pytest.approx(log_probs, abs=1e-4)
        assert sample["acc"] == right[-1]
        assert all(len(sample[f"{what}_hash"]) == 64 for what in ("doc", "prompt", "target"))
    assert results["results"]["piqa"]["acc,none"] == pytest.approx(np.mean(right))


def test_the_hubs_files_give_the_same(evaluated, folder, tmp_path):
    write_hub(tmp_path / "hub")
    tasks = "hellaswag,arc_easy,mmlu_abstract_algebra"
    other = main(Args(folder / "nano", tasks, tmp_path / "hub", out=tmp_path / "out"))["samples"]
    for task, samples in other.items():
        for ours, same in zip(samples, evaluated[0]["samples"][task], strict=True):
            assert ours["prompt_hash"] == same["prompt_hash"] and ours["acc"] == same["acc"]


def test_examples_come_from_the_split_that_the_task_names(folder, tmp_path):
    assert write_tasks(["hellaswag", "mmlu", "arc_easy"], folder / "data", tmp_path, shots=2) == {}
    names = {path.name for path in tmp_path.glob("*.jsonl")}
    assert {"hellaswag-train.jsonl", "mmlu_world_religions-dev.jsonl", "arc_easy-test.jsonl"} <= names
    assert not any("-validation" in name for name in names if name.startswith("arc"))
    assert len((tmp_path / "mmlu_world_religions-dev.jsonl").read_text().splitlines()) == 5
    (none := tmp_path / "none").mkdir()
    assert write_tasks(["hellaswag"], folder / "data", none, shots=None) == {}
    assert not list(none.glob("*train*"))  # 39,905 rows that nobody needs


def test_a_limit_and_shots_reach_lm_eval(folder, tmp_path):
    results = main(Args(folder / "nano", "boolq", folder / "data", limit=2, out=tmp_path, shots=3, seed=5))
    assert results["n-samples"]["boolq"]["effective"] == 2 and results["n-shot"]["boolq"] == 3
    first = results["samples"]["boolq"][0]["arguments"][0][0]
    assert first.count("\nAnswer:") == 4 and first.count("holds water") == 3


@pytest.mark.parametrize("name, shots, sentence", [
    ("hellaswag", 13, "12 rows in its train split: 13 examples need"), ("gsm8k_cot", 9, "brings 8 examples along"),
    ("mmlu_anatomy", None, "has no items of mmlu_anatomy"),
])  # fmt: skip
def test_what_the_files_cannot_give_is_a_problem_of_that_task_alone(folder, tmp_path, name, shots, sentence):
    problems = write_tasks([name, "boolq"], folder / "data", tmp_path, shots)
    assert sentence in problems.pop(name) and not any("boolq" not in other for other in problems)
    assert (tmp_path / "boolq.yaml").exists() == ("boolq" not in problems)


def test_each_built_in_file_still_exists():
    tasks = built_in()
    assert {task.set for task in tasks.values()} == set(BUILT_IN) and len(tasks) > 80
    assert tasks["mmlu_anatomy"].subject == "anatomy" and tasks["minerva_math_num_theory"].subject == "number_theory"
    assert tasks["gsm8k"].n_examples(None) == 5 and tasks["gsm8k_cot_zeroshot"].n_examples(4) == 0


# ---------------------------------------------------------------------------------------------------------------------
# The harness's own way to run a model: transformers, HFLM


@pytest.fixture(scope="module")
def hf(folder):
    """HFLM on the same model, exported to transformers.

    transformers sets the logits of image tokens to the least number, so that its probabilities are of text alone. Ours
    are over the whole vocabulary. Without its list of image tokens, it computes the same. HFLM's cache of logits is
    off: it confuses two requests of one text that is split at two places, such as the first two of item_requests.
    """
    model = ChameleonForConditionalGeneration.from_pretrained(folder / "hf").eval()
    model.model.vocabulary_mapping.image_tokens = []
    tokenizer = AutoTokenizer.from_pretrained(folder / "hf")

    def make(add_bos_token: bool, dtype: torch.dtype = torch.float32) -> HFLM:
        how = dict(device="cpu", batch_size=4, max_length=CONTEXT, add_bos_token=add_bos_token, logits_cache=False)
        how |= dict(tokenizer=tokenizer, backend="causal", prefix_token_id=VOCAB.bos, softmax_dtype=dtype)
        return HFLM(pretrained=model.to(dtype), **how)

    return make


def item_requests() -> list:
    """HellaSwag, ARC and BoolQ as lm-eval words them, an empty context, and spaces at the border."""
    pairs = [("", "a red tar"), ("a red ", "tar"), ("Q: é\nA:", " no\n"), ("a red tar", " a")]
    for item in ITEMS["hellaswag"]["validation"]:
        pairs += [(f"{item['activity_label']}: {item['ctx_a']}", f" {ending}") for ending in item["endings"]]
    for item in ITEMS["arc_challenge"]["test"]:
        pairs += [(f"Question: {item['question']}\nAnswer:", f" {text}") for text in item["choices"]["text"]]
    for item in ITEMS["boolq"]["validation"]:
        pairs += [(f"{item['passage']}\nQuestion: {item['question']}?\nAnswer:", f" {word}") for word in ("no", "yes")]
    return [request(*pair) for pair in pairs]


def test_log_likelihoods_equal_those_of_the_harness_on_transformers(run, hf):
    requests = item_requests()
    ours = Harness(run).loglikelihood(requests, disable_tqdm=True)
    other = hf(add_bos_token=True).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in other]
    assert np.abs(np.subtract(*([x for x, _ in each] for each in (ours, other)))).max() < 1e-4
    for context in {each.args[0] for each in requests}:
        several = [i for i, each in enumerate(requests) if each.args[0] == context]
        assert np.argmax([ours[i][0] for i in several]) == np.argmax([other[i][0] for i in several])


def test_greedy_continuations_are_recognised(run, hf):
    """What the model writes greedily is greedy to both."""
    prompt = [VOCAB.bos, *TOKENIZER.encode("a red")]
    text = write(run, [prompt], 3, stop_tokens=(VOCAB.eos,))[0].text
    requests = [request("a red", text), request("a red", text + "q")]
    ours = Harness(run).loglikelihood(requests, disable_tqdm=True)
    other = hf(add_bos_token=True).loglikelihood(requests, disable_tqdm=True)
    assert [greedy for _, greedy in ours] == [greedy for _, greedy in other]


def test_rolling_log_likelihoods_equal_those_of_the_harness_on_transformers(run, hf, monkeypatch):
    """Up to four windows, in float64: in float32 the rounding of a thousand tokens adds up to some 1e-4."""
    monkeypatch.setattr(modeling_chameleon.ChameleonRMSNorm, "forward", rms_norm)  # its own computes in float32
    rng = random.Random(0)
    texts = ["a", *("".join(rng.choices("a red,tk\n", k=n)) for n in (9, CONTEXT, 3 * CONTEXT, 1000))]
    requests = [request(text) for text in texts]
    model = Harness(dataclasses.replace(run, model=copy.deepcopy(run.model).double()))
    ours = model.loglikelihood_rolling(requests, disable_tqdm=True)
    other = hf(add_bos_token=False, dtype=torch.float64).loglikelihood_rolling(requests, disable_tqdm=True)
    assert np.abs(np.subtract(ours, other)).max() < 1e-9 and min(ours) < -1000
    assert not model.n_truncated  # windows, and nothing cut


def rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


# ---------------------------------------------------------------------------------------------------------------------
# Requests


def test_results_do_not_depend_on_the_batch_or_its_order(run, monkeypatch):
    requests = item_requests()
    together = Harness(run).loglikelihood(requests, disable_tqdm=True)
    order = random.Random(1).sample(range(len(requests)), len(requests))
    monkeypatch.setattr(scoring, "BATCH_TOKENS", 1)
    alone = Harness(run).loglikelihood([requests[i] for i in order], disable_tqdm=True)
    for i, (log_prob, greedy) in zip(order, alone, strict=True):
        assert (log_prob, greedy) == (pytest.approx(together[i][0], abs=1e-4), together[i][1])


def test_a_context_that_is_too_long_keeps_its_right_end_and_is_counted(run):
    model, text = Harness(run), "a red tar, " * CONTEXT
    found = model.loglikelihood([request(text, " a"), request(text[-22:], " a")], disable_tqdm=True)
    left, right = context_and_continuation(TOKENIZER, text, " a")
    assert found[0] == pytest.approx(score(run, [([VOCAB.bos, *left[1 - CONTEXT :]], right)])[0][:2], abs=1e-4)
    assert (model.n_requests, model.n_truncated) == (2, 1)


def test_writing_stops_at_strings_as_write_does(run):
    texts = ["a red", "ta", "re re re"]
    whole = write(run, [[VOCAB.bos, *TOKENIZER.encode(text)] for text in texts], 40)
    stops = [next(letter for letter in each.text[1:] if letter.isascii()) for each in whole]
    options = {"until": stops, "max_gen_toks": 40, "do_sample": False}
    found = Harness(run).generate_until([request(text, options) for text in texts], disable_tqdm=True)
    expected = write(run, [[VOCAB.bos, *TOKENIZER.encode(text)] for text in texts], 40, stops)
    assert found == [each.text for each in expected] and not any(stop in text for text in found for stop in stops)
    assert any(len(text) < len(each.text) for text, each in zip(found, whole, strict=True))


def test_samples_depend_on_the_item_and_the_repetition_alone(run):
    options = {"until": [], "max_gen_toks": 12, "do_sample": True, "temperature": 1.0, "top_p": 0.95}
    requests = [request("a red", options, doc_id=i) for i in range(4) for _ in range(3)]
    texts = Harness(run, seed=1).generate_until(requests, disable_tqdm=True)
    assert len(set(texts)) > 8  # all differ, or nearly
    assert Harness(run, seed=1).generate_until(requests[6:9], disable_tqdm=True) == texts[6:9]
    assert Harness(run, seed=2).generate_until(requests, disable_tqdm=True) != texts


def test_options_of_generation():
    greedy = {"until": "Q:", "max_gen_toks": 1000, "temperature": 0.7, "do_sample": False, "num_beams": 1}
    assert writing_options(greedy, 256) == {
        "max_new_tokens": 128, "stop_strings": ["Q:"], "temperature": 0.0, "top_p": 1.0,
    }  # fmt: skip
    assert writing_options({"do_sample": True}, 4096)["temperature"] == 1.0
    assert writing_options({"temperature": 0.5, "top_p": 0.9}, 4096)["temperature"] == 0.5
    with pytest.raises(UserError, match="top_k = 5"):
        writing_options({"top_k": 5}, 4096)


def test_chat_ends_the_turn_after_the_context(run):
    model = Harness(run, chat=True)
    asked = [VOCAB.bos, *TOKENIZER.encode("a red"), VOCAB.eot]
    assert model.tokens("a red", " tar") == (asked, TOKENIZER.encode("tar"))
    expected = write(run, [asked], 20, stop_tokens=(VOCAB.eos, VOCAB.eot))[0].text
    assert model.generate_until([request("a red", {"max_gen_toks": 20})], disable_tqdm=True) == [expected]


def test_no_text_makes_a_special_token(run):
    left, right = Harness(run).tokens("</s><image><s>", " </s>")
    assert left[0] == VOCAB.bos and all(VOCAB.is_text(token) for token in left[1:] + right)


# ---------------------------------------------------------------------------------------------------------------------
# Images, and tasks of the user

YAML = """
task: made_up_{kind}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}, cache_dir: {data}.cache}}
test_split: test
output_type: {kind}
doc_to_image: !function made_up.images
doc_to_text: "{text}"
doc_to_target: answer
"""
CHOICES = 'doc_to_choice: ["red", "tar"]\nmetric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n'
WRITES = 'generation_kwargs: {until: ["\\n"], max_gen_toks: 8}\n'


@pytest.fixture
def own_task(tmp_path):
    """Two task files with an image: one to choose, one to write."""
    (tmp_path / "items.jsonl").write_text('{"question": "what?", "answer": 0}\n')
    (tmp_path / "made_up.py").write_text(
        "from PIL import Image\n\ndef images(doc):\n    return [Image.new('RGB', (8, 8), 'red')]\n"
    )

    def make(kind: str, text: str = "<image>{{question}}") -> str:
        more = CHOICES if kind == "multiple_choice" else WRITES
        path = tmp_path / f"{kind}.yaml"
        path.write_text(YAML.format(kind=kind, data=tmp_path / "items.jsonl", text=text) + more)
        return str(path)

    return make


def test_images_of_a_task_become_tokens(run, folder, own_task, tmp_path):
    paths = [own_task("multiple_choice"), own_task("generate_until")]
    results = main(Args(folder / "nano", ",".join(paths), out=tmp_path / "out"))
    image = RawImage(np.broadcast_to(np.uint8([255, 0, 0]), (8, 8, 3)).copy())
    prompt = prompt_tokens([image, Text("what?")], run)
    assert sum(VOCAB.is_image(token) for token in prompt) == RELEASED_VQGAN.codes_per_image
    expected = [each[:2] for each in score(run, [(prompt, TOKENIZER.encode(f" {word}")) for word in ("red", "tar")])]
    chosen = [each[0] for each in results["samples"]["made_up_multiple_choice"][0]["resps"]]
    assert chosen == [pytest.approx(each, abs=1e-4) for each in expected]
    written = results["samples"]["made_up_generate_until"][0]["resps"][0][0]
    assert written == write(run, [prompt], 8, ["\n"])[0].text
    assert (tmp_path / "out" / "samples_made_up_generate_until.jsonl").exists()


@pytest.mark.parametrize("images, sentence", [
    ({"visual": []}, "has 1 <image> in its text and 0 images"), ({"visual": [0, 0]}, "and 2 images"),
    ({"audio": ["x"]}, "only text and images"),
])  # fmt: skip
def test_marks_and_images_must_agree(run, images, sentence):
    with pytest.raises(UserError, match=sentence):
        Harness(run).tokens("<image> what?", " red", images)


def test_modes_of_images_and_a_single_one(run):
    model = Harness(run)
    grey = model.tokens("<image>", " a", {"visual": Pillow.new("L", (20, 9), 128)})
    assert grey == model.tokens("<image>", " a", {"visual": [Pillow.new("RGBA", (20, 9), (128, 128, 128, 255))]})


# ---------------------------------------------------------------------------------------------------------------------
# What a user can do wrong


def failed(arguments: list[str], capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        cli(arguments)
    assert ended.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize("full", [False, True])
def test_an_out_that_cannot_be_written_is_one_sentence(folder, tmp_path, capsys, monkeypatch, full):
    def replaced(source, target):
        raise OSError(errno.ENOSPC, "No space left on device")

    arguments = [str(folder / "nano"), "--tasks", "boolq", "--data", str(write_authors(tmp_path / "data"))]
    if full:
        monkeypatch.setattr("nanochameleon.evaluate.text.harness.evaluate", lambda *_: {"samples": {}})
        monkeypatch.setattr("nanochameleon.evaluate.text.harness.write_file", replaced)
        error = failed([*arguments, "--out", str(tmp_path / "out")], capsys)
        assert "out (No space left on device): choose another --out" in error
    else:
        (tmp_path / "file").write_text("")
        error = failed([*arguments, "--out", str(tmp_path / "file")], capsys)
        assert "file (File exists): choose another --out" in error
    assert len(error.splitlines()) == 1


def test_a_bad_file_leaves_out_its_task_alone(folder, tmp_path, capsys):
    write_authors(tmp_path / "data")
    bad = tmp_path / "data" / "boolq" / "dev.jsonl"
    bad.write_text(bad.read_text() + "{broken\n")
    error = failed([str(folder / "nano"), "--tasks", "boolq,openbookqa", "--data", str(tmp_path / "data"), "--out",
                    str(tmp_path / "out")], capsys)  # fmt: skip
    assert "dev.jsonl:4 is not JSON" in error and "1 of 2 tasks were not run" in error
    assert set(json.loads((tmp_path / "out" / "results.json").read_text())["results"]) == {"openbookqa"}


@pytest.mark.parametrize("arguments, sentence", [
    (["--tasks", "helloswag"], "there is no task 'helloswag'"), (["--tasks", "gone.yaml"], "no file gone.yaml"),
    ([], "--tasks is missing"), (["--tasks", "boolq", "--limit", "0"], "--limit must be 1 or more"),
    (["--tasks", "boolq", "--data", "nowhere"], "--data must be a folder"), (["--tasks", "boolq"], "--data is missing"),
])  # fmt: skip
def test_wrong_options_are_one_sentence(folder, arguments, sentence, capsys):
    model = str(folder / "nano")
    error = failed([model, *arguments, "--out", str(folder / "unused")], capsys)
    assert sentence in error


def test_no_item_is_asked_twice(folder, tmp_path, capsys):
    twice = ["--tasks", "mmlu_abstract_algebra,mmlu", "--data", str(folder / "data"), "--out", str(tmp_path)]
    error = failed([str(folder / "nano"), *twice], capsys)
    assert "mmlu_abstract_algebra is in mmlu_abstract_algebra and in mmlu: leave one of them out" in error


def test_a_task_file_that_cannot_be_loaded_is_named(folder, tmp_path, capsys):
    files = "dataset_path: json\ndataset_kwargs: {data_files: {test: gone.jsonl}}\n"
    (tmp_path / "bad.yaml").write_text(f"task: bad\n{files}output_type: multiple_choice\n")
    error = failed([str(folder / "nano"), "--tasks", str(tmp_path / "bad.yaml"), "--out", str(tmp_path / "o")], capsys)
    assert "bad.yaml is no task that lm-eval can load offline" in error


def test_without_the_extra_it_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    assert "pip install -c constraints.txt -e '.[eval]'" in failed(["models/toy", "--tasks", "list"], capsys)


def test_the_list_names_a_task_of_each_set(capsys):
    cli(["--tasks", "list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == list(BUILT_IN)
    assert all(any(task in line for line in lines) for task in SETS)


def test_nothing_reaches_the_network_or_the_home_directory(folder, own_task, tmp_path):
    """In a process of its own, since datasets reads the environment when it is imported."""
    path = Path(own_task("generate_until"))
    path.write_text(re.sub(", cache_dir: [^}]*", "", path.read_text()))
    lost = path.with_name("lost.yaml")
    lost.write_text("task: lost\ndataset_path: made_up/set\noutput_type: multiple_choice\n")
    (tmp_path / "home").mkdir()
    code = f"""
import socket
def connect(*_):
    raise AssertionError("the network was touched")
socket.socket.connect = connect
from torch.utils import collect_env
collect_env.get_pretty_env_info = str
from nanochameleon.evaluate.text.harness import cli
cli([{str(folder / "nano")!r}, "--tasks", {str(path)!r}, "--out", {str(tmp_path / "out")!r}])
cli([{str(folder / "nano")!r}, "--tasks", {str(lost)!r}, "--out", {str(tmp_path / "out")!r}])
"""
    env = os.environ | {"HOME": str(tmp_path / "home"), "USERPROFILE": str(tmp_path / "home")}
    env = {name: value for name, value in env.items() if not name.startswith(("HF_", "XDG_"))}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 2 and "lost.yaml is no task that lm-eval can load offline" in done.stderr
    assert "touched" not in done.stderr and "made_up_generate_until" in done.stdout
    assert not list((tmp_path / "home").rglob("*"))


def test_nothing_of_lm_eval_is_imported_before_it_is_needed():
    code = "import nanochameleon.evaluate.text.harness, sys; print({'lm_eval', 'datasets', 'torch'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
