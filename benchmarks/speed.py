"""How fast the runs are, part by part, against the library's plain way and against this machine's limit.

    python benchmarks/speed.py
    python benchmarks/speed.py --part training profile      # with one thread, as a grid's processes, and with all

Real fine-tuning of the embedded model on rotten_tomatoes through the Trainer. The variants take turns, several rounds
in one run, and medians are compared: read the ratios, not the seconds. The limit is a product of two 2048 x 2048
matrices, timed between the rounds. «Fixed padding» is what transformers' run_classification.py does by default (it pads
to 128 tokens), «longest» what it does with --pad_to_max_length False; both through the Trainer, with this project's
batch of 32. Prints tables, and keeps them with all times in benchmarks/speed.json, where parts not measured anew stay.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import UTC, datetime
from fractions import Fraction
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

import callbacks
import common
import config
import cost
import data_prep
import executors
import grid
import models
import paper
import prepared_run
import resolve
import run_dir
import train
import unpad
from config import RunConfig

ROOT = Path(train.__file__).parent
BASE = RunConfig(model="minilm", dataset="rotten_tomatoes", trainer={"disable_tqdm": True})
PLAIN = {"no_unpadding": True}
# what each variant changes: fields of RunConfig. The mean of a row's tokens needs all of the last layer.
VARIANTS = {
    "fixed padding to 128": PLAIN,
    "padding to the longest": PLAIN,
    "no padding, all of the last layer (--pooling mean)": {"pooling": "mean"},
    "no padding, the last layer for [CLS] alone": {},
    "the same in bf16": {"bf16": True},
}
KINDS = {  # of operators, by the beginning of their names
    "matrix products": ("aten::mm", "aten::addmm"),
    "attention's products and softmax": ("aten::bmm", "aten::_softmax", "aten::_scaled_dot_product"),
    "GELU": ("aten::gelu",),
    "layer norm": ("aten::native_layer_norm",),
    "optimizer and clipping": ("aten::_fused_adamw", "aten::linalg_vector_norm", "aten::_foreach", "Optimizer"),
    "embedding": ("aten::embedding", "aten::fill_", "aten::zero_", "aten::index"),
    "copies and views": (
        "aten::copy_",
        "aten::cat",
        "aten::clone",
        "aten::view",
        "aten::transpose",
        "aten::as_strided",
    ),
}


def repeated(function: Callable[[], object]) -> float:
    """The seconds of one call: the median of those that fit into a second and a half, the first one left out."""
    until, times = time.perf_counter() + 1.5, []
    function()
    while not times or time.perf_counter() < until:
        started = time.perf_counter()
        function()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def peak() -> float:
    """Floating-point operations a second of a matrix product, with the threads in use."""
    a, b = torch.randn(2, 2048, 2048, device="cuda" if torch.cuda.is_available() else "cpu")
    return 2 * 2048**3 / repeated(lambda: (a @ b)[0, 0].item())


def prepare(data: Path | str, **changes: object) -> prepared_run.PreparedRun:
    """A run that is ready to train and neither evaluates nor saves."""
    with tempfile.TemporaryDirectory() as folder:
        run = resolve.resolve_run(replace(BASE, data_dir=str(data), output_dir=folder, **changes))
        prepared = prepared_run.prepare_run(run, data_prep.load("rotten_tomatoes", data))
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(prepared.trainer.args, name, "no")
    prepared.trainer.args.load_best_model_at_end = False
    return prepared


def trained(trainer: Trainer) -> float:
    """The seconds of its optimizer steps."""
    timer = callbacks.TrainTimer()
    trainer.add_callback(timer)
    with contextlib.redirect_stdout(None):
        trainer.train()
    trainer.remove_callback(timer)
    return timer.seconds


def trainer_of(variant: str, data: Path) -> Trainer:
    trainer = prepare(data, num_train_epochs=1, **VARIANTS[variant]).trainer
    if variant.startswith("fixed"):
        fixed = {"padding": "max_length", "max_length": 128}
        trainer.data_collator = DataCollatorWithPadding(trainer.processing_class, **fixed)
    return trainer


def medians(times: dict[str, list[float]]) -> dict[str, float]:
    return {name: statistics.median(of) for name, of in times.items()}


def show(rows: dict[str, dict], caption: str) -> None:
    print(f"\n{caption}, {torch.get_num_threads()} threads\n\n{pd.DataFrame(rows).T.to_markdown()}", flush=True)


def training(data: Path, rounds: int) -> dict:
    """Rows a second of one epoch of the same rows."""
    trainers = {name: trainer_of(name, data) for name in VARIANTS}
    times, peaks = {name: [] for name in VARIANTS}, []
    for _ in tqdm(range(rounds), desc="training"):
        peaks.append(peak())
        for name, trainer in trainers.items():
            times[name].append(trained(trainer))
    lengths = next(iter(trainers.values())).train_dataset["length"]
    operations, took = 6 * cost.encoder_weights("minilm") * sum(lengths), medians(times)
    rows = {
        name: {
            "rows a second": round(len(lengths) / seconds, 1),
            "against fixed padding": round(took["fixed padding to 128"] / seconds, 2),
            "against longest": round(took["padding to the longest"] / seconds, 2),
            "of the peak": f"{operations / seconds / statistics.median(peaks):.0%}",
        }
        for name, seconds in took.items()
    }
    limit = f"peak {statistics.median(peaks) / 1e9:.0f} GFLOP/s"
    show(rows, f"Training, {len(lengths)} rows, {sum(lengths)} tokens, {limit}")
    return {"rows": rows, "seconds": times, "peaks": peaks}


def evaluation(data: Path, rounds: int) -> dict:
    """Rows a second of the test split."""

    def way(batch: int, in_row_order: bool, **changes: object) -> Callable[[], object]:
        trainer_flags = {"disable_tqdm": True, "per_device_eval_batch_size": batch}
        prepared = prepare(data, trainer=trainer_flags, **changes)
        rows = np.argsort(prepared.order) if in_row_order else range(len(prepared.order))
        test = prepared.trainer.eval_dataset.select(rows)
        prepared.trainer.compute_metrics = None
        return lambda: prepared.trainer.evaluate(test)

    ways = {
        "row order, batch 64": way(64, True, **PLAIN),
        "row order, batch 256": way(256, True, **PLAIN),
        "by length, batch 64": way(64, False, **PLAIN),
        "by length, batch 256": way(256, False, **PLAIN),
        "unpadded, by length, batch 64 (train.py's way)": way(64, False),
        "unpadded, by length, batch 256": way(256, False),
    }
    times = {name: [] for name in ways}
    for _ in tqdm(range(rounds), desc="evaluation"):
        for name, evaluate in ways.items():
            started = time.perf_counter()
            with contextlib.redirect_stdout(None):
                evaluate()
            times[name].append(time.perf_counter() - started)
    count, took = data_prep.manifest("rotten_tomatoes", data)["rows"]["test"], medians(times)
    rows = {
        name: {
            "rows a second": round(count / seconds, 1),
            "against the first": round(took["row order, batch 64"] / seconds, 2),
        }
        for name, seconds in took.items()
    }
    show(rows, f"Evaluation, {count} rows")
    return {"rows": rows, "seconds": times}


def where_it_goes(data: Path, rounds: int) -> dict:
    """The share of each kind of work in training, by torch's profiler; the shares add up with one thread only."""
    draw = unpad.keep_mask

    def seen(*given: object) -> torch.Tensor:
        with record_function("dropout's masks"):
            return draw(*given)

    unpad.keep_mask = seen
    trainer = prepare(data, max_steps=12).trainer
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total = trained(trainer)
    unpad.keep_mask = draw
    spent = dict.fromkeys([*KINDS, "dropout's masks", "loading batches"], 0.0)
    for event in profiler.key_averages():
        kind = next((kind for kind, names in KINDS.items() if event.key.startswith(names)), None)
        if kind:
            spent[kind] += event.self_cpu_time_total / 1e6
        elif event.key == "dropout's masks":
            spent[event.key] = event.cpu_time_total / 1e6
        elif "DataLoader" in event.key:
            spent["loading batches"] = event.cpu_time_total / 1e6
    spent["small operators, autograd, Python, the profiler itself"] = total - sum(spent.values())
    rows = {kind: {"share": f"{seconds / total:.1%}"} for kind, seconds in spent.items()}
    show(rows, "Where the time of training goes")
    return {"rows": rows, "seconds": spent}


def runs(data: Path, rounds: int) -> dict:
    """All of a run but training and evaluating: in a new process, and in a further process of the grid."""

    def fixed(run: config.Run, total: float) -> float:
        seconds = run_dir.load_valid_result(run)["seconds"]
        return total - seconds["train"] - seconds["evaluate"]

    new, forked = [], []
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(pool_of(1, torch.get_num_threads())) as pool:
        half = replace(BASE, data_dir=str(data), max_steps=1, corrupt="bottom", frac=Fraction(1, 2))
        for seed in tqdm(range(rounds + 1), desc="runs"):
            run = resolve.resolve_run(replace(half, seed=seed, output_dir=f"{folder}/forked"))
            started = time.perf_counter()
            list(pool.run_all([run]))
            forked.append(fixed(run, time.perf_counter() - started))
            run = resolve.resolve_run(replace(half, seed=seed, output_dir=f"{folder}/new"))
            started = time.perf_counter()
            subprocess.run([sys.executable, "train.py", *run.config.flags()], cwd=ROOT, check=True, capture_output=True)
            new.append(fixed(run, time.perf_counter() - started))
    took = medians({"in a new process": new, "in a process of the grid, from the second on": forked[1:]})
    rows = {name: {"seconds": round(seconds, 2)} for name, seconds in took.items()}
    show(rows, "Fixed cost of a run")
    return {"rows": rows, "seconds": {"new": new, "forked": forked}}


def pool_of(processes: int, threads: int) -> executors.LocalPool:
    return executors.LocalPool(executors.WorkerLayout(processes, threads))


def probe(data: Path, rounds: int) -> dict:
    """Three learning rates of ten epochs, 1,000 and 500 rows, evaluated after each, loading included; once."""
    took = {}
    with tempfile.TemporaryDirectory() as folder:
        data_prep.prepare("rotten_tomatoes", train_size=1_000, test_size=500, data_dir=folder)
        for way, changes in (("computed once", {"tuning": "probe"}), ("plain", PLAIN)):
            started = time.perf_counter()
            for rate in tqdm((1e-5, 2e-5, 5e-5), desc=f"probe, {way}"):
                wanted = replace(BASE, data_dir=folder, output_dir=f"{folder}/{way}", learning_rate=rate, **changes)
                rows = data_prep.load("rotten_tomatoes", folder)
                trainer = prepared_run.prepare_run(resolve.resolve_run(wanted), rows).trainer
                if way == "plain":
                    freeze(trainer.model)
                with contextlib.redirect_stdout(None):
                    trainer.train()
            took[way] = time.perf_counter() - started
    rows = {
        way: {"seconds": round(seconds, 1), "against plain": round(took["plain"] / seconds, 1)}
        for way, seconds in took.items()
    }
    show(rows, "Linear probe")
    return {"rows": rows}


def freeze(model: PreTrainedModel) -> None:
    model.base_model.requires_grad_(False)


def side_by_side(data: Path, rounds: int) -> dict:
    """Runs an hour of the grid's processes: two runs of one epoch for each core."""
    cores = os.cpu_count()
    layouts = dict.fromkeys([(1, 1), (1, cores), (cores, 1)])
    times = {str(executors.WorkerLayout(*layout)): [] for layout in layouts}
    with tempfile.TemporaryDirectory() as folder:
        one_epoch = replace(BASE, data_dir=str(data), num_train_epochs=1)
        for turn in tqdm(range(rounds), desc="workers"):
            for layout in layouts:
                name = str(executors.WorkerLayout(*layout))
                wanted = [replace(one_epoch, seed=s, output_dir=f"{folder}/{name}-{turn}") for s in range(2 * cores)]
                with contextlib.closing(pool_of(*layout)) as pool:
                    warm = resolve.resolve_run(
                        replace(one_epoch, max_steps=1, output_dir=f"{folder}/warm-{name}-{turn}")
                    )
                    list(pool.run_all([warm]))
                    todo = [resolve.resolve_run(run) for run in wanted]
                    started = time.perf_counter()
                    outcomes = list(pool.run_all(todo))
                    times[name].append(time.perf_counter() - started)
                if any(state != "done" for _, state, _ in outcomes):
                    raise RuntimeError(f"a run failed: {outcomes}")
    took = medians(times)
    rows = {
        layout: {
            "runs an hour": round(3600 * 2 * cores / seconds),
            "against one thread": round(took["1 x 1 thread"] / seconds, 2),
        }
        for layout, seconds in took.items()
    }
    counts = data_prep.manifest("rotten_tomatoes", data)["rows"]
    show(rows, f"Processes, runs of {counts['train']} train and {counts['test']} test rows; the parent")
    return {"rows": rows, "seconds": times}


def covered(spans: list[tuple[float, float]]) -> float:
    """How much time the spans cover together."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def whole_grid(data: Path, rounds: int) -> dict:
    """A grid of 24 demo runs from its command to its end: the time in which no run was under way, and none trained.

    The runs an hour against those of peer.py, one after another with all cores: a run of each of the demo's three
    kinds, which have as many cells each.
    """
    with tempfile.TemporaryDirectory() as folder:
        for name in data_prep.DEMO:
            data_prep.prepare(name, data_dir=f"{folder}/data")
        command = [sys.executable, "grid.py", "--preset", "demo", "--seed", "0", "1"]
        command += ["--data_dir", f"{folder}/data", "--output_dir", folder]
        begun = datetime.now(UTC)
        subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
        total = (datetime.now(UTC) - begun).total_seconds()
        under_way, trained = [], []
        for path in Path(folder).glob("runs/*/result.json"):
            result = json.loads(path.read_text())
            seconds, end = result["seconds"], (datetime.fromisoformat(result["finished"]) - begun).total_seconds()
            under_way.append((end - seconds["total"], end))
            trained.append((end - seconds["train"] - seconds["evaluate"], end))
        one_of_each = {run.dataset + run.tuning: run for run in grid.expand(paper.PRESETS["demo"], {})}
        started = time.time()
        for run in one_of_each.values():
            flags = [f"{folder}/data/{run.dataset}", str(models.find_model("minilm")[0]), f"{folder}/peer", run.tuning]
            flags += [str(run.num_train_epochs), str(run.learning_rate)]
            subprocess.run([sys.executable, "benchmarks/peer.py", *flags], cwd=ROOT, check=True, capture_output=True)
        peer = (time.time() - started) / len(one_of_each)
    row = {"runs": len(trained), "seconds": round(total, 1), "before the first": round(min(under_way)[0], 1)}
    row |= {
        "no run under way": f"{1 - covered(under_way) / total:.1%}",
        "none trained": f"{1 - covered(trained) / total:.1%}",
    }
    row |= {
        "runs an hour": round(3600 * len(trained) / total),
        "of peer.py": round(3600 / peer),
        "ratio": round(peer * len(trained) / total, 2),
    }
    show({"grid": row}, "A grid of demo runs")
    return {"rows": {"grid": row}, "seconds": {"under way": under_way, "trained": trained}}


def shared_machine(data: Path, rounds: int) -> dict:
    """Twelve steps of train.py with a thread on each core, alone and beside a busy process on each core.

    Threads that wait for one another spin 10,000 times before they let others have the core (train.py's), or 300,000
    times (libgomp's own).
    """
    cores, times = os.cpu_count(), {}
    with tempfile.TemporaryDirectory() as folder:
        for turn, beside in product(range(rounds), (0, cores)):
            with contextlib.ExitStack() as others:
                for _ in range(beside):
                    others.callback(subprocess.Popen([sys.executable, "-c", "while True: pass"]).kill)
                for spins in (10_000, 300_000):
                    name = f"{folder}/{turn}-{beside}-{spins}"
                    wanted = replace(BASE, data_dir=str(data), max_steps=12, output_dir=name)
                    environment = os.environ | {"GOMP_SPINCOUNT": str(spins), "OMP_NUM_THREADS": str(cores)}
                    command = [sys.executable, "train.py", *wanted.flags()]
                    subprocess.run(command, cwd=ROOT, env=environment, check=True, capture_output=True)
                    seconds = run_dir.load_valid_result(resolve.resolve_run(wanted))["seconds"]["train"]
                    times.setdefault(f"{spins} spins, {beside} beside", []).append(seconds)
    rows = {name: {"seconds": round(median, 1)} for name, median in medians(times).items()}
    show(rows, "Twelve steps beside busy processes")
    return {"rows": rows, "seconds": times}


BY_THREADS = ("training", "profile")  # with one thread, too
PARTS = {
    "training": training,
    "evaluation": evaluation,
    "profile": where_it_goes,
    "runs": runs,
    "probe": probe,
    "workers": side_by_side,
    "grid": whole_grid,
    "shared": shared_machine,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    args = parser.parse_args()
    train.silence_libraries()
    torch.use_deterministic_algorithms(True)  # as every run does
    torch.utils.deterministic.fill_uninitialized_memory = False
    path = Path(__file__).with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    about = {"machine": prepared_run.device_of("cpu")["name"], "torch": torch.__version__}
    about |= {"commit": common.git_commit(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        data_prep.prepare("rotten_tomatoes", train_size=384, test_size=192, data_dir=folder)
        for part, threads in product(args.part, sorted({1, os.cpu_count()})):
            if threads == os.cpu_count() or part in BY_THREADS:
                torch.set_num_threads(threads)
                found[f"{part}, {threads} threads"] = about | PARTS[part](Path(folder), args.rounds)
                path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
