"""A probe that has converged: logistic regression on what a frozen encoder gives, without steps or learning rates.

Table 4's probe trains its head for a fixed number of steps, so that it also measures how fast a head learns. This one
measures what the features hold. Used by train.py, --tuning probe_converged.
"""

import warnings
from collections.abc import Callable

import datasets
import numpy as np
import pandas as pd
import torch
from sklearn.exceptions import ConvergenceWarning
from sklearn.linear_model import LogisticRegressionCV
from sklearn.metrics import log_loss
from sklearn.pipeline import Pipeline, make_pipeline
from sklearn.preprocessing import StandardScaler
from threadpoolctl import threadpool_limits
from transformers import PreTrainedModel

import stats
import unpad
from common import InputError, explain

FOLDS = 5


def layer_reader(reads: str, every_layer: bool) -> Callable:
    """For `features.Encoder.outputs`: a column for each layer's output, `layer_0` the embeddings, or the last alone.

    `reads` is what is taken of it: cls, mean (of the other tokens), last (the last token), or pooler (what the model's
    pooler gives).
    """

    def read(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = model.base_model(**batch, output_hidden_states=True)
        last = len(output.hidden_states) - 1
        if reads == "pooler":
            return {f"layer_{last}": output.pooler_output}
        take = {"cls": unpad.first_token, "mean": unpad.mean_of_others, "last": unpad.last_token}[reads]
        mask = batch["attention_mask"]
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
    one_thread = threadpool_limits(1)  # several threads wait for each other: 13 times as slow
    with one_thread, warnings.catch_warnings(), explain("the probe has not converged", ConvergenceWarning):
        warnings.simplefilter("error", ConvergenceWarning)
        return probe.fit(features.astype(np.float64), labels)


def evaluate(train: datasets.Dataset, test: datasets.Dataset, half: np.ndarray) -> tuple[pd.DataFrame, np.ndarray]:
    """A row for each column `layer_<number>`, fitted to the train rows and read on the test rows, and the last one's
    predictions, shape (test rows,).

    `layer`, `C`, the log loss on train and test, and the scores of `stats.score_epochs`; `half` is of the test rows.
    """
    train, test = (rows.with_format("numpy") for rows in (train, test))
    labels, rows, guesses = (train["label"][:], test["label"][:]), [], []
    for column in (name for name in test.column_names if name.startswith("layer_")):
        values = train[column][:], test[column][:]
        fitted = fit(values[0], labels[0])
        losses = [
            log_loss(true, fitted.predict_proba(x), labels=fitted.classes_)
            for x, true in zip(values, labels, strict=True)
        ]
        guesses.append(fitted.predict(values[1]))
        row = {"layer": int(column.removeprefix("layer_")), "C": fitted[-1].C_}
        rows.append(row | dict(zip(("train_loss", "eval_loss"), losses, strict=True)))
    scores = stats.score_epochs(labels[1], np.column_stack(guesses), half, len(fitted.classes_))
    return pd.DataFrame(rows).join(scores), guesses[-1]
