"""Fine-tune one encoder, corrupted or not, on one data set with `transformers.Trainer`: one run of one cell.

    python train.py --model bert-base-uncased --corrupt bottom --frac 0.5
    python train.py --model minilm --corrupt top --frac 1/3 --dataset bbc_news --pooling mean --num_train_epochs 3
    python train.py --model distilbert-base-uncased --dataset ag_news --tuning probe

Every field of `TrainingArguments` is a flag; those in PROTOCOL of protocol.py are refused: every run is evaluated after
each epoch and keeps the best. The run's folder, outputs/runs/<run>, appears whole, with `epochs.csv`,
`predictions.csv.gz` (each test row, each epoch), `log.txt` and `result.json`. A run that is there already is not done
again. With --resume one that was cut off goes on from its last epoch. corrupt.py has the methods of corruption,
tunings.py the ways to fine-tune.
"""

import dataclasses
import logging
import os
import platform
import resource
import signal
import sys
import time
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import config

os.environ.setdefault("GOMP_SPINCOUNT", "10000")  # threads that wait for one another let other programs have the core
if __name__ == "__main__":
    config.parse_run(__doc__)  # help and wrong flags are told before torch is imported

import datasets
import numpy as np
import pandas as pd
import torch
from accelerate.utils.memory import should_reduce_batch_size
from filelock import Timeout
from safetensors.torch import save_file
from transformers import Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy

import callbacks
import corrupt
import data_prep
import model_check
import models
import paper
import probe
import resolve
import run_dir
import stats
import tunings
import unpad
from common import USER_ERRORS, InputError, RunError, explain, fail, git_commit, in_worker, one_line, write_signed
from config import Run, RunConfig
from prepared_run import device_of, in_force, optimizer_of, prepare_run, training_arguments

SCORES = {"eval_loss": "eval_loss"}  # the Trainer's name of each score, and ours
SCORES |= {f"eval_{name}": name for name in ("accuracy", "weighted_f1", *stats.HALVES)}
PACKAGES = ("torch", "transformers", "accelerate", "datasets", "evaluate", "scikit-learn", "tokenizers", "numpy")


def check(wanted: RunConfig) -> None:
    """Check all that can be checked before the rows are prepared and a weight is loaded. Raises InputError."""
    if wanted.tuning not in tunings.TUNINGS:
        raise InputError(f"--tuning {wanted.tuning} is not known: choose from {', '.join(tunings.TUNINGS)}")
    args, how = training_arguments(wanted, Path(), ""), corrupt.Corruption.of(wanted)
    corrupt.check_method(how)
    folder, _ = models.find_model(wanted.model, wanted.revision)
    with explain("the library refuses these flags", Exception):
        Trainer.get_optimizer_cls_and_kwargs(args, corrupt.empty_model(folder))
        optimizer = torch.optim.SGD([torch.zeros(1)], args.learning_rate)
        get_scheduler(args.lr_scheduler_type, optimizer, 0, 1, args.lr_scheduler_kwargs)
    corrupt.check_corruptible(folder, how)
    if wanted.probe_reads == "pooler" and getattr(corrupt.empty_model(folder).base_model, "pooler", None) is None:
        raise InputError(f"{wanted.model} has no pooler: give --probe_reads cls or mean")
    longest = model_check.longest_input(folder)
    if not 8 <= wanted.max_length <= longest:
        raise InputError(f"--max_length {wanted.max_length} is not from 8 to {longest}, what {wanted.model} can read")
    model_check.check_model(folder, models.model_fingerprint(folder), wanted.pooling, wanted.padded)


def fine_tune_uncorrupted(run: Run, data: datasets.DatasetDict) -> tuple[dict[str, torch.Tensor], float]:
    """What --corrupt_after corrupts: the weights of the uncorrupted run's last epoch, and its weighted F1 there.

    It trains as that run does, to the digit; nothing is chosen by its test F1.
    """
    trainer = prepare_run(dataclasses.replace(run, config=run.config.without_corruption()), data).trainer
    trainer.args.save_strategy, trainer.args.load_best_model_at_end = SaveStrategy.NO, False
    train(trainer, run, None)
    scores = epoch_table(trainer.state.log_history)
    return {name: values.cpu() for name, values in trainer.model.state_dict().items()}, scores["weighted_f1"].iloc[-1]


def run_training(run: Run) -> dict:
    """Do the run, whose lock the caller holds, and return its result; raises what goes wrong.

    Load the rows, corrupt the model (`prepare_run`), train and evaluate, write, publish.
    """
    with run_dir.run_workspace(run) as new:
        started = time.perf_counter()
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # costs 7 % of the time and repeats nothing
        data = data_prep.load(run.config.dataset, run.config.data_dir, run.data["fingerprint"])
        weights, f1_before = fine_tune_uncorrupted(run, data) if run.config.corrupt_after else (None, None)
        trainer, order, test, corruption, speed, known, predicted = prepare_run(run, data, weights)
        device = device_of(trainer.args.device.type)

        checkpoint, before = (run_dir.last_checkpoint(run) if run.config.resume else None) or (None, {})
        timer, resumed_from = callbacks.TrainTimer(before.get("trained", 0.0)), before.get("resumed_from", [])
        if checkpoint:
            predicted.extend(np.array(classes) for classes in before["predicted"])

        def progress() -> dict:
            """What a process that goes on from here must know, besides the Trainer's own checkpoint."""
            part = {"until_epoch": trainer.state.epoch, "device": device, "commit": git_commit()}
            return {
                "predicted": [classes.tolist() for classes in predicted],
                "trained": timer.seconds,
                "total": before.get("total", 0.0) + time.perf_counter() - started,
                "resumed_from": [*resumed_from, part | {p: version(p) for p in ("torch", "transformers")}],
            }

        def evaluate_at_step() -> dict:
            scores = trainer.predict(trainer.eval_dataset, metric_key_prefix="eval").metrics
            return {name: scores[key] for key, name in SCORES.items()} | {"classes": predicted.pop()}

        steps = callbacks.EvaluateAt(run.config.eval_at, evaluate_at_step)
        watchers = [timer, callbacks.Checkpoints(run, progress), callbacks.Progress(run)]
        watchers += [steps] if run.config.eval_at else []
        for callback in [*watchers, *callbacks.reporters(run, resumed=checkpoint is not None)]:
            trainer.add_callback(callback)
        if run.config.tuning == "probe_converged":
            half = stats.split_halves(test["label"], test.get("group"))[order]
            layers, classes = probe.evaluate(trainer.train_dataset, trainer.eval_dataset, half)
            predicted.append(classes)
            if run.config.probe_layers == "all":
                layers.to_csv(new / "layers.csv", index=False)
            epochs = layers.tail(1).assign(epoch=1).drop(columns=["layer", "C"]).reset_index(drop=True)
        else:
            train(trainer, run, checkpoint)
            epochs = epoch_table(trainer.state.log_history)
        if beyond := [step for step in run.config.eval_at if step > trainer.state.max_steps]:
            print(f"--eval_at {beyond[0]} and later: training ends after step {trainer.state.max_steps}")
        trained = trainer.model.num_parameters(only_trainable=True) if trainer.optimizer else None
        evaluating = sum(row.get("eval_runtime", 0) for row in trainer.state.log_history)
        best = epochs.to_dict("records")[epochs["weighted_f1"].idxmax()]
        best_classes, rows = predicted[epochs["weighted_f1"].idxmax()], np.argsort(order)
        predictions = test.assign(**{f"epoch_{k}": classes[rows] for k, classes in enumerate(predicted, 1)})
        if steps.rows:
            by_step = pd.DataFrame(steps.rows)
            by_step.drop(columns="classes").to_csv(new / "steps.csv", index=False)
            guesses = {f"step_{row['step']}": row["classes"][rows] for row in steps.rows}
            predictions = predictions.assign(**guesses)
        if run.config.save_model or run.config.save_vectors or run.config.save_states:
            with unpad.capture_pooled(trainer.model, run.config.pooling) as pooled:
                read_back = trainer.predict(trainer.eval_dataset)
            if (read_back.predictions.argmax(-1) != best_classes).any():
                raise RunError(
                    "the best epoch's weights give other predictions when they are read back: this machine does not "
                    "compute the same twice"
                )
        if run.config.save_vectors:
            np.save(new / "vectors.npy", torch.cat(pooled).numpy()[rows], allow_pickle=False)
        if run.config.save_model:
            save_model(trainer, run, new / "model")
        epochs.to_csv(new / "epochs.csv", index=False)
        predictions.to_csv(new / "predictions.csv.gz", index=False, compression={"method": "gzip", "mtime": 0})
        total = before.get("total", 0.0) + time.perf_counter() - started
        result = {
            "weighted_f1": best["weighted_f1"],
            "accuracy": best["accuracy"],
            "best_epoch": best["epoch"],
            "epochs": len(epochs),
            "steps": [row["step"] for row in steps.rows],
            "weighted_f1_before_corruption": f1_before,
            "command": f"OMP_NUM_THREADS={torch.get_num_threads()} {run.command}",
            "settings": run.settings,
            "model": {
                "name": run.config.model,
                "revision": run.revision,
                "architecture": type(trainer.model).__name__,
                "parameters": trainer.model.num_parameters(),
                "trained": trained,
            },
            "data": {name: run.data[name] for name in ("request", "source", "dropped", "rows", "rows_per_class")}
            | known,
            "corruption": corruption,
            "in_force": in_force(trainer) | optimizer_of(trainer),
            "speed": speed,
            "resumed_from": resumed_from,
            "seconds": {"train": timer.seconds, "evaluate": evaluating, "total": total},
            "finished": datetime.now(UTC).isoformat(timespec="milliseconds"),
            "device": device,
            "peak_memory": peak_memory(device["type"]),
            "versions": {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}},
            "commit": git_commit(),
            "files": run_dir.list_files(new),
        }
        if run.config.save_states:  # not among the files: analyse.py deletes them
            save_model(trainer, run, new / "states")
            if weights is not None:
                save_file(weights, new / "states" / "before.safetensors")
            result["states"] = {f"states/{name}": of for name, of in run_dir.list_files(new / "states").items()}
        write_signed(new / "result.json", result)
        run_dir.publish(run)
        return result


def save_model(trainer: Trainer, run: Run, folder: Path) -> None:
    """Save the model that the Trainer has, and what it takes to read with it."""
    tunings.merge_lora(trainer.model)
    trainer.processing_class.model_max_length = run.config.max_length
    trainer.save_model(str(folder))
    if run.config.pooling == "mean":
        unpad.save_mean(folder)


def train(trainer: Trainer, run: Run, checkpoint: Path | None) -> None:
    """Train, from the checkpoint on if there is one; raises MemoryError with what to do about it."""
    try:
        trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    except Exception as error:
        if should_reduce_batch_size(error):
            raise MemoryError(out_of_memory(run, trainer.args)) from error
        raise
    if (done := trainer.state.global_step) < (steps := trainer.state.max_steps):
        raise RunError(f"training ended after step {done} of {steps}, and nothing says why: run it again")


def epoch_table(log: list[dict]) -> pd.DataFrame:
    """A row for each epoch: train and test loss, accuracy, weighted F1, and the F1 on either half of the test split."""
    train = pd.DataFrame([row for row in log if "loss" in row])[["epoch", "loss"]]
    test = pd.DataFrame([row for row in log if "eval_loss" in row])
    table = train.merge(test[["epoch", *SCORES]], on="epoch", validate="one_to_one").convert_dtypes()
    return table.rename(columns={"loss": "train_loss"} | SCORES)


def out_of_memory(run: Run, args: TrainingArguments) -> str:
    rows, parts = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = "a smaller --max_length or --per_device_eval_batch_size, or do fewer runs at a time"
    if rows % 2 == 0:
        advice = f"--per_device_train_batch_size {rows // 2} --gradient_accumulation_steps {2 * parts}, or {advice}"
    return f"out of memory with {rows} rows of up to {run.config.max_length} tokens at a time: give {advice}"


def peak_memory(device_type: str) -> int:
    """The most bytes that this process has held; on a GPU the most that its tensors took there."""
    if device_type == "cuda":
        return torch.cuda.max_memory_allocated()
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held  # getrusage(2): bytes there, kilobytes on Linux


def run_or_reuse(run: Run, wait: bool = True) -> tuple[dict, bool]:
    """The run's result, and whether it was there already; the run is done now if nobody has done it or does it now.

    If another process does it, waits for its result, or raises filelock.Timeout if `wait` is false. Any failure of the
    run becomes a RunError, with the traceback in `failure.json`.
    """
    with run_dir.run_lock(run, wait):
        if result := run_dir.load_valid_result(run):
            run_dir.discard(run, checkpoints_too=True)
            for name in ("failure.json", "failure.log"):  # of a later attempt, to keep more of it
                (run.folder / name).unlink(missing_ok=True)
            return result, True
        try:
            return run_training(run_dir.keep_what_is_there(run)), False
        except (InputError, RunError):
            raise
        except Exception as error:
            failure = run.folder / "failure.json"
            where = f"; the traceback is in {failure}" if failure.exists() else ""
            raise RunError(f"the run failed, {type(error).__name__}: {one_line(error)}{where}") from error


def run_in_worker(run: Run, wait: bool) -> tuple[str, str]:
    """Do a run of the grid: "done", "failed", or "busy" if another process does it and `wait` is false; and a line."""
    silence_libraries()
    try:
        found = resolve.resolve_run(run.config, prepare=False)
        differ = [name for name, value in run.settings.items() if found is None or found.settings[name] != value]
        if differ:
            raise RunError(f"{', '.join(differ)} differ from what they were when the grid began: start it again")
        result, reused = run_or_reuse(dataclasses.replace(found, command=run.command), wait)
        line = config.describe_result(run.settings, result)
        return "done", line + (", done by another process" if reused else "")
    except Timeout:
        return "busy", f"{run.folder}: another process does it"
    except Exception as error:
        return "failed", f"{run.folder}: {type(error).__name__}: {one_line(error)}"


def silence_libraries() -> None:
    """The console gets the Trainer's own lines and errors; all that the libraries say goes to the run's log."""
    datasets.disable_progress_bars()
    for name in ("transformers", "datasets", "huggingface_hub"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [], True
        logger.setLevel(logging.WARNING)
    logging.getLogger("transformers.trainer").setLevel(logging.INFO)
    if not in_worker():
        console = logging.StreamHandler()
        console.setLevel(logging.ERROR)
        logging.basicConfig(handlers=[console])


def main() -> None:
    wanted = config.parse_run(__doc__)
    silence_libraries()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    try:
        os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # one GPU a run
        check(wanted)
        run = resolve.resolve_run(wanted)
        try:
            result, reused = run_or_reuse(run, wait=False)
        except Timeout:
            print(f"another process is doing this run: waiting for its result in {run.folder}", flush=True)
            result, reused = run_or_reuse(run)
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        kept = "it goes on from its last epoch" if wanted.resume else "nothing is kept (--resume keeps its epochs)"
        print(f"interrupted: the same command does the run; {kept}", file=sys.stderr)
        sys.exit(130)
    files = ", ".join(sorted(path.name for path in run.folder.iterdir()))
    print(f"{config.describe_result(run.settings, result)}\n{paper.compare(run.settings, result['weighted_f1'])}")
    print(f"{'was there already' if reused else 'done'}: {run.folder}: {files}")


if __name__ == "__main__":
    main()
