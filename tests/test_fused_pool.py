"""Max pooling behind a convolution (conv2d_max_pool2d) and behind its BatchNorm (conv_bn_relu): one
kernel or several, the same result as the parts."""

import functools

import pytest
import torch
import torch.nn.functional as F

import fastconv
import fastconv.functional as ff
import references
import support
from fastconv.benchmarking.shapes import ConvShape
from support import DTYPES, FORMATS, LAYOUT_PAIRS, assert_exact, integers, name_of, normal
from turns import in_turn, slow

# (convolution, pooling): LeNet's and a stem's, then borders: windows that overlap, leave a rest,
# are padded, hold one element or the whole plane; strides, dilation and groups beneath.
CASES = {
    "lenet conv1": (ConvShape("", 2, 1, 28, 28, 6, 5, 5, (1, 1), (2, 2)), (2, None, 0)),
    "lenet conv2": (ConvShape("", 2, 6, 14, 14, 16, 5, 5), (2, None, 0)),
    "stem": (ConvShape("", 1, 3, 21, 19, 8, 7, 7, (2, 2), (3, 3)), (3, 2, 1)),
    "overlapping": (ConvShape("", 1, 4, 9, 11, 5, 3, 3, (1, 1), (1, 1)), (3, 1, 1)),
    "rest": (ConvShape("", 1, 3, 8, 10, 4, 3, 3, (1, 1), (1, 1)), (3, 3, 0)),
    "gaps": (ConvShape("", 1, 3, 12, 9, 4, 3, 3, (1, 1), (1, 1)), (2, (5, 3), 0)),
    "uneven": (ConvShape("", 2, 5, 7, 9, 7, 3, 2, (2, 1), (1, 0)), ((2, 3), (1, 2), (1, 0))),
    "one element": (ConvShape("", 2, 3, 5, 6, 4, 3, 3), (1, 2, 0)),
    "whole plane": (ConvShape("", 3, 3, 6, 7, 9, 3, 3), ((4, 5), None, 0)),
    "1x1": (ConvShape("", 2, 16, 6, 6, 24, 1, 1), (2, None, 0)),
    "dilated": (ConvShape("", 1, 4, 13, 12, 6, 3, 3, (1, 1), (2, 2), (2, 2)), (2, None, 1)),
    "grouped": (ConvShape("", 2, 6, 8, 8, 9, 3, 3, (1, 1), (1, 1), (1, 1), 3), (2, None, 0)),
    "depthwise": (ConvShape("", 2, 8, 9, 9, 8, 3, 3, (1, 1), (1, 1), (1, 1), 8), (2, None, 0)),
    "empty batch": (ConvShape("", 0, 3, 8, 8, 4, 3, 3), (2, None, 0)),
}
ACTIVATIONS = ("relu", None, "relu6", "leaky_relu", "silu", "hardswish", "sigmoid")
EXACT = ("relu", None, "relu6")  # rounding and these commute


def rows():
    return [pytest.param(r, id=r.name) for r in support.rows("conv2d_max_pool2d", "fprop")]


def pool_options(pool):
    return dict(zip(("pool_kernel_size", "pool_stride", "pool_padding"), pool, strict=True))


def activate(z, activation):
    functions = {None: lambda t: t, "sigmoid": torch.sigmoid}
    return functions.get(activation, getattr(F, activation or "", None))(z)


@functools.cache
def tensors(name, kind, dtype, bias=True):
    """Input, weight, bias of a case, on the CPU and in NCHW."""
    shape = CASES[name][0]
    generator = torch.Generator().manual_seed(len(name))
    make = integers if kind == "integers" else normal
    sizes = (shape.input, shape.weight, (shape.K,))
    x, w, b = (make(size, generator).to(dtype) for size in sizes)
    return x, w, b if bias else None


def placed(x, w, b, layouts=("NCHW", "NCHW"), device="cpu"):
    x, w = (
        torch.empty_like(t, device=device, memory_format=FORMATS[f]).copy_(t)
        for t, f in zip((x, w), layouts, strict=True)
    )
    return x, w, None if b is None else b.to(device)


def fused(name, args, activation="relu"):
    shape, pool = CASES[name]
    return ff.conv2d_max_pool2d(*args, **shape.options, activation=activation, **pool_options(pool))


def parts(module, name, args, activation="relu"):
    shape, pool = CASES[name]
    return module.max_pool2d(activate(module.conv2d(*args, **shape.options), activation), *pool)


def reference(name, x, w, b, activation="relu"):
    shape, (kernel, stride, padding) = CASES[name]
    pair = lambda v: v if isinstance(v, tuple) else (v, v)  # noqa: E731
    bias = torch.zeros(shape.K, dtype=torch.float64) if b is None else b.double()
    y = references.conv2d(x.double(), w.double(), bias, **shape.options)
    kernel = pair(kernel)
    stride = kernel if stride is None else pair(stride)
    return references.max_pool2d(
        activate(y, activation), kernel, stride, pair(padding), (1, 1), False
    )[0]


# Every dtype, every pair of layouts, with bias and without; not their product, which the rows get
# in test_each_row.
MIXES = [(torch.float32, layouts, layouts[0] == "NHWC") for layouts in LAYOUT_PAIRS]
MIXES += [(dtype, ("NHWC", "NHWC"), True) for dtype in DTYPES if dtype != torch.float32]
MIX_NAMES = [f"{name_of(d)}-{'-'.join(f)}-{'bias' if b else 'no bias'}" for d, f, b in MIXES]


@pytest.mark.parametrize("dtype, layouts, bias", MIXES, ids=MIX_NAMES)
def test_integers_are_the_parts_bit_for_bit(dtype, layouts, bias, backend):
    places = DTYPES.index(dtype), LAYOUT_PAIRS.index(layouts), 2 * bias
    for name in in_turn(CASES, slow(backend), *places):
        args = placed(*tensors(name, "integers", dtype, bias), layouts, backend.device)
        out, expected = fused(name, args), parts(ff, name, args)
        assert torch.equal(out, expected), name
        support.assert_same_format(out, expected)
        assert_exact(out, reference(name, *tensors(name, "integers", dtype, bias)))


@pytest.mark.parametrize("dtype, activation", [
    *[(torch.float32, activation) for activation in ACTIVATIONS],
    *[(dtype, "silu") for dtype in DTYPES if dtype != torch.float32],
], ids=lambda value: name_of(value) if isinstance(value, torch.dtype) else str(value))  # fmt: skip
def test_activations_keep_the_contract(dtype, activation, backend):
    places = DTYPES.index(dtype), ACTIVATIONS.index(activation)
    for name in in_turn(CASES, slow(backend), *places):
        x, w, b = tensors(name, "normal", dtype)
        expected = reference(name, x, w, b, activation)
        peers = [parts(F, name, placed(x, w, b, (f, f)), activation) for f in FORMATS]
        out = fused(name, placed(x, w, b, device=backend.device), activation)
        support.assert_contract(out, expected, peers)


@pytest.mark.parametrize("row", rows())
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_each_row(row, dtype, layout):
    """Forced, so that the table's choice does not hide it: integers exactly, normal numbers within
    the contract."""
    ran = 0
    for name in CASES:
        for kind in ("integers", "normal"):
            x, w, b = tensors(name, kind, dtype)
            args = placed(x, w, b, (layout, layout), support.row_device(row))
            out, reason = support.forced(row, functools.partial(fused, name, args))
            if reason:
                continue
            ran += 1
            expected = reference(name, x, w, b)
            if kind == "integers":
                assert_exact(out, expected)
            else:
                peers = [parts(F, name, placed(x, w, b, (f, f))) for f in FORMATS]
                support.assert_contract(out, expected, peers)
    support.coverage["conv2d_max_pool2d fprop: row x case x dtype x layout"] += ran
    assert ran or not support.must_run(row, dtype), f"{row.name} ran nothing"


def statistics(name, dtype, device="cpu"):
    """running_mean, running_var, weight, bias of a BatchNorm; of powers of two where the variance
    is, so that integers stay exact with eps = 0."""
    K = CASES[name][0].K
    k = torch.arange(K, device=device)
    values = (k % 3 - 1, 4.0 ** (k % 2), 2.0 ** (k % 3), k % 5 - 2)
    return [v.to(torch.float64 if dtype == torch.float64 else torch.float32) for v in values]


def fused_norm(name, args, training=False, activation="relu"):
    """conv_bn_relu with the case's pooling."""
    shape, pool = CASES[name]
    x, w, b = args
    mean, var, *affine = statistics(name, x.dtype, x.device)
    return ff.conv_bn_relu(
        *(x, w, b, mean, var, *affine),
        **shape.options,
        **pool_options(pool),
        activation=activation,
        eps=1e-5 if training else 0.0,
        training=training,
    )


def parts_norm(module, name, args, training=False, activation="relu"):
    shape, pool = CASES[name]
    x, w, b = args
    mean, var, *affine = statistics(name, x.dtype, x.device)
    y = module.conv2d(x, w, b, **shape.options)
    y = module.batch_norm(y, mean, var, *affine, training, 0.1, 1e-5 if training else 0.0)
    return module.max_pool2d(activate(y, activation), *pool)


@pytest.mark.parametrize("dtype, layouts, bias", MIXES, ids=MIX_NAMES)
def test_behind_batch_norm_integers_are_exact(dtype, layouts, bias, backend):
    for name in CASES:
        x, w, b = tensors(name, "integers", dtype, bias)
        out = fused_norm(name, placed(x, w, b, layouts, backend.device))
        exact = [None if t is None else t.double() for t in (x, w, b)]
        expected = parts_norm(F, name, exact)
        if dtype not in (torch.float32, torch.float64):  # rounded once
            expected = expected.to(dtype).double()
        assert_exact(out, expected)


@pytest.mark.parametrize("row", rows())
@pytest.mark.parametrize("layout", FORMATS)
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_each_row_behind_batch_norm(row, dtype, layout):
    ran = 0
    for name in CASES:
        x, w, b = tensors(name, "normal", dtype)
        args = placed(x, w, b, (layout, layout), support.row_device(row))
        out, reason = support.forced(row, functools.partial(fused_norm, name, args))
        if reason:
            continue
        ran += 1
        expected = parts_norm(F, name, [t.double() for t in (x, w, b)])
        peers = [parts_norm(F, name, placed(x, w, b, (f, f))) for f in FORMATS]
        support.assert_contract(out, expected, peers)
    support.coverage["conv2d_max_pool2d fprop behind BatchNorm: row x case x dtype x layout"] += ran
    assert ran or not support.must_run(row, dtype), f"{row.name} ran nothing"


@pytest.mark.parametrize("training", [True, False], ids=["training", "evaluation"])
def test_gradients_behind_batch_norm(training, backend):
    name = "overlapping"
    results = []
    for call in (fused_norm, functools.partial(parts_norm, F)):
        args = placed(*tensors(name, "normal", torch.float64), device=backend.device)
        leaves = [t.clone().requires_grad_() for t in args]
        out = call(name, leaves, training)
        weights = torch.arange(out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-7)


def test_a_residual_before_the_pooling(backend):
    """No kernel pools behind a residual: it is a kernel more, and the same result."""
    x, w, b = placed(*tensors("rest", "normal", torch.float32), device=backend.device)
    y = ff.conv2d(x, w, b, padding=1)
    residual = torch.linspace(-3, 3, y.numel(), device=y.device).view_as(y)
    norm = statistics("rest", torch.float32, x.device)
    out = ff.conv_bn_relu(x, w, b, *norm, residual=residual, padding=1, pool_kernel_size=3)
    expected = F.max_pool2d(F.relu(F.batch_norm(F.conv2d(x, w, b, padding=1), *norm) + residual), 3)
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def test_statistics_come_together():
    x, w, b = tensors("rest", "normal", torch.float32)
    mean = torch.zeros(4)
    tail = (0.0, (1, 1), (1, 1), (1, 1), 1, "relu")
    call = torch.ops.fastconv.conv_bn_act
    for device in ("cpu", "meta"):
        x, w, b, mean = (t.to(device) for t in (x, w, b, mean))
        with pytest.raises(RuntimeError, match="mean is given and var missing"):
            call(x, w, b, mean, None, None, None, None, *tail)
        with pytest.raises(RuntimeError, match="bn_weight is given and bn_bias missing"):
            call(x, w, b, None, None, mean, None, None, *tail)
    assert call(x, w, b, None, None, None, None, None, *tail).shape == (1, 4, 8, 10)


@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_unfused_it_is_the_parts_bit_for_bit(dtype):
    """The CPU has no row of its own for it: convolution, then pooling, and no fallback to ATen."""
    with fastconv.backend("cpu"), fastconv.allow_fallback(False):
        for name in CASES:
            args = tensors(name, "normal", dtype)
            for activation in EXACT:
                got, expected = fused(name, args, activation), parts(ff, name, args, activation)
                assert torch.equal(got, expected), (name, activation)


@pytest.mark.skipif(bool(support.emulator_missing()), reason="needs the emulator")
def test_a_small_net_is_one_launch():
    if not support.rows("conv2d_max_pool2d", "fprop"):
        pytest.skip("no row fuses convolution and pooling")
    args = tensors("lenet conv1", "normal", torch.float32)
    with fastconv.backend("emulator"), fastconv.emulator.launches() as log:
        fused("lenet conv1", args)
    assert len(log) == 1, log
    with fastconv.backend("emulator"), fastconv.emulator.launches() as log:
        fused_norm("lenet conv1", args)
    assert len(log) == 1, log


def test_nan_passes_through(backend):
    x, w, b = (t.clone() for t in tensors("lenet conv2", "normal", torch.float32))
    x[0, 0, 3, 3] = torch.nan
    args = placed(x, w, b, device=backend.device)
    out, expected = fused("lenet conv2", args), parts(ff, "lenet conv2", args)
    assert torch.equal(out.isnan(), expected.isnan()) and out.isnan().any()


def test_three_dimensions(backend):
    x, w, b = placed(*tensors("lenet conv1", "integers", torch.float32), device=backend.device)
    batch = fused("lenet conv1", (x[:1], w, b))
    assert torch.equal(fused("lenet conv1", (x[0], w, b)), batch[0])


@pytest.mark.parametrize("name", ["lenet conv1", "overlapping", "grouped"])
def test_gradients_are_the_parts(name, backend):
    results = []
    for function in (fused, functools.partial(parts, ff)):
        x, w, b = tensors(name, "normal", torch.float64)
        args = placed(x[:1], w, b, device=backend.device)
        leaves = [t.clone().requires_grad_() for t in args]
        out = function(name, leaves)
        weights = torch.arange(out.numel(), device=out.device, dtype=out.dtype).view_as(out)
        results.append((out, *torch.autograd.grad((out * weights).sum(), leaves)))
    for got, expected in zip(*results, strict=True):
        assert torch.equal(got, expected)


def test_forward_mode(backend):
    x, w, b = placed(*tensors("lenet conv2", "normal", torch.float64), device=backend.device)
    tangent = torch.ones_like(x)
    call = functools.partial(fused, "lenet conv2")
    theirs = functools.partial(parts, F, "lenet conv2")
    got, expected = (
        torch.func.jvp(lambda t, f=f: f((t, w, b)), (x,), (tangent,)) for f in (call, theirs)
    )
    torch.testing.assert_close(got, expected)


def test_autocast_casts_as_conv2d(backend):
    args = placed(*tensors("lenet conv1", "normal", torch.float32), device=backend.device)
    with torch.autocast(backend.device, torch.bfloat16):
        out = fused("lenet conv1", args)
    assert out.dtype == torch.bfloat16
    low = [t.bfloat16() for t in args]
    assert torch.equal(out, fused("lenet conv1", low))


@pytest.mark.parametrize("layouts", LAYOUT_PAIRS, ids="-".join)
@pytest.mark.parametrize("name", CASES)
def test_meta_has_the_shape_and_the_strides(name, layouts):
    args = placed(*tensors(name, "integers", torch.float32), layouts)
    for call in (fused, fused_norm):
        real, meta = call(name, args), call(name, [t.to("meta") for t in args])
        assert (meta.shape, meta.stride(), meta.dtype) == (real.shape, real.stride(), real.dtype)


def bad(**changes):
    x = torch.zeros(changes.pop("input", (1, 2, 8, 8)))
    w = torch.zeros(changes.pop("weight", (3, 2, 3, 3)))
    return (x, w, changes.pop("bias", None)), changes


REFUSED = {
    "padding beyond half a window": bad(pool_padding=2),
    "negative padding": bad(pool_padding=-1),
    "window beyond the plane": bad(pool_kernel_size=7),
    "empty window": bad(pool_kernel_size=0),
    "stride of zero": bad(pool_stride=0),
    "three values": bad(pool_kernel_size=(2, 2, 2)),
    "channels": bad(weight=(3, 4, 3, 3)),
    "rank": bad(input=(8, 8)),
    "bias": bad(bias=torch.zeros(4)),
    "dtypes": bad(bias=torch.zeros(3, dtype=torch.float16)),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses_what_its_parts_refuse_in_their_words(name):
    args, options = REFUSED[name]
    pool = [options.get(f"pool_{k}", d) for k, d in (("kernel_size", 2), ("stride", None))]
    pool.append(options.get("pool_padding", 0))
    _, ours = support.outcome(ff.conv2d_max_pool2d, *args, **options)
    _, theirs = support.outcome(lambda: ff.max_pool2d(ff.conv2d(*args), *pool))
    assert theirs is not None and type(ours) is type(theirs)
    assert str(ours) == str(theirs)


def test_torchs_words_for_too_much_padding():
    args = tensors("lenet conv1", "integers", torch.float32)
    with pytest.raises(RuntimeError, match="pad should be at most half of effective kernel size"):
        ff.conv2d_max_pool2d(*args, pool_padding=2)


def test_arguments_that_are_no_numbers():
    x, w, b = tensors("lenet conv1", "integers", torch.float32)
    with pytest.raises(TypeError, match="pool_stride"):
        ff.conv2d_max_pool2d(x, w, b, pool_stride="2")
    with pytest.raises(ValueError, match="activation must be one of"):
        ff.conv2d_max_pool2d(x, w, b, activation="tanh")
    with pytest.raises(TypeError, match="weight must be a Tensor"):
        ff.conv2d_max_pool2d(x, None, b)
    assert torch.equal(
        ff.conv2d_max_pool2d(x, w, b, padding="same"), ff.conv2d_max_pool2d(x, w, b, padding=2)
    )
