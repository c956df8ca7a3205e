"""The FLOPs of a step and of a training run by hand, in the paper, and by torch's counter."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import sparsebreg as sb


def test_flops_by_hand():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 10))
    conv, linear = 2 * 4 * 36 * 2 * 9, 2 * 144 * 10
    count = sb.flops.per_step(model, (5, 2, 8, 8))
    assert count.dense == count.sparse == 5 * (conv + linear)
    with torch.no_grad():
        model[0].weight[1:] = 0
        model[3].weight[:, 36:] = 0
    for swapped in (False, True):
        if swapped:
            sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
        count = sb.flops.per_step(model, (1, 2, 8, 8))
        assert count.dense == conv + linear
        assert count.sparse == pytest.approx((conv + linear) / 4)
        assert isinstance(model[0], sb.nn.SparseConv2d) == swapped
    assert model.training
    assert count.coarse == pytest.approx(0.25 * count.sgd)
    assert count.fraction_of_sgd(0) == pytest.approx((2 * 0.25 + 1) / 3)


def test_the_papers_fractions():
    flops = sb.flops.StepFlops(1.0, 0.07)
    assert flops.fraction_of_sgd(0) == pytest.approx(0.38, abs=0.005)
    assert sb.flops.StepFlops(1.0, 0.057).fraction_of_sgd(99) == pytest.approx(0.06, abs=0.005)


def test_wrong_input_shape():
    with pytest.raises(ValueError, match="input_shape: expected a shape that the model takes"):
        sb.flops.per_step(nn.Linear(3, 3), (1, 4))


@pytest.mark.parametrize("kind", ["mlp", "convnet"])
def test_torchs_counter_sees_sparse_layers(kind, backend):
    """Forward, grad_x and grad_values: 2 · nnz · positions each, per layer; bias and activations are free."""
    if kind == "mlp":
        model, shape = sb.models.mlp((1, 6, 6), hidden=(20,)), (3, 1, 6, 6)
        positions = {"1": 3, "3": 3}
    else:
        model, shape = sb.models.convnet((1, 16, 16), channels=4), (3, 1, 16, 16)
        positions = {"0": 3 * 144, "3": 3 * 4, "7": 3, "9": 3}
    sb.sparse_init_(model, 0.2)
    x = torch.randn(shape, requires_grad=True)
    sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
    layers = {n: model.get_submodule(n).pattern for n in positions}
    products = {n: 2 * layers[n].nnz * p for n, p in positions.items()}
    with FlopCounterMode(display=False) as counter:
        y = model(x)
    assert counter.get_total_flops() == sum(products.values())
    for n, flops in products.items():
        assert sum(counter.get_flop_counts()[f"Sequential.{n}"].values()) == flops
    with FlopCounterMode(display=False) as counter:
        y.sum().backward()
    assert counter.get_total_flops() == 2 * sum(products.values())
    with FlopCounterMode(display=False) as counter:
        model(x.detach()).sum().backward()
    first = next(iter(products.values()))
    assert counter.get_total_flops() == 3 * sum(products.values()) - first  # no gradient for the input


def test_a_full_pattern_counts_as_the_dense_layer():
    model = sb.models.convnet((1, 16, 16), channels=4)
    x = torch.randn(2, 1, 16, 16, requires_grad=True)
    totals = []
    for _ in range(2):
        with FlopCounterMode(display=False) as counter:
            model(x).sum().backward()
        totals.append(counter.get_total_flops())
        if len(totals) == 1:
            sb.sparsify_(model, sb.SparsifyConfig(decide="always"))
    assert totals[0] == totals[1] > 0


def keep(model, density):
    """Exactly this density in every layer."""
    with torch.no_grad():
        for m in model.modules():
            if isinstance(m, nn.Linear):
                m.weight.view(-1)[round(density * m.weight.numel()) :] = 0
    return model


def test_training_flops_are_the_papers(backend):
    """LinBreg at 7 % density costs 38 % of SGD; ML-LinBreg with m = 99 at 5.7 % costs 6 %."""
    model = keep(sb.models.mlp((1, 10, 10), hidden=(100,), classes=10), 0.07)
    counted = sb.flops.TrainingFlops(model, (4, 1, 10, 10))
    assert counted.fraction_of_sgd == 0
    for _ in range(5):
        counted.step("fine", samples=32)
    assert counted.fraction_of_sgd == pytest.approx((2 * 0.07 + 1) / 3)
    assert round(100 * counted.fraction_of_sgd) == 38
    assert counted.sgd == 5 * 32 * 3 * 2 * (100 * 100 + 100 * 10)

    model = keep(sb.models.mlp((1, 10, 10), hidden=(100,), classes=10), 0.057)
    counted = sb.flops.TrainingFlops(model, (4, 1, 10, 10))
    optimizer = sb.LinBreg(sb.param_groups(model, sb.L1(0.1)), lr=0.0)
    cycle = sb.Multilevel(model, optimizer, 99, sb.SparsifyConfig(decide="always"))
    x, y = torch.randn(8, 1, 10, 10), torch.randint(0, 10, (8,))
    executed = 0
    for _ in range(200):
        optimizer.zero_grad()
        x.requires_grad_(True)
        with FlopCounterMode(display=False) as counter:
            F.cross_entropy(model(x), y).backward()
        executed += counter.get_total_flops()
        counted.step(cycle.phase, samples=len(x))
        cycle.step()
    assert counted.fraction_of_sgd == pytest.approx((99 * 3 * 0.057 + 2 * 0.057 + 1) / 300)
    assert round(100 * counted.fraction_of_sgd) == 6
    # As executed, fine steps too: torch's counter agrees.
    assert executed == pytest.approx(counted.fraction_of_sgd * counted.sgd)


def test_training_flops_follow_the_density_and_resume():
    model = keep(sb.models.mlp((1, 4, 4), hidden=(10,)), 0.5)
    counted = sb.flops.TrainingFlops(model, (1, 1, 4, 4))
    counted.step("dense")
    assert counted.fraction_of_sgd == 1
    counted.step("coarse")
    keep(model, 0.1)
    counted.step("fine")
    full = 2 * (160 + 100)
    assert counted.total == pytest.approx(full * (3 + 3 * 0.5 + 2 * 0.1 + 1))
    other = sb.flops.TrainingFlops(model, (1, 1, 4, 4))
    other.load_state_dict(counted.state_dict())
    assert other.fraction_of_sgd == counted.fraction_of_sgd
    with pytest.raises(ValueError, match="phase: expected one of coarse, fine, dense, got 'warm'"):
        counted.step("warm")
