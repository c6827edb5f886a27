"""Wrong answers to the exercises of lesson 2."""

import torch


def plain_formula(vectors, codebook):
    """Right around 0; with an offset of 10,000 the squares leave no digits."""
    squares = vectors.square().sum(1, keepdim=True) - 2 * vectors @ codebook.T + codebook.square().sum(1)
    return squares.argmin(1)


def most_alike(vectors, codebook):
    """The largest product is not the smallest distance."""
    return (vectors @ codebook.T).argmax(1)


def transposed(x, side):
    """Columns of windows first."""
    b, c, h, w = x.shape
    return x.view(b, c, h // side, side, w // side, side).permute(0, 4, 2, 1, 3, 5).reshape(-1, c, side, side)


def reshaped(x, side):
    """A reshape alone cuts rows, not windows."""
    return x.reshape(-1, x.shape[1], side, side)


def one_pixel(image):
    image[31, 31] ^= 1
    return image


WRONG = {
    "nearest_code": [plain_formula, most_alike, lambda v, c: torch.cdist(v, c).argmin(0)],
    "windows": [transposed, reshaped],
    "patches": [48, 13],  # without the empty patch; without cutting things into four
    "far_change": [lambda image: image, lambda image: 255 - image, one_pixel],
}
