import gc
import json
import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # two threads of a tiny model wait for each other on a busy machine

import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModel, AutoTokenizer, BertConfig, BertModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
sys.path.insert(0, str(Path(__file__).parent.parent))

import config
import data_prep
import models
import resolve
import train

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
ARCHITECTURES = {
    "bert": SIZES,
    "distilbert": {"dim": 32, "n_layers": 2, "n_heads": 2, "hidden_dim": 64},
    "roberta": SIZES,
    "xlm-roberta": SIZES,
    "camembert": SIZES,
    "electra": SIZES | {"embedding_size": 32},
    "mpnet": SIZES,
}
OTHERS = {
    # DeBERTa v3's own settings: relative positions, normed
    "deberta-v2": SIZES
    | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}
    | {"norm_rel_ebd": "layer_norm", "share_att_key": True},
    "modernbert": SIZES | {"pad_token_id": 0, "global_attn_every_n_layers": 2},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "opt": SIZES | {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gpt_neox": SIZES,
    "llama": SIZES,
    "qwen2": SIZES | {"num_key_value_heads": 2},
}
DECODERS = ("gpt2", "opt", "gpt_neox", "llama", "qwen2")


def random_model(architecture: str, folder: Path, **changes: object) -> Path:
    """A two-layer encoder of the architecture with random weights, and BERT's tokenizer."""
    torch.manual_seed(0)
    shape = AutoConfig.for_model(architecture, vocab_size=30_522, **(ARCHITECTURES | OTHERS)[architecture] | changes)
    model = AutoModel.from_config(shape)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(models.find_model("minilm")[0])
    tokenizer.model_input_names = ["input_ids", "attention_mask"]
    if architecture in DECODERS:  # most were trained without a token for padding
        own = (
            {"pad_token": "[unused0]"} if architecture == "opt" else {}
        )  # OPT has one, id 1, as its configuration says
        raw = Tokenizer.from_str(
            json.dumps(json.loads(tokenizer.backend_tokenizer.to_str()) | {"post_processor": None})
        )
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="[SEP]", unk_token="[UNK]", **own)
    if architecture in ("bert", "electra"):
        tokenizer.model_input_names.insert(1, "token_type_ids")
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session", autouse=True)
def quiet() -> None:
    train.silence_libraries()
    gc.collect()
    gc.freeze()  # the Trainer collects garbage often, and what was imported need not be looked at each time


@pytest.fixture(scope="session")
def tiny_bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer BERT with random weights, none of them at the value that corruption gives, and a real tokenizer."""
    folder = tmp_path_factory.mktemp("models") / "tiny-bert"
    torch.manual_seed(0)
    model = BertModel(BertConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(models.find_model("minilm")[0]).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def small_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both embedded sets, real but small."""
    data_dir = tmp_path_factory.mktemp("prepared") / "data"
    for name in data_prep.DEMO:
        data_prep.prepare(name, train_size=96, test_size=50, data_dir=data_dir)
    return data_dir


@pytest.fixture
def flags(tiny_bert: Path, small_data: Path, tmp_path: Path) -> list[str]:
    """A run of two epochs of three steps on texts of many lengths, in the test's own output folder."""
    where = ["--model", str(tiny_bert), "--dataset", "rotten_tomatoes", "--data_dir", str(small_data)]
    what = ["--num_train_epochs", "2", "--learning_rate", "1e-3", "--disable_tqdm", "True"]
    return [*where, *what, "--output_dir", str(tmp_path / "outputs")]


def run_of(flags: list[str]) -> config.Run:
    """The run that the flags of train.py ask for."""
    return resolve.resolve_run(config.RunConfig(**config.parse_flags(config.run_parser(train.__doc__), flags)))
