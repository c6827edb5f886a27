"""Our engine as a model of lm-evaluation-harness (https://github.com/EleutherAI/lm-evaluation-harness, 0.4.13).

    requests of lm-eval (texts, images) -> tokens -> scoring.score or writing.write -> what lm-eval expects back

Every context begins with <s>. With `chat`, the end of the user's turn follows a context, and the model's answer ends at
an end of turn, too. Left out: chat templates as text, since text never makes a special token.
"""

from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from PIL.Image import Image
from tqdm import tqdm

from nanochameleon.data import RawDocument, RawImage
from nanochameleon.documents import Text
from nanochameleon.errors import UserError, shown
from nanochameleon.evaluate.scoring import context_and_continuation, score
from nanochameleon.evaluate.task import digest, item_seed
from nanochameleon.evaluate.writing import write
from nanochameleon.generation.prompts import prompt_tokens
from nanochameleon.images.files import to_rgb
from nanochameleon.images.tokenizer import preprocess
from nanochameleon.training.run import Run
from nanochameleon.weights.tokenizer_json import to_json

CHUNK = 512  # requests between two steps of the progress bar
MARK = "<image>"  # where an image goes in the text of a multimodal request
KNOWN = {"until", "max_gen_toks", "do_sample", "temperature", "top_p"}  # options of generation
NEUTRAL = {"num_beams": 1, "top_k": 0, "repetition_penalty": 1.0}  # options that change nothing when they are so


class Harness(TemplateLM):
    """A model that lm-eval can ask. `n_requests` and `n_truncated` count those whose left end was cut off to fit."""

    MULTIMODAL = True

    def __init__(self, run: Run, chat: bool = False, seed: int = 0, name: str = "nanochameleon"):
        super().__init__()
        self.run, self.chat, self.seed, self.name = run, chat, seed, name
        self.n_requests = self.n_truncated = 0

    # What lm-eval asks about the model

    @property
    def eot_token_id(self) -> int:
        return self.run.vocab.eos

    @property
    def prefix_token_id(self) -> int:
        return self.run.vocab.bos

    @property
    def max_length(self) -> int:
        return self.run.cfg.model.max_seq_len

    @property
    def tokenizer_name(self) -> str:
        return f"nanochameleon-{digest(to_json(self.run.tokenizer))}"

    def get_model_info(self) -> dict[str, Any]:
        dtype = str(self.run.model.output.weight.dtype)
        return {"model_name": self.name, "model_dtype": dtype, "context": self.max_length, "chat": self.chat}

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_) -> list[int]:
        return self.run.tokenizer.encode(string)

    # Requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        pairs = [(None, *self.tokens(*request.args)) for request in requests]
        return self._loglikelihood_tokens(pairs, disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """Return the log-probability of whole texts. One longer than the context is read in windows; none is cut."""
        windows = []
        for request in requests:
            text = self.tok_encode(request.args[0]), self.prefix_token_id, self.max_length, 1
            windows.append([make_disjoint_window(window) for window in get_rolling_token_windows(*text)])
        pairs = [(None, *window) for each in windows for window in each]
        scores = iter(self._loglikelihood_tokens(pairs, disable_tqdm))
        return [sum(next(scores)[0] for _ in each) for each in windows]

    def _loglikelihood_tokens(self, requests: Sequence[tuple], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        scored = []
        for chunk in chunks(requests, "scoring", disable_tqdm):
            scored += score(self.run, [(context, continuation) for _, context, continuation in chunk])
        self.count(each.truncated for each in scored)
        return [(each.log_prob, each.greedy) for each in scored]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        groups: dict[str, list[int]] = defaultdict(list)  # requests of the same options are written together
        seeds, times = [], Counter()
        for number, request in enumerate(requests):
            groups[str(request.args[1])].append(number)
            item = str(request.task_name), str(request.doc_id)
            seeds.append(item_seed(self.seed, *item, times[item]))  # a sample of an item has a seed of its own
            times[item] += 1
        texts = [""] * len(requests)
        for numbers in groups.values():
            options = writing_options(requests[numbers[0]].args[1], self.max_length)
            for chunk in chunks(numbers, "writing", disable_tqdm):
                prompts = [self.prompt(*requests[number].args) for number in chunk]
                stops = (self.run.vocab.eos, self.run.vocab.eot) if self.chat else None
                new = write(self.run, prompts, stop_tokens=stops, seeds=[seeds[number] for number in chunk], **options)
                self.count(each.truncated for each in new)
                for number, each in zip(chunk, new, strict=True):
                    texts[number] = each.text
        return texts

    def count(self, truncated: Iterable[bool]) -> None:
        flags = list(truncated)
        self.n_requests += len(flags)
        self.n_truncated += sum(flags)

    # Texts and images -> tokens

    def prompt(self, context: str, options: dict, more: dict | None = None) -> list[int]:
        left, right = self.tokens(context, "", more)
        return left + right  # trailing spaces

    def tokens(self, context: str, continuation: str, more: dict | None = None) -> tuple[list[int], list[int]]:
        """Return the tokens of a context, from <s> on, and of its continuation.

        After the end of a turn an answer starts without a space, as in training.
        """
        *before, last = segments(context, more, self.run) if more else [Text(context)]
        start = prompt_tokens(before, self.run)
        if self.chat:
            end = [*self.tok_encode(last.text), self.run.vocab.eot]
            return start + end, self.tok_encode(continuation.removeprefix(" "))
        left, right = context_and_continuation(self.run.tokenizer, last.text, continuation)
        return start + left, right


def segments(text: str, more: dict[str, Any], run: Run) -> RawDocument:
    """Split the text of a multimodal request at its marks, where its images go. The last segment is text."""
    if unknown := more.keys() - {"visual"}:
        raise UserError(f"a task gives the model {shown(min(unknown))}: only text and images can be read")
    images = [more["visual"]] if isinstance(more["visual"], Image) else list(more["visual"] or [])
    parts = text.split(MARK)
    if len(images) != len(parts) - 1:
        counts = f"{len(parts) - 1} {MARK} in its text and {len(images)} images"
        raise UserError(f"a multimodal item has {counts}: doc_to_text must have one {MARK} for each image")
    fit = "pad" if run.cfg.train.assistant_only_loss else "crop"  # as the model learnt to see them
    found: RawDocument = []
    for part, image in zip(parts, images, strict=False):
        found += [Text(part), RawImage(preprocess(to_rgb(image), run.cfg.vqgan.resolution, fit))]
    return [*found, Text(parts[-1])]


def writing_options(options: dict[str, Any], context: int) -> dict[str, Any]:
    """Translate lm-eval's options of generation into those of write. New tokens take half of the context at most."""
    given = normalize_gen_kwargs(options)
    for name in given.keys() - KNOWN:
        if given[name] not in (None, NEUTRAL.get(name)):
            raise UserError(
                f"a task wants {shown(name)} = {shown(given[name])} for generation, which is not known here"
            )
    return {
        "max_new_tokens": min(given["max_gen_toks"], context // 2),
        "stop_strings": given["until"],
        "temperature": given.get("temperature", 1.0) if given["do_sample"] else 0.0,
        "top_p": given.get("top_p", 1.0),
    }


def chunks(items: Sequence, name: str, quiet: bool) -> Iterable[Sequence]:
    """Split into chunks, with a progress bar where stderr is a terminal."""
    starts = range(0, len(items), CHUNK)
    return (items[i : i + CHUNK] for i in tqdm(starts, name, unit=f" x {CHUNK}", disable=quiet or None))
