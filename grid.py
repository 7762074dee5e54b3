"""Do every run that a table needs, one after the other in one process; skip what is already there.

    python grid.py --preset paper --dry_run                      # list the 960 runs, and what they cost on this machine
    python grid.py --preset demo
    python grid.py --preset table1 --model bert-base-uncased --dataset sst2 imdb      # two columns of Table 1's Base
    python grid.py --preset table1 --model minilm --percent 0 50 100 --seed 0 1 2     # another model in their place
    python grid.py --preset demo --num_train_epochs 10           # any other flag goes to every run

--model, --dataset, --corrupt, --percent, --learning_rate and --seed take the place of the preset's own. Data sets that
are missing are prepared first, as data_prep.py does. A run that fails leaves its reason in `failure.json` and does not
stop the others; the grid then ends with exit code 1 and names it. The same command once more does what is missing.
"""

import argparse
import gc
import math
import shlex
import shutil
import sys
import time
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import lru_cache
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)

import data_prep
import train

# (encoder layers, hidden size) of models whose cells are known without their files
SHAPES = {
    "bert-base-uncased": (12, 768),
    "bert-large-uncased": (24, 1024),
    "distilbert-base-uncased": (6, 768),
    "minilm": (6, 384),
}
CLASSIFICATION = ("sst2", "imdb", "ag_news", "emotion", "dbpedia", "tfnt")


@dataclass(frozen=True)
class Cells:
    """Some cells of the paper's tables: every model, data set and damage, at every learning rate and seed."""

    dataset: tuple[str, ...]
    pooling: str = "cls"
    tuning: str = "full"
    model: tuple[str, ...] = ("bert-base-uncased", "bert-large-uncased", "distilbert-base-uncased")
    percent: tuple[Fraction, ...] = (0, 25, 50, 75, 100)  # those that are a whole number of the model's layers
    corrupt: tuple[str, ...] = ("none", "bottom", "top", "all")
    learning_rate: tuple[str, ...] = ("1e-5", "2e-5", "5e-5")
    seed: tuple[str, ...] = ("0",)
    more: tuple[str, ...] = ("--num_train_epochs", "10")


TABLE_1 = Cells(CLASSIFICATION)
TABLE_3 = Cells(CLASSIFICATION, pooling="mean")
TABLE_4 = Cells(("ag_news", "dbpedia"), tuning="probe")
TABLE_5 = Cells(("mrpc", "rte"))
SAVE = "--save_vectors"
FIGURE_1 = replace(
    TABLE_1, dataset=("ag_news",), model=("bert-base-uncased",), percent=(0, 25, 100), more=(*TABLE_1.more, SAVE)
)
# learning rates for runs of 76 and 10 steps, and of 50 for the head alone: high
DEMO = Cells(("rotten_tomatoes",), model=("minilm",), learning_rate=("8e-5",), more=("--num_train_epochs", "2"))
BBC_NEWS = replace(DEMO, dataset=("bbc_news",), learning_rate=("2e-4",), more=(*DEMO.more, SAVE))
BBC_PROBE = replace(DEMO, dataset=("bbc_news",), tuning="probe", learning_rate=("1e-2",), more=TABLE_1.more)
PRESETS = {
    "demo": (DEMO, BBC_NEWS, BBC_PROBE),
    "table1": (TABLE_1,),
    "table3": (TABLE_3,),
    "table4": (TABLE_4,),
    "table5": (TABLE_5,),
    "figure1": (FIGURE_1,),
    "paper": (FIGURE_1, TABLE_1, TABLE_3, TABLE_4, TABLE_5),  # Figure 1's runs are among Table 1's
}
AXES = {
    "model": "instead of the preset's",
    "dataset": "instead of the preset's",
    "corrupt": "which sides, of none (0 %%), bottom, top, all (100 %%)",
    "percent": "of the encoder layers; by default 0 25 50 75 100, where that is a whole number of layers",
    "learning_rate": "instead of the preset's; a cell is the best of them",
    "seed": "one run for each",
}


def shape(model: str) -> tuple[int, int]:
    """The number of encoder layers and the hidden size."""
    if model in SHAPES:
        return SHAPES[model]
    config = train.corrupt.load_config(train.corrupt.find_model(model)[0])
    return config.num_hidden_layers, config.hidden_size


def damages(cells: Cells, layers: int) -> list[list[str]]:
    """The flags of each damage of a model with so many layers, 0 % first."""
    flags = []
    for percent in cells.percent:
        frac = Fraction(percent) / 100
        sides = {0: ("none",), 1: ("all",)}.get(frac, ("bottom", "top"))
        for side in sides if (frac * layers).denominator == 1 else ():
            if side in cells.corrupt:
                flags.append(["--corrupt", {"all": "bottom"}.get(side, side), "--frac", str(frac)] if frac else [])
    return flags


def jobs(preset: tuple[Cells, ...], axes: dict[str, tuple]) -> list[list[str]]:
    """The flags of every run of a preset, once each; `axes` take the place of the preset's own.

    Raises RunError if there is none.
    """
    found: dict[tuple[str, ...], list[str]] = {}
    for cells in preset:
        cells = replace(cells, **axes)
        if unknown := set(cells.dataset) - set(data_prep.DATASETS):
            raise data_prep.DataError(f"unknown data set {min(unknown)!r}: choose from {', '.join(data_prep.DATASETS)}")
        kind = [("--pooling", cells.pooling), ("--tuning", cells.tuning)]
        kind = [word for flag, value in kind if value not in ("cls", "full") for word in (flag, value)]
        for model in cells.model:
            for dataset in cells.dataset:
                for damage in damages(cells, shape(model)[0]):
                    for rate in cells.learning_rate:
                        for seed in cells.seed:
                            flags = ["--model", model, *damage, "--dataset", dataset, *kind, "--learning_rate", rate]
                            flags += cells.more if seed == "0" else (*cells.more, "--seed", seed)
                            found.setdefault(tuple(word for word in flags if word != SAVE), flags)
    if not found:
        raise train.RunError("no cell is left: a --percent must be a whole number of layers, a --corrupt belong to it")
    return list(found.values())


class Progress(TrainerCallback):
    """Moves the grid's bar by one for each optimizer step of the run."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.update()


# ---- What it costs ----


@lru_cache
def tokens(dataset: str, data_dir: str, max_length: int) -> tuple[int, int]:
    """The tokens of the train and of the test split, without padding, as minilm's tokenizer (BERT's own) counts them;
    of a set that is not prepared at most: Table 2's rows, each of `max_length` tokens."""
    if data_prep.is_prepared(dataset, data_dir):
        tokenizer = train.corrupt.load_tokenizer(train.corrupt.find_model("minilm")[0])
        counts = []
        for part in data_prep.load(dataset, data_dir).values():
            texts = [list(part[column]) for column in part.column_names if column != "label"]
            counts.append(sum(min(len(ids), max_length) for ids in tokenizer(*texts)["input_ids"]))
        return counts[0], counts[1]
    spec = data_prep.DATASETS[dataset]
    test = spec.test_size or sum(spec.test_from.values())
    train_rows = spec.train_size or sum(spec.train_from.values()) - (0 if spec.test_from else test)
    return train_rows * max_length, test * max_length


def cost(flags: list[str], encoded: set) -> tuple[float, float]:
    """The tokens that the run's encoder reads, and its floating-point operations.

    These are 2 for each weight and token forward and 4 backward. A frozen encoder reads every row once for all the
    probes of its cell; `encoded` holds the cells that were counted.
    """
    args, training_args = train.parse(flags)
    layers, hidden = shape(args.model)
    weights = layers * (12 * hidden**2 + 13 * hidden)
    in_train, in_test = tokens(args.dataset, args.data_dir, args.max_length)
    if args.tuning == "probe":
        cell = (args.model, args.corrupt, args.frac, args.dataset, args.pooling, training_args.seed)
        if cell in encoded:
            return 0, 0
        encoded.add(cell)
        return in_train + in_test, 2 * weights * (in_train + in_test)
    epochs = training_args.num_train_epochs
    trained, evaluated = epochs * in_train, (math.ceil(epochs) + 1) * in_test
    return trained + evaluated, weights * (6 * trained + 2 * evaluated)


def measured_speed() -> float:
    """Floating-point operations a second of this machine, in steps of training a four-layer BERT; about 5 s."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = BertConfig(hidden_size=384, num_hidden_layers=4, num_attention_heads=12, intermediate_size=1536)
    model = BertForSequenceClassification(config).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    ids = torch.randint(1000, 2000, (32, 32), device=device)
    labels, started, done = torch.zeros(32, dtype=torch.long, device=device), 0.0, 0
    while done < 3 or time.perf_counter() - started < 4:
        if done == 2:  # warmed up
            started = time.perf_counter()
        model(input_ids=ids, labels=labels).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        done += 1
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    weights = 4 * (12 * 384**2 + 13 * 384)
    return 6 * weights * ids.numel() * (done - 2) / (time.perf_counter() - started)


def dry_run(flag_lists: list[list[str]]) -> None:
    """List the runs, each as the command that does it alone, and what those that are missing will cost."""
    present, read, operations, encoded, absent = 0, 0, 0.0, set(), {}
    for flags in flag_lists:
        args, _ = train.parse(flags)
        done = False
        try:
            # planning would prepare a data set that is missing, and without one no result can be there
            if not data_prep.is_prepared(args.dataset, args.data_dir):
                absent[args.dataset] = "not prepared: its tokens are at most those counted"
            elif args.model not in absent:
                done = train.result_of(train.plan(flags)) is not None
        except train.corrupt.ModelError:
            absent[args.model] = "not on this machine yet"
        if not done:
            read, operations = (a + b for a, b in zip((read, operations), cost(flags, encoded), strict=True))
        present += done
        print(f"{'done   ' if done else 'missing'} python train.py {shlex.join(flags)}")
    for name, how in absent.items():
        print(f"{name} is {how}")
    print(f"{len(flag_lists)} runs: {present} are there, {len(flag_lists) - present} to do")
    if operations:
        speed = measured_speed()
        print(
            f"to do: {read / 1e6:,.2f} million tokens, {operations:.2g} floating-point operations, about "
            f"{operations / speed / 3600:,.2f} hours at this machine's {speed / 1e9:,.0f} GFLOP/s in training"
        )


# ---- Do them ----


def steps(run: train.Run) -> int:
    """The optimizer steps that the run will take."""
    args = run.training_args
    batches = math.ceil(run.data["rows"]["train"] / args.train_batch_size)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)


def do_runs(flag_lists: list[list[str]], keep_features: bool = False) -> list[str]:
    """Do the runs that are missing; returns a line for each that failed."""
    runs, failures, planned = [], [], set()
    lost: dict[str, Exception] = {}  # models and data sets that cannot be had, asked for once: a silent hub takes time
    for flags in flag_lists:
        args, training_args = train.parse(flags)
        try:
            if reason := lost.get(args.model) or lost.get(args.dataset):
                raise reason
            run = train.plan(flags)
            if run.folder not in planned and train.result_of(run) is None:
                runs.append(run)
            planned.add(run.folder)  # flags that go to every run can make two of them one
        except train.BAD_INPUT as error:
            if isinstance(error, data_prep.DataError):
                lost[args.dataset] = error
            elif isinstance(error, train.corrupt.ModelNotFound):
                lost[args.model] = error
            failures.append(f"python train.py {shlex.join(flags)}: {error}")
            if len(failures) == len(flag_lists):
                raise  # not one run can be started
    try:
        for run in runs[:1]:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise train.RunError(f"{run.folder.parent} cannot be written: {train.corrupt.one_line(error)}") from error
    data_prep.write_table2(args.data_dir, training_args.output_dir)
    print(f"{len(planned) + len(failures)} runs: {len(planned) - len(runs)} are there, {len(runs)} to do")
    with tqdm(total=sum(map(steps, runs)), unit="step", smoothing=0.02, disable=not runs) as bar:
        for number, run in enumerate(runs, 1):
            bar.set_description(f"run {number}/{len(runs)}")
            run.training_args.disable_tqdm = True
            if train.result_of(run):  # another process has done it since it was planned
                continue
            try:
                bar.write(train.summary(run, train.execute(run, callbacks=(Progress(bar),))))
            except Exception as error:
                failures.append(f"{run.folder}: {type(error).__name__}: {train.corrupt.one_line(error)}")
                bar.write(f"failed: {failures[-1]}")
            gc.collect()  # a Trainer is full of cycles: without this, models pile up
    if not keep_features and any(run.args.tuning == "probe" for run in runs):
        shutil.rmtree(Path(training_args.output_dir) / "features", ignore_errors=True)
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
        epilog="Any other flag goes to every run: see python train.py --help.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="which runs")
    for name, text in AXES.items():
        kind = Fraction if name == "percent" else str
        sides = ("none", "bottom", "top", "all") if name == "corrupt" else None
        parser.add_argument(f"--{name}", nargs="+", type=kind, choices=sides, default=argparse.SUPPRESS, help=text)
    parser.add_argument("--dry_run", action="store_true", help="list the runs and what they cost, and do none")
    parser.add_argument("--keep_features", action="store_true", help="keep the probes' encoder outputs on disk")
    try:
        args, shared = parser.parse_known_args()
    except ZeroDivisionError:
        parser.error("--percent divides by zero: give a percentage of the layers, such as 50 or 100/3")
    train.quieten()
    axes = {name: tuple(getattr(args, name)) for name in AXES if name in args}
    try:
        flag_lists = [[*flags, *shared] for flags in jobs(PRESETS[args.preset], axes)]
        if args.dry_run:
            dry_run(flag_lists)
            return
        failures = do_runs(flag_lists, args.keep_features)
    except train.BAD_INPUT as error:
        parser.error(str(error))
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with what is missing", file=sys.stderr)
        sys.exit(130)
    if failures:
        print(f"{len(failures)} of {len(flag_lists)} runs failed:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
