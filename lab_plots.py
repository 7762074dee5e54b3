"""The figures of Tables A to C: F1 against the size of the change, a map of layers and parts, bars of tunings.

report.py puts them on the page and into its folder of figures.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.figure import Figure

from lab import SAME, natural
from paper import dataset_title
from plots import COLOURS, COLUMN, GREY, INK, LINES, MARKERS, STYLE, describe_corruption, describe_model, own_ids, save
from tables import groups, in_order

PALETTE = (*COLOURS[:-1], INK)  # black would not be seen on a dark page


def new_panel(cells: pd.DataFrame, width: float, height: float) -> tuple[Figure, object]:
    figure = Figure(figsize=(width, height), layout="constrained")
    panel = figure.subplots()
    panel.set_title(f"{describe_model(cells.iloc[0])}, {dataset_title(cells['dataset'].iloc[0])}", loc="left")
    return figure, panel


def draw_change(cells: pd.DataFrame) -> Figure:
    """Table A: F1 against |W' - W| / |W|; a line for each method, from its mildest to its severest, solid and with
    filled marks for the bottom, dashed and hollow for the top."""
    figure, panel = new_panel(cells, COLUMN * 1.5, 2.9)
    for f1 in cells.loc[cells["side"] == "none", "f1"].head(1):
        panel.axhline(f1, color=INK, linestyle=(0, (4, 2)), linewidth=0.8, label="uncorrupted")
    shown = cells.dropna(subset=["relative_change", "f1"])
    shown = shown[shown["side"].isin(["bottom", "top"])].drop_duplicates(["side", "percent", "method"])
    family = shown["method"].str.split().str[0]
    for number, name in enumerate(dict.fromkeys(word.split()[0] for word in in_order(shown["method"]))):
        colour, marker = PALETTE[number % len(PALETTE)], MARKERS[number // len(PALETTE)]
        for side, dash, fill in (("bottom", "-", colour), ("top", "--", "none")):
            rows = shown[(family == name) & (shown["side"] == side)].sort_values("relative_change")
            looks = {"color": colour, "marker": marker, "markerfacecolor": fill, "linestyle": dash, "markersize": 4}
            label = name if side == "bottom" else None
            panel.errorbar(
                rows["relative_change"], rows["f1"], rows["f1_std"].fillna(0), elinewidth=0.6, label=label, **looks
            )
    panel.set_xlabel("relative size of the change, |W' - W| / |W| (solid: bottom; dashed, hollow: top)")
    panel.set_ylabel("weighted F1 (%)")
    panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    figure.legend(loc="outside lower center", ncols=4)
    return figure


def draw_places(cells: pd.DataFrame) -> Figure:
    """Table B: F1 - the uncorrupted model's, for each place and part."""
    rows = cells[cells["side"] != "none"]
    places, parts = sorted(set(rows["place"]), key=natural), sorted(set(rows["parts"]))
    lost = rows.pivot(index="place", columns="parts", values="lost").reindex(index=places, columns=parts)
    figure, panel = new_panel(cells, COLUMN, 0.8 + 0.27 * len(places))
    full = max(1.0, np.nanmax(np.abs(lost.to_numpy(float))))
    panel.imshow(lost.to_numpy(float), cmap="PuOr", vmin=-full, vmax=full, aspect="auto")
    for (y, x), value in np.ndenumerate(lost.to_numpy(float)):
        if value == value:
            colour = (
                "white" if abs(value) > 0.6 * full else "black"
            )  # on the map's own colours, light and dark page alike
            panel.text(x, y, f"{value:+.1f}", ha="center", va="center", color=colour, fontsize=6.5)
    panel.set_xticks(range(len(parts)), parts)
    panel.set_yticks(range(len(places)), places)
    panel.set_ylabel("corrupted layer")
    panel.set_xlabel("part; F1 points against the uncorrupted model")
    panel.tick_params(length=0)
    return figure


def draw_tunings(cells: pd.DataFrame) -> Figure:
    """Table C: a bar for each tuning and corruption, its deviation over the seeds, and its number of parameters."""
    figure, panel = new_panel(cells, COLUMN * 1.5, 2.6)
    corruptions = sorted(set(zip(cells["percent"], cells["side"], strict=True)))
    tunings = in_order(cells["tuning"])
    width = 0.8 / len(corruptions)
    for number, (percent, side) in enumerate(corruptions):
        rows = cells[cells["percent"].eq(percent) & cells["side"].eq(side)].set_index("tuning").reindex(tunings)
        x = np.arange(len(tunings)) + (number - (len(corruptions) - 1) / 2) * width
        looks = {"color": LINES[side][1], "label": describe_corruption(side, percent), "error_kw": {"elinewidth": 0.7}}
        panel.bar(x, rows["f1"], 0.92 * width, yerr=rows["f1_std"].fillna(0), **looks)
    trained = cells.drop_duplicates("tuning").set_index("tuning")["trained"].reindex(tunings)
    panel.set_xticks(range(len(tunings)), [f"{name}\n{count}" for name, count in trained.items()], fontsize=6)
    low = (cells["f1"] - cells["f1_std"].fillna(0)).min()
    panel.set_ylim(max(0, low - 3), min(100, cells["f1"].max() + 3))
    panel.set_ylabel("weighted F1 (%)")
    panel.set_xlabel("what trains, and how many parameters")
    figure.legend(loc="outside lower center", ncols=4)
    return figure


DRAWINGS = {"A": (draw_change, "size"), "B": (draw_places, "places"), "C": (draw_tunings, "tunings")}


@rc_context(STYLE)
def draw_lab(chosen: dict[str, pd.DataFrame], folder: Path) -> dict[str, list[dict]]:
    """The figures of each table, one for each model and data set, as files in `folder` and for the page."""
    figures: dict[str, list[dict]] = {}
    for name in DRAWINGS.keys() & chosen.keys():
        draw, kind = DRAWINGS[name]
        split = [*SAME, "method"] if name == "B" else SAME
        for key, cells in groups(chosen[name], *split):
            if name == "B" and set(cells["side"]) == {"none"}:
                continue
            stem = f"table{name}_{'_'.join(filter(None, key))}_{kind}".replace("/", "--").replace(" ", "-")
            svg: Markup = own_ids(save(draw(cells), folder / stem), f"{name}{len(figures.get(name, ()))}-")
            figures.setdefault(name, []).append(
                {"table": name, "dataset": cells["dataset"].iloc[0], "stem": stem, "svg": svg}
            )
    return figures
