"""What a grid costs: counted by hand, and the prediction's parts against sums by hand."""

from pathlib import Path

import pytest

import corrupt
import cost
import data_prep

WEIGHTS = 6 * (12 * 384**2 + 13 * 384)  # of minilm's layers


# The layers' weights and biases are those of the library's models.
@pytest.mark.parametrize(("model", "expected"), [("bert-base-uncased", 85_054_464), ("minilm", WEIGHTS)])
def test_weights(model: str, expected: int) -> None:
    assert cost.weights_of(model) == expected
    if model == "minilm":
        loaded, _ = corrupt.load_broken(corrupt.find_model(model)[0], "none", None, seed=0)
        assert expected == sum(weight.numel() for weight in corrupt.encoder_layers(loaded).parameters())


# RTE, not prepared: 2,490 and 277 rows of at most 64 tokens. Three learning rates of ten epochs, 78 steps and 5 test
# batches each; 6 operations a weight and token in training, 2 in testing; a probe's encoder reads all rows once.
def test_work_of_a_cell(tmp_path: Path) -> None:
    flags = ["--model", "minilm", "--dataset", "rte", "--data_dir", str(tmp_path), "--learning_rate"]
    cell = [[*flags, rate] for rate in ("1e-5", "2e-5", "5e-5")]
    work = cost.work(cell)
    trained, evaluated = 3 * 10 * 2_490 * 64, 3 * 10 * 277 * 64
    assert work == (3, 3 * 780, trained, 3 * 10 * 5, evaluated, WEIGHTS, False)
    assert work.operations == WEIGHTS * (6 * trained + 2 * evaluated)
    probe = cost.work([[*flags, "--tuning", "probe"] for flags in cell])
    assert probe == (3, 3 * 780, 0, 3 * 10 * 5, 2_767 * 64, WEIGHTS, True)
    assert probe.operations == 2 * WEIGHTS * 2_767 * 64
    assert cost.work([[*cell[0], "--save_vectors"]]).evaluated == 11 * 277 * 64  # once more, to keep the vectors
    assert cost.work([[*cell[0], "--max_steps", "39"]]).trained == 2_490 * 64 / 2


# Of a prepared set the tokens are those that the tokenizer makes of each text, at most 16.
def test_tokens(small_data: Path) -> None:
    tokenizer = corrupt.load_tokenizer(corrupt.find_model("minilm")[0])
    data = data_prep.load("rotten_tomatoes", small_data)
    by_text = [sum(min(len(tokenizer(text).input_ids), 16) for text in part["text"]) for part in data.values()]
    assert cost.tokens("rotten_tomatoes", str(small_data), 16) == tuple(by_text)


# Two runs of 100 tokens in training and 10 in testing, then the same as a probe; five cells on two workers.
def test_prediction_by_hand() -> None:
    speed = cost.Speed(train_step=0.5, train_token=0.01, test_batch=0.25, test_token=0.001)
    overhead = cost.Overhead(run=1.0, step=0.1, batch=0.2)
    full = cost.Work(2, 4, 100, 3, 10, WEIGHTS, head_alone=False)
    assert cost.seconds(full, speed, overhead) == pytest.approx(2 + 4 * 0.6 + 1.0 + 3 * 0.45 + 0.01)
    probe = full._replace(trained=0, head_alone=True)
    assert cost.seconds(probe, speed, overhead) == pytest.approx(2 + 4 * 0.1 + 3 * 0.2 + 0.01)
    assert cost.makespan([5, 4, 3, 3, 1], 2) == 8  # 5 3; 4 3 1
    assert cost.makespan([5, 4], 3) == 5
