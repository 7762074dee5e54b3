"""Tables A to F, beyond the paper: by method, place, tuning, depth, order, length of training; and recovery by step.

Functions of frames; used by aggregate.py and report.py. Each table has the cells of those models and data sets that
have something that only it shows. docs/lab.md defines it all.
"""

import json

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

import stats
from config import OF_TUNING, SIDES
from paper import dataset_title, model_title
from tables import as_text, in_order, name_apart

SAME = ["model", "same", "pooling", "dataset"]  # what the cells share that are compared; `same_but` makes `same`
AMOUNTS = {"num_train_epochs": "epochs", "train": "rows"}  # of training: the column, and its unit in words


VARIED = {  # settings that a table's cells may differ in; what data_fingerprint says, test_rows need not say again
    **dict.fromkeys("ABDE", ("test_rows",)),
    "C": ("test_rows", *OF_TUNING),
    "F": ("num_train_epochs", "train_size", "data_fingerprint"),
}


def read_settings(column: pd.Series) -> pd.DataFrame:
    """Settings in JSON, a row for each cell, as columns."""
    return pd.DataFrame([json.loads(text) for text in column], index=column.index)


def same_but(cells: pd.DataFrame, varied: tuple[str, ...]) -> pd.DataFrame:
    """With a column `same`: of the settings in which runs of the folder differ, all that are not `varied`."""
    settings = read_settings(cells["settings"]).drop(columns=[*varied], errors="ignore")
    return cells.assign(same=[json.dumps(of) for of in settings.to_dict("records")])


def has(cells: pd.DataFrame, mask: pd.Series, *by: str) -> pd.Series:
    """For each cell, whether the mask is true of a cell that shares SAME, and `by`, with it."""
    return mask.groupby([cells[name] for name in (*SAME, *by)]).transform("any")


def both_sides(cells: pd.DataFrame) -> pd.DataFrame:
    """0 % and 100 %, which have no side, once for bottom and once for top; `column` is the side."""
    across = cells["side"].isin(["none", "all"])
    sides = [cells[across].assign(column=side) for side in ("bottom", "top")]
    return pd.concat([cells[~across].assign(column=lambda of: of["side"]), *sides])


def plain(cells: pd.DataFrame) -> pd.DataFrame:
    """What the paper corrupts, as and when it does."""
    as_paper = cells["method"].eq("reinit") & cells["parts"].eq("all") & cells["side"].isin(SIDES)
    return cells[as_paper & cells["order"].eq("before")]


def by_method(cells: pd.DataFrame) -> pd.DataFrame:
    """Table A: methods at each degree that has several; beside them the relative size of the change."""
    cells = cells[cells["tuning"].eq("full") & cells["parts"].eq("all") & cells["side"].isin(SIDES)]
    other, uncorrupted = cells["method"] != "reinit", cells["side"] == "none"
    cells = cells[has(cells, other, "percent") | (uncorrupted & has(cells, other))]
    by = [cells[name] for name in (*SAME, "percent", "method")]
    for side in ("bottom", "top"):
        change = cells["relative_change"].where(cells["side"].isin([side, "all"])).groupby(by).transform("max")
        cells = cells.assign(**{f"change {side}": as_text(change, "{:.3f}")})
    method = cells["method"].mask(cells["side"] == "none", "uncorrupted")
    return both_sides(cells.assign(method=method, corruption=as_text(cells["percent"], "{:g}%")))


def by_place(cells: pd.DataFrame) -> pd.DataFrame:
    """Table B: single layers, other places than the paper's, and their parts."""
    cells = cells[cells["tuning"] == "full"]
    other, uncorrupted = cells["parts"].ne("all") | ~cells["side"].isin(SIDES), cells["side"] == "none"
    f1 = cells["f1"].where(uncorrupted).groupby([cells[name] for name in SAME]).transform("first")
    place = cells["place"].mask(uncorrupted, "none")
    shown = (other | cells["layers"].eq(1)) & has(cells, other, "method") | (uncorrupted & has(cells, other))
    return cells.assign(place=place, column=cells["parts"], lost=cells["f1"] - f1)[shown]


def by_tuning(cells: pd.DataFrame) -> pd.DataFrame:
    """Table C: what trains, and how much of it (the most, where that depends on the side), against the corruption."""
    cells = plain(cells)
    other = ~cells["tuning"].isin(["full", "probe", "probe_converged"])
    cells = cells[has(cells, other, "side", "percent") | (cells["side"].eq("none") & has(cells, other))]
    own = read_settings(cells["settings"]).filter([*OF_TUNING])
    own = name_apart(own, [cells[name] for name in ("model", "pooling", "tuning")], cells["dataset"])
    cells = cells.assign(tuning=cells["tuning"] + (" (" + own + ")").where(own != "", ""), column=degree(cells))
    trained = cells["trained"].groupby([cells[name] for name in (*SAME, "tuning")]).transform("max")
    return cells.assign(trained=as_text(trained, "{:,.0f}"))


def by_depth(cells: pd.DataFrame) -> pd.DataFrame:
    """Table D: one layer more at a time, from each side, where there are steps that the paper's quarters have not."""
    cells = plain(cells[cells["tuning"] == "full"])
    between = cells["percent"].where(cells["percent"] % 25 > 0)
    return both_sides(cells[between.groupby([cells[name] for name in SAME]).transform("nunique") > 1])


def by_order(cells: pd.DataFrame) -> pd.DataFrame:
    """Table E: corrupted before fine-tuning, as in the paper, and after it, where it is then fine-tuned once more."""
    after, uncorrupted = cells["order"] == "after", cells["side"] == "none"
    shown = has(cells, after, "method", "parts", "side", "percent", "tuning")
    shown |= uncorrupted & has(cells, after, "tuning")
    method = cells["method"].mask(uncorrupted, "uncorrupted")
    cells = cells.assign(method=method, corruption=as_text(cells["percent"], "{:g}%"))
    return both_sides(cells[shown & cells["parts"].eq("all")])


def degree(cells: pd.DataFrame) -> pd.Series:
    """What is corrupted, as the name of a column."""
    side = cells["side"].where(cells["side"].isin(["bottom", "top"]), "")
    return (as_text(cells["percent"], "{:g}% ") + side).str.strip()


def by_training(cells: pd.DataFrame) -> pd.DataFrame:
    """Table F: more rows or more epochs, where runs differ in nothing else. Where a data set has several versions with
    as many rows, the one that most cells have counts; each other is a set of its own."""
    cells = plain(cells[cells["tuning"] == "full"]).dropna(subset=[*AMOUNTS])
    version = read_settings(cells["settings"]).reindex(columns=["data_fingerprint"], fill_value="").squeeze(axis=1)
    most = version.groupby([cells[name] for name in (*SAME, "train")]).transform(lambda of: of.mode()[0])
    same = read_settings(cells["same"]).assign(data_fingerprint=version.mask(version == most, ""))
    amounts = {unit: as_text(cells[name], "{:.12g}") for name, unit in AMOUNTS.items()}
    same = [json.dumps(of) for of in same.to_dict("records")]
    cells = cells.assign(same=same, column=degree(cells), **amounts)
    amount, by = cells["rows"] + " " + cells["epochs"], [cells[name] for name in SAME]
    return cells[amount.groupby(by).transform("nunique") > 1]


LAB_TABLES = {  # caption, the columns of its rows, its cells
    "A": ("by method of corruption", ["corruption", "method", "change bottom", "change top"], by_method),
    "B": ("by corrupted place and part", ["method", "place"], by_place),
    "C": ("by what trains", ["tuning", "trained"], by_tuning),
    "D": ("by number of corrupted layers", ["layers"], by_depth),
    "E": ("corrupted before, or after, fine-tuning", ["corruption", "method", "order"], by_order),
    "F": ("by rows and epochs of training", ["rows", "epochs"], by_training),
}


def lab_cells(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells of each lab table that has any, with the columns of its rows, and `column`; `variant` says what sets
    them apart in that table."""
    before, chosen = cells[cells["order"] == "before"], {}
    for name, (_, _, select) in LAB_TABLES.items():
        shown = select(same_but(cells if name == "E" else before, VARIED[name]))
        if len(shown):
            once = shown[~shown.index.duplicated()]
            apart = name_apart(read_settings(once["same"]), [once["model"], once["pooling"]], once["dataset"])
            chosen[name] = shown.assign(variant=shown.index.map(apart))
    return chosen


def in_no_table(cells: pd.DataFrame, chosen: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The cells that neither a table of the paper's kind nor one of the lab holds."""
    shown = {index for frame in chosen.values() for index in frame.index}
    return cells[cells["table"].isna() & ~cells.index.isin(shown)]


def lab_table(name: str, cells: pd.DataFrame) -> pd.DataFrame:
    """A lab table as text, from its cells: F1 with its deviation over seeds; a dagger marks collapsed cells."""
    texts = as_text(cells["f1"]).mask(cells["collapsed"].eq(True), as_text(cells["f1"], "{:.2f}†"))
    cells = cells.assign(text=texts + as_text(cells["f1_std"], " ± {:.2f}"))
    rows = ["model", "variant", "pooling", *LAB_TABLES[name][1]]
    wide = cells.pivot(index=rows, columns=["dataset", "column"], values="text").fillna("")
    for axis in (0, 1):
        wide = wide.sort_index(axis=axis, key=lambda names: names.map(in_order(names).index))
    table = wide.set_axis([f"{dataset_title(dataset)} {column}" for dataset, column in wide], axis=1).reset_index()
    several = table["pooling"].nunique() > 1
    names = zip(table["model"].map(model_title), table["pooling"], table["variant"], strict=True)
    table["model"] = [" ".join(filter(None, (model, of * several, variant))) for model, of, variant in names]
    return table.drop(columns=["variant", "pooling"])


# ---- Whether differences are more than luck ----

AGAINST = {  # what each cell is compared with: the cell that is as it is, but for this
    "A": ("reinit", {"method": "reinit"}),
    "B": ("uncorrupted", {"method": "reinit", "parts": "all", "side": "none", "percent": 0.0}),
    "C": ("full", {"tuning": "full"}),
    "E": ("corrupted before", {"order": "before"}),
}


def by_more_training(cells: pd.DataFrame, by_seed: pd.DataFrame) -> list[tuple]:
    """Table F's pairs for `differences`: how far a cell is from the uncorrupted one with as much training, against how
    far it is with the fewest epochs, and with the fewest rows."""
    corrupted, same = cells[cells["side"] != "none"].reset_index(names="cell"), [*SAME, *AMOUNTS]
    uncorrupted = cells[cells["side"] == "none"].reset_index(names="whole")[[*same, "whole"]]
    corrupted, pairs = corrupted.merge(uncorrupted, on=same), []
    for amount, unit in AMOUNTS.items():
        same = [*SAME, "side", "percent", *AMOUNTS.keys() - {amount}]
        least = corrupted.loc[corrupted.groupby(same)[amount].idxmin(), [*same, amount, "cell", "whole"]]
        for pair in corrupted.merge(least, on=same, suffixes=("", "_least")).to_dict("records"):
            far, far_least = (by_seed[pair[f"cell{end}"]] - by_seed[pair[f"whole{end}"]] for end in ("", "_least"))
            if pair["cell"] != pair["cell_least"]:
                against = f"the same with {unit} = {pair[f'{amount}_least']:.12g}, both minus the uncorrupted"
                pairs.append(("F", pair["cell"], pair["cell_least"], against, far - far_least))
    return pairs


def differences(chosen: dict[str, pd.DataFrame], cells: pd.DataFrame, runs: pd.DataFrame, cell: list) -> pd.DataFrame:
    """A row for each cell of Tables A to C, and E: how far its F1 is from that of `AGAINST`, by paired seeds; and for
    those of Table F, `by_more_training`.

    As for a claim: the mean, its 95 % t interval, p, and p corrected by Holm within its table. `runs` are those of
    `stats.fixed_rate`; `against` names the other cell's learning rate where it is another.
    """
    by_seed, pairs = stats.f1_by_seed(cells, runs, cell), []
    on = [*SAME, "method", "parts", "side", "percent", "tuning", "order"]
    for table in [name for name in AGAINST if name in chosen]:
        (against, change), alike = AGAINST[table], same_but(cells, VARIED[table])
        asked = alike.loc[chosen[table].index.unique()].reset_index(names="cell").assign(**change)
        for pair in asked.merge(alike[on].reset_index(names="other"), on=on).itertuples():
            if pair.cell != pair.other:
                pairs.append((table, pair.cell, pair.other, against, by_seed[pair.cell] - by_seed[pair.other]))
    pairs += by_more_training(chosen["F"], by_seed) if "F" in chosen else []
    rates = cells[cell].merge(runs[[*cell, "learning_rate"]].drop_duplicates(cell), how="left")["learning_rate"]
    rates, rows = rates.set_axis(cells.index), []
    for table, of, other, against, apart in pairs:
        against += f", at {rates[other]:g}" if rates[[of, other]].nunique() == 2 else ""
        judged = stats.judge_seeds(apart)
        judged["verdict"] = {"holds": "higher", "fails": "lower"}.get(judged["verdict"], judged["verdict"])
        rows.append({"table": table, **cells.loc[of, [*cell, "place"]], "against": against} | judged)
    frame = pd.DataFrame(rows, columns=["table", *cell, "place", "against", *stats.VERDICT[:8]])
    for _, p in frame["p"].dropna().groupby(frame["table"]):
        frame.loc[p.index, "p_holm"] = multipletests(p, method="holm")[1]
    return frame


# ---- Recovery, step by step ----


def recovery_curves(runs: pd.DataFrame, steps: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """A row for each cell and step of --eval_at: mean F1 over its seeds, and the recovery R of those means.

    `runs` are those of `stats.fixed_rate`; `uncorrupted` is the mean F1 of the uncorrupted model's last epoch over the
    same seeds, missing if it lacks one of them. A step that not all of the cell's runs have is left out.
    """
    same = ["model", "variant", "pooling", "dataset", "tuning", "learning_rate", "seed"]
    uncorrupted = runs.loc[runs["side"] == "none", [*same, "f1_last"]].rename(columns={"f1_last": "uncorrupted"})
    whole = steps.merge(runs.merge(uncorrupted, how="left", on=same).drop(columns="f1"), on="run")
    mean = {name: (name, "mean") for name in ("f1", "floor", "words")} | {"seeds": ("seed", "nunique")}
    mean |= {"f1_std": ("f1", "std"), "uncorrupted": ("uncorrupted", lambda f1: f1.mean(skipna=False))}
    curves = whole.groupby([*cell, "step"]).agg(**mean, runs=("run", " ".join)).reset_index()
    curves = curves[curves["seeds"] == curves.groupby(cell)["seeds"].transform("max")]
    curves["recovery"] = stats.recovery(curves["f1"], curves["uncorrupted"], curves["floor"])
    return curves


def recovery_times(curves: pd.DataFrame, cell: list[str]) -> pd.DataFrame:
    """A row for each cell: the drop (what a fine-tuned model loses at once), T90, the first step with R >= 0.9, and
    the area under R(k), as its mean over the steps."""
    rows = []
    for key, curve in curves.groupby(cell):
        first, last, recovery = curve.iloc[0], curve.iloc[-1], curve["recovery"]
        row = dict(zip(cell, key, strict=True)) | {
            name: last[name] for name in ("uncorrupted", "floor", "seeds", "runs")
        }
        row |= {"first_step": first["step"], "f1_first": first["f1"], "last_step": last["step"], "f1_last": last["f1"]}
        fell = first["uncorrupted"] - first["f1"] if (row["order"], first["step"]) == ("after", 0) else np.nan
        reached = curve.loc[recovery >= 0.9, "step"]
        t90 = "" if recovery.isna().all() else str(reached.iloc[0]) if len(reached) else "not reached"
        width = last["step"] - first["step"]
        area = np.trapezoid(recovery, curve["step"]) / width if width else np.nan
        rows.append(row | {"drop": fell, "t90": t90, "area": area})
    return pd.DataFrame(rows)
