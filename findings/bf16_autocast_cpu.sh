# torch 2.14.1 on x86: a convolutional network trained under torch.autocast("cpu", torch.bfloat16), by the CPU's
# instructions.
#
# One would guess: bf16 is half the memory, and a CPU that cannot multiply it converts to float32 and back, so that
#   autocast costs some conversions at worst, and the same program is about as fast everywhere.
# Behaviour: torch asks oneDNN whether it has bf16 for this CPU. With AVX512_BF16 or AMX it has fast convolutions; with
#   other AVX-512 it emulates the instruction; with AVX2 alone it has none, and torch takes its own slow_conv2d. Nothing
#   warns. ONEDNN_MAX_CPU_ISA and ATEN_CPU_CAPABILITY make a CPU one with fewer instructions.
#   (Source: torch.ops.mkldnn._is_mkldnn_bf16_supported() is False in the first case, and the profiler names
#   aten::_slow_conv2d_backward; in the others ONEDNN_VERBOSE=1 names jit:avx512_core and avx512_core_bf16.)
# Output seen, time of a step (forward and backward) of what float32 takes on the same instructions:
#   AVX2: 8.69
#   AVX512_CORE: 1.96
#   AVX512_CORE_BF16: 0.49
# Fails if that changes; tries those of the three that the CPU has. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/step.py" <<'PY'
import statistics
import time

import torch
from torch import nn

torch.set_num_threads(1)
torch.manual_seed(0)


def conv(inputs, outputs, side):
    """Returns a convolution with BN and ReLU."""
    kernel = nn.Conv2d(inputs, outputs, side, padding=side // 2, bias=False)
    return [kernel, nn.BatchNorm2d(outputs), nn.ReLU()]


layers = [*conv(64, 64, 1), *conv(64, 64, 3), *conv(64, 256, 1), *conv(256, 128, 1)]
net = nn.Sequential(*layers, *conv(128, 128, 3)).to(memory_format=torch.channels_last)
x = torch.randn(2, 64, 64, 64).to(memory_format=torch.channels_last)


def seconds(enabled):
    """Returns the processor time of a step."""
    begin = time.process_time()
    with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
        loss = net(x).float().square().mean()
    loss.backward()
    return time.process_time() - begin


times = [(seconds(False), seconds(True)) for _ in range(9)][2:]
print(statistics.median(bf16 / float32 for float32, bf16 in times))
PY
grep -qw avx2 /proc/cpuinfo  # an x86 CPU under Linux
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
tries() { # instructions as oneDNN, ATen and Linux name them, the least and the largest ratio
  if ! grep -qw "$3" /proc/cpuinfo; then
    echo "$1: this CPU has none"
    return
  fi
  ratio=$(ONEDNN_MAX_CPU_ISA=$1 ATEN_CPU_CAPABILITY=$2 "$folder/venv/bin/python" "$folder/step.py")
  printf '%s: %.2f\n' "$1" "$ratio"
  python3 -c "assert $4 < $ratio < $5"
}
tries AVX2 avx2 avx2 3 1000
tries AVX512_CORE avx512 avx512bw 1.2 6
tries AVX512_CORE_BF16 avx512 avx512_bf16 0 0.9
