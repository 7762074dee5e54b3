"""Draw the paper's Figure 1 and, for report.py, F1 by epoch and F1 against the corrupted fraction.

    python plots.py                          # Figure 1 of every model and data set whose runs kept their vectors
    python plots.py --model bert-base-uncased --dataset ag_news --frac 1/4

Figure 1 is t-SNE of the test split's [CLS] vectors after fine-tuning, at four degrees of corruption. It takes runs of
`python train.py --save_vectors` (`python grid.py --preset figure1` does the paper's four) that `python aggregate.py`
has put into results.csv. The panels are 0 %, top, bottom and 100 %, the paper's order: four runs that differ in the
corruption and the learning rate alone (the best by F1), at the lowest seed that all four have. Beside
outputs/figure1_<model>_<dataset>.png and .pdf stand the dots, in .csv, and what the panels say, in _numbers.csv:

    f1            weighted F1 of the run, in percent
    silhouette    of the true classes, in the original space: 1 far apart, 0 mixed, below 0 closer to another class
    knn_accuracy  in percent: each row gets the class that most of its 15 nearest other rows have (on a tie the class
                  that comes first), in the original space

t-SNE sees the first 50 principal components and starts from the first two, with perplexity 30 (a third of the rows
where there are fewer than 91), random state 0 and one thread, so that a machine draws the same figure each time. In
t-SNE neither the size of a cluster nor the distance between two means anything: compare panels by the numbers.
"""

import argparse
import json
from contextlib import ExitStack
from io import StringIO
from pathlib import Path

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
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

from aggregate import in_order, read_csv
from common import InputError, atomic_write, fail, fraction, make_parser, one_line
from paper import DATASETS, MODELS, TABLES, dataset_title, model_name, model_title

COLUMN = 3.3  # inches
# Okabe and Ito's vermillion and blue, which colour-blind eyes tell apart; in the page each is a variable of its own, so
# that the same drawing is right on light and on dark.
INK, GREY, BOTTOM, TOP = "#222222", "#767676", "#d55e00", "#0072b2"
THEME = {INK: "var(--ink)", GREY: "var(--grey)", BOTTOM: "var(--bottom)", TOP: "var(--top)"}
LINES = {"none": (INK, "-", "o"), "bottom": (BOTTOM, "-", "v"), "top": (TOP, "--", "^"), "all": (GREY, ":", "s")}
FONTS = {"pdf.fonttype": 42, "text.parse_math": False}  # TrueType, embedded; a "$" in a name is a "$"
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
    "svg.fonttype": "none",
    "svg.hashsalt": "bert",
    **FONTS,
}
NEIGHBOURS = 15
# Okabe and Ito's palette; more classes than colours take the next marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "^", "x")
MORE_VECTORS = "run python grid.py --preset figure1, or python train.py --save_vectors, and then python aggregate.py"


def describe_model(cell: dict | pd.Series) -> str:
    return f"{model_title(cell['model'])} {cell['variant']}".strip()


def describe_corruption(side: str, percent: float) -> str:
    return {"none": "uncorrupted", "all": "100 %"}.get(side, f"{side} {percent:g} %")


def describe_cell(cell: dict | pd.Series) -> str:
    """A cell in words: model, corruption, data set."""
    corruption = describe_corruption(cell["side"], cell["percent"])
    return f"{describe_model(cell)}, {corruption}, {dataset_title(cell['dataset'])}"


# ---- F1 by epoch, and against the corrupted fraction ----


def average_seeds(cell: pd.Series, epochs: dict[str, pd.DataFrame]) -> pd.DataFrame:
    """F1 in percent by epoch: mean and standard deviation over the cell's seeds, at its best learning rate."""
    frames = [epochs[run].set_index("epoch")["weighted_f1"] * 100 for run in cell["runs"].split()]
    seeds = pd.concat(frames, axis=1)
    return pd.DataFrame({"mean": seeds.mean(axis=1), "std": seeds.std(axis=1)})


def make_panels(cells: pd.DataFrame, legend: int) -> tuple[Figure, list[tuple[Axes, pd.DataFrame]]]:
    """A figure as wide as a column, with one panel for each model (and variant) below the other."""
    groups = [cells[cells["model"] == model] for model in in_order(cells["model"], MODELS)]
    groups = [group for of_model in groups for _, group in of_model.groupby("variant")]
    height = 1.75 * len(groups) + 0.12 * legend + 0.2
    figure = Figure(figsize=(COLUMN, height), layout="constrained")
    axes = figure.subplots(len(groups), 1, sharex=True, squeeze=False)[:, 0]
    for panel, group in zip(axes, groups, strict=True):
        first = group.iloc[0]
        panel.set_title(f"{describe_model(first)}, {dataset_title(first['dataset'])}", loc="left")
        panel.set_ylabel("weighted F1 (%)")
        panel.grid(axis="y", color=GREY, alpha=0.25, linewidth=0.5)
    return figure, list(zip(axes, groups, strict=True))


def draw_epochs(cells: pd.DataFrame, epochs: dict[str, pd.DataFrame]) -> Figure:
    """Weighted F1 by epoch, a line for each corruption, a panel for each model; the band is one standard deviation."""
    order = cells.sort_values("percent").dropna(subset="f1")
    figure, axes = make_panels(order, legend=3)
    lines = {}
    for panel, group in axes:
        for _, cell in group.iterrows():
            colour, dash, marker = LINES[cell["side"]]
            f1, name = average_seeds(cell, epochs), describe_corruption(cell["side"], cell["percent"])
            looks = {"color": colour, "alpha": 0.35 + 0.65 * cell["percent"] / 100 if cell["side"] != "none" else 1}
            lines[name] = panel.plot(f1["mean"], linestyle=dash, marker=marker, markersize=2.2, **looks)[0]
            if f1["std"].notna().any():
                low, high = f1["mean"] - f1["std"], f1["mean"] + f1["std"]
                panel.fill_between(f1.index, low, high, color=colour, alpha=0.15, linewidth=0)
        panel.xaxis.get_major_locator().set_params(integer=True)
    panel.set_xlabel("epoch")
    names = sorted(lines, key=lambda name: ["bottom", "top", "uncorrupted", "100"].index(name.split()[0]))
    figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=3)
    return figure


def draw_fraction(cells: pd.DataFrame, name: str) -> Figure:
    """Weighted F1 against the corrupted part of the layers, one panel for each model; the reference's in thin lines."""
    figure, axes = make_panels(cells, legend=2)
    artists = {}
    for panel, group in axes:
        for whose, looks in (("", {}), ("_reference", {"linewidth": 0.7, "markerfacecolor": "none", "alpha": 0.75})):
            rows = group.dropna(subset=f"f1{whose}").sort_values("percent")
            for side, words in (("none", "uncorrupted"), ("all", "100 % corrupted")):
                if not whose and len(level := rows.loc[rows["side"] == side, "f1"]):
                    colour, dash, _ = LINES[side]
                    style = {"color": colour, "linestyle": (0, (4, 2)) if side == "none" else dash, "linewidth": 0.8}
                    artists[words] = panel.axhline(level.item(), **style)
            for side in ("bottom", "top"):
                path = rows[rows["side"].isin(["none", side, "all"])]
                if not len(path):
                    continue
                colour, dash, marker = LINES[side]
                style = {"color": colour, "linestyle": dash, "marker": marker, **looks}
                error = None if whose or path["f1_std"].isna().all() else path["f1_std"].fillna(0)
                bars = {"yerr": error, "elinewidth": 0.7, "capsize": 1.5}
                artist = panel.errorbar(path["percent"], path[f"f1{whose}"], **bars, **style)
                artists[f"{side}, {name}" if whose else side] = artist
        panel.set_xticks(sorted({0, 100, *cells["percent"]}))  # the panels share their ticks
    panel.set_xlabel("corrupted encoder layers (%)")
    order = ["bottom", "top", "uncorrupted", "100 % corrupted", f"bottom, {name}", f"top, {name}"]
    handles = {words: artists[words] for words in order if words in artists}
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=2 if len(handles) <= 4 else 3)
    return figure


def save(figure: Figure, path: Path) -> Markup:
    """Write the figure as path.png and path.pdf; returns it as SVG, in the colours of the page."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")  # laid out once, not for each file
    for kind, options in (("png", {"dpi": 300}), ("pdf", {"metadata": {"CreationDate": None}})):
        with atomic_write(path.with_name(f"{path.name}.{kind}")) as aside:
            figure.savefig(aside, facecolor="white", **options)
    text = StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    for colour, variable in THEME.items():
        svg = svg.replace(colour, variable)
    return Markup(svg)


@rc_context(STYLE)
def draw_all(both: pd.DataFrame, epochs: dict[str, pd.DataFrame], name: str, folder: Path) -> list[dict]:
    """Two figures for each table and data set, as files in `folder` and for the page."""
    figures = []
    for table in in_order(both["table"], TABLES):
        of_table = both[both["table"] == table]
        for dataset in in_order(of_table["dataset"], DATASETS):
            cells = of_table[of_table["dataset"] == dataset]
            for kind, figure in (("fraction", draw_fraction(cells, name)), ("epochs", draw_epochs(cells, epochs))):
                stem = f"table{table}_{dataset}_{kind}"
                of = {"table": table, "dataset": dataset_title(dataset), "kind": kind, "stem": stem}
                figures.append(of | {"svg": save(figure, folder / stem)})
    return figures


# ---- Figure 1 ----


def panel_title(side: str, percent: float) -> str:
    return f"{percent:g} % {side}" if side in ("top", "bottom") else f"{percent:g} %"


def choose_runs(output_dir: Path, choice: dict[str, object]) -> dict[tuple[str, str], list]:
    """The four runs, rows of results.csv in the panels' order, of each model and data set that has all four.

    `choice` holds the model, data set and part of the layers (`frac`) to keep to, if any. The mildest degree comes
    first, then the lowest seed; of several variants the one with the best F1 in panel (b). Raises InputError if there
    are none.
    """
    if not (output_dir / "results.csv").is_file():
        raise InputError(
            f"{output_dir}/results.csv is not there: run python aggregate.py --output_dir {output_dir} first"
        )
    runs = read_csv(output_dir / "results.csv")
    runs = runs[(runs["pooling"] == "cls") & (runs["tuning"] == "full")]
    runs = runs[[(output_dir / "runs" / run / "vectors.npy").is_file() for run in runs["run"]]]
    if runs.empty:
        raise InputError(f"no run of {output_dir}/results.csv (pooling cls, full tuning) has vectors: {MORE_VECTORS}")
    cell = ["model", "dataset", "variant", "seed", "side", "percent"]
    ascending = {"percent": True, "seed": True, "f1": False, "learning_rate": True, "variant": True}
    runs = runs.sort_values([*ascending], ascending=[*ascending.values()]).drop_duplicates(cell)
    best = {row[:6]: row for row in runs[[*cell, "learning_rate", "run", "f1"]].itertuples(index=False)}
    tops = runs[runs["side"] == "top"]
    tops = tops.assign(frac=tops["percent"].map("{:g}".format))
    for name, value in choice.items():
        tops = tops[tops[name] == (f"{float(100 * value):g}" if name == "frac" else value)]
    fours: dict[tuple[str, str], list] = {}
    for top in tops.itertuples():
        panels = (("none", 0), ("top", top.percent), ("bottom", top.percent), ("all", 100))
        four = [best.get((top.model, top.dataset, top.variant, top.seed, *panel)) for panel in panels]
        if None not in four:
            fours.setdefault((top.model, top.dataset), four)
    if not fours:
        flags = "".join(f" --{name} {value}" for name, value in choice.items())
        vectors = "; ".join(
            f"{model} on {dataset} ({', '.join(dict.fromkeys(map(panel_title, its['side'], its['percent'])))})"
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
        per_class = json.loads((folder / "result.json").read_text())["data"]["rows_per_class"]["test"]
        labels = pd.read_csv(folder / "predictions.csv.gz")["label"].to_numpy()
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {one_line(error)}"
        raise InputError(f"{folder} cannot be read ({reason}): delete it and do the run again") from error
    classes, counts = np.unique(labels, return_counts=True)
    for right, wrong in (
        (vectors.ndim == 2 and len(vectors) == len(labels), f"vectors.npy is {vectors.shape} for {len(labels)} rows"),
        (np.isfinite(vectors).all(), "vectors.npy has values that are not finite numbers"),
        (counts.tolist() == [*per_class.values()], "predictions.csv.gz has not the rows of each class in result.json"),
    ):
        if not right:
            raise InputError(f"{folder}: {wrong}: delete the folder and do the run again")
    return vectors, labels, dict(zip(classes.tolist(), per_class, strict=True))


def knn_accuracy(vectors: np.ndarray, labels: np.ndarray, k: int = NEIGHBOURS) -> float:
    """The share of rows whose class most of their k nearest other rows have."""
    nearest = NearestNeighbors(n_neighbors=min(k, len(vectors) - 1)).fit(vectors).kneighbors(return_distance=False)
    classes = np.unique(labels)
    votes = np.stack([(labels[nearest] == label).sum(1) for label in classes])
    return float((classes[votes.argmax(0)] == labels).mean())


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
        silhouette, knn = silhouette_score(vectors, labels), 100 * knn_accuracy(vectors, labels)
        numbers.append({**run._asdict(), "silhouette": silhouette, "knn_accuracy": knn, "rows": len(labels)})
        x, y = embed(vectors).T
        columns = {"row": range(len(labels)), "label": labels, "label_name": [names[label] for label in labels]}
        dots.append(pd.DataFrame({"side": run.side, "percent": run.percent, **columns, "x": x, "y": y, "run": run.run}))
    return pd.DataFrame(numbers), pd.concat(dots)


@rc_context(FONTS)
def draw_figure_1(numbers: pd.DataFrame, dots: pd.DataFrame, names: dict[int, str], across: int = 4) -> Figure:
    """The panels and one legend: four across with a title, as wide as a page's text, or two across."""
    columns = 3 if len(names) > 10 else 4  # of the legend, where it is below
    below = (3.8, 4.85 + 0.12 * -(-len(names) // columns))
    size = (7, max(2.15, 0.115 * len(names) + 0.1)) if across == 4 else below
    figure = Figure(figsize=size, dpi=300, layout="constrained")
    looks = {label: (COLOURS[i % 7], MARKERS[i // 7 % 3]) for i, label in enumerate(names)}
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
        axes.set_title(f"({letter}) {panel_title(panel.side, panel.percent)}", fontsize=7.5, pad=3)
        measured = f"F1 {panel.f1:.2f} %  {NEIGHBOURS}-NN {panel.knn_accuracy:.2f} %"
        axes.set_xlabel(f"{measured}\nsilhouette {panel.silhouette:z.3f}", fontsize=6, linespacing=1.4, labelpad=2)
    handles = [Line2D([], [], color=c, marker=m, linestyle="", markersize=3) for c, m in looks.values()]
    looks = {"frameon": False, "fontsize": 5 if len(names) > 10 else 6.5, "labelspacing": 0.4, "handletextpad": 0.2}
    place = {"loc": "outside right center"} if across == 4 else {"loc": "outside lower center", "ncols": columns}
    figure.legend(handles, names.values(), **place, **looks)
    title = f"{panel.model} on {panel.dataset}{panel.variant and ', '}{panel.variant}: t-SNE of the [CLS] vectors of "
    if across == 4:
        figure.suptitle(f"{title}{panel.rows:,} test rows after fine-tuning", fontsize=6.5, color="0.3")
    return figure


def is_drawn(output_dir: Path, files: list[str], four: list) -> bool:
    """Whether the files are there, of the same runs with the same F1, and newer than their vectors."""
    if not all((output_dir / name).is_file() for name in files):
        return False
    numbers, time = read_csv(output_dir / files[0]), (output_dir / files[0]).stat().st_mtime
    return numbers["run"].tolist() == [run.run for run in four] and all(
        abs(f1 - run.f1) < 1e-9 and (output_dir / "runs" / run.run / "vectors.npy").stat().st_mtime <= time
        for f1, run in zip(numbers["f1"], four, strict=True)
    )


@rc_context(FONTS)
def write_figure_1(output_dir: Path, choice: dict[str, object], again: bool = True) -> dict[str, pd.DataFrame]:
    """Figure 1 of each model and data set that has its runs: writes its files, and gives the numbers of each.

    Leaves out what is drawn already, unless `again`. Raises InputError before the first file is written.
    """
    figures, numbers_of = [], {}
    for pair, four in sorted(choose_runs(output_dir, choice).items()):
        stem = f"figure1_{'_'.join(pair).replace('/', '--')}"
        files = [f"{stem}{end}" for end in ("_numbers.csv", ".csv", ".png", ".pdf")]
        if not again and is_drawn(output_dir, files, four):
            continue
        vectors_of = [load_vectors(output_dir / "runs" / run.run) for run in four]
        if not all(np.array_equal(labels, vectors_of[0][1]) for _, labels, _ in vectors_of):
            raise InputError(f"the runs of {' on '.join(pair)} have other test rows: do them again on one data set")
        figures.append((stem, files, four, vectors_of))
    for stem, files, four, vectors_of in figures:
        numbers_of[stem], dots = measure(four, vectors_of)
        figure = draw_figure_1(numbers_of[stem], dots, vectors_of[0][2])
        with ExitStack() as stack:  # all files or none; the numbers, which is_drawn reads, are renamed last
            numbers_csv, dots_csv, png, pdf = (stack.enter_context(atomic_write(output_dir / name)) for name in files)
            numbers_of[stem].to_csv(numbers_csv, index=False)
            dots.to_csv(dots_csv, index=False)
            figure.savefig(png)
            figure.savefig(pdf, metadata={"CreationDate": None})
    return numbers_of


def main() -> None:
    parser = make_parser(__doc__)
    where = "where results.csv and runs/ are (default: %(default)s)"
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help=where)
    choice = {"default": argparse.SUPPRESS}
    parser.add_argument("--model", type=model_name, help="as in results.csv (default: each)", **choice)
    parser.add_argument("--dataset", help="as in results.csv (default: each)", **choice)
    parser.add_argument("--frac", type=fraction, help="of the layers in panels b and c (default: the least)", **choice)
    given = vars(parser.parse_args())
    output_dir = given.pop("output_dir")
    try:
        for stem, numbers in write_figure_1(output_dir, given).items():
            print(numbers.drop(columns=["run", "variant"]).to_string(index=False))
            print(f"-> {output_dir}/{stem}.png, {stem}.pdf, {stem}.csv, {stem}_numbers.csv")
    except (InputError, OSError) as error:
        fail(error)


if __name__ == "__main__":
    main()
