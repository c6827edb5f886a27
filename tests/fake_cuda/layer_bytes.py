"""Counts the bytes that a layer of the 1.4B moves between matmuls and attention once it is compiled for an H100.

    cd tests && python -m fake_cuda.layer_bytes

Inductor runs up to its scheduler, which decides what is fused, so no Triton is needed; then the graph runs op by op on
fake tensors. A kernel reads each of its inputs once and writes each of its outputs once: Inductor's own count.
"""

import copy
from dataclasses import replace
from functools import partial
from unittest.mock import patch

import torch

from fake_cuda.harness import run_on_fake_cuda


def layer_kernels() -> list:
    """[["forward", [[kernel, bytes], ...]], ["backward", ...]] of a block, not the first: it has no branch to add."""
    import torch._functorch.config
    import torch._inductor.config
    from torch._inductor.compile_fx import compile_fx

    from fake_cuda.device import CUDA, fake_tensors
    from fake_cuda.recorder import Recorder
    from fake_cuda.training_step import WIDE, documents, on_device
    from nanochameleon.training.precision import autocast

    torch._inductor.config.fx_graph_cache = torch._functorch.config.enable_autograd_cache = False
    torch._inductor.config.joint_graph_constant_folding = False  # it would run ops on the GPU
    found: list = []
    with fake_tensors(), Recorder():
        model, batch = on_device(replace(WIDE, n_layers=2)).train(), documents(0).to(CUDA)
        model.layers[1].compile(backend=partial(compile_fx, inner_compile=partial(schedule, found)))
        with autocast("bf16", CUDA):
            features = model.forward_features(batch.tokens, batch.positions, batch.documents)
        features.sum().backward()
    return found


def schedule(found: list, graph: torch.fx.GraphModule, inputs: list, **options):
    """In place of Inductor's compiler: note the kernels, and return the graph as it is."""
    from functorch.compile import make_boxed_func
    from torch._inductor import scheduler
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.graph import GraphLowering
    from torch._inductor.utils import get_fused_kernel_name

    kernels: list[tuple[str, int]] = []

    def note(lowered) -> None:
        lowered.init_wrapper_code()
        lowered._update_scheduler()
        for node in lowered.scheduler.nodes:
            fused = not node.is_extern() and get_fused_kernel_name(node.get_nodes(), "original_aten")
            name = fused or getattr(node.node, "python_kernel_name", None) or "outputs"
            kernels.append((name, node.get_read_write_buffers_sizes()))
        raise StopIteration  # no code is wanted

    with patch.object(scheduler, "has_triton", lambda: True), patch.object(GraphLowering, "codegen", note):
        try:
            compile_fx_inner(copy.deepcopy(graph), inputs, **options)
        except Exception as error:
            if not kernels:
                raise RuntimeError("Inductor did not come to its scheduler") from error
    found.append(["backward" if options.get("is_backward") else "forward", kernels])
    return make_boxed_func(graph.forward)


def between_matmuls() -> dict[str, list[tuple[str, int]]]:
    """{"forward": [(kernel, bytes), ...], "backward": ...}, without matmuls and attention."""
    passes = dict(run_on_fake_cuda(layer_kernels))
    return {name: [(kernel, n) for kernel, n in all_ if kernel.startswith("fused")] for name, all_ in passes.items()}


def main() -> None:
    passes = between_matmuls()
    for name, kernels in passes.items():
        print(f"{name}: {sum(n for _, n in kernels) / 1e9:.2f} GB")
        for kernel, n in kernels:
            print(f"    {n / 1e6:7.1f} MB  {kernel}")
    print(f"together: {sum(n for kernels in passes.values() for _, n in kernels) / 1e9:.2f} GB")


if __name__ == "__main__":
    import sys

    sys.modules["fake_cuda.layer_bytes"] = sys.modules["__main__"]
    layer_kernels.__module__ = "fake_cuda.layer_bytes"
    main()
