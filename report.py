"""Write outputs/report.html, one page that shows what healed, and its figures as files to put into a paper.

    python report.py                                  # after python aggregate.py
    python report.py --output_dir outputs --against other_outputs      # two grids, side by side

The page needs nothing but itself: the claims and how often they hold, the tables as heat maps beside the paper's, F1
against the corrupted fraction, F1 by epoch, Figure 1, what is doubtful, and each run with the command that repeats it.
Each figure is also in outputs/figures, as PNG and PDF, 3.3 inches wide as a column is. Everything is read from the CSVs
that aggregate.py wrote and from the runs' folders; a number that these do not agree on is refused.
"""

import argparse
import json
import re
from base64 import b64encode
from collections import defaultdict
from io import BytesIO
from pathlib import Path
from typing import NamedTuple

import jinja2
import numpy as np
import pandas as pd
from markupsafe import Markup

import aggregate
import figure1
import figures

LOST, APART = 25, 10  # F1 points at which a heat map's colour is full: against the undamaged model, against the paper
CLAIMS = (
    "A corrupted model does not fully recover",
    "The more layers are corrupted, the lower the F1",
    "Corrupting the bottom hurts more than corrupting the top",
)
NEEDS = ("an undamaged and a corrupted model", "two degrees of corruption", "bottom and top at the same degree")
COUNTED = ("holds", "compared")
HOW_OFTEN = ((1.0, "always"), (0.9, "nearly always"), (0.65, "mostly"), (0.35, "about half of the time"))
OF_A_CELL = ["model", "side", "frac", "percent", "dataset", "pooling", "tuning", "learning_rate", "seed"]
OF_A_CELL += ["model_fingerprint", "data_fingerprint"]
COLUMNS = ["table", "model", "variant", "dataset"]  # a column of a table, for one model
TEMPLATE = Path(__file__).with_name("report.html.jinja")


class NoReport(ValueError):
    """There is nothing to show, or what there is does not fit together; the message says what to do."""


# ---- Read ----


class Grid(NamedTuple):
    """What aggregate.py made of the runs, and what stands in their folders."""

    runs: pd.DataFrame  # results.csv
    cells: pd.DataFrame  # cells.csv
    pairs: pd.DataFrame  # bottom_top.csv
    results: dict[str, dict]  # each run's result.json
    epochs: dict[str, pd.DataFrame]  # each run's epochs.csv
    failures: dict[str, str]  # why a run failed
    left_out: list[str]  # runs that are in no table


def read_csv(path: Path) -> pd.DataFrame:
    names = dict.fromkeys(("model", "variant", "dataset"), str)
    frame = pd.read_csv(path, keep_default_na=False, na_values=[""], dtype=names)
    return frame.fillna({"variant": ""})


def read(output_dir: Path) -> Grid:
    """Raises NoReport if the CSVs are not there or are older than the runs."""
    again = f"run python aggregate.py --output_dir {output_dir} first"
    if not (output_dir / "runs").is_dir():
        raise NoReport(f"{output_dir} holds no runs: give the output folder of grid.py or train.py")
    try:
        runs, cells, pairs = (read_csv(output_dir / f"{name}.csv") for name in ("results", "cells", "bottom_top"))
    except (OSError, ValueError) as error:
        raise NoReport(f"the tables are not there ({' '.join(str(error).split())}): {again}") from error
    results, epochs = {}, {}
    for run, f1 in zip(runs["run"], runs["f1"], strict=True):
        folder = output_dir / "runs" / run
        try:
            results[run] = json.loads((folder / "result.json").read_text())
            epochs[run] = pd.read_csv(folder / "epochs.csv")
            same = abs(100 * results[run]["weighted_f1"] - f1) < 1e-6
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise NoReport(
                f"{folder} is not what results.csv was made from ({type(error).__name__}): {again}"
            ) from error
        if not same:
            raise NoReport(f"{folder} has another F1 than results.csv: {again}")
    folders = sorted(path.parent.name for path in output_dir.glob("runs/*/result.json"))
    failures = {path.parent.name: reason_of(path) for path in sorted(output_dir.glob("runs/*/failure.json"))}
    return Grid(runs, cells, pairs, results, epochs, failures, [run for run in folders if run not in results])


def reason_of(failure: Path) -> str:
    try:
        return json.loads(failure.read_text())["reason"]
    except (OSError, ValueError, KeyError, TypeError):
        return "failure.json cannot be read"


# ---- Ours beside the reference: the paper, or another grid ----


def beside(ours: pd.DataFrame, reference: pd.DataFrame, by_variant: bool) -> pd.DataFrame:
    """A row for each cell of ours, and of the reference where it has a column of ours; its values end in _reference.

    `difference` is ours - reference, `lost` F1 - the undamaged model's (both in percent, negative is worse).
    """
    columns = ours[COLUMNS].drop_duplicates()
    on = COLUMNS if by_variant else [name for name in COLUMNS if name != "variant"]
    theirs = reference[[*on, "percent", "side", "f1", "collapsed", "layers"]].merge(columns, on=on)
    both = ours.merge(theirs, how="outer", on=[*COLUMNS, "percent", "side"], suffixes=("", "_reference"))
    both["layers"] = both["layers"].fillna(both["layers_reference"]).astype(int)
    both["difference"] = both["f1"] - both["f1_reference"]
    whole = both[both["side"] == "none"].set_index(COLUMNS)
    for whose in ("", "_reference"):
        undamaged = both[COLUMNS].merge(whole[[f"f1{whose}"]], how="left", left_on=COLUMNS, right_index=True)
        both[f"lost{whose}"] = both[f"f1{whose}"] - undamaged[f"f1{whose}"]
    return both


def how_often(holds: int, compared: int) -> str:
    share = holds / compared
    words = next((words for least, words in HOW_OFTEN if share >= least), "seldom" if holds else "never")
    return f"{words} ({holds} of {compared})"


def verdict(both: pd.DataFrame, reference: pd.DataFrame, pairs: pd.DataFrame, name: str) -> list[dict]:
    """For each claim: how often it holds in the tables that are here, in ours and in the reference, and a sentence."""
    ours = both.dropna(subset="f1")
    counts = aggregate.claims_table(ours, reference)
    counts = counts[counts["table"].isin(ours["table"])]
    said = []
    for number, claim in enumerate(CLAIMS, 1):
        of_claim = counts[counts["claim"].str.startswith(f"({number})")]
        sums = of_claim.sum(numeric_only=True)
        holds, compared, there, in_all = (int(sums[f"{of}_{what}"]) for of in ("ours", "paper") for what in COUNTED)
        sentence = f"Nothing here to compare: it takes {NEEDS[number - 1]}."
        if compared:
            sentence = f"Holds here {how_often(holds, compared)}"
            sentence += f"; in {name} {how_often(there, in_all)}." if in_all else "."
        if number == 3 and len(pairs):
            unclear = [pair_of(pair) for pair in pairs[pairs["low"] <= 0].to_dict("records")]
            sentence += (
                f" In {len(pairs) - len(unclear)} of {len(pairs)} the 95 % interval of the difference is above 0"
            )
            sentence += f"; not so in {'; '.join(unclear)}." if 0 < len(unclear) <= 3 else "."
        shares = [{"name": "here", "holds": holds, "compared": compared}]
        shares += [{"name": name, "holds": there, "compared": in_all}] if in_all else []
        tables = of_claim.to_dict("records")
        said.append({"number": number, "claim": claim, "sentence": sentence, "shares": shares, "tables": tables})
    return said


def pair_of(pair: dict) -> str:
    """A row of bottom_top.csv in words."""
    how = [
        words for words, is_so in (("mean", pair["pooling"] == "mean"), ("probe", pair["tuning"] == "probe")) if is_so
    ]
    return ", ".join([figures.model_of(pair), f"{pair['percent']:g} %", figures.dataset_of(pair), *how])


def what_is_left(both: pd.DataFrame) -> pd.DataFrame:
    """A row for each table, degree and side: the F1 in percent of the undamaged model's, averaged over table columns.

    Taken are the `columns` (model and data set) that have both sides at that degree; `reference` if it has them all.
    """
    share = both.assign(
        ours=100 * both["f1"] / (both["f1"] - both["lost"]),
        reference=100 * both["f1_reference"] / (both["f1_reference"] - both["lost_reference"]),
    )
    rows = []
    for (table, percent), group in share[share["side"] != "none"].groupby(["table", "percent"]):
        wide = group.pivot(index=COLUMNS, columns="side", values=["ours", "reference"])
        complete = wide[wide["ours"].notna().all(axis=1)]
        if complete.empty or set(wide["ours"]) not in ({"all"}, {"bottom", "top"}):
            continue
        for side in wide["ours"]:
            ours, reference = complete["ours", side].mean(), complete["reference", side].mean(skipna=False)
            of = {"table": table, "percent": percent, "side": side, "columns": len(complete)}
            rows.append(of | {"ours": ours, "reference": reference})
    return pd.DataFrame(rows, columns=["table", "percent", "side", "columns", "ours", "reference"])


def by_degree(left: pd.DataFrame) -> defaultdict:
    cells = zip(left["percent"], left["side"], left.to_dict("records"), strict=True)
    return defaultdict(dict, {(percent, side): cell for percent, side, cell in cells})


def headline(left: pd.DataFrame, name: str) -> str:
    """The first table's degree nearest to one half, in a sentence; nothing if no column has both sides."""
    of_table = left[(left["table"] == left["table"].min()) & (left["side"] != "all")]
    if of_table.empty:
        return ""
    percent = min(of_table["percent"], key=lambda percent: abs(percent - 50))
    found = left[(left["table"] == left["table"].min()) & left["percent"].isin([percent, 100])].set_index("side")
    words = {
        "bottom": f"with the bottom {percent:g} % of its layers re-initialised",
        "top": "with the top",
        "all": "with all",
    }
    parts = [f"{found.at[side, 'ours']:.0f} % {words[side]}" for side in words if side in found.index]
    tuning = "A linear probe" if left["table"].min() == 4 else "Fine-tuning"
    columns = int(found["columns"].iloc[0])
    sentence = f"{tuning} gives back, of the undamaged model's F1, {', '.join(parts)}"
    if found["reference"].notna().all():
        theirs = ", ".join(f"{found.at[side, 'reference']:.0f} %" for side in words if side in found.index)
        sentence += f"; in {name} {theirs}"
    over = f"over {columns} column{'s' * (columns > 1)} of model and data set"
    return f"{sentence} (Table {left['table'].min()}, averaged {over})."


# ---- The tables as heat maps ----


def heat(cells: pd.DataFrame, points: pd.Series, full: float, signed: bool = False) -> dict:
    """One table's cells in the paper's layout, for the page; the colour follows `points` and is full at `full`."""
    table = aggregate.paper_table(cells)
    shown = aggregate.marked(table, "<b>{}</b>", '<span class="collapsed">{}</span>')
    models: list[dict] = []
    for row, (model, degree) in table.text[["model", "corruption"]].iterrows():
        if not models or models[-1]["name"] != model:
            models.append({"name": model, "rows": []})
        numbers = []
        for column in list(table.cell)[::2]:
            across = degree.startswith(("0%", "100%"))
            for name in (column,) if across else (column, column.removesuffix("bottom") + "top"):
                cell = table.cell.at[row, name]
                number = {"across": across, "text": shown.at[row, name], "cell": None if pd.isna(cell) else int(cell)}
                if number["text"]:
                    by = points.get(cell, np.nan)
                    text = f"{cells.at[cell, 'f1']:+.2f}" if signed else number["text"]
                    number |= {"text": Markup(text), "heat": 0 if np.isnan(by) else min(1, abs(by) / full)}
                    number["kind"] = "low" if by < 0 else "high"
                numbers.append(number)
        models[-1]["rows"].append({"degree": degree, "numbers": numbers})
    datasets = [column.removesuffix(" bottom") for column in list(table.cell)[::2]]
    return {"datasets": datasets, "models": models, "missing": table.missing}


def maps(both: pd.DataFrame, name: str) -> list[dict]:
    """The heat maps of each table: ours, and where the reference has cells of it, theirs and the difference."""
    found = []
    for number, cells in both.groupby("table"):
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
        caption = f"weighted F1 in percent {aggregate.TABLES[number]}"
        found.append({"number": number, "caption": caption, "views": views, "missing": ours["missing"]})
    return found


def figures_1(output_dir: Path) -> list[dict]:
    """Figure 1 of each model and data set that has one: its picture, four panels in two rows, and its numbers."""
    found = []
    for path in sorted(output_dir.glob("figure1_*_numbers.csv")):
        stem = path.name.removesuffix("_numbers.csv")
        numbers, dots = read_csv(path), pd.read_csv(output_dir / f"{stem}.csv", keep_default_na=False)
        names = dots.drop_duplicates("label").set_index("label")["label_name"].sort_index().to_dict()
        picture = BytesIO()
        figure1.draw(numbers, dots, names, across=2).savefig(picture, format="png")
        rows = numbers.assign(
            damage=[figures.damage_of(*of) for of in zip(numbers["side"], numbers["percent"], strict=True)]
        )
        first = numbers.iloc[0]
        title = f"{figures.model_of(first)} on {figures.dataset_of(first)}"
        picture = b64encode(picture.getvalue()).decode()
        found.append({"title": title, "stem": stem, "picture": picture, "rows": rows.to_dict("records")})
    return found


# ---- What to doubt, and where the numbers come from ----


def doubts(grid: Grid, both: pd.DataFrame) -> dict:
    """What a reader must know before trusting a number: collapsed runs, rates at the edge, gaps, what is not there."""
    ours = both.dropna(subset="f1")
    collapsed = grid.runs[grid.runs["collapsed"]]
    edge = ours[ours["edge"].eq(True)]
    apart = ours.dropna(subset="difference").sort_values("difference", key=abs, ascending=False)
    return {
        "collapsed": [{**run, "label": figures.label_of(run)} for run in collapsed.to_dict("records")],
        "edge": cell_rows(edge),
        "edge_of": int(ours["edge"].notna().sum()),
        "gap": cell_rows(ours.sort_values("gap", ascending=False).head(10)),
        "mean_gap": ours["gap"].mean(),
        "apart": cell_rows(apart.head(10)),
        "mean_apart": apart["difference"].mean(),
        "mean_distance": apart["difference"].abs().mean(),
        "compared": len(apart),
        "spread": cell_rows(ours.dropna(subset="f1_std").sort_values("f1_std", ascending=False).head(10)),
        "no_table": cell_rows(grid.cells[grid.cells["table"].isna()]),
        "halved": [run for run, result in grid.results.items() if result.get("batch", {}).get("halved")],
        "resumed": [run for run, result in grid.results.items() if result.get("cut_off")],
        "failures": grid.failures,
        "left_out": grid.left_out,
    }


def cell_rows(cells: pd.DataFrame) -> list[dict]:
    return [
        {**cell, "label": figures.label_of(cell), "runs": cell["runs"].split()} for cell in cells.to_dict("records")
    ]


def tips(both: pd.DataFrame) -> list[dict]:
    """What a cell tells when it is pointed at."""
    return cell_rows(both.assign(id=both.index, runs=both["runs"].fillna("")))


def origin(grid: Grid) -> dict:
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
        for result in grid.results.values()
    )
    rows = {
        result["settings"]["data_fingerprint"][:8]: result.get("data", {}).get("rows", {})
        for result in grid.results.values()
    }

    def counted(*by: str) -> list[dict]:
        groups = results.groupby([*by], dropna=False)
        return groups.agg(runs=("hours", "size"), hours=("hours", "sum")).reset_index().to_dict("records")

    values = settings_of(grid)
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


def settings_of(grid: Grid) -> dict[str, dict[str, int]]:
    """The values of each setting, beside those of the cell, learning rate and seed, and how many runs have each."""
    settings = pd.DataFrame(result["settings"] for result in grid.results.values()).drop(columns=OF_A_CELL)
    settings = settings.astype(object).map(lambda value: json.dumps(value))
    return {name: column.value_counts().to_dict() for name, column in settings.items()}


def settings_apart(ours: Grid, theirs: Grid) -> list[dict]:
    """The settings whose values are not the same in two grids."""
    one, other = settings_of(ours), settings_of(theirs)
    both = [(name, list(one.get(name, {})), list(other.get(name, {}))) for name in {**one, **other}]
    return [{"name": name, "ours": a, "theirs": b} for name, a, b in both if set(a) != set(b)]


def run_rows(grid: Grid) -> list[dict]:
    """Each run, with the command that repeats it; `best` are those that a cell's number is made of."""
    best = set(" ".join(grid.cells["runs"]).split())
    return [
        {
            **run,
            "label": figures.label_of(run),
            "best": run["run"] in best,
            "command": grid.results[run["run"]]["command"],
        }
        for run in grid.runs.to_dict("records")
    ]


# ---- The page ----


def render(**content: object) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATE.parent),
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    return environment.get_template(TEMPLATE.name).render(**content)


def write(output_dir: Path, against: Path | None) -> Path:
    """Write the page and its figures; returns the page's path. Raises NoReport, OSError."""
    grid = read(output_dir)
    placed = grid.cells.dropna(subset="table").astype({"table": int})
    if placed.empty:
        raise NoReport("no cell belongs to a table of the paper: its pooling and tuning have none (see cells.csv)")
    if against:
        if against.resolve() == output_dir.resolve():
            raise NoReport(f"--against {against} is the output folder itself: give another")
        name = against.resolve().name
        stem = f"report_against_{name}"
        other = read(against)
        reference, apart = other.cells.dropna(subset="table").astype({"table": int}), settings_apart(grid, other)
    else:
        name, stem, reference, apart = "the paper", "report", aggregate.paper_cells(), []
    both = beside(placed, reference, by_variant=against is not None)
    if against and both["difference"].isna().all():
        raise NoReport(f"{output_dir} and {against} have no cell in common: nothing to compare")
    folder = output_dir / stem.replace("report", "figures")
    folder.mkdir(exist_ok=True)
    left = what_is_left(both)
    page = render(
        name=name,
        against=against,
        grid=grid,
        tables=maps(both, name),
        tables_known=aggregate.TABLES,
        verdict=verdict(both, reference, grid.pairs, name),
        left=[(table, by_degree(rows)) for table, rows in left.groupby("table")],
        degrees=left[["percent", "side"]].drop_duplicates().sort_values(["percent", "side"]).to_dict("records"),
        headline=headline(left, name),
        figures=figures.draw_all(both, grid.epochs, name, folder),
        folder=folder.name,
        figures_1=figures_1(output_dir),
        doubts=doubts(grid, both),
        tips=tips(both),
        origin=origin(grid),
        runs=run_rows(grid),
        number_of={run: number for number, run in enumerate(grid.runs["run"], 1)},
        command_of={run: result["command"] for run, result in grid.results.items()},
        cells=int(both["f1"].notna().sum()),
        models=[aggregate.MODELS.get(m, m) for m in aggregate.in_order(both["model"], aggregate.MODELS)],
        datasets=[aggregate.DATASETS.get(d, d) for d in aggregate.in_order(both["dataset"], aggregate.DATASETS)],
        scale={"lost": LOST, "apart": APART},
        how_often=HOW_OFTEN,
        apart=apart,
    )
    path = output_dir / f"{stem}.html"
    aggregate.write_whole(path, page)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and examples
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    parser.add_argument("--against", type=Path, help="another output folder, in the place of the paper")
    args = parser.parse_args()
    try:
        path = write(args.output_dir, args.against)
    except (NoReport, OSError) as error:
        parser.error(str(error))
    print(f"-> {path} ({path.stat().st_size / 2**20:.1f} MiB), and its figures as PNG and PDF beside it")


if __name__ == "__main__":
    main()
