"""The tables, from results written by hand: the paper's numbers must come out in the paper's places."""

import json
from pathlib import Path

import pandas as pd
import pytest

import aggregate

BASE, LARGE = "bert-base-uncased", "bert-large-uncased"


def write_result(
    output_dir: Path, model: str, side: str, percent: float, dataset: str, f1: float, **changes: object
) -> None:
    layers = 24 if model == LARGE else 12
    settings = {"model": model, "side": side, "percent": percent, "frac": str(percent / 100), "dataset": dataset}
    settings |= {"pooling": "cls", "tuning": "full", "learning_rate": 5e-5, "seed": 0, "num_train_epochs": 10.0}
    settings |= {"model_fingerprint": "a" * 64, "data_fingerprint": dataset.ljust(64, "0"), **changes}
    result = {"settings": settings, "weighted_f1": f1 / 100, "accuracy": f1 / 100, "best_epoch": 3, "epochs": 10}
    result |= {"corruption": {"of_layers": layers}, "seconds": {"total": 1.0}, "device": {"name": "cpu"}}
    result |= {"versions": {"torch": "2", "transformers": "5"}, "commit": None}
    name = "_".join(f"{value}" for value in settings.values())
    folder = output_dir / "runs" / name
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(json.dumps(result))


# Rows of the paper's Table 1, typed from its text.
PAPER = """
Base  0%         92.11 92.11
Base  25% (1-3)  90.16 91.72
Base  50% (1-6)  83.25 87.92
Base  100% (1-12) 75.17 75.17
Large 0%         93.22 93.22
Large 75% (1-18) 80.84 84.86
"""


def test_the_papers_layout(tmp_path: Path) -> None:
    names = {"Base": BASE, "Large": LARGE}
    for line in reversed(PAPER.strip().splitlines()):  # the order of the runs is no matter
        name, degree, *_, bottom, top = line.split()
        percent = float(degree.rstrip("%"))
        sides = {0: ["none"], 100: ["all"]}.get(percent, ["bottom", "top"])
        for side, f1 in zip(sides, (float(bottom), float(top)), strict=False):
            write_result(tmp_path, names[name], side, percent, "sst2", f1)
    table, there, missing = aggregate.paper_table(aggregate.make_cells(aggregate.read_runs(tmp_path)), "cls", "full")
    rows = [" ".join(row).split() for row in table.itertuples(index=False)]
    assert rows == [line.split() for line in PAPER.strip().splitlines()]
    assert list(table) == ["model", "corruption", "SST-2 bottom", "SST-2 top"]
    assert (there, missing) == (9, 0)
    assert "| Base    | 50% (1-6)    | 83.25          | **87.92**   |" in aggregate.markdown(table)


# Best learning rate by the mean over seeds: 1e-5 has (80 + 84) / 2 = 82, 5e-5 has (90 + 70) / 2 = 80.
def test_best_learning_rate_over_seeds(tmp_path: Path) -> None:
    for rate, seed, f1 in ((1e-5, 0, 80), (1e-5, 1, 84), (5e-5, 0, 90), (5e-5, 1, 70)):
        write_result(tmp_path, BASE, "none", 0, "sst2", f1, learning_rate=rate, seed=seed)
    (cell,) = aggregate.make_cells(aggregate.read_runs(tmp_path)).to_dict("records")
    assert cell["f1"] == pytest.approx(82) and cell["f1_std"] == pytest.approx(8**0.5)
    assert (cell["learning_rate"], cell["seeds"], cell["learning_rates_tried"]) == (1e-5, 2, "1e-05 5e-05")
    assert len(cell["runs"].split()) == 2


# A cell that was not run is empty and counted; runs of other settings get rows of their own; a probe is no cell here.
def test_missing_cells_and_variants(tmp_path: Path) -> None:
    write_result(tmp_path, BASE, "none", 0, "sst2", 90)
    write_result(tmp_path, BASE, "bottom", 50, "sst2", 80)
    write_result(tmp_path, BASE, "none", 0, "bbc_news", 95)
    write_result(tmp_path, BASE, "none", 0, "rotten_tomatoes", 85, tuning="probe")
    cells = aggregate.make_cells(aggregate.read_runs(tmp_path))
    table, there, missing = aggregate.paper_table(cells, "cls", "full")
    assert table.to_dict("split")["data"] == [
        ["Base", "0%", "90.00", "90.00", "95.00", "95.00"],
        ["Base", "50% (1-6)", "80.00", "", "", ""],
    ]
    assert (there, missing) == (3, 3)
    write_result(tmp_path, BASE, "none", 0, "sst2", 99, num_train_epochs=1.0)
    cells = aggregate.make_cells(aggregate.read_runs(tmp_path))
    table, _, _ = aggregate.paper_table(cells, "cls", "full")
    found = dict(zip(zip(table["model"], table["corruption"], strict=True), table["SST-2 bottom"], strict=True))
    assert found["Base num_train_epochs=1.0", "0%"] == "99.00"
    assert found["Base num_train_epochs=10.0", "0%"] == "90.00"


def test_files_and_an_empty_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["aggregate.py", "--output_dir", str(tmp_path)])
    with pytest.raises(SystemExit) as exit_info:
        aggregate.main()
    assert exit_info.value.code == 2 and "holds no result" in capsys.readouterr().err
    write_result(tmp_path, BASE, "top", 25, "sst2", 91.72)
    aggregate.main()
    assert "1 cells from 1 runs, 1 cells missing" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "results.csv")["f1"].tolist() == pytest.approx([91.72])
    assert {path.name for path in tmp_path.iterdir()} == {"runs", "results.csv", "cells.csv", "table1.csv", "table1.md"}
