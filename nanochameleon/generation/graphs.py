"""CUDA graphs: a step of fixed shape is captured once and replayed.

A decode step is hundreds of small kernels, and launching each from Python takes longer than running it. On other
devices a step just runs. A captured step works on the tensors that it saw, so they must stay in place (decoder.py).
"""

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """One graph per key. Equal keys must mean equal shapes and flags."""

    def __init__(self, device: torch.device):
        self.enabled = device.type == "cuda"
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # memory that all graphs share, since no two of them run at once

    def round_up(self, n: int, most: int) -> int:
        """Slots to run for n slots in use: with graphs the next power of two, so that there are few graphs."""
        return min(most, 1 << (n - 1).bit_length()) if self.enabled else n

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step: the first time plainly, to warm up; the second time capture it; then replay."""
        if not self.enabled or key not in self.graphs:
            self.graphs[key] = None
            return step()
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                step()
            self.pool = graph.pool()
            self.graphs[key] = graph
        self.graphs[key].replay()
