"""Compiles guard.cpp against torch's own headers, once for each version of both."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch
from torch.utils.cpp_extension import include_paths

from nanochameleon.kernels.caches import cache_folder

SOURCE = Path(__file__).parent / "guard.cpp"
# C++20: since torch 2.12 its headers need it, and older ones allow it. -w: their warnings are not ours.
FLAGS = ["-std=c++20", "-O0", "-w", "-shared", "-fPIC",
         f"-D_GLIBCXX_USE_CXX11_ABI={int(torch._C._GLIBCXX_USE_CXX11_ABI)}"]  # fmt: skip


class NoFakeDevice(Exception):
    """Why there can be no fake CUDA device here, in one sentence."""


def device_library() -> Path:
    """The compiled guard. Raises NoFakeDevice if it cannot be compiled."""
    if torch.version.hip:
        raise NoFakeDevice(
            f"torch {torch.__version__} is built for AMD GPUs, whose device the fake one cannot replace: "
            "install torch's build for CPUs or for CUDA to run these tests"
        )
    if shutil.which("g++") is None:
        raise NoFakeDevice("the fake CUDA device is C++, and g++ is missing: install it (Debian: apt install g++)")
    built_from = f"{SOURCE.read_text()} {torch.__file__} {torch.__version__} {FLAGS}"
    name = hashlib.sha256(built_from.encode()).hexdigest()[:16]
    folder = cache_folder("NANOCHAMELEON_CACHE", "") or Path(tempfile.gettempdir())
    path = folder / f"fake-cuda-{name}.so"
    if not path.is_file():
        compile_guard(path)
    return path


def compile_guard(path: Path) -> None:
    """Compile aside, then rename: two test workers may do so at once. Raises NoFakeDevice with the compiler's words."""
    libraries = Path(torch.__file__).parent / "lib"
    with tempfile.TemporaryDirectory(dir=path.parent) as aside:
        new = Path(aside) / path.name
        command = ["g++", *FLAGS, *(f"-I{folder}" for folder in include_paths()), str(SOURCE), "-o", str(new)]
        # A torch built for CUDA registers its device when it is loaded, so it has to come first: the last one counts.
        linked = ["-lc10", "-ltorch_cpu", *(["-Wl,--no-as-needed", "-ltorch_cuda"] if torch.version.cuda else [])]
        done = subprocess.run(
            [*command, f"-L{libraries}", f"-Wl,-rpath,{libraries}", *linked],
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise NoFakeDevice(
                f"guard.cpp does not compile against the headers of torch {torch.__version__}, so it has to be "
                f"adapted to that version:\n{done.stderr[-3000:]}"
            )
        new.replace(path)
