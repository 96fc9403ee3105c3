"""fuse: what tracing a forward must keep, and forwards that cannot be traced."""

from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
from fastconv import surgery
from fusing import Net, bn, check, conv, image, reason


class Branching(nn.Module):
    """A forward that depends on its input's values: torch.fx cannot trace it."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(conv(), bn(), nn.ReLU())
        self.rest = nn.ModuleList([nn.Sequential(conv(), bn()), conv()])

    def forward(self, x):
        y = self.stem(x)
        return self.rest[0](y) if x.sum() > 0 else self.rest[1](y)


@pytest.mark.parametrize("sign", [1, -1])
def test_models_that_cannot_be_traced_are_fused_inside(sign):
    wanted = {"stem.0": "Conv-BN-ReLU", "rest.0.0": "Conv-BN"}
    check(Branching(), sign * image().abs(), exactly=wanted)
    lone = reason(Branching(), "rest.1")
    assert "in the model, a Branching that is not traced" in lone and "control flow" in lone
    inside = nn.Sequential(conv(), nn.ReLU(), Branching())
    wanted = {"0": "Conv-ReLU", **{f"2.{name}": became for name, became in wanted.items()}}
    check(inside, sign * image().abs(), exactly=wanted)


class GivesUp(nn.Module):
    """Reads its weight and hands a value on, then branches on its input."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.rand(4, 1, 1))

    def forward(self, x, kept=None):
        y = x * self.weight
        if kept is not None:
            kept.append(y)
        return y if y.sum() > 0 else -y


def test_what_a_forward_left_before_it_was_given_up():
    def weight(m, x):
        return m.relu(m.conv(m.odd(x) * m.odd.weight))

    check(Net(weight, odd=GivesUp()), exactly={"conv": "Conv-ReLU"})

    def listed(m, x):
        kept = []
        y = m.stem(m.odd(x, kept))
        return y + kept[0]

    stem = nn.Sequential(conv(), nn.ReLU())
    check(Net(listed, odd=GivesUp(), stem=stem), exactly={"stem.0": "Conv-ReLU"})


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.calls, self.last = conv(), bn(), 0, None

    def forward(self, x):
        self.calls += 1
        self.last = x
        return self.bn(self.conv(x))


@pytest.mark.parametrize("nested", [False, True])
def test_a_forward_that_changes_its_module_goes_on_doing_so(nested):
    net = nn.Sequential(Counting(), conv(), nn.ReLU()) if nested else Counting()
    fused = fastconv.fuse(net.eval())
    counter, x = (fused[0] if nested else fused), image()
    assert counter.calls == 0 and counter.last is None, "tracing must leave nothing behind"
    fused(x), fused(x)
    assert counter.calls == 2 and counter.last is x
    assert "changes its own calls, last" in reason(net, "0.conv" if nested else "conv")


def context_of_no_gradients(m, x):
    with torch.no_grad():
        return m.relu(m.conv(x))


def branch_on_type(m, x):
    return m.relu(m.conv(x)) if isinstance(x, torch.Tensor) else m.relu(m.conv(x[0]))


def test_a_forward_that_asks_for_a_tensor_gets_the_right_branch():
    check(Net(branch_on_type), exactly={"conv": "Conv-ReLU"})


def test_gradients_switched_off_stay_off():
    fused = fastconv.fuse(Net(context_of_no_gradients).eval())
    assert not fused(image()).requires_grad


def test_random_numbers_stay_random():
    net = Net(lambda m, x: m.relu(m.conv(x)) + torch.rand(2, 4, 6, 7)).eval()
    fused, x = fastconv.fuse(net), image()
    assert not torch.equal(fused(x), fused(x))


def test_optional_arguments():
    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = conv(), bn()

        def forward(self, x, mask=None, *, scale=1.0):
            y = F.relu(self.bn(self.conv(x)))
            return (y if mask is None else y * mask) * scale

    net = Masked().eval()
    fused = fastconv.fuse(net)
    assert [entry.became for entry in surgery.report(fused).entries] == ["Conv-BN-ReLU"]
    x = image()
    mask = torch.rand(2, 4, 6, 7)
    calls = [((x,), {}), ((), {"x": x}), ((x, mask), {}), ((x,), {"mask": mask}), ((x, None), {}),
             ((x,), {"scale": 3.0}), ((x,), {"mask": None, "scale": 2.0})]  # fmt: skip
    for args, kwargs in calls:
        torch.testing.assert_close(fused(*args, **kwargs), net(*args, **kwargs))
    for args, kwargs in [((), {}), ((x, None, 1.0), {}), ((x,), {"x": x}), ((x,), {"other": 1})]:
        with pytest.raises(TypeError, match="forward"):
            fused(*args, **kwargs)


def test_outputs_keep_their_structure():
    def body(m, x):
        y = m.relu(m.conv(x))
        return OrderedDict(out=y, all=[y, (x, None)])

    check(Net(body), exactly={"conv": "Conv-ReLU"})


def test_buffers_and_parameters_used_directly():
    net = Net(lambda m, x: m.relu(m.conv(x)) * m.scale + m.shift)
    net.register_buffer("scale", torch.rand(4, 1, 1))
    net.shift = nn.Parameter(torch.rand(4, 1, 1))
    check(net, exactly={"conv": "Conv-ReLU"})
    fused = fastconv.fuse(net)
    fused.scale = torch.ones(4, 1, 1)
    fused.double()  # makes new tensors
    x = image().double()
    torch.testing.assert_close(fused(x), F.relu(fused.conv(x)) + fused.shift)


def test_unbatched_images():
    check(Net(lambda m, x: m.relu(m.conv2(m.relu(m.conv(x))) + x)), image()[0])


def test_names_of_layers_are_free():
    """Such names are methods of torch.nn's containers."""
    layers = OrderedDict(keys=conv(), items=bn(), type_=nn.ReLU(), values=conv(), a_b=nn.SiLU())
    check(nn.Sequential(layers), exactly={"keys": "Conv-BN-ReLU", "values": "Conv-SiLU"})
