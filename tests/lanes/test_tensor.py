"""What a lane tensor must be able to do besides computing."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from helpers import lane, ordinary
from torch.nn import functional as F

from sparsebreg import lanes

pytestmark = pytest.mark.usefixtures("on_native")


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


def test_unknown_operations_in_place_and_with_out():
    x, t = lane(20, 4, 3, 3)
    assert t.erf_() is t
    torch.testing.assert_close(ordinary(t), x.erf())
    out = lanes.from_plain(x.clone())
    assert torch.erf(lanes.from_plain(x), out=out) is out
    torch.testing.assert_close(ordinary(out), x.erf())


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


def test_bad_input():
    with pytest.raises(TypeError, match="x: expected a float32 or float64 tensor"):
        lanes.from_plain(torch.zeros(2, 2, dtype=torch.int64))
    with pytest.raises(ValueError, match="x: expected two dimensions or more, got 1"):
        lanes.from_plain(torch.zeros(2))


def test_memory_is_that_of_the_plain_tensor():
    """Whoever reads the memory sees the numbers, and who writes to it changes them."""
    for door in (torch.from_dlpack, np.from_dlpack, np.asarray, lambda t: t.share_memory_()):
        x, t = lane(20, 3, 4, 4)
        seen = door(t)
        assert np.array_equal(np.asarray(seen), x.numpy())
        seen[...] = 2
        assert torch.equal(t + 0, torch.full_like(x, 2))
    x, t = lane(20, 3, 4, 4)
    assert t.data_ptr() == t.untyped_storage().data_ptr() == t.numpy().ctypes.data
    assert t.untyped_storage().nbytes() == x.untyped_storage().nbytes()
    assert not t.is_shared()
    t.share_memory_()
    assert t.is_shared()
    with pytest.raises(BufferError, match="require gradient"):
        torch.from_dlpack(t.requires_grad_())


def test_another_storage_is_taken_or_refused():
    x, t = lane(20, 3, 4, 4)
    other = torch.randn(20, 3, 4, 4)
    t.data = other
    assert torch.equal(t + 0, other)
    other.zero_()
    assert not (t + 0).any()
    for call in (lambda: t.resize_(3), lambda: t.set_(x), lambda: t.set_(x.untyped_storage())):
        with pytest.raises(RuntimeError, match=r"expected a tensor with storage of its own, got a LaneTensor \(see"):
            call()


def test_a_gradient_that_a_hook_has_kept_stays_what_it_was():
    x = torch.randn(20, 3, 4, 4, requires_grad=True)
    kept = []
    for factor in (2, 5):
        t = lanes.from_plain(x)
        t.register_hook(kept.append)
        (t * factor).sum().backward()
    for grad, factor in zip(kept, (2.0, 5.0), strict=True):
        assert torch.equal(grad + 0, torch.full_like(x, factor))
    assert torch.equal(x.grad, torch.full_like(x, 7))
