"""What runs inside the encoder, against the library's own encoder on the same weights."""

from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ARCHITECTURES, random_model
from scipy.stats import chisquare
from torch import nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer, BatchEncoding, PreTrainedModel

import corrupt
import pack

# what follows the encoder's output of shape (rows, positions, hidden size)
FIRST = {
    "bert": lambda model, hidden: model.classifier(model.bert.pooler(hidden)),
    "distilbert": lambda model, hidden: model.classifier(model.pre_classifier(hidden[:, 0]).relu()),
}


def head(model: PreTrainedModel, hidden: torch.Tensor) -> torch.Tensor:
    return FIRST.get(model.config.model_type, lambda model, hidden: model.classifier(hidden))(model, hidden)


def both(folder: Path) -> tuple[PreTrainedModel, PreTrainedModel]:
    """The library's model, and ours with the same weights, both without dropout."""
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3).eval()
    ours, _ = corrupt.load_broken(folder, "none", None, seed=0, num_labels=3)
    ours.load_state_dict(model.state_dict())
    return model, ours.eval()


def batches(folder: Path) -> list[BatchEncoding]:
    """Single texts and a pair, padded right and left, rows of equal and of other lengths, and one without a mask."""
    tokenizer, made = AutoTokenizer.from_pretrained(folder), []
    for side in ("right", "left"):
        tokenizer.padding_side = side
        made.append(
            tokenizer(["many words and more of them", "one", "one two", "two"], padding=True, return_tensors="pt")
        )
        made.append(tokenizer(["one", "two"], ["a", "b and c and d"], padding=True, return_tensors="pt"))
    return [*made, tokenizer(["no mask"], return_attention_mask=False, return_tensors="pt")]


# The logits are the head's own, of hidden states whose position 0 was replaced, row by row, by [CLS] (which is not at
# position 0 where the padding is left) or by the mean of the others. Packed or not, for every architecture.
@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_pooling(architecture: str, packed: bool, pooling: str, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / architecture)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, ours = both(folder)
    if packed and architecture == "mpnet":
        with pytest.raises(ValueError, match="mpnet cannot be packed"):
            pack.pack(ours, pooling)
        return
    if packed:
        pack.pack(ours, pooling)
    elif pooling == "mean":
        pack.pool_mean(ours)
    with torch.no_grad():
        for batch in batches(folder):
            hidden = model.base_model(**batch).last_hidden_state
            for row in range(len(hidden)) if packed or pooling == "mean" else ():
                ids = batch["input_ids"][row].tolist()
                others = [i for i in range(len(ids)) if ids[i] not in (tokenizer.cls_token_id, tokenizer.pad_token_id)]
                vectors = [ids.index(tokenizer.cls_token_id)] if pooling == "cls" else others
                hidden[row, 0] = torch.stack([hidden[row, i] for i in vectors]).mean(0)
            torch.testing.assert_close(ours(**batch).logits, head(model, hidden))


# Every gradient of the packed model is the library's, of a padded batch of pairs.
@pytest.mark.parametrize("architecture", pack.PACKABLE)
def test_gradients_of_a_packed_batch(architecture: str, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / architecture)
    model, ours = both(folder)
    pack.pack(ours)
    batch = batches(folder)[1]
    for one in (model, ours):
        one(**batch, labels=torch.tensor([0, 2])).loss.backward()
    gradients = {name: weight.grad for name, weight in model.named_parameters()}
    assert sum(gradient is not None and gradient.abs().max() > 0 for gradient in gradients.values()) > 30
    for name, weight in ours.named_parameters():
        torch.testing.assert_close(weight.grad, gradients[name])


def quick(hidden: torch.Tensor, p: float) -> torch.Tensor:
    return pack.QuickDropout(p)(hidden)


# Kept with probability 1 - p, alike in all four elements that one 64-bit draw serves and independently of each other:
# the sixteen patterns of neighbours have their shares (chi-squared). What is kept is divided by that probability.
@pytest.mark.parametrize("p", [0.1, 0.5])
def test_distribution_of_quick_dropout(p: float) -> None:
    torch.manual_seed(0)
    dropped = quick(torch.full((1_000, 4_000), 3.0), p)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(1 - p, abs=5 * (p * (1 - p) / kept.numel()) ** 0.5 + 2**-17)
    torch.testing.assert_close(dropped[kept], torch.full((int(kept.sum()),), 3 / (1 - p)), rtol=2e-5, atol=0)
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


# The stream hangs on torch's seed alone; a call moves it on. An odd number of elements is no matter.
def test_stream_of_quick_dropout() -> None:
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        masks.append([quick(torch.ones(3, 333), 0.5) for _ in range(2)])
    assert torch.equal(masks[0][0], masks[1][0]) and torch.equal(masks[0][1], masks[1][1])
    assert not torch.equal(masks[0][0], masks[0][1]) and not torch.equal(masks[0][0], masks[2][0])


# Every dropout of the model is ours afterwards and off when it is evaluated; in training, the attention's too, the
# mean over many passes through the first layer's attention is the output without dropout.
def test_dropout_in_a_packed_model(tmp_path: Path) -> None:
    folder = random_model("bert", tmp_path / "bert")
    model, ours = both(folder)
    pack.pack(ours)
    pack.use_quick_dropout(ours)
    kinds = {type(module) for module in ours.modules() if isinstance(module, nn.Dropout)}
    assert kinds == {pack.QuickDropout}
    batch = batches(folder)[0]
    with torch.no_grad():
        torch.testing.assert_close(ours(**batch).logits, model(**batch).logits)
        first = ours.bert.encoder.layer[0].attention.self.train()
        outputs = []
        first.register_forward_hook(lambda *call: outputs.append(call[2][0]))
        for _ in range(2_000):
            ours.bert(**batch)
        expected = []
        first.eval().register_forward_hook(lambda *call: expected.append(call[2][0]))
        ours.bert(**batch)
    assert not torch.equal(outputs[0], outputs[1])
    outputs = torch.stack(outputs)
    error = (outputs.mean(0) - expected[0]).abs() / (outputs.std(0) / 2_000**0.5)
    assert error.max() < 6
