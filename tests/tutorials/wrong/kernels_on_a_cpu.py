"""Plausible wrong answers to lesson 8's exercises."""

import math


def sum_without_scaling(logits):
    largest, total = -math.inf, 0.0
    for x in logits:
        largest = max(largest, x)
        total += math.exp(x - largest) if x > -math.inf else 0.0
    return largest + math.log(total) if total else -math.inf


def forgets_the_largest(logits):
    largest, total = -math.inf, 0.0
    for x in logits:
        if x > largest:
            total *= math.exp(largest - x)
            largest = x
        total += math.exp(x - largest) if largest > -math.inf else 0.0
    return math.log(total) if total else -math.inf


def scales_the_new_one_alone(logits):
    largest, total = -math.inf, 0.0
    for x in logits:
        if x > largest:
            total = total + 1.0
            largest = x
        elif x > -math.inf:
            total += math.exp(x - largest)
    return largest + math.log(total) if total else -math.inf


def adds_sums(a, b):
    return max(a[0], b[0]), a[1] + b[1]


def scales_the_larger(a, b):
    m = max(a[0], b[0])
    if m == -math.inf:
        return m, 0.0
    low = min(a[0], b[0])
    return m, a[1] * math.exp(low - m) + b[1] * math.exp(low - m)


LOGITS = 4_096 * 65_536

WRONG = {
    "log_sum_exp": [sum_without_scaling, forgets_the_largest, scales_the_new_one_alone],
    "merge": [adds_sums, scales_the_larger],
    # numbers for bytes; the formula's four arrays; one way only
    "bytes_moved": [(3 * LOGITS, 2 * LOGITS), (8 * LOGITS, 4 * LOGITS), (6 * LOGITS, 2 * LOGITS)],
    "bad_row": [[100.0, 0.0], [0.0, 50.0], [-1e4, -1e4 + 10]],
}
