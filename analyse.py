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
from pathlib import Path
from typing import NamedTuple

import datasets
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
from common import USER_ERRORS, InputError, atomic_write, fail, make_parser, one_line, run_script
from config import Run, RunConfig

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
    x, y = (values.astype(np.float64) - values.astype(np.float64).mean(0) for values in (x, y))
    if min(np.abs(x).max(), np.abs(y).max()) < 1e-6:
        return np.nan
    return hsic(x, y) / np.sqrt(hsic(x, x) * hsic(y, y))


def distance(original: torch.Tensor, corrupted: torch.Tensor, recovered: torch.Tensor) -> dict[str, float]:
    """Whether a tensor went home: |recovered - original| / |corrupted - original|, and the cosine of its step with the
    way home, both NaN where it cannot be told (Frobenius, float64)."""
    home = original.double().flatten() - corrupted.double().flatten()
    step = recovered.double().flatten() - corrupted.double().flatten()
    far, moved = home.norm().item(), step.norm().item()
    left = (home - step).norm().item() / far if far else np.nan
    return {"distance": left, "cosine": (home @ step).item() / (far * moved) if far and moved else np.nan}


def line_between(first: Weights, second: Weights, loss: Callable[[Weights], float]) -> pd.DataFrame:
    """The loss at 21 points (1 - a) first + a second, and how far it lies above the straight line between its ends.

    The largest `above` is the barrier: 0 where the two lie in one valley, and the loss has no hill between them.
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

    @property
    def settings(self) -> dict:
        return self.run.settings


def read_subject(folder: Path) -> Subject:
    """Raises InputError for what is not a run, kept no weights, or was made from a model or rows that are gone."""
    try:
        result = run_dir.read_result(folder)
        flags = shlex.split(result["command"].partition("train.py")[2])
        run = resolve.resolve_run(RunConfig(**config.parse_flags(config.run_parser(__doc__), flags)), prepare=False)
    except run_dir.UNREADABLE as error:
        raise InputError(f"{folder} is not a run that can be read: {one_line(error)}") from error
    differ = [name for name, value in result["settings"].items() if run is None or run.settings.get(name) != value]
    if differ:
        raise InputError(
            f"{folder} was made with other {differ[0]} than there is now: prepare the rows, or do it again"
        )
    saved = [folder / name for name in ("states", "model") if (folder / name / "config.json").exists()]
    if not saved or (run.config.corrupt_after and saved[0].name != "states"):
        raise InputError(f"{folder} has no saved states: do the run again with --save_states True")
    return Subject(replace(run, config=replace(run.config, output_dir=str(folder.parent.parent))), result, saved[0])


def check_pair(first: Subject, second: Subject) -> None:
    """Raises InputError unless the two read the same rows, as the same model does."""
    for name in ("model", "model_fingerprint", "dataset", "data_fingerprint", "max_length", "pooling"):
        values = [subject.settings[name] for subject in (first, second)]
        if values[0] != values[1]:
            runs = f"{first.run.name} and {second.run.name}"
            raise InputError(f"{name} is {values[0]} and {values[1]} in {runs}: compare runs that share it")


def find_partners(subjects: list[Subject]) -> list[Subject | None]:
    """What each is compared with: the uncorrupted run of its own settings, or for that one that of the seed before."""

    def shared(subject: Subject, *but: str) -> dict:
        apart = {"side", "frac", "percent", "kaiming_a", "corrupt_seed", *config.OF_CORRUPTION, *but}
        return {name: value for name, value in subject.settings.items() if name not in apart}

    plain = sorted((s for s in subjects if s.settings["side"] == "none"), key=lambda s: s.settings["seed"])
    partners = []
    for subject in subjects:
        same = [other for other in plain if shared(other) == shared(subject)]
        if subject in plain:
            but, seed = ("seed", "head_seed", "data_seed"), subject.settings["seed"]
            alike = [other for other in plain if shared(other, *but) == shared(subject, *but)]
            same = [other for other in alike if other.settings["seed"] < seed][-1:]
        partners.append(same[0] if same else None)
    return partners


# ---- One run ----


@torch.no_grad()
def mean_loss(model: PreTrainedModel, rows: DataLoader) -> float:
    """The mean cross-entropy of the rows, without dropout."""
    total, count = 0.0, 0
    for batch in rows:
        size = len(batch["labels"])
        total += model(**batch.to(model.device)).loss.item() * size
        count += size
    return total / count


def analyse(subject: Subject, partner: Subject | None, cache: Path) -> dict[str, pd.DataFrame]:
    """The frames of a run, by the name of their file; `run` is its name, `against` its partner's."""
    run, device = subject.run, torch.device("cuda" if torch.cuda.is_available() else "cpu")
    data = data_prep.load(run.config.dataset, run.config.data_dir, run.data["fingerprint"])
    tokens, tokenizer, order, _ = train.load_rows(run, data)

    def outputs(of: Subject, state: str, model: PreTrainedModel) -> datasets.DatasetDict:
        folder = cache / features.key_of({"run": of.result["sha256"], "state": state})
        encoder = features.Encoder(model, tokenizer, device, None, folder, BATCH)
        return encoder.outputs(tokens, probe.layer_reader(run.config.pooling, every_layer=True))

    # before recovery: the corrupted model, drawn again, of the pre-trained one or of the one fine-tuned before
    before = load_file(subject.weights / "before.safetensors") if run.config.corrupt_after else None
    uncorrupted = replace(run, config=run.config.without_corruption())
    original = before or train.load_model(uncorrupted, data)[0].state_dict()
    model, manifest = train.load_model(run, data, before)
    corrupted = {name: values.clone() for name, values in model.state_dict().items()}
    states = {"before": outputs(subject, "before", model)}
    model = unpad.load_saved(subject.weights)
    recovered = {name: values.clone() for name, values in model.state_dict().items()}
    states["after"] = outputs(subject, "after", model)

    frames, half = {}, stats.split_halves(data["test"].to_pandas()["label"], data["test"].to_pandas().get("group"))
    try:
        fitted = {state: probe.evaluate(both["train"], both["test"], half[order])[0] for state, both in states.items()}
        frames["layers"] = pd.concat(fitted, names=["state"]).reset_index("state")
    except InputError as error:
        print(f"{run.name}: no probes: {one_line(error)}", file=sys.stderr)
    names = [(f"{model.base_model_prefix}.{row['name']}", row) for row in manifest["tensors"]]
    rows = [
        {"tensor": row["name"], "layer": row["layer"], "part": row["part"]}
        | distance(original[name], corrupted[name], recovered[name])
        for name, row in names
        if name in recovered  # --method drop takes them out
    ]
    if rows:
        there = [name for name, _ in names]
        whole = (torch.cat([state[name].flatten() for name in there]) for state in (original, corrupted, recovered))
        frames["distance"] = pd.DataFrame([{"tensor": "all"} | distance(*whole), *rows]).astype({"layer": "Int64"})
    if partner:
        first, second = (
            both["test"].with_format("numpy")
            for both in (outputs(partner, "after", unpad.load_saved(partner.weights)), states["after"])
        )
        frames["similarity"] = pd.DataFrame(
            {"layer_against": int(i.removeprefix("layer_")), "layer": int(j.removeprefix("layer_"))}
            | {"cka": similarity(first[i][:], second[j][:])}
            for i in first.column_names
            if i.startswith("layer_")
            for j in second.column_names
            if j.startswith("layer_")
        )
        theirs = unpad.load_saved(partner.weights).state_dict()
        if theirs.keys() == recovered.keys():
            batches = DataLoader(
                tokens["test"].remove_columns("length"), BATCH, collate_fn=DataCollatorWithPadding(tokenizer)
            )
            model.eval().to(device)

            def loss(weights: Weights) -> float:
                model.load_state_dict(weights)
                return mean_loss(model, batches)

            frames["barrier"] = line_between(theirs, recovered, loss)
    for kind, frame in frames.items():
        frame.insert(0, "run", run.name)
        if kind in ("similarity", "barrier"):
            frame.insert(1, "against", partner.run.name)
    return frames


def write_inside(folder: Path, frames: dict[str, pd.DataFrame]) -> None:
    """Put the frames into the run's folder, all or none."""
    aside = folder / ".inside.partial"
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir()
    for kind, frame in frames.items():
        frame.to_csv(aside / f"{kind}.csv", index=False)
    shutil.rmtree(folder / "inside", ignore_errors=True)
    aside.rename(folder / "inside")


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("runs", nargs="*", type=Path, help="folders of runs: the others against the first")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs"), help="holds runs/ (default: outputs)")
    parser.add_argument("--keep", action="store_true", help="keep the weights")
    args = parser.parse_args()
    train.silence_libraries()
    output_dir, cache = args.output_dir, args.output_dir / "features" / "inside"
    try:
        if len(args.runs) == 1:
            raise InputError(f"{args.runs[0]} alone has nothing to be compared with: give two runs or more, or none")
        folders = args.runs or [path.parent for path in sorted(output_dir.glob("runs/*/states"))]
        subjects = [read_subject(folder) for folder in folders]
        if not subjects and not any(output_dir.glob("runs/*/inside")):
            raise InputError(f"{output_dir}/runs has no saved states: run python grid.py --preset inside first")
        if args.runs:
            partners = [None, *subjects[:1] * (len(subjects) - 1)]
            for subject in subjects[1:]:
                check_pair(subjects[0], subject)
        else:
            partners = find_partners(subjects)
        for number, (subject, partner) in enumerate(zip(subjects, partners, strict=True), 1):
            name, folder = subject.run.name, subject.run.folder
            if (args.runs and number == 1) or (not args.runs and (folder / "inside").exists()):
                continue
            against = f"against {partner.run.name}" if partner else "alone: no uncorrupted run kept its weights"
            print(f"[{number} of {len(subjects)}] {name} {against}", flush=True)
            write_inside(folder, analyse(subject, partner, cache))
        for name in sorted({path.name for path in output_dir.glob("runs/*/inside/*.csv")}):
            frames = [pd.read_csv(path, dtype=str) for path in sorted(output_dir.glob(f"runs/*/inside/{name}"))]
            with atomic_write(output_dir / f"inside_{name}") as aside:
                pd.concat(frames).to_csv(aside, index=False)
        if not args.keep:
            for folder in [cache, *(subject.run.folder / "states" for subject in subjects)]:
                shutil.rmtree(folder, ignore_errors=True)
    except USER_ERRORS as error:
        fail(error)
    print(f"-> {output_dir}/{', '.join(path.name for path in sorted(output_dir.glob('inside_*.csv')))}")


if __name__ == "__main__":
    run_script(main)
