"""Generation beside transformers' `generate` with equal random weights, and against itself in other ways.

On a CPU: a 5.9M model, where ids must agree; a mixed batch against its rows one by one; guidance; with
OMP_NUM_THREADS=1 in CPU time, which neighbours hardly disturb. On a GPU: the shapes of the 7B and a 1.3B. transformers
is optional, and skipped by name where it is missing.
"""

from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec

import torch
from torch import Tensor

from nanochameleon.bench.rows import Row, clock, device_name, rows_of, take_turns
from nanochameleon.config import ModelConfig, SamplingParams
from nanochameleon.errors import say
from nanochameleon.generation.engine import Engine, generate
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

TOY, TOY_VOCAB = ModelConfig(1_536, 256, 6, 4, max_seq_len=1_024), Vocab(1_536, 512, n_reserved=8, eot_slot=2)
GPU_MODELS = {  # of one width for all heads, 128
    "7B": ModelConfig(),
    "1.3B": ModelConfig(dim=2_048, n_layers=22, n_heads=16),
}
GREEDY = SamplingParams(
    temperature=0.0, repetition_penalty=1.0, image_temperature=0.0, guidance_scale=1.0, image_guidance_scale=1.0
)
IMAGE_CODES = {"cpu": 64, "cuda": 1_024}


def random_model(cfg: ModelConfig, device: torch.device, dtype: torch.dtype) -> Chameleon:
    """Output weights that are not 0, so that greedy ids are no accident, and no </s>, so that lengths are equal."""
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


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of each head from our order of rotary pairs, (0, 1) (2, 3), to theirs: first members, then second ones."""
    per_head = weight.unflatten(0, (heads, -1, 2)).transpose(1, 2)
    return per_head.flatten(0, 2)


def as_transformers(model: Chameleon, vocab: Vocab):
    """transformers' model with the same weights. Its image tokenizer, which generate does not use, is a small one."""
    from transformers import ChameleonConfig, ChameleonForConditionalGeneration, GenerationConfig

    cfg, weight = model.cfg, model.output.weight
    images = dict(embed_dim=8, num_embeddings=1, latent_channels=8, base_channels=32, channel_multiplier=[1],
                    num_res_blocks=1, resolution=16)  # fmt: skip
    their = ChameleonConfig(
        vocab_size=cfg.vocab_size, hidden_size=cfg.dim, intermediate_size=cfg.ffn_dim, num_hidden_layers=cfg.n_layers,
        num_attention_heads=cfg.n_heads, num_key_value_heads=cfg.kv_heads, max_position_embeddings=cfg.max_seq_len,
        rms_norm_eps=cfg.norm_eps, bos_token_id=vocab.bos, pad_token_id=vocab.pad, eos_token_id=None,
        vocabulary_map={"<image>": vocab.unk, "IMGIMGAZ": vocab.first_code}, vq_config=images,
    )  # fmt: skip
    with torch.device(weight.device):
        peer = ChameleonForConditionalGeneration(their).to(weight.dtype).eval()
    peer.generation_config = GenerationConfig(do_sample=False, pad_token_id=vocab.pad)
    state = {"lm_head.weight": weight, "model.embed_tokens.weight": model.tok_embeddings.weight,
             "model.norm.weight": model.norm.weight}  # fmt: skip
    for i, block in enumerate(model.layers):
        a, f, to = block.attention, block.feed_forward, f"model.layers.{i}."
        for name, linear, norm, heads in (("q", a.wq, a.q_norm, cfg.n_heads), ("k", a.wk, a.k_norm, cfg.kv_heads)):
            state[f"{to}self_attn.{name}_proj.weight"] = half_split(linear.weight, heads)
            for part in ("weight", "bias"):
                each = getattr(norm, part).repeat_interleave(heads // len(norm.weight), 0)
                state[f"{to}self_attn.{name}_norm.{part}"] = half_split(each.flatten(), heads).view(heads, -1)
        state |= {
            f"{to}self_attn.v_proj.weight": a.wv.weight, f"{to}self_attn.o_proj.weight": a.wo.weight,
            f"{to}mlp.gate_proj.weight": f.w1.weight, f"{to}mlp.up_proj.weight": f.w3.weight,
            f"{to}mlp.down_proj.weight": f.w2.weight, f"{to}input_layernorm.weight": block.attention_norm.weight,
            f"{to}post_attention_layernorm.weight": block.ffn_norm.weight,
        }  # fmt: skip
    missing, unexpected = peer.load_state_dict(state, strict=False)
    assert not unexpected and all("vqmodel" in name for name in missing), (missing[:3], unexpected[:3])
    return peer


def their_ids(peer, prompts: Tensor, n: int, **options) -> list[list[int]]:
    out = peer.generate(
        input_ids=prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=n, min_new_tokens=n, **options
    )
    return out[:, prompts.shape[1] :].tolist()


def our_ids(engine: Engine, prompts: Tensor, n: int) -> list[list[int]]:
    new = [[] for _ in prompts]
    first = engine.n_added
    for prompt in prompts.tolist():
        engine.add(prompt, replace(GREEDY, max_new_tokens=n), "text")
    for output in engine.run():
        new[output.request_id - first] += output.tokens
    return new


# ---------------------------------------------------------------------------------------------------------------------
# Cases


def text_case(
    name: str, model: Chameleon, vocab: Vocab, batch: int, n: int, unit: str, rounds: int, seconds: float
) -> Iterator[Row]:
    """Greedy text, ours beside transformers' two caches."""
    device = model.output.weight.device
    prompts = torch.randint(vocab.first_text, vocab.size, (batch, 16), device=device)
    prompts[:, 0] = vocab.bos
    engine = Engine(model, vocab, 64, batch, 16 + n)
    jobs = {"nano": lambda: our_ids(engine, prompts, n)}
    if find_spec("transformers"):
        peer = as_transformers(model, vocab)
        jobs["transformers generate dynamic"] = lambda: their_ids(peer, prompts, n)
        jobs["transformers generate static"] = lambda: their_ids(peer, prompts, n, cache_implementation="static")
        if model.output.weight.dtype == torch.float32:
            assert jobs["nano"]() == jobs["transformers generate dynamic"](), "greedy ids differ from transformers'"
    per = n if unit.startswith("ms") else n * batch
    yield from rows_of(
        "engine",
        f"{name} text batch {batch}",
        "nano",
        take_turns(jobs, rounds, seconds),
        per,
        unit,
        device_name(device),
    )


def mixed_case(model: Chameleon, vocab: Vocab, n: int, rounds: int, seconds: float) -> Iterator[Row]:
    """16 rows of three modes and all lengths in one batch, and the same rows one by one."""

    def run(n_slots: int) -> int:
        engine = Engine(model, vocab, 16, n_slots, 256)
        for i in range(16):
            options = SamplingParams(guidance_scale=1.0, image_guidance_scale=1.0, max_new_tokens=n + i)
            engine.add([vocab.bos, *range(vocab.first_text, vocab.first_text + i)], options, MIX[i % 3], (i,))
        return sum(len(output.tokens) for output in engine.run())

    device = model.output.weight.device
    jobs = {"nano": lambda: run(16), "nano one by one": lambda: run(1)}
    yield from rows_of(
        "engine",
        "mixed batch of 16",
        "nano",
        take_turns(jobs, rounds, seconds),
        run(16),
        "tokens/s",
        device_name(device),
    )


MIX = ("text", "image", "both")


def image_case(name: str, model: Chameleon, vocab: Vocab, n_codes: int, rounds: int, seconds: float) -> Iterator[Row]:
    """One image with three-way guidance, after a prompt of words and an image; the same without."""
    device = model.output.weight.device
    shown = [vocab.boi, *[vocab.first_code] * n_codes, vocab.eoi]
    prompt = [vocab.bos, *range(vocab.first_text, vocab.first_text + 8), *shown, vocab.boi]

    def run(by_text: float, by_image: float):
        options = SamplingParams(guidance_scale=by_text, image_guidance_scale=by_image, max_new_tokens=n_codes + 1)
        return generate(model, [prompt], vocab, n_codes, options, "image")

    jobs = {"nano": lambda: run(3.0, 1.2), "nano without guidance": lambda: run(1.0, 1.0)}
    taken = take_turns(jobs, rounds, seconds)
    yield from rows_of("engine", f"{name} guided image", "nano", taken, n_codes, "ms a code", device_name(device))


def first_token(name: str, model: Chameleon, vocab: Vocab) -> Row:
    """Seconds from weights that are loaded to the first id, in this process for the first time."""
    start = clock()
    our_ids(Engine(model, vocab, 64, 1, 64), torch.tensor([[vocab.bos, vocab.first_text]]), 1)
    taken = {"nano": clock() - start}
    device = device_name(model.output.weight.device)
    return rows_of("engine", f"{name} start to first token", "nano", taken, 1.0, "ms", device)[0]


def bench(device: torch.device, quick: bool) -> Iterator[Row]:
    if not find_spec("transformers"):
        say("transformers is not installed: skipped")
    rounds, seconds, n = (2, 2.0, 32) if quick else (9, 60.0, 128)
    if device.type == "cpu":
        models = {"5.9M": (random_model(TOY, device, torch.float32), TOY_VOCAB, (1, 16), "tokens/s")}
    else:
        models = {
            name: (random_model(cfg, device, torch.bfloat16), Vocab(), (1, 16), "ms a step")
            for name, cfg in GPU_MODELS.items()
        }
    for name, (model, vocab, batches, unit) in models.items():
        yield first_token(name, model, vocab)
        with torch.no_grad():  # ids that are no text never win, as in a model with a grammar
            model.output.weight[: vocab.first_text] *= 1e-3
        for batch in batches:
            yield from text_case(name, model, vocab, batch, n, unit, rounds, seconds)
        yield from image_case(name, model, vocab, IMAGE_CODES[device.type], rounds, seconds)
        if device.type == "cpu":
            yield from mixed_case(model, vocab, n, rounds, seconds)
