"""Our export in Meta's layout, read by transformers' own conversion script.

    python -m venv peer && peer/bin/pip install transformers==4.46.3 accelerate==1.1.1 requests pillow
    python tests/peers/conversion_script.py peer/bin/python

The script (models/chameleon/convert_chameleon_weights_to_hf.py, last in transformers 4.46.3) runs unchanged up to the
end of its conversion. It asks for 65,536 tokens and 1 shard ("7B") or 4 ("30B"). Its formulas for grouped queries hold
only for n_heads = n_kv_heads^2, so the small models here have those sizes. Once its files are written it downloads an
image to try the model on. It is ended there, since that part of 4.46.3 fails in any case: it gives the processor
`images` twice (TypeError).
"""

import dataclasses
import json
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

import torch
from safetensors.torch import load_file

from nanochameleon.config import ModelConfig, VQGANConfig
from nanochameleon.convert import Args, convert
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.text_tokenizer import TextTokenizer
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab
from nanochameleon.weights.layout_configs import model_from_hf
from nanochameleon.weights.model_folder import open_model_files

sys.path.insert(0, str(Path(__file__).parents[1]))
from tiny import nano_folder

SCRIPT = """
    import runpy, sys
    import requests

    requests.get = lambda *words, **more: sys.exit(0)  # its files are written
    name = "transformers.models.chameleon.convert_chameleon_weights_to_hf"
    sys.argv = [name, "--input_dir", sys.argv[1], "--model_size", sys.argv[2], "--output_dir", sys.argv[3]]
    runpy.run_module(name, run_name="__main__")
"""
LOGITS = """
    import sys, torch, transformers
    from transformers import ChameleonForConditionalGeneration

    model = ChameleonForConditionalGeneration.from_pretrained(sys.argv[1]).double().eval()
    tokens = torch.load(sys.argv[2])
    with torch.no_grad():
        torch.save(model(tokens).logits, sys.argv[3])
    print(transformers.__version__)
"""
VQ = VQGANConfig(ch=32, n_res_blocks=1)
MODELS = {
    "7B": ModelConfig(dim=64, n_layers=2, n_heads=4, multiple_of=8),
    "30B": ModelConfig(
        dim=128, n_layers=2, n_heads=16, n_kv_heads=4, qk_norm_groups=4, norm_order="post", multiple_of=8
    ),
}


def run(python: str, code: str, *words: object) -> str:
    command = [python, "-c", textwrap.dedent(code), *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[3:]} failed:\n{done.stderr[-3_000:]}")
    return done.stdout


def random_model(cfg: ModelConfig) -> Chameleon:
    torch.manual_seed(0)
    model = Chameleon(cfg)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, float(name.endswith("weight")), 0.3)
    torch.nn.init.normal_(model.output.weight, std=0.5)
    return model


def check(size: str, python: str, place: Path) -> bool:
    """Compare the script's tensors with our own export bit by bit, and its model's text logits with ours."""
    model, vqgan, tokenizer = random_model(MODELS[size]), VQGAN(VQ), TextTokenizer([], Vocab())
    nano = nano_folder(place / "nano", model, vqgan, tokenizer=tokenizer)
    meta, hf = (convert(Args(nano, place / to, to)) for to in ("meta", "hf"))
    (meta / "models" / "nano").rename(meta / "models" / size.lower())
    run(python, SCRIPT, meta, size, place / "peer")
    ours, peers = load_file(hf / "model.safetensors"), load_file(place / "peer" / "model.safetensors")
    equal = ours.keys() == peers.keys() and all(torch.equal(ours[name], peers[name]) for name in ours)
    tokens = torch.randint(0, 65_536, (1, 20))
    torch.save(tokens, place / "tokens.pt")
    version = run(python, LOGITS, place / "peer", place / "tokens.pt", place / "logits.pt").strip()
    text = slice(Vocab().first_text, None)
    with torch.no_grad():
        logits = model.double().logits(model(tokens))[..., text]
    error = float((logits - torch.load(place / "logits.pt")[..., text]).abs().max() / logits.abs().max())
    read = open_model_files(place / "peer")
    config = json.loads((place / "peer" / "config.json").read_text())
    sizes = dataclasses.replace(model_from_hf(config), multiple_of=8, qk_norm_groups=MODELS[size].qk_norm_groups)
    same = sizes == MODELS[size] and read.vqgan == VQ and read.tokenizers.text().vocab == Vocab()
    print(f"{size}, transformers {version}: {len(peers)} tensors {'equal' if equal else 'DIFFER'} to our export,")
    print(f"  logits within {error:.2g} (its norms are float32), its folder {'read' if same else 'NOT READ'} by us")
    return equal and same and error < 1e-5


def main() -> int:
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    with tempfile.TemporaryDirectory() as name:
        return int(not all([check(size, sys.argv[1], Path(name) / size) for size in MODELS]))


if __name__ == "__main__":
    sys.exit(main())
