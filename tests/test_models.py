"""What a model's folder holds is what is used: weights, tokenizer, index, positions. Else one line says why not."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from conftest import ARCHITECTURES, random_model, run_of
from datasets import ClassLabel, Dataset, DatasetDict
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForMaskedLM, BertConfig, BertForMaskedLM

import config
import corrupt
import data_prep
import features
import model_check
import models
import train
from common import InputError, RunError

MINILM = models.find_model("minilm")[0]
SHAPE = {"num_attention_heads": 2, "hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64}
TEXTS = ["Ein Café in ZÜRICH, isn't it?", "Łódź & İzmir", "東京 2020", "🙂👍🏽 ok", "New\tline\n."]


def copy_of(folder: Path, to: Path, **configuration: object) -> Path:
    """A copy, with other values in its config.json."""
    shutil.copytree(folder, to, ignore=shutil.ignore_patterns("1_Pooling", "README.md"))
    path = to / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | configuration))
    return to


def check(folder: Path, **flags: object) -> None:
    train.check(config.RunConfig(model=str(folder), **flags))


# ---- Weights ----


def lose_layers(folder: Path) -> None:
    copy_of(MINILM, folder, num_hidden_layers=3)


def index(name: str) -> Callable:
    def make(folder: Path) -> None:
        copy_of(MINILM, folder)
        (folder / "model.safetensors").rename(folder.parent / "secret.safetensors")
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"embeddings": name}}))

    return make


def value(number: float, name: str = "encoder.layer.1.output.dense.weight") -> Callable:
    def make(folder: Path) -> None:
        weights = load_file(MINILM / "model.safetensors")
        weights[name][0] = number
        copy_of(MINILM, folder)
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})

    return make


def adapter(folder: Path) -> None:
    (copy_of(MINILM, folder) / "adapter_config.json").write_text("{}")


def pickled(folder: Path) -> None:
    (copy_of(MINILM, folder) / "model.safetensors").rename(folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lose_layers, r"holds encoder\.layer\.3\..* does not use: mend config.json"),
        (lambda folder: copy_of(MINILM, folder, num_hidden_layers=7), "lacks tensors of its encoder"),
        (index("../secret.safetensors"), r"names '\.\./secret\.safetensors'"),
        (index("/etc/weights.safetensors"), "names '/etc/weights"),
        (index("weights.bin"), "names 'weights.bin'"),
        (index("gone.safetensors"), "gone.safetensors is not a whole safetensors file"),
        (value(float("nan")), "layer.1.output.dense.weight with values that are NaN or infinite"),
        (value(float("-inf"), "embeddings.word_embeddings.weight"), "NaN or infinite"),
        (adapter, "holds an adapter"),
        (pickled, r"--revision refs/pr/N.*AutoModel, AutoTokenizer"),
        (lambda folder: copy_of(MINILM, folder, transformers_weights="other.safetensors"), "has transformers_weights"),
        (lambda folder: copy_of(MINILM, folder, quantization_config={"load_in_8bit": True}), "quantization_config"),
        (lambda folder: copy_of(MINILM, folder, vocab_size=30_000), "cannot be loaded|lacks"),
    ],
)
def test_weights_that_are_not_the_models(make: Callable, message: str, tmp_path: Path) -> None:
    make(tmp_path / "model")
    with pytest.raises(InputError, match=message) as refused:
        check(tmp_path / "model")
    assert "\n" not in str(refused.value)


# A hub's own file: heads of pre-training and buffers of older versions are left aside, the encoder is loaded whole.
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "modernbert"])
def test_heads_of_pretraining_are_dropped(architecture: str, tmp_path: Path) -> None:
    shape = AutoConfig.for_model(architecture, vocab_size=60_000, **ARCHITECTURES.get(architecture, SHAPE))
    pretrained = AutoModelForMaskedLM.from_config(shape)
    for parameter in pretrained.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    pretrained.save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors") | {"embeddings.position_ids": torch.arange(512)[None]}
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    model, manifest = corrupt.load_corrupted(tmp_path, corrupt.UNCORRUPTED, seed=0)
    encoder = dict(pretrained.base_model.named_parameters())
    for name, parameter in model.base_model.named_parameters():
        assert "pooler" in name or torch.equal(parameter, encoder[name]), name
    base = {id(parameter) for parameter in model.base_model.parameters()}
    head = {name for name, parameter in model.named_parameters() if id(parameter) not in base}
    assert head <= set(manifest["newly_initialised"])
    again = corrupt.load_corrupted(tmp_path, corrupt.Corruption("bottom", Fraction(1)), seed=0)[0]
    for name in head:  # the head's own stream: the same beside every corruption, and not the file's
        assert torch.equal(model.get_parameter(name), again.get_parameter(name))
        assert name not in weights or not torch.equal(model.get_parameter(name), weights[name])


# Weights that are replaced while a run loads them, even by a file of the same size and time, make it fail.
def test_weights_replaced_while_loading(tmp_path: Path, small_data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, load = copy_of(MINILM, tmp_path / "model"), corrupt.load_corrupted
    value(0.5)(tmp_path / "other")
    flags = ["--model", str(folder), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data)]
    run = run_of([*flags, "--output_dir", str(tmp_path / "outputs")])

    def replaced(*args: object, **kwargs: object) -> object:
        loaded, weights = load(*args, **kwargs), folder / "model.safetensors"
        shutil.copyfile(tmp_path / "other" / weights.name, weights)
        shutil.copystat(MINILM / weights.name, weights)
        return loaded

    monkeypatch.setattr(corrupt, "load_corrupted", replaced)
    with pytest.raises(RunError, match="was changed while it was being loaded"):
        train.run_training(run)
    assert not (run.folder / "result.json").exists()


# ---- What the model can read ----


# RoBERTa numbers positions from behind its padding index: 512 positions and padding 1 are 510 tokens.
@pytest.mark.parametrize(
    ("architecture", "longest"), [("bert", 40), ("distilbert", 40), ("roberta", 38), ("mpnet", 38)]
)
def test_positions(architecture: str, longest: int, tmp_path: Path) -> None:
    folder = random_model(architecture, tmp_path / architecture, max_position_embeddings=40)
    check(folder, max_length=longest)
    model, ids = corrupt.load_corrupted(folder, corrupt.UNCORRUPTED, seed=0)[0], torch.full((1, longest + 1), 2_000)
    model(ids[:, :-1])
    with pytest.raises((IndexError, RuntimeError)):
        model(ids)
    with pytest.raises(InputError, match=f"--max_length {longest + 1} is not from 8 to {longest}"):
        check(folder, max_length=longest + 1)


def test_a_tokenizer_larger_than_the_embeddings(tmp_path: Path) -> None:
    BertForMaskedLM(BertConfig(vocab_size=20_000, **SHAPE)).bert.save_pretrained(tmp_path)
    models.load_tokenizer(MINILM).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="ids up to 30521, and embeddings for 0 to 19999"):
        check(tmp_path)


# What a configuration says of outputs is nothing to a run: the same numbers.
@pytest.mark.parametrize("flag", [{"output_hidden_states": True}, {"output_attentions": True}, {"return_dict": False}])
def test_outputs_in_the_configuration(flag: dict, flags: list[str], tiny_bert: Path, tmp_path: Path) -> None:
    folder = copy_of(tiny_bert, tmp_path / "tiny-bert", **flag)
    run = run_of([*flags, "--model", str(folder)])
    check(folder)
    same = run_of(flags)
    assert train.run_training(run)["weighted_f1"] == train.run_training(same)["weighted_f1"]
    assert (run.folder / "epochs.csv").read_bytes() == (same.folder / "epochs.csv").read_bytes()


# ---- The tokenizer ----


def raw(folder: Path) -> Tokenizer:
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


# A cased tokenizer.json stays cased, whatever the library makes of it, and a pair keeps its two segments.
@pytest.mark.parametrize(
    "configuration",
    [
        None,
        {"tokenizer_class": "BertTokenizer", "do_lower_case": True},
        {"tokenizer_class": "PreTrainedTokenizerFast"},
        {"tokenizer_class": "BertTokenizer", "do_lower_case": False, "strip_accents": True},
    ],
)
@pytest.mark.parametrize("lowercase", [False, True])
def test_the_tokenizer_is_the_file(configuration: dict | None, lowercase: bool, tmp_path: Path) -> None:
    folder = copy_of(MINILM, tmp_path / "model")
    for name in ("tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
        (folder / name).unlink()
    if configuration:
        (folder / "tokenizer_config.json").write_text(json.dumps(configuration))
    content = json.loads((folder / "tokenizer.json").read_text())
    content["normalizer"]["lowercase"] = lowercase
    (folder / "tokenizer.json").write_text(json.dumps(content))
    tokenizer, expected = models.load_tokenizer(folder), raw(folder)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids
    pair, expected_pair = tokenizer(*TEXTS[:2]), expected.encode(*TEXTS[:2])
    assert (pair["input_ids"], pair["token_type_ids"]) == (expected_pair.ids, expected_pair.type_ids)
    assert {0, 1} == set(pair["token_type_ids"]) and tokenizer.pad_token_id == 0


@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "deberta-v2", "modernbert"])
def test_tokenizers_of_the_architectures(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setitem(ARCHITECTURES, architecture, ARCHITECTURES.get(architecture, SHAPE))
    ids = {"pad_token_id": 0, "cls_token_id": 101, "sep_token_id": 102} if architecture == "modernbert" else {}
    folder = random_model(architecture, tmp_path / architecture, **ids)
    tokenizer, expected = models.load_tokenizer(folder), raw(folder)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == expected.encode(text).ids
    assert tokenizer(*TEXTS[:2])["input_ids"] == expected.encode(*TEXTS[:2]).ids
    assert tokenizer.padding_side == "right" and capsys.readouterr().err == ""


def texts_of(*texts: str) -> DatasetDict:
    columns = {"text": texts} if len(texts) < 3 else {"sentence1": texts[:2], "sentence2": texts[1:]}
    rows = Dataset.from_dict({**columns, "label": [0, 1]}).cast_column("label", ClassLabel(names=["no", "yes"]))
    return DatasetDict(train=rows, test=rows)


# Of 24 tokens one [UNK] is let pass and two are not: 4 and 8 %. A pair without segments is refused for a model that
# tells them apart, and nothing is said for one that does not.
def test_unknown_words_and_lost_segments(tmp_path: Path) -> None:
    tokenizer = models.load_tokenizer(MINILM)
    ten = "one two three four five six seven eight nine ten"
    features.tokenise(texts_of(ten, ten[:-3] + "🙃"), tokenizer, 2, 64, tmp_path / "few")
    with pytest.raises(InputError, match=r"^8% of train's tokens are \[UNK\], at most 5% may be"):
        features.tokenise(texts_of(ten[:-3] + "🙃", ten[:-3] + "🙃"), tokenizer, 2, 64, tmp_path / "many")
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    features.tokenise(texts_of("one", "two", "three"), tokenizer, 0, 64, tmp_path / "none")
    with pytest.raises(InputError, match="does not tell two sentences apart"):
        features.tokenise(texts_of("one", "two", "three"), tokenizer, 2, 64, tmp_path / "pairs")


def test_revision_is_for_the_hub(tiny_bert: Path) -> None:
    for model in ("minilm", str(tiny_bert)):
        with pytest.raises(InputError, match="--revision v1 is for hub models"):
            models.find_model(model, "v1")


# A run's check costs a MiniLM run little: it loads the weights once, also for many runs of a grid.
def test_the_check_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    loads, load = [], corrupt.load_corrupted
    monkeypatch.setattr(corrupt, "load_corrupted", lambda *args, **kwargs: loads.append(args) or load(*args, **kwargs))
    model_check.check_model.cache_clear()
    for pooling in ("cls", "mean", "cls"):
        for seed in range(3):
            check("minilm", pooling=pooling, seed=seed, dataset=data_prep.DEMO[0])
    assert len(loads) == 2
