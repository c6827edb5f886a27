"""What the paper watches to see trouble coming (section 2.3), measured while a model is trained: the largest attention
logit of each layer, and how hard each modality pulls. monitor.py writes it down.
"""

import math

import torch
from torch import Tensor

from nanochameleon.kernels.attention.qknorm_rope import apply_rotary_emb
from nanochameleon.kernels.attention.reference import visible
from nanochameleon.packing import Batch
from nanochameleon.parallel.sharding import full_tensor
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Attention, Chameleon
from nanochameleon.vocab import Vocab


def largest_logit(attention: Attention, x: Tensor, table: Tensor, doc_ids: Tensor) -> Tensor:
    """Of all heads that this rank has: the attention's input x (B, T, D) -> the largest score that a query sees."""
    b, t, _ = x.shape
    q, k = (w(x).view(b, t, -1, attention.head_dim) for w in (attention.wq, attention.wk))
    q, k = (
        apply_rotary_emb(norm(y).transpose(1, 2), table) for norm, y in ((attention.q_norm, q), (attention.k_norm, k))
    )
    scores = q.float() @ k.float().repeat_interleave(q.shape[1] // k.shape[1], 1).mT / math.sqrt(attention.head_dim)
    return scores.masked_fill(~visible(doc_ids, doc_ids)[:, None], -math.inf).amax()


@torch.no_grad()
def max_attention_logits(objective: Objective, batch: Batch, keys: Tensor | None) -> list[float]:
    """The largest attention logit of each layer on these rows, by one more forward pass; of a layer that is spread over
    ranks, of this rank's heads. Every rank of a sharded model has to take part."""
    found: list[Tensor] = []

    def look(attention: Attention, inputs: tuple) -> None:
        found.append(largest_logit(attention, *inputs[:3]))

    hooks = [block.attention.register_forward_pre_hook(look) for block in objective.model.layers]
    try:
        with torch.compiler.set_stance("force_eager"):  # what is compiled does not see the hooks
            objective(batch, keys)
    finally:
        for hook in hooks:
            hook.remove()
        if hasattr(objective, "reshard"):  # FSDP keeps what is outside of blocks until a backward pass
            objective.reshard()
    return torch.stack(found).tolist()


def gradient_norms(model: Chameleon, vocab: Vocab) -> dict[str, float]:
    """{"grad_norm_text", "grad_norm_image"}: the gradient's norm over the rows of embedding and output layer that
    belong to text, or to image codes. Of a sharded model it is that of all ranks, which have to take part."""
    rows = sum(full_tensor(m.weight.grad.square().sum(1)) for m in (model.tok_embeddings, model.output))
    image, text = rows[vocab.first_code : vocab.eoi].sum(), rows[vocab.first_text :].sum()
    return {"grad_norm_text": float(text.sqrt()), "grad_norm_image": float(image.sqrt())}
