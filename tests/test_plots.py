"""The figures: which runs are in Figure 1, in which order, the numbers under its panels; lines, bands, ticks."""

import os
from collections import namedtuple
from fractions import Fraction
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.markers import MarkerStyle
from test_aggregate import cut_off, sign, write_result
from threadpoolctl import threadpool_limits

import common
import plots

# The paper's panels: how many of the first class's 20 rows lie where the second class's 20 do, and the F1 in percent.
PANELS = {("none", 0): (0, 94.0), ("top", 25): (2, 93.0), ("bottom", 25): (4, 92.0), ("all", 100): (6, 80.0)}
BASE = "bert-base-uncased"
FILES = [f"figure1_org--bert_ag_news{end}" for end in (".csv", ".pdf", ".png", "_numbers.csv")]


# Two names that differ in a sign that a file's name cannot have are two files; a hub id is told by its slash.
def test_names_of_files() -> None:
    assert plots.file_stem("table1", "", "sst2", "epochs") == "table1_sst2_epochs"
    assert plots.file_stem("figure1", "org/bert") == "figure1_org--bert"
    stems = {plots.file_stem("tableA", name) for name in ("my set", "my-set", "my_set", "x" * 300, "x" * 301)}
    assert len(stems) == 5 and max(map(len, stems)) < 200


def add_run(output_dir: Path, side: str, percent: float, strays: int = 0, f1: float = 90.0, **changes: object) -> Path:
    """A run with 40 test rows of two classes at two points, and its row in results.csv."""
    row = {"model": "org/bert", "variant": "", "side": side, "percent": float(percent), "dataset": "ag_news"}
    row |= {
        "method": "reinit",
        "parts": "all",
        "order": "before",
        "pooling": "cls",
        "tuning": "full",
        "learning_rate": 1e-5,
        "seed": 0,
        "f1": f1,
        **changes,
    }
    labels = np.tile([0, 1], 20)
    settings = {name: row[name] for name in ("pooling", "tuning", "learning_rate", "seed")}
    settings["max_length"] = 32 if row["variant"] else 64
    place = (output_dir, *(row[name] for name in ("model", "side", "percent", "dataset")))
    folder = write_result(*place, f1, predicted=(labels, 0 * labels), **settings)
    at_second = (labels == 1) | (np.arange(40) < 2 * strays)
    np.save(folder / "vectors.npy", np.where(at_second[:, None], np.float32([0, 3, 4]), np.float32([0, 0, 0])))
    sign(folder)
    results = output_dir / "results.csv"
    row["run"] = folder.name
    text = results.read_text() if results.exists() else ""
    text += pd.DataFrame([row]).to_csv(header=not text, index=False)
    common.write_together(output_dir, "aggregate", {"results.csv": text})
    return folder


CELL = {"model": BASE, "variant": "", "dataset": "sst2", "side": "top", "percent": 50.0, "runs": "a b", "f1": 60.0}
CELL |= {"f1_std": np.nan, "collapsed": False, "collapsed_reference": False, "words": 65.0, "floor": 50.0}


def add_four(output_dir: Path, **changes: object) -> list[Path]:
    """The four runs; those of the later panels come first in results.csv."""
    folders = [add_run(output_dir, *panel, *PANELS[panel], **changes) for panel in reversed(PANELS)]
    return folders[::-1]


def call(monkeypatch: pytest.MonkeyPatch, output_dir: Path, *flags: str) -> None:
    monkeypatch.setattr("sys.argv", ["plots.py", "--output_dir", str(output_dir), *flags])
    plots.main()


# ---- F1 by epoch, and against the corrupted fraction ----


# Two seeds with F1 0.5 and 0.7, then 0.6 and 0.6: mean 60, deviation sqrt(2) * 10, then 0.
def test_the_band_over_seeds() -> None:
    epochs = {
        run: pd.DataFrame({"epoch": [1, 2], "weighted_f1": f1}) for run, f1 in (("a", [0.5, 0.6]), ("b", [0.7, 0.6]))
    }
    (panel,) = plots.draw_epochs(pd.DataFrame([CELL]), epochs, (40, 90)).axes
    assert panel.lines[0].get_xydata().tolist() == pytest.approx(np.array([[1, 60], [2, 60]]))
    band = panel.collections[0].get_paths()[0].vertices
    at_1 = sorted(set(np.round(band[band[:, 0] == 1, 1], 6)))
    assert at_1 == pytest.approx([60 - 200**0.5, 60 + 200**0.5]) and set(band[band[:, 0] == 2, 1]) == {60.0}


# BERT-base has 25 % and DistilBERT has not: the panels share their axis, and its ticks.
def test_the_ticks_are_those_of_all_panels() -> None:
    cells = [CELL | {"percent": percent} for percent in (25.0, 50.0)] + [CELL | {"model": "distilbert-base-uncased"}]
    figure = plots.draw_fraction(pd.DataFrame(cells).assign(f1_reference=70.0), "the paper", (0, 100))
    assert [panel.get_title(loc="left") for panel in figure.axes] == ["Base, SST-2", "Distil, SST-2"]
    assert [panel.get_xticks().tolist() for panel in figure.axes] == [[0, 25, 50, 100]] * 2
    (legend,) = figure.legends
    lines = ["top", "top, the paper", "words alone", "constant or guessing"]
    assert [text.get_text() for text in legend.get_texts()] == lines


# The axis of a data set is that of its cells that did not collapse, of both sources, and of words alone; what lies
# below is an arrow with its number.
def test_the_axis_of_a_data_set() -> None:
    cells = pd.DataFrame([CELL | {"f1": f1, "collapsed": f1 < 40} for f1 in (60.0, 80.0, 10.0)])
    cells = cells.assign(percent=[25.0, 50.0, 75.0], f1_reference=[90.0, np.nan, 30.0], collapsed_reference=False)
    assert plots.f1_axis(cells.assign(words=70.0)) == pytest.approx((30 - 3.6, 93.6))
    assert plots.f1_axis(cells[:2].assign(words=50.0)) == pytest.approx((50 - 2.4, 92.4))
    figure = plots.draw_fraction(cells.assign(f1_reference=np.nan), "the paper", (50, 90))
    (note,) = figure.axes[0].texts
    assert note.get_text() == "10.0" and note.xy == (75, 50)


# ---- Figure 1 ----


# By hand, k = 3, rows at 0, 1, 2, 10, 11, 12: the three others nearest to 0, 1 and 2 are each other and 10. So rows 0
# and 1 see one of their class and two of the other, row 2 two of the other; 10, 11 and 12 see two of theirs at least.
# k = 2, rows at 0, 1, 3: the first two have a tie, which the first class wins, the third sees the others' class alone.
# k = 15 is all five others: rows 0 and 1 see four of the other class, the rest three of theirs.
# The silhouette is 1 - a / b where a, the mean distance to a row's own class, is less than b, to the other; here
# a = 1, 1, 9, 11/3, 11/3, 13/3 and b = 35/4, 31/4, 3/2, 19/2, 21/2, 23/2. t-SNE would change these ratios.
def test_numbers_of_a_line_in_the_original_space(monkeypatch: pytest.MonkeyPatch) -> None:
    line = np.array([[0, 0], [1, 0], [2, 0], [10, 0], [11, 0], [12, 0]], dtype=np.float32)
    labels = np.array([3, 3, 5, 5, 5, 5])
    run = namedtuple("Row", "side percent run")("none", 0, "a")

    def measure(rows: list[int]) -> dict:
        return plots.measure([run], [(line[rows], labels[rows], {3: "class 0", 5: "class 1"})])[0].to_dict("records")[0]

    numbers = measure([*range(6)])
    assert numbers["knn_accuracy"] == pytest.approx(100 * 4 / 6)
    monkeypatch.setattr(plots, "NEIGHBOURS", 3)
    assert measure([*range(6)])["knn_accuracy"] == pytest.approx(100 * 3 / 6)
    monkeypatch.setattr(plots, "NEIGHBOURS", 2)
    assert measure([0, 1, 3])["knn_accuracy"] == pytest.approx(100 * 2 / 3)
    silhouettes = [1 - 4 / 35, 1 - 4 / 31, 1.5 / 9 - 1, 1 - 22 / 57, 1 - 22 / 63, 1 - 26 / 69]
    assert numbers["silhouette"] == pytest.approx(sum(silhouettes) / 6)


# By hand, s strays, distance 1 between the points. First class at its point: a = s / 19, b = 1; strays: b = 0 and
# a = (20 - s) / 19; second class: a = 0, b = (20 - s) / 20. So the silhouettes are 1 - s / 19, -1 and 1. Of the 15
# nearest to a stray at most 5 are strays too: it is taken for the second class, and all others are told rightly.
def test_panels_in_the_papers_order_with_their_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folders = add_four(tmp_path, learning_rate=2e-5)
    add_run(tmp_path, "top", 25, 1, f1=91.0, learning_rate=1e-5)  # not the best learning rate
    (add_run(tmp_path, "top", 25, 1, f1=99.0, learning_rate=5e-5) / "vectors.npy").unlink()
    add_run(tmp_path, "top", 25, 1, f1=99.0, seed=1)
    add_run(tmp_path, "top", 25, 1, f1=99.0, pooling="mean")
    add_run(tmp_path, "none", 0, 1, f1=99.0, tuning="probe")
    add_run(tmp_path, "none", 0, 1, f1=99.0, dataset="imdb")
    call(monkeypatch, tmp_path)
    assert sorted(path.name for path in tmp_path.glob("*")) == ["aggregate.sha256", *FILES, "results.csv", "runs"]

    numbers = pd.read_csv(tmp_path / FILES[3])
    assert list(zip(numbers["side"], numbers["percent"], strict=True)) == list(PANELS)
    assert list(numbers["run"]) == [folder.name for folder in folders]
    assert list(numbers["f1"]) == [94, 93, 92, 80]
    assert list(numbers["knn_accuracy"]) == [100, 95, 90, 85]
    silhouettes = [((20 - s) * (1 - s / 19) - s + 20) / 40 for s in (0, 2, 4, 6)]
    assert np.allclose(numbers["silhouette"], silhouettes, atol=1e-6)

    dots = pd.read_csv(tmp_path / FILES[0])
    assert list(dots["run"]) == [folder.name for folder in folders for _ in range(40)]
    assert list(dots["row"]) == [*range(40)] * 4
    assert list(dots["label_name"]) == ["class 0", "class 1"] * 80
    # rows 0, 2 ... 10 of the last panel stray: t-SNE puts them to the second class, and 12, 14 ... away from it
    place = dots.loc[dots["side"] == "all", ["x", "y"]].to_numpy()
    away = np.linalg.norm(place - place[1::2].mean(0), axis=1)
    assert away[0:12:2].max() < away[12::2].min()
    assert imread(tmp_path / FILES[2]).shape[:2] == (645, 2100)

    pdf = (tmp_path / FILES[1]).read_bytes()
    assert b"/FontFile2" in pdf and b"/Type3" not in pdf  # fonts embedded, as TrueType

    before = {name: (tmp_path / name).read_bytes() for name in FILES}
    call(monkeypatch, tmp_path, "--model", "org/bert", "--dataset", "ag_news", "--frac", "1/4")
    assert before == {name: (tmp_path / name).read_bytes() for name in FILES}
    chosen = {name: (tmp_path / name.replace("_ag_news", "_ag_news_25")).read_bytes() for name in FILES}
    assert chosen == before  # beside it, since its degree was chosen


# What is drawn stays if it is of the same runs with the same F1, newer than their vectors, and whole.
def test_a_figure_that_is_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plots, "embed", lambda vectors: vectors[:, :2])  # what it looks like does not matter here
    monkeypatch.setattr(plots, "draw_figure_1", lambda *_: Figure(figsize=(1, 1)))
    last = add_four(tmp_path)[3]
    (stem,) = plots.write_figure_1(tmp_path, {}, again=False)
    numbers, dots, results = tmp_path / f"{stem}_numbers.csv", tmp_path / f"{stem}.csv", tmp_path / "results.csv"
    assert plots.write_figure_1(tmp_path, {}, again=False) == {}
    assert list(plots.write_figure_1(tmp_path, {})) == [stem]

    newer = numbers.stat().st_mtime + 1000
    os.utime(last / "vectors.npy", (newer, newer))
    assert list(plots.write_figure_1(tmp_path, {}, again=False)) == [stem]
    os.utime(numbers, (newer, newer))
    assert plots.write_figure_1(tmp_path, {}, again=False) == {}

    runs = pd.read_csv(results)
    runs = runs.assign(f1=runs["f1"].replace(80.0, 81.0))
    common.write_together(tmp_path, "aggregate", {"results.csv": runs.to_csv(index=False)})
    assert plots.write_figure_1(tmp_path, {}, again=False)[stem]["f1"].tolist() == [94, 93, 92, 81]
    os.utime(numbers, (newer, newer))
    add_run(tmp_path, "all", 100, f1=82.0, learning_rate=2e-5)
    assert plots.write_figure_1(tmp_path, {}, again=False)[stem]["f1"].tolist() == [94, 93, 92, 82]
    add_run(tmp_path, "all", 100, f1=82.0, learning_rate=5e-6)  # of two with the same F1 the lower rate
    os.utime(numbers, (newer, newer))
    assert plots.write_figure_1(tmp_path, {}, again=False)[stem]["learning_rate"].tolist() == [1e-5] * 3 + [5e-6]
    assert plots.write_figure_1(tmp_path, {}, again=False) == {}
    dots.unlink()
    assert list(plots.write_figure_1(tmp_path, {}, again=False)) == [stem]


# Four runs of one seed and one variant, or no figure; the mildest degree that has both sides, then the lowest seed.
def test_which_four(tmp_path: Path) -> None:
    for side, percent in (("none", 0), ("top", 50), ("bottom", 50), ("all", 100)):
        for seed in (1, 2, 10):
            add_run(tmp_path, side, percent, seed=seed)
    add_run(tmp_path, "top", 12.5, seed=1)
    add_run(tmp_path, "bottom", 12.5, seed=2)
    add_run(tmp_path, "top", 25, seed=1)
    add_run(tmp_path, "bottom", 25, seed=1, variant="max_length=32")
    for side in ("top", "bottom"):
        add_run(tmp_path, side, 100 / 3, seed=2)

    def chosen(asked: dict) -> list[tuple]:
        (four,) = plots.choose_runs(tmp_path, asked).values()
        return [(run.side, round(run.percent), run.seed) for run in four]

    assert chosen({}) == [("none", 0, 2), ("top", 33, 2), ("bottom", 33, 2), ("all", 100, 2)]
    assert chosen({"frac": Fraction(1, 3)}) == chosen({})
    assert chosen({"frac": Fraction("0.5")}) == [("none", 0, 1), ("top", 50, 1), ("bottom", 50, 1), ("all", 100, 1)]


# Names are shown as they are: matplotlib would read what is between two dollars as mathematics, and fail on "$0_$".
def test_names_with_dollars(tmp_path: Path) -> None:
    names = ["$0-$50", "a $0_$"]
    numbers = pd.DataFrame([*PANELS], columns=["side", "percent"]).assign(model="$m_$", dataset="bert", variant="")
    numbers = numbers.assign(run=range(4), f1=94, silhouette=0, knn_accuracy=87.5, rows=2)
    places = pd.DataFrame({"label": [0, 1], "label_name": names, "x": [0, 1], "y": 0.0})
    figure = plots.draw_figure_1(numbers, pd.concat([places.assign(run=run) for run in range(4)]))
    figure.draw_without_rendering()
    assert [text.get_text() for text in figure.legends[0].get_texts()] == names

    cells = pd.DataFrame([CELL | {"model": "$m_$", "runs": "a"}]).assign(table="1")
    epochs = {"a": pd.DataFrame({"epoch": [1, 2], "weighted_f1": [0.5, 0.6]})}
    assert "$m_$, SST-2" in plots.draw_all(cells.assign(f1_reference=np.nan), epochs, "$the_$", tmp_path)[0]["svg"]


# A dot's place tells its class here, and its colour and marker must be those of that class in the legend.
def test_each_class_looks_like_its_name_in_the_legend() -> None:
    names = {label: f"class {label}" for label in range(20)}
    numbers = pd.DataFrame([*PANELS], columns=["side", "percent"]).assign(model="bert", dataset="tfnt", variant="")
    numbers = numbers.assign(run=range(4), f1=[94.126, 93, 92, 80], silhouette=-0.0001, knn_accuracy=87.5, rows=20)
    places = pd.DataFrame({"label": range(20), "label_name": names.values(), "x": range(20), "y": 0.0})
    figure = plots.draw_figure_1(numbers, pd.concat([places.assign(run=run) for run in range(4)]))
    (legend,) = figure.legends
    shown = {
        text.get_text(): (to_hex(handle.get_color()), handle.get_marker())
        for text, handle in zip(legend.get_texts(), legend.legend_handles, strict=True)
    }
    assert list(shown) == list(names.values())
    assert len(set(shown.values())) == 20

    def outline(marker: str) -> list:
        style = MarkerStyle(marker)
        return style.get_path().transformed(style.get_transform()).vertices.tolist()

    for axes in figure.axes:
        dots = [
            (round(place[0]), to_hex(colour), scatter.get_paths()[0].vertices.tolist())
            for scatter in axes.collections
            for place, colour in zip(scatter.get_offsets(), scatter.get_edgecolors(), strict=True)
        ]
        assert sorted(dots) == [(i, shown[name][0], outline(shown[name][1])) for i, name in names.items()]
    assert [axes.get_title() for axes in figure.axes] == ["(a) 0 %", "(b) 25 % top", "(c) 25 % bottom", "(d) 100 %"]
    assert figure.axes[0].get_xlabel() == "F1 94.13 %  15-NN 87.50 %\nsilhouette 0.000"


def swap_labels(folder: Path) -> None:
    predictions = pd.read_csv(folder / "predictions.csv.gz")
    predictions.assign(label=1 - predictions["label"], epoch_1=1).to_csv(folder / "predictions.csv.gz", index=False)
    sign(folder)


def other_vectors(folder: Path, vectors: np.ndarray) -> None:
    np.save(folder / "vectors.npy", vectors)
    sign(folder)


# Threads add up in an order of their own, which t-SNE would show.
def test_the_number_of_threads_changes_no_dot() -> None:
    vectors = np.random.default_rng(0).normal(size=(100, 60)).astype(np.float32)
    with threadpool_limits(1):
        one = plots.embed(vectors)
    with threadpool_limits(2):
        two = plots.embed(vectors)
    assert (one == two).all()


# A model that collapsed gives every row the same vector: a figure all the same, and no warning.
@pytest.mark.filterwarnings("error")
def test_a_collapsed_model_is_one_dot() -> None:
    assert not plots.embed(np.full((40, 3), 0.1, dtype=np.float32)).any()


# What is wrong with the run of 25 % top, or with the flags, and what the one line on stderr must say.
BAD = {
    "no results": (lambda top: (top.parents[1] / "results.csv").unlink(), [], "run python aggregate.py --output_dir"),
    "cut results": (lambda top: cut_off(top.parents[1] / "results.csv"), [], "run python aggregate.py --output_dir"),
    "no vectors": (
        lambda top: [p.unlink() for p in top.parent.glob("*/vectors.npy")],
        [],
        "run python grid.py --preset",
    ),
    "three panels": (
        lambda top: (top / "vectors.npy").unlink(),
        [],
        "org/bert on ag_news (uncorrupted, bottom 25 %, 100 %)",
    ),
    "unknown model": (lambda top: None, ["--model", "bart"], "no figure --model bart: "),
    "unknown data set": (lambda top: None, ["--dataset", "sst2"], "no figure --dataset sst2: "),
    "unknown degree": (lambda top: None, ["--frac", "1/2"], "no figure --frac 1/2: "),
    "not a number": (lambda top: other_vectors(top, np.full((40, 3), np.nan)), [], "not finite numbers"),
    "too few rows": (lambda top: other_vectors(top, np.ones((39, 3))), [], "(39, 3) for 40 rows"),
    "another's vectors": (lambda top: np.save(top / "vectors.npy", np.ones((40, 3))), [], "vectors.npy is not what"),
    "cut vectors": (lambda top: cut_off(top / "vectors.npy"), [], "delete it and do the run again"),
    "cut predictions": (lambda top: cut_off(top / "predictions.csv.gz"), [], "delete it and do the run again"),
    "edited": (lambda top: (top / "result.json").write_text("{}"), [], "result.json is not what the run wrote"),
    "a pickle": (lambda top: other_vectors(top, np.array([{}] * 40)), [], "Python objects in dtype"),
    "other rows": (swap_labels, [], "the runs of org/bert on ag_news have other test rows"),
}


@pytest.mark.parametrize("wrong", BAD)
def test_bad_input_is_one_line(
    wrong: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    spoil, flags, expected = BAD[wrong]
    if not flags and wrong not in ("no results", "cut results", "no vectors", "three panels"):
        add_four(tmp_path, dataset="a_good_one")  # it would be drawn first if not all were checked before
    spoil(add_four(tmp_path)[1])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(SystemExit, match=r"^2$"):
        call(monkeypatch, tmp_path, *flags)
    out, err = capsys.readouterr()
    assert (out, err.count("\n")) == ("", 1)
    assert err.startswith("plots.py: error: ") and expected in err
    assert sorted(tmp_path.rglob("*")) == before
