"""Regularizers and update rules written down plainly: dense tensors, groups listed one by one, no shared code."""

import functools
import math

import torch

import sparsebreg as sb

#: One of every kind, with strengths that make some zeros and some nonzeros in the tests' problems.
REGS = [
    sb.NoReg(),
    sb.L1(0.02),
    sb.L1NonNegative(0.02),
    sb.GroupL2(0.02, "rows"),
    sb.GroupL2(0.02, "channels"),
    sb.GroupL2(0.02, "kernels"),
    sb.L1GroupL2(0.01, "rows"),
    sb.L1GroupL2(0.01, "channels", 0.02),
    sb.L1GroupL2(0.01, "kernels"),
    sb.NuclearNorm(0.05),
]


@functools.cache
def groups_of(shape, over):
    """(groups, weights of one) indices into the flattened weight."""
    rows, channels, kernel = shape[0], shape[1], math.prod(shape[2:])

    def place(o, i, k):
        return (o * channels + i) * kernel + k

    if over == "rows":
        groups = [[place(o, i, k) for i in range(channels) for k in range(kernel)] for o in range(rows)]
    elif over == "channels":
        groups = [[place(o, i, k) for o in range(rows) for k in range(kernel)] for i in range(channels)]
    else:
        groups = [[place(o, i, k) for k in range(kernel)] for o in range(rows) for i in range(channels)]
    return torch.tensor(groups)


def strengths(reg):
    """(of the ℓ1 norm, of the group norm)"""
    if isinstance(reg, sb.L1GroupL2):
        return reg.lam, reg.lam if reg.lam_group is None else reg.lam_group
    return (0.0, reg.lam) if isinstance(reg, sb.GroupL2) else (getattr(reg, "lam", 0.0), 0.0)


def soft(z, t):
    return torch.sign(z) * torch.clamp(z.abs() - t, min=0)


def prox(reg, z, step):
    lam, group = strengths(reg)
    if isinstance(reg, sb.NuclearNorm):
        # (M Mᵀ)^(1/2) has the singular values as eigenvalues.
        matrix = z.reshape(z.shape[0], -1)
        s, u = torch.linalg.eigh(matrix @ matrix.T)
        keep = (1 - step * lam / s.clamp(min=1e-300).sqrt()).clamp(min=0)
        return (u @ torch.diag(keep) @ u.T @ matrix).reshape(z.shape)
    if isinstance(reg, sb.L1NonNegative):
        return torch.clamp(z - step * lam, min=0)
    z = soft(z, step * lam)
    if isinstance(reg, sb.GroupL2):
        g = groups_of(tuple(z.shape), reg.over)
        flat = z.reshape(-1).clone()
        norm = flat[g].square().sum(1, keepdim=True).sqrt().clamp(min=1e-300)
        flat[g] = flat[g] * (1 - step * group * math.sqrt(g.shape[1]) / norm).clamp(min=0)
        z = flat.reshape(z.shape)
    return z


def subgradient(reg, w):
    lam, group = strengths(reg)
    if isinstance(reg, sb.NuclearNorm):
        u, s, vh = torch.linalg.svd(w.reshape(w.shape[0], -1), full_matrices=False)
        rank = int((s > 1e-12 * s[0]).sum())
        return lam * (u[:, :rank] @ vh[:rank]).reshape(w.shape)
    if isinstance(reg, sb.L1NonNegative):
        return lam * (w > 0).to(w.dtype)
    p = lam * w.sign()
    if isinstance(reg, sb.GroupL2):
        g = groups_of(tuple(w.shape), reg.over)
        values = w.reshape(-1)[g]
        norm = values.square().sum(1, keepdim=True).sqrt().clamp(min=1e-300)
        p.view(-1)[g] += group * math.sqrt(g.shape[1]) * values / norm
    return p


class LinBreg:
    """``start`` gives the state, ``move`` changes it and returns z and t: the weight becomes prox_{tJ}(z)."""

    def __init__(self, lr, momentum=0.0, delta=1.0, weight_decay=0.0):
        self.lr, self.beta, self.delta, self.decay = lr, momentum, delta, weight_decay

    def start(self, w, reg):
        return {"dual": w / self.delta + subgradient(reg, w), "momentum_buffer": torch.zeros_like(w)}

    def move(self, w, g, s):
        s["momentum_buffer"] = self.beta * s["momentum_buffer"] + (1 - self.beta) * self.lr * (g + self.decay * w)
        s["dual"] = s["dual"] - s["momentum_buffer"]
        return self.delta * s["dual"], self.delta


class AdaBreg:
    def __init__(self, lr, betas=(0.9, 0.999), eps=1e-8, delta=1.0, weight_decay=0.0, decoupled_weight_decay=False):
        self.lr, self.betas, self.eps, self.delta = lr, betas, eps, delta
        self.coupled = 0.0 if decoupled_weight_decay else weight_decay
        self.decoupled = weight_decay if decoupled_weight_decay else 0.0

    def start(self, w, reg):
        return {
            "dual": w / self.delta + subgradient(reg, w),
            "exp_avg": torch.zeros_like(w),
            "exp_avg_sq": torch.zeros_like(w),
            "step": 0,
        }

    def move(self, w, g, s):
        g = g + self.coupled * w
        s["step"] += 1
        for key, beta, new in (("exp_avg", self.betas[0], g), ("exp_avg_sq", self.betas[1], g**2)):
            s[key] = beta * s[key] + (1 - beta) * new
        m, r = (s[k] / (1 - b ** s["step"]) for k, b in zip(("exp_avg", "exp_avg_sq"), self.betas, strict=True))
        s["dual"] = s["dual"] - self.lr * m / (r.sqrt() + self.eps) - self.lr * self.decoupled * w
        return self.delta * s["dual"], self.delta


class ProxSGD:
    def __init__(self, lr, momentum=0.0, weight_decay=0.0):
        self.lr, self.beta, self.decay = lr, momentum, weight_decay

    def start(self, w, reg):
        return {"momentum_buffer": torch.zeros_like(w)}

    def move(self, w, g, s):
        s["momentum_buffer"] = self.beta * s["momentum_buffer"] + g + self.decay * w
        return w - self.lr * s["momentum_buffer"], self.lr


def depths(levels, steps, depth=0):
    """How many levels inside the frozen pattern each of so many coarse steps is; ``levels``: (every, steps, keep)."""
    if not levels:
        return [depth] * steps
    (every, inside, _), *deeper = levels
    period = [depth] * every + depths(deeper, inside, depth + 1)
    return (period * steps)[:steps]


class Training:
    """Steps a model by a rule; with ``coarse_steps``, m steps on the frozen nonzero weights after every other one.

    Of these, those that ``depths`` says are on the largest weights of ``levels``.
    """

    def __init__(self, model, rule, reg, coarse_steps=0, levels=()):
        self.model, self.rule, self.m, self.left = model, rule, coarse_steps, 0
        self.levels, self.depths, self.masks = levels, depths(levels, coarse_steps), []
        self.reg = {n: reg if p.dim() > 1 else sb.NoReg() for n, p in model.named_parameters()}
        self.state = {n: rule.start(p.detach().clone(), self.reg[n]) for n, p in model.named_parameters()}
        self.mask = {}

    @torch.no_grad()
    def step(self):
        coarse = self.left > 0
        if coarse and self.levels:
            self._choose(self.depths[self.m - self.left])
        for n, p in self.model.named_parameters():
            before = dict(self.state[n])
            z, t = self.rule.move(p.clone(), p.grad, self.state[n])
            if coarse and self.reg[n].sparse:
                keep = self.mask[n]
                z = z * keep
                for key, old in before.items():
                    if isinstance(old, torch.Tensor):
                        self.state[n][key] = torch.where(keep, self.state[n][key], old)
            new = prox(self.reg[n], z, t)
            p.copy_(torch.where(self.mask[n], new, p) if coarse and self.reg[n].sparse else new)
        if coarse:
            self.left -= 1
        elif self.m:
            self.mask = {n: p != 0 for n, p in self.model.named_parameters()}
            self.masks = [self.mask]
            self.left = self.m

    def _choose(self, depth):
        """The mask of this depth: kept, or made of the largest weights of the one above."""
        self.masks = self.masks[: depth + 1]
        if len(self.masks) <= depth:
            inside = {}
            for n, p in self.model.named_parameters():
                active = self.masks[-1][n].flatten().nonzero().flatten().tolist()
                order = sorted(active, key=lambda i: -abs(p.flatten()[i].item()))
                mask = torch.zeros(p.numel(), dtype=torch.bool)
                mask[order[: math.ceil(self.levels[depth - 1][2] * len(active))]] = True
                inside[n] = mask.view(p.shape)
            self.masks.append(inside)
        self.mask = self.masks[-1]


def least_squares(shape, dtype=torch.float64, seed=3):
    """(loss of a weight of this shape, a sparse start): a full-batch problem with a unique minimiser."""
    g = torch.Generator().manual_seed(seed)
    rest = math.prod(shape[1:])
    matrix = torch.randn(3 * rest, rest, generator=g, dtype=dtype)
    target = torch.randn(3 * rest, shape[0], generator=g, dtype=dtype)
    start = torch.randn(shape, generator=g, dtype=dtype) * (torch.rand(shape, generator=g) < 0.3)
    return lambda w: (matrix @ w.reshape(shape[0], rest).T - target).square().mean(), start


def compare_steps(optimizer, w, rule, reg, loss, steps, close, maximize=False):
    """``steps`` steps of both: weights and state agree after the first ones and every tenth."""
    twin = torch.nn.Parameter(w.detach().clone())
    state = rule.start(twin.detach().clone(), reg)
    for i in range(steps):
        optimizer.zero_grad()
        loss(w).backward()
        optimizer.step()
        (g,) = torch.autograd.grad(loss(twin), twin)
        z, t = rule.move(twin.detach(), -g if maximize else g, state)
        with torch.no_grad():
            twin.copy_(prox(reg, z, t))
        if i > 2 and (i + 1) % 10:
            continue
        close(w.detach(), twin.detach())
        for key, value in optimizer.state[w].items():
            if isinstance(value, torch.Tensor):
                close(value, state[key])
            else:
                assert value == state[key]
