"""Runs one function in a process of its own that has the fake CUDA device; its result comes back as JSON."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fake_cuda.build import device_library

SECONDS = 240


def run_on_fake_cuda(function: Callable, **arguments) -> Any:
    """function(**arguments) in a child process with the fake CUDA device. One child for several checks: each takes 4 s.

    function: at the top level of a module. Arguments and result are what JSON holds: tuples become lists.
    Raises NoFakeDevice where the device cannot be made, and AssertionError with the child's last lines if it fails.
    """
    job = {
        "library": str(device_library()),
        "path": [*sys.path, str(Path(__file__).parents[2])],
        "arguments": arguments,
    }
    job |= {"module": function.__module__, "function": function.__name__}
    env = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1]), "OMP_NUM_THREADS": "1"}
    env["CUDA_VISIBLE_DEVICES"] = ""  # a real GPU would answer some questions of torch itself
    child = subprocess.run(
        [sys.executable, "-m", "fake_cuda.child", json.dumps(job)], env=env, capture_output=True, text=True,
        timeout=SECONDS, check=False,
    )  # fmt: skip
    assert child.returncode == 0, f"{job['function']} failed on the fake CUDA device:\n{child.stderr[-6000:]}"
    return json.loads(child.stdout.splitlines()[-1])
