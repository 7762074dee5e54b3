"""Tables A to D and F, and lab.csv, from runs made by hand: which cells, where, and whether a difference is luck."""

import json
from pathlib import Path

import pandas as pd
import pytest
from scipy.stats import ttest_1samp, ttest_rel
from test_aggregate import BASE, change, run_main, write_result

import report
import tables

F1 = {1: 60, 2: 62, 3: 67}  # of three seeds
SEEDS = tuple(F1)


def write(folder: Path, side: str, percent: float, f1: dict[int, float], **changes: object) -> None:
    for seed, value in f1.items():
        write_result(folder, BASE, side, percent, "sst2", value, seed=seed, **changes)


def shifted(points: float) -> dict[int, float]:
    return {seed: value + points for seed, value in F1.items()}


def table(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_csv(folder / f"table{name}.csv", dtype=str, keep_default_na=False)


def write_lab(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two methods, one in two severities, on either half; two layers and a part; two tunings; three depths."""
    write(folder, "none", 0, shifted(20), trained=100)
    for side, points in (("bottom", 0), ("top", 10)):
        write(folder, side, 50, shifted(points), corruption={"relative_change": 1.4}, trained=100)
    noise = {"method": "noise", "severity": 0.5, "corruption": {"relative_change": 0.5}}
    write(folder, "bottom", 50, {1: 70, 2: 73, 3: 76}, **noise)
    write(folder, "bottom", 50, shifted(-5), **noise | {"severity": 1.0, "corruption": {"relative_change": 1.0}})
    second = {"corruption": {"layers": [2], "place": "2"}}
    write(folder, "2", 100 / 12, shifted(12), **second)
    write(folder, "2", 100 / 12, shifted(15), parts="ffn", **second)
    write(folder, "bottom", 50, shifted(4), tuning="bitfit", trained=7)
    for layers in (1, 2):
        write(folder, "bottom", 100 * layers / 12, shifted(18 - layers))
    assert run_main(folder, monkeypatch) == 0
    return folder


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return write_lab(tmp_path, monkeypatch)


# Standard deviation of 60, 62, 67: sqrt(13) = 3.61.
def test_the_tables(lab: Path) -> None:
    a = table(lab, "A").to_numpy().tolist()
    whole = "83.00 ± 3.61"
    assert list(table(lab, "A")) == [
        *("model", "corruption", "method", "change bottom", "change top", "SST-2 bottom", "SST-2 top")
    ]
    assert a == [
        ["Base", "0%", "uncorrupted", "", "", whole, whole],
        ["Base", "50%", "reinit", "1.400", "1.400", "63.00 ± 3.61", "73.00 ± 3.61"],
        ["Base", "50%", "noise 0.5", "0.500", "", "73.00 ± 3.00", ""],
        ["Base", "50%", "noise 1", "1.000", "", "58.00 ± 3.61", ""],
    ]
    b = table(lab, "B")
    assert list(b) == ["model", "method", "place", "SST-2 all", "SST-2 ffn"]
    assert b.to_numpy().tolist() == [
        ["Base", "reinit", "none", whole, ""],
        ["Base", "reinit", "1", "80.00 ± 3.61", ""],
        ["Base", "reinit", "2", "75.00 ± 3.61", "78.00 ± 3.61"],
    ]
    c = table(lab, "C")
    assert list(c) == ["model", "tuning", "trained", "SST-2 0%", "SST-2 50% bottom"]
    assert c["tuning"].tolist() == ["full", "bitfit"] and c["trained"].tolist() == ["100", "7"]
    assert c["SST-2 50% bottom"].tolist() == ["63.00 ± 3.61", "67.00 ± 3.61"] and c["SST-2 0%"].tolist() == [whole, ""]
    d = table(lab, "D")
    assert d["layers"].tolist() == ["0", "1", "2", "6"]
    assert d["SST-2 bottom"].str[:5].tolist() == ["83.00", "80.00", "79.00", "63.00"]
    for name in "ABCD":
        assert (lab / f"table{name}.md").read_text().count("\n") == len(table(lab, name)) + 2
        assert r"\begin{tabular}" in (lab / f"table{name}.tex").read_text()


# The paper's tables and comparisons hold none of the other corruptions.
def test_the_papers_tables_stay(lab: Path) -> None:
    assert table(lab, "1")["corruption"].tolist() == ["0%", "8.33333% (1-1)", "16.6667% (1-2)", "50% (1-6)"]
    cells = pd.read_csv(lab / "cells.csv")
    assert cells["table"].notna().sum() == 5 and len(cells) == 10
    ours = pd.read_csv(lab / "comparison.csv").dropna(subset="ours")
    assert len(ours) == 5 and ours["paper"].notna().sum() == 3  # at 0 and 50 %
    recovery = cells.set_index(["method", "parts", "side", "percent", "tuning"])["recovery"]
    assert recovery["noise 0.5", "all", "bottom", 50.0, "full"] == pytest.approx((73 - 50) / (83 - 50))


# The differences by scipy's paired test; corrected by hand as Holm does for two.
def test_whether_a_difference_is_luck(lab: Path) -> None:
    rows = pd.read_csv(lab / "lab.csv").set_index(["table", "method", "parts", "place", "tuning"])
    noise = rows.loc["A", "noise 0.5", "all", "1-6", "full"]
    test = ttest_rel([70, 73, 76], [*F1.values()])
    assert noise["difference"] == pytest.approx(10) and noise["p"] == pytest.approx(test.pvalue)
    assert (noise["low"], noise["high"]) == pytest.approx(tuple(test.confidence_interval()))
    assert (noise["verdict"], noise["against"], noise["seeds"]) == ("higher", "reinit", 3)
    assert noise["p_holm"] == pytest.approx(noise["p"])  # the only one of its table with a deviation
    constant = rows.loc["A", "noise 1", "all", "1-6", "full"]
    assert constant["difference"] == pytest.approx(-5) and constant["why"] == "no deviation over the seeds"
    assert rows.loc["B", "reinit", "ffn", "2", "full"]["difference"] == pytest.approx(-5)
    assert rows.loc["C", "reinit", "all", "1-6", "bitfit"]["difference"] == pytest.approx(4)
    assert set(rows.index.get_level_values("table")) == {"A", "B", "C"}


# The other cell is as it is but for one thing: the same method corrupted before fine-tuning, at the same place; `full`
# with as many epochs, for either lora_rank. Its learning rate is named where it is another.
def test_what_is_compared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "none", 0, shifted(20), num_train_epochs=2.0)
    write(tmp_path, "none", 0, shifted(20), num_train_epochs=2.0, tuning="probe")
    noise, place = {"method": "noise", "severity": 0.5}, {"corruption": {"layers": [2, 3], "place": "2-3"}}
    write(tmp_path, "bottom", 50, shifted(0), num_train_epochs=2.0)
    for changes, side, percent, points in ((noise, "bottom", 50, (5, 5, 5, 9)), (place, "2-3", 100 / 6, (1, 2, 2, 5))):
        write(tmp_path, side, percent, shifted(points[0]), num_train_epochs=2.0, **changes)
        after = {seed: F1[seed] + more for seed, more in zip(F1, points[1:], strict=True)}
        write(tmp_path, side, percent, after, num_train_epochs=2.0, corrupt_after=True, **changes)
    write(tmp_path, "bottom", 50, shifted(30), num_train_epochs=3.0)
    for rank, points in ((4, (1, 2, 3)), (8, (2, 3, 4))):
        lora = {seed: F1[seed] + more for seed, more in zip(F1, points, strict=True)}
        write(tmp_path, "bottom", 50, lora, tuning="lora", lora_rank=rank, num_train_epochs=2.0, learning_rate=0.005)
    assert run_main(tmp_path, monkeypatch) == 0
    rows = pd.read_csv(tmp_path / "lab.csv", keep_default_na=False).query("table in ('C', 'E')")
    assert [*zip(rows["table"], rows["place"], rows["against"], rows["difference"].astype(float), strict=True)] == [
        ("C", "", "full", 0),
        ("C", "1-6", "full, at 5e-05", pytest.approx(2)),
        ("C", "1-6", "full, at 5e-05", pytest.approx(3)),
        ("E", "1-6", "corrupted before", pytest.approx(4 / 3)),
        ("E", "2-3", "corrupted before", pytest.approx(2)),
    ]
    assert table(tmp_path, "C")["tuning"].tolist() == ["full", "lora (lora_rank=4)", "lora (lora_rank=8)", "probe"]
    assert len(table(tmp_path, "E")) == 5 and set(table(tmp_path, "E")["method"]) == {
        "uncorrupted",
        "noise 0.5",
        "reinit",
    }


# All layers alone have no side: they stand on both, with their change.
def test_all_layers_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, "none", 0, shifted(20))
    for method, change_of in (("reinit", 1.4), ("shuffle", 1.2)):
        write(tmp_path, "all", 100, shifted(0), method=method, corruption={"relative_change": change_of})
    assert run_main(tmp_path, monkeypatch) == 0
    a = table(tmp_path, "A")
    assert a["SST-2 top"].str[:5].tolist() == a["SST-2 bottom"].str[:5].tolist() == ["83.00", "63.00", "63.00"]
    assert a["change top"].tolist() == ["", "1.400", "1.200"]


# Numbers in names count as numbers, whatever stands around them: a version is not one, nor is a sign that says 1 or 2.
def test_order_of_names() -> None:
    names = pd.Series(["set10", "set2", "a-1.2.3", "a-1.10", "..", ""], name="dataset")
    assert tables.in_order(names) == ["", "..", "a-1.10", "a-1.2.3", "set2", "set10"]
    assert tables.in_order(pd.Series(["①", "set²"], name="dataset")) == ["set²", "①"]
    assert tables.in_order(pd.Series(["10", "2-4,6", "none", "2"], name="place")) == ["none", "2", "2-4,6", "10"]


# Without other corruptions and tunings there is nothing of the lab, and what it wrote before goes.
def test_no_lab(lab: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder in (lab / "runs").iterdir():
        if any(part in folder.name for part in ("noise", "layers-", "bitfit", "-8.33", "-16.6")):
            folder.rename(lab / folder.name)
    assert run_main(lab, monkeypatch) == 0
    assert not [path.name for path in lab.glob("table[ABCD].*")] and not (lab / "lab.csv").exists()


# The page has the tables and their figures; the map's numbers are F1 - 83, the uncorrupted model's.
def test_the_page(lab: Path) -> None:
    page = report.write(lab, None).read_text(encoding="utf-8")
    section = page.partition('<section id="lab">')[2].partition("</section>")[0]
    assert all(f"Table {name}:" in section for name in "ABCD") and "73.00 ± 3.00" in section
    svgs = dict(zip("ABC", section.split("<svg")[1:], strict=True))
    assert all(f">{text}</text>" in svgs["B"] for text in ("-3.0", "-8.0", "-5.0"))
    assert all(f">{name}</text>" in svgs["A"] for name in ("reinit", "noise", "uncorrupted"))
    assert all(f">{words}</text>" in svgs["C"] for words in ("full", "bitfit", "bottom 50 %", "uncorrupted"))
    kinds = {path.name.split("_")[0] + path.suffix for path in (lab / "figures").glob("table[ABC]_*")}
    assert kinds == {f"table{name}.{kind}" for name in "ABC" for kind in ("png", "pdf")}
    assert "higher" in section and "10.00" in section


def write_training(folder: Path, epochs: float, rows: int, points: tuple[float, ...], version: str = "") -> None:
    """Runs of so many epochs and rows: bottom 50 % loses so many points by seed, as many seeds as there are points."""
    for (seed, whole), loss in zip(F1.items(), points, strict=False):
        for side, percent, f1 in (("none", 0, whole + 20), ("bottom", 50, whole + 20 - loss)):
            kept = {
                "seed": seed,
                "num_train_epochs": float(epochs),
                "data_fingerprint": f"{rows}{version}".ljust(64, "0"),
            }
            run = write_result(folder, BASE, side, percent, "sst2", f1, **kept)
            data = json.loads((run / "result.json").read_text())["data"]
            data["rows"]["train"] = rows
            change(run / "result.json", data=data)


# Table F. Bottom 50 % loses 20 points with half an epoch; 10, 9 and 11 with two; 5 with two epochs of twice the rows.
def test_more_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for epochs, rows, points in ((0.5, 10, (20, 20, 20)), (2, 10, (10, 9, 11)), (2, 20, (5, 5, 5))):
        write_training(tmp_path, epochs, rows, points)
    assert run_main(tmp_path, monkeypatch) == 0
    f = table(tmp_path, "F")
    assert list(f) == ["model", "rows", "epochs", "SST-2 0%", "SST-2 50% bottom"]
    assert f[["rows", "epochs"]].to_numpy().tolist() == [["10", "0.5"], ["10", "2"], ["20", "2"]]
    assert f["SST-2 50% bottom"].str[:5].tolist() == ["63.00", "73.00", "78.00"]
    rows = pd.read_csv(tmp_path / "lab.csv").set_index("against")
    assert set(rows["table"]) == {"F"} and len(rows) == 2
    for amount, gain in (("epochs = 0.5", [10, 11, 9]), ("rows = 10", [5, 4, 6])):
        row = rows.loc[f"the same with {amount}, both minus the uncorrupted"]
        assert row["difference"] == pytest.approx(sum(gain) / 3) and row["verdict"] == "higher"
        assert row["p"] == pytest.approx(ttest_1samp(gain, 0).pvalue)
    report.write(tmp_path, None)
    assert (tmp_path / "figures" / "tableF_bert-base-uncased_cls_sst2_training.pdf").exists()


# More rows that are tested on other rows, and epochs that do not count since steps do, are in no Table F.
def test_what_is_not_more_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    labels = ([0, 1] * 100 + [1, 0] * 100, [0, 1] * 200)
    for fingerprint, f1 in (("a", {"f1": 90}), ("b", {"f1": 0, "predicted": labels})):
        for side, percent in (("none", 0), ("bottom", 50)):
            changes = {"data_fingerprint": fingerprint * 64, **f1}
            run = write_result(tmp_path, BASE, side, percent, "sst2", **changes)
            data = json.loads((run / "result.json").read_text())["data"]
            data["rows"]["train"] += len(fingerprint) if fingerprint == "b" else 0
            change(run / "result.json", data=data)
    for epochs in (2.0, 4.0):
        steps = {"max_steps": 5, "num_train_epochs": epochs, "data_fingerprint": f"{epochs}".ljust(64, "0")}
        run = write_result(tmp_path, BASE, "bottom", 50, "sst2", 70, pooling="mean", **steps)
        data = json.loads((run / "result.json").read_text())["data"]
        data["rows"]["train"] = int(epochs)
        change(run / "result.json", data=data)
    assert run_main(tmp_path, monkeypatch) == 0
    assert not (tmp_path / "tableF.csv").exists()


# The number of rows counts, not what data_prep.py was asked for (here nothing, the whole set); other rows of one number
# are another data set, with a table row of their own.
def test_rows_of_another_version(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for rows, points, version in ((4_000_001, (5, 6, 7), ""), (4_000_002, (4, 5, 6), ""), (4_000_002, (1, 1), "b")):
        write_training(tmp_path, 2, rows, points, version)
    assert run_main(tmp_path, monkeypatch) == 0
    assert table(tmp_path, "1")["model"].str.contains("data_fingerprint=4000002b").sum() == 2
    f = table(tmp_path, "F")
    assert f["rows"].tolist() == ["4000001", "4000002"] and f["SST-2 50% bottom"].str[:5].tolist() == ["77.00", "78.00"]
