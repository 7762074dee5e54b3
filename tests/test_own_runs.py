"""A user's own folder goes wherever a data set's name does: one run, a grid, the tables. test_own_data.py reads it."""

import json
import shlex
import sys
from pathlib import Path

import pandas as pd
import pytest
from conftest import run_of
from test_own_data import BAD_FOLDERS, films, refused, write

import aggregate
import config
import cost
import data_prep
import grid
import run_dir
import train


@pytest.fixture
def mydata(tmp_path: Path) -> Path:
    return write(tmp_path / "sets" / "mydata", train=films(40), test=films(20, 40))


# What data_prep.py refuses, the grid refuses before it begins.
@pytest.mark.parametrize(("folders", "message"), BAD_FOLDERS)
def test_bad_folders(
    folders: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    paths = [str(write(tmp_path / folder, train=films(4), test=films(4))) for folder in folders]
    assert message in refused(grid, paths, tmp_path, monkeypatch, capsys)
    assert message in refused(grid, [*paths, "--dry_run"], tmp_path, monkeypatch, capsys)


def flags_of(dataset: Path | str, model: Path, tmp_path: Path) -> list[str]:
    where = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "outputs")]
    return ["--model", str(model), "--dataset", str(dataset), *where, "--max_steps", "1", "--disable_tqdm", "True"]


# The run is the set's by its name, and the same one by path and by name; what the command says is what was typed.
# Files that change are prepared anew, with the sizes that were asked for; a path that is gone is never its name.
def test_train(mydata: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    flags = flags_of(mydata, tiny_bert, tmp_path)
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()
    assert "mydata is not in" in capsys.readouterr().out
    (path,) = tmp_path.glob("outputs/runs/*/result.json")
    result = json.loads(path.read_text())
    assert result["settings"]["dataset"] == "mydata" and f"--dataset {mydata} " in result["command"]
    assert result["data"]["rows"] == {"train": 40, "test": 20} and "_mydata@" in path.parent.name
    predictions = pd.read_csv(path.with_name("predictions.csv.gz"))
    assert predictions["label"].tolist() == data_prep.load("mydata", tmp_path / "data")["test"]["label"]

    by_name = run_of(flags_of("mydata", tiny_bert, tmp_path))
    assert run_dir.load_valid_result(by_name) == result and run_of(flags).folder == by_name.folder == path.parent
    assert capsys.readouterr().out == ""

    data_prep.prepare(str(mydata), train_size=30, data_dir=tmp_path / "data")
    films(50).to_csv(mydata / "train.csv", index=False)
    again = run_of(flags)
    assert f"mydata in {tmp_path}/data is from other files than {mydata} has now" in (output := capsys.readouterr().out)
    assert "30 train and 20 test rows" in output and "10 texts shared by train and test left out" in output
    assert again.data["rows"] == {"train": 30, "test": 20} and again.folder != by_name.folder

    mydata.rename(mydata.with_name("elsewhere"))
    assert run_of(flags_of("mydata", tiny_bert, tmp_path)).folder == again.folder
    assert "mydata is not a folder: choose from sst2, " in refused(
        train, [str(mydata), *flags[:2]], tmp_path, monkeypatch, capsys
    )


# A dry run counts the rows and writes nothing; the grid's workers do the runs, the tables have the set's name. Once its
# files have changed, they are not there.
def test_grid(
    mydata: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = [*flags_of(mydata, tiny_bert, tmp_path), "--learning_rate", "1e-3"]
    place = str(mydata), str(tmp_path / "data")

    def output_of(*more: str) -> str:
        what = ["--preset", "table1", "--frac", "0", "0.5", "--corrupt", "none", "top", "--jobs", "1"]
        monkeypatch.setattr(sys, "argv", ["grid.py", *flags, *what, *more])
        grid.main()
        return capsys.readouterr().out

    before = sorted(tmp_path.rglob("*"))
    listed = output_of("--dry_run")
    assert listed.count(f"missing python train.py --model {tiny_bert}") == 2 and "2 runs: 0 are there" in listed
    assert listed.endswith("; a run needs 1.4 GB of memory at most\n")  # Python and its packages; the model is tiny
    assert f"{mydata} is not prepared" in listed and sorted(tmp_path.rglob("*")) == before
    assert cost.count_rows(*place) == (40, 20) and cost.count_tokens(*place, 64) == (40 * 64, 20 * 64)
    assert "2 runs: 0 are there, 2 to do" in output_of() and "2 runs: 2 are there, 0 to do" in output_of("--dry_run")
    cost.row_lengths.cache_clear()
    assert cost.count_tokens(*place, 64) == (40 * 4, 20 * 4)  # [CLS] film 7 [SEP]

    monkeypatch.setattr(sys, "argv", ["aggregate.py", "--output_dir", str(tmp_path / "outputs")])
    aggregate.main()
    table = pd.read_csv(tmp_path / "outputs" / "table1.csv")
    assert list(table) == ["model", "corruption", "mydata bottom", "mydata top"]
    assert table["mydata top"].notna().all() and len(table) == 2
    words = shlex.split(listed.splitlines()[0])[3:]  # without: missing python train.py
    run = config.RunConfig(**config.parse_flags(config.run_parser(train.__doc__), words))
    assert grid.find_run(run)
    films(50).to_csv(mydata / "train.csv", index=False)
    assert not grid.find_run(run)
    assert data_prep.manifest("mydata", tmp_path / "data")["rows"]["train"] == 40
