"""Do every run that a preset needs, one after the other in one process; skip what is already there.

    python grid.py --preset demo --dry_run               # list the runs, each as the command that does it alone
    python grid.py --preset demo
    python grid.py --preset demo --num_train_epochs 10   # any other flag goes to every run

A run that fails leaves its reason in `failure.json` and does not stop the others; the grid then ends with exit code 1
and names it. The same command once more does what is missing.
"""

import argparse
import gc
import math
import shlex
import sys

from tqdm import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

import data_prep
import train


def demo() -> list[list[str]]:
    """Table 1's cells for the embedded model and data sets: 0 %, 50 % bottom, 50 % top and 100 %, in two epochs."""
    damages = ([], ["--corrupt", "bottom", "--frac", "1/2"], ["--corrupt", "top", "--frac", "1/2"])
    damages += (["--corrupt", "bottom", "--frac", "1"],)
    learning_rates = {"rotten_tomatoes": "8e-5", "bbc_news": "2e-4"}  # high, for runs of 76 and 10 steps
    return [
        ["--model", "minilm", *damage, "--dataset", dataset, "--learning_rate", rate, "--num_train_epochs", "2"]
        for dataset, rate in learning_rates.items()
        for damage in damages
    ]


PRESETS = {"demo": demo}


class Progress(TrainerCallback):
    """Moves the grid's bar by one for each optimizer step of the run."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: object) -> None:
        self.bar.update()


def steps(run: train.Run) -> int:
    """The optimizer steps that the run will take."""
    args = run.training_args
    batches = math.ceil(run.data["rows"]["train"] / args.train_batch_size)
    steps_per_epoch = math.ceil(batches / args.gradient_accumulation_steps)
    return args.max_steps if args.max_steps > 0 else math.ceil(steps_per_epoch * args.num_train_epochs)


def dry_run(flag_lists: list[list[str]]) -> None:
    for flags in flag_lists:
        args, _ = train.parse(flags)
        # planning would prepare a data set that is missing, and without one no result can be there
        done = data_prep.is_prepared(args.dataset, args.data_dir) and train.result_of(train.plan(flags))
        print(f"{'done   ' if done else 'missing'} python train.py {shlex.join(flags)}")


def do_runs(flag_lists: list[list[str]]) -> list[str]:
    """Do the runs that are missing; returns a line for each that failed."""
    runs, failures, planned = [], [], set()
    for flags in flag_lists:
        try:
            run = train.plan(flags)
            if run.folder not in planned and train.result_of(run) is None:
                runs.append(run)
            planned.add(run.folder)  # flags that go to every run can make two of them one
        except train.BAD_INPUT as error:
            failures.append(f"python train.py {shlex.join(flags)}: {error}")
            if len(failures) == len(flag_lists):
                raise  # not one run can be started
    try:
        for run in runs[:1]:
            run.folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise train.RunError(f"{run.folder.parent} cannot be written: {train.corrupt.one_line(error)}") from error
    print(f"{len(planned) + len(failures)} runs: {len(planned) - len(runs)} are there, {len(runs)} to do")
    with tqdm(total=sum(map(steps, runs)), unit="step", smoothing=0.02, disable=not runs) as bar:
        for number, run in enumerate(runs, 1):
            bar.set_description(f"run {number}/{len(runs)}")
            run.training_args.disable_tqdm = True
            try:
                bar.write(train.summary(run, train.execute(run, callbacks=(Progress(bar),))))
            except Exception as error:
                failures.append(f"{run.folder}: {type(error).__name__}: {train.corrupt.one_line(error)}")
                bar.write(f"failed: {failures[-1]}")
            gc.collect()  # a Trainer is full of cycles: without this, models pile up
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
    parser.add_argument("--dry_run", action="store_true", help="list the runs and do none")
    args, shared = parser.parse_known_args()
    train.quieten()
    flag_lists = [[*flags, *shared] for flags in PRESETS[args.preset]()]
    try:
        if args.dry_run:
            dry_run(flag_lists)
            return
        failures = do_runs(flag_lists)
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
