"""Ratings from pairs: the strengths under which the wins that were seen are likeliest (Bradley and Terry 1952).

    P(i beats j) = 1 / (1 + exp(s_j - s_i))        rating = 1000 + 400 / ln(10) * s, whose mean is 1000

A tie is half a win for each side. A model that never loses would have no finite rating, so PRIOR wins are added for
each side of each pair. Online Elo is left out, since it depends on the order of the votes.
"""

import math

import numpy as np

PRIOR = 0.1  # wins
MEAN, SCALE = 1000.0, 400 / math.log(10)  # 400 points: ten wins for each loss
MAX_STEP = 2.0  # of a strength in one step of Newton's method, which overshoots far from the solution


def strengths(wins: np.ndarray, prior: float = PRIOR) -> np.ndarray:
    """wins (..., K, K): how often i beat j -> strengths (..., K) of mean 0."""
    k = wins.shape[-1]
    wins = wins + prior * (1 - np.eye(k))
    games = wins + wins.swapaxes(-1, -2)
    s = np.zeros(wins.shape[:-1])
    for _ in range(100):
        p = 1 / (1 + np.exp(s[..., None, :] - s[..., :, None]))  # (..., i, j): i beats j
        gradient = (wins - games * p).sum(-1)
        curvature = games * p * (1 - p)
        hessian = np.eye(k) * curvature.sum(-1)[..., None] - curvature + 1 / k  # 1 / k: no common shift
        step = np.linalg.solve(hessian, gradient[..., None])[..., 0]
        s = s + np.clip(step, -MAX_STEP, MAX_STEP)
        if np.abs(step).max() < 1e-12:
            break
    return s - s.mean(-1, keepdims=True)


def ratings(by_prompt: np.ndarray, n_resamples: int = 1_000, seed: int = 0) -> np.ndarray:
    """by_prompt (prompts, K, K): how often i beat j at each prompt -> (K, 3): rating, and its 95% interval.

    Prompts are resampled, since the pairs of one prompt share answers.
    """
    n = len(by_prompt)
    counts = np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=n_resamples)  # (resamples, prompts)
    resampled = strengths(np.einsum("rp,pij->rij", counts.astype(float), by_prompt, optimize=True))
    low, high = np.percentile(resampled, [2.5, 97.5], axis=0)
    return MEAN + SCALE * np.stack([strengths(by_prompt.sum(0)), low, high], axis=-1)
