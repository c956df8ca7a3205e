"""What a layer costs: predictions against the plain formula, constants fitted to a machine, their cache."""

import copy
import json
import math

import pytest
import torch
from helpers import BACKENDS
from swapping import dear, write_costs
from torch import nn

import sparsebreg as sb
from sparsebreg import backends
from sparsebreg.experiments.cli import main
from sparsebreg.swap import costs
from sparsebreg.swap.costs import SHIPPED, Load


@pytest.fixture
def tiny(monkeypatch):
    """A calibration that takes no time, and says nothing."""
    cases = {
        "linear": [((8, 8), (16, 8))],
        "conv": [((2, 2, 3), (16, 2, 4, 4))],
        "pointwise": [((2, 2, 1), (2, 2, 4, 4))],
    }
    monkeypatch.setattr(costs, "_CASES", cases)


CASES = [
    (nn.Linear(300, 200), (40, 300), 40, 48, 500, "linear"),
    (nn.Linear(300, 200), (3, 7, 300), 21, 32, 500, "linear"),
    (nn.Conv2d(6, 10, 3, padding=1), (5, 6, 8, 9), 5 * 72, 16 * 72, 16, "conv"),
    (nn.Conv2d(6, 10, (1, 3), stride=(2, 3), padding="valid"), (32, 6, 9, 9), 32 * 15, 32 * 15, 6 * 6 + 10, "conv"),
    (nn.Conv2d(6, 10, 1, stride=2), (32, 6, 8, 8), 32 * 16, 32 * 16, 6 * 4 + 10, "pointwise"),
]


@pytest.mark.parametrize(("layer", "x_shape", "count", "padded", "io", "kind"), CASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_predicted_time_is_the_formula(layer, x_shape, count, padded, io, kind, dtype, one_thread):
    layer = copy.deepcopy(layer).to(dtype)
    load, scale = Load.of(layer, x_shape), 2 if dtype is torch.float64 else 1
    for how, n, weights in (("dense", count, layer.weight.numel()), ("sparse", padded, 77)):
        a, b, c = SHIPPED[kind][how]
        plain = (a * weights + b * io) * scale * n + c
        assert load.milliseconds(SHIPPED, how, weights) == pytest.approx(plain * 1e-6)
    y = layer(torch.zeros(x_shape, dtype=dtype))
    assert count == y.numel() // (layer.weight.shape[0])


@pytest.mark.parametrize("layer", [nn.Linear(900, 700), nn.Conv2d(32, 64, 3), nn.Conv2d(128, 128, 1, 2)])
@pytest.mark.parametrize("n", [16, 40])
def test_both_take_as_long_at_the_break_even(layer, n):
    x_shape = (n, 900) if isinstance(layer, nn.Linear) else (n, layer.in_channels, 9, 9)
    dense = "dense" if isinstance(layer, nn.Linear) else "channels_last"
    load = Load.of(layer, x_shape)
    density = load.break_even(SHIPPED, "sparse", dense)
    assert 0 < density < 1
    times = [
        load.milliseconds(SHIPPED, "sparse", density * load.weights),
        load.milliseconds(SHIPPED, dense, load.weights),
    ]
    assert times[0] == pytest.approx(times[1])


def test_unknown_shape_is_a_large_batch():
    layer = nn.Linear(300, 200)
    limit = Load.of(layer, (16 << 20, 300)).break_even(SHIPPED, "sparse", "dense")
    assert Load.of(layer).break_even(SHIPPED, "sparse", "dense") == pytest.approx(limit, rel=1e-5)


def test_what_the_model_does_not_know():
    assert Load.of(nn.Conv2d(64, 64, 3, groups=2)) is None
    assert Load.of(nn.Conv1d(4, 4, 1)) is None
    small = Load.of(nn.Linear(100, 100))  # a matter of its calls: the batch decides
    assert small.break_even(SHIPPED, "sparse", "dense") is None
    assert Load.of(nn.Linear(100, 100), (128, 100)).break_even(SHIPPED, "sparse", "dense") is not None
    nothing = Load.of(nn.Linear(100, 1), (0, 100))
    assert nothing.break_even(SHIPPED, "sparse", "dense") is None


def test_fit_finds_the_constants():
    true = (0.25, 3.5, 9e4)
    rows = [(float(n * w), float(n * io), 1.0) for n in (16, 128) for w, io in ((1e3, 90), (5e4, 400), (1e6, 2100))]
    times = [sum(t * v for t, v in zip(true, row, strict=True)) for row in rows]
    assert costs._fit(rows, times) == pytest.approx(true)
    fewer = [(0.25 * row[0] - 1e-3 * row[1] + 9e4) for row in rows]  # a cost below 0 is none
    a, b, c = costs._fit(rows, fewer)
    assert a > 0
    assert (b, c >= 0) == (0.0, True)
    falling = [1.0 / row[0] for row in rows]
    a, b, c = costs._fit(rows, falling)
    assert a > 0
    assert min(b, c) >= 0


def test_calibration_is_kept_and_read(cache, tiny, capsys):
    before = torch.get_rng_state()
    assert costs.current() == (SHIPPED, "shipped")
    found = sb.calibrate()
    assert torch.equal(torch.get_rng_state(), before)
    assert found.path.parent == cache
    assert [p.name for p in cache.iterdir()] == [found.path.name]
    assert costs.current() == (found.costs, str(found.path))
    assert {k: set(t) for k, t in found.costs.items()} == {k: set(t) for k, t in SHIPPED.items()}
    assert str(found.path) in str(found)
    assert sb.info().costs == str(found.path)
    found.path.unlink()
    assert main(["info", "--calibrate"]) == 0
    out = capsys.readouterr().out
    assert "ns per weight" in out
    assert f"costs:           {found.path}" in out


def test_calibration_counts_for_what_it_was_measured_with(cache, monkeypatch):
    write_costs(dear())
    assert costs.current()[0] == dear()
    other = next(name for name in BACKENDS if name != backends.current().name)
    for change in (
        lambda m: m.setattr(costs, "__version__", "0"),
        lambda m: m.setattr(torch, "__version__", "0"),
        lambda m: m.setattr(torch, "get_num_threads", lambda: 77),
        lambda m: m.setattr(costs, "cpu_name", lambda: "another"),
        lambda m: m.setenv("SPARSEBREG_BACKEND", other),
    ):
        with monkeypatch.context() as m:
            change(m)
            assert costs.current() == (SHIPPED, "shipped")
    assert costs.current()[0] == dear()


@pytest.mark.parametrize("how", ["garbage", "empty", "cut", "list", "nan", "negative", "zero", "missing", "other_key"])
def test_damaged_cache_is_no_cache(cache, how, tiny):
    write_costs(dear())
    (path,) = cache.iterdir()
    text = path.read_text()
    saved = json.loads(text)
    first = {"nan": math.nan, "negative": -1.0, "zero": 0.0}
    if how in first:
        saved["costs"]["linear"]["sparse"][0] = first[how]
    elif how == "missing":
        del saved["costs"]["conv"]
    elif how == "other_key":
        saved["key"]["threads"] += 1
    content = {"garbage": "\0\xff{", "empty": "", "cut": text[:-9], "list": "[]"}.get(how, json.dumps(saved))
    path.write_text(content)
    assert costs.current() == (SHIPPED, "shipped")
    assert costs.current() != (sb.calibrate().costs, str(path))  # rebuilt
    assert costs.current()[1] == str(path)


def test_where_the_cache_is(monkeypatch, tmp_path, tiny):
    monkeypatch.delenv("SPARSEBREG_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert sb.calibrate().path.parent == tmp_path / "xdg" / "sparsebreg"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert costs._folder() == tmp_path / "home" / ".cache" / "sparsebreg"
    monkeypatch.setenv("SPARSEBREG_CACHE", "")
    assert sb.calibrate().path is None
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SPARSEBREG_CACHE", str(tmp_path / "file" / "below"))  # no folder can be there
    assert sb.calibrate().path is None
    assert costs.current() == (SHIPPED, "shipped")
