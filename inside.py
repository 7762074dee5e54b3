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
from lab_plots import PALETTE
from paper import dataset_title
from plots import COLUMN, GREY, LINES, STYLE, describe_corruption, describe_model, own_ids, save
from tables import groups

KINDS = ("similarity", "barrier", "distance", "layers")  # inside_<kind>.csv
ORDERS = {"before": "corrupted, then fine-tuned", "after": "fine-tuned, corrupted, fine-tuned again"}
FIGURE = ["model", "variant", "dataset", "pooling", "tuning"]  # what one figure is of


def read(output_dir: Path, runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Of the runs that are in results.csv, each with its cell: the frames of analyse.py and, as `curves` and
    `recovery`, of aggregate.py; those that are there."""
    frames = {}
    for name in ("curves", "recovery", *KINDS):
        path = output_dir / (f"inside_{name}.csv" if name in KINDS else f"{name}.csv")
        frame = read_csv(path) if path.exists() else pd.DataFrame()
        frame = frame.merge(runs[[*CELL, "run"]], on="run") if name in KINDS and len(frame) else frame
        frames |= {name: frame} if len(frame) else {}
    return frames


def summarise(frames: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """A row for each cell that was measured: `recovery`, and means over the runs of what analyse.py found.

    `cka`, of the last layers, and `barrier` are against the run that each is compared with; `distance` and `cosine` of
    all corrupted tensors as one; `probe_before` and `probe_after` F1 in percent, at the last layer.
    """
    of_runs = []
    if "similarity" in frames:
        same = frames["similarity"].query("layer == layer_against")
        of_runs.append(same[same["layer"] == same["layer"].max()].set_index(["run", *CELL])["cka"])
    if "barrier" in frames:
        of_runs.append(frames["barrier"].groupby(["run", *CELL])["above"].max().rename("barrier"))
    if "distance" in frames:
        of_runs.append(frames["distance"].query("tensor == 'all'").set_index(["run", *CELL])[["distance", "cosine"]])
    if "layers" in frames:
        last = frames["layers"].query("layer == layer.max()").assign(state="probe_" + frames["layers"]["state"])
        of_runs.append(100 * last.pivot(index=["run", *CELL], columns="state", values="weighted_f1"))
    cells = frames.get("recovery", pd.DataFrame(columns=[*CELL, "runs"]))
    if of_runs:
        runs = pd.concat(of_runs, axis=1).reset_index("run").groupby(CELL)
        found = runs.mean(numeric_only=True).join(runs["run"].agg(" ".join).rename("found_in"))
        cells = cells.merge(found.reset_index(), how="outer", on=CELL)
        cells["runs"] = cells["runs"].fillna(cells["found_in"])
    return cells.sort_values(["order", "percent", "side"], kind="stable", ascending=[False, True, True])


# ---- Figures ----


def panels_of(frame: pd.DataFrame, height: float, **options: object) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure with a panel for each value of `panel`, two side by side."""
    parts = list(frame.groupby("panel", sort=False))
    rows = -(-len(parts) // 2)
    figure = Figure(figsize=(2 * COLUMN, height * rows + 0.6), layout="constrained")
    axes = figure.subplots(rows, 2, squeeze=False, **options).flatten()
    for unused in axes[len(parts) :]:
        unused.set_visible(False)
    first = frame.iloc[0]
    figure.suptitle(f"{describe_model(first)}, {dataset_title(first['dataset'])}", fontsize=8)
    for panel, (name, _) in zip(axes, parts, strict=False):
        panel.set_title(name, loc="left")
    return figure, [(panel, part) for panel, (_, part) in zip(axes, parts, strict=False)]


def draw_lines(frame: pd.DataFrame, x: str, y: str, labels: tuple[str, str], scale: str = "linear") -> Figure:
    """The mean of `y` over the runs, against `x`, a line for each cell; the band is one deviation."""
    figure, panels = panels_of(frame, 1.9, sharex=True, sharey=True)
    lines = {}
    for panel, part in panels:
        for (side, percent, method), cell in part.groupby(["side", "percent", "method"], sort=False):
            label = describe_corruption(side, percent) + ("" if method == "reinit" else f", {method}")
            colour = LINES[side][1] if side in LINES and method == "reinit" else PALETTE[len(lines) % len(PALETTE)]
            of_x = cell.groupby(x)[y]
            mean, std = of_x.mean(), of_x.std() if "f1_std" not in cell else cell.set_index(x)["f1_std"]
            (lines[label],) = panel.plot(
                mean, marker="o", markersize=2, color=lines[label].get_color() if label in lines else colour
            )
            panel.fill_between(
                mean.index, mean - std, mean + std, color=lines[label].get_color(), alpha=0.15, linewidth=0
            )
        for words, dash in (("uncorrupted", (0, (4, 2))), ("words", ":"), ("floor", (0, (1, 2)))):
            for value in part.get(words, pd.Series(dtype=float)).dropna().head(1):
                panel.axhline(value, color=GREY, linestyle=dash, linewidth=0.8)
                panel.annotate(
                    {"words": "words alone"}.get(words, words),
                    (1, value),
                    xycoords=("axes fraction", "data"),
                    ha="right",
                    va="bottom",
                    fontsize=5.5,
                    color=GREY,
                )
        panel.set_xscale(scale, **({"linthresh": 1} if scale == "symlog" else {}))
        panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    figure.supxlabel(labels[0], fontsize=7)
    figure.supylabel(labels[1], fontsize=7)
    figure.legend(lines.values(), lines.keys(), loc="outside lower center", ncols=4)
    return figure


def draw_maps(frame: pd.DataFrame) -> Figure:
    """CKA of each layer with each of the run that it is compared with, a panel for each cell, means over its runs."""
    figure, panels = panels_of(frame, 2.2)
    for panel, part in panels:
        mean = part.pivot_table(index="layer", columns="layer_against", values="cka", dropna=False)
        image = panel.imshow(mean, origin="lower", cmap="viridis", vmin=0, vmax=1)
        for (y, x), value in np.ndenumerate(mean.to_numpy()):
            text = "" if np.isnan(value) else f"{value:.2f}".lstrip("0")
            panel.text(x, y, text, ha="center", va="center", fontsize=5, color="white" if value < 0.6 else "black")
        panel.set(xlabel="layer of the uncorrupted run", ylabel="layer")
    figure.colorbar(image, ax=figure.axes, shrink=0.6)
    return figure


def draw_kind(kind: str, frame: pd.DataFrame) -> Figure:
    """The figure of one kind of frame, of one model and data set."""
    order = frame["order"].map(ORDERS)
    if kind == "curves":
        return draw_lines(
            frame.assign(panel=order), "step", "f1", ("steps of fine-tuning", "weighted F1 (%)"), "symlog"
        )
    if kind == "similarity":
        cell = [
            describe_corruption(side, percent) for side, percent in zip(frame["side"], frame["percent"], strict=True)
        ]
        return draw_maps(
            frame.assign(panel=pd.Series(cell, frame.index) + ", corrupted " + frame["order"] + " fine-tuning")
        )
    if kind == "barrier":
        labels = ("from the run that it is compared with (0) to the recovered run (1)", "test loss")
        return draw_lines(frame.assign(panel=order), "a", "loss", labels)
    if kind == "distance":
        frame = frame.dropna(subset="layer").melt([*CELL, "layer"], ["distance", "cosine"], "measure")
        return draw_lines(
            frame.assign(panel=frame["measure"] + ", " + frame["order"]),
            "layer",
            "value",
            ("layer", "mean over tensors"),
        )
    frame = frame.assign(panel=order + ": " + frame["state"] + " recovery", f1=100 * frame["weighted_f1"])
    return draw_lines(frame, "layer", "f1", ("layer, 0 the embeddings", "weighted F1 (%) of the probe"))


@rc_context(STYLE)
def draw_inside(frames: dict[str, pd.DataFrame], folder: Path) -> list[dict]:
    """A figure for each kind, model and data set, as files in `folder` and for the page."""
    figures = []
    for kind in (kind for kind in frames if kind != "recovery"):
        for key, frame in groups(frames[kind], *FIGURE):
            stem = f"inside_{'_'.join(filter(None, key))}_{kind}".replace("/", "--").replace(" ", "-")
            svg = own_ids(save(draw_kind(kind, frame), folder / stem), f"i{len(figures)}-")
            figures.append({"kind": kind, "table": "inside", "dataset": key[2], "stem": stem, "svg": svg})
    return figures
