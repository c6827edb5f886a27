"""The exercises of lessons 3 and 4 together are a working model: its logits and its loss are the library's."""

from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st
from solutions import one_stream, one_transformer
from strategies import model_configs

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.losses import next_token_loss
from nanochameleon.packing import Batch, pack
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

VOCAB = Vocab.toy(12, 0)


def random_model(cfg: ModelConfig, seed: int) -> Chameleon:
    """In float64, and every weight is random: norms, biases and the output layer, too."""
    torch.manual_seed(seed)
    model = Chameleon(cfg).double().eval().requires_grad_(False)
    for name, weight in model.named_parameters():
        if "norm" in name:
            torch.nn.init.normal_(weight, float(name.endswith("weight")), 0.3)
        elif name.startswith(("output", "tok_embeddings")):
            torch.nn.init.normal_(weight, std=cfg.dim**-0.5)
    return model


@st.composite
def batches(draw) -> Batch:
    documents = st.lists(st.lists(st.integers(0, VOCAB.size - 1), min_size=1, max_size=9), min_size=1, max_size=8)
    return pack(draw(documents), draw(st.integers(9, 20)), VOCAB.pad)


def assembled_logits(weights: dict[str, torch.Tensor], batch: Batch, cfg: ModelConfig) -> torch.Tensor:
    """(B, T, V), one sequence after the other, from the tokens and where documents are: nothing else of the batch."""
    rows = [
        one_transformer.forward(tokens, weights, one_stream.positions(ids), one_stream.visible(ids), cfg)
        for tokens, ids in zip(batch.tokens, batch.doc_ids, strict=True)
    ]
    return torch.stack(rows)


@given(
    model_configs(VOCAB.size), st.booleans(), batches(), st.integers(0, 2**32 - 1), st.sampled_from([0.0, 1e-5, 0.1])
)
def test_the_solutions_of_lessons_3_and_4_are_the_library_s_model_and_loss(cfg, qk_norm, batch, seed, z_loss):
    model = random_model(replace(cfg, qk_norm=qk_norm), seed)
    weights = dict(model.state_dict())
    logits = assembled_logits(weights, batch, model.cfg)
    library_logits = model.logits(model(batch.tokens, batch.positions, Documents.of(batch.doc_ids)))
    torch.testing.assert_close(logits, library_logits, rtol=1e-9, atol=1e-9)

    pairs = zip(batch.tokens, batch.doc_ids, strict=True)
    targets = torch.cat([one_stream.targets(tokens, ids) for tokens, ids in pairs])
    assert torch.equal(targets, batch.targets.flatten())
    loss = one_stream.loss(logits.flatten(0, 1), targets, z_loss)
    library_loss = next_token_loss(library_logits.flatten(0, 1), targets, VOCAB, z_loss).loss
    torch.testing.assert_close(loss, library_loss, rtol=1e-9, atol=1e-9)


def test_the_assembled_model_learns_as_the_library_does():
    """Their gradients agree, so a training loop could take either."""
    cfg = ModelConfig(vocab_size=VOCAB.size, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8)
    model, batch = random_model(cfg, 0).requires_grad_(), pack([[0, 15, 16, 17], [0, 5, 6]], 9, VOCAB.pad)
    weights = dict(model.named_parameters())
    targets = batch.targets.flatten()
    loss = one_stream.loss(assembled_logits(weights, batch, cfg).flatten(0, 1), targets, 1e-3)
    gradients = torch.autograd.grad(loss, weights.values())
    logits = model.logits(model(batch.tokens, batch.positions, Documents.of(batch.doc_ids)))
    next_token_loss(logits.flatten(0, 1), targets, VOCAB, 1e-3).loss.backward()
    for (name, weight), gradient in zip(weights.items(), gradients, strict=True):
        torch.testing.assert_close(gradient, weight.grad, rtol=1e-7, atol=1e-9, msg=name)
