"""Fine-tune one encoder, broken or whole, on one data set with `transformers.Trainer`: one run of one cell.

    python train.py --model bert-base-uncased --corrupt bottom --frac 0.5
    python train.py --model minilm --corrupt top --frac 1/3 --dataset bbc_news --learning_rate 1e-4 --num_train_epochs 3
    python train.py --model distilbert-base-uncased --dataset ag_news --tuning probe

Every flag of `TrainingArguments` works, but for those in FIXED: the paper's protocol, which tests after every epoch
and keeps the best. The run's folder, outputs/runs/<run>, then holds `epochs.csv`, `predictions.csv.gz` (the test
split, best epoch) and, written last, `result.json`. A run that is already there is not done again.
"""

import contextlib
import copy
import gc
import json
import math
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import traceback
from collections.abc import Iterator
from fractions import Fraction
from functools import lru_cache
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's matrix products do not repeat

import datasets
import evaluate
import numpy as np
import pandas as pd
import torch
import transformers
from torch.utils.data import Sampler, SequentialSampler
from transformers import (
    DataCollatorWithPadding,
    Trainer,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    default_data_collator,
)

import corrupt
import data_prep
import encode
import pack
import settings

METRIC = Path(__file__).parent / "metrics" / "weighted_f1"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tokenizers", "numpy")


# ---- Training ----


class PairedTrainer(Trainer):
    """A Trainer whose data order has a random stream of its own, and whose predictions keep the order of the rows."""

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler:
        sampler = super()._get_train_sampler(self.train_dataset)  # which, unlike the argument, still has the lengths
        if self.args.train_sampling_strategy == "group_by_length":
            sampler.lengths = list(sampler.lengths)  # it asks for one at a time, slow from Arrow: seconds an epoch
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        sampler.generator = corrupt.stream(seed, "data order")
        return sampler

    def _get_eval_sampler(self, eval_dataset: datasets.Dataset) -> Sampler:
        return SequentialSampler(eval_dataset)  # the library's own groups by length and so shuffles predictions


class StopIfDiverged(TrainerCallback):
    """Ends a run whose loss is no longer a number: its F1 would be that of a constant."""

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, logs: dict, **_: object
    ) -> None:
        for name in {"loss", "eval_loss"} & logs.keys():
            if not math.isfinite(logs[name]):
                raise settings.RunError(
                    f"diverged: {name} is {logs[name]} in epoch {state.epoch:g}; lower --learning_rate"
                )


class Clock(TrainerCallback):
    """Counts the seconds of the optimizer steps, without evaluations and checkpoints."""

    def __init__(self) -> None:
        self.trained = 0.0

    def on_epoch_begin(self, *_: object, **__: object) -> None:
        self.last = time.perf_counter()

    def on_step_end(self, *_: object, **__: object) -> None:
        now = time.perf_counter()
        self.trained, self.last = self.trained + now - self.last, now


def halves(labels: np.ndarray) -> np.ndarray:
    """0 or 1 for each row: two fixed halves of the test split, of the same class shares (odd ones go to half 0)."""
    return pd.Series(labels).groupby(labels).cumcount().to_numpy() % 2


@lru_cache(maxsize=1)
def broken(
    folder: Path, side: str, frac: Fraction | None, seed: int, kaiming_a: float, label_names: tuple[str, ...]
) -> tuple[transformers.PreTrainedModel, dict]:
    """`corrupt.load_broken`, kept for the next run of the same cell; to be copied before it is trained."""
    labels = dict(enumerate(label_names))
    label2id = {name: label for label, name in labels.items()}
    return corrupt.load_broken(folder, side, frac, seed, kaiming_a, id2label=labels, label2id=label2id)


@lru_cache(maxsize=2)
def prepared(dataset: str, data_dir: str, fingerprint: str) -> datasets.DatasetDict:
    """`data_prep.load`, kept for the next run on the same rows."""
    return data_prep.load(dataset, data_dir)


@lru_cache(maxsize=1)
def metric() -> evaluate.EvaluationModule:
    return evaluate.load(str(METRIC), keep_in_memory=True)


def quicken(model: transformers.PreTrainedModel, plain: bool, pooling: str) -> bool:
    """Hook the pooling into the model and, unless it is to stay `plain`, what makes it quick; whether it is packed."""
    packed = not plain and model.config.model_type in pack.PACKABLE
    if packed:
        pack.pack(model, pooling)
    elif pooling == "mean":
        pack.pool_mean(model)
    if not plain:
        pack.use_quick_dropout(model)
    return packed


class Setup(NamedTuple):
    """A Trainer that is ready to train, and what is known of its run besides."""

    trainer: PairedTrainer
    order: np.ndarray  # the test split's row numbers in the order in which it predicts
    corruption: dict  # the corruption's manifest
    speed: dict  # what was left out of the library's way
    predicted: list[np.ndarray]  # filled by each evaluation: the predicted class of each row, in `order`


def make_trainer(run: settings.Run, data: datasets.DatasetDict) -> Setup:
    args, device = run.args, run.training_args.device
    tokenizer = corrupt.load_tokenizer(run.model_folder)
    names = data["train"].features["label"].names
    half = halves(np.array(data["test"]["label"]))
    tokens = {name: run.settings[name] for name in ("numbers", "data_fingerprint", "model_fingerprint", "max_length")}
    tokens |= {name: version(name) for name in ("transformers", "tokenizers")}
    folder = Path(args.data_dir) / args.dataset / f"tokens-{encode.key_of(tokens)}"
    data, order = encode.tokenised(data, tokenizer, args.max_length, folder)
    half = half[order]

    seed = run.training_args.seed
    model, corruption = broken(run.model_folder, args.corrupt, args.frac, seed, args.kaiming_a, tuple(names))
    model = copy.deepcopy(model)
    quick = not args.plain and device.type == "cpu"  # none of it has been measured on a GPU
    speed = {"packed": quicken(model, not quick, args.pooling), "quick_dropout": quick}

    collator = DataCollatorWithPadding(tokenizer)
    if args.tuning == "probe":
        precision = {"bf16": torch.bfloat16, "fp16": torch.float16}
        autocast = next((dtype for name, dtype in precision.items() if getattr(run.training_args, name)), None)
        data = encode.probe_features(
            model,
            data,
            tokenizer,
            Path(run.training_args.output_dir) / "features" / encode.key_of(encoder_settings(run)),
            run.training_args.per_device_eval_batch_size,
            device,
            autocast,
        )
        collator = default_data_collator
    predicted: list[np.ndarray] = []

    def compute_metrics(evaluated: transformers.EvalPrediction) -> dict[str, float]:
        classes, labels = evaluated.predictions.argmax(-1), evaluated.label_ids
        predicted.append(classes)
        scores = metric().compute(predictions=classes, references=labels)
        for name, part in (("half_a", half == 0), ("half_b", half == 1)):
            part_scores = metric().compute(predictions=classes[part], references=labels[part])
            scores[f"weighted_f1_{name}"] = part_scores["weighted_f1"]
        return scores

    trainer = PairedTrainer(
        model_init=lambda: model,  # asked for twice, at first and when training begins: nothing trains it in between
        args=run.training_args,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=compute_metrics,
        callbacks=[StopIfDiverged()],
    )
    return Setup(trainer, order, corruption, speed, predicted)


def encoder_settings(run: settings.Run) -> dict:
    """All that a frozen encoder's outputs depend on."""
    names = ("numbers", "model_fingerprint", "side", "frac", "kaiming_a", "seed", "data_fingerprint", "pooling")
    names += ("max_length", "plain", "per_device_eval_batch_size", "bf16", "fp16", "tf32")
    packages = {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    return {name: run.settings[name] for name in names} | packages | {"device": device_of(run)}


def device_of(run: settings.Run) -> dict:
    return {
        "type": run.training_args.device.type,
        "name": torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine(),
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def position_0(model: transformers.PreTrainedModel) -> Iterator[list[torch.Tensor]]:
    """A list that fills, batch by batch, with the encoder's output at position 0: what pooler and head read."""
    seen: list[torch.Tensor] = []
    hook = pack.encoder_of(model).register_forward_hook(lambda *call: seen.append(call[2][0][:, 0].float().cpu()))
    yield seen
    hook.remove()


def epoch_table(log: list[dict]) -> pd.DataFrame:
    """A row for each epoch: train and test loss, accuracy, weighted F1, and the F1 on either half of the test split."""
    train = pd.DataFrame([row for row in log if "loss" in row])[["epoch", "loss"]]
    test = pd.DataFrame([row for row in log if "eval_loss" in row])
    scores = ["eval_loss", *(f"eval_{name}" for name in ("accuracy", "weighted_f1"))]
    scores += ["eval_weighted_f1_half_a", "eval_weighted_f1_half_b"]
    table = train.merge(test[["epoch", *scores]], on="epoch", validate="one_to_one").convert_dtypes()
    table = table.rename(columns={"loss": "train_loss"})
    return table.rename(columns={name: name.removeprefix("eval_") for name in scores if name != "eval_loss"})


def execute(run: settings.Run) -> dict:
    """Do the run and return its result, or leave `failure.json` with the reason and raise."""
    checkpoints, started = run.folder / "checkpoints", time.perf_counter()
    try:
        run.folder.mkdir(parents=True, exist_ok=True)
        for name in ("result.json", "failure.json", "epochs.csv", "predictions.csv.gz", "vectors.npy"):
            (run.folder / name).unlink(missing_ok=True)
    except OSError as error:
        raise settings.RunError(f"{run.folder} cannot be written: {corrupt.one_line(error)}") from error
    try:
        for left_over in (checkpoints, run.folder / "model"):  # of a run that was killed, or of other settings
            shutil.rmtree(left_over, ignore_errors=True)
        if data_prep.manifest(run.args.dataset, run.args.data_dir)["fingerprint"] != run.settings["data_fingerprint"]:
            raise settings.RunError(f"{run.args.dataset} was prepared anew after this run was planned: start it again")
        data = prepared(run.args.dataset, run.args.data_dir, run.settings["data_fingerprint"])
        run.training_args._n_gpu = min(run.training_args.n_gpu, 1)  # DataParallel would change the batch
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs 7 % of the time and repeats nothing
        setup = make_trainer(run, data)
        trainer, clock = setup.trainer, Clock()
        trainer.add_callback(clock)
        run.training_args.output_dir = str(checkpoints)
        trainer.train()

        epochs = epoch_table(trainer.state.log_history)
        best = epochs.to_dict("records")[epochs["weighted_f1"].idxmax()]
        best_classes = setup.predicted[epochs["weighted_f1"].idxmax()]
        rows = np.argsort(setup.order)
        predictions = pd.DataFrame({"label": data["test"]["label"], "prediction": best_classes[rows]})

        if run.args.save_model or run.args.save_vectors:
            with position_0(trainer.model) as seen:
                read_back = trainer.predict(trainer.eval_dataset)
            if (read_back.predictions.argmax(-1) != best_classes).any():
                raise settings.RunError(
                    "the best epoch's weights give other predictions when read back: this machine does not compute "
                    "the same twice"
                )
        if run.args.save_vectors:
            with data_prep.whole(run.folder / "vectors.npy") as path, path.open("wb") as file:
                np.save(file, torch.cat(seen).numpy()[rows], allow_pickle=False)
        if run.args.save_model:
            trainer.save_model(str(run.folder / "model"))
        with data_prep.whole(run.folder / "epochs.csv") as path:
            epochs.to_csv(path, index=False)
        with data_prep.whole(run.folder / "predictions.csv.gz") as path:
            predictions.to_csv(path, index_label="row", compression={"method": "gzip", "mtime": 0})
        total = time.perf_counter() - started
        evaluated = sum(row.get("eval_runtime", 0) for row in trainer.state.log_history)
        result = {
            "weighted_f1": best["weighted_f1"],
            "accuracy": best["accuracy"],
            "best_epoch": best["epoch"],
            "epochs": len(epochs),
            "command": f"OMP_NUM_THREADS={torch.get_num_threads()} {shlex.join(['python', 'train.py', *run.flags])}",
            "settings": run.settings,
            "model": {
                "name": run.args.model,
                "revision": run.model_revision,
                "architecture": type(trainer.model).__name__,
                "parameters": trainer.model.num_parameters(),
            },
            "data": {name: run.data[name] for name in ("request", "source", "dropped", "rows", "rows_per_class")},
            "corruption": setup.corruption,
            "speed": setup.speed,
            "seconds": {"train": clock.trained, "evaluate": evaluated, "total": total},
            "device": device_of(run),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "commit": git_commit(),
        }
        with data_prep.whole(run.folder / "result.json") as path:
            path.write_text(json.dumps(result, indent=1) + "\n")
        return result
    except Exception as error:
        failure = {"reason": f"{type(error).__name__}: {error}", "settings": run.settings}
        failure["traceback"] = traceback.format_exc().splitlines()
        with data_prep.whole(run.folder / "failure.json") as path:
            path.write_text(json.dumps(failure, indent=1) + "\n")
        raise
    finally:
        shutil.rmtree(checkpoints, ignore_errors=True)


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files of it were changed; None outside a git checkout."""
    try:
        command = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        return subprocess.run(command, cwd=METRIC, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def quieten() -> None:
    """Leave only errors and the Trainer's own lines: the loading report says what the manifest says."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()


def finished(run: settings.Run) -> dict:
    """The result of doing the run; any failure becomes a RunError, with the traceback in `failure.json`."""
    try:
        return execute(run)
    except settings.BAD_INPUT:
        raise
    except Exception as error:
        reason = f"{type(error).__name__}: {corrupt.one_line(error)}"
        raise settings.RunError(f"the run failed, {reason}; the traceback is in {run.folder}/failure.json") from error


def do(cell: list[list[str]]) -> list[tuple[bool, str]]:
    """Do a cell's runs in a worker of the grid; for each, whether it is there now, and a line to say so."""
    quieten()
    said = []
    for flags in cell:
        where = f"python train.py {shlex.join(flags)}"
        try:
            run = settings.plan([*flags, "--disable_tqdm", "True"])
            where = run.folder
            with contextlib.redirect_stdout(None):  # the Trainer's lines, without its bar
                result = settings.result_of(run) or execute(run)
            said.append((True, settings.summary(run, result)))
        except Exception as error:
            said.append((False, f"{where}: {type(error).__name__}: {corrupt.one_line(error)}"))
        gc.collect()  # a Trainer is full of cycles: without this, models pile up
    return said


def main() -> None:
    quieten()
    try:
        run = settings.plan(sys.argv[1:])
        result = settings.result_of(run)
        done = "was there already" if result else "done"
        result = result or finished(run)
    except settings.BAD_INPUT as error:
        print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted: nothing is kept of this run, the same command starts it again", file=sys.stderr)
        sys.exit(130)
    print(f"{settings.summary(run, result)}\n{done}: {run.folder}")


if __name__ == "__main__":
    main()
