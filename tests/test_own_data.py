"""A user's own folder of train and test files: what is read, and what is refused. test_own_runs.py has its runs."""

import csv
import os
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import datasets
import pandas as pd
import pytest

import data_prep

WRITE = {
    "csv": lambda frame, path: frame.to_csv(path, index=False),
    "tsv": lambda frame, path: frame.to_csv(path, index=False, sep="\t", quoting=csv.QUOTE_NONNUMERIC),
    "jsonl": lambda frame, path: frame.to_json(path, orient="records", lines=True),
    "parquet": lambda frame, path: frame.to_parquet(path),
}
# what a reader that guesses loses or mistakes
TEXTS = ["NA", "null", "2020-01-01", "007", " a blank before", 'he said "no", twice', "tab\there", "two\nlines", "Ж 🎬"]


def write(folder: Path, kind: str = "csv", **parts: pd.DataFrame) -> Path:
    folder.mkdir(parents=True)
    for split, frame in parts.items():
        WRITE[kind](frame, folder / f"{split}.{kind}")
    return folder


def films(rows: int, first: int = 0) -> pd.DataFrame:
    numbers = range(first, first + rows)
    return pd.DataFrame([(f"film {i}", ("bad", "good")[i % 2]) for i in numbers], columns=["text", "label"])


def rows_of(data: datasets.Dataset) -> list[tuple]:
    """In the order of the user's file, with the classes' names."""
    names = data.features["label"].names
    rows = sorted(data, key=lambda row: row.pop("source_row"))
    return [tuple({**row, "label": names[row["label"]]}.values()) for row in rows]


# Each format, its rows in another order, gives the rows that were written, and `source_row` says where each stood; the
# test rows stay in their order. Columns that are not asked for may hold anything.
def test_formats(tmp_path: Path) -> None:
    frame = pd.DataFrame({"note": None, "label": [(10, 2, -1)[i % 3] for i in range(9)], "text": TEXTS})
    splits = []
    for seed, kind in enumerate(WRITE):
        parts = {"train": frame.sample(frac=1, random_state=seed), "test": frame[:6]}
        folder, data_dir = write(tmp_path / kind / "mydata", kind, **parts), tmp_path / f"{kind} data"
        manifest = data_prep.prepare(str(folder), data_dir=data_dir)
        data = data_prep.load("mydata", data_dir)
        assert data["train"].features["label"].names == ["-1", "2", "10"]
        for split, part in parts.items():
            assert rows_of(data[split]) == list(zip(part["text"], part["label"].map(str), strict=True))
        assert data["test"]["source_row"][:] == list(range(6))
        assert manifest["rows_per_class"] == {"train": {"-1": 3, "2": 3, "10": 3}, "test": {"-1": 2, "2": 2, "10": 2}}
        assert manifest["dropped"]["shared_texts_kept"] == 6
        hashes = {path.name: sha256(path.read_bytes()).hexdigest() for path in folder.iterdir()}
        assert manifest["source"] == {"folder": "mydata", "files": hashes}
        splits.append((data["train"]["text"][:], data["test"]["text"][:]))
    assert splits[0] == splits[1] == splits[2] == splits[3]


@pytest.mark.parametrize("kind", WRITE)
def test_pairs(kind: str, tmp_path: Path) -> None:
    frame = pd.DataFrame({"sentence2": TEXTS, "label": ["yes", "no", "no"] * 3, "sentence1": TEXTS[::-1]})
    folder = write(tmp_path / "pairs", kind, train=frame, test=frame[:3])
    data_prep.prepare(str(folder), data_dir=tmp_path / "data")
    data = data_prep.load("pairs", tmp_path / "data")
    assert data["train"].column_names == ["sentence1", "sentence2", "label", "source_row"]
    assert rows_of(data["train"]) == list(zip(TEXTS[::-1], TEXTS, frame["label"], strict=True))


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
    manifest = data_prep.prepare(str(write(tmp_path / "x", kind, train=frame, test=frame)), data_dir=tmp_path / "data")
    assert list(manifest["rows_per_class"]["train"]) == names


# What may be a class or a slip counts as classes, and a line says so; what is plain says nothing.
@pytest.mark.parametrize(
    ("labels", "lines"),
    [
        (["-1", "NA", "none", "x"], ["though they may stand for rows without a label: -1, NA, none"]),
        (["a", "A", "\uff21", "b"], ["though they look alike: A, a, \uff21"]),
        (["None", "none"], ["though they may stand for rows without a label: None, none", "look alike: None, none"]),
        (["01", "1", "1e5", "v1.0", "inf"], []),
    ],
)
def test_doubtful_classes(labels: list, lines: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    frame = pd.DataFrame({"text": map(str, range(2 * len(labels))), "label": labels * 2})
    manifest = data_prep.prepare(str(write(tmp_path / "x", train=frame, test=frame)), data_dir=tmp_path / "data")
    assert list(manifest["rows_per_class"]["train"]) == sorted(labels)
    told = capsys.readouterr().err.splitlines()
    assert len(told) == len(lines) and all(map(str.endswith, told, lines))


# Names and paths of any language, in any locale: `\u00e9` may be one character or two, and the set's name is one.
@pytest.mark.parametrize("name", ["caf\u00e9", "cafe\u0301"])
def test_names(name: str, tmp_path: Path) -> None:
    folder = write(tmp_path / "a b" / name, train=films(4), test=films(4))
    command = [sys.executable, "data_prep.py", "--dataset", str(folder), "--data_dir", str(tmp_path / "d \u00e9")]
    options = {"cwd": Path(data_prep.__file__).parent, "env": os.environ | {"LC_ALL": "C"}, "capture_output": True}
    assert subprocess.run(command, **options, check=True).stderr == b""
    assert data_prep.own_names(tmp_path / "d \u00e9") == ["caf\u00e9"]
    assert data_prep.up_to_date(str(folder), tmp_path / "d \u00e9")["rows"] == {"train": 4, "test": 4}
    assert pd.read_csv(tmp_path / "d \u00e9" / "table2.csv")["dataset"].tolist() == ["caf\u00e9"]


# Of 40 train rows 10 are again in test, and 2 stand twice. Whole, all stay, and the leak is told; where sizes are given
# what is drawn from has neither. Table 2 has the set after those that are known.
def test_sizes_and_shared_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    folder = write(tmp_path / "a set", train=pd.concat([films(38), films(2)]), test=films(30, 28))
    data_prep.prepare("bbc_news", train_size=20, test_size=10, data_dir=tmp_path / "data")

    def output_of(*flags: str) -> str:
        where = ["--dataset", str(folder), "--data_dir", str(tmp_path / "data")]
        monkeypatch.setattr(sys, "argv", ["data_prep.py", *where, *flags])
        data_prep.main()
        return capsys.readouterr().out

    shared = "10 texts shared by train and test"
    assert (
        f"a set: 40 train and 30 test rows, 2 classes, 0 duplicates dropped and 2 kept, {shared} kept, fing"
        in output_of()
    )
    table = pd.read_csv(tmp_path / "data" / "table2.csv")
    assert table["dataset"].tolist() == ["bbc_news", "a set"] and table["shared_texts_kept"].tolist() == [0, 10]
    assert f"28 train and 30 test rows, 2 classes, 2 duplicates dropped and 0 kept, {shared} left out" in output_of(
        "--train_size", "28"
    )
    data = data_prep.load("a set", tmp_path / "data")
    assert sorted(data["train"]["text"]) == sorted(films(28)["text"]) and data["train"]["label"].count(1) == 14
    assert "40 train and 20 test rows" in output_of("--test_size", "20")
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
        ({"train.csv": "text,label\né,x\n".encode("latin-1")}, "cannot be read as csv: 'utf-8' codec can't decode"),
        ({"train.csv": b"text,label\nb,y\nhello, world,x\n"}, "line 3: there are 3 cells and the header has 2"),
        ({"train.csv": b"text,label\nb\n"}, "line 2: there are 1 cells"),
        ({"train.csv": b'text,label\n"a,x\nb,y\n'}, "line 2: unexpected end of data (put a cell"),
        ({"train.csv": b'text,label\nb,y\n"a,x\nc"",y\nd",x\n'}, "line 3: a quoted cell holds a separator and a line"),
        ({"train.csv": b'text,label\nb,y\na "quote,x\n"c, d\re",x\n'}, "line 4: a quoted cell holds a separator"),
        (
            {"train.csv": None, "train.tsv": b'text\tlabel\n"a\tx\nb"\ty\n'},
            "a quoted cell holds a separator and a line",
        ),
        ({"train.csv": b'text,label\n"a" b,x\nc,y\n'}, "line 2: ',' expected after '\"'"),
        ({"train.csv": b"text,label\na\0b,x\nc,y\n"}, "NUL"),
        ({"test.csv": b"text,label\na,x\nb,-1\n"}, "'-1' (GLUE's mark of rows without a label)"),
        ({"train.csv": b"text,label\na,nan\nb,y\n"}, "1 rows have no label"),
        ({"train.csv": b"text,label\na,1.0\nb,0\n"}, "a label that is a decimal number (regression is not supported"),
        ({"train.csv": b"text,label\na,01\nb,2\nc,1\n"}, "train has one class written in two ways, '01' and '1'"),
        ({"train.csv": b"text,label\na,3.25\nb,4e-1\n"}, "2 rows have a label that is a decimal number"),
        ({"train.csv": b"text,label\na,x\nb, \n"}, "1 rows have no label (the first is row 1)"),
        ({"train.csv": b"text,label\na,x\n ,y\n,y\n"}, "2 rows have an empty text (the first is row 1)"),
        # a byte order mark, a zero-width space, a word joiner: tokenizers drop them
        ({"train.csv": b"text,label\na,x\n\xef\xbb\xbf\xe2\x80\x8b\xe2\x81\xa0,y\n"}, "1 rows have an empty text"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": 0, "label": 1}\n'}, "a key stands twice"),
        ({"train.csv": b"text,label\na,x\nb,x\n"}, "the label 'x': there must be two classes at least"),
        ({"test.csv": b"text,label\na,x\nb,z\n"}, "a label in test that train lacks, 'z' (the first is row 1)"),
        ({"test.csv": b"text,label\na,x\nb,x\n"}, "the test split of 2 rows has no row of y: every class must"),
        ({"test.csv": b"text,label\na,x\nb,y\n"}, "none for its second half"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": "x"}\n[1]\n'}, "line 2 is not a JSON object"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": "x"}\n{"text\n'}, "line 2 is not JSON: "),
        ({"test.csv": None, "test.jsonl": b'{"text": 5, "label": "x"}\n'}, "a text that is not text"),
        ({"test.csv": None, "test.jsonl": b'{"text": "\\ud83d", "label": "x"}\n'}, "a text that is not text"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": null}\n'}, "1 rows have no label"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": 0.5}\n'}, "a label that is a decimal number"),
        ({"test.csv": None, "test.jsonl": b'{"text": "a", "label": [1]}\n'}, "neither an integer nor a text"),
        ({"test.csv": None, "test.parquet": b"PAR1 and nothing PAR1"}, "test.parquet: it cannot be read as parquet"),
        (
            {"test.csv": None, "test.parquet": BYTES},
            "2 rows have a text that is not text, or has a NUL (the first is row 0)",
        ),
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
    where = ["--data_dir", str(tmp_path / "data")]
    where += ["--output_dir", str(tmp_path / "outputs")] if script is not data_prep else []
    monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", "--dataset", *flags, *where])
    with pytest.raises(SystemExit) as exit_info:
        script.main()
    (error,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and sorted(tmp_path.rglob("*")) == before
    return error


# Names that are taken, also where they only look different; paths that do not exist; what would be overwritten.
BAD_FOLDERS = [
    (["sets/sst2"], "sst2 cannot be prepared as 'sst2': rename the folder"),
    (["sets/AG News"], "cannot be prepared as 'AG News'"),
    (["sets/tokens"], "cannot be prepared as 'tokens'"),
    (["sets/.hidden"], "cannot be prepared as '.hidden'"),
    (["sets/mydata", "more/mydata"], "would both be prepared as mydata"),
    (["data/mydata"], "is where prepared rows go"),
]


@pytest.mark.parametrize(
    ("folders", "message", "flags"),
    [
        *((*case, []) for case in BAD_FOLDERS),
        (["sets/mydata"], "mydata: it is read from its own folder, never from --source", ["--source", "."]),
        ([], "no/such/folder is not a folder: choose from sst2, ", ["no/such/folder"]),
    ],
)
def test_bad_folders(
    folders: list[str],
    message: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    paths = [str(write(tmp_path / folder, train=films(4), test=films(4))) for folder in folders]
    assert message in refused(data_prep, [*paths, *flags], tmp_path, monkeypatch, capsys)
