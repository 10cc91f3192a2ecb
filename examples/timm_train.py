"""Train a model of timm to a tenth of its weights, with its optimizers and its average.

    python examples/timm_train.py FOLDER [--model vit_tiny_patch16_224] [--opt adamw] [--epochs 100]

FOLDER has train/ and val/, with a folder of images for each class. It goes on from last.pt.
"""

import argparse
from pathlib import Path

import timm
import torch
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3
from torch import nn

import spartan

parser = argparse.ArgumentParser()
parser.add_argument("folder", type=Path)
parser.add_argument("--model", default="vit_tiny_patch16_224")
parser.add_argument("--opt", default="adamw")
parser.add_argument("--epochs", type=int, default=100)
parser.add_argument("--density", type=float, default=0.1)
parser.add_argument("--size", type=int, default=224)
args = parser.parse_args()
device = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def loader(part, training):
    images, size = ImageDataset(str(args.folder / part)), (3, args.size, args.size)
    return create_loader(images, size, 128, training, use_prefetcher=False, device=device)


train, val = loader("train", True), loader("val", False)
classes = len(train.dataset.reader.class_to_idx)
model = timm.create_model(args.model, num_classes=classes).to(device)
optimizer = create_optimizer_v2(model, opt=args.opt, lr=1e-3, weight_decay=0.05)
schedule = CosineLRScheduler(optimizer, args.epochs, warmup_t=5)
average = ModelEmaV3(model, decay=0.999)
sparsifier = spartan.Sparsifier(model, optimizer, "spartan", args.density, args.epochs * len(train))
parts, last = {"model": model, "optimizer": optimizer, "average": average}, Path("last.pt")
if last.exists():  # the optimizer's state carries the sparsifier's
    for name, state in torch.load(last).items():
        parts[name].load_state_dict(state)
for epoch in range(sparsifier.step // len(train), args.epochs):
    schedule.step(epoch)
    for x, y in train:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x.to(device)), y.to(device)).backward()
        optimizer.step()
        average.update(model, step=sparsifier.step)
    torch.save({name: part.state_dict() for name, part in parts.items()}, last)
sparsifier.finalize()
best = sparsifier.project(average.module).eval()
right = sum(int((best(x.to(device)).cpu().argmax(1) == y).sum()) for x, y in val)
print(f"{sparsifier.coverage}; accuracy of the average {right / len(val.dataset):.2%}")
spartan.save(best, "model.safetensors")
