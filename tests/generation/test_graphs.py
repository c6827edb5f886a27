"""Graphs without a GPU: stand-ins for torch.cuda note where each step runs, is captured and is replayed."""

from contextlib import contextmanager

import pytest
import torch
from tiny import N_CODES, VOCAB, tiny_model

from nanochameleon.config import SamplingParams
from nanochameleon.generation import graphs as module
from nanochameleon.generation.decoder import Decoder
from nanochameleon.generation.engine import Engine
from nanochameleon.generation.graphs import Graphs

GPU = torch.device("cuda:1")


class FakeCUDA:
    """The device and the stream that are current, and captures. broken: every capture fails, as CUDA's do, at its end.

    step: what a replay runs. state: the tensors that a capture leaves as they are.
    """

    def __init__(self, patch: pytest.MonkeyPatch, broken: bool = False, state: tuple[torch.Tensor, ...] = ()):
        self.broken, self.state, self.step = broken, state, None
        self.now_device, self.now_stream, self.capturing, self.n_captures, self.n_replays = 0, "main", False, 0, 0
        self.where = []  # of each step that noted it
        for name in ("device", "stream", "graph"):
            patch.setattr(torch.cuda, name, getattr(self, name))
        patch.setattr(torch.cuda, "Stream", FakeStream)
        patch.setattr(torch.cuda, "current_stream", FakeStream)
        patch.setattr(torch.cuda, "CUDAGraph", lambda: FakeGraph(self))

    def note(self) -> None:
        """A step that notes where it runs."""
        self.where.append((self.now_device, "a capture" if self.capturing else self.now_stream))

    @contextmanager
    def device(self, device: torch.device):
        before, self.now_device = self.now_device, device.index
        yield
        self.now_device = before

    @contextmanager
    def stream(self, stream: "FakeStream"):
        before, self.now_stream = self.now_stream, stream
        try:
            yield
        finally:
            self.now_stream = before

    @contextmanager
    def graph(self, graph: "FakeGraph", pool: str | None, stream: "FakeStream", capture_error_mode: str):
        assert stream is self.now_stream and capture_error_mode == "thread_local"
        assert pool == ("pool" if self.n_captures else None)
        before, self.capturing = [x.clone() for x in self.state], True
        try:
            yield
        finally:
            self.capturing = False
            for x, value in zip(self.state, before, strict=True):  # launches were recorded, none has run
                x.copy_(value)
        if self.broken:
            raise RuntimeError("CUDA error: operation failed due to a previous error during capture")
        self.n_captures += 1


class FakeStream:
    def __init__(self, device: torch.device):
        self.device = device

    def wait_stream(self, stream: "FakeStream") -> None:
        assert stream.device == self.device == GPU


class FakeGraph:
    def __init__(self, cuda: FakeCUDA):
        self.cuda = cuda

    def pool(self) -> str:
        return "pool"

    def replay(self) -> None:
        self.cuda.n_replays += 1
        self.cuda.step()


def test_a_step_warms_up_on_the_stream_of_its_capture_and_is_then_replayed(monkeypatch):
    cuda, graphs = FakeCUDA(monkeypatch), Graphs(GPU)
    cuda.step = cuda.note
    for key in ("a key", "another"):
        cuda.where.clear()
        for _ in range(4):
            graphs.run(key, cuda.note)
        assert cuda.where == [(1, graphs.stream), (1, "a capture"), *[(1, "main")] * 3]
    assert cuda.n_captures == 2 and cuda.n_replays == 6 and (cuda.now_device, cuda.now_stream) == (0, "main")


def decoded(patch: pytest.MonkeyPatch, broken: bool | None) -> tuple[list[list[int]], FakeCUDA]:
    """The tokens of guided requests, by an engine whose steps run as on a GPU; broken None: as on a CPU."""
    model = tiny_model(1).double()
    engine = Engine(model, VOCAB, N_CODES, 6)
    with torch.inference_mode():
        engine.decoder = decoder = Decoder(model, VOCAB, N_CODES, 6, engine.context)
    others = decoder.branch_slots, decoder.token_buffer, decoder.step_idx, decoder.cache.keys, decoder.cache.values
    cuda = FakeCUDA(patch, bool(broken), (*decoder.slot_tensors(), *others))

    class Watched(Graphs):
        def run(self, key, step):
            cuda.step = step  # the same as the captured one, since its key is the same
            super().run(key, step)

    decoder.graphs = Watched(torch.device("cpu") if broken is None else GPU)
    for i in range(8):
        params = SamplingParams(guidance_scale=2.0, image_guidance_scale=1.2, max_new_tokens=20)
        engine.add([VOCAB.bos, VOCAB.first_text + i], params, "both", (i,))
    new = [[] for _ in range(8)]
    for output in engine.run():
        new[output.request_id] += output.tokens
    return new, cuda


def test_replayed_steps_give_the_tokens_of_plain_ones(monkeypatch):
    tokens, cuda = decoded(monkeypatch, broken=False)
    assert tokens == decoded(monkeypatch, broken=None)[0]
    assert cuda.n_replays > cuda.n_captures > 1


def test_a_capture_that_fails_turns_graphs_off_with_one_warning(monkeypatch, capsys):
    module.warn_once.cache_clear()
    for _ in range(2):  # a second engine does not repeat the warning
        tokens, cuda = decoded(monkeypatch, broken=True)
        assert cuda.n_captures == cuda.n_replays == 0 and (cuda.now_device, cuda.now_stream) == (0, "main")
        assert tokens == decoded(monkeypatch, broken=None)[0]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and said.startswith("warning: decoding takes longer without CUDA graphs")
    assert "previous error during capture" in said


def test_a_step_that_is_wrong_raises_in_its_first_run(monkeypatch):
    FakeCUDA(monkeypatch)

    def wrong():
        raise RuntimeError("sizes differ")

    with pytest.raises(RuntimeError, match="sizes differ"):
        Graphs(GPU).run("a key", wrong)


def test_graphs_can_be_turned_off(monkeypatch):
    monkeypatch.setenv("NANOCHAMELEON_GRAPHS", "0")
    cuda, graphs = FakeCUDA(monkeypatch), Graphs(GPU)
    for _ in range(3):
        graphs.run("a key", cuda.note)
    assert cuda.where == [(0, "main")] * 3 and graphs.round_up(5, 16) == 5
    monkeypatch.delenv("NANOCHAMELEON_GRAPHS")
    assert Graphs(GPU).enabled and not Graphs(torch.device("cpu")).enabled
