"""What lesson 4's answers must do: checked against transformer.py and the kernels' references, in float64."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from checks import Wrong, close, compare, difference, same, shown
from nanochameleon.config import ModelConfig
from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import apply_rotary_emb, attention_reference, visible
from nanochameleon.packing import pack
from nanochameleon.transformer import Chameleon, QKNorm, compute_freqs_cis

BASE = ModelConfig(vocab_size=40, dim=24, n_layers=2, n_heads=6, n_kv_heads=2, multiple_of=8, norm_eps=0.1)
SIZES = {
    "two key heads for six query heads, one group of norms": BASE,
    "two groups of norms": replace(BASE, qk_norm_groups=2),
    "as many key heads as query heads (cfg.n_kv_heads is None)": replace(BASE, n_kv_heads=None, qk_norm_groups=3),
    "no QK-norm": replace(BASE, qk_norm=False),
    "the norms after the branches (post)": replace(BASE, norm_order="post"),
}


def _random_model(cfg: ModelConfig, seed: int = 0) -> Chameleon:
    """Every weight is random, also those that start at 0 or 1, so that a forgotten one is seen."""
    torch.manual_seed(seed)
    model = Chameleon(cfg).double().eval()
    for name, weight in model.named_parameters():
        torch.nn.init.normal_(weight, 1.0 if "norm" in name and name.endswith("weight") else 0.0, 0.5)
    return model.requires_grad_(False)


BATCH = pack([[5, 6, 7, 8, 9], [21, 22, 23]], 10, 1)  # two documents and two places of padding
TOKENS, POSITIONS, IDS = BATCH.tokens[0], BATCH.positions[0], BATCH.doc_ids
MASK = visible(IDS, IDS)[0]


def _agree(answer: Callable, cases: Iterable[tuple[str, tuple, Tensor]], tolerance: float = 1e-5) -> None:
    """Raise Wrong at the first case (description, arguments, result) where the answer differs, and say where."""
    for what, args, expected in cases:
        given = answer(*args)
        if not same(expected, given, tolerance):
            raise Wrong(f"with {what} {difference(expected, given, tolerance)}")


def _x(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def rms_norm(answer):
    """The result equals torch's own RMSNorm, with a weight that is not 1 and an eps that matters."""
    inputs = [(_x(2, 3), _x(3, seed=2), eps) for eps in (1e-5, 0.5)] + [(_x(4, 8), _x(8, seed=2), 1e-5)]
    compare(answer, lambda x, weight, eps: F.rms_norm(x, x.shape[-1:], weight, eps), inputs)


def rotate(answer):
    """The rotation equals `apply_rotary_emb`'s."""

    def library(x, positions, theta):
        freqs_cis = compute_freqs_cis(positions[None], x.shape[-1], theta)
        return apply_rotary_emb(x.transpose(0, 1)[None], freqs_cis)[0].transpose(0, 1)

    inputs = [(_x(2, 1, 2), torch.tensor([0, 1]), 100.0), (_x(2, 1, 4), torch.tensor([0, 3]), 100.0)]
    compare(answer, library, [*inputs, (_x(9, 3, 8), torch.tensor([0, 1, 2, 3, 0, 1, 50, 51, 0]), 1e4)])


def qk_norm(answer):
    """The result equals `QKNorm`'s for 1, 2 and 4 groups, on 4 and 8 heads."""

    def library(x, weight, bias, eps):
        norm = QKNorm(*weight.shape, eps)
        norm.weight.data, norm.bias.data = weight, bias
        return norm(x[None])[0].detach()

    inputs = [(_x(1, heads, 2), _x(g, 2, seed=2), _x(g, 2, seed=3), 0.1) for heads in (4, 8) for g in (1, 2, 4)]
    compare(answer, library, inputs)


def attend(answer):
    """The result equals `attention_reference`'s, with as many key heads as query heads and with fewer."""

    def library(q, k, v, mask):
        q, k, v = (y.transpose(0, 1)[None] for y in (q, k, v))
        return attention_reference(q, k, v, mask[None])[0].transpose(0, 1)

    ids = torch.tensor([[0, 0, 1, 1, 1, -1]])
    mask = visible(ids, ids)[0]
    inputs = [(_x(2, 1, 2), _x(2, 1, 2, seed=2), _x(2, 1, 2, seed=3), torch.ones(2, 2, dtype=torch.bool).tril())]
    inputs += [(_x(6, 6, 4), _x(6, g, 4, seed=2), _x(6, g, 4, seed=3), mask) for g in (6, 2, 1)]
    compare(answer, library, inputs)


def attention(answer):
    """The result equals `Attention.forward`'s for several sizes."""
    cases = []
    for what, cfg in SIZES.items():
        layer, freqs_cis = _random_model(cfg).layers[0].attention, compute_freqs_cis(POSITIONS[None], 4, cfg.rope_theta)
        expected = layer(_x(1, 10, 24).double(), freqs_cis, Documents.of(IDS), None)[0]
        cases.append((what, (_x(1, 10, 24).double()[0], dict(layer.state_dict()), POSITIONS, MASK, cfg), expected))
    _agree(answer, cases)


def feed_forward(answer):
    """The result equals `FeedForward.forward`'s."""
    layer = _random_model(BASE).layers[0].feed_forward
    _agree(answer, [("five tokens", (_x(5, 24).double(), dict(layer.state_dict())), layer(_x(5, 24).double()))])


def block(answer):
    """The result equals `Block.forward`'s in both norm orders."""
    cases = []
    for what, cfg in SIZES.items():
        layer, freqs_cis = _random_model(cfg).layers[0], compute_freqs_cis(POSITIONS[None], 4, cfg.rope_theta)
        stream, branch = layer(_x(1, 10, 24).double(), None, freqs_cis, Documents.of(IDS), None, None)
        expected = (stream if branch is None else stream + branch)[0]
        cases.append((what, (_x(1, 10, 24).double()[0], dict(layer.state_dict()), POSITIONS, MASK, cfg), expected))
    _agree(answer, cases)


def forward(answer):
    """The logits equal the library's."""
    cases = []
    for what, cfg in SIZES.items():
        model = _random_model(cfg)
        expected = model.logits(model(TOKENS[None], POSITIONS[None], Documents.of(IDS)))[0]
        cases.append((what, (TOKENS, dict(model.state_dict()), POSITIONS, MASK, cfg), expected))
    _agree(answer, cases)


def new_parameters(answer):
    """The parameters of all QK-norms of the 34B: 48 layers, 2 norms, weight and bias, 4 groups of 128."""
    close(answer, 48 * 2 * 2 * 4 * 128, 0.0)


def change_by_positions(answer):
    """The change of the logits where positions run through a sequence, and the mask stays: none."""
    close(answer, 0.0, 1e-3)


def _score_norm_last(i: int, j: int) -> float:
    """The lesson's score(i, j, norm_last=True): of the same query, key and norm."""
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 1, 64, generator=generator)
    norm = QKNorm(1, 64, 1e-5).requires_grad_(False)
    norm.weight += 0.5 * torch.randn(1, 64, generator=generator)
    norm.bias += 0.5 * torch.randn(1, 64, generator=generator)
    at_i, at_j = (
        norm(apply_rotary_emb(x, compute_freqs_cis(torch.tensor([[p]]), 64, 1e4))) for x, p in ((q, i), (k, j))
    )
    return float((at_i * at_j).sum() / 8)


def equal_distances(answer):
    """Two pairs of places, equally far apart, whose scores differ by more than 1.5 with the norm last."""
    try:
        (i, j), (k, l) = answer
        apart = abs(_score_norm_last(i, j) - _score_norm_last(k, l))
    except (TypeError, ValueError, RuntimeError):
        raise Wrong(f"the answer is two pairs of places, ((i, j), (k, l)), not {shown(answer)}") from None
    if i - j != k - l:
        raise Wrong(f"{i} - {j} is {i - j}, and {k} - {l} is {k - l}: the distances differ")
    if apart <= 1.5:
        raise Wrong(f"the scores of ({i}, {j}) and ({k}, {l}) differ by {apart:.2f}, not by more than 1.5")
