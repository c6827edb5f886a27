"""Real faults on real runs: processes that are killed, stopped or hung; a full disk; torchrun's restarts.

    python tests/faults.py --times 10      kills 10 runs of each way at drawn moments, each twice, resumes with the same
                                           command, and compares the ends

The ways are 1 and 2 ranks, plain and FSDP, of a small toy whose settings are else the preset's. A kill may fall into
any stage: the tokenizers, the data, the transformer before and after its first checkpoint. test_faults.py has a few of
each; docs/results/parallel.md the figures of this script.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from ranks import free_port

TESTS = Path(__file__).parent
PATIENCE = 280  # seconds until a process is taken to hang


SMALL_TOY = (
    "toy", "--device=cpu", "--vqgan.ch=8", "--model.dim=64", "--model.n-layers=2", "--model.n-heads=2",
    "--tokenizers.n-texts=200", "--tokenizers.n-merges=40", "--tokenizers.steps=10", "--tokenizers.warmup-steps=4",
    "--tokenizers.batch-size=2", "--data.n-documents=100", "--train.steps=20", "--train.seq-len=256",
    "--train.save-every=6", "--train.sample-every=10", "--train.sample-minutes=None", "--train.log-every=2",
)  # fmt: skip


def small(folder: Path, **parallel):
    """The configuration of small_runs.py in the presets' precision and with sample sheets."""
    from dataclasses import replace

    from small_runs import config

    cfg = config(folder, precision="auto", **parallel)
    return replace(cfg, train=replace(cfg.train, sample_every=3))


def configuration(folder: Path, changes: dict):
    """The configuration of `program`: the small toy if changes have "whole", else one that saves after every step."""
    from dataclasses import replace

    from nanochameleon.cli import parse_run

    if changes.get("whole"):
        return parse_run([*SMALL_TOY, f"--out={folder}", f"--parallel.data-parallel={changes['whole']}"])
    cfg = small(folder, **changes.get("parallel", {}))
    return replace(cfg, train=replace(cfg.train, save_every=1, keep_checkpoints=3))


def program(folder: Path, changes: dict) -> None:
    """Run all stages but the report, in each process.

    changes: "parallel", fields of ParallelConfig; "whole", see configuration; "pause", seconds before each step, so
    that there is time to be killed in; "hangs", a rank that hangs in step 5.
    """
    import train
    from nanochameleon.errors import exit_on_user_error

    real, calls = train.forward_backward, itertools.count()

    def forward_backward(model, *arguments):
        if next(calls) == 5 and model.mesh.rank == changes.get("hangs"):
            signal.pause()
        time.sleep(changes.get("pause", 0.0))
        return real(model, *arguments)

    train.forward_backward, train.report = forward_backward, lambda *_: None
    exit_on_user_error(lambda: train.main(configuration(folder, changes)))


def as_process(folder: Path, changes: dict, environment: dict[str, str]) -> None:
    """Run `program` in a session of its own; its output goes to FOLDER.log."""
    os.setsid()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler if number == signal.SIGINT else signal.SIG_DFL)
    log = os.open(folder.with_suffix(".log"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.environ.update(environment)
    program(folder, changes)


class Launched:
    """A running training: ranks forked from one that has all modules loaded, which saves seconds each; or started by
    torchrun with so many restarts."""

    def __init__(self, folder: Path, ranks: int, torchrun: int | None = None, **changes):
        os.environ["PYTHONPATH"] = os.pathsep.join([str(TESTS), str(TESTS.parent)])
        self.torchrun = None
        if torchrun is not None:
            self.torchrun = start_torchrun(folder, ranks, torchrun, changes)
            return
        server = multiprocessing.get_context("forkserver")
        server.set_forkserver_preload(["train", "test_distributed", "matplotlib.figure"])
        names = {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.processes = []
        for rank in range(ranks):
            environment = {k: str(v) for k, v in (names | {"RANK": rank, "LOCAL_RANK": rank}).items()}
            arguments = folder, changes, environment
            self.processes.append(server.Process(target=as_process, args=arguments, daemon=True))
            self.processes[-1].start()

    @property
    def pids(self) -> list[int]:
        """Process ids of the ranks, in their order."""
        if self.torchrun is None:
            return [process.pid for process in self.processes]
        children = Path(f"/proc/{self.torchrun.pid}/task/{self.torchrun.pid}/children").read_text().split()
        return sorted(map(int, children))

    def send(self, number: int) -> None:
        """Send a signal to all processes, as a terminal or a scheduler does."""
        if self.torchrun:
            os.killpg(self.torchrun.pid, number)
            return
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(process.pid, number)

    def wait(self, which: slice = slice(None)) -> int:
        """Wait for all ranks, or these; returns 0 or the first other exit code. Raises TimeoutError."""
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
    """Wait until condition() is true. Raises TimeoutError."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError("nothing happened")
        time.sleep(0.01)


def lines(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def kill(run: Launched, ranks: int, chance: random.Random) -> bool:
    """Kill all ranks, or one, which the others notice; returns whether that was before the end."""
    if ranks > 1 and chance.random() < 0.5 and not run.ended():
        with suppress(ProcessLookupError):
            os.kill(chance.choice(run.pids), signal.SIGKILL)
    else:
        run.send(signal.SIGKILL)
    return run.wait() != 0


def kill_and_resume(prepared: Path, folder: Path, ranks: int, seed: int, kills: int = 1, **changes) -> int:
    """Kills the run at `kills` drawn moments after its next step, each time resuming with the same command; -> how
    often it was killed before its end."""
    chance, killed = random.Random(seed), 0
    shutil.copytree(prepared, folder)
    for _ in range(kills):
        run, before = Launched(folder, ranks, pause=0.04, **changes), lines(folder)
        wait_for(lambda run=run, before=before: lines(folder) > before or run.ended())
        time.sleep(chance.uniform(0, 0.6))
        killed += kill(run, ranks, chance)
    if Launched(folder, ranks, **changes).wait() != 0:
        raise AssertionError(f"it did not resume:\n{said(folder)[-3000:]}")
    return killed


CLOCKS = ("seconds", "tokens_per_second", "mfu", "memory_gib")


def end_of(folder: Path) -> dict:
    """The results of a run by name: the last step and all tensors of the newest whole checkpoint; tokenizers, data and
    sample sheets as bytes; the log without its clocks."""
    from nanochameleon.training import checkpoint
    from nanochameleon.training.monitor import read_metrics
    from nanochameleon.training.restore import stored_shapes
    from nanochameleon.weights.tensor_files import ShardedSafetensors

    path = checkpoint.newest(folder)
    shapes = stored_shapes(path)
    tensors = ShardedSafetensors(sorted(path.glob("*.safetensors")), shapes)
    images = checkpoint.newest(folder / "image_tokenizer").glob("*.safetensors")
    files = [folder / "text_tokenizer.json", *images, *folder.glob("data/*/*"), *folder.glob("samples/*")]
    log = [{k: v for k, v in line.items() if k not in CLOCKS} for line in read_metrics(folder / "metrics.jsonl")]
    end = {"step": checkpoint.read_state(path)["step"], "log": json.dumps(log)}
    end |= {str(file.relative_to(folder)): file.read_bytes() for file in files}
    return end | {name: tensors[name] for name in shapes}


def differences(one: dict, other: dict) -> list[str]:
    """Names of the results that are not bitwise the same."""
    import torch

    names = one.keys() & other.keys()
    equal = {name for name in names if torch.is_tensor(one[name]) and torch.equal(one[name], other[name])}
    equal |= {name for name in names if not torch.is_tensor(one[name]) and one[name] == other[name]}
    return sorted((one.keys() | other.keys()) - equal)


# ---------------------------------------------------------------------------------------------------------------------
# The whole run, as a program


STAGES = {
    "start": "*", "text tokenizer": "config.json", "image tokenizer": "text_tokenizer.json", "data": "data",
    "transformer": "metrics.jsonl", "transformer, saved": "step-*",
}  # fmt: skip


def stage_of(folder: Path) -> str:
    """How far a run has come: the last stage that has made something."""
    return next((stage for stage, made in reversed(STAGES.items()) if any(folder.glob(made))), "start")


def at_work(run: Launched, folder: Path) -> bool:
    """Whether its ranks have met. Before that, a rank whose peer was killed waits for parallel.timeout."""
    lock = folder / ".lock"
    return lock.exists() and lock.read_text() == str(run.pids[0])


def kill_anywhere(folder: Path, ranks: int, mode: str, seed: int, seconds: float) -> list[str]:
    """Begins a run that lasts so many seconds and kills it twice, each time at a drawn moment of a drawn stage, or
    later where that is done, and resumes with the same command; -> the stages in which it was killed."""
    chance, names, stages = random.Random(seed), list(STAGES), []
    for _ in range(2):
        run, aim = Launched(folder, ranks, whole=mode), chance.randrange(len(names))
        wait_for(lambda run=run, aim=aim: names.index(stage_of(folder)) >= aim or run.ended())
        time.sleep(chance.uniform(0, seconds / len(names)))
        stage = stage_of(folder)
        if kill(run, ranks if at_work(run, folder) else 1, chance):
            stages.append(stage)
    if Launched(folder, ranks, whole=mode).wait() != 0:
        raise AssertionError(f"it did not resume:\n{said(folder)[-3000:]}")
    return stages


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=10, help="runs of each way")
    args = parser.parse_args()
    sys.path[:0] = [str(TESTS), str(TESTS.parent)]
    ways, expected, equal, stages = list(itertools.product((1, 2), ("ddp", "fsdp"))), {}, 0, Counter()
    with tempfile.TemporaryDirectory() as place:
        for way in ways:
            whole, start = Path(place) / f"whole-{way}", time.monotonic()
            assert Launched(whole, way[0], whole=way[1]).wait() == 0, said(whole)
            expected[way] = time.monotonic() - start, end_of(whole)
        for number, (seed, way) in enumerate(itertools.product(range(args.times), ways), 1):
            (seconds, end), folder = expected[way], Path(place) / f"run-{number}"
            stages.update(kill_anywhere(folder, *way, seed, seconds))
            different = differences(end_of(folder), end)
            equal += not different
            print(f"{number} ({way}, seed {seed}): {different or 'the same bits'}; {dict(stages)}", flush=True)
            shutil.rmtree(folder)
    print(f"{equal} of {number} ended with the same bits; {stages.total()} kills before an end")
    sys.exit(equal < number)


if __name__ == "__main__":
    main()
