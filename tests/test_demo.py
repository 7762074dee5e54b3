"""The main job itself, shortened, as run_all.sh does it: rows, grid, tables, page; and one of its numbers in full."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import run_of

import data_prep
import grid
import paper
import resolve
import train

ROOT = Path(train.__file__).parent
AGAIN = """
import sys
import grid
for how in ([], ["--dry_run"]):
    sys.argv = ["grid.py", *sys.argv[1:], *how]
    grid.main()
print("train" in sys.modules)
"""


def script(*command: object) -> subprocess.CompletedProcess:
    command = [sys.executable, *map(str, command)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)


def test_the_main_job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    data, outputs = str(tmp_path / "my data"), tmp_path / "my outputs"
    prepared = script("data_prep.py", "--train_size", 40, "--test_size", 20, "--data_dir", data)
    assert prepared.returncode == 0, prepared.stderr
    assert pd.read_csv(Path(data) / "table2.csv")["train"].tolist() == [40, 40]
    flags = ["--data_dir", data, "--output_dir", str(outputs), "--max_steps", "1", "--jobs", "2"]

    monkeypatch.setattr(sys, "argv", ["grid.py", "--preset", "demo", *flags, "--dry_run"])
    grid.main()
    listed = capsys.readouterr().out
    assert listed.count("missing python train.py --model minilm") == 12 and not (outputs / "runs").exists()
    assert "12 runs: 0 are there, 12 to do" in listed and "floating-point operations in the encoders: about" in listed

    # something stands where one run's folder should be: that run fails, the eleven others are done
    shared = {"data_dir": data, "output_dir": str(outputs), "max_steps": 1}
    blocked = resolve.resolve_run(grid.expand(paper.PRESETS["demo"], {}, shared)[1]).folder
    blocked.parent.mkdir(parents=True)
    blocked.write_text("")
    done = script("grid.py", *flags)
    assert done.returncode == 1 and "1 of 12 runs failed" in done.stderr
    assert blocked.name in done.stderr.splitlines()[-1]
    results = {path: path.stat().st_mtime_ns for path in outputs.glob("runs/*/result.json")}
    assert len(results) == 11 and not list((outputs / "unfinished").iterdir())
    assert not (outputs / "features").exists()  # the features are gone with the grid
    # where there is no terminal a line for each run, and nothing that moves a cursor
    lines = re.findall(r"(?m)^\[(\d+) of 12(?:, about \d+ (?:s|min) left)?\] (failed: )?", done.stdout)
    assert [int(number) for number, _ in lines] == list(range(1, 13)) and len({failed for _, failed in lines}) == 2
    assert "".join(done.stdout.split("\n")).isprintable() and "".join(done.stderr.split("\n")).isprintable()

    # the same command does what is missing, and only that; and once more nothing, without importing what runs need
    blocked.unlink()
    monkeypatch.setattr(sys, "argv", ["grid.py", *flags])
    grid.main()
    assert "12 runs: 11 are there, 1 to do" in capsys.readouterr().out
    done = script("-c", AGAIN, *flags)
    assert done.stdout.count("12 runs: 12 are there, 0 to do") == 2 and done.stdout.endswith("False\n"), done.stderr
    assert all(path.stat().st_mtime_ns == time for path, time in results.items())

    # what was asked for is noted, each run under its folder's name
    (asked,) = json.loads((outputs / "asked.json").read_text()).items()
    assert asked[0].startswith("python grid.py --data_dir") and set(asked[1]) == {
        path.parent.name for path in results
    } | {blocked.name}

    # the command that stands in a result gives the same numbers, to the last digit, in a process of its own
    (run,) = outputs.glob("runs/minilm*bottom-50*bbc_news*full*")
    command = json.loads((run / "result.json").read_text())["command"]
    paths = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    again = f"{command} --output_dir '{tmp_path}/again'"
    subprocess.run(again, shell=True, cwd=ROOT, env=paths, timeout=600, check=True)
    for name in ("epochs.csv", "predictions.csv.gz"):
        assert (tmp_path / "again" / "runs" / run.name / name).read_bytes() == (run / name).read_bytes()

    tables = script("aggregate.py", "--output_dir", outputs)
    assert tables.returncode == 0 and "12 cells from 12 runs, 0 cells missing" in tables.stdout, tables.stderr
    assert pd.read_csv(outputs / "table2.csv")["train"].tolist() == [40, 40]
    by_tuning = {tuning: pd.read_csv(outputs / f"table{number}.csv") for tuning, number in (("full", 1), ("probe", 4))}
    for tuning, columns in (("full", 6), ("probe", 4)):
        assert by_tuning[tuning]["corruption"].tolist() == ["0%", "50% (1-3)", "100% (1-6)"]
        assert by_tuning[tuning].shape == (3, columns) and by_tuning[tuning].notna().all(axis=None)
    for path in outputs.glob("runs/*/result.json"):
        result = json.loads(path.read_text())
        table = by_tuning[result["settings"]["tuning"]]
        cell = table.loc[table["corruption"].str.startswith(f"{result['settings']['percent']:g}%")]
        side = "top" if result["settings"]["side"] == "top" else "bottom"
        label = paper.DATASETS[result["settings"]["dataset"]]
        assert cell[f"{label} {side}"].item() == round(100 * result["weighted_f1"], 2)

    # the page, and Figure 1, which has a point for each test row in each of its four panels
    page = script("report.py", "--output_dir", outputs)
    assert page.returncode == 0 and (outputs / "report.html").stat().st_size > 10_000, page.stderr
    assert (outputs / "figure1_minilm_bbc_news.png").stat().st_size > 10_000
    assert len(pd.read_csv(outputs / "figure1_minilm_bbc_news.csv")) == 4 * 20


# The demo's run of the uncorrupted model on the 160 and 150 rows of BBC News, as the grid does it. The last digits
# depend on the machine and on the number of threads.
def test_a_number_of_the_demo(tmp_path: Path) -> None:
    torch.set_num_threads(os.cpu_count())
    data_prep.prepare("bbc_news", data_dir=tmp_path / "data")
    flags = ["--model", "minilm", "--dataset", "bbc_news", "--learning_rate", "2e-4", "--num_train_epochs", "2"]
    flags += ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "outputs")]
    result = train.run_training(run_of(flags))
    assert result["data"]["rows"] == {"train": 160, "test": 150}
    assert result["weighted_f1"] == pytest.approx(0.8507, abs=0.06)
    torch.set_num_threads(1)
