"""What the tests of attention draw, compute and compare, on a CPU and as a GPU would."""

import torch
from hypothesis import strategies as st

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.transformer import compute_freqs_cis

EPS = 1e-5
LENGTHS = [1, 2, 5, 17, 63, 64, 65, 130, 200]
HEAD_DIMS = [2, 6, 16, 32, 48, 80, 128]


seeds = st.integers(0, 10_000)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@st.composite
def problems(draw, lengths=LENGTHS, head_dims=HEAD_DIMS):
    """(tensors in float64 whose values bfloat16 holds, freqs_cis, documents, gradient of the output)."""
    b, t = draw(st.integers(1, 2)), draw(st.sampled_from(lengths))
    shared, key_heads = draw(st.sampled_from([1, 2, 3])), draw(st.sampled_from([1, 2]))
    e = draw(st.sampled_from(head_dims))
    gain = draw(st.sampled_from([0.2, 1.0, 20.0]))  # the last: scores beyond what no maximum is needed for
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))

    def numbers(*shape):
        return torch.randn(shape, generator=generator).bfloat16().double()

    heads = shared * key_heads
    tensors = {"q": numbers(b, t, heads, e), "k": numbers(b, t, key_heads, e), "v": numbers(b, t, key_heads, e)}
    if draw(st.booleans()):
        groups = draw(st.sampled_from([1, key_heads]))
        for name in ("q", "k"):
            tensors[f"{name}_weight"] = gain * (1 + 0.3 * numbers(groups, e))
            tensors[f"{name}_bias"] = 0.3 * numbers(groups, e)
    kind = draw(st.sampled_from(["none", "packed", "any"]))
    docs = torch.randint(-1, 3, (b, t), generator=generator)
    docs = docs.sort(1, descending=True).values if kind == "packed" else docs
    documents = None if kind == "none" else Documents.of(docs)
    return tensors, compute_freqs_cis(torch.arange(t).expand(b, t), e, 10_000.0), documents, numbers(b, t, heads, e)


def outcome(function, problem, dtype) -> list[torch.Tensor]:
    """The output and the gradients of all tensors; q, k and v of this type, the norms float32 at least."""
    tensors, freqs_cis, documents, upstream = problem
    norm_dtype = torch.float64 if dtype == torch.float64 else torch.float32
    x = {n: t.to(norm_dtype if "_" in n else dtype).requires_grad_() for n, t in tensors.items()}
    norms = [(x[f"{n}_weight"], x[f"{n}_bias"]) if f"{n}_weight" in x else None for n in "qk"]
    out = function(x["q"], x["k"], x["v"], freqs_cis, documents, *norms, EPS)
    return [out.detach(), *torch.autograd.grad(out, list(x.values()), upstream.to(dtype))]


def sizes(problem) -> float:
    """How large the numbers in between are: scores, and the differences that cancel in a score's gradient."""
    tensors, _, _, upstream = problem
    lengths = {name: x.norm(dim=-1).max().item() for name, x in (*tensors.items(), ("upstream", upstream))}
    root = tensors["q"].shape[-1] ** 0.5

    def longest(n: str) -> float:
        weight = tensors.get(f"{n}_weight")
        return lengths[n] if weight is None else root * weight.abs().max().item() + lengths[f"{n}_bias"]

    q, k = longest("q"), longest("k")
    return (1 + q * k / root) * (1 + lengths["upstream"] * lengths["v"] * max(q, k) / root)
