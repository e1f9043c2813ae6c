#!/usr/bin/env bash
# Since timm 1.0.31 the config.json that save_for_hf writes has model_args with in_chans, num_classes and global_pool (img_size too for a vision
# transformer), also for a model created with no argument at all; 1.0.30 wrote only the model_args that the caller passed, and none otherwise. So a reader
# that did for those, create_model(cfg["architecture"], num_classes=0, **cfg.get("model_args", {})), is now a TypeError: num_classes given twice.
# timm's own loader, create_model("local-dir:FOLDER", num_classes=0), takes model_args as defaults that the caller's arguments override, and loads.
set -euo pipefail
here=$(mktemp -d)
trap 'rm -rf "$here"' EXIT
python3 -m venv "$here/env"
"$here/env/bin/pip" install --quiet --disable-pip-version-check timm==1.0.31 torch==2.15.0 torchvision==0.29.2 numpy==2.4.6 \
  huggingface_hub==2.4.0 safetensors==0.8.0
"$here/env/bin/pip" install --quiet --disable-pip-version-check --no-deps --target "$here/before" timm==1.0.30
cat > "$here/export.py" <<'PY'
import json
import sys
from pathlib import Path

import timm
import torch
from timm.models import save_for_hf

folder = Path(sys.argv[1])
for name, given in (("mobilenetv3_small_050", {}), ("vit_tiny_patch16_224", {}), ("mobilenetv3_small_050", {"num_classes": 10, "in_chans": 1})):
    torch.manual_seed(0)
    model = timm.create_model(name, **given)
    save_for_hf(model, folder, safe_serialization=True)
    cfg = json.loads((folder / "config.json").read_text())
    args = cfg.get("model_args")
    print(f"timm {timm.__version__}: {name} created with {given} exports model_args {args}")
    if sys.argv[2] == "before":
        assert args is None, "this has changed"
        assert timm.create_model(cfg["architecture"], num_classes=0, **cfg.get("model_args", {})).num_classes == 0, "this has changed"
        save_for_hf(model, folder, safe_serialization=True, model_args={"drop_rate": 0.1})
        assert json.loads((folder / "config.json").read_text())["model_args"] == {"drop_rate": 0.1}, "this has changed"
        continue
    at_least = {"num_classes": 1000, "in_chans": 3} | given
    assert at_least.items() <= args.items() and "global_pool" in args and ("img_size" in args) == name.startswith("vit"), "this has changed"
    try:
        timm.create_model(cfg["architecture"], num_classes=0, **args)
    except TypeError as error:
        print("  given again:", error)
        assert "multiple values for keyword argument 'num_classes'" in str(error), "this has changed"
    else:
        raise SystemExit("this has changed")
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=0).eval()
    merged = timm.create_model(cfg["architecture"], **(args | {"num_classes": 0})).eval()
    model.reset_classifier(0)
    images = torch.rand(1, args["in_chans"], 224, 224)
    with torch.no_grad():
        same = torch.equal(loaded(images), model.eval()(images))
    print("  by local-dir: num_classes", loaded.num_classes, "the same output", same)
    assert loaded.num_classes == merged.num_classes == 0 and same, "this has changed"
PY
"$here/env/bin/python" "$here/export.py" "$here/now-export" now
PYTHONPATH="$here/before" "$here/env/bin/python" "$here/export.py" "$here/before-export" before
echo "as found"
