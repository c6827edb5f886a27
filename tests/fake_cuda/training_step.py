"""A training step of the 1.4B's width on the fake device, as train.py's loop takes it; runs in the child process."""

from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from types import SimpleNamespace
from unittest.mock import patch

import torch
from torch import Tensor

import train
from fake_cuda.device import CUDA, fake_tensors
from fake_cuda.recorder import Recorder
from nanochameleon.config import ModelConfig, OptimConfig, ParallelConfig, TrainConfig
from nanochameleon.kernels.dispatch import use_kernels
from nanochameleon.optim import make_optimizer
from nanochameleon.packing import Batch, pack
from nanochameleon.parallel.apply import wrap
from nanochameleon.parallel.mesh import Mesh
from nanochameleon.presets import toy
from nanochameleon.training.objective import Objective
from nanochameleon.training.precision import autocast
from nanochameleon.training.recovery import Progress
from nanochameleon.transformer import Chameleon
from nanochameleon.vocab import Vocab

LAYERS, SEQUENCES, SEQ_LEN = 3, 4, 4_096
VOCAB = Vocab()
WIDE = ModelConfig(dim=2_048, n_layers=LAYERS, n_heads=16)  # the 1.4B has 22 layers
BACKEND = "aot_eager_decomp_partition"  # all of torch.compile but Inductor's code, which needs Triton


def documents(step: int) -> Batch:
    """SEQUENCES of several documents with images of 1,024 codes, and padding; more and shorter documents each step."""
    image = [VOCAB.boi, *range(VOCAB.first_code, VOCAB.first_code + 1_024), VOCAB.eoi]
    text = [VOCAB.bos, *range(VOCAB.first_text, VOCAB.first_text + 300)]
    packed = [[*text, *image] for _ in range(2 * SEQUENCES)] + [[*text, *image, *text]] * SEQUENCES
    packed += [text[: 300 // (step + 1)]] * (8 * step)
    return pack(packed, SEQ_LEN, VOCAB.pad)[:SEQUENCES]


def on_device(cfg: ModelConfig, dtype: torch.dtype = torch.float32) -> Chameleon:
    torch.set_default_dtype(dtype)  # torch cannot convert a module of fake tensors
    try:
        with patch.object(Chameleon, "init_weights", lambda self: None), torch.device(CUDA):
            return Chameleon(cfg)
    finally:
        torch.set_default_dtype(torch.float32)


def training_config(case: dict) -> SimpleNamespace:
    train_cfg = TrainConfig(
        steps=3, batch_size=SEQUENCES, seq_len=SEQ_LEN, precision=case["precision"], sample_every=10**6,
        fused_output=case.get("fused_output", "auto"), save_every=10**6,
    )  # fmt: skip
    parallel = {"micro_batch": 2, "activation_checkpointing": case.get("activation_checkpointing", False)}
    parallel["compile"] = "on" if case.get("compile") else "off"
    optim = OptimConfig(name=case.get("optim", "adamw"))
    return replace(
        toy(), model=replace(WIDE, dropout=case.get("dropout", 0.0)), optim=optim, train=train_cfg,
        parallel=ParallelConfig(**parallel),
    )  # fmt: skip


class Phases:
    """Tells the recorder where the loop is: the second of three steps, the only one that logs and saves nothing."""

    def __init__(self, recorder: Recorder):
        self.recorder, self.step = recorder, -1

    def watch(self, stack: ExitStack, name: str) -> None:
        real = getattr(train, name)

        def watched(*args):
            self.enter(name)
            try:
                return real(*args)
            finally:
                self.enter("between")

        stack.enter_context(patch.object(train, name, watched))

    def enter(self, name: str) -> None:
        self.recorder.phase = name if self.step == 1 else "other"

    def batch(self, number: int, rows: slice) -> Batch:
        self.step = number
        self.enter("batch")
        return documents(number)[rows]


def training_step(case: dict) -> dict:
    """Three steps of train.train_loop; what the recorder found in the second, and where the optimizer's state is."""
    recorder, cfg = Recorder(SEQ_LEN), training_config(case)
    phases = Phases(recorder)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    with fake_tensors(), use_kernels(case.get("kernels", "auto")), ExitStack() as stack, recorder:
        model = on_device(cfg.model)
        objective = Objective(model, VOCAB, cfg.train.precision, None, cfg.train.fused_output)
        stack.enter_context(patch("torch.compile", partial(torch.compile, backend=BACKEND)))
        parallel = wrap(objective, Mesh(CUDA), cfg.parallel)
        optimizer = make_optimizer(model, cfg.optim)
        for name in ("forward_backward", "clip_gradients", "optimizer_step"):
            phases.watch(stack, name)
        saver = SimpleNamespace(save=lambda *_, **__: None)
        run = SimpleNamespace(vocab=VOCAB)
        train.train_loop(
            cfg, run, parallel, optimizer, SimpleNamespace(batch=phases.batch), saver, Progress(), None, lambda: False
        )
        after_step = misplaced(optimizer)
        again = make_optimizer(model, cfg.optim)
        again.load_state_dict(host_copy(optimizer.state_dict()))
        after_loading = misplaced(again)
    compiled = torch._dynamo.utils.counters
    return {
        "syncs": [line for line in recorder.syncs if not line.startswith("other")],
        "mixed": recorder.mixed,
        "dense": [line for line in recorder.dense if not line.startswith("other")],
        "misplaced": after_step + after_loading,
        "graphs": compiled["stats"]["unique_graphs"],
        "graph_breaks": sum(compiled["graph_break"].values()),
    }


def misplaced(optimizer: torch.optim.Optimizer) -> list[str]:
    """Entries of the optimizer's state that are not on their parameter's device."""
    return [
        f"{name} of {tuple(parameter.shape)} on {x.device}"
        for parameter, state in optimizer.state.items()
        for name, x in state.items()
        if isinstance(x, Tensor) and x.device != parameter.device
    ]


def host_copy(state: dict) -> dict:
    """A state as a checkpoint's reader gives it: all of it on the CPU."""
    return torch.utils._pytree.tree_map(lambda x: x.cpu() if isinstance(x, Tensor) else x, state)


def training_steps(cases: dict[str, dict]) -> dict[str, dict]:
    """Each case's name -> what its steps showed."""
    with patch("nanochameleon.kernels.gpu.packages.missing_cuda_package", lambda: None):
        return {name: training_step(case) for name, case in cases.items()}


def saved_bytes() -> int:
    """Bytes that one compiled layer keeps for the backward pass in bf16, without copies of its weights."""
    return kept_by(3) - kept_by(2)


def kept_by(layers: int) -> int:
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        if x.ndim > 2 or (
            x.ndim and len(x) == SEQUENCES * SEQ_LEN
        ):  # weights have two dimensions, activations a row a token
            kept[x.untyped_storage()._cdata] = x.untyped_storage().nbytes()
        return x

    torch._dynamo.reset()
    with fake_tensors(), Recorder():
        model, batch = on_device(replace(WIDE, n_layers=layers)).train(), documents(0).to(CUDA)
        for block in model.layers:
            block.compile(backend=BACKEND)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x), autocast("bf16", CUDA):
            features = model.forward_features(batch.tokens, batch.positions, batch.documents)
        features.sum().backward()  # until here autograd holds them all, so no address is used twice
    return sum(kept.values())
