#!/usr/bin/env bash
# torch 2.14.1 (CUDA build) on a machine without a GPU, or with its GPUs hidden: fake CUDA tensors.
#
# One would guess: FakeTensorMode computes no numbers, so a network on fake CUDA tensors runs forward
#   and backward on any machine. (Source: torch/_subclasses/fake_tensor.py; autograd/engine.cpp.)
# Behaviour: forward runs, under CUDA's autocast too; backward raises RuntimeError, as autograd's engine
#   asks for a stream of the device that the tensors name. It runs if C++ is told "meta" where it asks
#   for a tensor's device (the dispatched operator prim.device) - but then CUDA's autocast leaves the
#   tensors alone, as it asks in the same way. So no one answer serves both.
# Output seen:
#   forward: cuda:0 torch.bfloat16 / backward: RuntimeError: hasPrimaryContext expects a valid device index
#   told meta: the gradient is on cuda:0 / told meta, under autocast: torch.float32
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy==2.4.6
CUDA_VISIBLE_DEVICES="" "$folder/venv/bin/python" -W ignore - <<'PY'
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GPU, META = torch.device("cuda", 0), torch.device("meta")


class Told(TorchDispatchMode):
    """Runs all on fake tensors; C++ hears `answer` where it asks for a tensor's device."""

    def __init__(self, answer):
        super().__init__()
        self.answer, self.fake = answer, FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.prim.device.default:
            return self.answer
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == META:
            kwargs["device"] = GPU
        with self.fake:
            return func(*args, **kwargs)


def convolved(autocast):
    """A convolution of ones on the fake GPU; autocast as torch.autocast("cuda") would enable it."""
    x, weight = torch.ones(1, 3, 8, 8, device=GPU), torch.ones(4, 3, 3, 3, device=GPU)
    weight.requires_grad_()
    torch.set_autocast_enabled("cuda", autocast)
    torch.set_autocast_dtype("cuda", torch.bfloat16)
    torch.set_autocast_cache_enabled(False)
    try:
        return weight, torch.nn.functional.conv2d(x, weight)
    finally:
        torch.set_autocast_enabled("cuda", False)


assert not torch.cuda.is_available()
torch.cuda._lazy_init = lambda: None  # factories would ask for a driver
with Told(GPU):
    weight, y = convolved(autocast=True)
    print("forward:", y.device, y.dtype)
    assert (y.device, y.dtype) == (GPU, torch.bfloat16)
    weight, y = convolved(autocast=False)
    try:
        y.sum().backward()
    except RuntimeError as error:
        print("backward: RuntimeError:", str(error).splitlines()[0])
    else:
        raise SystemExit("changed: backward runs now")
with Told(META):
    weight, y = convolved(autocast=False)
    y.sum().backward()
    print("told meta: the gradient is on", weight.grad.device)
    assert weight.grad.device == GPU
    weight, y = convolved(autocast=True)
    print("told meta, under autocast:", y.dtype)
    assert y.dtype == torch.float32, "changed: autocast acts now"
print("as described")
PY
