"""What recovered: each measure against a definition or a hand-worked case; recovery curves; the whole way."""

import json
import shlex
import shutil
from itertools import permutations
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import run_of
from safetensors.torch import load_file
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.preprocessing import StandardScaler
from test_aggregate import BASE, change, sign, write_result
from test_aggregate import run_main as aggregate
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import analyse
import callbacks
import config
import corrupt
import data_prep
import inside
import lab
import prepared_run
import report
import run_dir
import train
from common import InputError

RANDOM = np.random.default_rng(0)

# ---- The measures ----


# The estimator as Song et al. define it: the mean over all (i, j, q, r) that differ of k_ij (l_ij + l_qr - 2 l_iq).
def test_hsic_is_the_mean_over_four_rows() -> None:
    x, y = RANDOM.normal(size=(6, 3)), RANDOM.normal(size=(6, 2))
    k, m = x @ x.T, y @ y.T
    terms = [k[i, j] * (m[i, j] + m[q, r] - 2 * m[i, q]) for i, j, q, r in permutations(range(6), 4)]
    assert analyse.hsic(x, y) == pytest.approx(np.mean(terms))


# 1 for a rotation, another scale and another place; about 0 for what has nothing in common, with n near d, where the
# usual CKA is far from it; not defined for what is constant.
def test_similarity() -> None:
    x, other = RANDOM.normal(size=(100, 90)), RANDOM.normal(size=(100, 90))
    rotation, _ = np.linalg.qr(RANDOM.normal(size=(90, 90)))
    assert analyse.similarity(x, 3 * x @ rotation + 5) == pytest.approx(1)
    x_centred, other_centred = x - x.mean(0), other - other.mean(0)
    norms = [np.linalg.norm(values.T @ values) for values in (x_centred, other_centred)]
    biased = np.linalg.norm(x_centred.T @ other_centred) ** 2 / np.prod(norms)
    assert biased > 0.4 and abs(analyse.similarity(x, other)) < 0.02
    half = np.hstack([x[:, :45], other[:, :45]])
    assert 0.3 < analyse.similarity(x, half) < 0.7
    assert analyse.similarity(x, 1e-9 * x) == pytest.approx(1)
    assert np.isnan(analyse.similarity(0.1 + 1e-8 * other, x)) and np.isnan(analyse.similarity(x, np.zeros((100, 3))))


# From the origin home is (3, 4), the step (3, 0): 4 of 5 are left, the cosine is 3 / 5, and so is the step's length.
def test_distance() -> None:
    home, away = torch.tensor([3.0, 4.0]), torch.zeros(2)
    half = analyse.distance(home, away, torch.tensor([3.0, 0.0]))
    assert half == pytest.approx({"distance": 0.8, "cosine": 0.6, "moved": 0.6})
    assert analyse.distance(home, away, home) == pytest.approx({"distance": 0, "cosine": 1, "moved": 1})
    stayed = analyse.distance(home, away, away)
    assert (stayed["distance"], stayed["moved"]) == (1, 0) and np.isnan(stayed["cosine"])
    assert all(np.isnan(value) for value in analyse.distance(home, home, away).values())


# (x^2 - 1)^2 has a hill of 1 between -1 and 1. Over (x - 1)^2 the line from -1 to 1 falls from 4: it lies nowhere above
# its chord, and the barrier is at its ends.
def test_barrier() -> None:
    ends = [{"x": torch.tensor([value])} for value in (-1.0, 1.0)]
    line = analyse.line_between(*ends, lambda weights: (weights["x"].item() ** 2 - 1) ** 2)
    x = np.linspace(-1, 1, 21)
    np.testing.assert_allclose(line["loss"], (x**2 - 1) ** 2, atol=1e-6)
    assert line["above"].max() == pytest.approx(1) and line["a"][line["above"].idxmax()] == 0.5
    convex = analyse.line_between(*ends, lambda weights: (weights["x"].item() - 1) ** 2)
    assert convex["above"].max() == 0 and convex["above"].min() == pytest.approx(-1)
    same = analyse.line_between(ends[0], ends[0], lambda weights: weights["x"].item() ** 2 + 0.3)
    assert same["above"].abs().max() == pytest.approx(0, abs=1e-12)


# ---- Evaluated at steps, and corrupted after fine-tuning ----


# The evaluations change nothing else; those at an epoch's end are the epoch's; each F1 is scikit-learn's.
def test_steps(flags: list[str], tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    plain, stepped = (
        run_of(flags),
        run_of([*flags, "--eval_at", "0", "1", "3", "9", "--output_dir", str(tmp_path / "b")]),
    )
    assert plain.name == stepped.name and "tuple" not in stepped.command and "--eval_at 0 1 3 9" in stepped.command
    train.run_training(plain)
    result = train.run_training(stepped)
    assert "--eval_at 9 and later: training ends after step 6" in capsys.readouterr().out
    assert (plain.folder / "epochs.csv").read_bytes() == (stepped.folder / "epochs.csv").read_bytes()
    steps, epochs = (pd.read_csv(stepped.folder / f"{name}.csv") for name in ("steps", "epochs"))
    assert steps["step"].tolist() == result["steps"] == [0, 1, 3, 6]
    same = ["eval_loss", "accuracy", "weighted_f1", "weighted_f1_half_a"]
    pd.testing.assert_frame_equal(steps[same].iloc[2:].reset_index(drop=True), epochs[same])
    rows = pd.read_csv(stepped.folder / "predictions.csv.gz")
    for step in steps.itertuples():
        f1 = f1_score(rows["label"], rows[f"step_{step.step}"], average="weighted", zero_division=0)
        assert step.weighted_f1 == pytest.approx(f1, abs=1e-12)
    # there for what asks for no more; not for what asks for another step
    for words, there in ((["--eval_at", "1", "9"], True), ([], True), (["--eval_at", "2"], False)):
        run = run_of([*flags, "--output_dir", str(tmp_path / "b"), *words])
        assert (run_dir.load_valid_result(run) is not None) == there
    assert "was not evaluated after step 2" in capsys.readouterr().err


# Steps end at 1 and 6; an evaluation lasts from 1 to 5: two seconds of training.
def test_the_clock_leaves_them_out(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0, 1, 5, 6])
    monkeypatch.setattr("callbacks.time.perf_counter", lambda: next(ticks))
    timer = callbacks.TrainTimer()
    for event in (timer.on_epoch_begin, timer.on_step_end, timer.on_predict, timer.on_step_end):
        event()
    assert timer.seconds == 2


# A score or a prediction of a step that was changed is refused, under a digest that is right.
def test_an_edited_step_is_refused(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    run = run_of([*flags, "--num_train_epochs", "1", "--eval_at", "0"])
    train.run_training(run)
    steps = pd.read_csv(run.folder / "steps.csv")
    steps.assign(weighted_f1=steps["weighted_f1"] + [0.01, 0]).to_csv(run.folder / "steps.csv", index=False)
    assert run_dir.load_valid_result(run) is None and "steps.csv is not what" in capsys.readouterr().err
    sign(run.folder)
    assert run_dir.load_valid_result(run) is None and "not those of its predictions" in capsys.readouterr().err


# The uncorrupted run first, to the digit; then the same draws as ever in its place, and all else as it had become.
def test_corrupt_after(flags: list[str], small_data: Path, tmp_path: Path) -> None:
    flags = [*flags, "--eval_at", "0", "--save_states"]
    whole, cut = run_of(flags), run_of([*flags, "--corrupt", "bottom", "--frac", "1/2", "--corrupt_after"])
    assert cut.name.endswith("_corrupt_after=True") and "bottom" in cut.name
    train.run_training(whole)
    result = train.run_training(cut)
    epochs = pd.read_csv(whole.folder / "epochs.csv")
    assert result["weighted_f1_before_corruption"] == epochs["weighted_f1"].iloc[-1]
    before = load_file(cut.folder / "states" / "before.safetensors")
    model, _ = prepared_run.load_model(cut, data_prep.load("rotten_tomatoes", small_data), before)
    drawn, _ = corrupt.load_corrupted(cut.model_folder, corrupt.Corruption.of(cut.config), 0, num_labels=2)
    for name, values in model.state_dict().items():
        corrupted = name.startswith("bert.encoder.layer.0.")
        assert torch.equal(values, drawn.state_dict()[name] if corrupted else before[name]), name
    # what was fine-tuned has the test loss of the uncorrupted run's last epoch; the run began from `model`
    rows = data_prep.load("rotten_tomatoes", small_data)["test"]
    tokens = AutoTokenizer.from_pretrained(cut.model_folder)(
        rows["text"][:], padding=True, truncation=True, max_length=64, return_tensors="pt"
    )
    steps = pd.read_csv(cut.folder / "steps.csv")
    for weights, expected in ((before, epochs["eval_loss"].iloc[-1]), (model.state_dict(), steps["eval_loss"][0])):
        drawn.load_state_dict(weights)
        with torch.no_grad():
            loss = drawn.eval()(**tokens, labels=torch.tensor(rows["label"][:])).loss.item()
        assert loss == pytest.approx(expected, abs=1e-5)
    assert epochs["eval_loss"].nunique() == 2 and result["best_epoch"] == 1  # so that the last is not the best


# Where nothing is lost R is 1 from the first step, the drop 0, T90 step 0: here a noise that no float32 can hold.
def test_no_corruption_has_recovered(flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for part, rows in (("train", 64), ("test", 40)):
        texts = ["good film", "a good one, good", "bad film", "it was bad, bad"] * (rows // 4)
        labels = [word for text in texts for word in ("good", "bad") if word in text]
        numbered = [f"{text} {number}" for number, text in enumerate(texts, rows)]
        (tmp_path / "words").mkdir(exist_ok=True)
        frame = pd.DataFrame({"text": numbered, "label": labels})
        frame.to_csv(tmp_path / "words" / f"{part}.csv", index=False)
    flags = [
        *flags,
        "--dataset",
        str(tmp_path / "words"),
        "--eval_at",
        "0",
        "--learning_rate",
        "3e-3",
        "--num_train_epochs",
        "12",
    ]
    noise = ["--corrupt", "bottom", "--frac", "1/2", "--method", "noise", "--severity", "1e-30", "--corrupt_after"]
    for words in ([], noise):
        train.run_training(run_of([*flags, *words]))
    assert aggregate(tmp_path / "outputs", monkeypatch) == 0
    recovery = pd.read_csv(tmp_path / "outputs" / "recovery.csv", dtype={"t90": str}).set_index("order").loc["after"]
    assert (recovery["drop"], recovery["t90"]) == (0, "0") and recovery["f1_first"] == recovery["uncorrupted"]
    curve = pd.read_csv(tmp_path / "outputs" / "curves.csv").query("order == 'after' and step == 0")
    assert curve["recovery"].tolist() == [1]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corrupt_after"], "--corrupt_after needs something to corrupt"),
        (["--corrupt", "top", "--frac", "1", "--corrupt_after", "--tuning", "probe"], "fine-tunes twice at one rate"),
        (["--eval_at", "-1"], "--eval_at -1 is not a step"),
        (["--eval_at", "1", "--resume"], "--resume keeps neither"),
        (["--eval_at", "1", "--tuning", "probe_converged"], "--eval_at 1 is not a step"),
        (["--save_states", "--tuning", "probe"], "--save_states needs full"),
    ],
)
def test_refused_flags(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        config.RunConfig(**config.parse_flags(config.run_parser(""), words))


# ---- Curves, from runs written by hand ----


def write_steps(folder: Path, f1: dict[int, float]) -> None:
    """Steps with these F1 (percent) into a run of `write_result`, which has 100 rows in each half and class."""
    predictions, rows = pd.read_csv(folder / "predictions.csv.gz"), []
    label, place = predictions["label"], predictions.groupby("label").cumcount()
    for step, value in f1.items():
        predictions[f"step_{step}"] = label.where(place // 2 >= 100 - value, 1 - label)
        scores = dict.fromkeys(("weighted_f1", "weighted_f1_half_a", "weighted_f1_half_b", "accuracy"), value / 100)
        rows.append({"step": step} | scores)
    predictions.to_csv(folder / "predictions.csv.gz", index=False)
    pd.DataFrame(rows).to_csv(folder / "steps.csv", index=False)
    sign(folder)


# Two seeds. Uncorrupted 88 and 92: mean 90; floor 50. Corrupted after: means 40, 60, 86, 88 at steps 0, 2, 4, 8:
# R -0.25, 0.25, 0.9, 0.95, T90 4, area (0 + 1.15 + 3.7) / 8. Corrupted before: one seed lacks step 2, 0.5 is never 0.9.
def test_curves_and_times(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed, shift in ((1, -2), (2, 2)):
        write_result(tmp_path, BASE, "none", 0, "sst2", 90 + shift, seed=seed)
        for after, f1 in ((True, {0: 40, 2: 60, 4: 86, 8: 88}), (False, {0: 50, 2: 55, 8: 70})):
            f1 = {step: value + shift for step, value in f1.items() if after or step != 2 or seed == 1}
            folder = write_result(tmp_path, BASE, "bottom", 50, "sst2", f1[8], seed=seed, corrupt_after=after)
            write_steps(folder, f1)
    assert aggregate(tmp_path, monkeypatch) == 0
    recovery = pd.read_csv(tmp_path / "recovery.csv").set_index("order")
    after, before = recovery.loc["after"], recovery.loc["before"]
    assert (after["drop"], after["t90"], after["uncorrupted"], after["seeds"]) == (50, "4", 90, 2)
    assert after["area"] == pytest.approx((0 + 1.15 + 3.7) / 8)
    assert (before["t90"], before["f1_first"], before["last_step"]) == ("not reached", 50, 8) and np.isnan(
        before["drop"]
    )
    curves = pd.read_csv(tmp_path / "curves.csv").set_index(["order", "step"])
    assert curves.loc["after", "recovery"].tolist() == pytest.approx([-0.25, 0.25, 0.9, 0.95])
    assert curves.loc["before"].index.tolist() == [0, 8] and curves.loc[("after", 4), "f1_std"] == pytest.approx(8**0.5)
    assert all(len(runs.split()) == 2 for runs in curves["runs"])
    # the paper's tables have the first order alone, Table E both
    e = pd.read_csv(tmp_path / "tableE.csv", dtype=str)
    assert e["order"].tolist() == ["before", "before", "after"] and e["SST-2 bottom"].str[:5].tolist() == [
        "90.00",
        "70.00",
        "88.00",
    ]
    assert len(pd.read_csv(tmp_path / "table1.csv")) == 2
    difference = pd.read_csv(tmp_path / "lab.csv").set_index("table").loc["E"]
    assert difference["difference"] == pytest.approx(18) and difference["against"] == "corrupted before"


# R is not told where a seed's uncorrupted run is missing, or that model is no better than the floor.
def test_what_r_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in (1, 2):
        write_steps(write_result(tmp_path, BASE, "bottom", 50, "sst2", 70, seed=seed), {0: 60, 8: 70})
        write_steps(write_result(tmp_path, BASE, "bottom", 50, "imdb", 70, seed=seed), {0: 60, 8: 70})
        write_result(tmp_path, BASE, "none", 0, "imdb", 51, seed=seed)
    write_result(tmp_path, BASE, "none", 0, "sst2", 90, seed=1)
    assert aggregate(tmp_path, monkeypatch) == 0
    recovery = pd.read_csv(tmp_path / "recovery.csv").query("side == 'bottom'")
    assert recovery["t90"].isna().all() and recovery["area"].isna().all() and recovery["f1_last"].tolist() == [70, 70]


# ---- The whole way ----


def run_analyse(monkeypatch: pytest.MonkeyPatch, *words: object) -> None:
    monkeypatch.setattr("sys.argv", ["analyse.py", *map(str, words)])
    analyse.main()


@pytest.fixture(scope="module")
def healed(tiny_bert: Path, small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An output folder with the states of two uncorrupted runs and of two that were corrupted, in either order."""
    outputs = tmp_path_factory.mktemp("inside") / "my outputs"
    flags = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data), "--save_states"]
    flags += ["--num_train_epochs", "1", "--learning_rate", "3e-3", "--output_dir", str(outputs), "--eval_at", "0", "2"]
    cut = ["--corrupt", "bottom", "--frac", "1/2"]
    for words in ([], ["--seed", "1"], cut, [*cut, "--corrupt_after"]):
        train.run_training(run_of([*flags, *words]))
    return outputs


def folder_of(outputs: Path, pattern: str) -> Path:
    (folder,) = outputs.glob(f"runs/{pattern}")
    return folder


# Each number against the models themselves, read by the library; then the weights are gone, and nothing is done twice.
def test_the_whole_way(
    healed: Path, tiny_bert: Path, small_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:  # fmt: skip
    outputs = tmp_path / "outputs"
    shutil.copytree(healed, outputs)
    whole, other, cut, after = (
        folder_of(outputs, pattern) for pattern in ("*none*seed0", "*none*seed1", "*bottom*seed0", "*after=True")
    )
    models = {
        folder: AutoModelForSequenceClassification.from_pretrained(folder / "states").eval()
        for folder in (whole, other, cut, after)
    }
    home = load_file(after / "states" / "before.safetensors")
    run_analyse(monkeypatch, "--output_dir", outputs)
    printed = capsys.readouterr().out
    assert printed.count(" against ") == 3 and printed.count(f"{whole.name} alone") == 1
    similarity, barrier, distance, layers = (
        pd.read_csv(outputs / f"inside_{kind}.csv", keep_default_na=False, na_values=[""])
        for kind in ("similarity", "barrier", "distance", "layers")
    )
    assert barrier.groupby("run")["against"].first().to_dict() == {
        other.name: whole.name, cut.name: whole.name, after.name: whole.name
    }  # fmt: skip

    data = data_prep.load("rotten_tomatoes", small_data)
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)

    def read(model: torch.nn.Module, part: str) -> tuple[list[np.ndarray], float]:
        tokens = tokenizer(data[part]["text"][:], padding=True, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            output = model(**tokens, labels=torch.tensor(data[part]["label"][:]), output_hidden_states=True)
        return [hidden[:, 0].numpy() for hidden in output.hidden_states], output.loss.item()

    # CKA by centred kernels, Kornblith's, is the biased one of the same outputs: near, and 1 of a run with itself
    outputs_of = {folder: read(model, "test") for folder, model in models.items()}
    cells = similarity[similarity["run"] == cut.name].set_index(["layer_against", "layer"])["cka"]
    assert len(cells) == 9 and cells.xs(0, level="layer").isna().all() and cells.xs(0).isna().all()
    for i, j in ((1, 1), (1, 2), (2, 2)):
        expected = analyse.similarity(outputs_of[whole][0][i], outputs_of[cut][0][j])
        assert cells[i, j] == pytest.approx(expected, abs=1e-4)

    # the ends of the line are the two models' test losses, its middle that of the mean of their weights
    line = barrier[barrier["run"] == cut.name].reset_index(drop=True)
    ends = [outputs_of[folder][1] for folder in (whole, cut)]
    assert [line["loss"][0], line["loss"][20]] == pytest.approx(ends, abs=1e-5)
    mean = {name: (models[whole].state_dict()[name] + values) / 2 for name, values in models[cut].state_dict().items()}
    middle = AutoModelForSequenceClassification.from_pretrained(tiny_bert).eval()
    middle.load_state_dict(mean)
    assert line["loss"][10] == pytest.approx(read(middle, "test")[1], abs=1e-5)
    assert line["above"][10] == pytest.approx(line["loss"][10] - sum(ends) / 2, abs=1e-5)

    # the way home: to the pre-trained tensor, or to what it had become before it was corrupted
    name = "encoder.layer.0.output.dense.weight"
    drawn, _ = corrupt.load_corrupted(tiny_bert, corrupt.Corruption("bottom", config.fraction("1/2")), 0, num_labels=2)
    pretrained, _ = corrupt.load_corrupted(tiny_bert, num_labels=2)
    for folder, origin in ((cut, pretrained.get_parameter(f"bert.{name}")), (after, home[f"bert.{name}"])):
        row = distance.set_index(["run", "name"]).loc[(folder.name, name)]
        away, back = (model.get_parameter(f"bert.{name}").detach() for model in (drawn, models[folder]))
        expected = torch.linalg.norm(back - origin) / torch.linalg.norm(away - origin)
        assert row["distance"] == pytest.approx(expected.item(), rel=1e-4) and row["layer"] == 1
        cosine = torch.cosine_similarity((back - away).flatten(), (origin - away).detach().flatten(), dim=0)
        assert row["cosine"] == pytest.approx(cosine.item(), abs=1e-4)
    assert (distance["run"].value_counts() == 16).all() and set(distance["run"]) == {cut.name, after.name}

    # probes: scikit-learn's, at the C that was chosen, on the same outputs
    for state, model in (("before", drawn.eval()), ("after", models[cut])):
        row = layers.set_index(["run", "state", "layer"]).loc[(cut.name, state, 2)]
        (train_x, test_x), scaler = (read(model, part)[0][2] for part in ("train", "test")), StandardScaler()
        fitted = LogisticRegression(C=row["C"], max_iter=10_000).fit(
            scaler.fit_transform(train_x), data["train"]["label"][:]
        )
        f1 = f1_score(data["test"]["label"][:], fitted.predict(scaler.transform(test_x)), average="weighted")
        assert row["weighted_f1"] == pytest.approx(f1, abs=0.03)

    # the weights are gone, the runs are valid and the same command has nothing to do; aggregate, the page
    assert not list(outputs.glob("runs/*/states")) and not list((outputs / "unfinished").iterdir())
    command = shlex.split(json.loads((cut / "result.json").read_text())["command"])[3:]
    assert run_dir.load_valid_result(run_of([*command, "--output_dir", str(outputs)]))
    written = {path: path.read_bytes() for path in outputs.glob("inside_*.csv")}
    run_analyse(monkeypatch, "--output_dir", outputs)
    assert {path: path.read_bytes() for path in outputs.glob("inside_*.csv")} == written and len(written) == 5
    assert aggregate(outputs, monkeypatch) == 0
    page = report.write(outputs, None).read_text(encoding="utf-8")
    section = page.partition('<section id="inside">')[2].partition("</section>")[0]
    assert section.count("<svg") == 5 and "Did weights go home?" in section
    assert section.count("not measured") == 3  # T90, of an F1 that is the floor
    assert {path.name.rpartition("_")[2] for path in (outputs / "figures").glob("inside_*.png")} == {
        f"{kind}.png" for kind in ("curves", "similarity", "barrier", "distance", "layers")
    }


# Cells that differ in their parts alone have a line each; a curve of one step has no area.
def test_parts_and_single_steps() -> None:
    cell = {"model": "minilm", "variant": "", "method": "reinit", "order": "before", "side": "bottom", "percent": 50.0}
    frame = pd.DataFrame([cell | {"parts": parts} for parts in ("all", "attention", "ffn")])
    assert inside.add_panels("barrier", frame)["label"].nunique() == 3
    curve = {"step": 10, "f1": 90.0, "uncorrupted": 90.0, "floor": 50.0, "recovery": 1.0, "seeds": 2, "runs": "a b"}
    row = lab.recovery_times(pd.DataFrame([cell | {"parts": "all"} | curve]), [*cell, "parts"]).iloc[0]
    assert row["t90"] == "10" and np.isnan(row["area"])


# Two runs by name, the second against the first; a run against its own copy has CKA 1 and no barrier; weights stay.
def test_runs_by_name(healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outputs, copy = tmp_path / "outputs", tmp_path / "copy"
    shutil.copytree(healed, outputs)
    shutil.copytree(healed, copy)
    cut = folder_of(outputs, "*bottom*seed0")
    run_analyse(monkeypatch, copy / "runs" / cut.name, cut, "--output_dir", outputs, "--keep")
    similarity = pd.read_csv(outputs / "inside_similarity.csv").set_index(["layer_against", "layer"])["cka"]
    assert similarity[1, 1] == similarity[2, 2] == pytest.approx(1) and similarity[1, 2] < 0.999
    assert pd.read_csv(outputs / "inside_barrier.csv")["above"].abs().max() < 1e-9
    assert len(list(outputs.glob("runs/*/states"))) == 4 and len(list(outputs.glob("runs/*/inside"))) == 1
    # what is there is not done again: the others are, as after an end that came too early
    read = (cut / "inside" / "summary.csv").stat().st_mtime_ns
    run_analyse(monkeypatch, "--output_dir", outputs, "--keep")
    assert len(list(outputs.glob("runs/*/inside"))) == 4
    assert (cut / "inside" / "summary.csv").stat().st_mtime_ns == read


# A corrupted run whose uncorrupted one kept no weights waits for it: it is not read alone, and no weights go. Killed
# while the weights go, it goes on. What was found and cannot be read is told. A run that is done again, to keep more of
# it, keeps what was found.
def test_a_run_without_its_partner(
    healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(healed, outputs)
    cut, after = (folder_of(outputs, pattern) for pattern in ("*bottom*seed0", "*after=True"))
    shutil.rmtree(after)
    whole = folder_of(outputs, "*none*seed0").rename(tmp_path / "failed")
    with pytest.raises(SystemExit) as ended:
        run_analyse(monkeypatch, "--output_dir", outputs)
    assert ended.value.code == 1 and f"{cut.name} was not read: its uncorrupted run" in capsys.readouterr().err
    assert not (cut / "inside").exists() and len(list(outputs.glob("runs/*/states"))) == 2
    whole.rename(outputs / "runs" / folder_of(healed, "*none*seed0").name)

    def killed(folder: Path, **how: bool) -> None:
        if weights := next(Path(folder).rglob("*.safetensors"), None):
            weights.unlink()
            raise KeyboardInterrupt
        rmtree(folder, **how)

    rmtree = shutil.rmtree
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as ended:
        patch.setattr(shutil, "rmtree", killed)
        run_analyse(monkeypatch, "--output_dir", outputs)
    assert ended.value.code == 130 and (cut / "inside" / "similarity.csv").exists()
    run_analyse(monkeypatch, "--output_dir", outputs)
    assert not list(outputs.glob("runs/*/states")) and not list((outputs / "unfinished").iterdir())
    summary = cut / "inside" / "summary.csv"
    whole = summary.read_bytes()
    capsys.readouterr()
    for damaged in (b"", b'run,x\n"abc', whole[:20], whole.replace(b"seed0", b"seed1")):
        summary.write_bytes(damaged)
        with pytest.raises(SystemExit) as ended:
            run_analyse(monkeypatch, "--output_dir", outputs)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and f"{summary} cannot be read, delete {cut}, and do the run again" in error
        assert error.count("\n") == 1
    summary.write_bytes(whole)
    found = (cut / "inside" / "similarity.csv").read_bytes()
    command = shlex.split(json.loads((cut / "result.json").read_text())["command"])[3:]
    assert not train.run_or_reuse(run_of([*command, "--output_dir", str(outputs), "--save_vectors"]))[1]
    assert (cut / "vectors.npy").exists() and (cut / "inside" / "similarity.csv").read_bytes() == found


# What is wrong is told in one line, with exit code 2, and nothing is written.
def test_refused_runs(
    healed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, flags: list[str]
) -> None:
    outputs = tmp_path / "outputs"
    shutil.copytree(healed, outputs)
    whole, cut = (folder_of(outputs, pattern) for pattern in ("*none*seed0", "*bottom*seed0"))
    flags = [*flags, "--num_train_epochs", "1"]
    longer = run_of([*flags, "--max_length", "32", "--save_states"])
    other = run_of([*flags, "--dataset", "bbc_news", "--save_states"])
    bare = run_of(flags)
    for run in (longer, other, bare):
        train.run_training(run)

    def refused(*words: object, output_dir: Path = outputs) -> str:
        with pytest.raises(SystemExit) as ended:
            run_analyse(monkeypatch, *words, "--output_dir", output_dir)
        error = capsys.readouterr().err
        assert ended.value.code == 2 and error.count("\n") == 1 and not list(outputs.glob("inside_*"))
        return error

    assert "max_length is 64 and 32" in refused(whole, longer.folder)
    assert "dataset is rotten_tomatoes and bbc_news" in refused(cut, other.folder)
    assert "has no saved states: delete it and do the run again with --save_states True" in refused(whole, bare.folder)
    assert "is not a run that can be read" in refused(whole, tmp_path)
    weights = longer.folder / "states" / "model.safetensors"
    shutil.copy(whole / "states" / "model.safetensors", weights)
    assert f"{weights} is not what the run wrote" in refused(longer.folder, cut)
    assert "name two or more" in refused(whole)
    assert "run python grid.py --preset inside" in refused(output_dir=tmp_path / "nowhere")
    config_of = json.loads((cut / "result.json").read_text())
    settings = config_of["settings"] | {"model_fingerprint": "b" * 64}
    moved = cut.with_name(config.run_name(settings))
    shutil.copytree(cut, moved)
    change(moved / "result.json", config_of, settings=settings)
    assert "made with another model_fingerprint than there is now" in refused(whole, moved)
