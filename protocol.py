"""The protocol: what each field of TrainingArguments, and the environment, may do to a run's numbers.

The fields that a user chooses most are flags of their own, in config.py. Needs no torch.
"""

import math
import os
import re

from common import InputError

# Each field of TrainingArguments that is not a field of RunConfig stands in one of these three; a test says so.
# The paper's protocol, and what one process needs. Flags that say otherwise are refused.
PROTOCOL = {
    "eval_strategy": "epoch",
    "logging_strategy": "epoch",
    "save_strategy": "best",
    "save_only_model": True,
    "save_total_limit": None,  # callbacks.Checkpoints deletes those that are neither the last nor the best
    "load_best_model_at_end": True,
    "metric_for_best_model": "weighted_f1",
    "greater_is_better": True,
    "eval_delay": 0,
    "eval_do_concat_batches": True,
    "include_for_metrics": [],
    "length_column_name": "length",
    "remove_unused_columns": True,
    "logging_nan_inf_filter": False,  # a loss that is not a number must be seen
    "accelerator_config": {"use_seedable_sampler": True},  # the data order has a stream of its own
    "train_sampling_strategy": "random",  # others change which rows meet, and group_by_length shuffles predictions
    "run_name": None,  # a run reports under its folder's name
    **dict.fromkeys(("eval_steps", "label_names", "parallelism_config", "resume_from_checkpoint"), None),
    **dict.fromkeys(("fsdp", "fsdp_config", "deepspeed", "hub_token"), None),
    "debug": "",
    **dict.fromkeys(("eval_on_start", "eval_use_gather_object", "batch_eval_metrics", "logging_first_step"), False),
    **dict.fromkeys(("prediction_loss_only", "dataloader_drop_last", "auto_find_batch_size", "do_train"), False),
    **dict.fromkeys(("do_predict", "push_to_hub", "ignore_data_skip"), False),
    **dict.fromkeys(
        ("bf16_full_eval", "fp16_full_eval"), False
    ),  # change no score, and round the weights that are kept
    "enable_jit_checkpoint": False,  # would end a run at a signal as if it were done
    "restore_callback_states_from_checkpoint": False,
}
# What affects results, at the value that it has without a flag: a result that lacks it was made with that value.
AFFECTS = {
    "lr_scheduler_type": "linear",
    "warmup_steps": 0,
    "optim": "adamw_torch_fused",
    "weight_decay": 0.0,
    "adam_beta1": 0.9,
    "adam_beta2": 0.999,
    "adam_epsilon": 1e-8,
    "gradient_accumulation_steps": 1,
    "average_tokens_across_devices": True,
    "max_grad_norm": 1.0,
    "label_smoothing_factor": 0.0,
    "per_device_eval_batch_size": 64,
    "dataloader_in_order": True,
    **dict.fromkeys(("lr_scheduler_kwargs", "optim_args", "optim_target_modules", "tf32"), None),
    **dict.fromkeys(("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"), None),
    **dict.fromkeys(("torch_compile_backend", "torch_compile_mode", "liger_kernel_config"), None),
    **dict.fromkeys(("activation_checkpointing", "gradient_checkpointing", "neftune_noise_alpha"), None),
    **dict.fromkeys(("fp16", "full_determinism", "use_cpu", "use_cache"), False),
    **dict.fromkeys(("torch_compile", "use_liger_kernel", "dataloader_persistent_workers"), False),
}
OF_FROZEN = ("per_device_eval_batch_size", "fp16", "tf32", "full_determinism", "use_cpu")  # those of a converged probe
NEUTRAL = frozenset(  # what cannot change a number
    re.findall(
        r"\w+",
        """dataloader_multiprocessing_context dataloader_num_workers dataloader_pin_memory dataloader_prefetch_factor
        ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph ddp_timeout
        disable_tqdm do_eval eval_accumulation_steps hub_always_push hub_model_id
        hub_private_repo hub_revision hub_strategy include_num_input_tokens_seen local_rank log_level
        log_level_replica log_on_each_node logging_steps project save_on_each_node save_steps skip_memory_metrics
        torch_empty_cache_steps trackio_bucket_id trackio_space_id trackio_static_space_id""",
    )
)
# Values of numbers that the library lets pass, or refuses only when it trains: from the first, below the second.
RANGES = {
    **dict.fromkeys(("label_smoothing_factor", "adam_beta1", "adam_beta2"), (0, 1)),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), (0, math.inf)),
    **dict.fromkeys(("neftune_noise_alpha", "dataloader_num_workers"), (0, math.inf)),
    **dict.fromkeys(("gradient_accumulation_steps", "eval_accumulation_steps"), (1, math.inf)),
    "per_device_eval_batch_size": (1, 2**31),
}

# Variables of the environment that change numbers behind the flags: refused unless their value says no. Of accelerate's
# all but those that cannot change a number; docs/decisions.md has the table.
CHANGES_NUMBERS = re.compile(
    "(ACCELERATE_(?!LOG_LEVEL$|DEBUG_|CPU_AFFINITY$|.*ABLE_RICH$|DYNAMO_MODE$|DYNAMO_USE_)|"
    "NVIDIA_TF32_OVERRIDE$|TORCH_ALLOW_TF32|(ONEDNN|DNNL)_DEFAULT_FPMATH_MODE$)"
)


def check_environment() -> None:
    """Raises InputError for a variable of the environment that would change numbers, or split a run."""
    if (processes := os.environ.get("WORLD_SIZE", "")) not in ("", "1"):
        raise InputError(
            f"WORLD_SIZE={processes} in the environment, and a run is one process: leave out accelerate launch and "
            "torchrun (grid.py --runs_per_gpu fills GPUs)"
        )
    for name, value in sorted(os.environ.items()):
        harmless = ("", "0", "no", "none", "false", "strict") + (("1",) if name.endswith("ACCUMULATION_STEPS") else ())
        if CHANGES_NUMBERS.match(name) and value.lower() not in harmless:
            raise InputError(f"{name}={value} in the environment would change the numbers: unset it and use flags")
