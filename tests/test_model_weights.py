"""Pretrained weights of the networks: torchvision's, loaded strictly, or refused with a reason."""

import warnings

import pytest
import torch

from fastconv import models
from fastconv.models import pretrained
from networks import PARAMETERS, count, on_meta, theirs
from zoo import torchvision

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def download(monkeypatch):
    """In place of torchvision's: hands out `download.state`, and remembers what it was asked."""

    def fake(url, *args, **options):
        fake.calls.append((url, args, options))
        return fake.state

    fake.calls = []
    monkeypatch.setattr(torchvision.models._api, "load_state_dict_from_url", fake)
    return fake


@pytest.mark.parametrize(
    "spelling",
    [
        torchvision.models.ResNet18_Weights.IMAGENET1K_V1,
        "DEFAULT",
        "IMAGENET1K_V1",
        "ResNet18_Weights.IMAGENET1K_V1",
    ],
    ids=str,
)
def test_weights_are_torchvisions(spelling, download):
    source = theirs("resnet18").eval()
    download.state = source.state_dict()
    model = models.resnet18(weights=spelling, progress=False).eval()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, download.state[key]), key
    url = torchvision.models.ResNet18_Weights.DEFAULT.url
    assert download.calls == [(url, (), {"progress": False, "check_hash": True})]


def test_weights_are_loaded_strictly(download):
    download.state = theirs("resnet18").state_dict()
    del download.state["bn1.bias"]
    with pytest.raises(RuntimeError, match="Missing key.*bn1.bias"):
        models.resnet18(weights="DEFAULT")


@pytest.mark.parametrize("old", [{"pretrained": True}, {"weights": True}], ids=str)
def test_the_old_spelling_warns(old, download):
    download.state = theirs("resnet18").state_dict()
    with pytest.warns(UserWarning, match="resnet18: .* is deprecated.*weights='IMAGENET1K_V1'"):
        model = models.resnet18(**old)
    assert torch.equal(model.conv1.weight, download.state["conv1.weight"])
    with pytest.warns(UserWarning, match="weights=None"):
        models.resnet18(**dict.fromkeys(old, False))
    assert len(download.calls) == 1
    with pytest.raises(TypeError, match="weights or pretrained, not both"):
        models.resnet18(weights="DEFAULT", pretrained=True)


@pytest.mark.parametrize("name", PARAMETERS)
def test_every_networks_weights_are_found(name, monkeypatch):
    loaded = []
    monkeypatch.setattr(pretrained, "load", lambda model, weights, progress: loaded.append(weights))
    model = on_meta(name, weights="DEFAULT")
    assert loaded == [torchvision.models.get_model_weights(name).DEFAULT]
    assert count(model) == (6_624_904 if name == "googlenet" else PARAMETERS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        on_meta(name, pretrained=True)
    assert loaded[1] is torchvision.models.get_model_weights(name).IMAGENET1K_V1


def test_weights_of_features_alone(monkeypatch):
    monkeypatch.setattr(pretrained, "load", lambda model, weights, progress: None)
    model = on_meta("vgg16", weights="IMAGENET1K_FEATURES", num_classes=5)
    assert model.classifier[-1].out_features == 5


def test_googlenets_weights(download):
    source = theirs("googlenet").eval()
    download.state = source.state_dict()
    model = models.googlenet(weights="DEFAULT").eval()
    assert (model.transform_input, model.aux_logits, model.aux1) == (True, False, None)
    images = torch.randn(1, 3, 32, 32)
    source.transform_input = True
    torch.testing.assert_close(model(images), source(images), rtol=1e-4, atol=1e-5)
    with pytest.warns(UserWarning, match="auxiliary classifiers are not pretrained"):
        model = models.googlenet(weights="DEFAULT", aux_logits=True, transform_input=False)
    assert model.aux_logits and not model.transform_input
    assert torch.equal(model.aux1.fc1.weight, download.state["aux1.fc1.weight"])


@pytest.mark.parametrize(
    "name, config, error, message",
    [
        ("resnet18", {"weights": "DEFAULT", "num_classes": 10}, ValueError,
         "num_classes must be 1000 for ResNet18_Weights.IMAGENET1K_V1, but got 10"),
        ("vgg16", {"weights": "DEFAULT", "in_channels": 1}, ValueError,
         "in_channels must be 3 for VGG16_Weights.IMAGENET1K_V1, but got 1"),
        ("googlenet", {"weights": "DEFAULT", "num_classes": 2}, ValueError,
         "num_classes must be 1000"),
        ("alexnet", {"weights": "V7"}, ValueError,
         "alexnet has no weights called 'V7': there are IMAGENET1K_V1, DEFAULT"),
        ("resnet18", {"weights": "ResNet50_Weights.DEFAULT"}, ValueError,
         "resnet18 has no weights called 'ResNet50_Weights.DEFAULT'"),
        ("resnet18", {"weights": torchvision.models.ResNet50_Weights.DEFAULT}, TypeError,
         "a member of ResNet18_Weights, but got ResNet50_Weights.IMAGENET1K_V2"),
        ("resnet18", {"weights": 10}, TypeError, "weights must be None, .* but got 10"),
        ("vgg16_c", {"weights": "DEFAULT"}, ValueError, "vgg16_c has no pretrained weights"),
        ("vgg11_lrn", {"pretrained": True}, ValueError, "vgg11_lrn has no pretrained weights"),
        ("alexnet", {"lrn": True, "weights": "DEFAULT"}, ValueError,
         r"alexnet\(lrn=True\) has no pretrained weights"),
        ("googlenet", {"paper": True, "weights": "DEFAULT"}, ValueError,
         r"googlenet\(paper=True\) has no pretrained weights"),
    ],
)  # fmt: skip
def test_weights_that_do_not_fit_are_refused(name, config, error, message, download):
    with pytest.raises(error, match=message):
        models.get_model(name, **config)
    assert not download.calls


class Broken:
    """A torchvision whose import fails, as one that was built for another torch does."""

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "torchvision":
            raise RuntimeError("operator torchvision::nms\ndoes not exist")


@pytest.mark.parametrize("name", ["resnet18", "googlenet"])
def test_a_torchvision_that_cannot_be_imported(name, monkeypatch):
    sys = pretrained.importlib.sys
    for module in [m for m in sys.modules if m.split(".")[0] == "torchvision"]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "meta_path", [Broken(), *sys.meta_path])
    message = f"the weights of {name} come from torchvision, which cannot be imported .RuntimeError"
    with pytest.raises(ImportError, match=message) as caught:
        models.get_model(name, weights="DEFAULT")
    assert "\n" not in str(caught.value)
    monkeypatch.setitem(sys.modules, "torchvision", None)  # as where it is not installed
    with pytest.raises(ImportError, match=r"cannot be imported \(.*torchvision"):
        models.get_model(name, weights="DEFAULT")
    assert count(on_meta(name, weights=None)) == PARAMETERS[name], "needed for weights alone"
