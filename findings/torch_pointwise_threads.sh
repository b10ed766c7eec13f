#!/usr/bin/env bash
# torch 2.14.1 and 2.6.0 (CPU): the numbers of a 1x1 convolution depend on the batch size and on the
# number of threads, and torchrun changes the latter.
#
# One would guess: an image's features are the same alone and in any batch (eval mode, one machine, one
#   version), or if not, then by the library's blocking, in all layers alike; threads share out work.
# Behaviour: with one thread a float32 1x1 convolution of stride 1 takes oneDNN for 16 images or more and
#   another routine (_slow_conv2d_forward) for fewer; the results differ in the last bits. With two threads
#   all batches take oneDNN and are equal. 3x3 ones take oneDNN always. `torchrun --nproc_per_node 2`
#   sets OMP_NUM_THREADS=1 where it is unset: the same script then takes the other routine in every
#   bottleneck and in the classifier, so features cached by plain python, or a log, are not equal bit by
#   bit to those of a process that torchrun started. (Source: ConvParams::use_mkldnn in
#   aten/src/ATen/native/Convolution.cpp; torch/distributed/run.py.)
# Output seen, for each version:
#   python, 1 thread: 16 images mkldnn, 15 images slow; image 1 equal in both: False
#   python, 2 threads: 16 images mkldnn, 15 images mkldnn; image 1 equal in both: True
#   python, 1 thread, 3x3: 16 images mkldnn, 15 images mkldnn; image 1 equal in both: True
#   torchrun --nproc_per_node 1: other threads than 1: True
#   torchrun --nproc_per_node 2: other threads than 1: False
# Fails if that changes. Needs two cores.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
unset OMP_NUM_THREADS MKL_NUM_THREADS
cat > "$folder/batches.py" <<'PY'
import torch
from torch.profiler import ProfilerActivity, profile

ROUTINES = {"aten::mkldnn_convolution": "mkldnn", "aten::_slow_conv2d_forward": "slow"}


def run(net, images):
    with profile(activities=[ProfilerActivity.CPU]) as seen, torch.no_grad():
        out = net(images)
    return out, *(ROUTINES[e.key] for e in seen.key_averages() if e.key in ROUTINES)


torch.manual_seed(0)
images = torch.randn(16, 256, 33, 33)
for threads, size in ((1, 1), (2, 1), (1, 3)):
    net = torch.nn.Conv2d(256, 64, size)
    torch.set_num_threads(threads)
    all_of_them, routine_16 = run(net, images)
    but_one, routine_15 = run(net, images[:15])
    words = f"python, {threads} thread{'s' * (threads > 1)}{', 3x3' * (size > 1)}"
    equal = torch.equal(all_of_them[0], but_one[0])
    print(f"{words}: 16 images {routine_16}, 15 images {routine_15}; image 1 equal in both: {equal}")
PY
cat > "$folder/threads.py" <<'PY'
import os

import torch

if os.environ["RANK"] == "0":
    print("other threads than 1:", torch.get_num_threads() > 1)
PY
for version in 2.14.1 2.6.0; do
  python3 -m venv "$folder/$version"
  "$folder/$version/bin/pip" install -q "torch==$version" numpy
  {
    "$folder/$version/bin/python" "$folder/batches.py" 2> /dev/null
    for processes in 1 2; do
      "$folder/$version/bin/torchrun" --nproc_per_node $processes "$folder/threads.py" 2> /dev/null |
        sed "s/^/torchrun --nproc_per_node $processes: /"
    done
  } | tee "$folder/seen"
  diff "$folder/seen" <(sed -n 's/^#   \(\(python\|torchrun\).*: .*\)/\1/p' "$0")
  rm -rf "${folder:?}/$version"
done
