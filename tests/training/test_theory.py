"""What theory promises of ML-LinBreg with exact gradients, checked on the package's own optimizer and cycle.

v is the dual variable, p = v − θ/δ. As v⁺ = v − τ ∇L(θ) on the weights that move, and the others have θ⁺ = θ,

    ⟨∇L(θ), θ⁺ − θ⟩ = −D_sym(θ⁺, θ)/τ − ‖θ⁺ − θ‖²/(δτ) ,   D_sym = ⟨p⁺ − p, θ⁺ − θ⟩ ,

in fine and coarse steps alike; with Lip-Lipschitz gradients this gives the inequality of :func:`gap`, for every τ. It
makes the loss fall if τ ≤ 2/(δ Lip), since then all its terms are at least 0: D_sym because p ∈ ∂J(θ), for the whole of
θ and not just for its active part. At a thaw this needs that each weight outside of the pattern still has the v with
which it was zero; so both are looked at together, as dense tensors, after every step.
"""

import itertools

import numpy as np
import plain
import pytest
import torch
from helpers import close
from scipy.optimize import minimize
from torch import nn
from torch.nn import functional as F

import sparsebreg as sb

ALWAYS = sb.SparsifyConfig(decide="always")
SPARSE = [reg for reg in plain.REGS if reg.sparse]
SAMPLES, FEATURES, OUT = 40, 12, 6


def problem(loss):
    """(model, function of the model that gives the loss, Lipschitz constant of that function's gradient)."""
    g = torch.Generator().manual_seed(5)
    x = torch.randn(SAMPLES, FEATURES, generator=g, dtype=torch.float64)
    top = torch.linalg.eigvalsh(x.T @ x)[-1].item()
    target = torch.randn(SAMPLES, OUT, generator=g, dtype=torch.float64)
    model = nn.Sequential(nn.Linear(FEATURES, OUT, bias=False)).double()
    weight = torch.randn(OUT, FEATURES, generator=g, dtype=torch.float64)
    model[0].weight.data = weight * (torch.rand(OUT, FEATURES, generator=g) < 0.2)
    # The mean runs over samples and outputs; the second derivative of the logistic loss is at most 1/4.
    if loss == "least_squares":
        return model, lambda m: F.mse_loss(m(x), target), 2 * top / (SAMPLES * OUT)
    return model, lambda m: F.binary_cross_entropy_with_logits(m(x), (target > 0).double()), top / (4 * SAMPLES * OUT)


def dense(model, optimizer):
    """(θ, v) as dense tensors, whatever the phase."""
    layer = model[0]
    if getattr(layer, "frozen", False):
        state = optimizer.state[layer.values]
        return layer.weight.detach(), layer.pattern.scatter(state["dual"], state["frozen"]["dual"].clone())
    return layer.weight.detach().clone(), optimizer.state[layer.weight]["dual"].clone()


def in_subdifferential(theta, v, reg, delta):
    """v ∈ ∂J_δ(θ), which is θ = prox_{δJ}(δ v)."""
    return (plain.prox(reg, delta * v, delta) - theta).abs().max().item() < 1e-12


def trace(loss, reg, delta, tau, steps=40, coarse_steps=5):
    """(phase, loss, θ, v) before every step of ML-LinBreg and after the last."""
    model, loss_of, _ = problem(loss)
    optimizer = sb.LinBreg(sb.param_groups(model, reg), lr=tau, delta=delta)
    if isinstance(reg, sb.L1NonNegative):
        model[0].weight.data.abs_()
    cycle = sb.Multilevel(model, optimizer, coarse_steps, ALWAYS)
    weight = model[0].weight.detach().clone()
    seen = []
    for i in range(steps + 1):
        optimizer.zero_grad()
        value = loss_of(model)
        theta, v = dense(model, optimizer) if i else (weight, weight / delta + plain.subgradient(reg, weight))
        seen.append((cycle.phase, value.item(), theta, v))
        value.backward()
        cycle.step()
    return seen


def gap(before, after, delta, tau, lip):
    """L(θ) − L(θ⁺) − D_sym(θ⁺, θ)/τ − (2 − δτ Lip)/(2δτ) ‖θ⁺ − θ‖², and D_sym."""
    (_, old, theta, v), (_, new, theta_next, v_next) = before, after
    d = theta_next - theta
    d_sym = ((v_next - v - d / delta) * d).sum().item()
    return old - new - d_sym / tau - (2 - delta * tau * lip) / (2 * delta * tau) * d.square().sum().item(), d_sym


@pytest.mark.parametrize(("delta", "fraction"), [(1.0, 1.0), (0.3, 2.0)])
@pytest.mark.parametrize("reg", SPARSE, ids=repr)
@pytest.mark.parametrize("loss", ["least_squares", "logistic"])
def test_descent_at_every_step(loss, reg, delta, fraction):
    """Fine, coarse and across every change of pattern, for τ up to 2/(δ Lip)."""
    lip = problem(loss)[2]
    tau = fraction / (delta * lip)
    seen = trace(loss, reg, delta, tau)
    pairs = list(itertools.pairwise(seen))
    assert [before[0] for before, _ in pairs[:8]] == ["fine", *["coarse"] * 5, "fine", "coarse"]
    for before, after in pairs:
        left, d_sym = gap(before, after, delta, tau, lip)
        assert left >= -1e-12
        assert d_sym >= -1e-12
        assert after[1] <= before[1] + 1e-12
        assert in_subdifferential(*after[2:], reg, delta)
    supports = [(theta != 0) for phase, _, theta, _ in seen if phase == "fine"]
    assert any(not torch.equal(a, b) for a, b in itertools.pairwise(supports))  # the pattern did change
    assert seen[-1][1] < 0.99 * seen[0][1]


@pytest.mark.parametrize("loss", ["least_squares", "logistic"])
def test_no_descent_beyond_the_largest_step(loss):
    """At τ = 3/(δ Lip) the inequality stands, but its last term is negative: what holds without it up to 2/(δ Lip),
    that the loss falls by D_sym/τ at least, is lost, and the loss rises."""
    lip = problem(loss)[2]
    for fraction in (2.0, 3.0):
        tau = fraction / lip
        seen = trace(loss, sb.L1(0.02), 1.0, tau, steps=100)
        pairs = list(itertools.pairwise(seen))
        gaps = [gap(a, b, 1.0, tau, lip) for a, b in pairs]
        scale = max(value for _, value, _, _ in seen)
        assert min(left for left, _ in gaps) >= -1e-12 * max(1, scale)
        falls = [a[1] - b[1] for a, b in pairs]
        least = min(fall - d_sym / tau for fall, (_, d_sym) in zip(falls, gaps, strict=True))
        if fraction == 2:
            assert min(falls) >= -1e-12
            assert least >= -1e-12
        else:
            assert min(falls) < -1e-4
            assert least < -1e-4


def test_the_check_can_fail():
    """With half of the Lipschitz constant, or v off by a little after a thaw, the inequality does not hold."""
    lip = problem("least_squares")[2]
    tau = 1 / lip
    seen = trace("least_squares", sb.L1(0.02), 1.0, tau)
    assert min(gap(a, b, 1.0, tau, lip / 2)[0] for a, b in itertools.pairwise(seen)) < -1e-6
    (phase, value, theta, v), after = seen[6], seen[7]
    assert phase == "fine"
    assert gap((phase, value, theta, v), after, 1.0, tau, lip)[0] >= -1e-12
    wrong = v - 0.05 * (after[2] - theta).sign()
    assert gap((phase, value, theta, wrong), after, 1.0, tau, lip)[0] < -1e-6
    assert not in_subdifferential(theta, v + 0.05, sb.L1(0.02), 1.0)


@pytest.mark.parametrize("delta", [1.0, 0.3])
@pytest.mark.parametrize("reg", SPARSE, ids=repr)
class TestRestrictionAndProlongation:
    def start(self, reg, delta):
        """A model and an optimizer whose v is any, with the θ that belongs to it."""
        model, _, _ = problem("least_squares")
        reg = reg.with_lam(30 * reg.lam)
        optimizer = sb.LinBreg(sb.param_groups(model, reg), lr=0.1, delta=delta)
        v = torch.randn(OUT, FEATURES, dtype=torch.float64)
        v[:2] *= 0.1
        v[:, :3] *= 0.1
        model[0].weight.data = plain.prox(reg, delta * v, delta)
        optimizer.state[model[0].weight]["dual"] = v
        return model, optimizer, reg

    def assert_subgradient(self, value, v, theta, delta):
        """J_δ(z) ≥ J_δ(θ) + ⟨v, z − θ⟩ for z near and far."""
        elastic = lambda z: value(z) + z.square().sum() / (2 * delta)  # noqa: E731
        for size in (1e-3, 0.1, 1.0, 10.0):
            for _ in range(10):
                z = (theta + size * torch.randn_like(theta)).abs()  # admissible for nonnegative weights too
                assert elastic(z) >= elastic(theta) + (v * (z - theta)).sum() - 1e-10

    def test_restriction(self, reg, delta):
        """Rv ∈ ∂Ĵ_δ(Rθ), with Ĵ the J of the dense weight that is zero elsewhere."""
        model, optimizer, reg = self.start(reg, delta)
        theta, v = dense(model, optimizer)
        assert 0 < (theta == 0).sum() < theta.numel()
        sb.sparsify_(model, ALWAYS, optimizer=optimizer)
        pattern, values = model[0].pattern, model[0].values.detach()
        assert torch.equal(pattern.mask(), theta != 0)
        dual = optimizer.state[model[0].values]["dual"]
        assert torch.equal(dual, v[theta != 0])
        close(reg.restrict(pattern).prox(delta * dual, delta), values)
        self.assert_subgradient(lambda z: reg.value(pattern.scatter(z)), dual, values, delta)

    def test_prolongation(self, reg, delta):
        """After coarse steps with any gradients, groups that vanish among them, v ∈ ∂J_δ(θ) for the dense pair."""
        model, optimizer, reg = self.start(reg, delta)
        before = dense(model, optimizer)
        sb.sparsify_(model, ALWAYS, optimizer=optimizer)
        layer = model[0]
        away = layer.values.detach().clone()
        zeros = 0
        for i in range(30):
            # Gradients that first push all values through zero, and then about at random.
            layer.values.grad = away if i < 15 else torch.randn_like(away)
            optimizer.step()
            zeros += int((layer.values == 0).sum())
        assert zeros > 0
        hat = layer.values.detach().clone(), optimizer.state[layer.values]["dual"].clone()
        mask = layer.pattern.mask()
        sb.densify_(model, optimizer)
        theta, v = dense(model, optimizer)
        for whole, part, old in zip((theta, v), hat, before, strict=True):
            assert torch.equal(whole[mask], part)
            assert torch.equal(whole[~mask], old[~mask])
        assert in_subdifferential(theta, v, reg, delta)
        self.assert_subgradient(reg.value, v, theta, delta)
        assert not in_subdifferential(theta, v + 10, reg, delta)


def train(model, loss_of, optimizer, stepper, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        loss_of(model).backward()
        stepper.step()


def least_squares_solution(x, y):
    return torch.linalg.lstsq(x, y).solution.T


class TestLimits:
    def data(self, samples):
        g = torch.Generator().manual_seed(8)
        x = torch.randn(samples, FEATURES, generator=g, dtype=torch.float64)
        y = torch.randn(samples, OUT, generator=g, dtype=torch.float64)
        model = nn.Sequential(nn.Linear(FEATURES, OUT, bias=False)).double()
        nn.init.zeros_(model[0].weight)
        lip = 2 * torch.linalg.eigvalsh(x.T @ x)[-1].item() / (samples * OUT)
        return x, y, model, lambda m: F.mse_loss(m(x), y), lip

    @pytest.mark.parametrize("coarse_steps", [0, 3])
    @pytest.mark.parametrize("reg", [sb.L1(0.01), sb.GroupL2(0.005), sb.L1GroupL2(0.003, "channels")], ids=repr)
    def test_strongly_convex(self, reg, coarse_steps):
        """The only minimiser of the loss is the limit: J decides the way there, not the end."""
        x, y, model, loss_of, lip = self.data(120)
        optimizer = sb.LinBreg(sb.param_groups(model, reg), lr=1.5 / lip)
        cycle = sb.Multilevel(model, optimizer, coarse_steps, ALWAYS)
        train(model, loss_of, optimizer, cycle, 1200)
        best = least_squares_solution(x, y)
        assert loss_of(model).item() - F.mse_loss(x @ best.T, y).item() < 1e-13
        if cycle.phase == "coarse":
            cycle.thaw()
        assert (model[0].weight - best).abs().max() < 1e-6

    def test_many_minimisers_multilevel(self):
        """Fewer equations than weights (the PL inequality holds): the loss goes to its minimum, 0."""
        _, _, model, loss_of, lip = self.data(6)
        optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.02)), lr=1 / lip)
        train(model, loss_of, optimizer, sb.Multilevel(model, optimizer, 3, ALWAYS), 2000)
        assert loss_of(model).item() < 1e-12

    def test_many_minimisers_linbreg(self):
        """From v = 0, the limit is the solution of xθ = y with the least J_δ (Cai, Osher, Shen 2009)."""
        x, y, model, loss_of, lip = self.data(6)
        lam, delta = 0.3, 2.0
        optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(lam)), lr=1 / (delta * lip), delta=delta)
        train(model, loss_of, optimizer, optimizer, 5000)
        weight = model[0].weight.detach().numpy()
        a, b = x.numpy(), y.numpy()
        for row, target in zip(weight, b.T, strict=True):
            # θ = plus − minus, both at least 0: a smooth problem.
            best = minimize(
                lambda z: lam * z.sum() + ((z[:FEATURES] - z[FEATURES:]) ** 2).sum() / (2 * delta),
                np.ones(2 * FEATURES),
                jac=lambda z: lam + np.r_[z[:FEATURES] - z[FEATURES:], z[FEATURES:] - z[:FEATURES]] / delta,
                bounds=[(0, None)] * (2 * FEATURES),
                constraints={
                    "type": "eq",
                    "fun": lambda z, t=target: a @ (z[:FEATURES] - z[FEATURES:]) - t,
                    "jac": lambda z: np.hstack([a, -a]),
                },
                method="SLSQP",
                options={"maxiter": 500, "ftol": 1e-14},
            ).x
            assert np.abs(row - (best[:FEATURES] - best[FEATURES:])).max() < 1e-5
        assert (weight == 0).any()

    def test_long_coarse_phase(self):
        """Its limit is the minimiser over the active weights."""
        x, y, model, loss_of, lip = self.data(120)
        optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.01)), lr=1 / lip)
        cycle = sb.Multilevel(model, optimizer, 2000, ALWAYS)
        model[0].weight.data = torch.randn(OUT, FEATURES, dtype=torch.float64) * (torch.rand(OUT, FEATURES) < 0.4)
        train(model, loss_of, optimizer, cycle, 2000)
        assert cycle.phase == "coarse"
        mask, weight = model[0].pattern.mask(), model[0].weight
        assert 0 < mask.sum() < mask.numel()
        for row in range(OUT):
            columns = mask[row].nonzero().squeeze(1)
            best = least_squares_solution(x[:, columns], y[:, row : row + 1])
            assert (weight[row, columns] - best[0]).abs().max() < 1e-6
