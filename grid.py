"""Do every run that a table needs, side by side in processes that stay alive; skip what is already there.

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
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial
from pathlib import Path

import psutil
import torch

import corrupt
import cost
import data_prep
import progress
import settings
import train
import unfinished
import workers

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
    "model": "minilm, local folders, or hub ids",
    "dataset": data_prep.HELP,
    "corrupt": "which sides; none is 0 %%, all is 100 %%",
    "percent": "of the encoder layers (default: 0 25 50 75 100, where that is a whole number of layers)",
    "learning_rate": "a cell is the best of them",
    "seed": "one run for each (default: 0)",
}


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
        kind = [("--pooling", cells.pooling), ("--tuning", cells.tuning)]
        kind = [word for flag, value in kind if value not in ("cls", "full") for word in (flag, value)]
        for model in cells.model:
            for dataset in cells.dataset:
                for damage in damages(cells, cost.config_of(model).num_hidden_layers):
                    for rate in cells.learning_rate:
                        for seed in cells.seed:
                            flags = ["--model", model, *damage, "--dataset", dataset, *kind, "--learning_rate", rate]
                            flags += cells.more if seed == "0" else (*cells.more, "--seed", seed)
                            found.setdefault(tuple(word for word in flags if word != SAVE), flags)
    if not found:
        raise settings.RunError(
            "no cell is left: a --percent must be a whole number of layers, a --corrupt belong to it"
        )
    return list(found.values())


# ---- List them ----


def is_there(flags: list[str]) -> bool:
    """Whether the run's result is there; never prepares a data set, without which no result can be."""
    args, _ = settings.parse(flags)
    prepared = data_prep.up_to_date(args.dataset, args.data_dir)
    return prepared is not None and settings.result_of(settings.plan(flags)) is not None


def dry_run(flag_lists: list[list[str]], at_work: workers.Staff) -> None:
    """List the runs, each as the command that does it alone, and what those that are missing will cost."""
    missing, absent = [], {}
    for flags in flag_lists:
        args, _ = settings.parse(flags)
        if not data_prep.up_to_date(args.dataset, args.data_dir):
            absent[args.dataset] = "not prepared: its tokens are at most those counted"
        done = False
        if args.model not in absent:
            try:
                done = is_there(flags)
            except corrupt.ModelError:
                absent[args.model] = "not on this machine yet"
        if not done:
            missing.append(flags)
        print(f"{'done   ' if done else 'missing'} python train.py {shlex.join(flags)}")
    for name, how in absent.items():
        print(f"{name} is {how}")
    print(f"{len(flag_lists)} runs: {len(flag_lists) - len(missing)} are there, {len(missing)} to do")
    if missing:
        print(cost.prediction(by_cell(missing), at_work))


# ---- Do them ----


def by_cell(flag_lists: list[list[str]]) -> list[list[list[str]]]:
    """Runs that differ in their learning rate alone together: one worker does them, and loads model and rows once."""
    cells: dict[tuple[str, ...], list[list[str]]] = {}
    for flags in flag_lists:
        rate = flags.index("--learning_rate") + 1
        cells.setdefault((*flags[:rate], *flags[rate + 1 :]), []).append(flags)
    return sorted(cells.values(), key=cost.roughly, reverse=True)  # lest a long one begins last


def staff(flag_lists: list[list[str]], jobs: int | None, runs_per_gpu: int | None) -> workers.Staff:
    """As many workers as processor cores, or `runs_per_gpu` on each GPU, but no more than there is memory for.

    `flag_lists` are all runs that were asked for, those that are there too: the threads change a result's last digits
    and must not depend on what is missing.
    """
    cores, count = torch.get_num_threads(), torch.cuda.device_count()
    gpus = tuple(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")) if count else ()
    if runs_per_gpu and not gpus:
        raise settings.RunError("--runs_per_gpu needs a GPU, and there is none: leave it out")
    processes = jobs or (len(gpus) * (runs_per_gpu or 1) if gpus else cores)
    room = max(1, int(psutil.virtual_memory().total / max(map(cost.memory, flag_lists))))
    if processes > room:
        print(f"{processes} workers need more memory than there is: {room} at a time", file=sys.stderr)
    processes = min(processes, room)
    return workers.Staff(processes, max(1, cores // processes), gpus)


def plan(flag_lists: list[list[str]]) -> tuple[list[settings.Run], list[str], int]:
    """The runs that are missing, a line for each that cannot be started, and how many there are in all.

    Raises ModelError, DataError or RunError if not one can be started.
    """
    runs, failures, planned = [], [], set()
    lost: dict[str, Exception] = {}  # models and data sets that cannot be had, asked for once: a silent hub takes time
    for flags in flag_lists:
        args, _ = settings.parse(flags)
        try:
            if reason := lost.get(args.model) or lost.get(args.dataset):
                raise reason
            run = settings.plan(flags)
            if run.unfinished.exists():
                unfinished.sweep(run)
            if run.folder not in planned and settings.result_of(run) is None:
                runs.append(run)
            planned.add(run.folder)  # flags that go to every run can make two of them one
        except settings.BAD_INPUT as error:
            if isinstance(error, data_prep.DataError):
                lost[args.dataset] = error
            elif isinstance(error, corrupt.ModelNotFound):
                lost[args.model] = error
            failures.append(f"python train.py {shlex.join(flags)}: {error}")
            if len(failures) == len(flag_lists):
                raise
    return runs, failures, len(planned) + len(failures)


def do_runs(
    flag_lists: list[list[str]], team: Callable[[], workers.Here | workers.OnRay], keep_features: bool = False
) -> list[str]:
    """Do the runs that are missing; returns a line for each that failed."""
    runs, failures, total = plan(flag_lists)
    args, training_args = settings.parse(flag_lists[0])
    data_prep.write_table2(args.data_dir, training_args.output_dir)
    print(f"{total} runs: {total - len(runs) - len(failures)} are there, {len(runs)} to do", flush=True)
    if not runs:
        return failures
    try:
        with team() as at_work:
            failures += work_through(runs, at_work)
    finally:
        for run in runs:
            unfinished.sweep(run)
    output_dir = Path(training_args.output_dir)
    other_grids = any(output_dir.glob("unfinished/*.lock"))  # they may be reading the features
    if not keep_features and not other_grids and any(run.args.tuning == "probe" for run in runs):
        shutil.rmtree(output_dir / "features", ignore_errors=True)
    return failures


def work_through(runs: list[settings.Run], team: workers.Here | workers.OnRay) -> list[str]:
    """Do the runs, those last that another process is at; returns a line for each that failed."""
    by_flags = {tuple(run.flags): run for run in runs}
    flag_lists = by_cell([run.flags for run in runs])
    cells = [[by_flags[tuple(flags)] for flags in cell] for cell in flag_lists]
    costs = [cost.roughly(cell) / len(cell) for cell in flag_lists for _ in cell]
    failures, busy = [], []
    with progress.Display([run for cell in cells for run in cell], costs, str(team)) as display:
        for blocking in (False, True):
            for run, state, line in team.work(cells, blocking):
                if state == "busy":
                    busy.append([run])
                    continue
                display.ended_as(run, state, line)
                failures += [line] if state == "failed" else []
            cells = busy
    return failures


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and examples
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Any other flag goes to every run: see python train.py --help_all.",
    )
    parser.add_argument("--preset", choices=PRESETS, default="demo", help="which runs (default: %(default)s)")
    axes = parser.add_argument_group("instead of the preset's own, one or more each")
    for name, text in AXES.items():
        kind = Fraction if name == "percent" else str
        sides = ("none", "bottom", "top", "all") if name == "corrupt" else None
        axes.add_argument(f"--{name}", nargs="+", type=kind, choices=sides, default=argparse.SUPPRESS, help=text)
    how = parser.add_argument_group("how they are done")
    how.add_argument("--jobs", type=int, metavar="N", help="so many side by side (default: one a core, or one a GPU)")
    how.add_argument("--runs_per_gpu", type=int, metavar="N", help="so many side by side on each GPU (default: 1)")
    where = "this machine, or a Ray cluster (default: %(default)s)"
    how.add_argument("--executor", choices=("local", "ray"), default="local", help=where)
    how.add_argument("--dry_run", action="store_true", help="list the runs and what they cost, and do none")
    how.add_argument("--keep_features", action="store_true", help="keep the probes' encoder outputs on disk")
    try:
        args, shared = parser.parse_known_args()
    except ZeroDivisionError:
        parser.error("--percent divides by zero: give a percentage of the layers, such as 50 or 100/3")
    for name in ("jobs", "runs_per_gpu"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is no number of processes: give 1 or more")
    if args.jobs and args.runs_per_gpu:
        parser.error("--jobs and --runs_per_gpu both say how many: give one of them")
    if args.executor == "ray" and (args.jobs or args.dry_run):
        parser.error("--jobs and --dry_run are for this machine: leave them or --executor ray out")
    train.quieten()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    given = {name: tuple(getattr(args, name)) for name in AXES if name in args}
    try:
        flag_lists = [[*flags, *shared] for flags in jobs(PRESETS[args.preset], given)]
        run_args, training_args = settings.parse(flag_lists[0])
        datasets = dict.fromkeys(flags[flags.index("--dataset") + 1] for flags in flag_lists)
        data_prep.check_names(datasets, run_args.data_dir)
        for dataset in datasets:
            cost.rows(dataset, run_args.data_dir)  # reads a user's own: what is wrong with it is told before any run
        if args.dry_run:
            dry_run(flag_lists, staff(flag_lists, args.jobs, args.runs_per_gpu))
            return
        if args.executor == "ray":
            where = (training_args.output_dir, run_args.data_dir)
            team = partial(workers.OnRay, *where, args.runs_per_gpu or 1, cost.memory)
        else:
            team = partial(workers.Here, staff(flag_lists, args.jobs, args.runs_per_gpu))
        failures = do_runs(flag_lists, team, args.keep_features)
    except settings.BAD_INPUT as error:
        parser.error(str(error))
    except BrokenProcessPool:
        print("a worker was killed, perhaps for want of memory: with --jobs 1 it needs less", file=sys.stderr)
        sys.exit(1)
    except KeyboardInterrupt:
        kept = "from their last epochs" if "--resume" in shared else "from the beginning (--resume keeps their epochs)"
        print(f"interrupted: the same command goes on; runs that were cut off start {kept}", file=sys.stderr)
        sys.exit(130)
    if failures:
        print(f"{len(failures)} of {len(flag_lists)} runs failed:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    main()
