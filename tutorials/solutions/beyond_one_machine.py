"""Worked answers to the exercises of lesson 10."""


def reduce_scatter(parts):
    total = [sum(values) for values in zip(*parts, strict=True)]  # the reduce
    size = len(total) // len(parts)
    return [total[rank * size : (rank + 1) * size] for rank in range(len(parts))]  # the scatter


# tokens * FLOPs a token / (GPUs * utilisation * peak) are seconds
days_on_64_gpus = 9.2e12 * 43.7e9 / (64 * 0.4 * 989e12) / 86_400

# The interval ends at the p for which "none of n" has a chance of 2.5%: 0.999^n = 0.025, so n = 3.69 / 0.001.
answers_needed = 3_688

# One lone "unsafe", and nobody agrees with it: chance would do as well. Seeing the same rare thing is what counts.
agreement_without_alpha = [["unsafe"] + ["safe"] * 9, ["safe"] * 10, ["safe"] * 10]
