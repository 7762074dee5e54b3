"""A user's own folder of train and test files: what is read, what is refused, and that it goes wherever a name does."""

import csv
import json
import shlex
import sys
from hashlib import sha256
from pathlib import Path

import datasets
import pandas as pd
import pytest

import aggregate
import cost
import data_prep
import grid
import settings
import train

WRITE = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_NONNUMERIC),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}
# what a reader that guesses would lose or mistake
TEXTS = ["NA", "null", "2020-01-01", "007", " a blank before", 'he said "no", twice', "tab\there", "two\nlines", "Ж 🎬"]


def write(folder: Path, kind: str = "csv", **parts: pd.DataFrame) -> Path:
    folder.mkdir(parents=True)
    for split, frame in parts.items():
        WRITE[kind](frame, folder / f"{split}.{kind}")
    return folder


def films(rows: int, first: int = 0) -> pd.DataFrame:
    numbers = range(first, first + rows)
    return pd.DataFrame([(f"film {i}", ("bad", "good")[i % 2]) for i in numbers], columns=["text", "label"])


@pytest.fixture
def mydata(tmp_path: Path) -> Path:
    return write(tmp_path / "sets" / "mydata", train=films(40), test=films(20, 40))


def rows_of(data: datasets.Dataset) -> list[tuple]:
    """In no order, with the classes' names."""
    names = data.features["label"].names
    return sorted(tuple({**row, "label": names[row["label"]]}.values()) for row in data)


# Each format, its rows in another order, gives the rows that were written, and so the same fingerprint. Columns that
# are not asked for may hold anything.
def test_formats(tmp_path: Path) -> None:
    frame = pd.DataFrame({"note": None, "label": [(10, 2, -1)[i % 3] for i in range(9)], "text": TEXTS})
    fingerprints = set()
    for seed, kind in enumerate(WRITE):
        parts = {"train": frame.sample(frac=1, random_state=seed), "test": frame[:6]}
        folder, data_dir = write(tmp_path / kind / "mydata", kind, **parts), tmp_path / f"{kind} data"
        made = data_prep.prepare(str(folder), data_dir=data_dir)
        data = data_prep.load("mydata", data_dir)
        assert data["train"].features["label"].names == ["-1", "2", "10"]
        for split, part in (("train", frame), ("test", frame[:6])):
            assert rows_of(data[split]) == sorted(zip(part["text"], part["label"].map(str), strict=True))
        assert made["rows_per_class"] == {"train": {"-1": 3, "2": 3, "10": 3}, "test": {"-1": 2, "2": 2, "10": 2}}
        assert made["dropped"]["shared_texts_kept"] == 6
        hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        assert made["source"] == {"folder": "mydata", "files": hashes}
        fingerprints.add(made["fingerprint"])
    assert len(fingerprints) == 1


@pytest.mark.parametrize("kind", WRITE)
def test_pairs(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"sentence2": TEXTS, "label": ["yes", "no", "no"] * 3, "sentence1": TEXTS[::-1]})
    folder = write(tmp_path / "pairs", kind, train=frame, test=frame[:3])
    data_prep.prepare(str(folder), data_dir=tmp_path / "data")
    data = data_prep.load("pairs", tmp_path / "data")
    assert data["train"].column_names == ["sentence1", "sentence2", "label"]
    assert rows_of(data["train"]) == sorted(zip(TEXTS[::-1], TEXTS, frame["label"], strict=True))


# Numbers in their order, whether a file has them as numbers or as text; else the alphabet.
@pytest.mark.parametrize(
    ("kind", "labels", "names"),
    [
        ("csv", [10, 9, -1], ["-1", "9", "10"]),
        ("jsonl", ["010", "9", "-1"], ["-1", "9", "010"]),
        ("parquet", [True, False, True], ["False", "True"]),
        ("tsv", ["b", "a ", "B"], ["B", "a", "b"]),
        ("jsonl", ["10", "9", "x"], ["10", "9", "x"]),
        ("jsonl", ["2020-01-02", "2020-01-01", "NA"], ["2020-01-01", "2020-01-02", "NA"]),
    ],
)
def test_order_of_the_classes(kind: str, labels: list, names: list[str], tmp_path: Path) -> None:
    frame = pd.DataFrame({"text": [f"text {i}" for i in range(6)], "label": labels * 2})
    made = data_prep.prepare(str(write(tmp_path / "x", kind, train=frame, test=frame)), data_dir=tmp_path / "data")
    assert list(made["rows_per_class"]["train"]) == names


# Of 40 train rows 10 are again in test, and 2 stand twice. Whole, all stay, and the leak is told; where sizes are given
# what is drawn from has neither. Table 2 has the set after those that are known.
def test_sizes_and_shared_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "a set", train=pd.concat([films(38), films(2)]), test=films(30, 28))
    data_prep.prepare("bbc_news", train_size=20, test_size=10, data_dir=tmp_path / "data")

    def said(*flags: str) -> str:
        where = ["--dataset", str(folder), "--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["data_prep.py", *where, *flags])
        data_prep.main()
        return capsys.readouterr().out

    shared = "10 texts shared by train and test"
    assert f"a set: 40 train and 30 test rows, 2 classes, 0 duplicates dropped, {shared} kept, fing" in said()
    table = pd.read_csv(tmp_path / "table2.csv")
    assert table["dataset"].tolist() == ["bbc_news", "a set"] and table["shared_texts_kept"].tolist() == [0, 10]
    assert f"28 train and 30 test rows, 2 classes, 2 duplicates dropped, {shared} left out" in said(
        "--train_size", "28"
    )
    data = data_prep.load("a set", tmp_path / "data")
    assert sorted(data["train"]["text"]) == sorted(films(28)["text"]) and data["train"]["label"].count(1) == 14
    assert "40 train and 20 test rows" in said("--test_size", "20")
    assert not {*data_prep.load("a set", tmp_path / "data")["test"]["text"]} & {*films(38)["text"]}


NO_LABEL = pd.DataFrame({"text": ["a", "b"], "label": pd.array([1, None], dtype="Int64")}).to_parquet()
BYTES = pd.DataFrame({"text": [b"a", b"b"], "label": ["x", "y"]}).to_parquet()
GOOD = b"text,label\na,x\nb,y\nc,x\n"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"train.csv": None}, "no train file: it needs one of train.csv, train.tsv, train.jsonl, train.parquet"),
        ({"test.csv": None}, "no test file"),
        ({"train.tsv": GOOD}, "train.csv and train.tsv: it needs one"),
        ({"train.csv": b""}, "there are none"),
        ({"train.csv": b"text,label\n"}, "train.csv: the source has no rows"),
        ({"test.csv": b"a good film,1\na bad film,0\n"}, "test.csv: the columns must be text and label"),
        ({"train.csv": b"text,text,label\na,b,x\n"}, "each once: there are 'text', 'text', 'label'"),
        ({"train.csv": b"text,sentence1,sentence2,label\na,b,c,x\n"}, "not both"),
        ({"train.csv": b"sentence1,sentence2,label\na,b,x\nc,d,y\n"}, "test: column 'sentence1' is missing"),
        ({"train.csv": "text,label\né,x\n".encode("latin-1")}, "cannot be read as csv in UTF-8"),
        ({"train.csv": b"text,label\nb,y\nhello, world,x\n"}, "line 3 has 3 cells and the header has 2"),
        ({"train.csv": b"text,label\nb\n"}, "line 2 has 1 cells"),
        ({"train.csv": b'text,label\n"a,x\nb,y\n'}, "unexpected end of data"),
        ({"train.csv": b"text,label\na,x\nb, \n"}, "1 rows have no label (the first is row 1)"),
        ({"train.csv": b"text,label\na,x\n ,y\n,y\n"}, "2 rows have an empty text (the first is row 1)"),
        ({"train.csv": b"text,label\na,x\nb,x\n"}, "the label 'x': there must be two classes at least"),
        ({"test.csv": b"text,label\na,x\nb,z\n"}, "a label in test that train lacks, 'z' (the first is row 1)"),
        ({"test.csv": b"text,label\na,x\nb,x\n"}, "the test split of 2 rows has no row of y: every class must"),
        ({"test.csv": b"text,label\na,x\nb,y\n"}, "none for its second half"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": "x"}\n[1]\n'}, "line 2 is no JSON object"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": "x"}\n{"text\n'}, "line 2 is no JSON: "),
        ({"test.csv": None, "test.jsonl": b'{"text": 5, "label": "x"}\n'}, "a text that is no text"),
        ({"test.csv": None, "test.jsonl": b'{"text": "\\ud83d", "label": "x"}\n'}, "a text that is no text"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": null}\n'}, "1 rows have no label"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": 0.5}\n'}, "neither an integer nor a text"),
        ({"test.csv": None, "test.parquet": b"PAR1 and nothing PAR1"}, "test.parquet: it cannot be read as parquet"),
        ({"test.csv": None, "test.parquet": BYTES}, "2 rows have a text that is no text (the first is row 0)"),
        ({"test.csv": None, "test.parquet": NO_LABEL}, "1 rows have no label (the first is row 1)"),
    ],
)
def test_bad_files(
    files: dict[str, bytes | None],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "own").mkdir()
    for name, content in ({"train.csv": GOOD, "test.csv": GOOD} | files).items():
        if content is not None:
            (tmp_path / "own" / name).write_bytes(content)
    assert message in refused(data_prep, [str(tmp_path / "own")], tmp_path, monkeypatch, capsys)


def refused(
    script: object,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> str:
    """The one line with which the script ends, having written nothing; its first flags are data sets."""
    before = sorted(tmp_path.rglob("*"))
    where = ["--data_dir", str(tmp_path / "data"), "--output_dir", str(tmp_path / "outputs")]
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--dataset", *flags, *where])
    with pytest.raises(SystemExit) as exit_info:
        script.main()
    (error,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and sorted(tmp_path.rglob("*")) == before
    return error


# Names that are taken, also where they only look different; paths that are not there; what would be overwritten.
@pytest.mark.parametrize(
    ("folders", "flags", "message"),
    [
        (["sets/sst2"], [], "sst2 cannot be prepared as 'sst2': rename the folder"),
        (["sets/AG News"], [], "cannot be prepared as 'AG News'"),
        (["sets/tokens"], [], "cannot be prepared as 'tokens'"),
        (["sets/.hidden"], [], "cannot be prepared as '.hidden'"),
        (["sets/mydata", "more/mydata"], [], "would both be prepared as mydata"),
        (["sets/mydata"], ["--source", "."], "mydata is read from its own folder, never from --source"),
        (["data/mydata"], [], "is where prepared rows go"),
    ],
)
def test_bad_folders(
    folders: list[str],
    flags: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    paths = [str(write(tmp_path / folder, train=films(4), test=films(4))) for folder in folders]
    assert message in refused(data_prep, [*paths, *flags], tmp_path, monkeypatch, capsys)
    if not flags:
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

    by_name = settings.plan(flags_of("mydata", tiny_bert, tmp_path))
    assert settings.result_of(by_name) == result and settings.plan(flags).folder == by_name.folder == path.parent
    assert capsys.readouterr().out == ""

    data_prep.prepare(str(mydata), train_size=30, data_dir=tmp_path / "data")
    films(50).to_csv(mydata / "train.csv", index=False)
    again = settings.plan(flags)
    assert f"mydata in {tmp_path}/data is from other files than {mydata} has now" in (said := capsys.readouterr().out)
    assert "30 train and 20 test rows" in said and "10 texts shared by train and test left out" in said
    assert again.data["rows"] == {"train": 30, "test": 20} and again.folder != by_name.folder

    mydata.rename(mydata.with_name("elsewhere"))
    assert settings.plan(flags_of("mydata", tiny_bert, tmp_path)).folder == again.folder
    assert "mydata is no folder: choose from sst2, " in refused(
        train, [str(mydata), *flags[:2]], tmp_path, monkeypatch, capsys
    )


# A dry run counts the rows and writes nothing; the grid's workers do the runs, the tables have the set's name. Once its
# files have changed, they are not there.
def test_grid(
    mydata: Path, tiny_bert: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    flags = [*flags_of(mydata, tiny_bert, tmp_path), "--learning_rate", "1e-3"]

    def said(*more: str) -> str:
        what = ["--preset", "table1", "--percent", "0", "50", "--corrupt", "none", "top", "--jobs", "1"]
        monkeypatch.setattr(sys, "argv", ["grid.py", *flags, *what, *more])
        grid.main()
        return capsys.readouterr().out

    before = sorted(tmp_path.rglob("*"))
    listed = said("--dry_run")
    assert listed.count(f"missing python train.py --model {tiny_bert}") == 2 and "2 runs: 0 are there" in listed
    assert f"{mydata} is not prepared" in listed and sorted(tmp_path.rglob("*")) == before
    assert cost.work([flags])[2:5] == (40 * 64 / 2, 1, 20 * 64)  # one of two batches, and one of 20 test rows
    assert "2 runs: 0 are there, 2 to do" in said() and "2 runs: 2 are there, 0 to do" in said("--dry_run")
    cost.tokens.cache_clear()
    assert cost.tokens(str(mydata), str(tmp_path / "data"), 64) == (40 * 4, 20 * 4)  # [CLS] film 7 [SEP]

    runs, *_ = aggregate.read_runs(tmp_path / "outputs")
    table = aggregate.paper_table(aggregate.make_cells(runs))
    assert list(table.text) == ["model", "corruption", "mydata bottom", "mydata top"]
    assert table.text["mydata top"].ne("").all() and len(table.text) == 2
    run = shlex.split(listed.splitlines()[0])[3:]  # without: missing python train.py
    assert grid.is_there(run)
    films(50).to_csv(mydata / "train.csv", index=False)
    assert not grid.is_there(run)
    assert data_prep.manifest("mydata", tmp_path / "data")["rows"]["train"] == 40
