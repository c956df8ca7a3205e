"""The cases of ``sparsebreg bench`` for pytest-benchmark, on all processors that torch takes; see README.md."""

import pytest

import sparsebreg as sb
from sparsebreg.experiments.bench.cases import candidates, installed
from sparsebreg.experiments.bench.options import Options


def pytest_addoption(parser):
    parser.addoption("--grid", choices=("small", "full"), default="small", help="which layers, densities and batches")


def pytest_generate_tests(metafunc):
    """A test for every way to do what the cases of the module's SUITE and PARTS say."""
    if "timed" not in metafunc.fixturenames:
        return
    options = Options("", metafunc.module.SUITE, full=metafunc.config.getoption("--grid") == "full")
    parts = getattr(metafunc.module, "PARTS", [p for p in options.grid("parts") if p != "swap"])
    options = Options("", options.suite, parts=parts, full=options.full)
    peers = tuple(installed())
    ways = [(case, way) for case in options.cases() for way in candidates(case, options.grid("densities"), peers)]
    metafunc.parametrize("timed", ways, indirect=True, ids=[f"{case} {way}".replace(" ", "-") for case, way in ways])


@pytest.fixture
def timed(request, benchmark):
    """Verifies the result of a way to do something, and times it."""
    case, way = request.param

    def go():
        step = way.prepare()
        benchmark.group = str(case)
        facts = sb.info()
        benchmark.extra_info.update(backend=facts.backend, isa=facts.isa, threads=facts.threads)
        benchmark.pedantic(step, rounds=11, warmup_rounds=2)

    return go
