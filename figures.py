"""The figures of the page, as files to put into a paper: F1 by epoch, and F1 against the corrupted fraction.

Used by report.py, which gives each of them the cells of one table and data set.
"""

from io import StringIO
from pathlib import Path
from typing import NamedTuple

import matplotlib
import pandas as pd
from loky import ProcessPoolExecutor, cpu_count
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import aggregate

COLUMN = 3.3  # inches
# Okabe and Ito's vermillion and blue, which colour-blind eyes tell apart; in the page each is a variable of its own, so
# that the same drawing is right on light and on dark.
INK, GREY, BOTTOM, TOP = "#222222", "#767676", "#d55e00", "#0072b2"
THEME = {INK: "var(--ink)", GREY: "var(--grey)", BOTTOM: "var(--bottom)", TOP: "var(--top)"}
LINES = {"none": (INK, "-", "o"), "bottom": (BOTTOM, "-", "v"), "top": (TOP, "--", "^"), "all": (GREY, ":", "s")}
STYLE = {
    "font.size": 7,
    "axes.titlesize": 8,
    "axes.edgecolor": GREY,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.6,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "text.color": INK,
    "lines.linewidth": 1.1,
    "lines.markersize": 3,
    "legend.frameon": False,
    "legend.fontsize": 6.5,
    "pdf.fonttype": 42,  # TrueType, embedded
    "svg.fonttype": "none",
    "svg.hashsalt": "healing",
}


def model_of(cell: dict | pd.Series) -> str:
    return f"{aggregate.MODELS.get(cell['model'], cell['model'])} {cell['variant']}".strip()


def dataset_of(cell: dict | pd.Series) -> str:
    return aggregate.DATASETS.get(cell["dataset"], cell["dataset"])


def label_of(cell: dict | pd.Series) -> str:
    """A cell in words: model, damage, data set."""
    return f"{model_of(cell)}, {damage_of(cell['side'], cell['percent'])}, {dataset_of(cell)}"


def damage_of(side: str, percent: float) -> str:
    return {"none": "undamaged", "all": "100 %"}.get(side, f"{side} {percent:g} %")


def means(cell: pd.Series, epochs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """F1 in percent by epoch: mean and standard deviation over the cell's seeds, at its best learning rate."""
    frames = [epochs[run].set_index("epoch")["weighted_f1"] * 100 for run in cell["runs"].split()]
    seeds = pd.concat(frames, axis=1)
    return pd.DataFrame({"mean": seeds.mean(axis=1), "std": seeds.std(axis=1)})


def opacity(percent: float) -> float:
    return 0.35 + 0.65 * percent / 100


def panels(cells: pd.DataFrame, legend: int) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure as wide as a column, with one panel for each model (and variant) below the other."""
    groups = [cells[cells["model"] == model] for model in aggregate.in_order(cells["model"], aggregate.MODELS)]
    groups = [group for of_model in groups for _, group in of_model.groupby("variant")]
    height = 1.75 * len(groups) + 0.12 * legend + 0.2
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for panel, group in zip(axes, groups, strict=True):
        first = group.iloc[0]
        panel.set_title(f"{model_of(first)}, {dataset_of(first)}", loc="left")
        panel.set_ylabel("weighted F1 (%)")
        panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    return figure, list(zip(axes, groups, strict=True))


def draw_epochs(cells: pd.DataFrame, epochs: dict[str, pd.DataFrame]) -> Figure:
    """Weighted F1 by epoch, a line for each corruption, a panel for each model; the band is one standard deviation."""
    order = cells.sort_values("percent").dropna(subset="f1")
    figure, axes = panels(order, legend=3)
    lines = {}
    for panel, group in axes:
        for _, cell in group.iterrows():
            colour, dash, marker = LINES[cell["side"]]
            of_cell, name = means(cell, epochs), damage_of(cell["side"], cell["percent"])
            looks = {"color": colour, "alpha": opacity(cell["percent"]) if cell["side"] in ("bottom", "top") else 1}
            lines[name] = panel.plot(of_cell["mean"], linestyle=dash, marker=marker, markersize=2.2, **looks)[0]
            if of_cell["std"].notna().any():
                low, high = of_cell["mean"] - of_cell["std"], of_cell["mean"] + of_cell["std"]
                panel.fill_between(of_cell.index, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("epoch")
    names = sorted(lines, key=lambda name: ["bottom", "top", "undamaged", "100"].index(name.split()[0]))
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=3)
    return figure


def draw_fraction(cells: pd.DataFrame, name: str) -> Figure:
    """Weighted F1 against the corrupted part of the layers, one panel for each model; the reference's in thin lines."""
    figure, axes = panels(cells, legend=2)
    shown = {}
    for panel, group in axes:
        for whose, looks in (("", {}), ("_reference", {"linewidth": 0.7, "markerfacecolor": "none", "alpha": 0.75})):
            there = group.dropna(subset=f"f1{whose}").sort_values("percent")
            for side, words in (("none", "undamaged"), ("all", "100 % corrupted")):
                if not whose and len(level := there.loc[there["side"] == side, "f1"]):
                    colour, dash, _ = LINES[side]
                    style = {"color": colour, "linestyle": (0, (4, 2)) if side == "none" else dash, "linewidth": 0.8}
                    shown[words] = panel.axhline(level.item(), **style)
            for side in ("bottom", "top"):
                path = there[there["side"].isin(["none", side, "all"])]
                if not len(path):
                    continue
                colour, dash, marker = LINES[side]
                style = {"color": colour, "linestyle": dash, "marker": marker, **looks}
                error = None if whose or path["f1_std"].isna().all() else path["f1_std"].fillna(0)
                drawn = panel.errorbar(path["percent"], path[f"f1{whose}"], error, elinewidth=0.7, capsize=1.5, **style)
                shown[f"{side}, {name}" if whose else side] = drawn
        panel.set_xticks(sorted({0, 100, *group["percent"]}))
    panel.set_xlabel("corrupted encoder layers (%)")
    order = ["bottom", "top", "undamaged", "100 % corrupted", f"bottom, {name}", f"top, {name}"]
    handles = {words: shown[words] for words in order if words in shown}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 if len(handles) <= 4 else 3)
    return figure


def save(figure: Figure, path: Path) -> Markup:
    """Write the figure as path.png and path.pdf; returns it as SVG, in the colours of the page."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each file
    for kind, options in (("png", {"dpi": 300}), ("pdf", {"metadata": {"CreationDate": None}})):
        aside = path.with_name(f".partial-{path.name}.{kind}")
        figure.savefig(aside, facecolor="white", **options)
        aside.replace(path.with_name(f"{path.name}.{kind}"))
    drawn = StringIO()
    figure.savefig(drawn, format="svg", transparent=True, metadata={"Date": None})
    svg = drawn.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


class Drawing(NamedTuple):
    """What a figure is drawn from, in a process of its own, and where its files go."""

    table: int
    dataset: str
    kind: str  # fraction or epochs
    cells: pd.DataFrame
    epochs: dict[str, pd.DataFrame]
    name: str
    path: Path

    def draw(self) -> dict:
        with matplotlib.rc_context(STYLE):
            by_epoch = self.kind == "epochs"
            figure = draw_epochs(self.cells, self.epochs) if by_epoch else draw_fraction(self.cells, self.name)
            svg = save(figure, self.path)
        dataset = aggregate.DATASETS.get(self.dataset, self.dataset)
        return {"table": self.table, "dataset": dataset, "kind": self.kind, "stem": self.path.name, "svg": svg}


def draw_all(both: pd.DataFrame, epochs: dict[str, pd.DataFrame], name: str, folder: Path) -> list[dict]:
    """Two figures for each table and data set, as files and for the page."""
    drawings = []
    for table, of_table in both.groupby("table"):
        for dataset in aggregate.in_order(of_table["dataset"], aggregate.DATASETS):
            cells = of_table[of_table["dataset"] == dataset]
            its = {run: epochs[run] for runs in cells["runs"].dropna() for run in runs.split()}
            for kind in ("fraction", "epochs"):
                path = folder / f"table{table}_{dataset}_{kind}"
                drawings.append(Drawing(table, dataset, kind, cells, its, name, path))
    with ProcessPoolExecutor(min(len(drawings), cpu_count(), 8)) as pool:
        return list(pool.map(Drawing.draw, drawings))
