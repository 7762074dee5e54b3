"""Prepare data sets: the truncated train and test splits of the paper's Table 2.

    python data_prep.py                                  # the demo's two sets, embedded in installed packages
    python data_prep.py --dataset sst2 mrpc              # from the Hugging Face hub
    python data_prep.py --dataset sst2 --source DIR      # from DIR/sst2/train.parquet and validation.parquet
    python data_prep.py --dataset bbc_news --train_size 200 --test_size 100
    python data_prep.py --dataset path/to/mydata         # your own: its train.csv and test.csv; docs/data.md

Each set becomes one folder, data/<dataset>: a `datasets.DatasetDict` of `train` and `test` with the columns
`text` (or `sentence1` and `sentence2`) and `label`, and a `manifest.json` that says where every row came from.
Splits are stratified, seeded, disjoint, and do not depend on the order of the source. Table 2 itself, of the sets that
are prepared, is outputs/table2.csv. docs/data.md is the data card of each set.
"""

import argparse
import hashlib
import json
import re
import shutil
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from uuid import uuid4

import datasets
import numpy as np
import pandas as pd
from filelock import FileLock

from sources import (
    DATASETS,
    DEMO,
    EMBEDDED,
    HELP,
    DataError,
    Spec,
    is_text,
    one_line,
    own_source,
    read_folder,
    read_hub,
    read_own,
    refuse,
)

PREPARATION = 2  # raise it when the same source would give other rows: prepared sets are then made again
MANIFEST = ("dataset", "fingerprint", "request", "source", "dropped", "rows", "rows_per_class")


# ---- Check and split ----


def checked(frame: pd.DataFrame, spec: Spec) -> pd.DataFrame:
    """The frame with our column names and integer labels, or a DataError that names the first bad row."""
    wanted = [*(theirs for theirs, _ in spec.columns), "label"]
    if absent := [column for column in wanted if column not in frame]:
        raise DataError(f"column {absent[0]!r} is missing: the source has {', '.join(map(repr, frame.columns))}")
    if frame.empty:
        raise DataError("the source has no rows: mend the source")
    frame = frame[wanted].rename(columns=dict(spec.columns))
    last = len(spec.label_names) - 1
    faults = {"no label": frame["label"].isna(), f"a label outside 0 to {last}": ~frame["label"].isin(range(last + 1))}
    for _, column in spec.columns:
        faults[f"no {column}"] = frame[column].isna()
        faults[f"a {column} that is no text"] = ~frame[column].map(is_text)
        faults[f"an empty {column}"] = frame[column].map(lambda cell: isinstance(cell, str) and not cell.strip())
    refuse(faults)
    return frame.astype({"label": int})


def pool(parts: dict[str, pd.DataFrame], published: dict[str, int], spec: Spec, as_published: bool) -> pd.DataFrame:
    """The checked rows of several splits as one frame, in an order that does not depend on the source's.

    `key` is what a tokenizer sees of a row. Raises DataError if a split has not its published number of rows, unless
    the user gave sizes of their own (`as_published` false).
    """
    frames = []
    for split, rows in published.items():
        try:
            frames.append(checked(parts[split], spec))
        except DataError as error:
            raise DataError(f"{split}: {error}") from error
        if as_published and len(parts[split]) != rows:
            missing = rows - len(parts[split])
            raise DataError(
                f"{split} has {len(parts[split]):,} rows and {rows:,} are published, {abs(missing):,} too "
                f"{'few' if missing > 0 else 'many'}: get the whole source, or say --train_size and --test_size"
            )
    frame = pd.concat(frames, ignore_index=True)
    columns = [ours for _, ours in spec.columns]
    frame["key"] = frame[columns].map(normalised).agg("\x1f".join, axis=1)
    return frame.sort_values(["key", *columns, "label"], ignore_index=True)


def normalised(text: str) -> str:
    """The text with every run of white space as one blank: what a tokenizer sees of it."""
    return " ".join(text.split())


def without_duplicates(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
    """One row for each text, and what was dropped.

    Texts that differ only in white space count as the same: no tokenizer here tells them apart. A text with several
    labels keeps its most frequent one, the smallest at a tie.
    """
    votes = frame.value_counts(["key", "label"]).rename("votes").reset_index()
    label = votes.sort_values(["votes", "label"], ascending=[False, True]).drop_duplicates("key").set_index("key")
    kept = frame.drop_duplicates("key", ignore_index=True)
    kept["label"] = kept["key"].map(label["label"])
    return kept, {"duplicate_texts": len(frame) - len(kept), "labels_outvoted": len(votes) - len(label)}


def split_by_sentence(texts: list[str], labels: np.ndarray, test_size: int, seed: int) -> np.ndarray:
    """Which phrases are test phrases when whole sentences are held out (SST-2's phrases are parts of sentences).

    A sentence is a phrase that stands, token by token, inside no other. Sentences are held out one by one, in a
    seeded order that keeps the classes' shares, until `test_size` phrases stand in held-out sentences alone.
    Returns a boolean array of shape (phrases,): at least `test_size` are true, and none of them stands inside a
    phrase that is false.
    """
    tokens = [tuple(text.split()) for text in texts]
    phrase_of = {phrase: row for row, phrase in enumerate(tokens)}

    def phrases_inside(row: int) -> set[int]:
        words = tokens[row]
        spans = (words[a:b] for a in range(len(words)) for b in range(a + 1, len(words) + 1))
        return {phrase_of[span] for span in spans if span in phrase_of}

    inside = [phrases_inside(row) for row in range(len(tokens))]
    parts = set().union(*(found - {row} for row, found in enumerate(inside)))
    sentences = np.random.default_rng(seed).permutation([row for row in range(len(tokens)) if row not in parts])
    # stratified: the k-th of n sentences of a class stands at k/n of the way
    by_class = pd.Series(labels[sentences])
    progress = (by_class.groupby(by_class).cumcount() + 0.5) / by_class.map(by_class.value_counts())

    sentences_left = defaultdict(int)
    for sentence in sentences:
        for phrase in inside[sentence]:
            sentences_left[phrase] += 1
    held_out = np.zeros(len(tokens), dtype=bool)
    for sentence in sentences[progress.argsort(kind="stable")]:
        if held_out.sum() >= test_size:
            break
        for phrase in inside[sentence]:
            sentences_left[phrase] -= 1
            held_out[phrase] = sentences_left[phrase] == 0
    return held_out


def stratified(frame: pd.DataFrame, size: int | None, seed: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`size` rows (None: all) with the classes' shares of the frame, and the rows left over, both shuffled.

    Each class gets its share rounded down; the rows then still wanted go to the largest remainders.
    """
    frame = frame.sample(frac=1, random_state=seed)
    size = len(frame) if size is None else size
    if size > len(frame):
        raise DataError(f"{size:,} rows are wanted but {len(frame):,} are there: {size - len(frame):,} too few")
    share = frame["label"].value_counts().sort_index() * size / max(len(frame), 1)
    quota = share.astype(int)
    quota[(quota - share).nsmallest(size - quota.sum()).index] += 1
    taken = frame.groupby("label").cumcount() < frame["label"].map(quota)
    return frame[taken], frame[~taken]


def split(
    parts: dict[str, pd.DataFrame], spec: Spec, train_size: int | None, test_size: int | None, seed: int
) -> tuple[pd.DataFrame, pd.DataFrame, dict]:
    """Train and test rows, every class in both, and what was dropped. Sizes that are None are the spec's.

    What is taken whole stays as it was published, duplicates too. What is drawn from has no duplicates and no text of
    the other part; where both are whole, the texts they share are counted as `shared_texts_kept`.
    """
    given = {"train": train_size, "test": test_size}
    sizes = {"train": train_size or spec.train_size, "test": test_size or spec.test_size}
    if spec.test_from is None:
        rows, dropped = without_duplicates(pool(parts, spec.train_from, spec, not any(given.values())))
        if spec.by_sentence:
            held_out = split_by_sentence(rows["text"].tolist(), rows["label"].to_numpy(), sizes["test"], seed)
            test, train = stratified(rows[held_out], test_size, seed)[0], rows[~held_out]
        else:
            test, train = stratified(rows, sizes["test"], seed)
        dropped |= {"shared_texts": 0, "shared_texts_kept": 0}
    else:
        dropped = {"duplicate_texts": 0, "labels_outvoted": 0}
        pools = {}
        for name, source in (("train", spec.train_from), ("test", spec.test_from)):
            pools[name] = pool(parts, source, spec, as_published=given[name] is None)
            if sizes[name]:
                pools[name], found = without_duplicates(pools[name])
                dropped = {what: count + found[what] for what, count in dropped.items()}
        shared = set(pools["train"]["key"]) & set(pools["test"]["key"])
        drawn = next((name for name in ("train", "test") if sizes[name]), None)
        if drawn:
            pools[drawn] = pools[drawn][~pools[drawn]["key"].isin(shared)]
        dropped |= {"shared_texts": len(shared) if drawn else 0, "shared_texts_kept": 0 if drawn else len(shared)}
        train, test = pools["train"], stratified(pools["test"], sizes["test"], seed)[0]
    train = stratified(train, sizes["train"], seed)[0]
    for name, part in (("train", train), ("test", test)):
        if missing := sorted(set(range(len(spec.label_names))) - set(part["label"])):
            names = ", ".join(spec.label_names[label] for label in missing)
            how = "choose a larger size" if sizes[name] else "every class must be in both splits"
            raise DataError(f"the {name} split of {len(part):,} rows has no row of {names}: {how}")
    if test["label"].value_counts().max() < 2:
        raise DataError("the test split has one row of each class, and none for its second half: more are needed")
    return train, test, dropped


# ---- Prepare, whole or not at all ----


def own_names(data_dir: str | Path) -> list[str]:
    """The users' own sets that are prepared."""
    names = sorted(path.parent.name for path in Path(data_dir).glob("[!.]*/manifest.json"))
    names = [name for name in names if name not in DATASETS and is_prepared(name, data_dir)]
    return [name for name in names if manifest(name, data_dir)["dataset"] == name]


def located(dataset: str, data_dir: str | Path = "data") -> tuple[str, Path | None]:
    """The name of a data set and, if `dataset` is a folder of the user's own, that folder.

    Raises DataError if it is neither a known name, nor a folder that can be one, nor an own set's that is prepared.
    """
    if dataset in DATASETS:
        return dataset, None
    if not Path(dataset).is_dir():
        own = own_names(data_dir)
        if dataset in own:
            return dataset, None
        what = f"unknown data set {dataset!r}" if Path(dataset).name == dataset else f"{dataset} is no folder"
        raise DataError(
            f"{what}: choose from {', '.join([*DATASETS, *own])}, or give a folder with a train and a test file"
        )
    folder = Path(dataset).resolve()
    name, taken = folder.name, [*DATASETS, "tokens"]
    if not re.fullmatch(r"\w[\w .,=+-]{0,59}", name) or plain(name) in map(plain, taken):
        raise DataError(
            f"{dataset} cannot be prepared as {name!r}: rename the folder, to up to 60 letters, digits, blanks or "
            f"any of _.,=+-, other than {', '.join(taken)}"
        )
    if folder.is_relative_to(Path(data_dir).resolve() / name):
        raise DataError(
            f"{dataset} is where prepared rows go: give the name {name} for those, or move your own files elsewhere"
        )
    return name, Path(dataset)


def check_names(datasets: Iterable[str], data_dir: str | Path) -> None:
    """Raises DataError if one of them cannot be `located`, or two are folders of the same name."""
    folders = {}
    for dataset in datasets:
        name, folder = located(dataset, data_dir)
        if folder and folders.setdefault(name, folder).resolve() != folder.resolve():
            raise DataError(f"{folders[name]} and {folder} would both be prepared as {name}: rename one of the folders")


def plain(name: str) -> str:
    """The name as a file system or a table may confuse it with another: SST-2 and sst2 are one."""
    return re.sub(r"[\W_]", "", name).lower()


def prepare(
    dataset: str,
    source: str = "hub",
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "data",
    write: bool = True,
) -> dict:
    """Prepare one data set as `data_dir/<name>` and return its manifest; does nothing if just that is there.

    `dataset` is a known name or a user's own folder. `source` is "hub" or a folder that holds `<name>/<split>.parquet`;
    embedded sets are read from their package. Sizes are numbers of rows; None means Table 2's, or all of an own set's.
    Raises DataError, having written nothing. Nothing is written either if `write` is false.
    """
    name, folder = located(dataset, data_dir)
    if source != "hub" and (name in EMBEDDED or name not in DATASETS):
        where = "an installed package" if name in EMBEDDED else "its own folder"
        raise DataError(f"{name} is read from {where}, never from --source: leave --source out")
    for flag, size in (("--train_size", train_size), ("--test_size", test_size)):
        if size is not None and size < 1:
            raise DataError(f"{flag} {size} is no number of rows: give at least one for each class")
    if not 0 <= seed < 2**32:
        raise DataError(f"--seed {seed} is not from 0 to {2**32 - 1}")
    if (Path(data_dir) / name).exists() and not (Path(data_dir) / name / "manifest.json").is_file():
        raise DataError(
            f"{Path(data_dir) / name} was not made by data_prep.py: give another --data_dir or move it away"
        )
    spec = DATASETS.get(name)
    request = {"preparation": PREPARATION, "train_size": train_size, "test_size": test_size, "seed": seed}

    def there(provenance: dict) -> dict | None:
        """The manifest of a set that was prepared by this request, from a source that agrees with `provenance`."""
        made = manifest(name, data_dir) if is_prepared(name, data_dir) else {"request": None}
        return made if made["request"] == request and provenance.items() <= made["source"].items() else None

    try:
        if folder:
            spec, parts, provenance = read_own(folder)
        elif name not in DATASETS:
            if made := there({}):
                return made
            raise DataError("it was prepared with another size or seed: give the folder of its files, not its name")
        elif name in EMBEDDED:
            parts, provenance = EMBEDDED[name]()
        elif source != "hub":
            parts, provenance = read_folder(spec, Path(source) / name)
        elif made := there({"hub": "/".join(spec.hub)}):
            return made  # without asking the hub again
        else:
            parts, provenance = read_hub(spec)
        if made := there(provenance):
            return made
        train, test, dropped = split(parts, spec, train_size, test_size, seed)
    except ModuleNotFoundError as error:
        raise DataError(f"{name}: {error}: run pip install -r requirements.txt") from error
    except DataError as error:
        raise DataError(f"{name}: {error}") from error

    features = datasets.Features({column: datasets.Value("string") for _, column in spec.columns})
    features["label"] = datasets.ClassLabel(names=list(spec.label_names))
    data = datasets.DatasetDict(
        {
            part: datasets.Dataset.from_pandas(rows[list(features)], features=features, preserve_index=False)
            for part, rows in (("train", train), ("test", test))
        }
    )
    made = {
        "dataset": name,
        "fingerprint": fingerprint(data),
        "request": request,
        "source": provenance,
        "dropped": dropped,
        "rows": {part: len(rows) for part, rows in data.items()},
        "rows_per_class": {
            part: {spec.label_names[label]: int(n) for label, n in rows["label"].value_counts().sort_index().items()}
            for part, rows in (("train", train), ("test", test))
        },
    }
    if write:
        save(data, made, Path(data_dir))
    return made


def save(data: datasets.DatasetDict, made: dict, data_dir: Path) -> None:
    """Write the set and its manifest aside, then rename: a folder that bears the set's name is whole."""
    name = made["dataset"]
    aside = data_dir / f".{name}.partial"
    datasets.disable_progress_bars()
    try:
        with locked(name, data_dir):
            shutil.rmtree(aside, ignore_errors=True)
            data.save_to_disk(aside)
            (aside / "manifest.json").write_text(json.dumps(made, indent=2) + "\n")
            shutil.rmtree(data_dir / name, ignore_errors=True)
            aside.rename(data_dir / name)
    except OSError as error:
        raise DataError(f"{name}: {data_dir} cannot be written: {one_line(error)}") from error


def ready(dataset: str, data_dir: str | Path = "data", write: bool = True) -> dict:
    """The manifest of a data set, which is prepared first, and said to be, if it is not `up_to_date`.

    An own set of which the files have changed keeps the sizes and the seed that it was prepared with.
    """
    if made := up_to_date(dataset, data_dir):
        return made
    name, folder = located(dataset, data_dir)
    asked, why = {}, f"is not in {data_dir} yet: preparing it"
    if is_prepared(name, data_dir):
        asked = {key: manifest(name, data_dir)["request"][key] for key in ("train_size", "test_size", "seed")}
        why = f"in {data_dir} is from other files than {folder} has now: preparing it anew"
    if write:
        print(f"{name} {why} as data_prep.py does")
    made = prepare(dataset, data_dir=data_dir, write=write, **asked)
    if write:
        print(summary(made, data_dir))
    return made


def summary(made: dict, data_dir: str | Path) -> str:
    dropped = made["dropped"]
    shared = [(dropped["shared_texts"], "left out"), (dropped["shared_texts_kept"], "kept")]
    shared = "".join(f"{count:,} texts shared by train and test {what}, " for count, what in shared if count)
    return (
        f"{made['dataset']}: {made['rows']['train']:,} train and {made['rows']['test']:,} test rows, "
        f"{len(made['rows_per_class']['test'])} classes, {dropped['duplicate_texts']} duplicates dropped, {shared}"
        f"fingerprint {made['fingerprint'][:8]} -> {Path(data_dir) / made['dataset']}"
    )


# ---- What the later scripts read ----


def is_prepared(name: str, data_dir: str | Path = "data") -> bool:
    try:
        return manifest(name, data_dir)["request"]["preparation"] == PREPARATION
    except DataError:
        return False


def up_to_date(dataset: str, data_dir: str | Path = "data") -> dict | None:
    """The manifest of a data set that is prepared, an own folder's only if its files are still those."""
    name, folder = located(dataset, data_dir)
    made = manifest(name, data_dir) if is_prepared(name, data_dir) else None
    return made if made and (folder is None or made["source"] == own_source(folder)) else None


def manifest(name: str, data_dir: str | Path = "data") -> dict:
    """What was prepared: source, counts, request and fingerprint. Raises DataError if nothing was."""
    try:
        made = json.loads((Path(data_dir) / name / "manifest.json").read_text())
        return {key: made[key] for key in MANIFEST}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{name} is not prepared in {data_dir}: run python data_prep.py --dataset {name}") from error


def fingerprint_of(name: str, data_dir: str | Path = "data") -> str | None:
    """The fingerprint of the prepared set; None if nothing is prepared."""
    return manifest(name, data_dir)["fingerprint"] if is_prepared(name, data_dir) else None


def lock(path: Path) -> FileLock:
    """A lock that the system takes from a process that dies. Where the file system has none, acquiring it fails."""
    return FileLock(path, fallback_to_soft=False)


@contextmanager
def locked(name: str, data_dir: str | Path) -> Iterator[None]:
    """Keeps others from putting other rows in the set's place. Raises DataError where that is not possible."""
    try:
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        held = lock(Path(data_dir) / f".{name}.lock").acquire()
    except OSError as error:
        raise DataError(f"{name}: {data_dir} cannot be written: {one_line(error)}") from error
    with held:
        yield


def load(name: str, data_dir: str | Path = "data") -> datasets.DatasetDict:
    """The prepared set. Raises DataError if its rows are not those that its manifest's fingerprint stands for."""
    with locked(name, data_dir):
        made, folder = manifest(name, data_dir), Path(data_dir) / name
        try:
            data = datasets.load_from_disk(str(folder))
            intact = fingerprint(data) == made["fingerprint"]
        except (OSError, ValueError) as error:
            raise DataError(f"{folder} cannot be read ({one_line(error)}): delete it and prepare it again") from error
    if not intact:
        raise DataError(f"{folder} was changed after it was prepared: delete it and prepare it again")
    return data


def fingerprint(data: datasets.DatasetDict) -> str:
    """sha256 over every cell of both splits, in order, and the label names."""
    digest = hashlib.sha256()
    for part, rows in data.items():
        digest.update(json.dumps([part, len(rows), rows.features["label"].names]).encode())
        for batch in rows.iter(batch_size=1_000):
            digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def table2(data_dir: str | Path = "data") -> pd.DataFrame:
    """The paper's Table 2 of the sets that are prepared, users' own last; balanced if no class has twice the rows of
    another."""
    made = [manifest(name, data_dir) for name in [*DATASETS, *own_names(data_dir)] if is_prepared(name, data_dir)]
    classes = [pd.DataFrame(m["rows_per_class"]).sum(axis=1) for m in made]
    return pd.DataFrame(
        {
            "dataset": m["dataset"],
            "classes": len(rows),
            "train": m["rows"]["train"],
            "test": m["rows"]["test"],
            "balanced": "yes" if rows.max() < 2 * rows.min() else "no",
            **m["dropped"],
            "fingerprint": m["fingerprint"],
        }
        for m, rows in zip(made, classes, strict=True)
    )


def write_table2(data_dir: str | Path, output_dir: str | Path) -> Path:
    """Write Table 2 of the sets that are prepared as `output_dir/table2.csv`. Raises DataError where it cannot."""
    try:
        Path(output_dir).mkdir(parents=True, exist_ok=True)
        with whole(Path(output_dir) / "table2.csv") as path:
            table2(data_dir).to_csv(path, index=False)
    except OSError as error:
        raise DataError(f"{output_dir}/table2.csv cannot be written: {one_line(error)}") from error
    return Path(output_dir) / "table2.csv"


@contextmanager
def whole(path: Path) -> Iterator[Path]:
    """A path to write to, renamed to `path` at the end: the file appears whole or not at all."""
    aside = path.with_name(f".partial-{uuid4().hex}-{path.name}")  # others may be writing the same
    try:
        yield aside
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and examples
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--dataset", nargs="+", default=DEMO, metavar="NAME", help=f"{HELP} (default: {' '.join(DEMO)})"
    )
    parser.add_argument(
        "--source", default="hub", help="hub, or a folder with <dataset>/<split>.parquet (default: hub)"
    )
    parser.add_argument("--train_size", type=int, metavar="N", help="rows (default: Table 2's, or all of your own)")
    parser.add_argument("--test_size", type=int, metavar="N", help="rows (default: Table 2's, or all of your own)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--data_dir", default="data", help="where the prepared sets go (default: %(default)s)")
    parser.add_argument("--output_dir", default="outputs", help="where table2.csv goes (default: %(default)s)")
    args = parser.parse_args()
    try:
        check_names(args.dataset, args.data_dir)
        for dataset in args.dataset:
            made = prepare(dataset, args.source, args.train_size, args.test_size, args.seed, args.data_dir)
            print(summary(made, args.data_dir))
        print(f"Table 2 -> {write_table2(args.data_dir, args.output_dir)}")
    except DataError as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
