"""Tasks on threads, torch's and Python's: all of [0, n) is done once, each thread in memory of its own."""

import errno
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from numba import config

from nanochameleon.kernels import caches
from nanochameleon.kernels.cpu import launch
from nanochameleon.kernels.cpu.parallel_for import args_unpacker, fetch_add
from nanochameleon.kernels.cpu.simd import load, load1, splat, store, store1


class KernelArgs(NamedTuple):
    done: int  # (N,) float32: how often each was done
    by: int  # (N,) float32: a mark of the chunk that did it
    clashes: int  # int64: how often another thread wrote into the same scratch meanwhile
    step: float


unpack_args = args_unpacker(KernelArgs)


@launch.kernel
def count(args, chunk, first, last, scratch):
    args = unpack_args(args)
    for i in range(first, last):
        store(scratch, splat(load1(args.done + 4 * i) + args.step))
        for _ in range(100):
            store(scratch + 64, load(scratch))
        if load1(scratch + 64) != load1(args.done + 4 * i) + args.step:
            fetch_add(args.clashes)
        store1(args.done + 4 * i, load1(scratch + 64))
        store1(args.by + 4 * i, chunk)


def counted(n: int, chunks: int | None = None) -> tuple[list[float], list[float]]:
    done, by, clashes = torch.zeros(n), torch.full((n,), -1.0), torch.zeros(1, dtype=torch.long)
    launch.run(count, KernelArgs(done.data_ptr(), by.data_ptr(), clashes.data_ptr(), 0.5), n, 32, chunks)
    assert not clashes
    return done.tolist(), by.tolist()


@pytest.fixture(params=["torch's threads", "Python's threads"])
def way(request, monkeypatch):
    if request.param == "Python's threads":
        monkeypatch.setattr(launch, "openmp", lambda: None)


@pytest.fixture(params=[1, 2, 5])
def threads(request):
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


@pytest.mark.parametrize("n", [0, 1, 2, 7, 40, 3_000])
def test_every_task_runs_once_and_chunks_are_in_order(way, threads, n):
    done, by = counted(n)
    assert done == [0.5] * n and by == sorted(by) and -1 not in by


@pytest.mark.parametrize(("n", "chunks"), [(10, 3), (2, 5), (7, 1)])
def test_there_are_as_many_chunks_as_requested(way, threads, n, chunks):
    assert set(counted(n, chunks)[1]) == set(range(min(n, chunks)))


def test_python_s_own_threads_may_run_kernels_at_the_same_time(way, threads):
    with ThreadPoolExecutor(4) as pool:
        for done, _ in pool.map(counted, [500] * 40):
            assert done == [0.5] * 500


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """Where compiled kernels are kept in a test."""
    monkeypatch.setattr(launch, "cache_folder", lambda variable, wished, usual, name: tmp_path / name)
    return tmp_path


def compiled_count():
    """The kernel above, by a wrapper of Numba's that was not used before."""
    return launch.compiled(count.function, 5)


def test_a_kernel_is_compiled_once_and_then_read(kept):
    assert [compiled_count().cache_hits for _ in range(2)] == [0, 1]


def test_an_edit_of_any_kernel_source_makes_compiled_code_stale():
    seen = launch.sources(count.function)
    assert {*Path(launch.__file__).parents[1].rglob("*.py"), Path(__file__)} <= {*seen}


@pytest.mark.parametrize("ending", ["nbi", "nbc"])
def test_a_truncated_cache_file_is_compiled_again_with_a_warning(kept, caplog, ending):
    compiled_count()
    for path in kept.rglob(f"*.{ending}"):
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    caches.say.cache_clear()
    assert compiled_count().address
    assert str(kept) in caplog.text and "delete that folder" in caplog.text


def test_a_full_disk_costs_the_cache_alone(kept, monkeypatch, caplog):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("numba.core.caching.IndexDataCacheFile.save", full)
    caches.say.cache_clear()
    assert compiled_count().address and "No space left on device" in caplog.text


def test_a_kernel_runs_where_no_cache_can_be_written(tmp_path, monkeypatch):
    before = config.CACHE_DIR
    monkeypatch.setattr(launch, "cache_folder", lambda *_: None)
    monkeypatch.setitem(vars(count), "compiled", compiled_count())
    assert counted(7)[0] == [0.5] * 7
    assert before == config.CACHE_DIR


@pytest.mark.skipif(
    sys.platform != "linux", reason="torch's OpenMP is looked for on Linux; elsewhere Python's threads do"
)
def test_torch_s_openmp_is_found():
    assert launch.openmp() is not None
