"""What is computed once and read by many runs: token ids, and the encoder's outputs for a linear probe.

Tokens are made once for each (data set, tokenizer, length), the encoder's outputs for a linear probe once for each
(model, corruption, data set, pooling). Whoever comes first makes them, the others wait and read them from disk.
"""

import json
import shutil
import sys
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pyarrow as pa
import torch
from filelock import Timeout
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.utils import ModelOutput

import corrupt
import data_prep

CACHE_BYTES = 8 * 2**30  # older entries go when the probes' outputs or the tokens are more


def key_of(settings: dict) -> str:
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def made_once(parts: datasets.DatasetDict, function: Callable, folder: Path, **options: object) -> datasets.DatasetDict:
    """`parts` mapped by `function`, in Arrow files under `folder`, memory-mapped; made only if they are not there.

    `options` go to `datasets.Dataset.map`. The folder appears whole or not at all. Raises DataError where it cannot
    be written.
    """

    def read() -> datasets.DatasetDict:
        read = {part: datasets.Dataset.from_file(str(folder / f"{part}.arrow")) for part in parts}
        if wrong := [part for part, rows in read.items() if len(rows) != len(parts[part])]:
            raise OSError(f"{wrong[0]} has {len(read[wrong[0]])} rows of {len(parts[wrong[0]])}")
        return datasets.DatasetDict(read)

    aside = folder.with_name(f".{folder.name}.partial")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with data_prep.lock(lock_of(folder)):
            if folder.is_dir():
                try:
                    folder.touch()  # the last use, for `trim`
                    return read()
                except (pa.ArrowInvalid, OSError) as error:
                    print(f"{folder} cannot be read ({corrupt.one_line(error)}): making it again", file=sys.stderr)
                    shutil.rmtree(folder)
            try:
                shutil.rmtree(aside, ignore_errors=True)
                aside.mkdir()
                for part, rows in parts.items():
                    rows.map(
                        function,
                        batched=True,
                        load_from_cache_file=False,
                        cache_file_name=str(aside / f"{part}.arrow"),
                        new_fingerprint=key_of({"folder": folder.name, "part": part}),  # spares it hashing the function
                        **options,
                    )
                aside.rename(folder)
            finally:
                shutil.rmtree(aside, ignore_errors=True)
            return read()
    except OSError as error:
        raise data_prep.DataError(f"{folder} cannot be written: {corrupt.one_line(error)}") from error


def lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def trim(cache: Path, limit: int = CACHE_BYTES) -> None:
    """Delete the entries of the cache that were used longest ago, until it holds at most `limit` bytes."""
    try:
        entries = sorted(
            (path for path in cache.glob("*") if path.is_dir() and not path.name.startswith(".")),
            key=lambda path: path.stat().st_mtime_ns,
            reverse=True,
        )
        held = 0
        for entry in entries:
            held += sum(file.stat().st_size for file in entry.glob("*"))
            if held > limit and entry != entries[0]:
                with data_prep.lock(lock_of(entry)).acquire(timeout=0):
                    shutil.rmtree(entry)
    except (Timeout, FileNotFoundError):
        return  # somebody else is using the cache or emptying it: the next probe trims it


# ---- Tokens ----


def tokenised(
    data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, max_length: int, folder: Path
) -> tuple[datasets.DatasetDict, np.ndarray]:
    """Token ids, and the row numbers of the test split, which is sorted by length so that its batches need no padding.

    Pairs are truncated longest first and keep the tokenizer's segments. The tokens are kept in `folder`.
    """
    columns = [name for name in data["train"].column_names if name != "label"]

    def encode(rows: dict) -> dict:
        tokens = tokenizer(*(rows[column] for column in columns), truncation="longest_first", max_length=max_length)
        return {**tokens, "length": [len(ids) for ids in tokens["input_ids"]]}

    data = made_once(data, encode, folder, remove_columns=columns)
    trim(folder.parent)
    order = np.argsort(data["test"]["length"], kind="stable")
    data["test"] = data["test"].select(order)
    return data, order


# ---- The linear probe's features (Table 4) ----


class Encoded(nn.Module):
    """Stands in the place of a frozen encoder: gives the head the outputs that the encoder gave before.

    They come as `inputs_embeds`, shape (rows, hidden size): the pooler's output where there is one, else position 0.
    """

    def forward(self, input_ids: None = None, inputs_embeds: torch.Tensor = None, **_: object) -> ModelOutput:
        return BaseModelOutputWithPooling(last_hidden_state=inputs_embeds.unsqueeze(1), pooler_output=inputs_embeds)


def encoder_output(model: PreTrainedModel, tokens: dict[str, torch.Tensor]) -> torch.Tensor:
    output = model.base_model(**tokens)
    return output.last_hidden_state[:, 0] if output.get("pooler_output") is None else output.pooler_output


@torch.no_grad()
def probe_features(
    model: PreTrainedModel,
    data: datasets.DatasetDict,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    batch_size: int,
    device: torch.device,
    autocast: torch.dtype | None,
) -> datasets.DatasetDict:
    """The frozen encoder's outputs for all rows of `data` (tokens), computed once, with dropout off, in `folder`.

    Leaves the model with `Encoded` in the place of its encoder, so that what trains is its head alone. Raises
    ModelError if the head then gives other logits than the whole model does.
    """
    model.eval().to(device)
    orders = {part: np.argsort(rows["length"], kind="stable") for part, rows in data.items()}
    by_length = datasets.DatasetDict({part: rows.select(orders[part]) for part, rows in data.items()})

    def batch_of(rows: dict) -> dict[str, torch.Tensor]:
        tokens = {name: rows[name] for name in tokenizer.model_input_names if name in rows}
        return tokenizer.pad(tokens, return_tensors="pt").to(device)

    def encode(rows: dict) -> dict:
        with torch.autocast(device.type, dtype=autocast, enabled=autocast is not None):
            return {"inputs_embeds": encoder_output(model, batch_of(rows)).float().cpu().numpy()}

    others = [name for name in data["train"].column_names if name not in ("label", "length")]
    made = made_once(by_length, encode, folder, batch_size=batch_size, remove_columns=others)
    trim(folder.parent)

    few = by_length["test"][:8]
    whole = model(**batch_of(few)).logits
    setattr(model, model.base_model_prefix, Encoded())
    made = datasets.DatasetDict({part: rows.select(np.argsort(orders[part])) for part, rows in made.items()})
    of_few = made["test"].select(orders["test"][:8]).with_format("torch")["inputs_embeds"][:]
    if not torch.allclose(model(inputs_embeds=of_few.to(device)).logits, whole, atol=1e-1 if autocast else 1e-4):
        raise corrupt.ModelError(
            f"{type(model).__name__} cannot be probed: its head reads more than position 0 or the pooler's output, or "
            f"{folder} holds another encoder's outputs: delete it, or use --tuning full"
        )
    return made.with_format("torch")
