"""Rebuild the paper's tables from the runs, put them beside the paper's own, and count its claims in both.

    python aggregate.py                                # after python grid.py
    python aggregate.py --output_dir other_outputs

Written to the output folder, F1 weighted and in percent as in the paper (arXiv 2406.14459): `results.csv`, a row for
each run; `cells.csv`, a row for each cell; `table1` and `3`, `4`, `5` in the paper's layout, as .csv, .md and .tex, if
they have runs; `table2.csv`, the data sets of the runs; `comparison.csv`, ours beside the paper's 320 cells;
`claims.csv`, how many comparisons hold each claim of section 4.2; `bottom_top.csv`, bottom against top example by
example.

A cell that was not run is empty and counted as missing, and so are runs that a grid was asked for. Runs that differ in
anything but learning rate and seed are never put into one cell: `variant` then says what differs, and the tables have
rows for each. Every score is computed again from the run's predictions. A run that is not as it was written, or that
another version of this code did, is named on stderr and left out; the exit code is then 1, and 2 without runs.
"""

import json
import sys
from contextlib import ExitStack
from pathlib import Path

import pandas as pd
from pandas.api.typing import DataFrameGroupBy

import data_sources
import run_dir
import stats
from common import InputError, atomic_write, make_parser, one_line, run_script
from config import FIELDS, NEUTRAL_VALUES, RunConfig
from paper import CLAIMS, DATASETS, LAYERS, MODELS, TABLES, dataset_title, model_title, published_cells, table_of

CELL = ["model", "variant", "side", "percent", "dataset", "pooling", "tuning"]
RUN = [*CELL, "learning_rate", "seed"]
ACROSS = r"(0|100)%"  # the corruption in rows that have one number for bottom and top
PLACE = ["table", "model", "percent", "side", "dataset"]  # a cell of a paper table
KNOWN = {"table": TABLES, "model": MODELS, "dataset": DATASETS}  # columns that have an order in paper.py


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


def read_runs(output_dir: Path) -> tuple[pd.DataFrame, dict[str, pd.DataFrame], pd.DataFrame, list[str]]:
    """A row for each run, each run's predictions at its best epoch, Table 2, and a line for each run that is left out.

    F1, accuracy and shares are in percent; the rows are sorted, so that the order of the folders does not matter.
    """
    rows, others, predictions, sets, problems = {}, {}, {}, {}, []
    for folder in sorted(output_dir.glob("runs/*/")):
        run = folder.name
        try:
            files = {path.name for path in folder.iterdir()}
            if not files or ("failure.json" in files and "result.json" not in files):
                continue
            result = run_dir.read_result(folder)
            row, other = result_row(result), other_settings(result)
            epochs, by_epoch = run_dir.read_evidence(folder, result)
            best = by_epoch[f"epoch_{epochs['weighted_f1'].idxmax() + 1}"]
            frame = by_epoch.filter(["row", "label", "group"]).assign(prediction=best)
            row |= stats.picked_on_halves(epochs) | stats.collapse_stats(frame) | {"run": run}
            data = {"dataset": row["dataset"], "fingerprint": row["data_fingerprint"]}
            if (key := tuple(data.values())) not in sets:
                sets[key] = data_sources.table2([result["data"] | data])
            rows[run], others[run], predictions[run] = row, other, frame
        except run_dir.UNREADABLE as error:
            problems.append(f"{folder} is left out: {why(error)}; delete the folder and do the run again")
    if not rows:
        advice = f"{output_dir}/runs holds no result: run bash run_all.sh, or python train.py, first"
        raise InputError("\n".join([*problems, advice]))
    runs = pd.DataFrame(rows.values(), index=list(rows))
    runs.insert(1, "variant", variants(runs, pd.DataFrame(others.values(), index=list(others)).fillna("null")))
    table2 = pd.concat([sets[key] for key in sorted(sets)])
    return runs.sort_values([*RUN, "run"], ignore_index=True), predictions, table2, problems


def result_row(result: dict) -> dict:
    """A run's row, from its result.json. Raises what is in UNREADABLE if a field is missing or makes no sense."""
    settings, kinds = result["settings"], {"percent": float, "learning_rate": float, "seed": int}
    RunConfig(**{name: settings[name] for name in FIELDS if name in settings})  # refuses what no run can be
    row = {name: kinds.get(name, str)(settings[name]) for name in RUN if name != "variant"}
    row["layers"], of_layers = len(result["corruption"]["layers"]), result["corruption"]["num_layers"]
    sides = {0: ("none",), 100: ("all",)}.get(row["percent"], ("bottom", "top"))
    if row["side"] not in sides or row["layers"] != round(row["percent"] / 100 * of_layers):
        raise ValueError(f"{row['layers']} of {of_layers} layers are not {row['side']} {row['percent']} %")
    row |= {"f1": 100 * result["weighted_f1"], "accuracy": 100 * result["accuracy"]}
    row |= {name: result[name] for name in ("best_epoch", "epochs", "commit")}
    row |= {"seconds": round(result["seconds"]["total"], 1), "device": result["device"]["name"]}
    row |= {name: result["versions"][name] for name in ("torch", "transformers")}
    row |= {name: settings[name] for name in ("model_fingerprint", "data_fingerprint")}
    " ".join(map(str, row.values())).encode()  # raises ValueError for what no CSV can hold, half of a surrogate pair
    return row


def other_settings(result: dict) -> dict[str, str]:
    """A run's settings as JSON, beside those of RUN; what its result lacks has the value that it was made with."""
    request = result["data"]["request"]
    prepared = {"train_size": request["train_size"], "test_size": request["test_size"], "split_seed": request["seed"]}
    settings = NEUTRAL_VALUES | prepared | result["settings"]
    return {name: json.dumps(value).strip('"') for name, value in settings.items() if name not in (*RUN, "frac")}


def variants(runs: pd.DataFrame, others: pd.DataFrame) -> pd.Series:
    """What sets a run apart from others of its cell, beside learning rate and seed; one name for all data sets.

    A setting that differs between the runs of one data set is named for all of the model's runs with that pooling and
    tuning. Of several versions of a data set that no setting tells apart, the one with the most runs is not named.
    """
    by, dataset = [runs[name] for name in ("model", "pooling", "tuning")], runs["dataset"]
    variant, data = pd.Series("", index=runs.index), others.pop("data_fingerprint")
    for name in others.columns[others.nunique() > 1]:
        differs = others[name].groupby([*by, dataset]).transform("nunique").gt(1).groupby(by).transform("any")
        text = others[name].str[:8] if name == "model_fingerprint" else others[name]
        variant += (f", {name}=" + text).where(differs, "")
    most = data.groupby([*by, dataset, variant]).transform(lambda versions: versions.mode()[0])
    variant += (", data_fingerprint=" + data.str[:8]).where(data != most, "")
    variant = variant.str.removeprefix(", ")
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
    cells["table"] = pd.array(tables, dtype="str")
    columns = ["f1", "f1_std", "cross_fitted", "selection_bias", "seeds"]
    columns += ["learning_rate", "learning_rates_tried", "lr_at_grid_edge"]
    return cells[["table", *CELL, *columns, "collapsed", "collapsed_runs", "constant_f1", "floor", "layers", "runs"]]


def read_csv(path: Path) -> pd.DataFrame:
    """A CSV that a script wrote, read back: names stay text."""
    names = dict.fromkeys(("table", "model", "variant", "dataset", "label_name"), "str")
    return pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names).fillna({"variant": ""})


def in_order(names: pd.Series) -> list[str]:
    """The names that occur: those of paper.py first, in their order there, then the others."""
    known = [*KNOWN.get(names.name, ())]
    return sorted(set(names), key=lambda name: ([*known, name].index(name), name))


def groups(frame: pd.DataFrame, *by: str) -> DataFrameGroupBy:
    """As groupby, but in the order of paper.py."""
    ordered = frame.sort_values([*by], key=lambda names: names.map(in_order(names).index), kind="stable")
    return ordered.groupby([*by], sort=False)


def as_text(numbers: pd.Series, form: str = "{:.2f}") -> pd.Series:
    """The numbers as text, empty where there is none."""
    return numbers.map(form.format).where(numbers.notna(), "")


def format_cells(cells: pd.DataFrame, bold: str, red: str) -> pd.Series:
    """One table's cells as text: the higher of bottom and top in bold, collapsed ones in red, deviation over seeds."""
    texts = as_text(cells["f1"])
    f1 = pd.to_numeric(texts)
    lowest = f1.groupby([cells[name] for name in ("model", "variant", "percent", "dataset")]).transform("min")
    texts = texts.mask(cells["collapsed"].eq(True), texts.map(red.format))
    texts = texts.mask(f1 > lowest, texts.map(bold.format))
    return texts + as_text(cells["f1_std"], " ± {:.2f}")


def paper_table(cells: pd.DataFrame, values: pd.Series) -> pd.DataFrame:
    """One table in the paper's layout, of a value for each of its cells, ours or the paper's.

    A row for each model and degree of corruption; columns `model`, `corruption`, and for each data set
    `<data set> bottom` and `<data set> top`. 0 % and 100 % have no side: the paper prints one number across both
    columns, here it stands in both. A cell that is not there is empty.
    """
    columns = pd.MultiIndex.from_product([in_order(cells["dataset"]), ["bottom", "top"]])
    cells = cells.assign(model=pd.Categorical(cells["model"], in_order(cells["model"])), value=values.astype(object))
    across = cells["percent"].isin([0, 100])
    cells = pd.concat([cells[~across], *(cells[across].assign(side=side) for side in columns.levels[1])])
    table = cells.pivot(index=["model", "variant", "percent", "layers"], columns=["dataset", "side"], values="value")
    table = table.reindex(columns=columns, fill_value="").fillna("")
    table.columns = [" ".join(f"{dataset_title(name)} {side}".split()) for name, side in columns]
    table.insert(0, "model", [" ".join(f"{model_title(name)} {variant}".split()) for name, variant, *_ in table.index])
    table.insert(1, "corruption", [f"{part:g}% (1-{depth})" if depth else "0%" for *_, part, depth in table.index])
    return table.reset_index(drop=True)


def count_missing(table: pd.DataFrame) -> int:
    """The cells in a table's rows and columns that were not run; 0 % and 100 % are one for bottom and top."""
    return int((table.eq("").sum(axis=1) / (1 + table["corruption"].str.match(ACROSS))).sum())


def markdown(cells: pd.DataFrame) -> str:
    """One table in Markdown; a dagger stands for red."""
    table = paper_table(cells, format_cells(cells, "**{}**", "{}†"))
    legend = "\n\n† collapsed: at least 99 % of the predictions are one class, in one run of the cell or more"
    text = table.replace(r"\|", r"\|", regex=True).to_markdown(index=False, disable_numparse=True)
    return f"{text}{legend if cells['collapsed'].any() else ''}\n"


def latex(cells: pd.DataFrame) -> str:
    """A tabular for \\input; the number of 0 % and 100 % stands across bottom and top, as in the paper."""
    table = paper_table(cells, format_cells(cells, r"\textbf{{{}}}", r"\textcolor{{red}}{{{}}}"))
    across, bottoms, tops = table["corruption"].str.match(ACROSS), table.columns[2::2], table.columns[3::2]
    table.loc[across, bottoms] = table[bottoms].map(r"\multicolumn{{2}}{{c}}{{{}}}".format)
    table.loc[across, tops] = "@"
    table = table.set_index(["model", "corruption"]).rename_axis([None, None])
    table.columns = pd.MultiIndex.from_tuples([(name.rpartition(" ")[0], name.split()[-1].title()) for name in table])
    style = table.style.format_index(escape="latex", axis=0).format_index(escape="latex", axis=1)
    form = {"column_format": "ll" + "c" * table.shape[1], "multicol_align": "c", "multirow_align": "naive"}
    text = style.to_latex(**form, hrules=True, clines="skip-last;data")
    for sign, name in (("|", "bar"), ("<", "less"), (">", "greater")):  # in TeX's own fonts they are others
        text = text.replace(sign, rf"\text{name}{{}}")
    rule = f"\\cline{{1-{2 + table.shape[1]}}}\n"
    text = text.replace(rule + r"\bottomrule", r"\bottomrule").replace(rule, "\\midrule\n").replace(" & @", "")
    text = text.replace(" &  & Bottom", "Model & Corruption & Bottom", 1)
    needs = "% needs \\usepackage{booktabs,graphicx,xcolor}; as wide as the line at most\n"
    if not text.replace("±", "").isascii():
        needs += (
            "% and xelatex or lualatex, with \\usepackage{fontspec} and a \\setmainfont that has all of the names\n"
        )
    needs += "% red: a run with 99 % of one class\n"
    fit = "}\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi\n"
    return f"{needs}\\noindent\\sbox0{{%\n{text}{fit}"


def compare(ours: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row for each cell of ours and of the paper's; F1 and `difference`, ours - paper, in percent."""
    ours = ours[[*PLACE, "variant", "f1", "cross_fitted", "collapsed"]].rename(columns={"f1": "ours"})
    paper = paper[[*PLACE, "f1", "collapsed"]].rename(columns={"f1": "paper", "collapsed": "paper_outlier"})
    both = ours.merge(paper, how="outer", on=PLACE).astype({"collapsed": "boolean", "paper_outlier": "boolean"})
    both.insert(both.columns.get_loc("paper") + 1, "difference", both["ours"] - both["paper"])
    return both


def claims_table(ours: pd.DataFrame, paper: pd.DataFrame) -> pd.DataFrame:
    """A row for each table and claim: `holds` of `compared` in the paper, in ours, in ours at the paper's cells."""
    sources, rows = {"paper": paper, "ours": ours, "ours_in_paper": ours.merge(paper[PLACE], on=PLACE)}, []
    for table in TABLES:
        counts = {name: stats.count_claims(cells[cells["table"] == table]) for name, cells in sources.items()}
        for number, claim in enumerate(CLAIMS):
            rows.append({"table": table, "claim": f"({number + 1}) {claim.short}"})
            for name, of_claims in counts.items():
                rows[-1] |= dict(zip((f"{name}_holds", f"{name}_compared"), of_claims[number], strict=True))
    return pd.DataFrame(rows)


def bottom_top(cells: pd.DataFrame, runs: pd.DataFrame, predictions: dict[str, pd.DataFrame]) -> tuple:
    """A row for each degree that has both sides, their best runs paired by seed; a line for each that is refused."""
    by, rows, problems = [name for name in CELL if name != "side"], [], []
    best = cells.assign(run=cells["runs"].str.split()).explode("run").merge(runs[["run", "seed"]], on="run")
    for key, group in best[best["side"].isin(["bottom", "top"])].groupby(by):
        seeds = group.pivot(index="seed", columns="side", values="run")
        if seeds.shape[1] == 1:
            continue
        what, both = f"bottom against top, {stats.in_words(key)}", seeds.dropna()
        if len(both) < len(seeds):
            words = f"only {both.index.tolist()} are" if len(both) else "none is"
            warn(f"{what}: the sides have different seeds: {words} compared")
        bottom, top = ([predictions[run] for run in both[side]] for side in ("bottom", "top"))
        if any(not frame[["row", "label"]].equals(bottom[0][["row", "label"]]) for frame in bottom + top):
            problems.append(f"{what} is left out: the test rows or labels of the runs differ")
        elif len(both):
            rows.append(dict(zip(by, key, strict=True)) | {"seeds": len(both), **stats.compare_paired(bottom, top)})
    return pd.DataFrame(rows, columns=[*by, "seeds", *stats.COMPARED]), problems


def missing_lines(output_dir: Path, runs: pd.Series, cells: pd.DataFrame) -> list[str]:
    """What is missing of the runs that grids were asked for, and of the paper's cells if a model of the paper is here.

    Raises InputError if asked.json, in which grid.py leaves each command and its runs, cannot be read.
    """
    path, lines = output_dir / "asked.json", []
    try:
        asked = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        for command, names in asked.items():
            if missing := len(set(names) - set(runs)):
                lines.append(f'{missing} of {len(names)} runs of "{" ".join(command.split())}" are missing')
    except run_dir.UNREADABLE as error:
        raise InputError(f"{path} cannot be read: {why(error)}; delete it, and do the grid's command again") from error
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
    output_dir = parser.parse_args().output_dir
    failures, problems = read_failures(output_dir)
    failed = [f"failed: {run}: {reason}" for run, reason in failures.items()]
    try:
        runs, predictions, table2, left_out = read_runs(output_dir)
        cells, paper = make_cells(runs), published_cells()
        pairs, unpaired = bottom_top(cells, runs, predictions)
        problems += left_out + unpaired
        in_tables = cells.dropna(subset="table")
        tables = {n: of_table for (n,), of_table in groups(in_tables, "table")}
        texts = {f"table{n}": paper_table(of_table, as_text(of_table["f1"])) for n, of_table in tables.items()}
        claims = claims_table(in_tables, paper)
        frames = {"results": runs, "cells": cells, "comparison": compare(in_tables, paper), "claims": claims}
        frames |= {"bottom_top": pairs, "table2": table2, **texts}
        files = {f"{name}.csv": frame.to_csv(index=False) for name, frame in frames.items()}
        for n, of_table in tables.items():
            files |= {f"table{n}.md": markdown(of_table), f"table{n}.tex": latex(of_table)}
        with ExitStack() as stack:  # all files or none
            for name, text in files.items():
                stack.enter_context(atomic_write(output_dir / name)).write_text(text, encoding="utf-8")
        for name in {f"table{n}.{kind}" for n in TABLES for kind in ("csv", "md", "tex")} - files.keys():
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
    short = claims[claims["table"].isin(tables)][["table", "claim"]]
    for name in ("paper", "ours", "ours_in_paper"):
        short[name] = claims[f"{name}_holds"].astype(str) + "/" + claims[f"{name}_compared"].astype(str)
    print(f"Claims: how many comparisons hold, of those that can be made\n\n{short.to_markdown(index=False)}\n")
    empty = sum(map(count_missing, texts.values()))
    cells_line = (
        f"{len(in_tables)} cells from {len(runs)} runs, {empty} cells missing in the rows and columns that are there"
    )
    print("\n".join([cells_line, *missing, *failed]))
    if len(cells) > len(in_tables):
        warn(f"{len(cells) - len(in_tables)} cells are of a pooling and tuning that no table has: see cells.csv")
    print(f"-> {output_dir}/{', '.join(files)}")
    if problems:
        sys.exit("\n".join(problems))  # on stderr, with exit code 1


if __name__ == "__main__":
    run_script(main)
