#!/usr/bin/env bash
# timm's model.num_features is not the width of what create_model(name, num_classes=0) returns: num_features is the width of forward_features, and some
# heads go on to another width, wider or (fasternet_l) narrower, which num_classes=0 keeps. head_hidden_size is the width of the output for each model
# here. On torch's meta device a forward pass tells the width without computing or allocating anything.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check timm==1.0.31 torch==2.15.0 torchvision==0.29.2 numpy==2.4.6
"$here/env/bin/python" - <<'PY'
import timm
import torch

print("timm", timm.__version__, "torch", torch.__version__)
expected = {  # num_features, the width of the output
    "mobilenetv3_small_100": (576, 1024),
    "vgg11": (512, 4096),
    "efficientvit_b0": (128, 1280),
    "hgnetv2_b0": (1024, 2048),
    "fasternet_l": (1536, 1280),
    "resnet18": (512, 512),
    "vit_tiny_patch16_224": (192, 192),
}
for name, found in expected.items():
    with torch.device("meta"), torch.no_grad():
        model = timm.create_model(name, num_classes=0).eval()
        images = torch.zeros(2, 3, 224, 224)
        pooled, features = model(images), model.forward_features(images)
    print(f"{name}: num_features {model.num_features}, output {tuple(pooled.shape)} on {pooled.device}, head_hidden_size {model.head_hidden_size}")
    assert (model.num_features, pooled.shape[1]) == found and pooled.ndim == 2, "this has changed"
    assert model.head_hidden_size == pooled.shape[1], "this has changed"
    assert model.num_features == features.shape[2 if features.ndim == 3 else 1], "this has changed"
PY
echo "as found"
