#!/usr/bin/env bash
# onnxruntime 1.32.0, openvino 2026.4.1 and OpenCV's dnn (5.0.0.93) on one ONNX file of torch.onnx.export (torch
# 2.14.1), beside OpenVINO on the module itself; timm 1.0.31. All in float32.
#
# One would guess: a runtime that loads a file and answers in the right shape computes what the file says, up to
#   rounding; what it does not have it refuses.
# Behaviour: OpenVINO and OpenCV do nothing for `antialias` of ONNX's Resize, and OpenCV takes `scales` for the size
#   of the output alone and maps coordinates by the ratio of the sizes. Neither says so.
#   - A picture reduced in the network, as preprocessing that is exported with it does, is aliased.
#   - timm resizes the position embeddings of a ViT at another size than its own with antialias: at 224 a DINOv2's
#     from 37x37 to 16x16. OpenVINO is right if it is given the module instead of the file.
#   - scale_factor=0.5 of an odd side: torch steps by 2, OpenCV by 129 / 64, so its last column looks half a pixel
#     off; "nearest" by 1.75 takes other pixels. Meta's DINOv2 resizes its position embeddings so, by (16 + 0.1) / 37.
#     Right is size= instead of scale_factor=.
#   - onnxruntime, by which an export is usually checked, is right in all.
#   (Source: OpenVINO's src/frontends/onnx/frontend/src/op/resize.cpp keeps the attribute beside LINEAR_ONNX and
#   CUBIC, which do not use it, known as its issue 35893; OpenCV's modules/dnn/src/layers/resize2_layer.cpp.)
# Output seen, norm of the difference to torch's output, of its norm (random weights):
#   to 48x64, antialias: onnxruntime 0.000, openvino of the file 0.261, of the module 0.000, OpenCV 0.261
#   DINOv2 at 224: onnxruntime 0.000, openvino of the file 0.039, of the module 0.000, OpenCV 0.039
#   to 48x64: onnxruntime 0.000, openvino of the file 0.000, of the module 0.000, OpenCV 0.000
#   by 0.5: onnxruntime 0.000, openvino of the file 0.000, of the module 0.000, OpenCV 0.313
#   bicubic by 16.1 / 37: onnxruntime 0.000, openvino of the file 0.000, of the module 0.000, OpenCV 0.125
#   nearest by 1.75: onnxruntime 0.000, openvino of the file 0.000, of the module 0.000, OpenCV 0.363
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resizes.py" <<'PY'
import logging
import sys

import cv2
import numpy as np
import onnxruntime
import openvino
import timm
import torch
import torch.nn.functional as F
from torch import nn

logging.disable(logging.CRITICAL)
torch.manual_seed(0)
path = f"{sys.argv[1]}/network.onnx"
exact = {"INFERENCE_PRECISION_HINT": "f32"}


class Resize(nn.Module):
    def __init__(self, **how):
        super().__init__()
        self.how = how

    def forward(self, x):
        return F.interpolate(x, **self.how)


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        name = "vit_small_patch14_dinov2"
        self.net = timm.create_model(name, img_size=518, dynamic_img_size=True, depth=2)

    def forward(self, x):
        return self.net.forward_features(x)


def by_opencv(x):
    net = cv2.dnn.readNetFromONNX(path)
    net.setInput(x)
    return net.forward()


def by_openvino(model, x):
    return openvino.compile_model(model, "CPU", exact)(x)[0]


def compare(name, net, size):
    x = torch.rand(1, 3, *size)
    with torch.no_grad():
        expected = net.eval()(x).numpy()
    torch.onnx.export(net, (x,), path, input_names=["x"], external_data=False, verbose=False)
    module, x = openvino.convert_model(net, example_input=x), x.numpy()
    outputs = {
        "onnxruntime": onnxruntime.InferenceSession(path).run(None, {"x": x})[0],
        "openvino of the file": by_openvino(openvino.convert_model(path), x),
        "of the module": by_openvino(module, x),
        "OpenCV": by_opencv(x),
    }
    norm = np.linalg.norm(expected)
    errors = {key: np.linalg.norm(y - expected) / norm for key, y in outputs.items()}
    print(f"{name}: {', '.join(f'{key} {error:.3f}' for key, error in errors.items())}")


odd = (97, 129)
compare("to 48x64, antialias", Resize(size=(48, 64), mode="bilinear", antialias=True), odd)
compare("DINOv2 at 224", Features(), (224, 224))
compare("to 48x64", Resize(size=(48, 64), mode="bilinear"), odd)
compare("by 0.5", Resize(scale_factor=0.5, mode="bilinear"), odd)
compare("bicubic by 16.1 / 37", Resize(scale_factor=16.1 / 37, mode="bicubic"), (37, 37))
compare("nearest by 1.75", Resize(scale_factor=1.75, mode="nearest"), odd)
PY
export PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 timm==1.0.31 onnx==1.23.2 onnxscript==0.7.2 \
  onnxruntime==1.32.0 openvino==2026.4.1 opencv-python-headless==5.0.0.93
"$folder/env/bin/python" "$folder/resizes.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
