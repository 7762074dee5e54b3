"""The splits of the paper's Table 2: check the rows of a source, and draw train and test rows from them.

Functions of frames alone. Splits are stratified, seeded and disjoint, and do not depend on the order of the source.
Used by data_prep.py.
"""

import unicodedata
from collections import Counter
from itertools import combinations

import numpy as np
import pandas as pd

from common import InputError, explain
from data_sources import DatasetSpec, Frames, is_text, refuse


def validate(frame: pd.DataFrame, spec: DatasetSpec) -> pd.DataFrame:
    """The frame with our column names and integer labels. Raises InputError that names the first bad row."""
    wanted = [*(theirs for theirs, _ in spec.columns), "label"]
    if absent := [column for column in wanted if column not in frame]:
        raise InputError(f"column {absent[0]!r} is missing: the source has {', '.join(map(repr, frame.columns))}")
    frame = frame[wanted].rename(columns=dict(spec.columns))
    last = len(spec.label_names) - 1
    faults = {"no label": frame["label"].isna(), "the label -1, which stands for none": frame["label"].isin([-1])}
    faults[f"a label that is not an integer from 0 to {last}"] = ~frame["label"].isin(range(last + 1))
    for _, column in spec.columns:
        faults[f"no {column}"] = frame[column].isna()
        faults[f"a {column} that is not text, or has a NUL"] = ~frame[column].map(is_text)
        faults[f"an empty {column}"] = frame[column].map(lambda cell: isinstance(cell, str) and not visible(cell))
    refuse(faults)
    return frame.astype({"label": int})


def visible(text: str) -> bool:
    """Whether it has a character besides separators and control characters, which tokenizers drop."""
    return any(unicodedata.category(character)[0] not in "ZC" for character in text)


def merge_splits(parts: Frames, published: dict[str, int], spec: DatasetSpec, as_published: bool) -> pd.DataFrame:
    """The validated rows of several splits as one frame, in an order that does not depend on the source's.

    `key` is what a tokenizer sees of a row; `source_row` counts the rows from 0, through the splits one after the
    other. Raises InputError if a split has not its published number of rows, unless the user gave other sizes
    (`as_published` false).
    """
    frames = []
    for split, rows in published.items():
        with explain(split, InputError):
            frames.append(validate(parts[split], spec))
        missing = rows - len(parts[split])
        if as_published and missing:
            amount = f"{abs(missing):,} too {'few' if missing > 0 else 'many'}"
            advice = "get the whole source, or give --train_size and --test_size"
            raise InputError(f"{split} has {len(parts[split]):,} rows and {rows:,} are published, {amount}: {advice}")
    frame = pd.concat(frames, ignore_index=True)
    columns = [ours for _, ours in spec.columns]
    frame["key"] = frame[columns].map(normalised).agg("\x1f".join, axis=1)
    frame["source_row"] = range(len(frame))
    return frame.sort_values(["key", *columns, "label", "source_row"], ignore_index=True)


def normalised(text: str) -> str:
    """The text with every run of white space as one blank: what a tokenizer sees of it."""
    return " ".join(text.split())


def without_duplicates(frame: pd.DataFrame) -> tuple[pd.DataFrame, dict]:
    """One row for each text, and what was dropped. Texts that differ only in white space count as the same: no
    tokenizer here tells them apart. A text with several labels keeps its most frequent one, the smallest at a tie;
    its `source_row` may then have another."""
    votes = frame.value_counts(["key", "label"]).reset_index(name="votes")
    label = votes.sort_values(["votes", "label"], ascending=[False, True]).drop_duplicates("key").set_index("key")
    kept = frame.drop_duplicates("key", ignore_index=True)
    kept["label"] = kept["key"].map(label["label"])
    return kept, {"duplicate_texts": len(frame) - len(kept), "labels_outvoted": len(votes) - len(label)}


def split_by_sentence(texts: list[str], labels: np.ndarray, test_size: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Which phrases are test phrases when whole sentences are held out (SST-2's phrases are parts of sentences), and
    the group of each phrase: the place, in the order of holding out, of the last sentence that it stands in.

    No two texts are the same phrase; a sentence is one that stands, token by token, inside no other. Sentences are held
    out one by one, in a seeded order that keeps the classes' shares, until `test_size` phrases or more stand in
    held-out sentences alone. Returns two arrays of shape (phrases,): no true phrase stands inside a false one.
    """
    row_of = {tuple(text.split()): row for row, text in enumerate(texts)}
    spans = ((words[a:b] for a, b in combinations(range(len(words) + 1), 2)) for words in row_of)
    inside = [{row_of[span] for span in group if span in row_of} for group in spans]
    parts = set().union(*(phrases - {row} for row, phrases in enumerate(inside)))
    sentences = np.random.default_rng(seed).permutation([row for row in range(len(texts)) if row not in parts])
    # stratified: the k-th of n sentences of a class stands at k/n of the way
    by_class = pd.Series(labels[sentences]).groupby(labels[sentences])
    progress = (by_class.cumcount() + 0.5) / by_class.transform("size")
    last = np.zeros(len(texts), dtype=int)  # for each phrase, the place of the last sentence that it stands in
    for place, sentence in enumerate(sentences[progress.argsort(kind="stable")]):
        last[list(inside[sentence])] = place
    return last <= np.sort(last)[min(test_size, len(texts)) - 1], last


def stratified(
    frame: pd.DataFrame, size: int | None, seed: int, whole: pd.DataFrame | None = None
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`size` rows of the frame (None: all) with the classes' shares of the `whole` (None: of the frame), and the rows
    left over, both shuffled. Each class gets its share rounded down; the rows then still wanted go to the largest
    remainders."""
    labels = (frame if whole is None else whole)["label"]
    frame = frame.sample(frac=1, random_state=seed)
    size = len(frame) if size is None else size
    share = labels.value_counts().sort_index() * size / max(len(labels), 1)
    quota = share.astype(int)
    quota[(quota - share).nsmallest(size - quota.sum()).index] += 1
    taken = frame.groupby("label").cumcount() < frame["label"].map(quota)
    if missing := size - taken.sum():
        raise InputError(f"{size:,} rows are wanted but there are {taken.sum():,}: {missing:,} too few")
    return frame[taken], frame[~taken]


def split(parts: Frames, spec: DatasetSpec, given: dict[str, int | None], seed: int) -> tuple[Frames, dict[str, int]]:
    """Train and test rows, every class in both, and what was dropped. Sizes `given` as None are the spec's.

    A part that is taken whole stays as it was published, with its duplicates, and a test part in its order. A part that
    is drawn from loses its duplicates and the texts of the other part; where both are whole, the texts that they share
    are counted as `shared_texts_kept`. Where the spec keeps duplicates, test rows are drawn from the texts that stand
    once.
    """
    sizes = {"train": given["train"] or spec.train_size, "test": given["test"] or spec.test_size}
    keys = ("duplicate_texts", "duplicate_texts_kept", "labels_outvoted", "shared_texts", "shared_texts_kept")
    dropped = Counter(dict.fromkeys(keys, 0))
    if spec.test_from is None:
        rows = merge_splits(parts, spec.train_from, spec, not any(given.values()))
        if not spec.keep_duplicates:
            rows, counts = without_duplicates(rows)
            dropped.update(counts)
        if spec.by_sentence:
            texts, labels = rows["text"].tolist(), rows["label"].to_numpy()
            held_out, rows["group"] = split_by_sentence(texts, labels, sizes["test"], seed)
            train, test = rows[~held_out], stratified(rows[held_out], given["test"], seed)[0]
        else:
            once = rows[~rows["key"].duplicated(keep=False)]
            test, rest = stratified(once, sizes["test"], seed, rows)
            train = pd.concat([rest, rows.drop(once.index)])
    else:
        pools = {}
        for name, source in (("train", spec.train_from), ("test", spec.test_from)):
            pools[name] = merge_splits(parts, source, spec, as_published=given[name] is None)
            if sizes[name]:
                pools[name], counts = without_duplicates(pools[name])
                dropped.update(counts)
        shared = set(pools["train"]["key"]) & set(pools["test"]["key"])
        drawn = next((name for name, size in sizes.items() if size), None)
        if drawn:
            pools[drawn] = pools[drawn][~pools[drawn]["key"].isin(shared)]
        dropped["shared_texts" if drawn else "shared_texts_kept"] = len(shared)
        train, test = pools["train"], pools["test"].sort_values("source_row")
        if sizes["test"]:
            test = stratified(pools["test"], sizes["test"], seed)[0]
    rows = {"train": stratified(train, sizes["train"], seed)[0], "test": test}
    dropped["duplicate_texts_kept"] = int(sum(part["key"].duplicated().sum() for part in rows.values()))
    for name, part in rows.items():
        if missing := [label for number, label in enumerate(spec.label_names) if not part["label"].eq(number).any()]:
            advice = "choose a larger size" if sizes[name] else "every class must be in both splits"
            raise InputError(f"the {name} split of {len(part):,} rows has no row of {', '.join(missing)}: {advice}")
    if test["label"].value_counts().max() < 2:
        raise InputError("the test split has one row of each class, and none for its second half: more are needed")
    return rows, dict(dropped)
