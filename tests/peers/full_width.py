"""Compare a layer of the 7B and of the 34B in full width, and the image tokenizer in full size, with transformers.

    python tests/peers/full_width.py            about 6 GB of memory and some minutes on two cores

This is too large for `make test`. It prints a line for each and exits with 1 if one exceeds its bound.
"""

import dataclasses
import sys
import tempfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from transformers import ChameleonConfig
from transformers.models.chameleon import modeling_chameleon as hf

sys.path.insert(0, str(Path(__file__).parents[1]))

from tiny import nano_folder, released_model

from nanochameleon.convert import Args, convert
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.presets import chameleon_7b, chameleon_34b
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon, compute_freqs_cis
from nanochameleon.vocab import Vocab
from nanochameleon.weights import layouts
from nanochameleon.weights.layout_configs import hf_config
from nanochameleon.weights.model_folder import open_model

LENGTH = 64


@torch.no_grad()
def layer(cfg) -> float:
    """Return the largest difference from transformers' output of one layer, relative to the largest output."""
    torch.manual_seed(0)
    cfg = dataclasses.replace(cfg, n_layers=1, dropout=0.0)
    with torch.device("meta"):
        block = Chameleon(cfg).layers[0]
    block.to_empty(device="cpu")
    for name, weight in block.named_parameters():
        if "norm" in name:
            weight.normal_(float(name.endswith("weight")), 0.3)
        else:
            weight.uniform_(-1, 1).mul_((3 / weight.shape[1]) ** 0.5)
    config = ChameleonConfig(**hf_config(cfg, chameleon_7b().vqgan, Vocab(), {}, "float32"))
    config._attn_implementation = "sdpa"
    kind = hf.ChameleonSwinDecoderLayer if cfg.norm_order == "post" else hf.ChameleonDecoderLayer
    with torch.device("meta"):
        theirs = kind(config, 0)
    named = {f"layers.0.{name}": weight for name, weight in block.state_dict().items()}
    state = {layouts.names_of(n).hf.removeprefix("model.layers.0."): layouts.to_hf(n, x, cfg) for n, x in named.items()}
    theirs.load_state_dict(state, assign=True)
    x, positions = torch.randn(1, LENGTH, cfg.dim), torch.arange(LENGTH)[None]
    freqs_cis = compute_freqs_cis(positions, cfg.head_dim, cfg.rope_theta)
    stream, branch = block(x, None, freqs_cis, None, None, None)
    ours = stream if branch is None else stream + branch
    embeddings = hf.ChameleonRotaryEmbedding(config)(x, positions)
    other = theirs(x, attention_mask=None, position_ids=positions, position_embeddings=embeddings)[0]
    return float((ours - other).abs().max() / other.abs().max())


@torch.no_grad()
def image_tokenizer() -> tuple[bool, float]:
    """Whether the codes of an image are equal, and the largest difference of the pixels decoded from them.

    Compares transformers' encoder with the weights of our export, and the decoder that open_model finds next to them,
    with our own."""
    torch.manual_seed(0)
    cfg = chameleon_7b().vqgan
    vqgan = VQGAN(cfg).eval()
    torch.nn.init.normal_(vqgan.quantize.embedding.weight)
    with tempfile.TemporaryDirectory() as place:
        tokenizer = TextTokenizer([], Vocab.toy(cfg.n_codes, 0))
        model = released_model(vocab_size=tokenizer.vocab.size)
        nano = nano_folder(Path(place) / "nano", model, vqgan, tokenizer=tokenizer)
        export = convert(Args(nano, Path(place) / "hf", "hf"))
        config = ChameleonConfig.from_pretrained(export)
        files = load_file(export / "model.safetensors")
        again = open_model(export, "cpu").image_tokenizer.vqgan
    theirs = hf.ChameleonVQVAE._from_config(config.vq_config).eval()
    prefix = layouts.VQ_PREFIX
    theirs.load_state_dict({name.removeprefix(prefix): x for name, x in files.items() if name.startswith(prefix)})
    pixels = torch.nn.functional.interpolate(torch.rand(1, 3, 40, 40) * 2 - 1, size=cfg.resolution, mode="bicubic")
    codes = theirs.encode(pixels.clone(), return_dict=True).image_tokens.view(1, -1)
    mine = vqgan.encode(pixels)
    print(f"{len(mine.unique())} different codes of {mine.numel()}")
    return torch.equal(codes, mine), float((again.decode(codes) - vqgan.decode(mine)).abs().max())


def main() -> int:
    bad = 0
    for preset in (chameleon_7b, chameleon_34b):
        error = layer(preset().model)
        bad += not error < 1e-4
        print(f"one layer of {preset.__name__}, float32, {LENGTH} tokens: relative difference {error:.2g} (bound 1e-4)")
    equal, pixels = image_tokenizer()
    bad += not (equal and pixels < 1e-5)
    print(f"image tokenizer, 512 pixels: codes {'equal' if equal else 'DIFFER'}, pixels {pixels:.2g} (bound 1e-5)")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
