"""Write outputs/report.html, one page that shows what recovered, and its figures as files to put into a paper.

    python report.py                                  # after python aggregate.py
    python report.py --output_dir outputs --compare_to other_outputs      # two output folders, side by side

The page needs nothing but itself: the claims and how often they hold, the tables as heat maps beside the paper's, F1
against the corrupted fraction, F1 by epoch, Figure 1, what is doubtful, and each run with the command that repeats it.
Each figure is also in outputs/figures, as PNG and PDF, 3.3 inches wide as a column is; Figure 1 is drawn as plots.py
does, where it is not up to date. All is read from the CSVs that aggregate.py wrote and from the runs' folders; a number
that these do not agree on is refused.
"""

import json
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

import plots
from aggregate import claims_table, format_cells, in_order, paper_table, read_csv, with_neutral
from common import InputError, atomic_write, fail, make_parser, one_line
from paper import CLAIMS, DATASETS, MODELS, TABLES, dataset_title, model_title, published_cells

LOST, APART = 25, 10  # F1 points where a heat map's colour is full: against the uncorrupted model, against the paper
COUNTED = ("holds", "compared")
HOW_OFTEN = ((1.0, "always"), (0.9, "nearly always"), (0.65, "mostly"), (0.35, "about half of the time"))
TUNINGS = {"full": "Fine-tuning", "probe": "A linear probe"}  # others go by their own name
OF_A_CELL = ["model", "side", "frac", "percent", "dataset", "pooling", "tuning", "learning_rate", "seed"]
OF_A_CELL += ["model_fingerprint", "data_fingerprint"]
COLUMNS = ["table", "model", "variant", "dataset"]  # a column of a table, for one model
TEMPLATE = Path(__file__).with_name("report.html.jinja")


# ---- Read ----


class ResultSet(NamedTuple):
    """What aggregate.py made of the runs, and what stands in their folders."""

    runs: pd.DataFrame  # results.csv
    cells: pd.DataFrame  # cells.csv
    pairs: pd.DataFrame  # bottom_top.csv
    results: dict[str, dict]  # each run's result.json
    epochs: dict[str, pd.DataFrame]  # each run's epochs.csv
    failures: dict[str, str]  # why a run failed
    left_out: list[str]  # runs that are in no table


def read(output_dir: Path) -> ResultSet:
    """Raises InputError if the CSVs are not there or are older than the runs."""
    again = f"run python aggregate.py --output_dir {output_dir} first"
    if not (output_dir / "runs").is_dir():
        raise InputError(f"{output_dir} holds no runs: give the output folder of grid.py or train.py")
    try:
        runs, cells, pairs = (read_csv(output_dir / f"{name}.csv") for name in ("results", "cells", "bottom_top"))
    except (OSError, ValueError) as error:
        raise InputError(f"the tables are not there ({one_line(error)}): {again}") from error
    results, epochs = {}, {}
    for run, f1 in zip(runs["run"], runs["f1"], strict=True):
        folder = output_dir / "runs" / run
        try:
            results[run] = json.loads((folder / "result.json").read_text())
            epochs[run] = pd.read_csv(folder / "epochs.csv")
            if not abs(100 * results[run]["weighted_f1"] - f1) < 1e-6:
                raise ValueError("another F1")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{folder} is not what results.csv was made from ({one_line(error)}): {again}") from error
    folders = sorted(path.parent.name for path in output_dir.glob("runs/*/result.json"))
    failures = {path.parent.name: read_reason(path) for path in sorted(output_dir.glob("runs/*/failure.json"))}
    return ResultSet(runs, cells, pairs, results, epochs, failures, [run for run in folders if run not in results])


def read_reason(failure: Path) -> str:
    try:
        return json.loads(failure.read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return "failure.json cannot be read"


# ---- Ours beside the reference: the paper, or another output folder ----


def join_reference(ours: pd.DataFrame, reference: pd.DataFrame, by_variant: bool) -> pd.DataFrame:
    """A row for each cell of ours, and of the reference where it has a column of ours; its values end in _reference.

    `difference` is ours - reference, `lost` F1 - the uncorrupted model's (both in percent, negative is worse).
    """
    columns = ours[COLUMNS].drop_duplicates()
    on = COLUMNS if by_variant else [name for name in COLUMNS if name != "variant"]
    theirs = reference[[*on, "percent", "side", "f1", "collapsed", "layers"]].merge(columns, on=on)
    both = ours.merge(theirs, how="outer", on=[*COLUMNS, "percent", "side"], suffixes=("", "_reference"))
    both["layers"] = both["layers"].fillna(both["layers_reference"]).astype(int)
    both["difference"] = both["f1"] - both["f1_reference"]
    baseline = both[both["side"] == "none"].set_index(COLUMNS)
    for whose in ("", "_reference"):
        uncorrupted = both[COLUMNS].merge(baseline[[f"f1{whose}"]], how="left", left_on=COLUMNS, right_index=True)
        both[f"lost{whose}"] = both[f"f1{whose}"] - uncorrupted[f"f1{whose}"]
    return both


def how_often(holds: int, compared: int) -> str:
    share = holds / compared
    words = next((words for least, words in HOW_OFTEN if share >= least), "seldom" if holds else "never")
    return f"{words} ({holds} of {compared})"


def claim_summary(both: pd.DataFrame, reference: pd.DataFrame, pairs: pd.DataFrame, name: str) -> list[dict]:
    """For each claim: how often it holds in the tables that are here, in ours and in the reference, and a sentence."""
    ours = both.dropna(subset="f1")
    counts = claims_table(ours, reference)
    counts = counts[counts["table"].isin(ours["table"])]
    summary = []
    for number, claim in enumerate(CLAIMS, 1):
        of_claim = counts[counts["claim"].str.startswith(f"({number})")]
        sums = of_claim.sum(numeric_only=True)
        holds, compared, theirs, in_all = (int(sums[f"{of}_{what}"]) for of in ("ours", "paper") for what in COUNTED)
        sentence = f"Nothing here to compare: it takes {claim.needs}."
        if compared:
            sentence = f"Holds here {how_often(holds, compared)}"
            sentence += f"; in {name} {how_often(theirs, in_all)}." if in_all else "."
        if number == 3 and len(pairs):
            unclear = [describe_pair(pair) for pair in pairs[pairs["low"] <= 0].to_dict("records")]
            above = f"{len(pairs) - len(unclear)} of {len(pairs)}"
            sentence += f" In {above} the 95 % interval of the difference is above 0"
            sentence += f"; not so in {'; '.join(unclear)}." if 0 < len(unclear) <= 3 else "."
        shares = [{"name": "here", "holds": holds, "compared": compared}]
        shares += [{"name": name, "holds": theirs, "compared": in_all}] if in_all else []
        of = {"number": number, "claim": claim.sentence, "tables": of_claim.to_dict("records")}
        summary.append(of | {"sentence": sentence, "shares": shares})
    return summary


def describe_pair(pair: dict) -> str:
    """A row of bottom_top.csv in words."""
    unusual = [pair[name] for name, usual in (("pooling", "cls"), ("tuning", "full")) if pair[name] != usual]
    return ", ".join([plots.describe_model(pair), f"{pair['percent']:g} %", dataset_title(pair["dataset"]), *unusual])


def recovered_share(both: pd.DataFrame) -> pd.DataFrame:
    """A row for each table, degree and side: the F1 in percent of the uncorrupted model's, averaged over table columns.

    Taken are the `columns` (model and data set) that have both sides at that degree; `reference` if it has them all.
    """
    share = both.assign(
        ours=100 * both["f1"] / (both["f1"] - both["lost"]),
        reference=100 * both["f1_reference"] / (both["f1_reference"] - both["lost_reference"]),
    )
    rows = []
    for table in in_order(both["table"], TABLES):
        of_table = share[(share["table"] == table) & (share["side"] != "none")]
        for percent, group in of_table.groupby("percent"):
            wide = group.pivot(index=COLUMNS, columns="side", values=["ours", "reference"])
            complete = wide[wide["ours"].notna().all(axis=1)]
            if complete.empty or set(wide["ours"]) not in ({"all"}, {"bottom", "top"}):
                continue
            for side in wide["ours"]:
                ours, reference = complete["ours", side].mean(), complete["reference", side].mean(skipna=False)
                of = {"table": table, "percent": percent, "side": side, "columns": len(complete)}
                rows.append(of | {"ours": ours, "reference": reference})
    return pd.DataFrame(rows, columns=["table", "percent", "side", "columns", "ours", "reference"])


def headline(shares: pd.DataFrame, name: str) -> str:
    """The first table's degree nearest to one half, in a sentence; nothing if no column has both sides."""
    table = next(iter(shares["table"]), None)
    of_table = shares[shares["table"] == table]
    percents = of_table.loc[of_table["side"] != "all", "percent"]
    if percents.empty:
        return ""
    percent = min(percents, key=lambda percent: abs(percent - 50))
    rows = of_table[of_table["percent"].isin([percent, 100])].set_index("side")
    bottom = f"with the bottom {percent:g} % of its layers re-initialised"
    words = {"bottom": bottom, "top": "with the top", "all": "with all"}
    parts = [f"{rows.at[side, 'ours']:.0f} % {words[side]}" for side in words if side in rows.index]
    tuning, columns = TABLES[table].tuning, int(rows["columns"].iloc[0])
    sentence = f"{TUNINGS.get(tuning, tuning)} gives back, of the uncorrupted model's F1, {', '.join(parts)}"
    if rows["reference"].notna().all():
        theirs = ", ".join(f"{rows.at[side, 'reference']:.0f} %" for side in words if side in rows.index)
        sentence += f"; in {name} {theirs}"
    over = f"over {columns} column{'s' * (columns > 1)} of model and data set"
    return f"{sentence} (Table {table}, averaged {over})."


# ---- The tables as heat maps ----


def heat(cells: pd.DataFrame, points: pd.Series, full: float, signed: bool = False) -> dict:
    """One table's cells in the paper's layout, for the page; the colour follows `points` and is full at `full`."""
    table = paper_table(cells)
    texts = format_cells(table, "<b>{}</b>", '<span class="collapsed">{}</span>')
    models: list[dict] = []
    for row, (model, degree) in table.text[["model", "corruption"]].iterrows():
        if not models or models[-1]["name"] != model:
            models.append({"name": model, "rows": []})
        numbers = []
        for column in list(table.cell)[::2]:
            across = degree.startswith(("0%", "100%"))
            for name in (column,) if across else (column, column.removesuffix("bottom") + "top"):
                cell = table.cell.at[row, name]
                number = {"across": across, "text": texts.at[row, name], "cell": None if pd.isna(cell) else int(cell)}
                if number["text"]:
                    by = points.get(cell, np.nan)
                    text = f"{cells.at[cell, 'f1']:+.2f}" if signed else number["text"]
                    number |= {"text": Markup(text), "heat": 0 if np.isnan(by) else min(1, abs(by) / full)}
                    number["kind"] = "low" if by < 0 else "high"
                numbers.append(number)
        models[-1]["rows"].append({"degree": degree, "numbers": numbers})
    datasets = [column.removesuffix(" bottom") for column in list(table.cell)[::2]]
    return {"datasets": datasets, "models": models, "missing": table.missing}


def heat_maps(both: pd.DataFrame, name: str) -> list[dict]:
    """The heat maps of each table: ours, and where the reference has cells of it, theirs and the difference."""
    maps = []
    for number in in_order(both["table"], TABLES):
        cells = both[both["table"] == number]
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
        caption = f"weighted F1 in percent {TABLES[number].caption}"
        maps.append({"number": number, "caption": caption, "views": views, "missing": ours["missing"]})
    return maps


def figures_1(output_dir: Path, runs: set[str]) -> list[dict]:
    """Figure 1 of each model and data set that has one: its picture, four panels in two rows, and its numbers."""
    if any(output_dir.glob("runs/*/vectors.npy")):
        try:
            plots.write_figure_1(output_dir, {}, again=False)
        except InputError as error:
            print(f"Figure 1: {one_line(error)}", file=sys.stderr)
    figures = []
    for path in sorted(output_dir.glob("figure1_*_numbers.csv")):
        stem = path.name.removesuffix("_numbers.csv")
        numbers = read_csv(path)
        if not runs.issuperset(numbers["run"]):
            continue  # of runs that are no longer there
        dots = read_csv(output_dir / f"{stem}.csv")
        names = dots.drop_duplicates("label").set_index("label")["label_name"].sort_index().to_dict()
        picture = BytesIO()
        plots.draw_figure_1(numbers, dots, names, across=2).savefig(picture, format="png")
        sides = zip(numbers["side"], numbers["percent"], strict=True)
        rows = numbers.assign(corruption=[plots.describe_corruption(*of) for of in sides])
        first = numbers.iloc[0]
        title = f"{plots.describe_model(first)} on {dataset_title(first['dataset'])}"
        picture = b64encode(picture.getvalue()).decode()
        figures.append({"title": title, "stem": stem, "picture": picture, "rows": rows.to_dict("records")})
    return figures


# ---- What to doubt, and where the numbers come from ----


def caveats(ours: ResultSet, both: pd.DataFrame) -> dict:
    """What a reader must know before trusting a number: collapsed runs, rates at the edge, what is not there."""
    cells = both.dropna(subset="f1")
    collapsed = ours.runs[ours.runs["collapsed"]]
    apart = cells.dropna(subset="difference").sort_values("difference", key=abs, ascending=False)
    return {
        "collapsed": [{**run, "label": plots.describe_cell(run)} for run in collapsed.to_dict("records")],
        "edge": cell_rows(cells[cells["lr_at_grid_edge"].eq(True)]),
        "edge_of": int(cells["lr_at_grid_edge"].notna().sum()),
        "bias": cell_rows(cells.sort_values("selection_bias", ascending=False).head(10)),
        "mean_bias": cells["selection_bias"].mean(),
        "apart": cell_rows(apart.head(10)),
        "mean_apart": apart["difference"].mean(),
        "mean_distance": apart["difference"].abs().mean(),
        "compared": len(apart),
        "spread": cell_rows(cells.dropna(subset="f1_std").sort_values("f1_std", ascending=False).head(10)),
        "no_table": cell_rows(ours.cells[ours.cells["table"].isna()]),
        "resumed": [run for run, result in ours.results.items() if result.get("resumed_from")],
        "failures": ours.failures,
        "left_out": ours.left_out,
    }


def cell_rows(cells: pd.DataFrame) -> list[dict]:
    return [
        {**cell, "label": plots.describe_cell(cell), "runs": cell["runs"].split()} for cell in cells.to_dict("records")
    ]


def provenance(ours: ResultSet) -> dict:
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
        for result in ours.results.values()
    )
    rows = {
        result["settings"]["data_fingerprint"][:8]: result.get("data", {}).get("rows", {})
        for result in ours.results.values()
    }

    def counted(*by: str) -> list[dict]:
        groups = results.groupby([*by], dropna=False)
        return groups.agg(runs=("hours", "size"), hours=("hours", "sum")).reset_index().to_dict("records")

    values = count_settings(ours)
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


def count_settings(ours: ResultSet) -> dict[str, dict[str, int]]:
    """The values of each setting, beside those of the cell, learning rate and seed, and how many runs have each."""
    settings = pd.DataFrame(with_neutral(result["settings"]) for result in ours.results.values())
    settings = settings.drop(columns=OF_A_CELL).astype(object).map(json.dumps)
    return {name: column.value_counts().to_dict() for name, column in settings.items()}


def settings_apart(ours: ResultSet, theirs: ResultSet) -> list[dict]:
    """The settings whose values are not the same in two output folders."""
    one, other = count_settings(ours), count_settings(theirs)
    both = [(name, list(one.get(name, {})), list(other.get(name, {}))) for name in {**one, **other}]
    return [{"name": name, "ours": a, "theirs": b} for name, a, b in both if set(a) != set(b)]


# ---- The page ----


def render(**content: object) -> str:
    loader = jinja2.FileSystemLoader(TEMPLATE.parent)
    style = {"autoescape": True, "trim_blocks": True, "lstrip_blocks": True, "undefined": jinja2.StrictUndefined}
    return jinja2.Environment(loader=loader, **style).get_template(TEMPLATE.name).render(**content)


def write(output_dir: Path, compare_to: Path | None) -> Path:
    """Write the page and its figures; returns the page's path. Raises InputError, OSError."""
    ours = read(output_dir)
    in_tables = ours.cells.dropna(subset="table")
    if in_tables.empty:
        raise InputError("no cell belongs to a table: none has their pooling and tuning (see cells.csv)")
    if compare_to:
        if compare_to.resolve() == output_dir.resolve():
            raise InputError(f"--compare_to {compare_to} is the output folder itself: give another")
        name = compare_to.resolve().name
        end = f"_compared_to_{name}"
        theirs = read(compare_to)
        reference, apart = theirs.cells.dropna(subset="table"), settings_apart(ours, theirs)
    else:
        name, end, reference, apart = "the paper", "", published_cells(), []
    both = join_reference(in_tables, reference, by_variant=compare_to is not None)
    if compare_to and both["difference"].isna().all():
        raise InputError(f"{output_dir} and {compare_to} have no cell in common: nothing to compare")
    folder = output_dir / f"figures{end}"
    folder.mkdir(exist_ok=True)
    shares = recovered_share(both)
    page = render(
        name=name,
        compare_to=compare_to,
        tables=heat_maps(both, name),
        captions={number: table.caption for number, table in TABLES.items()},
        claims=claim_summary(both, reference, ours.pairs, name),
        shares={(row["table"], row["percent"], row["side"]): row for row in shares.to_dict("records")},
        degrees=sorted(set(zip(shares["percent"], shares["side"], strict=True))),
        headline=headline(shares, name),
        figures=plots.draw_all(both, ours.epochs, name, folder),
        folder=folder.name,
        figures_1=figures_1(output_dir, set(ours.results)),
        caveats=caveats(ours, both),
        tips=cell_rows(both.assign(id=both.index, runs=both["runs"].fillna(""))),  # what a number tells
        provenance=provenance(ours),
        runs=[{**run, "label": plots.describe_cell(run)} for run in ours.runs.to_dict("records")],
        best=set(" ".join(ours.cells["runs"]).split()),  # the runs that a cell's number is made of
        number_of={run: number for number, run in enumerate(ours.runs["run"], 1)},
        command_of={run: result["command"] for run, result in ours.results.items()},
        cells=int(both["f1"].notna().sum()),
        models=[model_title(model) for model in in_order(both["model"], MODELS)],
        datasets=[dataset_title(dataset) for dataset in in_order(both["dataset"], DATASETS)],
        scale={"lost": LOST, "apart": APART},
        how_often=HOW_OFTEN,
        apart=apart,
    )
    path = output_dir / f"report{end}.html"
    with atomic_write(path) as aside:
        aside.write_text(page)
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
    main()
