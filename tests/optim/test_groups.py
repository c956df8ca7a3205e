"""Groups of parameters, and their regularizers."""

import pytest
from torch import nn

import sparsebreg as sb


class TestParamGroups:
    def test_split(self):
        model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Linear(4, 3), nn.Embedding(3, 4))
        groups = sb.param_groups(model, sb.L1(0.1))
        assert [g["reg"] for g in groups] == [sb.L1(0.1), sb.NoReg()]
        assert [id(p) for p in groups[0]["params"]] == [id(model[0].weight), id(model[2].weight)]
        assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))

    def test_tied_weight_once(self):
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        model[1].weight = model[0].weight
        assert len(sb.param_groups(model, sb.L1(0.1))[0]["params"]) == 1

    def model(self):
        return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 3, bias=False), nn.Sequential(nn.Conv2d(4, 2, 2)))

    def test_per_layer_mapping(self):
        model = self.model()
        groups = sb.param_groups(model, sb.L1(0.1), {"1": sb.NoReg(), "2.0": sb.GroupL2(0.2)})
        assert [g["reg"] for g in groups] == [sb.L1(0.1), sb.NoReg(), sb.GroupL2(0.2), sb.NoReg()]
        weights = [model[0].weight, model[1].weight, model[2][0].weight]
        assert [[id(p) for p in g["params"]] for g in groups[:3]] == [[id(w)] for w in weights]
        assert [id(p) for p in groups[3]["params"]] == [id(model[0].bias), id(model[2][0].bias)]

    def test_per_layer_function(self):
        """Equal regularizers share a group; None is the common one."""
        seen = []

        def choose(name, module):
            seen.append((name, type(module)))
            return sb.GroupL2(0.2, "kernels") if isinstance(module, nn.Conv2d) else None

        groups = sb.param_groups(self.model(), sb.L1(0.1), choose)
        assert [(g["reg"], len(g["params"])) for g in groups] == [
            (sb.L1(0.1), 2), (sb.GroupL2(0.2, "kernels"), 1), (sb.NoReg(), 2),
        ]  # fmt: skip
        assert seen == [("0", nn.Linear), ("1", nn.Linear), ("2.0", nn.Conv2d)]

    def test_scale_by_fan_in(self):
        """lam · c/√fan_in, with fan_in = 4, 3 and 16, and mean factor 1 over the 12, 9 and 32 weights."""
        c = (12 + 9 + 32) / (12 / 4**0.5 + 9 / 3**0.5 + 32 / 16**0.5)
        own = {"1": sb.L1GroupL2(0.2, "rows", 0.4), "2.0": sb.NoReg()}
        groups = sb.param_groups(self.model(), sb.L1(0.1), own, scale="fan_in")
        assert groups[0]["reg"].lam == pytest.approx(0.1 * c / 2, rel=1e-12)
        assert groups[1]["reg"].lam == pytest.approx(0.2 * c / 3**0.5, rel=1e-12)
        assert groups[1]["reg"].lam_group == pytest.approx(0.4 * c / 3**0.5, rel=1e-12)
        assert groups[2]["reg"] == sb.NoReg()
        same = nn.Sequential(nn.Linear(5, 5), nn.Linear(5, 7))
        assert sb.param_groups(same, sb.L1(0.1), scale="fan_in")[0]["reg"].lam == pytest.approx(0.1, rel=1e-12)

    def test_errors(self):
        with pytest.raises(TypeError, match="model: expected a torch.nn.Module"):
            sb.param_groups([1], sb.L1(0.1))
        with pytest.raises(ValueError, match=r"per_layer: expected names among 0, 1, 2.0, got '2'"):
            sb.param_groups(self.model(), sb.L1(0.1), {"2": sb.L1(0.2)})
        with pytest.raises(TypeError, match="per_layer: expected a mapping or a function, got float"):
            sb.param_groups(self.model(), sb.L1(0.1), 0.2)
        with pytest.raises(TypeError, match="reg: expected a regularizer .*, got 0.2"):
            sb.param_groups(self.model(), sb.L1(0.1), lambda name, module: 0.2)
        with pytest.raises(ValueError, match="scale: expected one of fan_in, got 'size'"):
            sb.param_groups(self.model(), sb.L1(0.1), scale="size")
        with pytest.raises(ValueError, match="model: expected initialised layers for scale='fan_in', got a lazy '0'"):
            sb.param_groups(nn.Sequential(nn.LazyLinear(3)), sb.L1(0.1), scale="fan_in")
        with pytest.raises(TypeError, match="reg: expected a regularizer"):
            sb.param_groups(nn.Linear(1, 1), 0.1)
        with pytest.raises(ValueError, match="model: expected linear or convolution layers"):
            sb.param_groups(nn.ReLU(), sb.L1(0.1))
