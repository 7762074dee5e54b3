"""Who does the runs: processes that are killed or whose grid ends, what each has of the machine, and a Ray cluster."""

import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from threading import Event, Thread
from uuid import uuid4

import psutil
import pytest
import torch
from conftest import run_of
from filelock import FileLock

import config
import cost
import data_prep
import executors
import run_dir
import train
from common import InputError
from executors import WorkerLayout, run_in_process

ROOT = Path(executors.__file__).parent
LIMIT = 300  # seconds, of what takes a few: a busy machine may take its time


def wait_until(condition: Callable[[], object]) -> object:
    limit = time.monotonic() + LIMIT
    while not (value := condition()):
        assert time.monotonic() < limit, "waited for too long"
        time.sleep(0.05)
    return value


@contextlib.contextmanager
def local_pool(*layout: object) -> Iterator[executors.LocalPool]:
    with contextlib.closing(executors.LocalPool(WorkerLayout(*layout))) as pool:
        yield pool


# A run whose process is killed is done again; killed twice, it has failed, and says why. Another run goes on meanwhile.
def test_a_killed_process(flags: list[str]) -> None:
    short, long = run_of([*flags, "--num_train_epochs", "1"]), run_of([*flags, "--num_train_epochs", "100000"])
    killed, over = [], Event()

    def kill_each_try() -> None:
        while not over.wait(0.05):
            for process in [p for run, _, p in list(pool.running.values()) if run == long and p.pid not in killed]:
                if killed or (long.work_dir / "now.json").exists():  # the first in the middle, others at once
                    process.kill()
                    killed.append(process.pid)

    with local_pool(2, 1) as pool:
        killer = Thread(target=kill_each_try, daemon=True)
        killer.start()
        outcomes = list(pool.run_all([long, short]))
        over.set()
        killer.join()
    assert len(killed) == 2
    states = sorted((run.name, state) for run, state, _ in outcomes)
    assert states == sorted([(long.name, "again"), (long.name, "failed"), (short.name, "done")])
    assert f"{long.folder}: {executors.KILLED}" in [line for _, _, line in outcomes]
    assert json.loads((long.folder / "failure.json").read_text())["reason"] == executors.KILLED
    assert run_dir.load_valid_result(short)


def say_what_it_has(run: config.Run, wait: bool, threads: int, gpu: str | None, answer: Connection) -> None:
    """In a run's process: in the place of the run, its GPU and its threads; the first waits until the second began."""
    assert signal.getsignal(signal.SIGINT) == signal.SIG_IGN  # from its first moment

    def say(run: config.Run, wait: bool) -> tuple[str, str]:
        run.work_dir.mkdir(parents=True)
        wait_until(lambda: len(list(run.work_dir.parent.iterdir())) >= 2)
        return os.environ["CUDA_VISIBLE_DEVICES"], str(torch.get_num_threads())

    train.run_in_worker = say
    run_in_process(run, wait, threads, gpu, answer)


# Two processes side by side have a GPU each, and as many threads as they were given; a third run gets one of the two.
def test_gpus_and_threads(flags: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(executors, "run_in_process", say_what_it_has)
    runs = [run_of([*flags, "--seed", seed]) for seed in "012"]
    with local_pool(2, 3, ("4", "7")) as pool:
        outcomes = list(pool.run_all(runs))
    assert {run.name: threads for run, _, threads in outcomes} == {run.name: "3" for run in runs}
    gpus = {run.name: gpu for run, gpu, _ in outcomes}
    assert {gpus[runs[0].name], gpus[runs[1].name]} == {"4", "7"} and gpus[runs[2].name] in ("4", "7")


def has_ended(process: psutil.Process) -> bool:
    try:
        return process.status() == psutil.STATUS_ZOMBIE  # whoever adopts it takes its time
    except psutil.NoSuchProcess:
        return True


def hear_ctrl_c() -> None:
    """In a process that begins: what the shell that started the tests may have set to be ignored."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


# Ctrl-C ends a grid with one line and exit code 130, and leaves no process. Its runs are forked from a server that has
# imported what they need, also if the grid is called from another folder.
def test_ctrl_c(flags: list[str], tmp_path: Path) -> None:
    flags = [*flags, "--frac", "0", "--tuning", "full", "--num_train_epochs", "100000", "--output_dir", "outputs"]
    command = [sys.executable, str(ROOT / "grid.py"), *flags]
    with (tmp_path / "said").open("w") as said:
        group = {"start_new_session": True, "preexec_fn": hear_ctrl_c}
        grid = psutil.Popen(command, cwd=tmp_path, stdout=said, stderr=said, **group)
    started = []
    try:
        wait_until(lambda: list(tmp_path.glob("outputs/unfinished/*/now.json")) or grid.poll() is not None)
        started = grid.children(recursive=True)
        (server,) = [child for child in grid.children() if "forkserver" in " ".join(child.cmdline())]
        assert len(server.children()) == 1 and any("libtorch" in file.path for file in server.memory_maps())
        os.killpg(grid.pid, signal.SIGINT)
        assert grid.wait(LIMIT) == 130
        wait_until(lambda: all(map(has_ended, started)))
    finally:
        for process in [*started, grid]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    there, *said = (tmp_path / "said").read_text().splitlines()
    assert there == "1 runs: 0 are there, 1 to do"
    assert len(said) == 1 and said[0].startswith("interrupted: the same command goes on")
    assert list((tmp_path / "outputs" / "unfinished").iterdir()) == []


def do_in_pool(run: config.Run) -> None:
    list(executors.LocalPool(WorkerLayout(1, 1)).run_all([run]))


# A run's process ends when that of the grid is killed, though nobody tells it.
def test_a_killed_grid(flags: list[str]) -> None:
    run = run_of([*flags, "--num_train_epochs", "100000"])
    executors.start_server()
    grid = multiprocessing.get_context("forkserver").Process(target=do_in_pool, args=(run,))
    grid.start()
    started = []
    try:
        wait_until((run.work_dir / "now.json").exists)
        started = psutil.Process(grid.pid).children(recursive=True)
        grid.kill()
        wait_until(lambda: all(map(has_ended, started)))
    finally:
        for process in [*started, grid]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
    assert len(started) >= 2 and FileLock(f"{run.work_dir}.lock").acquire(timeout=0)


# A machine that sees the output folder writes there; one that does not gets the rows and sends the result. Both give
# the numbers of this machine's processes. The set is a user's own, of which the files are on this machine alone.
# A part of a GPU of a cluster that has none is refused.
def test_ray(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "token")
    monkeypatch.setenv("RAY_AUTH_TOKEN", uuid4().hex)  # else Ray would write one to the user's home
    data, own = tmp_path / "data", tmp_path / "sets" / "mydata"
    own.mkdir(parents=True)
    for part, rows in data_prep.load("rotten_tomatoes", flags[flags.index("--data_dir") + 1]).items():
        rows.to_csv(own / f"{part}.csv")
    flags = [*flags, "--data_dir", str(data), "--dataset", str(own)]
    runs = [run_of([*flags, "--seed", seed]) for seed in "01"]
    here = [run_of([*flags, "--seed", seed, "--output_dir", str(tmp_path / "here")]) for seed in "01"]
    with local_pool(1, 1) as pool:
        lines = [line for _, _, line in pool.run_all(here)]
    shutil.rmtree(own)
    with contextlib.closing(executors.RayPool(str(tmp_path / "outputs"), str(data), None, cost.memory)) as cluster:
        shared, apart = runs
        assert [outcome[1:] for outcome in cluster.run_all([shared])] == [("done", lines[0])]
        cluster.token.unlink()
        data.rename(tmp_path / "not seen")
        assert [outcome[1:] for outcome in cluster.run_all([apart])] == [("done", lines[1])]
    for run, other in zip(runs, here, strict=True):
        assert run_dir.load_valid_result(run)["commit"] == run_dir.load_valid_result(other)["commit"]
        for name in ("epochs.csv", "predictions.csv.gz"):
            assert (run.folder / name).read_bytes() == (other.folder / name).read_bytes()
    assert list((tmp_path / "outputs" / "unfinished").iterdir()) == []
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(InputError, match="--runs_per_gpu needs a GPU, and the cluster has none"):
        executors.RayPool(str(tmp_path / "outputs"), str(data), 2, cost.memory)
    assert list((tmp_path / "outputs" / "unfinished").iterdir()) == []
