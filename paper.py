"""What the paper says (arXiv 2406.14459), as data: models, data sets, tables, presets, claims and published numbers.

A new model, table, preset or claim is an entry here and nowhere else. The other scripts read these.
"""

from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path

import pandas as pd

PUBLISHED = Path(__file__).parent / "paper"  # the paper's tables as CSV


@dataclass(frozen=True)
class Model:
    """An encoder: its name in the tables, its other hub name, and its shape (keys of the library's configuration)."""

    title: str
    hub_name: str | None  # the hub's name today, where it differs from the name here
    shape: dict | None = None  # None: read it from the model's own config.json


BERT = {"model_type": "bert", "vocab_size": 30_522}
LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "intermediate_size": 4096}
# The order of both dictionaries is that of the tables. What is not in them follows under its own name.
MODELS = {
    "bert-base-uncased": Model("Base", "google-bert/bert-base-uncased", {**BERT, "num_hidden_layers": 12}),
    "bert-large-uncased": Model("Large", "google-bert/bert-large-uncased", {**BERT, **LARGE}),
    "distilbert-base-uncased": Model(
        "Distil", "distilbert/distilbert-base-uncased", {"model_type": "distilbert", "vocab_size": 30_522}
    ),
    "minilm": Model("MiniLM", None),
}
LAYERS = {"bert-base-uncased": 12, "bert-large-uncased": 24, "distilbert-base-uncased": 6}
DATASETS = {
    "sst2": "SST-2",
    "imdb": "IMDB",
    "ag_news": "AG News",
    "emotion": "Emotion",
    "dbpedia": "DBPedia",
    "tfnt": "TFNT",
    "mrpc": "MRPC",
    "rte": "RTE",
    "rotten_tomatoes": "Rotten Tomatoes",
    "bbc_news": "BBC News",
}


def model_name(name: str) -> str:
    """The model's name here, if `name` is either of its two hub names; else `name`."""
    return next((ours for ours, model in MODELS.items() if name == model.hub_name), name)


def hub_names(name: str) -> tuple[str, ...]:
    """The names under which the hub, or its cache, may have a model: `name` first."""
    ours = model_name(name)
    names = [name, ours, MODELS[ours].hub_name] if ours in MODELS else [name]
    return tuple(dict.fromkeys(filter(None, names)))


def model_title(name: str) -> str:
    return MODELS[name].title if name in MODELS else name


# Table 2's test rows; it gives none for MRPC and RTE (theirs are those of our splits)
TEST_ROWS = {"sst2": 12_000, "imdb": 5_000, "ag_news": 6_000, "emotion": 4_000, "dbpedia": 12_000, "tfnt": 4_000}
TEST_ROWS |= {"mrpc": 1_725, "rte": 277}


def dataset_title(name: str) -> str:
    return DATASETS.get(name, name)


# ---- Tables ----


@dataclass(frozen=True)
class Table:
    """Which cells a table holds; its number is its key in TABLES. The paper has those of which PUBLISHED has a file."""

    caption: str  # follows "weighted F1 in percent"
    pooling: str
    tuning: str
    datasets: tuple[str, ...] | None = None  # None: all that no other table of this pooling and tuning names


TABLES = {
    "1": Table("after fine-tuning", "cls", "full"),
    "3": Table("with the mean token", "mean", "full"),
    "4": Table("of the linear probe", "cls", "probe"),
    "4b": Table("of the converged probe", "cls", "probe_converged"),
    "5": Table("on sentence pairs", "cls", "full", ("mrpc", "rte")),
}


def table_of(pooling: str, tuning: str, dataset: str) -> str | None:
    """The number of the table that such a cell belongs to; None if there is none. The pooling last counts as cls."""
    pooling = "cls" if pooling == "last" else pooling
    kind = {number: table for number, table in TABLES.items() if (table.pooling, table.tuning) == (pooling, tuning)}
    named = [number for number, table in kind.items() if table.datasets and dataset in table.datasets]
    return next(iter([*named, *(number for number, table in kind.items() if table.datasets is None)]), None)


def published_cells() -> pd.DataFrame:
    """The paper's 320 cells: table, model, side, percent, dataset, f1 (percent), layers (corrupted ones), collapsed.

    `collapsed` marks the outliers of section 4.4. `variant` is empty: the paper has one number for each cell.
    """
    place = ["table", "model", "percent", "side", "dataset"]
    numbers = [number for number in TABLES if (PUBLISHED / f"table{number}.csv").exists()]
    cells = pd.concat([pd.read_csv(PUBLISHED / f"table{number}.csv").assign(table=number) for number in numbers])
    outliers = pd.read_csv(PUBLISHED / "outliers.csv", dtype={"table": str})[place]
    cells = cells.merge(outliers, how="left", on=place, indicator="collapsed")
    cells["model"] = cells["model"].map({MODELS[name].title.lower(): name for name in LAYERS})
    cells["dataset"] = cells["dataset"].map({title: name for name, title in DATASETS.items()})
    cells["layers"] = (cells["percent"] / 100 * cells["model"].map(LAYERS)).astype(int)
    collapsed = cells["collapsed"] == "both"
    percent = cells["percent"].astype(float)
    return cells.assign(variant="", collapsed=collapsed, collapsed_share=collapsed.astype(float), percent=percent)


def compare(settings: dict, f1: float) -> str:
    """What the paper has for a run's cell, and how far the run's F1 (0 to 1) is from it."""
    if (settings["method"], settings["parts"], settings["corrupt_after"]) != ("reinit", "all", False):
        return "the paper has no such corruption"
    table = table_of(settings["pooling"], settings["tuning"], settings["dataset"])
    place = {"table": table} | {name: settings[name] for name in ("model", "percent", "side", "dataset")}
    published = published_cells().set_index(list(place))["f1"].get(tuple(place.values()))
    if published is None:
        return "the paper has no such cell"
    best = f"the paper's Table {table} has {published:.2f} %, the best of three learning rates"
    return f"{best}; ours - the paper's: {100 * f1 - published:+.2f}"


# ---- Claims (section 4.2) ----


@dataclass(frozen=True)
class Claim:
    short: str
    sentence: str
    needs: str  # what a comparison takes


CLAIMS = (
    Claim(
        "corrupted < uncorrupted",
        "A corrupted model does not fully recover",
        "an uncorrupted and a corrupted model",
    ),
    Claim(
        "more corruption, lower F1",
        "The more layers are corrupted, the lower the F1",
        "two degrees of corruption",
    ),
    Claim(
        "bottom < top",
        "Corrupting the bottom hurts more than corrupting the top",
        "bottom and top at the same degree",
    ),
)


# ---- Presets: which runs a table needs ----


@dataclass(frozen=True)
class Sweep:
    """Every model, data set and corruption, at every learning rate and seed; grid.py has flags for these axes."""

    dataset: tuple[str, ...]
    model: tuple[str, ...] = tuple(LAYERS)
    corrupt: tuple[str, ...] = ("none", "bottom", "top", "all")
    frac: tuple[Fraction, ...] | None = tuple(Fraction(k, 4) for k in range(5))  # if whole layers; None: 0, 1, 2, ...
    layers: tuple[str, ...] = ()  # instead of side and frac, as --layers takes them; each: every single layer
    learning_rate: tuple[float, ...] = (1e-5, 2e-5, 5e-5)
    seed: tuple[int, ...] = (0,)
    fixed: dict = field(default_factory=dict)  # other fields of config.RunConfig, the same for every run


TABLE_1 = Sweep(("sst2", "imdb", "ag_news", "emotion", "dbpedia", "tfnt"))
TABLE_3 = replace(TABLE_1, fixed={"pooling": "mean"})
TABLE_4 = Sweep(("ag_news", "dbpedia"), fixed={"tuning": "probe"})
TABLE_4B = Sweep(("ag_news", "dbpedia"), learning_rate=(0.0,), fixed={"tuning": "probe_converged"})
TABLE_5 = Sweep(("mrpc", "rte"))
QUARTER = (Fraction(0), Fraction(1, 4), Fraction(1))
FIGURE_1 = Sweep(("ag_news",), model=("bert-base-uncased",), frac=QUARTER, fixed={"save_vectors": True})
# Learning rates for runs of 76 and 10 steps, and of 50 for the head alone: high.
DEMO = Sweep(("rotten_tomatoes",), model=("minilm",), learning_rate=(8e-5,), fixed={"num_train_epochs": 2.0})
DEMO_BBC = replace(DEMO, dataset=("bbc_news",), learning_rate=(2e-4,), fixed={**DEMO.fixed, "save_vectors": True})
DEMO_PROBE = replace(DEMO, dataset=("bbc_news",), learning_rate=(1e-2,), fixed={"tuning": "probe"})
# The lab (docs/lab.md), at the demo's size. A method or a tuning that needs another learning rate has its own.
HALF = (Fraction(0), Fraction(1, 2))
LAB = Sweep(("rotten_tomatoes",), model=("minilm",), frac=HALF, learning_rate=(2e-4,), fixed={"num_train_epochs": 3.0})
METHODS = (
    *(("reinit", None), ("normal", None), ("noise", 0.5), ("noise", 1.0), ("shuffle", None), ("prune", 0.5)),
    *(("prune", 0.9), ("prune_random", 0.5), ("bitflip", 1e-4), ("permute", None), ("drop", None)),
)
# The best of a pilot (docs/results/lab): seed 0, SST-2, mean of bottom and top 50 %.
TUNING_RATES = {"full": 2e-4, "corrupted": 5e-4, "intact": 2e-4, "bitfit": 5e-3, "lora": 5e-3, "llrd": 2e-4}
EVAL_AT = (0, 1, 2, 5, 10, 20, 30, 50, 75, 100, 200, 500)  # steps of the recovery curves, dense at first


def vary(sweep: Sweep, **fixed: object) -> Sweep:
    return replace(sweep, fixed=sweep.fixed | fixed)


def tuned(tuning: str) -> Sweep:
    sides = ("bottom", "top") if tuning in ("corrupted", "intact") else LAB.corrupt
    return replace(vary(LAB, tuning=tuning), learning_rate=(TUNING_RATES[tuning],), corrupt=sides)


INSIDE = replace(
    vary(LAB, num_train_epochs=2.0, eval_at=EVAL_AT, save_states=True), frac=(*HALF, Fraction(1)), seed=(0, 1)
)
PRESETS = {
    "demo": (DEMO, DEMO_BBC, DEMO_PROBE),
    "table1": (TABLE_1,),
    "table3": (TABLE_3,),
    "table4": (TABLE_4,),
    "table4b": (TABLE_4B,),
    "table5": (TABLE_5,),
    "figure1": (FIGURE_1,),
    "methods": tuple(vary(LAB, method=name, severity=severity) for name, severity in METHODS),
    "places": tuple(vary(replace(LAB, layers=("each",)), parts=parts) for parts in ("all", "attention", "ffn")),
    "tunings": tuple(map(tuned, TUNING_RATES)),
    "progressive": (replace(LAB, frac=None),),
    "inside": (INSIDE, vary(replace(INSIDE, corrupt=("bottom", "top", "all")), corrupt_after=True)),
    "paper": (FIGURE_1, TABLE_1, TABLE_3, TABLE_4, TABLE_5),  # Figure 1's runs are among Table 1's
}
