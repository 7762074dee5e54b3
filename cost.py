"""What a grid costs: its tokens and floating-point operations, counted, and the hours that they take, predicted.

Used by grid.py. Tokens are counted in the prepared rows, without padding. A few real steps of each model in as many
processes as the grid would use give the seconds for a token, a batch and a run; the prediction adds them up and deals
the cells out to the workers.
"""

import contextlib
import heapq
import math
import statistics
import tempfile
import time
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    DistilBertConfig,
    PreTrainedConfig,
    TrainingArguments,
)

import corrupt
import data_prep
import settings
import train
import workers

# of the paper's models, so that a grid can be planned where they are not
CONFIGS = {
    "bert-base-uncased": BertConfig(),
    "bert-large-uncased": BertConfig(
        hidden_size=1024, num_hidden_layers=24, num_attention_heads=16, intermediate_size=4096
    ),
    "distilbert-base-uncased": DistilBertConfig(),
}
SHORT, LONG = (4, 12), (6, 62)  # tokens of the shortest and the longest row of the two batches that are timed


@lru_cache
def config_of(model: str) -> PreTrainedConfig:
    return CONFIGS.get(model) or corrupt.load_config(corrupt.find_model(model)[0])


def weights_of(model: str) -> int:
    """The weights and biases of the encoder's layers."""
    hidden = config_of(model).hidden_size
    return config_of(model).num_hidden_layers * (12 * hidden**2 + 13 * hidden)


def rows(dataset: str, data_dir: str) -> tuple[int, int]:
    """Of train and test; of a set that is not prepared Table 2's or all that are published, or those of its files."""
    if made := data_prep.up_to_date(dataset, data_dir):
        return tuple(made["rows"].values())
    if dataset not in data_prep.DATASETS:
        return own_rows(dataset, data_dir)
    spec = data_prep.DATASETS[dataset]
    test = spec.test_size or sum(spec.test_from.values())
    return spec.train_size or sum(spec.train_from.values()) - (0 if spec.test_from else test), test


@lru_cache
def own_rows(dataset: str, data_dir: str) -> tuple[int, int]:
    return tuple(data_prep.ready(dataset, data_dir, write=False)["rows"].values())


@lru_cache
def tokens(dataset: str, data_dir: str, max_length: int) -> tuple[int, int]:
    """Of train and test, without padding, as minilm's tokenizer (BERT's own) counts them; of a set that is not prepared
    at most: `max_length` for each row."""
    made = data_prep.up_to_date(dataset, data_dir)
    if not made:
        return tuple(count * max_length for count in rows(dataset, data_dir))
    tokenizer, counts = corrupt.load_tokenizer(corrupt.find_model("minilm")[0]), []
    for part in data_prep.load(made["dataset"], data_dir).values():
        texts = [list(part[column]) for column in part.column_names if column != "label"]
        counts.append(sum(min(len(ids), max_length) for ids in tokenizer(*texts)["input_ids"]))
    return tuple(counts)


def steps(args: TrainingArguments, train_rows: int) -> int:
    """The optimizer steps of a run."""
    batches = math.ceil(train_rows / args.train_batch_size)
    per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(per_epoch * args.num_train_epochs)


def roughly(cell: list[list[str]]) -> float:
    """What the cell's runs cost, one beside another, without counting a token."""
    args, training_args = settings.parse(cell[0])
    in_train, in_test = rows(args.dataset, args.data_dir)
    read = in_train + in_test
    if args.tuning == "full":
        read = len(cell) * (
            3 * steps(training_args, in_train) * training_args.train_batch_size
            + training_args.num_train_epochs * in_test
        )
    return read * weights_of(args.model)


def memory(flags: list[str]) -> float:
    """The bytes that a worker needs at most: Python and its packages, weights, their cached copy, gradients, Adam's two
    moments, and the activations of a batch without padding."""
    args, training_args = settings.parse(flags)
    config = config_of(args.model)
    parameters = weights_of(args.model) + config.vocab_size * config.hidden_size
    batch = training_args.train_batch_size * args.max_length
    return 1e9 + 24 * parameters + 4 * 20 * batch * config.hidden_size * config.num_hidden_layers


class Work(NamedTuple):
    """What the runs of a cell do; the encoder of a linear probe reads each row once for all of them."""

    runs: int
    steps: int
    trained: float  # tokens, forward and backward
    evaluations: int  # batches
    evaluated: float  # tokens, forward alone
    weights: int
    head_alone: bool

    @property
    def operations(self) -> float:
        """Floating-point operations of the encoder: 2 for each weight and token forward and 4 backward."""
        return self.weights * (6 * self.trained + 2 * self.evaluated)


def work(cell: list[list[str]]) -> Work:
    args, training_args = settings.parse(cell[0])
    in_train, in_test = rows(args.dataset, args.data_dir)
    train_tokens, test_tokens = tokens(args.dataset, args.data_dir, args.max_length)
    runs, step_count = len(cell), steps(training_args, in_train)
    batch = training_args.train_batch_size * training_args.gradient_accumulation_steps
    epochs = step_count / math.ceil(in_train / batch)
    tests = runs * (math.ceil(epochs) + (args.save_model or args.save_vectors))  # what is saved is tested once more
    evaluations = tests * math.ceil(in_test / training_args.eval_batch_size)
    trained, evaluated = runs * epochs * train_tokens, tests * test_tokens
    if args.tuning == "probe":
        trained, evaluated = 0, train_tokens + test_tokens
    return Work(
        runs, runs * step_count, trained, evaluations, evaluated, weights_of(args.model), args.tuning == "probe"
    )


# ---- Measured ----


class Speed(NamedTuple):
    """Seconds of one worker, while the others work too."""

    train_step: float
    train_token: float
    test_batch: float
    test_token: float


def repeated(function: Callable[[], object]) -> float:
    """The seconds of one call: the median of those that fit into a second and a half, the first one left out."""
    until, times = time.perf_counter() + 1.5, []
    function()
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def measure(config: PreTrainedConfig, flags: list[str]) -> Speed:
    """Time steps of training and batches of testing with random weights, at two numbers of tokens."""
    train.quieten()
    args, training_args = settings.parse(flags)
    device = training_args.device
    model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    train.quicken(model, args.plain or device.type != "cpu", args.pooling)
    model.to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, weight_decay=0.0, fused=True)
    autocast = torch.autocast(device.type, torch.bfloat16, enabled=training_args.bf16)

    def batch(size: int, lengths: tuple[int, int]) -> dict[str, torch.Tensor]:
        length = torch.linspace(*lengths, size).round().long()
        mask = (torch.arange(lengths[1]) < length[:, None]).long()
        ids = torch.randint(1_000, config.vocab_size, mask.shape)
        given = {"input_ids": ids, "attention_mask": mask, "labels": torch.zeros(size, dtype=torch.long)}
        return {name: tensor.to(device) for name, tensor in given.items()}

    def step(given: dict[str, torch.Tensor]) -> None:
        with autocast:
            loss = model(**given).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()

    @torch.no_grad()
    def test(given: dict[str, torch.Tensor]) -> None:
        with autocast:
            model(**given).loss.item()

    found = []
    share = min(1, 1e8 / weights_of(args.model))  # of a batch: BERT-large would need half a minute for a step on a CPU
    for function, size in ((step, training_args.train_batch_size), (test, training_args.eval_batch_size)):
        model.train(function is step)
        batches = [batch(math.ceil(share * size), lengths) for lengths in (SHORT, LONG)]
        short, long = (repeated(lambda given=given, function=function: function(given)) for given in batches)
        of_short, of_long = (int(given["attention_mask"].sum()) for given in batches)
        token = max(0.0, (long - short) / (of_long - of_short))
        found += [max(0.0, short - token * of_short), token]
    return Speed(*found)


class Overhead(NamedTuple):
    """Seconds of what is not the encoder's arithmetic, in a process that has done a run before."""

    run: float  # loading, breaking, checkpoints, results
    step: float  # the Trainer's work around a step
    batch: float  # the same in an evaluation


def overhead() -> Overhead:
    """From a few steps of real runs of minilm."""
    train.quieten()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(None):
        data_prep.prepare("rotten_tomatoes", train_size=256, test_size=128, data_dir=folder)
        flags = ["--model", "minilm", "--dataset", "rotten_tomatoes", "--data_dir", folder, "--output_dir", folder]
        flags += ["--max_length", "8", "--disable_tqdm", "True", "--num_train_epochs", "2"]
        for seed in ("1", "2"):
            whole = train.execute(settings.plan([*flags, "--seed", seed, "--max_steps", "1"]))["seconds"]
        for rate in ("1e-3", "2e-3"):
            head = train.execute(settings.plan([*flags, "--tuning", "probe", "--learning_rate", rate]))["seconds"]
    return Overhead(whole["total"] - whole["train"] - whole["evaluate"], head["train"] / 16, head["evaluate"] / 4)


def seconds(work: Work, speed: Speed, overhead: Overhead) -> float:
    """What one worker needs for a cell."""
    spent = work.runs * overhead.run + work.steps * overhead.step + work.evaluations * overhead.batch
    spent += work.trained * speed.train_token + work.evaluated * speed.test_token
    return spent if work.head_alone else spent + work.steps * speed.train_step + work.evaluations * speed.test_batch


def makespan(durations: list[float], processes: int) -> float:
    """When the last of the workers is done, if each takes the next cell of the list as soon as it is free."""
    free = [0.0] * processes
    for duration in durations:
        heapq.heapreplace(free, free[0] + duration)
    return max(free)


def prediction(cells: list[list[list[str]]], staff: workers.Staff) -> str:
    """A line that says what the cells, in the order in which they will be done, cost on this machine."""
    works = [work(cell) for cell in cells]
    models = [settings.parse(cell[0])[0].model for cell in cells]
    asked = time.perf_counter()
    with workers.Here(staff) as here:

        def by_each(function: Callable, *given: object) -> list[float]:
            return [statistics.mean(figures) for figures in zip(*here.each(function, *given), strict=True)]

        around = Overhead(*by_each(overhead))
        started = time.perf_counter() - asked
        speeds = {
            model: Speed(*by_each(measure, config_of(model), cells[models.index(model)][0])) for model in set(models)
        }
    durations = [seconds(work, speeds[model], around) for work, model in zip(works, models, strict=True)]
    total = makespan(durations, staff.processes)
    read, operations = sum(w.trained + w.evaluated for w in works), sum(w.operations for w in works)
    took = f"{total / 3600:,.1f} hours" if total > 7200 else f"{total / 60:,.1f} minutes"
    return (
        f"to do: {read / 1e6:,.2f} million tokens, {operations:.2g} floating-point operations in the encoders: about "
        f"{took} with {staff} ({operations / total / 1e9:,.0f} GFLOP/s), and {started:.0f} s to start them"
    )
