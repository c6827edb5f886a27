"""The child process of harness.py: the device first, since torch looks for one while it is imported."""

import ctypes
import json
import os
import sys
from importlib import import_module


def main(job: dict) -> None:
    sys.path[:] = job["path"]
    ctypes.CDLL(job["library"])
    from fake_cuda.device import answer_for_a_gpu

    answer_for_a_gpu()
    function = getattr(import_module(job["module"]), job["function"])
    print(json.dumps(function(**job["arguments"])), flush=True)
    os._exit(0)  # an ordinary end now and then aborts while autograd's thread of the device is taken down


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
