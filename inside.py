"""What analyse.py found, and how fast models recover: one row for each cell, and the figures of both.

Used by report.py, which puts them on the page and into its folder of figures.
"""

from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from aggregate import CELL, read_csv
from common import check_together
from lab_plots import PALETTE
from paper import dataset_title
from plots import COLUMN, GREY, LINES, STYLE, describe_corruption, describe_model, file_stem, own_ids, save
from tables import groups

KINDS = ("similarity", "barrier", "distance", "layers")  # inside_<kind>.csv, and summary
ORDERS = {"before": "corrupt, fine-tune", "after": "fine-tune, corrupt, fine-tune"}
FIGURE = ["model", "variant", "dataset", "pooling", "tuning"]  # what one figure is of


def read(output_dir: Path, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The frames that are there: of analyse.py, for the `runs` (results.csv), with their cells; `curves`; and `cells`,
    a row for each cell that was measured: recovery.csv, of its `runs`, and the means of what analyse.py found, over
    those that it was `found_in`. Raises InputError if a file is not what was written."""
    frames, recovery = {}, pd.DataFrame(columns=[*CELL, "runs"])
    there = any(output_dir.glob("inside_*.csv"))
    written = check_together(output_dir, "aggregate") | (check_together(output_dir, "analyse") if there else set())
    for kind in (*KINDS, "summary"):
        if (name := f"inside_{kind}.csv") in written:
            frames[kind] = read_csv(output_dir / name).merge(runs[[*CELL, "run"]], on="run")
    if "curves.csv" in written:
        frames["curves"], recovery = (read_csv(output_dir / f"{name}.csv") for name in ("curves", "recovery"))
    if "summary" in frames:
        by_cell = frames.pop("summary").groupby(CELL)
        found = by_cell.mean(numeric_only=True).join(by_cell["run"].agg(" ".join).rename("found_in"))
        recovery = recovery.merge(found.reset_index(), how="outer", on=CELL)
    frames["cells"] = recovery.sort_values(["order", "percent", "side"], ascending=[False, True, True])
    return {kind: frame for kind, frame in frames.items() if len(frame)}


# ---- Figures ----

LINE_FIGURES = {  # x, y, and what stands at the axes
    "curves": ("step", "f1", "step of fine-tuning", "weighted F1 (%)"),
    "barrier": ("a", "loss", "from the run compared with (0) to the recovered one (1)", "test loss"),
    "distance": ("layer", "value", "layer", "mean over its tensors"),
    "layers": ("layer", "f1", "layer, 0 the embeddings", "weighted F1 of the probe (%)"),
}
REFERENCES = {"uncorrupted": (0, (4, 2)), "words": ":", "floor": (0, (1, 2))}  # columns of curves, and their dashes


def add_panels(kind: str, frame: pd.DataFrame) -> pd.DataFrame:
    """The frame with columns `panel`, by which it is sorted, `label` of its line or map, and what is drawn."""
    label = [describe_corruption(*cell) for cell in zip(frame["side"], frame["percent"], strict=True)]
    how = [
        (", " + frame[name]).where(frame[name] != usual, "") for name, usual in (("method", "reinit"), ("parts", "all"))
    ]
    frame = frame.assign(label=pd.Series(label, frame.index) + how[0] + how[1])
    panel = frame["order"].map(ORDERS)
    if kind == "similarity":
        panel = frame["label"] + (", " + frame["order"]).where(frame["side"] != "none", ", two seeds")
    if kind == "layers":
        frame, panel = frame.assign(f1=100 * frame["weighted_f1"]), panel + ": " + frame["state"] + " recovery"
    if kind == "distance":
        frame = frame.dropna(subset="layer").melt([*CELL, "label", "layer"], ["distance", "cosine", "moved"], "measure")
        panel = frame["order"].map(ORDERS) + ": " + frame["measure"]
    return frame.assign(panel=panel).sort_values(["order", "percent"], ascending=[False, True], kind="stable")


def new_panels(frame: pd.DataFrame, columns: int, **options: object) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure as wide as a page, with a panel for each value of `panel`, `columns` side by side, and its rows."""
    parts = list(frame.groupby("panel", sort=False))
    rows = -(-len(parts) // columns)
    figure = Figure(figsize=(2 * COLUMN, 1.9 * rows + 0.5), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, **options).flatten()
    for unused in axes[len(parts) :]:
        unused.set_visible(False)
    for panel, (name, _) in zip(axes, parts, strict=False):
        panel.set_title(name, loc="left", fontsize=6 if columns > 2 else 7)
    figure.suptitle(f"{describe_model(frame.iloc[0])}, {dataset_title(frame['dataset'].iloc[0])}", fontsize=8)
    return figure, [(panel, part) for panel, (_, part) in zip(axes, parts, strict=False)]


def draw_lines(kind: str, frame: pd.DataFrame) -> Figure:
    """A line for each cell, the mean over its runs; the band is one deviation."""
    x, y, *labels = LINE_FIGURES[kind]
    figure, panels = new_panels(frame, 2, sharex=True, sharey=True)
    lines = {}
    for panel, part in panels:
        for (label, side, method), cell in part.groupby(["label", "side", "method"], sort=False):
            usual = LINES[side][1] if side in LINES and method == "reinit" else PALETTE[len(lines) % len(PALETTE)]
            colour = lines[label].get_color() if label in lines else usual
            mean = cell.groupby(x)[y].mean()
            std = cell.set_index(x)["f1_std"] if kind == "curves" else cell.groupby(x)[y].std()
            (lines[label],) = panel.plot(mean, marker="o", markersize=2, color=colour, label=label)
            panel.fill_between(mean.index, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        for name, dash in REFERENCES.items():
            for value in part.get(name, pd.Series(dtype=float)).head(1).dropna():
                panel.axhline(value, color=GREY, linestyle=dash, linewidth=0.8)
                looks = {"transform": panel.get_yaxis_transform(), "va": "bottom", "fontsize": 5.5, "color": GREY}
                panel.text(0.01, value, name, **looks)
        if kind == "curves":
            panel.set_xscale("symlog", linthresh=2)
            panel.set_xticks(sorted({0, *part["step"]}), labels=sorted({0, *part["step"]}), fontsize=5, minor=False)
        elif x == "layer":
            panel.xaxis.get_major_locator().set_params(integer=True)
        panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
        panel.set(xlabel=labels[0], ylabel=labels[1])
        panel.label_outer()
    figure.legend(handles=[*lines.values()], loc="outside lower center", ncols=4)
    return figure


def draw_similarity(frame: pd.DataFrame) -> Figure:
    """CKA of each layer with each of the run that it is compared with, a map for each cell, means over its runs."""
    figure, panels = new_panels(frame, 4, sharex=True, sharey=True)
    for panel, part in panels:
        mean = part.pivot_table(index="layer", columns="layer_against", values="cka", dropna=False)
        panel.imshow(mean, origin="lower", cmap="viridis", vmin=0, vmax=1)
        for (layer, other), value in np.ndenumerate(mean.to_numpy()):
            looks = {"ha": "center", "va": "center", "fontsize": 4, "color": "white" if value < 0.6 else "black"}
            panel.text(other, layer, "" if np.isnan(value) else f"{value:.2f}", **looks)
        panel.set(xlabel="layer compared with", ylabel="layer")
        panel.label_outer()
    return figure


@rc_context(STYLE)
def draw_inside(frames: dict[str, pd.DataFrame], folder: Path) -> list[dict]:
    """A figure for each kind, model and data set, as files in `folder` and for the page."""
    figures = []
    for kind in (kind for kind in frames if kind != "cells"):
        for key, rows in groups(frames[kind], *FIGURE):
            stem = file_stem("inside", *key, kind)
            frame = add_panels(kind, rows)
            figure = draw_similarity(frame) if kind == "similarity" else draw_lines(kind, frame)
            svg = own_ids(save(figure, folder / stem), f"i{len(figures)}-")
            figures.append({"kind": kind, "table": "inside", "dataset": key[2], "stem": stem, "svg": svg})
    return figures
