"""Real faults on real runs: processes that are killed, told to stop, hung; a full disk; torchrun's restarts.

    python tests/faults.py --times 20 --ranks 2      kills 20 runs, goes on with the same command, compares the ends

test_faults.py has a few of each; docs/results.md the figures of this script.
"""

import argparse
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path

from ranks import free_port

TESTS = Path(__file__).parent
PATIENCE = 120  # seconds until a process is taken to hang


def program(folder: Path, changes: dict) -> None:
    """What the processes run: the transformer's training. changes: "parallel", the fields of ParallelConfig; "pause",
    seconds before each step, so that there is a moment to be killed in; "hangs", a rank that does so in step 5."""
    from dataclasses import replace

    from test_distributed import config

    import train
    from nanochameleon.errors import exit_on_user_error

    real = train.Training.step

    def step(self, monitor, stopped):
        if self.trainee.mesh.rank == changes.get("hangs") and self.progress.step == 5:
            signal.pause()
        time.sleep(changes.get("pause", 0.0))
        return real(self, monitor, stopped)

    train.Training.step, train.report = step, lambda *_: None
    cfg = config(folder, **changes.get("parallel", {}))
    cfg = replace(cfg, train=replace(cfg.train, save_every=1, keep=3))
    exit_on_user_error(lambda: train.main(cfg))


def as_process(folder: Path, changes: dict, environment: dict[str, str]) -> None:
    """program, in a session of its own, its words in FOLDER.log."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    program(folder, changes)


class Launched:
    """A run at work. ranks 1 or more: processes forked from one that has all modules loaded, which saves seconds each;
    torchrun: started by it, with so many restarts."""

    def __init__(self, folder: Path, ranks: int, torchrun: int | None = None, **changes):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self.torchrun = None
        if torchrun is not None:
            self.torchrun = start_torchrun(folder, ranks, torchrun, changes)
            return
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["train", "test_distributed"])
        names = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = []
        for rank in range(ranks):
            environment = {k: str(v) for k, v in (names | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            arguments = folder, changes, environment
            self.processes.append(server.Process(target=as_process, args=arguments, daemon=True))
            self.processes[-1].start()

    @property
    def pids(self) -> list[int]:
        """Of the ranks, in their order."""
        if self.torchrun is None:
            return [process.pid for process in self.processes]
        children = Path(f"/proc/{self.torchrun.pid}/task/{self.torchrun.pid}/children").read_text().split()
        return sorted(map(int, children))

    def send(self, number: int) -> None:
        """To all processes, as a terminal or a scheduler does."""
        if self.torchrun:
            os.killpg(self.torchrun.pid, number)
            return
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def wait(self, which: slice = slice(None)) -> int:
        """The exit code, 0 where all ended well, or these ranks. Raises TimeoutError."""
        if self.torchrun:
            return self.torchrun.wait(PATIENCE)
        for process in self.processes[which]:
            process.join(PATIENCE)
            if process.exitcode is None:
                raise TimeoutError("it hangs")
        return next((process.exitcode for process in self.processes[which] if process.exitcode), 0)

    def ended(self) -> bool:
        if self.torchrun:
            return self.torchrun.poll() is not None
        return all(process.exitcode is not None for process in self.processes)


def start_torchrun(folder: Path, ranks: int, restarts: int, changes: dict) -> subprocess.Popen:
    script = folder.with_suffix(".py")
    script.write_text(f"import faults, pathlib\nfaults.program(pathlib.Path({str(folder)!r}), {changes!r})\n")
    where = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--max-restarts", str(restarts)]
    words = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks), *where, str(script)]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    with folder.with_suffix(".log").open("a") as log:
        return subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment, start_new_session=True)


def said(folder: Path) -> str:
    return folder.with_suffix(".log").read_text()


def wait_for(condition, seconds: float = PATIENCE) -> None:
    """Raises TimeoutError where it does not come true."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("nothing happened")
        time.sleep(0.01)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill_and_go_on(prepared: Path, folder: Path, ranks: int, seed: int, kills: int = 1, **changes) -> int:
    """Kills the run at `kills` drawn moments, the whole group or one rank of it, each time going on with the same
    command; -> how often it was killed before its end."""
    chance, killed = random.Random(seed), 0
    shutil.copytree(prepared, folder)
    for _ in range(kills):
        run, before = Launched(folder, ranks, pause=0.04, **changes), lines(folder)
        wait_for(lambda run=run, before=before: lines(folder) > before or run.ended())
        time.sleep(chance.uniform(0, 0.6))
        if ranks > 1 and chance.random() < 0.5 and not run.ended():
            with suppress(ProcessLookupError):
                os.kill(chance.choice(run.pids), signal.SIGKILL)  # the others notice
        else:
            run.send(signal.SIGKILL)
        killed += run.wait() != 0
    if Launched(folder, ranks, **changes).wait() != 0:
        raise AssertionError(f"it did not go on:\n{said(folder)[-3000:]}")
    return killed


def end_of(folder: Path) -> dict:
    """The last step and all tensors of the newest whole checkpoint."""
    from nanochameleon import checkpoint
    from nanochameleon.tensor_files import Cut

    path = checkpoint.newest(folder)
    names = checkpoint.stored_shapes(path).keys()
    tensors = Cut(sorted(path.glob("*.safetensors")), names)
    return {"step": checkpoint.read_state(path)["step"]} | {name: tensors[name] for name in names}


def same(one: dict, other: dict) -> bool:
    import torch

    return one.keys() == other.keys() and one["step"] == other["step"] and all(
        torch.equal(one[name], other[name]) for name in one if name != "step"
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=20)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--mode", choices=["ddp", "fsdp"], default="ddp")
    args = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    from test_distributed import prepare

    parallel = {"parallel": {"mode": args.mode}}
    with tempfile.TemporaryDirectory() as place:
        prepared, whole = prepare(Path(place) / "prepared", mode=args.mode), Path(place) / "whole"
        shutil.copytree(prepared, whole)
        assert Launched(whole, args.ranks, **parallel).wait() == 0, said(whole)
        expected, equal, killed = end_of(whole), 0, 0
        for seed in range(args.times):
            folder = Path(place) / f"run{seed}"
            killed += kill_and_go_on(prepared, folder, args.ranks, seed, **parallel)
            equal += same(end_of(folder), expected)
            print(f"{seed + 1} runs, {killed} killed before their end, {equal} ended with the same bits", flush=True)
    sys.exit(equal < args.times)


if __name__ == "__main__":
    main()
