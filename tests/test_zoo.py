"""convert and fuse on networks whose authors never heard of fastconv: torchvision's and timm's."""

from dataclasses import dataclass, field

import pytest
import torch
from torch import nn

import fastconv
import support
import zoo
from fastconv import surgery


@dataclass(frozen=True)
class Network:
    """A network of one of the libraries.

    Attributes:
        name: as the library's constructor by name takes it.
        size: of the square input.
        fused: kernels of more than one layer that fuse() must find, at least.
        left: convolutions that must run alone, at most.
        options: further arguments of the constructor.
        part: the attribute to take in place of the whole network.
    """

    name: str
    size: int
    fused: int
    left: int
    options: dict = field(default_factory=dict)
    part: str = ""

    def __str__(self):
        return f"{self.name}.{self.part}" if self.part else self.name

    def build(self):
        torch.manual_seed(1)
        library, name = self.name.split(":")
        if library == "timm":
            model = zoo.timm.create_model(name, num_classes=10, **self.options)
        else:
            model = zoo.torchvision.models.get_model(name, weights=None, **self.options)
        model = getattr(model, self.part) if self.part else model
        narrow(model)
        randomise(model)
        return model

    def images(self, dtype=torch.float32):
        return torch.randn(2, 3, self.size, self.size, dtype=dtype)


HEADLESS = {"weights_backbone": None, "num_classes": 4}
SMALL = {"num_classes": 10}
NETWORKS = [
    Network("tv:alexnet", 75, 5, 0, SMALL),
    Network("tv:vgg11", 32, 8, 0, SMALL),
    Network("tv:vgg11_bn", 32, 8, 0, SMALL),
    Network("tv:googlenet", 64, 57, 2, SMALL | {"aux_logits": True, "init_weights": False}),
    Network("tv:inception_v3", 75, 94, 0, SMALL | {"aux_logits": False, "init_weights": False}),
    Network("tv:resnet18", 32, 20, 0, SMALL),
    Network("tv:resnext50_32x4d", 32, 53, 0, SMALL),
    Network("tv:densenet121", 32, 121, 61, SMALL),
    Network("tv:mobilenet_v2", 32, 52, 0, SMALL),
    Network("tv:mobilenet_v3_small", 32, 43, 9, SMALL),
    Network("tv:mnasnet0_5", 32, 52, 0, SMALL),
    Network("tv:efficientnet_b0", 64, 81, 0, SMALL),
    Network("tv:shufflenet_v2_x0_5", 32, 56, 0, SMALL),
    Network("tv:squeezenet1_1", 48, 26, 0, SMALL),
    Network("tv:regnet_y_400mf", 64, 85, 0, SMALL),
    Network("tv:fcn_resnet50", 32, 54, 1, HEADLESS),
    Network("tv:deeplabv3_mobilenet_v3_large", 48, 61, 9, HEADLESS),
    Network("tv:lraspp_mobilenet_v3_large", 48, 57, 9, HEADLESS),
    Network("tv:ssdlite320_mobilenet_v3_large", 64, 66, 8, HEADLESS, "backbone"),
    Network("tv:fasterrcnn_mobilenet_v3_large_fpn", 48, 54, 12, HEADLESS, "backbone"),
    Network("tv:retinanet_resnet50_fpn", 48, 53, 8, HEADLESS, "backbone"),
    Network("timm:hrnet_w18_small", 32, 91, 0),
    Network("timm:repvgg_a0", 32, 61, 0),
    Network("timm:dla46_c", 32, 48, 1),
    Network("timm:xception41p", 32, 53, 43),
    Network("timm:cspresnet50", 64, 55, 0),
    Network("timm:res2net50_14w_8s", 64, 149, 0),
    Network("timm:seresnet18", 32, 36, 0),
    Network("timm:ghostnet_050", 32, 88, 7),
    Network("timm:test_nfnet", 32, 8, 0),
    Network("timm:test_byobnet", 32, 22, 0),
    Network("timm:test_efficientnet", 32, 17, 0),
    Network("timm:test_resnet", 32, 15, 0),
    Network("timm:convnext_atto", 32, 0, 40),
    Network("timm:resnetv2_18", 32, 26, 4),
    Network("timm:tinynet_e", 32, 51, 0),
    Network("timm:ese_vovnet19b_slim_dw", 32, 22, 18),
    Network("timm:test_vit", 160, 0, 1),
    Network("timm:efficientvit_b0", 32, 38, 12),
    Network("timm:mixnet_s", 32, 72, 82),
    Network("timm:lcnet_035", 32, 30, 2),
]


def narrow(model):
    """VGG's and AlexNet's heads with 32 features for 4096: nothing is fused there."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and 4096 in (module.in_features, module.out_features):
            sizes = (32 if n == 4096 else n for n in (module.in_features, module.out_features))
            model.set_submodule(name, nn.Linear(*sizes))


def randomise(model):
    """Statistics and factors that a wrong fold would not survive."""
    for module in model.modules():
        if getattr(module, "running_mean", None) is not None:
            module.running_mean.uniform_(-0.3, 0.3)
            module.running_var.uniform_(0.6, 1.5)
            if module.weight is not None:
                nn.init.uniform_(module.weight, 0.7, 1.4)
                nn.init.uniform_(module.bias, -0.3, 0.3)


def tensors(output):
    if isinstance(output, torch.Tensor):
        return [output]
    values = output.values() if isinstance(output, dict) else output
    return [t for value in values for t in tensors(value)]


def relative_error(got, wanted):
    """The largest over the outputs: difference over the largest value."""
    pairs = list(zip(tensors(got), tensors(wanted), strict=True))
    assert pairs and all(a.shape == b.shape for a, b in pairs)
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def loss_and_gradients(model, images):
    torch.manual_seed(5)  # dropout draws the same
    loss = sum(t.square().mean() for t in tensors(model(images)))
    wanted = [p for p in model.parameters() if p.requires_grad]
    found = torch.autograd.grad(loss, wanted, allow_unused=True)
    assert torch.isfinite(loss)
    return torch.cat([loss.detach().flatten(), *(g.flatten() for g in found if g is not None)])


@pytest.fixture(params=NETWORKS, ids=str)
def network(request, one_thread):
    return request.param


def test_converted_it_computes_the_same(network):
    model = network.build().eval()
    keys, images = list(model.state_dict()), network.images()
    converted = fastconv.convert(model)
    assert list(converted.state_dict()) == keys and list(model.state_dict()) == keys
    exact = [m for m in model.modules() if type(m) in surgery.conversion.OURS]
    ours = [m for m in converted.modules() if type(m) in surgery.conversion.TORCHS]
    assert len(exact) == len(ours) > 0
    assert not [m for m in converted.modules() if type(m) in surgery.conversion.OURS]
    with torch.inference_mode():
        assert relative_error(converted(images), model(images)) < 1e-4
    reverted = fastconv.revert(converted)
    assert [type(m) for m in reverted.modules()] == [type(m) for m in model.modules()]
    support.coverage["networks converted: outputs and keys the same"] += 1


def test_converted_it_learns_the_same(network):
    model = network.build().double().train()
    images = network.images(torch.float64)
    converted = fastconv.convert(model)
    wanted, got = (loss_and_gradients(m, images) for m in (model, converted))
    assert (got - wanted).norm() < 1e-6 * wanted.norm()
    for (name, a), b in zip(model.named_buffers(), converted.buffers(), strict=True):
        torch.testing.assert_close(a, b, msg=lambda text, name=name: f"{name}: {text}")
    support.coverage["networks converted: float64 gradients the same"] += 1


def test_fused_it_computes_the_same(network):
    model = network.build().eval()
    images = network.images()
    fused = fastconv.fuse(model)
    assert list(fused.state_dict()) == list(model.state_dict())
    with torch.inference_mode():
        got, wanted = fused(images), model(images)
    assert type(got) is type(wanted)
    assert relative_error(got, wanted) < 1e-4
    found = surgery.report(fused)
    alone = [entry for entry in found.left if entry.became == "Conv2d"]
    assert len(found.fused) >= network.fused and len(alone) <= network.left, f"\n{found}"
    support.coverage["networks fused: outputs the same"] += 1
    support.coverage["networks fused: kernels of several layers"] += len(found.fused)
    support.coverage["networks fused: convolutions left alone"] += len(alone)


def same_when_fused(model, images):
    """fuse keeps the outputs; returns its report."""
    fused = fastconv.fuse(model.eval())
    with torch.inference_mode():
        assert relative_error(fused(images), model(images)) < 1e-4
    return surgery.report(fused)


def test_frozen_norms_are_folded(one_thread):
    frozen = zoo.torchvision.ops.FrozenBatchNorm2d
    model = zoo.torchvision.models.resnet18(num_classes=10, norm_layer=frozen)
    randomise(model)
    found = same_when_fused(model, torch.randn(2, 3, 32, 32))
    assert found.counts["Conv-BN-ReLU"] == 8 and found.counts["Conv-BN-add-ReLU"] == 8
    assert found.counts["Conv-BN-ReLU-MaxPool"] == 1


def test_lists_of_features(one_thread):
    model = zoo.timm.create_model("test_resnet", features_only=True)
    randomise(model)
    assert len(same_when_fused(model, torch.randn(2, 3, 32, 32)).fused) == 15


def test_a_whole_detector_is_fused_inside(one_thread):
    """It takes a list of images: torch.fx traces no more than its parts."""
    network = Network("tv:fasterrcnn_mobilenet_v3_large_fpn", 48, 54, 12, HEADLESS)
    model = network.build().eval()
    fused = fastconv.fuse(model)
    found, images = surgery.report(fused), network.images()
    assert len([e for e in found.fused if e.name.startswith("backbone.")]) >= network.fused
    with torch.inference_mode():
        assert relative_error(fused.backbone(images), model.backbone(images)) < 1e-4


@pytest.mark.parametrize("name", ["tv:resnet18", "tv:deeplabv3_mobilenet_v3_large"])
def test_a_fused_network_still_trains(name, one_thread):
    model = next(network for network in NETWORKS if network.name == name).build()
    fused = fastconv.fuse(model).double().train()
    images = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    wanted, got = (loss_and_gradients(m, images) for m in (model.double().train(), fused))
    assert (got - wanted).norm() < 1e-6 * wanted.norm()
