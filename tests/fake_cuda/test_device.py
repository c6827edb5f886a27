"""The fake CUDA device itself: what it is like, and that its absence turns tests red."""

import subprocess

import pytest
import torch

from fake_cuda import build
from fake_cuda.build import NoFakeDevice
from fake_cuda.harness import run_on_fake_cuda


def products() -> dict:
    from fake_cuda.device import CUDA, fake_tensors

    with fake_tensors(), torch.autocast("cuda", torch.bfloat16):
        weight = torch.nn.Parameter(torch.ones(3, 4, device="cuda"))
        y = torch.zeros(2, 4, device=CUDA) @ weight.T
        y.float().sum().backward()
        found = {"y": str(y.dtype), "device": str(y.device), "gradient": str(weight.grad.device)}
        try:
            y.float() + torch.zeros(3, device="cpu")
        except RuntimeError as error:
            found["mixed"] = str(error)
    return found | {"capability": torch.cuda.get_device_capability(), "printed": print("noise") is None}


def test_tensors_are_on_the_fake_device():
    found = run_on_fake_cuda(products)
    assert "tensors to be on the same device" in found.pop("mixed")
    assert found == {
        "y": "torch.bfloat16", "device": "cuda:0", "gradient": "cuda:0", "capability": [9, 0], "printed": True
    }  # fmt: skip
    assert not torch.cuda.is_available() or torch.version.cuda  # nothing of it is in this process


def fails() -> None:
    raise RuntimeError("this is why")


def test_a_failure_brings_its_reason():
    with pytest.raises(AssertionError, match="this is why"):
        run_on_fake_cuda(fails)


@pytest.mark.parametrize(
    "attribute, value, reason",
    [
        ("shutil.which", lambda name: None, "g\\+\\+ is missing"),
        ("cache_folder", lambda *_: None, "does not compile against the headers of torch"),
    ],
)
def test_where_it_cannot_be_made_the_test_is_red(attribute, value, reason, monkeypatch, tmp_path):
    monkeypatch.setattr(f"fake_cuda.build.{attribute}", value)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # nothing is compiled yet
    refused = subprocess.CompletedProcess([], 1, "", "error: 'NoOpDeviceGuardImpl' has no member")
    monkeypatch.setattr(build.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(NoFakeDevice, match=reason):
        run_on_fake_cuda(products)
