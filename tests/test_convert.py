"""convert and revert: what a model has, it keeps."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import fastconv
from fastconv import surgery

PAIRS = [
    (nn.Conv2d, fastconv.Conv2d, (3, 4, 3)),
    (nn.MaxPool2d, fastconv.MaxPool2d, (2,)),
    (nn.AvgPool2d, fastconv.AvgPool2d, (2,)),
    (nn.AdaptiveAvgPool2d, fastconv.AdaptiveAvgPool2d, (1,)),
    (nn.BatchNorm2d, fastconv.BatchNorm2d, (3,)),
]
BOTH = pytest.mark.parametrize("inplace", [False, True])


class Standardised(nn.Conv2d):
    """A convolution with code of its own."""

    def forward(self, x):
        return self._conv_forward(x, self.weight - self.weight.mean(), self.bias)


def small():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2))


def types(model):
    return [type(module) for module in model.modules()]


@pytest.mark.parametrize("plain, ours, arguments", PAIRS)
@BOTH
def test_each_layer_even_as_the_root(plain, ours, arguments, inplace):
    layer = plain(*arguments)
    x = torch.randn(2, 3, 6, 6)
    expected = layer.eval()(x)
    converted = fastconv.convert(layer, inplace=inplace)
    assert (converted is layer) == inplace and type(converted) is ours
    assert type(layer) is (ours if inplace else plain)
    torch.testing.assert_close(converted(x), expected)
    assert type(fastconv.revert(converted)) is plain


def test_parameters_order_flags_and_attributes_stay():
    model = small()
    model[0].weight.requires_grad_(False)
    model[1].eval()
    model[0].remark = "mine"
    names = [name for name, _ in model.named_modules()]
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    converted = fastconv.convert(model, inplace=True)
    assert [name for name, _ in converted.named_modules()] == names
    after = {**dict(converted.named_parameters()), **dict(converted.named_buffers())}
    assert list(after) == list(tensors) and all(after[k] is t for k, t in tensors.items())
    assert not converted[0].weight.requires_grad and not converted[1].training
    assert converted[0].training and converted[0].remark == "mine"


def test_a_copy_shares_nothing():
    model = small()
    converted = fastconv.convert(model)
    with torch.no_grad():
        converted[0].weight.add_(1)
    assert not torch.equal(converted[0].weight, model[0].weight)
    assert types(model) == types(small())


@BOTH
def test_there_and_back_and_twice(inplace):
    model = small()
    before = types(model)
    converted = fastconv.convert(fastconv.convert(model, inplace=inplace), inplace=inplace)
    assert types(converted)[1:3] == [fastconv.Conv2d, fastconv.BatchNorm2d]
    reverted = fastconv.revert(fastconv.revert(converted, inplace=inplace), inplace=inplace)
    assert types(reverted) == before
    assert types(fastconv.revert(small())) == before


def test_shared_modules_and_parameters_stay_shared():
    conv = nn.Conv2d(3, 3, 3, padding=1)
    other = nn.Conv2d(3, 3, 3, padding=1)
    other.weight = conv.weight
    converted = fastconv.convert(nn.ModuleList([conv, nn.Sequential(conv), other]))
    assert converted[0] is converted[1][0] and converted[2].weight is converted[0].weight


def test_hooks_run_and_their_handles_still_work():
    model, calls = small(), []
    conv = model[0]
    handles = [
        conv.register_forward_pre_hook(lambda *_: calls.append("before")),
        conv.register_forward_hook(lambda *_: calls.append("after")),
        conv.register_full_backward_hook(lambda *_: calls.append("backward")),
    ]
    conv._register_state_dict_hook(lambda *_: calls.append("state_dict"))
    conv.register_load_state_dict_post_hook(lambda *_: calls.append("load"))
    fastconv.convert(model, inplace=True)
    model(torch.randn(2, 3, 8, 8, requires_grad=True)).sum().backward()
    model.load_state_dict(model.state_dict())
    assert calls == ["before", "after", "backward", "state_dict", "load"]
    for handle in handles:
        handle.remove()
    model(torch.randn(2, 3, 8, 8))
    assert len(calls) == 5


def test_subclasses_are_left_alone():
    model = nn.Sequential(Standardised(3, 4, 3), nn.LazyConv2d(4, 1), nn.SyncBatchNorm(4))
    converted = fastconv.convert(model)
    assert types(converted) == types(model)
    reasons = {entry.name: entry.reason for entry in surgery.report(converted).entries}
    assert reasons["0"] == "a subclass of Conv2d, with code of its own"


def test_a_lazy_layer_becomes_ours_once_it_is_a_layer():
    model = nn.Sequential(nn.LazyConv2d(4, 3))
    fastconv.convert(model, inplace=True)(torch.randn(1, 3, 5, 5))
    assert type(fastconv.convert(model)[0]) is fastconv.Conv2d


def test_quantisations_modules_are_left_alone():
    observed, plain = nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3)
    observed.qconfig = torch.ao.quantization.get_default_qconfig("fbgemm")
    plain.qconfig = None
    aware = torch.ao.nn.qat.Conv2d(
        3, 4, 3, qconfig=torch.ao.quantization.get_default_qat_qconfig("fbgemm")
    )
    model = nn.Sequential(torch.ao.quantization.QuantStub(), observed, aware, plain)
    converted = fastconv.convert(model)
    assert types(converted)[1:] == [*types(model)[1:-1], fastconv.Conv2d]


@pytest.mark.parametrize(
    "norm",
    [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal],
    ids=lambda norm: norm.__name__,
)
@BOTH
def test_parametrizations_go_on(norm, inplace):
    torch.manual_seed(0)
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 3))).eval()
    x = torch.randn(2, 3, 6, 6)
    keys, expected = list(model.state_dict()), model(x)
    converted = fastconv.convert(model, inplace=inplace)
    conv = converted[0]
    assert isinstance(conv, fastconv.Conv2d) and parametrize.is_parametrized(conv, "weight")
    assert isinstance(model[0], fastconv.Conv2d) == inplace, "a copy must not change its model"
    assert list(converted.state_dict()) == keys
    torch.testing.assert_close(converted(x), expected)
    again = copy.deepcopy(converted)
    torch.testing.assert_close(again(x), expected)
    back = fastconv.revert(again)
    assert not isinstance(back[0], fastconv.Conv2d)
    torch.testing.assert_close(back(x), expected)
    parametrize.remove_parametrizations(conv, "weight")
    assert type(conv) is fastconv.Conv2d
    torch.testing.assert_close(converted(x), expected)


@pytest.mark.parametrize("norm", [nn.utils.weight_norm, nn.utils.spectral_norm])
@BOTH
def test_norms_made_of_hooks_go_on(norm, inplace):
    model = nn.Sequential(norm(nn.Conv2d(3, 4, 3)), nn.ReLU())
    x = torch.randn(2, 3, 6, 6)
    model(x).sum().backward()  # leaves a computed weight, which deepcopy refuses
    model.eval()
    keys, expected = list(model.state_dict()), model(x)
    converted = fastconv.convert(model, inplace=inplace)
    assert type(converted[0]) is fastconv.Conv2d and list(converted.state_dict()) == keys
    torch.testing.assert_close(converted(x), expected)
    if norm is nn.utils.weight_norm:
        with torch.no_grad():
            converted[0].weight_g.mul_(2)
        assert not torch.allclose(converted(x), expected)


def test_it_trains_copies_and_is_saved():
    converted = fastconv.convert(small())
    converted(torch.randn(2, 3, 8, 8)).sum().backward()
    assert converted[0].weight.grad.abs().sum() > 0
    for copied in (copy.deepcopy(converted), pickle.loads(pickle.dumps(converted))):
        assert types(copied) == types(converted)
    file = io.BytesIO()
    torch.save(converted.state_dict(), file)
    file.seek(0)
    small().load_state_dict(torch.load(file, weights_only=True))


def test_inside_torch_compile():
    model = small().eval()
    x = torch.randn(2, 3, 8, 8)
    compiled = torch.compile(model, backend="eager")
    expected = compiled(x)
    converted = fastconv.convert(compiled, inplace=True)
    assert converted is compiled and type(model[0]) is fastconv.Conv2d
    torch.testing.assert_close(compiled(x), expected)
    with torch.profiler.profile() as profile:
        compiled(x)
    ran = {event.key for event in profile.key_averages()}
    assert "fastconv::conv2d" in ran and "aten::conv2d" not in ran, "compiled anew"
    copied = fastconv.convert(torch.compile(small().eval(), backend="eager"))
    assert types(copied).count(fastconv.Conv2d) == 1 and copied(x).shape == expected.shape


def test_inside_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(small())
        assert fastconv.convert(wrapped, inplace=True) is wrapped
        assert type(wrapped.module[0]) is fastconv.Conv2d
        wrapped(torch.randn(2, 3, 8, 8)).sum().backward()
        assert wrapped.module[0].weight.grad is not None
    finally:
        torch.distributed.destroy_process_group()


def test_converted_layers_run_everywhere(backend):
    model = small()
    x = torch.randn(2, 3, 7, 7)
    expected = model(x)
    model[1].reset_running_stats()
    converted = fastconv.convert(model).to(backend.device)
    torch.testing.assert_close(
        converted(x.to(backend.device)).cpu(), expected, rtol=1e-4, atol=1e-5
    )


class Uncopyable(nn.Module):
    def __deepcopy__(self, memo):
        raise ValueError("holds a socket")


@pytest.mark.parametrize("surgeon", [fastconv.convert, fastconv.revert, fastconv.fuse])
class TestErrors:
    @pytest.mark.parametrize("wrong", [None, 3, "resnet18", torch.ones(1), {}])
    def test_not_a_module(self, surgeon, wrong):
        expected = f"must be a torch.nn.Module, but got a {type(wrong).__name__}"
        with pytest.raises(TypeError, match=expected):
            surgeon(wrong)

    def test_a_class(self, surgeon):
        with pytest.raises(TypeError, match="but got the class Conv2d"):
            surgeon(nn.Conv2d)

    @pytest.mark.parametrize("inplace", [False, True])
    def test_torchscript(self, surgeon, inplace):
        traced = torch.jit.trace(nn.Conv2d(3, 4, 3).eval(), torch.ones(1, 3, 5, 5))
        with pytest.raises(TypeError, match="is compiled by TorchScript"):
            surgeon(traced, inplace=inplace)

    def test_cannot_be_copied(self, surgeon):
        model = nn.Sequential(Uncopyable(), nn.Conv2d(3, 4, 3))
        with pytest.raises(RuntimeError, match=r"cannot be copied \(holds a socket\): pass inpl"):
            surgeon(model)
        assert surgeon(model, inplace=True) is model

    def test_inplace_is_a_keyword(self, surgeon):
        with pytest.raises(TypeError, match="positional"):
            surgeon(small(), True)


def test_torchscript_inside_is_left_alone():
    traced = torch.jit.trace(nn.Conv2d(3, 4, 3).eval(), torch.ones(1, 3, 5, 5))
    model = nn.Sequential(traced, nn.Conv2d(4, 4, 1)).eval()
    x = torch.randn(1, 3, 5, 5)
    for surgeon in (fastconv.convert, fastconv.fuse):
        changed = surgeon(model)
        assert type(changed[1]) is fastconv.Conv2d
        torch.testing.assert_close(changed(x), model(x))
