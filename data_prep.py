"""Prepare data sets: the truncated train and test splits of the paper's Table 2.

    python data_prep.py                                  # the demo's two sets, embedded in installed packages
    python data_prep.py --dataset sst2 mrpc              # from the Hugging Face hub
    python data_prep.py --dataset sst2 --source DIR      # from DIR/sst2/train.parquet and validation.parquet
    python data_prep.py --dataset bbc_news --train_size 200 --test_size 100
    python data_prep.py --dataset path/to/mydata         # your own: its train.csv and test.csv; docs/data.md

Each set becomes one folder, data/<dataset>: a `datasets.DatasetDict` of `train` and `test` with the columns
`text` (or `sentence1` and `sentence2`), `label`, `source_row`, the row's number in its source, and `group` where rows
belong together (SST-2's sentences); and a `manifest.json` that says what was read. Splits are stratified, seeded,
disjoint, and do not depend on the order of the source; a test split that is taken whole keeps it. Table 2 of the sets
that are prepared is data/table2.csv. docs/data.md is the data card of each set.
"""

import json
import re
import shutil
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from hashlib import sha256
from pathlib import Path
from unicodedata import normalize

import datasets
import numpy as np

import data_sources
from common import (
    USER_ERRORS,
    InputError,
    RunError,
    atomic_write,
    explain,
    file_lock,
    make_parser,
    one_line,
    run_script,
)
from data_sources import DATASETS, DEMO, HELP, doubts, own_source, read_source
from splits import split

SPLIT_VERSION = 3  # raise it when the same source would give other rows: prepared sets are then made again


# ---- Prepare, whole or not at all ----


def own_names(data_dir: str | Path) -> list[str]:
    """The users' own sets that are prepared."""
    names = {path.parent.name for path in Path(data_dir).glob("[!.]*/manifest.json")} - {*DATASETS}
    return [name for name in sorted(names) if (find_manifest(name, data_dir) or {}).get("dataset") == name]


def resolve_dataset(dataset: str, data_dir: str | Path = "data") -> tuple[str, Path | None]:
    """The name of a data set and, if `dataset` is a folder of the user's own, that folder. Raises InputError if it is
    neither a known name, nor a folder that can be one, nor an own set that is prepared."""
    if dataset in DATASETS:
        return dataset, None
    if not Path(dataset).is_dir():
        known = [*DATASETS, *own_names(data_dir)]
        if dataset in known:
            return dataset, None
        what = f"unknown data set {dataset!r}" if Path(dataset).name == dataset else f"{dataset} is not a folder"
        raise InputError(f"{what}: choose from {', '.join(known)}, or give a folder with a train and a test file")
    folder = Path(dataset).resolve()
    name, taken = normalize("NFC", folder.name), [*DATASETS, "tokens", "table2.csv"]
    plain = re.sub(r"[\W_]", "", name).lower()  # as a file system or a table may confuse it: SST-2 and sst2 are one
    if not re.fullmatch(r"\w[\w .,=+-]{0,59}", name) or plain in [re.sub(r"[\W_]", "", known) for known in taken]:
        rule = f"up to 60 letters, digits, blanks or any of _.,=+-, other than {', '.join(taken)}"
        raise InputError(f"{dataset} cannot be prepared as {name!r}: rename the folder, to {rule}")
    if folder.is_relative_to(Path(data_dir).resolve() / name):
        raise InputError(f"{dataset} is where prepared rows go: give the name {name}, or move your own files elsewhere")
    return name, Path(dataset)


def check_names(names: Iterable[str], data_dir: str | Path) -> None:
    """Raises InputError if one of them cannot be resolved, or two are folders of the same name."""
    folders = {}
    for dataset in names:
        name, folder = resolve_dataset(dataset, data_dir)
        if folder and folders.setdefault(name, folder).resolve() != folder.resolve():
            raise InputError(f"{folders[name]} and {folder} would both be prepared as {name}: rename one of them")


def prepare(
    dataset: str,
    source: str = "hub",
    train_size: int | None = None,
    test_size: int | None = None,
    seed: int = 0,
    data_dir: str | Path = "data",
    write: bool = True,
) -> dict:
    """Prepare one data set as `data_dir/<name>` and return its manifest; does nothing if just that is prepared.

    `dataset` is a known name or a user's own folder. `source` is "hub" or a folder that holds `<name>/<split>.parquet`;
    embedded sets are read from their package. Sizes are numbers of rows; None means Table 2's, or all of an own set's.
    Raises InputError, having written nothing. Writes nothing either if `write` is false.
    """
    name, folder = resolve_dataset(dataset, data_dir)
    for flag, size in (("--train_size", train_size), ("--test_size", test_size)):
        if size is not None and not 1 <= size < 2**31:
            raise InputError(f"{flag} {size} is not a number of rows: give at least one for each class")
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed {seed} is not from 0 to {2**32 - 1}")
    target = Path(data_dir) / name
    if target.exists() and not (target / "manifest.json").is_file():
        raise InputError(f"{target} was not made by data_prep.py: give another --data_dir or move it away")
    request = {"split_version": split_version(name), "train_size": train_size, "test_size": test_size, "seed": seed}
    stored = find_manifest(name, data_dir)
    same = stored and stored["request"] == request
    hub = DATASETS[name].hub if name in DATASETS else None  # None: a user's own set
    if same and source == "hub" and not folder and stored["source"].get("hub") == hub:
        return stored  # does not ask the hub again, nor for an own set's files
    with explain(name, InputError):
        spec, parts, origin = read_source(name, folder, source)
        if same and stored["source"] == origin:
            return stored
        rows, dropped = split(parts, spec, {"train": train_size, "test": test_size}, seed)
    for doubt in doubts(spec.label_names):
        print(f"{name}: {doubt}", file=sys.stderr)
    numbers = {name: datasets.Value("int64") for name in ("source_row", "group") if name in rows["test"]}
    features = {column: datasets.Value("string") for _, column in spec.columns}
    features = datasets.Features(features, label=datasets.ClassLabel(names=list(spec.label_names)), **numbers)
    data, rows_per_class = datasets.DatasetDict(), {}
    for part, frame in rows.items():
        data[part] = datasets.Dataset.from_pandas(frame[list(features)], features=features, preserve_index=False)
        rows_per_class[part] = dict(zip(spec.label_names, np.bincount(frame["label"]).tolist(), strict=True))
    record = {"dataset": name, "fingerprint": fingerprint(data), "request": request, "source": origin}
    record |= {"dropped": dropped, "rows": data.num_rows, "rows_per_class": rows_per_class}
    if write:
        aside = target.with_name(f".{name}.partial")  # renamed at the end: the folder with the set's name is whole
        datasets.disable_progress_bars()
        with explain(f"{name}: {data_dir} cannot be written", OSError), locked(name, data_dir):
            shutil.rmtree(aside, ignore_errors=True)
            data.save_to_disk(aside)
            (aside / "manifest.json").write_text(json.dumps(record, indent=2) + "\n")
            shutil.rmtree(target, ignore_errors=True)
            aside.rename(target)
    return record


def ensure_prepared(dataset: str, data_dir: str | Path = "data", write: bool = True) -> dict:
    """The manifest of a data set; prepares the set first, and says so, if it is not `up_to_date`. An own set whose
    files have changed keeps the sizes and the seed that it was prepared with."""
    if record := up_to_date(dataset, data_dir):
        return record
    name, folder = resolve_dataset(dataset, data_dir)
    sizes, why = {}, f"is not in {data_dir} yet: preparing it"
    if stored := find_manifest(name, data_dir):
        sizes = {key: stored["request"][key] for key in ("train_size", "test_size", "seed")}
        why = f"in {data_dir} is from other files than {folder} has now: preparing it anew"
    if write:
        print(f"{name} {why} as data_prep.py does")
    record = prepare(dataset, data_dir=data_dir, write=write, **sizes)
    if write:
        print(summary(record, data_dir))
    return record


def summary(record: dict, data_dir: str | Path) -> str:
    dropped = record["dropped"]
    shared = [(dropped["shared_texts"], "left out"), (dropped["shared_texts_kept"], "kept")]
    shared = "".join(f"{count:,} texts shared by train and test {what}, " for count, what in shared if count)
    return (
        f"{record['dataset']}: {record['rows']['train']:,} train and {record['rows']['test']:,} test rows, "
        f"{len(record['rows_per_class']['test'])} classes, {dropped['duplicate_texts']} duplicates dropped and "
        f"{dropped['duplicate_texts_kept']} kept, {shared}"
        f"fingerprint {record['fingerprint'][:8]} -> {Path(data_dir) / record['dataset']}"
    )


# ---- What the later scripts read ----


def split_version(name: str) -> str:
    """The rules by which rows are split: the version of this code, and a digest of the set's own entry."""
    return f"{SPLIT_VERSION}-{sha256(repr(DATASETS.get(name)).encode()).hexdigest()[:8]}"


def find_manifest(name: str, data_dir: str | Path = "data") -> dict | None:
    """What was prepared: source, counts, request and fingerprint. None if nothing was, or by other rules than now."""
    try:
        record = json.loads((Path(data_dir) / name / "manifest.json").read_text())
        return record if record["request"]["split_version"] == split_version(name) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def manifest(name: str, data_dir: str | Path = "data") -> dict:
    """The manifest of a prepared set. Raises InputError if there is none."""
    if record := find_manifest(name, data_dir):
        return record
    raise InputError(f"{name} is not prepared in {data_dir}: run python data_prep.py --dataset {name}")


def fingerprint_of(name: str, data_dir: str | Path = "data") -> str | None:
    """The fingerprint of the prepared set; None if nothing is prepared."""
    return (find_manifest(name, data_dir) or {}).get("fingerprint")


def up_to_date(dataset: str, data_dir: str | Path = "data") -> dict | None:
    """The manifest of a data set that is prepared. None if it is not, or if the files of an own folder have changed."""
    name, folder = resolve_dataset(dataset, data_dir)
    record = find_manifest(name, data_dir)
    return record if record and (folder is None or record["source"] == own_source(folder)) else None


@contextmanager
def locked(name: str, data_dir: str | Path) -> Iterator[None]:
    """Nobody else replaces the set's rows inside the block. Raises InputError where the folder cannot be locked."""
    with explain(f"{name}: {data_dir} cannot be written", OSError):
        Path(data_dir).mkdir(parents=True, exist_ok=True)
        lock = file_lock(Path(data_dir) / f".{name}.lock").acquire()
    with lock:
        yield


def load(name: str, data_dir: str | Path = "data", planned: str | None = None) -> datasets.DatasetDict:
    """The prepared set. Raises InputError if its rows are not those that its manifest's fingerprint stands for, and
    RunError if that is not the one that was `planned`."""
    folder = Path(data_dir) / name
    with locked(name, data_dir):
        record = manifest(name, data_dir)
        if planned not in (None, record["fingerprint"]):
            raise RunError(f"{name} was prepared anew after this run was planned: start it again")
        with explain(f"{folder} cannot be read: delete it and prepare it again", OSError, ValueError):
            data = datasets.load_from_disk(str(folder))
            if fingerprint(data) == record["fingerprint"]:
                return data
    raise InputError(f"{folder} was changed after it was prepared: delete it and prepare it again")


def fingerprint(data: datasets.DatasetDict) -> str:
    """The sha256 of every cell of both splits, in order, and of the label names."""
    digest = sha256()
    for part, rows in data.items():
        digest.update(json.dumps([part, len(rows), rows.features["label"].names]).encode())
        for batch in rows.iter(batch_size=1_000):
            digest.update(json.dumps(batch).encode())
    return digest.hexdigest()


def write_table2(data_dir: str | Path) -> Path:
    """Write Table 2 of the sets that are prepared, users' own last, as `data_dir/table2.csv`."""
    path = Path(data_dir) / "table2.csv"
    manifests = [find_manifest(name, data_dir) for name in [*DATASETS, *own_names(data_dir)]]
    with explain(f"{path} cannot be written", OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as aside:
            data_sources.table2(filter(None, manifests)).to_csv(aside, index=False)
    return path


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--dataset", nargs="+", default=DEMO, metavar="NAME", help=f"{HELP} (default: the demo's two)")
    parser.add_argument("--source", default="hub", help="hub (default), or a folder with <dataset>/<split>.parquet")
    for flag in ("--train_size", "--test_size"):
        parser.add_argument(flag, type=int, metavar="N", help="rows (default: Table 2's, or all of your own)")
    parser.add_argument("--seed", type=int, default=0, help="of the split (default: %(default)s)")
    parser.add_argument("--data_dir", default="data", help="where the prepared sets go (default: %(default)s)")
    args = parser.parse_args()
    try:
        check_names(args.dataset, args.data_dir)
        for dataset in args.dataset:
            record = prepare(dataset, args.source, args.train_size, args.test_size, args.seed, args.data_dir)
            print(summary(record, args.data_dir))
        print(f"Table 2 -> {write_table2(args.data_dir)}")
    except USER_ERRORS as error:
        parser.error(one_line(error))


if __name__ == "__main__":
    run_script(main)
