"""How long planning, tables and page take for the paper's 960 runs, how much memory, and how large the page is.

    python benchmarks/page.py [--runs 960] [--rows N] [--epochs 10] [--output_dir DIR]

Planning is grid.py's dry run of so many runs of the embedded model, of which none is there, or all. The other runs are
made up: predictions with the paper's F1 for each cell and noise of a point for each run, constant ones for its
outliers, of the size of Table 2's test splits or of N rows. More than 960 runs have further seeds. With --output_dir
the runs, the tables and the page stay there. Memory is never less than this script's own, with which a process begins.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd

sys.path.insert(0, str(Path(__file__).parent.parent))

import common
import config
import cost
import data_prep
import grid
import paper
import places
import resolve
import run_dir
import stats
from aggregate import PLACE
from config import RunConfig

ROOT = Path(__file__).parent.parent
TENSORS = 16  # of a layer


def draw(
    rows: int, classes: int, outlier: float | None, curve: np.ndarray, random: np.random.Generator
) -> pd.DataFrame:
    """Labels, and for each epoch predictions with that F1. One class has the share whose constant prediction has the
    F1 of the data set's outlier, if the paper has one; the others are alike."""
    share = np.full(classes, 1 / classes) if outlier is None else (outlier + np.sqrt(outlier**2 + 8 * outlier)) / 4
    share = share if outlier is None else np.array([share, *[(1 - share) / (classes - 1)] * (classes - 1)])
    labels = np.repeat(range(classes), np.diff(np.round(np.cumsum([0, *share]) * rows).astype(int)))
    place = np.concatenate([random.permutation(count) for count in np.bincount(labels)])  # within its class
    wrong = place[:, None] < np.round((1 - curve) * rows / classes)  # as many in each class
    guesses = (labels[:, None] + wrong * random.integers(1, classes, (rows, 1))) % classes
    order = np.random.default_rng(0).permutation(rows)  # the same for all runs
    columns = {f"epoch_{k}": guess[order] for k, guess in enumerate(guesses.T, 1)}
    return pd.DataFrame({"row": range(rows), "label": labels[order], **columns})


def write_run(
    wanted: RunConfig, curve: np.ndarray, outlier: float | None, collapsed: bool, rows: int | None, classes: int | None,
    random: np.random.Generator,
) -> None:  # fmt: skip
    """A run's folder as train.py leaves it, with about these F1 (0 to 1) by epoch, or predicting only one class."""
    layers = cost.shape_of(wanted.model).num_hidden_layers
    place = places.select_layers(wanted.corrupt, wanted.frac, layers)
    settings = {"results_version": config.RESULTS_VERSION, "model": wanted.model, "dataset": wanted.dataset}
    settings |= {"model_fingerprint": wanted.model.ljust(64, "0"), "data_fingerprint": wanted.dataset.ljust(64, "0")}
    settings |= {"side": place.side, "frac": str(place.frac), "percent": float(100 * place.frac)}
    settings |= config.NEUTRAL_VALUES | {k: v for k, v in vars(wanted).items() if k in config.NEUTRAL_VALUES}
    folder = Path(wanted.output_dir) / "runs" / config.run_name(settings)
    folder.mkdir(parents=True)

    names = data_prep.DATASETS[wanted.dataset].label_names[:classes]
    train, test = cost.count_rows(wanted.dataset, "")
    predictions = draw(rows or test, len(names), outlier, curve, random)
    predictions.iloc[:, 2:] *= not collapsed
    labels, guesses = predictions["label"], predictions.iloc[:, 2:].to_numpy()
    gzip = {"method": "gzip", "compresslevel": 1}
    predictions.to_csv(folder / "predictions.csv.gz", index=False, compression=gzip)
    scores = stats.score_epochs(labels.to_numpy(), guesses, stats.split_halves(labels), len(names))
    scores = pd.concat([pd.DataFrame({"train_loss": 1 - curve, "eval_loss": 1 - curve}), scores], axis=1)
    scores.set_index(np.arange(1.0, len(curve) + 1)).to_csv(folder / "epochs.csv", index_label="epoch")
    best = scores["weighted_f1"].idxmax()

    tensor = {"name": "encoder.layer.3.attention.self.query.weight", "layer": 4, "kind": "Linear.weight"}
    tensor |= {"method": "kaiming_uniform", "bound": 0.125, "count": 147456, "sha256_before": "0" * 64}
    tensor |= {"sha256_after": "0" * 64}
    counts = dict(zip(names, np.bincount(labels).tolist(), strict=True))
    result = {
        "weighted_f1": scores["weighted_f1"][best].item(),
        "accuracy": scores["accuracy"][best].item(),
        "best_epoch": best + 1.0,
        "epochs": len(curve),
        "command": f"OMP_NUM_THREADS=1 python train.py {' '.join(wanted.flags())}",
        "settings": settings,
        "model": {"name": wanted.model, "revision": "0" * 40, "parameters": cost.encoder_weights(wanted.model)},
        "data": {
            "request": dict.fromkeys(("train_size", "test_size"), None) | {"seed": 0},
            "dropped": {"duplicate_texts": 0},
            "rows": {"train": train, "test": len(labels)},
            "rows_per_class": {"train": dict.fromkeys(names, train // len(names)), "test": counts},
        },
        "corruption": {
            "num_layers": layers,
            "place": str(place),
            "relative_change": None,
            "layers": [layer + 1 for layer in place.layers],
            "tensors": [tensor] * (TENSORS * len(place.layers)),
        },
        "resumed_from": [],
        "seconds": {"train": 50.0, "evaluate": 5.0, "total": 60.0},
        "finished": "2026-01-01T00:00:00.000+00:00",
        "device": {"type": "cpu", "name": "made up", "threads": 1},
        "versions": dict.fromkeys(("python", "torch", "transformers"), "made up"),
        "commit": None,
        "files": run_dir.list_files(folder),
    }
    common.write_signed(folder / "result.json", result)


def write_runs(
    runs: list[RunConfig], noise: float = 1.0, rows: int | None = None, classes: int | None = None, epochs: int = 10
) -> None:
    """Runs of the paper's cells, with its F1 but for noise of so many points."""
    random = np.random.default_rng(0)
    cells = paper.published_cells().set_index(PLACE)
    outliers = cells[cells["collapsed"]].groupby("dataset")["f1"].first() / 100
    for wanted in runs:
        table, frac = paper.table_of(wanted.pooling, wanted.tuning, wanted.dataset), wanted.frac or 0
        side = {0: "none", 1: "all"}.get(frac, wanted.corrupt)
        cell = cells.loc[(table, wanted.model, float(100 * frac), side, wanted.dataset)]
        f1 = float(np.clip(cell["f1"] + noise * random.normal(), 1, 99.9)) / 100
        curve = f1 - 0.3 * f1 * np.exp(-np.arange(1.0, epochs + 1)) - 0.003 * random.random(epochs)
        curve[-1] = f1
        write_run(wanted, curve, outliers.get(wanted.dataset), cell["collapsed"], rows, classes, random)


def plan(count: int) -> None:
    """Time the dry run of about so many runs, none of which is there, and all."""
    with tempfile.TemporaryDirectory() as folder:
        axes = {"model": ("minilm",), "dataset": data_prep.DEMO, "seed": tuple(range(-(-count // 24)))}
        flags = ["--preset", "table1", "--data_dir", f"{folder}/data", "--output_dir", folder]
        flags += [word for name, values in axes.items() for word in (f"--{name}", *map(str, values))]
        for name in data_prep.DEMO:
            data_prep.prepare(name, data_dir=f"{folder}/data")
        runs = grid.expand(paper.PRESETS["table1"], axes, {"data_dir": f"{folder}/data", "output_dir": folder})
        for state in ("none is", "all are"):
            if state == "all are":
                for run in map(resolve.resolve_run, runs):
                    run.folder.mkdir(parents=True)
                    common.write_signed(run.folder / "result.json", {"settings": run.settings, "files": {}})
            time_script("grid", *flags, "--dry_run", label=f"--dry_run of {len(runs)} runs, {state} there")


def time_script(name: str, *flags: str, label: str = "") -> None:
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, str(ROOT / f"{name}.py"), *flags], stdout=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        sys.exit(f"{name}.py failed")
    print(f"{name}.py {label} {time.perf_counter() - started:.1f} s, {used.ru_maxrss / 2**10:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], usage=argparse.SUPPRESS)
    parser.add_argument("--runs", type=int, default=960, help="about how many (default: the paper's 960)")
    parser.add_argument("--rows", type=int, help="of each test split (default: Table 2's)")
    parser.add_argument("--epochs", type=int, default=10, help="of each run (default: 10)")
    parser.add_argument("--output_dir", type=Path, help="keep everything in this folder (default: keep nothing)")
    args = parser.parse_args()
    plan(args.runs)
    with tempfile.TemporaryDirectory() as scratch:
        output_dir, seeds = args.output_dir or Path(scratch), -(-args.runs // 960)
        runs = grid.expand(paper.PRESETS["paper"], {"seed": tuple(range(seeds))}, {"output_dir": str(output_dir)})
        runs = runs[:: max(1, len(runs) // args.runs)]
        write_runs(runs, rows=args.rows, epochs=args.epochs)
        print(f"{len(runs)} runs:", flush=True)
        for script in ("aggregate", "report"):
            time_script(script, "--output_dir", str(output_dir))
        page, figures = output_dir / "report.html", [*output_dir.glob("figures/*")]
        size = sum(path.stat().st_size for path in figures)
        print(f"report.html {page.stat().st_size / 2**20:.1f} MiB, {len(figures)} figure files {size / 2**20:.1f} MiB")


if __name__ == "__main__":
    main()
