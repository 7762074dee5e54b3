"""A probe that has converged: logistic regression on what a frozen encoder gives, without steps or learning rates.

Table 4's probe trains its head for a fixed number of steps, so that it also measures how fast a head learns. This one
measures what the features hold. Used by train.py, --tuning probe_converged.
"""

import warnings
from collections.abc import Callable

import datasets
import numpy as np
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from transformers import PreTrainedModel

import unpad
from common import InputError, explain

FOLDS = 5


def layer_reader(reads: str, every_layer: bool) -> Callable:
    """For `features.Encoder.outputs`: a column for each layer's output, `layer_0` the embeddings, or the last alone.

    `reads` is what is taken of it: cls, mean (of the other tokens), or pooler (what the model's pooler gives).
    """

    def read(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = model.base_model(**batch, output_hidden_states=True)
        last = len(output.hidden_states) - 1
        if reads == "pooler":
            return {f"layer_{last}": output.pooler_output}
        take, mask = {"cls": unpad.first_token, "mean": unpad.mean_of_others}[reads], batch["attention_mask"]
        layers = range(last + 1) if every_layer else [last]
        return {f"layer_{k}": take(output.hidden_states[k], mask) for k in layers}

    return read


def fit(features: np.ndarray, labels: np.ndarray) -> Pipeline:
    """Logistic regression on standardised features, its C by 5-fold cross-validation on these (train) rows alone.

    Ten values of C from 1e-4 to 1e4, stratified folds, the log-likelihood of the left-out fold. Raises InputError where
    a class has fewer rows than there are folds, or the solver does not converge.
    """
    if (fewest := np.bincount(labels).min()) < FOLDS:
        raise InputError(f"a class has {fewest} train rows: a converged probe needs {FOLDS} or more of each")
    values = np.logspace(-4, 4, 10)
    options = {"cv": FOLDS, "scoring": "neg_log_loss", "max_iter": 100_000, "l1_ratios": (0,)}
    probe = make_pipeline(StandardScaler(), LogisticRegressionCV(Cs=values, use_legacy_attributes=False, **options))
    with warnings.catch_warnings(), explain("the probe has not converged", ConvergenceWarning):
        warnings.simplefilter("error", ConvergenceWarning)
        return probe.fit(features.astype(np.float64), labels)


def fit_layers(features: datasets.DatasetDict) -> tuple[np.ndarray, list[dict]]:
    """The predicted class of each test row by each column's probe, shape (rows, columns), and a row for each column:
    `layer`, `C`, and the log loss on train and test rows."""
    guesses, rows = [], []
    parts = {part: split.with_format("numpy") for part, split in features.items()}
    labels = {part: split["label"][:] for part, split in parts.items()}
    for column in (name for name in features["test"].column_names if name.startswith("layer_")):
        values = {part: split[column][:] for part, split in parts.items()}
        probe = fit(values["train"], labels["train"])
        losses = {
            f"{part}_loss": log_loss(labels[part], probe.predict_proba(values[part]), labels=probe.classes_)
            for part in ("train", "test")
        }
        guesses.append(probe.predict(values["test"]))
        rows.append({"layer": int(column.removeprefix("layer_")), "C": float(probe[-1].C_), **losses})
    return np.column_stack(guesses), rows
