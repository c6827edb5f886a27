"""The smallest models and the smallest run folder: random weights, 4 codes an image, made in milliseconds."""

import dataclasses
import random
from pathlib import Path

import torch

from nanochameleon.cli import complete
from nanochameleon.config import (
    DataConfig,
    EvalConfig,
    ModelConfig,
    OptimConfig,
    RunConfig,
    SamplingParams,
    TokenizerTraining,
    TrainConfig,
    VQGANConfig,
)
from nanochameleon.convert import Args, write_nano
from nanochameleon.generation.sampling import MODALITIES
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.training import checkpoint
from nanochameleon.training.run import CONFIG, IMAGE_TOKENIZER, TEXT_TOKENIZER, config_to_json
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab
from nanochameleon.weights.read_layouts import ModelFiles
from nanochameleon.weights.tensor_files import LazyTensors
from nanochameleon.weights.tokenizer_json import save_text_tokenizer, to_json

VOCAB = Vocab.toy(8, 4)
N_CODES = 4  # an image
TOKENIZER = TextTokenizer([(b"a", b" "), (b"r", b"e"), (b"re", b"d"), (b"t", b"a")], VOCAB)
TINY_VQGAN = VQGANConfig(
    resolution=4, ch=8, ch_mult=(1, 2), n_res_blocks=1, z_channels=4, embed_dim=4, n_codes=8, n_groups=4,
    mid_attention=False,
)  # fmt: skip
TINY_MODEL = ModelConfig(vocab_size=VOCAB.size, dim=16, n_layers=2, n_heads=2, multiple_of=8, max_seq_len=64)


def tiny_model(seed: int = 0, **changes) -> Chameleon:
    """A random model in eval mode whose logits are far from uniform: the output layer, zero at the start of training,
    is random too. `changes` are fields of ModelConfig."""
    torch.manual_seed(seed)
    model = Chameleon(dataclasses.replace(TINY_MODEL, **changes))
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model.eval()


def random_request(rng: random.Random) -> tuple[list[int], SamplingParams, str, tuple[int, ...] | None]:
    """Any prompt, params, modality and stops, with room for an image."""
    prompt = [VOCAB.bos] + [rng.randrange(VOCAB.first_text, VOCAB.size) for _ in range(rng.randrange(20))]
    if rng.random() < 0.3:
        prompt += [VOCAB.boi, *(VOCAB.code_to_token(rng.randrange(8)) for _ in range(rng.randrange(N_CODES)))]
    shares, scales, heat = [0.3, 0.9, 1.0], [0.0, 1.0, 1.2, 3.0], [0.0, 0.7, 1.3, 100.0]
    text, image = (
        (rng.choice(heat), rng.choice(shares), rng.choice([None, 1, 5]), rng.choice([0.0, 0.05])) for _ in range(2)
    )
    penalty, most = rng.choice([1.0, 1.2, 0.8]), rng.randrange(N_CODES + 2, 30)
    params = SamplingParams(*text, penalty, *image, rng.choice(scales), rng.choice(scales), most)
    return prompt, params, rng.choice(MODALITIES), rng.choice([None, (VOCAB.eos, VOCAB.eot)])


def tiny_config(**changes) -> RunConfig:
    sample = SamplingParams(max_new_tokens=16)
    return dataclasses.replace(RunConfig("tiny", TINY_VQGAN, TINY_MODEL, OptimConfig(), sample=sample), **changes)


def tiny_run(folder: Path, model: Chameleon | None = None, source: str = "shapes") -> Path:
    """Writes a whole run folder, untrained, and returns it."""
    model = model or tiny_model()
    cfg = tiny_config(model=model.cfg, data=DataConfig(source=source))
    torch.manual_seed(0)
    vqgan = VQGAN(cfg.vqgan)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / CONFIG).write_text(config_to_json(cfg))
    save_text_tokenizer(TOKENIZER, folder / TEXT_TOKENIZER)
    checkpoint.save(folder / IMAGE_TOKENIZER, 1, {"model": vqgan.state_dict()}, {})
    checkpoint.save(folder, 1, {"weights": model.state_dict()}, {})
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Models as they are released: norms away from 1 and 0, an image tokenizer with the release's 32 groups

RELEASED_VQGAN = VQGANConfig(
    resolution=8, ch=32, ch_mult=(1, 2), n_res_blocks=1, z_channels=6, embed_dim=5, n_codes=8
)  # fmt: skip


def released_model(seed: int = 0, dtype: torch.dtype = torch.float32, **changes) -> Chameleon:
    """`changes` are fields of ModelConfig; every tensor is random, norms too."""
    model = tiny_model(seed, **changes)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(parameter, float(name.endswith("weight")), 0.3)
    return model.to(dtype)


def in_memory(model: Chameleon, vqgan: VQGAN, tokenizer: TextTokenizer = TOKENIZER) -> ModelFiles:
    """As open_model_files would give it."""
    weights, vq = ({k: x.detach() for k, x in net.state_dict().items()} for net in (model, vqgan))
    described = [LazyTensors({k: x.to("meta") for k, x in each.items()}, each.__getitem__) for each in (weights, vq)]
    return ModelFiles("nano", model.cfg, vqgan.cfg, to_json(tokenizer), *described)


def nano_folder(folder: Path, model: Chameleon | None = None, vqgan: VQGAN | None = None, **more) -> Path:
    """Writes a model in our layout and returns its folder."""
    torch.manual_seed(1)
    parts = in_memory(model or released_model(), vqgan or VQGAN(RELEASED_VQGAN), **more)
    folder.mkdir(parents=True)
    write_nano(parts, folder, parts.weights.get, Args(folder, folder, "nano"))
    return folder


# ---------------------------------------------------------------------------------------------------------------------
# Training

SHAPES_VQGAN = VQGANConfig(
    resolution=32, ch=4, ch_mult=(1, 1, 1, 1), n_res_blocks=1, z_channels=4, embed_dim=4, n_codes=16, n_groups=2,
    mid_attention=False,
)  # fmt: skip


def training_config(out: Path, **changes) -> RunConfig:
    """A run on the shapes world of a few steps, with everything on whose state a resumed run needs: dropout, momentum,
    moving averages, the adversary. `changes` are fields of RunConfig."""
    optim = OptimConfig("muon", lr=3e-3, eps=1e-8, warmup_steps=2, schedule="cosine")
    cfg = RunConfig(
        "tiny", SHAPES_VQGAN, ModelConfig(dim=16, n_layers=1, n_heads=2, multiple_of=8, dropout=0.1), optim,
        tokenizers=TokenizerTraining(
            n_merges=64, n_texts=200, steps=6, batch_size=2, warmup_steps=2, optim=optim, disc_weight=0.1,
            disc_start=3, disc_channels=4,
        ),
        train=TrainConfig(
            steps=12, batch_size=2, seq_len=192, precision="fp32", log_every=5, sample_every=8, save_every=5,
            image_loss="drawn", image_token_noise=0.5, image_token_noise_end=0.1,
        ),
        sample=SamplingParams(max_new_tokens=16), evaluation=EvalConfig(4, 4, 4), out=out, device="cpu",
    )  # fmt: skip
    return complete(dataclasses.replace(cfg, **changes))
