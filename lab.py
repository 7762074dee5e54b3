"""Tables A to D, beyond the paper: by method, by place, by tuning, and layer by layer (docs/lab.md).

Functions of frames; used by aggregate.py and report.py. Each table has the cells of those models and data sets that
have something that only it shows.
"""

import re

import numpy as np
import pandas as pd
from statsmodels.stats.multitest import multipletests

import stats
from config import SIDES
from paper import dataset_title, model_title
from tables import as_text, groups, in_order

SAME = ["model", "variant", "pooling", "dataset"]  # what the cells share that are compared


def has(cells: pd.DataFrame, mask: pd.Series, *by: str) -> pd.Series:
    """For each cell, whether the mask is true of a cell that shares SAME, and `by`, with it."""
    return mask.groupby([cells[name] for name in (*SAME, *by)]).transform("any")


def both_sides(cells: pd.DataFrame) -> pd.DataFrame:
    """0 % and 100 %, which have no side, once for bottom and once for top; `column` is the side."""
    across = cells["side"].isin(["none", "all"])
    sides = [cells[across].assign(column=side) for side in ("bottom", "top")]
    return pd.concat([cells[~across].assign(column=cells["side"]), *sides])


def by_method(cells: pd.DataFrame) -> pd.DataFrame:
    """Table A: methods at each degree that has several; beside them the relative size of the change."""
    cells = cells[cells["tuning"].eq("full") & cells["parts"].eq("all") & cells["side"].isin(SIDES)]
    other = cells["method"] != "reinit"
    cells = cells[has(cells, other, "percent") | (cells["side"].eq("none") & has(cells, other))]
    uncorrupted = cells["side"] == "none"
    cells = cells.assign(method=cells["method"].mask(uncorrupted, "uncorrupted"))
    change = cells.pivot_table("relative_change", [*SAME, "percent", "method"], "side", observed=True)
    place = [cells[name] for name in (*SAME, "percent", "method")]
    for side in ("bottom", "top"):
        of_side = change.get(side, pd.Series(dtype=float)).reindex(pd.MultiIndex.from_arrays(place))
        cells[f"change {side}"] = as_text(of_side.set_axis(cells.index), "{:.3f}")
    return both_sides(cells.assign(corruption=as_text(cells["percent"], "{:g}%")))


def by_place(cells: pd.DataFrame) -> pd.DataFrame:
    """Table B: single layers, other places than the paper's, and their parts."""
    cells = cells[cells["tuning"] == "full"]
    other = cells["parts"].ne("all") | ~cells["side"].isin(SIDES)
    shown = (other | cells["layers"].eq(1)) & has(cells, other, "method")
    cells = cells[shown | (cells["side"].eq("none") & has(cells, other))]
    uncorrupted = cells["f1"].where(cells["side"] == "none").groupby([cells[name] for name in SAME]).transform("first")
    place = cells["place"].mask(cells["side"] == "none", "none")
    return cells.assign(place=place, column=cells["parts"], lost=cells["f1"] - uncorrupted)


def by_tuning(cells: pd.DataFrame) -> pd.DataFrame:
    """Table C: what trains, and how much of it, against the corruption."""
    cells = cells[cells["method"].eq("reinit") & cells["parts"].eq("all") & cells["side"].isin(SIDES)]
    other = ~cells["tuning"].isin(["full", "probe", "probe_converged"])
    cells = cells[has(cells, other, "side", "percent") | (cells["side"].eq("none") & has(cells, other))]
    trained = cells["trained"].groupby([cells[name] for name in (*SAME, "tuning")])
    fewest, most = trained.transform("min"), trained.transform("max")
    text = as_text(most, "{:,.0f}").mask(fewest < most, as_text(fewest, "{:,.0f} to ") + as_text(most, "{:,.0f}"))
    degree = as_text(cells["percent"], "{:g}% ") + cells["side"].where(cells["side"].isin(["bottom", "top"]), "")
    return cells.assign(trained=text, column=degree.str.strip())


def by_depth(cells: pd.DataFrame) -> pd.DataFrame:
    """Table D: one layer more at a time, from each side, where there are steps that the paper's quarters have not."""
    cells = cells[cells["method"].eq("reinit") & cells["parts"].eq("all") & cells["tuning"].eq("full")]
    cells = cells[cells["side"].isin(SIDES)]
    between = cells["percent"].where(cells["percent"] % 25 > 0)
    cells = cells[between.groupby([cells[name] for name in SAME]).transform("nunique") > 1]
    return both_sides(cells)


LAB_TABLES = {  # caption, the columns of its rows, its cells
    "A": ("by method of corruption", ["corruption", "method", "change bottom", "change top"], by_method),
    "B": ("by corrupted place and part", ["method", "place"], by_place),
    "C": ("by what trains", ["tuning", "trained"], by_tuning),
    "D": ("by number of corrupted layers", ["layers"], by_depth),
}


def lab_cells(cells: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The cells of each lab table that has any, with the columns of its rows, and `column`."""
    chosen = {name: select(cells) for name, (_, _, select) in LAB_TABLES.items()}
    return {name: frame for name, frame in chosen.items() if len(frame)}


def in_no_table(cells: pd.DataFrame, chosen: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """The cells that neither a table of the paper's kind nor one of the lab holds."""
    shown = {index for frame in chosen.values() for index in frame.index}
    return cells[cells["table"].isna() & ~cells.index.isin(shown)]


def natural(text: str) -> list:
    """For sorting: layer 2 before layer 10, and the degree before its side."""
    return [(0, float(word), "") if word[0].isdigit() else (1, 0.0, word) for word in re.findall(r"[\d.]+|\D+", text)]


def lab_table(name: str, cells: pd.DataFrame) -> pd.DataFrame:
    """A lab table as text, from its cells: F1 with its deviation over seeds; a dagger marks collapsed cells."""
    rows = LAB_TABLES[name][1]
    texts = as_text(cells["f1"]).mask(cells["collapsed"].eq(True), as_text(cells["f1"], "{:.2f}†"))
    cells = cells.assign(text=texts + as_text(cells["f1_std"], " ± {:.2f}"))
    columns = {}
    for (dataset,), of_set in groups(cells, "dataset"):
        for column in sorted(set(of_set["column"]), key=natural):
            columns[dataset, column] = f"{dataset_title(dataset)} {column}"
    for row in rows:
        order = (
            in_order(cells[row])
            if row in ("method", "tuning")
            else sorted(set(cells[row]), key=lambda v: natural(f"{v}"))
        )
        cells[row] = pd.Categorical(
            cells[row], ["none", *(v for v in order if v != "none")] if row == "place" else order
        )
    cells["model"] = pd.Categorical(cells["model"], in_order(cells["model"]))
    wide = cells.pivot(index=["model", "variant", "pooling", *rows], columns=["dataset", "column"], values="text")
    wide = wide.sort_index().reindex(columns=pd.MultiIndex.from_tuples(columns)).fillna("")
    table = wide.set_axis(list(columns.values()), axis=1).reset_index()
    table["model"] = [f"{model_title(m)} {v}".strip() for m, v in zip(table["model"], table["variant"], strict=True)]
    return table.drop(columns=["variant", "pooling"])


# ---- Whether differences are more than luck ----


def pairs(chosen: dict[str, pd.DataFrame], cells: pd.DataFrame) -> list[tuple[str, int, int]]:
    """Table, cell and the cell that it is compared with, by their index: each method with reinit at the same place,
    each place with the uncorrupted model, each tuning with full."""
    plain = cells[cells["method"].eq("reinit") & cells["parts"].eq("all")]
    key, found = [*SAME, "side", "percent", "tuning"], []
    of = {tuple(row[:-1]): row[-1] for row in plain.assign(index=plain.index)[[*key, "index"]].itertuples(index=False)}
    for name, frame in chosen.items():
        for index in dict.fromkeys(frame.index if name != "D" else ()):
            cell = cells.loc[index]
            same, place = tuple(cell[SAME]), (cell["side"], cell["percent"])
            against = {"A": (*place, "full"), "B": ("none", 0.0, "full"), "C": (*place, "full")}[name]
            other = of.get((*same, *against))
            if other is not None and other != index:
                found.append((name, index, other))
    return found


def differences(
    chosen: dict[str, pd.DataFrame], cells: pd.DataFrame, runs: pd.DataFrame, cell: list[str]
) -> pd.DataFrame:
    """A row for each of `pairs`: the mean difference in F1 over paired seeds, its 95 % t interval, p, also corrected by
    Holm within its table. `runs` are those of `stats.fixed_rate`."""
    by_seed, rows = stats.f1_by_seed(cells, runs, cell), []
    for name, index, other in pairs(chosen, cells):
        judged = stats.judge_seeds(by_seed[index] - by_seed[other])
        judged["verdict"] = {"holds": "higher", "fails": "lower"}.get(judged["verdict"], judged["verdict"])
        against = "reinit" if name == "A" else "uncorrupted" if name == "B" else "full"
        rows.append(
            {"table": name, **cells.loc[index, cell], "place": cells["place"][index], "against": against} | judged
        )
    frame = pd.DataFrame(
        rows, columns=["table", *cell, "place", "against", "verdict", "why", "difference", "low", "high", "p", "seeds"]
    )
    frame["p_holm"], tested = np.nan, frame["p"].dropna()
    for _, p in tested.groupby(frame["table"]):
        frame.loc[p.index, "p_holm"] = multipletests(p, method="holm")[1]
    return frame
