"""Tokens and the probe's features, against direct computations with the library's own parts."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import random_model, run_of
from datasets import ClassLabel, Dataset, DatasetDict
from transformers import AutoTokenizer, PreTrainedModel, Trainer

import data_prep
import features
import prepared_run
import train
import unpad
from common import InputError
from config import Run


def frozen(model: PreTrainedModel) -> PreTrainedModel:
    model.base_model.requires_grad_(False)
    return model


# The probe's head, trained on features that were computed once, gives the logits of the plain way: the whole model in
# the Trainer, everything under base_model frozen. Dropout is off in both.
@pytest.mark.parametrize(("architecture", "pooling"), [("bert", "cls"), ("distilbert", "mean"), ("mpnet", "cls")])
def test_probe_equals_the_frozen_run(architecture: str, pooling: str, tmp_path: Path, small_data: Path) -> None:
    off = {"dropout": 0, "attention_dropout": 0, "seq_classif_dropout": 0}
    if architecture != "distilbert":
        off = {"hidden_dropout_prob": 0, "attention_probs_dropout_prob": 0}
    folder = random_model(architecture, tmp_path / architecture, **off)
    flags = ["--model", str(folder), "--corrupt", "bottom", "--frac", "1/2", "--dataset", "rotten_tomatoes"]
    flags += ["--data_dir", str(small_data), "--output_dir", str(tmp_path / "outputs"), "--disable_tqdm", "True"]
    flags += ["--learning_rate", "1e-2", "--num_train_epochs", "2", "--pooling", pooling]
    data = data_prep.load("rotten_tomatoes", small_data)

    def logits(trainer: Trainer) -> np.ndarray:
        before = trainer.predict(trainer.eval_dataset).predictions
        trainer.train()
        after = trainer.predict(trainer.eval_dataset).predictions
        assert np.abs(before - after).max() > 0.01
        return after

    plain, plain_order, *_ = prepared_run.prepare_run(run_of(flags), data)
    whole_model = plain.model_init
    plain.model_init = lambda: frozen(whole_model())
    probe, order, *_ = prepared_run.prepare_run(run_of([*flags, "--tuning", "probe"]), data)
    assert order.tolist() == plain_order.tolist()
    trained = {name for name, _ in probe.model.named_parameters()}
    assert trained == {name for name, weight in plain.model_init().named_parameters() if weight.requires_grad}
    np.testing.assert_allclose(logits(probe), logits(plain), rtol=0, atol=1e-6)


def key_of(run: Run) -> str:
    return prepared_run.features_folder(run, prepared_run.training_arguments(run.config, run.work_dir, run.name)).name


# Other corruption, seed, pooling or data: other features. Another learning rate or more epochs: the same.
def test_what_the_features_depend_on(tiny_bert: Path, small_data: Path) -> None:
    base = ["--model", str(tiny_bert), "--dataset", "bbc_news", "--data_dir", str(small_data), "--tuning", "probe"]

    def key(*flags: str) -> str:
        return key_of(run_of([*base, *flags]))

    half = ("--corrupt", "top", "--frac", "0.5")
    others = [half, (*half, "--seed", "1"), (*half, "--kaiming_a", "1"), ("--pooling", "mean"), ("--max_length", "32")]
    others += [("--dataset", "rotten_tomatoes"), ("--corrupt", "bottom", "--frac", "0.5")]
    assert len({key(), *(key(*flags) for flags in others)}) == len(others) + 1
    assert key("--learning_rate", "1e-3", "--num_train_epochs", "3") == key()


# Features of another encoder in the cache's place are noticed, not trained on.
def test_features_of_another_encoder_are_not_used(
    tiny_bert: Path, small_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    flags = ["--model", str(tiny_bert), "--dataset", "bbc_news", "--data_dir", str(small_data), "--tuning", "probe"]
    flags += ["--output_dir", str(tmp_path)]
    data = data_prep.load("bbc_news", small_data)
    prepared_run.prepare_run(run_of(flags), data)
    (folder,) = (path for path in (tmp_path / "features").iterdir() if path.is_dir())
    run = run_of([*flags, "--corrupt", "bottom", "--frac", "1"])
    folder.rename(folder.with_name(key_of(run)))
    copied = prepared_run.prepare_run(run, data).trainer.train_dataset["inputs_embeds"][:]
    assert capsys.readouterr().err.count("is not what was written: making it again") == 2
    shutil.rmtree(tmp_path / "features")
    assert torch.equal(copied, prepared_run.prepare_run(run, data).trainer.train_dataset["inputs_embeds"][:])


# Sentence pairs keep their segments: 0 up to the first [SEP], 1 after it; the longer one is truncated first.
# The tokens are made once: read again they are the same; a file that was cut off is made again.
def test_pairs_and_their_cache(tiny_bert: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    columns = {"sentence1": ["one two three", "a"], "sentence2": ["four", "b " * 20], "label": [0, 1]}
    part = Dataset.from_dict(columns).cast_column("label", ClassLabel(names=["no", "yes"]))
    data, tokenizer = DatasetDict(train=part, test=part), AutoTokenizer.from_pretrained(tiny_bert)
    for attempt in ("made", "read", "mended"):
        tokens, order = features.tokenise(data, tokenizer, 2, 12, tmp_path / "tokens")
        assert tokens["train"]["token_type_ids"][0] == [0] * 5 + [1] * 2
        assert tokens["train"]["token_type_ids"][1] == [0] * 3 + [1] * 9
        assert tokens["train"]["length"][:] == [7, 12] and order.tolist() == [0, 1]
        assert tokens["train"].features["label"].names == ["no", "yes"]
        assert ("making it again" in capsys.readouterr().err) == (attempt == "mended")
        written = (tmp_path / "tokens" / "train.arrow").stat()
        if attempt == "made":
            first = written.st_mtime_ns
        elif attempt == "read":
            assert written.st_mtime_ns == first
            os.truncate(tmp_path / "tokens" / "train.arrow", written.st_size // 2)
    assert {path.name for path in tmp_path.iterdir()} == {"tokens", ".tokens.lock"}


# The vectors that are kept are the library's hidden states of the saved model, row by row: at [CLS], or their mean
# over the other tokens.
@pytest.mark.parametrize("pooling", ["cls", "mean"])
def test_saved_vectors(pooling: str, tiny_bert: Path, small_data: Path, tmp_path: Path) -> None:
    flags = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data), "--save_model"]
    flags += ["--save_vectors", "--num_train_epochs", "1", "--output_dir", str(tmp_path), "--disable_tqdm", "True"]
    run = run_of([*flags, "--pooling", pooling])
    train.run_training(run)
    vectors = np.load(run.folder / "vectors.npy", allow_pickle=False)
    model = unpad.load_saved(run.folder / "model").base_model
    tokenizer = AutoTokenizer.from_pretrained(run.folder / "model")
    for row, text in enumerate(data_prep.load("rotten_tomatoes", small_data)["test"]["text"]):
        tokens = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
        with torch.no_grad():
            hidden = model.eval()(**tokens).last_hidden_state[0]
        expected = hidden[0] if pooling == "cls" else hidden[1:].mean(0)
        np.testing.assert_allclose(vectors[row], expected.numpy(), atol=1e-5)
    assert json.loads((run.folder / "result.json").read_text())["settings"]["pooling"] == pooling


# A whole file in the place of another, or one whose digest was not written before the process died, is made again. What
# a process that was killed left half written goes.
def test_another_file_in_the_cache(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    rows = Dataset.from_dict({"x": [1, 2, 3, 4], "label": [0, 1, 1, 0]})

    def read(name: str, rows: Dataset) -> list[int]:
        return features.cached_map(DatasetDict(train=rows), lambda batch: {"y": batch["x"]}, tmp_path / name)["train"][
            "y"
        ][:]

    assert (read("few", rows.select([0, 1])), read("all", rows)) == ([1, 2], [1, 2, 3, 4])
    (tmp_path / "all" / "tmpkilled").write_bytes(b"half")
    for lost in ("digest", "file"):
        if lost == "digest":
            (tmp_path / "all" / "train.sha256").unlink()
        else:
            (tmp_path / "few" / "train.arrow").replace(tmp_path / "all" / "train.arrow")
        assert read("all", rows) == [1, 2, 3, 4]
        assert "all/train.arrow is not what was written: making it again" in capsys.readouterr().err
        assert read("all", rows) == [1, 2, 3, 4] and capsys.readouterr().err == ""
    assert sorted(path.name for path in (tmp_path / "all").iterdir()) == ["train.arrow", "train.sha256"]


# Labels that are not those of the prepared rows, in a file that is whole under its own digest, are never used.
def test_other_labels_in_the_cache(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"x": [1, 2, 3], "label": [0, 1, 1]})
    reversed_labels = Dataset.from_dict({"x": [1, 2, 3], "label": [1, 0, 0]})

    def make(part: Dataset) -> None:
        features.cached_map(DatasetDict(test=part), lambda batch: {"y": batch["x"]}, tmp_path / "tokens")

    make(reversed_labels)
    with pytest.raises(InputError, match=r"test\.arrow has other labels than its rows: delete .*tokens"):
        make(rows)
