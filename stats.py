"""Statistics, as functions of frames alone: of one run, of a cell's runs, of several cells. F1 is in percent.

aggregate.py uses them; they read no file and print nothing.
"""

from itertools import pairwise

import numpy as np
import pandas as pd
from scipy.stats import binomtest
from sklearn.metrics import cohen_kappa_score

COMPARED = ["rows", "f1_bottom", "f1_top", "difference", "low", "high"]
COMPARED += ["n_only_bottom_correct", "n_only_top_correct", "p_mcnemar"]
HALVES = ("weighted_f1_half_a", "weighted_f1_half_b")
COLLAPSED = 0.95  # of the predictions are one class, and
KAPPA = 0.02  # Cohen's kappa is below this: they say nothing about the labels
RESAMPLES = 10_000


def split_halves(labels: pd.Series, groups: pd.Series | None = None) -> np.ndarray:
    """0 or 1 for each row: two fixed halves of the test split, of the same class shares (odd ones go to half 0).

    Rows of one group, if they have groups, stand in one half; a group goes by the label of its first row.
    """
    first = labels if groups is None else labels.groupby(groups).first()
    half = first.groupby(first).cumcount() % 2
    return half.to_numpy() if groups is None else groups.map(half).to_numpy()


def score_epochs(labels: np.ndarray, guesses: np.ndarray, half: np.ndarray, classes: int) -> pd.DataFrame:
    """Accuracy and weighted F1 (0 to 1) of each epoch, also on either half. `guesses` has the shape (rows, epochs).

    As scikit-learn's `f1_score(average="weighted", zero_division=0)`, for all epochs at once.
    """
    epochs = guesses.shape[1]

    def count(cells: np.ndarray) -> np.ndarray:  # how often each occurs, as (part, class, epoch): all rows, either half
        counts = np.bincount(cells.ravel(), minlength=2 * classes * epochs).reshape(2, classes, epochs)
        return np.stack([counts.sum(0), *counts])

    place = (half * classes * epochs)[:, None] + np.arange(epochs)
    guessed = place + guesses.astype(np.intp) * epochs
    support, hits = count(place + labels.astype(np.intp)[:, None] * epochs), count(guessed[guesses == labels[:, None]])
    f1 = (support * 2 * hits / np.maximum(support + count(guessed), 1)).sum(1) / support.sum(1)
    return pd.DataFrame(
        {"accuracy": hits[0].sum(0) / len(labels), **dict(zip(("weighted_f1", *HALVES), f1, strict=True))}
    )


def picked_on_halves(epochs: pd.DataFrame) -> dict[str, float]:
    """The F1 of the best epoch on either half of the test split, and that epoch's F1 on the other half."""
    half_a, half_b = (100 * epochs[name] for name in HALVES)
    a, b = half_a.idxmax(), half_b.idxmax()
    return {"picked_on_a": half_a[a], "then_on_b": half_b[a], "picked_on_b": half_b[b], "then_on_a": half_a[b]}


def class_floors(shares: np.ndarray) -> tuple[float, float]:
    """Weighted F1 (0 to 1) of always predicting the most frequent class, and the expected one of drawing each row's
    class with the classes' `shares`."""
    return float(constant_f1(shares.max())), float((shares**2).sum())


def constant_f1(share: float) -> float:
    """Weighted F1 (0 to 1) of predicting one class of that share in the labels for every row."""
    return 2 * share**2 / (1 + share)


def collapse_stats(predictions: pd.DataFrame) -> dict[str, float | bool]:
    """The share of the most predicted class (percent), whether the run is collapsed, and the test split's `floor`.

    A run is collapsed if 95 % of its predictions or more are one class and Cohen's kappa, their agreement with the
    labels beyond chance, is under 0.02: Mosbach et al. (2021) call such runs failed. `constant_f1`, of a collapsed run,
    is the F1 of predicting only that class; section 4.4's outliers are such numbers. `floor` is the larger one of
    `class_floors`.
    """
    labels, guesses = (np.bincount(predictions[name]) / len(predictions) for name in ("label", "prediction"))
    most = guesses.argmax()
    of_most = labels[most] if most < len(labels) else 0.0
    collapsed = bool(guesses[most] >= COLLAPSED) and kappa(predictions["label"], predictions["prediction"]) < KAPPA
    constant = 100 * constant_f1(of_most) if collapsed else np.nan
    shares = {"most_predicted": 100 * guesses[most], "floor": 100 * max(class_floors(labels))}
    return {**shares, "collapsed": collapsed, "constant_f1": constant}


def kappa(labels: pd.Series, predictions: pd.Series) -> float:
    """Cohen's kappa; 0 where labels and predictions are one class, which says nothing."""
    value = cohen_kappa_score(labels, predictions)
    return 0.0 if np.isnan(value) else float(value)


def same_seeds(runs: pd.DataFrame, cell: list[str]) -> tuple[pd.DataFrame, list[str]]:
    """The runs whose seed every learning rate of their cell has, and a line for each cell that loses runs by it.

    Only these compare the learning rates fairly. A cell in which no seed has all learning rates keeps its runs, and
    has a line too.
    """
    groups, notes = [], []
    for key, group in runs.groupby(cell):
        seeds = group.groupby("learning_rate")["seed"].agg(set)
        common = set.intersection(*seeds)
        if any(of_rate != common for of_rate in seeds):
            words = f"only {sorted(common)} are compared" if common else "none is common, each mean is over its own"
            notes.append(f"{in_words(key)}: learning rates have different seeds: {words}")
        groups.append(group[group["seed"].isin(common)] if common else group)
    return pd.concat(groups), notes


def in_words(key: tuple) -> str:
    return " ".join(f"{part}" for part in key if part != "")


def pick_learning_rate(runs: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """A row for each cell, which is its index: the best learning rate's mean and deviation of F1 over its seeds.

    That is the paper's protocol (section 4.1): test F1 picks learning rate and epoch. `cross_fitted` picks them on one
    half of the test split and reads the other, both ways round, averaged; `selection_bias` is the first minus the
    second. `lr_at_grid_edge`: the best learning rate is the lowest or the highest tried, so a better one may lie
    outside.
    """
    mean = ("f1", "constant_f1", "floor", "picked_on_a", "then_on_b", "picked_on_b", "then_on_a")
    columns = {name: (name, "mean") for name in mean}
    columns |= {"f1_std": ("f1", "std"), "seeds": ("seed", "nunique"), "layers": ("layers", "first")}
    columns |= {"collapsed": ("collapsed", "any"), "collapsed_runs": ("collapsed", "sum"), "runs": ("run", " ".join)}
    by_rate = runs.groupby([*cell, "learning_rate"]).agg(**columns).reset_index()
    cells, best_on_a, best_on_b = (
        by_rate.sort_values([score, "learning_rate"], ascending=[False, True]).drop_duplicates(cell).set_index(cell)
        for score in ("f1", "picked_on_a", "picked_on_b")
    )
    cells["cross_fitted"] = (best_on_a["then_on_b"] + best_on_b["then_on_a"]) / 2
    cells["selection_bias"] = cells["f1"] - cells["cross_fitted"]
    rates = by_rate.groupby(cell)["learning_rate"]
    at_edge = cells["learning_rate"].eq(rates.min()) | cells["learning_rate"].eq(rates.max())
    cells["lr_at_grid_edge"] = at_edge.astype("boolean").where(rates.size() > 1)
    cells["learning_rates_tried"] = rates.agg(lambda rates: " ".join(f"{rate:g}" for rate in rates))
    return cells.sort_index()


def count_claims(cells: pd.DataFrame) -> list[tuple[int, int]]:
    """For each of the paper's claims, in one table's cells: how many comparisons hold it, strictly, and of how many.

    Compared are each corrupted cell with the uncorrupted one; each degree with the next one that is there, along
    bottom and along top; bottom with top at the same degree.
    """
    below, less, bottom_top = [], [], []  # pairs of F1, the one that a claim has lower first
    for _, group in cells.groupby(["model", "variant", "dataset"]):
        f1 = group.set_index(["percent", "side"])["f1"].to_dict()
        below += [(f1[cell], f1[0, "none"]) for cell in f1 if cell != (0, "none") and (0, "none") in f1]
        paths = [sorted(cell for cell in f1 if cell[1] in ("none", side, "all")) for side in ("bottom", "top")]
        less += [(f1[high], f1[low]) for low, high in {step for path in paths for step in pairwise(path)}]
        bottom_top += [(f1[cell], f1[cell[0], "top"]) for cell in f1 if cell[1] == "bottom" and (cell[0], "top") in f1]
    return [(sum(low < high for low, high in pairs), len(pairs)) for pairs in (below, less, bottom_top)]


def weighted_f1(counts: np.ndarray, labels: np.ndarray, runs: np.ndarray) -> np.ndarray:
    """Weighted F1 (0 to 1), averaged over `runs`, each run's predictions for each pattern of test rows, for each row of
    `counts`, which says how often each pattern occurs."""
    classes = np.union1d(labels, runs)
    true, guessed = (part[..., None] == classes for part in (labels, runs))
    parts = np.concatenate([true[None], true & guessed, guessed]).astype(float)
    sums = counts @ parts.transpose(1, 0, 2).reshape(len(labels), -1)  # one product for all runs
    support, hits, guesses = np.split(sums.reshape(len(counts), len(parts), -1), [1, 1 + len(runs)], axis=1)
    return (support * 2 * hits / np.maximum(support + guesses, 1)).sum(-1).mean(-1) / counts.sum(-1)


def compare_paired(bottom: list[pd.DataFrame], top: list[pd.DataFrame]) -> dict[str, float]:
    """COMPARED, from each seed's predictions on the same test rows; `difference` is top - bottom.

    `low` and `high` are the percentile bootstrap's 95 % interval over test rows, or over groups of rows where rows
    belong together. Rows with the same label and predictions are exchangeable: to draw how often each such pattern
    occurs is to draw rows. With several seeds, F1 is
    averaged over them on the same drawn rows, and the counts of rows that only one side predicts correctly are added:
    McNemar's exact two-sided p then takes the seeds as independent, and is too small where they are not.
    """
    labels = bottom[0]["label"].to_numpy()
    guesses = [frame["prediction"].to_numpy() for frame in bottom + top]
    rows, groups = np.column_stack([labels, *guesses]), bottom[0].get("group")
    patterns, pattern_of, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    label, *sides = np.split(patterns.T, [1, 1 + len(bottom)])
    label, random = label[0], np.random.default_rng(0)

    def f1(counts: np.ndarray) -> list[np.ndarray]:
        return [100 * weighted_f1(counts.astype(float), label, side) for side in sides]

    f1_bottom, f1_top = (mean.item() for mean in f1(counts[None]))
    samples = (random.multinomial(len(labels), counts / len(labels), size=500) for _ in range(RESAMPLES // 500))
    if groups is not None:
        inside = pd.crosstab(groups.to_numpy(), pattern_of.ravel()).to_numpy()  # how often, in each group
        share = np.full(len(inside), 1 / len(inside))
        samples = (random.multinomial(len(inside), share, size=500) @ inside for _ in range(RESAMPLES // 500))
    low, high = np.quantile(np.concatenate([top - bottom for bottom, top in map(f1, samples)]), [0.025, 0.975])
    correct = [side == label for side in sides]
    only_bottom, only_top = (int((one & ~other).sum(0) @ counts) for one, other in (correct, correct[::-1]))
    p = binomtest(only_bottom, only_bottom + only_top).pvalue if only_bottom + only_top else 1.0
    values = (len(labels), f1_bottom, f1_top, f1_top - f1_bottom, low, high, only_bottom, only_top, p)
    return dict(zip(COMPARED, values, strict=True))
