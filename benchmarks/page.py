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

import config
import corrupt
import cost
import data_prep
import grid
import paper
import run_dir
from aggregate import PLACE
from config import RunConfig

ROOT = Path(__file__).parent.parent
TENSORS = 16  # of a layer


def write_run(wanted: RunConfig, f1: float, collapsed: bool, output_dir: Path, random: np.random.Generator) -> None:
    """A run's folder as train.py leaves it, whose best epoch has about this F1 (0 to 1)."""
    layers = cost.shape_of(wanted.model).num_hidden_layers
    side, frac, corrupted = corrupt.select_layers(wanted.corrupt, wanted.frac, layers)
    settings = {"results_version": config.RESULTS_VERSION, "model": wanted.model, "dataset": wanted.dataset}
    settings |= {"model_fingerprint": wanted.model.ljust(64, "0"), "data_fingerprint": wanted.dataset.ljust(64, "0")}
    settings |= {"side": side, "frac": str(frac), "percent": float(100 * frac)}
    settings |= config.NEUTRAL_VALUES | {k: v for k, v in vars(wanted).items() if k in config.NEUTRAL_VALUES}
    folder = output_dir / "runs" / config.run_name(settings)
    folder.mkdir(parents=True)

    rows, classes = cost.count_rows(wanted.dataset, "")[1], len(data_prep.DATASETS[wanted.dataset].label_names)
    labels = np.arange(rows) % classes
    predicted = np.where(random.random(rows) < f1, labels, (labels + 1) % classes) * (not collapsed)
    frame = pd.DataFrame({"label": labels, "prediction": predicted})
    frame.to_csv(folder / "predictions.csv.gz", index_label="row", compression={"method": "gzip", "compresslevel": 1})

    curve = f1 - 0.3 * f1 * np.exp(-np.arange(1.0, 11)) - 0.003 * random.random(10)
    curve[8] = f1
    epochs = pd.DataFrame({"epoch": range(1, 11), "train_loss": 1 - curve, "eval_loss": 1 - curve})
    epochs = epochs.assign(accuracy=curve, weighted_f1=curve)
    for half in "ab":
        epochs[f"weighted_f1_half_{half}"] = np.clip(curve + random.normal(0, 0.003, 10), 0, 1)
    epochs.to_csv(folder / "epochs.csv", index=False)

    tensor = {"name": "encoder.layer.3.attention.self.query.weight", "layer": 4, "kind": "Linear.weight"}
    tensor |= {"method": "kaiming_uniform", "bound": 0.125, "count": 147456, "sha256_before": "0" * 64}
    result = {
        "weighted_f1": f1,
        "accuracy": f1,
        "best_epoch": 9,
        "epochs": 10,
        "command": f"OMP_NUM_THREADS=1 python train.py {' '.join(wanted.flags())}",
        "settings": settings,
        "model": {"name": wanted.model, "revision": "0" * 40, "parameters": cost.encoder_weights(wanted.model)},
        "corruption": {"num_layers": layers, "tensors": [tensor] * (TENSORS * len(corrupted))},
        "resumed_from": [],
        "seconds": {"train": 50.0, "evaluate": 5.0, "total": 60.0},
        "finished": "2026-01-01T00:00:00.000+00:00",
        "device": {"type": "cpu", "name": "made up", "threads": 1},
        "versions": dict.fromkeys(("python", "torch", "transformers"), "made up"),
        "commit": None,
        "files": run_dir.list_files(folder),
    }
    (folder / "result.json").write_text(json.dumps(result, indent=1))


def write_runs(runs: list[RunConfig], output_dir: Path, noise: float = 1.0) -> None:
    """Runs of the paper's cells, with its F1 but for noise of so many points."""
    random = np.random.default_rng(0)
    cells = paper.published_cells().set_index(PLACE)
    for wanted in runs:
        table, frac = paper.table_of(wanted.pooling, wanted.tuning, wanted.dataset), wanted.frac or 0
        side = {0: "none", 1: "all"}.get(frac, wanted.corrupt)
        cell = cells.loc[(table, wanted.model, float(100 * frac), side, wanted.dataset)]
        f1 = float(np.clip(cell["f1"] + noise * random.normal(), 1, 99.9)) / 100
        write_run(wanted, f1, cell["collapsed"], output_dir, random)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=960, help="about how many of the paper's 960 (default: all)")
    parser.add_argument("--output_dir", type=Path, help="keep everything in this folder (default: keep nothing)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        output_dir = args.output_dir or Path(scratch)
        runs, seconds = grid.expand(paper.PRESETS["paper"], {}), {}
        runs = runs[:: max(1, len(runs) // args.runs)]
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
