"""What many runs read and one computes: token ids, what needs no encoder, and the encoder's outputs for a probe.

Tokens and floors are computed once for each (data set, tokenizer, length), the encoder's outputs for a probe once for
each (model, corruption, data set, pooling). The process that comes first computes them; the others wait and read them
from disk.
"""

import json
import sys
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import datasets
import numpy as np
import pyarrow.compute as pc
import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.pipeline import make_pipeline
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.modeling_outputs import BaseModelOutputWithPoolingAndCrossAttentions
from transformers.utils import ModelOutput

import stats
import unpad
from common import InputError, atomic_write, explain, file_lock, read_signed, sha256_of, write_signed

TEXTS = ("text", "sentence1", "sentence2")  # the columns of a prepared set that a tokenizer reads
MOST_UNKNOWN = 0.05  # of the tokens


def key_of(settings: dict) -> str:
    return sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:32]


def cached_map(
    parts: datasets.DatasetDict, function: Callable, folder: Path, **options: object
) -> datasets.DatasetDict:
    """`parts` mapped by `function`, in Arrow files in `folder`, memory-mapped; computed only if they are not there.

    Each file has beside it its sha256 and the folder's name, which is the key of what it was made from: a file that is
    not what was written there is made again, and that is said. `options` go to `datasets.Dataset.map`. Raises
    InputError where `folder` cannot be written.
    """
    mapped = {}

    def seal(path: Path) -> str:
        return f"{sha256_of(path)} {folder.name}/{path.name}\n"

    with explain(f"{folder} cannot be written", OSError):
        folder.mkdir(parents=True, exist_ok=True)
        with file_lock(folder.with_name(f".{folder.name}.lock")):
            for left in folder.glob("tmp*"):
                left.unlink()  # half a file, of a process that was killed
            for part, rows in parts.items():
                path, digest = folder / f"{part}.arrow", folder / f"{part}.sha256"
                if path.exists() and not (digest.exists() and digest.read_text() == seal(path)):
                    print(f"{path} is not what was written: making it again", file=sys.stderr)
                    path.unlink()
                mapped[part] = rows.map(
                    function, batched=True, cache_file_name=str(path), new_fingerprint=key_of({path.name: folder.name}),
                    **options,
                )  # fmt: skip
                if not digest.exists() or digest.read_text() != seal(path):
                    with atomic_write(digest) as aside:
                        aside.write_text(seal(path))
                if mapped[part]["label"][:] != rows["label"][:]:
                    raise InputError(f"{path} has other labels than its rows: delete {folder}")
    return datasets.DatasetDict(mapped)


def tokenise(
    data: datasets.DatasetDict, tokenizer: PreTrainedTokenizerBase, segments: int, max_length: int, folder: Path
) -> tuple[datasets.DatasetDict, np.ndarray]:
    """Token ids, and the row numbers of the test split, which is sorted by length so that its batches need no padding.

    Pairs are truncated longest first and keep the tokenizer's segments. The tokens are kept in `folder`. Raises
    InputError if the tokenizer does not know the texts' words, or gives a model of two `segments` only one of a pair.
    """
    columns = [name for name in TEXTS if name in data["train"].column_names]
    others = [name for name in data["train"].column_names if name != "label"]

    def encode(rows: dict) -> dict:
        tokens = tokenizer(*(rows[column] for column in columns), truncation="longest_first", max_length=max_length)
        return {**tokens, "length": [len(ids) for ids in tokens["input_ids"]]}

    tokens = cached_map(data, encode, folder, remove_columns=others)
    for part, rows in tokens.items():
        share = pc.mean(pc.equal(pc.list_flatten(rows.data.column("input_ids")), tokenizer.unk_token_id)).as_py()
        if tokenizer.unk_token_id is not None and share > MOST_UNKNOWN:
            raise InputError(
                f"{share:.0%} of {part}'s tokens are {tokenizer.unk_token}, at most {MOST_UNKNOWN:.0%} may be: the "
                "model's tokenizer is for other texts, or its files do not fit each other"
            )
    if segments > 1 and len(columns) == 2 and 1 not in tokens["test"][0].get("token_type_ids", []):
        raise InputError("the tokenizer does not tell two sentences apart, and the model can: mend its tokenizer.json")
    if len(columns) == 2 and tokenizer.num_special_tokens_to_add(pair=True) < 2:
        raise InputError(f"{type(tokenizer).__name__} puts nothing between two sentences: take a model made for pairs")
    order = np.argsort(tokens["test"]["length"], kind="stable")
    tokens["test"] = tokens["test"].select(order)
    return tokens, order


def compute_floors(tokens: datasets.DatasetDict, special_ids: list[int], folder: Path) -> dict[str, float]:
    """What the test split gives without an encoder, as weighted F1 from 0 to 1; computed once, in `folder`.

    `constant` is always the most frequent class, `guessing` draws each row's class with the classes' shares, `words` is
    a logistic regression on TF-IDF of the same word pieces of the same train rows (scikit-learn's defaults).
    """
    path = folder / "floors.json"
    with file_lock(folder.with_name(f".{folder.name}.lock")):
        with suppress(OSError, ValueError):
            return {name: read_signed(path)[name] for name in ("constant", "guessing", "words")}
        pieces, labels = ({part: rows[column][:] for part, rows in tokens.items()} for column in ("input_ids", "label"))
        vectors = TfidfVectorizer(analyzer=lambda ids: [i for i in ids if i not in special_ids])
        words = make_pipeline(vectors, LogisticRegression(max_iter=10_000))
        guesses = words.fit(pieces["train"], labels["train"]).predict(pieces["test"])
        constant, guessing = stats.class_floors(np.bincount(labels["test"]) / len(labels["test"]))
        f1 = f1_score(labels["test"], guesses, average="weighted", zero_division=0)
        floors = {"constant": constant, "guessing": guessing, "words": f1}
        with atomic_write(path) as aside:
            write_signed(aside, floors)
        return floors


# ---- The encoder's outputs, for a probe (Table 4) ----


class CachedEncoder(nn.Module):
    """Stands in the place of a frozen encoder: gives the head the outputs that the encoder gave before.

    They come as `inputs_embeds`, shape (rows, hidden size), as `probe_features` reads them.
    """

    def forward(self, input_ids: None = None, inputs_embeds: torch.Tensor = None, **_: object) -> ModelOutput:
        hidden = inputs_embeds.unsqueeze(1)
        return BaseModelOutputWithPoolingAndCrossAttentions(last_hidden_state=hidden, pooler_output=inputs_embeds)


@dataclass(frozen=True)
class Encoder:
    """A frozen encoder, and how and where its outputs are computed."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    device: torch.device
    autocast: torch.dtype | None
    folder: Path  # of the outputs
    batch_size: int

    def batch_of(self, rows: dict) -> dict[str, torch.Tensor]:
        tokens = {name: rows[name] for name in self.tokenizer.model_input_names if name in rows}
        return self.tokenizer.pad(tokens, return_tensors="pt").to(self.device)

    @torch.no_grad()
    def outputs(self, data: datasets.DatasetDict, read: Callable) -> datasets.DatasetDict:
        """What `read` takes of the encoder's output for all rows of `data` (tokens), computed once, with dropout off.

        `read` gets the model and a batch, and gives columns of shape (rows, hidden size).
        """
        self.model.eval().to(self.device)
        orders = {part: np.argsort(rows["length"], kind="stable") for part, rows in data.items()}
        by_length = datasets.DatasetDict({part: rows.select(orders[part]) for part, rows in data.items()})

        def encode(rows: dict) -> dict:
            with torch.autocast(self.device.type, dtype=self.autocast, enabled=self.autocast is not None):
                columns = read(self.model, self.batch_of(rows))
            return {name: values.float().cpu().numpy() for name, values in columns.items()}

        others = [name for name in data["train"].column_names if name not in ("label", "length")]
        outputs = cached_map(by_length, encode, self.folder, batch_size=self.batch_size, remove_columns=others)
        return datasets.DatasetDict(
            {part: rows.select(np.argsort(orders[part])) for part, rows in outputs.items()}
        ).with_format("torch")


@torch.no_grad()
def probe_features(encoder: Encoder, data: datasets.DatasetDict, pooling: str) -> datasets.DatasetDict:
    """What the head reads of all rows of `data` (tokens): the pooler's output where there is one, else position 0, or
    with `pooling` last the last real token.

    Leaves the model with `CachedEncoder` in the place of its encoder, so that what trains is its head alone. Raises
    InputError if the head then gives other logits than the whole model does.
    """

    def read_as_head(model: PreTrainedModel, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        output = model.base_model(**batch)
        hidden, pooled = output.last_hidden_state, output.get("pooler_output")
        if pooled is None:
            pooled = unpad.last_token(hidden, batch["attention_mask"]) if pooling == "last" else hidden[:, 0]
        return {"inputs_embeds": pooled}

    outputs, model = encoder.outputs(data, read_as_head), encoder.model
    few = data["test"][:8]
    logits = model(**encoder.batch_of(few)).logits
    setattr(model, model.base_model_prefix, CachedEncoder())
    of_few = outputs["test"]["inputs_embeds"][:8].to(encoder.device)
    if not torch.allclose(model(inputs_embeds=of_few).logits, logits, atol=1e-1 if encoder.autocast else 1e-4):
        raise InputError(
            f"{type(model).__name__} cannot be probed: its head reads more than position 0 or the pooler's output, or "
            f"{encoder.folder} holds another encoder's outputs: delete it, or use --tuning full"
        )
    return outputs
