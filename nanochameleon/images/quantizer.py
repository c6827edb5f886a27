"""Vector quantization: each vector becomes the nearest of K codebook vectors (VQ-VAE, arXiv 1711.00937).

The codebook learns by exponential moving averages of the vectors assigned to each code (appendix A.1 there). Codes
that no vector uses are moved onto vectors of the batch, so that the whole codebook is in use. The alternative is the
VQ-VAE's `codebook_loss`, by gradient. The commitment loss pulls the encoder's vectors to their codes. Its weight is
beta (tokenizers.commitment_weight), as in the paper; taming-transformers and Hugging Face multiply the codebook loss
instead, a known bug.

Shapes: B images, h x w vectors each, E their size, N = B * h * w, K codes.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def nearest_code(vectors: Tensor, codebook: Tensor) -> Tensor:
    """Index of the codebook row with the least squared distance: (N, E), (K, E) -> (N,) int64."""
    # |v - c|^2 = |v|^2 - 2 v.c + |c|^2 loses all its digits when v and c share a large offset. So the codebook's mean
    # is subtracted from both first: distances do not change and the numbers stay small.
    centre = codebook.mean(0)  # (E,)
    v, c = vectors - centre, codebook - centre
    # |v|^2 is left out, since it is the same for every code
    return torch.addmm(c.square().sum(1), v, c.T, alpha=-2).argmin(1)  # (N, K) -> (N,)


def straight_through(vectors: Tensor, quantized: Tensor) -> Tensor:
    """The value of `quantized` with the gradient of `vectors`, since argmin passes no gradient."""
    return vectors + (quantized - vectors).detach()


def codebook_loss(vectors: Tensor, quantized: Tensor) -> Tensor:
    """Pull the codes to the encoder's vectors, which get no gradient: mean |sg(v) - q|^2."""
    return F.mse_loss(quantized, vectors.detach())


def commitment_loss(vectors: Tensor, quantized: Tensor) -> Tensor:
    """Pull the encoder's vectors to their codes, which get no gradient: mean |v - sg(q)|^2."""
    return F.mse_loss(vectors, quantized.detach())


class Quantizer(nn.Module):
    """The codebook (K, E) and, while it is trained by moving averages, the running counts and sums of each code."""

    def __init__(self, n_codes: int, embed_dim: int):
        super().__init__()
        # nn.Embedding's own values, which on the meta device would first import torch's compiler
        self.embedding = nn.Embedding.from_pretrained(torch.randn(n_codes, embed_dim), freeze=False)
        nn.init.uniform_(self.embedding.weight, -1 / n_codes, 1 / n_codes)
        self.register_buffer("counts", None, persistent=False)
        self.register_buffer("sums", None, persistent=False)
        self.reset_averages()

    def reset_averages(self) -> None:
        """Start the averages as if each code had been used once, by its own vector."""
        self.sums = self.embedding.weight.detach().clone()
        self.counts = torch.ones_like(self.sums[:, 0])

    def codes(self, z: Tensor) -> Tensor:
        """Encoder output (B, E, h, w) -> codes (B, h*w) in raster order."""
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1])  # (N, E)
        return nearest_code(flat.float(), self.embedding.weight.float()).view(len(z), -1)

    def lookup(self, codes: Tensor, grid: int) -> Tensor:
        """Codes (B, grid*grid) -> their vectors (B, E, grid, grid)."""
        return self.embedding(codes).view(len(codes), grid, grid, -1).permute(0, 3, 1, 2)

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """z (B, E, h, w) -> its codebook vectors, codes (B, h*w), the vectors again.

        The first output passes its gradient to z, the last one to the codebook.
        """
        codes = self.codes(z.detach())
        quantized = self.lookup(codes, z.shape[-1])
        return straight_through(z, quantized), codes, quantized

    @torch.no_grad()
    def update_averages(
        self, z: Tensor, codes: Tensor, decay: float, min_count: float, generator: torch.Generator
    ) -> None:
        """Take one moving-average step towards this batch's vectors.

        A code is dead when its running count falls below `min_count`; it moves onto a random vector of the batch.
        """
        # 1. Each code's running count, and the running sum of the vectors assigned to it.
        flat = z.permute(0, 2, 3, 1).reshape(-1, z.shape[1]).float()  # (N, E)
        hits = F.one_hot(codes.reshape(-1), len(self.counts)).to(flat.dtype)  # (N, K)
        self.counts.lerp_(hits.sum(0), 1 - decay)
        self.sums.lerp_(hits.T @ flat, 1 - decay)
        # 2. Dead codes restart with a count of 1, so that they are not dead again in the next step.
        dead = (self.counts < min_count).nonzero()[:, 0]
        if len(dead):
            picks = torch.randint(len(flat), (len(dead),), generator=generator)
            self.counts[dead] = 1.0
            self.sums[dead] = flat[picks.to(flat.device)]
        # 3. A code is the mean of its vectors.
        self.embedding.weight.copy_(self.sums / self.counts[:, None].clamp_min(1e-6))

    @torch.no_grad()
    def init_kmeans(self, vectors: Tensor, rounds: int, generator: torch.Generator) -> None:
        """Place the codebook on vectors (N, E) before training: k-means++ picks, then `rounds` of k-means."""
        # 1. k-means++: the next pick is likely to be far from all earlier ones.
        flat = vectors.float().cpu()
        picks = [int(torch.randint(len(flat), (1,), generator=generator))]
        nearest = torch.full((len(flat),), torch.inf)
        for _ in range(len(self.counts) - 1):
            nearest = torch.minimum(nearest, (flat - flat[picks[-1]]).square().sum(1))
            weights = nearest if nearest.any() else torch.ones(len(flat))  # all different ones are picked
            picks.append(int(torch.multinomial(weights, 1, generator=generator)))
        # 2. k-means; a code without vectors keeps its place.
        codebook = flat[picks]  # (K, E)
        for _ in range(rounds):
            hits = F.one_hot(nearest_code(flat, codebook), len(codebook)).to(flat.dtype)
            counts = hits.sum(0)[:, None]
            codebook = torch.where(counts > 0, hits.T @ flat / counts.clamp_min(1), codebook)
        self.embedding.weight.copy_(codebook)
        self.counts.fill_(1.0)
        self.sums.copy_(codebook)
