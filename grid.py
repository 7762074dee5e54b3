"""Do every run that a table needs, side by side, each in a process of its own; skip what is there already.

    python grid.py --preset paper --dry_run                      # list the 960 runs, and what they cost on this machine
    python grid.py --preset demo
    python grid.py --preset table1 --model bert-base-uncased --dataset sst2 imdb      # two columns of Table 1's Base
    python grid.py --preset table1 --model minilm --frac 0 0.5 1 --seed 0 1 2         # another model in their place
    python grid.py --preset demo --num_train_epochs 10           # any other flag goes to every run

--model, --dataset, --corrupt, --frac, --learning_rate and --seed take the place of the preset's own. Data sets that are
missing are prepared first, as data_prep.py does. A run that fails leaves its reason in `failure.json` and does not stop
the others; the grid then ends with exit code 1 and names it. The same command once more does what is missing.
"""

import argparse
import json
import os
import shlex
import shutil
import signal
import sys
from contextlib import closing, suppress
from dataclasses import replace
from fractions import Fraction
from itertools import product
from pathlib import Path

import config
import paper
from common import USER_ERRORS, InputError, atomic_write, fail, file_lock, fraction, make_parser

AXES = {  # name: type, help
    "model": (str, "minilm, local folders, or hub ids"),
    "dataset": (str, "known sets, or folders of your own (docs/data.md)"),
    "corrupt": (str, "which sides; none is 0 %%, all is 100 %%"),
    "frac": (
        fraction,
        "parts of the encoder layers (default: 0 1/4 1/2 3/4 1, where that is a whole number of layers)",
    ),
    "layers": (str, "instead: places such as 3 or 2-4,6, or each, for every single layer"),
    "learning_rate": (float, "a cell is the best of them"),
    "seed": (int, "one run for each (default: 0)"),
}

ANY_PLACE = {"corrupt": "bottom", "frac": Fraction(1)}  # for checks of flags that do not say which layers


def parse() -> tuple[argparse.Namespace, dict, dict]:
    """How the grid is done, the axes that are given, and the fields that every run gets."""
    parser = make_parser(__doc__)
    parser.epilog = "Any other flag goes to every run: see python train.py --help_all."
    parser.add_argument("--preset", choices=paper.PRESETS, default="demo", help="which runs (default: %(default)s)")
    axes = parser.add_argument_group("instead of the preset's own, one or more each")
    for name, (kind, text) in AXES.items():
        sides = ("none", "bottom", "top", "all") if name == "corrupt" else None
        axes.add_argument(f"--{name}", nargs="+", type=kind, choices=sides, default=argparse.SUPPRESS, help=text)
    how = parser.add_argument_group("how they are done")
    how.add_argument("--jobs", type=int, metavar="N", help="so many side by side (default: one a core, or one a GPU)")
    how.add_argument("--runs_per_gpu", type=int, metavar="N", help="so many side by side on each GPU (default: 1)")
    where = "this machine, or a Ray cluster (default: %(default)s)"
    how.add_argument("--executor", choices=("local", "ray"), default="local", help=where)
    how.add_argument("--dry_run", action="store_true", help="list the runs and what they cost, and do none")
    how.add_argument("--keep_features", action="store_true", help="keep the probes' encoder outputs on disk")
    args, others = parser.parse_known_args([config.with_underscores(word) for word in sys.argv[1:]])
    for name in ("jobs", "runs_per_gpu"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} {getattr(args, name)} is not a number of processes: give 1 or more")
    if args.jobs and args.runs_per_gpu:
        parser.error("--jobs and --runs_per_gpu both say how many: give one of them")
    if args.executor == "ray" and (args.jobs or args.dry_run):
        parser.error("--jobs and --dry_run are for this machine: leave them or --executor ray out")
    shared = config.parse_flags(config.run_parser(__doc__), others)
    given = {name: tuple(getattr(args, name)) for name in AXES if name in args}
    try:
        if "layers" in given and {"corrupt", "frac"} & given.keys():
            raise InputError("--layers and --corrupt or --frac both say which layers: give one of them")
        for sweep in paper.PRESETS[args.preset]:
            config.RunConfig(**ANY_PLACE | sweep.fixed | shared)
    except InputError as error:
        parser.error(str(error))
    return args, given, shared


if __name__ == "__main__":
    parse()  # help and wrong flags are told before torch is imported

import psutil
import torch

import cost
import data_prep
import executors
import models
import places
import progress
import resolve
import run_dir
from config import Run, RunConfig

# ---- Which runs ----


def corruptions(sweep: paper.Sweep, layers: int) -> list[dict]:
    """The corruptions of a model with so many layers, 0 % first: fields of RunConfig. Raises InputError."""
    fracs = [Fraction(k, layers) for k in range(layers + 1)] if sweep.frac is None else sweep.frac
    if sweep.layers:
        named = [str(k + 1) for k in range(layers)] if sweep.layers == ("each",) else sweep.layers
        once = {places.select_layers("none", None, layers, place): place for place in named}  # raises InputError
        return [{}] * (0 in fracs and "none" in sweep.corrupt) + [{"layers": place} for place in once.values()]
    chosen = []
    for frac in (frac for frac in fracs if (frac * layers).denominator == 1):
        sides = {0: ("none",), 1: ("all",)}.get(frac, ("bottom", "top"))
        for side in (side for side in sides if side in sweep.corrupt):
            chosen.append({"corrupt": {"all": "bottom"}.get(side, side), "frac": frac} if frac else {})
    return chosen


def expand(preset: tuple[paper.Sweep, ...], axes: dict[str, tuple], shared: dict | None = None) -> list[RunConfig]:
    """Every run of a preset, once each. `axes` take the place of the preset's own; every run gets the fields `shared`.

    A part of the layers that does not fit a model is left out; if the user named it, that is said. Raises InputError if
    no run is left.
    """
    runs: dict[str, RunConfig] = {}
    axes = ({"layers": ()} if {"corrupt", "frac"} & axes.keys() else {}) | axes
    for sweep in (replace(sweep, **axes) for sweep in preset):
        for model, dataset in product(sweep.model, sweep.dataset):
            chosen = corruptions(sweep, cost.shape_of(model).num_hidden_layers)
            for corruption, rate, seed in product(chosen, sweep.learning_rate, sweep.seed):
                cell = {"model": model, "dataset": dataset, "learning_rate": rate, "seed": seed}
                fields = sweep.fixed | cell | corruption | (shared or {})
                if not corruption:
                    fields = {name: value for name, value in fields.items() if name not in config.OF_CORRUPTION}
                run = RunConfig(**fields)
                runs.setdefault(str(replace(run, save_vectors=False)), run)
    if not runs:
        raise InputError("no cell is left: a --frac must be a whole number of layers, a --corrupt belong to it")
    models = dict.fromkeys(model for sweep in preset for model in axes.get("model", sweep.model))
    for model, frac in product(models, axes.get("frac", ())):
        layers = cost.shape_of(model).num_hidden_layers
        if (frac * layers).denominator > 1:
            print(f"{model}: --frac {frac} is left out: not a whole number of its {layers} layers", file=sys.stderr)
    return list(runs.values())


def worker_layout(runs: list[RunConfig], jobs: int | None, runs_per_gpu: int | None) -> executors.WorkerLayout:
    """One process a core, or `runs_per_gpu` on each GPU, but no more than there is memory for.

    `runs` are all that were asked for, those that are there too: the threads change a result's last digits and must not
    depend on what is missing.
    """
    cores, count = torch.get_num_threads(), torch.cuda.device_count()
    gpus = tuple(os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(count)))).split(",")) if count else ()
    if runs_per_gpu and not gpus:
        raise InputError("--runs_per_gpu needs a GPU, and there is none: leave it out")
    wanted = jobs or (len(gpus) * (runs_per_gpu or 1) if gpus else cores)
    room = max(1, int(psutil.virtual_memory().total / max(map(cost.memory, runs))))
    if wanted > room:
        print(f"{wanted} processes need more memory than there is: {room} at a time", file=sys.stderr)
    processes = min(wanted, room)
    return executors.WorkerLayout(processes, max(1, cores // processes), gpus)


# ---- What is missing ----


def find_run(wanted: RunConfig) -> Run | None:
    """The run, if its result is there; never prepares a data set, without which there is no result."""
    run = resolve.resolve_run(wanted, prepare=False)
    return run if run and run_dir.load_valid_result(run, digests=False) else None


def check(wanted: RunConfig) -> None:
    """Check a run that is missing. Raises InputError."""
    import train  # here, and not at the top: it takes two seconds, for nothing if nothing is missing

    train.check(wanted)


def list_runs(runs: list[RunConfig], layout: executors.WorkerLayout) -> None:
    """The dry run: each run as the command that does it alone, and what those that are missing will cost.

    Runs of a model that is not here count, though nothing of the model is checked. Ends the process with exit code 1 if
    some runs are refused; raises InputError if all are.
    """
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends it quietly
    missing, refused, notes, lines = [], 0, {}, []
    for run in runs:
        if not data_prep.up_to_date(run.dataset, run.data_dir):
            notes[f"{run.dataset} is not prepared: its tokens are at most those counted"] = run
        state = "missing"
        try:
            with suppress(models.NotHere):
                state = "done" if find_run(run) else state
            if state == "missing":
                check(run)
        except models.NotHere as error:
            notes[str(error)] = run
        except InputError as error:
            state, refused = "refused", refused + 1
            notes[str(error)] = run
            if refused == len(runs):
                raise
        missing += [run] if state == "missing" else []
        lines.append(f"{state:7} {run.command}")
    print(*lines, *notes, sep="\n")
    there, cannot = len(runs) - len(missing) - refused, f", {refused} that cannot be done" if refused else ""
    print(f"{len(runs)} runs: {there} are there, {len(missing)} to do{cannot}")
    if missing:
        held = max(map(cost.memory, missing)) / 1e9
        predicted = cost.predict(missing, layout.processes, layout.threads)
        print(f"{predicted} with {layout}; a run needs {held:.1f} GB of memory at most")
    if refused:
        sys.exit(1)


def find_missing(runs: list[RunConfig]) -> tuple[list[Run], list[str], list[str]]:
    """The runs to do, a line for each that cannot be started, and the names of all (of those their commands).

    Prepares data sets that are missing. Raises InputError if not one run can be started.
    """
    missing, failures, names = [], [], {}
    lost: dict[str, InputError] = {}  # data sets that cannot be had: asked for once, a silent hub takes time
    for wanted in runs:
        try:
            if wanted.dataset in lost:
                raise lost[wanted.dataset]
            run = find_run(wanted)
            if run is None:
                check(wanted)
                try:
                    run = resolve.resolve_run(wanted)
                except InputError as error:
                    lost[wanted.dataset] = error
                    raise
                run_dir.clean_stale(run)
                if run.name not in names:
                    missing.append(run)
            names[run.name] = None  # flags that go to every run can make two of them one
        except InputError as error:
            names[wanted.command] = None
            failures.append(f"{wanted.command}: {error}")
            if len(failures) == len(runs):
                raise
    return missing, failures, list(names)


def note_asked(names: list[str], output_dir: Path) -> None:
    """Keep in asked.json which runs this command asked for: aggregate.py says how many of them are missing."""
    output_dir.mkdir(parents=True, exist_ok=True)
    with file_lock(output_dir / ".asked.lock"), atomic_write(output_dir / "asked.json") as aside:
        asked = run_dir.read_asked(output_dir) | {shlex.join(["python", "grid.py", *sys.argv[1:]]): names}
        aside.write_text(json.dumps(asked, indent=1) + "\n", encoding="utf-8")


# ---- Do them ----


def dispatch(runs: list[Run], pool: executors.LocalPool | executors.RayPool) -> list[str]:
    """Do the runs, those last that another process does; returns a line for each that failed."""
    costs = {run.name: cost.relative_cost(run.config) for run in runs}
    if any(run.config.tuning == "probe" for run in runs):  # the first run of a probe reads the rows for the others
        seen = set()
        for run in runs:
            cell = str(replace(run.config, learning_rate=0.0))
            costs[run.name] /= 10 if cell in seen and run.config.tuning == "probe" else 1
            seen.add(cell)
    ordered = sorted(runs, key=lambda run: costs[run.name], reverse=True)  # a long one that begins last would end last
    failures, busy = [], []
    with progress.Display(ordered, [costs[run.name] for run in ordered], str(pool)) as display:
        for todo, wait_for_others in ((ordered, False), (busy, True)):
            for run, state, line in pool.run_all(todo, wait_for_others):
                if state == "busy":
                    busy.append(run)
                    continue
                display.add_outcome(run, state, line)
                failures += [line] if state == "failed" else []
    return failures


def main() -> None:
    args, axes, shared = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends as by Ctrl-C
    base = RunConfig(**ANY_PLACE | paper.PRESETS[args.preset][0].fixed | shared)
    try:
        runs = expand(paper.PRESETS[args.preset], axes, shared)
        run_dir.read_asked(Path(base.output_dir))  # told before anything is prepared
        data_prep.check_names(dict.fromkeys(run.dataset for run in runs), base.data_dir)
        for run in runs:
            cost.count_rows(run.dataset, base.data_dir)  # reads a user's own: what is wrong with it is told first
        if args.executor == "local":
            layout = worker_layout(runs, args.jobs, args.runs_per_gpu)
        if args.dry_run:
            return list_runs(runs, layout)
        missing, failures, names = find_missing(runs)
        note_asked(names, Path(base.output_dir))
        there = len(names) - len(missing) - len(failures)
        print(f"{len(names)} runs: {there} are there, {len(missing)} to do", flush=True)
        if missing:
            failures += run_missing(missing, args, layout if args.executor == "local" else None)
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        kept = "from their last epochs" if base.resume else "from the beginning (--resume keeps their epochs)"
        print(f"interrupted: the same command goes on; runs that were cut off start {kept}", file=sys.stderr)
        sys.exit(130)
    if failures:
        print(f"{len(failures)} of {len(runs)} runs failed:", *failures, sep="\n  ", file=sys.stderr)
        sys.exit(1)


def run_missing(missing: list[Run], args: argparse.Namespace, layout: executors.WorkerLayout | None) -> list[str]:
    """Do the runs, here or on a cluster, and clean up; returns a line for each that failed."""
    base = missing[0].config
    if layout:
        pool = executors.LocalPool(layout)
    else:
        pool = executors.RayPool(base.output_dir, base.data_dir, args.runs_per_gpu, cost.memory)
    try:
        with closing(pool):
            failures = dispatch(missing, pool)
    finally:
        for run in missing:
            run_dir.clean_stale(run)
    output_dir = Path(base.output_dir)
    other_grids = any(output_dir.glob("unfinished/*.lock"))  # they may be reading the features
    if not args.keep_features and not other_grids:
        shutil.rmtree(output_dir / "features", ignore_errors=True)
    return failures


if __name__ == "__main__":
    main()
