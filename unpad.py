"""What runs inside the encoder: the pooling hook, no padding, and a last layer for [CLS] alone.

A padded batch goes in and the same logits come out, but the encoder's layers see a list of real tokens, and the last
layer computes only what the head reads. How much each part saves is in docs/performance.md; `train.py --no_unpadding`
leaves all of it out but the pooling.
"""

import inspect
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AttentionInterface, AutoConfig, AutoModelForSequenceClassification, PreTrainedModel
from transformers.utils import ModelOutput

import places

# Architectures whose layers mix tokens in the attention function alone, which transformers lets one replace.
# Of each: a layer's query, and what follows the attention and takes all that the rest of the layer reads.
UNPADDABLE = {
    **dict.fromkeys(
        ("bert", "camembert", "electra", "roberta", "xlm-roberta"), ("attention.self.query", "attention.output")
    ),
    "distilbert": ("attention.q_lin", "sa_layer_norm"),
}
STEPS = 2**16  # a dropout probability is rounded to a multiple of 1 / STEPS


def encoder_of(model: PreTrainedModel) -> nn.Module:
    """The module that runs the encoder's list of layers; its output is what pooler and head read."""
    layers = places.encoder_layers(model)
    return next(module for module in model.base_model.modules() if any(child is layers for child in module.children()))


def mask_getter(model: PreTrainedModel) -> Callable[[], torch.Tensor | None]:
    """Hook the model so that the function returned gives the attention mask of the batch in hand, or None."""
    mask = None

    def remember(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal mask
        mask = inspect.signature(module.forward).bind(*args, **kwargs).arguments.get("attention_mask")

    model.base_model.register_forward_pre_hook(remember, with_kwargs=True)
    return lambda: mask


def with_output(output: ModelOutput | tuple, hidden: torch.Tensor) -> ModelOutput | tuple:
    if isinstance(output, tuple):
        return (hidden, *output[1:])
    output["last_hidden_state"] = hidden
    return output


# ---- Pooling (Table 3) ----


def first_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """[CLS] of each row, the first position that is not padding: (rows, positions, hidden size) to (rows, hidden)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), mask.argmax(dim=1)]


def last_token(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The last position of each row that is not padding, which a decoder's head reads. Shapes as of `first_token`."""
    last = mask.shape[1] - 1 - mask.flip(1).argmax(dim=1)
    return hidden[torch.arange(len(hidden), device=hidden.device), last]


def mean_of_others(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mean of each row's real tokens but [CLS]; [SEP] counts as a token. Shapes as of `first_token`."""
    real = mask.to(hidden.dtype)
    body = real.scatter(1, real.argmax(dim=1, keepdim=True), 0).unsqueeze(-1)
    return (hidden * body).sum(dim=1) / body.sum(dim=1)


def pool_mean(model: PreTrainedModel) -> RemovableHandle:
    """Put the mean over the non-[CLS], non-padding positions in the place of position 0, before pooler and head.

    The paper's section A.1, for every architecture whose pooler or head reads position 0. In place: the model has the
    hook until the handle's `remove()`.
    """
    get_mask = mask_getter(model)

    def replace_first(module: nn.Module, args: tuple, output: ModelOutput | tuple) -> ModelOutput | tuple:
        hidden, mask = output[0], get_mask()  # (rows, positions, hidden size)
        mask = torch.ones(hidden.shape[:2], device=hidden.device) if mask is None else mask
        mean = mean_of_others(hidden, mask)[:, None]
        return with_output(output, torch.cat([mean.to(hidden.dtype), hidden[:, 1:]], dim=1))

    return encoder_of(model).register_forward_hook(replace_first)


MEAN = "-mean-pooling"  # ends the architecture's name in a saved model's configuration: a plain load must not take it


def save_mean(folder: Path) -> None:
    """Make a saved model say in its configuration that it needs `load_saved`."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": config["model_type"] + MEAN, "architectures": [config["architectures"][0] + MEAN]}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_saved(folder: str | Path) -> PreTrainedModel:
    """A model that train.py saved with --save_model, with its pooling: it gives the run's predictions."""
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    mean = config["model_type"].endswith(MEAN)
    config = AutoConfig.for_model(**config | {"model_type": config["model_type"].removesuffix(MEAN)})
    model = AutoModelForSequenceClassification.from_pretrained(folder, config=config, use_safetensors=True)
    if mean:
        pool_mean(model)
    return model


# ---- No padding ----


class UnpaddedLayout(NamedTuple):
    """How the rows of a batch lie in the list of its real tokens; the layers get it in the attention mask's place."""

    groups: tuple[tuple[int, int], ...]  # (rows, length): rows of equal length stand together, the shortest first
    order: torch.Tensor  # (rows,): which row of the batch stands where
    first: torch.Tensor  # (rows,): where each row's [CLS] stands


def unpad(model: PreTrainedModel, pooling: str = "cls") -> None:
    """Let the encoder's layers see the real tokens alone, shape (1, tokens, hidden size); in place.

    Behind the last layer pooler and head get what they read, shape (rows, 1, hidden size): each row's [CLS], or with
    `pooling` mean the mean of its other tokens, as `pool_mean` gives it. Raises ValueError for an architecture that is
    not in UNPADDABLE.
    """
    if model.config.model_type not in UNPADDABLE:
        raise ValueError(f"{model.config.model_type} needs its padding: choose from {', '.join(UNPADDABLE)}")
    layout, get_mask = None, mask_getter(model)

    def flatten(module: nn.Module, args: tuple, kwargs: dict) -> tuple[tuple, dict]:
        nonlocal layout
        call = inspect.signature(module.forward).bind(*args, **kwargs)
        hidden, mask = call.arguments["hidden_states"], get_mask()
        real = torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device) if mask is None else mask.bool()
        length, order = real.sum(dim=1).sort(stable=True)
        lengths, rows = length.unique_consecutive(return_counts=True)
        groups = tuple(zip(rows.tolist(), lengths.tolist(), strict=True))
        layout = UnpaddedLayout(groups, order, length.cumsum(0) - length)
        positions = order[:, None] * hidden.shape[1] + torch.arange(hidden.shape[1], device=hidden.device)
        tokens = hidden.flatten(0, 1).index_select(0, positions[real[order]])
        call.arguments |= {"hidden_states": tokens[None], "attention_mask": layout}
        return call.args, call.kwargs

    def pooled(module: nn.Module, args: tuple, output: ModelOutput | tuple) -> ModelOutput | tuple:
        rows = output[0][0]
        if pooling == "mean":
            rows = torch.cat([group[:, 1:].mean(dim=1) for group in rows_of(rows, layout)])
        return with_output(output, rows.index_select(0, layout.order.argsort())[:, None])

    encoder_of(model).register_forward_pre_hook(flatten, with_kwargs=True)
    encoder_of(model).register_forward_hook(pooled)
    if pooling == "cls":
        narrow_last_layer(model, lambda: layout)
    model.set_attn_implementation("unpadded")


def narrow_last_layer(model: PreTrainedModel, get_layout: Callable[[], UnpaddedLayout]) -> None:
    """Let the last layer of an unpadded encoder give [CLS] alone, shape (1, rows, hidden size); in place.

    Behind the last layer's attention no token reads another, so that those which the head does not read need no query,
    no feed-forward, and have no gradient there. `get_layout` gives the layout of the batch in hand.
    """
    last = places.encoder_layers(model)[-1]
    query, rest = (last.get_submodule(name) for name in UNPADDABLE[model.config.model_type])

    def pick(module: nn.Module, args: tuple) -> tuple:
        return tuple(tokens.index_select(1, get_layout().first) for tokens in args)

    def put_back(module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        layout = get_layout()
        whole = output.new_zeros(1, sum(rows * length for rows, length in layout.groups), output.shape[2])
        return whole.index_copy(1, layout.first, output)  # the attention's views want a query of every token

    query.register_forward_pre_hook(pick)
    query.register_forward_hook(put_back)
    rest.register_forward_pre_hook(pick)


def rows_of(tokens: torch.Tensor, layout: UnpaddedLayout) -> list[torch.Tensor]:
    """The groups of a list of tokens, shape (tokens, ...), each as (rows, length, ...)."""
    parts = tokens.split([rows * length for rows, length in layout.groups])
    return [part.unflatten(0, group) for part, group in zip(parts, layout.groups, strict=True)]


def attention(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: UnpaddedLayout,
    dropout: float = 0.0,
    scaling: float | None = None,
    **_: object,
) -> tuple[torch.Tensor, None]:
    """Each row attends to itself, without padding: rows of one length are one batch.

    `query`, `key`, `value` have the shape (1, heads, tokens, head size), the output (1, tokens, heads, head size). An
    attention function as `transformers.AttentionInterface` wants it.
    """
    parts = (rows_of(tensor[0].transpose(0, 1), attention_mask) for tensor in (query, key, value))
    quick, outputs = dropout > 0 and query.device.type == "cpu", []
    sizes = [rows * query.shape[1] * length**2 for rows, length in attention_mask.groups]
    keep = keep_mask(sum(sizes), dropout, query.dtype).split(sizes) if quick else sizes
    for q, k, v, kept in zip(*parts, keep, strict=True):
        q, k, v = (tensor.transpose(1, 2) for tensor in (q, k, v))  # (rows, heads, length, head size)
        if quick:
            weights = (q @ (k.transpose(2, 3) * scaling)).softmax(dim=-1)
            output = weights * kept.view(weights.shape) @ v
        else:
            output = F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, scale=scaling)
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None], None


AttentionInterface.register("unpadded", attention)


def keep_mask(elements: int, p: float, dtype: torch.dtype) -> torch.Tensor:
    """What dropout multiplies by: 0 with probability `p`, else 1 / (1 - p). Shape (elements,), on the CPU.

    torch draws such a mask on one thread, element by element. Here one 64-bit draw of SFC64, seeded from torch's global
    generator, serves four elements: the same distribution, with `p` rounded to a multiple of 1 / 65536.
    """
    dropped = round(p * STEPS)
    seed = int(torch.randint(2**63 - 1, ()))
    draws = np.random.Generator(np.random.SFC64(seed)).integers(2**64, size=-(-elements // 4), dtype=np.uint64)
    keep = torch.from_numpy(draws.view(np.int16)[:elements]) >= dropped - STEPS // 2
    return keep.to(dtype).mul_(STEPS / (STEPS - dropped))


# ---- All of it ----


def speed_up_encoder(model: PreTrainedModel, pooling: str, plain: bool) -> bool:
    """Hook the pooling into the model and, unless it is to stay `plain`, unpad it; returns whether it is unpadded."""
    unpadded = not plain and pooling != "last" and model.config.model_type in UNPADDABLE
    if unpadded:
        unpad(model, pooling)
    elif pooling == "mean":
        pool_mean(model)
    return unpadded


@contextmanager
def capture_pooled(model: PreTrainedModel, pooling: str = "cls") -> Iterator[list[torch.Tensor]]:
    """A list that fills, batch by batch, with the encoder's output where pooler and head read it.

    That is position 0, where the mean stands, too; with `pooling` last the last real token. Each tensor has the shape
    (rows, hidden size), in float32 on the CPU.
    """
    pooled: list[torch.Tensor] = []
    get_mask = mask_getter(model) if pooling == "last" else None

    def keep(module: nn.Module, args: tuple, output: ModelOutput | tuple) -> None:
        rows = last_token(output[0], get_mask()) if get_mask else output[0][:, 0]
        pooled.append(rows.float().cpu())

    hook = encoder_of(model).register_forward_hook(keep)
    yield pooled
    hook.remove()
