"""Public names: those of the package, those that the README mentions, and the contract."""

import importlib
import re
from pathlib import Path

import pytest

import sparsebreg as sb

ROOT = Path(__file__).parents[1]

CONTRACT = [
    "sparse_init_", "LinBreg", "AdaBreg", "ProxSGD", "param_groups", "L1", "GroupL2", "L1GroupL2", "NoReg",
    "Multilevel.step", "LambdaScheduler.step", "LambdaScheduler.state_dict", "sparsify_", "densify_",
    "SparsifyConfig", "nn.SparseLinear.from_dense", "nn.SparseLinear.to_dense", "nn.SparseConv2d.from_dense",
    "nn.SparseConv2d.to_dense", "SparsePattern.from_mask", "use_backend", "set_backend", "info", "flops.per_step",
    "flops.TrainingFlops", "models.mlp", "models.convnet", "models.resnet18", "models.vgg16",
    "models.wide_resnet28_10", "gradient.resolve", "lanes.to_plain", "memory.release", "nn.functional.sparse_linear",
    "nn.functional.sparse_conv2d",
]  # fmt: skip


def resolve(name):
    """The object behind a dotted name below the package."""
    found, module = sb, "sparsebreg"
    for part in name.split("."):
        if not hasattr(found, part):
            importlib.import_module(f"{module}.{part}")
        found, module = getattr(found, part), f"{module}.{part}"
    return found


@pytest.mark.parametrize("name", sb.__all__)
def test_names_of_the_package(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("name", CONTRACT)
def test_contract(name):
    assert callable(resolve(name))


def test_names_in_the_documentation():
    texts = [
        p.read_text() for p in (ROOT / "README.md", ROOT / "bench" / "README.md", *sorted((ROOT / "docs").glob("*.md")))
    ]
    names = {n for text in texts for n in re.findall(r"\bsb\.([A-Za-z_][\w.]*\w)", text)}
    names |= {n for text in texts for n in re.findall(r"`sparsebreg\.([a-z_][\w.]*\w)", text)}
    assert {"sparsify_", "gradient.resolve", "flops.TrainingFlops"} <= names
    for name in names:
        resolve(name)


def test_a_name_that_is_gone_is_noticed():
    with pytest.raises(ModuleNotFoundError):
        resolve("gradient.settle")


def test_public_modules_import_by_name():
    for name in ("flops", "gradient", "lanes", "memory", "models", "nn"):
        assert importlib.import_module(f"sparsebreg.{name}") is getattr(sb, name)
