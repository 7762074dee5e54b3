"""Weighted F1 against scikit-learn, a hand-computed case, and the paper's own outliers."""

import evaluate
import numpy as np
import pytest
from sklearn.metrics import accuracy_score, f1_score

import prepared_run


def scores(predictions: list[int], references: list[int]) -> dict[str, float]:
    return evaluate.load(str(prepared_run.METRIC), keep_in_memory=True).compute(
        predictions=predictions, references=references
    )


# Class 0: precision 1/2, recall 1, F1 2/3, weight 1/4. Class 1: 1, 1/3, 1/2, weight 3/4. A class nobody has: no weight.
def test_by_hand() -> None:
    assert scores([0, 0, 2, 1], [0, 1, 1, 1]) == pytest.approx({"weighted_f1": 13 / 24, "accuracy": 1 / 2})


@pytest.mark.parametrize("classes", [2, 5, 20])
def test_against_scikit_learn(classes: int) -> None:
    references, predictions = np.random.default_rng(classes).integers(classes, size=(2, 400))
    expected = {
        "weighted_f1": f1_score(references, predictions, average="weighted", zero_division=0),
        "accuracy": accuracy_score(references, predictions),
    }
    assert scores(predictions, references) == pytest.approx(expected, abs=1e-15)


# A constant prediction of a class of share p scores 2p^2/(1+p). The paper's collapsed runs are just that: 33.97 on
# IMDB at p = 0.506, and 16.98 on Emotion at p = 0.337.
@pytest.mark.parametrize(("share", "paper"), [(0.506, 33.97), (0.337, 16.98)])
def test_constant_prediction(share: float, paper: float) -> None:
    ones = round(1000 * share)
    f1 = scores([1] * 1000, [1] * ones + [0] * (1000 - ones))["weighted_f1"]
    assert f1 == pytest.approx(2 * share**2 / (1 + share))
    assert 100 * f1 == pytest.approx(paper, abs=0.06)
