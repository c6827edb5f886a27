"""Which blocks are compiled, that a compiler's failure does not end a run, and that sampling compiles nothing."""

import logging
from dataclasses import replace
from functools import partial

import pytest
import torch
from ranks import run_on
from small_runs import config
from test_transformer import random_model
from tiny import VOCAB, tiny_model
from torch import nn
from torch._dynamo.testing import CompileCounter

from nanochameleon.config import ParallelConfig
from nanochameleon.generation import fastest
from nanochameleon.packing import pack
from nanochameleon.parallel import compile as compiling
from nanochameleon.parallel.apply import wrap
from nanochameleon.parallel.compile import InductorOrEager, choose_compile, compile_blocks, eager
from nanochameleon.parallel.mesh import init_mesh
from nanochameleon.training.objective import Objective
from nanochameleon.transformer import Block

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.fixture(autouse=True)
def _restored(monkeypatch):
    settings = torch._dynamo.config
    names = ("optimize_ddp", "recompile_limit", "suppress_errors")
    monkeypatch.setattr(logging.getLogger("torch._dynamo.convert_frame"), "filters", [])
    with settings.patch({name: getattr(settings, name) for name in names}):
        yield


@pytest.mark.parametrize("requested, device, missing, on, reason", [
    ("auto", CUDA, None, True, "Triton and a C compiler"),
    ("auto", CUDA, "triton", False, "triton is missing"),
    ("auto", CUDA, "a whole layer", False, "ranks share"),
    ("auto", CUDA, "gcc", False, "no C compiler"),
    ("auto", CPU, None, False, "for GPUs"),
    ("on", CPU, "triton", True, "parallel.compile says"),
    ("off", CUDA, None, False, "parallel.compile says"),
])  # fmt: skip
def test_auto_compiles_where_a_gpu_has_what_that_takes(requested, device, missing, on, reason, monkeypatch):
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setattr(compiling, "find_spec", lambda name: None if missing == "triton" else name)
    monkeypatch.setattr(compiling.shutil, "which", lambda name: None if missing == "gcc" else f"/usr/bin/{name}")
    found, why = choose_compile(requested, device, 2 if missing == "a whole layer" else 1)
    assert found == on and reason in why


def loss(model: nn.Module) -> torch.Tensor:
    model.zero_grad()
    return model.logits(model(torch.arange(6).view(2, 3))).square().sum()


def fails(graph, inputs):
    raise RuntimeError("a compiler that fails\nand says a lot")


def fails_in_the_backward_graph(graph, inputs):
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.aot_autograd import make_boxed_func

    return aot_autograd(fw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), bw_compiler=fails)(
        graph, inputs
    )


@pytest.mark.parametrize("compiler", [fails, fails_in_the_backward_graph])
def test_a_compiler_that_fails_is_one_warning_and_the_step_is_eager(compiler, monkeypatch, capsys):
    model = random_model(0).train()
    loss(model).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    monkeypatch.setattr(compiling, "choose_compile", lambda *_: (True, ""))
    monkeypatch.setattr(compiling, "InductorOrEager", lambda: InductorOrEager(compiler))
    torch._dynamo.reset()
    compile_blocks(model.layers, "auto", CPU)
    for _ in range(2):
        loss(model).backward()
    # in float64; a graph that was traced rotates by the real product, whose last bits may differ
    torch.testing.assert_close([p.grad for p in model.parameters()], expected, rtol=1e-9, atol=1e-12)
    warning = "warning: torch.compile failed (RuntimeError: a compiler that fails); training continues without\n"
    assert capsys.readouterr().err == warning


def test_a_tracer_that_fails_is_one_warning_and_the_step_is_eager(monkeypatch, capfd):
    model = random_model(0).train()
    loss(model).backward()
    expected = [p.grad.clone() for p in model.parameters()]

    def fails(*_):
        raise RuntimeError("a tracer that fails\nand says a lot")

    monkeypatch.setattr(compiling, "choose_compile", lambda *_: (True, ""))
    monkeypatch.setattr(torch._dynamo.symbolic_convert.InstructionTranslator, "run", fails)
    torch._dynamo.reset()
    compile_blocks(model.layers, "auto", CPU)
    for _ in range(2):
        loss(model).backward()
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), expected, strict=True))
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith("warning: torch.compile failed (") and "a tracer that fails" in line


def graphs_inside_ddp() -> int:
    """In one forward pass, where a bucket of DDP holds a fraction of a block."""
    counter, ddp, parallel = CompileCounter(), nn.parallel.DistributedDataParallel, ParallelConfig(compile="on")
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch, init_mesh(parallel, 2, CPU) as mesh:
        patch.setattr(Block, "compile", lambda block: nn.Module.compile(block, backend=counter))
        patch.setattr(nn.parallel, "DistributedDataParallel", partial(ddp, bucket_cap_mb=0.001))
        objective = Objective(tiny_model(n_layers=4).train(), VOCAB, "fp32")
        wrap(objective, mesh, parallel).wrapped(pack([[1, 2, 3, 4]], 8, VOCAB.pad), None)
    return counter.frame_count


def test_ddp_does_not_cut_blocks():
    assert run_on(2, graphs_inside_ddp) == [2, 2]


def test_a_compiler_that_fails_ends_a_run_that_asked_for_it(monkeypatch):
    torch._dynamo.reset()
    model = random_model(0).train()
    monkeypatch.setattr(Block, "compile", lambda block: nn.Module.compile(block, backend=fails))
    compile_blocks(model.layers, "on", CPU)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed, match="a compiler that fails"):
        loss(model)


def test_blocks_share_two_graphs():
    torch._dynamo.reset()
    model, counter = random_model(0, n_layers=4).train(), CompileCounter()
    backend = InductorOrEager(counter)
    for block in model.layers:
        block.compile(backend=backend)
    loss(model).backward()
    assert counter.frame_count == 2


def test_sampling_in_a_training_compiles_nothing(tmp_path, monkeypatch):
    """A sheet of images is drawn at step 2 and a report at the end, by the decoder that GPUs take."""
    import train

    monkeypatch.setattr(fastest, "why_numba_unavailable", lambda *_: "as on a GPU")
    torch._dynamo.reset()
    counter, seen = CompileCounter(), {}
    monkeypatch.setattr(Block, "compile", lambda block: nn.Module.compile(block, backend=counter))

    def counted(name, function):
        def call(*arguments):
            before = counter.frame_count
            result = function(*arguments)
            seen[name] = counter.frame_count - before
            return result

        return call

    for name in ("write_sample_sheet", "make_report"):
        monkeypatch.setattr(train, name, counted(name, getattr(train, name)))
    cfg = config(tmp_path / "run", compile="on")
    train.main(replace(cfg, train=replace(cfg.train, steps=4, sample_every=2)))
    assert seen == {"write_sample_sheet": 0, "make_report": 0} and counter.frame_count > 0


def test_eager_runs_compiled_blocks_as_they_are():
    torch._dynamo.reset()
    model, counter = random_model(0), CompileCounter()
    for block in model.layers:
        block.compile(backend=counter)
    with eager():
        loss(model)
    assert counter.frame_count == 0
    loss(model)
    assert counter.frame_count > 0
