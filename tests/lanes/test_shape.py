"""Views, copies and reductions of lane tensors."""

import copy
import io
import pickle

import pytest
import torch
from lanetests import REDUCTIONS, agree, lane, ordinary
from torch.nn import functional as F

from sparsebreg import lanes


@pytest.mark.parametrize("n", [1, 16, 21])
@pytest.mark.parametrize("name", REDUCTIONS)
def test_what_leaves_the_layout(name, n):
    agree(REDUCTIONS[name], n, 5, 3, 4, packed=False)


def test_writes_through_views_arrive():
    x, t = lane(20, 4, 3, 3)
    view = t[:, 1:3]
    view.zero_()
    x[:, 1:3].zero_()
    assert torch.equal(ordinary(t), x)
    assert torch.equal(F.relu(t) + 0, F.relu(x))
    t.mul_(2)
    assert torch.equal(view + 0, x[:, 1:3] * 2)


def test_writes_through_views_reach_the_gradient():
    x = torch.randn(20, 4, 3, 3, requires_grad=True)
    t = lanes.from_plain(x) * 1
    t[:, 1:3] *= 3
    (t * t).sum().backward()
    want = x.detach().clone()
    want[:, 1:3] *= 9
    torch.testing.assert_close(x.grad, 2 * want)


def test_data_and_detach_share_the_storage():
    x, t = lane(20, 4, 3, 3)
    t.data.add_(1)
    t.detach().add_(1)
    torch.testing.assert_close(ordinary(t), x + 2)


def test_leaves_as_an_ordinary_tensor():
    x, t = lane(20, 4, 3, 3)
    assert (t.numpy() == x.numpy()).all()
    assert t.tolist() == x.tolist()
    assert t.sum().item() == pytest.approx(x.sum().item(), rel=1e-4)
    assert torch.equal(pickle.loads(pickle.dumps(t)), x)
    file = io.BytesIO()
    torch.save(t, file)
    file.seek(0)
    assert torch.equal(torch.load(file, weights_only=True), x)
    assert torch.equal(ordinary(copy.deepcopy(t)), x)
    assert repr(x)[7:-1] in repr(t)
    assert torch.equal(t.double() + 0, x.double())
    with pytest.raises(RuntimeError, match="requires grad"):
        lanes.from_plain(x.clone().requires_grad_()).numpy()


def test_mixed_batches_and_shapes():
    x, t = lane(20, 4, 3, 3)
    one, row = torch.randn(1, 4, 3, 3), torch.randn(20, 1, 1, 1)
    torch.testing.assert_close(ordinary(t * one), x * one)
    torch.testing.assert_close(ordinary(t * row), x * row)
    torch.testing.assert_close(ordinary(t + lanes.from_plain(one)), x + one)
    with pytest.raises(RuntimeError, match="size"):
        t + torch.randn(20, 4, 3, 2)


def test_dimensions_out_of_range():
    _, t = lane(20, 4, 3, 3)
    for call in (
        lambda: torch.cat([t, t], 4),
        lambda: t.sum(4),
        lambda: t.mean((2, -5)),
        lambda: torch.cat([t, t], -5),
    ):
        with pytest.raises(IndexError, match="out of range"):
            call()
