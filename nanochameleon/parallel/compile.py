"""torch.compile of the transformer's blocks, for GPUs: it fuses the operations between matmuls.

All blocks share one program. Two graphs are compiled at first: the first block gets no branch to add, the others do.
Both are compiled once more when the documents of a batch change, then for any documents; and so for a micro-batch of
another size.
"""

import logging
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec

import torch
from torch import nn

from nanochameleon.errors import shown, warn


def choose_compile(requested: str, device: torch.device, tp_size: int = 1) -> tuple[bool, str]:
    """Whether blocks are compiled on this device, and why. requested: "auto", "on" or "off".

    tp_size: ranks that share each layer. torch.compile cannot trace how they split QK-norm's groups.
    """
    if requested != "auto":
        return requested == "on", "as parallel.compile says"
    if device.type != "cuda":
        return False, "auto compiles for GPUs"
    if tp_size > 1:
        return False, "blocks that ranks share are not compiled"
    if not find_spec("triton"):
        return False, "the package triton is missing"
    if not shutil.which(os.environ.get("CC") or "gcc") and not shutil.which("clang"):  # Triton compiles its launchers
        return False, "there is no C compiler: install gcc, or set CC"
    return True, "auto: this GPU has Triton and a C compiler"


class InductorOrEager:
    """A backend of torch.compile: inductor, and after the first failure the graph as it is, with one warning.

    So a run that never asked for torch.compile does not end with it. compiler: (graph, its inputs) -> a callable.
    """

    def __init__(self, compiler: Callable | None = None):
        self.compiler = compiler or torch._dynamo.lookup_backend("inductor")
        self.failed = False

    def __call__(self, graph: torch.fx.GraphModule, inputs: Sequence) -> Callable:
        from torch._functorch import config

        # The backward graph is compiled here, too: later, an error would come out of loss.backward().
        at_once = {name: True for name in ("force_non_lazy_backward_lowering",) if hasattr(config, name)}
        if not self.failed:
            try:
                with config.patch(at_once):
                    return self.compiler(graph, inputs)
            except Exception as error:  # of a compiler, a driver, a full disk
                self.give_up(error)
        return graph.forward

    def give_up(self, error: BaseException) -> None:
        if not self.failed:
            warn(f"torch.compile failed ({type(error).__name__}: {shown(error, 160)}); training continues without")
        self.failed = True

    def suppress_dynamo(self) -> None:
        """Run what dynamo, which makes the graphs, fails to trace as it is. It logs pages about each such error."""
        torch._dynamo.config.suppress_errors = True
        logging.getLogger("torch._dynamo.convert_frame").addFilter(self.is_news)

    def is_news(self, record: logging.LogRecord) -> bool:
        """Whether dynamo's record is logged: a suppressed error is not, since give_up says it in one sentence."""
        error = record.exc_info[1] if record.exc_info else None
        if error:
            self.give_up(error)
        return not error


def compile_blocks(blocks: Sequence[nn.Module], requested: str, device: torch.device, tp_size: int = 1) -> None:
    """Compile each block at its first call, if that was chosen. "on" raises what the compiler raises.

    Changes torch's configuration for the whole process.
    """
    if not choose_compile(requested, device, tp_size)[0]:
        return
    # Inside DDP, torch would cut each graph at 25 MB of parameters so that gradients are summed during the backward
    # pass. They are anyway: each block is a graph of its own.
    torch._dynamo.config.optimize_ddp = False
    # All blocks share one function, which torch would run eagerly from the ninth graph on.
    torch._dynamo.config.recompile_limit = 32
    options = {}
    if requested == "auto":
        options["backend"] = backend = InductorOrEager()
        backend.suppress_dynamo()
    for block in blocks:
        block.compile(**options)


@contextmanager
def eager() -> Iterator[None]:
    """Run compiled blocks as they are."""
    if "torch._dynamo" not in sys.modules:  # nothing is compiled, and the import takes seconds
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
