"""Rebuild the paper's tables from the runs, put them beside the paper's own, and count its claims in both.

    python aggregate.py                                # after python grid.py
    python aggregate.py --output_dir other_outputs

Written to the output folder, F1 weighted and in percent as in the paper (arXiv 2406.14459): `results.csv`, a row for
each run; `cells.csv`, a row for each cell; `table1` and `3`, `4`, `5` in the paper's layout, as .csv, .md and .tex, if
they have runs; `table2.csv`, the data sets of the runs; `comparison.csv`, ours beside the paper's 320 cells;
`comparisons.csv` and `claims.csv`, whether each comparison, and each claim of section 4.2, holds, fails or cannot be
told, with the seed as the unit; `floors.csv`, what the data sets give without an encoder.

A cell that was not run is empty and counted as missing, and so are runs that a grid was asked for. Runs that differ in
anything but learning rate and seed are never put into one cell: `variant` then says what differs, and the tables have
rows for each. Every score is computed again from the run's predictions. A run that is not as it was written, or that
another version of this code did, is named on stderr and left out; the exit code is then 1, and 2 without runs.
"""

import json
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import pandas as pd

import data_sources
import lab
import run_dir
import stats
from common import InputError, make_parser, one_line, run_script, write_together
from config import FIELDS, NEUTRAL_VALUES, OF_CORRUPTION, RunConfig, exact
from paper import CLAIMS, LAYERS, TABLES, TEST_ROWS, published_cells, table_of
from protocol import PROTOCOL
from tables import as_text, count_missing, groups, latex, markdown, name_apart, paper_table, plain_latex, plain_markdown

CELL = ["model", "variant", "method", "parts", "order", "side", "percent", "dataset", "pooling", "tuning"]
RUN = [*CELL, "learning_rate", "seed"]
FLOORS = ("constant", "guessing", "words")
PLACE = ["table", "model", "percent", "side", "dataset"]  # a cell of a paper table


def warn(line: str) -> None:
    print(line, file=sys.stderr)


def why(error: BaseException) -> str:
    return f"it lacks {error}" if isinstance(error, KeyError) else one_line(error)


def read_failures(output_dir: Path) -> tuple[dict[str, str], list[str]]:
    """Why each run failed, and a line for each failure.json that cannot be read."""
    failures, problems = {}, []
    for path in sorted(output_dir.glob("runs/*/failure.json")):
        try:
            reason = json.loads(path.read_text(encoding="utf-8"))["reason"]
            failures[path.parent.name] = " ".join(reason.split())
        except run_dir.UNREADABLE as error:
            problems.append(f"{path} cannot be read: {why(error)}; delete it")
    return failures, problems


def read_runs(output_dir: Path) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], pd.DataFrame, pd.DataFrame, list[str]]:
    """A row for each run, each run's predictions at its best epoch, its steps (`run`, `step`, `f1`) if any, Table
    2, and a line for each run that is left out.

    F1, accuracy and shares are in percent; the rows are sorted, so that the order of the folders does not matter.
    """
    rows, others, predictions, sets, steps, problems = {}, {}, {}, {}, [pd.DataFrame(columns=["run", "step", "f1"])], []
    for folder in sorted(output_dir.glob("runs/*/")):
        run = folder.name
        try:
            files = {path.name for path in folder.iterdir()}
            if not files or ("failure.json" in files and "result.json" not in files):
                continue
            result = run_dir.read_result(folder)
            row, other = result_row(result), other_settings(result)
            epochs, by_epoch, by_step = run_dir.read_evidence(folder, result)
            best = by_epoch[f"epoch_{epochs['weighted_f1'].idxmax() + 1}"]
            frame = by_epoch.filter(["row", "label", "group"]).assign(prediction=best)
            test_rows = pd.util.hash_pandas_object(frame.drop(columns="prediction"), index=False).to_numpy().tobytes()
            other |= {"test_rows": sha256(test_rows).hexdigest()}
            row |= {"f1_last": 100 * epochs["weighted_f1"].iloc[-1]}
            row |= stats.picked_on_halves(epochs) | stats.collapse_stats(frame) | {"run": run}
            data = {"dataset": row["dataset"], "fingerprint": row["data_fingerprint"]}
            if (key := tuple(data.values())) not in sets:
                sets[key] = data_sources.table2([result["data"] | data])
            rows[run], others[run], predictions[run] = row, other, frame
            if by_step is not None:
                steps.append(by_step[["step"]].assign(run=run, f1=100 * by_step["weighted_f1"]))
        except run_dir.UNREADABLE as error:
            problems.append(f"{folder} is left out: {why(error)}; delete the folder and do the run again")
    if not rows:
        advice = f"{output_dir}/runs holds no result: run bash run_all.sh, or python train.py, first"
        raise InputError("\n".join([*problems, advice]))
    runs = pd.DataFrame(rows.values(), index=list(rows))
    others = pd.DataFrame(others.values(), index=list(others)).fillna("null")
    apart = others[others.columns[others.nunique() > 1]]
    runs.insert(1, "variant", variants(runs, apart.drop(columns="test_rows", errors="ignore")))
    runs["settings"] = [json.dumps(values) for values in apart.to_dict("records")]
    table2 = pd.concat([sets[key] for key in sorted(sets)])
    return runs.sort_values([*RUN, "run"], ignore_index=True), predictions, pd.concat(steps), table2, problems


def result_row(result: dict) -> dict:
    """A run's row, from its result.json. Raises what is in UNREADABLE if a field is missing or makes no sense."""
    settings, kinds = result["settings"], {"percent": float, "learning_rate": float, "seed": int}
    settings, corruption = NEUTRAL_VALUES | settings, result["corruption"]
    fields = {name: settings[name] for name in FIELDS if name in NEUTRAL_VALUES}
    RunConfig(**fields | ({} if settings["side"] == "none" else {"layers": settings["side"]}))  # refuses what cannot be
    settings["order"] = "after" if settings["corrupt_after"] else "before"  # corrupted before, or after, fine-tuning
    row = {name: kinds.get(name, str)(settings[name]) for name in RUN if name != "variant"}
    row["method"] += "" if settings["severity"] is None else f" {exact(settings['severity'])}"
    layers, of_layers = corruption["layers"], corruption["num_layers"]
    row |= {
        "layers": len(layers),
        "place": str(corruption.get("place", "-".join(map(str, layers[:1] + layers[1:][-1:])))),
    }
    sides = {0: ("none",), 100: ("all",)}.get(row["percent"], ("bottom", "top"))
    if row["side"] not in {*sides, row["place"]} - {""} or row["layers"] != round(row["percent"] / 100 * of_layers):
        raise ValueError(f"{row['layers']} of {of_layers} layers are not {row['side']} {row['percent']} %")
    change, trained = corruption.get("relative_change"), result["model"].get("trained")
    row |= {"relative_change": np.nan if change is None else float(change)}
    row |= {"trained": None if trained is None else int(trained)}
    row |= {"f1": 100 * result["weighted_f1"], "accuracy": 100 * result["accuracy"]}
    row |= {name: result[name] for name in ("best_epoch", "epochs", "commit")}
    epochs = float(settings["num_train_epochs"]) if settings["max_steps"] < 0 else np.nan  # then steps count
    row |= {"num_train_epochs": epochs}
    row |= {"seconds": round(result["seconds"]["total"], 1), "device": result["device"]["name"]}
    row |= {"peak_memory_gb": round(result.get("peak_memory", np.nan) / 1e9, 2)}
    row |= {name: result["versions"][name] for name in ("torch", "transformers")}
    row |= {name: settings[name] for name in ("model_fingerprint", "data_fingerprint")}
    floors = result["data"].get("floors", {})
    row |= {name: 100 * floors.get(name, np.nan) for name in FLOORS}
    row |= {"max_length": settings["max_length"], **result["data"]["rows"]}
    " ".join(map(str, row.values())).encode()  # raises ValueError for what no CSV can hold, half of a surrogate pair
    return row


def other_settings(result: dict) -> dict[str, str]:
    """A run's settings as JSON, beside those of RUN; what its result lacks has the value that it was made with.

    A neutral value has one spelling, 0 for 0.0. What has become a part of the protocol is not a setting.
    """
    rows, split_seed = result["data"]["rows"], result["data"]["request"]["seed"]
    prepared = {"train_size": rows["train"], "test_size": rows["test"], "split_seed": split_seed}
    settings = NEUTRAL_VALUES | prepared | result["settings"]
    settings |= {name: value for name, value in NEUTRAL_VALUES.items() if settings[name] == value}
    own = {*RUN, *OF_CORRUPTION, *PROTOCOL, "frac"}
    return {name: json.dumps(value).strip('"') for name, value in settings.items() if name not in own}


def variants(runs: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """What sets a run apart from others of its model, pooling and tuning, beside learning rate and seed."""
    by = [runs[name] for name in ("model", "pooling", "tuning")]
    variant = name_apart(others, by, runs["dataset"])
    for of_model, kinds in variant.groupby(by):
        if kinds.nunique() > 1:
            names = " | ".join(name or "the others" for name in sorted(set(kinds)))
            warn(f"{' '.join(of_model)}: runs of different settings are kept apart: {names}")
    return variant


def make_cells(runs: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell, with the number of its table, if it has one."""
    comparable, notes = stats.same_seeds(runs, CELL)
    for note in notes:
        warn(note)
    cells = stats.pick_learning_rate(comparable, CELL).reset_index()
    tables = [table_of(*place) for place in cells[["pooling", "tuning", "dataset"]].values]
    cells["table"] = pd.Series(pd.array(tables, dtype="str")).where(cells.index.isin(lab.plain(cells).index))
    column = ["model", "variant", "dataset", "pooling", "tuning"]
    uncorrupted = (
        cells["f1"].where(cells["side"] == "none").groupby([cells[name] for name in column]).transform("first")
    )
    cells["recovery"] = stats.recovery(cells["f1"], uncorrupted, cells["floor"])
    columns = ["f1", "f1_std", "recovery", "cross_fitted", "selection_bias", "seeds"]
    columns += ["learning_rate", "learning_rates_tried", "lr_at_grid_edge"]
    columns += ["collapsed", "collapsed_share", "constant_f1", "floor", "words", "layers", "place"]
    columns += ["relative_change", "trained", "train", "num_train_epochs", "settings", "runs"]
    return cells[["table", *CELL, *columns]]


def floors_table(runs: pd.DataFrame) -> pd.DataFrame:
    """What each data set gives without an encoder, for each tokenizer (the model's) and length, in percent."""
    by = ["dataset", "data_fingerprint", "model", "model_fingerprint", "max_length"]
    return runs.groupby(by)[["train", "test", *FLOORS]].first().reset_index()


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV that a script wrote, read back: names stay text."""
    names = dict.fromkeys(("table", "model", "variant", "dataset", "label_name", "side", "place", "t90"), "str")
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names).fillna({"variant": "", "place": ""})


def compare(ours: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell of ours and of the paper's; F1 and `difference`, ours - paper, in percent."""
    ours = ours[[*PLACE, "variant", "f1", "cross_fitted", "collapsed"]].rename(columns={"f1": "ours"})
    paper = paper[[*PLACE, "f1", "collapsed"]].rename(columns={"f1": "paper", "collapsed": "paper_outlier"})
    both = ours.merge(paper, how="outer", on=PLACE).astype({"collapsed": "boolean", "paper_outlier": "boolean"})
    both.insert(both.columns.get_loc("paper") + 1, "difference", both["ours"] - both["paper"])
    return both


def compare_claims(
    ours: pd.DataFrame, fixed: pd.DataFrame, intervals: pd.DataFrame, paper: pd.DataFrame, run_deviation: float
) -> dict[str, pd.DataFrame]:
    """`comparisons`, a row for each comparison of the claims, in ours and in the paper, and `claims`, each with its
    verdict; `source` says whose. Beside ours stand the F1 of the paper's protocol, and cross-fitted."""
    judged, of_claims = stats.compare_runs(ours, fixed, CELL)
    for end in ("lower", "higher"):
        judged = judged.join(ours[["f1", "cross_fitted"]].add_suffix(f"_{end}"), on=end)
    judged = judged.join(intervals, on="lower")
    judged.loc[judged["claim"] != 2, [*intervals]] = np.nan
    theirs, claims_of_paper = stats.compare_published(paper, TEST_ROWS, run_deviation)
    frames = {"comparisons": (judged, theirs), "claims": (of_claims, claims_of_paper)}
    both = {}
    for name, (first, second) in frames.items():
        both[name] = pd.concat([first.assign(source="ours"), second.assign(source="paper")], ignore_index=True)
        both[name].insert(0, "source", both[name].pop("source"))
        both[name]["claim"] = both[name]["claim"].map(lambda number: f"({number + 1}) {CLAIMS[number].short}")
    both["claims"]["run_deviation"] = run_deviation  # that the paper's are judged by
    both["comparisons"] = both["comparisons"].drop(columns=["lower", "higher"])
    return both


def claims_markdown(claims: pd.DataFrame) -> str:
    """Our claims in Markdown, all tables together: the verdict, the mean difference, and the counts."""
    rows = claims[claims["source"].eq("ours") & claims["table"].eq("all")].copy()
    rows["verdict"] += rows["why"].map(" ({})".format).where(rows["why"] != "", "")
    interval = as_text(rows["low"], " [{:.2f}, ") + as_text(rows["high"], "{:.2f}]")
    rows["mean difference"] = as_text(rows["difference"], "{:+.2f}") + interval
    counts = ["holds", "fails", "unresolved"]
    rows["comparisons: " + ", ".join(counts)] = rows[counts].astype(str).agg(", ".join, axis=1)
    rows["as the paper counts"] = rows["counted"].astype(str) + " of " + rows["compared"].astype(str)
    return rows[["claim", "verdict", *rows.columns[-3:]]].to_markdown(index=False)


def two_models(cells: pd.DataFrame, runs: pd.DataFrame, predictions: dict[str, pd.DataFrame]) -> tuple:
    """For each degree that has bottom and top with one seed, by the bottom cell's index, the interval over the test
    rows of these two models; and a line for each whose test rows differ."""
    by, rows, problems = [name for name in CELL if name != "side"], {}, []
    seed_of = runs.set_index("run")["seed"]
    for key, group in cells[cells["side"].isin(["bottom", "top"])].groupby(by):
        if len(group) < 2:
            continue
        names = group.sort_values("side")["runs"].str.split().sum()  # the bottom's come first
        frames = [predictions[name] for name in names]
        if any(not frame[["row", "label"]].equals(frames[0][["row", "label"]]) for frame in frames):
            problems.append(f"bottom against top, {stats.in_words(key)}: the test rows or labels of the runs differ")
        elif len(names) == 2 and seed_of[names].nunique() == 1:
            low, high = stats.two_models_interval(*frames)
            rows[group.index[group["side"] == "bottom"][0]] = {
                "rows": len(frames[0]),
                "rows_low": low,
                "rows_high": high,
            }
    return pd.DataFrame.from_dict(rows, "index", columns=["rows", "rows_low", "rows_high"]), problems


def missing_lines(output_dir: Path, runs: pd.Series, cells: pd.DataFrame) -> list[str]:
    """What is missing of the runs that grids were asked for, and of the paper's cells if a model of the paper is here.

    Raises InputError if asked.json cannot be read.
    """
    lines = []
    for command, names in run_dir.read_asked(output_dir).items():
        if missing := len(set(names) - set(runs)):
            lines.append(f'{missing} of {len(names)} runs of "{" ".join(command.split())}" are missing')
    if cells["model"].isin(LAYERS).any():
        paper = published_cells()[PLACE]
        ours = paper.merge(cells[PLACE].drop_duplicates())["table"].value_counts()
        of = {
            number: (int(ours.get(number, 0)), count)
            for number, count in paper["table"].value_counts(sort=False).items()
        }
        short = ", ".join(f"Table {number}: {here} of {count}" for number, (here, count) in of.items() if here < count)
        lines.append(f"{sum(ours)} of the paper's {len(paper)} cells{short and f' ({short})'}")
    return lines


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    rates = "compare cells at these learning rates, fixed beforehand, one for each cell (default: cells with one alone)"
    parser.add_argument("--learning_rate", nargs="+", type=float, default=[], help=rates)
    pilot = "choose each cell's learning rate on these seeds, and compare on the others"
    parser.add_argument("--pilot_seeds", nargs="+", type=int, default=[], help=pilot)
    deviation = "F1 points from run to run that the paper's numbers are judged by (default: %(default)s)"
    parser.add_argument("--run_deviation", type=float, default=0.5, help=deviation)
    args = parser.parse_args()
    if args.learning_rate and args.pilot_seeds:
        parser.error("--learning_rate and --pilot_seeds both choose the learning rate: give one of them")
    if not 0 <= args.run_deviation < 100:
        parser.error(f"--run_deviation {args.run_deviation} is not from 0 to 100 points")
    output_dir = args.output_dir
    failures, problems = read_failures(output_dir)
    failed = [f"failed: {run}: {reason}" for run, reason in failures.items()]
    try:
        runs, predictions, steps, table2, left_out = read_runs(output_dir)
        cells, paper = make_cells(runs), published_cells()
        for name, wanted in (("learning_rate", args.learning_rate), ("seed", args.pilot_seeds)):
            if absent := set(wanted) - set(runs[name]):
                raise InputError(f"no run has {name} {min(absent):g}: there are {sorted(set(runs[name]))}")
        fixed = stats.fixed_rate(runs, CELL, args.learning_rate, args.pilot_seeds)
        in_tables = cells.dropna(subset="table")
        intervals, unlike = two_models(in_tables, runs, predictions)
        problems += left_out + unlike
        tables = {n: of_table for (n,), of_table in groups(in_tables, "table")}
        texts = {f"table{n}": paper_table(of_table, as_text(of_table["f1"])) for n, of_table in tables.items()}
        beyond = lab.lab_cells(cells)
        texts |= {f"table{n}": lab.lab_table(n, of_table) for n, of_table in beyond.items()}
        frames = {"results": runs, "cells": cells, "comparison": compare(in_tables, paper)}
        frames |= compare_claims(in_tables, fixed, intervals, paper, args.run_deviation)
        frames |= {"floors": floors_table(runs), "table2": table2, **texts}
        frames |= {"lab": lab.differences(beyond, cells, fixed, CELL)} if beyond else {}
        if len(curves := lab.recovery_curves(fixed, steps, CELL)):
            frames |= {"curves": curves, "recovery": lab.recovery_times(curves, CELL)}
        files = {f"{name}.csv": frame.to_csv(index=False) for name, frame in frames.items()}
        for n, of_table in tables.items():
            files |= {f"table{n}.md": markdown(of_table), f"table{n}.tex": latex(of_table)}
        for n in beyond:
            files |= {
                f"table{n}.md": plain_markdown(texts[f"table{n}"]),
                f"table{n}.tex": plain_latex(texts[f"table{n}"]),
            }
        write_together(output_dir, "aggregate", files)
        kinds = [f"table{n}.{kind}" for n in (*TABLES, *lab.LAB_TABLES) for kind in ("csv", "md", "tex")]
        for name in {*kinds, "lab.csv", "curves.csv", "recovery.csv"} - files.keys():
            (output_dir / name).unlink(missing_ok=True)  # of runs that are gone
    except (InputError, OSError) as error:
        parser.error("\n".join([*problems, *failed, str(error)]))
    try:
        missing = missing_lines(output_dir, runs["run"], in_tables)
    except InputError as error:
        missing, problems = [], [*problems, str(error)]
    for n in tables:
        caption = f"weighted F1 in percent {TABLES[n].caption}; bold: the higher side"
        print(f"Table {n}: {caption}\n\n{files[f'table{n}.md']}")
    for n in beyond:
        print(f"Table {n}: weighted F1 in percent {lab.LAB_TABLES[n][0]}\n\n{files[f'table{n}.md']}")
    print(f"Claims, each comparison and their mean judged by the seeds\n\n{claims_markdown(frames['claims'])}\n")
    empty = sum(count_missing(texts[f"table{n}"]) for n in tables)
    cells_line = (
        f"{len(in_tables)} cells from {len(runs)} runs, {empty} cells missing in the rows and columns that are there"
    )
    print("\n".join([cells_line, *missing, *failed]))
    if nowhere := len(lab.in_no_table(cells, beyond)):
        warn(f"{nowhere} cells are of a pooling, tuning or corruption that no table has: see cells.csv")
    print(f"-> {output_dir}/{', '.join(files)}")
    if problems:
        sys.exit("\n".join(problems))  # on stderr, with exit code 1


if __name__ == "__main__":
    run_script(main)
