"""What a grid costs: tokens and operations, counted, and the hours that they take, predicted. Used by grid.py.

Tokens are counted in the prepared rows, without padding. The speed of a model is that of its finished runs in the
output folder, else that of a few steps with random weights.
"""

import math
import statistics
import time
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedConfig

import data_prep
import features
import models
import paper
import protocol
import run_dir
import unpad
from config import RunConfig
from prepared_run import device_of

RUN_SECONDS = 1.0  # of a run besides training and evaluating


@lru_cache
def shape_of(model: str) -> PreTrainedConfig:
    """The configuration of a model; of the paper's models also where they are not on this machine."""
    known = paper.MODELS.get(paper.model_name(model))
    if known and known.shape:
        return AutoConfig.for_model(**known.shape)
    return models.load_config(models.find_model(model)[0])


def encoder_weights(model: str) -> int:
    """The weights and biases of the encoder's layers."""
    hidden = shape_of(model).hidden_size
    return shape_of(model).num_hidden_layers * (12 * hidden**2 + 13 * hidden)


def memory(run: RunConfig) -> float:
    """The bytes that a run needs at most: Python and its packages, weights, gradients, Adam's two moments, a copy for
    the best epoch, and the activations of a batch without padding; and a third of that, for what is freed and not
    used again, since no two batches are as large."""
    shape = shape_of(run.model)
    parameters = encoder_weights(run.model) + shape.vocab_size * shape.hidden_size
    batch = run.per_device_train_batch_size * run.max_length
    return 4 / 3 * (1e9 + 24 * parameters + 4 * 20 * batch * shape.hidden_size * shape.num_hidden_layers)


@lru_cache
def count_rows(dataset: str, data_dir: str) -> tuple[int, int]:
    """Of train and test; of a set that is not prepared Table 2's or all that are published, or those of its files."""
    if dataset in data_prep.DATASETS and not data_prep.up_to_date(dataset, data_dir):
        spec = data_prep.DATASETS[dataset]
        test = spec.test_size or sum(spec.test_from.values())
        return spec.train_size or sum(spec.train_from.values()) - (0 if spec.test_from else test), test
    return tuple(data_prep.ensure_prepared(dataset, data_dir, write=False)["rows"].values())


@lru_cache
def row_lengths(dataset: str, data_dir: str, max_length: int) -> tuple[list[int], list[int]]:
    """The tokens of each row of train and test, without padding, as minilm's tokenizer (BERT's own) counts them; of a
    set that is not prepared at most: `max_length` for each row."""
    if not (prepared := data_prep.up_to_date(dataset, data_dir)):
        return tuple([max_length] * count for count in count_rows(dataset, data_dir))
    tokenizer, lengths = models.load_tokenizer(models.find_model("minilm")[0]), []
    for part in data_prep.load(prepared["dataset"], data_dir).values():
        texts = [list(part[column]) for column in features.TEXTS if column in part.column_names]
        lengths.append([min(len(ids), max_length) for ids in tokenizer(*texts, verbose=False)["input_ids"]])
    return tuple(lengths)


def count_tokens(dataset: str, data_dir: str, max_length: int) -> tuple[int, int]:
    """Of train and test, as `row_lengths` has them."""
    return tuple(map(sum, row_lengths(dataset, data_dir, max_length)))


def epochs_of(run: RunConfig) -> tuple[float, int]:
    """How many epochs a run has, and the optimizer's steps of each."""
    batches = math.ceil(count_rows(run.dataset, run.data_dir)[0] / run.per_device_train_batch_size)
    steps = math.ceil(batches / run.trainer.get("gradient_accumulation_steps", 1))
    return run.max_steps / steps if run.max_steps > 0 else run.num_train_epochs, steps


def passes(run: RunConfig, counts: tuple[int, int]) -> float:
    """How many rows or tokens go through the encoder, of `counts` in train and test; a step counts three times, for
    backward too. A probe reads each once; that its learning rates share this is not counted. --corrupt_after trains
    twice, --eval_at reads test once more for each step."""
    (train, test), (epochs, steps) = counts, epochs_of(run)
    more = sum(step <= epochs * steps for step in run.eval_at) * test
    whole = (1 + run.corrupt_after) * (3 * epochs * train + math.ceil(epochs) * test)
    return (train + test if run.tuning.startswith("probe") else whole) + more


def relative_cost(run: RunConfig) -> float:
    """What a run costs beside others, without counting a token."""
    return passes(run, count_rows(run.dataset, run.data_dir)) * encoder_weights(run.model)


def finished_rates(output_dir: Path, device: dict) -> dict[tuple, float]:
    """Seconds of a token's pass, as in the finished runs of each (model, tuning, bf16) on that device; the median.

    Of probes the mean: the first of a cell computes features, and the others read them.
    """
    spent: dict[tuple, list[tuple[float, float]]] = {}
    for path in output_dir.glob("runs/*/result.json"):
        try:
            result = run_dir.read_result(path.parent)
            s, (train, test) = result["settings"], result["data"]["tokens"].values()
            whole = 3 * s["num_train_epochs"] * train + result["epochs"] * test  # evaluated after each, and at the end
            read = train + test if s["tuning"].startswith("probe") else whole
            read = (1 + s["corrupt_after"]) * read + len(result.get("steps", ())) * test
            if s["max_steps"] < 0 and result["device"] == device:
                seconds = max(0.1, result["seconds"]["total"] - RUN_SECONDS)
                spent.setdefault((s["model"], s["tuning"], s["bf16"]), []).append((seconds, read))
        except run_dir.UNREADABLE:
            continue
    rates = {kind: statistics.median(seconds / read for seconds, read in runs) for kind, runs in spent.items()}
    probes = {kind: np.sum(runs, axis=0) for kind, runs in spent.items() if kind[1].startswith("probe")}
    return rates | {kind: seconds / read for kind, (seconds, read) in probes.items()}


class StepTime(NamedTuple):
    """What a training step takes, in seconds."""

    token: float  # a pass of one token, of padding too if the model pads
    pads: bool
    optimizer: float  # its step, whatever the batch


def time_step(run: RunConfig) -> StepTime:
    """The median of three training steps with random weights; of a large model on a part of a batch."""
    device, shape = "cuda" if torch.cuda.is_available() else "cpu", shape_of(run.model)
    model = AutoModelForSequenceClassification.from_config(shape, trust_remote_code=False)
    unpadded = unpad.speed_up_encoder(model, run.pooling, run.no_unpadding or device != "cpu")
    model.train().to(device)
    rows = math.ceil(run.per_device_train_batch_size * min(1, 1e8 / encoder_weights(run.model)))
    longest = min(run.max_length, getattr(shape, "max_position_embeddings", 514) - 2)
    lengths = np.quantile(row_lengths(run.dataset, run.data_dir, run.max_length)[0], (np.arange(rows) + 0.5) / rows)
    lengths = torch.from_numpy(lengths.round().clip(2, longest))
    mask = (torch.arange(int(lengths.max())) < lengths[:, None]).long().to(device)
    ids, computed = torch.randint_like(mask, shape.vocab_size), int(mask.sum()) if unpadded else mask.numel()
    optimizer, times = torch.optim.AdamW(model.parameters(), fused=True), []
    for _ in range(4):
        started = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=run.bf16):
            loss = model(input_ids=ids, attention_mask=mask, labels=torch.zeros_like(mask[:, 0])).loss
        loss.backward()
        loss.item()
        between = time.perf_counter()
        torch.nn.utils.clip_grad_norm_(model.parameters(), protocol.AFFECTS["max_grad_norm"])
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for a GPU
        times.append((between - started, time.perf_counter() - between))
    both_passes, step = np.median(times[1:], axis=0)
    return StepTime(both_passes / (3 * computed), not unpadded, step)


def rate_of(run: RunConfig, took: StepTime) -> float:
    """Seconds of a real token's pass in this run, with its share of padding and of the optimizer's steps. A probe's
    encoder has neither: its rows are read by length, and the head alone trains."""
    if run.tuning.startswith("probe"):
        return took.token
    lengths = np.random.default_rng(0).permutation(row_lengths(run.dataset, run.data_dir, run.max_length)[0])
    batches = np.split(lengths, range(run.per_device_train_batch_size, len(lengths), run.per_device_train_batch_size))
    padded = sum(len(batch) * batch.max() for batch in batches) / lengths.sum() if took.pads else 1
    epochs, steps = epochs_of(run)
    steps *= (1 + run.corrupt_after) * epochs
    return took.token * padded + took.optimizer * steps / passes(run, tokens_of(run))


def predict(runs: list[RunConfig], processes: int, threads: int) -> str:
    """A line that says what the runs cost on this machine, so many side by side, and what they would cost in bf16."""
    torch.set_num_threads(threads)
    device = device_of("cuda" if torch.cuda.is_available() else "cpu")
    finished, timed, sources = finished_rates(Path(runs[0].output_dir), device), {}, set()

    def time_steps(run: RunConfig) -> float:
        if (run.model, run.bf16) not in timed:
            timed[run.model, run.bf16] = time_step(run)
        return rate_of(run, timed[run.model, run.bf16])

    def rate(run: RunConfig) -> float:
        """Of finished runs; of finished runs in the other precision, times the ratio of the two; or of steps alone."""
        name, other = models.name_in_results(run.model), replace(run, bf16=not run.bf16)
        known, twin = (finished.get((name, one.tuning, one.bf16)) for one in (run, other))
        sources.add("finished runs" if known else "steps timed here")
        return known or time_steps(run) * (twin / time_steps(other) if twin else 1)

    def hours(runs: list[RunConfig]) -> str:
        seconds = [RUN_SECONDS + rate(run) * passes(run, tokens_of(run)) for run in runs]
        total = max(sum(seconds) / processes, *seconds)
        return f"{total / 3600:,.1f} hours" if total > 7200 else f"{total / 60:,.1f} minutes"

    read = sum(passes(run, tokens_of(run)) for run in runs)
    operations = sum(2 * encoder_weights(run.model) * passes(run, tokens_of(run)) for run in runs)
    took, source = hours(runs), " and ".join(sorted(sources))
    if not all(run.bf16 for run in runs):
        source += f"; with --bf16 True about {hours([replace(run, bf16=True) for run in runs])}"
    return (
        f"to do: {read / 1e6:,.2f} million tokens forward (a step counts three times), {operations:.2g} floating-point "
        f"operations in the encoders: about {took}, by {source}"
    )


def tokens_of(run: RunConfig) -> tuple[int, int]:
    return count_tokens(run.dataset, run.data_dir, run.max_length)
