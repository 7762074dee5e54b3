"""One run as a script without this project does it: transformers' Trainer, as run_classification.py comes.

It pads to 128 tokens. Rows and tokens are this project's; each epoch is evaluated, the weights are saved at the end.

    python benchmarks/peer.py DATA/NAME MODEL OUTPUT full|probe EPOCHS LEARNING_RATE

Used by speed.py, for the time of a whole process.
"""

import sys

from datasets import load_from_disk
from sklearn.metrics import f1_score
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    EvalPrediction,
    Trainer,
    TrainingArguments,
)


def scores(evaluated: EvalPrediction) -> dict[str, float]:
    return {"f1": f1_score(evaluated.label_ids, evaluated.predictions.argmax(-1), average="weighted")}


def main() -> None:
    rows, model_folder, output, tuning, epochs, rate = sys.argv[1:]
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    data = load_from_disk(rows)
    data = data.map(lambda part: tokenizer(part["text"], truncation=True, max_length=64), batched=True)
    classes = data["train"].features["label"].num_classes
    model = AutoModelForSequenceClassification.from_pretrained(model_folder, num_labels=classes)
    if tuning == "probe":
        model.base_model.requires_grad_(False)
    chosen = {"num_train_epochs": float(epochs), "learning_rate": float(rate), "per_device_train_batch_size": 32}
    trainer = Trainer(
        model,
        TrainingArguments(output, eval_strategy="epoch", save_strategy="no", disable_tqdm=True, **chosen),
        data_collator=DataCollatorWithPadding(tokenizer, padding="max_length", max_length=128),
        train_dataset=data["train"],
        eval_dataset=data["test"],
        processing_class=tokenizer,
        compute_metrics=scores,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
