"""What a grid costs: counted by hand, and the prediction's parts against sums by hand."""

import math
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pandas as pd
import pytest
import torch
from test_results import RESULTS
from transformers import BertConfig

import common
import corrupt
import cost
import data_prep
import models
import places
import prepared_run
from config import NEUTRAL_VALUES, RESULTS_VERSION, RunConfig, run_name

WEIGHTS = 6 * (12 * 384**2 + 13 * 384)  # of minilm's layers


@pytest.fixture
def rte(tmp_path: Path) -> RunConfig:
    """2,490 and 277 rows of at most 64 tokens, as the set is not prepared; ten epochs of 78 steps."""
    return RunConfig(model="minilm", dataset="rte", data_dir=str(tmp_path), output_dir=str(tmp_path))


# The layers' weights and biases are those of the library's models.
@pytest.mark.parametrize(("model", "expected"), [("bert-base-uncased", 85_054_464), ("minilm", WEIGHTS)])
def test_weights(model: str, expected: int) -> None:
    assert cost.encoder_weights(model) == expected
    if model == "minilm":
        loaded, _ = corrupt.load_corrupted(models.find_model(model)[0], corrupt.UNCORRUPTED, seed=0)
        assert expected == sum(weight.numel() for weight in places.encoder_layers(loaded).parameters())


# A step counts three times, an evaluation once; half an epoch is evaluated, too; a probe's encoder reads all rows once.
def test_passes(rte: RunConfig) -> None:
    train, test = cost.count_tokens("rte", rte.data_dir, 64)
    assert (train, test) == (2_490 * 64, 277 * 64)
    assert cost.passes(rte, (train, test)) == 3 * 10 * train + 10 * test
    assert cost.passes(replace(rte, max_steps=39), (train, test)) == 3 * train / 2 + test
    assert cost.passes(replace(rte, tuning="probe"), (train, test)) == train + test
    assert cost.relative_cost(rte) == (3 * 10 * 2_490 + 10 * 277) * WEIGHTS


# Of a prepared set the tokens are those that the tokenizer makes of each text, at most 16; no warnings.
def test_tokens(small_data: Path, caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = models.load_tokenizer(models.find_model("minilm")[0])
    data = data_prep.load("rotten_tomatoes", small_data)
    by_text = [sum(min(len(tokenizer(text).input_ids), 16) for text in part["text"]) for part in data.values()]
    assert cost.count_tokens("rotten_tomatoes", str(small_data), 16) == tuple(by_text)
    cost.count_tokens("bbc_news", str(small_data), 16)
    assert "longer than" not in caplog.text


def finish(run: RunConfig, seed: int, seconds: float, device: dict | None = None, **settings: object) -> None:
    """Leave the result of a run of two epochs over 100 and 40 tokens."""
    cell = {"model": run.model, "side": "none", "percent": 0.0, "dataset": run.dataset, "seed": seed}
    prints = {"results_version": RESULTS_VERSION, "model_fingerprint": "a", "data_fingerprint": "b"}
    kept = NEUTRAL_VALUES | cell | prints | {"num_train_epochs": 2.0} | settings
    tokens = {"tokens": {"train": 100, "test": 40}}
    folder = Path(run.output_dir) / "runs" / run_name(kept)
    folder.mkdir(parents=True)
    device = device or prepared_run.device_of("cpu")
    result = {
        "settings": kept,
        "data": tokens,
        "epochs": math.ceil(kept["num_train_epochs"]),
        "seconds": {"total": seconds},
        "device": device,
    }
    common.write_signed(folder / "result.json", result)


# A run's fixed second is left out; of several the median counts. Runs that were cut short, and what cannot be read, are
# passed over, and runs on another device. Full: 2 (3 x 100 + 40) = 680 tokens, half an epoch 3 x 50 + 40 = 190; a
# probe's encoder reads 140, in the first run of three, which cost 0.03 s a token together.
def test_speed_of_finished_runs(rte: RunConfig) -> None:
    for seed, (epochs, seconds) in enumerate(((2.0, 1 + 680 * 0.01), (0.5, 1 + 190 * 0.02), (2.0, 1 + 680 * 0.09))):
        finish(rte, seed, seconds, num_train_epochs=epochs)
    for seed, share in enumerate((0.08, 0.005, 0.005), 3):
        finish(rte, seed, 1 + 140 * share, tuning="probe")
    finish(rte, 6, 1 + 680 * 9, prepared_run.device_of("cpu") | {"threads": 64})
    finish(rte, 7, 1 + 680, max_steps=1)
    finish(rte, 8, 1, bf16=["a list"])
    for name, text in (("half", '{"settings": {"mod'), ("other", "[]"), ("empty", "{}"), ("deep", "[" * 100_000)):
        (Path(rte.output_dir) / "runs" / name).mkdir()
        (Path(rte.output_dir) / "runs" / name / "result.json").write_text(text)
    rates = cost.finished_rates(Path(rte.output_dir), prepared_run.device_of("cpu"))
    assert rates == {("minilm", "full", False): pytest.approx(0.02), ("minilm", "probe", False): pytest.approx(0.03)}


# Three runs of 4,958,080 passes at a millisecond, and a second each, on two processes: 7,438.6 s; one alone 4,959.1 s.
# What has not been run is timed. In bf16 half of that if steps take half as long, a fifth if runs did.
def test_prediction(rte: RunConfig, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    finish(rte, "a", 1 + 680 * 0.001)
    monkeypatch.setattr(cost, "time_step", lambda run: cost.StepTime(0.004 if run.bf16 else 0.008, False, 0.0))
    threads = torch.get_num_threads()
    assert cost.predict([replace(rte, seed=seed) for seed in range(3)], 2, threads) == (
        "to do: 14.87 million tokens forward (a step counts three times), 3.2e+14 floating-point operations in the "
        "encoders: about 2.1 hours, by finished runs; with --bf16 True about 62.0 minutes"
    )
    assert "about 82.7 minutes" in cost.predict([rte], 2, threads)
    finish(rte, "b", 1 + 680 * 0.0002, bf16=True)
    assert cost.predict([rte], 2, threads).endswith(
        "82.7 minutes, by finished runs; with --bf16 True about 16.5 minutes"
    )
    assert cost.predict([replace(rte, bf16=True)], 2, threads).endswith("about 16.5 minutes, by finished runs")
    both = cost.predict([replace(rte, model=str(tiny_bert), max_length=16), rte], 2, threads)
    assert "by finished runs and steps timed here; with" in both


# Also with a vocabulary of ten words, and where --max_length, which no run has checked yet, is more than can be read.
def test_steps_are_timed(rte: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
    shape = BertConfig(vocab_size=10, max_position_embeddings=20, **sizes)
    monkeypatch.setattr(cost, "shape_of", lambda model: shape)
    took = cost.time_step(rte)
    assert took.token > 0 and took.optimizer > 0 and not took.pads


# No real run took more than is said, and the largest not much less.
def test_memory() -> None:
    runs = pd.concat(pd.read_csv(path) for path in RESULTS.glob("*/results.csv"))
    held = runs.loc[runs["model"] == "minilm", "peak_memory_gb"].max()
    assert held < cost.memory(RunConfig(model="minilm")) / 1e9 < 1.2 * held


# 0.01 s for a token, 0.6 for a step of the optimizer. A batch of 4, 2, 2 and 2 tokens: 16 with padding, 10 without. Two
# epochs of one step: 2 (3 x 10 + 5) = 70 passes; two runs in one with --corrupt_after. A probe has neither.
def test_padding_and_the_optimizer(rte: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cost, "row_lengths", lambda *_: ([4, 2, 2, 2], [5]))
    monkeypatch.setattr(cost, "count_rows", lambda *_: (4, 1))
    run, took = replace(rte, num_train_epochs=2.0, per_device_train_batch_size=4), cost.StepTime(0.01, True, 0.6)
    assert cost.rate_of(run, took) == pytest.approx(0.01 * 1.6 + 0.6 * 2 / 70)
    twice = replace(run, corrupt="bottom", frac=Fraction(1, 2), corrupt_after=True)
    assert cost.rate_of(twice, took) == pytest.approx(0.01 * 1.6 + 0.6 * 4 / 140)
    assert cost.rate_of(run, took._replace(pads=False)) == pytest.approx(0.01 + 0.6 * 2 / 70)
    assert cost.rate_of(replace(run, tuning="probe"), took) == 0.01
    halved = replace(run, per_device_train_batch_size=1, max_steps=4, trainer={"gradient_accumulation_steps": 2})
    assert cost.epochs_of(halved) == (2, 2)
