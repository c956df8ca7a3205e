"""The benchmark, on tiny shapes and a synthetic clock: no test looks at how fast anything is."""

import copy
import gc
import json
import math
import re
import time

import numpy as np
import pytest
import torch
from helpers import Clock

import sparsebreg as sb
from sparsebreg import backends
from sparsebreg.experiments import cli, timing
from sparsebreg.experiments.bench import against, cases, options, plots
from sparsebreg.experiments.bench import measure as measuring
from sparsebreg.experiments.bench import run as running
from sparsebreg.experiments.bench.against import compare
from sparsebreg.experiments.bench.breakdown import PARTS, REST, breakdown
from sparsebreg.experiments.bench.cases import Case, derived, work
from sparsebreg.experiments.bench.measure import break_even, measure
from sparsebreg.experiments.bench.options import Options
from sparsebreg.experiments.bench.shapes import (
    CONV2D,
    LINEAR,
    NETWORKS,
    NORM,
    REPRESENTATIVE,
    SUITES,
    Conv2d,
    Linear,
    Norm,
)

LANES = ["lanes"] if backends.current().lanes else []


def main(*words):
    return cli.main(["bench", *(str(w) for w in words)])


@pytest.fixture
def tiny(monkeypatch):
    """Small layers in every suite, no peers, roofs that cost nothing."""
    for suite, layers in (
        ("linear", {"small": Linear(32, 16)}),
        ("conv", {"small_conv": Conv2d(4, 8, 3, 2, 1, 6)}),
        ("norm", {"small_norm": Norm(4, 5)}),
        ("network", {"mlp": (1, 4, 4)}),
    ):
        monkeypatch.setitem(SUITES, suite, layers)
    monkeypatch.setitem(NETWORKS, "mlp", (1, 4, 4))
    for module in (running, cases):
        monkeypatch.setattr(module, "installed", dict)
    monkeypatch.setattr(options, "REPRESENTATIVE", ("small", "small_conv", "small_norm", "mlp"))
    monkeypatch.setattr(timing, "GEMM", 16)
    monkeypatch.setattr(timing, "COPY", 1 << 10)
    monkeypatch.setattr(timing, "TURN", 0)
    roofs = timing.roofs
    monkeypatch.setattr(timing, "roofs", lambda: roofs(1e-3))


@pytest.fixture
def undrawn(monkeypatch):
    for name in ("speedup", "roofline"):
        monkeypatch.setattr(plots, name, lambda *a: False)


@pytest.fixture
def clock(tiny, undrawn, monkeypatch):
    """A dense linear layer takes 4 ms, a sparse one 1 ms times ``clock.slow``."""
    clock = Clock()
    monkeypatch.setattr(timing, "clock", clock)
    monkeypatch.setattr(timing, "roofs", lambda: {"gemm_gflops": 100.0, "copy_gbs": 10.0})
    kind = type(backends.current())
    sparse, dense = kind.linear_forward, torch.nn.Linear.forward

    def spending(function, seconds):
        def forward(self, *args):
            result = function(self, *args)
            clock.spend(seconds())
            return result

        return forward

    monkeypatch.setattr(kind, "linear_forward", spending(sparse, lambda: 1e-3 * clock.slow))
    monkeypatch.setattr(torch.nn.Linear, "forward", spending(dense, lambda: 4e-3))
    return clock


FORWARD = ("--suite", "linear", "--parts", "forward", "--densities", "0.5,0.1", "--budget", 0.1, "--quiet")


def test_everything_is_measured_and_written(tiny, tmp_path, capsys):
    words = ("--suite", "all", "--full", "--densities", "0.5,0.1", "--batches", 16, "--threads", 1)
    assert main(*words, "--budget", 1e-3, "--out", tmp_path / "b") == 0
    printed = capsys.readouterr()
    content = json.loads((tmp_path / "b" / "bench.json").read_text(), parse_constant=pytest.fail)
    assert content["schema"] == against.SCHEMA
    machine = content["machine"]
    assert all(machine[k] for k in ("cpu", "cores", "isa", "threads", "torch", "numpy", "python", "version", "backend"))
    assert "caches" in machine
    assert machine["torch"] == str(torch.__version__)
    assert [r["threads"] for r in content["roofs"]] == [1]
    assert content["options"]["densities"] == [0.5, 0.1]
    expected = {
        *((layer, part, d, by) for part in ("forward", "grad_x", "grad_values", "step") for d in (0.5, 0.1)
          for layer, by in (("small", "sparse"), ("small_conv", "sparse"), *(("small_conv", by) for by in LANES))),
        *((layer, "swap", d, "sparse") for layer in ("small", "small_conv") for d in (0.5, 0.1)),
        *(("small", "forward", d, "torch.sparse") for d in (0.5, 0.1)),
        *(("small_norm", "step", None, by) for by in LANES),
        *(("small_conv", "grad_weight", None, by) for by in LANES),
        *(("mlp", "step", d, by) for d in (0.5, 0.1) for by in ("coarse", "fine", "cycle m=9", "cycle m=99")),
    }  # fmt: skip
    results = {(r["layer"], r["part"], r["density"], r["implementation"]): r for r in content["results"]}
    assert results.keys() == expected
    assert len(content["results"]) == len(expected)
    for r in results.values():
        assert r["rounds"] >= 5
        assert (r["batch"], r["threads"]) == (16, 1)
        for name in ("ms", "dense_ms", "ratio"):
            assert 0 < r[name]["q1"] <= r[name]["median"] <= r[name]["q3"]
        assert r["ratios"] == [r["ratio"]["median"]]
        assert r["dense_format"] in ("contiguous", "channels_last")
    r = results["small", "step", 0.1, "sparse"]
    assert r["useful_gflops"] == pytest.approx(3 * 2 * 51 * 16 / r["ms"]["median"] / 1e6)
    assert r["effective_gflops"] == pytest.approx(3 * 2 * 512 * 16 / r["ms"]["median"] / 1e6)
    assert r["of_gemm"] == pytest.approx(r["useful_gflops"] / content["roofs"][0]["gemm_gflops"])
    assert r["of_copy"] == pytest.approx(r["gbs"] / content["roofs"][0]["copy_gbs"])
    assert {(e["layer"], e["part"]) for e in content["break_even"]} == {
        (layer, part) for layer, part, d, _ in expected if d is not None and part != "swap"
    }
    text = (tmp_path / "b" / "bench.md").read_text()
    assert text in printed.out
    head = next(line for line in text.splitlines() if line.startswith("| layer"))
    columns = [c.strip() for c in head.strip("|").split("|")]
    assert columns[3:8] == ["density", "dense ms", "ms", "speed-up", "quartiles"]
    line = next(line for line in text.splitlines() if re.match(r"\| small +\| step +\| sparse +\| +10% ", line))
    assert float(line.strip("|").split("|")[6]) == pytest.approx(r["ratio"]["median"], abs=0.005)
    assert "case" in printed.err  # progress
    for name in ("speedup.png", "roofline.png"):
        assert (tmp_path / "b" / name).read_bytes()[:4] == b"\x89PNG"


def test_batches_and_threads_are_columns_where_they_vary(tiny, undrawn, tmp_path):
    before = torch.get_num_threads()
    words = ("--batches", "3,16", "--threads", "1,2", "--layers", "small_conv", "--densities", 0.2, "--parts", "step")
    assert main(*words, "--budget", 1e-3, "--quiet", "--out", tmp_path) == 0
    assert torch.get_num_threads() == before
    found = json.loads((tmp_path / "bench.json").read_text())["results"]
    # Three samples do not fill a lane block.
    ways = [(3, "sparse"), (16, "sparse"), *((16, by) for by in LANES)]
    assert {(r["batch"], r["threads"], r["implementation"]) for r in found} == {
        (b, t, by) for b, by in ways for t in (1, 2)
    }
    assert "| batch |   threads |" in re.sub(r" +batch", " batch", (tmp_path / "bench.md").read_text())


def test_turns(monkeypatch):
    clock, calls = Clock(), []
    monkeypatch.setattr(timing, "clock", clock)

    def step(name, seconds):
        def go():
            calls.append(name)
            clock.now += seconds * (50 if calls.count(name) == 1 else 1)  # cold once
            assert not gc.isenabled()

        return go

    rounds = timing.interleave([step("a", 0.25), step("b", 0.5), step("c", 0.75)], 12.0)
    assert "".join(calls) == "abc" * 9  # one to warm up, 8 of 1.5 s
    assert gc.isenabled()
    np.testing.assert_allclose(rounds, np.tile([0.25, 0.5, 0.75], (8, 1)), atol=1e-6)
    assert len(timing.interleave([lambda: None], 0.001, most=7)) == 7
    calls.clear()
    assert len(timing.interleave([step("a", 1.0)], 0.1)) == 5  # at least
    calls.clear()
    rounds = timing.interleave([step("a", 0.0004), step("b", 1.0)], 300, most=5)
    assert "".join(calls) == "abab" + ("aaaaab" * 5)  # turns of 2 ms
    np.testing.assert_allclose(rounds[:, 0], 0.0004, rtol=1e-3)


def test_ratio_is_taken_per_round_against_the_better_format(tiny, monkeypatch):
    # The machine slows down over the rounds: the ratios of the rounds are 4, 3, 2, that of the medians is 2.4.
    contiguous, last, sparse = [2.0, 40.0, 900.0], [1.0, 12.0, 400.0], [0.25, 4.0, 200.0]
    columns = [contiguous, last, sparse, *([sparse] if LANES else [])]
    monkeypatch.setattr(timing, "interleave", lambda steps, budget: np.array(columns).T)
    results, notes = measure(Case("conv", "small_conv", "step", 16), [0.1])
    assert notes == []
    for r in results:
        assert r["dense_format"] == "channels_last"
        assert r["dense_ms"]["median"] == 12e3
        assert r["ratio"] == {"q1": 2.5, "median": 3.0, "q3": 3.5}
        assert (r["ms"]["median"], r["rounds"]) == (4e3, 3)


def test_fine_steps_and_cycles():
    coarse, pair = np.array([1.0, 2.0, 3.0]), np.array([4.0, 5.0, 2.5])
    times = derived({("torch", None): ("", coarse), ("coarse", 0.1): ("", coarse), ("pair", 0.1): ("", pair)})
    assert ("pair", 0.1) not in times
    fine = times["fine", 0.1][1]
    assert fine.tolist() == [3.0, 3.0, 0.025]  # never below zero
    np.testing.assert_allclose(times["cycle m=9", 0.1][1], (9 * coarse + fine) / 10)
    np.testing.assert_allclose(times["cycle m=99", 0.1][1], (99 * coarse + fine) / 100)


def test_where_the_time_of_a_step_goes(tiny, undrawn, tmp_path):
    words = ("--suite", "network", "--densities", 0.1, "--batches", 16, "--budget", 1e-3, "--quiet")
    assert main(*words, "--out", tmp_path) == 0
    results = json.loads((tmp_path / "bench.json").read_text())["results"]
    parts = {r["implementation"]: r["parts_ms"] for r in results if "parts_ms" in r}
    assert parts.keys() == {"coarse", "fine"}
    for found in parts.values():
        assert found.keys() == {*PARTS, REST}
    assert min(parts["coarse"]["sparse products"], parts["coarse"]["optimizer"]) > 0
    assert parts["coarse"]["swap"] == 0 < parts["fine"]["swap"]
    assert parts["coarse"]["norms"] == 0  # an MLP has none
    line = next(x for x in (tmp_path / "bench.md").read_text().splitlines() if re.match(r"\| mlp +\| fine +\| +16 ", x))
    assert float(line.strip("|").split("|")[5]) == pytest.approx(parts["fine"]["sparse products"], abs=0.05)


def test_parts_of_a_step():
    x = torch.randn(64, 64)

    def step():
        torch.mm(x, x)
        with torch.autograd.profiler.record_function("sparsebreg::conv2d_backward"):
            torch.mm(x, x)  # the innermost part counts
            torch.sort(x)
        time.sleep(0.02)

    parts = breakdown(step, 2)
    assert min(parts["dense products"], parts["sparse products"]) > 0
    assert parts[REST] > 15
    assert parts["swap"] == parts["norms"] == parts["optimizer"] == 0


@pytest.mark.parametrize(
    ("densities", "ratios", "relation", "density"),
    [
        ((0.01, 0.1), (4, 0.25), "=", math.sqrt(0.001)),
        ((0.1, 0.01), (0.25, 4), "=", math.sqrt(0.001)),
        ((0.01, 0.1, 0.5), (9, 1, 0.2), "=", 0.1),
        ((0.01, 0.04, 0.16), (8, 2, 0.5), "=", 0.08),
        ((0.01, 0.04, 0.16, 0.5), (8, 0.5, 2, 0.1), "=", 0.01 * 4 ** (math.log(8) / math.log(16))),
        ((0.01, 0.1), (4, 1.5), ">", 0.1),
        ((0.01, 0.1), (0.9, 0.2), "<", 0.01),
    ],
)
def test_break_even(densities, ratios, relation, density):
    assert break_even(densities, ratios) == (relation, pytest.approx(density))


def result(layer, ratio, density=0.1, by="sparse", threads=2, quartiles=(0.0, 0.0), **more):
    keys = {"suite": "linear", "layer": layer, "part": "step", "batch": 128, "threads": threads, "density": density}
    q1, q3 = quartiles
    return {**keys, "implementation": by, "rounds": 9, "ratio": {"q1": q1, "median": ratio, "q3": q3}, **more}


def test_comparison():
    old = [result(n, 4.0) for n in "abcdef"] + [result("a", 4.0, by="sparseprop"), result("a", 4.0, by="torch.sparse")]
    new = [result(n, r) for n, r in zip("abcde", (3.41, 3.39, 4.59, 4.61, 4.0), strict=True)]
    new += [result("a", 1.0, by="sparseprop"), result("a", 1.0, by="torch.sparse"), result("a", 3.0, density=0.2)]
    found = compare(old, new, 15.0)
    assert {k[1]: v for k, v in found.worse.items()} == {"b": (4.0, 3.39)}
    assert {k[1]: v for k, v in found.better.items()} == {"d": (4.0, 4.61)}
    assert found.same == 3
    assert [k[1] for k in found.missing] == ["f"]
    assert [(k[1], k[5]) for k in found.additional] == [("a", 0.2)]
    text = str(found)
    assert re.search(r"\| b step batch=128 threads=2 density=10% sparse +\| +4.00 \| +3.39 \| +-15% \|", text)
    assert "missing now:\n  f step" in text
    assert "not measured before:\n  a step batch=128 threads=2 density=20% sparse" in text
    assert text.endswith("1 worse, 1 better, 3 the same within tolerance and noise")
    assert compare(old, new, 16.0).worse == {}
    # The interval of nine rounds is 1.57 / 3 of the quartiles' distance to either side: 3.39 + 0.009 and + 0.011.
    for spread, worse in ((0.0172, ["b"]), (0.0210, [])):
        new[1] = result("b", 3.39, quartiles=(3.3, 3.3 + spread))
        assert [k[1] for k in compare(old, new, 15.0).worse] == worse
    for spread, better in ((0.0172, ["d"]), (0.0210, [])):
        new[3] = result("d", 4.61, quartiles=(4.6, 4.6 + spread))
        assert [k[1] for k in compare(old, new, 15.0).better] == better
    text = str(compare([result(str(i), 1.0) for i in range(23)], new, 15.0))
    assert "  19 step" in text
    assert "  20 step" not in text
    assert "\n  and 3 more\n" in text


@pytest.mark.parametrize(("ratios", "median"), [((2.0,), 2.0), ((1.0, 3.0), 3.0), ((5.0, 1.0, 3.0), 3.0)])
def test_runs_are_merged_to_the_one_with_the_median_ratio(ratios, median):
    merged = measuring.merged([result("a", r, ms=1 / r) for r in ratios])
    assert (merged["ratio"]["median"], merged["ms"], merged["ratios"]) == (median, 1 / median, list(ratios))


def test_a_kernel_slowed_by_a_quarter_is_told_and_noise_is_not(clock, tmp_path, capsys, monkeypatch):
    counted = []
    interleave = timing.interleave
    monkeypatch.setattr(timing, "interleave", lambda *a: counted.append(a) or interleave(*a))

    def again(slow):
        clock.slow = slow
        counted.clear()
        status = main(*FORWARD, "--compare", tmp_path / "old" / "bench.json", "--out", tmp_path / "new")
        return status, len(counted), capsys.readouterr().out

    assert main(*FORWARD, "--repeats", 3, "--out", tmp_path / "old") == 0
    old = json.loads((tmp_path / "old" / "bench.json").read_text())
    ours = [r for r in old["results"] if r["implementation"] == "sparse"]
    assert len(ours) == 2
    for r in ours:
        assert r["ratio"]["median"] == pytest.approx(4.0, rel=0.03)
        assert len(r["ratios"]) == 3
    for _ in range(3):
        status, times, text = again(1.0)
        assert (status, times) == (0, 1)
        assert "0 worse, 0 better, 2 the same within tolerance and noise" in text
    status, times, text = again(1.25)
    assert (status, times) == (1, 4)  # three times more
    assert "2 worse, 0 better" in text
    assert re.search(
        r"small forward batch=128 threads=\d+ density=10% sparse +\| +[34].\d+ \| +3.\d+ \| +-[12]\d% \|", text
    )
    assert (tmp_path / "new" / "bench.md").read_text().rstrip() in text
    assert again(0.5)[0] == 0
    # A slow spell of the sparse kernel while it is measured first, and never again.
    spend = clock.spend
    monkeypatch.setattr(clock, "spend", lambda s: spend(s * (1.5 if len(counted) == 1 and s < 3e-3 else 1.0)))
    status, times, text = again(1.0)
    assert (status, times) == (0, 2)
    assert "0 worse" in text


def test_tolerance(clock, tmp_path):
    assert main(*FORWARD, "--out", tmp_path) == 0
    clock.slow = 1.25
    words = (*FORWARD, "--compare", tmp_path / "bench.json", "--out", tmp_path / "new")
    assert main(*words, "--tolerance", 40) == 0
    assert main(*words) == 1


def test_comparison_with_another_machine(clock, tmp_path, capsys):
    assert main(*FORWARD, "--out", tmp_path) == 0
    old = json.loads((tmp_path / "bench.json").read_text())
    old["machine"]["cpu"] = "Z80"
    old["roofs"][0]["copy_gbs"] = 20.0
    gone = copy.deepcopy(old["results"][0])
    gone["layer"] = "gone"
    old["results"] = [gone, *(r for r in old["results"] if r["density"] != 0.5)]
    (tmp_path / "old.json").write_text(json.dumps(old))
    capsys.readouterr()
    assert main(*FORWARD, "--compare", tmp_path / "old.json", "--out", tmp_path) == 0
    text = capsys.readouterr().out
    assert "Not the same conditions: cpu: Z80 before, " in text
    assert "; 20 GB/s of a copy before, 10 now" in text
    assert "GF/s of a product before" not in text
    assert "missing now:\n  gone forward" in text
    assert re.search(r"not measured before:\n  small forward batch=128 threads=\d+ density=50% sparse\n", text)


GOOD = {"schema": 1, "machine": {}, "roofs": [], "results": [result("a", 2.0)]}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "Expecting value"),
        ("\xff", "Expecting value"),
        ("[1]", "another file"),
        ('{"benchmarks": [], "version": "4.0.0"}', "another file"),
        (json.dumps({**GOOD, "schema": 99}), "schema 99"),
        (json.dumps({**GOOD, "roofs": [{"threads": 1}]}), "roofs with KeyError: 'gemm_gflops'"),
        (json.dumps({**GOOD, "results": [7]}), r"results\[0\] with TypeError"),
        (json.dumps({**GOOD, "results": [{"ratio": {"median": 1.0}}]}), r"results\[0\] with KeyError: 'suite'"),
        (json.dumps({**GOOD, "results": [result("a", -2.0)]}), r"results\[0\] with ValueError: ratio"),
        (json.dumps({**GOOD, "results": [result("a", "fast")]}), r"results\[0\] with TypeError: ratio"),
        (json.dumps({**GOOD, "results": [result(["a"], 1.0)]}), r"results\[0\] with TypeError: unhashable"),
        (json.dumps(GOOD), r"results of what is to be measured now \(\d+ threads\), got others \(2 threads\)"),
    ],
)
def test_files_to_compare_with_that_are_none(text, message, tiny, tmp_path, capsys):
    if text is not None:
        (tmp_path / "old.json").write_text(text)
    assert main(*FORWARD, "--compare", tmp_path / "old.json", "--out", tmp_path / "new") == 1
    error = capsys.readouterr().err
    assert error.startswith("sparsebreg: error: compare: expected ")
    assert re.search(message, error)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--suite", "gpu"), "suite: expected one of linear, conv, norm, network, all, got 'gpu'"),
        (("--layers", "mlp_9x9"), "layers: expected one of mlp_784x512, .*, resnet18, vgg16, got 'mlp_9x9'"),
        (("--suite", "linear", "--layers", "vgg16"), "layers: expected one of mlp_784x512, .* got 'vgg16'"),
        (("--layers", ","), "layers: expected at least one, got none"),
        (("--densities", "0.1,x"), "densities: expected numbers, got 0.1, x"),
        (("--densities", "0"), "densities: expected a finite number above 0 and at most 1, got 0.0"),
        (("--densities", "10"), "densities: expected a finite number above 0 and at most 1, got 10.0"),
        (("--batches", "0"), "batches: expected an integer of at least 1, got 0"),
        (("--batches", "1.5"), "batches: expected numbers, got 1.5"),
        (("--threads", "-1"), "threads: expected an integer of at least 1, got -1"),
        (("--parts", "backward"), "parts: expected one of forward, grad_x, .*, got 'backward'"),
        (
            ("--suite", "norm", "--parts", "forward"),
            "parts: expected step for norms and networks, no grad_weight for linear layers, got forward",
        ),
        (("--budget", "0"), "budget: expected a finite number above 0, got 0.0"),
        (("--repeats", "0"), "repeats: expected an integer of at least 1, got 0"),
        (("--tolerance", "101"), "tolerance: expected a finite number of at least 0 and at most 100, got 101.0"),
    ],
)
def test_bad_options_are_told_and_write_nothing(words, message, tmp_path, capsys):
    assert main("--out", tmp_path / "b", *words) == 1
    error = capsys.readouterr().err
    assert error.startswith("sparsebreg: error: ")
    assert re.search(message, error)
    assert not (tmp_path / "b").exists()


def test_out_is_needed(capsys):
    assert main("--suite", "linear") == 1
    assert "out: expected a folder for the results (--out), got none" in capsys.readouterr().err


def test_wrong_results_are_not_timed(tiny, monkeypatch):
    case = Case("linear", "small", "forward", 16)
    monkeypatch.setattr(cases, "_sparselab", lambda dense, mask: torch.nn.Linear(32, 16))
    results, notes = measure(case, [0.1], ["sparselab"], 1e-3)
    assert {r["implementation"] for r in results} == {"sparse", "torch.sparse"}
    assert len(notes) == 1
    assert notes[0].startswith("small forward batch=16, sparselab density=0.1: left out: result: expected that of the")
    kind = type(backends.current())
    forward = kind.linear_forward
    monkeypatch.setattr(kind, "linear_forward", lambda *a: forward(*a) * 1.01)
    with pytest.raises(sb.core.errors.RunError, match=r"sparse density=0.1: result: .* relative error of 0.01"):
        measure(case, [0.1])


def test_wrong_gradients_are_not_timed(tiny, monkeypatch):
    kind = type(backends.current())
    backward = kind.conv2d_backward

    def wrong(self, pattern, *args):
        grad_x, grad_values, grad_bias = backward(self, pattern, *args)
        return grad_x, None if grad_values is None else grad_values.flip(0), grad_bias

    monkeypatch.setattr(kind, "conv2d_backward", wrong)
    measure(Case("conv", "small_conv", "grad_x", 16), [0.2], budget=1e-3)
    for part in ("grad_values", "step"):
        with pytest.raises(sb.core.errors.RunError, match="result: expected that of the dense layer"):
            measure(Case("conv", "small_conv", part, 16), [0.2], budget=1e-3)


def test_norms_need_lane_tensors(tiny, tmp_path, capsys):
    assert main("--suite", "norm", "--batches", 3, "--quiet", "--out", tmp_path) == 1
    assert "batches: expected batches of at least 16 and the native backend for norms" in capsys.readouterr().err


def test_work_of_a_convolution(tiny):
    # 8 x 4 x 3 x 3 weights, 29 of them active; (16, 4, 6, 6) to (16, 8, 3, 3).
    done = work(Case("conv", "small_conv", "step", 16), 0.1)
    assert done.useful == 3 * 2 * 29 * 16 * 9
    assert done.dense == 3 * 2 * 288 * 16 * 9
    assert done.bytes == 3 * 4 * (16 * 4 * 36 + 16 * 8 * 9 + 29 + 29)
    one = work(Case("conv", "small_conv", "grad_x", 16), 0.1)
    assert (3 * one.useful, 3 * one.bytes) == (done.useful, done.bytes)
    assert work(Case("norm", "small_norm", "step", 16), None).bytes == 8 * 4 * 16 * 4 * 25
    assert work(Case("linear", "small", "swap", 16), 0.1) == cases.Work(None, None, None)


@pytest.mark.parametrize(
    ("prefix", "model"),
    [("convnet", "convnet"), ("resnet18", "resnet18"), ("vgg16", "vgg16"), ("wrn28", "wide_resnet28_10")],
)
def test_shapes_are_those_of_the_models(prefix, model):
    found = set()
    with torch.device("meta"):
        network = sb.models.MODELS[model](NETWORKS.get(model, (3, 32, 32)))

        def look(m, args, _):
            found.add(
                (m.in_channels, m.out_channels, *m.kernel_size[:1], *m.stride[:1], *m.padding[:1], args[0].shape[2])
            )

        for m in network.modules():
            if isinstance(m, torch.nn.Conv2d):
                m.register_forward_hook(look)
        network(torch.empty(2, *NETWORKS.get(model, (3, 32, 32))))
    shapes = {n: s for n, s in CONV2D.items() if n.startswith(prefix)}
    assert shapes
    for name, shape in shapes.items():
        assert tuple(shape) in found, name


def test_grids():
    small, full = Options("x"), Options("x", full=True)
    assert {c.layer for c in small.cases()} == set(REPRESENTATIVE)
    assert {(c.part, c.batch) for c in small.cases()} == {("forward", 128), ("step", 128)}
    assert small.thread_counts() == [torch.get_num_threads()]
    assert {c.layer for c in full.cases()} == {*LINEAR, *CONV2D, *NORM, *NETWORKS}
    assert len(full.cases()) == 4 * (5 * len(LINEAR) + 6 * len(CONV2D) + len(NORM) + len(NETWORKS))
    assert full.thread_counts()[-1] == torch.get_num_threads()
    assert Options("x", layers=["vgg16"]).cases() == [Case("network", "vgg16", "step", 128)]
