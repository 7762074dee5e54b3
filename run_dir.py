"""A run's folder: whether its result is valid, the lock, the log, the checkpoints, and how it appears whole.

All lies in outputs/unfinished until the run's folder is renamed to outputs/runs. Used by train.py, which does the run,
and by grid.py and aggregate.py, which ask what is there. Needs no torch.
"""

import json
import logging
import os
import re
import shlex
import shutil
import sys
import time
import traceback
import zlib
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
import pandas as pd
from filelock import Timeout

import stats
from common import InputError, RunError, atomic_write, explain, file_lock, in_worker, one_line, read_signed, sha256_of
from config import NEUTRAL_VALUES, RESULTS_VERSION, Run, run_name

# What reading a file that is not what it should be can raise.
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, ArithmeticError)
UNREADABLE += (RecursionError,)

# ---- The result ----

# What a run keeps if it is asked to: the setting with its value, and what its folder has then.
KEPT = {
    "save_model": (True, ["model"]),
    "save_vectors": (True, ["vectors.npy"]),
    "probe_layers": ("all", ["layers.csv"]),
    "save_states": (True, ["states", "inside"]),  # analyse.py makes the one of the other, and deletes that
}


def read_asked(output_dir: Path) -> dict[str, list[str]]:
    """The names of the runs that each command of grid.py asked for. Raises InputError if the file cannot be read."""
    path = output_dir / "asked.json"
    with explain(f"{path} cannot be read, delete it and do the grid's command again", *UNREADABLE):
        asked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        lists = asked.values() if isinstance(asked, dict) else [None]
        if not all(isinstance(names, list) and all(isinstance(name, str) for name in names) for names in lists):
            raise ValueError("it has not a list of names for each command")
        return asked


def refuse(reason: str) -> None:
    print(f"{reason}: running it again", file=sys.stderr)


def read_result(folder: Path) -> dict:
    """The folder's result.json. Raises ValueError if it was edited or is under another name than its settings give."""
    result = read_signed(folder / "result.json")
    if (made_by := result["settings"].get("results_version")) != RESULTS_VERSION:
        raise ValueError(f"its results_version is {made_by}, this code's is {RESULTS_VERSION}")
    result["settings"] = NEUTRAL_VALUES | result["settings"]  # what a flag that is new has made of no result
    if (name := run_name(result["settings"])) != folder.name:
        raise ValueError(f"it is a copy, or was renamed: its settings' name is {name}")
    return result


def read_evidence(folder: Path, result: dict) -> tuple[pd.DataFrame, pd.DataFrame, pd.DataFrame | None]:
    """The run's epochs, its predictions, and its steps if it was evaluated at some (--eval_at).

    Predictions are `row`, `label`, `group` where rows belong together, and one for each epoch, `epoch_1` the first, and
    step, `step_0`. Every score of every epoch and step is computed again from them. Raises ValueError if a file is not
    the one that the run wrote, or its numbers do not agree.
    """
    for name, expected in result["files"].items():
        if sha256_of(folder / name) != expected["sha256"]:
            raise ValueError(f"{name} is not what the run wrote")
    epochs = pd.read_csv(folder / "epochs.csv")
    steps = pd.read_csv(folder / "steps.csv") if "steps.csv" in result["files"] else None
    times = [f"epoch_{k}" for k in range(1, len(epochs) + 1)]
    times += [] if steps is None else [f"step_{k}" for k in steps["step"]]
    small = dict.fromkeys(("label", *times), "int16")  # a class that is no such number is refused
    predictions = pd.read_csv(folder / "predictions.csv.gz", dtype=small)
    labels, guesses = predictions["label"], predictions[times].to_numpy()
    classes = [*result["data"]["rows_per_class"]["test"].values()]
    whole = len(epochs) == result["epochs"] and min(labels.min(), guesses.min()) >= 0
    if not whole or np.bincount(labels, minlength=len(classes)).tolist() != classes or guesses.max() >= len(classes):
        raise ValueError("predictions.csv.gz has not the run's test rows, classes or epochs")
    half = stats.split_halves(labels, predictions.get("group"))
    scores = stats.score_epochs(labels.to_numpy(), guesses, half, len(classes))
    best = epochs.loc[epochs["weighted_f1"].idxmax(), ["weighted_f1", "accuracy", "epoch"]].tolist()
    agrees = best == [result[name] for name in ("weighted_f1", "accuracy", "best_epoch")]
    if not agrees or not np.allclose(scores, pd.concat([epochs, steps])[[*scores]], rtol=0, atol=1e-9):
        raise ValueError("its scores are not those of its predictions")
    return epochs, predictions, steps


def load_valid_result(run: Run, digests: bool = True) -> dict | None:
    """The result, if it came from just these settings and its files are those that the run wrote; else says why not.

    Without `digests` only the files' sizes are compared, which takes a millisecond.
    """
    if not (run.folder / "result.json").is_file():
        return None
    try:
        result = read_result(run.folder)
        if changed := [name for name, value in run.settings.items() if result["settings"].get(name) != value]:
            return refuse(f"{run.folder} was made with other {', '.join(changed)}")
        if digests:
            read_evidence(run.folder, result)
        for name, expected in result["files"].items():
            if (run.folder / name).stat().st_size != expected["bytes"]:
                return refuse(f"{run.folder}/{name} is not what the run wrote")
    except UNREADABLE as error:
        return refuse(f"{run.folder}: {one_line(error)}")
    wanted = run.config
    for setting, (value, names) in KEPT.items():
        if getattr(wanted, setting) == value and not any((run.folder / name).exists() for name in names):
            return refuse(f"{run.folder} has no {names[0]}")
    steps = result.get("steps", [])
    if missing := [step for step in wanted.eval_at if step not in steps and step <= max(steps, default=step)]:
        return refuse(f"{run.folder} was not evaluated after step {missing[0]}")
    return result


def keep_what_is_there(run: Run) -> Run:
    """The run, asked also for all that its earlier result keeps, in whose place it will be put."""
    try:
        steps = read_result(run.folder).get("steps", [])
    except UNREADABLE:
        return run
    if steps and run.config.resume:
        raise InputError(f"{run.folder} has evaluations by step, which --resume does not keep: leave it out")
    there = {setting: value for setting, (value, names) in KEPT.items() if (run.folder / names[0]).exists()}
    config = replace(run.config, eval_at=(*run.config.eval_at, *steps), **there)
    flags = []
    for name in (*KEPT, "eval_at"):
        if (value := getattr(config, name)) != getattr(run.config, name):
            flags += [f"--{name}", *map(str, value if name == "eval_at" else [value])]
    return replace(run, config=config, command=shlex.join([*shlex.split(run.command), *flags]))


def list_files(folder: Path) -> dict[str, dict]:
    """The size and the sha256 of each file under the folder, as `result.json` keeps them."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(p.relative_to(folder)): {"bytes": p.stat().st_size, "sha256": sha256_of(p)} for p in paths}


# ---- The lock ----


@contextmanager
def run_lock(run: Run, wait: bool = True) -> Iterator[None]:
    """Hold the run's lock, so that nobody else does the run; the system takes the lock from a process that dies.

    Raises filelock.Timeout if another process has it and `wait` is false, InputError where it cannot be written.
    """
    lock = Path(f"{run.work_dir}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = file_lock(lock).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise
    except OSError as error:
        raise InputError(f"{lock} cannot be written and locked: {one_line(error)}") from error
    with held:
        put_back(run)  # a process died in `publish`
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # whoever gets a lock on the file without a name tries again


def remove_stale_locks(locks: Iterable[Path]) -> list[Path]:
    """Delete those of the lock files that no living process holds and this user may delete; returns their paths."""
    stale = []
    for path in locks:
        try:
            with file_lock(path).acquire(timeout=0):
                path.unlink(missing_ok=True)
        except OSError:  # filelock.Timeout among them
            continue
        stale.append(path)
    return stale


def clean_stale(run: Run) -> None:
    """Delete what a dead process left of the run, unless some process does it now; `discard` says what stays."""
    if not run.work_dir.exists():
        return
    try:
        with run_lock(run, wait=False):
            discard(run, checkpoints_too=load_valid_result(run, digests=False) is not None)
    except Timeout:
        return


def discard(run: Run, checkpoints_too: bool = False) -> None:
    """Delete the run's unfinished files; with --resume its checkpoints and log stay. The caller holds its lock."""
    if run.config.resume and not checkpoints_too:
        for part in ("new", "old"):
            shutil.rmtree(run.work_dir / part, ignore_errors=True)
    else:
        shutil.rmtree(run.work_dir, ignore_errors=True)


# ---- From nothing to a result ----


@contextmanager
def run_workspace(run: Run) -> Iterator[Path]:
    """The folder `new`, to be filled and then published, and the log. The caller holds the run's lock.

    A failure leaves its reason and the log in the run's folder and is raised; bad input (InputError) leaves nothing.
    """
    with explain(f"{run.folder} cannot be written", OSError):
        if run.folder.exists() and not run.folder.is_dir():
            raise FileExistsError(f"a file is in its place: {run.folder}")
        discard(run)  # what a process that died has left
        (run.work_dir / "new").mkdir(parents=True)
    diverged = False
    try:
        with run_log(run):
            yield run.work_dir / "new"
    except InputError:
        raise
    except Exception as error:
        diverged = isinstance(error, RunError)  # it would end so again: its checkpoints are not worth keeping
        write_failure(run, f"{type(error).__name__}: {one_line(error)}", traceback.format_exc().splitlines())
        raise
    finally:
        discard(run, checkpoints_too=diverged)


def publish(run: Run) -> None:
    """Put the folder `new` in the place of the run's, which is whole at every moment or not there.

    What analyse.py has found in the same weights, those of the same losses to the last digit, goes along.
    """
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    new, old = run.work_dir / "new", run.work_dir / "old"
    shutil.rmtree(old, ignore_errors=True)
    losses = [folder / "epochs.csv" for folder in (run.folder, new)]
    if (run.folder / "inside").is_dir() and losses[0].is_file() and sha256_of(losses[0]) == sha256_of(losses[1]):
        shutil.copytree(run.folder / "inside", new / "inside")
    if (log := run.work_dir / "log.txt").exists():
        log.rename(new / "log.txt")
    try:
        if run.folder.exists():
            run.folder.rename(old)
        new.rename(run.folder)
    finally:
        put_back(run)
    discard(run, checkpoints_too=True)


def put_back(run: Run) -> None:
    """The earlier result, if it was moved aside and nothing has taken its place."""
    if (run.work_dir / "old").is_dir() and not run.folder.exists():
        (run.work_dir / "old").rename(run.folder)


def write_failure(run: Run, reason: str, trace: list[str], log: bytes | None = None) -> None:
    """Leave the reason and the log in the run's folder, beside an earlier result if there is one.

    Says so where it cannot be left.
    """
    failure = {"reason": reason, "settings": run.settings, "traceback": trace}
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with atomic_write(run.folder / "failure.json") as path:
            path.write_text(json.dumps(failure, indent=1) + "\n")
        if log is None and (run.work_dir / "log.txt").exists():
            log = (run.work_dir / "log.txt").read_bytes()
        with atomic_write(run.folder / "failure.log") as path:
            path.write_bytes(log or b"")
    except OSError as error:
        print(f"{run.folder}/failure.json cannot be written: {one_line(error)}", file=sys.stderr)


# ---- The log ----


class TimestampedTee:
    """A stream whose lines go to a log, each with its time, and all of it to the console too, if there is one."""

    def __init__(self, log: TextIO, console: TextIO | None = None) -> None:
        self.log, self.console, self.begun = log, console, ""

    def write(self, text: str) -> int:
        if self.console:
            self.console.write(text)
        *lines, self.begun = (self.begun + text).split("\n")
        for line in lines:
            line = re.sub(r"\x1b\[[\d;]*[A-Za-z]", "", line)
            if line := line.rstrip().rpartition("\r")[2]:  # of a bar, which writes over itself, the last state
                self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")
        return len(text)

    def __getattr__(self, name: str) -> object:
        return getattr(self.console or self.log, name)


@contextmanager
def run_log(run: Run) -> Iterator[None]:
    """Until it ends, all that the run and its libraries say goes to its log.txt.

    The console gets what it would get without. A process of the grid has none: there the whole process writes to the
    log, also what is not Python.
    """
    with (run.work_dir / "log.txt").open("a", buffering=1, encoding="utf-8") as file, ExitStack() as stack:
        for descriptor in (1, 2) if in_worker() else ():
            os.dup2(file.fileno(), descriptor)
        tees = [TimestampedTee(file, None if in_worker() else stream) for stream in (sys.stdout, sys.stderr)]
        stack.enter_context(redirect_stdout(tees[0]))
        stack.enter_context(redirect_stderr(tees[1]))
        handler = logging.StreamHandler(TimestampedTee(file))
        handler.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        logging.getLogger().addHandler(handler)
        stack.callback(logging.getLogger().removeHandler, handler)
        tees[0].log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {run.command}\n")
        try:
            yield
        except BaseException:
            TimestampedTee(file).write(traceback.format_exc())
            raise


# ---- While it runs ----


def read_progress(run: Run) -> dict:
    """How far the run is, as `callbacks.Progress` left it last; empty if it has not begun to train."""
    try:
        return json.loads((run.work_dir / "now.json").read_text())
    except (OSError, ValueError):
        return {}


def last_checkpoint(run: Run) -> tuple[Path, dict] | None:
    """The last checkpoint that is whole and of the run's own settings, and its progress; deletes later ones.

    Raises InputError for a checkpoint of another user: its optimizer.pt is a pickle, if a restricted one.
    """
    checkpoints = (run.work_dir / "checkpoints").glob("checkpoint-*")
    for folder in sorted(checkpoints, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        if any(path.stat().st_uid != os.geteuid() for path in (folder, *folder.iterdir())):
            raise InputError(f"{folder} belongs to another user and is not read: delete it")
        try:
            progress = json.loads((folder / "progress.json").read_text())
            whole = all((folder / name).stat().st_size == size for name, size in progress["sizes"].items())
            if whole and progress["settings"] == run.settings:
                return folder, progress
            print(f"{folder} is not whole, or of other settings: not used", file=sys.stderr)
        except FileNotFoundError:
            pass  # of a process that died while it saved, or of the last epoch
        except (ValueError, KeyError, TypeError, AttributeError):
            print(f"{folder}/progress.json cannot be read: not used", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)  # as the latest it would push out others
    return None
