"""Who does the runs of a grid: processes of this machine, or a Ray cluster. Both outlive what they lose.

Each run has a process of its own, forked from a server that has imported torch: what kills one takes no other along,
and nothing is left over for the next. Used by grid.py.
"""

import atexit
import gc
import json
import multiprocessing
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from contextlib import chdir
from dataclasses import replace
from functools import lru_cache
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from pathlib import Path
from threading import Thread
from typing import NamedTuple
from uuid import uuid4

import data_prep
import run_dir
from common import InputError, explain, file_lock, git_commit, one_line
from config import Run, RunConfig

KILLED = "its process was killed twice, perhaps because memory is short: --jobs 1 needs less"


class Outcome(NamedTuple):
    """What became of a run: "done", "failed", "busy" (another process does it), or "again" (it is done once more)."""

    run: Run
    state: str
    line: str


# ---- On this machine ----


class WorkerLayout(NamedTuple):
    """How many processes do runs side by side, the threads of each, and the GPUs that they share."""

    processes: int
    threads: int
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} thread{'s' * (self.threads > 1)}"


class LocalPool:
    """Does runs in processes of this machine."""

    def __init__(self, layout: WorkerLayout) -> None:
        self.layout, self.running = layout, {}
        self.context = multiprocessing.get_context("forkserver")

    def close(self) -> None:
        for _, _, process in self.running.values():
            process.kill()
            process.join()

    def __str__(self) -> str:
        return str(self.layout)

    def run_all(self, runs: list[Run], wait_for_others: bool = False) -> Iterator[Outcome]:
        """Do the runs, the first ones first; a run whose process was killed gets one more try."""
        waiting, killed = deque(runs), Counter()
        gpus = self.layout.gpus or (None,)
        free = [gpus[slot % len(gpus)] for slot in reversed(range(self.layout.processes))]
        while waiting or self.running:
            while waiting and free:
                run, gpu = waiting.popleft(), free.pop()
                answer, to_answer = self.context.Pipe(duplex=False)
                given = (run, wait_for_others, self.layout.threads, gpu, to_answer)
                process = self.context.Process(target=run_in_process, args=given)
                start_server()
                process.start()
                to_answer.close()  # so that the process's end is seen
                self.running[answer] = run, gpu, process
            for answer in wait(list(self.running)):
                run, gpu, process = self.running.pop(answer)
                try:
                    outcome = answer.recv()
                except (EOFError, OSError):
                    outcome = None
                process.join()
                free.append(gpu)
                if outcome:
                    yield Outcome(run, *outcome)
                else:
                    killed[run.name] += 1
                    if killed[run.name] == 1:
                        waiting.appendleft(run)
                        yield Outcome(run, "again", f"{run.folder}: its process was killed")
                    else:
                        run_dir.write_failure(run, KILLED, [])
                        yield Outcome(run, "failed", f"{run.folder}: {KILLED}")


def start_server() -> None:
    """Start the server of processes, unless it runs. It imports the `train` from here, wherever the grid was called.

    It and its processes leave Ctrl-C to the grid: what is started while a signal is ignored ignores it, too.
    """
    forkserver.set_forkserver_preload(["train"])
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    with chdir(Path(__file__).parent):
        forkserver.ensure_running()
    signal.signal(signal.SIGINT, handler)


def run_in_process(run: Run, wait_for_others: bool, threads: int, gpu: str | None, answer: Connection) -> None:
    """A process for one run: it leaves the console to the grid, and ends when the grid ends."""
    multiprocessing.set_start_method(None, force=True)  # the usual: else a killed process's locks outlive it
    Thread(target=end_with_parent, daemon=True).start()
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for descriptor in (1, 2):  # until the run's log takes them
        os.dup2(nowhere, descriptor)
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    gc.freeze()  # what the server has imported need not be looked at again
    import torch

    import train

    torch.set_num_threads(threads)
    answer.send(train.run_in_worker(run, wait_for_others))


def end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


# ---- On a cluster ----


class RayPool:
    """Does runs on the machines of the Ray cluster that RAY_ADDRESS names, or on this machine alone.

    A run is a task with one processor core and, where the cluster has GPUs, the given part of one. Ray does it again,
    up to three times, if its machine dies. Results go to the output folder if the machine sees it, else they are sent
    here; so are the prepared rows to a machine that has not the same.
    """

    def __init__(
        self, output_dir: str, data_dir: str, runs_per_gpu: int | None, memory: Callable[[RunConfig], float]
    ) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise InputError("--executor ray needs Ray: pip install -r requirements-cluster.txt") from None

        self.ray, self.memory = ray, memory
        self.output_dir, self.data_dir = Path(output_dir).resolve(), Path(data_dir).resolve()
        self.token = self.output_dir / "unfinished" / f".grid-{uuid4().hex}.lock"  # who sees it, sees the folder
        here = Path(__file__).parent
        code = {
            "working_dir": str(here),
            "excludes": [f"/{path.name}" for path in here.iterdir() if path.suffix != ".py" and path.name != "metrics"],
            "env_vars": {"HEALING_COMMIT": git_commit() or ""},
        }
        address = os.environ.get("RAY_ADDRESS", "local")  # Ray's own choice may be a cluster that died
        if address == "local":
            code["py_executable"] = shlex.quote(sys.executable)  # Ray does not quote it; a path may have a blank
        with explain("no Ray cluster", Exception):  # Ray's own are of every kind
            ray.init(address, runtime_env=code, logging_level="error", log_to_driver=False)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own in the grid's place
        gpus = ray.cluster_resources().get("GPU")
        if runs_per_gpu and not gpus:
            ray.shutdown()
            raise InputError("--runs_per_gpu needs a GPU, and the cluster has none: leave it out")
        self.gpu_part = 1 / (runs_per_gpu or 1) if gpus else 0
        self.machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.rows: dict[str, object] = {}  # of each data set, where Ray keeps them
        with explain(f"{self.token} cannot be written", OSError):
            self.token.parent.mkdir(parents=True, exist_ok=True)
            run_dir.remove_stale_locks(self.token.parent.glob(".grid-*.lock"))
            self.held = file_lock(self.token).acquire()

    def close(self) -> None:
        self.token.unlink(missing_ok=True)
        self.ray.shutdown()

    def __str__(self) -> str:
        return f"Ray, {len(self.machines)} machine{'s' * (len(self.machines) > 1)}"

    def run_all(self, runs: list[Run], wait_for_others: bool = False) -> Iterator[Outcome]:
        """Do the runs, as `LocalPool.run_all` does. Raises InputError if no machine has the memory for one of them."""
        task, running = self.ray.remote(run_on_node), {}
        for run in runs:
            memory = int(self.memory(run.config))
            if memory > max(machine.get("memory", 0) for machine in self.machines):
                raise InputError(f"{run.name} needs {memory / 2**30:.1f} GiB: no machine of the cluster has that")
            name, model = run.config.dataset, Path(run.config.model)
            if name not in self.rows:
                with data_prep.locked(name, self.data_dir):
                    self.rows[name] = self.ray.put(read_files(self.data_dir / name))
            places = {"output_dir": str(self.output_dir), "data_dir": str(self.data_dir)}
            places |= {"model": str(model.resolve())} if model.is_dir() else {}
            there = replace(run, config=replace(run.config, **places))
            options = {"num_cpus": 1, "num_gpus": self.gpu_part, "memory": memory, "max_retries": 3}
            given = (there, wait_for_others, self.token, [self.rows[name]])
            running[task.options(**options).remote(*given)] = run
        while running:
            (ready,), _ = self.ray.wait(list(running))
            run = running.pop(ready)
            try:
                state, line, files, events = self.ray.get(ready)
                if files:
                    receive(run, files)
                if events:
                    shutil.rmtree(run.tensorboard, ignore_errors=True)
                    write_files(events, run.tensorboard)
            except (self.ray.exceptions.RayError, InputError, OSError) as error:
                state, line = "failed", f"{run.folder}: {type(error).__name__}: {one_line(error)}"
                run_dir.write_failure(run, line, [])
            yield Outcome(run, state, line)


def read_files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write_files(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def receive(run: Run, files: dict[str, bytes]) -> None:
    """Publish a run's files that came from a machine of the cluster, unless another process has done the run since."""
    if "result.json" not in files:
        failure = json.loads(files["failure.json"])
        run_dir.write_failure(run, failure["reason"], failure["traceback"], files.get("failure.log"))
        return
    with run_dir.run_lock(run):
        if run_dir.load_valid_result(run) is None:
            run_dir.discard(run, checkpoints_too=True)
            write_files(files, run.work_dir / "new")
            run_dir.publish(run)


@lru_cache(maxsize=1)
def scratch() -> tuple[Path, object]:
    """A folder of this process's own, and its lock; those of processes that died are removed."""
    for lock in run_dir.remove_stale_locks(Path(tempfile.gettempdir()).glob("healing-*.lock")):
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="healing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, file_lock(Path(f"{folder}.lock")).acquire()


def run_on_node(
    run: Run, wait_for_others: bool, token: Path, rows: list
) -> tuple[str, str, dict[str, bytes], dict[str, bytes]]:
    """Do a run on a machine of the cluster; also returns its files and TensorBoard's, if the machine does not see the
    output folder."""
    import ray

    name, shared, places = run.config.dataset, token.exists(), {}
    if not shared:
        places["output_dir"] = str(scratch()[0] / "outputs")
    if data_prep.fingerprint_of(name, run.config.data_dir) != run.data["fingerprint"]:
        places["data_dir"] = str(scratch()[0] / "data")
        if data_prep.fingerprint_of(name, places["data_dir"]) != run.data["fingerprint"]:
            write_files(ray.get(rows[0]), Path(places["data_dir"]) / name)
    run = replace(run, config=replace(run.config, **places))
    gpus = tuple(filter(None, [os.environ.get("CUDA_VISIBLE_DEVICES")]))
    *_, (_, state, line) = LocalPool(WorkerLayout(1, 1, gpus)).run_all([run], wait_for_others)
    if shared:
        return state, line, {}, {}
    files, events = read_files(run.folder), read_files(run.tensorboard)
    for folder in (run.folder, run.work_dir, run.tensorboard):
        shutil.rmtree(folder, ignore_errors=True)
    return state, line, files, events
