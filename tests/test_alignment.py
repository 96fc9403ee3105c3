"""Pooling and BatchNorm where the CUDA kernels change their path: packs of 16 bytes against single
elements, packs that straddle two planes, windows shared by a warp, sums in several slices."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import support
from support import DTYPES, FORMATS, assert_contract, name_of, normal

# Channels that fill packs in every dtype, in none and in some; planes that are and are not whole
# packs; more elements a channel than one block sums (4,096, or 128 rows).
SIZES = [
    (2, 8, 7, 7),
    (3, 40, 13, 20),
    (2, 7, 15, 17),
    (5, 12, 32, 32),
    (3, 264, 5, 8),
    (9, 16, 1, 1),
]

POOLS = {
    "max 3x3": lambda m, x: m.max_pool2d(x, 3, 2, 1),
    "average 3x3": lambda m, x: m.avg_pool2d(x, 3, 2, 1, count_include_pad=False),
    "average 7x5": lambda m, x: m.avg_pool2d(x, (7, 5), (3, 5), (3, 0), ceil_mode=True),
    "global": lambda m, x: m.adaptive_avg_pool2d(x, 1),
    "adaptive": lambda m, x: m.adaptive_avg_pool2d(x, (2, 3)),
}


def placed(t, layout, misaligned, device="cpu"):
    """A copy in the layout; `misaligned` puts it one element past an aligned address."""
    t = t.contiguous(memory_format=FORMATS[layout])
    if not misaligned:
        return t.to(device)
    room = torch.empty(t.numel() + 1, dtype=t.dtype, device=device)
    return room.as_strided(t.shape, t.stride(), 1).copy_(t)


def with_gradient(function, x, grad=None):
    x = x.detach().requires_grad_()
    out = function(x)
    grad = torch.ones_like(out) if grad is None else grad.to(out.device, out.dtype)
    return out.detach(), torch.autograd.grad(out, x, grad)[0]


def sizes_for(backend):
    """Interpreted, alignment is one flag of the problem: the smaller ones show what it does."""
    interpreted = backend.name == "triton" and backend.device == "cpu"
    return [s for s in SIZES if not interpreted or s[2] * s[3] in (49, 255)]


@functools.cache
def pool_case(name, size, dtype):
    generator = torch.Generator().manual_seed(sum(size))
    x = normal(size, generator).to(dtype)
    call = POOLS[name]
    grad = normal(call(F, x.double()).shape, generator).to(dtype)
    expected = with_gradient(functools.partial(call, F), x.double(), grad)
    peers = [with_gradient(functools.partial(call, F), placed(x, f, False), grad) for f in FORMATS]
    return x, grad, expected, peers


@pytest.fixture(params=[b for b in support.backends() if b.name != "aten"], ids=str)
def backend(request):
    with fastconv.backend(request.param.name):
        yield request.param


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("name", POOLS)
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_pooling(name, dtype, layout, misaligned, backend):
    if dtype == torch.float64 and name.startswith("a"):
        pytest.skip("the oracle is no better than float64; test_pooling.py has one that is")
    for size in sizes_for(backend):
        x, grad, expected, peers = pool_case(name, size, dtype)
        x = placed(x, layout, misaligned, backend.device)
        got = with_gradient(functools.partial(POOLS[name], ff), x, grad)
        for i in range(2):
            assert_contract(got[i], expected[i], [peer[i] for peer in peers])


@functools.cache
def norm_case(size, dtype, training):
    generator = torch.Generator().manual_seed(sum(size) + training)
    x = (normal(size, generator) * 2 + 3).to(dtype)
    grad = normal(size, generator).to(dtype)
    mean, var = normal((size[1],), generator), normal((size[1],), generator).abs() + 0.5
    statistics = (None, None) if training else (mean.float(), var.float())

    def call(module, t):
        kept = [s if s is None else s.to(t.device) for s in statistics]
        if t.dtype in (torch.float16, torch.bfloat16, torch.float32):
            return module.batch_norm(t, *kept, training=training)
        return module.batch_norm(
            t, *[s if s is None else s.double() for s in kept], training=training
        )

    expected = with_gradient(functools.partial(call, F), x.double(), grad)
    peers = [with_gradient(functools.partial(call, F), placed(x, f, False), grad) for f in FORMATS]
    return x, grad, call, expected, peers


@pytest.mark.parametrize("misaligned", [False, True], ids=["aligned", "misaligned"])
@pytest.mark.parametrize("training", [True, False], ids=["training", "inference"])
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", [d for d in DTYPES if d != torch.float64], ids=name_of)
def test_batch_norm(dtype, layout, training, misaligned, backend):
    for size in sizes_for(backend):
        x, grad, call, expected, peers = norm_case(size, dtype, training)
        x = placed(x, layout, misaligned, backend.device)
        got = with_gradient(functools.partial(call, ff), x, grad)
        for i in range(2):
            assert_contract(got[i], expected[i], [peer[i] for peer in peers])


@pytest.mark.skipif(bool(support.emulator_missing()), reason="needs the emulator")
def test_launches():
    """Inference is one kernel; statistics and gradients are three: sums, their joining, the step
    over all elements, which a gradient that is not asked for leaves out."""
    x = torch.randn(2, 8, 6, 6, requires_grad=True)
    w = torch.randn(8, requires_grad=True)
    mean, var = torch.zeros(8), torch.ones(8)

    def count(function):
        with fastconv.emulator.launches() as log:
            result = function()
        return len(log), result

    with fastconv.backend("emulator"):
        assert count(lambda: ff.batch_norm(x.detach(), mean, var))[0] == 1
        assert count(lambda: ff.batch_norm(x.detach(), None, None, training=True))[0] == 3
        out = ff.batch_norm(x, None, None, w, training=True)
        assert count(lambda: torch.autograd.grad(out.sum(), w, retain_graph=True))[0] == 2
        assert count(lambda: torch.autograd.grad(out.sum(), x))[0] == 3
        for call in POOLS.values():
            launches, out = count(lambda c=call: c(ff, x))
            assert launches == 1
            assert count(lambda o=out: torch.autograd.grad(o.sum(), x))[0] == 1
