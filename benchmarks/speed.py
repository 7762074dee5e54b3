"""How fast the runs are, part by part, against the library's plain way and against this machine's limit.

    python benchmarks/speed.py
    OMP_NUM_THREADS=1 python benchmarks/speed.py --part training evaluation profile   # as in a worker of the grid

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
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from torch.profiler import ProfilerActivity, profile, record_function
from tqdm import tqdm
from transformers import DataCollatorWithPadding, PreTrainedModel, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

import cost
import data_prep
import pack
import settings
import train
import workers

FLAGS = ["--model", "minilm", "--dataset", "rotten_tomatoes", "--disable_tqdm", "True"]
PLAIN = ("--plain", "True")
GROUPED = ("--train_sampling_strategy", "group_by_length")
# what each variant changes: flags of train.py, and parts of pack.py on the plain model
VARIANTS: dict[str, tuple[tuple[str, ...], str]] = {
    "fixed padding to 128": (PLAIN, "pad"),
    "padding to the longest": (PLAIN, ""),
    "longest + like lengths together": ((*PLAIN, *GROUPED), ""),
    "longest + quick dropout": (PLAIN, "dropout"),
    "longest + packing": (PLAIN, "pack"),
    "both (train.py's way)": ((), ""),
    "both + like lengths together": (GROUPED, ""),
    "both + bf16": (("--bf16", "True", "--use_cpu", str(not torch.cuda.is_available())), ""),
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


def peak() -> float:
    """Floating-point operations a second of a matrix product, with the threads in use."""
    a, b = torch.randn(2, 2048, 2048, device="cuda" if torch.cuda.is_available() else "cpu")
    return 2 * 2048**3 / cost.repeated(lambda: (a @ b)[0, 0].item())


def setup(data: Path, *flags: str) -> train.Setup:
    """A run that is ready to train and neither evaluates nor saves."""
    with tempfile.TemporaryDirectory() as folder:
        run = settings.plan([*FLAGS, "--data_dir", str(data), "--output_dir", folder, *flags])
        made = train.make_trainer(run, data_prep.load("rotten_tomatoes", data))
    for name in ("eval_strategy", "save_strategy", "logging_strategy"):
        setattr(made.trainer.args, name, "no")
    made.trainer.args.load_best_model_at_end = False
    return made


def trained(trainer: Trainer) -> float:
    """The seconds of its optimizer steps."""
    clock = train.Clock()
    trainer.add_callback(clock)
    with contextlib.redirect_stdout(None):
        trainer.train()
    trainer.remove_callback(clock)
    return clock.trained


def trainer_of(variant: str, data: Path) -> Trainer:
    flags, parts = VARIANTS[variant]
    trainer = setup(data, "--num_train_epochs", "1", *flags).trainer
    tokenizer = trainer.processing_class
    if "pad" in parts:
        trainer.data_collator = DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128)
    if "pack" in parts:
        pack.pack(trainer.model)
    if "dropout" in parts:
        pack.use_quick_dropout(trainer.model)
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
    operations, took = 6 * cost.weights_of("minilm") * sum(lengths), medians(times)
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

    def way(batch: int, in_row_order: bool, *flags: str) -> Callable[[], object]:
        made = setup(data, "--per_device_eval_batch_size", str(batch), *flags)
        test = made.trainer.eval_dataset.select(np.argsort(made.order) if in_row_order else range(len(made.order)))
        made.trainer.compute_metrics = None
        return lambda: made.trainer.evaluate(test)

    ways = {
        "row order, batch 64": way(64, True, *PLAIN),
        "row order, batch 256": way(256, True, *PLAIN),
        "by length, batch 64": way(64, False, *PLAIN),
        "by length, batch 256": way(256, False, *PLAIN),
        "packed, by length, batch 64 (train.py's way)": way(64, False),
        "packed, by length, batch 256": way(256, False),
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
    draw = pack.keep_mask

    def seen(*given: object) -> torch.Tensor:
        with record_function("dropout's masks"):
            return draw(*given)

    pack.keep_mask = seen
    trainer = setup(data, "--max_steps", "12").trainer
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        total = trained(trainer)
    pack.keep_mask = draw
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
    """All of a run but training and evaluating: in a new process, and in one that has done a run before."""

    def fixed(folder: Path, total: float) -> float:
        seconds = json.loads((folder / "result.json").read_text())["seconds"]
        return total - seconds["train"] - seconds["evaluate"]

    new, alive = [], []
    flags = [*FLAGS, "--data_dir", str(data), "--max_steps", "1", "--corrupt", "bottom", "--frac", "0.5"]
    with tempfile.TemporaryDirectory() as folder:
        for number in tqdm(range(rounds + 1), desc="runs"):
            more = [*flags, "--seed", str(number), "--output_dir", f"{folder}/alive"]
            started = time.perf_counter()
            train.do(more, {}, False)
            alive.append(fixed(settings.plan(more).folder, time.perf_counter() - started))
            more[-1] = f"{folder}/new"
            started = time.perf_counter()
            subprocess.run(
                [sys.executable, "train.py", *more], cwd=Path(train.__file__).parent, check=True, capture_output=True
            )
            new.append(fixed(settings.plan(more).folder, time.perf_counter() - started))
    took = medians({"in a new process": new, "in a worker, from the second run on": alive[1:]})
    rows = {name: {"seconds": round(seconds, 2)} for name, seconds in took.items()}
    show(rows, "Fixed cost of a run")
    return {"rows": rows, "seconds": {"new": new, "alive": alive}}


def probe(data: Path, rounds: int) -> dict:
    """Three learning rates of ten epochs, 1,000 and 500 rows, tested after each, loading included; once."""
    took = {}
    with tempfile.TemporaryDirectory() as folder:
        data_prep.prepare("rotten_tomatoes", train_size=1_000, test_size=500, data_dir=folder)
        for way, more in (("computed once", ("--tuning", "probe")), ("plain", PLAIN)):
            started = time.perf_counter()
            for rate in tqdm(("1e-5", "2e-5", "5e-5"), desc=f"probe, {way}"):
                flags = ["--data_dir", folder, "--output_dir", f"{folder}/{way}", "--learning_rate", rate, *more]
                trainer = train.make_trainer(
                    settings.plan([*FLAGS, *flags]), data_prep.load("rotten_tomatoes", folder)
                ).trainer
                trainer.args.output_dir = f"{folder}/checkpoints"
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
    """Runs an hour of the grid's workers: two runs of one epoch for each core, in processes that are awake."""
    cores = os.cpu_count()
    ways = dict.fromkeys([workers.Staff(1, 1), workers.Staff(1, cores), workers.Staff(cores, 1)])
    times = {str(staff): [] for staff in ways}
    with tempfile.TemporaryDirectory() as folder:
        for turn in tqdm(range(rounds), desc="workers"):
            for staff in ways:
                flags = [*FLAGS, "--data_dir", str(data), "--num_train_epochs", "1"]
                with workers.Here(staff) as here:
                    warm = [*flags, "--max_steps", "1"]
                    for task in [
                        worker.submit(train.do, warm, {}, False, "--output_dir", f"{folder}/{staff}-{turn}-{number}")
                        for number, worker in enumerate(here.workers)
                    ]:
                        task.result()
                    out = ["--output_dir", f"{folder}/{staff}-{turn}"]
                    cells = [[settings.plan([*flags, "--seed", str(seed), *out])] for seed in range(2 * cores)]
                    started = time.perf_counter()
                    said = list(here.work(cells))
                    times[str(staff)].append(time.perf_counter() - started)
                if any(state != "done" for _, state, _ in said):
                    raise RuntimeError(f"a run failed: {said}")
    took = medians(times)
    rows = {
        staff: {
            "runs an hour": round(3600 * 2 * cores / seconds),
            "against one thread": round(took["1 x 1 thread"] / seconds, 2),
        }
        for staff, seconds in took.items()
    }
    counts = data_prep.manifest("rotten_tomatoes", data)["rows"]
    show(rows, f"Workers, runs of {counts['train']} train and {counts['test']} test rows; the parent")
    return {"rows": rows, "seconds": times}


def covered(spans: list[tuple[float, float]]) -> float:
    """How much time the spans cover together."""
    total, until = 0.0, 0.0
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, until))
        until = max(until, end)
    return total


def whole_grid(data: Path, rounds: int) -> dict:
    """A grid of 24 demo runs from its command to its end: the time in which no run was under way, and none trained."""
    with tempfile.TemporaryDirectory() as folder:
        for name in data_prep.DEMO:
            data_prep.prepare(name, data_dir=f"{folder}/data")
        command = [sys.executable, "grid.py", "--preset", "demo", "--seed", "0", "1"]
        command += ["--data_dir", f"{folder}/data", "--output_dir", folder]
        begun = datetime.now(UTC)
        subprocess.run(command, cwd=Path(__file__).parent.parent, check=True, capture_output=True)
        total = (datetime.now(UTC) - begun).total_seconds()
        under_way, trained = [], []
        for path in Path(folder).glob("runs/*/result.json"):
            result = json.loads(path.read_text())
            seconds, end = result["seconds"], (datetime.fromisoformat(result["finished"]) - begun).total_seconds()
            under_way.append((end - seconds["total"], end))
            trained.append((end - seconds["train"] - seconds["evaluate"], end))
    row = {"runs": len(trained), "seconds": round(total, 1), "before the first": round(min(under_way)[0], 1)}
    row |= {
        "no run under way": f"{1 - covered(under_way) / total:.1%}",
        "none trained": f"{1 - covered(trained) / total:.1%}",
    }
    show({"grid": row}, "A grid of demo runs")
    return {"rows": {"grid": row}, "seconds": {"under way": under_way, "trained": trained}}


PARTS = {
    "training": training,
    "evaluation": evaluation,
    "profile": where_it_goes,
    "runs": runs,
    "probe": probe,
    "workers": side_by_side,
    "grid": whole_grid,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--rounds", type=int, default=3, help="turns of each variant")
    args = parser.parse_args()
    train.quieten()
    torch.use_deterministic_algorithms(True)  # as every run does
    torch.utils.deterministic.fill_uninitialized_memory = False
    path = Path(__file__).with_suffix(".json")
    found = json.loads(path.read_text()) if path.exists() else {}
    about = {"machine": platform.processor() or platform.machine(), "torch": torch.__version__}
    about |= {"commit": train.git_commit(), "rounds": args.rounds}
    with tempfile.TemporaryDirectory() as folder:
        data_prep.prepare("rotten_tomatoes", train_size=384, test_size=192, data_dir=folder)
        for part in args.part:
            key = f"{part}, {torch.get_num_threads()} threads"
            found[key] = about | PARTS[part](Path(folder), args.rounds)
            path.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
