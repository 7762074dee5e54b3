"""Write outputs/report.html, one page that shows what recovered, and its figures as files to put into a paper.

    python report.py                                  # after python aggregate.py
    python report.py --output_dir outputs --compare_to other_outputs      # two output folders, side by side

The page needs nothing but itself: the claims and how often they hold, the tables as heat maps beside the paper's, F1
against the corrupted fraction, F1 by epoch, Figure 1, what is doubtful, and each run with the command that repeats it.
Each figure is also in outputs/figures, as PNG and PDF, 3.3 inches wide as a column is; Figure 1 is drawn as plots.py
does, where it is not up to date. All is read from the CSVs that aggregate.py wrote and from the runs' folders; a number
that these do not agree on is refused.
"""

import re
import sys
from base64 import b64encode
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

import inside
import lab
import lab_plots
import plots
import run_dir
import stats
from aggregate import missing_lines, other_settings, read_csv, read_failures
from common import InputError, atomic_write, check_together, fail, make_parser, one_line, run_script, sha256_of
from config import exact
from paper import CLAIMS, TABLES, dataset_title, model_title, published_cells
from tables import OF_DATA, as_text, count_missing, format_cells, groups, paper_table

COLUMNS = ["table", "model", "variant", "dataset"]  # a column of a table, for one model
TEMPLATE = Path(__file__).with_name("report.html.jinja")
TABLESORT = Path(__file__).parent / "web" / "tablesort.min.js"  # tristen.ca/tablesort, MIT


# ---- Read ----


class ResultSet(NamedTuple):
    """What aggregate.py made of the runs, and what stands in their folders."""

    runs: pd.DataFrame  # results.csv
    cells: pd.DataFrame  # cells.csv
    comparisons: pd.DataFrame  # comparisons.csv
    claims: pd.DataFrame  # claims.csv
    lab: pd.DataFrame  # lab.csv; empty where no table of the lab has cells
    results: dict[str, dict]  # each run's result.json
    epochs: dict[str, pd.DataFrame]  # each run's epochs.csv
    failures: dict[str, str]  # why a run failed
    left_out: list[str]  # runs that are in no table


def read(output_dir: Path) -> ResultSet:
    """Raises InputError if the CSVs are not there, are not what was written, or are older than the runs."""
    again = f"run python aggregate.py --output_dir {output_dir} first"
    if not (output_dir / "runs").is_dir():
        raise InputError(f"{output_dir} holds no runs: give the output folder of grid.py or train.py")
    written = check_together(output_dir, "aggregate")
    try:
        names = ("results", "cells", "comparisons", "claims")
        runs, cells, comparisons, claims = (read_csv(output_dir / f"{name}.csv") for name in names)
        lab.lab_cells(cells)
        beyond = read_csv(output_dir / "lab.csv") if "lab.csv" in written else pd.DataFrame()
    except KeyError as error:
        raise InputError(f"the tables are of an older version ({one_line(error)}): {again}") from error
    results, epochs = {}, {}
    for run, f1 in zip(runs["run"], runs["f1"], strict=True):
        folder = output_dir / "runs" / run
        try:
            results[run] = run_dir.read_result(folder)
            epochs[run] = pd.read_csv(folder / "epochs.csv")
            if not abs(100 * results[run]["weighted_f1"] - f1) < 1e-6:
                raise ValueError("another F1")
            if sha256_of(folder / "epochs.csv") != results[run]["files"]["epochs.csv"]["sha256"]:
                raise ValueError("epochs.csv is not what the run wrote")
        except run_dir.UNREADABLE as error:
            raise InputError(f"{folder} is not what results.csv was made from ({one_line(error)}): {again}") from error
    folders = sorted(path.parent.name for path in output_dir.glob("runs/*/result.json"))
    failures, left_out = read_failures(output_dir)[0], [run for run in folders if run not in results]
    return ResultSet(runs, cells, comparisons, claims, beyond, results, epochs, failures, left_out)


# ---- Ours beside the reference: the paper, or another output folder ----


def join_reference(ours: pd.DataFrame, reference: pd.DataFrame, by_variant: bool) -> pd.DataFrame:
    """A row for each cell of ours, and of the reference where it has a column of ours; its values end in _reference.

    `difference` is ours - reference, `lost` F1 - the uncorrupted model's (both in percent, negative is worse),
    `recovery` as `stats.recovery` says; the paper's floors are taken to be those of our test rows.
    """
    columns = ours[COLUMNS].drop_duplicates()
    on = COLUMNS if by_variant else [name for name in COLUMNS if name != "variant"]
    values = [*on, "percent", "side", "f1", "collapsed", "layers", "floor"]
    theirs = reference.reindex(columns=values).merge(columns, on=on)
    both = ours.merge(theirs, how="outer", on=[*COLUMNS, "percent", "side"], suffixes=("", "_reference"))
    both["layers"] = both["layers"].fillna(both["layers_reference"]).astype(int)
    both["difference"] = both["f1"] - both["f1_reference"]
    by = [both[name] for name in COLUMNS]
    floor = both["floor"].groupby(by).transform("first")
    both["floor_reference"] = both["floor_reference"].fillna(floor)
    both["words"] = both["words"].groupby(by).transform("first")
    for whose in ("", "_reference"):
        f1 = both[f"f1{whose}"]
        uncorrupted = f1.where(both["side"] == "none").groupby(by).transform("first")
        both[f"lost{whose}"] = f1 - uncorrupted
        both[f"recovery{whose}"] = stats.recovery(f1, uncorrupted, both[f"floor{whose}"])
    return both


def recovered_share(both: pd.DataFrame) -> pd.DataFrame:
    """A row for each table, degree and side: the recovery R in percent, averaged over table columns.

    Taken are the `columns` (model and data set) that have both sides at that degree; `reference` if it has them all.
    """
    rows = []
    for (table, percent), group in groups(both[both["side"] != "none"], "table", "percent"):
        wide = group.pivot(index=COLUMNS, columns="side", values=["recovery", "recovery_reference"])
        complete = 100 * wide[wide["recovery"].notna().all(axis=1)]
        if complete.empty or set(wide["recovery"]) not in ({"all"}, {"bottom", "top"}):
            continue
        for side in wide["recovery"]:
            ours, reference = complete["recovery", side].mean(), complete["recovery_reference", side].mean(skipna=False)
            rows.append((table, percent, side, len(complete), ours, reference, tuple(complete.index)))
    return pd.DataFrame(rows, columns=["table", "percent", "side", "columns", "ours", "reference", "averaged"])


def headline(shares: pd.DataFrame) -> pd.DataFrame:
    """The rows of the first table's degree nearest to one half, and of 100 % if it is averaged over the same columns;
    none if no column has both sides."""
    of_table = shares[shares["table"].isin(shares["table"].head(1))]
    degrees = of_table.loc[of_table["side"] != "all", "percent"]
    nearest = degrees.sort_values(key=lambda percent: abs(percent - 50), kind="stable").head(1)
    shown = of_table[of_table["percent"].isin([*nearest, 100 * len(nearest)])]
    return shown[shown["averaged"] == shown["averaged"].iloc[0]] if len(shown) else shown


def forest_rows(ours: ResultSet) -> pd.DataFrame:
    """Our comparisons of bottom with top that have an interval and are evidence, each with a label."""
    rows = ours.comparisons
    rows = rows[rows["source"].eq("ours") & rows["claim"].str.startswith("(3)") & rows["evidence"]]
    rows = rows.dropna(subset=["low", "rows_low"], how="all").reset_index(drop=True)
    one = rows["low"].isna()
    rows["difference"] = rows["difference"].mask(one, rows["f1_higher"] - rows["f1_lower"])
    rows["label"] = [
        f"{row['against'].split(' against')[0].removeprefix('bottom ')}, {plots.describe_model(row)}, "
        f"{dataset_title(row['dataset'])}, Table {row['table']}"
        for row in rows.to_dict("records")
    ]
    return rows


# ---- What the page shows: maps of the tables, Figure 1, where the numbers come from ----


def heat(title: str, cells: pd.DataFrame, texts: pd.Series, points: pd.Series) -> dict:
    """A map for the page: the cells of one table in the paper's layout, and for each its text and its points."""
    numbers = pd.DataFrame({"text": texts, "points": points}).to_dict("index")
    missing = count_missing(paper_table(cells, texts))
    return {"title": title, "ids": paper_table(cells, cells.index), "numbers": numbers, "missing": missing}


def heat_maps(both: pd.DataFrame, name: str) -> dict[str, list[dict]]:
    """The maps of each table: ours, and where the reference has cells of it, theirs and the difference."""
    maps, marks = {}, ("<b>{}</b>", '<span class="collapsed">{}</span>')
    for (number,), cells in groups(both, "table"):
        maps[number] = [heat("Ours", cells, format_cells(cells, *marks), cells["lost"])]
        known = cells[cells["f1_reference"].notna()]
        if known.empty:
            continue
        cells = cells[cells["model"].isin(known["model"]) & cells["dataset"].isin(known["dataset"])]
        theirs = cells.assign(f1=cells["f1_reference"], collapsed=cells["collapsed_reference"], f1_std=np.nan)
        title, apart = name.replace("the paper", "The paper"), cells["difference"]
        maps[number].append(heat(title, cells, format_cells(theirs, *marks), cells["lost_reference"]))
        maps[number].append(heat(f"Ours - {name}", cells, as_text(apart, "{:+.2f}"), apart))
    return maps


def figures_1(output_dir: Path, f1_of: dict[str, float]) -> list[dict]:
    """Figure 1 of each model and data set that has one: its picture, four panels in two rows, and its numbers.

    Shown are the one that plots.py draws unasked, drawn here if need be, and those of a degree that was chosen there.
    """
    if any(output_dir.glob("runs/*/vectors.npy")):
        try:
            plots.write_figure_1(output_dir, {}, again=False)
        except InputError as error:
            print(f"Figure 1: {one_line(error)}", file=sys.stderr)
    figures = []
    for stem in sorted(path.name.removesuffix("_numbers.csv") for path in output_dir.glob("figure1_*_numbers.csv")):
        if not plots.is_current(output_dir, stem, f1_of):
            continue  # of runs that are gone
        numbers, dots = (read_csv(output_dir / f"{stem}{end}.csv") for end in ("_numbers", ""))
        picture = BytesIO()
        plots.draw_figure_1(numbers, dots, across=2).savefig(picture, format="png")
        picture = b64encode(picture.getvalue()).decode()
        figures.append({"stem": stem, "picture": picture, "rows": numbers.to_dict("records")})
    return figures


def provenance(ours: ResultSet) -> pd.DataFrame:
    """Where each run's numbers come from: weights, rows, machine, hours."""
    return pd.DataFrame(
        {
            "model": result["settings"]["model"],
            "model_fingerprint": result["settings"]["model_fingerprint"][:8],
            "revision": (result.get("model", {}).get("revision") or "")[:8],
            "dataset": result["settings"]["dataset"],
            "data_fingerprint": result["settings"]["data_fingerprint"][:8],
            "rows": ", ".join(f"{split} {rows}" for split, rows in result.get("data", {}).get("rows", {}).items()),
            "hours": result["seconds"]["total"] / 3600,
            "device": f"{result['device']['name']} ({result['device'].get('type', 'unknown')})",
            "threads": result["device"].get("threads"),
            **{name: result["versions"].get(name) for name in ("python", "torch", "transformers")},
            "commit": re.sub(r"^(\w{12})\w*", r"\1", result["commit"] or "none"),
            "finished": result.get("finished", "unknown")[:10],
        }
        for result in ours.results.values()
    )


def count_settings(ours: ResultSet) -> dict[str, dict[str, int]]:
    """The values of each setting, beside those of the cell, and how many runs have each."""
    rates = ours.runs[["learning_rate", "seed"]].map(exact)
    others = pd.DataFrame([other_settings(result) for result in ours.results.values()]).fillna("null")
    settings = rates.join(others.drop(columns=["model_fingerprint", *OF_DATA], errors="ignore"))
    return {name: column.value_counts().to_dict() for name, column in settings.items()}


def settings_apart(both: tuple[ResultSet, ResultSet]) -> dict[str, tuple[list[str], list[str]]]:
    """What differs between the runs of two output folders, settings, weights and rows, and the values in each."""
    values = [count_settings(one) for one in both]
    for name, digest in (("model", "model_fingerprint"), ("dataset", "data_fingerprint"), ("dataset", "rows")):
        of_names = [provenance(one).groupby(name)[digest].unique() for one in both]
        for shared in of_names[0].index.intersection(of_names[1].index):
            for its, digests in zip(values, of_names, strict=True):
                its[f"{digest} of {shared}"] = digests[shared]
    sides = {name: [sorted(its.get(name, ["none"])) for its in values] for name in values[0] | values[1]}
    return {name: (here, there) for name, (here, there) in sides.items() if here != there}


# ---- The page ----


def write(output_dir: Path, compare_to: Path | None) -> Path:
    """Write the page and its figures; returns the page's path. Raises InputError, OSError."""
    ours = read(output_dir)
    within = inside.read(output_dir, ours.runs)
    in_tables = ours.cells.dropna(subset="table")
    if in_tables.empty:
        raise InputError(
            "no cell belongs to a table of the paper's kind: run the uncorrupted model, too (see cells.csv)"
        )
    if compare_to:
        if compare_to.resolve() == output_dir.resolve():
            raise InputError(f"--compare_to {compare_to} is the output folder itself: give another")
        name = compare_to.resolve().name
        end = f"_compared_to_{name}"
        theirs = read(compare_to)
        judged = theirs.claims[theirs.claims["source"] == "ours"]
        reference, apart = theirs.cells.dropna(subset="table"), settings_apart((ours, theirs))
    else:
        name, end, reference, apart = "the paper", "", published_cells(), {}
        judged = ours.claims[ours.claims["source"] == "paper"]
    both = join_reference(in_tables, reference, by_variant=compare_to is not None)
    if compare_to and both["difference"].isna().all():
        raise InputError(f"{output_dir} and {compare_to} have no cell in common: nothing to compare")
    folder = output_dir / f"figures{end}"
    folder.mkdir(exist_ok=True)
    claims = ours.claims[ours.claims["source"] == "ours"].merge(
        judged, how="left", on=["table", "claim"], suffixes=("", "_reference")
    )
    rows, beyond = forest_rows(ours), lab.lab_cells(ours.cells)
    shares = recovered_share(both)
    style = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    environment = jinja2.Environment(loader=jinja2.FileSystemLoader(TEMPLATE.parent), **style)
    page = environment.get_template(TEMPLATE.name).render(
        describe_model=plots.describe_model,
        describe_corruption=plots.describe_corruption,
        dataset_title=dataset_title,
        name=name,
        compare_to=compare_to,
        ours=ours,
        both=both.fillna({"runs": ""}),
        maps=heat_maps(both, name),
        claims=claims.assign(**{name: claims[name].astype(object).fillna("") for name in ("why", "why_reference")}),
        run_deviation=ours.claims["run_deviation"].iloc[0],
        forest=plots.write_forest(rows, folder) if len(rows) else "",
        tablesort=Markup(TABLESORT.read_text(encoding="utf-8")),
        csvs=sorted(path.name for path in output_dir.glob("*.csv")),
        shares=shares,
        headline=headline(shares),
        figures=plots.draw_all(both, ours.epochs, name, folder),
        folder=folder.name,
        lab_tables={name: lab.lab_table(name, of_table) for name, of_table in beyond.items()},
        lab_figures=lab_plots.draw_lab(beyond, folder),
        lab_differences=ours.lab,
        inside=within.get("cells", ()),
        inside_figures=inside.draw_inside(within, folder),
        no_table=lab.in_no_table(ours.cells, beyond),
        LAB_TABLES=lab.LAB_TABLES,
        figures_1=figures_1(output_dir, dict(zip(ours.runs["run"], ours.runs["f1"], strict=True))),
        resumed=[run for run, result in ours.results.items() if result.get("resumed_from")],
        provenance=provenance(ours),
        settings=count_settings(ours),
        apart=apart,
        missing=missing_lines(output_dir, ours.runs["run"], in_tables),
        number_of={run: number for number, run in enumerate(ours.runs["run"], 1)},
        models=[model_title(model) for (model,), _ in groups(both, "model")],
        datasets=[dataset_title(dataset) for (dataset,), _ in groups(both, "dataset")],
        TABLES=TABLES,
        CLAIMS=CLAIMS,
    )
    path = output_dir / f"report{end}.html"
    with atomic_write(path) as aside:
        aside.write_text(page, encoding="utf-8")
    return path


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    parser.add_argument("--compare_to", type=Path, help="another output folder, in the place of the paper")
    args = parser.parse_args()
    try:
        path = write(args.output_dir, args.compare_to)
    except (InputError, OSError) as error:
        fail(error)
    print(f"-> {path} ({path.stat().st_size / 2**20:.1f} MiB), and its figures as PNG and PDF beside it")


if __name__ == "__main__":
    run_script(main)
