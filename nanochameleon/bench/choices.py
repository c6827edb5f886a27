"""Time the scoring of multiple-choice items next to transformers with the same random weights.

    items -> ours: trees of tokens (evaluate/token_trees.py)
          -> theirs: each context with each candidate, padded to the longest of a batch, all logits, their log-softmax

Items have a context and 4 candidates of 4 to 12 tokens. As in real sets, the lengths of questions vary, by half around
their mean, and items come in any order. Both choose the same candidates, or the bench fails. In bfloat16, whose
rounding differs from one order of sums to another, near ties may fall either way.
"""

from collections.abc import Iterator
from importlib.util import find_spec
from typing import NamedTuple

import torch
from torch import Tensor

from nanochameleon.bench.engine import SMALL_VQGAN, TOY, TOY_VOCAB, as_transformers, random_model
from nanochameleon.bench.measure import median_seconds
from nanochameleon.bench.rows import Row, make_row
from nanochameleon.config import OptimConfig, RunConfig
from nanochameleon.errors import UserError, say
from nanochameleon.evaluate.scoring import score
from nanochameleon.training.run import Run

CHOICES = 4
BATCH_ITEMS = 16  # of transformers: 64 sequences at once
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TOLERANCE = {"fp32": 1e-3, "bf16": 0.5}  # of a sum of log-probabilities, about -60 here


class Item(NamedTuple):
    context: list[int]
    candidates: list[list[int]]


class Case(NamedTuple):
    name: str
    n_items: int
    words: int  # text tokens of the question, on average
    codes: int = 0  # image codes before it
    shots: int = 0  # tokens of the examples before that
    shared: bool = True  # are the examples the same for all items?
    near: bool = False  # do the candidates of an item differ in one token, as in shapes_choice?


CASES = (
    Case("30 tokens", 1_000, words=29),
    Case("70 tokens, an image", 1_000, codes=64, words=3, near=True),
    Case("400 tokens, own shots", 100, shots=370, words=29, shared=False),
    Case("400 tokens, shared shots", 100, shots=370, words=29),
)


def items(case: Case) -> list[Item]:
    """Draw random items."""
    generator, v = torch.Generator().manual_seed(0), TOY_VOCAB

    def draw(n: int, low: int = v.first_text, high: int = v.size) -> list[int]:
        return torch.randint(low, high, (n,), generator=generator).tolist()

    def candidate() -> list[int]:
        return draw(*draw(1, 4, 13))

    def candidates() -> list[list[int]]:
        if not case.near:
            return [candidate() for _ in range(CHOICES)]
        first = candidate()
        places = draw(CHOICES - 1, 0, len(first))
        return [first, *([*first[:i], *draw(1), *first[i + 1 :]] for i in places)]

    shared = draw(case.shots)

    def context() -> list[int]:
        image = [v.boi, *draw(case.codes, v.first_code, v.eoi), v.eoi] if case.codes else []
        [words] = draw(1, (case.words + 1) // 2, case.words * 3 // 2 + 1)
        shots = shared if case.shared else draw(case.shots)
        return [v.bos, *shots, *image, *draw(words)]

    return [Item(context(), candidates()) for _ in range(case.n_items)]


def our_scores(run: Run, asked: list[Item]) -> Tensor:
    """Return the sums of log-probabilities (items, CHOICES) float64."""
    scored = score(run, [(item.context, candidate) for item in asked for candidate in item.candidates])
    return torch.tensor([each.log_prob for each in scored], dtype=torch.float64).view(-1, CHOICES)


@torch.inference_mode()
def their_scores(peer, asked: list[Item]) -> Tensor:
    """The same through transformers."""
    found, pad = [], TOY_VOCAB.pad
    for start in range(0, len(asked), BATCH_ITEMS):
        batch = [(item.context, new) for item in asked[start : start + BATCH_ITEMS] for new in item.candidates]
        size = max(len(context) + len(new) for context, new in batch)
        tokens = torch.full((len(batch), size), pad)
        counted = torch.zeros(len(batch), size - 1, dtype=torch.bool)  # the targets that belong to a candidate
        for row, (context, new) in enumerate(batch):
            tokens[row, : len(context) + len(new)] = torch.tensor(context + new)
            counted[row, len(context) - 1 : len(context) + len(new) - 1] = True
        # the whole model would give the same, but for image tokens, whose logits it replaces
        hidden = peer.model(input_ids=tokens, attention_mask=(tokens != pad).long()).last_hidden_state
        log_probs = peer.lm_head(hidden).float().log_softmax(-1)[:, :-1]
        log_probs = log_probs.gather(-1, tokens[:, 1:, None])[..., 0]
        found.append((log_probs.double() * counted).sum(-1))
    return torch.cat(found).view(-1, CHOICES)


def same_choices(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    """Raise AssertionError if they choose a candidate that is worse for us than our choice, by more than that."""
    chosen = theirs.argmax(1, keepdim=True)
    short_of_best = ours.max(1).values - ours.gather(1, chosen)[:, 0]
    assert float(short_of_best.max()) <= tolerance, f"a choice differs by {float(short_of_best.max())}"


def as_run(model) -> Run:
    """Return a run that score takes: it has no tokenizers."""
    return Run(RunConfig("choices", SMALL_VQGAN, model.cfg, OptimConfig()), TOY_VOCAB, None, None, model)


def measure(case: Case, models: dict[str, Run], peers: dict, rounds: int) -> Iterator[Row]:
    """Yield a row for each of our models next to each of transformers', and a row for each of those."""
    asked, device = items(case), torch.device("cpu")
    ours = {f"nano {name}": lambda run=run: our_scores(run, asked) for name, run in models.items()}
    theirs = {f"transformers {name}": lambda peer=peer: their_scores(peer, asked) for name, peer in peers.items()}
    for name in peers:
        same_choices(ours[f"nano {name}"](), theirs[f"transformers {name}"](), TOLERANCE[name])
    seconds = median_seconds(ours | theirs, rounds, device)

    def row(name: str, *ratio) -> Row:
        return make_row("choices", case.name, name, case.n_items / seconds[name], "items/s", device, *ratio)

    for name in ours:
        yield from [row(name, seconds[peer] / seconds[name], peer) for peer in theirs] or [row(name)]
    yield from map(row, theirs)


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    if device.type != "cpu":
        raise UserError("choices are timed on a CPU: leave out --device")
    models = {name: as_run(random_model(TOY, device, dtype)) for name, dtype in DTYPES.items()}
    peers = {}
    if find_spec("transformers") is None:
        say("transformers is not installed: skipped")
    else:
        peers = {name: as_transformers(run.model, TOY_VOCAB) for name, run in models.items()}
    for case in CASES:
        yield from measure(
            case._replace(n_items=case.n_items // 32) if quick else case, models, peers, 2 if quick else 3
        )
