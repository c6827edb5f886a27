"""The paper's nine tasks of common sense and reading (Table 6): what each wants, and which figure the paper prints.

    file -> rows -> questions -> log-probabilities -> acc, acc_norm, acc_answer (candidates.py)

All have no shots in the paper, except for its second line of HellaSwag. The items are those that others report: the
development split where the test split has no published answers. The paper's figures are in percent.
"""

from nanochameleon.evaluate.text.candidates import Benchmark, task

NORM, ANSWER = ("acc_norm", "acc"), ("acc_answer", "acc", "acc_norm")  # the paper's metric first


def paper(small: float, large: float, llama: str) -> str:
    return f"7B {small:.1f}, 34B {large:.1f}, Llama-2-{llama}"


BENCHMARKS = (
    Benchmark(
        "piqa", "PIQA: everyday physics, 2 options", "piqa", "validation", NORM,
        paper(79.6, 83.3, "7B 78.8, 34B 81.9"),
        "piqa/dev.jsonl and dev-labels.lst, or piqa/validation-*.parquet",
        "yonatanbisk.com/piqa, or baber/piqa on the hub",
    ),
    Benchmark(
        "siqa", "SIQA: what people feel and do, 3 options", "social_iqa", "validation", NORM,
        paper(57.0, 63.3, "7B 48.3, 34B 50.9"),
        "siqa/dev.jsonl and dev-labels.lst, or siqa/validation-*.parquet",
        "leaderboard.allenai.org/socialiqa, or lighteval/siqa on the hub",
    ),
    Benchmark(
        "hellaswag", "HellaSwag: how a scene ends, 4 options", "hellaswag", "validation", NORM,
        paper(74.2, 82.7, "7B 77.2, 34B 83.3"),
        "hellaswag/hellaswag_val.jsonl, or hellaswag/validation-*.parquet",
        "github.com/rowanz/hellaswag, or Rowan/hellaswag on the hub",
    ),
    Benchmark(
        "hellaswag_10shot", "HellaSwag after 10 solved ones", "hellaswag", "validation", NORM,
        paper(75.6, 85.1, "70B 87.1"),
        "as hellaswag, and hellaswag/hellaswag_train.jsonl or hellaswag/train-*.parquet",
        "github.com/rowanz/hellaswag, or Rowan/hellaswag on the hub",
        shots=10,
    ),
    Benchmark(
        "winogrande", "WinoGrande: whom a sentence means, 2 options", "winogrande", "validation", ("acc",),
        paper(70.4, 78.5, "7B 69.2, 34B 76.7"),
        "winogrande_1.1/dev.jsonl, or winogrande/validation-*.parquet",
        "winogrande.allenai.org, or allenai/winogrande on the hub",
    ),
    Benchmark(
        "arc_easy", "ARC-Easy: school science, 3 to 5 options", "arc_easy", "test", NORM,
        paper(76.1, 84.1, "7B 75.2, 34B 79.4"),
        "ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-Test.jsonl, or ai2_arc/ARC-Easy/test-*.parquet",
        "allenai.org/data/arc, or allenai/ai2_arc on the hub",
    ),
    Benchmark(
        "arc_challenge", "ARC-Challenge: harder school science, 3 to 5 options", "arc_challenge", "test", NORM,
        paper(46.5, 59.7, "7B 45.9, 34B 54.5"),
        "ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-Test.jsonl, or ai2_arc/ARC-Challenge/test-*.parquet",
        "allenai.org/data/arc, or allenai/ai2_arc on the hub",
    ),
    Benchmark(
        "obqa", "OpenBookQA: a fact applied, 4 options", "openbookqa", "test", ANSWER,
        paper(51.0, 54.0, "7B 58.6, 34B 58.2"),
        "OpenBookQA-V1-Sep2018/Data/Main/test.jsonl, or openbookqa/main/test-*.parquet",
        "allenai.org/data/open-book-qa, or allenai/openbookqa on the hub",
    ),
    Benchmark(
        "boolq", "BoolQ: yes or no, after a passage", "boolq", "validation", ANSWER,
        paper(81.4, 86.0, "7B 77.4, 34B 83.7"),
        "boolq/dev.jsonl, or super_glue/boolq/validation-*.parquet",
        "github.com/google-research-datasets/boolean-questions, or aps/super_glue on the hub",
    ),
)  # fmt: skip

TASKS = tuple(map(task, BENCHMARKS))
