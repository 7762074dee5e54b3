"""How long the tables and the page take for the paper's 960 runs, and how large the page is.

    python benchmarks/page.py [--runs 960] [--output_dir DIR]

The runs are made up: the paper's F1 for each cell, noise of a point for each learning rate, and predictions of the size
of Table 2's test splits with about that accuracy, constant ones for its outliers. With --output_dir they, the tables
and the page stay there.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

import aggregate
import cost
import data_prep
import grid
import settings
import train

ROOT = Path(__file__).parent.parent
TENSORS = 16  # of a layer


def write_run(flags: list[str], f1: float, collapsed: bool, output_dir: Path, random: np.random.Generator) -> None:
    """A run's folder as train.py leaves it, whose best epoch has about this F1 (0 to 1)."""
    args, training_args = settings.parse(flags)
    layers, frac = cost.config_of(args.model).num_hidden_layers, args.frac or 0
    side = {0: "none", 1: "all"}.get(frac, args.corrupt)
    made_of = {"numbers": settings.NUMBERS, "model": args.model, "model_fingerprint": args.model.ljust(64, "0")}
    made_of |= {"side": side, "frac": str(frac), "percent": float(100 * frac), "kaiming_a": args.kaiming_a}
    made_of |= {"dataset": args.dataset, "data_fingerprint": args.dataset.ljust(64, "0"), "pooling": args.pooling}
    made_of |= {"tuning": args.tuning, "max_length": args.max_length, "plain": args.plain}
    made_of |= settings.training_settings(training_args)
    folder = output_dir / "runs" / settings.run_name(made_of)
    folder.mkdir(parents=True)

    rows, classes = cost.rows(args.dataset, "")[1], len(data_prep.DATASETS[args.dataset].label_names)
    labels = np.arange(rows) % classes
    predicted = np.where(random.random(rows) < f1, labels, (labels + 1) % classes) * (not collapsed)
    frame = pd.DataFrame({"label": labels, "prediction": predicted})
    frame.to_csv(folder / "predictions.csv.gz", index_label="row", compression={"method": "gzip", "compresslevel": 1})

    healed = f1 - 0.3 * f1 * np.exp(-np.arange(1.0, 11)) - 0.003 * random.random(10)
    healed[8] = f1
    epochs = pd.DataFrame({"epoch": range(1, 11), "train_loss": 1 - healed, "eval_loss": 1 - healed})
    epochs = epochs.assign(accuracy=healed, weighted_f1=healed)
    for half in "ab":
        epochs[f"weighted_f1_half_{half}"] = np.clip(healed + random.normal(0, 0.003, 10), 0, 1)
    epochs.to_csv(folder / "epochs.csv", index=False)

    tensor = {"name": "encoder.layer.3.attention.self.query.weight", "layer": 4, "kind": "Linear.weight"}
    tensor |= {"method": "kaiming_uniform", "bound": 0.125, "count": 147456, "sha256_before": "0" * 64}
    result = {
        "weighted_f1": f1,
        "accuracy": f1,
        "best_epoch": 9,
        "epochs": 10,
        "command": f"OMP_NUM_THREADS=1 python train.py {' '.join(flags)}",
        "settings": made_of,
        "model": {"name": args.model, "revision": "0" * 40, "parameters": cost.weights_of(args.model)},
        "corruption": {"of_layers": layers, "tensors": [tensor] * int(TENSORS * layers * frac)},
        "batch": {"rows": 32, "accumulated": 1, "processes": 1, "halved": 0},
        "cut_off": [],
        "seconds": {"train": 50.0, "evaluate": 5.0, "total": 60.0},
        "finished": "2026-01-01T00:00:00.000+00:00",
        "device": {"type": "cpu", "name": "made up", "threads": 1},
        "versions": dict.fromkeys(("python", *train.PACKAGES), "made up"),
        "commit": None,
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def write_runs(flag_lists: list[list[str]], output_dir: Path, noise: float = 1.0) -> None:
    """Runs of the paper's cells, with its F1 but for noise of so many points."""
    random = np.random.default_rng(0)
    paper = aggregate.paper_cells().set_index(aggregate.PLACE)
    for flags in flag_lists:
        args, _ = settings.parse(flags)
        table = aggregate.table_of(args.pooling, args.tuning, args.dataset)
        frac = args.frac or 0
        side = {0: "none", 1: "all"}.get(frac, args.corrupt)
        cell = paper.loc[(table, args.model, float(100 * frac), side, args.dataset)]
        f1 = float(np.clip(cell["f1"] + noise * random.normal(), 1, 99.9)) / 100
        write_run(flags, f1, cell["collapsed"], output_dir, random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=960, help="about how many of the paper's 960 (default: all)")
    parser.add_argument("--output_dir", type=Path, help="keep everything in this folder (default: keep nothing)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        output_dir = args.output_dir or Path(scratch)
        flag_lists, seconds = grid.jobs(grid.PRESETS["paper"], {}), {}
        runs = flag_lists[:: max(1, len(flag_lists) // args.runs)]
        write_runs(runs, output_dir)
        for script in ("aggregate", "report"):
            started = time.perf_counter()
            command = [sys.executable, str(ROOT / f"{script}.py"), "--output_dir", str(output_dir)]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            seconds[script] = time.perf_counter() - started
        page, figures = output_dir / "report.html", [*output_dir.glob("figures/*")]
        size = sum(path.stat().st_size for path in figures)
        print(f"{len(runs)} runs: aggregate.py {seconds['aggregate']:.1f} s, report.py {seconds['report']:.1f} s")
        print(f"report.html {page.stat().st_size / 2**20:.1f} MiB, {len(figures)} figure files {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
