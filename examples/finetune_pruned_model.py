"""Train dense, prune by magnitude, fine-tune with the pattern fixed: only the weights that are left are computed."""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.nn.utils import prune

import sparsebreg as sb

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]


def train(model, optimizer, epochs):
    for _ in range(epochs):
        for index in torch.randperm(len(x_train)).split(100):
            optimizer.zero_grad()
            F.cross_entropy(model(x_train[index]), y_train[index]).backward()
            optimizer.step()


@torch.no_grad()
def accuracy(model):
    return (model(x_test).argmax(1) == y_test).float().mean().item()


model = sb.models.mlp((64,), hidden=(512, 512))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
train(model, optimizer, 5)
dense = accuracy(model)

layers = [m for m in model if isinstance(m, torch.nn.Linear)]
for layer in layers:
    prune.l1_unstructured(layer, "weight", amount=0.95)
    prune.remove(layer, "weight")  # a plain parameter again, with zeros
pruned = accuracy(model)

optimizer = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.9)  # prune.remove made new parameters
# Every layer, whether it gets faster or not: in one that stayed dense, SGD would fill the zeros.
report = sb.sparsify_(model, sb.SparsifyConfig(decide="always"), optimizer=optimizer)
train(model, optimizer, 5)
sb.densify_(model, optimizer=optimizer)

print(report)
tuned = accuracy(model)
sparsity = 1 - sum(int(m.weight.count_nonzero()) for m in layers) / sum(m.weight.numel() for m in layers)
print(f"test accuracy: dense {dense:.1%}, pruned {pruned:.1%}, fine-tuned {tuned:.1%} at sparsity {sparsity:.1%}")
