"""What runs inside the encoder, against the library's own encoder on the same weights."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, SIZES, random_model
from scipy.stats import chisquare
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedModel

import corrupt
import model_check
import places
import unpad
from common import InputError

# what follows the encoder's output of shape (rows, positions, hidden size)
FIRST = {
    "bert": lambda model, hidden: model.classifier(model.bert.pooler(hidden)),
    "distilbert": lambda model, hidden: model.classifier(model.pre_classifier(hidden[:, 0]).relu()),
}


def head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return FIRST.get(model.config.model_type, lambda model, hidden: model.classifier(hidden))(model, hidden)


def both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The library's model, and ours with the same weights, both without dropout.

    Matrices are large, so that attention chooses: with a new model's small ones every query gives nearly the same.
    """
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    for weight in places.encoder_layers(model).parameters():
        weight.data *= 20 if weight.dim() == 2 else 1
    ours, _ = corrupt.load_corrupted(folder, corrupt.UNCORRUPTED, seed=0, num_labels=3)
    ours.load_state_dict(model.state_dict())
    return model, ours.eval()


def batches(folder: Path) -> list[BatchEncoding]:
    """Single texts and a pair, padded right and left, rows of equal and of other lengths, and one without a mask."""
    tokenizer, padded = AutoTokenizer.from_pretrained(folder), []
    texts, pairs = ["many words and more of them", "one", "one two", "two"], (["one", "two"], ["a", "b and c and d"])
    for side in ("right", "left"):
        tokenizer.padding_side = side
        padded.append(tokenizer(texts, padding=True, return_tensors="pt"))
        padded.append(tokenizer(*pairs, padding=True, return_tensors="pt"))
    return [*padded, tokenizer(["no mask"], return_attention_mask=False, return_tensors="pt")]


# The logits are the head's own, of hidden states whose position 0 was replaced, row by row, by [CLS] (which is not at
# position 0 where the padding is left) or by the mean of the others. Unpadded or not, for every architecture.
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("unpadded", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pooling(architecture: str, unpadded: bool, pooling: str, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, ours = both(folder)
    if unpadded and architecture == "mpnet":
        with pytest.raises(ValueError, match="mpnet needs its padding"):
            unpad.unpad(ours, pooling)
        return
    if unpadded:
        unpad.unpad(ours, pooling)
    elif pooling == "mean":
        unpad.pool_mean(ours)
    with torch.no_grad():
        for batch in batches(folder):
            hidden = model.base_model(**batch).last_hidden_state
            for row in range(len(hidden)) if unpadded or pooling == "mean" else ():
                ids = batch["input_ids"][row].tolist()
                others = [i for i in range(len(ids)) if ids[i] not in (tokenizer.cls_token_id, tokenizer.pad_token_id)]
                vectors = [ids.index(tokenizer.cls_token_id)] if pooling == "cls" else others
                hidden[row, 0] = torch.stack([hidden[row, i] for i in vectors]).mean(0)
            torch.testing.assert_close(ours(**batch).logits, head(model, hidden))


# Every gradient of the unpadded model is the library's, of a padded batch of pairs.
@pytest.mark.parametrize("architecture", unpad.UNPADDABLE)
def test_gradients_of_an_unpadded_batch(architecture: str, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / architecture)
    model, ours = both(folder)
    unpad.unpad(ours)
    batch = batches(folder)[1]
    for one in (model, ours):
        one(**batch, labels=torch.tensor([0, 2])).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert sum(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values()) > 30
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name])


# The last layer reads every token for its keys and values, and nothing else of it but [CLS]; of DistilBERT's, the
# attention's output too. With mean pooling it reads all.
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("architecture", unpad.UNPADDABLE)
def test_the_last_layer_is_for_cls_alone(architecture: str, pooling: str, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / architecture)
    _, ours = both(folder)
    unpad.unpad(ours, pooling)
    batch, seen = batches(folder)[0], {}
    layers = places.encoder_layers(ours)
    for number, layer in enumerate(layers):
        for name, linear in layer.named_modules():
            if isinstance(linear, nn.Linear):
                key = number, name
                linear.register_forward_pre_hook(lambda _, args, key=key: seen.update({key: args[0].shape[1]}))
    ours(**batch)
    rows, tokens = len(batch["input_ids"]), int(batch["attention_mask"].sum())
    for (number, name), count in seen.items():
        all_read = number < len(layers) - 1 or pooling == "mean" or name.endswith(("key", "value", "k_lin", "v_lin"))
        assert count == (tokens if all_read or name == "attention.out_lin" else rows), name
    assert len(seen) == 6 * len(layers)


def dropped(ones: torch.Tensor, p: float) -> torch.Tensor:
    return ones * unpad.keep_mask(ones.numel(), p, ones.dtype).view(ones.shape)


# Kept with probability 1 - p, alike in all four elements that one 64-bit draw serves and independently of each other:
# the sixteen patterns of neighbours have their shares (chi-squared). What is kept is divided by that probability.
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_distribution_of_the_mask(p: float) -> None:
    torch.manual_seed(0)
    left = dropped(torch.full((1_000, 4_000), 3.0), p)
    kept = left != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5 + 2**-17)
    torch.testing.assert_close(left[kept], torch.full((int(kept.sum()),), 3 / (1 - p)), rtol=2e-5, atol=0)
    for apart in (1, 4_000):
        patterns = np.bincount(
            kept.flatten()[: 4 * apart * (kept.numel() // (4 * apart))]
            .view(-1, 4, apart)
            .numpy()
            .transpose(0, 2, 1)
            .reshape(-1, 4)
            @ [8, 4, 2, 1],
            minlength=16,
        )
        expected = [np.prod([1 - p if n >> bit & 1 else p for bit in range(4)]) for n in range(16)]
        assert chisquare(patterns, np.array(expected) * patterns.sum()).pvalue > 1e-3


# The stream depends on torch's seed alone; a call moves it on. The number of elements may be odd.
def test_stream_of_the_mask() -> None:
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append([dropped(torch.ones(3, 333), 0.5) for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1]) and not torch.equal(masks[0][0], masks[2][0])


# The attention's dropout is off when the model is evaluated; in training the mean over many passes through the first
# layer's attention is the output without dropout.
def test_dropout_in_an_unpadded_model(tmp_path: Path) -> None:
    folder = random_model("bert", tmp_path / "bert")
    model, ours = both(folder)
    unpad.unpad(ours)
    batch = batches(folder)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, model(**batch).logits)
        first, calls = ours.bert.encoder.layer[0].attention.self, []
        first.register_forward_pre_hook(lambda *call: calls.append(call[1:]), with_kwargs=True)
        ours(**batch)
        ((args, kwargs),) = calls
        expected, _ = first(*args, **kwargs)
        first.train()
        outputs = torch.stack([first(*args, **kwargs)[0] for _ in range(2_000)])
    assert not torch.equal(outputs[0], outputs[1])
    error = (outputs.mean(0) - expected).abs() / (outputs.std(0) / 2_000**0.5)
    assert error.max() < 6


# ---- Does the head read what --pooling says? ----

SHAPES = {
    "modernbert": {**SIZES, "pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102, "classifier_pooling": "mean"},
    "deberta-v2": SIZES,
    "opt": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "word_embed_proj_dim": 32},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "pad_token_id": 0},
}


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, *SHAPES])
def test_pooling_is_checked(architecture: str, pooling: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(ARCHITECTURES, architecture, {**ARCHITECTURES, **SHAPES}[architecture])
    folder = random_model(architecture, tmp_path / architecture)
    if architecture in ("opt", "gpt2") or (architecture, pooling) == ("deberta-v2", "mean"):
        with pytest.raises(InputError, match=f"{pooling} needs a head that reads .*ForSequenceClassification"):
            model_check.check_model(folder, "fingerprint", pooling, False)
    else:
        model_check.check_model(folder, "fingerprint", pooling, False)


def last_token(module: nn.Module, args: tuple) -> tuple:
    return (args[0].flip(1),)


def all_tokens(module: nn.Module, args: tuple) -> tuple:
    return (args[0] + 0.1 * args[0].mean(1, keepdim=True),)


# A head that reads another position, or others as well, is found out; so is a mean that takes [CLS] or the padding
# along or is not a mean, and a path of ours that gives other logits.
@pytest.mark.parametrize(
    ("pooling", "fault"), [("cls", last_token), ("cls", all_tokens), ("mean", last_token), ("mean", all_tokens)]
)
def test_a_head_that_reads_something_else(pooling: str, fault: Callable, tiny_bert: Path) -> None:
    model, _ = corrupt.load_corrupted(tiny_bert, corrupt.UNCORRUPTED, seed=0)
    tokens = batches(tiny_bert)[:2]
    model_check.check_pooling(corrupt.load_corrupted(tiny_bert, corrupt.UNCORRUPTED, seed=0)[0], tokens, pooling, False)
    model.bert.pooler.register_forward_pre_hook(fault)
    with pytest.raises(InputError, match="needs a head that reads"):
        model_check.check_pooling(model, tokens, pooling, True)


def mean_of_all(model: PreTrainedModel) -> RemovableHandle:
    return unpad.encoder_of(model).register_forward_hook(
        lambda module, args, output: unpad.with_output(output, output[0].mean(1, keepdim=True).expand_as(output[0]))
    )


def largest(model: PreTrainedModel) -> RemovableHandle:
    return unpad.encoder_of(model).register_forward_hook(
        lambda module, args, output: unpad.with_output(
            output, output[0][:, 1:3].amax(1, keepdim=True).expand_as(output[0])
        )
    )


@pytest.mark.parametrize("pool", [mean_of_all, largest])
def test_a_mean_of_something_else(pool: Callable, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unpad, "pool_mean", pool)
    model, _ = corrupt.load_corrupted(tiny_bert, corrupt.UNCORRUPTED, seed=0)
    with pytest.raises(InputError, match="needs a head that reads the mean of the other tokens alone"):
        model_check.check_pooling(model, batches(tiny_bert)[:2], "mean", True)


def test_another_path(tiny_bert: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows_of = unpad.rows_of
    monkeypatch.setattr(unpad, "rows_of", lambda *args: [rows * 1.01 for rows in rows_of(*args)])
    model, _ = corrupt.load_corrupted(tiny_bert, corrupt.UNCORRUPTED, seed=0)
    with pytest.raises(InputError, match="gives other logits without padding"):
        model_check.check_pooling(model, batches(tiny_bert)[:2], "cls", False)
