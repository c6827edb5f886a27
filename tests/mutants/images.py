"""Bugs to plant in images/."""

from mutants.mutant import Mutant

MUTANTS = [
    Mutant(
        "convolutions are compiled for each number of windows",
        "images/vqgan.py",
        "-len(different) % BATCH_MULTIPLE",
        "0",
        "images/test_vqgan.py",
    ),
    Mutant("the farthest code", "images/quantizer.py", ".argmin(1)", ".argmax(1)", "images/test_quantizer.py"),
    Mutant(
        "distances without a centre lose their digits",
        "images/quantizer.py",
        "centre = codebook.mean(0)",
        "centre = 0 * codebook[0]",
        "images/test_quantizer.py",
    ),
    Mutant(
        "no straight-through",
        "images/quantizer.py",
        "return vectors + (quantized - vectors).detach()",
        "return quantized",
        "images/test_quantizer.py",
    ),
    Mutant(
        "beta on the codebook's term",
        "images/quantizer.py",
        "return F.mse_loss(vectors, quantized.detach())",
        "return F.mse_loss(quantized, vectors.detach())",
        "images/test_quantizer.py",
    ),
    Mutant(
        "moving averages with the shares swapped",
        "images/quantizer.py",
        "self.sums.lerp_(hits.T @ flat, 1 - decay)",
        "self.sums.lerp_(hits.T @ flat, decay)",
        "images/test_quantizer.py",
    ),
    Mutant(
        "dead codes are counted, not moved",
        "images/quantizer.py",
        "self.sums[dead] = flat[picks.to(flat.device)]",
        "pass",
        "images/test_quantizer.py",
    ),
    Mutant(
        "k-means starts anywhere",
        "images/quantizer.py",
        "weights = nearest if nearest.any() else torch.ones(len(flat))",
        "weights = torch.ones(len(flat))",
        "images/test_quantizer.py",
    ),
    Mutant(
        "the window is not looked at",
        "images/vqgan.py",
        "if self.cfg.window is None:",
        "if True:",
        "images/test_vqgan.py",
    ),
    Mutant(
        "windows are joined transposed",
        "images/vqgan.py",
        ".permute(0, 3, 1, 4, 2, 5)",
        ".permute(0, 3, 2, 4, 1, 5)",
        "images/test_vqgan.py",
    ),
    Mutant(
        "a known window has the codes of another one",
        "images/windows.py",
        "{key: len(rows) + i for",
        "{key: i for",
        "images/test_image_tokenizer.py",
    ),
    Mutant("white is not 1", "images/tokenizer.py", "/ 127.5 - 1", "/ 128 - 1", "images/test_image_tokenizer.py"),
    Mutant(
        "images without a budget",
        "images/files.py",
        "self.changed.wait_for(lambda: self.free >= n)",
        "pass",
        "images/test_image_files.py",
    ),
    Mutant(
        "transparent is black",
        "images/files.py",
        'Image.new("RGBA", image.size, "white")',
        'Image.new("RGBA", image.size, "black")',
        "images/test_image_files.py",
    ),
]
