"""Write outputs/report.html, one page that shows what healed, and its figures as files to put into a paper.

    python report.py                                  # after python aggregate.py
    python report.py --output_dir outputs --against other_outputs      # two grids, side by side

The page needs nothing but itself: the claims and how often they hold, the tables as heat maps beside the paper's, F1
against the corrupted fraction, F1 by epoch, Figure 1, what is doubtful, and each run with the command that repeats it.
Each figure is also in outputs/figures, as PNG and PDF, 3.3 inches wide as a column is. Everything is read from the CSVs
that aggregate.py wrote and from the runs' folders; a number that these do not agree on is refused.
"""

import argparse
import json
import re
from base64 import b64encode
from collections import defaultdict
from io import BytesIO, StringIO
from pathlib import Path
from typing import NamedTuple

import jinja2
import matplotlib
import numpy as np
import pandas as pd
from loky import ProcessPoolExecutor, cpu_count
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import aggregate
import figure1

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
LOST, APART = 25, 10  # F1 points at which a heat map's colour is full: against the undamaged model, against the paper
CLAIMS = (
    "A corrupted model does not fully recover",
    "The more layers are corrupted, the lower the F1",
    "Corrupting the bottom hurts more than corrupting the top",
)
NEEDS = ("an undamaged and a corrupted model", "two degrees of corruption", "bottom and top at the same degree")
COUNTED = ("holds", "compared")
HOW_OFTEN = ((1.0, "always"), (0.9, "nearly always"), (0.65, "mostly"), (0.35, "about half of the time"))
OF_A_CELL = ["model", "side", "frac", "percent", "dataset", "pooling", "tuning", "learning_rate", "seed"]
OF_A_CELL += ["model_fingerprint", "data_fingerprint"]
COLUMNS = ["table", "model", "variant", "dataset"]  # a column of a table, for one model
TEMPLATE = Path(__file__).with_name("report.html.jinja")


class NoReport(ValueError):
    """There is nothing to show, or what there is does not fit together; the message says what to do."""


# ---- Read ----


class Grid(NamedTuple):
    """What aggregate.py made of the runs, and what stands in their folders."""

    runs: pd.DataFrame  # results.csv
    cells: pd.DataFrame  # cells.csv
    pairs: pd.DataFrame  # bottom_top.csv
    results: dict[str, dict]  # each run's result.json
    epochs: dict[str, pd.DataFrame]  # each run's epochs.csv
    failures: dict[str, str]  # why a run failed
    left_out: list[str]  # runs that are in no table


def read_csv(path: Path) -> pd.DataFrame:
    names = dict.fromkeys(("model", "variant", "dataset"), str)
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names)
    return frame.fillna({"variant": ""})


def read(output_dir: Path) -> Grid:
    """Raises NoReport if the CSVs are not there or are older than the runs."""
    again = f"run python aggregate.py --output_dir {output_dir} first"
    if not (output_dir / "runs").is_dir():
        raise NoReport(f"{output_dir} holds no runs: give the output folder of grid.py or train.py")
    try:
        runs, cells, pairs = (read_csv(output_dir / f"{name}.csv") for name in ("results", "cells", "bottom_top"))
    except (OSError, ValueError) as error:
        raise NoReport(f"the tables are not there ({' '.join(str(error).split())}): {again}") from error
    results, epochs = {}, {}
    for run, f1 in zip(runs["run"], runs["f1"], strict=True):
        folder = output_dir / "runs" / run
        try:
            results[run] = json.loads((folder / "result.json").read_text())
            epochs[run] = pd.read_csv(folder / "epochs.csv")
            same = abs(100 * results[run]["weighted_f1"] - f1) < 1e-6
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NoReport(
                f"{folder} is not what results.csv was made from ({type(error).__name__}): {again}"
            ) from error
        if not same:
            raise NoReport(f"{folder} has another F1 than results.csv: {again}")
    folders = sorted(path.parent.name for path in output_dir.glob("runs/*/result.json"))
    failures = {path.parent.name: reason_of(path) for path in sorted(output_dir.glob("runs/*/failure.json"))}
    return Grid(runs, cells, pairs, results, epochs, failures, [run for run in folders if run not in results])


def reason_of(failure: Path) -> str:
    try:
        return json.loads(failure.read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return "failure.json cannot be read"


# ---- Ours beside the reference: the paper, or another grid ----


def beside(ours: pd.DataFrame, reference: pd.DataFrame, by_variant: bool) -> pd.DataFrame:
    """A row for each cell of ours, and of the reference where it has a column of ours; its values end in _reference.

    `difference` is ours - reference, `lost` F1 - the undamaged model's (both in percent, negative is worse).
    """
    columns = ours[COLUMNS].drop_duplicates()
    on = COLUMNS if by_variant else [name for name in COLUMNS if name != "variant"]
    theirs = reference[[*on, "percent", "side", "f1", "collapsed", "layers"]].merge(columns, on=on)
    both = ours.merge(theirs, how="outer", on=[*COLUMNS, "percent", "side"], suffixes=("", "_reference"))
    both["layers"] = both["layers"].fillna(both["layers_reference"]).astype(int)
    both["difference"] = both["f1"] - both["f1_reference"]
    whole = both[both["side"] == "none"].set_index(COLUMNS)
    for whose in ("", "_reference"):
        undamaged = both[COLUMNS].merge(whole[[f"f1{whose}"]], how="left", left_on=COLUMNS, right_index=True)
        both[f"lost{whose}"] = both[f"f1{whose}"] - undamaged[f"f1{whose}"]
    return both


def how_often(holds: int, compared: int) -> str:
    share = holds / compared
    words = next((words for least, words in HOW_OFTEN if share >= least), "seldom" if holds else "never")
    return f"{words} ({holds} of {compared})"


def verdict(both: pd.DataFrame, reference: pd.DataFrame, pairs: pd.DataFrame, name: str) -> list[dict]:
    """For each claim: how often it holds in the tables that are here, in ours and in the reference, and a sentence."""
    ours = both.dropna(subset="f1")
    counts = aggregate.claims_table(ours, reference)
    counts = counts[counts["table"].isin(ours["table"])]
    said = []
    for number, claim in enumerate(CLAIMS, 1):
        of_claim = counts[counts["claim"].str.startswith(f"({number})")]
        sums = of_claim.sum(numeric_only=True)
        holds, compared, there, in_all = (int(sums[f"{of}_{what}"]) for of in ("ours", "paper") for what in COUNTED)
        sentence = f"Nothing here to compare: it takes {NEEDS[number - 1]}."
        if compared:
            sentence = f"Holds here {how_often(holds, compared)}"
            sentence += f"; in {name} {how_often(there, in_all)}." if in_all else "."
        if number == 3 and len(pairs):
            unclear = [pair_of(pair) for pair in pairs[pairs["low"] <= 0].to_dict("records")]
            sentence += (
                f" In {len(pairs) - len(unclear)} of {len(pairs)} the 95 % interval of the difference is above 0"
            )
            sentence += f"; not so in {'; '.join(unclear)}." if 0 < len(unclear) <= 3 else "."
        shares = [{"name": "here", "holds": holds, "compared": compared}]
        shares += [{"name": name, "holds": there, "compared": in_all}] if in_all else []
        tables = of_claim.to_dict("records")
        said.append({"number": number, "claim": claim, "sentence": sentence, "shares": shares, "tables": tables})
    return said


def pair_of(pair: dict) -> str:
    """A row of bottom_top.csv in words."""
    how = [
        words for words, is_so in (("mean", pair["pooling"] == "mean"), ("probe", pair["tuning"] == "probe")) if is_so
    ]
    return ", ".join([model_of(pair), f"{pair['percent']:g} %", dataset_of(pair), *how])


def what_is_left(both: pd.DataFrame) -> pd.DataFrame:
    """A row for each table, degree and side: the F1 in percent of the undamaged model's, averaged over table columns.

    Taken are the `columns` (model and data set) that have both sides at that degree; `reference` if it has them all.
    """
    share = both.assign(
        ours=100 * both["f1"] / (both["f1"] - both["lost"]),
        reference=100 * both["f1_reference"] / (both["f1_reference"] - both["lost_reference"]),
    )
    rows = []
    for (table, percent), group in share[share["side"] != "none"].groupby(["table", "percent"]):
        wide = group.pivot(index=COLUMNS, columns="side", values=["ours", "reference"])
        complete = wide[wide["ours"].notna().all(axis=1)]
        if complete.empty or set(wide["ours"]) not in ({"all"}, {"bottom", "top"}):
            continue
        for side in wide["ours"]:
            ours, reference = complete["ours", side].mean(), complete["reference", side].mean(skipna=False)
            of = {"table": table, "percent": percent, "side": side, "columns": len(complete)}
            rows.append(of | {"ours": ours, "reference": reference})
    return pd.DataFrame(rows, columns=["table", "percent", "side", "columns", "ours", "reference"])


def by_degree(left: pd.DataFrame) -> defaultdict:
    cells = zip(left["percent"], left["side"], left.to_dict("records"), strict=True)
    return defaultdict(dict, {(percent, side): cell for percent, side, cell in cells})


def headline(left: pd.DataFrame, name: str) -> str:
    """The first table's degree nearest to one half, in a sentence; nothing if no column has both sides."""
    of_table = left[(left["table"] == left["table"].min()) & (left["side"] != "all")]
    if of_table.empty:
        return ""
    percent = min(of_table["percent"], key=lambda percent: abs(percent - 50))
    found = left[(left["table"] == left["table"].min()) & left["percent"].isin([percent, 100])].set_index("side")
    words = {
        "bottom": f"with the bottom {percent:g} % of its layers re-initialised",
        "top": "with the top",
        "all": "with all",
    }
    parts = [f"{found.at[side, 'ours']:.0f} % {words[side]}" for side in words if side in found.index]
    tuning = "A linear probe" if left["table"].min() == 4 else "Fine-tuning"
    columns = int(found["columns"].iloc[0])
    sentence = f"{tuning} gives back, of the undamaged model's F1, {', '.join(parts)}"
    if found["reference"].notna().all():
        theirs = ", ".join(f"{found.at[side, 'reference']:.0f} %" for side in words if side in found.index)
        sentence += f"; in {name} {theirs}"
    over = f"over {columns} column{'s' * (columns > 1)} of model and data set"
    return f"{sentence} (Table {left['table'].min()}, averaged {over})."


# ---- The tables as heat maps ----


def heat(cells: pd.DataFrame, points: pd.Series, full: float, signed: bool = False) -> dict:
    """One table's cells in the paper's layout, for the page; the colour follows `points` and is full at `full`."""
    table = aggregate.paper_table(cells)
    shown = aggregate.marked(table, "<b>{}</b>", '<span class="collapsed">{}</span>')
    models: list[dict] = []
    for row, (model, degree) in table.text[["model", "corruption"]].iterrows():
        if not models or models[-1]["name"] != model:
            models.append({"name": model, "rows": []})
        numbers = []
        for column in list(table.cell)[::2]:
            across = degree.startswith(("0%", "100%"))
            for name in (column,) if across else (column, column.removesuffix("bottom") + "top"):
                cell = table.cell.at[row, name]
                number = {"across": across, "text": shown.at[row, name], "cell": None if pd.isna(cell) else int(cell)}
                if number["text"]:
                    by = points.get(cell, np.nan)
                    text = f"{cells.at[cell, 'f1']:+.2f}" if signed else number["text"]
                    number |= {"text": Markup(text), "heat": 0 if np.isnan(by) else min(1, abs(by) / full)}
                    number["kind"] = "low" if by < 0 else "high"
                numbers.append(number)
        models[-1]["rows"].append({"degree": degree, "numbers": numbers})
    datasets = [column.removesuffix(" bottom") for column in list(table.cell)[::2]]
    return {"datasets": datasets, "models": models, "missing": table.missing}


def maps(both: pd.DataFrame, name: str) -> list[dict]:
    """The heat maps of each table: ours, and where the reference has cells of it, theirs and the difference."""
    found = []
    for number, cells in both.groupby("table"):
        ours = heat(cells, cells["lost"], LOST)
        views = [{"title": "Ours", "kind": "lost", **ours}]
        known = cells[cells["f1_reference"].notna()]
        if len(known):
            cells = cells[cells["model"].isin(known["model"]) & cells["dataset"].isin(known["dataset"])]
            theirs = cells.assign(f1=cells["f1_reference"], f1_std=np.nan, collapsed=cells["collapsed_reference"])
            title = name.replace("the paper", "The paper")
            views.append({"title": title, "kind": "lost", **heat(theirs, cells["lost_reference"], LOST)})
            apart = cells.assign(f1=cells["difference"], f1_std=np.nan, collapsed=False)
            of_apart = heat(apart, cells["difference"], APART, signed=True)
            views.append({"title": f"Ours - {name}", "kind": "apart", **of_apart})
        caption = f"weighted F1 in percent {aggregate.TABLES[number]}"
        found.append({"number": number, "caption": caption, "views": views, "missing": ours["missing"]})
    return found


def model_of(cell: dict | pd.Series) -> str:
    return f"{aggregate.MODELS.get(cell['model'], cell['model'])} {cell['variant']}".strip()


def dataset_of(cell: dict | pd.Series) -> str:
    return aggregate.DATASETS.get(cell["dataset"], cell["dataset"])


def label_of(cell: dict | pd.Series) -> str:
    """A cell in words: model, damage, data set."""
    return f"{model_of(cell)}, {damage_of(cell['side'], cell['percent'])}, {dataset_of(cell)}"


def damage_of(side: str, percent: float) -> str:
    return {"none": "undamaged", "all": "100 %"}.get(side, f"{side} {percent:g} %")


# ---- Figures ----


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


def figures_1(output_dir: Path) -> list[dict]:
    """Figure 1 of each model and data set that has one: its picture, four panels in two rows, and its numbers."""
    found = []
    for path in sorted(output_dir.glob("figure1_*_numbers.csv")):
        stem = path.name.removesuffix("_numbers.csv")
        numbers, dots = read_csv(path), pd.read_csv(output_dir / f"{stem}.csv", keep_default_na=False)
        names = dots.drop_duplicates("label").set_index("label")["label_name"].sort_index().to_dict()
        picture = BytesIO()
        figure1.draw(numbers, dots, names, across=2).savefig(picture, format="png")
        rows = numbers.assign(damage=[damage_of(*of) for of in zip(numbers["side"], numbers["percent"], strict=True)])
        first = numbers.iloc[0]
        title = f"{model_of(first)} on {dataset_of(first)}"
        picture = b64encode(picture.getvalue()).decode()
        found.append({"title": title, "stem": stem, "picture": picture, "rows": rows.to_dict("records")})
    return found


# ---- What to doubt, and where the numbers come from ----


def doubts(grid: Grid, both: pd.DataFrame) -> dict:
    """What a reader must know before trusting a number: collapsed runs, rates at the edge, gaps, what is not there."""
    ours = both.dropna(subset="f1")
    collapsed = grid.runs[grid.runs["collapsed"]]
    edge = ours[ours["edge"].eq(True)]
    apart = ours.dropna(subset="difference").sort_values("difference", key=abs, ascending=False)
    return {
        "collapsed": [{**run, "label": label_of(run)} for run in collapsed.to_dict("records")],
        "edge": cell_rows(edge),
        "edge_of": int(ours["edge"].notna().sum()),
        "gap": cell_rows(ours.sort_values("gap", ascending=False).head(10)),
        "mean_gap": ours["gap"].mean(),
        "apart": cell_rows(apart.head(10)),
        "mean_apart": apart["difference"].mean(),
        "mean_distance": apart["difference"].abs().mean(),
        "compared": len(apart),
        "spread": cell_rows(ours.dropna(subset="f1_std").sort_values("f1_std", ascending=False).head(10)),
        "no_table": cell_rows(grid.cells[grid.cells["table"].isna()]),
        "halved": [run for run, result in grid.results.items() if result.get("batch", {}).get("halved")],
        "resumed": [run for run, result in grid.results.items() if result.get("cut_off")],
        "failures": grid.failures,
        "left_out": grid.left_out,
    }


def cell_rows(cells: pd.DataFrame) -> list[dict]:
    return [{**cell, "label": label_of(cell), "runs": cell["runs"].split()} for cell in cells.to_dict("records")]


def tips(both: pd.DataFrame) -> list[dict]:
    """What a cell tells when it is pointed at."""
    return cell_rows(both.assign(id=both.index, runs=both["runs"].fillna("")))


def origin(grid: Grid) -> dict:
    """Where the numbers come from: settings, weights, rows, machines and hours."""
    results = pd.DataFrame(
        {
            "model": result["settings"]["model"],
            "model_fingerprint": result["settings"]["model_fingerprint"][:8],
            "revision": (result.get("model", {}).get("revision") or "")[:8],
            "dataset": result["settings"]["dataset"],
            "data_fingerprint": result["settings"]["data_fingerprint"][:8],
            "hours": result["seconds"]["total"] / 3600,
            "device": f"{result['device']['name']} ({result['device'].get('type', 'unknown')})",
            "threads": result["device"].get("threads"),
            **{name: result["versions"].get(name) for name in ("python", "torch", "transformers")},
            "commit": re.sub(r"^(\w{12})\w*", r"\1", result["commit"] or "none"),
            "finished": result.get("finished", "unknown"),
        }
        for result in grid.results.values()
    )
    rows = {
        result["settings"]["data_fingerprint"][:8]: result.get("data", {}).get("rows", {})
        for result in grid.results.values()
    }

    def counted(*by: str) -> list[dict]:
        groups = results.groupby([*by], dropna=False)
        return groups.agg(runs=("hours", "size"), hours=("hours", "sum")).reset_index().to_dict("records")

    values = settings_of(grid)
    return {
        "models": counted("model", "model_fingerprint", "revision"),
        "datasets": [{**of, "rows": rows[of["data_fingerprint"]]} for of in counted("dataset", "data_fingerprint")],
        "machines": counted("device", "threads", "python", "torch", "transformers", "commit"),
        "same": {name: next(iter(counts)) for name, counts in values.items() if len(counts) == 1},
        "varying": {name: counts for name, counts in values.items() if len(counts) > 1},
        "hours": results["hours"].sum(),
        "from": results["finished"].min()[:10],
        "until": results["finished"].max()[:10],
    }


def settings_of(grid: Grid) -> dict[str, dict[str, int]]:
    """The values of each setting, beside those of the cell, learning rate and seed, and how many runs have each."""
    settings = pd.DataFrame(result["settings"] for result in grid.results.values()).drop(columns=OF_A_CELL)
    settings = settings.astype(object).map(lambda value: json.dumps(value))
    return {name: column.value_counts().to_dict() for name, column in settings.items()}


def settings_apart(ours: Grid, theirs: Grid) -> list[dict]:
    """The settings whose values are not the same in two grids."""
    one, other = settings_of(ours), settings_of(theirs)
    both = [(name, list(one.get(name, {})), list(other.get(name, {}))) for name in {**one, **other}]
    return [{"name": name, "ours": a, "theirs": b} for name, a, b in both if set(a) != set(b)]


def run_rows(grid: Grid) -> list[dict]:
    """Each run, with the command that repeats it; `best` are those that a cell's number is made of."""
    best = set(" ".join(grid.cells["runs"]).split())
    return [
        {**run, "label": label_of(run), "best": run["run"] in best, "command": grid.results[run["run"]]["command"]}
        for run in grid.runs.to_dict("records")
    ]


# ---- The page ----


def render(**content: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE.name).render(**content)


def write(output_dir: Path, against: Path | None) -> Path:
    """Write the page and its figures; returns the page's path. Raises NoReport, OSError."""
    grid = read(output_dir)
    placed = grid.cells.dropna(subset="table").astype({"table": int})
    if placed.empty:
        raise NoReport("no cell belongs to a table of the paper: its pooling and tuning have none (see cells.csv)")
    if against:
        if against.resolve() == output_dir.resolve():
            raise NoReport(f"--against {against} is the output folder itself: give another")
        name = against.resolve().name
        stem = f"report_against_{name}"
        other = read(against)
        reference, apart = other.cells.dropna(subset="table").astype({"table": int}), settings_apart(grid, other)
    else:
        name, stem, reference, apart = "the paper", "report", aggregate.paper_cells(), []
    both = beside(placed, reference, by_variant=against is not None)
    if against and both["difference"].isna().all():
        raise NoReport(f"{output_dir} and {against} have no cell in common: nothing to compare")
    figures = output_dir / stem.replace("report", "figures")
    figures.mkdir(exist_ok=True)
    left = what_is_left(both)
    page = render(
        name=name,
        against=against,
        grid=grid,
        tables=maps(both, name),
        tables_known=aggregate.TABLES,
        verdict=verdict(both, reference, grid.pairs, name),
        left=[(table, by_degree(rows)) for table, rows in left.groupby("table")],
        degrees=left[["percent", "side"]].drop_duplicates().sort_values(["percent", "side"]).to_dict("records"),
        headline=headline(left, name),
        figures=draw_all(both, grid.epochs, name, figures),
        folder=figures.name,
        figures_1=figures_1(output_dir),
        doubts=doubts(grid, both),
        tips=tips(both),
        origin=origin(grid),
        runs=run_rows(grid),
        number_of={run: number for number, run in enumerate(grid.runs["run"], 1)},
        command_of={run: result["command"] for run, result in grid.results.items()},
        cells=int(both["f1"].notna().sum()),
        models=[aggregate.MODELS.get(m, m) for m in aggregate.in_order(both["model"], aggregate.MODELS)],
        datasets=[aggregate.DATASETS.get(d, d) for d in aggregate.in_order(both["dataset"], aggregate.DATASETS)],
        scale={"lost": LOST, "apart": APART},
        how_often=HOW_OFTEN,
        apart=apart,
    )
    path = output_dir / f"{stem}.html"
    aggregate.write_whole(path, page)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and examples
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    parser.add_argument("--against", type=Path, help="another output folder, in the place of the paper")
    args = parser.parse_args()
    try:
        path = write(args.output_dir, args.against)
    except (NoReport, OSError) as error:
        parser.error(str(error))
    print(f"-> {path} ({path.stat().st_size / 2**20:.1f} MiB), and its figures as PNG and PDF beside it")


if __name__ == "__main__":
    main()
