"""What is watched while a model is trained is what it says it is."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotation import rotated, rotated_pairs
from strategies import model_configs
from tiny import TINY_MODEL, VOCAB, tiny_model
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.packing import pack
from nanochameleon.training.diagnostics import gradient_norms, largest_logit, local_max_logits
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Chameleon, compute_freqs_cis


def by_hand(model: Chameleon, batch) -> list[float]:
    """Layer by layer, head by head, pair by pair, from the definition."""
    cfg, x = model.cfg, model.tok_embeddings(batch.tokens)
    table, peaks, branch = compute_freqs_cis(batch.positions, cfg.head_dim, cfg.rope_theta), [], None
    for block in model.layers:
        a, stream = block.attention, x if branch is None else x + branch
        read = block.attention_norm(stream) if cfg.norm_order == "pre" else stream
        q, k = a.wq(read).unflatten(-1, (-1, cfg.head_dim)), a.wk(read).unflatten(-1, (-1, cfg.head_dim))
        q, k = a.q_norm(q), a.k_norm(k)
        q, k = (rotated_pairs(y, table[:, 0, :, None]) for y in (q, k))
        peak = -math.inf
        for row, docs in enumerate(batch.doc_ids.tolist()):
            pairs = [(i, j) for j in range(len(docs)) for i in range(j + 1) if docs[i] == docs[j]]
            for s, t in pairs:
                for head in range(cfg.n_heads):
                    pair = q[row, t, head] * k[row, s, head * cfg.kv_heads // cfg.n_heads].conj()
                    peak = max(peak, pair.real.sum().item() / math.sqrt(cfg.head_dim))
        peaks.append(peak)
        x, branch = block(x, branch, table, Documents.of(batch.doc_ids), None, None)
    return peaks


@given(model_configs(vocab_size=VOCAB.size), st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(0, 9))
@settings(max_examples=12)
def test_attention_logits_are_the_largest_scores_that_a_query_sees(cfg, lengths, seed):
    torch.manual_seed(seed)
    model = Chameleon(cfg).eval()
    for name, parameter in model.named_parameters():
        if "_norm" in name:
            torch.nn.init.normal_(parameter, 1.0, 0.5)
    docs = [torch.randint(VOCAB.size, (n,)).tolist() for n in lengths]
    batch = pack(docs, max(lengths) + 2, VOCAB.pad)
    with torch.no_grad(), use_kernels("reference"):
        expected = by_hand(model, batch)
        found = local_max_logits(Objective(model, VOCAB, "fp32"), batch, None)
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)


def test_without_qk_norm_the_logits_grow_with_the_weights_and_with_it_they_do_not():
    batch = pack([[0, 20, 30, 40, 25]], 5, VOCAB.pad)
    for normed, factor in ((False, 9.0), (True, 1.0)):
        model = tiny_model(qk_norm=normed, n_layers=1)
        before = local_max_logits(Objective(model, VOCAB, "fp32"), batch, None)
        for weight in (model.layers[0].attention.wq.weight, model.layers[0].attention.wk.weight):
            weight.data.mul_(3.0)
        after = local_max_logits(Objective(model, VOCAB, "fp32"), batch, None)
        assert after[0] == pytest.approx(factor * before[0], rel=1e-3)
        assert not model.layers[0].attention._forward_pre_hooks


@torch.no_grad()
def test_under_autocast_scores_are_float32_and_of_one_key_head_at_a_time():
    attention, (b, t, d) = tiny_model(n_heads=4, n_kv_heads=2).layers[0].attention, (1, 40, TINY_MODEL.dim)
    torch.nn.init.normal_(attention.q_norm.weight, 0, 3)  # scores that bfloat16 would round
    x, freqs_cis = torch.randn(b, t, d), compute_freqs_cis(torch.arange(t)[None], attention.head_dim, 10_000.0)
    documents, sizes = Documents.of(torch.zeros(b, t, dtype=torch.long)), []

    class Sizes(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(y.numel() for y in pytree.tree_leaves(out) if isinstance(y, torch.Tensor))
            return out

    with torch.autocast("cpu", torch.bfloat16):
        q, k = (w(x).unflatten(-1, (-1, attention.head_dim)) for w in (attention.wq, attention.wk))
        q, k = (rotated(y, freqs_cis[:, 0, :, None]).double() for y in (attention.q_norm(q), attention.k_norm(k)))
        with Sizes():
            found = largest_logit(attention, x, freqs_cis, documents)
    scores = torch.einsum("bihe,bjhe->bhij", q, k.repeat_interleave(2, 2)) / attention.head_dim**0.5
    expected = scores[torch.ones(t, t, dtype=torch.bool).tril().expand(b, 4, t, t)].max().item()
    assert found.item() == pytest.approx(expected, rel=1e-5) and max(sizes) <= max(b * 2 * t * t, b * t * d)


def test_gradient_norms_are_of_each_modality_s_rows():
    model, vocab = tiny_model(), VOCAB
    docs = [[0, 20, 30, vocab.boi, 4, 5, 6, 7, vocab.eoi, 25, 2]]
    sums = Objective(model, vocab, "fp32")(pack(docs, 11, vocab.pad), None, 1e-5)
    sums.next_token.loss.backward()
    found = gradient_norms(model, vocab)
    squares = model.tok_embeddings.weight.grad.square().sum(1) + model.output.weight.grad.square().sum(1)
    kinds = [vocab.modality(i) for i in range(vocab.size)]
    for name, kind in (("grad_norm_text", "text"), ("grad_norm_image", "image")):
        expected = math.sqrt(sum(float(s) for s, k in zip(squares, kinds, strict=True) if k == kind))
        assert found[name] == pytest.approx(expected, rel=1e-5) and found[name] > 0
