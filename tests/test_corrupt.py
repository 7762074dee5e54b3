"""What corruption touches, counted by hand; what it draws, against the formula; what it must refuse."""

import json
import math
from collections import Counter
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import (
    AlbertConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    DistilBertConfig,
    ElectraConfig,
    MPNetConfig,
    RobertaConfig,
    T5Config,
)

import corrupt
import models
import places
from common import InputError

# The sixteen parameters of a BERT layer, written down from the architecture's description.
LINEAR = ["attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense"]
LINEAR += ["intermediate.dense", "output.dense"]
NORM = ["attention.output.LayerNorm", "output.LayerNorm"]


def all_tensors(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


# The second of two layers: 6 weights drawn, 2 LayerNorm weights 1, 8 biases 0; every other tensor of the file is
# bit-identical to the original's.
def test_what_is_touched_in_a_two_layer_bert(tiny_bert: Path) -> None:
    original = load_file(tiny_bert / "model.safetensors")
    model, manifest = corrupt.load_corrupted(tiny_bert, corrupt.Corruption("top", Fraction(1, 2)), seed=0)
    after = all_tensors(model.bert)
    expected = {f"encoder.layer.1.{name}.{kind}" for name in LINEAR + NORM for kind in ("weight", "bias")}
    assert {row["name"] for row in manifest["tensors"]} == expected
    assert {name for name in original if not torch.equal(original[name], after[name])} == expected
    assert set(original) == set(after)
    for name in NORM:
        assert torch.equal(after[f"encoder.layer.1.{name}.weight"], torch.ones(32))
    for name in LINEAR + NORM:
        assert not after[f"encoder.layer.1.{name}.bias"].any()
    assert (manifest["side"], manifest["layers"], manifest["num_layers"]) == ("top", [2], 2)
    assert manifest["method"] == "reinit"
    assert Counter(row["init"] for row in manifest["tensors"]) == {"kaiming_uniform": 6, "ones": 2, "zeros": 8}


# A uniform on [-b, b] with b = sqrt(6 / fan_in) has mean 0 and standard deviation b / sqrt(3).
def test_bound_and_moments_of_the_draws() -> None:
    model, manifest = corrupt.load_corrupted(
        models.find_model("minilm")[0], corrupt.Corruption("bottom", Fraction(1, 6)), seed=3
    )
    drawn = [row for row in manifest["tensors"] if row["init"] == "kaiming_uniform"]
    fan_in = {"output.dense.weight": 1536, "attention.output.dense.weight": 384}
    for row in drawn:
        name = row["name"].removeprefix("encoder.layer.0.")
        weight = model.bert.get_parameter(row["name"])
        bound = math.sqrt(6 / fan_in.get(name, 384))
        assert row["bound"] == pytest.approx(bound) and row["count"] == weight.numel()
        assert 0.999 * bound < weight.abs().max() <= bound
        assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.01)
        assert abs(weight.mean().item()) < 4 * bound / math.sqrt(3 * weight.numel())
    assert len({tuple(model.bert.get_parameter(row["name"]).flatten()[:8].tolist()) for row in drawn}) == 6


# kaiming_uniform_ with negative slope a has the bound sqrt(6 / ((1 + a^2) fan_in)).
def test_kaiming_a(tiny_bert: Path) -> None:
    model, manifest = corrupt.load_corrupted(
        tiny_bert, corrupt.Corruption("bottom", Fraction(1, 2), kaiming_a=math.sqrt(5)), seed=0
    )
    (row,) = [row for row in manifest["tensors"] if row["name"].endswith("self.query.weight")]
    assert row["bound"] == pytest.approx(1 / math.sqrt(32))
    assert model.bert.get_parameter(row["name"]).abs().max() <= row["bound"]


# Bottom 1/3 is part of bottom 2/3 and of 100 %, with the same draws; the seed changes them.
def test_corruption_is_nested() -> None:
    folder, _ = models.find_model("minilm")

    def after(side: str, frac: Fraction, seed: int = 0) -> dict[str, str]:
        rows = corrupt.load_corrupted(folder, corrupt.Corruption(side, frac), seed)[1]["tensors"]
        return {row["name"]: row["sha256_after"] for row in rows}

    third, two_thirds, whole = (after("bottom", Fraction(k, 3)) for k in (1, 2, 3))
    assert len(third) == 32 and third.items() < two_thirds.items() < whole.items()
    assert after("top", Fraction(1, 3)).items() == whole.items() - two_thirds.items()
    assert after("top", Fraction(1)) == whole
    other = after("bottom", Fraction(1, 3), seed=1)
    assert all(other[name] != third[name] for name in third if "dense.weight" in name)


SMALL = {"num_hidden_layers": 4, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "vocab_size": 50}
DISTIL = DistilBertConfig(n_layers=4, dim=16, n_heads=2, hidden_dim=32, vocab_size=50)


# Each architecture's layers, found by structure: sixteen tensors a layer, under the name its authors gave the list.
@pytest.mark.parametrize(
    ("config", "layer_list"),
    [
        (DISTIL, "transformer.layer"),
        (RobertaConfig(**SMALL), "encoder.layer"),
        (ElectraConfig(embedding_size=8, **SMALL), "encoder.layer"),
        (MPNetConfig(**SMALL), "encoder.layer"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_layers_of_other_architectures(config: object, layer_list: str) -> None:
    model = AutoModelForSequenceClassification.from_config(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    before = all_tensors(model)
    place = places.Place("bottom", Fraction(1, 4), (0,))
    rows, _ = corrupt.corrupt_layers(model, place, corrupt.UNCORRUPTED, seed=0)
    prefix = f"{model.base_model_prefix}.{layer_list}.0."
    touched = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert touched == {name for name in before if name.startswith(prefix)}
    assert len(rows) == len(touched) == 16
    assert sum(row["kind"].startswith("LayerNorm") for row in rows) == 4


ALBERT = {"hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 32, "embedding_size": 8}


# The second ALBERT has a list of as many layers as it runs, but runs the whole list for each.
@pytest.mark.parametrize(
    ("config", "name"),
    [
        (AlbertConfig(**ALBERT), "AlbertModel"),
        (AlbertConfig(num_hidden_layers=2, inner_group_num=2, **ALBERT), "AlbertModel"),
        (T5Config(num_layers=2, d_model=16, d_ff=32, num_heads=2), "T5Model"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_refused_by_name(config: object, name: str, tmp_path: Path) -> None:
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=name):
        corrupt.check_corruptible(tmp_path, corrupt.Corruption("bottom", Fraction(1, 2)))


@pytest.mark.parametrize(
    ("asked", "given", "layers", "expected"),
    [
        ("none", None, 12, ("none", 0, range(0))),
        ("bottom", "0.25", 12, ("bottom", Fraction(1, 4), range(3))),
        ("top", "0.75", 12, ("top", Fraction(3, 4), range(3, 12))),
        ("top", "1/3", 6, ("top", Fraction(1, 3), range(4, 6))),
        ("bottom", "0", 6, ("none", 0, range(0))),
        ("top", "1", 6, ("all", 1, range(6))),
    ],
)
def test_which_layers(asked: str, given: str | None, layers: int, expected: tuple) -> None:
    side, frac, chosen = expected
    assert places.select_layers(asked, given and Fraction(given), layers) == (side, frac, tuple(chosen), ())


def test_a_fraction_of_a_layer_lists_the_fractions_that_are_allowed() -> None:
    with pytest.raises(InputError, match=r"0, 1/6, 1/3, 1/2, 2/3, 5/6, 1$"):
        places.select_layers("bottom", Fraction("0.3"), 6)


# The saved encoder, read back by the library, is the corrupted one; the manifest's hashes are those of both files.
def test_saved_model_reloads(tiny_bert: Path, tmp_path: Path) -> None:
    saved = tmp_path / "deep" / "corrupted"
    corrupt.save_corrupted(str(tiny_bert), corrupt.Corruption("bottom", Fraction(1, 2)), 0, saved)
    in_memory, _ = corrupt.load_corrupted(tiny_bert, corrupt.Corruption("bottom", Fraction(1, 2)), seed=0)
    reloaded = all_tensors(AutoModel.from_pretrained(saved))
    expected = all_tensors(in_memory.bert)
    assert reloaded.keys() == expected.keys()
    assert all(torch.equal(reloaded[name], expected[name]) for name in expected)
    before, after = load_file(tiny_bert / "model.safetensors"), load_file(saved / "model.safetensors")
    rows = json.loads((saved / "corruption.json").read_text())["tensors"]
    assert len(rows) == 16
    for row in rows:
        assert row["sha256_before"] == corrupt.tensor_sha256(before[row["name"]])
        assert row["sha256_after"] == corrupt.tensor_sha256(after[row["name"]]) != row["sha256_before"]
    with pytest.raises(InputError, match="there already"):
        corrupt.save_corrupted(str(tiny_bert), corrupt.Corruption("top", Fraction(1, 2)), 0, saved)


# A file whose tensors do not match its configuration must not be filled up with random ones.
def test_lost_encoder_weights_are_an_error(tiny_bert: Path, tmp_path: Path) -> None:
    weights = load_file(tiny_bert / "model.safetensors")
    del weights["encoder.layer.1.output.dense.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    (tmp_path / "config.json").write_text((tiny_bert / "config.json").read_text())
    with pytest.raises(InputError, match=r"such as bert\.encoder\.layer\.1\.output\.dense\.weight"):
        corrupt.load_corrupted(tmp_path, corrupt.UNCORRUPTED, seed=0)
