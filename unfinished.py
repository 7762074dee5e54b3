"""A run while it is being done: its lock, its log, its checkpoints, and the folder that appears whole.

All of it lies in outputs/unfinished until the run's folder is renamed to outputs/runs. Used by train.py, which does the
run, and by grid.py, which clears up after workers that died.
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
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager, redirect_stderr, redirect_stdout, suppress
from hashlib import file_digest
from pathlib import Path
from typing import TextIO

import transformers
from filelock import Timeout
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback
from transformers.trainer_utils import rotate_checkpoints

import corrupt
import data_prep
import settings


class Diverged(settings.RunError):
    """A run that would diverge again: none of its checkpoints is worth keeping."""


@contextmanager
def alone(run: settings.Run, wait: bool = True) -> Iterator[None]:
    """Hold the run's lock, so that nobody else does it meanwhile; the system takes it from a process that dies.

    Raises filelock.Timeout if another process has it and `wait` is false, RunError where it cannot be written.
    """
    lock = Path(f"{run.unfinished}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = data_prep.lock(lock).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise
    except OSError as error:
        raise settings.RunError(f"{lock} cannot be written and locked: {corrupt.one_line(error)}") from error
    with held:
        if (run.unfinished / "old").is_dir() and not run.folder.exists():  # a process died while it installed the new
            (run.unfinished / "old").rename(run.folder)
        try:
            yield
        finally:
            lock.unlink(missing_ok=True)  # whoever gets a lock on the file without a name tries again


def of_the_dead(locks: Iterable[Path]) -> list[Path]:
    """Delete those of the lock files that no living process holds and this user may; returns their paths."""
    dead = []
    for path in locks:
        try:
            with data_prep.lock(path).acquire(timeout=0):
                path.unlink(missing_ok=True)
        except OSError:  # filelock.Timeout among them
            continue
        dead.append(path)
    return dead


def sweep(run: settings.Run) -> None:
    """Delete what a dead process left of the run, unless somebody is at it; `discard` says what stays."""
    try:
        with alone(run, wait=False):
            discard(run, checkpoints_too=settings.result_of(run) is not None)
    except Timeout:
        return


def discard(run: settings.Run, checkpoints_too: bool = False) -> None:
    """Delete the run's unfinished files, with --resume not its checkpoints and log; the caller holds its lock."""
    if run.args.resume and not checkpoints_too:
        for part in ("new", "old"):
            shutil.rmtree(run.unfinished / part, ignore_errors=True)
    else:
        shutil.rmtree(run.unfinished, ignore_errors=True)


@contextmanager
def being_done(run: settings.Run) -> Iterator[None]:
    """Make the folder `new` and the log. A failure leaves its reason and the log in the run's folder, and is raised."""
    first = run.training_args.process_index == 0
    try:
        if run.folder.exists() and not run.folder.is_dir():
            raise FileExistsError(f"a file is in its place: {run.folder}")
        if first:
            discard(run)  # what a process that died has left
            (run.unfinished / "new").mkdir(parents=True)
    except OSError as error:
        raise settings.RunError(f"{run.folder} cannot be written: {corrupt.one_line(error)}") from error
    try:
        with log(run):
            yield
    except Exception as error:
        if first:
            failed(run, f"{type(error).__name__}: {error}", traceback.format_exc().splitlines())
            discard(run, checkpoints_too=isinstance(error, Diverged))
        raise
    finally:
        if first:
            discard(run)


def install(run: settings.Run) -> None:
    """Put the folder `new` in the place of the run's, which is whole at every moment or not there."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(run.unfinished / "old", ignore_errors=True)
    if (log := run.unfinished / "log.txt").exists():
        log.rename(run.unfinished / "new" / "log.txt")
    if run.folder.exists():
        run.folder.rename(run.unfinished / "old")
    (run.unfinished / "new").rename(run.folder)
    discard(run, checkpoints_too=True)


def digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file under the folder."""
    found = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        with path.open("rb") as file:
            found[str(path.relative_to(folder))] = file_digest(file, "sha256").hexdigest()
    return found


def failed(run: settings.Run, reason: str, traceback: list[str], said: bytes | None = None) -> None:
    """Leave the reason and the log in the run's folder, beside an earlier result if there is one; or say that it cannot
    be left."""
    failure = {"reason": reason, "settings": run.settings, "traceback": traceback}
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        with data_prep.whole(run.folder / "failure.json") as path:
            path.write_text(json.dumps(failure, indent=1) + "\n")
        if said is None and (log := run.unfinished / "log.txt").exists():
            said = log.read_bytes()
        with data_prep.whole(run.folder / "failure.log") as path:
            path.write_bytes(said or b"")
    except OSError as error:
        print(f"{run.folder}/failure.json cannot be written: {corrupt.one_line(error)}", file=sys.stderr)


# ---- What a run says ----


class Lines:
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
def into(file: TextIO, descriptor: int) -> Iterator[None]:
    """What is written to the descriptor, not by Python alone, goes to the file."""
    kept = os.dup(descriptor)
    os.dup2(file.fileno(), descriptor)
    try:
        yield
    finally:
        os.dup2(kept, descriptor)
        os.close(kept)


@contextmanager
def log(run: settings.Run) -> Iterator[None]:
    """Meanwhile all that the run and its libraries say goes to its log.txt; the console gets what it would without.

    Where there is no console (sys.stderr is None: a worker of the grid) a crash leaves its words there too.
    """
    if run.training_args.process_index > 0:
        yield
        return
    with (run.unfinished / "log.txt").open("a", buffering=1, encoding="utf-8") as file, ExitStack() as until_end:
        console, said = sys.stderr, Lines(file)
        said.write(f"python train.py {shlex.join(run.flags)}\n")
        for descriptor in () if console else (1, 2):
            until_end.enter_context(into(file, descriptor))
        to_log = logging.StreamHandler(said)
        to_log.setFormatter(logging.Formatter("%(levelname)s %(name)s: %(message)s"))
        for name in ("transformers", "datasets", "huggingface_hub"):
            logger = logging.getLogger(name)
            until_end.callback(setattr, logger, "handlers", logger.handlers)
            logger.handlers = [to_log, *(logger.handlers if console else [])]
        shown = run.training_args.get_process_log_level()
        until_end.callback(transformers.logging.set_verbosity, transformers.logging.get_verbosity())
        transformers.logging.set_verbosity_info()
        for handler in logging.getLogger("transformers").handlers[1:]:
            until_end.callback(handler.setLevel, handler.level)
            handler.setLevel(shown)
        until_end.enter_context(redirect_stdout(Lines(file, sys.stdout)))
        until_end.enter_context(redirect_stderr(Lines(file, console)))
        try:
            yield
        except BaseException:
            with suppress(OSError):
                said.write(traceback.format_exc())
            raise


class HowFar(TrainerCallback):
    """Leaves in now.json, at most once a second, how far the run is: the grid shows it."""

    def __init__(self, run: settings.Run) -> None:
        self.path, self.due = run.unfinished / "now.json", 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object
    ) -> None:
        self.write(state)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.write(state)

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.write(state)

    def write(self, state: TrainerState) -> None:
        if time.monotonic() < self.due or not state.is_world_process_zero:
            return
        self.due = time.monotonic() + 1
        tested = [row["eval_weighted_f1"] for row in state.log_history if "eval_weighted_f1" in row]
        now = {"epoch": state.epoch, "epochs": state.num_train_epochs, "weighted_f1": tested[-1] if tested else None}
        now["fraction"] = state.global_step / state.max_steps
        with suppress(OSError), data_prep.whole(self.path) as path:
            path.write_text(json.dumps(now))


def how_far(run: settings.Run) -> dict:
    """What `HowFar` left last; empty if the run has not begun to train."""
    try:
        return json.loads((run.unfinished / "now.json").read_text())
    except (OSError, ValueError):
        return {}


@contextmanager
def reports(run: settings.Run, trainer: Trainer, goes_on: bool) -> Iterator[None]:
    """Meanwhile the Trainer reports the run to where --report_to says; then that is ended, however the run ends.

    The process's next run would go on with what is left open, and so would a test of the weights that are read back.
    """
    kinds = (TensorBoardCallback, TrackioCallback, WandbCallback)
    reporters = [callback for callback in trainer.callback_handler.callbacks if isinstance(callback, kinds)]
    for reporter in reporters:
        if isinstance(reporter, TensorBoardCallback) and run.training_args.process_index == 0:
            reporter.logging_dir = str(run.tensorboard)
            if not goes_on:
                shutil.rmtree(run.tensorboard, ignore_errors=True)
    failed = True
    try:
        yield
        failed = False
    finally:
        for reporter in reporters:
            trainer.remove_callback(reporter)
            if isinstance(reporter, WandbCallback):
                import wandb

                wandb.finish(exit_code=int(failed))
            else:
                reporter.on_train_end(trainer.args, trainer.state, trainer.control)  # again, if all went well


# ---- Checkpoints ----


class Checkpoints(TrainerCallback):
    """Bounds the checkpoints to the last and the best, and makes the last one that a run can go on from.

    `progress.json`, written last, says that a checkpoint is whole: it has the run's settings, each file's size, and
    what `progress` gives. The one at the end of training has none: a run whose result was not written does its last
    epoch again.
    """

    def __init__(self, run: settings.Run, progress: Callable[[], dict]) -> None:
        self.run, self.progress = run, progress

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if args.world_size > 1:
            args.distributed_state.wait_for_everyone()  # each process writes its random state
        if not args.should_save:
            return
        if self.run.args.resume:
            if state.global_step >= state.max_steps:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            with data_prep.whole(folder / "progress.json") as path:
                path.write_text(json.dumps({"settings": self.run.settings, "sizes": sizes, **self.progress()}))
        # by step: the Trainer goes by the files' times, and a clock that was put back would cost the last one
        rotate_checkpoints(args.output_dir, 1, state.best_model_checkpoint, use_mtime=False)


def last_checkpoint(run: settings.Run) -> tuple[Path, dict] | None:
    """The last checkpoint that is whole and of the run's own settings, and its progress; deletes later ones.

    Raises RunError for a checkpoint of another user: its optimizer.pt is a pickle, if a restricted one.
    """
    found = (run.unfinished / "checkpoints").glob("checkpoint-*")
    for folder in sorted(found, key=lambda folder: int(folder.name.split("-")[1]), reverse=True):
        if any(path.stat().st_uid != os.geteuid() for path in (folder, *folder.iterdir())):
            raise settings.RunError(f"{folder} belongs to another user and is not read: delete it")
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
        if run.training_args.process_index == 0:
            shutil.rmtree(folder, ignore_errors=True)  # as the latest it would push out others
    return None
