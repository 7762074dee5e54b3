"""Rebuild the paper's tables from the runs: outputs/results.csv, cells.csv, table1.csv and table1.md.

    python aggregate.py
    python aggregate.py --output_dir outputs

`results.csv` has a row for each run. `cells.csv` has a row for each cell: the learning rate whose mean over the seeds
is best, as the paper takes the best of three. F1 is weighted and in percent, as in the paper. A cell that was not run
is empty and counted as missing. Runs that differ in anything but learning rate and seed are never put into one cell:
`variant` then says what differs, and the table has rows for each.
"""

import argparse
import json
from fractions import Fraction
from pathlib import Path

import pandas as pd

CELL = ["model", "variant", "side", "percent", "dataset", "pooling", "tuning"]
# The order and the names of the paper's tables; what is not in them follows under its own name.
MODELS = {"bert-base-uncased": "Base", "bert-large-uncased": "Large", "distilbert-base-uncased": "Distil"}
MODELS |= {"minilm": "MiniLM"}
DATASETS = {"sst2": "SST-2", "rotten_tomatoes": "Rotten Tomatoes", "bbc_news": "BBC News"}


class NoResults(ValueError):
    """There is nothing to make a table of, or no place to put it."""


def read_runs(output_dir: Path) -> pd.DataFrame:
    """A row for each finished run, F1 and accuracy in percent, sorted so that the order of the folders is no matter."""
    results = {}
    for path in output_dir.glob("runs/*/result.json"):
        try:
            results[path.parent.name] = json.loads(path.read_text())
        except ValueError as error:
            raise NoResults(f"{path} cannot be read ({error}): delete it and do the run again") from error
    if not results:
        raise NoResults(f"{output_dir}/runs holds no result: run bash run_all.sh, or python train.py, first")
    settings = pd.DataFrame([result["settings"] for result in results.values()], index=list(results))
    rows = settings[["model", "side", "percent", "dataset", "pooling", "tuning", "learning_rate", "seed"]].assign(
        variant=variants(settings),
        layers=[round(Fraction(r["settings"]["frac"]) * r["corruption"]["of_layers"]) for r in results.values()],
        f1=[100 * r["weighted_f1"] for r in results.values()],
        accuracy=[100 * r["accuracy"] for r in results.values()],
        best_epoch=[r["best_epoch"] for r in results.values()],
        epochs=[r["epochs"] for r in results.values()],
        seconds=[round(r["seconds"]["total"], 1) for r in results.values()],
        device=[r["device"]["name"] for r in results.values()],
        torch=[r["versions"]["torch"] for r in results.values()],
        transformers=[r["versions"]["transformers"] for r in results.values()],
        commit=[r["commit"] for r in results.values()],
        model_fingerprint=settings["model_fingerprint"],
        data_fingerprint=settings["data_fingerprint"],
        run=list(results),
    )
    return rows.sort_values([*CELL, "learning_rate", "seed", "run"], ignore_index=True)


def variants(settings: pd.DataFrame) -> pd.Series:
    """What sets a run apart from others of its model and data set, beside its cell, learning rate and seed."""
    own = settings.drop(columns=[*(set(CELL) & set(settings)), "frac", "learning_rate", "seed"]).astype(object)
    own = own.where(own.notna(), None).map(lambda value: json.dumps(value, sort_keys=True).strip('"'))
    differs = own.groupby([settings["model"], settings["dataset"]]).transform("nunique") > 1
    shown = own.apply(lambda column: column.str[:8] if column.name.endswith("_fingerprint") else column)
    return pd.Series(
        [", ".join(f"{name}={shown.at[run, name]}" for name in own if differs.at[run, name]) for run in own.index],
        index=own.index,
    )


def make_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell: the best learning rate's mean and standard deviation of F1 (percent) over its seeds."""
    tried = runs.groupby([*CELL, "learning_rate"], as_index=False).agg(
        f1=("f1", "mean"),
        f1_std=("f1", "std"),
        seeds=("seed", "nunique"),
        layers=("layers", "first"),
        runs=("run", " ".join),
    )
    best = tried.sort_values(["f1", "learning_rate"], ascending=[False, True]).drop_duplicates(CELL)
    rates = tried.groupby(CELL)["learning_rate"].agg(lambda rates: " ".join(f"{rate:g}" for rate in rates))
    return best.merge(rates.rename("learning_rates_tried").reset_index(), on=CELL).sort_values(CELL, ignore_index=True)


def in_order(names: pd.Series, known: dict[str, str]) -> list[str]:
    """The names that occur: known ones first, in their order, then the others."""
    present = set(names)
    return [name for name in known if name in present] + sorted(present - set(known))


def paper_table(cells: pd.DataFrame, pooling: str, tuning: str) -> tuple[pd.DataFrame, int, int]:
    """The paper's layout, and how many of its cells are there and missing.

    A row for each model and degree of corruption, columns `<data set> bottom` and `<data set> top`. 0 % and 100 % have
    no side: the paper prints one number across both columns, here it stands in both.
    """
    cells = cells[(cells["pooling"] == pooling) & (cells["tuning"] == tuning)]
    f1 = cells.set_index(["model", "variant", "percent", "side", "dataset"])["f1"]
    degrees = cells[["model", "variant", "percent", "layers"]].drop_duplicates()
    degrees["model"] = pd.Categorical(degrees["model"], in_order(degrees["model"], MODELS))
    rows, there, missing = [], 0, 0
    for model, variant, percent, layers in degrees.sort_values(list(degrees)).itertuples(index=False):
        row = {"model": " ".join([MODELS.get(model, model), variant]).strip()}
        row["corruption"] = f"{percent:g}% (1-{layers})" if layers else "0%"
        sides = {0: ("none",), 100: ("all",)}.get(percent, ("bottom", "top"))
        for dataset in in_order(cells["dataset"], DATASETS):
            values = [f1.get((model, variant, percent, side, dataset)) for side in sides]
            missing += values.count(None)
            there += len(values) - values.count(None)
            for column, value in zip(("bottom", "top"), values * (2 // len(values)), strict=True):
                row[f"{DATASETS.get(dataset, dataset)} {column}"] = "" if value is None else f"{value:.2f}"
        rows.append(row)
    return pd.DataFrame(rows), there, missing


def markdown(table: pd.DataFrame) -> str:
    """The table in Markdown, the higher of bottom and top in bold, as in the paper."""
    table = table.copy()
    for bottom in [name for name in table if name.endswith(" bottom")]:
        top = f"{bottom.removesuffix(' bottom')} top"
        values = table[[bottom, top]].apply(pd.to_numeric)
        for higher, lower in ((bottom, top), (top, bottom)):
            wins = values[higher] > values[lower]
            table.loc[wins, higher] = "**" + table.loc[wins, higher] + "**"
    return table.to_markdown(index=False, disable_numparse=True) + "\n"


def write_whole(path: Path, text: str) -> None:
    """Write aside, then rename: the file appears whole or not at all."""
    aside = path.with_name(f".partial-{path.name}")
    aside.write_text(text)
    aside.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0],
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="where runs/ is and the tables go")
    output_dir = parser.parse_args().output_dir
    try:
        runs = read_runs(output_dir)
        cells = make_cells(runs)
        table, there, missing = paper_table(cells, pooling="cls", tuning="full")
        write_whole(output_dir / "results.csv", runs.to_csv(index=False))
        write_whole(output_dir / "cells.csv", cells.to_csv(index=False))
        write_whole(output_dir / "table1.csv", table.to_csv(index=False))
        write_whole(output_dir / "table1.md", markdown(table))
    except (NoResults, OSError) as error:
        parser.error(str(error))
    print("Table 1: weighted F1 in percent after fine-tuning; the higher of bottom and top in bold\n")
    print(markdown(table))
    print(f"{there} cells from {len(runs)} runs, {missing} cells missing")
    for path in sorted(output_dir.glob("runs/*/failure.json")):
        print(f"failed: {path.parent.name}: {json.loads(path.read_text())['reason']}")
    print(f"-> {output_dir}/results.csv, cells.csv, table1.csv, table1.md")


if __name__ == "__main__":
    main()
