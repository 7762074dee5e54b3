"""What watches a run while it trains: divergence, the clock, progress for the grid, checkpoints, reports.

Used by train.py, which adds these to its Trainer.
"""

import json
import math
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import rotate_checkpoints

from common import RunError, atomic_write
from config import Run


class StopIfDiverged(TrainerCallback):
    """Ends a run whose loss is not a number: its F1 would be that of a constant."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: object
    ) -> None:
        for name in {"loss", "eval_loss"} & logs.keys():
            if not math.isfinite(logs[name]):
                raise RunError(
                    f"diverged: {name} is {logs[name]} in epoch {state.epoch:g}; give a lower --learning_rate"
                )


class TrainTimer(TrainerCallback):
    """Counts the seconds of the optimizer steps, without evaluations and checkpoints."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.seconds = seconds

    def start(self, *_: object, **__: object) -> None:
        self.last = time.perf_counter()

    on_epoch_begin = on_predict = start  # EvaluateAt predicts between two steps

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.seconds, self.last = self.seconds + now - self.last, now


class EvaluateAt(TrainerCallback):
    """Evaluates after each of these steps of the optimizer, 0 before the first, and after the last.

    `rows` fills with what `evaluate` gives, and the `step`. No random stream is moved: the run trains as without it.
    """

    def __init__(self, steps: tuple[int, ...], evaluate: Callable[[], dict]) -> None:
        self.steps, self.evaluate, self.rows = steps, evaluate, []

    def record(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if state.global_step in (*self.steps, state.max_steps):
            with torch.random.fork_rng(devices=[]):  # a data loader draws a seed
                self.rows.append({"step": state.global_step} | self.evaluate())

    on_train_begin = on_step_end = record


class Progress(TrainerCallback):
    """Leaves in now.json, at most once a second, how far the run is: the grid shows it."""

    def __init__(self, run: Run) -> None:
        self.path, self.due = run.work_dir / "now.json", 0.0

    def write(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if time.monotonic() < self.due:
            return
        self.due = time.monotonic() + 1
        scores = [row["eval_weighted_f1"] for row in state.log_history if "eval_weighted_f1" in row]
        now = {"epoch": state.epoch, "epochs": state.num_train_epochs, "weighted_f1": scores[-1] if scores else None}
        now["fraction"] = state.global_step / state.max_steps
        with suppress(OSError), atomic_write(self.path) as path:
            path.write_text(json.dumps(now))

    on_train_begin = on_step_end = on_evaluate = write


class Checkpoints(TrainerCallback):
    """Bounds the checkpoints to the last and the best, and makes the last one that a run can go on from.

    `progress.json`, written last, says that a checkpoint is whole: it has the run's settings, each file's size, and
    what `progress` gives. The one at the end of training has none: a run whose result was not written does its last
    epoch again.
    """

    def __init__(self, run: Run, progress: Callable[[], dict]) -> None:
        self.run, self.progress = run, progress

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        if self.run.config.resume:
            if state.global_step >= state.max_steps:
                return
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            sizes = {path.name: path.stat().st_size for path in folder.iterdir()}
            with atomic_write(folder / "progress.json") as path:
                path.write_text(json.dumps({"settings": self.run.settings, "sizes": sizes, **self.progress()}))
        # by step: the Trainer goes by the files' times, and a clock that was put back would cost the last one
        rotate_checkpoints(args.output_dir, 1, state.best_model_checkpoint, use_mtime=False)


def reporters(run: Run, resumed: bool) -> list[TrainerCallback]:
    """What the Trainer does not set up by itself: TensorBoard's curves under the run's name, begun anew or gone on."""
    if run.config.report_to != "tensorboard":
        return []
    from torch.utils.tensorboard import SummaryWriter

    if not resumed:
        shutil.rmtree(run.tensorboard, ignore_errors=True)
    return [TensorBoardCallback(SummaryWriter(str(run.tensorboard)))]
