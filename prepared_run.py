"""A run's Trainer, ready to train: its rows as tokens, its corrupted model, what trains, how it is scored.

Used by train.py, which trains it, and by analyse.py, which reads its rows and its model again.
"""

import dataclasses
import os
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

import datasets
import evaluate
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import transformers
from transformers import (
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    default_data_collator,
)
from transformers.utils import ModelOutput

import callbacks
import corrupt
import features
import models
import probe
import protocol
import stats
import tunings
import unpad
from common import InputError, RunError, explain, in_worker
from config import Run, RunConfig

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it CUDA's matrix products do not repeat
METRIC = Path(__file__).parent / "metrics" / "weighted_f1"


# ---- What is read ----


def load_rows(
    run: Run, data: datasets.DatasetDict
) -> tuple[datasets.DatasetDict, PreTrainedTokenizerBase, np.ndarray, Path]:
    """The rows as tokens, the model's tokenizer, the test split's order in `tokens`, and the folder of the tokens."""
    tokenizer = models.load_tokenizer(run.model_folder)
    names = ("results_version", "data_fingerprint", "model_fingerprint", "max_length")
    key = {name: run.settings[name] for name in names} | {p: version(p) for p in ("transformers", "tokenizers")}
    folder = Path(run.config.data_dir) / "tokens" / f"{run.config.dataset}-{features.key_of(key)}"
    segments = models.segments(run.model_folder)
    tokens, order = features.tokenise(data, tokenizer, segments, run.config.max_length, folder)
    return tokens, tokenizer, order, folder


def seed_for(wanted: RunConfig, name: str) -> int:
    """A random stream's seed: that of the run, unless it has its own."""
    return wanted.seed if getattr(wanted, name) is None else getattr(wanted, name)


def load_model(
    run: Run, data: datasets.DatasetDict, weights: dict[str, torch.Tensor] | None = None
) -> tuple[PreTrainedModel, dict]:
    """The run's corrupted model with its new head, or of the fine-tuned `weights` of --corrupt_after; the manifest."""
    labels = dict(enumerate(data["train"].features["label"].names))
    model, corruption = corrupt.load_corrupted(
        run.model_folder,
        corrupt.Corruption.of(run.config),
        seed_for(run.config, "corrupt_seed"),
        seed_for(run.config, "head_seed"),
        weights,
        id2label=labels,
        label2id={name: label for label, name in labels.items()},
    )
    if models.model_fingerprint(run.model_folder) != run.settings["model_fingerprint"]:
        raise RunError(f"{run.model_folder} was changed while it was being loaded: start the run again")
    return model, corruption


class Trainable(NamedTuple):
    """What a run reads with: a tuning that reads something else than tokens gets it."""

    model: PreTrainedModel
    tokens: datasets.DatasetDict
    tokenizer: PreTrainedTokenizerBase
    run: Run
    args: TrainingArguments


def read_tokens(parts: Trainable) -> tuple[datasets.DatasetDict, Callable]:
    return parts.tokens, DataCollatorWithPadding(parts.tokenizer)


def read_probe(parts: Trainable) -> tuple[datasets.DatasetDict, Callable]:
    """What the frozen encoder gives its head, computed once for all learning rates (section A.2)."""
    return features.probe_features(frozen(parts), parts.tokens, parts.run.config.pooling), default_data_collator


def read_probe_converged(parts: Trainable) -> tuple[datasets.DatasetDict, Callable]:
    """What `run_training` fits probe.py's logistic regression to: nothing trains by steps."""
    wanted = parts.run.config
    reader = probe.layer_reader(wanted.probe_reads, wanted.probe_layers == "all")
    return frozen(parts).outputs(parts.tokens, reader), default_data_collator


READS = {"probe": read_probe, "probe_converged": read_probe_converged}  # by --tuning; the others read tokens


def frozen(parts: Trainable) -> features.Encoder:
    model, _, tokenizer, run, args = parts
    dtype = torch.bfloat16 if args.bf16 else torch.float16 if args.fp16 else None
    folder, batch_size = features_folder(run, args), args.per_device_eval_batch_size
    return features.Encoder(model, tokenizer, args.device, dtype, folder, batch_size)


def features_folder(run: Run, args: TrainingArguments) -> Path:
    """Named for all that a frozen encoder's outputs depend on: every setting but those of the head's training."""
    of_head = {"learning_rate", "num_train_epochs", "max_steps", "per_device_train_batch_size"}
    settings = {name: value for name, value in run.settings.items() if name not in of_head}
    settings |= {name: version(name) for name in ("torch", "transformers", "tokenizers")}
    settings |= {"device": device_of(args.device.type), "layers": run.config.probe_layers}
    return run.work_dir.parent.with_name("features") / features.key_of(settings)


# ---- The Trainer ----


def training_arguments(wanted: RunConfig, checkpoints: Path, name: str) -> TrainingArguments:
    """What the Trainer gets; raises InputError for what the library's own checks refuse, or the environment changes."""
    protocol.check_environment()
    known = {field.name for field in dataclasses.fields(TrainingArguments)}
    chosen = {field: value for field, value in vars(wanted).items() if field in known}
    values = protocol.PROTOCOL | protocol.AFFECTS | chosen | {"dataloader_pin_memory": torch.cuda.is_available()}
    if wanted.report_to == "tensorboard":
        values["report_to"] = "none"  # callbacks.reporters sees to it
    if in_worker():
        values["disable_tqdm"] = True
    if wanted.bf16 and not torch.accelerator.is_available():
        values["use_cpu"] = True  # the library wants to be told
    values |= wanted.trainer | {"output_dir": str(checkpoints), "run_name": name}
    if wanted.resume:
        values |= {"save_strategy": "epoch", "save_only_model": False}
    with explain("the library refuses these flags", Exception):
        return TrainingArguments(**{field: value for field, value in values.items() if field in known})


def in_force(trainer: Trainer) -> dict:
    """What the Trainer works with, read from it; raises InputError for what is not what the flags say."""
    args, accelerator, smoother = trainer.args, trainer.accelerator, trainer.label_smoother
    precision = "fp16" if args.fp16 else "bf16" if args.bf16 else "no"
    settings = {  # in force, by the flags
        "mixed_precision": (accelerator.mixed_precision if accelerator.native_amp else "no", precision),
        "processes": (accelerator.num_processes, 1),
        "train_batch_size": (args.train_batch_size, args.per_device_train_batch_size),
        "label_smoothing": (smoother.epsilon if smoother else 0.0, args.label_smoothing_factor),
        "tf32": (torch.backends.fp32_precision == "tf32", bool(args.tf32)),
    }
    for name, (value, asked) in settings.items():
        if value != asked:
            raise InputError(f"{name} is {value} in force, and {asked} by the flags: say so by a flag")
    found = {name: value for name, (value, _) in settings.items()}
    return found | {"gradient_accumulation_steps": args.gradient_accumulation_steps}


def optimizer_of(trainer: Trainer) -> dict:
    """The optimizer that trained, and its settings; the weights in one group, without decay in another if there is."""
    if trainer.optimizer is None:
        return {"optimizer": None}  # of a converged probe
    groups = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in trainer.optimizer.param_groups]
    return {"optimizer": type(trainer.optimizer.optimizer).__name__, "groups": groups}


def device_of(kind: str) -> dict:
    """The device, "cpu" or "cuda", that trains: numbers repeat on one kind of processor, with one number of threads."""
    cpu = torch.cpu.get_capabilities()
    processor = f"{cpu.get('cpu_name', cpu['architecture'])}, {torch.backends.cpu.get_cpu_capability()}"
    return {
        "type": kind,
        "name": torch.cuda.get_device_name() if kind == "cuda" else processor,
        "threads": torch.get_num_threads(),
    }


class PreparedRun(NamedTuple):
    """A Trainer that is ready to train, and what is known of its run besides."""

    trainer: Trainer
    order: np.ndarray  # the test split's row numbers in the order in which it predicts
    test: pd.DataFrame  # of each of its rows: `row` of the source, `label`, and `group` where rows belong together
    corruption: dict  # the corruption's manifest
    speed: dict  # what is not the library's way
    data: dict  # tokens in each split, without padding, and what the test split gives without an encoder
    predicted: list[np.ndarray]  # filled by each evaluation: the predicted class of each row, in `order`


def prepare_run(run: Run, data: datasets.DatasetDict, weights: dict[str, torch.Tensor] | None = None) -> PreparedRun:
    """Tokenise, load, corrupt, and make the Trainer; `weights` as of `load_model`."""
    wanted, args = run.config, training_arguments(run.config, run.work_dir / "checkpoints", run.name)
    tokens, tokenizer, order, folder = load_rows(run, data)
    test = data["test"].to_pandas().rename(columns={"source_row": "row"}).filter(["row", "label", "group"])
    half = stats.split_halves(test["label"], test.get("group"))[order]

    model, corruption = load_model(run, data, weights)
    tunings.TUNINGS[wanted.tuning](model, corruption, wanted)  # first: lora puts modules in the place of others
    plain = wanted.padded or args.device.type != "cpu"  # none of it has been measured on a GPU
    speed = {"unpadded": unpad.speed_up_encoder(model, wanted.pooling, plain)}
    rows, collator = READS.get(wanted.tuning, read_tokens)(Trainable(model, tokens, tokenizer, run, args))
    metric, predicted = evaluate.load(str(METRIC), keep_in_memory=True), []

    def compute_metrics(evaluated: transformers.EvalPrediction) -> dict[str, float]:
        classes, labels = evaluated.predictions.argmax(-1), evaluated.label_ids
        predicted.append(classes)
        scores = metric.compute(predictions=classes, references=labels)
        for number, name in enumerate(stats.HALVES):
            part = half == number
            scores[name] = metric.compute(predictions=classes[part], references=labels[part])["weighted_f1"]
        return scores

    def mean_over_batch(
        outputs: ModelOutput, labels: torch.Tensor, num_items_in_batch: int | None = None
    ) -> torch.Tensor:
        """A part's share in the mean loss of the whole batch. The library's own loss of a part is its mean, which the
        Trainer then takes for such a share: it would be too large."""
        smoothing = args.label_smoothing_factor
        total = F.cross_entropy(outputs.logits, labels, reduction="sum", label_smoothing=smoothing)
        return total / (len(labels) if num_items_in_batch is None else num_items_in_batch)

    # epoch k's order has the seed data_seed + k: with the plain seed, that of epoch 2 would be seed 1's of epoch 1
    args.data_seed = corrupt.seed_of(seed_for(wanted, "data_seed"), "data order")
    trainer = (tunings.LayerwiseTrainer if wanted.tuning == "llrd" else Trainer)(
        model_init=lambda: model,  # asked for twice, at first and when training begins: nothing trains it in between
        args=args,
        data_collator=collator,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        compute_loss_func=mean_over_batch if args.gradient_accumulation_steps > 1 else None,
        compute_metrics=compute_metrics,
        callbacks=[callbacks.StopIfDiverged()],
    )
    trainer.layer_decay = wanted.layer_decay
    in_force(trainer)
    known = {"tokens": {part: sum(rows["length"]) for part, rows in tokens.items()}}
    known["floors"] = features.compute_floors(tokens, tokenizer.all_special_ids, folder)
    return PreparedRun(trainer, order, test, corruption, speed, known, predicted)
