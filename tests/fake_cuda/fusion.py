"""What Inductor, torch.compile's code generator, fuses for an H100, and how many bytes each kernel moves.

Inductor runs up to its scheduler, which decides on fusion; then the graph runs op by op on fake tensors. So no Triton is
needed. A kernel reads each of its inputs once and writes each of its outputs once: Inductor's own count.
"""

from collections.abc import Callable
from functools import partial
from unittest.mock import patch

import torch
from torch._inductor import scheduler
from torch._inductor.compile_fx import compile_fx, compile_fx_inner
from torch._inductor.graph import GraphLowering
from torch._inductor.utils import get_fused_kernel_name


class Scheduled(Exception):
    """The scheduler is done, and code is not wanted."""


Kernels = list[tuple[str, int]]  # name and bytes, in order


def count(graph: GraphLowering, kernels: Kernels):
    graph.init_wrapper_code()
    graph._update_scheduler()
    for node in graph.scheduler.nodes:
        moved = node.get_read_write_buffers_sizes()
        if node.is_extern():
            kernels.append((str(getattr(node.node, "python_kernel_name", None) or node.node.op_overload), moved))
        else:
            kernels.append((get_fused_kernel_name(node.get_nodes(), "original_aten"), moved))
    raise Scheduled


def backend(record: Callable[[str, Kernels], None]) -> Callable:
    """A backend for torch.compile. record("forward" or "backward", kernels) is called once for each graph."""

    def inner(gm: torch.fx.GraphModule, inputs: list, **options):
        kernels: Kernels = []
        answers = patch.multiple(scheduler, has_triton=lambda: True)
        with answers, patch.object(GraphLowering, "codegen", lambda graph: count(graph, kernels)):
            try:
                compile_fx_inner(copy.deepcopy(gm), inputs, **options)
            except Exception as e:
                if not isinstance(e, Scheduled) and not isinstance(e.__cause__, Scheduled) and "Scheduled" not in repr(e): raise
        record("backward" if options.get("is_backward") else "forward", kernels)
        from functorch.compile import make_boxed_func
        return make_boxed_func(gm.forward)

    return partial(compile_fx, inner_compile=inner)
import copy
