"""Draw the paper's Figure 1 and, for report.py, F1 by epoch and F1 against the corrupted fraction.

    python plots.py                          # Figure 1 of every model and data set whose runs kept their vectors
    python plots.py --model bert-base-uncased --dataset ag_news --frac 1/4

Figure 1 is t-SNE of the test split's [CLS] vectors after fine-tuning, at four degrees of corruption. It takes runs of
`python train.py --save_vectors` (`python grid.py --preset figure1` does the paper's four) that `python aggregate.py`
has put into results.csv. The panels are 0 %, top, bottom and 100 %, the paper's order: four runs that differ in the
corruption and the learning rate alone (the best by F1), at the lowest seed that all four have. They are written to
outputs/figure1_<model>_<dataset>.png and .pdf (with --frac, figure1_<model>_<dataset>_<percent>), their dots to .csv,
and to _numbers.csv what they say: `f1`, weighted, in percent; `silhouette` of the true classes, 1 far apart, 0 mixed,
below 0 closer to another class; `knn_accuracy` in percent, where each row gets the class that most of its 15 nearest
other rows have (on a tie the class that comes first). Both are measured in the original space.

t-SNE sees the first 50 principal components and starts from the first two, with perplexity 30 (a third of the rows
where there are fewer than 91), random state 0 and one thread, so that a machine draws the same figure each time. In
t-SNE neither the size of a cluster nor the distance between two means anything: compare panels by the numbers.
"""

import re
from contextlib import ExitStack
from hashlib import sha256
from io import StringIO
from pathlib import Path
from textwrap import fill

import numpy as np
import pandas as pd
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import KNeighborsClassifier
from threadpoolctl import threadpool_limits

import run_dir
from aggregate import read_csv
from common import InputError, atomic_write, check_together, fail, fraction, make_parser, one_line, run_script
from paper import dataset_title, model_name, model_title
from tables import groups

COLUMN = 3.3  # inches
# Okabe and Ito's palette, which colour-blind eyes tell apart; more classes than colours take the next marker.
BOTTOM, TOP = "#d55e00", "#0072b2"
COLOURS, MARKERS = (TOP, "#e69f00", "#009e73", "#cc79a7", "#56b4e9", BOTTOM, "#000000"), ("o", "^", "x")
INK, GREY = "#222222", "#767676"
# In the page each colour is a variable of its own, so that the same drawing is right on light and on dark.
THEME = {INK: "var(--ink)", GREY: "var(--grey)", BOTTOM: "var(--bottom)", TOP: "var(--top)"}
# The place in the legend, the colour, the marker and the dashes of each side.
LINES = {"bottom": (0, BOTTOM, "v-"), "top": (1, TOP, "^--"), "none": (2, INK, "o-"), "all": (3, GREY, "s:")}
FONTS = {"pdf.fonttype": 42, "text.parse_math": False}  # TrueType, embedded; a "$" in a name is a "$"
STYLE = FONTS | {"font.size": 7, "text.color": INK, "axes.titlesize": 8, "axes.labelcolor": INK, "axes.edgecolor": GREY}
STYLE |= {"axes.linewidth": 0.6, "axes.spines.top": False, "axes.spines.right": False}
STYLE |= {"xtick.color": GREY, "ytick.color": GREY, "lines.linewidth": 1.1, "lines.markersize": 3}
STYLE |= {"legend.frameon": False, "legend.fontsize": 6.5, "svg.fonttype": "none", "svg.hashsalt": "bert"}
NEIGHBOURS = 15
ENDS = ("_numbers.csv", ".csv", ".png", ".pdf")  # of the names of a figure's files
MORE_VECTORS = "run python grid.py --preset figure1, or python train.py --save_vectors, and then python aggregate.py"


def describe_model(cell: dict | pd.Series) -> str:
    return f"{model_title(cell['model'])} {cell['variant']}".strip()


def describe_column(cells: pd.DataFrame) -> str:
    """The model and the data set, which the cells share; lines no wider than a column."""
    return fill(f"{describe_model(cells.iloc[0])}, {dataset_title(cells['dataset'].iloc[0])}", 50)


def describe_corruption(side: str, percent: float) -> str:
    known = {"none": "uncorrupted", "all": "100 %", "bottom": f"bottom {percent:g} %", "top": f"top {percent:g} %"}
    return known.get(side, f"layers {side}")


# ---- F1 by epoch, and against the corrupted fraction ----


def make_panels(
    cells: pd.DataFrame, axis: tuple[float, float], legend: int
) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure as wide as a column, with one panel for each model (and variant) below the other."""
    of_models = [group for _, group in groups(cells, "model", "variant")]
    figure = Figure(figsize=(COLUMN, 1.75 * len(of_models) + 0.12 * legend + 0.2), layout="constrained")
    panels = figure.subplots(len(of_models), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
    for panel, group in zip(panels, of_models, strict=True):
        panel.set_title(describe_column(group), loc="left")
        panel.set_ylabel("weighted F1 (%)")
        panel.set_ylim(*axis)
        panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    return figure, list(zip(panels, of_models, strict=True))


def f1_axis(cells: pd.DataFrame) -> tuple[float, float]:
    """The limits of the F1 axis in all figures of a data set: what did not collapse, and what needs no encoder."""
    values = [cells[f"f1{end}"].mask(cells[f"collapsed{end}"].eq(True)) for end in ("", "_reference")]
    values = pd.concat([*values, cells["words"]]).dropna()
    if values.empty:
        return 0, 100
    room = max(1.0, 0.06 * (values.max() - values.min()))
    return max(0, values.min() - room), min(100, values.max() + room)


def clip(panel: Axes, x: pd.Series, f1: pd.Series, colour: str) -> None:
    """An arrow at the lower edge, with the number, where a point lies below the axis."""
    low, high = panel.get_ylim()
    for at, value in zip(x[f1 < low], f1[f1 < low], strict=True):
        looks = {"arrowprops": {"arrowstyle": "->", "color": colour, "linewidth": 0.8}, "ha": "center"}
        tip, end = (at, low), (at, low + 0.12 * (high - low))
        panel.annotate(f"{value:.1f}", tip, end, fontsize=5.5, color=colour, **looks)


def draw_epochs(cells: pd.DataFrame, epochs: dict[str, pd.DataFrame], axis: tuple[float, float]) -> Figure:
    """Weighted F1 by epoch, a line for each cell, a panel for each model; the band is one deviation over the seeds."""
    figure, panels = make_panels(cells.sort_values("percent").dropna(subset="f1"), axis, legend=3)
    lines = {}
    for panel, group in panels:
        for _, cell in group.iterrows():
            side, percent = cell["side"], cell["percent"]
            f1 = [epochs[run].set_index("epoch")["weighted_f1"] * 100 for run in cell["runs"].split()]
            seeds = pd.concat(f1, axis=1)
            mean, std = seeds.mean(axis=1), seeds.std(axis=1)
            place, colour, form = LINES[side]
            looks = {"markersize": 2.2, "alpha": 0.35 + 0.65 * percent / 100 if side != "none" else 1}
            (line,) = panel.plot(mean, form, color=colour, label=describe_corruption(side, percent), **looks)
            lines[place, percent] = line
            if mean.max() < axis[0]:  # a line that is not in the picture
                clip(panel, mean.index[-1:], mean[-1:], colour)
            if std.notna().any():
                panel.fill_between(mean.index, mean - std, mean + std, color=colour, alpha=0.15, linewidth=0)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("epoch")
    figure.legend(handles=[lines[key] for key in sorted(lines)], loc="outside lower center", ncols=3)
    return figure


def draw_fraction(cells: pd.DataFrame, name: str, axis: tuple[float, float]) -> Figure:
    """Weighted F1 against the corrupted part of the layers, one panel for each model; the reference's in thin lines."""
    figure, panels = make_panels(cells, axis, legend=3)
    artists = {}
    for panel, group in panels:
        for side, words, dash in (("none", "uncorrupted", (0, (4, 2))), ("all", "100 % corrupted", ":")):
            place, colour, _ = LINES[side]
            for f1 in group.loc[group["side"] == side, "f1"].dropna():
                artists[place] = panel.axhline(f1, color=colour, linestyle=dash, linewidth=0.8, label=words)
        for place, column, words in ((8, "words", "words alone"), (9, "floor", "constant or guessing")):
            for f1 in group.loc[group[column] >= axis[0], column].head(1):
                artists[place] = panel.axhline(f1, color=GREY, linestyle=(0, (1, 2)), linewidth=1, label=words)
        for whose, looks in (("", {}), ("_reference", {"linewidth": 0.7, "markerfacecolor": "none", "alpha": 0.75})):
            rows = group.dropna(subset=f"f1{whose}").sort_values("percent")
            for side in ("bottom", "top"):
                path = rows[rows["side"].isin(["none", side, "all"])]
                if path.empty:
                    continue
                place, colour, form = LINES[side]
                error = None if whose or path["f1_std"].isna().all() else path["f1_std"].fillna(0)
                bars = {"yerr": error, "elinewidth": 0.7, "capsize": 1.5, "label": f"{side}, {name}" if whose else side}
                artist = panel.errorbar(path["percent"], path[f"f1{whose}"], fmt=form, color=colour, **bars, **looks)
                artists[place + len(LINES) * bool(whose)] = artist
                clip(panel, path["percent"], path[f"f1{whose}"], colour)
        panel.set_xticks(sorted({0, 100, *cells["percent"]}))  # the panels share their ticks
    panel.set_xlabel("corrupted encoder layers (%)")
    handles = [artists[place] for place in sorted(artists)]
    figure.legend(handles=handles, loc="outside lower center", ncols=2 if len(handles) <= 4 else 3)
    return figure


def draw_forest(rows: pd.DataFrame) -> Figure:
    """Top - bottom of each comparison of claim (3): `label`, `difference`, `low` and `high` over seeds; where there are
    none, `rows_low` and `rows_high` over the rows of two models, hollow and dashed."""
    figure = Figure(figsize=(COLUMN * 1.5, 0.55 + 0.17 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for place, row in enumerate(rows.iloc[::-1].itertuples()):
        of_seeds = row.low == row.low
        low, high = (row.low, row.high) if of_seeds else (row.rows_low, row.rows_high)
        axes.plot([low, high], [place, place], color=INK, linewidth=1, linestyle="-" if of_seeds else (0, (2, 2)))
        axes.plot(row.difference, place, "o", color=INK, markersize=3.5, markerfacecolor=INK if of_seeds else "none")
    axes.axvline(0, color=GREY, linewidth=0.8)
    axes.set_yticks(range(len(rows)), rows["label"].iloc[::-1], fontsize=6)
    axes.tick_params(axis="y", length=0, labelcolor=INK)
    axes.set_ylim(-0.7, len(rows) - 0.3)
    axes.set_xlabel("top - bottom, weighted F1 (points): above 0 the bottom hurts more")
    return figure


def file_stem(*words: str) -> str:
    """The words as a file's name, without its ending; with a digest where a sign had to give way, or letters."""
    name = "_".join(filter(None, words)).replace("/", "--")
    stem = re.sub(r"[^\w@.,=+-]", "-", name)[:150]
    return stem if stem == name else f"{stem}_{sha256(name.encode()).hexdigest()[:8]}"


def save(figure: Figure, path: Path) -> str:
    """Write the figure as path.png and path.pdf; returns it as SVG, in the colours of the page."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each file
    for kind, options in (("png", {"dpi": 300}), ("pdf", {"metadata": {"CreationDate": None}})):
        with atomic_write(path.with_name(f"{path.name}.{kind}")) as aside:
            figure.savefig(aside, facecolor="white", **options)
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = "<svg" + text.getvalue().partition("<svg")[2]
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return svg


def own_ids(svg: str, prefix: str) -> Markup:
    """The drawing with ids that no other of the page has."""
    return Markup(re.sub(r'\bid="|href="#|url\(#', rf"\g<0>{prefix}", svg))


@rc_context(STYLE)
def write_forest(rows: pd.DataFrame, folder: Path) -> Markup:
    """The forest plot, as files in `folder` and for the page."""
    return own_ids(save(draw_forest(rows), folder / "top_minus_bottom"), "forest-")


@rc_context(STYLE)
def draw_all(both: pd.DataFrame, epochs: dict[str, pd.DataFrame], name: str, folder: Path) -> list[dict]:
    """Two figures for each table and data set, as files in `folder` and for the page."""
    figures = []
    axes = {dataset: f1_axis(cells) for dataset, cells in both.groupby("dataset")}
    for (table, dataset), cells in groups(both, "table", "dataset"):
        axis = axes[dataset]
        figures_of_set = {"fraction": draw_fraction(cells, name, axis), "epochs": draw_epochs(cells, epochs, axis)}
        for kind, figure in figures_of_set.items():
            stem = file_stem(f"table{table}", dataset, kind)
            svg = save(figure, folder / stem)
            svg = own_ids(svg, f"f{len(figures)}-")
            figures.append({"table": table, "dataset": dataset, "kind": kind, "stem": stem, "svg": svg})
    return figures


# ---- Figure 1 ----


def choose_runs(output_dir: Path, choice: dict[str, object]) -> dict[tuple[str, str], list]:
    """The four runs, rows of results.csv in the panels' order, of each model and data set that has all four.

    `choice` may hold the model, data set and part of the layers (`frac`) to keep to. The mildest degree comes first,
    then the lowest seed; of several variants the one with the best F1 in panel (b). Raises InputError if none has them.
    """
    check_together(output_dir, "aggregate")
    results = output_dir / "results.csv"
    runs = read_csv(results)
    runs = runs.query("pooling == 'cls' and tuning == 'full' and method == 'reinit' and parts == 'all'")
    runs = runs[runs["order"] == "before"]
    runs = runs[[(output_dir / "runs" / run / "vectors.npy").is_file() for run in runs["run"]]]
    if runs.empty:
        raise InputError(f"no run of {results} (pooling cls, full tuning) has vectors: {MORE_VECTORS}")
    cell = ["model", "dataset", "variant", "seed", "side", "percent"]
    ascending = {"percent": True, "seed": True, "f1": False, "learning_rate": True, "variant": True}
    runs = runs.sort_values([*ascending], ascending=[*ascending.values()]).drop_duplicates(cell)
    best = {row[:6]: row for row in runs[[*cell, "learning_rate", "run", "f1"]].itertuples(index=False)}
    tops = runs[runs["side"] == "top"]
    for name, value in choice.items():
        tops = tops[np.isclose(tops["percent"], float(100 * value)) if name == "frac" else tops[name] == value]
    fours: dict[tuple[str, str], list] = {}
    for top in tops.itertuples():
        panels = (("none", 0), ("top", top.percent), ("bottom", top.percent), ("all", 100))
        four = [best.get((top.model, top.dataset, top.variant, top.seed, *panel)) for panel in panels]
        if None not in four:
            fours.setdefault((top.model, top.dataset), four)
    if not fours:
        flags = "".join(f" --{name} {value}" for name, value in choice.items())
        vectors = "; ".join(
            f"{model} on {dataset} ({', '.join(dict.fromkeys(map(describe_corruption, its['side'], its['percent'])))})"
            for (model, dataset), its in runs.groupby(["model", "dataset"])
        )
        raise InputError(
            f"no figure{flags}: it takes 0 %, top and bottom of one degree, and 100 %, at one seed and with all other "
            f"settings alike; the vectors that are there: {vectors}; for more {MORE_VECTORS}"
        )
    return fours


def load_vectors(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """A run's test vectors, checked but still on the disk, the class of each, and the classes' names."""
    try:
        result = run_dir.read_result(folder)
        labels = run_dir.read_evidence(folder, result)[1]["label"].to_numpy()
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
        if vectors.ndim != 2 or len(vectors) != len(labels):
            raise ValueError(f"vectors.npy is {vectors.shape} for {len(labels)} rows")
        if not np.isfinite(vectors).all():
            raise ValueError("vectors.npy has values that are not finite numbers")
    except run_dir.UNREADABLE as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{folder} cannot be used ({reason}): delete it and do the run again") from error
    return vectors, labels, dict(enumerate(result["data"]["rows_per_class"]["test"]))


def embed(vectors: np.ndarray) -> np.ndarray:
    """Two dimensions of the vectors, by t-SNE."""
    if (vectors == vectors[0]).all():  # a model that collapsed: a single dot, and PCA would divide by zero
        return np.zeros((len(vectors), 2))
    tsne = TSNE(init="pca", perplexity=min(30, (len(vectors) - 1) / 3), random_state=0)
    with threadpool_limits(1):  # several threads add up in another order, and t-SNE makes much of the last digit
        return tsne.fit_transform(PCA(min(50, *vectors.shape), random_state=0).fit_transform(vectors))


def measure(four: list, vectors_of: list) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each panel, with its numbers, and a row for each dot."""
    numbers, dots = [], []
    for run, (vectors, labels, names) in zip(four, vectors_of, strict=True):
        knn = KNeighborsClassifier(min(NEIGHBOURS, len(labels) - 1)).fit(vectors, labels)
        accuracy = 100 * knn.score(None, labels)  # None: of the fitted rows, each without itself
        measured = {"silhouette": silhouette_score(vectors, labels), "knn_accuracy": accuracy}
        numbers.append({**run._asdict(), **measured, "rows": len(labels)})
        x, y = embed(vectors).T
        columns = {"row": range(len(labels)), "label": labels, "label_name": [names[label] for label in labels]}
        dots.append(pd.DataFrame({"side": run.side, "percent": run.percent, **columns, "x": x, "y": y, "run": run.run}))
    return pd.DataFrame(numbers), pd.concat(dots)


@rc_context(FONTS)
def draw_figure_1(numbers: pd.DataFrame, dots: pd.DataFrame, across: int = 4) -> Figure:
    """The panels and one legend: four across with a title, as wide as a page's text, or two across."""
    names = dots.drop_duplicates("label").set_index("label")["label_name"].sort_index()
    columns = 3 if len(names) > 10 else 4  # of the legend, where it is below
    below = (3.8, 4.85 + 0.12 * -(-len(names) // columns))
    size = (7, max(2.15, 0.115 * len(names) + 0.1)) if across == 4 else below
    figure = Figure(figsize=size, dpi=300, layout="constrained")
    looks = {label: (COLOURS[i % 7], MARKERS[i // 7 % 3]) for i, label in enumerate(names.index)}
    size = np.clip(7e3 / len(dots), 0.7, 4)  # a dot's area
    dots = dots.assign(marker=[looks[label][1] for label in dots["label"]])
    dots = dots.sample(frac=1, random_state=0)  # so that no class lies on top of the others
    subplots = figure.subplots(4 // across, across).flat
    for axes, letter, panel in zip(subplots, "abcd", numbers.itertuples(), strict=True):
        for marker, its in dots[dots["run"] == panel.run].groupby("marker"):
            colours = [looks[label][0] for label in its["label"]]
            axes.scatter(its["x"], its["y"], size, colours, marker=marker, alpha=0.6, linewidths=0.3 * (marker == "x"))
        axes.set(xticks=[], yticks=[], box_aspect=1)
        axes.set_aspect("equal", adjustable="datalim")
        axes.spines[:].set(color="0.75", linewidth=0.5)
        side = panel.side if panel.side in ("bottom", "top") else ""
        axes.set_title(f"({letter}) {panel.percent:g} % {side}".strip(), fontsize=7.5, pad=3)
        measured = f"F1 {panel.f1:.2f} %  {NEIGHBOURS}-NN {panel.knn_accuracy:.2f} %"
        axes.set_xlabel(f"{measured}\nsilhouette {panel.silhouette:z.3f}", fontsize=6, linespacing=1.4, labelpad=2)
    handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=3) for c, m in looks.values()]
    looks = {"frameon": False, "fontsize": 5 if len(names) > 10 else 6.5, "labelspacing": 0.4, "handletextpad": 0.2}
    place = {"loc": "outside right center"} if across == 4 else {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles, names, **place, **looks)
    title = f"{panel.model} on {panel.dataset}{panel.variant and ', '}{panel.variant}: t-SNE of the [CLS] vectors of "
    if across == 4:
        figure.suptitle(f"{title}{panel.rows:,} test rows after fine-tuning", fontsize=6.5, color="0.3")
    return figure


def is_current(output_dir: Path, stem: str, f1_of: dict[str, float]) -> bool:
    """Whether a figure's files are there, of runs that have these F1, and newer than the runs' vectors."""
    files = [output_dir / f"{stem}{end}" for end in ENDS]
    if not all(path.is_file() for path in files):
        return False
    numbers, time = read_csv(files[0]), files[0].stat().st_mtime
    vectors = [output_dir / "runs" / run / "vectors.npy" for run in numbers["run"]]
    same = np.isclose(numbers["f1"], numbers["run"].map(f1_of), rtol=0, atol=1e-9).all()
    return same and all(path.stat().st_mtime <= time for path in vectors if path.is_file())


@rc_context(FONTS)
def write_figure_1(output_dir: Path, choice: dict[str, object], again: bool = True) -> dict[str, pd.DataFrame]:
    """Figure 1 of each model and data set that has its runs: writes its files, and gives the numbers of each.

    The degree is part of the files' names if it was chosen. Leaves out what is drawn already, unless `again`. Raises
    InputError before the first file is written.
    """
    figures, numbers_of = {}, {}
    for pair, four in sorted(choose_runs(output_dir, choice).items()):
        degree = [f"{four[1].percent:g}"] if "frac" in choice else []
        stem = file_stem("figure1", *pair, *degree)
        if not again and is_current(output_dir, stem, {run.run: run.f1 for run in four}):
            continue
        vectors_of = [load_vectors(output_dir / "runs" / run.run) for run in four]
        if not all(np.array_equal(labels, vectors_of[0][1]) for _, labels, _ in vectors_of):
            raise InputError(f"the runs of {' on '.join(pair)} have other test rows: do them again on one data set")
        figures[stem] = four, vectors_of
    for stem, runs in figures.items():
        numbers_of[stem], dots = measure(*runs)
        figure = draw_figure_1(numbers_of[stem], dots)
        with ExitStack() as stack:  # all files or none; the numbers, which is_current reads, are renamed last
            files = [output_dir / f"{stem}{end}" for end in ENDS]
            numbers_csv, dots_csv, png, pdf = (stack.enter_context(atomic_write(path)) for path in files)
            numbers_of[stem].to_csv(numbers_csv, index=False)
            dots.to_csv(dots_csv, index=False)
            figure.savefig(png)
            figure.savefig(pdf, metadata={"CreationDate": None})
    return numbers_of


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    parser.add_argument("--model", type=model_name, help="as in results.csv (default: each)")
    parser.add_argument("--dataset", help="as in results.csv (default: each)")
    parser.add_argument("--frac", type=fraction, help="of the layers in panels b and c (default: the least)")
    choice = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    output_dir = choice.pop("output_dir")
    try:
        for stem, numbers in write_figure_1(output_dir, choice).items():
            print(numbers.drop(columns=["run", "variant"]).to_string(index=False))
            print(f"-> {output_dir}/{stem}.png, {stem}.pdf, {stem}.csv, {stem}_numbers.csv")
    except (InputError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    run_script(main)
