"""Fine-tune one encoder, broken or whole, on one data set with `transformers.Trainer`: one run of one cell.

    python train.py --model bert-base-uncased --corrupt bottom --frac 0.5
    python train.py --model minilm --corrupt top --frac 1/3 --dataset bbc_news --learning_rate 1e-4 --num_train_epochs 3
    python train.py --model distilbert-base-uncased --dataset ag_news --tuning probe

Every flag of `TrainingArguments` works, but for those in FIXED: the paper's protocol, which tests after every epoch
and keeps the best. The run's folder, outputs/runs/<run>, appears whole, with `epochs.csv`, `predictions.csv.gz` (the
test split, best epoch), `log.txt` and `result.json`. A run that is already there is not done again. With --resume one
that was cut off goes on from its last epoch; `accelerate launch` in the place of `python` does one run on several GPUs.
"""

import contextlib
import copy
import gc
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
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
import torch.nn.functional as F
import transformers
from accelerate.utils import broadcast_object_list, find_executable_batch_size
from accelerate.utils.memory import clear_device_cache
from filelock import Timeout
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

import aggregate
import corrupt
import data_prep
import encode
import pack
import settings
import unfinished

METRIC = Path(__file__).parent / "metrics" / "weighted_f1"
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tokenizers", "numpy")


# ---- Training ----


class PairedTrainer(Trainer):
    """A Trainer whose data order has a random stream of its own, and whose predictions keep the order of the rows."""

    order_before: torch.Tensor | None = None  # the stream's state at the checkpoint from which the run goes on

    def _get_train_sampler(self, train_dataset: datasets.Dataset | None = None) -> Sampler:
        sampler = super()._get_train_sampler(self.train_dataset)  # which, unlike the argument, still has the lengths
        if self.args.train_sampling_strategy == "group_by_length":
            sampler.lengths = list(sampler.lengths)  # it asks for one at a time, slow from Arrow: seconds an epoch
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self.data_order = sampler.generator = corrupt.stream(seed, "data order")
        if self.order_before is not None:
            self.data_order.set_state(self.order_before)
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
                reason = f"{name} is {logs[name]} in epoch {state.epoch:g}"
                raise unfinished.Diverged(f"diverged: {reason}; lower --learning_rate")


class Clock(TrainerCallback):
    """Counts the seconds of the optimizer steps, without evaluations and checkpoints."""

    def __init__(self, trained: float = 0.0) -> None:
        self.trained = trained

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


def mean_over_batch(
    outputs: transformers.utils.ModelOutput, labels: torch.Tensor, num_items_in_batch: torch.Tensor | None = None
) -> torch.Tensor:
    """A part's share in the mean loss of the whole batch, where that is accumulated or shared among processes.

    The library's own loss of a part is its mean, which the Trainer then takes for such a share: it would be too large.
    """
    total = F.cross_entropy(outputs.logits, labels, reduction="sum")
    return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)


class Setup(NamedTuple):
    """A Trainer that is ready to train, and what is known of its run besides."""

    trainer: PairedTrainer
    order: np.ndarray  # the test split's row numbers in the order in which it predicts
    corruption: dict  # the corruption's manifest
    speed: dict  # what was left out of the library's way
    predicted: list[np.ndarray]  # filled by each evaluation: the predicted class of each row, in `order`


def make_trainer(run: settings.Run, data: datasets.DatasetDict) -> Setup:
    in_parts = run.training_args.gradient_accumulation_steps * run.training_args.world_size > 1
    args, device = run.args, run.training_args.device
    tokenizer = corrupt.load_tokenizer(run.model_folder)
    names = data["train"].features["label"].names
    half = halves(np.array(data["test"]["label"]))
    tokens = {name: run.settings[name] for name in ("numbers", "data_fingerprint", "model_fingerprint", "max_length")}
    tokens |= {name: version(name) for name in ("transformers", "tokenizers")}
    folder = Path(args.data_dir) / "tokens" / f"{args.dataset}-{encode.key_of(tokens)}"
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
            run.unfinished.parent.with_name("features") / encode.key_of(encoder_settings(run)),
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
        if run.training_args.world_size > 1:  # the Trainer's own counts rows twice where the processes' shares differ
            logits, labels = torch.tensor(evaluated.predictions), torch.tensor(evaluated.label_ids)
            scores["loss_of_all"] = F.cross_entropy(logits, labels).item()
        return scores

    trainer = PairedTrainer(
        model_init=lambda: model,  # asked for twice, at first and when training begins: nothing trains it in between
        args=run.training_args,
        data_collator=collator,
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_loss_func=mean_over_batch if in_parts else None,
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
    test["eval_loss"] = test.get("eval_loss_of_all", test["eval_loss"])
    scores = ["eval_loss", *(f"eval_{name}" for name in ("accuracy", "weighted_f1"))]
    scores += ["eval_weighted_f1_half_a", "eval_weighted_f1_half_b"]
    table = train.merge(test[["epoch", *scores]], on="epoch", validate="one_to_one").convert_dtypes()
    table = table.rename(columns={"loss": "train_loss"})
    return table.rename(columns={name: name.removeprefix("eval_") for name in scores if name != "eval_loss"})


class Trained(NamedTuple):
    """What a Trainer that has done its epochs leaves."""

    setup: Setup
    clock: Clock
    cut_off: list[dict]  # the parts of the run before this one: until which epoch, and what did them
    seconds_before: float  # that were spent until then
    batch: dict  # how the batch lay in memory


def fine_tune(run: settings.Run, data: datasets.DatasetDict) -> Trained:
    """Train the run, from its last checkpoint if it is to resume and has one.

    Where memory runs out, the batch is halved and the accumulation doubled, until it fits: the optimizer's batch stays
    what it was. Raises RunError if that is not possible.
    """
    args = run.training_args
    rows = args.per_device_train_batch_size // args.world_size
    accumulated, tested = args.gradient_accumulation_steps, args.per_device_eval_batch_size
    args.output_dir, started = str(run.unfinished / "checkpoints"), time.perf_counter()

    def last_checkpoint() -> tuple[Path | None, dict]:
        return (unfinished.last_checkpoint(run) if run.args.resume else None) or (None, {})

    at_once = first = last_checkpoint()[1].get("rows", rows)

    def half() -> int:
        nonlocal at_once
        if at_once % 2 or args.world_size > 1:
            raise settings.RunError(
                f"out of memory with {at_once} rows at a time, which are not halved further: give a smaller "
                "--per_device_train_batch_size or --max_length"
            )
        at_once //= 2
        return at_once

    @find_executable_batch_size(starting_batch_size=at_once, reduce_batch_size_fn=half)
    def train(batch_size: int) -> Trained:
        if batch_size < first:
            clear_device_cache(garbage_collection=True)  # the attempt before, which its exception kept alive until now
        parts = rows // batch_size
        args.per_device_train_batch_size, args.gradient_accumulation_steps = batch_size, parts * accumulated
        args.per_device_eval_batch_size = max(1, tested // parts)
        setup = make_trainer(run, data)
        checkpoint, progress = last_checkpoint()
        clock, before = Clock(progress.get("trained", 0.0)), progress.get("total", 0.0)
        cut_off = progress.get("parts", [])
        if checkpoint:
            setup.predicted.extend(np.array(classes) for classes in progress["predicted"])
            setup.trainer.order_before = torch.tensor(progress["data_order"], dtype=torch.uint8)
        setup.trainer.add_callback(clock)

        def now() -> dict:
            """What a process that goes on from here must know, besides the Trainer's own checkpoint."""
            part = {"until_epoch": setup.trainer.state.epoch, "rows": batch_size, "device": device_of(run)}
            part |= {"commit": git_commit(), **{name: version(name) for name in ("torch", "transformers")}}
            return {
                "predicted": [classes.tolist() for classes in setup.predicted],
                "data_order": setup.trainer.data_order.get_state().tolist(),
                "trained": clock.trained,
                "total": before + time.perf_counter() - started,
                "rows": batch_size,
                "parts": [*cut_off, part],
            }

        setup.trainer.add_callback(unfinished.Checkpoints(run, now))
        setup.trainer.add_callback(unfinished.HowFar(run))
        with unfinished.reports(run, setup.trainer, goes_on=checkpoint is not None):
            setup.trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        batch = {"rows": batch_size, "accumulated": args.gradient_accumulation_steps, "processes": args.world_size}
        return Trained(setup, clock, cut_off, before, {**batch, "halved": (parts - 1).bit_length()})

    return train()


def execute(run: settings.Run) -> dict:
    """Do the run and return its result, or leave `failure.json` with the reason and raise.

    The caller holds the run's lock. Of several processes (accelerate launch) all train and the first one writes.
    """
    new, started, first = run.unfinished / "new", time.perf_counter(), run.training_args.process_index == 0
    with unfinished.being_done(run):
        if data_prep.manifest(run.args.dataset, run.args.data_dir)["fingerprint"] != run.settings["data_fingerprint"]:
            raise settings.RunError(f"{run.args.dataset} was prepared anew after this run was planned: start it again")
        data = prepared(run.args.dataset, run.args.data_dir, run.settings["data_fingerprint"])
        run.training_args._n_gpu = min(run.training_args.n_gpu, 1)  # DataParallel would change the batch
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs 7 % of the time and repeats nothing
        trained = fine_tune(run, data)
        trainer, setup = trained.setup.trainer, trained.setup

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
            np.save(new / "vectors.npy", torch.cat(seen).numpy()[rows], allow_pickle=False)
        if run.args.save_model:
            trainer.save_model(str(new / "model"))
        total = trained.seconds_before + time.perf_counter() - started
        evaluated = sum(row.get("eval_runtime", 0) for row in trainer.state.log_history)
        result = {
            "weighted_f1": best["weighted_f1"],
            "accuracy": best["accuracy"],
            "best_epoch": best["epoch"],
            "epochs": len(epochs),
            "command": command(run),
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
            "batch": trained.batch,
            "cut_off": trained.cut_off,
            "seconds": {"train": trained.clock.trained, "evaluate": evaluated, "total": total},
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "device": device_of(run),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "commit": git_commit(),
        }
        if first:
            epochs.to_csv(new / "epochs.csv", index=False)
            gzip = {"method": "gzip", "mtime": 0}
            predictions.to_csv(new / "predictions.csv.gz", index_label="row", compression=gzip)
            result["files"] = unfinished.digests(new)
            (new / "result.json").write_text(json.dumps(result, indent=1) + "\n")
            unfinished.install(run)
        return result


def command(run: settings.Run) -> str:
    """The line that does the run again, to the last digit."""
    start = ["accelerate", "launch", "--multi_gpu", "--num_processes", str(run.training_args.world_size)]
    start = ["python"] if run.training_args.world_size == 1 else start
    return f"OMP_NUM_THREADS={torch.get_num_threads()} {shlex.join([*start, 'train.py', *run.flags])}"


def git_commit() -> str | None:
    """The commit of this code, with `-dirty` if files of it were changed; None outside a git checkout.

    On a cluster's nodes, where the code came without its repository, HEALING_COMMIT tells it.
    """
    if "HEALING_COMMIT" in os.environ:
        return os.environ["HEALING_COMMIT"] or None
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


def once(run: settings.Run, wait: bool = True) -> tuple[dict, bool]:
    """The run's result, and whether it was there already; done now, if nobody has done it or is doing it.

    If another process is at it, waits for its result, or raises filelock.Timeout if `wait` is false. Any failure of the
    run becomes a RunError, with the traceback in `failure.json`.
    """
    first = run.training_args.process_index == 0
    with unfinished.alone(run, wait) if first else contextlib.nullcontext():
        (result,) = broadcast_object_list([settings.result_of(run) if first else None])
        if result:
            if first and run.unfinished.exists():
                unfinished.discard(run, checkpoints_too=True)
            return result, True
        try:
            return execute(run), False
        except settings.BAD_INPUT:
            raise
        except Exception as error:
            kept, reason = run.folder / "failure.json", f"{type(error).__name__}: {corrupt.one_line(error)}"
            where = f"; the traceback is in {kept}" if kept.exists() else ""
            raise settings.RunError(f"the run failed, {reason}{where}") from error


def do(flags: list[str], asked: dict, wait: bool, *more: str) -> tuple[str, str]:
    """Do a run in a worker of the grid: "done", "failed", or "busy" if another process is at it; and a line.

    `asked` are the settings that the grid found: a worker that finds others has other weights or rows. `more` are
    flags that change no number.
    """
    quieten()
    where = f"python train.py {shlex.join(flags)}"
    try:
        with contextlib.redirect_stdout(None), contextlib.redirect_stderr(None):  # the console is the grid's
            run = settings.plan(flags, ("--disable_tqdm", "True", *more), asked.get("dataset"))
            if differ := [name for name, value in asked.items() if run.settings.get(name) != value]:
                raise settings.RunError(
                    f"{', '.join(differ)} differ from what they were when the grid began: start it again"
                )
            where = run.folder
            result, there = once(run, wait)
        return "done", settings.summary(run, result) + (", done by another process" if there else "")
    except Timeout:
        return "busy", f"{where}: another process is doing it"
    except Exception as error:
        return "failed", f"{where}: {type(error).__name__}: {corrupt.one_line(error)}"
    finally:
        gc.collect()  # a Trainer is full of cycles: without this, models pile up


def beside_the_paper(result: dict) -> str:
    """What the paper has for the run's cell, and how far ours is from it."""
    s, f1 = result["settings"], 100 * result["weighted_f1"]
    cells = aggregate.paper_cells().set_index(aggregate.PLACE)["f1"]
    table = aggregate.table_of(s["pooling"], s["tuning"], s["dataset"])
    paper = cells.get((table, s["model"], s["percent"], s["side"], s["dataset"]))
    if paper is None:
        return "the paper has no such cell"
    best = f"the paper's Table {table} has {paper:.2f} %, the best of three learning rates"
    return f"{best}; ours - the paper's: {f1 - paper:+.2f}"


def main() -> None:
    quieten()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    settings.default_settings()  # first: TrainingArguments of other flags make accelerate's processes lose each other
    args, training_args = settings.parse(sys.argv[1:])
    first = training_args.process_index == 0
    try:
        with training_args.main_process_first(local=False), contextlib.redirect_stdout(sys.stdout if first else None):
            run = settings.plan(sys.argv[1:])
        try:
            result, there = once(run, wait=False)
        except Timeout:
            if training_args.world_size > 1:
                raise settings.RunError(
                    "another process is doing this run: start it again when that has ended"
                ) from None
            print(f"another process is doing this run: waiting for its result in {run.folder}", flush=True)
            result, there = once(run)
    except settings.BAD_INPUT as error:
        if first:
            print(f"train.py: error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        kept = "it goes on from its last epoch" if args.resume else "nothing is kept of it (--resume keeps its epochs)"
        print(f"interrupted: the same command does the run, {kept}", file=sys.stderr)
        sys.exit(130)
    if first:
        files = ", ".join(sorted(path.name for path in run.folder.iterdir()))
        print(f"{settings.summary(run, result)}\n{beside_the_paper(result)}")
        print(f"{'was there already' if there else 'done'}: {run.folder}: {files}")


if __name__ == "__main__":
    main()
