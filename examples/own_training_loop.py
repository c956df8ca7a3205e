"""Sparse training in a loop of your own: the three lines with `sb.` before the loop, and ml.step() inside it."""

import torch
from sklearn.datasets import load_digits
from torch.nn import functional as F

import sparsebreg as sb

torch.manual_seed(0)
images, labels = load_digits(return_X_y=True)
x, y = torch.tensor(images, dtype=torch.float32) / 8 - 1, torch.tensor(labels)
x_train, y_train, x_test, y_test = x[:1500], y[:1500], x[1500:], y[1500:]

model = torch.nn.Sequential(
    torch.nn.Linear(64, 512), torch.nn.ReLU(), torch.nn.Linear(512, 512), torch.nn.ReLU(), torch.nn.Linear(512, 10)
)
sb.sparse_init_(model, density=0.05)
optimizer = sb.LinBreg(sb.param_groups(model, reg=sb.L1(0.05)), lr=1.0, momentum=0.9)
ml = sb.Multilevel(model, optimizer, coarse_steps=19)

for _ in range(20):
    for index in torch.randperm(len(x_train)).split(100):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(x_train[index]), y_train[index])
        loss.backward()
        ml.step()  # instead of optimizer.step()

print(ml.report)  # layer by layer: sparse, or why not
ml.thaw()  # the dense model is back, with its zeros
with torch.no_grad():
    accuracy = (model(x_test).argmax(1) == y_test).float().mean().item()
weights = [m.weight for m in model if isinstance(m, torch.nn.Linear)]
sparsity = 1 - sum(int(w.count_nonzero()) for w in weights) / sum(w.numel() for w in weights)
print(f"test accuracy {accuracy:.1%}, sparsity {sparsity:.1%}")
