"""Fused models on a CPU keep their filters packed: the same bits, and never an old filter."""

import copy
import gc
import pickle
import threading

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fastconv
import support
from fastconv import surgery
from fastconv._normalisation import conv_bn_act
from support import DTYPES, FORMATS, name_of


@pytest.fixture(autouse=True)
def _nothing_kept():
    gc.collect()
    surgery.forget_filters()
    yield
    surgery.forget_filters()


def model(groups=1):
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(8, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 16, 3, groups=groups),
        nn.ReLU(),
        nn.Conv2d(16, 16, 1),
        nn.SiLU(),
    )
    return net.eval().to(memory_format=torch.channels_last)


def image(size=9, seed=0):
    x = torch.randn(2, 8, size, size + 1, generator=torch.Generator().manual_seed(seed))
    return x.contiguous(memory_format=torch.channels_last)


def assert_current(fused, net, x=None):
    """The fused model computes what the model does now, at the first call and with kept filters."""
    x = image() if x is None else x
    with torch.no_grad():
        for _ in range(2):
            torch.testing.assert_close(fused(x), net(x), rtol=1e-3, atol=1e-4)


def test_filters_are_kept_and_the_bits_are_the_same():
    fused, x = fastconv.fuse(model()), image()
    assert surgery.kept_filters() == (0, 0)
    with torch.no_grad():
        first = fused(x)
        count, size = surgery.kept_filters()
        assert count == 3 and size >= 4 * (8 * 24 * 9 + 24 * 16 * 9 + 16 * 16)
        again = fused(x)
        assert surgery.kept_filters() == (count, size)
        surgery.forget_filters()
        assert surgery.kept_filters() == (0, 0)
        assert torch.equal(first, again) and torch.equal(first, fused(x))
    gradient = fused(x.clone().requires_grad_())
    torch.testing.assert_close(gradient, first)


def test_only_fused_models_keep_filters():
    with torch.no_grad():
        fastconv.convert(model())(image())
    assert surgery.kept_filters() == (0, 0)


CHANGES = {
    "in place": lambda w: w.mul_(-2),
    "one element": lambda w: w[5, 3, 1, 1].add_(7),
    "through data": lambda w: w.data.mul_(-2),
    "new data": lambda w: setattr(w, "data", torch.randn_like(w)),
    "copied": lambda w: w.copy_(torch.randn_like(w)),
    "through NumPy": lambda w: w.detach().numpy().fill(0.5),
    "initialised": lambda w: nn.init.normal_(w.data),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_filter_is_packed_anew(change):
    net = model()
    fused = fastconv.fuse(net, inplace=True)
    assert_current(fused, model())
    twin = model()
    torch.manual_seed(1)
    with torch.no_grad():
        CHANGES[change](net[3].weight)
        twin[3].weight.copy_(net[3].weight)
    assert_current(fused, twin)


def test_after_an_optimizers_step_and_after_loading():
    net, twin = model(), model()
    fused = fastconv.fuse(net, inplace=True)
    assert_current(fused, twin)
    optimizers = [torch.optim.SGD(m.parameters(), 0.5) for m in (net, twin)]
    for m, optimizer in zip((fused, twin), optimizers, strict=True):
        m(image()).square().mean().backward()
        optimizer.step()
    assert_current(fused, twin)
    state = {k: torch.randn_like(v).abs() for k, v in twin.state_dict().items() if "num" not in k}
    for m in (net, twin):
        m.load_state_dict(state, strict=False)
    assert_current(fused, twin)
    for m in (net, twin):
        m.load_state_dict({k: v * 2 for k, v in state.items()}, strict=False, assign=True)
    assert_current(fused, twin)


def test_what_is_kept_goes_with_the_parameter():
    fused = fastconv.fuse(model())
    with torch.no_grad():
        fused(image())
    assert surgery.kept_filters()[0] == 3
    del fused
    gc.collect()
    assert surgery.kept_filters() == (0, 0)


def test_memory_that_is_used_again_is_another_filter():
    """A new model's filters come to lie where an old one's lay."""
    for seed in range(5):
        net = model()
        torch.manual_seed(seed)
        for p in net.parameters():
            nn.init.normal_(p)
        assert_current(fastconv.fuse(net), net)
        del net


def test_images_of_many_sizes_share_few_packings():
    net = model()
    fused = fastconv.fuse(net)
    for size in (5, 9, 17, 40, 66):
        assert_current(fused, net, image(size))
    assert 3 <= surgery.kept_filters()[0] <= 9


def test_copies_and_dtypes():
    net = model()
    fused = fastconv.fuse(net)
    assert_current(fused, net)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_current(other, net)
    assert_current(fused.double(), copy.deepcopy(net).double(), image().double())


def test_autocast_does_not_keep_its_copies():
    fused = fastconv.fuse(model())
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        fused(image())
    assert surgery.kept_filters() == (0, 0)


def test_filters_made_in_inference_mode_are_not_watched_and_not_kept():
    with torch.inference_mode():
        net = model()
        fused = fastconv.fuse(net)
        for _ in range(2):
            torch.testing.assert_close(fused(image()), net(image()), rtol=1e-4, atol=1e-5)
            net[3].weight.mul_(-1)
            fused[3].weight.copy_(net[3].weight)
    assert surgery.kept_filters() == (0, 0)


def test_threads_share_what_is_kept():
    net = model()
    fused, x = fastconv.fuse(net), image()
    with torch.no_grad():
        expected = fused(x)
    surgery.forget_filters()
    results = []

    def run():
        with torch.no_grad():
            results.extend(fused(x) for _ in range(20))

    threads = [threading.Thread(target=run) for _ in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert len(results) == 160 and all(torch.equal(r, expected) for r in results)
    assert surgery.kept_filters()[0] == 3


@pytest.mark.parametrize("row", [
    pytest.param(r, id=r.name) for r in support.rows("conv2d", "fprop") if r.backend == "cpu"
])  # fmt: skip
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_each_row_gives_the_bits_it_gives_without(row, dtype):
    """Forced, on filters of either layout, dense, grouped, with a tail of filters and channels."""
    for groups, C, K, window in ((1, 5, 19, 3), (1, 80, 40, 3), (1, 33, 70, 1), (4, 16, 24, 3),
                                 (16, 16, 16, 3), (1, 16, 16, 5)):  # fmt: skip
        for layout in FORMATS.values():
            generator = torch.Generator().manual_seed(C)
            x = support.normal((2, C, 17, 18), generator).to(dtype)
            w = support.normal((K, C // groups, window, window), generator).to(dtype)
            x, w = (t.contiguous(memory_format=layout) for t in (x, w))
            args = (x, w, None, (), None, 0.0, (1, 1), (1, 1), (1, 1), groups, "relu", ())

            def call(keep, args=args):
                return conv_bn_act(*args, keep_filter=keep)

            without, reason = support.forced(row, lambda call=call: call(False))
            if reason:
                continue
            for _ in range(2):
                kept, _ = support.forced(row, lambda call=call: call(True))
                assert torch.equal(without, kept), (groups, C, K, window, layout)


def test_a_filter_of_another_layout_than_torchs_is_packed_at_each_call():
    """Strided, it is copied for each call anyway."""
    w = torch.randn(8, 3, 3, 8).permute(0, 3, 2, 1)
    x = image()
    for _ in range(2):
        out = conv_bn_act(
            x, w, None, (), None, 0.0, (1, 1), (0, 0), (1, 1), 1, "none", (), keep_filter=True
        )
        torch.testing.assert_close(out, F.conv2d(x, w), rtol=1e-4, atol=1e-5)
    assert surgery.kept_filters() == (0, 0)
