"""Train a ResNet-20 on CIFAR-10 to 5 % of its weights with Lightning.

    python examples/lightning_cifar10.py [--data NAME] [--epochs 40] [--resume CKPT]

NAME is of the hub, or a folder of parquet files with the columns image and label.
"""

import argparse

import lightning.pytorch as L
import torch
from datasets import load_dataset
from torch import nn

from spartan.commands.models import resnet20
from spartan.integrations.lightning import Sparsify

parser = argparse.ArgumentParser()
parser.add_argument("--data", default="uoft-cs/cifar10")
parser.add_argument("--epochs", type=int, default=40)
parser.add_argument("--density", type=float, default=0.05)
parser.add_argument("--resume")
args = parser.parse_args()


class Classifier(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = resnet20(3, 32, 10)

    def training_step(self, batch, index):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 0.1, momentum=0.9, weight_decay=5e-4)
        steps = self.trainer.estimated_stepping_batches
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=steps)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]


def scaled(rows):
    batch = torch.utils.data.default_collate(rows)
    return (batch["image"].float() - 120) / 64, batch["label"]


def loader(part, shuffle):
    part = part.rename_columns({part.column_names[0]: "image"}).with_format("torch")
    return torch.utils.data.DataLoader(part, 128, shuffle, collate_fn=scaled)


data = load_dataset(args.data)
best = L.callbacks.ModelCheckpoint(monitor="accuracy", mode="max")
trainer = L.Trainer(max_epochs=args.epochs, callbacks=[Sparsify("spartan", args.density), best])
parts = loader(data["train"], True), loader(data["test"], False)
trainer.fit(Classifier(), *parts, ckpt_path=args.resume)
