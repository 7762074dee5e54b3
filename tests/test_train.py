"""One run: what it leaves, that it repeats, that runs are paired, and what it refuses."""

import json
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import save
from sklearn.metrics import f1_score
from transformers import AutoModelForSequenceClassification, AutoTokenizer

import corrupt
import data_prep
import settings
import train

ROOT = Path(train.__file__).parent


@pytest.fixture
def flags(tiny_bert: Path, small_data: Path, tmp_path: Path) -> list[str]:
    """A run of two epochs of three steps on texts of many lengths, in the test's own output folder."""
    where = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data)]
    what = ["--num_train_epochs", "2", "--learning_rate", "1e-3", "--disable_tqdm", "True"]
    return [*where, *what, "--output_dir", str(tmp_path / "outputs")]


def run_main(monkeypatch: pytest.MonkeyPatch, flags: list[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["train.py", *flags])
    train.main()


def file_names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


# Just these files, just the epochs asked for; the F1s are scikit-learn's over the predictions that were kept.
def test_a_whole_run(flags: list[str], small_data: Path, tmp_path: Path) -> None:
    run = settings.plan([*flags, "--corrupt", "bottom", "--frac", "1/2"])
    train.execute(run)
    assert file_names(tmp_path / "outputs" / "runs") == [
        f"{run.folder.name}/{name}" for name in ("epochs.csv", "log.txt", "predictions.csv.gz", "result.json")
    ]
    epochs = pd.read_csv(run.folder / "epochs.csv")
    scores = ["accuracy", "weighted_f1", "weighted_f1_half_a", "weighted_f1_half_b"]
    assert list(epochs) == ["epoch", "train_loss", "eval_loss", *scores]
    assert epochs["epoch"].tolist() == [1, 2] and epochs.notna().all(axis=None)
    result = json.loads((run.folder / "result.json").read_text())
    best = epochs.loc[epochs["weighted_f1"].idxmax()]
    assert (result["best_epoch"], result["weighted_f1"]) == (best["epoch"], best["weighted_f1"])

    rows = pd.read_csv(run.folder / "predictions.csv.gz")
    test = data_prep.load("rotten_tomatoes", small_data)["test"]
    assert rows["row"].tolist() == list(range(50)) and rows["label"].tolist() == test["label"]
    half_b = rows.groupby("label").cumcount() % 2 == 1
    for name, part in (("", rows.index >= 0), ("_half_a", ~half_b), ("_half_b", half_b)):
        f1 = f1_score(rows["label"][part], rows["prediction"][part], average="weighted", zero_division=0)
        assert best[f"weighted_f1{name}"] == pytest.approx(f1, abs=1e-12)

    assert result["corruption"]["layers"] == [1] and len(result["corruption"]["tensors"]) == 16
    assert result["settings"]["data_fingerprint"] == data_prep.manifest("rotten_tomatoes", small_data)["fingerprint"]
    assert (result["settings"]["weight_decay"], result["settings"]["max_length"]) == (0.0, 64)


# The same command twice gives the same bytes; a third time the result is there; other settings have another place.
def test_repeats_to_the_last_digit(
    flags: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = settings.plan(flags)
    for folder in ("outputs", "again"):
        run_main(monkeypatch, [*flags, "--output_dir", str(tmp_path / folder)])
    first, second = (tmp_path / folder / "runs" / run.folder.name for folder in ("outputs", "again"))
    for name in ("epochs.csv", "predictions.csv.gz"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    capsys.readouterr()
    run_main(monkeypatch, [*flags, "--output_dir", str(tmp_path / "again")])
    assert "was there already" in capsys.readouterr().out
    for other in (["--seed", "1"], ["--weight_decay", "0.01"], ["--max_length", "32"], ["--kaiming_a", "1"]):
        assert settings.plan([*flags, *other]).folder != run.folder
    assert settings.plan([*flags, "--logging_steps", "3"]).folder == run.folder


# A result counts only if it came from the settings asked for; a truncated one does not count.
def test_results_of_other_settings_do_not_count(flags: list[str], capsys: pytest.CaptureFixture) -> None:
    run = settings.plan(flags)
    train.execute(run)
    assert settings.result_of(run)
    path = run.folder / "result.json"
    result = json.loads(path.read_text())
    path.write_text(json.dumps({**result, "settings": {**result["settings"], "numbers": 0}}))
    assert settings.result_of(run) is None
    assert f"numbers 0 (now {settings.NUMBERS})" in capsys.readouterr().err
    path.write_text(path.read_text()[:-100])
    assert settings.result_of(run) is None


# Files of an earlier attempt never stand beside a newer result, and rows that changed since the plan are refused.
def test_nothing_stale_is_kept(flags: list[str], small_data: Path, tmp_path: Path) -> None:
    shutil.copytree(small_data, tmp_path / "data")
    flags = [*flags, "--data_dir", str(tmp_path / "data"), "--num_train_epochs", "1"]
    train.execute(settings.plan([*flags, "--save_model"]))
    run = settings.plan(flags)
    train.execute(run)
    assert not (run.folder / "model").exists()
    data_prep.prepare("rotten_tomatoes", train_size=64, test_size=40, data_dir=tmp_path / "data")
    with pytest.raises(settings.RunError, match="prepared anew"):
        train.execute(run)
    assert (run.folder / "failure.json").exists() and settings.result_of(run)["settings"] == run.settings


# Another tokenizer configuration makes another run; a model with a head of its own is no place to begin.
def test_the_model_is_what_it_was(flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    copy = tmp_path / "tiny-bert"
    shutil.copytree(tiny_bert, copy)
    here = settings.plan([*flags, "--model", str(copy)]).folder
    assert here == settings.plan(flags).folder
    tokenizer = json.loads((copy / "tokenizer_config.json").read_text())
    (copy / "tokenizer_config.json").write_text(json.dumps({**tokenizer, "truncation_side": "left"}))
    settings.model_fingerprint.cache_clear()
    assert settings.plan([*flags, "--model", str(copy)]).folder != here
    model, _ = corrupt.load_broken(tiny_bert, "none", None, seed=0, num_labels=2)
    model.save_pretrained(tmp_path / "fine-tuned")
    with pytest.raises(corrupt.ModelError, match="has a head already"):
        corrupt.load_broken(tmp_path / "fine-tuned", "none", None, seed=0, num_labels=2)


# At one seed the head and the batches are the same for every corruption; another seed moves both.
def test_runs_are_paired(flags: list[str], small_data: Path) -> None:
    data = data_prep.load("rotten_tomatoes", small_data)

    def head_and_batches(*damage: str) -> tuple[torch.Tensor, list[list[int]]]:
        trainer, *_ = train.make_trainer(settings.plan([*flags, *damage]), data)
        batches = [batch["input_ids"][:, :12].tolist() for _ in range(2) for batch in trainer.get_train_dataloader()]
        return trainer.model.classifier.weight.detach().clone(), batches

    head, batches = head_and_batches()
    assert batches[: len(batches) // 2] == batches[len(batches) // 2 :]  # a fresh loader begins the stream anew
    for damage in (["--corrupt", "bottom", "--frac", "1/2"], ["--corrupt", "top", "--frac", "1"]):
        other_head, other_batches = head_and_batches(*damage)
        assert torch.equal(head, other_head) and batches == other_batches
    other_head, other_batches = head_and_batches("--seed", "1")
    assert not torch.equal(head, other_head) and batches != other_batches


# The plain random order has our stream too: three epochs of two seeds have no epoch in common, as theirs would.
def test_seeds_share_no_epoch(flags: list[str], small_data: Path) -> None:
    data = data_prep.load("rotten_tomatoes", small_data)
    epochs = []
    for seed in ("0", "1"):
        run = settings.plan([*flags, "--train_sampling_strategy", "random", "--seed", seed])
        loader = train.make_trainer(run, data)[0].get_train_dataloader()
        for epoch in range(3):
            loader.set_epoch(epoch)
            epochs.append(str([batch["input_ids"][:, :8].tolist() for batch in loader]))
    assert len(set(epochs)) == 6


# The saved model, read back by the library and run on one text after the other, makes the predictions of the file.
def test_predictions_belong_to_their_rows(flags: list[str], small_data: Path) -> None:
    run = settings.plan([*flags, "--model", "minilm", "--save_model"])
    train.execute(run)
    model = AutoModelForSequenceClassification.from_pretrained(run.folder / "model").eval()
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    test = data_prep.load("rotten_tomatoes", small_data)["test"]
    texts = [tokenizer(text, truncation=True, max_length=64, return_tensors="pt") for text in test["text"]]
    with torch.no_grad():
        expected = [model(**text).logits.argmax().item() for text in texts]
    predictions = pd.read_csv(run.folder / "predictions.csv.gz")["prediction"]
    assert predictions.nunique() > 1
    assert predictions.tolist() == expected
    assert model.config.id2label == dict(enumerate(test.features["label"].names))


# Five rows of class 0 and two of class 1: each half has its share of both.
def test_halves_are_stratified() -> None:
    assert train.halves(np.array([0, 0, 1, 0, 1, 0, 0])).tolist() == [0, 1, 0, 0, 1, 1, 0]


def make_folder(folder: Path, **files: str) -> Path:
    folder.mkdir()
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


NO_TENSORS = save({}).decode()  # a whole file, but empty
ALBERT = '{"model_type": "albert"}'
BERT = '{"model_type": "bert", "architectures": ["BertModel"]}'


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (["--model", "no-such/model"], "not on this machine and the hub cannot be reached"),
        (["--model", "no/such/model"], "unknown model"),
        (["--model", "EMPTY"], "no config.json"),
        (["--model", "PICKLED"], "pickled weights are never loaded"),
        (["--model", "BROKEN"], "no whole safetensors file"),
        (["--model", "ALBERT"], "AlbertModel cannot be broken"),
        (["--model", "NO_TOKENIZER"], "no tokenizer vocabulary"),
        (["--dataset", "sst3"], "sst3"),
        (["--dataset", "sst2"], "hub"),
        (["--frac", "0.3", "--corrupt", "bottom"], "choose from 0, 1/2, 1"),
        (["--frac", "1.5", "--corrupt", "top"], "choose from 0, 1/2, 1"),
        (["--frac", "1/0", "--corrupt", "top"], "Fraction(1, 0)"),
        (["--frac", "0.5"], "needs --corrupt"),
        (["--corrupt", "bottom"], "needs --frac"),
        (["--corrupt", "middle", "--frac", "0.5"], "invalid choice"),
        (["--no_such_flag", "1"], "unknown flag --no_such_flag"),
        (["--learning_rat", "1"], "unknown flag --learning_rat"),
        (["--eval_strategy", "steps"], "fixed to epoch"),
        (["--pooling", "max"], "invalid choice"),
        (["--tuning", "probe", "--save_vectors"], "need --tuning full"),
        (["--eval_delay", "2"], "fixed to 0"),
        (["--num_train_epochs", "0"], "not above 0"),
        (["--num_train_epochs", "nan"], "not above 0"),
        (["--seed", "-1"], "not from 0"),
        (["--learning_rate", "fast"], "invalid float value"),
        (["--max_length", "1024"], "not from 8 to 512"),
        (["--output_dir", "/dev/null/outputs"], "cannot be written"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_input(
    bad: list[str],
    message: str,
    flags: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    folders = {
        "EMPTY": lambda path: make_folder(path),
        "PICKLED": lambda path: make_folder(path, config__json=BERT, pytorch_model__bin="x"),
        "BROKEN": lambda path: make_folder(path, config__json=BERT, model__safetensors="x"),
        "ALBERT": lambda path: make_folder(
            path, config__json='{"model_type": "albert"}', model__safetensors=NO_TENSORS
        ),
    }
    bad = [str(folders[word](tmp_path / word)) if word in folders else word for word in bad]
    if "NO_TOKENIZER" in bad:
        bare = make_folder(tmp_path / "bare")
        for name in ("config.json", "model.safetensors"):
            shutil.copy(Path(flags[1]) / name, bare)
        bad = ["--model", str(bare)]
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit) as exit_info:
        run_main(monkeypatch, [*flags, *bad])
    (error,) = capsys.readouterr().err.splitlines()
    assert exit_info.value.code == 2 and error.startswith("train.py: error: ") and message in error
    assert not file_names(tmp_path / "outputs")


# A learning rate that makes the loss overflow is a failed run with its reason, not an F1.
def test_a_diverged_run_is_a_failure(flags: list[str]) -> None:
    run = settings.plan([*flags, "--learning_rate", "1e30", "--resume"])
    with pytest.raises(settings.RunError, match="diverged"):
        train.execute(run)
    assert file_names(run.folder) == ["failure.json", "failure.log"] and not run.unfinished.exists()
    assert "lower --learning_rate" in json.loads((run.folder / "failure.json").read_text())["reason"]


# A hub that takes the connection and never answers: one line and exit code 2, well before the library would give up.
def test_a_silent_hub(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = subprocess.run(
            [sys.executable, "train.py", "--output_dir", str(tmp_path / "outputs")],
            cwd=ROOT,
            env={"PATH": "", "HOME": str(tmp_path), "HF_ENDPOINT": address},
            capture_output=True,
            text=True,
            timeout=60,
        )
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert "'bert-base-uncased' is not on this machine" in done.stderr and not (tmp_path / "outputs").exists()


# Importing a step does not import what it does not use.
@pytest.mark.parametrize(
    ("script", "unused"),
    [("corrupt", {"pandas", "datasets", "evaluate", "sklearn"}), ("aggregate", {"torch", "transformers", "datasets"})],
)
def test_light_imports(script: str, unused: set[str]) -> None:
    code = f"import {script}, sys; print(*({unused!r} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


def test_the_head_has_its_own_stream(tiny_bert: Path) -> None:
    heads = []
    for seed in (0, 0, 1):
        torch.rand(7)
        heads.append(corrupt.load_broken(tiny_bert, "none", None, seed)[0].classifier.weight)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])


# Table 1's SST-2 of BERT-base, bottom 50 %, is 83.25; the paper has no MiniLM and no probe on SST-2.
def test_the_papers_value_beside_ours() -> None:
    cell = {"model": "bert-base-uncased", "side": "bottom", "percent": 50.0, "dataset": "sst2", "pooling": "cls"}
    cell |= {"tuning": "full"}
    said = train.beside_the_paper({"settings": cell, "weighted_f1": 0.8})
    assert "Table 1 has 83.25 %" in said and said.endswith("-3.25")
    for change in ({"model": "minilm"}, {"tuning": "probe"}, {"pooling": "mean", "tuning": "probe"}):
        assert train.beside_the_paper({"settings": cell | change, "weighted_f1": 0.8}) == "the paper has no such cell"
