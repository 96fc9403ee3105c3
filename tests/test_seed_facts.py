"""The worked examples that tutorials print: exact, functional and modules, on every backend."""

import pytest
import torch

import fastconv
import fastconv.functional as ff

BLOCK = [[19, 25], [37, 43]]
LAPLACIAN_IN = [[1, 2, 3, 0, 1], [0, 1, 2, 3, 1], [3, 0, 1, 2, 0], [1, 2, 3, 0, 1], [0, 1, 2, 3, 0]]
LAPLACIAN_OUT = [
    [5, 9, 16, -10, 4],
    [-7, -4, 4, 14, 2],
    [20, -13, -5, 5, -7],
    [2, 5, 13, -12, 3],
    [-4, 0, 7, 18, -4],
]
ALL_MINUS_ONE = [[-1, -1, -1], [-1, 8, -1], [-1, -1, -1]]
IDENTITY = [[1, 0, 0], [0, 1, 0], [0, 0, 1]]
ZERO_TO_8 = [[0, 1, 2], [3, 4, 5], [6, 7, 8]]
ONE_TO_9 = [[1, 2, 3], [4, 5, 6], [7, 8, 9]]
KERNEL = [[0, 1], [2, 3]]

CONVOLUTIONS = {
    "cross-correlation": (ZERO_TO_8, KERNEL, {}, BLOCK),
    "with padding 1": (
        *(ZERO_TO_8, KERNEL, {"padding": 1}),
        [[0, 3, 8, 4], [9, 19, 25, 10], [21, 37, 43, 16], [6, 7, 8, 0]],
    ),
    "padding 1, stride (3, 2)": (
        *(ZERO_TO_8, KERNEL, {"padding": 1, "stride": (3, 2)}),
        [[0, 8], [6, 8]],
    ),
    "diagonal, valid": (ONE_TO_9, IDENTITY, {}, [[15]]),
    "diagonal, padding 1": (
        *(ONE_TO_9, IDENTITY, {"padding": 1}),
        [[6, 8, 3], [12, 15, 8], [7, 12, 14]],
    ),
    "Laplacian": (LAPLACIAN_IN, ALL_MINUS_ONE, {"padding": 1}, LAPLACIAN_OUT),
}


def image(values, backend, dtype=torch.float32):
    return torch.tensor(values, dtype=dtype, device=backend.device)[None, None]


def striped(backend):
    """6 x 8, ones, columns 2 to 5 zero; and its vertical edges."""
    x = torch.ones(6, 8)
    x[:, 2:6] = 0
    y = torch.zeros(6, 7)
    y[:, 1], y[:, 5] = 1, -1
    return x[None, None].to(backend.device), y[None, None].to(backend.device)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("example", CONVOLUTIONS)
def test_worked_convolutions(example, dtype, backend):
    values, kernel, options, expected = CONVOLUTIONS[example]
    x, w = image(values, backend, dtype), image(kernel, backend, dtype)
    y = image(expected, backend, dtype)
    assert torch.equal(ff.conv2d(x, w, **options), y)
    assert torch.equal(ff.conv2d(x[0], w, **options), y[0])
    layer = fastconv.Conv2d(1, 1, w.shape[2:], bias=False, **options).to(x)
    layer.weight.data.copy_(w)
    assert torch.equal(layer(x), y)


def test_vertical_edges(backend):
    x, y = striped(backend)
    assert torch.equal(ff.conv2d(x, image([[1, -1]], backend)), y)
    # Transposed, the edges are horizontal and this kernel sees none.
    transposed = ff.conv2d(x.transpose(2, 3), image([[1, -1]], backend))
    assert torch.equal(transposed, torch.zeros_like(transposed))


def test_learn_the_kernel_from_the_pair(backend):
    x, y = striped(backend)
    good = 0
    for seed in range(20):
        torch.manual_seed(seed)
        layer = fastconv.Conv2d(1, 1, (1, 2), bias=False).to(backend.device)
        for _ in range(10):
            loss = ((layer(x) - y) ** 2).sum()
            layer.zero_grad()
            loss.backward()
            with torch.no_grad():
                layer.weight -= 0.03 * layer.weight.grad
        target = torch.tensor([1.0, -1.0], device=backend.device)
        close = (layer.weight.flatten() - target).abs().max() < 0.15
        good += bool(((layer(x) - y) ** 2).sum() < 0.1 and close)
    assert good > 10, f"{good} of 20 starts learned the kernel"


def test_learning_equals_torch_step_by_step(backend):
    x, y = striped(backend)
    layer = fastconv.Conv2d(1, 1, (1, 2), bias=False).to(backend.device)
    peer = torch.nn.Conv2d(1, 1, (1, 2), bias=False).to(backend.device)
    peer.load_state_dict(layer.state_dict())
    for _ in range(10):
        for net in (layer, peer):
            net.zero_grad()
            ((net(x) - y) ** 2).sum().backward()
            with torch.no_grad():
                net.weight -= 0.03 * net.weight.grad
        torch.testing.assert_close(layer.weight, peer.weight, rtol=1e-5, atol=1e-6)


def test_true_convolution_is_the_flipped_kernel(backend):
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (1, 1, 6, 7), generator=generator).float().to(backend.device)
    w = torch.randint(-4, 5, (1, 1, 3, 2), generator=generator).float().to(backend.device)
    correlated = ff.conv2d(x, w.flip(2, 3), padding=(2, 1))
    by_definition = torch.zeros(8, 8, device=backend.device)
    for i in range(3):
        for j in range(2):
            by_definition[i : i + 6, j : j + 7] += w[0, 0, i, j] * x[0, 0]
    assert torch.equal(correlated[0, 0], by_definition)


def test_learning_finds_the_flipped_kernel_too(backend):
    x, y = striped(backend)
    flipped_target = ff.conv2d(x, image([[-1, 1]], backend))
    assert torch.equal(flipped_target, -y)
    weight = torch.zeros(1, 1, 1, 2, device=backend.device, requires_grad=True)
    for _ in range(30):
        (grad,) = torch.autograd.grad(((ff.conv2d(x, weight) + y) ** 2).sum(), weight)
        weight = (weight - 0.03 * grad).detach().requires_grad_()
    torch.testing.assert_close(weight, image([[-1, 1]], backend), atol=0.05, rtol=0)


def test_rgba_to_grey(backend):
    x = torch.arange(4 * 5 * 6, device=backend.device).reshape(1, 4, 5, 6).float()
    layer = fastconv.Conv2d(4, 1, 1, bias=False).to(backend.device)
    weights = torch.tensor([0.25, 0.5, 0.125, 0.0], device=backend.device)
    layer.weight.data.copy_(weights.reshape(1, 4, 1, 1))
    assert torch.equal(layer(x)[0, 0], (weights[:, None, None] * x[0]).sum(0))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_two_stacked_3x3_see_5x5(memory_format, backend):
    x = torch.zeros(1, 1, 11, 11, device=backend.device)
    x = x.to(memory_format=memory_format).requires_grad_()
    w = torch.ones(1, 1, 3, 3, device=backend.device)
    out = ff.conv2d(ff.conv2d(x, w, padding=1), w, padding=1)
    (grad,) = torch.autograd.grad(out[0, 0, 5, 5], x)
    rows, columns = grad[0, 0].nonzero(as_tuple=True)
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 7, 3, 7)
    assert torch.equal(grad[0, 0, 5, 3:8].cpu(), torch.tensor([3.0, 6, 9, 6, 3]))


@pytest.mark.parametrize(
    "kind, expected",
    [
        ("max", [[6, 8], [14, 16]]),
        ("avg", [[3.5, 5.5], [11.5, 13.5]]),
    ],
)
def test_pooling_of_1_to_16(kind, expected, backend):
    x = image(torch.arange(1, 17).reshape(4, 4).tolist(), backend)
    function = {"max": ff.max_pool2d, "avg": ff.avg_pool2d}[kind]
    layer = {"max": fastconv.MaxPool2d, "avg": fastconv.AvgPool2d}[kind]
    for out in (function(x, 2, 2), function(x, (2, 2)), layer(2, 2)(x), layer((2, 2), stride=2)(x)):
        assert torch.equal(out, image(expected, backend))


def test_pooling_floor_and_ceil(backend):
    x = image([[3, 1, 4], [2, 5, 7], [9, 6, 8]], backend)
    assert torch.equal(ff.max_pool2d(x, 2, 2), image([[5]], backend))
    ceil = fastconv.MaxPool2d(2, 2, ceil_mode=True)
    assert torch.equal(ceil(x), image([[5, 7], [9, 8]], backend))


def test_global_average_pooling(backend):
    x = torch.arange(24, device=backend.device).reshape(1, 2, 3, 4).float()
    expected = torch.tensor([5.5, 17.5], device=backend.device).reshape(1, 2, 1, 1)
    assert torch.equal(fastconv.AdaptiveAvgPool2d(1)(x), expected)
    assert torch.equal(ff.adaptive_avg_pool2d(x, (1, 1)), expected)


def test_sizes(backend):
    def ones(*size):
        return torch.ones(size, device=backend.device)

    with torch.no_grad():
        conv = fastconv.Conv2d(1, 1, 3, padding=1).to(backend.device)
        assert conv(ones(1, 1, 5, 5)).shape == (1, 1, 5, 5)
        assert fastconv.MaxPool2d(2)(ones(1, 16, 28, 28)).shape == (1, 16, 14, 14)
        assert fastconv.MaxPool2d(2, 2, 1)(ones(1, 3, 32, 32)).shape == (1, 3, 17, 17)
        assert fastconv.MaxPool2d(2)(ones(1, 3, 224, 224)).shape == (1, 3, 112, 112)


@pytest.mark.parametrize("kernel", [1, 2, 3, (3, 2)])
@pytest.mark.parametrize("stride", [1, 2, (2, 3)])
@pytest.mark.parametrize("padding", [0, 1, (1, 0)])
@pytest.mark.parametrize("dilation", [1, 2, (1, 2)])
def test_output_size_formula(kernel, stride, padding, dilation, backend):
    def pair(value):
        return (value, value) if isinstance(value, int) else value

    expected = [
        (size + 2 * p - d * (k - 1) - 1) // s + 1
        for size, k, s, p, d in zip(
            (9, 8), pair(kernel), pair(stride), pair(padding), pair(dilation), strict=True
        )
    ]
    x = torch.ones(1, 2, 9, 8, device=backend.device)
    layer = fastconv.Conv2d(2, 3, kernel, stride, padding, dilation).to(backend.device)
    assert list(layer(x).shape) == [1, 3, *expected]
    if all(2 * p <= k for p, k in zip(pair(padding), pair(kernel), strict=True)):
        pool = fastconv.MaxPool2d(kernel, stride, padding, dilation)
        assert list(pool(x).shape) == [1, 2, *expected]


def test_down_and_up_sampling(backend):
    x = torch.rand(1, 16, 28, 28, device=backend.device)
    for factor, size in ((0.5, 14), (2, 56)):
        out = ff.interpolate(x, scale_factor=factor, mode="bilinear", align_corners=False)
        assert out.shape == (1, 16, size, size)
        expected = torch.nn.functional.interpolate(x, scale_factor=factor, mode="bilinear")
        assert torch.equal(out, expected)


def test_relu_is_torch(backend):
    x = torch.tensor([-1.0, 0.0, 2.0, float("nan"), -float("inf")], device=backend.device)
    expected = torch.relu(x)
    torch.testing.assert_close(ff.relu(x), expected, rtol=0, atol=0, equal_nan=True)
    y = x.clone()
    assert ff.relu(y, inplace=True) is y
    torch.testing.assert_close(y, expected, rtol=0, atol=0, equal_nan=True)
