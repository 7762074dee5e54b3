"""Corrupt a pre-trained encoder as the paper's section 3 does: re-initialise its bottom or its top layers.

    python corrupt.py --model bert-base-uncased --corrupt bottom --frac 0.5 --output_dir corrupted
    python corrupt.py --model minilm --corrupt top --frac 1/3 --seed 1 --output_dir corrupted

In the chosen encoder layers LayerNorm weights become 1, every other weight is drawn anew by Kaiming uniform, and all
biases become 0. Embeddings, pooler and head stay as they are. `load_corrupted` is the hook that train.py hands to
`Trainer(model_init=...)`; this command saves the corrupted encoder and `corruption.json`, which lists each tensor.
Another corruption is one function and its entry in METHODS.
"""

import hashlib
import json
import math
import shutil
from collections.abc import Callable
from contextlib import ExitStack
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from transformers import AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

import models
from common import USER_ERRORS, InputError, explain, fail, fraction, make_parser, run_script

SIDES = ("none", "bottom", "top")


# ---- Which layers ----


def select_layers(corrupt: str, frac: Fraction | None, layers: int) -> tuple[str, Fraction, range]:
    """The side (none, bottom, top or all), the part of the layers, and the layers, counted from 0 at the embeddings.

    Raises InputError unless `frac` is from 0 to 1 and a whole number of the `layers`.
    """
    if corrupt not in SIDES:
        raise InputError(f"--corrupt {corrupt} is not known: choose from {', '.join(SIDES)}")
    if (corrupt == "none") != (frac is None) and frac != 0:
        raise InputError(
            f"--frac {frac} needs --corrupt bottom or --corrupt top"
            if corrupt == "none"
            else f"--corrupt {corrupt} needs --frac, such as --frac 0.5"
        )
    frac = frac or Fraction(0)
    if frac * layers not in range(layers + 1):
        allowed = ", ".join(str(Fraction(k, layers)) for k in range(layers + 1))
        raise InputError(f"--frac {frac} is not a whole number of {layers} encoder layers: choose from {allowed}")
    count = int(frac * layers)
    if count in (0, layers):
        return ("all" if count else "none"), frac, range(count)
    return corrupt, frac, range(count) if corrupt == "bottom" else range(layers - count, layers)


def encoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The encoder's layers, bottom first: the one list of `num_hidden_layers` modules of one class in `base_model`.

    Raises InputError where there is no such list, or more than one, or where the layers share weights.
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
        why = "its layers share one set of weights" if config.model_type == "albert" else "not one list of layers"
        raise InputError(
            f"{type(base).__name__} cannot be corrupted layer by layer ({why}): use BERT, DistilBERT, RoBERTa, "
            "ELECTRA, MPNet, or another encoder that is built like them"
        )
    return found[outermost[0]]


class Target(NamedTuple):
    """A parameter that is to be corrupted."""

    name: str  # in `base_model`
    layer: int  # from 0
    kind: str  # module class and local name, such as Linear.weight
    role: str  # "matrix", "norm" or "bias"
    parameter: nn.Parameter


def plan_corruption(model: PreTrainedModel, layers: range) -> list[Target]:
    """Every parameter of the layers. Raises InputError for one that section 3 of the paper does not speak of."""
    names = {id(parameter): name for name, parameter in model.base_model.named_parameters()}
    targets = []
    for layer in layers:
        for module in encoder_layers(model)[layer].modules():
            for local_name, parameter in module.named_parameters(recurse=False):
                name, kind = names[id(parameter)], f"{type(module).__name__}.{local_name}"
                if local_name == "bias" and isinstance(module, nn.LayerNorm | nn.Linear | nn.Conv1d):
                    role = "bias"
                elif local_name == "weight" and isinstance(module, nn.LayerNorm):
                    role = "norm"
                elif local_name == "weight" and isinstance(module, nn.Linear | nn.Conv1d):
                    role = "matrix"
                else:
                    raise InputError(
                        f"{type(model.base_model).__name__} cannot be corrupted: {name} is a {kind}, and only weights "
                        "and biases of LayerNorm, Linear and Conv1d are known"
                    )
                targets.append(Target(name, layer, kind, role, parameter))
    return targets


@lru_cache
def empty_model(folder: Path) -> PreTrainedModel:
    """The model without weights, to look at. Raises InputError."""
    config = models.load_config(folder)
    with explain(f"{folder} does not give a {type(config).__name__} classifier", Exception), torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


@lru_cache
def check_corruptible(folder: Path, corrupt: str, frac: Fraction | None, method: str) -> None:
    """Check, without loading a weight, that the model can be corrupted so. Raises InputError."""
    if method not in METHODS:
        raise InputError(f"--method {method} is not known: choose from {', '.join(METHODS)}")
    model = empty_model(folder)
    layers = len(encoder_layers(model))
    select_layers(corrupt, frac, layers)
    plan_corruption(model, range(layers))


# ---- How they are corrupted ----


def named_generator(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for each (seed, name), so that drawing from one never moves another."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def seed_of(seed: int, name: str) -> int:
    """The seed of that stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) % 2**63


def reinit(target: Target, generator: torch.Generator, kaiming_a: float) -> dict:
    """The paper's section 3: LayerNorm weights 1, biases 0, other weights by `torch.nn.init.kaiming_uniform_`.

    The uniform's bound is sqrt(6 / ((1 + a^2) fan_in)).
    """
    if target.role == "matrix":
        nn.init.kaiming_uniform_(target.parameter, a=kaiming_a, generator=generator)
        fan_in = target.parameter[0].numel()
        return {"init": "kaiming_uniform", "bound": math.sqrt(6 / ((1 + kaiming_a**2) * fan_in))}
    nn.init.constant_(target.parameter, 1.0 if target.role == "norm" else 0.0)
    return {"init": "ones" if target.role == "norm" else "zeros", "bound": None}


# --method: what becomes of a parameter, in place; the function returns what the manifest is to say of it
METHODS: dict[str, Callable[[Target, torch.Generator, float], dict]] = {"reinit": reinit}


@torch.no_grad()
def corrupt_layers(
    model: PreTrainedModel, layers: range, seed: int, kaiming_a: float = 0.0, method: str = "reinit"
) -> list[dict]:
    """Corrupt the encoder layers in place; a row for each tensor says what was done to it.

    Each tensor has its own random stream, seeded by (seed, parameter name): it gets the same draw whatever else is
    corrupted, so bottom 25 % is part of bottom 50 %. Layers in the rows are counted from 1, as in the paper.
    """
    rows = []
    for target in plan_corruption(model, layers):
        row = {"name": target.name, "layer": target.layer + 1, "kind": target.kind, "count": target.parameter.numel()}
        row["sha256_before"] = tensor_sha256(target.parameter)
        row |= METHODS[method](target, named_generator(seed, target.name), kaiming_a)
        rows.append(row | {"sha256_after": tensor_sha256(target.parameter)})
    return rows


def load_corrupted(
    folder: Path,
    corrupt: str,
    frac: Fraction | None,
    seed: int,
    kaiming_a: float = 0.0,
    method: str = "reinit",
    head_seed: int | None = None,
    **config: object,
) -> tuple[PreTrainedModel, dict]:
    """The model-loading hook: a pre-trained encoder with a new head, corrupted, in float32; and the manifest of it.

    The head of `AutoModelForSequenceClassification` is drawn from a stream of its own, so that it is the same for
    every corruption; `head_seed` is `seed` unless it is given. `config` goes to the model's configuration
    (`num_labels`, ...). Raises InputError.
    """
    usual = {"problem_type": "single_label_classification", "return_dict": True, "classifier_pooling": "cls"}
    usual |= {"output_hidden_states": False, "output_attentions": False}
    config = {name: value for name, value in usual.items() if hasattr(models.load_config(folder), name)} | config
    config |= {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the library's report of new weights says what the manifest says
    logging.disable_progress_bar()
    with explain(f"the weights in {folder} cannot be loaded", Exception), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed if head_seed is None else head_seed, "head"))
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **config)
        new = check_loaded(folder, model, info)
    logging.set_verbosity(verbosity)
    num_layers = len(encoder_layers(model))
    side, frac, layers = select_layers(corrupt, frac, num_layers)
    manifest = {
        "side": side,
        "frac": str(frac),
        "layers": [layer + 1 for layer in layers],
        "num_layers": num_layers,
        "method": method,
        "seed": seed,
        "kaiming_a": kaiming_a,
        "newly_initialised": new,
        "tensors": corrupt_layers(model, layers, seed, kaiming_a, method),
    }
    return model, manifest


def check_loaded(folder: Path, model: PreTrainedModel, info: dict[str, set]) -> list[str]:
    """The names of the head's tensors, all newly drawn, and of a pooler's that the file lacks.

    Raises InputError unless the encoder is just what the file holds, and finite. Part of a head that served to
    pre-train the model (ModernBERT's) is drawn anew, too.
    """
    prefix, base = f"{model.base_model_prefix}.", model.base_model
    new, unused = set(info["missing_keys"]), {name.removeprefix(prefix): name for name in info["unexpected_keys"]}
    lost = [name for name in sorted(new) if name.startswith(prefix) and "pooler" not in name]
    if lost or info["mismatched_keys"]:
        raise InputError(f"{folder} lacks tensors of its encoder, such as {[*lost, *info['mismatched_keys']][0]}")
    parts = {name for name, _ in base.named_children()} - {"pooler"}
    for name, in_file in sorted(unused.items()):
        if name.split(".")[0] in parts and not name.endswith(("position_ids", "token_type_ids")):
            why = f"which its config.json ({model.config.num_hidden_layers} layers) does not use: mend config.json"
            raise InputError(f"{folder} holds {in_file}, {why}")
    for name, parameter in base.named_parameters():
        if not parameter.isfinite().all():
            raise InputError(f"{folder} holds {name} with values that are NaN or infinite: download or save it again")
    head = {name for name, _ in model.named_parameters() if not name.startswith(prefix)}
    if head and not head & new:
        raise InputError(f"{folder} has a head already ({min(head)}): give the encoder alone, saved from base_model")
    if kept := head - new:
        fresh = AutoModelForSequenceClassification.from_config(model.config, trust_remote_code=False)
        for name in kept:
            model.get_parameter(name).data.copy_(fresh.get_parameter(name))
    return sorted(new | kept)


def tensor_sha256(tensor: torch.Tensor) -> str:
    return hashlib.sha256(tensor.detach().contiguous().numpy()).hexdigest()


# ---- The command ----


def save_corrupted(
    model: str, corrupt: str, frac: Fraction, seed: int, kaiming_a: float, method: str, output_dir: Path
) -> dict:
    """Save the corrupted encoder (no head), its tokenizer and `corruption.json` in a new folder, or nothing."""
    if output_dir.exists():
        raise InputError(f"{output_dir} is there already: give another --output_dir or delete it")
    folder, revision = models.find_model(model)
    check_corruptible(folder, corrupt, frac, method)
    corrupted, manifest = load_corrupted(folder, corrupt, frac, seed, kaiming_a, method)
    aside = output_dir.with_name(f".{output_dir.name}.partial")
    with explain(f"{output_dir} cannot be written", OSError), ExitStack() as stack:
        output_dir.parent.mkdir(parents=True, exist_ok=True)
        shutil.rmtree(aside, ignore_errors=True)
        stack.callback(shutil.rmtree, aside, ignore_errors=True)
        corrupted.base_model.save_pretrained(aside)
        models.load_tokenizer(folder).save_pretrained(aside)
        manifest = {"model": model, "revision": revision, **manifest}
        (aside / "corruption.json").write_text(json.dumps(manifest, indent=2) + "\n")
        aside.rename(output_dir)
    return manifest


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument("--model", required=True, help="minilm, a local folder, or a hub id")
    parser.add_argument("--corrupt", required=True, choices=SIDES[1:], help="count the layers from this side")
    parser.add_argument("--frac", required=True, type=fraction, help="part of the encoder layers, such as 0.5 or 1/3")
    parser.add_argument("--method", choices=METHODS, default="reinit", help="how (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the draws (default: %(default)s)")
    slope = "negative slope of Kaiming's leaky ReLU (default: %(default)s)"
    parser.add_argument("--kaiming_a", type=float, default=0.0, help=slope)
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder")
    args = parser.parse_args()
    if not math.isfinite(args.kaiming_a):
        parser.error(f"--kaiming_a {args.kaiming_a} is not finite")
    try:
        manifest = save_corrupted(**vars(args))
    except USER_ERRORS as error:
        fail(error)
    print(
        f"{args.model}: {len(manifest['tensors'])} tensors in layers {manifest['layers']} of {manifest['num_layers']} "
        f"corrupted -> {args.output_dir}"
    )


if __name__ == "__main__":
    run_script(main)
