"""How a corrupted model recovers: which of its parameters train, and at which rate. An entry of TUNINGS is --tuning.

The head trains in every one. Used by train.py.
"""

import peft
import torch
from torch import nn
from transformers import PreTrainedModel, Trainer

import corrupt
import places
from common import InputError, explain
from config import RunConfig

LORA_TARGETS = (  # query and value, by the names that the library's architectures give them; fused ones whole
    r".*\.(query|value|q|v|(query|value|q|v)_proj|[qv]_lin|c_attn|in_proj|query_key_value|Wqkv)"
)


def tune_full(model: PreTrainedModel, corruption: dict, wanted: RunConfig) -> None:
    """Everything trains."""


def tune_head(model: PreTrainedModel, corruption: dict, wanted: RunConfig) -> None:
    """The head alone, on a frozen encoder (the paper's section A.2)."""
    model.base_model.requires_grad_(False)


def tune_corrupted(model: PreTrainedModel, corruption: dict, wanted: RunConfig) -> None:
    """The tensors that the corruption addressed."""
    addressed = {row["name"] for row in corruption["tensors"]}
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad = name in addressed


def tune_intact(model: PreTrainedModel, corruption: dict, wanted: RunConfig) -> None:
    """The tensors that the corruption left."""
    addressed = {row["name"] for row in corruption["tensors"]}
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad = name not in addressed


def tune_biases(model: PreTrainedModel, corruption: dict, wanted: RunConfig) -> None:
    """The biases (BitFit, Ben Zaken et al. 2022). Raises InputError where there are none."""
    for name, parameter in model.base_model.named_parameters():
        parameter.requires_grad = name.rpartition(".")[2] == "bias"
    if not any(parameter.requires_grad for parameter in model.base_model.parameters()):
        raise InputError(f"--tuning bitfit trains biases, and {type(model.base_model).__name__} has none: use lora")


def tune_lora(model: PreTrainedModel, corruption: dict, wanted: RunConfig) -> None:
    """Low-rank updates of query and value, by peft, drawn from a stream of their own (Hu et al. 2022)."""
    head = [p for name, p in model.named_parameters() if not name.startswith(f"{model.base_model_prefix}.")]
    settings = {"r": wanted.lora_rank, "lora_alpha": wanted.lora_alpha, "target_modules": LORA_TARGETS}
    settings |= {"fan_in_fan_out": model.config.model_type == "gpt2"}
    with explain(f"--tuning lora does not fit {type(model).__name__}", ValueError), torch.random.fork_rng(devices=[]):
        torch.manual_seed(corrupt.seed_of(wanted.seed, "lora"))
        peft.inject_adapter_in_model(peft.LoraConfig(**settings), model)
    for parameter in head:
        parameter.requires_grad = True


def merge_lora(model: PreTrainedModel) -> None:
    """Put the low-rank updates into the weights that they update; the model is then one of the library's again."""
    for name, module in list(model.named_modules()):
        if isinstance(module, peft.tuners.lora.LoraLayer):
            module.merge()
            model.set_submodule(name, module.get_base_layer())


# --tuning
TUNINGS = {
    "full": tune_full,
    "probe": tune_head,
    "probe_converged": tune_head,
    "corrupted": tune_corrupted,
    "intact": tune_intact,
    "bitfit": tune_biases,
    "lora": tune_lora,
    "llrd": tune_full,
}


def rate_factors(model: PreTrainedModel, decay: float) -> dict[nn.Parameter, float]:
    """What the learning rate of each parameter is multiplied by: decay^(L - l) in layer l of L, embeddings l = 0.

    Pooler, head, and what else lies outside keep the whole rate (layer-wise decay, Howard and Ruder 2018).
    """
    layers = [places.modules_of(model, "embeddings"), *places.encoder_layers(model)]
    factors = dict.fromkeys(model.parameters(), 1.0)
    for number, layer in enumerate(layers):
        for module in layer if number == 0 else [layer]:
            factors |= dict.fromkeys(module.parameters(), decay ** (len(layers) - 1 - number))
    return factors


class LayerwiseTrainer(Trainer):
    """The library's Trainer with a learning rate of its own for each layer (--tuning llrd)."""

    layer_decay = 1.0

    def create_optimizer(self, model: PreTrainedModel | None = None) -> torch.optim.Optimizer:
        optimizer = super().create_optimizer(model)
        factors, groups = rate_factors(self.model, self.layer_decay), []
        for group in optimizer.param_groups:
            for factor in sorted({factors[parameter] for parameter in group["params"]}):
                params = [parameter for parameter in group["params"] if factors[parameter] == factor]
                groups.append({**group, "params": params, "lr": factor * group["lr"]})
        optimizer.param_groups[:] = groups
        return optimizer
