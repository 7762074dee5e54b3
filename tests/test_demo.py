"""The demo line itself, shortened: data_prep, grid, aggregate, as run_all.sh calls them."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd

import grid
import settings

ROOT = Path(__file__).parent.parent


def script(name: str, *flags: object) -> subprocess.CompletedProcess:
    command = [sys.executable, f"{name}.py", *map(str, flags)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)


def test_the_demo_line(tmp_path: Path) -> None:
    data, outputs = tmp_path / "my data", tmp_path / "my outputs"
    prepared = script("data_prep", "--train_size", 40, "--test_size", 20, "--data_dir", data)
    assert prepared.returncode == 0, prepared.stderr
    flags = ["--data_dir", data, "--output_dir", outputs, "--max_steps", 1]

    listed = script("grid", *flags, "--preset", "demo", "--dry_run")
    assert listed.stdout.count("missing python train.py --model minilm") == 12 and not outputs.exists()
    assert "floating-point operations in the encoders: about" in listed.stdout

    # something stands where one run's folder should be: that run fails, the eleven others are done
    blocked = settings.plan([*grid.jobs(grid.PRESETS["demo"], {})[1], *map(str, flags)]).folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    done = script("grid", *flags)
    assert done.returncode == 1 and "1 of 12 runs failed" in done.stderr
    assert blocked.name in done.stderr.splitlines()[-1]
    results = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/result.json")}
    assert len(results) == 11
    # where there is no terminal a line for each run, and nothing that moves a cursor
    lines = re.findall(r"(?m)^\[(\d+) of 12(?:, about \d+ (?:s|min) left)?\] (failed: )?", done.stdout)
    assert [int(number) for number, _ in lines] == list(range(1, 13)) and len({failed for _, failed in lines}) == 2
    assert "".join(done.stdout.split("\n")).isprintable() and "".join(done.stderr.split("\n")).isprintable()

    # the same command does what is missing, and only that
    blocked.unlink()
    done = script("grid", *flags)
    assert done.returncode == 0 and "12 runs: 11 are there, 1 to do" in done.stdout, done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())

    # the command that stands in a worker's result gives the same numbers, to the last digit, in a process of its own
    for run in (run for run in outputs.glob("runs/minilm*bottom-50*")):
        command = json.loads((run / "result.json").read_text())["command"]
        paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        again = subprocess.run(
            f"{command} --output_dir '{tmp_path}/again'", shell=True, cwd=ROOT, env=paths, timeout=300
        )
        assert again.returncode == 0
        for name in ("epochs.csv", "predictions.csv.gz"):
            assert (tmp_path / "again" / "runs" / run.name / name).read_bytes() == (run / name).read_bytes()

    tables = script("aggregate", "--output_dir", outputs)
    assert tables.returncode == 0 and "12 cells from 12 runs, 0 cells missing" in tables.stdout, tables.stderr
    by_tuning = {tuning: pd.read_csv(outputs / f"table{number}.csv") for tuning, number in (("full", 1), ("probe", 4))}
    for tuning, columns in (("full", 6), ("probe", 4)):
        assert by_tuning[tuning]["corruption"].tolist() == ["0%", "50% (1-3)", "100% (1-6)"]
        assert by_tuning[tuning].shape == (3, columns) and by_tuning[tuning].notna().all(axis=None)
    for path in outputs.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        table = by_tuning[result["settings"]["tuning"]]
        cell = table.loc[table["corruption"].str.startswith(f"{result['settings']['percent']:g}%")]
        side = "top" if result["settings"]["side"] == "top" else "bottom"
        label = {"bbc_news": "BBC News", "rotten_tomatoes": "Rotten Tomatoes"}[result["settings"]["dataset"]]
        assert cell[f"{label} {side}"].item() == round(100 * result["weighted_f1"], 2)

    # the features are gone with the grid; Figure 1 has a point for each test row in each of its four panels
    assert not (outputs / "features").exists()
    drawn = script("figure1", "--output_dir", outputs)
    assert drawn.returncode == 0, drawn.stderr
    assert (outputs / "figure1_minilm_bbc_news.png").stat().st_size > 10_000
    assert len(pd.read_csv(outputs / "figure1_minilm_bbc_news.csv")) == 4 * 20
    assert pd.read_csv(outputs / "table2.csv")["train"].tolist() == [40, 40]
