"""Made-up items of every text benchmark, written as the authors' files or as the hub's parquet.

write_authors(folder)     write_hub(folder)        the same items, several sets in one folder
ITEMS[name][split]        what read_split must return for both, in the hub's fields
"""

import csv
import json
from pathlib import Path

Row = dict


def choices(*texts: str, labels: str = "ABCDE") -> Row:
    return {"text": list(texts), "label": list(labels[: len(texts)])}


def piqa(goal: str, sol1: str, sol2: str, label: int) -> Row:
    return {"goal": goal, "sol1": sol1, "sol2": sol2, "label": label}


def siqa(context: str, question: str, a: str, b: str, c: str, label: str) -> Row:
    answers = {"answerA": a, "answerB": b, "answerC": c}
    return {"context": context, "question": question, **answers, "label": label}


def hellaswag(activity: str, ctx_a: str, ctx_b: str, endings: list[str], label: str) -> Row:
    return {"activity_label": activity, "ctx_a": ctx_a, "ctx_b": ctx_b, "endings": endings, "label": label}


def winogrande(sentence: str, option1: str, option2: str, answer: str) -> Row:
    return {"sentence": sentence, "option1": option1, "option2": option2, "answer": answer}


def arc(name: str, question: str, pair: Row, answer: str) -> Row:
    return {"id": name, "question": question, "choices": pair, "answerKey": answer}


def openbookqa(name: str, question: str, pair: Row, answer: str) -> Row:
    return {"id": name, "question_stem": question, "choices": pair, "answerKey": answer}


def boolq(question: str, passage: str, label: int) -> Row:
    return {"question": question, "passage": passage, "label": label}


def gsm8k(first: int, second: int) -> Row:
    total = first + second
    answer = f"Ann has {first}+{second} = <<{first}+{second}={total}>>{total} pens.\n#### {total}"
    return {"question": f"Ann has {first} pens and buys {second}. How many has she now?", "answer": answer}


def math(subject: str, level: int, problem: str, solution: str) -> Row:
    return {"problem": problem, "level": f"Level {level}", "type": subject, "solution": solution}


def mmlu(subject: str, number: int, answer: int) -> Row:
    options = [f"{number + i} lamps" for i in range(4)]
    return {
        "question": f"Which row, of {subject}, has {number}?",
        "subject": subject,
        "choices": options,
        "answer": answer,
    }


HELLASWAG = [
    hellaswag(
        "Baking", "A man stands in a Kitchen.", "he opens The oven",
        ["and sings.", "and bakes.", "and.", "x."], "1",
    ),
    hellaswag(
        "Home and Garden", "[header] How to water a fern [title] Fill a can. [step] Use rain.", "",
        ["[substeps] Pour it  slowly.", "Burn it [title] Now.", "Eat the can.", "Sell it."], "0",
    ),
    hellaswag("Running", "Two girls run.", "one Falls and", ["gets up.", "flies.", "melts.", "sinks in Paris."], "0"),
]  # fmt: skip
MMLU_SUBJECTS = ("abstract_algebra", "world_religions")

ITEMS: dict[str, dict[str, list[Row]]] = {
    "piqa": {
        "train": [piqa(f"To move {n} stones,", "use a cart", "use a feather", 0) for n in range(12)],
        "validation": [
            piqa("To open a jar,", "twist the lid", "shout at the lid until it is ashamed", 0),
            piqa("To dry a plate,", "put it under water", "use a towel", 1),
            piqa("To see at night,", "light a lamp", "close both eyes", 0),
        ],
    },
    "social_iqa": {
        "train": [siqa(f"Kim won {n} games.", "How is Kim?", "happy", "wet", "a tree", "1") for n in range(12)],
        "validation": [
            siqa("Lee lost the keys.", "What will Lee do next?", "search for them", "sleep", "sing", "1"),
            siqa("Max gave Jo a cake.", "How is Jo?", "angry", "thankful", "made of glass", "2"),
            siqa("Pat is late.", "Why?", "it is blue", "the sea", "the bus broke down", "3"),
        ],
    },
    "hellaswag": {
        "train": [
            hellaswag("Rowing", f"Boat {n} moves.", "a man", ["rows.", "eats it.", "reads.", "is 4."], "0")
            for n in range(12)
        ],
        "validation": HELLASWAG,
    },
    "winogrande": {
        "train": [winogrande(f"Cup {n} fits the box as the _ is small.", "cup", "box", "1") for n in range(12)],
        "validation": [
            winogrande("The ball broke the table because the _ was made of steel.", "ball", "table", "1"),
            winogrande("Ana thanked Bea because _ had helped her.", "Ana", "Bea", "2"),
            winogrande("The hat is in the bag, so the _ is full .", "hat", "bag", "2"),
        ],
    },
    "arc_easy": {
        "train": [arc(f"T{n}", f"What is {n} plus 0?", choices(f"{n}", "x", "y", "z"), "A") for n in range(12)],
        "validation": [arc("V1", "What melts?", choices("ice", "sand", "air", "light"), "A")],
        "test": [
            arc("E1", "What do plants need?", choices("light", "noise", "iron bars", "paint"), "A"),
            arc("E2", "Which is cold?", choices("fire", "steam", "snow", labels="123"), "3"),
            arc("E3", "Which flies?", choices("a stone", "a fish", "a bird", "a root", "a spoon"), "C"),
        ],
    },
    "arc_challenge": {
        "train": [arc(f"S{n}", f"Name number {n}.", choices(f"it is {n}", "x", "y", "z"), "A") for n in range(12)],
        "validation": [arc("W1", "What is heavy?", choices("lead", "air", "a thought", "foam"), "A")],
        "test": [
            arc("C1", "Why is the moon bright?", choices("it burns", "sunlight", "lamps", "magic"), "B"),
            arc("C2", "What is iron?", choices("a metal", "a gas", "a plant", "a sound", labels="1234"), "1"),
            arc("C3", "What moves the tides?", choices("the moon", "fish", "ships", "salt"), "A"),
        ],
    },
    "openbookqa": {
        "train": [
            openbookqa(f"8-{n}", f"A cat number {n} is", choices("a pet", "x", "y", "z"), "A") for n in range(12)
        ],
        "validation": [openbookqa("9-1", "Rain comes from", choices("clouds", "stones", "books", "cars"), "A")],
        "test": [
            openbookqa("7-1", "A magnet pulls", choices("wood", "iron", "paper", "glass"), "B"),
            openbookqa("7-2", "Bees make", choices("milk", "bread", "steel", "honey"), "D"),
            openbookqa("7-3", "Owls hunt at", choices("night", "noon", "work", "school"), "A"),
        ],
    },
    "boolq": {
        "train": [boolq(f"is lake {n} wet", f"Lake {n} -- Lake {n} holds water.", 1) for n in range(12)],
        "validation": [
            boolq("is oak a wood", "Oak -- An oak is a tree with hard wood.", 1),
            boolq("can a square have five sides", "Square -- A square has four sides.", 0),
            boolq("is tea a drink", "Tea -- Tea is a drink of leaves -- and water.", 1),
        ],
    },
    "gsm8k": {
        "train": [gsm8k(n, n + 3) for n in range(12)],
        "test": [gsm8k(20, 5), gsm8k(999, 1001), gsm8k(7, 7)],
    },
    "math": {
        "train": [math("Algebra", 1, f"Find $x$ if $x+1={n}$.", f"So $\\boxed{{{n - 1}}}$.") for n in range(1, 13)],
        "test": [
            math("Algebra", 2, "Find $2x$ for $x=3$.", "It is $\\boxed{6}$."),
            math("Algebra", 5, "Halve $1$.", "We get $\\boxed{\\frac{1}{2}}$."),
            math("Number Theory", 3, "What is the remainder of $7$ by $4$?", "It is $\\boxed{3}$."),
        ],
    },
    "mmlu": {
        "dev": [mmlu(subject, n, n % 4) for subject in MMLU_SUBJECTS for n in range(5)],
        "validation": [mmlu(subject, 40, 1) for subject in MMLU_SUBJECTS],
        "test": [mmlu(subject, n, (n + 1) % 4) for subject in MMLU_SUBJECTS for n in range(50, 53)],
    },
}

# ---------------------------------------------------------------------------------------------------------------------
# The authors' formats


def nested(row: Row) -> Row:
    """ARC's and OpenBookQA's form: the choices inside the question."""
    pairs = zip(row["choices"]["text"], row["choices"]["label"], strict=True)
    stem = row["question"] if "question" in row else row["question_stem"]
    question = {"stem": stem, "choices": [{"text": text, "label": label} for text, label in pairs]}
    return {"id": row["id"], "question": question, "answerKey": row["answerKey"]}


def boolq_with_title(row: Row) -> Row:
    title, _, passage = row["passage"].partition(" -- ")
    return {"question": row["question"], "title": title, "answer": bool(row["label"]), "passage": passage}


AUTHORS = {  # name: (the file of a split, the authors' row)
    "piqa": ("piqa/physicaliqa-train-dev/{}.jsonl", lambda row: {k: row[k] for k in ("goal", "sol1", "sol2")}),
    "social_iqa": ("socialiqa-train-dev/{}.jsonl", lambda row: {k: v for k, v in row.items() if k != "label"}),
    "hellaswag": ("hellaswag/hellaswag_{}.jsonl", lambda row: row | {"ind": 7, "label": int(row["label"])}),
    "winogrande": ("winogrande_1.1/{}.jsonl", lambda row: {"qID": f"Q-{row['sentence']}"} | row),
    "arc_easy": ("ARC-V1-Feb2018-2/ARC-Easy/ARC-Easy-{}.jsonl", nested),
    "arc_challenge": ("ARC-V1-Feb2018-2/ARC-Challenge/ARC-Challenge-{}.jsonl", nested),
    "openbookqa": ("openbookqa/OpenBookQA-V1-Sep2018/Data/Main/{}.jsonl", nested),
    "boolq": ("boolq/{}.jsonl", boolq_with_title),
    "gsm8k": ("gsm8k/grade_school_math/data/{}.jsonl", lambda row: row),
}
ENDS = {  # the authors' word for a split, where it is not dev for validation
    "hellaswag": {"validation": "val"},
    "winogrande": {"train": "train_xl", "validation": "dev"},
    "arc_easy": {"train": "Train", "validation": "Dev", "test": "Test"},
    "arc_challenge": {"train": "Train", "validation": "Dev", "test": "Test"},
}


def put(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")
    return path


def authors_file(folder: Path, name: str, split: str) -> Path:
    """The JSON lines of a split, for the sets that have such files."""
    return folder / AUTHORS[name][0].format(ENDS.get(name, {"validation": "dev"}).get(split, split))


def write_authors(folder: Path) -> Path:
    """Write all sets in the authors' formats, and return the folder for --data."""
    for name, (_, convert) in AUTHORS.items():
        for split, rows in ITEMS[name].items():
            path = authors_file(folder, name, split)
            put(path, "".join(json.dumps(convert(row)) + "\n" for row in rows))
            if name in ("piqa", "social_iqa"):
                put(path.with_name(f"{path.stem}-labels.lst"), "".join(f"{row['label']}\n" for row in rows))
    write_math(folder / "MATH")
    write_mmlu(folder / "mmlu/data")
    return folder


def write_math(folder: Path) -> None:
    for split, rows in ITEMS["math"].items():
        for number, row in enumerate(rows):
            put(folder / split / row["type"].lower().replace(" ", "_") / f"{number}.json", json.dumps(row))


def write_mmlu(folder: Path) -> None:
    for split, rows in ITEMS["mmlu"].items():
        end = "val" if split == "validation" else split
        for subject in MMLU_SUBJECTS:
            path = put(folder / end / f"{subject}_{end}.csv", "")
            with path.open("w", newline="") as file:
                mine = [row for row in rows if row["subject"] == subject]
                csv.writer(file).writerows([r["question"], *r["choices"], "ABCD"[r["answer"]]] for r in mine)


# ---------------------------------------------------------------------------------------------------------------------
# The hub's format

CONFIGS = {  # the folder of a set and its configuration
    "piqa": "piqa/plain_text",
    "social_iqa": "siqa/default",
    "hellaswag": "hellaswag/data",
    "winogrande": "winogrande/winogrande_xl",
    "arc_easy": "ai2_arc/ARC-Easy",
    "arc_challenge": "ai2_arc/ARC-Challenge",
    "openbookqa": "openbookqa/main",
    "boolq": "super_glue/boolq",
    "gsm8k": "gsm8k/main",
    "mmlu": "mmlu/all",
}


def write_parquet(path: Path, rows: list[Row]) -> None:
    import pyarrow
    from pyarrow import parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def write_hub(folder: Path) -> Path:
    """Write all sets as parquet, in the hub's folders, and return the folder for --data."""
    for name, config in CONFIGS.items():
        for split, rows in ITEMS[name].items():
            write_parquet(folder / config / f"{split}-00000-of-00001.parquet", rows)
    for split, rows in ITEMS["math"].items():
        for subject in sorted({row["type"] for row in rows}):
            path = folder / "hendrycks_math" / subject.lower().replace(" ", "_") / f"{split}-00000-of-00001.parquet"
            write_parquet(path, [row for row in rows if row["type"] == subject])
    return folder
