#!/usr/bin/env bash
# ptflops 0.7.5, calflops 0.3.2, grad-cam 1.5.7, openvino 2026.4.1, torchinfo 1.8.0, thop 0.1.1.post2209072238,
# lightning 2.6.6, monai 1.6.1, fvcore 0.1.5.post20221221 (torch 2.14.1): each called once beside
# a training, on a network in training mode whose backbone's BN is frozen by eval().
#
# One would guess: what counts, draws, explains or exports a network leaves it as it was.
# Behaviour: most do not, each in one of three ways, and none names it.
#   - ptflops, calflops, pytorch-grad-cam and OpenVINO's convert_model call eval(), and that stays. Where train()
#     stands before the loop, or the tool is called within an epoch, what follows trains without dropout and by
#     running statistics, which move no more.
#   - torchinfo, thop, TensorBoard's add_graph, Lightning's to_onnx, the older torch.onnx exporter and MONAI's GradCAM
#     put the mode back by train() of the whole network, which thaws the frozen BN: from there on a "fixed backbone"
#     takes the statistics of each batch. A mode belongs to a module, and they note one for all.
#   - fvcore and torch.jit.trace run it as it is: running statistics have one or five steps more, often of noise.
#   - As meant: a copy (copy.deepcopy) for each of them, or the modes of all net.modules() noted and put back.
#   (Source: eval() in ptflops/pytorch_engine.py, calflops/flops_counter.py, pytorch_grad_cam/base_cam.py and
#   openvino/frontend/pytorch/ts_decoder.py; train(mode) in torchinfo/torchinfo.py, thop/profile.py, ...)
# Output seen (mode of the head's BN, mode of the frozen BN, steps of the head's running statistics):
#   before: train, eval, 0
#   ptflops: eval, eval, 0
#   calflops: eval, eval, 0
#   pytorch_grad_cam: eval, eval, 0
#   openvino: eval, eval, 0
#   torchinfo: train, train, 0
#   thop: train, train, 0
#   tensorboard: train, train, 0
#   lightning: train, train, 0
#   onnx_older: train, train, 0
#   monai: train, train, 0
#   fvcore: train, eval, 1
#   jit_trace: train, eval, 5
#   onnx_dynamo: train, eval, 0
# Fails if that changes. Installs into a temporary folder (6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/tools.py" <<'PY'
import contextlib
import importlib
import io
import logging
import sys

import torch
from torch import nn

logging.disable(logging.CRITICAL)
SHAPE = (1, 3, 32, 32)
x = torch.randn(SHAPE)
folder = sys.argv[1]


def network():
    backbone = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
    head = nn.Sequential(nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1))
    net = nn.Sequential(backbone, head).train()
    backbone.eval().requires_grad_(False)
    return net


def use(name):
    return importlib.import_module(name)


def pytorch_grad_cam(net):
    with use("pytorch_grad_cam").GradCAM(model=net, target_layers=[net[1][0]]) as cam:
        cam(input_tensor=x, targets=[lambda output: output[1].sum()])


def tensorboard(net):
    with use("torch.utils.tensorboard").SummaryWriter(folder) as writer:
        writer.add_graph(net, x)


def lightning(net):
    module = use("lightning").LightningModule()
    module.net, module.forward = net, net.forward
    module.to_onnx(f"{folder}/lightning.onnx", x)


tools = {
    "before": lambda net: None,
    "ptflops": lambda net: use("ptflops").get_model_complexity_info(net, SHAPE[1:]),
    "calflops": lambda net: use("calflops").calculate_flops(net, SHAPE),
    "pytorch_grad_cam": pytorch_grad_cam,
    "openvino": lambda net: use("openvino").convert_model(net, example_input=x),
    "torchinfo": lambda net: use("torchinfo").summary(net, input_size=SHAPE),
    "thop": lambda net: use("thop").profile(net, (x,)),
    "tensorboard": tensorboard,
    "lightning": lightning,
    "onnx_older": lambda net: torch.onnx.export(net, (x,), f"{folder}/1.onnx", dynamo=False),
    "monai": lambda net: use("monai.visualize").GradCAM(net, "1.0")(x, class_idx=1),
    "fvcore": lambda net: use("fvcore.nn").FlopCountAnalysis(net, x).total(),
    "jit_trace": lambda net: torch.jit.trace(net, x),
    "onnx_dynamo": lambda net: torch.onnx.export(net, (x,), f"{folder}/2.onnx", dynamo=True),
}
for name, tool in tools.items():
    net = network()
    with contextlib.redirect_stdout(io.StringIO()):
        tool(net)
    modes = ["train" if part[1].training else "eval" for part in (net[1], net[0])]
    print(f"{name}: {', '.join(modes)}, {net[1][1].num_batches_tracked}", flush=True)
PY
export PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 ptflops==0.7.5 calflops==0.3.2 transformers==5.24.0 \
  grad-cam==1.5.7 openvino==2026.4.1 torchinfo==1.8.0 thop==0.1.1.post2209072238 tensorboard==2.21.0 lightning==2.6.6 \
  onnx==1.23.2 onnxscript==0.7.2 monai==1.6.1 fvcore==0.1.5.post20221221
"$folder/env/bin/python" "$folder/tools.py" "$folder" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
