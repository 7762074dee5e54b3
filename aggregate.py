"""Rebuild the paper's tables from the runs, put them beside the paper's own, and count its claims in both.

    python aggregate.py                                # after python grid.py
    python aggregate.py --output_dir other_outputs

Written to the output folder, F1 weighted and in percent as in the paper (arXiv 2406.14459): `results.csv`, a row for
each run; `cells.csv`, a row for each cell; `table1` and `3`, `4`, `5` in the paper's layout, as .csv, .md and .tex, if
they have runs; `comparison.csv`, ours beside the paper's 320 cells; `claims.csv`, how many comparisons hold each claim
of section 4.2; `bottom_top.csv`, bottom against top example by example.

A cell that was not run is empty and counted as missing. Runs that differ in anything but learning rate and seed are
never put into one cell: `variant` then says what differs, and the tables have rows for each. A run that cannot be read
is named on stderr and left out; the exit code is then 1, and 2 if there is nothing to make a table of.
"""

import argparse
import json
import sys
import zlib
from collections import namedtuple
from fractions import Fraction
from itertools import pairwise, product
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.stats import binomtest

NUMBERS = 3  # the newest results that this code knows: NUMBERS of settings.py
CELL = ["model", "variant", "side", "percent", "dataset", "pooling", "tuning"]
PLACE = ["table", "model", "percent", "side", "dataset"]  # a cell of the paper
VALUES = ["f1", "collapsed", "f1_std", "cell"]  # what a paper table holds of a cell
HALVES = ["picked_on_a", "then_on_b", "picked_on_b", "then_on_a"]  # F1 on the two halves of the test split
COMPARED = ["rows", "f1_bottom", "f1_top", "difference", "low", "high"]
COMPARED += ["only_bottom_right", "only_top_right", "p_mcnemar"]
# The order and the names of the paper's tables; what is not in them follows under its own name.
MODELS = {"bert-base-uncased": "Base", "bert-large-uncased": "Large", "distilbert-base-uncased": "Distil"}
MODELS |= {"minilm": "MiniLM"}
DATASETS = {"sst2": "SST-2", "imdb": "IMDB", "ag_news": "AG News", "emotion": "Emotion", "dbpedia": "DBPedia"}
DATASETS |= {"tfnt": "TFNT", "mrpc": "MRPC", "rte": "RTE", "rotten_tomatoes": "Rotten Tomatoes", "bbc_news": "BBC News"}
TABLES = {1: "after fine-tuning", 3: "with the mean token", 4: "of the linear probe", 5: "on sentence pairs"}
CLAIMS = ("corrupted < undamaged", "more damage, lower F1", "bottom < top")
Table = namedtuple(
    "Table", "text collapsed std cell missing"
)  # frames of the same shape but for the names, and a count
PAPER = Path(__file__).parent / "paper"
PAPER_LAYERS = {"base": 12, "large": 24, "distil": 6}  # in the order of MODELS
COLLAPSED = 0.99  # of the predictions are one class
RESAMPLES = 10_000
UNREADABLE = (OSError, EOFError, zlib.error, ValueError, LookupError, TypeError, AttributeError, ZeroDivisionError)


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def read_runs(output_dir: Path) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], list[str], list[str]]:
    """A row for each finished run, each run's predictions, and a line for each that failed and each that is left out.

    F1, accuracy and shares are in percent; the rows are sorted, so that the order of the folders is no matter.
    """
    settings, measured, predictions, failures, problems = {}, {}, {}, [], []
    for path in sorted([*output_dir.glob("runs/*/result.json"), *output_dir.glob("runs/*/failure.json")]):
        name, file = path.parent.name, path.name
        try:
            result = json.loads(path.read_text())
            if file == "failure.json":
                failures.append(f"failed: {name}: {result['reason']}")
                continue
            row = {**measured_by(result), "run": name}
            file = "epochs.csv"
            row |= picked_on_halves(pd.read_csv(path.with_name(file)), result["epochs"])
            file = "predictions.csv.gz"
            predicted = pd.read_csv(path.with_name(file), usecols=["row", "label", "prediction"], dtype="int32")
            row |= constancy(predicted)
            settings[name], measured[name], predictions[name] = result["settings"], row, predicted
        except UNREADABLE as error:
            why = f"lacks {error}" if isinstance(error, KeyError) else " ".join(str(error).split())
            problems.append(f"{path.parent} is left out: {file}: {why}; delete the folder and do the run again")
    if not measured:
        said = f"{output_dir}/runs holds no result: run bash run_all.sh, or python train.py, first"
        raise FileNotFoundError("\n".join([*problems, *failures, said]))
    runs = pd.DataFrame(measured.values(), index=list(measured))
    runs.insert(1, "variant", variants(pd.DataFrame(settings.values(), index=list(settings))))
    runs = runs.sort_values([*CELL, "learning_rate", "seed", "run"], ignore_index=True)
    again = runs.duplicated([*CELL, "learning_rate", "seed"])
    problems += [f"{output_dir}/runs/{run} is left out: another has the same settings" for run in runs["run"][again]]
    return runs[~again].reset_index(drop=True), predictions, failures, problems


def measured_by(result: dict) -> dict:
    """A run's row, from its result.json; raises what is in UNREADABLE if a field is missing or makes no sense."""
    settings = result["settings"]
    if settings["numbers"] > NUMBERS:
        raise ValueError(f"its numbers are of version {settings['numbers']}, this aggregate.py knows up to {NUMBERS}")
    if not (0 <= result["weighted_f1"] <= 1 and 0 <= result["accuracy"] <= 1):
        raise ValueError("weighted_f1 or accuracy is not from 0 to 1")
    layers = round(Fraction(settings["frac"]) * result["corruption"]["of_layers"])
    row = {name: settings[name] for name in (*CELL, "learning_rate", "seed") if name != "variant"}
    row |= {"layers": layers, "f1": 100 * result["weighted_f1"], "accuracy": 100 * result["accuracy"]}
    row |= {name: result[name] for name in ("best_epoch", "epochs", "commit")}
    row |= {"seconds": round(result["seconds"]["total"], 1), "device": result["device"]["name"]}
    row |= {name: result["versions"][name] for name in ("torch", "transformers")}
    return row | {name: settings[name] for name in ("model_fingerprint", "data_fingerprint")}


def picked_on_halves(epochs: pd.DataFrame, expected: int) -> dict[str, float]:
    """The F1 (percent) of the best epoch on either half of the test split, and that epoch's F1 on the other half."""
    if len(epochs) != expected:
        raise ValueError(f"{len(epochs)} epochs of {expected}")
    half_a, half_b = 100 * epochs["weighted_f1_half_a"], 100 * epochs["weighted_f1_half_b"]
    if not (half_a.between(0, 100) & half_b.between(0, 100)).all():
        raise ValueError("an F1 that is not from 0 to 1")
    on_a, on_b = half_a.idxmax(), half_b.idxmax()
    return dict(zip(HALVES, (half_a[on_a], half_b[on_a], half_b[on_b], half_a[on_b]), strict=True))


def constancy(predictions: pd.DataFrame) -> dict[str, float | bool]:
    """The share of the most predicted class (percent), and whether the run is collapsed: at least 99 %.

    `constant_f1`, of a collapsed run, is what predicting only that class gives (percent): 2p^2 / (1 + p), p the class's
    share in the labels. Section 4.4's outliers are such numbers.
    """
    shares = predictions["prediction"].value_counts(normalize=True)
    collapsed = bool(shares.iloc[0] >= COLLAPSED)
    p = (predictions["label"] == shares.index[0]).mean()
    constant_f1 = 100 * 2 * p**2 / (1 + p) if collapsed else np.nan
    return {"most_predicted": 100 * shares.iloc[0], "collapsed": collapsed, "constant_f1": constant_f1}


def variants(settings: pd.DataFrame) -> pd.Series:
    """What sets a run apart from others of its model, data set and table, beside its cell, learning rate and seed."""
    by = [settings[name] for name in ("model", "dataset", "pooling", "tuning")]
    own = settings.drop(columns=[*(set(CELL) & set(settings)), "frac", "learning_rate", "seed"]).astype(object)
    own = own.where(own.notna(), None).map(lambda value: json.dumps(value, sort_keys=True).strip('"'))
    differs = own.groupby(by).transform("nunique") > 1
    shown = own.apply(lambda column: column.str[:8] if column.name.endswith("_fingerprint") else column)
    variant = [", ".join(f"{name}={shown.at[run, name]}" for name in own if differs.at[run, name]) for run in own.index]
    variant = pd.Series(variant, index=own.index)
    for column, kinds in variant.groupby(by):
        if kinds.nunique() > 1:
            warn(f"{' '.join(column)}: runs of different settings are kept apart: {' | '.join(sorted(set(kinds)))}")
    return variant


def same_seeds(runs: pd.DataFrame) -> pd.DataFrame:
    """The runs whose seed every learning rate of their cell has: only these compare the rates fairly.

    Says which are left out. A cell in which no seed has all learning rates keeps its runs, and that is said too.
    """
    kept = []
    for cell, group in runs.groupby(CELL):
        seeds = [set(of_rate) for _, of_rate in group.groupby("learning_rate")["seed"]]
        common = set.intersection(*seeds)
        if any(of_rate != common for of_rate in seeds):
            taken = f"only {sorted(common)} are compared" if common else "none is common, each mean is over its own"
            warn(f"{' '.join(f'{part}' for part in cell if part != '')}: learning rates have different seeds: {taken}")
        kept.append(group[group["seed"].isin(common)] if common else group)
    return pd.concat(kept)


def make_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell: the best learning rate's mean and standard deviation of F1 (percent) over its seeds.

    That is the paper's protocol (section 4.1), in which test F1 picks learning rate and epoch. `cross_fitted` picks
    them on one half of the test split and reads the other, both ways round, averaged; `gap` is the first minus the
    second. `edge`: the best learning rate is the lowest or the highest tried, so that a better one may lie outside.
    """
    tried = same_seeds(runs).groupby([*CELL, "learning_rate"])
    mean = tried[["f1", "constant_f1", *HALVES]].mean()
    mean = mean.assign(f1_std=tried["f1"].std(), seeds=tried["seed"].nunique(), layers=tried["layers"].first())
    mean = mean.assign(
        collapsed=tried["collapsed"].any(), collapsed_runs=tried["collapsed"].sum(), runs=tried["run"].agg(" ".join)
    ).reset_index()
    best = {}
    for score in ("f1", "picked_on_a", "picked_on_b"):
        ranked = mean.sort_values([score, "learning_rate"], ascending=[False, True])
        best[score] = ranked.drop_duplicates(CELL).set_index(CELL).sort_index()
    cells, rates = best["f1"], mean.groupby(CELL)["learning_rate"]
    cells["cross_fitted"] = (best["picked_on_a"]["then_on_b"] + best["picked_on_b"]["then_on_a"]) / 2
    cells["gap"] = cells["f1"] - cells["cross_fitted"]
    at_edge = cells["learning_rate"].eq(rates.min()) | cells["learning_rate"].eq(rates.max())
    cells["edge"] = at_edge.astype("boolean").where(rates.size() > 1)
    cells["learning_rates_tried"] = rates.agg(lambda rates: " ".join(f"{rate:g}" for rate in rates))
    cells = cells.reset_index()
    tables = [table_of(*of) for of in zip(cells["pooling"], cells["tuning"], cells["dataset"], strict=True)]
    cells["table"] = pd.array(tables, dtype="Int64")
    shown = ["f1", "f1_std", "cross_fitted", "gap", "seeds", "learning_rate", "learning_rates_tried", "edge"]
    return cells[["table", *CELL, *shown, "collapsed", "collapsed_runs", "constant_f1", "layers", "runs"]]


def table_of(pooling: str, tuning: str, dataset: str) -> int | None:
    """The number of the paper's table that such a cell belongs to; None if it has no such table."""
    table = {("cls", "full"): 1, ("mean", "full"): 3, ("cls", "probe"): 4}.get((pooling, tuning))
    return 5 if table == 1 and dataset in ("mrpc", "rte") else table


def paper_cells() -> pd.DataFrame:
    """The paper's 320 cells in the columns of ours that the tables and the claims need; collapsed are its outliers."""
    cells = pd.concat([pd.read_csv(PAPER / f"table{number}.csv").assign(table=number) for number in TABLES])
    cells = cells.merge(pd.read_csv(PAPER / "outliers.csv")[PLACE], how="left", on=PLACE, indicator="collapsed")
    cells["layers"] = (cells["percent"] / 100 * cells["model"].map(PAPER_LAYERS)).astype(int)
    cells["model"] = cells["model"].map(dict(zip(PAPER_LAYERS, MODELS, strict=False)))
    cells["dataset"] = cells["dataset"].map({shown: name for name, shown in DATASETS.items()})
    return cells.assign(variant="", collapsed=cells["collapsed"] == "both", percent=cells["percent"].astype(float))


def in_order(names: pd.Series, known: dict[str, str]) -> list[str]:
    """The names that occur: known ones first, in their order, then the others."""
    return sorted(set(names), key=lambda name: ([*known, name].index(name), name))


def paper_table(cells: pd.DataFrame) -> Table:
    """One table's cells in the paper's layout: ours and the paper's own are made by this.

    A row for each model and degree of corruption, columns `<data set> bottom` and `<data set> top`. 0 % and 100 % have
    no side: the paper prints one number across both columns, here it stands in both. `std` is the deviation over
    seeds as text, empty where there is one seed; `cell` says which row of `cells` a number comes from. Missing are
    those in the rows and columns that are there.
    """
    columns = pd.MultiIndex.from_product([in_order(cells["dataset"], DATASETS), ["bottom", "top"]])
    cells = cells.assign(model=pd.Categorical(cells["model"], in_order(cells["model"], MODELS)), cell=cells.index)
    cells["f1_std"] = cells.get("f1_std", np.nan)
    across = cells["percent"].isin([0, 100])
    cells = pd.concat([cells[~across], *(cells[across].assign(side=side) for side in ("bottom", "top"))])
    wide = cells.set_index(["model", "variant", "percent", "layers", "dataset", "side"])[VALUES]
    wide = wide.unstack(["dataset", "side"])
    f1, collapsed, std, cell = (wide[values].reindex(columns=columns) for values in VALUES)
    text, collapsed = f1.map(lambda value: "" if pd.isna(value) else f"{value:.2f}"), collapsed.eq(True)
    std = std.map(lambda value: "" if pd.isna(value) else f" ± {value:.2f}")
    text.columns = collapsed.columns = std.columns = cell.columns = [
        f"{DATASETS.get(name, name)} {side}" for name, side in columns
    ]
    text.insert(0, "model", [" ".join([MODELS.get(model, model), variant]).strip() for model, variant, *_ in f1.index])
    text.insert(1, "corruption", [f"{part:g}% (1-{depth})" if depth else "0%" for *_, part, depth in f1.index])
    missing = sum(row.isna().sum() / (2 if degree[2] in (0, 100) else 1) for degree, row in f1.iterrows())
    frames = (frame.reset_index(drop=True) for frame in (text, collapsed, std, cell.astype("Int64")))
    return Table(*frames, int(missing))


def marked(table: Table, bold: str, red: str) -> pd.DataFrame:
    """The table's texts, the higher of bottom and top in bold, collapsed ones in red; with the deviation over seeds."""
    shown, number = table.text.copy(), table.text[list(table.collapsed)].apply(pd.to_numeric)
    for bottom, top in zip(list(number)[::2], list(number)[1::2], strict=True):
        for column, other in ((bottom, top), (top, bottom)):
            shown.loc[table.collapsed[column], column] = shown[column].map(red.format)
            shown.loc[number[column] > number[other], column] = shown[column].map(bold.format)
    shown[list(table.std)] += table.std
    return shown


def markdown(table: Table) -> str:
    """The table in Markdown, which has no red: a dagger stands for it."""
    text = marked(table, "**{}**", "{}†").to_markdown(index=False, disable_numparse=True)
    legend = "\n\n† collapsed: at least 99 % of the predictions are one class, in one run of the cell or more"
    return f"{text}{legend if table.collapsed.any(axis=None) else ''}\n"


def latex(table: Table) -> str:
    """A tabular for \\input; the number of 0 % and 100 % stands across bottom and top, as in the paper."""
    shown = marked(table, r"\textbf{{{}}}", r"\textcolor{{red}}{{{}}}")
    across = shown["corruption"].str.match(r"(0|100)%")
    for bottom, top in zip(list(table.collapsed)[::2], list(table.collapsed)[1::2], strict=True):
        shown.loc[across, bottom] = shown[bottom].map(r"\multicolumn{{2}}{{c}}{{{}}}".format)
        shown.loc[across, top] = "@"
    shown = shown.set_index(["model", "corruption"]).rename_axis([None, None])
    shown.columns = pd.MultiIndex.from_tuples([(name.rpartition(" ")[0], name.split()[-1].title()) for name in shown])
    style = shown.style.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
    form = {"column_format": "ll" + "c" * shown.shape[1], "multicol_align": "c", "multirow_align": "naive"}
    text = style.to_latex(**form, hrules=True, clines="skip-last;data")
    rule = f"\\cline{{1-{2 + shown.shape[1]}}}\n"
    text = text.replace(rule + r"\bottomrule", r"\bottomrule").replace(rule, "\\midrule\n").replace(" & @", "")
    packages = "% needs \\usepackage{booktabs} and \\usepackage{xcolor}; red: a run with 99 % of one class\n"
    return packages + text.replace(" &  & Bottom", "Model & Corruption & Bottom", 1)


def compare(ours: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell of ours and of the paper's; F1 and `difference`, ours - paper, in percent."""
    ours = ours[[*PLACE, "variant", "f1", "cross_fitted", "collapsed"]].rename(columns={"f1": "ours"})
    paper = paper[[*PLACE, "f1", "collapsed"]].rename(columns={"f1": "paper", "collapsed": "paper_outlier"})
    both = ours.merge(paper, how="outer", on=PLACE).astype({"collapsed": "boolean", "paper_outlier": "boolean"})
    both.insert(both.columns.get_loc("paper") + 1, "difference", both["ours"] - both["paper"])
    return both


def count_claims(cells: pd.DataFrame) -> list[tuple[int, int]]:
    """For each of CLAIMS (section 4.2), in one table's cells: how many comparisons hold it, strictly, of how many.

    Compared are each corrupted cell with the undamaged one; each degree with the next one that is there, along bottom
    and along top; bottom with top at the same degree.
    """
    counts = [(0, 0)] * len(CLAIMS)
    for _, group in cells.groupby(["model", "variant", "dataset"]):
        f1, whole = group.set_index(["percent", "side"])["f1"].to_dict(), (0, "none")
        paths = [sorted(cell for cell in f1 if cell[1] in ("none", side, "all")) for side in ("bottom", "top")]
        lower_higher = (
            {(cell, whole) for cell in f1 if cell != whole and whole in f1},
            {(more, less) for path in paths for less, more in pairwise(path)},
            {(cell, (cell[0], "top")) for cell in f1 if cell[1] == "bottom" and (cell[0], "top") in f1},
        )
        held = [sum(f1[low] < f1[high] for low, high in pairs) for pairs in lower_higher]
        counts = [(n + h, of + len(p)) for (n, of), h, p in zip(counts, held, lower_higher, strict=True)]
    return counts


def claims_table(ours: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row for each table and claim: `holds` of `compared` in the paper, in ours, in ours at the paper's cells."""
    sources, rows = {"paper": paper, "ours": ours, "ours_in_paper": ours.merge(paper[PLACE], on=PLACE)}, []
    for table, (number, claim) in product(TABLES, enumerate(CLAIMS)):
        rows.append({"table": table, "claim": f"({number + 1}) {claim}"})
        for name, cells in sources.items():
            holds, compared = count_claims(cells[cells["table"] == table])[number]
            rows[-1] |= {f"{name}_holds": holds, f"{name}_compared": compared}
    return pd.DataFrame(rows)


def weighted_f1(counts: np.ndarray, labels: np.ndarray, predictions: np.ndarray) -> np.ndarray:
    """Weighted F1 (0 to 1) for each row of `counts`, which says how often each (label, prediction) occurs."""
    classes = np.union1d(labels, predictions)
    true, predicted = labels[:, None] == classes, predictions[:, None] == classes
    support, guesses, hits = (counts @ part.astype(float) for part in (true, predicted, true & predicted))
    return (support * 2 * hits / np.maximum(support + guesses, 1)).sum(-1) / support.sum(-1)


def paired(bottom: list[pd.DataFrame], top: list[pd.DataFrame]) -> dict[str, float]:
    """COMPARED for the predictions of each seed on the same test rows: F1 and its difference in percent, top - bottom.

    `low` and `high` are the percentile bootstrap's 95 % interval over test rows. Rows with the same label and
    predictions are exchangeable, so drawing how often each such pattern occurs is drawing rows. With several seeds, F1
    is averaged over them on the same drawn rows, and the counts of rows that only one side has right are added:
    McNemar's exact two-sided p then takes the seeds as independent, and is too small where they are not.
    """
    labels = bottom[0]["label"].to_numpy()
    guesses = [frame["prediction"].to_numpy() for pair in zip(bottom, top, strict=True) for frame in pair]
    patterns, counts = np.unique(np.column_stack([labels, *guesses]), axis=0, return_counts=True)
    label, sides = patterns[:, 0], (patterns[:, 1::2].T, patterns[:, 2::2].T)

    def f1(counts: np.ndarray) -> list[np.ndarray]:
        return [np.mean([100 * weighted_f1(counts, label, seed) for seed in side], axis=0) for side in sides]

    f1_bottom, f1_top = (mean.item() for mean in f1(counts[None]))
    random = np.random.default_rng(0)
    drawn = (random.multinomial(len(labels), counts / len(labels), size=500) for _ in range(RESAMPLES // 500))
    low, high = np.quantile(np.concatenate([top - bottom for bottom, top in map(f1, drawn)]), [0.025, 0.975])
    right = [side == label for side in sides]
    only_bottom, only_top = (int((one & ~other).sum(0) @ counts) for one, other in (right, right[::-1]))
    p = binomtest(only_bottom, only_bottom + only_top).pvalue if only_bottom + only_top else 1.0
    values = (len(labels), f1_bottom, f1_top, f1_top - f1_bottom, low, high, only_bottom, only_top, p)
    return dict(zip(COMPARED, values, strict=True))


def bottom_top(cells: pd.DataFrame, runs: pd.DataFrame, predictions: dict[str, pd.DataFrame]) -> tuple:
    """A row for each degree with both sides there, their best runs paired by seed; a line for each that is refused."""
    seed_of, rows, problems = runs.set_index("run")["seed"].to_dict(), [], []
    by = [name for name in CELL if name != "side"]
    for key, group in cells.groupby(by):
        runs_of = zip(group["side"], group["runs"].str.split(), strict=True)
        run_of = {side: {seed_of[run]: run for run in of_side} for side, of_side in runs_of}
        if not {"bottom", "top"} <= run_of.keys():
            continue
        what = f"bottom against top, {' '.join(f'{part}' for part in key if part != '')}"
        seeds = sorted(run_of["bottom"].keys() & run_of["top"].keys())
        if run_of["bottom"].keys() != run_of["top"].keys():
            warn(f"{what}: the sides have different seeds: {f'only {seeds} are' if seeds else 'none is'} compared")
        bottom, top = ([predictions[run_of[side][seed]] for seed in seeds] for side in ("bottom", "top"))
        if any(not frame[["row", "label"]].equals(bottom[0][["row", "label"]]) for frame in bottom + top):
            problems.append(f"{what} is left out: the test rows or labels of the runs differ")
        elif seeds:
            rows.append(dict(zip(by, key, strict=True)) | {"seeds": len(seeds), **paired(bottom, top)})
    return pd.DataFrame(rows, columns=[*by, "seeds", *COMPARED]), problems


def write_whole(path: Path, text: str) -> None:
    """Write aside, then rename: the file appears whole or not at all."""
    aside = path.with_name(f".partial-{path.name}")
    aside.write_text(text)
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and an example
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    output_dir = parser.parse_args().output_dir
    try:
        runs, predictions, failures, problems = read_runs(output_dir)
        cells, paper = make_cells(runs), paper_cells()
        pairs, unpaired = bottom_top(cells, runs, predictions)
        placed = cells.dropna(subset="table")
        tables = {n: paper_table(placed[placed["table"] == n]) for n in TABLES if n in set(placed["table"])}
        claims = claims_table(placed, paper)
        frames = {"results": runs, "cells": cells, "comparison": compare(placed, paper), "claims": claims}
        frames |= {"bottom_top": pairs, **{f"table{n}": table.text for n, table in tables.items()}}
        files = {f"{name}.csv": frame.to_csv(index=False) for name, frame in frames.items()}
        for n, table in tables.items():
            files |= {f"table{n}.md": markdown(table), f"table{n}.tex": latex(table)}
        for name, text in files.items():
            write_whole(output_dir / name, text)
        for name in {f"table{n}.{kind}" for n in TABLES for kind in ("csv", "md", "tex")} - files.keys():
            (output_dir / name).unlink(missing_ok=True)  # of runs that are no longer there
    except OSError as error:
        parser.error(str(error))
    for n in tables:
        print(f"Table {n}: weighted F1 in percent {TABLES[n]}; bold: the higher side\n\n{files[f'table{n}.md']}")
    short = claims[claims["table"].isin(tables)][["table", "claim"]]
    for name in ("paper", "ours", "ours_in_paper"):
        short[name] = claims[f"{name}_holds"].astype(str) + "/" + claims[f"{name}_compared"].astype(str)
    print(f"Claims: comparisons that hold, of those there are\n\n{short.to_markdown(index=False)}\n")
    missing = sum(table.missing for table in tables.values())
    print("\n".join([f"{len(placed)} cells from {len(runs)} runs, {missing} cells missing", *failures]))
    if len(cells) > len(placed):
        warn(f"{len(cells) - len(placed)} cells are of a pooling and tuning that no table has: see cells.csv")
    print(f"-> {output_dir}/{', '.join(files)}")
    if problems + unpaired:
        sys.exit("\n".join(problems + unpaired))  # on stderr, with exit code 1


if __name__ == "__main__":
    main()
