"""Whether a model can be used as a run's settings say, tried by numbers before anything is prepared or written.

Its tensors, its tokenizer, the length that it reads, and what its head reads: docs/decisions.md lists it all. Used by
train.py.
"""

import sys
from functools import lru_cache
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

import corrupt
import models
import places
import unpad
from common import InputError, explain


@lru_cache
def longest_input(folder: Path) -> int:
    """In tokens. RoBERTa and its like number the positions from behind their padding index."""
    positions = [getattr(models.load_config(folder), "max_position_embeddings", sys.maxsize)]
    for name, module in corrupt.empty_model(folder).base_model.named_modules():
        if name.endswith("position_embeddings") and isinstance(module, torch.nn.Embedding):
            positions.append(module.num_embeddings - (0 if module.padding_idx is None else module.padding_idx + 1))
    return min(*positions, models.load_tokenizer(folder).model_max_length)


@lru_cache
def check_model(folder: Path, fingerprint: str, pooling: str, plain: bool) -> None:
    """Load the model once and check its tensors, its tokenizer and what its head reads. Raises InputError."""
    tokenizer = models.load_tokenizer(folder)
    model, _ = corrupt.load_corrupted(folder)
    ids, rows = max(tokenizer.get_vocab().values()), model.get_input_embeddings().num_embeddings
    if ids >= rows:
        raise InputError(f"{folder} has a tokenizer with ids up to {ids}, and embeddings for 0 to {rows - 1}: mend it")
    one, two = "A fine film.", "It is long, and longer than it need be."
    texts = [([one, two],), ([two],), ([one, two], [two, two])]
    with explain(f"{type(model).__name__} in {folder} cannot read a batch", Exception):
        batches = [tokenizer(*parts, padding=True, return_tensors="pt") for parts in texts]
        check_pooling(model, batches, pooling, plain)


@torch.no_grad()
def check_pooling(model: PreTrainedModel, batches: list[dict[str, torch.Tensor]], pooling: str, plain: bool) -> None:
    """Check by numbers, on each batch, that the head reads what `pooling` says; speeds the model up, in place.

    On the library's own path the encoder's last output is changed: the logits must move with what `pooling` reads and
    must not move with the rest, for mean not even where each token changes and their mean stays. Then the path of
    `speed_up_encoder` must give the library's logits. Raises InputError.
    """
    model.eval()
    mean = pooling == "mean"
    hook = unpad.pool_mean(model) if mean else None
    place = unpad.encoder_of(model) if mean else places.encoder_layers(model)[-1]
    expected = []
    for tokens in batches:
        real = tokens["attention_mask"].bool()
        first = torch.zeros_like(real).scatter(1, real.int().argmax(dim=1, keepdim=True), True)
        last = torch.zeros_like(real).scatter(1, real.shape[1] - 1 - real.flip(1).int().argmax(1, keepdim=True), True)
        read = {"cls": first, "mean": real & ~first, "last": last}[pooling].unsqueeze(-1)
        noise = torch.randn((*real.shape, model.config.hidden_size), generator=corrupt.named_generator(0, "noise"))
        center = (noise * read).sum(1, keepdim=True) / read.sum(1, keepdim=True)  # for [CLS] the noise itself
        logits = model(**tokens).logits
        changes = noise * read, noise - center * read
        moved, unmoved = ((logits_with(it, place, model, tokens) - logits).abs().amax(1) for it in changes)
        rounding = 1e-3 * moved.min()
        if not unmoved.max() < rounding:
            reads = {"cls": "[CLS]", "mean": "the mean of the other tokens", "last": "the last token"}[pooling]
            advice = "encoders take cls or mean, decoders last"
            name = type(model).__name__
            raise InputError(f"--pooling {pooling} needs a head that reads {reads} alone, {name}'s does not: {advice}")
        expected.append((logits, rounding))
    if hook:
        hook.remove()
    unpad.speed_up_encoder(model, pooling, plain)
    for tokens, (logits, rounding) in zip(batches, expected, strict=True):
        if not (model(**tokens).logits - logits).abs().max() < rounding:
            raise InputError(f"{type(model).__name__} gives other logits without padding: give --no_unpadding True")


def logits_with(noise: torch.Tensor, place: nn.Module, model: PreTrainedModel, tokens: dict) -> torch.Tensor:
    """The logits when `noise`, in units of the deviation, is added to the output of `place`."""

    def add(module: nn.Module, args: tuple, output: ModelOutput | tuple | torch.Tensor) -> object:
        hidden = output if isinstance(output, torch.Tensor) else output[0]
        changed = hidden + 3 * hidden.std() * noise
        return changed if hidden is output else unpad.with_output(output, changed)

    hook = place.register_forward_hook(add, prepend=True)
    logits = model(**tokens).logits
    hook.remove()
    return logits
