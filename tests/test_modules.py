"""The layers as torch.nn's: constructors, state_dicts, copies, formats, dtypes, autocast."""

import copy
import inspect
import io
import itertools
import pickle

import pytest
import torch
from torch import nn

import fastconv
from support import FORMATS, assert_same_format, outcome, run_python, unfused
from turns import in_turn, interpreted

CLASSES = ("Conv2d", "MaxPool2d", "AvgPool2d", "AdaptiveAvgPool2d", "BatchNorm2d")

CONVOLUTIONS = {
    "int": (3, 8, 3),
    "tuple": (3, 8, (3, 5)),
    "stride": (3, 8, 3, 2),
    "stride (1, 3)": (3, 8, 3, (1, 3)),
    "padding": (3, 8, 3, 1, 2),
    "padding (0, 2)": (3, 8, 3, 1, (0, 2)),
    "dilation": (3, 8, 3, 1, 0, 2),
    "dilation (1, 2)": (3, 8, 3, 1, 1, (1, 2)),
    "groups": (4, 8, 3, 1, 1, 1, 4),
    "no bias": (3, 8, 3, 1, 1, 1, 1, False),
    "same": (3, 8, 3, 1, "same"),
    "same, even kernel": (3, 8, (4, 2), 1, "same"),
    "same, even kernel, dilation": (3, 8, (2, 3), 1, "same", (3, 2)),
    "valid": (3, 8, 3, 2, "valid"),
    "reflect": (3, 8, 3, 1, 2, 1, 1, True, "reflect"),
    "replicate": (3, 8, 3, 2, (1, 2), 1, 1, True, "replicate"),
    "circular": (3, 8, 3, 1, (2, 1), 1, 1, True, "circular"),
    "reflect, same": (3, 8, (3, 4), 1, "same", 1, 1, True, "reflect"),
    "circular, same, dilation": (3, 8, 3, 1, "same", 2, 1, False, "circular"),
    "replicate, valid": (3, 8, 3, 1, "valid", 1, 1, True, "replicate"),
}

OTHERS = {
    "MaxPool2d": [(2,), ((3, 2), 2), (3, 2, 1), (3, 1, 0, 2), (2, 3, 0, 1, False, True),
                  (3, 2, 1, 1, True, True)],
    "AvgPool2d": [(2,), ((3, 2), (2, 1)), (3, 2, 1), (3, 2, 1, True), (3, 2, 1, False, False),
                  (2, 2, 0, False, True, 5)],
    "AdaptiveAvgPool2d": [(1,), ((3, 2),), ((None, 2),), (4,), ((2, None),)],
    "BatchNorm2d": [(3,), (3, 1e-3), (3, 1e-5, None), (3, 1e-5, 0.5, False),
                    (3, 1e-5, 0.1, True, False), (3, 1e-5, 0.1, False, False)],
}  # fmt: skip


def twins(name, *args, **options):
    """Ours and torch's, with equal parameters from equal seeds."""
    layers = []
    for module in (fastconv, nn):
        torch.manual_seed(11)
        layers.append(getattr(module, name)(*args, **options))
    return layers


def same(ours, theirs, **tolerance):
    ours, theirs = ((t,) if isinstance(t, torch.Tensor) else t for t in (ours, theirs))
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **tolerance)
        assert_same_format(a, b)


def every_layer():
    for name, args in CONVOLUTIONS.items():
        yield pytest.param("Conv2d", args, id=f"Conv2d-{name}")
    for name, calls in OTHERS.items():
        for args in calls:
            yield pytest.param(name, args, id=f"{name}-{args}")


LAYERS = [param.values for param in every_layer()]


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("name, args", list(every_layer()))
def test_every_argument_does_as_torchs(name, args, training, backend):
    place = LAYERS.index((name, args)) + training
    for layout in in_turn(FORMATS, interpreted(backend), place, every=2):
        check_layer(name, args, training, layout, backend)


def check_layer(name, args, training, layout, backend):
    ours, theirs = (layer.train(training).to(backend.device) for layer in twins(name, *args))
    channels = args[0] if name == "Conv2d" else 3
    x = torch.randn(2, channels, 9, 8).contiguous(memory_format=FORMATS[layout])
    x = x.to(backend.device)
    inputs = [x.detach().requires_grad_() for _ in range(2)]
    same(ours(inputs[0]), theirs(inputs[1]), rtol=1e-4, atol=1e-5)
    losses = [layer(t) for layer, t in zip((ours, theirs), inputs, strict=True)]
    for loss in losses:
        loss = loss[0] if isinstance(loss, tuple) else loss
        loss.sin().sum().backward()
    same(inputs[0].grad, inputs[1].grad, rtol=1e-4, atol=1e-5)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        same(a.grad, b.grad, rtol=1e-4, atol=1e-4)
    assert repr(ours) == repr(theirs)


@pytest.mark.parametrize("name, args", list(every_layer()))
def test_unbatched_inputs(name, args):
    ours, theirs = twins(name, *args)
    x = torch.randn(args[0] if name == "Conv2d" else 3, 9, 8)
    got, error = outcome(ours, x)
    expected, refused = outcome(theirs, x)
    assert type(error) is type(refused)
    if refused is None:
        same(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CLASSES)
def test_subclass_signature_and_documentation(name):
    ours, theirs = getattr(fastconv, name), getattr(nn, name)
    assert issubclass(ours, theirs) and ours.__name__ == name
    assert inspect.signature(ours) == inspect.signature(theirs)
    assert ours.__doc__ and ours.__module__.startswith("fastconv")


@pytest.mark.parametrize("name, args", list(every_layer()))
def test_state_dicts_go_both_ways(name, args):
    ours, theirs = twins(name, *args)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    for t in [*ours.parameters(), *ours.buffers()]:
        t.data = torch.rand(t.shape).to(t.dtype)
    theirs.load_state_dict(ours.state_dict())
    for t in theirs.parameters():
        t.data += 1
    ours.load_state_dict(theirs.state_dict())
    for a, b in zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    assert ours.state_dict()._metadata == theirs.state_dict()._metadata


@pytest.mark.parametrize("name, args", list(every_layer()))
def test_equal_seeds_give_equal_parameters(name, args):
    ours, theirs = twins(name, *args)
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)


def copies(layer):
    yield copy.deepcopy(layer)
    yield pickle.loads(pickle.dumps(layer))
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    yield torch.load(file, weights_only=False)


@pytest.mark.parametrize("name, args", list(every_layer()))
def test_copies_compute_the_same(name, args):
    layer = twins(name, *args)[0].eval()
    x = torch.randn(1, args[0] if name == "Conv2d" else 3, 9, 8)
    expected = layer(x)
    for twin in copies(layer):
        assert type(twin) is type(layer)
        same(twin(x), expected, rtol=0, atol=0)


def test_fused_layer_survives_copies():
    layer = fastconv.ConvBNReLU2d(3, 4, 3, activation="silu").eval()
    x = torch.randn(1, 3, 5, 5)
    for twin in copies(layer):
        assert twin.activation == "silu"
        assert torch.equal(twin(x), layer(x))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", ["Conv2d", "BatchNorm2d"])
def test_changed_dtype(name, dtype, backend):
    args = (3, 4, 3, 1, 1) if name == "Conv2d" else (3,)
    ours, theirs = (layer.to(backend.device, dtype) for layer in twins(name, *args))
    x = torch.randn(2, 3, 6, 6).to(backend.device, dtype)
    tolerance = 1e-9 if dtype is torch.float64 else 2e-2
    same(ours(x), theirs(x), rtol=tolerance, atol=tolerance)
    casts = {torch.float16: "half", torch.bfloat16: "bfloat16", torch.float64: "double"}
    named = getattr(twins(name, *args)[0], casts[dtype])()
    assert next(named.parameters()).dtype is dtype


@pytest.mark.parametrize("name", CLASSES)
def test_meta_construction(name):
    args = {"Conv2d": (3, 4, 3), "BatchNorm2d": (3,)}.get(name, (2,))
    with torch.device("meta"):
        layer = getattr(fastconv, name)(*args)
    assert all(t.is_meta for t in [*layer.parameters(), *layer.buffers()])
    expected = getattr(nn, name)(*args)(torch.randn(2, 3, 6, 6))
    out = layer(torch.randn(2, 3, 6, 6, device="meta"))
    assert out.is_meta and out.shape == expected.shape
    filled = layer.to_empty(device="cpu")
    filled.load_state_dict(getattr(nn, name)(*args).state_dict())
    assert filled(torch.randn(2, 3, 6, 6)).shape == expected.shape


@pytest.mark.parametrize("name", ["Conv2d", "BatchNorm2d"])
def test_device_and_dtype_arguments(name):
    args = (3, 4, 3) if name == "Conv2d" else (3,)
    layer = getattr(fastconv, name)(*args, device="meta", dtype=torch.bfloat16)
    parameter = next(layer.parameters())
    assert parameter.is_meta and parameter.dtype is torch.bfloat16


def network(module, fused=False):
    first = [module.Conv2d(3, 8, 3, padding=1, bias=False), module.BatchNorm2d(8), nn.ReLU()]
    if fused:
        first = [fastconv.ConvBNReLU2d(3, 8, 3, padding=1)]
    return nn.Sequential(
        *first,
        module.MaxPool2d(2),
        module.Conv2d(8, 16, 3, stride=2),
        module.AvgPool2d(2, 1),
        module.AdaptiveAvgPool2d(2),
    )


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("fused", [True, False])
def test_channels_last_goes_through_a_network(fused, training, backend):
    net = network(fastconv, fused).to(backend.device).train(training)
    x = torch.randn(2, 3, 16, 16, device=backend.device)
    plain = net(x)
    assert plain.is_contiguous()
    if training:
        net.load_state_dict(net.state_dict())
    last = net.to(memory_format=torch.channels_last)
    conv = next(
        layer for layer in last if type(layer) is fastconv.Conv2d and layer.stride == (2, 2)
    )
    assert conv.weight.is_contiguous(memory_format=torch.channels_last)
    seen = []
    for layer in last:
        layer.register_forward_hook(lambda m, i, out: seen.append(out))
    out = last(x.to(memory_format=torch.channels_last))
    for t in seen:
        assert t.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(out, plain, rtol=1e-4, atol=1e-5)
    # A channels_last weight alone: torch's convolution then gives channels_last too.
    y = plain.new_ones(1, 8, 6, 6)
    expected = nn.functional.conv2d(y, conv.weight, conv.bias, 2)
    same(conv(y), expected, rtol=1e-4, atol=1e-5)


# Conv, BatchNorm, residual, activation as one layer.


FUSED = {
    "plain": ((3, 8, 3), {}),
    "bias": ((3, 8, 3), {"bias": True}),
    "stride, padding": ((3, 8, 3, 2, 1), {}),
    "groups, dilation": ((4, 8, 3), {"groups": 2, "dilation": 2, "padding": 2}),
    "1x1": ((3, 8, 1), {"eps": 1e-3, "momentum": 0.3}),
    "'same', even": ((3, 8, (2, 4)), {"padding": "same"}),
    "momentum=None": ((3, 8, 3), {"momentum": None}),
    "recompute": ((3, 8, 3), {"recompute": True}),
    **{f"{a}": ((3, 8, 3), {"activation": a, "padding": 1})
       for a in ("relu6", "leaky_relu", "silu", "hardswish", "sigmoid", None)},
}  # fmt: skip


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("with_residual", [True, False], ids=["residual", "plain"])
@pytest.mark.parametrize("name", FUSED)
def test_fused_is_its_parts(name, with_residual, training, backend):
    places = list(FUSED).index(name), with_residual, 2 * training
    ways = itertools.product((True, False), FORMATS)
    for grad, layout in in_turn(ways, interpreted(backend), *places):
        check_fused(name, with_residual, training, grad, layout, backend)


def check_fused(name, with_residual, training, grad, layout, backend):
    args, options = FUSED[name]
    layer = fastconv.ConvBNReLU2d(*args, **options)
    for t in [*layer.bn.parameters(), layer.bn.running_mean, layer.bn.running_var]:
        t.data = torch.rand(8) + 0.5
    layer.to(backend.device).train(training)
    parts = unfused(layer)
    parts.parts.to(backend.device)
    x = torch.randn(2, args[0], 9, 8).contiguous(memory_format=FORMATS[layout])
    x = x.to(backend.device)
    with torch.no_grad():
        size = parts.parts[0](x).shape
    residual = torch.randn(size, device=x.device) if with_residual else None
    with torch.set_grad_enabled(grad):
        ours, theirs = layer(x, residual), parts(x, residual)
    same(ours, theirs, rtol=1e-4, atol=1e-5)
    for a, b in zip(layer.buffers(), parts.parts.buffers(), strict=True):
        torch.testing.assert_close(a, b)
    if grad:
        ours.sin().sum().backward()
        theirs.sin().sum().backward()
        for a, b in zip(layer.parameters(), parts.parts.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-3, atol=1e-4)


def test_fused_state_dict_keys_and_order():
    keys = [f"bn.{k}" for k in nn.BatchNorm2d(1).state_dict()]
    assert list(fastconv.ConvBNReLU2d(1, 2, 3).state_dict()) == ["conv.weight", *keys]
    biased = fastconv.ConvBNReLU2d(1, 2, 3, bias=True)
    assert list(biased.state_dict()) == ["conv.weight", "conv.bias", *keys]
    assert keys == [
        "bn.weight", "bn.bias", "bn.running_mean", "bn.running_var", "bn.num_batches_tracked",
    ]  # fmt: skip
    assert type(biased.conv) is fastconv.Conv2d and type(biased.bn) is fastconv.BatchNorm2d
    assert "relu" in repr(biased)
    plain = nn.ModuleDict({"conv": nn.Conv2d(1, 2, 3), "bn": nn.BatchNorm2d(2)})
    plain.load_state_dict(biased.state_dict())
    biased.load_state_dict(plain.state_dict())


def test_fused_signature():
    parameters = inspect.signature(fastconv.ConvBNReLU2d).parameters
    assert list(parameters)[:7] == [
        "in_channels", "out_channels", "kernel_size", "stride", "padding", "dilation", "groups",
    ]  # fmt: skip
    keywords = {k: p.default for k, p in parameters.items() if p.kind is p.KEYWORD_ONLY}
    assert keywords == {
        "bias": False, "eps": 1e-5, "momentum": 0.1, "activation": "relu", "recompute": False,
        "device": None, "dtype": None,
    }  # fmt: skip


def test_fused_counts_batches_in_training_alone(backend):
    layer = fastconv.ConvBNReLU2d(3, 4, 3).to(backend.device)
    x = torch.randn(2, 3, 5, 5, device=backend.device)
    layer(x)
    layer.eval()(x)
    assert layer.bn.num_batches_tracked == 1
    assert layer.bn.running_mean.grad_fn is None


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_without_statistics_uses_the_batchs(training, backend):
    """A BatchNorm that tracks nothing is never folded."""
    layer = fastconv.ConvBNReLU2d(3, 4, 3)
    layer.bn = fastconv.BatchNorm2d(4, track_running_stats=False)
    layer.to(backend.device).train(training)
    x = torch.randn(2, 3, 5, 5, device=backend.device)
    expected = torch.relu(layer.bn(layer.conv(x)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_fused_without_affine_parameters(training, backend):
    layer = fastconv.ConvBNReLU2d(3, 4, 3)
    layer.bn = fastconv.BatchNorm2d(4, affine=False)
    layer.to(backend.device).train(training)
    x = torch.randn(2, 3, 5, 5, device=backend.device)
    expected = copy.deepcopy(layer)
    expected = torch.relu(expected.bn(expected.conv(x)))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_fused_in_inference_is_one_operator(backend):
    if backend.name == "aten":
        pytest.skip("aten is forced")
    layer = fastconv.ConvBNReLU2d(3, 4, 3, padding=1).to(backend.device).eval()
    x, residual = (torch.randn(1, c, 8, 8, device=backend.device) for c in (3, 4))
    with torch.no_grad():
        layer(x, residual)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            layer(x, residual)
    ours = [e for e in profile.key_averages() if e.key.startswith("fastconv::")]
    assert sum(e.count for e in ours) == 1, [(e.key, e.count) for e in ours]


# autocast


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("input_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CLASSES)
def test_autocast_gives_torchs_dtypes(name, input_dtype, dtype):
    args = {"Conv2d": (3, 4, 3), "BatchNorm2d": (3,)}.get(name, (2,))
    ours, theirs = twins(name, *args)
    x = torch.randn(2, 3, 6, 6).to(input_dtype)
    results = []
    for layer in (ours, theirs):

        def run(layer=layer):
            leaf = x.clone().requires_grad_()
            with torch.autocast("cpu", dtype=dtype):
                out = layer(leaf)
            out.float().sum().backward()
            return out, leaf.grad, [p.grad for p in layer.parameters()]

        results.append(outcome(run))
    (got, error), (expected, refused) = results
    assert type(error) is type(refused), f"{error!r}, torch's {refused!r}"
    if refused is None:
        assert got[0].dtype is expected[0].dtype
        assert got[1].dtype is expected[1].dtype
        assert [g.dtype for g in got[2]] == [g.dtype for g in expected[2]]
        torch.testing.assert_close(got[0], expected[0], rtol=3e-2, atol=3e-2)


def test_autocast_leaves_float64_and_disabled_regions_alone():
    layer = fastconv.Conv2d(3, 4, 3)
    x = torch.randn(1, 3, 5, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype is torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype is torch.float32
        theirs, refused = outcome(nn.Conv2d(3, 4, 3).double(), x.double())
        got, error = outcome(copy.deepcopy(layer).double(), x.double())
        assert type(error) is type(refused)
        if refused is None:
            assert got.dtype is theirs.dtype


@pytest.mark.parametrize("grad", [True, False])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_autocast_of_the_fused_layer(training, grad):
    layer = fastconv.ConvBNReLU2d(3, 4, 3).train(training)
    parts = unfused(layer)
    x = torch.randn(2, 3, 6, 6)
    with torch.set_grad_enabled(grad), torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = layer(x), parts(x)
    assert ours.dtype is theirs.dtype
    torch.testing.assert_close(ours, theirs, rtol=3e-2, atol=3e-2)


# What else a module goes through.


def test_training_a_network_gives_torchs_numbers(backend):
    ours, theirs = network(fastconv).to(backend.device), network(nn).to(backend.device)
    theirs.load_state_dict(ours.state_dict())
    optimisers = [
        torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-3)
        for net in (ours, theirs)
    ]
    losses = ([], [])
    for step in range(8):
        torch.manual_seed(step)
        x = torch.randn(4, 3, 16, 16, device=backend.device)
        for net, optimiser, history in zip((ours, theirs), optimisers, losses, strict=True):
            optimiser.zero_grad()
            loss = (net(x) - 0.5).square().mean()
            loss.backward()
            optimiser.step()
            history.append(loss.item())
    assert losses[0] == pytest.approx(losses[1], rel=1e-3)
    assert losses[0][-1] < losses[0][0]


def test_torch_compile_keeps_the_graph_whole():
    """The eager backend: Dynamo traces everything, nothing needs a compiler."""
    net = network(fastconv, fused=True).eval()
    x = torch.randn(1, 3, 16, 16)
    compiled = torch.compile(net, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), net(x))
    net.train()
    torch.testing.assert_close(compiled(x).shape, net(x).shape)


@pytest.mark.parametrize("fused", [True, False])
def test_torch_export_and_fx(fused):
    net = network(fastconv, fused).eval()
    x = torch.randn(2, 3, 16, 16)
    exported = torch.export.export(net, (x,))
    torch.testing.assert_close(exported.module()(x), net(x))

    class Tracer(torch.fx.Tracer):
        """Takes our layers as one node each, as torch.fx takes those of torch.nn."""

        def is_leaf_module(self, module, name):
            return type(module).__module__.startswith(("fastconv.", "torch.nn."))

    graph = torch.fx.GraphModule(net, Tracer().trace(net))
    torch.testing.assert_close(graph(x), net(x))
    without_norm = torch.nn.Sequential(*[m for m in net if not hasattr(m, "running_mean")][-4:])
    traced = torch.fx.symbolic_trace(without_norm)
    y = torch.randn(1, 8, 12, 12)
    torch.testing.assert_close(traced(y), without_norm(y))


def test_functionals_can_be_traced_and_overridden():
    """As torch's: an argument with __torch_function__ gets the call."""
    seen = []

    class Tracer(torch.Tensor):
        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            seen.append(str(function))
            return super().__torch_function__(function, types, args, kwargs or {})

    x = torch.randn(1, 2, 5, 5).as_subclass(Tracer)
    w = torch.randn(3, 2, 3, 3)
    assert isinstance(fastconv.functional.conv2d(x, w), Tracer)
    assert isinstance(fastconv.functional.max_pool2d(x, 2), Tracer)
    assert any("conv2d" in name for name in seen)


def test_torch_jit_trace():
    net = network(fastconv).eval()
    x = torch.randn(1, 3, 16, 16)
    traced = torch.jit.trace(net, x)
    torch.testing.assert_close(traced(x + 1), net(x + 1))


def test_parametrizations_and_hooks():
    layer = torch.nn.utils.parametrizations.weight_norm(fastconv.Conv2d(3, 4, 3))
    torch.manual_seed(0)
    peer = torch.nn.utils.parametrizations.weight_norm(nn.Conv2d(3, 4, 3))
    peer.load_state_dict(layer.state_dict())
    x = torch.randn(1, 3, 6, 6)
    torch.testing.assert_close(layer(x), peer(x), rtol=1e-4, atol=1e-5)


def test_share_memory_and_a_second_process():
    done = run_python("""
        import torch, fastconv
        torch.multiprocessing.set_start_method("fork")
        layer = fastconv.Conv2d(1, 1, 3).share_memory()
        x = torch.ones(1, 1, 8, 8)
        torch.set_num_threads(1)
        expected = layer(x).sum().item()
        def child(q):
            q.put(layer(x).sum().item())
        q = torch.multiprocessing.SimpleQueue()
        p = torch.multiprocessing.Process(target=child, args=(q,))
        p.start(); got = q.get(); p.join()
        print(got == expected)
    """)
    assert done.stdout.strip() == "True", done.stderr
