"""Generate many requests, each from its own seed, and hand out each one when it has finished.

    (prompt, seed) ... -> make_request -> Engine -> (number of the request, its tokens), in the order in which they end

What a request draws depends on its prompt and its seed, not on the other requests (engine.py).
"""

from collections.abc import Iterator, Sequence

from nanochameleon.config import SamplingParams
from nanochameleon.evaluate.writing import slots_that_fit
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.request import Request, cfg_branches, make_request
from nanochameleon.generation.sampling import Modality
from nanochameleon.training.run import Run


def generate_each(
    run: Run, prompts: Sequence[Sequence[int]], seeds: Sequence[int], params: SamplingParams, modality: Modality,
    stops: Sequence[int] | None = None, batch_size: int = 64,
) -> Iterator[tuple[int, list[int]]]:  # fmt: skip
    """Return (i, new tokens of prompt i) ..., stop token included. batch_size: requests at once, less on a full GPU."""
    sizes = run.vocab, run.image_tokenizer.n_codes_per_image, run.model.cfg.max_seq_len
    pairs = zip(prompts, seeds, strict=True)
    requests = [make_request(prompt, *sizes, params, modality, (seed,), stops) for prompt, seed in pairs]
    return run_each(run, requests, batch_size)


def run_each(run: Run, requests: Sequence[Request], batch_size: int = 64) -> Iterator[tuple[int, list[int]]]:
    """The same for requests that are there already."""
    if not requests:
        return
    vocab, image_len = run.vocab, run.image_tokenizer.n_codes_per_image
    # Slots need only hold the longest request, which may be far shorter than the model's context.
    longest = max(len(request.prompt) + request.max_new_tokens for request in requests)
    branches = max(len(cfg_branches(request, vocab)) for request in requests)
    n_slots = min(min(batch_size, len(requests)) * branches, slots_that_fit(run, longest))
    engine = Engine(run.model, vocab, image_len, max(n_slots, branches), longest)
    for request in requests:
        engine.add_request(request)
    new: dict[int, list[int]] = {}
    for output in engine.run():
        new.setdefault(output.request_id, []).extend(output.tokens)
        if output.finished:
            yield output.request_id, new.pop(output.request_id)
