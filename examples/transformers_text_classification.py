"""Fine-tune a text classifier to 30 % of its weights with transformers' Trainer.

    python examples/transformers_text_classification.py [--model NAME] [--data NAME]

NAME is of the hub, or a folder: of a model, and of train.csv and test.csv with the columns text and
label. Run again it goes on from the last checkpoint. What it saves loads with `from_pretrained`.
"""

import argparse

from datasets import load_dataset
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    Trainer,
    TrainingArguments,
)
from transformers.trainer_utils import get_last_checkpoint

from spartan.integrations.transformers import SparsifierCallback

parser = argparse.ArgumentParser()
parser.add_argument("--model", default="distilbert-base-uncased")
parser.add_argument("--data", default="imdb")
parser.add_argument("--density", type=float, default=0.3)
parser.add_argument("--epochs", type=int, default=3)
parser.add_argument("--out", default="sparse-classifier")
args = parser.parse_args()

data = load_dataset(args.data)
tokenizer = AutoTokenizer.from_pretrained(args.model)
data = data.map(lambda rows: tokenizer(rows["text"], truncation=True), batched=True)
labels = len(set(data["train"]["label"]))
model = AutoModelForSequenceClassification.from_pretrained(args.model, num_labels=labels)


def accuracy(found):
    return {"accuracy": float((found.predictions.argmax(-1) == found.label_ids).mean())}


trainer = Trainer(
    model,
    TrainingArguments(
        args.out,
        num_train_epochs=args.epochs,
        eval_strategy="epoch",
        save_strategy="epoch",
        load_best_model_at_end=True,
        metric_for_best_model="accuracy",
    ),
    train_dataset=data["train"],
    eval_dataset=data["test"],
    processing_class=tokenizer,
    compute_metrics=accuracy,
    callbacks=[SparsifierCallback("spartan", args.density, exclude="classifier*")],
)
trainer.train(resume_from_checkpoint=get_last_checkpoint(args.out))
print(trainer.evaluate())
trainer.save_model()
