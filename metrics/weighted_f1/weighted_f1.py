"""Weighted F1 (the paper's measure) and accuracy, as an `evaluate` module that needs no hub.

evaluate.load("metrics/weighted_f1").compute(predictions=[0, 1], references=[0, 0])
"""

import datasets  # one import a line: evaluate's loader reads these lines itself
import evaluate
from sklearn.metrics import accuracy_score, f1_score


class WeightedF1(evaluate.Metric):
    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="F1 of each class, averaged with the classes' numbers of references as weights.",
            citation="",
            inputs_description="predictions, references: integer labels of shape (examples,)",
            features=datasets.Features({"predictions": datasets.Value("int64"), "references": datasets.Value("int64")}),
        )

    def _compute(self, predictions: list[int], references: list[int]) -> dict[str, float]:
        """Both from 0 to 1. A class that is never predicted has an F1 of 0."""
        return {
            "weighted_f1": float(f1_score(references, predictions, average="weighted", zero_division=0)),
            "accuracy": float(accuracy_score(references, predictions)),
        }
