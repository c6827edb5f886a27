"""Time generation next to transformers' `generate` with the same random weights, and next to our own other modes.

On a CPU: a model of 5.9M parameters, whose greedy tokens must equal transformers'; a mixed batch against its requests
one by one; guidance. With OMP_NUM_THREADS=1 it measures CPU time. On a GPU: models of 7B and 1.3B.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from importlib.util import find_spec

import torch
from torch import Tensor

from nanochameleon.bench.limits import Limits, measure_limits
from nanochameleon.bench.measure import Job, median_seconds, seconds_of
from nanochameleon.bench.rows import NO_LIMITS, Row, make_row, rows_against_peers
from nanochameleon.bench.work import step_work
from nanochameleon.config import ModelConfig, SamplingParams, VQGANConfig
from nanochameleon.errors import say
from nanochameleon.generation.engine import Engine, generate
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab
from nanochameleon.weights import layouts
from nanochameleon.weights.layout_configs import hf_config

TOY, TOY_VOCAB = ModelConfig(1_536, 256, 6, 4, max_seq_len=1_024), Vocab(1_536, 512, n_reserved=8, eot_slot=2)
SMALL_VQGAN = VQGANConfig(resolution=16, ch=32, ch_mult=(1,), n_res_blocks=1, z_channels=8, embed_dim=8, n_codes=1)
GPU_MODELS = {  # head_dim is 128 in both
    "7B": ModelConfig(),
    "1.3B": ModelConfig(dim=2_048, n_layers=22, n_heads=16),
}
GREEDY = SamplingParams(
    temperature=0.0, repetition_penalty=1.0, image_temperature=0.0, guidance_scale=1.0, image_guidance_scale=1.0
)
IMAGE_CODES = {"cpu": 64, "cuda": 1_024}


def random_model(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> Chameleon:
    """Return a model whose output weights are not 0, so that greedy tokens are not all ties."""
    torch.manual_seed(0)
    with torch.device(device):
        model = Chameleon(cfg).to(dtype).eval()
    with torch.no_grad():
        model.output.weight.normal_(std=0.1)
        for block in model.layers:
            for norm in (block.attention.q_norm, block.attention.k_norm):
                norm.weight.normal_(1, 0.2)
                norm.bias.normal_(0, 0.2)
    return model


# ---------------------------------------------------------------------------------------------------------------------
# transformers


def as_transformers(model: Chameleon, vocab: Vocab):
    """Return transformers' model with the same weights. Its image tokenizer is a small one, which generate ignores."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, GenerationConfig

    names, weight = {"<image>": vocab.unk, "IMGIMGAZ": vocab.first_code}, model.output.weight
    dtype = str(weight.dtype).removeprefix("torch.")
    config = hf_config(model.cfg, SMALL_VQGAN, vocab, names, dtype) | {"eos_token_id": None}
    with torch.device(weight.device):
        peer = ChameleonForConditionalGeneration(ChameleonConfig(**config)).to(weight.dtype).eval()
    peer.generation_config = GenerationConfig(do_sample=False, pad_token_id=vocab.pad)
    ours = model.state_dict()
    state = {layouts.names_of(name).hf: layouts.to_hf(name, x, model.cfg) for name, x in ours.items()}
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all("vqmodel" in name for name in missing), (missing[:3], unexpected[:3])
    return peer


def their_tokens(peer, prompts: Tensor, n: int, **options) -> list[list[int]]:
    out = peer.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, min_new_tokens=n, **options
    )
    return out[:, prompts.shape[1] :].tolist()


def our_tokens(engine: Engine, prompts: Tensor, n: int, params: SamplingParams = GREEDY) -> list[list[int]]:
    new = [[] for _ in prompts]
    first = engine.n_added
    for prompt in prompts.tolist():
        engine.add(prompt, replace(params, max_new_tokens=n), "text")
    for output in engine.run():
        new[output.request_id - first] += output.tokens
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Cases


@dataclass(frozen=True)
class Bench:
    """A model, and how long to measure it."""

    name: str
    model: Chameleon
    vocab: Vocab
    unit: str  # of text: tokens/s, ms per step
    rounds: int
    max_seconds: float
    n: int  # tokens of text per request
    peers: bool  # whether transformers is measured, too
    image_codes: int  # of an image
    limits: Limits

    @property
    def device(self) -> torch.device:
        return self.model.output.weight.device

    def rows(
        self, case: str, jobs: dict[str, Job], amount: float, unit: str, least: Mapping[str, float] = NO_LIMITS
    ) -> list[Row]:
        seconds = median_seconds(jobs, self.rounds, self.device, self.max_seconds)
        return rows_against_peers("engine", case, "nano", seconds, amount, unit, self.device, least)

    def least_seconds(self, steps: int, rows: int, prompts: int) -> float:
        """The limit of `steps` steps of `rows` tokens each, after prompts of that many tokens in all.

        Reading the prompts counts as no more than one of the steps.
        """
        cached = prompts + rows * (steps + 1) / 2  # in a mean step; a token reads itself, too
        work = step_work(self.model.cfg, rows, cached, self.model.output.weight.dtype)
        return steps * self.limits.seconds(work)


def first_token(b: Bench) -> Row:
    """Time from loaded weights to the first token, for the first time in this process."""
    prompt = torch.tensor([[b.vocab.bos, b.vocab.first_text]])
    seconds = seconds_of(lambda: our_tokens(Engine(b.model, b.vocab, 64, 1, 64), prompt, 1), b.device)
    return make_row("engine", f"{b.name} start to first token", "nano", 1e3 * seconds, "ms", b.device)


def text_case(b: Bench, batch: int) -> list[Row]:
    """Greedy text, ours next to transformers' with both of its caches; and ours sampled with all default filters."""
    prompts = torch.randint(b.vocab.first_text, b.vocab.size, (batch, 16), device=b.device)
    prompts[:, 0] = b.vocab.bos
    engine = Engine(b.model, b.vocab, 64, batch, 16 + b.n)
    jobs = {"nano": lambda: our_tokens(engine, prompts, b.n)}
    jobs["nano sampled"] = lambda: our_tokens(engine, prompts, b.n, SamplingParams())
    if b.peers:
        peer = as_transformers(b.model, b.vocab)
        jobs["transformers generate dynamic"] = lambda: their_tokens(peer, prompts, b.n)
        jobs["transformers generate static"] = lambda: their_tokens(peer, prompts, b.n, cache_implementation="static")
        if b.model.output.weight.dtype == torch.float32:
            assert jobs["nano"]() == jobs["transformers generate dynamic"](), "greedy tokens differ from transformers'"
    amount = b.n if b.unit.startswith("ms") else b.n * batch
    least = dict.fromkeys(jobs, b.least_seconds(b.n, batch, prompts.numel()))
    return b.rows(f"{b.name} text batch {batch}", jobs, amount, b.unit, least)


def image_case(b: Bench) -> list[Row]:
    """One image with three-way guidance, after a prompt of text and an image; the same without guidance."""
    n_codes = b.image_codes
    shown = [b.vocab.boi, *[b.vocab.first_code] * n_codes, b.vocab.eoi]
    prompt = [b.vocab.bos, *range(b.vocab.first_text, b.vocab.first_text + 8), *shown, b.vocab.boi]

    def run(text_scale: float, image_scale: float):
        options = SamplingParams(
            guidance_scale=text_scale, image_guidance_scale=image_scale, max_new_tokens=n_codes + 1
        )
        return generate(b.model, [prompt], b.vocab, n_codes, options, "image")

    jobs = {"nano": lambda: run(3.0, 1.2), "nano without guidance": lambda: run(1.0, 1.0)}
    # of three branches, two read little of the prompt
    least = {name: b.least_seconds(n_codes, rows, len(prompt)) for name, rows in zip(jobs, (3, 1), strict=True)}
    return b.rows(f"{b.name} guided image", jobs, n_codes, "ms a code", least)


def mixed_case(b: Bench) -> list[Row]:
    """16 requests of three modalities and all lengths in one batch, and the same requests one by one.

    The time includes reading their prompts. The two engines are made before, as in a server.
    """
    engines = {batch: Engine(b.model, b.vocab, 16, batch, 256) for batch in (1, 16)}

    def run(batch: int) -> int:
        engine = engines[batch]
        for i in range(16):
            options = SamplingParams(guidance_scale=1.0, image_guidance_scale=1.0, max_new_tokens=b.n + i)
            prompt = [b.vocab.bos, *range(b.vocab.first_text, b.vocab.first_text + i)]
            engine.add(prompt, options, ("text", "image", "both")[i % 3], (i,))
        return sum(len(output.tokens) for output in engine.run())

    jobs = {"nano": lambda: run(16), "nano one by one": lambda: run(1)}
    return b.rows("mixed batch of 16", jobs, run(16), "tokens/s")


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    if not (peers := find_spec("transformers") is not None):
        say("transformers is not installed: skipped")
    limits = measure_limits(device)
    yield from limits.rows("engine", device)
    how_long = (*((2, 2.0, 32) if quick else (9, 60.0, 128)), peers, IMAGE_CODES[device.type], limits)
    if device.type == "cpu":
        benches = [Bench("5.9M", random_model(TOY, device, torch.float32), TOY_VOCAB, "tokens/s", *how_long)]
    else:
        models = {name: random_model(cfg, device, torch.bfloat16) for name, cfg in GPU_MODELS.items()}
        benches = [Bench(name, model, Vocab(), "ms a step", *how_long) for name, model in models.items()]
    for b in benches:
        yield first_token(b)
        only_text(b)
        for batch in (1, 16):
            yield from text_case(b, batch)
        yield from image_case(b)
        if device.type == "cpu":
            yield from mixed_case(b)


def only_text(b: Bench) -> None:
    """Change the model: tokens that are not text never win, as if a grammar forbade them."""
    with torch.no_grad():
        b.model.output.weight[: b.vocab.first_text] *= 1e-3
