"""Plain torch with an average of the weights: digits to 5 %, the average exactly sparse too.

    python examples/plain_torch_with_ema.py [--epochs 30] [--out model.safetensors]

Stopped at any time it goes on from checkpoint.pt.
"""

import argparse
from pathlib import Path

import torch
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import spartan

parser = argparse.ArgumentParser()
parser.add_argument("--epochs", type=int, default=30)
parser.add_argument("--out", default="model.safetensors")
args = parser.parse_args()

digits = load_digits()
images = torch.tensor(digits.data / 16, dtype=torch.float32)
labels = torch.tensor(digits.target)
held_out = torch.arange(len(labels)) % 5 == 0
train = torch.utils.data.TensorDataset(images[~held_out], labels[~held_out])
batches = torch.utils.data.DataLoader(train, 64, shuffle=True, drop_last=True)

torch.manual_seed(0)
model = nn.Sequential(
    nn.Linear(64, 256), nn.BatchNorm1d(256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
    nn.Linear(256, 10),
)  # fmt: skip
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
average = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.99), use_buffers=True)
sparsifier = spartan.Sparsifier(
    model, optimizer, "spartan", budget=0.05, total_steps=args.epochs * len(batches)
)
parts = {"model": model, "optimizer": optimizer, "schedule": schedule, "average": average}
checkpoint = Path("checkpoint.pt")
if checkpoint.exists():  # the optimizer's state carries the sparsifier's
    for name, state in torch.load(checkpoint).items():
        parts[name].load_state_dict(state)

for _ in range(schedule.last_epoch, args.epochs):
    for x, y in batches:
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x), y).backward()
        optimizer.step()
        average.update_parameters(model)
    schedule.step()
    torch.save({name: part.state_dict() for name, part in parts.items()}, checkpoint)
sparsifier.finalize()
sparsifier.project(average)
accuracy = (average.eval()(images[held_out]).argmax(1) == labels[held_out]).float().mean()
print(f"{sparsifier.coverage}, density {sparsifier.density:.2%}, accuracy {accuracy:.2%}")
save_file(average.module.state_dict(), args.out)
