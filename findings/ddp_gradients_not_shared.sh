#!/usr/bin/env bash
# torch 2.14.1 (DistributedDataParallel), lightning 2.6.6: the gradients of backbone and head on two processes, each of
# which has images of its own.
#
# One would guess: behind DDP gradients are averages over the processes, whichever way losses go to backward(); what is
#   frozen at first and thawed later is trained as the rest is; and a trainer's own callback for that is fit for DDP.
# Behaviour: a forward pass arms DDP for one backward pass, over the parameters that wanted a gradient when DDP was made.
#   All else stays on its process, in silence: the processes' networks part, and process 0's is saved.
#   - Two losses of one forward pass, or of two (labelled and unlabelled images), with a backward() each, to save memory:
#     the first is averaged, the second is not. The sum is right, so is a backward() after each forward.
#   - A backbone thawed after DDP was made is never averaged, so lightning's BackboneFinetuning is not; DDP made anew is.
#   (Source: prepare_for_backward, called in forward of torch/nn/parallel/distributed.py; lightning/pytorch/callbacks/
#   finetuning.py. Known as PyTorch's issue 47260 and Lightning's 20340, both open.)
# Output seen (backbone, head: a gradient that the processes share, or each its own):
#   a and b forward, (a + b).backward(): shared, shared
#   a and b forward, a.backward(), b.backward(): own, own
#   one forward, two losses: own, own
#   backbone thawed after DDP was made: own, shared
#   DDP made anew: shared, shared
#   lightning, manual_backward(a), manual_backward(b): shared, shared
#   lightning, backbone thawed by BackboneFinetuning: own, shared
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/gradients.py" <<'PY'
import lightning.pytorch as pl
import torch
import torch.distributed as dist
from lightning.pytorch.callbacks import BackboneFinetuning
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP
from torch.utils.data import DataLoader

dist.init_process_group("gloo")
rank = dist.get_rank()
one, two = torch.randn(2, 4, 3, 8, 8, generator=torch.Generator().manual_seed(rank))


class Net(pl.LightningModule):
    def __init__(self, manual=False):
        super().__init__()
        self.backbone, self.head = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)
        self.automatic_optimization = not manual

    def forward(self, x):
        return self.head(self.backbone(x).tanh())

    def training_step(self, batch, number):
        a, b = loss(self(one)), loss(self(two))
        if self.automatic_optimization:
            return a + b
        self.manual_backward(a)
        self.manual_backward(b)
        show("lightning, manual_backward(a), manual_backward(b)", self)

    def on_train_batch_end(self, *_):
        if self.current_epoch == 1:
            show("lightning, backbone thawed by BackboneFinetuning", self)

    def configure_optimizers(self):
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], 0.1)


def show(name, net):
    found = []
    for part in (net.backbone, net.head):
        own = torch.cat([p.grad.flatten() for p in part.parameters()])
        dist.all_gather(both := [torch.empty_like(own) for _ in range(2)], own)
        found.append("shared" if torch.allclose(*both, atol=1e-6) else "own")
    if rank == 0:
        print(f"{name}: {', '.join(found)}", flush=True)


def loss(scores):
    return scores.square().mean()


def ended(name, net, *values):
    for value in values:
        value.backward(retain_graph=True)
    show(name, net.module)


net = DDP(Net())
ended("a and b forward, (a + b).backward()", net, loss(net(one)) + loss(net(two)))
net = DDP(Net())
ended("a and b forward, a.backward(), b.backward()", net, loss(net(one)), loss(net(two)))
scores = (net := DDP(Net()))(one)
ended("one forward, two losses", net, loss(scores), scores.sin().mean())
net = Net()
net.backbone.requires_grad_(False)
early = DDP(net)
net.backbone.requires_grad_(True)
ended("backbone thawed after DDP was made", early, loss(early(one)))
net.zero_grad()
ended("DDP made anew", late := DDP(net), loss(late(one)))

loader = DataLoader(torch.zeros(2))
kwargs = dict(accelerator="cpu", devices=2, strategy="ddp", barebones=True)
pl.Trainer(max_epochs=1, **kwargs).fit(Net(manual=True), loader)
thaw = BackboneFinetuning(unfreeze_backbone_at_epoch=1, backbone_initial_lr=0.1)
pl.Trainer(max_epochs=2, callbacks=[thaw], **kwargs).fit(Net(), loader)
PY
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy lightning==2.6.6
"$folder/env/bin/torchrun" --standalone --nproc_per_node 2 "$folder/gradients.py" \
  2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
