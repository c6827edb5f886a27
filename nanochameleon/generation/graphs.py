"""Steps of fixed shape, captured once and replayed: a decode step is hundreds of small kernels, and launching each from
Python takes longer than running it. Off CUDA a step just runs.

A captured step works on the very tensors that it saw, so all it reads and writes must stay in place (decoder.py).
"""

from collections.abc import Callable, Hashable

import torch


class Graphs:
    """A graph for each key; equal keys must mean equal shapes and flags."""

    def __init__(self, device: torch.device):
        self.on = device.type == "cuda"
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # of memory, shared: no two graphs run at once

    def size(self, n: int, most: int) -> int:
        """Rows to run for n live ones: a power of two where graphs are captured, so that they stay few."""
        return min(most, 1 << (n - 1).bit_length()) if self.on else n

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """The first time plainly, which warms up what capturing must not; the second time captured, then replayed."""
        if not self.on or key not in self.graphs:
            self.graphs[key] = None
            return step()
        if self.graphs[key] is None:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self.pool):
                step()
            self.pool = graph.pool()
            self.graphs[key] = graph
        self.graphs[key].replay()
