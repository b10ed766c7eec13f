#!/usr/bin/env bash
# torch 2.14.1 (DDP, FSDP2's fully_shard, torch.distributed.checkpoint): a network with BN that four processes train, each
# on images of its own, all from one distribution; evaluated, saved, and resumed from what was saved.
#
# One would guess: all processes train one network; fully_shard in DDP's place changes where weights lie, not what is
#   evaluated; and a distributed checkpoint holds the network that was saved.
# Behaviour: BN's running statistics are buffers. DDP sends those of process 0 to all at each forward pass, fully_shard
#   never does: the weights are one network's, the statistics those of four.
#   - An evaluation whose images are shared out over the processes scores a mixture that no file can give again.
#   - A full state dict has the statistics of process 0.
#   - dcp.save takes buffers for copies of one tensor, and each is written by the process that has the least to write so
#     far: the mean of one process beside the variance of another, in one layer. What is resumed, or converted, was on no
#     process. With DDP it is so, too, for what each process added in its last pass (four images here).
#   - As meant: SyncBatchNorm, or an average of the buffers over the processes, before each evaluation and each save.
#     DefaultSavePlanner(dedup_save_to_lowest_rank=True) has those of process 0, as a full state dict has.
#   (Source: _sync_buffers in torch/nn/parallel/distributed.py, which torch/distributed/fsdp/_fully_shard has not;
#   torch/distributed/checkpoint/_dedup_save_plans.py, where PyTorch's pull request 116469 put it.)
# Output seen (difference of outputs in eval mode in % of their norm; which process mean and variance of each BN are of):
#   DDP: 0 % apart; full state 00 00 00, checkpoint 12 21 11, at least 9 % from each
#   fully_shard: 18 % apart; full state 00 00 00, checkpoint 12 31 23, at least 11 % from each
#   buffers averaged: 0 % apart; full state ** ** **, checkpoint ** ** **, at least 0 % from each
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/buffers.py" <<'PY'
import sys

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

dist.init_process_group("gloo")
rank, world = dist.get_rank(), 4
same = torch.randn(1, 3, 32, 32, generator=torch.Generator().manual_seed(99))


def trained(wrap):
    torch.manual_seed(0)
    layers = []
    for width, wider in ((3, 8), (8, 16), (16, 16)):
        layers += [nn.Conv2d(width, wider, 3), nn.BatchNorm2d(wider), nn.ReLU()]
    net = wrap(nn.Sequential(*layers, nn.Conv2d(16, 4, 1)))
    optimizer = torch.optim.SGD(net.parameters(), 0.01)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(30):
        images = sum(torch.randn(4, 3, side, side, generator=generator) for side in (16, 1))
        net(images).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return net


def everywhere(value):
    found = [None] * world
    dist.all_gather_object(found, value)
    return found


def statistics(state):
    return {key: value.clone() for key, value in state.items() if "running" in key}


def whose(own, kept):
    """The process whose running mean, and the one whose running variance this is, of each BN."""
    text = ""
    for key, value in kept.items():
        found = [number for number in range(world) if torch.equal(own[number][key], value)]
        text += "*" if len(found) == world else "".join(map(str, found))
        text += " " * key.endswith("var")
    return text.strip()


def far(one, other):
    return round(100 * float((one - other).norm() / other.norm()))


for name in ("DDP", "fully_shard", "buffers averaged"):
    net = trained(DistributedDataParallel if name == "DDP" else fully_shard)
    if name == "buffers averaged":
        for key, buffer in net.named_buffers():
            if "running" in key:
                dist.all_reduce(buffer)
                buffer /= world
    state = get_model_state_dict(net)
    own = everywhere(statistics(state))
    full = StateDictOptions(full_state_dict=True, cpu_offload=True)
    whole = statistics(get_model_state_dict(net, options=full))
    dcp.save(state, checkpoint_id=f"{sys.argv[1]}/{name}")
    before = everywhere(net.eval()(same).detach())
    dcp.load(state, checkpoint_id=f"{sys.argv[1]}/{name}")
    resumed, after = statistics(state), net(same).detach()
    if rank == 0:
        most = max(far(x, before[0]) for x in before)
        least = min(far(after, x) for x in before)
        text = f"full state {whose(own, whole)}, checkpoint {whose(own, resumed)}"
        print(f"{name}: {most} % apart; {text}, at least {least} % from each", flush=True)
dist.barrier()
dist.destroy_process_group()
PY
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy
"$folder/env/bin/torchrun" --standalone --nproc_per_node 4 "$folder/buffers.py" "$folder" \
  2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
