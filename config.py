"""What a run is: its flags, the settings that its numbers depend on, its name and its folder.

`RunConfig` is what a user asks for; resolve.py makes a `Run` of it: the settings with their fingerprints, and where the
result goes. Needs no torch, so that aggregate.py can name and check runs without it.
"""

import argparse
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field, fields, replace
from fractions import Fraction
from functools import cached_property
from hashlib import sha256
from importlib.util import find_spec
from pathlib import Path

import paper
from common import InputError, fail, fraction, make_parser
from protocol import AFFECTS, NEUTRAL, OF_FROZEN, PROTOCOL, RANGES

RESULTS_VERSION = 5  # raise it when this code would give other numbers for the same settings: results are made again
SIDES = ("none", "bottom", "top", "all")  # of a run; other places are named by their layers
REPORTERS = ("none", "tensorboard", "trackio", "wandb")


def truth(text: str) -> bool:
    """True or False for argparse, in these spellings alone."""
    if text.lower() not in ("true", "false"):
        raise argparse.ArgumentTypeError(f"{text} is neither True nor False")
    return text.lower() == "true"


def spell_parts(text: str) -> str:
    """--parts in one spelling: each once, in order; all of them are all."""
    text = ",".join(sorted(set(text.split(","))))
    return "all" if text == "attention,ffn,layernorm" else text


def setting(
    default: object, text: str, kind: Callable = str, choices: tuple = (), affects: bool = True, group: str = "the run"
) -> object:
    """A field of RunConfig: its default, its help, its type on the command line, and whether it affects results.

    One whose default is a tuple takes several values.
    """
    return field(
        default=default, metadata={"help": text, "type": kind, "choices": choices, "affects": affects, "group": group}
    )


TRAINING = "training: any field of transformers' TrainingArguments is a flag, too; these matter most"


@dataclass(frozen=True)
class RunConfig:
    """One run, as a user asks for it; each field is a flag. Raises InputError for a value that is not allowed."""

    model: str = setting("bert-base-uncased", "minilm, a local folder, or a hub id")
    revision: str | None = setting(
        None, "of a hub model: a branch, tag or commit (default: its newest commit)", affects=False
    )
    corrupt: str = setting("none", "corrupt encoder layers, counted from this side", choices=("none", "bottom", "top"))
    frac: Fraction | None = setting(
        None, "part of the encoder layers, such as 0.5 or 1/3; needed with --corrupt", fraction
    )
    layers: str | None = setting(None, "instead of --corrupt: 3, or 2-4,6, from 1; also embeddings, pooler")
    parts: str = setting("all", "of the layers: attention, ffn, layernorm; or several: attention,ffn", spell_parts)
    method: str = setting(
        "reinit", "how: reinit, normal, noise, shuffle, prune, prune_random, bitflip, permute, drop (docs/lab.md)"
    )
    severity: float | None = setting(None, "of noise, prune, prune_random and bitflip", float)
    corrupt_after: bool = setting(False, "fine-tune first, then corrupt, then fine-tune again", truth)
    dataset: str = setting(
        "sst2", f"{', '.join(paper.DATASETS)}, or a folder of your own with a train and a test file (docs/data.md)"
    )
    pooling: str = setting(
        "cls",
        "what the head reads: [CLS], the other tokens' mean (Table 3), the last (decoders)",
        choices=("cls", "mean", "last"),
    )
    tuning: str = setting(
        "full",
        "what trains: full, probe (Table 4), probe_converged, corrupted, intact, bitfit, lora, llrd (docs/lab.md)",
    )
    lora_rank: int = setting(8, "of --tuning lora's updates", int)
    lora_alpha: float = setting(16.0, "what they are multiplied by, times their rank", float)
    layer_decay: float = setting(0.9, "of --tuning llrd: a layer's learning rate, over that of the layer above", float)
    probe_reads: str = setting(
        "cls", "what a converged probe reads",
        choices=("pooler", "cls", "mean"),
    )  # fmt: skip
    probe_layers: str = setting(
        "last", "all: one of each layer, too (layers.csv)", choices=("last", "all"), affects=False
    )
    max_length: int = setting(64, "tokens; longer inputs are truncated", int)
    kaiming_a: float = setting(0.0, "negative slope of Kaiming's leaky ReLU", float)
    no_unpadding: bool = setting(False, "the library's own encoder, with padding: slower, other dropout masks", truth)
    data_dir: str = setting("data", "where data_prep.py put the prepared sets", affects=False)
    resume: bool = setting(
        False, "keep a checkpoint of each epoch until the end; go on from the last", truth, affects=False
    )
    save_model: bool = setting(False, "keep the best epoch's weights in the run's folder", truth, affects=False)
    save_vectors: bool = setting(
        False, "keep what the head reads of each test row, best epoch (Figure 1)", truth, affects=False
    )
    save_states: bool = setting(False, "keep the weights until analyse.py has read them", truth, affects=False)
    eval_at: tuple[int, ...] = setting(
        (), "evaluate after these steps, too, and after the last (steps.csv)", int, affects=False
    )
    learning_rate: float = setting(5e-5, "the paper's are 1e-5, 2e-5, 5e-5, the best kept", float, group=TRAINING)
    num_train_epochs: float = setting(10.0, "each is evaluated, the best is kept", float, group=TRAINING)
    max_steps: int = setting(
        -1, "of the optimizer, instead of epochs; -1: as many as the epochs have", int, group=TRAINING
    )
    per_device_train_batch_size: int = setting(32, "rows of a step", int, group=TRAINING)
    seed: int = setting(0, "of the draws, the head, the order of the rows, and dropout", int, group=TRAINING)
    corrupt_seed: int | None = setting(None, "of the corruption's draws, if another", int, group=TRAINING)
    head_seed: int | None = setting(None, "of the new head, if another", int, group=TRAINING)
    data_seed: int | None = setting(None, "of the order of the rows, if another", int, group=TRAINING)
    bf16: bool = setting(False, "bfloat16: other numbers, faster where the processor has it", truth, group=TRAINING)
    report_to: str = setting(
        "none", "each run reports under its folder's name", choices=REPORTERS, affects=False, group=TRAINING
    )
    output_dir: str = setting("outputs", "the run's folder is OUTPUT_DIR/runs/<run>", affects=False, group=TRAINING)
    trainer: dict = field(default_factory=dict)  # other fields of TrainingArguments

    def __post_init__(self) -> None:
        for name, known in FIELDS.items():  # 3 epochs of a preset are the 3.0 of a flag
            if known.metadata["type"] is float and getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))
        object.__setattr__(self, "eval_at", tuple(sorted(set(self.eval_at))))
        if self.tuning == "probe_converged":
            self._without_training()
        self._check_corruption()
        positive = ["per_device_train_batch_size", "lora_rank", "lora_alpha"]
        positive += ["num_train_epochs"] * (self.tuning != "probe_converged")
        for name in positive:
            if not 0 < getattr(self, name) < 2**31:
                raise InputError(f"--{name} {getattr(self, name)} is not above 0 and below 2^31")
        for name, (low, below) in RANGES.items():
            if (value := self.trainer.get(name)) is not None and not low <= value < below:
                limit = "" if below == math.inf else f" and below {below}"
                raise InputError(f"--{name} {value} is not a number from {low} on{limit}")
        if not 0 <= self.learning_rate < math.inf:
            raise InputError(
                f"--learning_rate {self.learning_rate} is not a learning rate: the paper's are 1e-5 to 5e-5"
            )
        for name in ("seed", "corrupt_seed", "head_seed", "data_seed"):
            if not 0 <= (getattr(self, name) or 0) < 2**32:
                raise InputError(f"--{name} {getattr(self, name)} is not from 0 to {2**32 - 1}")
            if name != "seed" and getattr(self, name) == self.seed:
                object.__setattr__(self, name, None)  # says nothing that --seed does not
        if self.max_steps == 0 or self.max_steps < -1:
            raise InputError(f"--max_steps {self.max_steps} trains nothing: leave it out, or give a number above 0")
        saved = [name for name in ("save_model", "save_vectors", "save_states") if getattr(self, name)]
        if self.tuning.startswith("probe") and saved:
            raise InputError(f"--tuning {self.tuning} does not change the encoder: --{saved[0]} needs full")
        if self.eval_at and (self.eval_at[0] < 0 or self.tuning == "probe_converged"):
            raise InputError(f"--eval_at {self.eval_at[0]} is not a step of training: give such as 0 1 2 5 10 20 50")
        if self.resume and (self.eval_at or self.corrupt_after):
            raise InputError("--resume keeps neither --eval_at's evaluations nor --corrupt_after's model: leave it out")
        if not 0 < self.layer_decay <= 1:
            raise InputError(f"--layer_decay {self.layer_decay} is not above 0 and at most 1")
        for name, tuning in OF_TUNING.items():
            if tuning != self.tuning and getattr(self, name) != FIELDS[name].default:
                raise InputError(f"--{name} is of --tuning {tuning}: leave it out")
        if (self.probe_reads, self.probe_layers) == ("pooler", "all"):
            raise InputError(
                "--probe_layers all needs --probe_reads cls or mean: the pooler reads the last layer alone"
            )
        if self.report_to != "none" and not find_spec(self.report_to):
            raise InputError(f"--report_to {self.report_to} needs the package: pip install {self.report_to}")
        for name, value in self.trainer.items():
            if name in PROTOCOL and value != PROTOCOL[name]:
                raise InputError(
                    f"--{name} is fixed to {PROTOCOL[name]}, as every run's: leave it out (docs/decisions.md)"
                )

    def _check_corruption(self) -> None:
        if self.layers is not None and (self.corrupt != "none" or self.frac is not None):
            raise InputError("--layers and --corrupt both say which layers: give one of them")
        if self.uncorrupted:
            for name in OF_CORRUPTION:
                if getattr(self, name) != FIELDS[name].default:
                    raise InputError(f"--{name} needs something to corrupt: give --corrupt with --frac, or --layers")
        if self.method != "reinit" and self.kaiming_a:
            raise InputError(f"--kaiming_a is of --method reinit, and {self.method} draws otherwise: leave it out")
        if self.tuning in ("corrupted", "intact") and (self.uncorrupted or self.method in ("permute", "drop")):
            what = f"--method {self.method}" if not self.uncorrupted else "nothing corrupted"
            raise InputError(f"--tuning {self.tuning} with {what} has no tensors to tell apart: use --tuning full")
        if self.corrupt_after and self.tuning != "full":
            raise InputError(f"--corrupt_after fine-tunes twice at one rate: --tuning {self.tuning} is not for both")

    @property
    def uncorrupted(self) -> bool:
        return self.layers is None and (self.corrupt == "none" or self.frac == 0)

    @property
    def padded(self) -> bool:
        """Whether the encoder is the library's own: a converged probe reads every layer, and every token of it."""
        return self.no_unpadding or self.tuning == "probe_converged"

    def without_corruption(self) -> "RunConfig":
        """The same run of the uncorrupted model."""
        names = ("corrupt", "frac", "layers", "kaiming_a", "corrupt_seed", *OF_CORRUPTION)
        return replace(self, **{name: FIELDS[name].default for name in names})

    def _without_training(self) -> None:
        """A converged probe takes no steps: its learning rate and its epochs are 0, whatever the defaults are."""
        zero = {"learning_rate": 0.0, "num_train_epochs": 0.0}
        names = [*zero, "max_steps", "per_device_train_batch_size", "head_seed", "data_seed", "no_unpadding"]
        usual = {name: FIELDS[name].default for name in names} | AFFECTS
        for name, value in ({name: getattr(self, name) for name in names} | self.trainer).items():
            if name in usual and name not in OF_FROZEN and value not in (usual[name], zero.get(name, usual[name])):
                raise InputError(f"--tuning probe_converged does not take --{name}: it trains until it has converged")
        for name, value in zero.items():
            object.__setattr__(self, name, value)
        if self.pooling != "cls":
            raise InputError("--pooling is what a head reads: --tuning probe_converged takes --probe_reads mean")

    @property
    def command(self) -> str:
        """The command line that does this run."""
        return shlex.join(["python", "train.py", *self.flags()])

    def flags(self) -> list[str]:
        """The flags of train.py that say this; model and data set first, then those that are not at their default."""
        own = {name: getattr(self, name) for name in FIELDS}
        changed = {name: value for name, value in own.items() if value != FIELDS[name].default}
        given = {"model": self.model, "dataset": self.dataset} | changed | self.trainer
        kinds = {dict: json.dumps, list: json.dumps, float: exact}
        several = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
        texts = {name: [kinds.get(type(v), str)(v) for v in values] for name, values in several.items()}
        words = [[f"--{name}={t[0]}"] if t[0].startswith("-") else [f"--{name}", *t] for name, t in texts.items()]
        return [word for of_one in words for word in of_one]


FIELDS = {f.name: f for f in fields(RunConfig) if f.name != "trainer"}
OF_TUNING = {"lora_rank": "lora", "lora_alpha": "lora", "layer_decay": "llrd"}  # fields that one tuning alone has
OF_TUNING |= dict.fromkeys(("probe_reads", "probe_layers"), "probe_converged")
OF_CORRUPTION = ("parts", "method", "severity", "corrupt_after")  # say nothing where nothing is corrupted
FOUND = ("model", "corrupt", "frac", "layers", "dataset")  # stand in the settings as they were found, with fingerprints
NEUTRAL_VALUES = {name: f.default for name, f in FIELDS.items() if f.metadata["affects"] and name not in FOUND}
NEUTRAL_VALUES |= AFFECTS


# ---- The command line ----


def run_parser(doc: str) -> argparse.ArgumentParser:
    """A parser of RunConfig's flags. What is not given is not in its namespace."""
    parser = make_parser(doc)
    groups = {}
    for name, setting in FIELDS.items():
        group = setting.metadata["group"]
        if group not in groups:
            groups[group] = parser.add_argument_group(group)
        add_flag(groups[group], name)
    parser.add_argument("--help_all", action="store_true", help="all flags of TrainingArguments, too, and exit")
    return parser


def add_flag(parser: argparse.ArgumentParser, name: str) -> None:
    """The flag of a field of RunConfig, for a parser or a group of one."""
    about, default = FIELDS[name].metadata, FIELDS[name].default
    options = {"type": about["type"], "default": argparse.SUPPRESS}
    options |= {"choices": about["choices"]} if about["choices"] else {}
    options |= {"metavar": "N"} if about["type"] in (int, float) else {}
    options |= {"nargs": "?", "const": True, "metavar": "True"} if about["type"] is truth else {}
    options |= {"nargs": "+"} if isinstance(default, tuple) else {}
    text = about["help"] + (f" (default: {default})" if default not in (None, False, ()) else "")
    parser.add_argument(f"--{name}", help=text, **options)


def parse_flags(parser: argparse.ArgumentParser, words: list[str]) -> dict:
    """What the command line gives of RunConfig's fields. Ends the process with one line if a flag is wrong."""
    given, others = parser.parse_known_args([with_underscores(word) for word in words])
    given = vars(given)
    if given.pop("help_all", False):
        parser.print_help()
        trainer_parser().print_help()
        parser.exit()
    names = [word[2:].partition("=")[0] for word in others if word.startswith("--")]
    for name in names:
        if name not in {*PROTOCOL, *AFFECTS, *NEUTRAL}:
            parser.error(f"unknown flag --{name}: python train.py --help_all lists them all")
    if others:
        values, unknown = trainer_parser().parse_known_args(others)
        if unknown:
            parser.error(f"{unknown[0]} is not a flag: python train.py --help_all lists them all")
        given["trainer"] = {name: getattr(values, name) for name in names}
    return given


def parse_run(doc: str) -> RunConfig:
    """The run that this process's command line asks for. Ends the process with one line if it is wrong."""
    try:
        return RunConfig(**parse_flags(run_parser(doc), sys.argv[1:]))
    except InputError as error:
        fail(error)


def with_underscores(word: str) -> str:
    """--max-length is --max_length."""
    return re.sub(r"^--[\w-]+", lambda flag: "--" + flag[0][2:].replace("-", "_"), word)


def trainer_parser() -> argparse.ArgumentParser:
    from transformers import HfArgumentParser, TrainingArguments

    return HfArgumentParser(TrainingArguments, usage=argparse.SUPPRESS, allow_abbrev=False, add_help=False)


# ---- The run ----


@dataclass(frozen=True)
class Run:
    """A run whose model and rows were found, but that has not begun."""

    config: RunConfig  # `dataset` is a name, never a folder
    command: str  # that does it again
    model_folder: Path
    revision: str | None  # of the model on the hub
    data: dict  # the manifest of the prepared set
    settings: dict  # all that the numbers depend on

    @cached_property
    def name(self) -> str:
        return run_name(self.settings)

    @property
    def folder(self) -> Path:
        return Path(self.config.output_dir) / "runs" / self.name

    @property
    def work_dir(self) -> Path:
        """Where the run's files lie until it is done."""
        return Path(self.config.output_dir) / "unfinished" / self.name

    @property
    def tensorboard(self) -> Path:
        return Path(self.config.output_dir) / "tensorboard" / self.name


def exact(number: float) -> str:
    """The number in as few digits as tell it from others."""
    return f"{number:g}" if float(f"{number:g}") == number else repr(number)


def run_name(settings: dict) -> str:
    """A folder name that holds every setting that the numbers depend on, those at their neutral value left out."""
    s = settings
    place = f"{s['side']}-{s['percent']:g}" if s["side"] in SIDES else f"layers-{s['side']}"
    name = (
        f"{s['model'].replace('/', '--')}@{s['model_fingerprint'][:8]}_{place}"
        f"_{s['dataset']}@{s['data_fingerprint'][:8]}_{s['pooling']}_{s['tuning']}"
        f"_lr{exact(s['learning_rate'])}_epochs{exact(s['num_train_epochs'])}_seed{s['seed']}"
    )
    shown = {"pooling", "tuning", "learning_rate", "num_train_epochs", "seed"}
    others = [f"{k}={s[k]}" for k, usual in NEUTRAL_VALUES.items() if k not in shown and s.get(k, usual) != usual]
    name = re.sub(r"[^\w@.,=+-]", "-", "_".join([name, *others])).lstrip(".-")
    begin = name.encode()[:183].decode(errors="ignore")  # a file's name may have 255 bytes, and the lock's is longer
    return name if len(name.encode()) <= 200 else f"{begin}_{sha256(name.encode()).hexdigest()[:16]}"


def describe_cell(settings: dict) -> str:
    """The run's cell in words."""
    s = settings
    part = f"{s['percent']:g} % {s['side']}" if s["side"] in SIDES else f"layers {s['side']}"
    part = {"none": "uncorrupted", "all": "100 %"}.get(s["side"], part)
    how = "" if s["method"] == "reinit" else s["method"] + ("" if s["severity"] is None else f" {s['severity']:g}")
    how += "" if s["parts"] == "all" else f" {s['parts']}"
    part += f" ({how.strip()})" if how else ""
    part += " after fine-tuning" if s["corrupt_after"] else ""
    how = ("" if s["pooling"] == "cls" else f", {s['pooling']} pooling") + (
        "" if s["tuning"] == "full" else f", {s['tuning']}"
    )
    return f"{s['model']}, {part}, {s['dataset']}{how}"


def describe_result(settings: dict, result: dict) -> str:
    """The run and its F1 in a line."""
    how = "" if settings["no_unpadding"] or result["speed"]["unpadded"] else ", with padding"
    return (
        f"{describe_cell(settings)}{how}, learning rate {settings['learning_rate']:g}, seed {settings['seed']}: "
        f"weighted F1 {100 * result['weighted_f1']:.2f} % (epoch {result['best_epoch']:.3g} of {result['epochs']})"
    )
