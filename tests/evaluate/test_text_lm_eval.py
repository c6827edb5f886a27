"""Peer: lm-evaluation-harness asks the same, to the letter, by its own task files on the same made-up items."""

import pytest
from lm_eval.tasks import TaskManager
from text_sets import CONFIGS, ITEMS, write_hub, write_parquet

from nanochameleon.evaluate.task import Options
from nanochameleon.evaluate.text import choices, mmlu
from nanochameleon.evaluate.text.candidates import question_of
from nanochameleon.evaluate.text.harness_tasks import write_tasks

OURS = {task.name: task for task in (*choices.TASKS, *mmlu.TASKS)}
THEIRS = {name: name for name in OURS if name not in ("hellaswag_10shot", "mmlu")} | {
    "siqa": "social_iqa",
    "obqa": "openbookqa",
    "mmlu": "mmlu_world_religions",
}


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Training items that differ in their ids alone, so that both draw the same shot. lm-eval draws one to spare."""
    folder = write_hub(tmp_path_factory.mktemp("hub"))
    for name, splits in ITEMS.items():
        if name in CONFIGS and "train" in splits:
            one = splits["train"][0]
            same = [one | ({"id": f"{n}"} if "id" in one else {}) for n in range(2)]
            write_parquet(folder / CONFIGS[name] / "train-00000-of-00001.parquet", same)
    return folder


@pytest.fixture(scope="module", params=[0, 1])
def asked(request, data, tmp_path_factory):
    """Our name -> lm-eval's requests, at each number of shots."""
    shots, folder = request.param, tmp_path_factory.mktemp("tasks")
    assert write_tasks(THEIRS.values(), data, folder, shots) == {}
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    tasks = manager.load([*THEIRS.values()])["tasks"]
    for task in tasks.values():
        task.set_config("num_fewshot", shots)
        task.set_fewshot_seed(1234)
        task.build_all_requests()
    return shots, {ours: requests(tasks[theirs]) for ours, theirs in THEIRS.items()}


def requests(task) -> list[tuple[int, str, str]]:
    return [(request.doc_id, *request.args) for request in task.instances]


@pytest.mark.parametrize("name", THEIRS)
def test_lm_eval_asks_the_same(data, asked, name):
    shots, theirs = asked
    items = OURS[name].read(Options(data=data, shots=shots))
    items = [item for item in items if item.group in ("", "world_religions")]
    assert theirs[name] == [
        (number, item.content["preamble"] + context, " " + continuation)
        for number, item in enumerate(items)
        for context, continuation in question_of(item.content).pairs()
    ]
    assert len(items) == 3
