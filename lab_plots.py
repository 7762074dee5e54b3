"""The figures of Tables A to C and F: by size of the change, layers and parts, what trains, epochs and rows.

report.py puts them on the page and into its folder of figures.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.container import BarContainer
from matplotlib.figure import Figure

from lab import AMOUNTS
from plots import (
    COLOURS,
    COLUMN,
    GREY,
    INK,
    LINES,
    MARKERS,
    STYLE,
    describe_column,
    describe_corruption,
    file_stem,
    own_ids,
    save,
)
from tables import groups, in_order

PALETTE = (*COLOURS[:-1], INK)  # black would not be seen on a dark page


def new_panel(cells: pd.DataFrame, width: float, height: float) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    panel.set_title(describe_column(cells), loc="left")
    return figure, panel


def draw_change(cells: pd.DataFrame) -> Figure:
    """Table A: F1 against |W' - W| / |W|; a line for each method, from its mildest to its severest."""
    figure, panel = new_panel(cells, COLUMN * 1.5, 2.9)
    for f1 in cells.loc[cells["side"] == "none", "f1"].head(1):
        panel.axhline(f1, color=INK, linestyle=(0, (4, 2)), linewidth=0.8, label="uncorrupted")
    shown = cells.dropna(subset=["relative_change", "f1"]).drop_duplicates(["side", "percent", "method"])
    family = shown["method"].str.split().str[0]
    for number, name in enumerate(dict.fromkeys(word.split()[0] for word in in_order(shown["method"]))):
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number // len(PALETTE)]
        for side, dash, fill in (("bottom", "-", colour), ("top", "--", "none")):
            rows = shown[(family == name) & (shown["side"] == side)].sort_values("relative_change")
            looks = {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": dash, "markersize": 4}
            looks |= {"yerr": rows["f1_std"].fillna(0), "elinewidth": 0.6, "label": name if side == "bottom" else None}
            panel.errorbar(rows["relative_change"], rows["f1"], **looks)
    panel.set_xlabel("relative size of the change, |W' - W| / |W| (solid: bottom; dashed, hollow: top)")
    panel.set_ylabel("weighted F1 (%)")
    panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_places(cells: pd.DataFrame) -> Figure:
    """Table B: F1 - the uncorrupted model's, for each place and part."""
    lost = cells[cells["side"] != "none"].pivot(index="place", columns="parts", values="lost")
    lost = lost.loc[in_order(lost.index)]
    figure, panel = new_panel(cells, COLUMN, 0.8 + 0.27 * len(lost))
    full = max(1.0, np.nanmax(np.abs(lost.to_numpy())))
    panel.imshow(lost, cmap="PuOr", vmin=-full, vmax=full, aspect="auto")
    for (y, x), value in np.ndenumerate(lost.to_numpy()):
        colour = "white" if abs(value) > 0.6 * full else "black"  # on the map's colours, on a light and a dark page
        text = "" if np.isnan(value) else f"{value:+.1f}"
        panel.text(x, y, text, ha="center", va="center", color=colour, fontsize=6.5)
    panel.set_xticks(range(len(lost.columns)), lost.columns)
    panel.set_yticks(range(len(lost)), lost.index)
    panel.set(xlabel="part; F1 points against the uncorrupted model", ylabel="corrupted layers")
    panel.tick_params(length=0)
    return figure


def draw_tunings(cells: pd.DataFrame) -> Figure:
    """Table C: a bar for each tuning and corruption, its deviation over the seeds, and its number of parameters."""
    figure, panel = new_panel(cells, COLUMN * 1.5, 2.6)
    of = cells.assign(bar=cells["tuning"] + "\n" + cells["trained"]).set_index("tuning")
    wide = of.pivot(index="bar", columns=["percent", "side"], values=["f1", "f1_std"]).sort_index(axis=1)
    wide = wide.loc[of.loc[in_order(cells["tuning"]), "bar"].unique()]
    colours = [LINES[side][1] for _, side in wide["f1"]]
    wide["f1"].plot.bar(ax=panel, yerr=wide["f1_std"].fillna(0), color=colours, rot=0, width=0.8, legend=False)
    low = (cells["f1"] - cells["f1_std"].fillna(0)).min()
    panel.set_ylim(max(0, low - 3), min(100, cells["f1"].max() + 3))
    panel.set(xlabel="what trains, and how many parameters", ylabel="weighted F1 (%)")
    bars = [drawn for drawn in panel.containers if isinstance(drawn, BarContainer)]
    words = [describe_corruption(side, percent) for percent, side in wide["f1"]]
    figure.legend(bars, words, loc="outside lower center", ncols=4)
    return figure


def draw_training(cells: pd.DataFrame) -> Figure:
    """Table F: F1 against the epochs, at the number of rows that has the most of them; and against the rows."""
    varied = [amount for amount in AMOUNTS if cells[amount].nunique() > 1]
    figure = Figure(figsize=(COLUMN * (0.5 + 0.5 * len(varied)), 2.4), layout="constrained")
    panels = figure.subplots(1, len(varied), sharey=True, squeeze=False)[0]
    panels[0].set_title(describe_column(cells), loc="left")
    lines = {}
    for axes, amount in zip(panels, varied, strict=True):
        (other,) = AMOUNTS.keys() - {amount}
        at = cells.groupby(other)[amount].nunique().idxmax()
        shown = cells[cells[other] == at].sort_values(amount)
        for (side, percent), rows in groups(shown, "side", "percent"):
            _, colour, form = LINES[side]
            looks = {"alpha": 0.35 + 0.65 * percent / 100 if side != "none" else 1, "elinewidth": 0.7, "capsize": 1.5}
            std = rows["f1_std"].fillna(0)
            label = describe_corruption(side, percent)
            lines[label] = axes.errorbar(rows[amount], rows["f1"], std, fmt=form, color=colour, label=label, **looks)
        axes.set_xscale("log")
        axes.set_xticks(sorted(set(shown[amount])), [f"{n:,.12g}" for n in sorted(set(shown[amount]))])
        axes.minorticks_off()
        axes.set_xlabel(f"{AMOUNTS[amount]} ({at:,.12g} {AMOUNTS[other]})")
        axes.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    panels[0].set_ylabel("weighted F1 (%)")
    figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=4)
    return figure


DRAWINGS = {
    "A": (draw_change, "size"),
    "B": (draw_places, "places"),
    "C": (draw_tunings, "tunings"),
    "F": (draw_training, "training"),
}


@rc_context(STYLE)
def draw_lab(chosen: dict[str, pd.DataFrame], folder: Path) -> dict[str, list[dict]]:
    """The figures of each table, one for each model and data set, as files in `folder` and for the page."""
    figures: dict[str, list[dict]] = {}
    for name in DRAWINGS.keys() & chosen.keys():
        draw, kind = DRAWINGS[name]
        for key, cells in groups(chosen[name], "model", "variant", "pooling", "dataset", *["method"] * (name == "B")):
            if set(cells["side"]) == {"none"}:
                continue  # a method of other tables alone
            stem = file_stem(f"table{name}", *key, kind)
            drawn = figures.setdefault(name, [])
            svg = own_ids(save(draw(cells), folder / stem), f"{name}{len(drawn)}-")
            drawn.append({"table": name, "dataset": cells["dataset"].iloc[0], "stem": stem, "svg": svg})
    return figures
