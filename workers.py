"""Who does the runs of a grid: processes of this machine that stay alive from run to run, or a Ray cluster.

Both do `train.do`, and both outlive what they lose: a run whose worker was killed is done again. Used by grid.py.
"""

import atexit
import json
import os
import shlex
import shutil
import signal
import sys
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from concurrent.futures.process import BrokenProcessPool
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple, Self
from uuid import uuid4

os.environ.setdefault("LOKY_MAX_MEMORY_LEAK_SIZE", "1e15")  # a worker keeps models from run to run: that is no leak
os.environ.setdefault("PYTHONWARNINGS", "ignore:resource_tracker")  # of locks that a killed worker leaves behind

from loky import ProcessPoolExecutor

import corrupt
import data_prep
import settings
import train
import unfinished
from begin import begin

KILLED = "its worker was killed twice, perhaps for want of memory: --jobs 1 needs less"
Said = tuple[settings.Run, str, str]  # a run, what became of it (done, failed, busy), and a line that says it


# ---- On this machine ----


class Staff(NamedTuple):
    """The processes that do the runs, side by side, the threads of each, and the GPUs that they share."""

    processes: int
    threads: int
    gpus: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.processes} x {self.threads} thread{'s' * (self.threads > 1)}"

    def worker(self, number: int) -> ProcessPoolExecutor:
        """A pool of one process, so that what kills it takes no other along. It starts with its first task."""
        env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), str(self.threads))
        if self.gpus:
            env["CUDA_VISIBLE_DEVICES"] = self.gpus[number % len(self.gpus)]
        return ProcessPoolExecutor(1, env=env, initializer=begin, initargs=(os.getpid(),))


class Here:
    """Worker processes of this machine, which start with their first run and end with the `with` block."""

    def __init__(self, staff: Staff) -> None:
        self.staff = staff
        self.workers = [staff.worker(number) for number in range(staff.processes)]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        for worker in self.workers:
            worker.shutdown(kill_workers=kind is not None)

    def __str__(self) -> str:
        return str(self.staff)

    def each(self, function: Callable, *given: object) -> list:
        """What each worker returns, all of them working at once, since they share the memory's bandwidth."""
        tasks = [worker.submit(function, *given) for worker in self.workers]
        return [task.result() for task in tasks]

    def work(self, cells: list[list[settings.Run]], blocking: bool = False) -> Iterator[Said]:
        """Do the cells' runs, one cell after the other; a run whose worker was killed gets one more try.

        A worker keeps to its cell, of which it has model and rows in memory. If no cell is left, it helps another.
        A run that another process is at is "busy", or is waited for if `blocking`.
        """
        waiting, at_hand = deque(cells), [deque() for _ in self.workers]
        running: dict[Future, tuple[int, settings.Run]] = {}
        killed = Counter()

        def give(number: int) -> None:
            if waiting and not at_hand[number]:
                at_hand[number].extend(waiting.popleft())
            if source := at_hand[number] or max(at_hand, key=len):
                run = source.popleft()
                given = (train.do, run.flags, run.settings, blocking)
                try:
                    task = self.workers[number].submit(*given)
                except BrokenProcessPool:  # killed while it had nothing to do
                    self.workers[number] = self.staff.worker(number)
                    task = self.workers[number].submit(*given)
                running[task] = number, run

        for number in range(len(self.workers)):
            give(number)
        while running:
            for task in wait(running, return_when=FIRST_COMPLETED).done:
                number, run = running.pop(task)
                try:
                    said = task.result()
                except BrokenProcessPool:
                    self.workers[number].shutdown(kill_workers=True)
                    self.workers[number] = self.staff.worker(number)
                    killed[run.folder] += 1
                    said = ("failed", f"{run.folder}: {KILLED}")
                    if killed[run.folder] == 1:
                        at_hand[number].appendleft(run)
                        said = ("again", f"{run.folder}: its worker was killed")
                    else:
                        unfinished.failed(run, KILLED, [])
                give(number)
                yield run, *said


# ---- On a cluster ----


class OnRay:
    """The machines of the Ray cluster that RAY_ADDRESS names, or this machine alone.

    A run is a task with one processor core and, where the cluster has GPUs, the given part of one. Ray does it again,
    up to three times, if its worker or its machine dies. Results go to the output folder if the machine sees it, else
    they are sent here; so are the prepared rows to a machine that has not the same.
    """

    def __init__(self, output_dir: str, data_dir: str, runs_per_gpu: int, memory: Callable[[list[str]], float]) -> None:
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            import ray
        except ModuleNotFoundError:
            raise settings.RunError("--executor ray needs Ray: pip install -r requirements-cluster.txt") from None
        self.memory = memory
        self.ray, self.output_dir, self.data_dir = ray, Path(output_dir).resolve(), Path(data_dir).resolve()
        self.token = self.output_dir / "unfinished" / f".grid-{uuid4().hex}.lock"  # who sees it, sees the folder
        env = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), "1")
        here = Path(__file__).parent
        code = {
            "working_dir": str(here),
            "excludes": [f"/{path.name}" for path in here.iterdir() if path.suffix != ".py" and path.name != "metrics"],
            "env_vars": {**env, "HEALING_COMMIT": train.git_commit() or ""},
        }
        address = os.environ.get("RAY_ADDRESS", "local")  # Ray's own choice may be a cluster that died
        if address == "local":
            code["py_executable"] = shlex.quote(sys.executable)  # which Ray does not: a blank in a path would end all
        try:
            ray.init(address, runtime_env=code, logging_level="error", log_to_driver=False)
        except Exception as error:  # Ray's own are of every kind
            raise settings.RunError(f"no Ray cluster: {corrupt.one_line(error)}") from error
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray has put its own in the grid's place
        self.gpu_part = 1 / runs_per_gpu if ray.cluster_resources().get("GPU") else 0
        self.machines = [node["Resources"] for node in ray.nodes() if node["Alive"]]
        self.rows: dict[str, object] = {}  # of each data set, where Ray keeps them

    def __enter__(self) -> Self:
        try:
            self.token.parent.mkdir(parents=True, exist_ok=True)
            unfinished.of_the_dead(self.token.parent.glob(".grid-*.lock"))
            self.held = data_prep.lock(self.token).acquire()
        except OSError as error:
            raise settings.RunError(f"{self.token} cannot be written: {corrupt.one_line(error)}") from error
        return self

    def __exit__(self, *_: object) -> None:
        self.token.unlink(missing_ok=True)
        self.ray.shutdown()

    def __str__(self) -> str:
        return f"Ray, {len(self.machines)} machine{'s' * (len(self.machines) > 1)}"

    def work(self, cells: list[list[settings.Run]], blocking: bool = False) -> Iterator[Said]:
        """Do the runs, as `Here.work` does. Raises RunError if no machine has the memory for one of them."""
        task, running = self.ray.remote(on_node), {}
        for run in (run for cell in cells for run in cell):
            memory = int(self.memory(run.flags))
            if memory > max(machine.get("memory", 0) for machine in self.machines):
                raise settings.RunError(
                    f"{run.folder.name} needs {memory / 2**30:.1f} GiB: no machine of the cluster has"
                )
            name = run.args.dataset
            if name not in self.rows:
                with data_prep.locked(name, self.data_dir):
                    self.rows[name] = self.ray.put(contents(self.data_dir / name))
            options = {"num_cpus": 1, "num_gpus": self.gpu_part, "memory": memory, "max_retries": 3}
            model = Path(run.args.model)
            more = ("--model", str(model.resolve())) if model.is_dir() else ()
            places = (self.output_dir, self.data_dir, self.token, [self.rows[name]])
            given = (run.flags, run.settings, blocking, more, *places)
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
                    write(events, run.tensorboard)
            except (self.ray.exceptions.RayError, settings.RunError, OSError) as error:
                state, line = "failed", f"{run.folder}: {type(error).__name__}: {corrupt.one_line(error)}"
                unfinished.failed(run, line, [])
            yield run, state, line


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(files: dict[str, bytes], folder: Path) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def receive(run: settings.Run, files: dict[str, bytes]) -> None:
    """Install a run's files that came from a machine of the cluster, unless another process has done the run since."""
    if "result.json" not in files:
        failure = json.loads(files["failure.json"])
        unfinished.failed(run, failure["reason"], failure["traceback"], files.get("failure.log"))
        return
    with unfinished.alone(run):
        if settings.result_of(run) is None:
            unfinished.discard(run, checkpoints_too=True)
            write(files, run.unfinished / "new")
            unfinished.install(run)


@lru_cache(maxsize=1)
def scratch() -> tuple[Path, object]:
    """A folder of this process's own, and its lock; those of processes that died are removed."""
    for lock in unfinished.of_the_dead(Path(tempfile.gettempdir()).glob("healing-*.lock")):
        shutil.rmtree(lock.with_suffix(""), ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix="healing-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return folder, data_prep.lock(Path(f"{folder}.lock")).acquire()


def on_node(
    flags: list[str],
    asked: dict,
    blocking: bool,
    more: tuple[str, ...],
    output_dir: Path,
    data_dir: Path,
    token: Path,
    rows: list,
) -> tuple[str, str, dict[str, bytes], dict[str, bytes]]:
    """Do a run on a machine of the cluster; also returns its files and TensorBoard's, if this machine does not see the
    output folder."""
    import ray

    name, shared = asked["dataset"], token.exists()
    if not shared:
        output_dir = scratch()[0] / "outputs"
    if data_prep.fingerprint_of(name, data_dir) != asked["data_fingerprint"]:
        data_dir = scratch()[0] / "data"
        if data_prep.fingerprint_of(name, data_dir) != asked["data_fingerprint"]:
            write(ray.get(rows[0]), data_dir / name)
    more = (*more, "--output_dir", str(output_dir), "--data_dir", str(data_dir))
    state, line = train.do(flags, asked, blocking, *more)
    if shared:
        return state, line, {}, {}
    files, events = (contents(output_dir / part / settings.run_name(asked)) for part in ("runs", "tensorboard"))
    for part in ("runs", "unfinished", "tensorboard"):
        shutil.rmtree(output_dir / part, ignore_errors=True)
    return state, line, files, events
