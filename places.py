"""Where a model is corrupted: its layers, found by structure, their parts, and what lies outside them.

Layers are counted from 1 at the embeddings, as in the paper's tables. Used by corrupt.py, tunings.py and unpad.py.
"""

import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import groupby
from typing import NamedTuple

from torch import nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from common import InputError

PARTS = ("attention", "ffn", "layernorm")
OUTSIDE = ("embeddings", "pooler")  # of the layers; corrupted only when they are named
NORMS = ("LayerNorm", "RMSNorm", "LlamaRMSNorm", "Qwen2RMSNorm")  # classes whose weight 1 changes nothing


class Place(NamedTuple):
    """Layers, and what else is corrupted."""

    side: str  # none, bottom, top, all; else the place as `spell` gives it
    frac: Fraction  # of the layers
    layers: tuple[int, ...]  # from 0
    outside: tuple[str, ...] = ()  # of OUTSIDE

    def __str__(self) -> str:
        return spell(self.layers, self.outside)


def spell(layers: tuple[int, ...], outside: tuple[str, ...] = ()) -> str:
    """The place as --layers takes it: (1, 2, 3, 5), from 0, is 2-4,6."""
    runs = [[layer for _, layer in run] for _, run in groupby(enumerate(layers), lambda pair: pair[1] - pair[0])]
    return ",".join([*outside, *(f"{r[0] + 1}-{r[-1] + 1}" if len(r) > 1 else f"{r[0] + 1}" for r in runs)])


def select_layers(corrupt: str, frac: Fraction | None, num_layers: int, layers: str | None = None) -> Place:
    """The place that --corrupt and --frac, or --layers, name in an encoder of `num_layers` layers.

    The same tensors are the same place: layers 1-3 of 6 are the bottom 1/2. Raises InputError unless `frac` is from 0
    to 1 and a whole number of layers, and for layers that are not there.
    """
    if layers is not None:
        chosen, outside = parse_layers(layers, num_layers)
        frac = Fraction(len(chosen), num_layers)
        sides = {tuple(range(len(chosen))): "bottom", tuple(range(num_layers))[-len(chosen) :]: "top"}
        side = "all" if frac == 1 else sides.get(chosen, spell(chosen))
        return Place(spell(chosen, outside) if outside else side, frac, chosen, outside)
    if corrupt not in (sides := ("none", "bottom", "top")):
        raise InputError(f"--corrupt {corrupt} is not known: choose from {', '.join(sides)}")
    if (corrupt == "none") != (frac is None) and frac != 0:
        raise InputError(
            f"--frac {frac} needs --corrupt bottom or --corrupt top"
            if corrupt == "none"
            else f"--corrupt {corrupt} needs --frac, such as --frac 0.5"
        )
    frac = frac or Fraction(0)
    if frac * num_layers not in range(num_layers + 1):
        allowed = ", ".join(str(Fraction(k, num_layers)) for k in range(num_layers + 1))
        raise InputError(f"--frac {frac} is not a whole number of {num_layers} encoder layers: choose from {allowed}")
    count = int(frac * num_layers)
    side = corrupt if 0 < count < num_layers else "all" if count else "none"
    return Place(side, frac, tuple(range(count) if corrupt == "bottom" else range(num_layers - count, num_layers)))


def parse_layers(text: str, num_layers: int) -> tuple[tuple[int, ...], tuple[str, ...]]:
    """The layers, from 0, and what lies outside them, that --layers names. Raises InputError."""
    layers, outside = set(), set()
    for word in text.split(","):
        first, _, last = word.partition("-")
        if word in OUTSIDE:
            outside.add(word)
        elif re.fullmatch(r"\d+(-\d+)?", word) and 1 <= int(first) <= int(last or first) <= num_layers:
            layers.update(range(int(first) - 1, int(last or first)))
        else:
            allowed = f"layers from 1 to {num_layers}, such as 3 or 2-4,6, and {' and '.join(OUTSIDE)}"
            raise InputError(f"--layers {text}: {word!r} is not a place in this model: give {allowed}")
    return tuple(sorted(layers)), tuple(name for name in OUTSIDE if name in outside)


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


def modules_of(model: PreTrainedModel, outside: str) -> list[nn.Module]:
    """The modules outside the layers that hold the embeddings, with what is normed and projected there, or the pooler.

    Raises InputError where the model has none.
    """
    base, layers = model.base_model, encoder_layers(model)
    if outside == "pooler":
        found = [module for name, module in base.named_children() if name == "pooler" and module is not None]
    else:
        inside = {id(module) for module in layers.modules()}
        found, holds = [], lambda module: any(isinstance(child, nn.Embedding) for child in module.children())
        for module in (module for module in base.modules() if id(module) not in inside and holds(module)):
            beside_layers = any(child is layers for child in module.children())
            found += [child for child in module.children() if isinstance(child, nn.Embedding) or not beside_layers]
    if not found:
        raise InputError(f"{type(base).__name__} has no {outside}: leave it out of --layers")
    return list({id(part): part for module in found for part in module.modules()}.values())


@dataclass(frozen=True)
class Target:
    """A parameter that is to be corrupted."""

    name: str  # in `base_model`
    layer: int | None  # from 0; None outside the layers
    part: str  # of PARTS, or of OUTSIDE
    kind: str  # module class and local name, such as Linear.weight
    role: str  # "matrix", "norm", "bias" or "embedding"
    fan_in: int  # inputs of the module's every output; an embedding row's is the hidden size, as section 3 has none
    module: nn.Module  # that holds it
    parameter: nn.Parameter


def plan_corruption(model: PreTrainedModel, place: Place, parts: str = "all") -> list[Target]:
    """Every parameter of the place, its layers narrowed to `parts`. Raises InputError for one of an unknown kind."""
    wanted = PARTS if parts == "all" else tuple(parts.split(","))
    if unknown := [name for name in wanted if name not in PARTS]:
        raise InputError(f"--parts {unknown[0]} is not known: choose from {', '.join(PARTS)}, several with commas")
    if place.outside and parts != "all":
        raise InputError(f"--parts narrows layers, and {place.outside[0]} is none: leave out one of the two")
    names = {id(parameter): name for name, parameter in model.base_model.named_parameters()}
    modules = [(None, part, module) for part in place.outside for module in modules_of(model, part)]
    for layer in place.layers:
        whole = encoder_layers(model)[layer]
        modules.append((layer, "ffn", whole))
        for child in whole.children():
            part = "attention" if "Attention" in type(child).__name__ else "ffn"
            modules += [(layer, part, module) for module in child.modules()]
    targets = []
    for layer, part, module in modules:
        for local_name, parameter in module.named_parameters(recurse=False):
            name, kind = names[id(parameter)], f"{type(module).__name__}.{local_name}"
            norm, fan_in = isinstance(module, nn.LayerNorm) or type(module).__name__ in NORMS, parameter[0].numel()
            if local_name == "bias" and (norm or isinstance(module, nn.Linear | nn.Conv1d | Conv1D)):
                role = "bias"
            elif local_name == "weight" and norm:
                role = "norm"
            elif local_name == "weight" and isinstance(module, nn.Linear | nn.Conv1d | Conv1D):
                role, fan_in = "matrix", len(parameter) if isinstance(module, Conv1D) else fan_in
            elif local_name == "weight" and isinstance(module, nn.Embedding):
                role, fan_in = "embedding", model.config.hidden_size
            else:
                raise InputError(
                    f"{type(model.base_model).__name__} cannot be corrupted: {name} is a {kind}, and only weights "
                    f"and biases of {', '.join(NORMS)}, Linear, Conv1d, Conv1D and Embedding are known"
                )
            part_of = "layernorm" if norm and layer is not None else part
            if part_of in (*wanted, *OUTSIDE):
                targets.append(Target(name, layer, part_of, kind, role, fan_in, module, parameter))
    if missing := [part for part in wanted if parts != "all" and part not in {target.part for target in targets}]:
        raise InputError(f"{type(model.base_model).__name__} has no {missing[0]} in layers {place}: leave it out")
    return targets
