"""Write text after prompts, for evaluations: greedy or sampled, until a stop string, a stop token or a limit.

    prompts (tokens) -> fit into the context -> engine -> bytes -> cut before the first stop string -> Written

A stop string is looked for in the decoded bytes, so it may be spread over several tokens. A request that has written
one is cancelled, and the next prompt takes its slot. What is written depends on the prompt and its seed, not on the
other prompts (engine.py).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from nanochameleon.config import SamplingParams
from nanochameleon.evaluate.fit import fit
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.request import make_request
from nanochameleon.training.run import Run


@dataclass(frozen=True)
class Written:
    text: str  # up to the first stop string, which is left out
    truncated: bool  # was the left end of the prompt cut off?
    stopped: bool  # did a stop string or a stop token end the text? If not, max_new_tokens did


def write(
    run: Run, prompts: Sequence[Sequence[int]], max_new_tokens: int, stop_strings: Sequence[str] = (),
    stop_tokens: Sequence[int] | None = None, temperature: float = 0.0, top_p: float = 1.0,
    seeds: Sequence[int] | None = None, batch_size: int = 64,
) -> list[Written]:  # fmt: skip
    """Return what the model writes after each prompt, whose first token is <s>. No image is drawn.

    stop_tokens: </s>, end of turn or <boi>; None: </s>. seeds: one for each prompt; they are needed unless
    temperature is 0 (greedy). batch_size: slots at most. A prompt too long for max_new_tokens is cut (fit.py).
    """
    if temperature > 0 and seeds is None:
        raise ValueError("a temperature above 0 needs a seed for each prompt")
    vocab, image_len, context = run.vocab, run.image_tokenizer.n_codes_per_image, run.model.cfg.max_seq_len
    params = SamplingParams(temperature, top_p, repetition_penalty=1.0, max_new_tokens=max_new_tokens)
    fitted = [fit(prompt, context - max_new_tokens, vocab) for prompt in prompts]
    requests = [
        make_request(prompt, vocab, image_len, context, params, "text", (seed,), stop_tokens)
        for (prompt, _), seed in zip(fitted, [0] * len(fitted) if seeds is None else seeds, strict=True)
    ]
    if not requests:
        return []
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    n_slots = min(batch_size, len(requests), slots_that_fit(run, longest))
    engine = Engine(run.model, vocab, image_len, n_slots, longest)
    stops, texts = (
        [stop.encode("utf-8", "surrogatepass") for stop in stop_strings if stop],
        [TextUntil() for _ in requests],
    )
    for request in requests:
        engine.add_request(request)
    for output in engine.run():
        text = texts[output.request_id]
        new = [token for token in output.tokens if vocab.is_text(token)]
        if text.add(run.tokenizer.decode_bytes(new), stops):
            engine.cancel(output.request_id)
        elif output.finished:
            text.stopped = output.tokens[-1] in (stop_tokens or (vocab.eos,))
    return [Written(text.decode(), cut, text.stopped) for text, (_, cut) in zip(texts, fitted, strict=True)]


def slots_that_fit(run: Run, context: int) -> int:
    """Return how many slots of so many tokens half of the free memory can hold. A slot of a 7B model takes GiB."""
    cfg = run.model.cfg
    values = 2 * cfg.n_layers * cfg.kv_heads * cfg.head_dim * context  # of keys and values
    n_bytes = values * run.model.tok_embeddings.weight.element_size()
    return max(1, free_memory(run.device) // 2 // n_bytes)


def free_memory(device: torch.device) -> int:
    """Return the free bytes of a GPU, or of the machine. Where nothing says how many, there is no limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        [kib] = re.findall(r"^MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE)
    except (OSError, ValueError):  # no Linux
        return 2**62
    return int(kib) * 1024


@dataclass
class TextUntil:
    """The bytes that one request has written, until a stop string."""

    data: bytes = b""
    stopped: bool = False

    def add(self, new: bytes, stops: Sequence[bytes]) -> bool:
        """Add the next bytes. If they complete a stop string, cut the text before it and return True.

        The string that ends first counts; of two with the same end, the longer one. So the text does not depend on how
        it was split into tokens, nor on when the host syncs.
        """
        start = max(0, len(self.data) - max(map(len, stops), default=0))
        self.data += new
        found = [(at + len(stop), at) for stop in stops if (at := self.data.find(stop, start)) >= 0]
        if found:
            self.data, self.stopped = self.data[: min(found)[1]], True
        return bool(found)

    def decode(self) -> str:
        """Return the text. Bytes that are not UTF-8, such as half a character at the end, become U+FFFD."""
        return self.data.decode("utf-8", errors="replace")
