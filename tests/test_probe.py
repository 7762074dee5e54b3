"""The converged probe, the floors and the seeds apart, against scikit-learn, the library and formulas."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import random_model, run_of
from datasets import ClassLabel, Dataset, DatasetDict
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import StratifiedKFold, cross_val_score
from sklearn.preprocessing import StandardScaler
from transformers import AutoModel, AutoTokenizer

import data_prep
import features
import prepared_run
import probe
import run_dir
import train
from common import InputError

CONVERGED = ["--tuning", "probe_converged"]


# C is the one whose folds' mean log-likelihood is best, each fold scaled with all train rows; the features' scale and
# place do not matter, and no class is a test row's only for its scale.
def test_the_fit_is_cross_validated_logistic_regression() -> None:
    random = np.random.default_rng(0)
    labels = np.repeat([0, 1, 2], 20)
    values = random.normal(size=(60, 5)) + 0.7 * np.eye(3)[labels] @ random.normal(size=(3, 5))
    scaled = StandardScaler().fit_transform(values)
    folds = StratifiedKFold(5)
    means = {
        c: cross_val_score(
            LogisticRegression(C=c, max_iter=10_000), scaled, labels, cv=folds, scoring="neg_log_loss"
        ).mean()
        for c in np.logspace(-4, 4, 10)
    }
    fitted = probe.fit(values, labels)
    assert pytest.approx(max(means, key=means.get)) == fitted[-1].C_
    expected = LogisticRegression(C=fitted[-1].C_, max_iter=10_000).fit(scaled, labels).predict_proba(scaled)
    np.testing.assert_allclose(fitted.predict_proba(values), expected, atol=1e-3)
    assert (probe.fit(1000 * values + 7, labels).predict(1000 * values + 7) == fitted.predict(values)).all()
    with pytest.raises(InputError, match="a class has 4 train rows: a converged probe needs 5"):
        probe.fit(values[:44], labels[:44])


# What is read of each layer is what the library's plain encoder gives, row by row without padding.
@pytest.mark.parametrize("reads", ["cls", "mean", "pooler"])
def test_what_is_read(reads: str, tiny_bert: Path, small_data: Path, flags: list[str]) -> None:
    flags = [flag for flag in flags if flag not in ("--num_train_epochs", "2", "--learning_rate", "1e-3")]
    every = [] if reads == "pooler" else ["--probe_layers", "all"]
    run = run_of([*flags, *CONVERGED, "--probe_reads", reads, *every])
    result, _ = train.run_or_reuse(run)
    data = data_prep.load("rotten_tomatoes", small_data)
    prepared = prepared_run.prepare_run(run, data).trainer
    model, tokenizer = AutoModel.from_pretrained(tiny_bert).eval(), AutoTokenizer.from_pretrained(tiny_bert)
    for row in (0, 5):
        tokens = tokenizer(data["train"]["text"][row], return_tensors="pt", truncation=True, max_length=64)
        with torch.no_grad():
            output = model(**tokens, output_hidden_states=True)
        expected = {f"layer_{k}": h[0, 0] if reads == "cls" else h[0, 1:].mean(0) for k, h in enumerate(output[2])}
        expected = {"layer_2": output.pooler_output[0]} if reads == "pooler" else expected
        got = prepared.train_dataset[row]
        assert {name for name in got if name.startswith("layer_")} == set(expected)
        for name, values in expected.items():
            torch.testing.assert_close(got[name], values, atol=1e-5, rtol=1e-4)
    # the run's number is that of the last layer's probe, and each layer's stands in layers.csv
    predictions = pd.read_csv(run.folder / "predictions.csv.gz")
    f1 = f1_score(predictions["label"], predictions["epoch_1"], average="weighted")
    assert result["weighted_f1"] == pytest.approx(f1) and result["in_force"]["optimizer"] is None
    train_x = prepared.train_dataset.with_format("numpy")["layer_2"][:]
    last = probe.fit(train_x, np.array(data["train"]["label"]))
    order = np.argsort(prepared_run.prepare_run(run, data).order)
    x = prepared.eval_dataset.with_format("numpy")["layer_2"][:][order]
    assert (last.predict(x.astype(float)) == predictions["epoch_1"]).all()
    assert (run.folder / "layers.csv").exists() == (reads != "pooler")
    if reads != "pooler":
        layers = pd.read_csv(run.folder / "layers.csv").set_index("layer")
        assert layers.index.tolist() == [0, 1, 2] and layers.loc[2, "weighted_f1"] == pytest.approx(f1)
        (run.folder / "layers.csv").unlink()
        assert run_dir.load_valid_result(run) is None  # asked for and gone: done again


# Left-padded rows: [CLS] is where the mask begins.
def test_cls_of_left_padded_rows() -> None:
    hidden, mask = torch.arange(24.0).view(2, 4, 3), torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    assert probe.unpad.first_token(hidden, mask).tolist() == [[3, 4, 5], [12, 13, 14]]
    assert probe.unpad.mean_of_others(hidden, mask).tolist() == [[7.5, 8.5, 9.5], [15, 16, 17]]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--learning_rate", "1e-3"], "does not take --learning_rate"),
        (["--num_train_epochs", "3"], "does not take --num_train_epochs"),
        (["--per_device_train_batch_size", "16"], "does not take --per_device_train_batch_size"),
        (["--weight_decay", "0.1"], "does not take --weight_decay"),
        (["--data_seed", "0", "--seed", "1"], "does not take --data_seed"),
        (["--no_unpadding", "True"], "does not take --no_unpadding"),
        (["--pooling", "mean"], "takes --probe_reads mean"),
        (["--probe_reads", "pooler", "--probe_layers", "all"], "reads the last layer alone"),
        (["--save_model", "True"], "needs full"),
    ],
)
def test_what_a_converged_probe_has_not(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        run_of([*CONVERGED, "--model", "minilm", *words])
    train.RunConfig(tuning="probe_converged", corrupt_seed=3, trainer={"per_device_eval_batch_size": 8})
    with pytest.raises(InputError, match="is of --tuning probe_converged"):
        run_of(["--model", "minilm", "--probe_reads", "mean"])


# DistilBERT has no pooler: it is told before anything is written.
def test_no_pooler(tmp_path: Path) -> None:
    folder = random_model("distilbert", tmp_path / "model")
    wanted = train.RunConfig(model=str(folder), tuning="probe_converged", probe_reads="pooler")
    with pytest.raises(InputError, match="has no pooler: give --probe_reads cls or mean"):
        train.check(wanted)


# ---- Floors ----


# By hand: 3 of 4 test rows are of class 1, 2 (3/4)^2 / (1 + 3/4) and (3/4)^2 + (1/4)^2; words by scikit-learn on texts.
# They are computed once; a file that was edited is computed again.
def test_floors(tiny_bert: Path, tmp_path: Path) -> None:
    texts = {
        "train": ["good film", "fine film", "bad film", "awful film"] * 5,
        "test": ["good", "fine", "awful", "fine day"],
    }
    labels = {"train": [1, 1, 0, 0] * 5, "test": [1, 1, 0, 1]}
    feature = ClassLabel(names=["no", "yes"])
    parts = {p: Dataset.from_dict({"text": texts[p], "label": labels[p]}).cast_column("label", feature) for p in texts}
    tokenizer = AutoTokenizer.from_pretrained(tiny_bert)
    tokens, _ = features.tokenise(DatasetDict(parts), tokenizer, 2, 16, tmp_path / "tokens")
    floors = features.compute_floors(tokens, tokenizer.all_special_ids, tmp_path / "tokens")
    assert floors["constant"] == pytest.approx(2 * 0.5625 / 1.75) and floors["guessing"] == pytest.approx(0.625)
    vectors = TfidfVectorizer(token_pattern=r"\S+")
    fitted = LogisticRegression().fit(vectors.fit_transform(texts["train"]), labels["train"])
    guesses = fitted.predict(vectors.transform(texts["test"]))
    assert floors["words"] == pytest.approx(f1_score(labels["test"], guesses, average="weighted"))
    path = tmp_path / "tokens" / "floors.json"
    written = path.read_text()
    path.write_text(written.replace('"words": ', '"words": 9'))
    assert features.compute_floors(tokens, tokenizer.all_special_ids, tmp_path / "tokens") == floors
    assert path.read_text() == written


# ---- Seeds apart ----


# Each seed moves its own part and no other: the corrupted weights, the head, the order of the rows.
def test_each_seed_moves_its_own(flags: list[str], small_data: Path) -> None:
    data = data_prep.load("rotten_tomatoes", small_data)

    def parts(*words: str) -> dict:
        trainer = prepared_run.prepare_run(
            run_of([*flags, "--corrupt", "bottom", "--frac", "1/2", *words]), data
        ).trainer
        weights = dict(trainer.model.named_parameters())
        batches = [batch["labels"].tolist() for batch in trainer.get_train_dataloader()]
        layer = weights["bert.encoder.layer.0.attention.self.query.weight"].detach().numpy().tolist()
        return {"corrupt_seed": layer, "head_seed": weights["classifier.weight"].tolist(), "data_seed": batches}

    base, other = parts(), parts("--seed", "1")
    assert all(base[name] != other[name] for name in base)
    for name in base:
        moved = parts(f"--{name}", "1")
        assert moved[name] == other[name]
        assert all(moved[rest] == base[rest] for rest in base if rest != name)
    named = run_of([*flags, "--head_seed", "1"]).name
    assert "_seed0_" in named and named.endswith("_head_seed=1")
    assert run_of([*flags, "--head_seed", "0"]).name == run_of(flags).name  # says nothing that --seed does not
