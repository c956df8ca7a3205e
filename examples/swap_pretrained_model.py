"""Swap the layers of a model that is sparse already for faster training on a CPU, and measure what it brings."""

import statistics
import time

import torch
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb


class Block(nn.Module):
    """A residual feed-forward block, as in a transformer."""

    def __init__(self, width):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        return x + self.down(F.gelu(self.up(self.norm(x))))


torch.manual_seed(0)
model = nn.Sequential(Block(256), Block(256), nn.Linear(256, 10))  # yours comes from a file: model.load_state_dict(...)
for module in model.modules():
    if isinstance(module, nn.Linear) and module.out_features > 10:  # stands for the pruning that yours has seen
        module.weight.data *= (
            module.weight.abs() > module.weight.abs().flatten().kthvalue(int(0.95 * module.weight.numel())).values
        )
optimizer = torch.optim.Adam(model.parameters(), lr=1e-4)
x, y = torch.randn(128, 256), torch.randint(10, (128,))


def step():
    optimizer.zero_grad()
    loss = F.cross_entropy(model(x), y)
    loss.backward()
    optimizer.step()
    return loss.item()


def milliseconds(repeat=15):
    times = []
    for _ in range(repeat):
        begin = time.perf_counter()
        step()
        times.append(1e3 * (time.perf_counter() - begin))
    return statistics.median(times[3:])  # the first steps warm up


report = sb.sparsify_(model, optimizer=optimizer)  # before any step: a dense step of Adam would fill the zeros
print(report)
sparse = milliseconds()
torch.save(model.state_dict(), "model.pt")  # keys and shapes of the dense model
sb.densify_(model, optimizer=optimizer)
dense = milliseconds()
print(f"a training step: dense {dense:.1f} ms, sparse {sparse:.1f} ms")
