"""Caption scores next to COCO's own code: the words of captions, and CIDEr-D.

    pip install --no-deps pycocoevalcap==1.2        104 MB, most of it Stanford's tokenizer; Java runs it
    python tests/peers/caption_scores.py [data.noun data.verb ...]

Files of WordNet, if any are given, add their example sentences. Prints how many captions have equal words, the first
that differ, and the largest difference of CIDEr-D over 200 random sets of captions.
"""

import random
import re
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import pycocoevalcap
from pycocoevalcap.cider.cider import Cider

from nanochameleon.evaluate.cider import cider_d, words

JAR = Path(pycocoevalcap.__path__[0]) / "tokenizer" / "stanford-corenlp-3.4.1.jar"
# what COCO's code drops; brackets stay, since its list names them in upper case
DROPPED = {"''", "'", "``", "`", ".", "?", "!", ",", ":", "-", "--", "...", ";"}
HARD = """A man's dog doesn't sit on the t-shirt.
It's a black/white cat (sleeping), isn't it?
Two "quoted" words and 'single' ones
1,000 people at 3:30 p.m. for $5.50 or 50%
Tom & Jerry @ the U.S. Open... really!
A 2-year-old boy; a girl - and a dog -- running
the dog´s ball and the cat’s toy “here”
he'll can't won't gonna cannot they're I'd we've
1/2 of a pizza, #1 dad, 5'10" tall, e.g. this
St. Louis Mr. Smith No. 5 etc.
A dog.The cat
the dogs' bowls / man/woman w/ no-one / 1980s 90's
a $20 bill and 20$ and €5 £3 ½ pizza
'tis ma'am d'oh y'all rock'n'roll 80's o'clock
A b&w photo of a (very) old car.
Three 4x4 trucks, 2 SUVs & a 10-speed bike
A sign that reads "STOP!" on Main St.
A man in a #23 jersey hits a ball.
the boy's and girls' teams
A cat, dog, and bird...all asleep
A woman who's holding her son's hand
they've got 1,234.56 dollars
A plate with half-eaten food; someone's lunch?
A person (or two) near the U.S.A. flag
Dr. Jones vs. Mrs. White at 5:00PM
A TV/VCR combo on a wood-grain stand
an up-close view of a stop-sign
A bus - #42 - is on 5th Ave.
He said 'hello' to her
A fire-engine-red truck
A 3-D image of a mid-air skateboarder
gimme that lemme see wanna go gotta run
one, two, three: go!
A man w/o shoes
A '57 Chevy on Route 66
Mt. Everest & the Sgt. at Arms""".splitlines()
NAMES = [
    "a",
    "red",
    "blue",
    "big",
    "small",
    "dog",
    "cat",
    "man",
    "woman",
    "riding",
    "horse",
    "on",
    "street",
    "the",
    "with",
    "of",
    "near",
    "two",
    "three",
    "tall",
]
SHOWN, MOST, SETS = 20, 20_000, 200


def stanford(captions: Sequence[str]) -> list[list[str]]:
    """Return the words of captions by Stanford's PTBTokenizer, as COCO's code calls it."""
    with tempfile.NamedTemporaryFile("w", suffix=".txt", encoding="utf-8") as file:
        file.write("\n".join(captions) + "\n")
        file.flush()
        command = ["java", "-cp", str(JAR), "edu.stanford.nlp.process.PTBTokenizer", "-preserveLines", "-lowerCase"]
        lines = subprocess.run([*command, file.name], capture_output=True, text=True, check=True).stdout.split("\n")
    return [[word for word in line.split() if word not in DROPPED] for line in lines[: len(captions)]]


def examples(path: Path) -> list[str]:
    """Return the example sentences of a data file of WordNet."""
    lines = path.read_text(encoding="latin-1").splitlines()
    return [found for line in lines for found in re.findall(r'"([^"]{15,120})"', line.partition("|")[2])]


def compare_words(what: str, captions: Sequence[str]) -> None:
    pairs = zip(captions, stanford(captions), map(words, captions), strict=True)
    different = [(caption, " ".join(theirs), " ".join(ours)) for caption, theirs, ours in pairs if theirs != ours]
    print(f"{what}: {len(captions) - len(different):,} of {len(captions):,} have equal words")
    for caption, theirs, ours in different[:SHOWN]:
        print(f"  {caption}\n    theirs: {theirs}\n    ours:   {ours}")


def largest_difference() -> float:
    """Return the largest difference of CIDEr-D, of a set or of an image."""
    rng, largest = random.Random(0), 0.0

    def caption() -> str:
        return " ".join(rng.choices(NAMES, k=rng.randrange(1, 14)))

    for _ in range(SETS):
        references = [[caption() for _ in range(rng.randrange(1, 6))] for _ in range(rng.randrange(2, 30))]
        said = [rng.choice([caption(), rng.choice(texts)]) for texts in references]
        mean, each = cider_d(said, references)
        theirs = Cider().compute_score(dict(enumerate(references)), {i: [text] for i, text in enumerate(said)})
        largest = max(largest, abs(mean - theirs[0]), *map(abs, each - theirs[1]))
    return largest


def main() -> None:
    compare_words("hard captions", HARD)
    if sentences := sorted(text for path in sys.argv[1:] for text in examples(Path(path))):
        compare_words("WordNet's examples", random.Random(0).sample(sentences, min(MOST, len(sentences))))
    print(f"CIDEr-D of {SETS} random sets: at most {largest_difference():.1e} apart")


if __name__ == "__main__":
    main()
