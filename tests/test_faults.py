"""What a run survives: kills, signals, dead and hung ranks, a full disk, damaged and hostile checkpoints. All of it is
done for real, to processes of their own (faults.py)."""

import os
import pickle
import resource
import shutil
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
from faults import Launched, differences, end_of, kill_and_resume, lines, said, wait_for
from faults import small as config
from ranks import run_on
from small_runs import learn, prepare
from small_runs import trained as trained_in

import train
from nanochameleon.errors import UserError
from nanochameleon.training import checkpoint
from nanochameleon.training.run import CONFIG, config_to_json
from nanochameleon.training.run_folder import LOCK

trained = partial(trained_in, precision="auto")  # as presets have it


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    return prepare(tmp_path_factory.mktemp("prepared") / "run", precision="auto")


@pytest.fixture(scope="module")
def ends(prepared, tmp_path_factory) -> dict[int, dict]:
    """How undisturbed runs of one and of two ranks end."""
    place, found = tmp_path_factory.mktemp("whole"), {}
    for ranks in (1, 2):
        folder = Path(shutil.copytree(prepared, place / str(ranks)))
        assert Launched(folder, ranks).wait() == 0, said(folder)
        found[ranks] = end_of(folder)
    return found


@pytest.mark.parametrize("ranks, seed", [(1, 0), (2, 1)])
def test_a_run_killed_at_any_moment_resumes_and_ends_with_the_same_bits(ranks, seed, prepared, ends, tmp_path):
    kill_and_resume(prepared, tmp_path / "run", ranks, seed, kills=2)
    assert differences(end_of(tmp_path / "run"), ends[ranks]) == []
    assert list((tmp_path / "run").glob(".tmp-*")) == []


@pytest.mark.parametrize("ranks, number", [(1, signal.SIGTERM), (1, signal.SIGINT), (2, signal.SIGTERM)])
def test_a_run_that_gets_a_stop_signal_saves_and_resumes_with_the_same_bits(ranks, number, prepared, ends, tmp_path):
    """As a scheduler tells it, all processes at once, or a terminal."""
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    run = Launched(folder, ranks, pause=0.05)
    wait_for(lambda: lines(folder) >= 3)
    run.send(number)
    assert run.wait() == 128 + number, said(folder)
    assert "stopped and saved in" in said(folder) and 3 <= checkpoint.read_state(checkpoint.newest(folder))["step"] < 12
    assert Launched(folder, ranks).wait() == 0, said(folder)
    assert differences(end_of(folder), ends[ranks]) == []


def test_torchrun_s_ranks_stop_together_and_start_again_when_one_is_lost(prepared, ends, tmp_path):
    """Stopped by the signal that torchrun sends on; then a rank is killed, and torchrun restarts all."""
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    run = Launched(folder, 2, torchrun=0, pause=0.05)
    wait_for(lambda: lines(folder) >= 3)
    run.send(signal.SIGINT)
    run.wait()
    reached = checkpoint.read_state(checkpoint.newest(folder))["step"]
    assert "stopped and saved in" in said(folder) and 3 <= reached < 9
    run = Launched(folder, 2, torchrun=1, pause=0.05)
    wait_for(lambda: lines(folder) > reached)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait() == 0, said(folder)
    assert differences(end_of(folder), ends[2]) == []


def test_ranks_whose_torchrun_was_killed_save_and_end(prepared, tmp_path):
    """Sharded, since a save has more to say to other ranks then."""
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    run = Launched(folder, 2, torchrun=0, pause=0.05, parallel={"data_parallel": "fsdp"})
    wait_for(lambda: lines(folder) >= 2)
    os.kill(run.torchrun.pid, signal.SIGKILL)
    wait_for(lambda: not (folder / LOCK).exists())
    assert "torchrun has ended without its ranks" in said(folder) and "stopped and saved in" in said(folder)
    assert 2 <= checkpoint.read_state(checkpoint.newest(folder))["step"] < 12


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_second_training_in_a_folder_is_refused_and_the_first_one_untouched(ranks, prepared, ends, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    run = Launched(folder, ranks, pause=0.05)
    wait_for(lambda: lines(folder) >= 2)
    for overwrite in (False, True):
        with pytest.raises(UserError, match=f"process {run.pids[0]} trains in {folder}: wait for it"):
            train.main(replace(config(folder), overwrite=overwrite))
    assert run.wait() == 0, said(folder)
    assert differences(end_of(folder), ends[ranks]) == []


def test_a_lost_rank_ends_the_run_with_a_sentence(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    run = Launched(folder, 2, pause=0.05)
    wait_for(lambda: lines(folder) >= 3)
    os.kill(run.pids[1], signal.SIGKILL)
    assert run.wait() != 0 and "error: rank 0 of 2: another rank has died" in said(folder)


def test_a_hung_rank_ends_the_run_with_a_sentence(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    run = Launched(folder, 2, hangs=1, parallel={"timeout": 4})
    code = run.wait(which=slice(0, 1))
    assert code != 0 and "another rank has died, or has not answered for 4 s" in said(folder)
    run.send(signal.SIGKILL)


# ---------------------------------------------------------------------------------------------------------------------
# A full disk


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB, or where nobody may mount one a limit of 30 KB a file, which cuts writes off as well."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=8m", "none", disk]
    mounted = subprocess.run(mount, capture_output=True).returncode == 0
    yield disk, mounted
    if mounted:
        subprocess.run(["umount", "-l", disk], check=True)


@contextmanager
def file_size_limit(n: int) -> Iterator[None]:
    before, heard = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, heard)


def fill_up(disk: Path) -> None:
    """Leaves 100 KB."""
    (disk / "full").write_bytes(bytes(max(0, shutil.disk_usage(disk).free - 100_000)))


def test_a_full_disk_loses_nothing_and_the_run_can_be_resumed(prepared, ends, small_disk, tmp_path):
    disk, mounted = small_disk
    folder = Path(shutil.copytree(prepared, disk / "run"))
    first = trained(prepared, folder, 1, until=2)
    kept = checkpoint.newest(first)
    if mounted:
        fill_up(disk)
    limit = nullcontext() if mounted else file_size_limit(30_000)
    with pytest.raises(UserError, match=r"cannot save a checkpoint in .*older checkpoints are untouched"), limit:
        learn(folder, config(folder))
    assert checkpoint.newest(folder) == kept and checkpoint.damage(kept) is None
    (disk / "full").unlink(missing_ok=True)
    assert list(folder.glob(".tmp-*")) == []
    learn(folder, config(folder))
    assert differences(end_of(folder), ends[1]) == []


def test_a_save_that_fails_is_a_warning_and_the_run_continues(prepared, ends, small_disk, capsys, monkeypatch):
    """The disk has room again before the last save."""
    disk, mounted = small_disk
    folder = Path(shutil.copytree(prepared, disk / "run"))
    real = checkpoint.save

    def save(run_dir, step, *rest):
        if step == 4 and mounted:
            fill_up(disk)
        with nullcontext() if mounted or step != 4 else file_size_limit(30_000):
            try:
                return real(run_dir, step, *rest)
            finally:
                (disk / "full").unlink(missing_ok=True)

    monkeypatch.setattr(checkpoint, "save", save)
    learn(folder, config(folder))
    assert "cannot save a checkpoint" in capsys.readouterr().err
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-000012", "step-000008"]
    assert differences(end_of(folder), ends[1]) == []


def learn_without_a_place_for_one(folder: Path) -> None:
    """The first rank cannot put the shards of step 4 in their place."""
    real = checkpoint.commit

    def commit(aside, run_dir, step, *rest):
        if step == 4:
            raise OSError("no room")
        return real(aside, run_dir, step, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoint, "commit", commit)
        learn(folder, config(folder, data_parallel="fsdp"))


def test_shards_that_cannot_be_renamed_are_a_warning_and_all_ranks_continue(prepared, tmp_path):
    folder = Path(shutil.copytree(prepared, tmp_path / "run"))
    (folder / CONFIG).write_text(config_to_json(config(folder, data_parallel="fsdp")))
    run_on(2, learn_without_a_place_for_one, folder)
    assert [path.name for path in checkpoint.checkpoints(folder)] == ["step-000012", "step-000008"]
    assert checkpoint.newest(folder).name == "step-000012" and list(folder.glob(".tmp-*")) == []


# ---------------------------------------------------------------------------------------------------------------------
# Damaged and hostile checkpoints of shards


@pytest.fixture(scope="module")
def sharded(prepared, tmp_path_factory) -> Path:
    """With checkpoints at 4 and 8 steps. Read only."""
    return trained(prepared, tmp_path_factory.mktemp("sharded") / "run", 2, until=8, data_parallel="fsdp")


@pytest.mark.parametrize("where", ["shard-00001", "shard-00002", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "missing"])
def test_a_damaged_shard_is_noticed_and_the_checkpoint_before_is_taken(where, damage, sharded, tmp_path, capsys):
    folder = Path(shutil.copytree(sharded, tmp_path / "run"))
    (file,) = checkpoint.newest(folder).glob(f"{where}*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.unlink()
    if damage != "missing":
        file.write_bytes(data if damage == "flipped" else data[:-1])
    assert checkpoint.newest(folder).name == "step-000004"
    assert f"passing over {folder / 'step-000008'}" in capsys.readouterr().err


class Hostile:
    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def test_no_pickle_next_to_the_shards_is_opened(sharded, tmp_path):
    """torch's own checkpoints have a pickle called .metadata, and non-tensors in files of .distcp."""
    folder, marker = Path(shutil.copytree(sharded, tmp_path / "run")), tmp_path / "it ran"
    for name in (".metadata", "__0_0.distcp", "model.pt", "model.safetensors.index.json"):
        (checkpoint.newest(folder) / name).write_bytes(pickle.dumps(Hostile(marker)))
    trained(None, folder, 1)
    assert checkpoint.read_state(checkpoint.newest(folder))["step"] == 12 and not marker.exists()
