"""Look inside recovered models: is each the same model again, or another one that also works?

    python analyse.py                                    # after python grid.py --preset inside: every run not yet read
    python analyse.py outputs/runs/RUN_A outputs/runs/RUN_B --keep      # RUN_B, and others after it, against RUN_A

Reads runs that kept their weights (train.py --save_states). Each is compared with the uncorrupted run of its own seed
and settings, an uncorrupted one with that of the seed before. What comes out stands in the run's folder, in `inside`,
and together in the output folder, beside the names of the runs: `inside_similarity.csv`, debiased linear CKA of each
layer of one with each of the other; `inside_barrier.csv`, the test loss at 21 points on the straight line between the
two; `inside_distance.csv`, for each corrupted tensor whether it went back to where it was; `inside_layers.csv`, a
converged probe on each layer's output, before recovery and after. docs/lab.md defines them. Then the weights that were
kept for this are deleted, unless there is --keep.
"""

import shlex
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import NamedTuple

import datasets
import joblib
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch.utils.data import DataLoader
from transformers import DataCollatorWithPadding, PreTrainedModel

import config
import data_prep
import features
import probe
import resolve
import run_dir
import stats
import train
import unpad
from common import (
    USER_ERRORS,
    InputError,
    explain,
    fail,
    make_parser,
    one_line,
    run_script,
    sha256_of,
    write_together,
)
from config import NEUTRAL_VALUES, Run, RunConfig
from prepared_run import load_model, load_rows

POINTS = 21  # of the line between two models
BATCH = 64
Weights = dict[str, torch.Tensor]


# ---- The measures ----


def hsic(x: np.ndarray, y: np.ndarray) -> float:
    """The unbiased estimator HSIC1 (Song et al. 2012) of two linear kernels; x (n, d), y (n, e), the same n > 3 rows.

    It goes by the features, so that its memory grows with n (d + e) and not with the n x n kernels.
    """
    n, own_x, own_y = len(x), (x**2).sum(1), (y**2).sum(1)  # the kernels' diagonals, which it leaves out
    rows_x, rows_y = x @ x.sum(0) - own_x, y @ y.sum(0) - own_y
    trace = ((x.T @ y) ** 2).sum() - own_x @ own_y
    return (trace + rows_x.sum() * rows_y.sum() / ((n - 1) * (n - 2)) - 2 / (n - 2) * rows_x @ rows_y) / (n * (n - 3))


def similarity(x: np.ndarray, y: np.ndarray) -> float:
    """Debiased linear CKA of two layers' outputs of the same rows: 1 up to rotation and scale, about 0 if they have
    nothing in common; NaN where one is the same for all rows."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    if any(np.ptp(values, axis=0).max() <= 1e-6 * np.abs(values).max() for values in (x, y)):
        return np.nan
    x, y = x - x.mean(0), y - y.mean(0)
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def distance(original: torch.Tensor, corrupted: torch.Tensor, recovered: torch.Tensor) -> dict[str, float]:
    """Whether a tensor went home: |recovered - original| / |corrupted - original|, the cosine of its step with the way
    home, and the length of that step over that of the way; NaN where it cannot be told (Frobenius, float64)."""
    home = original.double().flatten() - corrupted.double().flatten()
    step = recovered.double().flatten() - corrupted.double().flatten()
    far, moved = home.norm().item(), step.norm().item()
    cosine = (home @ step).item() / (far * moved) if far and moved else np.nan
    left, moved = ((home - step).norm().item() / far, moved / far) if far else (np.nan, np.nan)
    return {"distance": left, "cosine": cosine, "moved": moved}


def line_between(first: Weights, second: Weights, loss: Callable[[Weights], float]) -> pd.DataFrame:
    """The loss at 21 points (1 - a) first + a second, and how far it lies above the straight line between its ends.

    The largest `above` is the barrier: 0 where the two lie in one valley, without a hill between them.
    """
    at = np.linspace(0, 1, POINTS)
    losses = np.array([loss({name: torch.lerp(first[name], second[name], float(a)) for name in first}) for a in at])
    return pd.DataFrame({"a": at, "loss": losses, "above": losses - (1 - at) * losses[0] - at * losses[-1]})


# ---- The runs ----


class Subject(NamedTuple):
    """A run that kept its weights."""

    run: Run
    result: dict
    weights: Path  # the folder of the saved model


def read_subject(folder: Path) -> Subject:
    """Raises InputError for what is not a run, kept no weights, or was made from a model or rows that are gone."""
    try:
        result = run_dir.read_result(folder)
        flags = shlex.split(result["command"].partition("train.py")[2])
        run = resolve.resolve_run(RunConfig(**config.parse_flags(config.run_parser(__doc__), flags)), prepare=False)
    except run_dir.UNREADABLE as error:
        raise InputError(f"{folder} is not a run that can be read: {one_line(error)}") from error
    if run is None:
        raise InputError(
            f"{folder} was made from rows that are not prepared now: run data_prep.py, or {result['command']}"
        )
    for name, value in result["settings"].items():
        if run.settings.get(name) != value:
            raise InputError(
                f"{folder} was made with another {name} than there is now: prepare the rows or do it again"
            )
    saved = [folder / name for name in ("states", "model") if (folder / name / "config.json").exists()]
    if not saved or (run.config.corrupt_after and saved[0].name == "model"):
        raise InputError(f"{folder} has no saved states: delete it and do the run again with --save_states True")
    for name, expected in (result["files"] | result.get("states", {})).items():
        with explain(f"{folder / name} cannot be read", OSError):
            if name.startswith(f"{saved[0].name}/") and sha256_of(folder / name) != expected["sha256"]:
                raise InputError(f"{folder / name} is not what the run wrote: delete {folder} and do the run again")
    return Subject(replace(run, config=replace(run.config, output_dir=str(folder.parent.parent))), result, saved[0])


def check_pair(first: Subject, second: Subject) -> None:
    """Raises InputError unless the two read the same rows, as the same model does."""
    for name in ("model", "model_fingerprint", "dataset", "data_fingerprint", "max_length", "pooling"):
        values = [subject.run.settings[name] for subject in (first, second)]
        if values[0] != values[1]:
            runs = f"{first.run.name} and {second.run.name}"
            raise InputError(f"{name} is {values[0]} and {values[1]} in {runs}: compare runs that share it")


def find_partner(subject: Subject, subjects: list[Subject]) -> Subject | None:
    """The uncorrupted run of the subject's own settings; if it is that one, the uncorrupted run of the seed before."""
    names = ("kaiming_a", "corrupt_seed", *config.OF_CORRUPTION)
    same = subject.run.settings | {"side": "none", "percent": 0.0} | {name: NEUTRAL_VALUES[name] for name in names}
    there, wanted = {other.run.name: other for other in subjects}, [same]
    if subject.run.settings["side"] == "none":
        seeds = sorted({other.run.settings["seed"] for other in subjects}, reverse=True)
        wanted = [same | {"seed": seed} for seed in seeds if seed < same["seed"]]
    return next((there[name] for name in map(config.run_name, wanted) if name in there), None)


# ---- One run ----


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: DataLoader) -> float:
    """The mean cross-entropy of the rows; a model that was loaded is in evaluation mode, without dropout."""
    losses = [(model(**batch.to(model.device)).loss.item(), len(batch["labels"])) for batch in rows]
    return sum(loss * size for loss, size in losses) / sum(size for _, size in losses)


def copy_weights(model: PreTrainedModel) -> Weights:
    return {name: values.detach().cpu().clone() for name, values in model.state_dict().items()}


def analyse(subject: Subject, partner: Subject | None, cache: Path) -> dict[str, pd.DataFrame]:
    """The frames of a run, by the name of their file; `summary` has one row. Memory for one run and its partner."""
    run, device = subject.run, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data_prep.load(run.config.dataset, run.config.data_dir, run.data["fingerprint"])
    tokens, tokenizer, order, _ = load_rows(run, data)

    def read_layers(of: Subject, state: str, model: PreTrainedModel) -> datasets.DatasetDict:
        folder = cache / features.key_of({"run": of.result["sha256"], "state": state})
        encoder = features.Encoder(model, tokenizer, device, None, folder, BATCH)
        return encoder.outputs(tokens, probe.layer_reader(run.config.pooling, every_layer=True))

    # before recovery: the corrupted model, drawn again, of the pre-trained one or of the one that was fine-tuned
    fine_tuned = load_file(subject.weights / "before.safetensors") if run.config.corrupt_after else None
    healthy = replace(run, config=run.config.without_corruption())
    original = fine_tuned or copy_weights(load_model(healthy, data)[0])
    model, manifest = load_model(run, data, fine_tuned)
    if manifest["tensors"] != subject.result["corruption"]["tensors"]:
        raise InputError(f"{run.folder} was corrupted otherwise than this code does: delete it and do the run again")
    corrupted, before = copy_weights(model), read_layers(subject, "before", model)
    model = unpad.load_saved(subject.weights)
    recovered, after = copy_weights(model), read_layers(subject, "after", model)

    frames, summary = {}, {}
    test = data["test"].to_pandas()
    half = stats.split_halves(test["label"], test.get("group"))[order]
    try:
        states = {"before": before, "after": after}
        with joblib.parallel_config(n_jobs=torch.get_num_threads()):
            fitted = {name: probe.evaluate(state["train"], state["test"], half)[0] for name, state in states.items()}
        frames["layers"] = pd.concat(fitted, names=["state"]).reset_index("state")
        summary |= {f"probe_{name}": 100 * layers["weighted_f1"].iloc[-1] for name, layers in fitted.items()}
    except InputError as error:
        print(f"{run.name}: no probes: {one_line(error)}", file=sys.stderr)
    tensors = {f"{model.base_model_prefix}.{row['name']}": row for row in manifest["tensors"]}
    if there := [name for name in tensors if name in recovered]:  # --method drop takes them out
        rows = [
            {part: tensors[name][part] for part in ("name", "layer", "part")}
            | distance(original[name], corrupted[name], recovered[name])
            for name in there
        ]
        frames["distance"] = pd.DataFrame(rows)
        of_all = (torch.cat([state[name].flatten() for name in there]) for state in (original, corrupted, recovered))
        summary |= distance(*of_all)
    if partner:
        model_of_partner = unpad.load_saved(partner.weights)
        theirs = copy_weights(model_of_partner)
        first, second = read_layers(partner, "after", model_of_partner)["test"], after["test"]
        layers = [[name for name in rows.column_names if name.startswith("layer_")] for rows in (first, second)]
        frames["similarity"] = pd.DataFrame(
            {
                "layer_against": int(i[6:]),
                "layer": int(j[6:]),
                "cka": similarity(first[i][:].numpy(), second[j][:].numpy()),
            }
            for i, j in product(*layers)
        )
        summary["cka"] = frames["similarity"]["cka"].iloc[-1]  # of the last layers
        if theirs.keys() == recovered.keys():
            rows = tokens["test"].remove_columns("length")
            batches = DataLoader(rows, BATCH, collate_fn=DataCollatorWithPadding(tokenizer))

            def loss_of(weights: Weights) -> float:
                model.load_state_dict(weights)
                return mean_loss(model, batches)

            frames["barrier"] = line_between(theirs, recovered, loss_of)
            summary["barrier"] = frames["barrier"]["above"].max()
    names = {"run": run.name, "against": partner.run.name if partner else ""}
    return {kind: frame.assign(**names) for kind, frame in (frames | {"summary": pd.DataFrame([summary])}).items()}


def write_inside(folder: Path, frames: dict[str, pd.DataFrame]) -> None:
    """Put the frames into the run's folder, all or none."""
    aside = folder / ".inside.partial"
    for old in (aside, folder / "inside"):
        shutil.rmtree(old, ignore_errors=True)
    aside.mkdir()
    for kind, frame in frames.items():
        frame.to_csv(aside / f"{kind}.csv", index=False)
    aside.rename(folder / "inside")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs, the others against the first")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    parser.add_argument("--keep", action="store_true", help="keep the weights, as those of named runs are")
    args = parser.parse_args()
    train.silence_libraries()
    output_dir, cache = args.output_dir, args.output_dir / "unfinished" / "inside"
    try:
        waiting, folders = [], args.runs or [path.parent for path in sorted(output_dir.glob("runs/*/states"))]
        subjects = [read_subject(folder) for folder in folders]
        if args.runs:
            todo = [(other, subjects[0]) for other in subjects[1:]]
            output_dir = Path(subjects[-1].run.config.output_dir)
        else:
            new = [subject for subject in subjects if not (subject.run.folder / "inside").exists()]
            pairs = [(subject, find_partner(subject, subjects)) for subject in new]
            todo = [(one, partner) for one, partner in pairs if partner or one.run.settings["side"] == "none"]
            waiting = [one.run.name for one, partner in pairs if not partner and one.run.settings["side"] != "none"]
        for subject, partner in todo if args.runs else ():
            check_pair(partner, subject)
        if not todo and not waiting and (args.runs or not any(output_dir.glob("runs/*/inside"))):
            raise InputError("no two runs with saved states: run python grid.py --preset inside, or name two or more")
        for number, (subject, partner) in enumerate(todo, 1):
            against = f"against {partner.run.name}" if partner else "alone: no other uncorrupted run kept its weights"
            print(f"[{number} of {len(todo)}] {subject.run.name} {against}", flush=True)
            write_inside(subject.run.folder, analyse(subject, partner, cache))
        found: dict[str, list[pd.DataFrame]] = {}
        for path in sorted(output_dir.glob("runs/*/inside/*.csv")):
            advice = f"delete {path.parent.parent}, and do the run again with --save_states"
            with explain(f"{path} cannot be read, {advice}", OSError, ValueError, KeyError):
                frame = pd.read_csv(path, dtype=str)
                if set(frame["run"]) != {path.parent.parent.name}:
                    raise ValueError("it is of another run")
                found.setdefault(f"inside_{path.name}", []).append(frame)
        write_together(output_dir, "analyse", {name: pd.concat(of).to_csv(index=False) for name, of in found.items()})
        if not args.keep:
            read = () if args.runs or waiting else subjects  # others may need what these have
            shutil.rmtree(cache, ignore_errors=True)
            for subject in read:  # whole: an end in between leaves no half of them
                cache.mkdir(parents=True, exist_ok=True)
                shutil.move(subject.run.folder / "states", cache / subject.run.name)
            shutil.rmtree(cache, ignore_errors=True)
    except USER_ERRORS as error:
        fail(error)
    except KeyboardInterrupt:
        print("interrupted: the same command goes on with the runs that it has not read", file=sys.stderr)
        sys.exit(130)
    print(f"-> {', '.join(str(output_dir / name) for name in found)}")
    for name in waiting:
        print(
            f"{name} was not read: its uncorrupted run kept no weights; do that again, with --save_states",
            file=sys.stderr,
        )
    if waiting:
        sys.exit(1)


if __name__ == "__main__":
    run_script(main)
