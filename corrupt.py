"""Corrupt a pre-trained model: the paper's re-initialisation of bottom or top layers, or another method, anywhere.

    python corrupt.py --model bert-base-uncased --corrupt bottom --frac 0.5 --output_dir corrupted
    python corrupt.py --model minilm --corrupt top --frac 1/3 --seed 1 --output_dir corrupted
    python corrupt.py --model minilm --layers 2-4,6 --parts attention --method noise --severity 0.5 --output_dir noisy

The paper's way, the default (its section 3): in the chosen layers LayerNorm weights become 1, every other weight is
drawn anew by Kaiming uniform, and all biases become 0. Embeddings, pooler and head stay as they are. `load_corrupted`
is the hook that train.py hands to `Trainer(model_init=...)`; this command saves the corrupted model and
`corruption.json`, which lists each tensor and how much of it was changed. Another method is one function and its entry
in METHODS; places.py finds the tensors.
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
from typing import NamedTuple, Self

import numpy as np
import torch
from torch import nn
from transformers import AutoModel, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import logging

import config
import models
from common import USER_ERRORS, InputError, explain, fail, make_parser, run_script
from places import Place, Target, encoder_layers, plan_corruption, select_layers


class Corruption(NamedTuple):
    """Where and how a model is corrupted, as the flags of the same names say."""

    corrupt: str = "none"
    frac: Fraction | None = None
    layers: str | None = None
    parts: str = "all"
    method: str = "reinit"
    severity: float | None = None
    kaiming_a: float = 0.0

    @classmethod
    def of(cls, flags: object) -> Self:
        """From a RunConfig, or the namespace of a command line."""
        return cls(*(getattr(flags, name) for name in cls._fields))


UNCORRUPTED = Corruption()


# ---- The methods ----


class Method(NamedTuple):
    """An entry of METHODS. `change` works in place and returns what the manifest is to say of each tensor."""

    change: Callable  # of (target, generator, how) for each tensor, or of (model, targets, generator) if `whole`
    severity: tuple[str, Callable[[float], bool]] | None = None  # its range; None: it takes none
    matrices: bool = False  # weight matrices and embeddings alone
    whole: bool = False
    layers_only: bool = False  # whole layers: no parts, nothing outside


def reinit(target: Target, generator: torch.Generator, how: Corruption) -> dict:
    """The paper's section 3: LayerNorm weights 1, biases 0, other weights by `torch.nn.init.kaiming_uniform_`.

    The uniform's bound is sqrt(6 / ((1 + a^2) fan_in)). An embedding's row of padding becomes 0.
    """
    if target.role in ("norm", "bias"):
        nn.init.constant_(target.parameter, 1.0 if target.role == "norm" else 0.0)
        return {"init": "ones" if target.role == "norm" else "zeros", "bound": None}
    bound = math.sqrt(6 / ((1 + how.kaiming_a**2) * target.fan_in))
    if target.role == "embedding":
        nn.init.uniform_(target.parameter, -bound, bound, generator=generator)
        if target.module.padding_idx is not None:
            target.parameter[target.module.padding_idx] = 0
    else:
        outputs_first = target.parameter.T if target.kind == "Conv1D.weight" else target.parameter
        nn.init.kaiming_uniform_(outputs_first, a=how.kaiming_a, generator=generator)
    return {"init": "kaiming_uniform", "bound": bound}


def normal(model: PreTrainedModel, targets: list[Target], generator: torch.Generator) -> list[dict]:
    """What the library draws for a new model of this architecture (its `_init_weights`); one model for each seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(generator.initial_seed())
        drawn = AutoModel.from_config(model.config, dtype=torch.float32, trust_remote_code=False)
    for target in targets:
        target.parameter.copy_(drawn.get_parameter(target.name))
    return [{} for _ in targets]


def noise(target: Target, generator: torch.Generator, how: Corruption) -> dict:
    """W + s std(W) N(0, 1), with the population's deviation: a constant tensor stays."""
    deviation = target.parameter.double().std(correction=0).item()
    target.parameter.add_(torch.randn(target.parameter.shape, generator=generator), alpha=how.severity * deviation)
    return {"std": deviation}


def shuffle(target: Target, generator: torch.Generator, how: Corruption) -> dict:
    """The same values in a random order: their distribution is left, and no structure."""
    values = target.parameter.flatten()
    target.parameter.copy_(values[torch.randperm(len(values), generator=generator)].view_as(target.parameter))
    return {}


def prune(target: Target, generator: torch.Generator, how: Corruption) -> dict:
    """The entries of smallest magnitude, a share s of them, become 0 (of equal ones the first). They may recover."""
    return zero(target, target.parameter.abs().flatten().argsort(stable=True), how)


def prune_random(target: Target, generator: torch.Generator, how: Corruption) -> dict:
    """A share s of the entries, drawn at random, become 0."""
    return zero(target, torch.randperm(target.parameter.numel(), generator=generator), how)


def zero(target: Target, order: torch.Tensor, how: Corruption) -> dict:
    count = round(how.severity * target.parameter.numel())
    values = target.parameter.flatten().index_fill(0, order[:count], 0.0)
    target.parameter.copy_(values.view_as(target.parameter))
    return {"zeroed": count}


def bitflip(target: Target, generator: torch.Generator, how: Corruption) -> dict:
    """Each of the 32 bits of each float32 is flipped with probability s.

    What is then not finite, or larger than ten times the tensor's largest magnitude, becomes 0 and is counted.
    """
    size, most = target.parameter.numel(), 10 * target.parameter.abs().max()
    mask = np.zeros(size, dtype=np.uint32)
    for bit in range(32):
        flipped = torch.rand(size, generator=generator, dtype=torch.float64) < how.severity
        mask |= flipped.numpy().astype(np.uint32) << np.uint32(bit)
    bits = target.parameter.numpy().view(np.uint32)
    values = torch.from_numpy((bits ^ mask.reshape(bits.shape)).view(np.float32))
    broken = ~(values.abs() <= most)
    target.parameter.copy_(values.masked_fill(broken, 0.0))
    return {"bits_flipped": int(np.bitwise_count(mask).sum()), "zeroed": int(broken.sum())}


def permute(model: PreTrainedModel, targets: list[Target], generator: torch.Generator) -> list[dict]:
    """The layers in a random order that is not theirs (Tamkin et al. 2020)."""
    layers, values = layers_of(model, targets), {target.name: target.parameter.clone() for target in targets}
    order = own = sorted(layers)
    while order == own:
        order = [own[i] for i in torch.randperm(len(own), generator=generator)]
    moves = [
        move for to, source in zip(own, order, strict=True) for move in zip(layers[to], layers[source], strict=True)
    ]
    for target, other in moves:
        target.parameter.copy_(values[other.name])
    return [{"from_layer": other.layer + 1} for _, other in moves]


def drop(model: PreTrainedModel, targets: list[Target], generator: torch.Generator) -> list[dict]:
    """The layers are taken out, and the configuration follows (Sajjad et al. 2023, Gromov et al. 2024)."""
    layers, gone = encoder_layers(model), {target.layer for target in targets}
    kept = [layer for layer in range(len(layers)) if layer not in gone]
    by_layer = {k: v for k, v in model.config.to_dict().items() if isinstance(v, list) and len(v) == len(layers)}
    for layer in sorted(gone, reverse=True):
        del layers[layer]
    model.config.num_hidden_layers = len(kept)
    for name, values in by_layer.items():
        setattr(model.config, name, [values[layer] for layer in kept])
    for number, layer in enumerate(layers):
        for module in (module for module in layer.modules() if hasattr(module, "layer_idx")):
            module.layer_idx = number  # its place in a decoder's cache
    return [{"init": "dropped", "sha256_after": None, "relative_change": None} for _ in targets]


SHARE = ("from 0 to 1", lambda s: 0 <= s <= 1)
METHODS = {  # --method
    "reinit": Method(reinit),
    "normal": Method(normal, whole=True),
    "noise": Method(noise, severity=("above 0 and at most 1e6", lambda s: 0 < s <= 1e6)),
    "shuffle": Method(shuffle),
    "prune": Method(prune, severity=SHARE, matrices=True),
    "prune_random": Method(prune_random, severity=SHARE, matrices=True),
    "bitflip": Method(bitflip, severity=SHARE),
    "permute": Method(permute, whole=True, layers_only=True),
    "drop": Method(drop, whole=True, layers_only=True),
}


# ---- Whether a model can be corrupted so ----


@lru_cache
def empty_model(folder: Path) -> PreTrainedModel:
    """The model without weights, to look at. Raises InputError."""
    config = models.load_config(folder)
    with explain(f"{folder} does not give a {type(config).__name__} classifier", Exception), torch.device("meta"):
        return AutoModelForSequenceClassification.from_config(config, trust_remote_code=False)


@lru_cache
def check_corruptible(folder: Path, how: Corruption) -> None:
    """Check, without loading a weight, that the model can be corrupted so. Raises InputError."""
    model = empty_model(folder)
    num_layers = len(encoder_layers(model))
    plan_corruption(model, Place("all", Fraction(1), tuple(range(num_layers))))
    targets_of(model, select_layers(how.corrupt, how.frac, num_layers, how.layers), how)


def check_method(how: Corruption) -> None:
    """Raises InputError for an unknown method, or a severity that does not fit it."""
    if how.method not in METHODS:
        raise InputError(f"--method {how.method} is not known: choose from {', '.join(METHODS)}")
    method = METHODS[how.method]
    if not abs(how.kaiming_a) <= 1e6:
        raise InputError(f"--kaiming_a {how.kaiming_a} is not from -1e6 to 1e6")
    if method.severity is None and how.severity is not None:
        takers = ", ".join(name for name, other in METHODS.items() if other.severity)
        raise InputError(f"--severity {how.severity} is not for --method {how.method}: leave it out, or take {takers}")
    if method.severity and not (how.severity is not None and method.severity[1](how.severity)):
        raise InputError(f"--method {how.method} needs a --severity {method.severity[0]}, and it is {how.severity}")


def targets_of(model: PreTrainedModel, place: Place, how: Corruption) -> list[Target]:
    """The parameters that the method is to change. Raises InputError if it does not fit the severity or the place."""
    check_method(how)
    method, targets = METHODS[how.method], plan_corruption(model, place, how.parts)
    if method.layers_only and (how.parts != "all" or place.outside):
        raise InputError(f"--method {how.method} takes whole layers: leave out --parts, embeddings and pooler")
    if how.method == "permute" and place.layers:
        layers_of(model, targets)
    if how.method == "drop" and place.frac == 1:
        raise InputError("--method drop of all layers leaves no encoder: choose fewer")
    if how.method == "drop" and place.layers:
        layers = encoder_layers(model)
        first = next(n for n in range(len(layers)) if n not in place.layers)  # takes the place of layer 1
        if len({tuple(name for name, _ in layers[n].named_parameters()) for n in (0, first)}) > 1:
            raise InputError(f"--method drop cannot take out layer 1, which differs in kind from layer {first + 1}")
    if method.matrices:
        targets = [target for target in targets if target.role in ("matrix", "embedding")]
        if not targets and str(place):
            raise InputError(f"--method {how.method} needs weight matrices, and --parts {how.parts} has none")
    return targets


def layers_of(model: PreTrainedModel, targets: list[Target]) -> dict[int, list[Target]]:
    """The targets of each layer. Raises InputError unless these are two layers or more, and can change places."""
    layers: dict[int, list[Target]] = {}
    for target in targets:
        layers.setdefault(target.layer, []).append(target)
    kinds = getattr(model.config, "layer_types", None) or [None] * len(encoder_layers(model))
    alike = {(kinds[n], *((t.kind, *t.parameter.shape) for t in layer)) for n, layer in layers.items()}
    if len(layers) < 2 or len(alike) > 1:
        why = "differ in kind" if len(layers) > 1 else "are fewer than two"
        numbers = ", ".join(str(layer + 1) for layer in layers)
        raise InputError(f"--method permute cannot exchange layers {numbers}, which {why}: choose others")
    return layers


# ---- Corrupt ----


def named_generator(seed: int, name: str) -> torch.Generator:
    """A random stream of its own for each (seed, name), so that drawing from one never moves another."""
    return torch.Generator().manual_seed(seed_of(seed, name))


def seed_of(seed: int, name: str) -> int:
    """The seed of that stream."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8]) % 2**63


@torch.no_grad()
def corrupt_layers(model: PreTrainedModel, place: Place, how: Corruption, seed: int) -> tuple[list[dict], float | None]:
    """Corrupt the model in place; a row for each tensor says what was done to it; and the size of the whole change.

    Each tensor has its own random stream, seeded by (seed, method, parameter name): it gets the same draw whatever else
    is corrupted, so bottom 25 % is part of bottom 50 %. Layers in the rows are counted from 1, as in the paper.
    `relative_change` is |W' - W| / |W| (Frobenius), None where |W| is 0.
    """
    method, targets = METHODS[how.method], targets_of(model, place, how)
    before = [target.parameter.clone() for target in targets]
    if method.whole:
        notes = method.change(model, targets, named_generator(seed, how.method)) if targets else []
    else:
        own = "" if how.method == "reinit" else f"{how.method}:"
        notes = [method.change(target, named_generator(seed, own + target.name), how) for target in targets]
    rows, sizes = [], []
    for target, old, note in zip(targets, before, notes, strict=True):
        size, change = old.double().norm().item(), (target.parameter.double() - old.double()).norm().item()
        sizes.append((size, change))
        row = {"name": target.name, "layer": None if target.layer is None else target.layer + 1, "part": target.part}
        row |= {"kind": target.kind, "count": target.parameter.numel(), "method": how.method, "severity": how.severity}
        row |= {"sha256_before": tensor_sha256(old), "sha256_after": tensor_sha256(target.parameter)}
        rows.append(row | {"relative_change": change / size if size else None} | note)
    size, change = (math.hypot(*values) for values in zip(*sizes, strict=True)) if sizes else (0.0, 0.0)
    return rows, change / size if size and how.method != "drop" else None


def load_corrupted(
    folder: Path,
    how: Corruption = UNCORRUPTED,
    seed: int = 0,
    head_seed: int | None = None,
    weights: dict[str, torch.Tensor] | None = None,
    **settings: object,
) -> tuple[PreTrainedModel, dict]:
    """The model-loading hook: a pre-trained encoder with a new head, corrupted, in float32; and the manifest of it.

    The head of `AutoModelForSequenceClassification` is drawn from a stream of its own, so that it is the same for
    every corruption; `head_seed` is `seed` unless it is given. With `weights`, a fine-tuned model's, head and all, it
    is that model which is corrupted. `settings` go to the model's configuration (`num_labels`, ...). Raises InputError.
    """
    known = models.load_config(folder)
    usual = {"problem_type": "single_label_classification", "return_dict": True, "classifier_pooling": "cls"}
    usual |= {"output_hidden_states": False, "output_attentions": False}
    settings = {name: value for name, value in usual.items() if hasattr(known, name)} | settings
    if getattr(known, "pad_token_id", None) is None:  # a decoder's head looks for the last token that is not this
        settings["pad_token_id"] = models.load_tokenizer(folder).pad_token_id
    settings |= {"dtype": torch.float32, "use_safetensors": True, "trust_remote_code": False}
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # the library's report of new weights says what the manifest says
    logging.disable_progress_bar()
    with explain(f"the weights in {folder} cannot be loaded", Exception), torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_of(seed if head_seed is None else head_seed, "head"))
        model, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True, **settings)
        new = check_loaded(folder, model, info)
    logging.set_verbosity(verbosity)
    if weights is not None:
        model.load_state_dict(weights)
    num_layers = len(encoder_layers(model))
    place = select_layers(how.corrupt, how.frac, num_layers, how.layers)
    tensors, change = corrupt_layers(model, place, how, seed)
    manifest = {
        "side": place.side,
        "frac": str(place.frac),
        "place": str(place),
        "layers": [layer + 1 for layer in place.layers],
        "num_layers": num_layers,
        **{name: getattr(how, name) for name in ("parts", "method", "severity", "kaiming_a")},
        "seed": seed,
        "relative_change": change,
        "newly_initialised": new,
        "tensors": tensors,
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


def save_corrupted(model: str, how: Corruption, seed: int, output_dir: Path) -> dict:
    """Save the corrupted encoder (no head), its tokenizer and `corruption.json` in a new folder, or nothing."""
    if output_dir.exists():
        raise InputError(f"{output_dir} is there already: give another --output_dir or delete it")
    folder, revision = models.find_model(model)
    check_corruptible(folder, how)
    corrupted, manifest = load_corrupted(folder, how, seed)
    if not manifest["place"]:
        raise InputError("nothing is to be corrupted: give --corrupt with --frac, or --layers")
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


FLAGS = ("model", *Corruption._fields, "seed")


def main() -> None:
    parser = make_parser(__doc__)
    for name in FLAGS:
        config.add_flag(parser, name)
    parser.add_argument("--output_dir", required=True, type=Path, help="a new folder")
    args = parser.parse_args()
    try:
        wanted = config.RunConfig(**{name: value for name, value in vars(args).items() if name in FLAGS})
        manifest = save_corrupted(wanted.model, Corruption.of(wanted), wanted.seed, args.output_dir)
    except USER_ERRORS as error:
        fail(error)
    change = "" if manifest["relative_change"] is None else f", |W' - W| / |W| = {manifest['relative_change']:.3g}"
    print(
        f"{wanted.model}: {len(manifest['tensors'])} tensors in layers {manifest['place']} of {manifest['num_layers']} "
        f"corrupted by {wanted.method}{change} -> {args.output_dir}"
    )


if __name__ == "__main__":
    run_script(main)
