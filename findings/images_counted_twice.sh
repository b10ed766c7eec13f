#!/usr/bin/env bash
# lightning 2.6.6, accelerate 1.15.0, transformers 5.24.0, pytorch-ignite 0.5.5, mmengine 0.10.7, torchmetrics 1.9.0
# (torch 2.14.1): five images evaluated by two processes, and how often each is counted in the score.
#
# One would guess: a trainer that shares out an evaluation, with a metric that is reduced over processes, counts each
#   image once, as one process does.
# Behaviour: where the number of images is no multiple of the processes (VOC's 1,449 on eight) the sampler repeats the
#   first ones. Lightning and ignite put it in by themselves, accelerate does the same in prepare(), and a metric of
#   torchmetrics or ignite counts them again: the mIoU is another for each number of processes. transformers and mmengine
#   cut what was gathered back to the data set's length; of accelerate only gather_for_metrics does.
#   - gather_for_metrics fed into a torchmetrics metric, which reduces by itself, counts all images once a process: a mean
#     or mIoU is right then, a sum or a number of images is not.
#   (Source: torch/utils/data/distributed.py; accelerate/data_loader.py, even_batches; Lightning says it in a warning.)
# Output seen (times that image 0, 1, ... 4 is counted):
#   DistributedSampler + torchmetrics: 2 1 1 1 1
#   lightning validate + torchmetrics: 2 1 1 1 1
#   ignite auto_dataloader + its metric: 2 1 1 1 1
#   accelerate prepare + torchmetrics: 2 1 1 1 1
#   accelerate gather: 2 1 1 1 1
#   accelerate gather_for_metrics: 1 1 1 1 1
#   accelerate gather_for_metrics + torchmetrics: 2 2 2 2 2
#   transformers Trainer.evaluate: 1 1 1 1 1
#   mmengine DefaultSampler + its metric: 1 1 1 1 1
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/counts.py" <<'PY'
import logging
import os
import sys

import torch
import torch.distributed as dist
import torchmetrics
from torch.utils.data import DataLoader, Dataset
from torch.utils.data.distributed import DistributedSampler

N = 5


class Images(Dataset):
    def __len__(self):
        return N

    def __getitem__(self, i):
        return {"x": torch.tensor([float(i)]), "labels": torch.tensor(i)}


def tally(numbers):
    return torch.bincount(torch.as_tensor(numbers).flatten(), minlength=N)


class Times(torchmetrics.Metric):
    def __init__(self):
        super().__init__()
        self.add_state("times", torch.zeros(N, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, numbers):
        self.times += tally(numbers)

    def compute(self):
        return self.times


def loader(**options):
    return DataLoader(Images(), batch_size=1, **options)


def with_sampler():
    dist.init_process_group("gloo")
    metric = Times()
    for batch in loader(sampler=DistributedSampler(Images(), shuffle=False)):
        metric.update(batch["labels"])
    return metric.compute()


def with_lightning():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)
            self.metric = Times()

        def validation_step(self, batch, number):
            self.metric.update(batch["labels"])

        def on_validation_epoch_end(self):
            self.found = self.metric.compute()

    module = Module()
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = lightning.Trainer(accelerator="cpu", devices=2, strategy="ddp", **quiet)
    trainer.validate(module, loader(), verbose=False)
    return module.found


def with_ignite():
    import ignite.distributed as idist
    from ignite.engine import Engine
    from ignite.metrics import Metric
    from ignite.metrics.metric import sync_all_reduce

    class Count(Metric):
        def reset(self):
            self.times = torch.zeros(N, dtype=torch.long)

        def update(self, numbers):
            self.times = self.times + tally(numbers)

        @sync_all_reduce("times")
        def compute(self):
            return self.times

    with idist.Parallel(backend="gloo"):
        engine = Engine(lambda engine, batch: batch["labels"])
        Count().attach(engine, "times")
        images = idist.auto_dataloader(Images(), batch_size=2, shuffle=False)
        return engine.run(images).metrics["times"]


def with_accelerate(gathered, counted):
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    gather = {
        "each its own": lambda numbers: numbers,
        "gather": accelerator.gather,
        "gather_for_metrics": accelerator.gather_for_metrics,
    }[gathered]
    metric = Times()
    total = torch.zeros(N, dtype=torch.long)
    for batch in accelerator.prepare(loader()):
        numbers = gather(batch["labels"])
        metric.update(numbers)
        total += tally(numbers)
    return metric.compute() if counted == "torchmetrics" else total


def with_transformers():
    from transformers import PrinterCallback, Trainer, TrainingArguments

    class Net(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = torch.nn.Linear(1, 1)

        def forward(self, x, labels=None):
            return {"loss": self.net(x).mean(), "logits": x}

    found = {}

    def compute_metrics(seen):
        found["times"] = tally(seen.label_ids)
        return {}

    options = {"use_cpu": True, "per_device_eval_batch_size": 1, "report_to": []}
    arguments = TrainingArguments(sys.argv[2], disable_tqdm=True, log_level="error", **options)
    trainer = Trainer(Net(), arguments, eval_dataset=Images(), compute_metrics=compute_metrics)
    trainer.remove_callback(PrinterCallback)
    trainer.evaluate()
    return found["times"]


def with_mmengine():
    from mmengine.dataset import DefaultSampler
    from mmengine.evaluator import BaseMetric

    class Count(BaseMetric):
        def process(self, batch, outputs):
            self.results += batch["labels"].tolist()

        def compute_metrics(self, results):
            return {"times": tally(results)}

    dist.init_process_group("gloo")
    metric = Count()
    for batch in loader(sampler=DefaultSampler(Images(), shuffle=False)):
        metric.process(batch, None)
    return metric.evaluate(N)["times"]


KINDS = {
    "DistributedSampler + torchmetrics": with_sampler,
    "lightning validate + torchmetrics": with_lightning,
    "ignite auto_dataloader + its metric": with_ignite,
    "accelerate prepare + torchmetrics": lambda: with_accelerate("each its own", "torchmetrics"),
    "accelerate gather": lambda: with_accelerate("gather", "sum"),
    "accelerate gather_for_metrics": lambda: with_accelerate("gather_for_metrics", "sum"),
    "accelerate gather_for_metrics + torchmetrics": lambda: with_accelerate(
        "gather_for_metrics", "torchmetrics"
    ),
    "transformers Trainer.evaluate": with_transformers,
    "mmengine DefaultSampler + its metric": with_mmengine,
}
logging.disable(logging.WARNING)
name = list(KINDS)[int(sys.argv[1])]
times = KINDS[name]()
if os.environ["RANK"] == "0":
    print(f"{name}: {' '.join(map(str, torch.as_tensor(times).tolist()))}", flush=True)
if dist.is_initialized():
    dist.barrier()
    dist.destroy_process_group()
PY
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 lightning==2.6.6 accelerate==1.15.0 \
  transformers==5.24.0 pytorch-ignite==0.5.5 mmengine==0.10.7 torchmetrics==1.9.0
for number in 0 1 2 3 4 5 6 7 8; do
  "$folder/env/bin/python" -m torch.distributed.run --standalone --nproc_per_node 2 \
    "$folder/counts.py" "$number" "$folder/out" 2> "$folder/errors" || cat "$folder/errors"
done | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
