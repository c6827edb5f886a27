"""CUDA graphs: a step of fixed shape is captured once and replayed.

A decode step is hundreds of small kernels, and launching each from Python takes longer than running it. On other
devices a step just runs, and with NANOCHAMELEON_GRAPHS=0 also on a GPU. A captured step works on the tensors that it
saw, so they must stay in place (decoder.py).
"""

import os
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import cache, cached_property

import torch

from nanochameleon.errors import warn


@cache
def warn_once(sentence: str) -> None:
    warn(sentence)


class Graphs:
    """One graph per key. Equal keys must mean equal shapes and flags."""

    def __init__(self, device: torch.device):
        self.device = device
        self.enabled = device.type == "cuda" and os.environ.get("NANOCHAMELEON_GRAPHS") != "0"
        self.graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self.pool = None  # memory that all graphs share, since no two of them run at once

    @cached_property
    def stream(self) -> torch.cuda.Stream:
        """Of this device: torch's own stream for captures is on the device of the first capture in the process."""
        return torch.cuda.Stream(self.device)

    def round_up(self, n: int, most: int) -> int:
        """Slots to run for n slots in use: with graphs the next power of two, so that there are few graphs."""
        return min(most, 1 << (n - 1).bit_length()) if self.enabled else n

    def run(self, key: Hashable, step: Callable[[], None]) -> None:
        """Run the step: the first time plainly, to warm up; the second time capture it; then replay."""
        is_new, graph = key not in self.graphs, self.graphs.setdefault(key, None)
        if not self.enabled:
            return step()
        with torch.cuda.device(self.device):  # a capture of another device's stream would be empty
            if is_new:
                # On the stream of the capture: what libraries allocate for a stream, they allocate now.
                with self.side_stream():
                    return step()
            graph = graph or self.capture(step)
            if graph is None:
                return step()
            self.graphs[key] = graph
            graph.replay()

    def capture(self, step: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """Capture the step. If that fails, return None and turn graphs off.

        A capture records launches and runs none of them. All state of a step is in tensors, so a step whose capture
        failed has changed nothing, and can be run plainly.
        """
        graph = torch.cuda.CUDAGraph()
        # thread_local: other threads, such as one that saves a checkpoint, may allocate memory meanwhile
        how = dict(pool=self.pool, stream=self.stream, capture_error_mode="thread_local")
        try:
            with self.side_stream(), torch.cuda.graph(graph, **how):
                step()
        except RuntimeError as error:
            self.enabled = False
            warn_once(f"decoding takes longer without CUDA graphs, since one could not be captured: {error}")
            return None
        self.pool = graph.pool()
        return graph

    @contextmanager
    def side_stream(self) -> Iterator[None]:
        """Launch on `stream`, after and before what the current stream runs.

        It also leaves `stream` where a capture failed, which torch.cuda.graph does not.
        """
        current = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            yield
        current.wait_stream(self.stream)
