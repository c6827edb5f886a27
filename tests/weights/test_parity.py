"""Our numbers equal those of transformers' Chameleon, on random models in its layout. transformers is for tests only.

Its RMSNorm computes in float32 whatever the model's type, and its forward pass sets the logits of image codes to the
least number; both are bypassed where that is said. Everything else is transformers as it comes.
"""

import dataclasses

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from strategies import model_configs
from tiny import RELEASED_VQGAN, TOKENIZER, VOCAB, nano_folder, released_model
from transformers import ChameleonConfig, ChameleonForConditionalGeneration, ChameleonProcessor
from transformers.models.chameleon import modeling_chameleon
from transformers.models.chameleon.image_processing_pil_chameleon import ChameleonImageProcessorPil

from nanochameleon.config import ModelConfig, SamplingParams
from nanochameleon.convert import Args, convert
from nanochameleon.documents import Image as Codes
from nanochameleon.documents import Text, render
from nanochameleon.generation.engine import generate
from nanochameleon.images.tokenizer import preprocess, to_pixels
from nanochameleon.images.vqgan import VQGAN
from nanochameleon.losses import next_token_loss
from nanochameleon.transformer import Chameleon
from nanochameleon.weights import layouts
from nanochameleon.weights.layout_configs import hf_config
from nanochameleon.weights.layout_tokenizer import tokenizer_to_hf, vocabulary_map
from nanochameleon.weights.model_folder import open_model
from nanochameleon.weights.tokenizer_json import to_json

NAMES = vocabulary_map(tokenizer_to_hf(to_json(TOKENIZER), VOCAB))


def theirs(model: Chameleon, vqgan: VQGAN) -> ChameleonForConditionalGeneration:
    """The same model in transformers, through layouts.py alone."""
    dtype = str(model.output.weight.dtype).removeprefix("torch.")
    hf = ChameleonForConditionalGeneration(ChameleonConfig(**hf_config(model.cfg, vqgan.cfg, VOCAB, NAMES, dtype)))
    state = {layouts.names_of(k).hf: layouts.to_hf(k, x, model.cfg) for k, x in model.state_dict().items()}
    vq = {f"{layouts.VQ_PREFIX}{k}": x for k, x in vqgan.state_dict().items() if not k.startswith(layouts.DECODER)}
    hf.load_state_dict(state | vq)
    return hf.to(model.output.weight.dtype).eval()


def rms_norm(self, x: torch.Tensor) -> torch.Tensor:
    return F.rms_norm(x, x.shape[-1:], self.weight, self.variance_epsilon)


@pytest.fixture(scope="module")
def vqgan() -> VQGAN:
    torch.manual_seed(0)
    return VQGAN(RELEASED_VQGAN).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory, vqgan):
    """Our own export in Hugging Face's layout, with GQA, two groups of QK-norm and norms after the branches."""
    place = tmp_path_factory.mktemp("parity")
    model = released_model(dim=24, n_heads=4, n_kv_heads=2, qk_norm_groups=2, norm_order="post")
    return convert(Args(nano_folder(place / "nano", model, vqgan), place / "hf", "hf"))


# ---------------------------------------------------------------------------------------------------------------------
# The transformer


@settings(max_examples=25)
@given(model_configs(VOCAB.size), st.integers(0, 999), st.integers(1, 40))
def test_hidden_states_and_text_logits_are_equal(vqgan, cfg, seed, length):
    model = released_model(seed, torch.float64, **dataclasses.asdict(cfg))
    ids = torch.randint(0, VOCAB.size, (2, length), generator=torch.Generator().manual_seed(seed))
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(modeling_chameleon.ChameleonRMSNorm, "forward", rms_norm)
        out = theirs(model, vqgan)(ids, output_hidden_states=True)
        hidden = model(ids)
    torch.testing.assert_close(hidden, out.hidden_states[-1], rtol=0, atol=1e-9)
    text = slice(VOCAB.first_text, None)
    torch.testing.assert_close(model.logits(hidden)[..., text], out.logits[..., text], rtol=0, atol=1e-9)
    masked = out.logits[..., VOCAB.first_code : VOCAB.eoi]  # why only text columns can be compared
    assert (masked == torch.finfo(torch.float64).min).all()


def test_without_bypassing_anything_they_agree_to_float32(folder):
    hf = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    model, ids = open_model(folder, "cpu").model, torch.randint(0, VOCAB.size, (2, 30))
    with torch.no_grad():
        ours, other = model(ids), hf.model(ids).last_hidden_state
    assert hf.dtype == torch.float32 and (ours - other).abs().max() < 1e-4 * other.abs().max()


@pytest.mark.parametrize("seed", range(3))
def test_greedy_text_is_the_same_ids(vqgan, seed):
    model = released_model(seed, torch.float64, dim=24, n_heads=4, n_kv_heads=2, qk_norm_groups=2)
    prompts = [[VOCAB.bos, *TOKENIZER.encode(text)] for text in ("a red", "ta", "re re re")]
    greedy = SamplingParams(temperature=0, max_new_tokens=20, repetition_penalty=1.0)
    ours = generate(model, prompts, VOCAB, 16, greedy, "text", seed=0)
    hf, never = theirs(model, vqgan), [i for i in range(VOCAB.first_text) if i != VOCAB.eos]
    settings = dict(do_sample=False, max_new_tokens=20, suppress_tokens=never, bos_token_id=0, eos_token_id=2)
    for prompt, row in zip(prompts, ours, strict=True):
        out = hf.generate(torch.tensor([prompt]), pad_token_id=1, use_cache=True, **settings)
        assert out[0, len(prompt) :].tolist() == list(row)


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_five_steps_of_training_have_the_same_losses(vqgan, norm_order):
    """A QK-norm vector for every head, since transformers trains those apart. Image tokens are targets, too."""
    cfg = dict(dim=24, n_heads=4, qk_norm_groups=4, norm_order=norm_order)
    model = released_model(0, torch.float64, **cfg)
    ids = torch.randint(2, VOCAB.size, (3, 24), generator=torch.Generator().manual_seed(0))
    ids[:, 4:12] = torch.arange(VOCAB.first_code, VOCAB.eoi)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_chameleon.ChameleonRMSNorm, "forward", rms_norm)
        hf = theirs(model, vqgan)
        hf.model.vocabulary_mapping.image_tokens = []  # whose logits it would set to the least number
        hf.model.vqmodel.requires_grad_(False)
        optimizers = [torch.optim.AdamW(m.parameters(), lr=1e-2, weight_decay=0.0) for m in (model, hf)]
        losses = []
        for _ in range(5):
            targets = ids[:, 1:].flatten()
            sums = next_token_loss(
                model.logits(model(ids))[:, :-1].flatten(0, 1), targets, VOCAB, normalizer=targets.numel()
            )
            logits = hf(ids).logits  # its own loss computes in float32
            pair = sums.loss, F.cross_entropy(logits[:, :-1].flatten(0, 1), targets)
            own = hf(ids, labels=ids).loss
            assert abs(float(own.detach()) - float(pair[1].detach())) < 1e-5
            for optimizer, loss in zip(optimizers, pair, strict=True):
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
            losses.append([float(loss.detach()) for loss in pair])
    ours, other = zip(*losses, strict=True)
    assert ours == pytest.approx(other, abs=1e-6) and ours[-1] < ours[0] - 0.1


# ---------------------------------------------------------------------------------------------------------------------
# Images


def test_codes_are_the_same_and_decode_to_the_same_pixels(folder, vqgan):
    hf = ChameleonForConditionalGeneration.from_pretrained(folder).eval()
    pixels = torch.rand(6, 3, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        codes = hf.model.vqmodel.encode(pixels, return_dict=True).image_tokens.view(6, -1)
        assert torch.equal(codes, vqgan.encode(pixels)) and len(codes.unique()) > 1
        again = open_model(folder, "cpu").image_tokenizer.vqgan  # with the decoder that lies beside transformers' files
        torch.testing.assert_close(again.decode(codes), vqgan(pixels)[0], rtol=0, atol=1e-5)
    assert torch.equal(hf.model.get_image_tokens(pixels), VOCAB.code_to_token(codes).to(torch.int))


@pytest.mark.parametrize("size", [(8, 8), (16, 16), (24, 8), (64, 128), (40, 20)])
def test_pixels_are_the_same_with_its_rescale_and_ours_are_exact(folder, size):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8))
    ours = preprocess(image, 8, "crop")[None]
    shape = dict(size={"shortest_edge": 8}, crop_size={"height": 8, "width": 8})
    default = ChameleonImageProcessorPil(**shape)(image, return_tensors="pt")["pixel_values"]
    exported = ChameleonProcessor.from_pretrained(folder).image_processor(image, return_tensors="pt")["pixel_values"]
    allowed = 1e-5 if size[0] == size[1] else 1.01 * 2 / 255  # ours resizes the middle alone: one level, by rounding
    of_bytes = torch.tensor(ours).permute(0, 3, 1, 2).float()
    assert (of_bytes * 0.0078 - 1 - default).abs().max() < allowed  # where white is 0.989
    assert (to_pixels(ours) - exported).abs().max() < allowed
    white = np.full((1, 2, 2, 3), 255, np.uint8)
    assert to_pixels(white).unique().tolist() == [1.0]


def test_its_processor_reads_our_tokenizer_and_makes_our_ids(folder):
    processor = ChameleonProcessor.from_pretrained(folder)
    image = Image.fromarray(np.zeros((8, 8, 3), np.uint8))
    text, codes = ("a red", "ta re"), Codes(tuple(range(8)) * 2)
    ids = processor(images=[image], text="<image>".join(text), return_tensors="pt")["input_ids"][0].tolist()
    ours = render([Text(text[0]), codes, Text(text[1])], TOKENIZER, VOCAB, end=False)
    placeholders = [VOCAB.eot + 1 if VOCAB.is_image(np.array(i)) else i for i in ours]
    assert ids == [*placeholders, VOCAB.eot]
    assert processor.decode(ids, skip_special_tokens=True) == "a redta re"


def test_the_released_sizes_are_transformers_defaults():
    theirs, ours = ChameleonConfig(), ModelConfig()
    assert (theirs.hidden_size, theirs.intermediate_size, theirs.vocab_size) == (
        ours.dim,
        ours.ffn_dim,
        ours.vocab_size,
    )
    assert (theirs.bos_token_id, theirs.eos_token_id) == (1, 2)  # its trap: bos is 0, so our export says so
