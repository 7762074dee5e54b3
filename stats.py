"""Statistics, as functions of frames alone: of one run, of a cell's runs, of several cells. F1 is in percent.

aggregate.py uses them; they read no file and print nothing.
"""

from collections.abc import Callable
from itertools import combinations, pairwise

import numpy as np
import pandas as pd
from scipy.stats import norm, ttest_1samp
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.multitest import multipletests

COLUMN = ["table", "model", "variant", "dataset"]  # a column of a table, for one model
VERDICT = ["verdict", "why", "difference", "low", "high", "p", "p_holm", "seeds", "counted", "evidence"]
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
    pair = predictions["label"], predictions["prediction"]
    collapsed = bool(guesses[most] >= COLLAPSED and cohen_kappa_score(*pair, replace_undefined_by=0.0) < KAPPA)
    constant = 100 * constant_f1(of_most) if collapsed else np.nan
    shares = {"most_predicted": 100 * guesses[most], "floor": 100 * max(class_floors(labels))}
    return {**shares, "collapsed": collapsed, "constant_f1": constant}


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
    mean = ("f1", "constant_f1", "floor", "words", "picked_on_a", "then_on_b", "picked_on_b", "then_on_a")
    columns = {name: (name, "mean") for name in mean}
    columns |= {"f1_std": ("f1", "std"), "seeds": ("seed", "nunique"), "layers": ("layers", "first")}
    columns |= {
        "place": ("place", "first"),
        "relative_change": ("relative_change", "mean"),
        "trained": ("trained", "max"),
        "train": ("train", "first"),
        "num_train_epochs": ("num_train_epochs", "first"),
        "settings": ("settings", "first"),
    }
    columns |= {"collapsed": ("collapsed", "any"), "collapsed_share": ("collapsed", "mean"), "runs": ("run", " ".join)}
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


def fixed_rate(runs: pd.DataFrame, cell: list[str], rates: list[float], pilot_seeds: list[int]) -> pd.DataFrame:
    """The runs of each cell at one learning rate that no run among them has chosen.

    With `pilot_seeds` it is the rate with the best mean F1 at the last epoch on those seeds, whose runs are then left
    out, or the cell's only one. Else it is the one of `rates` that the cell has, without `rates` its only one; a cell
    with several is left out.
    """
    if pilot_seeds:
        one = runs.groupby(cell)["learning_rate"].transform("nunique") == 1
        pilot, tried = runs["seed"].isin(pilot_seeds), runs["seed"].isin(pilot_seeds) | one
        mean = runs[tried].groupby([*cell, "learning_rate"])["f1_last"].mean().reset_index()
        best = mean.sort_values(["f1_last", "learning_rate"], ascending=[False, True]).drop_duplicates(cell)
        return runs[~pilot].merge(best[[*cell, "learning_rate"]])
    runs = runs[runs["learning_rate"].isin(rates)] if rates else runs
    return runs[runs.groupby(cell)["learning_rate"].transform("nunique") == 1]


def recovery(f1: pd.Series, uncorrupted: pd.Series, floor: pd.Series) -> pd.Series:
    """R = (F1 - floor) / (the uncorrupted model's F1 - floor); none where that model is within 2 points of the floor:
    what has not learned cannot recover."""
    return (f1 - floor) / (uncorrupted - floor).where(uncorrupted > floor + 2)


# ---- Claims (section 4.2) ----


def pair_cells(cells: pd.DataFrame) -> pd.DataFrame:
    """A row for each comparison of a claim: `claim`, from 0, and the cells, by their index: `lower` is the one whose F1
    the claim has lower, `higher` the other.

    Compared are each corrupted cell with the uncorrupted one; each degree with the next one that is there, along
    bottom and along top; bottom with top at the same degree.
    """
    rows = []
    for _, group in cells.dropna(subset="f1").groupby(COLUMN, sort=False):
        of = dict(zip(zip(group["percent"], group["side"], strict=True), group.index, strict=True))
        rows += [(0, of[cell], of[0, "none"]) for cell in of if cell != (0, "none") and (0, "none") in of]
        paths = [sorted(cell for cell in of if cell[1] in ("none", side, "all")) for side in ("bottom", "top")]
        steps = dict.fromkeys(step for path in paths for step in pairwise(path))
        rows += [(1, of[high], of[low]) for low, high in steps]
        rows += [(2, of[cell], of[cell[0], "top"]) for cell in of if cell[1] == "bottom" and (cell[0], "top") in of]
    return pd.DataFrame(rows, columns=["claim", "lower", "higher"])


def no_evidence(cells: pd.DataFrame) -> pd.Series:
    """Why a cell is no evidence for a claim, empty if it is: more than half of its runs collapsed, or its column copies
    another one of the same table and data set.

    A column is a copy if, of its cells that did not collapse, three or more and more than half have the very F1 of an
    earlier column's.
    """
    why = pd.Series("", index=cells.index).mask(cells["collapsed_share"] > 0.5, "most of its runs collapsed")
    for _, of_set in cells[why == ""].groupby(["table", "dataset"], sort=False):
        columns = list(of_set.groupby(COLUMN, sort=False))
        for (_, first), (_, second) in combinations(columns, 2):
            both = first.merge(second, on=["percent", "side"])
            if (same := both["f1_x"].eq(both["f1_y"]).sum()) >= 3 and same > len(both) / 2:
                copied = f"{first['model'].iloc[0]} {first['variant'].iloc[0]}".strip()
                why[second.index] = f"its column copies that of {copied}"
    return why


def judge(difference: float, low: float, high: float, p: float) -> dict:
    verdict = "holds" if low > 0 else "fails" if high < 0 else "unresolved"
    return {"difference": difference, "low": low, "high": high, "p": p, "verdict": verdict, "why": ""}


def judge_seeds(differences: pd.Series) -> dict:
    """Whether a claim's difference is above 0 (holds), below (fails) or unresolved, from one value for each seed.

    The mean, its 95 % t interval and p (n - 1 degrees of freedom): the target is other seeds, on these test rows.
    """
    differences, seeds = differences.dropna(), {"seeds": len(differences.dropna())}
    if len(differences) < 2 or differences.std() < 1e-9:
        why = {0: "no seed has both at a fixed learning rate", 1: "one seed"}
        lacking = {"verdict": "unresolved", "why": why.get(len(differences), "no deviation over the seeds")}
        return {"difference": differences.mean(), "low": np.nan, "high": np.nan, "p": np.nan} | lacking | seeds
    test = ttest_1samp(differences, 0)
    return judge(differences.mean(), *test.confidence_interval(0.95), test.pvalue) | seeds


def judge_assumed(difference: float, variance: float) -> dict:
    """The same words for a difference whose variance is assumed: a 95 % normal interval and p."""
    low, high = norm.interval(0.95, difference, np.sqrt(variance))
    return judge(difference, low, high, 2 * norm.sf(abs(difference) / np.sqrt(variance))) | {"seeds": 1}


def compare(cells: pd.DataFrame, judge_one: Callable, judge_all: Callable) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The comparisons of the claims, and the claims, both with their verdicts; of all tables together and of each.

    `judge_one` judges a comparison, a row of `pair_cells`, `judge_all` the mean over several. `p_holm` is p corrected
    for all comparisons of the claim. What is no evidence is unresolved, and not in the mean. `counted` is what the
    paper would count: in how many of the `compared` the F1 is lower, strictly, however little.
    """
    pairs, why = pair_cells(cells), no_evidence(cells)
    against = [
        f"{describe(cells.loc[pair.lower])} against {describe(cells.loc[pair.higher])}" for pair in pairs.itertuples()
    ]
    rows = []
    for pair in pairs.itertuples():
        row = judge_one(pair)
        if lacking := [f"{describe(cells.loc[cell])}: {why[cell]}" for cell in (pair.lower, pair.higher) if why[cell]]:
            row |= {"verdict": "unresolved", "why": "no evidence, " + "; ".join(lacking)}
        rows.append(row | {"evidence": not lacking, "counted": cells["f1"][pair.lower] < cells["f1"][pair.higher]})
    judged = pairs.join(pd.DataFrame(rows, columns=VERDICT))
    judged.insert(0, "against", against)
    judged = cells.loc[judged["lower"], COLUMN].reset_index(drop=True).join(judged)
    tested = judged["evidence"] & judged["p"].notna()
    for _, p in judged.loc[tested, "p"].groupby(judged["claim"]):
        judged.loc[p.index, "p_holm"] = multipletests(p, method="holm")[1]
    claims = []
    for table in ["all", *cells["table"].unique()]:
        of_table = judged if table == "all" else judged[judged["table"] == table]
        for claim in range(3):
            of_claim = of_table[of_table["claim"] == claim]
            used = of_claim[of_claim["evidence"]]
            whole = judge_all(used) if len(used) else {"verdict": "unresolved", "why": "nothing to compare"}
            counts = of_claim["verdict"].value_counts().reindex(["holds", "fails", "unresolved"], fill_value=0)
            counts["no_evidence"], counts["counted"] = (~of_claim["evidence"]).sum(), of_claim["counted"].sum()
            claims.append({"table": table, "claim": claim} | whole | counts.to_dict() | {"compared": len(of_claim)})
    return judged, pd.DataFrame(claims)


def f1_by_seed(cells: pd.DataFrame, runs: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """The F1 of the last epoch, a row for each seed, a column for each cell, which is named by its index."""
    index = pd.MultiIndex.from_frame(cells[cell])
    wide = runs.pivot(index="seed", columns=cell, values="f1_last")
    return wide.reindex(columns=index).set_axis(cells.index, axis=1)


def compare_runs(cells: pd.DataFrame, runs: pd.DataFrame, cell: list[str]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`compare` from the runs of `fixed_rate`, seed by seed; a claim's mean is over the seeds that all of its
    comparisons have."""
    index = pd.MultiIndex.from_frame(cells[cell])
    share = runs.groupby(cell)["collapsed"].mean().reindex(index).set_axis(cells.index)
    cells = cells.assign(collapsed_share=share.fillna(cells["collapsed_share"]))
    by_seed = f1_by_seed(cells, runs, cell)

    def differences(pairs: pd.DataFrame) -> pd.DataFrame:
        return pd.DataFrame({p.Index: by_seed[p.higher] - by_seed[p.lower] for p in pairs.itertuples()})

    def judge_all(pairs: pd.DataFrame) -> dict:
        whole = differences(pairs).dropna()
        verdict = judge_seeds(whole.mean(axis=1))
        if len(whole) < 2:
            seeds = f"only seed {whole.index[0]} has" if len(whole) else "no seed has"
            verdict["why"] = f"{seeds} all of its {len(pairs)} comparisons at a fixed learning rate"
        if len(by_seed) == 1:
            verdict["why"] = "one seed"
        return verdict

    return compare(cells, lambda pair: judge_seeds(by_seed[pair.higher] - by_seed[pair.lower]), judge_all)


def compare_published(
    cells: pd.DataFrame, test_rows: dict[str, int], run_deviation: float
) -> tuple[pd.DataFrame, pd.DataFrame]:
    """`compare` for numbers of one seed and no predictions, under assumptions: each cell has a variance of
    `run_deviation`^2 for the run and F1 (100 - F1) / rows for its test rows, and cells are independent."""
    variance = run_deviation**2 + cells["f1"] * (100 - cells["f1"]) / cells["dataset"].map(test_rows)

    def judge_all(pairs: pd.DataFrame) -> dict:
        ends = pd.concat([pd.Series(1, pairs["higher"]), pd.Series(-1, pairs["lower"])])
        weights = ends.groupby(level=0).sum() / len(pairs)
        return judge_assumed((weights * cells["f1"]).sum(), (weights**2 * variance).sum())

    def judge_one(pair: tuple) -> dict:
        return judge_assumed(
            cells["f1"][pair.higher] - cells["f1"][pair.lower], variance[[pair.higher, pair.lower]].sum()
        )

    return compare(cells, judge_one, judge_all)


def describe(cell: pd.Series) -> str:
    return {"none": "0 %", "all": "100 %"}.get(cell["side"], f"{cell['side']} {cell['percent']:g} %")


# ---- Two models, on the same test rows ----


def weighted_f1(counts: np.ndarray, labels: np.ndarray, guesses: np.ndarray) -> np.ndarray:
    """Weighted F1 (0 to 1) of one run's predictions for each pattern of test rows, for each row of `counts`, which says
    how often each pattern occurs."""
    classes = np.union1d(labels, guesses)
    true, guessed = (part[:, None] == classes for part in (labels, guesses))
    support, hits, guesses = (
        counts @ part for part in (true.astype(float), (true & guessed).astype(float), guessed.astype(float))
    )
    return (support * 2 * hits / np.maximum(support + guesses, 1)).sum(-1) / counts.sum(-1)


def two_models_interval(bottom: pd.DataFrame, top: pd.DataFrame) -> tuple[float, float]:
    """The percentile bootstrap's 95 % interval of the weighted F1 (percent) of `top` - `bottom`, two runs' predictions.

    It says how far other test rows would move the difference of these two models, and nothing of other seeds. Drawn are
    rows, or groups of rows where rows belong together. Rows with the same label and predictions are exchangeable: to
    draw how often each such pattern occurs is to draw rows.
    """
    rows = np.column_stack([bottom["label"], bottom["prediction"], top["prediction"]])
    patterns, pattern_of, counts = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    label, *sides = patterns.T
    random, groups = np.random.default_rng(0), bottom.get("group")
    samples = (random.multinomial(len(rows), counts / len(rows), size=500) for _ in range(RESAMPLES // 500))
    if groups is not None:
        inside = pd.crosstab(groups.to_numpy(), pattern_of.ravel()).to_numpy()  # how often, in each group
        share = np.full(len(inside), 1 / len(inside))
        samples = (random.multinomial(len(inside), share, size=500) @ inside for _ in range(RESAMPLES // 500))
    differences = []
    for drawn in samples:
        f1_bottom, f1_top = (100 * weighted_f1(drawn.astype(float), label, side) for side in sides)
        differences.append(f1_top - f1_bottom)
    low, high = np.quantile(np.concatenate(differences), [0.025, 0.975])
    return float(low), float(high)
