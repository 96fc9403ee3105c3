"""Random geometry against the float64 references, which are no convolution of torch's: that one
ends the process on some of these (channels_last, S = 1 and dilation).

The default profile is small and derandomised; `--hypothesis-profile=thorough` is the large one.
"""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

import fastconv
import fastconv.functional as ff
import references
import support
from support import DTYPES, FORMATS, exact_failure, integers, name_of


def axis(draw, largest):
    """size, window, stride, padding, dilation with at least one output."""
    window = draw(st.integers(1, 5), label="window")
    dilation = draw(st.integers(1, 3), label="dilation")
    padding = draw(st.integers(0, 4), label="padding")
    span = dilation * (window - 1) + 1
    size = draw(st.integers(max(1, span - 2 * padding), largest), label="size")
    stride = draw(st.integers(1, 4), label="stride")
    return size, window, stride, padding, dilation


@st.composite
def convolutions(draw):
    (H, R, sh, ph, dh), (W, S, sw, pw, dw) = axis(draw, 14), axis(draw, 40)
    groups = draw(st.sampled_from([1, 1, 1, 2, 3, 5]), label="groups")
    # Up to 40 channels, and now and then one filter or channel a group.
    per_group = draw(st.one_of(st.integers(1, 6), st.integers(1, 40 // groups)), label="C / G")
    filters = draw(st.one_of(st.integers(1, 6), st.integers(1, 40 // groups)), label="K / G")
    depthwise = draw(st.integers(0, 5)) == 0
    if depthwise:
        groups, per_group, filters = draw(st.integers(2, 40)), 1, draw(st.integers(1, 2))
    N = draw(st.integers(0, 3), label="N")
    P = references.extent(H, R, sh, ph, dh)
    Q = references.extent(W, S, sw, pw, dw)
    work = max(N, 1) * groups * per_group * filters * R * S * P * Q
    assume(work < 400_000)
    return {
        "input": (N, groups * per_group, H, W),
        "weight": (groups * filters, per_group, R, S),
        "output": (N, groups * filters, P, Q),
        "options": {
            "stride": (sh, sw),
            "padding": (ph, pw),
            "dilation": (dh, dw),
            "groups": groups,
        },
    }


@st.composite
def pools(draw):
    axes = []
    for largest in (14, 33):
        size, window, stride, padding, dilation = axis(draw, largest)
        padding = min(padding, window // 2)
        assume(size + 2 * padding >= dilation * (window - 1) + 1)
        axes.append((size, window, stride, padding, dilation))
    size, window, stride, padding, dilation = zip(*axes, strict=True)
    N, C = draw(st.integers(0, 3)), draw(st.one_of(st.integers(1, 4), st.integers(1, 40)))
    return (N, C, *size), window, stride, padding, dilation, draw(st.booleans())


def layouts():
    return st.sampled_from(list(FORMATS))


def place(t, layout, form):
    """A leaf of that layout; "sliced" leaves gaps between its rows, which no format describes."""
    if form == "sliced":
        t = torch.cat([t, t], 3)[..., : t.shape[3]]
    else:
        t = torch.empty_like(t, memory_format=FORMATS[layout]).copy_(t)
    return t.detach().requires_grad_()


def forms():
    return st.sampled_from(["packed", "packed", "packed", "sliced"])


@given(
    problem=convolutions(),
    dtype=st.sampled_from(DTYPES),
    layout=st.tuples(layouts(), layouts(), layouts()),
    form=forms(),
    bias=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_conv2d(problem, dtype, layout, form, bias, seed):
    """Integers: exact, whatever the order of the sums."""
    generator = torch.Generator().manual_seed(seed)
    x, w, grad = (integers(problem[k], generator) for k in ("input", "weight", "output"))
    b = integers((w.shape[0],), generator) if bias else None
    options = problem["options"]
    expected = references.conv2d(x, w, b, **options)
    gradients = references.conv2d_gradients(x, w, grad, **options)
    leaves = [place(x.to(dtype), layout[0], form), place(w.to(dtype), layout[1], form)]
    leaves += [b.to(dtype).requires_grad_()] if bias else []
    with fastconv.allow_fallback(False):
        out = ff.conv2d(*leaves, **options)
        got = torch.autograd.grad(out, leaves, place(grad.to(dtype), layout[2], form).detach())
    assert not exact_failure(out, expected)
    for name, ours, right in zip(("dgrad", "wgrad", "bgrad"), got, gradients, strict=False):
        failure = exact_failure(ours, right)
        assert not failure, f"{name}: {failure}"


@given(problem=convolutions(), layout=st.tuples(layouts(), layouts()), seed=st.integers(0, 2**20))
def test_conv2d_of_random_numbers(problem, layout, seed):
    """Against the worst case of a sum in any order: n * eps * sum|products|."""
    generator = torch.Generator().manual_seed(seed)
    x, w, grad = (
        torch.randn(problem[k], generator=generator) for k in ("input", "weight", "output")
    )
    options = problem["options"]
    leaves = [place(x, layout[0], "packed"), place(w, layout[1], "packed")]
    out = ff.conv2d(*leaves, **options)
    got = torch.autograd.grad(out, leaves, grad)
    doubles = [t.double() for t in (x, w, grad)]
    right = [references.conv2d(*doubles[:2], **options)]
    right += references.conv2d_gradients(*doubles, **options)[:2]
    sizes = [t.abs() for t in doubles]
    scale = [references.conv2d(*sizes[:2], **options)]
    scale += references.conv2d_gradients(*sizes, **options)[:2]
    for ours, exact, sums in zip((out, *got), right, scale, strict=True):
        # sqrt(n) is what a sum of n rounded products is off by; 64 leaves room for bad luck.
        allowed = 64 * torch.finfo(torch.float32).eps * sums + 1e-30
        assert ((ours.double() - exact).abs() <= allowed).all()


@given(
    problem=convolutions(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    layout=layouts(),
    row=st.integers(0, 10**6),
    seed=st.integers(0, 2**20),
)
@pytest.mark.parametrize("direction", ["fprop", "dgrad", "wgrad", "bgrad"])
def test_conv2d_rows(direction, problem, dtype, layout, row, seed):
    """The same on a row drawn from the table, forced."""
    rows = support.rows("conv2d", direction)
    row = rows[row % len(rows)]
    generator = torch.Generator().manual_seed(seed)
    x, w, grad = (integers(problem[k], generator) for k in ("input", "weight", "output"))
    b = integers((w.shape[0],), generator)
    options, device = problem["options"], support.row_device(row)

    def run():
        tensors = [place(x.to(dtype), layout, "packed"), place(w.to(dtype), layout, "packed")]
        tensors = [t.detach().to(device) for t in [*tensors, b.to(dtype)]]
        which = {"dgrad": 0, "wgrad": 1, "bgrad": 2}.get(direction)
        if which is None:
            return ff.conv2d(*tensors, **options)
        tensors[which].requires_grad_()
        out = ff.conv2d(*tensors, **options)
        return torch.autograd.grad(out, tensors[which], grad.to(device, dtype))[0]

    result, refused = support.forced(row, run)
    if refused:
        return
    if direction == "fprop":
        expected = references.conv2d(x, w, b, **options)
    else:
        which = ("dgrad", "wgrad", "bgrad").index(direction)
        expected = references.conv2d_gradients(x, w, grad, **options)[which]
    failure = support.integers_failure(row, result, expected)
    assert not failure, f"{row.name}: {failure}"


@given(
    problem=pools(),
    dtype=st.sampled_from(DTYPES),
    layout=st.tuples(layouts(), layouts()),
    form=forms(),
    indexed=st.booleans(),
    nan=st.booleans(),
    seed=st.integers(0, 2**20),
)
def test_max_pool2d(problem, dtype, layout, form, indexed, nan, seed):
    size, window, stride, padding, dilation, ceil_mode = problem
    geometry = (window, stride, padding, dilation, ceil_mode)
    assume(all(n > 0 for n in pooled(size, *geometry)))
    generator = torch.Generator().manual_seed(seed)
    x = integers(size, generator, -3, 3)
    if nan:
        x[x == 3], x[x == -3] = torch.nan, -torch.inf
    expected, where = references.max_pool2d(x, *geometry)
    leaf = place(x.to(dtype), layout[0], form)
    with fastconv.allow_fallback(False):
        out = ff.max_pool2d(leaf, *geometry, return_indices=indexed)
        if indexed:
            out, indices = out
            assert torch.equal(torch.where(where >= 0, indices, -1), where)
        grad = integers(out.shape, generator)
        (got,) = torch.autograd.grad(out, leaf, place(grad.to(dtype), layout[1], form).detach())
    assert not exact_failure(out, expected)
    assert not exact_failure(got, references.max_pool2d_backward(grad, where, *size[2:]))


def pooled(size, window, stride, padding, dilation, ceil_mode):
    return [
        references.pool_extent(*numbers, ceil_mode)
        for numbers in zip(size[2:], window, stride, padding, dilation, strict=True)
    ]


@given(
    problem=pools(),
    dtype=st.sampled_from(DTYPES),
    layout=layouts(),
    form=forms(),
    include=st.booleans(),
    divisor=st.sampled_from([None, None, 1, 3, -2]),
    seed=st.integers(0, 2**20),
)
def test_avg_pool2d(problem, dtype, layout, form, include, divisor, seed):
    size, window, stride, padding, _, ceil_mode = problem
    geometry = (window, stride, padding, ceil_mode, include, divisor)
    assume(all(s + 2 * p >= k for s, p, k in zip(size[2:], padding, window, strict=True)))
    x = integers(size, torch.Generator().manual_seed(seed), -4, 4).requires_grad_()
    expected = references.avg_pool2d(x, *geometry)
    leaf = place(x.to(dtype), layout, form)
    with fastconv.allow_fallback(False):
        out = ff.avg_pool2d(leaf, *geometry)
        grad = integers(out.shape, torch.Generator().manual_seed(seed + 1))
        (got,) = torch.autograd.grad(out, leaf, grad.to(dtype))
    (right,) = torch.autograd.grad(expected, x, grad)
    for ours, exact in ((out, expected), (got, right)):
        # Quotients of small integers: a multiplication by a rounded reciprocal is one ulp more.
        largest = float(exact.detach().abs().max()) if exact.numel() else 0
        assert support.max_error(ours, exact.detach()) <= 2 * support.eps(dtype) * largest


@given(
    size=st.tuples(*[st.integers(a, b) for a, b in ((0, 3), (1, 20), (1, 14), (1, 14))]),
    out_size=st.tuples(st.integers(1, 16), st.integers(1, 16)),
    dtype=st.sampled_from(DTYPES),
    layout=layouts(),
    seed=st.integers(0, 2**20),
)
def test_adaptive_avg_pool2d(size, out_size, dtype, layout, seed):
    x = integers(size, torch.Generator().manual_seed(seed), -4, 4).requires_grad_()
    expected = references.adaptive_avg_pool2d(x, out_size)
    leaf = place(x.to(dtype), layout, "packed")
    with fastconv.allow_fallback(False):
        out = ff.adaptive_avg_pool2d(leaf, out_size)
        grad = integers(out.shape, torch.Generator().manual_seed(seed + 1))
        (got,) = torch.autograd.grad(out, leaf, grad.to(dtype))
    (right,) = torch.autograd.grad(expected, x, grad)
    for ours, exact in ((out, expected), (got, right)):
        largest = float(exact.detach().abs().max()) if exact.numel() else 0
        # An input element may lie in several windows: their quotients add up.
        assert support.max_error(ours, exact.detach()) <= 4 * support.eps(dtype) * largest


@given(
    size=st.tuples(*[st.integers(a, b) for a, b in ((1, 4), (1, 40), (1, 9), (1, 20))]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    layout=layouts(),
    training=st.booleans(),
    offset=st.sampled_from([0.0, 10.0, 1000.0]),
    seed=st.integers(0, 2**20),
)
def test_batch_norm(size, dtype, layout, training, offset, seed):
    N, C, H, W = size
    assume(N * H * W > 1)
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(size, generator=generator, dtype=torch.float64) + offset).to(dtype)
    w, b, mean, var = (torch.rand(C, generator=generator).to(dtype) + 0.5 for _ in range(4))
    statistics = (None, None) if training else (mean + offset, var)
    out = ff.batch_norm(place(x, layout, "packed"), *statistics, w, b, training)
    doubles = [None if t is None else t.double() for t in (x, w, b, *statistics)]
    expected = references.batch_norm(*doubles)
    # The mean is rounded to half an ulp of the offset, over a deviation that few values may make
    # small; the variance's own error is relative.
    deviation = doubles[0].std((0, 2, 3), correction=0).min() if training else var.min().sqrt()
    scale = (offset + 5) / max(float(deviation), 3e-3) + 10
    assert support.max_error(out.detach(), expected) <= 32 * support.eps(dtype) * scale


def test_every_dtype_was_reached():
    """A guard on the strategies: a sample of them must hold what the tests are for."""
    seen = set()

    @given(problem=convolutions(), dtype=st.sampled_from(DTYPES))
    def collect(problem, dtype):
        options = problem["options"]
        seen.add(name_of(dtype))
        seen.add(("groups", options["groups"] > 1))
        seen.add(("empty", problem["input"][0] == 0))
        seen.add(("dilated", max(options["dilation"]) > 1))
        seen.add(("1x1", problem["weight"][2:] == (1, 1)))

    collect()
    for feature in ("groups", "dilated", "empty"):
        assert {(feature, True), (feature, False)} <= seen
    assert {name_of(d) for d in DTYPES} <= seen
