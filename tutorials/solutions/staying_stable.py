"""Worked answers to lesson 6."""

import math

import torch


def z_loss_gradient(logits, targets, z):
    # loss = log Z - x[y] + z (log Z)^2, and d log Z / dx is the softmax p. So the gradient is
    # p (1 + 2 z log Z) - [v = y]. logsumexp takes the largest logit out first: exp(1e4) is infinite.
    log_z = logits.logsumexp(-1, keepdim=True)  # (N, 1)
    p = (logits - log_z).exp()  # (N, V)
    one_hot = torch.zeros_like(p)
    valid = targets >= 0
    one_hot[valid, targets[valid]] = 1
    return (p * (1 + 2 * z * log_z) - one_hot) * valid[:, None]


# After the norm a query and a key have mean 0 and variance 1, so each has length sqrt(E). Their product is at most E
# (Cauchy and Schwarz), and attention divides by sqrt(E). Rotation changes no length.
largest_logit_at_128 = math.sqrt(128)

# The norm divides by sqrt(variance + eps), with eps = 1e-5. Queries of variance 1e-6 are small against that.
not_undone = 1e-3
