"""What tables look like: the paper's layout, Markdown and LaTeX; and in words what sets their rows apart. Functions of
frames; used by aggregate.py, lab.py and report.py.

A table in text has `model` and what its rows are in its first columns, then a column for each of `<data set> <name>`.
"""

import re

import pandas as pd
from pandas.api.typing import DataFrameGroupBy

from paper import DATASETS, METHODS, MODELS, TABLES, TUNING_RATES, dataset_title, model_title

ACROSS = r"(0|100)%"  # the corruption in rows that have one number for bottom and top
METHOD_ORDER = [name if severity is None else f"{name} {severity:g}" for name, severity in METHODS]
KNOWN = {"table": TABLES, "model": MODELS, "dataset": DATASETS}  # columns that have an order in paper.py
KNOWN |= {
    "method": ["uncorrupted", *METHOD_ORDER],
    "tuning": TUNING_RATES,
    "place": ["none"],
    "order": ["before", "after"],
}


def in_order(names: pd.Series | pd.Index) -> list:
    """The names that occur: those of paper.py first, in their order there, then the others, 2 before 10."""
    known = [*KNOWN.get(names.name, ())]

    def place(name: object) -> tuple:
        words = re.findall(r"\d+(?:\.\d+)?|\D+", f"{name}")
        return [*known, name].index(name), [(0, float(w), "") if w[0].isdecimal() else (1, 0.0, w) for w in words]

    return sorted(set(names), key=place)


OF_DATA = ("train_size", "test_size", "split_seed", "data_fingerprint", "test_rows")  # a data set has its own


def name_apart(settings: pd.DataFrame, by: list[pd.Series], dataset: pd.Series) -> pd.Series:
    """In words what sets runs, or cells, apart from others of their data set; one name for all data sets.

    `settings` has a column for each setting. One that differs within a data set is named for all that share `by`. What
    a data set has of its own (OF_DATA) is named only where it is not what most have, the smallest of as many; of a
    version, most of those of one size.
    """
    name = pd.Series("", index=settings.index)
    own = [setting for setting in OF_DATA if setting in settings]
    for setting in [*settings.columns.difference(own, sort=False), *own]:
        values = settings[setting]
        text = values.str[:8] if setting.endswith(("_fingerprint", "_rows")) else values
        if setting in own:
            sizes = [settings[size] for size in own if size != setting and setting == "data_fingerprint"]
            differs = values != values.groupby([*by, dataset, *sizes]).transform(lambda of: in_order(of.mode())[0])
        else:
            differs = values.groupby([*by, dataset]).transform("nunique").gt(1).groupby(by).transform("any")
        name += (f", {setting}=" + text).where(differs, "")
    return name.str.removeprefix(", ")


def groups(frame: pd.DataFrame, *by: str) -> DataFrameGroupBy:
    """As groupby, but in the order of paper.py."""
    ordered = frame.sort_values([*by], key=lambda names: names.map(in_order(names).index), kind="stable")
    return ordered.groupby([*by], sort=False)


def as_text(numbers: pd.Series, form: str = "{:.2f}") -> pd.Series:
    """The numbers as text, empty where there is none."""
    return numbers.map(form.format).where(numbers.notna(), "").astype("str")


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
    legend = "\n\n† collapsed: predictions of a run of the cell, or of more, say nothing about the labels"
    text = table.replace(r"\|", r"\|", regex=True).to_markdown(index=False, disable_numparse=True)
    return f"{text}{legend if cells['collapsed'].any() else ''}\n"


def plain_markdown(table: pd.DataFrame) -> str:
    return table.replace(r"\|", r"\|", regex=True).to_markdown(index=False, disable_numparse=True) + "\n"


def plain_latex(table: pd.DataFrame) -> str:
    """A tabular for \\input of a table in text."""
    text = (
        table.style.hide(axis="index").format(escape="latex").format_index(escape="latex", axis=1).to_latex(hrules=True)
    )
    return fit_to_line(text, "")


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
    rule = f"\\cline{{1-{2 + table.shape[1]}}}\n"
    text = text.replace(rule + r"\bottomrule", r"\bottomrule").replace(rule, "\\midrule\n").replace(" & @", "")
    text = text.replace(" &  & Bottom", "Model & Corruption & Bottom", 1)
    return fit_to_line(text, "% red: a collapsed run, whose predictions say nothing about the labels\n")


def fit_to_line(text: str, legend: str) -> str:
    """A tabular that is as wide as the line at most, and what it needs."""
    for sign, name in (("|", "bar"), ("<", "less"), (">", "greater"), ("†", "dagger")):  # TeX's own fonts have others
        text = text.replace(sign, rf"\text{name}{{}}")
    needs = "% needs \\usepackage{booktabs,graphicx,xcolor}; as wide as the line at most\n"
    if not text.replace("±", "").isascii():
        needs += (
            "% and xelatex or lualatex, with \\usepackage{fontspec} and a \\setmainfont that has all of the names\n"
        )
    needs += legend
    fit = "}\\ifdim\\wd0>\\linewidth\\resizebox{\\linewidth}{!}{\\usebox0}\\else\\usebox0\\fi\n"
    return f"{needs}\\noindent\\sbox0{{%\n{text}{fit}"
