"""A run while it is being done: its lock, its checkpoints, and the folder that appears whole.

All of it lies in outputs/unfinished until the run's folder is renamed to outputs/runs. Used by train.py, which does the
run, and by grid.py, which clears up after workers that died.
"""

import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from hashlib import file_digest
from pathlib import Path

from filelock import FileLock, Timeout
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import rotate_checkpoints

import corrupt
import data_prep
import settings


@contextmanager
def alone(run: settings.Run, wait: bool = True) -> Iterator[None]:
    """Hold the run's lock, so that nobody else does it meanwhile; the system takes it from a process that dies.

    Raises filelock.Timeout if another process has it and `wait` is false, RunError where it cannot be written.
    """
    lock = Path(f"{run.unfinished}.lock")
    try:
        lock.parent.mkdir(parents=True, exist_ok=True)
        held = FileLock(lock).acquire(timeout=-1 if wait else 0)
    except Timeout:
        raise
    except (OSError, NotImplementedError) as error:
        raise settings.RunError(f"{lock} cannot be written and locked: {corrupt.one_line(error)}") from error
    with held:
        if (run.unfinished / "old").is_dir() and not run.folder.exists():  # a process died while it installed the new
            (run.unfinished / "old").rename(run.folder)
        yield
        lock.unlink()  # only now that the result is there: whoever gets a lock on the file without a name, looks again


def sweep(run: settings.Run) -> None:
    """Delete what a dead process left of the run; with --resume not its checkpoints. Does nothing if one is at it."""
    try:
        with alone(run, wait=False):
            discard(run)
    except Timeout:
        return


def discard(run: settings.Run, checkpoints_too: bool = False) -> None:
    """Delete the run's unfinished files; the caller holds its lock."""
    keep = run.args.resume and not checkpoints_too
    shutil.rmtree(run.unfinished / "new" if keep else run.unfinished, ignore_errors=True)


def install(run: settings.Run) -> None:
    """Put the folder `new` in the place of the run's, which is whole at every moment or not there."""
    run.folder.parent.mkdir(parents=True, exist_ok=True)
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


def failed(run: settings.Run, reason: str, traceback: list[str]) -> None:
    """Leave the reason in the run's folder; a result of other settings that stands there stays."""
    run.folder.mkdir(parents=True, exist_ok=True)
    with data_prep.whole(run.folder / "failure.json") as path:
        path.write_text(json.dumps({"reason": reason, "settings": run.settings, "traceback": traceback}, indent=1))


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
    """The last checkpoint that is whole and of the run's own settings, and its progress; says which it passes over.

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
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            pass
        print(f"{folder} is not whole, or was made with other settings: it is not used", file=sys.stderr)
    return None
