"""torchvision and timm: networks whose authors never heard of fastconv."""

import torch


def _import_torchvision():
    """torchvision's wheels are built for CUDA. Beside a CPU build of torch its operators cannot be
    loaded, and its import ends at the first two that it describes to torch. Its networks need none
    of them, so that declaring the two is enough."""
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms does not exist" not in str(error):
            raise
        declared = torch.library.Library("torchvision", "FRAGMENT")
        for name in ("nms", "qnms"):
            declared.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        import torchvision

        torchvision.declared = declared  # lives as long as the module, or the operators go
    return torchvision


torchvision = _import_torchvision()

import timm  # noqa: E402, F401  (it imports torchvision)
