"""Plausible wrong answers to the exercises of lesson 10."""


def all_reduce(parts):
    return [[sum(values) for values in zip(*parts, strict=True)]] * len(parts)


def mean_scatter(parts):
    size = len(parts[0]) // len(parts)
    mean = [sum(values) / len(parts) for values in zip(*parts, strict=True)]
    return [mean[rank * size : (rank + 1) * size] for rank in range(len(parts))]


def scatter_alone(parts):
    size = len(parts[0]) // len(parts)
    return [part[rank * size : (rank + 1) * size] for rank, part in enumerate(parts)]


WRONG = {
    "reduce_scatter": [all_reduce, mean_scatter, scatter_alone],
    "days_on_64_gpus": [73.5, 582.0],  # without the utilisation; with the peak of an A100
    "answers_needed": [1_000, 2_995, 36_880],  # 1 / p; one-sided; 0.01%
    "agreement_without_alpha": [
        [["safe"] * 10] * 3,  # undefined
        [["unsafe"] + ["safe"] * 9] * 3,  # perfect agreement
        [["a", "b", "a", "b", "a", "b", "a", "b", "a", "b"], ["a"] * 10, ["b"] * 10],  # few agree
        [["unsafe", "unsafe"] + ["safe"] * 8, ["unsafe"] + ["safe"] * 9, ["unsafe"] + ["safe"] * 9],
    ],
}
