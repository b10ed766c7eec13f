#!/usr/bin/env bash
# lightning 2.6.6 (torch 2.14.1): CombinedLoader(mode="max_size_cycle") of 16 labelled and 96 unlabelled images, both
# shuffled, in batches of 2, as semi-supervised training has them; the labelled images that one process sees in an epoch.
#
# One would guess: the short loader begins anew, and so shuffles anew, each time it is at its end, and each process sees
#   all labelled images in the course of an epoch; and a sampler that Lightning shares out to processes is shared out.
# Behaviour: by one process it is so. By several, Lightning puts in a DistributedSampler, whose order hangs on the epoch's
#   number alone, and which is told that at the beginning of an epoch of the long loader:
#   - The short one repeats the same batches in the same order until then, each process its own share of the images. With
#     183 labelled of 2,975 images an epoch has the same batches sixteen times: their statistics, their neighbours.
#   - A SubsetRandomSampler or WeightedRandomSampler(replacement=False) of the labelled images is wrapped: each process
#     takes its share of an order that it drew itself. Without seed_everything the orders differ, so that some images come
#     twice in a cycle and others not at all. (accelerate gives all processes one order.)
#   - As meant: use_distributed_sampler=False and a sampler of one's own, that draws anew in each __iter__.
#   (Source: _MaxSizeCycle in lightning/pytorch/utilities/combined_loader.py; _set_sampler_epoch in lightning/fabric/
#   utilities/data.py; DistributedSamplerWrapper in lightning/fabric/utilities/distributed.py.)
# Output seen (processes, labelled loader: labelled images of process 0 in an epoch, its different batches, images of the
# first cycle over all processes, of 16):
#   1, shuffle=True: 16, 45 different of 48 batches, 16
#   1, SubsetRandomSampler: 16, 43 different of 48 batches, 16
#   1, the same, seed_everything: 16, 43 different of 48 batches, 16
#   2, shuffle=True: 8, 4 different of 24 batches, 16
#   2, SubsetRandomSampler: 15, 23 different of 24 batches, 11
#   2, the same, seed_everything: 15, 23 different of 24 batches, 16
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/cycles.py" <<'PY'
import os

import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.utilities import CombinedLoader
from torch.utils.data import DataLoader, SubsetRandomSampler

LABELLED, UNLABELLED, BATCH = 16, 96, 2
world = int(os.environ["WORLD_SIZE"])


class Net(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.batches = []

    def training_step(self, batch, number):
        self.batches.append(tuple(batch["labelled"].int().tolist()))
        return self.weight.sum()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def tried(name, seed=None, **kwargs):
    if seed is None:
        torch.manual_seed(dist.get_rank())  # processes without a seed, but the same ones again
    else:
        pl.seed_everything(seed, verbose=False)
    loaders = {
        "labelled": DataLoader(torch.arange(LABELLED), BATCH, **kwargs),
        "unlabelled": DataLoader(torch.arange(UNLABELLED), BATCH, shuffle=True),
    }
    strategy = "ddp" if world > 1 else "auto"
    kwargs = dict(accelerator="cpu", devices=world, max_epochs=1, barebones=True)
    trainer, net = pl.Trainer(strategy=strategy, **kwargs), Net()
    trainer.fit(net, CombinedLoader(loaders, "max_size_cycle"))
    cycle = LABELLED // BATCH // world
    found = [None] * world
    dist.all_gather_object(found, net.batches[:cycle])
    first = {image for batches in found for batch in batches for image in batch}
    own = {image for batch in net.batches for image in batch}
    if trainer.is_global_zero:
        batches = f"{len(set(net.batches))} different of {len(net.batches)} batches"
        print(f"{world}, {name}: {len(own)}, {batches}, {len(first)}", flush=True)


dist.init_process_group("gloo")
tried("shuffle=True", shuffle=True)
tried("SubsetRandomSampler", sampler=SubsetRandomSampler(range(LABELLED)))
tried("the same, seed_everything", seed=0, sampler=SubsetRandomSampler(range(LABELLED)))
PY
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy lightning==2.6.6
for processes in 1 2; do
  "$folder/env/bin/torchrun" --standalone --nproc_per_node "$processes" "$folder/cycles.py" \
    2> "$folder/errors" || cat "$folder/errors"
done | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
