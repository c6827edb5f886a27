"""Worked answers to lesson 5."""

import math

import torch


def warmup_cosine(step, total, peak, warmup, last):
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)  # + 1: step 0 already moves, and step `warmup` would be the peak
    # 0 at the peak, 1 in the last step, which is total - 1; max() for a run that ends with its warm-up
    progress = (step - warmup) / max(1, total - 1 - warmup)
    cosine = (1 + math.cos(math.pi * progress)) / 2  # from 1 to 0
    return peak * (last + (1 - last) * cosine)


# Where the caption names the background, the image leaves nothing more open. In one caption of three it leaves a choice
# between two, which costs ln 2. The rest is in the caption's own floor: 2/3 ln 2.
second_background = math.log(2) / 3

# All rows are equal, so there is one direction, and every other singular value is 0. A polynomial without a constant
# term leaves 0 where it is: Muon cannot move along a direction of which the gradient says nothing. Its momentum helps,
# since it remembers other gradients.
stays_small = torch.ones(8, 8)
