"""The lab (docs/lab.md): where and how a model is corrupted, what trains; each definition checked."""

import json
import math
from fractions import Fraction
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DECODERS, OTHERS, random_model, run_of
from safetensors.torch import load_file
from scipy.stats import kstest
from test_train import own_pairs
from torch.nn.utils import prune
from transformers import AutoModel, AutoTokenizer, BertConfig

import config
import corrupt
import model_check
import models
import places
import train
import tunings
import unpad
from common import InputError
from config import RunConfig
from corrupt import Corruption

MINILM = models.find_model("minilm")[0]
HALF = Fraction(1, 2)
EVERY = ("reinit", None), ("normal", None), ("noise", 0.5), ("shuffle", None), ("prune", 0.5), ("prune_random", 0.5)
EVERY = (*EVERY, ("bitflip", 1e-3))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny random model of each architecture."""
    root = tmp_path_factory.mktemp("architectures")
    return {name: random_model(name, root / name) for name in LAYER}


def tensors_of(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.base_model.named_parameters()}


def corrupted(folder: Path, how: Corruption, seed: int = 0) -> tuple[dict, dict, dict[str, dict]]:
    """The base model's tensors before and after, and the manifest's rows by name."""
    before = tensors_of(corrupt.load_corrupted(folder)[0])
    model, manifest = corrupt.load_corrupted(folder, how, seed)
    return before, tensors_of(model), {row["name"]: row for row in manifest["tensors"]}


# ---- Where ----


# Of a layer of each architecture, from its authors' description: how many matrices, biases and norm weights; the name
# of a matrix that narrows or widens, and its fan-in. GPT-2's Conv1D has the inputs in its first dimension.
LAYER = {
    "bert": (6, 8, 2, "1.output.dense.weight", 64),
    "distilbert": (6, 8, 2, "ffn.lin2.weight", 64),
    "roberta": (6, 8, 2, "1.output.dense.weight", 64),
    "xlm-roberta": (6, 8, 2, "1.output.dense.weight", 64),
    "camembert": (6, 8, 2, "1.output.dense.weight", 64),
    "electra": (6, 8, 2, "1.output.dense.weight", 64),
    "mpnet": (6, 8, 2, "1.output.dense.weight", 64),
    "deberta-v2": (6, 8, 2, "1.output.dense.weight", 64),
    "modernbert": (4, 0, 2, "mlp.Wo.weight", 64),
    "gpt2": (4, 6, 2, "mlp.c_proj.weight", 128),
    "opt": (6, 8, 2, "fc2.weight", 64),
    "gpt_neox": (4, 6, 2, "mlp.dense_4h_to_h.weight", 64),
    "llama": (7, 0, 2, "mlp.down_proj.weight", 64),
    "qwen2": (7, 3, 2, "mlp.down_proj.weight", 64),
}


@pytest.mark.parametrize("architecture", LAYER)
def test_each_architecture_is_corrupted_exactly(architecture: str, folders: dict[str, Path]) -> None:
    matrices, biases, norms, narrow, fan_in = LAYER[architecture]
    before, after, rows = corrupted(folders[architecture], Corruption("top", HALF))
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == rows.keys() == {name for name in before if ".1." in f".{name}"}
    inits = [row["init"] for row in rows.values()]
    assert [inits.count(init) for init in ("kaiming_uniform", "zeros", "ones")] == [matrices, biases, norms]
    for name, row in rows.items():
        if row["init"] == "kaiming_uniform":
            bound = math.sqrt(6 / (fan_in if name.endswith(narrow) else 32))
            assert row["bound"] == pytest.approx(bound) and 0.9 * bound < after[name].abs().max() <= bound
            assert after[name].std().item() == pytest.approx(bound / math.sqrt(3), rel=0.1)
        else:
            assert (after[name] == (1 if row["init"] == "ones" else 0)).all()


# The parts of a layer are the whole of it, and no tensor is in two.
@pytest.mark.parametrize("architecture", LAYER)
def test_parts(architecture: str, folders: dict[str, Path]) -> None:
    of = {part: set(corrupted(folders[architecture], Corruption(layers="2", parts=part))[2]) for part in places.PARTS}
    whole = corrupted(folders[architecture], Corruption(layers="2"))[2]
    assert set().union(*of.values()) == whole.keys() and sum(map(len, of.values())) == len(whole)
    assert of["layernorm"] == {name for name, row in whole.items() if "Norm" in row["kind"]}
    mixing = (
        "query",
        "key",
        "value",
        "q_",
        "k_",
        "v_",
        ".q.",
        ".k.",
        ".v.",
        ".o.",
        "o_proj",
        "out",
        "attn",
        "attention.",
    )
    assert all(any(word in name for word in mixing) for name in of["attention"])
    assert len(of["ffn"]) in (2, 3, 4) and not any("attention." in name or "attn" in name for name in of["ffn"])


# Embeddings: rows uniform as the outputs of a layer with fan-in 32; the row of padding 0. The rest stays.
def test_embeddings_and_pooler(tiny_bert: Path) -> None:
    before, after, rows = corrupted(tiny_bert, Corruption(layers="embeddings"))
    assert {name for name in before if not torch.equal(before[name], after[name])} == rows.keys()
    assert rows.keys() == {name for name in before if name.startswith("embeddings.")}
    words, bound = after["embeddings.word_embeddings.weight"], math.sqrt(6 / 32)
    assert not words[0].any() and (words[1:].abs().sum(1) > 0).all() and 0.99 * bound < words.abs().max() <= bound
    assert (after["embeddings.LayerNorm.weight"] == 1).all() and not after["embeddings.LayerNorm.bias"].any()
    assert corrupted(tiny_bert, Corruption(layers="pooler"))[2].keys() == {"pooler.dense.weight", "pooler.dense.bias"}
    both = corrupted(tiny_bert, Corruption(layers="1,pooler,embeddings"))[2]
    assert len(both) == 16 + 2 + 5


PLACES = [("1-3", "bottom", "1-3"), ("3,1,2", "bottom", "1-3"), ("6", "top", "6"), ("4-6,4", "top", "4-6")]
PLACES += [("1-6", "all", "1-6"), ("6,2-4", "2-4,6", "2-4,6"), ("2,embeddings", "embeddings,2", "embeddings,2")]


@pytest.mark.parametrize(("given", "side", "spelled"), PLACES)
def test_places(given: str, side: str, spelled: str) -> None:
    place = places.select_layers("none", None, 6, given)
    assert (place.side, str(place)) == (side, spelled)


# --layers 1-3 of six is --corrupt bottom --frac 1/2: the same tensors, draws and folder.
def test_two_names_of_one_place(flags: list[str]) -> None:
    names = {run_of([*flags, *words]).name for words in (["--layers", "2"], ["--corrupt", "top", "--frac", "1/2"])}
    assert len(names) == 1
    parts = ("all", "layernorm,ffn,attention", "ffn,attention", "attention,ffn,ffn")
    names = [run_of([*flags, "--layers", "2", "--parts", words]).name for words in parts]
    assert names[0] == names[1] != names[2] == names[3]
    assert "_layers-embeddings_" in run_of([*flags, "--layers", "embeddings"]).name


# Each layer by itself, and all together: the same draws, whatever the method.
@pytest.mark.parametrize(("method", "severity"), EVERY)
def test_single_layers_make_up_the_range(method: str, severity: float | None) -> None:
    def digests(layers: str, seed: int = 0) -> dict[str, str]:
        how = Corruption(layers=layers, method=method, severity=severity)
        rows = corrupt.load_corrupted(MINILM, how, seed)[1]["tensors"]
        return {row["name"]: row["sha256_after"] for row in rows}

    whole = digests("1-2")
    assert digests("1") | digests("2") == whole
    if method != "prune":
        assert digests("1-2", seed=1) != whole


# ---- How ----


def test_shuffle_keeps_the_values() -> None:
    before, after, rows = corrupted(MINILM, Corruption(layers="1", method="shuffle"))
    for name in rows:
        assert torch.equal(before[name].flatten().sort().values, after[name].flatten().sort().values)
        assert not torch.equal(before[name], after[name])
    # each tensor's stream, by its definition: seed, method and parameter name
    seed = int.from_bytes(sha256(f"0:shuffle:{name}".encode()).digest()[:8]) % 2**63
    order = torch.randperm(before[name].numel(), generator=torch.Generator().manual_seed(seed))
    assert torch.equal(before[name].flatten()[order], after[name].flatten())


@pytest.mark.parametrize(("method", "theirs"), [("prune", prune.l1_unstructured), ("prune_random", None)])
def test_prune_as_torch_does(method: str, theirs: object) -> None:
    before, after, rows = corrupted(MINILM, Corruption(layers="1", method=method, severity=0.3))
    assert len(rows) == 6 and all(name.endswith("weight") and "Norm" not in name for name in rows)
    for name in rows:
        zeros = round(0.3 * before[name].numel())
        assert int((after[name] == 0).sum()) == rows[name]["zeroed"] == zeros
        assert torch.equal(after[name][after[name] != 0], before[name][after[name] != 0])
        module = torch.nn.Linear(*before[name].T.shape)
        module.weight.data.copy_(before[name])
        if theirs:
            assert torch.equal(theirs(module, "weight", amount=0.3).weight, after[name])
    ties = places.Target("w", 0, "ffn", "Linear.weight", "matrix", 4, module, torch.nn.Parameter(torch.ones(2, 4)))
    with torch.no_grad():
        corrupt.prune(ties, torch.Generator(), Corruption(severity=0.5))
    assert ties.parameter.tolist() == [[0] * 4, [1] * 4]  # of equal ones the first


# (W' - W) / (s std) are draws from N(0, 1), by Kolmogorov and Smirnov's test; severity scales the draw.
def test_noise_is_standard_normal() -> None:
    name, how = "encoder.layer.0.output.dense.weight", Corruption(layers="1", method="noise", severity=0.5)
    before, after, rows = corrupted(MINILM, how)
    deviation = before[name].numpy().astype(float).std()
    drawn = (after[name] - before[name]).double().numpy() / (0.5 * deviation)
    assert kstest(drawn.ravel()[:20_000], "norm").pvalue > 1e-3
    assert drawn.std() == pytest.approx(1, abs=0.01) and rows[name]["std"] == pytest.approx(deviation)
    for other, row in rows.items():  # of the population, which tells in a bias of few values
        assert row["std"] == pytest.approx(before[other].numpy().astype(float).std(), rel=1e-6, abs=1e-9)
    twice = corrupted(MINILM, how._replace(severity=1.0))[1][name]
    assert torch.allclose(twice - before[name], 2 * (after[name] - before[name]), atol=1e-6)


def test_noise_leaves_a_constant_tensor(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert)
    torch.nn.init.constant_(model.encoder.layer[0].output.dense.bias, 0.1)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    before, after, _ = corrupted(tmp_path, Corruption(layers="1", method="noise", severity=1.0))
    same = [name for name in before if name.startswith("encoder.layer.0.") and torch.equal(before[name], after[name])]
    assert same == ["encoder.layer.0.output.dense.bias"]


# The flipped bits, by XOR of the raw words: their number is binomial (n, s), each of the 32 places alike. What left the
# range of ten times the largest magnitude is 0, and counted.
def test_bitflip_by_xor() -> None:
    s, name = 1e-3, "encoder.layer.0.intermediate.dense.weight"
    before, after, rows = corrupted(MINILM, Corruption(layers="1", method="bitflip", severity=s))
    old, new = (tensors[name].numpy().view(np.uint32) for tensors in (before, after))
    zeroed, count = (after[name] == 0).numpy(), before[name].numel()
    mask = (old ^ new)[~zeroed]
    assert rows[name]["zeroed"] == zeroed.sum() > 0
    assert after[name].abs().max() <= 10 * before[name].abs().max() and after[name].isfinite().all()
    assert abs(rows[name]["bits_flipped"] - 32 * count * s) < 5 * math.sqrt(32 * count * s * (1 - s))
    mantissa = [int((mask >> bit & 1).sum()) for bit in range(23)]  # their flips leave nothing out of range
    assert all(abs(flips - mask.size * s) < 5 * math.sqrt(mask.size * s) for flips in mantissa)
    kept = np.bitwise_count(mask).sum()
    assert kept <= rows[name]["bits_flipped"] <= kept + 32 * zeroed.sum()


def test_bitflip_of_all_bits_is_not(tiny_bert: Path) -> None:
    before, after, rows = corrupted(tiny_bert, Corruption(layers="1", method="bitflip", severity=1.0))
    for name in rows:
        flipped = ~before[name].numpy().view(np.uint32)
        values = torch.from_numpy(flipped.view(np.float32).copy())
        values[~(values.abs() <= 10 * before[name].abs().max())] = 0
        assert torch.equal(after[name], values)


# `normal` against the library's own fresh model: BERT's N(0, 0.02), and GPT-2's output projections, 0.02 / sqrt(2 L).
def test_normal_is_the_librarys_draw(folders: dict[str, Path]) -> None:
    _, after, rows = corrupted(MINILM, Corruption(layers="1", method="normal"))
    for name in rows:
        if "Norm" in name or name.endswith("bias"):
            assert (after[name] == (1 if name.endswith("weight") else 0)).all()
        else:
            assert kstest(after[name].flatten().numpy()[:20_000] / BertConfig().initializer_range, "norm").pvalue > 1e-3
    for architecture, wanted in (("gpt2", {"c_proj": 0.02 / math.sqrt(4), "c_attn": 0.02}), ("modernbert", {})):
        _, after, rows = corrupted(folders[architecture], Corruption("top", HALF, method="normal"))
        torch.manual_seed(1)
        fresh = dict(AutoModel.from_config(AutoModel.from_pretrained(folders[architecture]).config).named_parameters())
        for name in rows:
            assert after[name].std().item() == pytest.approx(fresh[name].std().item(), rel=0.15, abs=1e-9)
        for part, deviation in wanted.items():
            drawn = [after[name].std().item() for name in rows if f"{part}.weight" in name]
            assert drawn and drawn == pytest.approx([deviation] * len(drawn), rel=0.1)


# Each layer's tensors are those of another one of the chosen, in a random order that is not theirs.
def test_permute_exchanges_layers() -> None:
    orders = set()
    for seed in range(4):
        before, after, rows = corrupted(MINILM, Corruption(layers="2-4", method="permute"), seed)
        source = {row["layer"]: row["from_layer"] for row in rows.values()}
        orders.add(tuple(source.items()))
        assert sorted(source) == sorted(source.values()) == [2, 3, 4] and any(k != v for k, v in source.items())
        for name in before:
            layer = int(name.split(".")[2]) + 1 if name.startswith("encoder.layer.") else 0
            origin = name.replace(f".{layer - 1}.", f".{source.get(layer, layer) - 1}.", 1) if layer else name
            assert torch.equal(after[name], before[origin]), name
    assert len(orders) > 1
    for seed in range(6):  # of two there is one order that is not theirs
        rows = corrupt.load_corrupted(MINILM, Corruption(layers="2,5", method="permute"), seed)[1]["tensors"]
        assert {(row["layer"], row["from_layer"]) for row in rows} == {(2, 5), (5, 2)}


# What is left is the other layers, in their order; the library loads it, and it computes what they compute.
@pytest.mark.parametrize("architecture", ["bert", "distilbert", "modernbert", "gpt2", "qwen2"])
def test_drop_takes_layers_out(architecture: str, tmp_path: Path) -> None:
    layers = {"distilbert": "n_layers", "gpt2": "n_layer"}.get(architecture, "num_hidden_layers")
    folder = random_model(architecture, tmp_path / "four", **{layers: 4})
    before = tensors_of(corrupt.load_corrupted(folder)[0])
    manifest = corrupt.save_corrupted(str(folder), Corruption(layers="2-3", method="drop"), 0, tmp_path / "saved")
    assert (manifest["layers"], manifest["num_layers"], manifest["relative_change"]) == ([2, 3], 4, None)
    assert {row["layer"] for row in manifest["tensors"]} == {2, 3}
    in_memory = places.encoder_layers(corrupt.load_corrupted(folder, Corruption(layers="2-3", method="drop"))[0])
    for number, layer in enumerate(in_memory):  # a decoder's cache goes by it
        assert {getattr(module, "layer_idx", number) for module in layer.modules()} == {number}
    model = AutoModel.from_pretrained(tmp_path / "saved")
    assert model.config.num_hidden_layers == len(places.encoder_layers(model)) == 2
    whole = AutoModel.from_pretrained(folder)
    layers, kept = places.encoder_layers(whole), places.encoder_layers(model)
    for layer, number in zip(kept, (0, 3), strict=True):
        theirs = dict(layers[number].named_parameters())
        assert all(torch.equal(tensor, theirs[name]) for name, tensor in layer.named_parameters())
    assert sum(map(torch.Tensor.numel, before.values())) > sum(map(torch.Tensor.numel, model.parameters()))
    with torch.no_grad():
        assert model(torch.arange(5, 15)[None])[0].isfinite().all()


# |W' - W| / |W| by NumPy, for a tensor, and for all of them together; none where |W| is 0.
def test_relative_change(tiny_bert: Path, tmp_path: Path) -> None:
    model = AutoModel.from_pretrained(tiny_bert)
    torch.nn.init.zeros_(model.encoder.layer[0].output.dense.bias)
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(tiny_bert).save_pretrained(tmp_path)
    before, after, rows = corrupted(tmp_path, Corruption("bottom", HALF))
    changes, sizes = [], []
    for name, row in rows.items():
        old, new = before[name].numpy().astype(float), after[name].numpy().astype(float)
        changes.append(np.linalg.norm(new - old))
        sizes.append(np.linalg.norm(old))
        expected = changes[-1] / sizes[-1] if sizes[-1] else None
        assert row["relative_change"] == (expected and pytest.approx(expected))
    assert rows["encoder.layer.0.output.dense.bias"]["relative_change"] is None
    whole = corrupt.load_corrupted(tmp_path, Corruption("bottom", HALF))[1]["relative_change"]
    assert whole == pytest.approx(np.linalg.norm(changes) / np.linalg.norm(sizes))


# ---- What trains ----


def starts_with(*prefixes: str) -> object:
    return lambda name: name.startswith(prefixes)


TRAINS = {  # of a BERT whose bottom half is corrupted, by the names of its parameters
    "full": lambda name: True,
    "corrupted": starts_with("bert.encoder.layer.0.", "classifier."),
    "intact": lambda name: not name.startswith("bert.encoder.layer.0."),
    "bitfit": lambda name: name.endswith("bias") or name.startswith("classifier."),
    "lora": lambda name: name.endswith(("query.weight", "value.weight")) or name.startswith("classifier."),
    "llrd": lambda name: True,
}


# A run of each: what it is not to train is the loaded model's to the bit, what it trains has moved, and is counted.
@pytest.mark.parametrize("tuning", TRAINS)
def test_what_trains(tuning: str, flags: list[str], tiny_bert: Path) -> None:
    cell = ["--corrupt", "bottom", "--frac", "1/2", "--tuning", tuning]
    run = run_of([*flags, *cell, "--save_model", "--num_train_epochs", "1"])
    result = train.run_training(run)
    saved = load_file(run.folder / "model" / "model.safetensors")
    start = dict(corrupt.load_corrupted(tiny_bert, Corruption("bottom", HALF), num_labels=2)[0].named_parameters())
    assert saved.keys() == start.keys()
    moved = {name for name in saved if not torch.equal(saved[name], start[name])}
    expected = {name for name in start if TRAINS[tuning](name)}
    assert moved == expected
    count = sum(start[name].numel() for name in expected)
    if tuning == "lora":  # two layers of query and value, r (d_in + d_out) each, and the head
        count = 2 * 2 * 8 * (32 + 32) + sum(start[name].numel() for name in expected if "classifier" in name)
    assert result["model"]["trained"] == count


# By hand, for two layers and decay 1/2: embeddings 1/4, the first layer 1/2, the second, the pooler and the head 1.
def test_layerwise_rates(flags: list[str], tiny_bert: Path) -> None:
    model, _ = corrupt.load_corrupted(tiny_bert)
    factors = tunings.rate_factors(model, 0.5)
    of = {name: factors[parameter] for name, parameter in model.named_parameters()}
    by_hand = {"bert.embeddings.": 0.25, "bert.encoder.layer.0.": 0.5, "bert.encoder.layer.1.": 1.0}
    assert of == {name: next((by_hand[p] for p in by_hand if name.startswith(p)), 1.0) for name in of}
    result = train.run_training(run_of([*flags, "--tuning", "llrd", "--layer_decay", "0.5", "--num_train_epochs", "1"]))
    rates = {group["initial_lr"] for group in result["in_force"]["groups"]}
    assert sorted(rates) == pytest.approx([2.5e-4, 5e-4, 1e-3])


@pytest.mark.parametrize("architecture", ["bert", "gpt2", "modernbert"])
def test_lora_merged_is_lora(architecture: str, folders: dict[str, Path]) -> None:
    model, manifest = corrupt.load_corrupted(folders[architecture], num_labels=3)
    names, ids = [name for name, _ in model.named_parameters()], torch.arange(5, 15)[None]
    plain = model.eval()(ids).logits
    tunings.tune_lora(model, manifest, RunConfig(tuning="lora", lora_rank=4))
    assert torch.equal(model(ids).logits, plain)  # B is 0 at first
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=3)
    trained = model(ids).logits
    assert (trained - plain).abs().max() > 1e-3
    tunings.merge_lora(model)
    assert torch.allclose(model(ids).logits, trained, atol=1e-5)
    assert [name for name, _ in model.named_parameters()] == names


# ---- Every architecture, as a user runs it ----


@pytest.mark.parametrize("tuning", ["full", "probe", "lora"])
@pytest.mark.parametrize("architecture", OTHERS)
def test_a_run_of_each(architecture: str, tuning: str, flags: list[str], folders: dict[str, Path]) -> None:
    pooling = "last" if architecture in DECODERS else "cls"
    words = ["--model", str(folders[architecture]), "--pooling", pooling, "--tuning", tuning, "--max_steps", "2"]
    run = run_of([*flags, *words, "--corrupt", "bottom", "--frac", "1/2"])
    train.check(run.config)
    result = train.run_training(run)
    assert math.isfinite(result["weighted_f1"]) and not result["speed"]["unpadded"]
    assert "with padding" in config.describe_result(run.settings, result)


@pytest.mark.parametrize("architecture", OTHERS)
def test_which_pooling_fits(architecture: str, folders: dict[str, Path]) -> None:
    accepted = set()
    for pooling in ("cls", "mean", "last"):
        try:
            model_check.check_model(folders[architecture], "any", pooling, False)
            accepted.add(pooling)
        except InputError as error:
            assert f"--pooling {pooling} needs a head" in str(error)
    encoders = {"deberta-v2": {"cls"}, "modernbert": {"cls", "mean"}}
    assert accepted == encoders.get(architecture, {"last"})


# A saved decoder reads its rows as the run did: the last token before the padding.
def test_a_saved_decoder(flags: list[str], folders: dict[str, Path]) -> None:
    words = ["--model", str(folders["gpt2"]), "--pooling", "last", "--save_model", "--save_vectors", "--max_steps", "3"]
    run = run_of([*flags, *words])
    train.run_training(run)
    model, tokenizer = (
        unpad.load_saved(run.folder / "model").eval(),
        AutoTokenizer.from_pretrained(run.folder / "model"),
    )
    batch = tokenizer(["good film", "a long and winding film that is not good"], padding=True, return_tensors="pt")
    alone = [model(**tokenizer([text], return_tensors="pt")).logits for text in ("good film",)]
    assert torch.allclose(model(**batch).logits[0], alone[0][0], atol=1e-5)
    vectors = np.load(run.folder / "vectors.npy")
    assert vectors.shape == (50, 32) and np.isfinite(vectors).all()


# ---- What is refused ----

BAD = {
    "--corrupt bottom --frac 1/2 --severity 0.5": "--severity 0.5 is not for --method reinit",
    "--corrupt bottom --frac 1/2 --method noise": "needs a --severity above 0",
    "--corrupt bottom --frac 1/2 --method noise --severity 0": "needs a --severity above 0",
    "--corrupt bottom --frac 1/2 --method noise --severity nan": "needs a --severity above 0",
    "--corrupt bottom --frac 1/2 --method noise --severity 1e39": "above 0 and at most 1e6, and it is 1e+39",
    "--corrupt bottom --frac 1/2 --method prune --severity 1.5": "needs a --severity from 0 to 1",
    "--corrupt bottom --frac 1/2 --method smash": "--method smash is not known: choose from reinit",
    "--method noise --severity 1": "--method needs something to corrupt",
    "--corrupt bottom --frac 1/2 --method noise --severity 1 --kaiming_a 1": "--kaiming_a is of --method reinit",
    "--layers 3": "'3' is not a place in this model: give layers from 1 to 2",
    "--layers 2-1": "'2-1' is not a place",
    "--layers 0": "'0' is not a place",
    "--layers 1,head": "'head' is not a place",
    "--layers ²": "'²' is not a place",
    "--layers 1 --corrupt bottom --frac 1/2": "give one of them",
    "--layers 1 --parts heads": "--parts heads is not known: choose from attention, ffn, layernorm",
    "--layers embeddings --parts ffn": "--parts narrows layers",
    "--layers 1 --method permute": "are fewer than two",
    "--layers 1,2 --method drop": "leaves no encoder",
    "--layers 1,embeddings --method drop": "takes whole layers",
    "--layers 1,2 --parts ffn --method permute": "takes whole layers",
    "--layers 1 --parts layernorm --method prune --severity 0.5": "needs weight matrices",
    "--pooling last": "--pooling last needs a head that reads the last token alone",
    "--tuning lora --lora_rank 0": "--lora_rank 0 is not above 0",
    "--lora_rank 4": "--lora_rank is of --tuning lora",
    "--tuning llrd --layer_decay 2": "not above 0 and at most 1",
    "--tuning corrupted": "with nothing corrupted",
    "--tuning intact --layers 1-2 --method permute": "with --method permute has no tensors to tell apart",
}


@pytest.mark.parametrize("words", BAD)
def test_refused_in_one_line(
    words: str, flags: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr("sys.argv", ["train.py", *flags, *words.split()])
    with pytest.raises(SystemExit) as ended:
        train.main()
    (line,) = capsys.readouterr().err.splitlines()[-1:]
    assert ended.value.code == 2 and BAD[words] in line and not (tmp_path / "outputs" / "runs").exists()


@pytest.mark.parametrize(
    ("architecture", "words", "message"),
    [
        ("distilbert", "--layers pooler", "DistilBertModel has no pooler"),
        ("gpt2", "--pooling mean", "needs a head that reads the mean"),
        ("gpt2", "", "decoders last"),
        ("llama", "--pooling last --tuning bitfit", "has none: use lora"),
        ("modernbert", "--layers 1-2 --method permute", "differ in kind"),
        ("modernbert", "--layers 1 --method drop", "cannot take out layer 1"),
    ],
)
def test_refused_for_an_architecture(
    architecture: str, words: str, message: str, flags: list[str], folders: dict[str, Path]
) -> None:
    run = run_of([*flags, "--model", str(folders[architecture]), *words.split()])
    with pytest.raises(InputError, match=message):
        train.check(run.config)
        train.run_training(run)


# A tokenizer that puts nothing between two sentences would make one of them.
def test_pairs_need_a_separator(flags: list[str], folders: dict[str, Path], small_data: Path, tmp_path: Path) -> None:
    pairs = own_pairs(small_data, tmp_path / "pairs")
    words = ["--dataset", str(pairs), "--data_dir", str(tmp_path / "data"), "--pooling", "last", "--max_steps", "2"]
    with pytest.raises(InputError, match="puts nothing between two sentences"):
        train.run_training(run_of([*flags, "--model", str(folders["gpt_neox"]), *words]))


# The command writes what the hook does, and says how much was changed.
def test_the_command(
    tmp_path: Path, tiny_bert: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    words = ["--model", str(tiny_bert), "--layers", "2", "--method", "noise", "--severity", "0.5"]
    monkeypatch.setattr("sys.argv", ["corrupt.py", *words, "--output_dir", str(tmp_path / "new")])
    corrupt.main()
    manifest = json.loads((tmp_path / "new" / "corruption.json").read_text())
    _, expected = corrupt.load_corrupted(tiny_bert, Corruption(layers="2", method="noise", severity=0.5))
    assert manifest["tensors"] == expected["tensors"] and manifest["severity"] == 0.5
    assert f"|W' - W| / |W| = {manifest['relative_change']:.3g}" in capsys.readouterr().out
