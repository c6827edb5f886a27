"""The transformer: the paper's sizes, causality, the cache, and what each part of the stability recipe promises."""

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rotation import rotated
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.aot_autograd import make_boxed_func

from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import complex_product, real_product
from nanochameleon.kernels.block.dropout import fold_in
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.packing import pack
from nanochameleon.transformer import Chameleon, KVCache, QKNorm, apply_rotary_emb, compute_freqs_cis

TINY = ModelConfig(vocab_size=40, dim=16, n_layers=2, n_heads=4, n_kv_heads=2, multiple_of=8, norm_eps=1e-5)


def random_model(seed: int = 0, cfg: ModelConfig = TINY, **changes) -> Chameleon:
    """A float64 model in eval mode with every parameter random, even norms and the output layer, which starts at 0."""
    torch.manual_seed(seed)
    model = Chameleon(dataclasses.replace(cfg, **changes)).double().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.add_(0.3 * torch.randn_like(parameter))
            elif name.startswith(("output", "tok_embeddings")):
                parameter.normal_()
            else:
                parameter.mul_(2)
    return model


def tokens(seed: int, *shape: int) -> torch.Tensor:
    return torch.randint(40, shape, generator=torch.Generator().manual_seed(seed))


# ---------------------------------------------------------------------------------------------------------------------
# Sizes and initialization

SIZES = {
    "7B": (ModelConfig(), 11_008, 7_013_158_912),
    "34B": (
        ModelConfig(dim=8_192, n_layers=48, n_heads=64, n_kv_heads=8, norm_order="post", qk_norm_groups=4),
        22_016,
        34_293_522_432,
    ),
}


SEEDS = st.integers(0, 2**32 - 1)


@given(SEEDS, SEEDS, st.sampled_from(["tok_embeddings.weight", "layers.0.attention.wq.weight"]))
def test_two_seeds_give_two_models_and_one_seed_always_the_same(one, other, name):
    with torch.device("meta"):
        model = Chameleon(TINY)
    shape, cpu = model.get_parameter(name).shape, torch.device("cpu")
    first, second, again = (model.init_tensor(name, shape, seed, cpu) for seed in (one, other, one))
    assert torch.equal(first, again) and torch.equal(first, second) == (one == other)


def test_no_two_matrices_have_the_same_initial_values():
    with torch.device("meta"):
        model = Chameleon(TINY)
    names = [name for name, p in model.named_parameters() if p.ndim == 2]
    drawn = [name for name in names if not name.startswith("output") and "norm" not in name]
    signs = [model.init_tensor(name, torch.Size([8, 8]), 1, torch.device("cpu")).sign().flatten() for name in drawn]
    assert len({tuple(x.tolist()) for x in signs}) == len(drawn)


@pytest.mark.parametrize("size", SIZES)
def test_the_paper_s_sizes(size):
    cfg, ffn_dim, parameters = SIZES[size]
    with torch.device("meta"):
        model = Chameleon(cfg)
    assert cfg.head_dim == 128 and cfg.ffn_dim == ffn_dim == model.layers[0].feed_forward.w1.out_features
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_the_first_loss_is_log_vocab_size():
    model = Chameleon(TINY)
    logits = model.logits(model(tokens(0, 3, 8))).flatten(0, 1)
    assert torch.nn.functional.cross_entropy(logits, tokens(1, 24)).item() == pytest.approx(math.log(40), abs=1e-6)


def test_initial_values_follow_the_table_of_init_tensor():
    torch.manual_seed(0)
    cfg = ModelConfig(vocab_size=500, dim=128, n_layers=3, n_heads=4, n_kv_heads=2, multiple_of=8)
    for name, parameter in Chameleon(cfg).named_parameters():
        if "norm" in name:
            assert torch.equal(parameter, torch.full_like(parameter, 0.0 if name.endswith("bias") else 1.0))
            continue
        fan_in = cfg.ffn_dim if "w2" in name else cfg.dim
        std = {"output.weight": 0.0, "tok_embeddings.weight": 0.02}.get(name, fan_in**-0.5)
        if name.endswith(("wo.weight", "w2.weight")):
            std /= math.sqrt(2 * cfg.n_layers)
        assert parameter.std().item() == pytest.approx(std, rel=0.03), name


@pytest.mark.parametrize(
    "changes", [dict(n_heads=3), dict(n_kv_heads=3), dict(qk_norm_groups=4), dict(dim=12, n_kv_heads=4)]
)
def test_sizes_that_do_not_divide_are_refused(changes):
    with pytest.raises(ValueError, match="multiple"):
        dataclasses.replace(TINY, **changes)


# ---------------------------------------------------------------------------------------------------------------------
# Causality, documents, cache


@given(st.integers(0, 1_000), st.integers(2, 9), st.booleans(), st.data())
def test_causality_by_gradient(seed, n, with_mask, data):
    """The state at t depends on every token up to t and on none after it: exactly zero, not small."""
    t, model = data.draw(st.integers(0, n - 1)), random_model(seed)
    embedded = []
    model.tok_embeddings.register_forward_hook(lambda module, inputs, out: embedded.append(out))
    hidden = model(
        tokens(seed, 1, n), documents=Documents.of(torch.zeros(1, n, dtype=torch.long)) if with_mask else None
    )
    (gradient,) = torch.autograd.grad((hidden[0, t] * torch.randn_like(hidden[0, t])).sum(), embedded[0])
    size = gradient[0].abs().sum(-1)
    assert (size[t + 1 :] == 0).all() and (size[: t + 1] > 0).all()


@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=5), st.integers(7, 16), st.integers(0, 1_000),
    st.sampled_from(["pre", "post"]),
)  # fmt: skip
def test_a_packed_sequence_equals_its_documents_alone(lengths, seq_len, seed, norm_order):
    model = random_model(seed, norm_order=norm_order)
    docs = [(tokens(seed + i, n) % 38 + 2).tolist() for i, n in enumerate(lengths)]
    batch = pack(docs, seq_len, pad=1)
    hidden = model(batch.tokens, batch.positions, Documents.of(batch.doc_ids))
    found = [
        (batch.tokens[row][mine].tolist(), hidden[row][mine])
        for row in range(len(hidden))
        for number in range(int(batch.doc_ids[row].max()) + 1)
        if (mine := batch.doc_ids[row] == number).any()
    ]
    assert sorted(ids for ids, _ in found) == sorted(docs)
    for ids, packed in found:
        torch.testing.assert_close(packed, model(torch.tensor([ids]))[0], rtol=1e-9, atol=1e-10)
    assert hidden.isfinite().all()  # padding too: NaN there would reach every weight by the gradient


@settings(max_examples=30)
@given(st.integers(0, 1_000), st.lists(st.lists(st.integers(1, 4), min_size=1, max_size=4), min_size=2, max_size=2))
def test_any_split_into_prefill_and_steps_is_one_forward_pass(seed, splits):
    """Each slot of the cache has its own length."""
    model, n = random_model(seed), max(sum(parts) for parts in splits) + 2
    cache = KVCache.empty(model.cfg, 2, n, torch.device("cpu"), torch.float64)
    cache.keys.fill_(7.0)  # entries that are not written yet are masked
    for row, parts in enumerate(splits):
        ids, at, pieces = tokens(seed + row, 1, sum(parts)), 0, []
        for part in parts:
            positions = torch.arange(at, at + part)[None]
            window = cache.view(slice(row, row + 1), positions, at + part + seed % 2)
            pieces.append(model(ids[:, at : at + part], positions, cache=window))
            at += part
        torch.testing.assert_close(torch.cat(pieces, 1), model(ids), rtol=1e-9, atol=1e-10)
    lengths = torch.tensor([[sum(parts)] for parts in splits])
    step = model(tokens(seed + 9, 2, 1), lengths, cache=cache.view(slice(0, 2), lengths, n))
    for row, parts in enumerate(splits):  # one step of both slots, each at its own position
        whole = torch.cat([tokens(seed + row, 1, sum(parts)), tokens(seed + 9, 2, 1)[row : row + 1]], 1)
        torch.testing.assert_close(step[row, 0], model(whole)[0, -1], rtol=1e-9, atol=1e-10)


def test_a_slot_with_a_copied_prefix_continues_like_its_source():
    model, ids = random_model(), tokens(0, 1, 4)
    cache = KVCache.empty(TINY, 3, 6, torch.device("cpu"), torch.float64)
    model(ids, torch.arange(4)[None], cache=cache.view(slice(0, 1), torch.arange(4)[None], 4))
    cache.copy_prefix(0, 2, 4)
    place = torch.tensor([[4]])
    again = model(tokens(1, 1, 1), place, cache=cache.view(slice(2, 3), place, 6))
    torch.testing.assert_close(again[0, 0], model(torch.cat([ids, tokens(1, 1, 1)], 1))[0, -1], rtol=1e-9, atol=1e-10)


def test_a_cache_that_is_too_short_is_refused():
    cache = KVCache.empty(TINY, 1, 5, torch.device("cpu"), torch.float64)
    with pytest.raises(ValueError, match="a cache of 5 tokens cannot hold 6"):
        cache.view(slice(0, 1), torch.tensor([[5]]), 6)


def test_logits_of_any_shape_are_the_output_layer():
    model = random_model()
    hidden = model(tokens(0, 2, 5))
    torch.testing.assert_close(model.logits(hidden[:, -1]), hidden[:, -1] @ model.output.weight.T)
    torch.testing.assert_close(hidden, model.norm(model.forward_features(tokens(0, 2, 5))))
    torch.testing.assert_close(model.logits(hidden, slice(3, 9)), model.logits(hidden)[..., 3:9])


# ---------------------------------------------------------------------------------------------------------------------
# Rotary positions


@given(st.integers(0, 1_000), st.integers(0, 50), st.integers(0, 50), st.integers(0, 200))
def test_rotary_keeps_norms_and_scores_depend_on_distance_alone(seed, i, j, shift):
    q, k = torch.randn(2, 1, 1, 1, 8, generator=torch.Generator().manual_seed(seed)).double()

    def at(x, position):
        return apply_rotary_emb(x, compute_freqs_cis(torch.tensor([[position]]), 8, 10_000.0))

    assert torch.equal(at(q, 0), q)
    torch.testing.assert_close(at(q, i).norm(), q.norm())
    score, moved = ((at(q, a) * at(k, b)).sum() for a, b in ((i, j), (i + shift, j + shift)))
    torch.testing.assert_close(score, moved, rtol=0, atol=2e-4)  # angles are float32


@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(1, 9), st.sampled_from([2, 6, 10, 16, 32, 48, 64, 128]),
    st.sampled_from([torch.float32, torch.float64]), st.booleans(), st.integers(0, 999),
)  # fmt: skip
def test_both_ways_to_rotate_are_the_complex_product_and_so_are_their_gradients(b, heads, t, e, dtype, shared, seed):
    """A CPU runs one, a GPU and torch.compile the other. They have the same bits where head dimensions fill torch's
    vectors; elsewhere its complex product rounds once less."""
    numbers = torch.Generator().manual_seed(seed)
    x, upstream = (torch.randn(b, t, heads, e // 2, 2, generator=numbers).to(dtype).transpose(1, 2) for _ in range(2))
    freqs_cis = compute_freqs_cis(torch.randint(5_000, (1 if shared else b, t), generator=numbers), e, 10_000.0)
    by_torch, written_out = (f(x.requires_grad_(), freqs_cis) for f in (complex_product, real_product))
    gradients = [torch.autograd.grad(y, x, upstream)[0] for y in (by_torch, written_out)]
    whole = e % 16 == 0 and torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
    room = 0.0 if whole else 4 * torch.finfo(dtype).eps * max(y.abs().max().item() for y in (x, upstream))
    torch.testing.assert_close(written_out, by_torch, rtol=0, atol=room)
    torch.testing.assert_close(*gradients, rtol=0, atol=room)
    assert torch.equal(apply_rotary_emb(x.flatten(-2), freqs_cis), rotated(x.flatten(-2), freqs_cis))


@given(st.integers(0, 500), st.integers(0, 3))
def test_rotary_rotates_neighbouring_pairs_by_powers_of_theta(position, pair):
    x = torch.zeros(1, 1, 1, 8).double()
    x[..., 2 * pair] = 1
    turned = apply_rotary_emb(x, compute_freqs_cis(torch.tensor([[position]]), 8, 10_000.0))[0, 0, 0]
    angle = position * 10_000 ** (-2 * pair / 8)
    expected = torch.zeros(8).double()
    expected[2 * pair], expected[2 * pair + 1] = math.cos(angle), math.sin(angle)
    torch.testing.assert_close(turned, expected, rtol=0, atol=5e-5)


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_compiled_block_holds_no_complex_tensor(dynamic):
    """Inductor has no code for complex tensors: it leaves them to eager operations between its kernels."""
    dtypes, model = [], random_model().float()

    def record(graph: torch.fx.GraphModule, _inputs: list) -> Callable:
        values = (node.meta.get("val") for node in graph.graph.nodes)
        dtypes.append({x.dtype for x in values if isinstance(x, torch.Tensor)})
        return make_boxed_func(graph.forward)

    block, x = model.layers[0], torch.randn(2, 5, 16, requires_grad=True)
    freqs_cis = compute_freqs_cis(torch.arange(5).expand(2, 5), 4, 10_000.0)
    with use_kernels("reference"):
        torch._dynamo.reset()  # lengths that an earlier test compiled would count
        backend = aot_autograd(fw_compiler=record, bw_compiler=record)
        run = torch.compile(block, backend=backend, fullgraph=True, dynamic=dynamic)
        sum(run(x, None, freqs_cis, None, None, None)).sum().backward()
    assert len(dtypes) == 2 and all(torch.float32 in found for found in dtypes)  # forward and backward
    assert not any(dtype.is_complex for found in dtypes for dtype in found)


def test_order_matters_only_through_positions():
    """Without positions attention is a set operation: the last token could not tell the order of those before."""
    model, ids = random_model(), tokens(3, 1, 5)
    other = ids[:, [1, 0, 2, 3, 4]]
    same = torch.zeros(1, 5, dtype=torch.long)
    assert not torch.allclose(model(ids)[:, -1], model(other)[:, -1], atol=1e-3)
    one_layer = random_model(n_layers=1)
    torch.testing.assert_close(one_layer(ids, same)[:, -1], one_layer(other, same)[:, -1])


# ---------------------------------------------------------------------------------------------------------------------
# The stability recipe


@given(st.integers(0, 1_000), st.floats(0.1, 1_000), st.floats(0.1, 1_000))
def test_with_qk_norm_the_scale_of_queries_and_keys_does_not_matter(seed, for_queries, for_keys):
    model, ids = random_model(seed, norm_eps=1e-12), tokens(seed, 1, 6)
    before = model(ids)
    with torch.no_grad():
        for layer in model.layers:
            layer.attention.wq.weight.mul_(for_queries)
            layer.attention.wk.weight.mul_(for_keys)
    torch.testing.assert_close(model(ids), before, rtol=1e-6, atol=1e-7)


def test_without_qk_norm_the_scale_matters():
    model, ids = random_model(qk_norm=False), tokens(0, 1, 6)
    before = model(ids)
    model.layers[0].attention.wq.weight.data.mul_(3)
    assert not torch.allclose(model(ids), before, atol=1e-2)


@given(st.sampled_from([1, 2, 4]), st.integers(1, 3), st.integers(0, 1_000))
def test_groups_of_qk_norm_are_separate_layer_norms(n_groups, heads_each, seed):
    """With a mean and a bias: LayerNorm, not RMSNorm."""
    torch.manual_seed(seed)
    together = QKNorm(n_groups, 6, 1e-5).double()
    nn.init.normal_(together.weight)
    nn.init.normal_(together.bias)
    x = 3 + torch.randn(2, 5, n_groups * heads_each, 6).double()
    parts = []
    for group, heads in enumerate(x.split(heads_each, 2)):
        alone = nn.LayerNorm(6, 1e-5).double()
        alone.load_state_dict({"weight": together.weight[group], "bias": together.bias[group]})
        parts.append(alone(heads))
    torch.testing.assert_close(together(x), torch.cat(parts, 2))


def test_grouped_queries_are_repeated_keys_and_values():
    grouped = random_model(qk_norm_groups=1)
    full = Chameleon(dataclasses.replace(grouped.cfg, n_kv_heads=4)).double().eval()
    state = grouped.state_dict()
    for name in state:
        if name.endswith(("wk.weight", "wv.weight")):
            state[name] = state[name].view(2, 4, 16).repeat_interleave(2, 0).reshape(16, 16)
    full.load_state_dict(state)
    torch.testing.assert_close(full(tokens(0, 2, 7)), grouped(tokens(0, 2, 7)))


@given(st.sampled_from([1.0, 100.0, 1e6]), st.integers(0, 100))
def test_norms_after_the_branches_bound_what_a_branch_adds(scale, seed):
    """Each of the 2 * n_layers branches adds a vector of at most sqrt(D) * the norm's largest weight."""
    model, ids = random_model(seed, norm_order="post"), tokens(seed, 1, 6)
    with torch.no_grad():
        for layer in model.layers:
            for weight in (layer.attention.wo.weight, layer.feed_forward.w1.weight, layer.feed_forward.w2.weight):
                weight.mul_(scale)
        added = (model.forward_features(ids) - model.tok_embeddings(ids)).norm(dim=-1)
    weights = [layer.get_submodule(name).weight for layer in model.layers for name in ("attention_norm", "ffn_norm")]
    assert (added <= sum(w.abs().max() for w in weights) * TINY.dim**0.5 + 1e-9).all()


def test_norms_before_the_branches_do_not():
    model, ids = random_model(norm_order="pre"), tokens(0, 1, 6)
    before = model.forward_features(ids).norm(dim=-1)
    model.layers[0].feed_forward.w2.weight.data.mul_(1e6)
    assert (model.forward_features(ids).norm(dim=-1) > 1e3 * before).all()


@pytest.mark.parametrize("norm_order", ["pre", "post"])
def test_dropout_acts_on_branches_and_in_training_only(norm_order):
    model, plain = (random_model(norm_order=norm_order, dropout=p) for p in (0.5, 0.0))
    ids = tokens(0, 1, 6)
    assert torch.equal(model(ids), plain(ids)) and torch.equal(model(ids), model(ids))
    model.train()
    plain.train()
    seeds, others = torch.tensor([7]), torch.tensor([8])
    assert torch.equal(model(ids, dropout_seeds=seeds), model(ids, dropout_seeds=seeds))  # a function of the seeds
    assert not torch.equal(model(ids, dropout_seeds=seeds), model(ids, dropout_seeds=others)) and torch.equal(
        plain(ids), plain(ids)
    )
    with pytest.raises(ValueError, match="one for each sequence"):
        model(ids)
    everything = random_model(norm_order=norm_order, dropout=1 - 1e-9).train()  # no branch gets through
    torch.testing.assert_close(everything.forward_features(ids, dropout_seeds=seeds), everything.tok_embeddings(ids))


def test_dropout_of_a_sequence_does_not_depend_on_its_batch():
    model, ids, seeds = random_model(dropout=0.5).train(), tokens(0, 5, 6), torch.arange(5)
    together = model.forward_features(ids, dropout_seeds=seeds)
    for row in range(5):
        alone = model.forward_features(ids[row : row + 1], dropout_seeds=seeds[row : row + 1])
        torch.testing.assert_close(alone[0], together[row])


def test_each_branch_of_each_layer_has_its_own_dropout():
    """With p = 0.5 two independent branches drop a quarter of the entries together; equal ones would drop half."""
    dropped, seeds = [], torch.tensor([3])
    model = random_model(dropout=0.5).train()
    for layer in range(len(model.layers)):
        for branch in range(2):
            block = model.layers[layer]
            dropped.append(block.drop(torch.ones(1, 40, 40), fold_in(seeds, layer), branch) == 0)
    for i, one in enumerate(dropped):
        for other in dropped[:i]:
            assert 0.2 < (one & other).float().mean() < 0.3
