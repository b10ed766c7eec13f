# torch 2.14.1 (CPU), torch.utils.checkpoint: a network with batch normalization, three steps.
#
# One would guess: activation checkpointing trades time for memory and nothing else: the recomputed forward pass gives
#   the same numbers, random ones too (preserve_rng_state), so the trained network is the same.
# Behaviour: loss and gradients are equal bit for bit, so a test that compares them passes. But the recomputed pass
#   is one in training mode: it moves running_mean and running_var once more, so a momentum of 0.1 acts as 0.19,
#   and the network that is evaluated is another one. checkpoint_sequential does not checkpoint its last segment,
#   whose layers are moved once: one network has statistics of two momenta.
#   (Source: torch/utils/checkpoint.py; it says of no module that it has a state.)
# Output seen, num_batches_tracked of three layers after three steps, of each running_var / that of plain steps:
#   plain: [3, 3, 3], [1.0, 1.0, 1.0]
#   checkpoint, use_reentrant=True: [6, 6, 6], [0.83, 0.77, 0.77]
#   checkpoint, use_reentrant=False: [6, 6, 6], [0.83, 0.77, 0.77]
#   checkpoint_sequential, 2 segments: [6, 6, 3], [0.83, 0.77, 1.0]
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/twice.py" <<'PY'
import copy

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint, checkpoint_sequential

torch.manual_seed(0)


def block(inputs):
    conv = nn.Conv2d(inputs, 8, 3, padding=1, bias=False)
    return nn.Sequential(conv, nn.BatchNorm2d(8), nn.ReLU())


NET = nn.Sequential(block(3), block(8), block(8), nn.Conv2d(8, 5, 1))
image = torch.randn(4, 3, 16, 16, requires_grad=True)
label = torch.randint(5, (4, 16, 16))
WAYS = {
    "plain": lambda net: net(image),
    "checkpoint, use_reentrant=True": lambda net: checkpoint(net, image, use_reentrant=True),
    "checkpoint, use_reentrant=False": lambda net: checkpoint(net, image, use_reentrant=False),
    "checkpoint_sequential, 2 segments": lambda net: checkpoint_sequential(
        net, 2, image, use_reentrant=False
    ),
}
SEEN = [[3, 3, 3], [6, 6, 6], [6, 6, 6], [6, 6, 3]]
found = {}
for name, forward in WAYS.items():
    net = copy.deepcopy(NET)
    for _ in range(3):
        nn.functional.cross_entropy(forward(net), label).backward()
    found[name] = net
plain = found["plain"]
for (name, net), expected in zip(found.items(), SEEN):
    norms = [[m for m in one.modules() if isinstance(m, nn.BatchNorm2d)] for one in (net, plain)]
    counts = [m.num_batches_tracked.item() for m in norms[0]]
    ratios = [round((m.running_var / p.running_var).mean().item(), 2) for m, p in zip(*norms)]
    print(f"{name}: {counts}, {ratios}")
    assert counts == expected
    assert [ratio < 0.9 for ratio in ratios] == [count == 6 for count in counts]
    for p, q in zip(net.parameters(), plain.parameters()):
        assert torch.equal(p.grad, q.grad)
PY
python -m venv "$folder/venv"
"$folder/venv/bin/pip" install -q torch==2.14.1 numpy
"$folder/venv/bin/python" "$folder/twice.py"
