"""The image tokenizer and the likelihood on a GPU: nothing on the wrong device, no read but the known ones."""

import re

from fake_cuda.harness import run_on_fake_cuda
from fake_cuda.image_steps import everything


def places(lines: list[str]) -> set[str]:
    """The functions that wait for the GPU."""
    return {re.search(r"\((.*)\)", line)[1] for line in lines}


def test_images_and_likelihood_keep_all_on_the_gpu():
    found = run_on_fake_cuda(everything)
    for name, run in found.items():
        assert run["mixed"] == [], name
    for name in ("training, muon, ema", "training, adamw, loss"):
        run = found[name]
        assert run["done"] and run["misplaced"] == []
        # a step with images of its own; "step 0" waits for the norm, the loss and its images alone
        assert places([line for line in run["syncs"] if line.startswith("step 0")]) == {
            "clip_gradients", "train_image_tokenizer"
        }  # fmt: skip
    assert found["use"]["shapes"] == [[3, 256], [3, 32, 32, 3]]
    assert places(found["likelihood"]["syncs"]) == {"bits"}
    assert found["likelihood"]["dense"] == []
