"""How much faster the linear probe is with the encoder's outputs computed once than the plain way.

    python benchmarks/probe.py

Both do the same work with the same Trainer on the embedded model: three learning rates, ten epochs, tested after each,
rotten_tomatoes with 1,000 train and 500 test rows. The plain way runs the frozen encoder on every batch of every epoch.
Prints seconds and their ratio, taken in one run, and writes benchmarks/probe.json.
"""

import json
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, Trainer

sys.path.insert(0, str(Path(__file__).parent.parent))

import data_prep
import train

RATES = ("1e-5", "2e-5", "5e-5")


def seconds(tuning: str, data_dir: str, output_dir: str) -> float:
    """The time of the three runs, loading included; the probe begins with an empty cache."""
    started = time.perf_counter()
    for rate in tqdm(RATES, desc=tuning):
        flags = ["--model", "minilm", "--dataset", "rotten_tomatoes", "--data_dir", data_dir, "--learning_rate", rate]
        run = train.plan([*flags, "--output_dir", output_dir, "--tuning", tuning, "--disable_tqdm", "True"])
        trainer, _, _ = train.make_trainer(run, data_prep.load("rotten_tomatoes", data_dir))
        trainer.args.output_dir = f"{output_dir}/checkpoints"
        if tuning == "full":
            freeze(trainer)
        trainer.train()
    return time.perf_counter() - started


def freeze(trainer: Trainer) -> None:
    load = trainer.model_init

    def model_init() -> PreTrainedModel:
        model = load()
        model.base_model.requires_grad_(False)
        return model

    trainer.model_init = model_init


def main() -> None:
    train.quieten()
    with tempfile.TemporaryDirectory() as folder:
        data_prep.prepare("rotten_tomatoes", train_size=1_000, test_size=500, data_dir=folder)
        cached, plain = (seconds(tuning, folder, f"{folder}/{tuning}") for tuning in ("probe", "full"))
    figures = {"plain_seconds": round(plain, 1), "cached_seconds": round(cached, 1), "ratio": round(plain / cached, 1)}
    figures |= {"threads": torch.get_num_threads(), "machine": platform.machine(), "torch": torch.__version__}
    (Path(__file__).parent / "probe.json").write_text(json.dumps(figures, indent=1) + "\n")
    print(f"plain {plain:.1f} s, features computed once {cached:.1f} s: {plain / cached:.1f} times faster")


if __name__ == "__main__":
    main()
