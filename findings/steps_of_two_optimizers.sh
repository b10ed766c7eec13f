#!/usr/bin/env bash
# lightning 2.6.6, mmengine 0.10.7 (torch 2.14.1): a run of 12 steps in which each network has an optimizer of its own, as
# the two students of CPS have.
#
# One would guess: Trainer(max_steps=12) trains on twelve batches, whatever a training_step does with one.
# Behaviour: where optimizers are stepped by hand, which several of them ask for, lightning counts each optimizer's step
#   (global_step): with two networks the run ends after six batches, with three after four, and says that max_steps was
#   reached.
#   - A schedule of max_steps (or estimated_stepping_batches, which is the same), stepped once a batch, is cut off: the
#     last rate is 0.12 or 0.15 of 0.2, not 0.02. every_n_train_steps of ModelCheckpoint counts the same steps.
#   - As meant: max_steps times the number of optimizers, or one optimizer over all parameters.
#   - mmengine counts batches (OptimWrapperDict). (Source: lightning/pytorch/loops/optimization/manual.py.)
# Output seen:
#   lightning, 1 optimizer: 12 batches, checkpoints after 4 8 12, last rate 0.02
#   lightning, 2 optimizers: 6 batches, checkpoints after 2 4 6, last rate 0.12
#   lightning, 3 optimizers: 4 batches, checkpoints after 4, last rate 0.15
#   lightning, 2 networks in one optimizer: 12 batches, checkpoints after 4 8 12, last rate 0.02
#   mmengine, 2 optimizers: 12 batches
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/count.py" <<'PY'
import logging
import sys

import lightning
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from mmengine.model import BaseModel
from mmengine.optim import OptimWrapper, OptimWrapperDict
from mmengine.runner import Runner
from torch import nn
from torch.optim import SGD
from torch.optim.lr_scheduler import PolynomialLR
from torch.utils.data import DataLoader

STEPS = 12
logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Noted(ModelCheckpoint):
    """Notes after how many batches it would save."""

    def _save_topk_checkpoint(self, trainer, monitored):
        trainer.lightning_module.saved.append(trainer.lightning_module.batches)


class Students(lightning.LightningModule):
    def __init__(self, networks, joined):
        super().__init__()
        self.automatic_optimization = False
        self.joined = joined
        self.networks = nn.ModuleList(nn.Linear(1, 1) for _ in range(networks))
        self.batches = 0
        self.saved = []

    def configure_optimizers(self):
        if self.joined:
            parts = [self.networks.parameters()]
        else:
            parts = [network.parameters() for network in self.networks]
        optimizers = [SGD(part, lr=0.2) for part in parts]
        steps = self.trainer.estimated_stepping_batches
        return optimizers, [PolynomialLR(optimizer, steps, 1.0) for optimizer in optimizers]

    def training_step(self, batch, number):
        self.batches += 1
        optimizers = self.optimizers()
        optimizers = optimizers if isinstance(optimizers, list) else [optimizers]
        self.rate = optimizers[0].param_groups[0]["lr"]
        self.manual_backward(sum(network(batch).mean() for network in self.networks))
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        schedules = self.lr_schedulers()
        for schedule in schedules if isinstance(schedules, list) else [schedules]:
            schedule.step()


def pictures():
    return DataLoader(torch.zeros(100, 1), batch_size=1)


def with_lightning(networks, joined=False):
    module = Students(networks, joined)
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    saves = Noted(sys.argv[1], every_n_train_steps=4)
    trainer = lightning.Trainer(
        max_steps=STEPS, max_epochs=-1, accelerator="cpu", callbacks=[saves], **quiet
    )
    trainer.fit(module, pictures())
    saved = "".join(f" {batches}" for batches in module.saved)
    what = f"{networks} networks in one optimizer" if joined else f"{networks} optimizer"
    what += "s" * (networks > 1 and not joined)
    print(f"lightning, {what}: {module.batches} batches, checkpoints after{saved}, ", end="")
    print(f"last rate {module.rate:.2f}")


class Pair(BaseModel):
    def __init__(self):
        super().__init__()
        self.networks = nn.ModuleList(nn.Linear(1, 1) for _ in range(2))
        self.batches = 0

    def train_step(self, data, optim_wrapper):
        self.batches += 1
        for name, network in zip(("one", "two"), self.networks, strict=True):
            optim_wrapper[name].update_params(network(data).mean())
        return {}

    def forward(self, *inputs, **more):
        raise NotImplementedError


def with_mmengine():
    pair = Pair()
    wrappers = {
        name: OptimWrapper(SGD(network.parameters(), lr=0.2))
        for name, network in zip(("one", "two"), pair.networks, strict=True)
    }
    runner = Runner(
        pair,
        sys.argv[1],
        train_dataloader=pictures(),
        train_cfg={"by_epoch": False, "max_iters": STEPS},
        optim_wrapper=OptimWrapperDict(**wrappers),
        default_hooks={"checkpoint": None, "logger": None},
        log_level="ERROR",
    )
    runner.train()
    print(f"mmengine, 2 optimizers: {pair.batches} batches")


with_lightning(1)
with_lightning(2)
with_lightning(3)
with_lightning(2, joined=True)
with_mmengine()
PY
export PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 lightning==2.6.6 mmengine==0.10.7
"$folder/env/bin/python" "$folder/count.py" "$folder/out" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
