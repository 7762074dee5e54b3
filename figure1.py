"""Draw the paper's Figure 1: t-SNE of the test split's [CLS] vectors after fine-tuning, at four degrees of corruption.

    python figure1.py                        # every model and data set whose runs kept their vectors
    python figure1.py --model bert-base-uncased --dataset ag_news --percent 25

It takes runs of `python train.py --save_vectors` (`python grid.py --preset figure1` does the paper's four) that
`python aggregate.py` has put into results.csv. The panels are 0 %, top, bottom and 100 %, the paper's order: four runs
that differ in the corruption and the learning rate alone (the best by F1), at the lowest seed that all four have.
Beside outputs/figure1_<model>_<dataset>.png and .pdf stand the dots, in .csv, and what the panels say, in _numbers.csv:

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
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE
from sklearn.metrics import silhouette_score
from sklearn.neighbors import NearestNeighbors
from threadpoolctl import threadpool_limits

NEIGHBOURS = 15
# Okabe and Ito's palette, which colour-blind eyes tell apart; more classes than colours take the next marker.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
MARKERS = ("o", "^", "x")
MORE_VECTORS = "run python grid.py --preset figure1, or python train.py --save_vectors, and then python aggregate.py"


class NoFigure(ValueError):
    """There is nothing to draw, or what there is cannot be drawn."""


def name_of(side: str, percent: float) -> str:
    return f"{percent:g} % {side}" if side in ("top", "bottom") else f"{percent:g} %"


def choose(output_dir: Path, asked: dict[str, object]) -> dict[tuple[str, str], list]:
    """The four runs, rows of results.csv in the panels' order, of each model and data set that has all four.

    `asked` holds the model, data set and degree to keep to, if any. The mildest degree comes first, then the lowest
    seed; of several variants the one with the best F1 in panel (b).
    """
    if not (output_dir / "results.csv").is_file():
        raise NoFigure(
            f"{output_dir}/results.csv is not there: run python aggregate.py --output_dir {output_dir} first"
        )
    runs = pd.read_csv(output_dir / "results.csv", keep_default_na=False)
    runs = runs[(runs["pooling"] == "cls") & (runs["tuning"] == "full")]
    runs = runs[[(output_dir / "runs" / run / "vectors.npy").is_file() for run in runs["run"]]]
    if runs.empty:
        raise NoFigure(f"no run of {output_dir}/results.csv (pooling cls, full tuning) has vectors: {MORE_VECTORS}")
    cell = ["model", "dataset", "variant", "seed", "side", "percent"]
    ascending = {"percent": True, "seed": True, "f1": False, "learning_rate": True, "variant": True}
    runs = runs.sort_values([*ascending], ascending=[*ascending.values()]).drop_duplicates(cell)
    best = {row[:6]: row for row in runs[[*cell, "learning_rate", "run", "f1"]].itertuples(index=False)}
    fours: dict[tuple[str, str], list] = {}
    for model, dataset, variant, seed, side, degree in best:
        here = {"model": model, "dataset": dataset, "percent": float(f"{degree:g}")}
        if side == "top" and here | asked == here:
            panels = (("none", 0), ("top", degree), ("bottom", degree), ("all", 100))
            four = [best.get((model, dataset, variant, seed, *panel)) for panel in panels]
            if None not in four:
                fours.setdefault((model, dataset), four)
    if not fours:
        flags = "".join(f" --{name} {value}" for name, value in asked.items())
        there = "; ".join(
            f"{model} on {dataset} ({', '.join(dict.fromkeys(map(name_of, its['side'], its['percent'])))})"
            for (model, dataset), its in runs.groupby(["model", "dataset"])
        )
        raise NoFigure(
            f"no figure{flags}: it takes 0 %, top and bottom of one degree, and 100 %, at one seed and with all other "
            f"settings alike; the vectors that are there: {there}; for more {MORE_VECTORS}"
        )
    return fours


def load(folder: Path) -> tuple[np.ndarray, np.ndarray, dict[int, str]]:
    """A run's test vectors, checked but still on the disk, the class of each, and the classes' names."""
    try:
        per_class = json.loads((folder / "result.json").read_text())["data"]["rows_per_class"]["test"]
        labels = pd.read_csv(folder / "predictions.csv.gz")["label"].to_numpy()
        vectors = np.load(folder / "vectors.npy", mmap_mode="r", allow_pickle=False)
    except (OSError, EOFError, ValueError, KeyError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise NoFigure(f"{folder} cannot be read ({reason}): delete it and do the run again") from error
    present, counts = np.unique(labels, return_counts=True)
    for right, wrong in (
        (vectors.ndim == 2 and len(vectors) == len(labels), f"vectors.npy is {vectors.shape} for {len(labels)} rows"),
        (np.isfinite(vectors).all(), "vectors.npy has values that are not finite numbers"),
        (counts.tolist() == [*per_class.values()], "predictions.csv.gz has not the rows of each class in result.json"),
    ):
        if not right:
            raise NoFigure(f"{folder}: {wrong}: delete the folder and do the run again")
    return vectors, labels, dict(zip(present.tolist(), per_class, strict=True))


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


def measure(four: list, loaded: list) -> tuple[pd.DataFrame, pd.DataFrame]:
    """A row for each panel, with its numbers, and a row for each dot."""
    numbers, dots = [], []
    for run, (vectors, labels, names) in zip(four, loaded, strict=True):
        silhouette, knn = silhouette_score(vectors, labels), 100 * knn_accuracy(vectors, labels)
        numbers.append({**run._asdict(), "silhouette": silhouette, "knn_accuracy": knn, "rows": len(labels)})
        x, y = embed(vectors).T
        columns = {"row": range(len(labels)), "label": labels, "label_name": [names[label] for label in labels]}
        dots.append(pd.DataFrame({"side": run.side, "percent": run.percent, **columns, "x": x, "y": y, "run": run.run}))
    return pd.DataFrame(numbers), pd.concat(dots)


def draw(numbers: pd.DataFrame, dots: pd.DataFrame, names: dict[int, str], across: int = 4) -> Figure:
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
        axes.set_title(f"({letter}) {name_of(panel.side, panel.percent)}", fontsize=7.5, pad=3)
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


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and examples
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    where = "where results.csv and runs/ are (default: %(default)s)"
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help=where)
    parser.add_argument("--model", default=argparse.SUPPRESS, help="as in results.csv (default: each)")
    parser.add_argument("--dataset", default=argparse.SUPPRESS, help="as in results.csv (default: each)")
    parser.add_argument(
        "--percent", type=float, default=argparse.SUPPRESS, help="of panels b and c (default: the mildest)"
    )
    asked = vars(parser.parse_args())
    output_dir = asked.pop("output_dir")
    try:
        figures = []  # all are checked before the first is drawn
        for pair, four in sorted(choose(output_dir, asked).items()):
            loaded = [load(output_dir / "runs" / run.run) for run in four]
            if not all(np.array_equal(labels, loaded[0][1]) for _, labels, _ in loaded):
                raise NoFigure(f"the runs of {' on '.join(pair)} have other test rows: do them again on one data set")
            figures.append((f"figure1_{'_'.join(pair).replace('/', '--')}", four, loaded))
        for stem, four, loaded in figures:
            numbers, dots = measure(four, loaded)
            figure = draw(numbers, dots, loaded[0][2])
            figure.savefig(output_dir / f".partial-{stem}.png")
            with rc_context({"pdf.fonttype": 42}):  # TrueType, embedded
                figure.savefig(output_dir / f".partial-{stem}.pdf", metadata={"CreationDate": None})
            dots.to_csv(output_dir / f".partial-{stem}.csv", index=False)
            numbers.to_csv(output_dir / f".partial-{stem}_numbers.csv", index=False)
            for name in (f"{stem}.csv", f"{stem}_numbers.csv", f"{stem}.pdf", f"{stem}.png"):  # now that all are whole
                (output_dir / f".partial-{name}").replace(output_dir / name)
            print(numbers.drop(columns=["run", "variant"]).to_string(index=False))
            print(f"-> {output_dir}/{stem}.png, {stem}.pdf, {stem}.csv, {stem}_numbers.csv")
    except (NoFigure, OSError) as error:
        parser.error(str(error))


if __name__ == "__main__":
    main()
