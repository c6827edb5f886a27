"""What is logged while a model trains; monitor.py writes it down.

The paper watches the loss by modality and the norm of the last block's output for early signs of trouble (section 2.3).
We add the largest attention logit of each layer, and the gradient's norm by modality.
"""

import math
import sys

import torch
from torch import Tensor

from nanochameleon.kernels.attention.documents import Documents
from nanochameleon.kernels.attention.reference import apply_rotary_emb, visible
from nanochameleon.packing import Batch
from nanochameleon.parallel.apply import ParallelModel
from nanochameleon.parallel.compile import eager
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.parallel.sharding import full_tensor
from nanochameleon.training.objective import Objective, Sums
from nanochameleon.transformer import Attention, Chameleon
from nanochameleon.vocab import Vocab


def compute_metrics(sums: Sums, mesh: Mesh, z_loss_weight: float) -> dict[str, float]:
    """Means per token of each modality over the whole batch; monitor.FIELDS explains the names."""
    local = torch.stack([*sums.next_token, sums.output_norm, sums.n_tokens]).tolist()  # one read of the GPU
    _, cross_entropy, z, log_z, n, of_images, n_images, output_norm, n_tokens = mesh.all_reduce_sum(*local)
    z_loss, n_text = z_loss_weight * z / max(n, 1.0), n - n_images
    return {
        "loss": cross_entropy / max(n, 1.0) + z_loss,
        "loss_text": (cross_entropy - of_images) / n_text if n_text else math.nan,
        "loss_image": of_images / n_images if n_images else math.nan,
        "z_loss": z_loss,
        "log_z": log_z / max(n, 1.0),
        "output_norm": output_norm / n_tokens,
    }


def largest_logit(attention: Attention, x: Tensor, freqs_cis: Tensor, documents: Documents) -> Tensor:
    """The attention's input x (B, T, D) -> the largest score that a query sees, over the heads of this rank."""
    b, t, _ = x.shape
    q, k = (w(x).view(b, t, -1, attention.head_dim) for w in (attention.wq, attention.wk))  # (B, T, H, E), (B, T, G, E)
    q, k = (
        apply_rotary_emb(norm(y).transpose(1, 2), freqs_cis)
        for norm, y in ((attention.q_norm, q), (attention.k_norm, k))
    )
    unseen = ~visible(documents.ids, documents.ids)[:, None]  # (B, 1, T, T)
    peaks = []
    with torch.autocast(x.device.type, enabled=False):  # it would compute scores in bf16
        # One key head at a time: the scores of all heads of a 7B take 2 GB.
        for queries, key in zip(q.chunk(k.shape[1], 1), k.unbind(1), strict=True):
            scores = queries.float() @ key.float()[:, None].mT  # (B, H / G, T, T)
            peaks.append(scores.masked_fill_(unseen, -math.inf).amax())
    return torch.stack(peaks).amax() / math.sqrt(attention.head_dim)


@torch.no_grad()
def local_max_logits(objective: Objective, batch: Batch, dropout_seeds: Tensor | None) -> list[float]:
    """The largest attention logit of each layer in this rank's batch and heads, by one more forward pass.

    Every rank of a sharded model has to take part.
    """
    found: list[Tensor] = []

    def record(attention: Attention, inputs: tuple) -> None:
        found.append(largest_logit(attention, *inputs[:3]))

    hooks = [block.attention.register_forward_pre_hook(record) for block in objective.model.layers]
    try:
        with eager():  # compiled code does not see the hooks
            objective(batch, dropout_seeds)
    finally:
        for hook in hooks:
            hook.remove()
        if hasattr(objective, "reshard"):  # FSDP keeps what is outside of blocks gathered until a backward pass
            objective.reshard()
    return torch.stack(found).tolist()


def max_attention_logits(model: ParallelModel, batch: Batch, dropout_seeds: Tensor) -> list[float]:
    """The largest attention logit of each layer on the first sequence of the whole batch, over all ranks."""
    mesh = model.mesh
    found = local_max_logits(model.objective, batch[:1].to(mesh.device), dropout_seeds[:1])
    has_first = mesh.batch_slice(len(batch.tokens) * mesh.dp_size).start == 0
    return mesh.all_reduce_max(*(found if has_first else [-math.inf] * len(found)))


def gradient_norms(model: Chameleon, vocab: Vocab) -> dict[str, float]:
    """{"grad_norm_text", "grad_norm_image"}: the gradient's norm over the rows of embedding and output layer that
    belong to text, or to image codes. Every rank of a sharded model has to take part."""
    rows = sum(full_tensor(m.weight.grad.square().sum(1)) for m in (model.tok_embeddings, model.output))  # (V,)
    text, image = rows[vocab.first_text :].sum(), rows[vocab.first_code : vocab.eoi].sum()
    return dict(zip(("grad_norm_text", "grad_norm_image"), torch.stack([text, image]).sqrt().tolist(), strict=True))


def memory_gib(device: torch.device) -> float | None:
    """Most memory taken so far: of the GPU, else of this process."""
    if device.type == "cuda":
        return round(torch.cuda.max_memory_allocated(device) / 2**30, 3)
    return peak_memory_gib()


def peak_memory_gib() -> float | None:
    """Most resident memory this process has had; None where the system does not report it."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    unit = 1 if sys.platform == "darwin" else 1_024  # bytes on macOS, KiB elsewhere
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
