"""What a run is before it starts: its flags, every setting that its numbers depend on, its folder, its result.

Used by train.py, which does it, and by grid.py, which asks whether it is there. `plan` checks all that can be checked
before a weight is loaded.
"""

import argparse
import json
import math
import re
import sys
from dataclasses import dataclass, field, fields
from fractions import Fraction
from functools import lru_cache
from hashlib import file_digest, sha256
from pathlib import Path
from typing import Literal

import torch
from transformers import HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations
from transformers.trainer_utils import SaveStrategy

import corrupt
import data_prep

NUMBERS = 3  # raise it when this code would give other numbers for the same settings: results are then made again

# The paper's protocol; flags that say otherwise are refused.
FIXED = {
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "best",
    "save_only_model": True,
    "save_total_limit": None,  # unfinished.Checkpoints deletes those that are neither the last nor the best
    "load_best_model_at_end": True,
    "metric_for_best_model": "weighted_f1",
    "greater_is_better": True,
    "eval_delay": 0,
    "eval_on_start": False,
    "eval_do_concat_batches": True,
    "batch_eval_metrics": False,
    "prediction_loss_only": False,
    "label_names": None,
    "dataloader_drop_last": False,
    "logging_first_step": False,
    "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
    "do_train": False,
    "do_predict": False,
    "push_to_hub": False,
    "resume_from_checkpoint": None,
}
# Where ours differ from the library's defaults; docs/decisions.md gives the reasons.
DEFAULTS = {
    "output_dir": "outputs",
    "num_train_epochs": 10,
    "per_device_train_batch_size": 32,
    "per_device_eval_batch_size": 64,
    "seed": 0,
    "accelerator_config": {"use_seedable_sampler": False},  # it would take the place of our data order's stream
    "dataloader_pin_memory": torch.cuda.is_available(),
}
# The Trainer's flags that --help shows; --help_all shows all.
SHOWN = {
    "learning_rate": "the paper's are 1e-5, 2e-5, 5e-5, the best kept",
    "num_train_epochs": "each is tested, the best is kept",
    "max_steps": "of the optimizer, instead of epochs; -1: as many as the epochs have",
    "per_device_train_batch_size": "rows of a step",
    "seed": "of the draws, the head, the order of the rows, and dropout",
    "bf16": "bfloat16 for speed on a GPU that has it: other numbers",
    "report_to": "none, tensorboard, trackio or wandb; each run goes by its folder's name",
    "output_dir": "the run's folder is OUTPUT_DIR/runs/<run>",
}
REPORTERS = ("tensorboard", "trackio", "wandb")
POSITIVE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps")
# TrainingArguments that cannot change a number, by the beginning of their names.
NEUTRAL = (
    *("output_dir", "do_", "log_", "logging_", "report_to", "run_name", "project", "trackio_", "disable_tqdm"),
    *("save_", "load_best_", "push_", "hub_", "resume_", "enable_jit_", "dataloader_num_", "dataloader_pin_"),
    *("dataloader_pref", "dataloader_multi", "eval_accumulation_", "skip_memory_", "debug"),
    *("include_", "torch_empty_", "local_rank", "ddp_", "greater_is_", "metric_for_", "eval_strategy"),
)


USAGE = """Fine-tune one encoder, broken or whole, on one data set: one run of one cell.

    python train.py --model bert-base-uncased --corrupt bottom --frac 0.5
    python train.py --model minilm --corrupt top --frac 1/3 --dataset bbc_news --pooling mean --seed 1"""


class RunError(ValueError):
    """A run that cannot be started or did not end well; the message says what is wrong and what to do."""


BAD_INPUT = (corrupt.ModelError, data_prep.DataError, RunError)  # what is told in one line, with exit code 2


@dataclass
class RunArguments:
    """The cell: which model, how it is broken, and what it is fine-tuned on."""

    _argument_group_name = "the run"

    model: str = field(default="bert-base-uncased", metadata={"help": "minilm, a local folder, or a hub id"})
    corrupt: Literal["none", "bottom", "top"] = field(
        default="none", metadata={"help": "re-initialise encoder layers, counted from this side"}
    )
    frac: Fraction | None = field(
        default=None, metadata={"help": "part of the encoder layers, such as 0.5 or 1/3; needed with --corrupt"}
    )
    dataset: str = field(default="sst2", metadata={"help": data_prep.HELP})
    pooling: Literal["cls", "mean"] = field(
        default="cls", metadata={"help": "what the head reads: [CLS], or the mean of the other tokens (Table 3)"}
    )
    tuning: Literal["full", "probe"] = field(
        default="full", metadata={"help": "train all, or a linear probe: the head on a frozen encoder (Table 4)"}
    )
    max_length: int = field(default=64, metadata={"help": "tokens; longer inputs are truncated"})
    kaiming_a: float = field(default=0.0, metadata={"help": "negative slope of Kaiming's leaky ReLU"})
    plain: bool = field(
        default=False, metadata={"help": "the library's own encoder, with padding: slower, other rounding and dropout"}
    )
    data_dir: str = field(default="data", metadata={"help": "where data_prep.py put the prepared sets"})
    resume: bool = field(
        default=False,
        metadata={"help": "keep a checkpoint of each epoch until the run is done, and go on from the last"},
    )
    save_model: bool = field(default=False, metadata={"help": "keep the best epoch's weights in the run's folder"})
    save_vectors: bool = field(
        default=False, metadata={"help": "keep what the head reads of each test row, best epoch (Figure 1)"}
    )


def parser_of(everything: bool) -> HfArgumentParser:
    """The parser of one run's flags; its help shows SHOWN of the Trainer's flags, or `everything`."""
    parser = HfArgumentParser(
        (RunArguments, TrainingArguments),
        prog="train.py",
        description=USAGE,
        usage=argparse.SUPPRESS,  # so that an error is one line
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(**FIXED, **DEFAULTS)
    parser.add_argument("--help_all", action="help", help="all flags of the Trainer, too, and exit")
    trainer = {field.name for field in fields(TrainingArguments)}
    for action in parser._actions:
        if action.dest in trainer - SHOWN.keys() and not everything:
            action.help = argparse.SUPPRESS
            continue
        if len(action.option_strings) > 1 and action.dest != "help":
            action.option_strings = action.option_strings[:1]  # --max-length works as well as --max_length
        if action.nargs == "?":
            action.metavar = "True"
        action.help = SHOWN.get(action.dest, action.help)
        if parser.get_default(action.dest) not in (None, argparse.SUPPRESS):
            action.help += " (default: %(default)s)"
    parser._optionals.title = "training: all flags of transformers' TrainingArguments, of which these matter most"
    parser._action_groups.append(parser._action_groups.pop(1))  # it came before the run's
    return parser


def parse(flags: list[str]) -> tuple[RunArguments, TrainingArguments]:
    """The arguments of one run. Ends the process with exit code 2 and one line if a flag is wrong."""
    parser = parser_of("--help_all" in flags)
    try:
        args, training_args, unknown = parser.parse_args_into_dataclasses(
            flags, return_remaining_strings=True, look_for_args_file=False
        )
    except Exception as error:  # from TrainingArguments' own checks, which are of every kind
        parser.error(corrupt.one_line(error))
    if unknown:
        parser.error(f"unknown flag {unknown[0]}: python train.py --help_all lists them all")
    for name in ("num_train_epochs", *POSITIVE):
        if not 0 < getattr(training_args, name) < math.inf:
            parser.error(f"--{name} {getattr(training_args, name)} is not above 0")
    if not 0 <= training_args.learning_rate < math.inf:
        parser.error(f"--learning_rate {training_args.learning_rate} is no learning rate: the paper's are 1e-5 to 5e-5")
    if not 0 <= training_args.seed < 2**32:
        parser.error(f"--seed {training_args.seed} is not from 0 to {2**32 - 1}")
    if training_args.max_steps == 0:
        parser.error("--max_steps 0 trains nothing: leave it out, or give a number above 0")
    if args.tuning == "probe" and (args.save_model or args.save_vectors):
        parser.error("--tuning probe leaves the encoder as it was: --save_model and --save_vectors need --tuning full")
    if not math.isfinite(args.kaiming_a):
        parser.error(f"--kaiming_a {args.kaiming_a} is not finite")
    for name, value in FIXED.items():
        if getattr(training_args, name) != value:
            parser.error(f"--{name} is fixed to {value}: every run is tested after each epoch and keeps the best")
    if training_args.run_name is not None:
        parser.error("--run_name would name all runs of a grid alike: each is reported under its folder's name")
    if args.resume:
        training_args.save_strategy, training_args.save_only_model = SaveStrategy.EPOCH, False
    return args, training_args


# ---- What a run is ----


@dataclass(frozen=True)
class Run:
    """A run that was checked but not started."""

    flags: list[str]
    args: RunArguments
    training_args: TrainingArguments
    model_folder: Path
    model_revision: str | None
    data: dict  # the manifest of the prepared set
    settings: dict  # all that the numbers depend on
    folder: Path

    @property
    def unfinished(self) -> Path:
        """Where the run's files lie until it is done."""
        return self.folder.parent.with_name("unfinished") / self.folder.name

    @property
    def tensorboard(self) -> Path:
        return self.folder.parent.with_name("tensorboard") / self.folder.name


def plan(flags: list[str], more: tuple[str, ...] = (), dataset: str | None = None) -> Run:
    """Check all that can be checked before a weight is loaded; prepares the data set if it is missing, and says so.

    `more` are flags that are no part of the command that repeats the run. `dataset` is the set's name, where another
    process has prepared it: the folder that the flags may give is then not looked at. Raises ModelError, DataError or
    RunError. Nothing is written under the output folder.
    """
    args, training_args = parse([*flags, *more])
    for reporter in set(training_args.report_to) - {"kubeflow"}:  # which the library adds by itself where it runs
        if reporter not in REPORTERS:
            raise RunError(f"--report_to {reporter}: choose from {', '.join(REPORTERS)}")
        if reporter not in get_available_reporting_integrations():
            raise RunError(f"--report_to {reporter} needs the package: pip install {reporter}")
    if training_args.world_size > 1:
        if training_args.per_device_train_batch_size % training_args.world_size:
            raise RunError(
                f"{training_args.world_size} processes cannot share a batch of "
                f"{training_args.per_device_train_batch_size} rows evenly: change either"
            )
        if args.tuning == "probe" or args.save_vectors:
            raise RunError("--tuning probe and --save_vectors are for one process: leave accelerate launch out")
    model_folder, revision = corrupt.find_model(args.model)
    side, frac = corrupt.inspect(model_folder, args.corrupt, args.frac)
    positions = getattr(corrupt.load_config(model_folder), "max_position_embeddings", args.max_length)
    longest = min(positions, corrupt.load_tokenizer(model_folder).model_max_length)
    if not 8 <= args.max_length <= longest:
        raise RunError(f"--max_length {args.max_length} is not from 8 to {longest}, what {args.model} can read")
    if dataset and data_prep.is_prepared(dataset, args.data_dir):
        data = data_prep.manifest(dataset, args.data_dir)
    else:
        data = data_prep.ready(args.dataset, args.data_dir)
    args.dataset = data["dataset"]

    settings = {
        "numbers": NUMBERS,
        "model": model_folder.resolve().name if Path(args.model).is_dir() else args.model,
        "model_fingerprint": model_fingerprint(model_folder),
        "side": side,
        "frac": str(frac),
        "percent": float(100 * frac),
        "kaiming_a": args.kaiming_a,
        "dataset": args.dataset,
        "data_fingerprint": data["fingerprint"],
        "pooling": args.pooling,
        "tuning": args.tuning,
        "max_length": args.max_length,
        "plain": args.plain,
        **training_settings(training_args),
    }
    if training_args.world_size > 1:  # each draws its own dropout masks
        settings["processes"] = training_args.world_size
    folder = Path(training_args.output_dir) / "runs" / run_name(settings)
    training_args.run_name = folder.name
    return Run(flags, args, training_args, model_folder, revision, data, settings, folder)


@lru_cache(maxsize=8)
def model_fingerprint(folder: Path) -> str:
    """sha256 over the configuration, the weights and the tokenizer."""
    digest = sha256()
    for path in sorted({path for pattern in corrupt.MODEL_FILES for path in folder.glob(pattern)}):
        with path.open("rb") as file:
            digest.update(path.name.encode() + file_digest(file, "sha256").digest())
    return digest.hexdigest()


def training_settings(training_args: TrainingArguments) -> dict:
    """The TrainingArguments that the numbers depend on."""
    return {name: value for name, value in training_args.to_dict().items() if not name.startswith(NEUTRAL)}


@lru_cache(maxsize=1)
def default_settings() -> dict:
    args, training_args = parse([])
    own = {name: getattr(args, name) for name in ("max_length", "kaiming_a", "plain")}
    return own | training_settings(training_args)


def run_name(settings: dict) -> str:
    """A folder name that holds every setting the numbers depend on, those at their default left out."""
    s = settings
    name = (
        f"{s['model'].replace('/', '--')}@{s['model_fingerprint'][:8]}_{s['side']}-{s['percent']:g}"
        f"_{s['dataset']}@{s['data_fingerprint'][:8]}_{s['pooling']}_{s['tuning']}"
        f"_lr{s['learning_rate']:g}_epochs{s['num_train_epochs']:g}_seed{s['seed']}"
    )
    shown = {"learning_rate", "num_train_epochs", "seed"}
    usual = {**default_settings(), "processes": 1}
    others = [f"{k}={s[k]}" for k, value in usual.items() if k not in shown and s.get(k, value) != value]
    name = re.sub(r"[^\w@.,=+-]", "-", "_".join([name, *others])).lstrip(".-")
    return name if len(name) <= 200 else f"{name[:183]}_{sha256(name.encode()).hexdigest()[:16]}"


def result_of(run: Run) -> dict | None:
    """The result that is there, if it came from just these settings; says so if another is in its place."""
    try:
        result = json.loads((run.folder / "result.json").read_text())
        stored, _ = dict(result["settings"]), float(result["weighted_f1"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, KeyError, TypeError):
        print(f"{run.folder}/result.json cannot be read: running it again", file=sys.stderr)
        return None
    # a TrainingArgument that one version of the library has and another has not is no difference
    asked = {k: v for k, v in run.settings.items() if k in stored or k not in training_settings(run.training_args)}
    changed = {name: stored.get(name) for name, value in asked.items() if stored.get(name) != value}
    if changed:
        was = ", ".join(f"{name} {value} (now {asked[name]})" for name, value in changed.items())
        print(f"{run.folder} was made with {was}: running it again", file=sys.stderr)
        return None
    for name, digest in result.get("files", {}).items():
        try:
            with (run.folder / name).open("rb") as file:
                whole = file_digest(file, "sha256").hexdigest() == digest
        except OSError:
            whole = False
        if not whole:
            print(f"{run.folder}/{name} is not what the run wrote: running it again", file=sys.stderr)
            return None
    for asked, name in ((run.args.save_model, "model"), (run.args.save_vectors, "vectors.npy")):
        if asked and not (run.folder / name).exists():
            print(f"{run.folder} has no {name}: running it again", file=sys.stderr)
            return None
    return result


def cell(run: Run) -> str:
    """The run's cell, as people call it."""
    s = run.settings
    where = "undamaged" if s["side"] == "none" else f"{s['percent']:g} % {s['side']}"
    how = "" if s["pooling"] == "cls" else ", mean pooling"
    how += "" if s["tuning"] == "full" else ", linear probe"
    return f"{s['model']}, {where}, {s['dataset']}{how}"


def summary(run: Run, result: dict) -> str:
    s = run.settings
    how = "" if s["plain"] or result["speed"]["packed"] else ", with padding"
    if (batch := result.get("batch", {})).get("halved"):
        how += f", {batch['rows']} rows at a time for want of memory"
    return (
        f"{cell(run)}{how}, learning rate {s['learning_rate']:g}, seed {s['seed']}: "
        f"weighted F1 {100 * result['weighted_f1']:.2f} % (epoch {result['best_epoch']:.3g} of {result['epochs']})"
    )
