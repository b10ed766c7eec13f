#!/usr/bin/env bash
# transformers 5.24.0, accelerate 1.15.0 (torch 2.14.1): one step of Trainer with SGD on the same four images, as one batch
# of four, accumulated from smaller ones, and by two processes with two images each.
#
# One would guess: the same step each time; accumulation and processes change where images are, not what is learned.
# Behaviour: Trainer leaves out the division by the accumulated batches, and multiplies by the number of processes, for a
#   model whose forward takes **kwargs, as that might average over num_items_in_batch itself. The semantic segmentation
#   models (SegFormer, DPT, MobileViT, UperNet, BEiT, ...) take **kwargs and average over their own batch: their gradient
#   is as many times too large: by the code 64 times with 8 batches on 8 GPUs, and so is the loss that is printed.
#   - ViT for images hands the number on to its loss, and is right.
#   - AdamW hides most of it; SGD, max_grad_norm and a comparison of runs do not.
#   - As meant: model.accepts_loss_kwargs = False before Trainer is made.
#   (Source: transformers/trainer.py, training_step and compute_loss; accumulation is known as transformers' issue 47688.)
# Output seen (length of the step, as a multiple of that of one batch of four):
#   Segformer: 2 batches of 2: 2.00, 4 batches of 1: 4.00, 2 processes: 2.00
#   DPT: 2 batches of 2: 2.00, 4 batches of 1: 4.00, 2 processes: 2.00
#   MobileViT: 2 batches of 2: 2.00, 4 batches of 1: 4.00, 2 processes: 2.00
#   Segformer, accepts_loss_kwargs = False: 2 batches of 2: 1.00, 4 batches of 1: 1.00, 2 processes: 1.00
#   ViT for images: 2 batches of 2: 1.00, 4 batches of 1: 1.00, 2 processes: 1.00
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/step.py" <<'PY'
import os
import sys

import torch
import transformers
from torch.utils.data import Dataset

kind, batch, accumulated, out = sys.argv[1:]
CLASSES, SIDE = 5, 64
transformers.logging.set_verbosity_error()


class Images(Dataset):
    def __len__(self):
        return 4

    def __getitem__(self, i):
        draw = torch.Generator().manual_seed(i)
        image = torch.randn(3, SIDE, SIDE, generator=draw)
        mask = torch.randint(0, CLASSES, (SIDE, SIDE), generator=draw)
        return {"pixel_values": image, "labels": torch.tensor(i) if kind == "ViT" else mask}


TRANSFORMER = {"image_size": SIDE, "intermediate_size": 32, "num_attention_heads": 2}
MODELS = {  # configuration, model, what makes it small
    "Segformer": (
        transformers.SegformerConfig,
        transformers.SegformerForSemanticSegmentation,
        {"depths": [1] * 4, "hidden_sizes": [8] * 4, "num_attention_heads": [1] * 4},
    ),
    "DPT": (
        transformers.DPTConfig,
        transformers.DPTForSemanticSegmentation,
        {"hidden_size": 32, "num_hidden_layers": 4, "backbone_out_indices": [0, 1, 2, 3]}
        | {"neck_hidden_sizes": [8] * 4, "fusion_hidden_size": 8}
        | TRANSFORMER,
    ),
    "MobileViT": (
        transformers.MobileViTConfig,
        transformers.MobileViTForSemanticSegmentation,
        {"image_size": SIDE, "hidden_sizes": [16] * 3, "neck_hidden_sizes": [8] * 7},
    ),
    "ViT": (
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        {"hidden_size": 16, "num_hidden_layers": 1} | TRANSFORMER,
    ),
}
torch.manual_seed(0)
config, make, small = MODELS[kind.removesuffix("=False")]
model = make(config(num_labels=CLASSES, **small))
if kind.endswith("=False"):
    model.accepts_loss_kwargs = False
for module in model.modules():  # eval mode throughout: neither dropout nor BN tells batches apart
    module.train(False)
    module.train = lambda mode=True, module=module: module
before = [p.detach().clone() for p in model.parameters()]
arguments = transformers.TrainingArguments(
    out,
    use_cpu=True,
    per_device_train_batch_size=int(batch),
    gradient_accumulation_steps=int(accumulated),
    max_steps=1,
    optim="sgd",
    learning_rate=1.0,
    lr_scheduler_type="constant",
    max_grad_norm=1e9,
    report_to=[],
    disable_tqdm=True,
    save_strategy="no",
    logging_strategy="no",
)
trainer = transformers.Trainer(model, arguments, train_dataset=Images())
trainer.remove_callback(transformers.PrinterCallback)
trainer.train()
if os.environ.get("RANK", "0") == "0":
    moved = [p.detach() - q for p, q in zip(model.parameters(), before, strict=True)]
    print(torch.cat([x.flatten() for x in moved]).norm().item())
if torch.distributed.is_initialized():
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()
PY
export PYTHONWARNINGS=ignore OMP_NUM_THREADS=1
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 transformers==5.24.0 accelerate==1.15.0
one() { "$folder/env/bin/python" "$folder/step.py" "$@" "$folder/out"; }
two() { "$folder/env/bin/torchrun" --standalone --nproc_per_node 2 "$folder/step.py" "$@" "$folder/out"; }
share() { awk -v whole="$1" -v found="$2" 'BEGIN { printf "%.2f", found / whole }'; }
row() {
  local whole
  whole=$(one "$2" 4 1)
  echo "$1: 2 batches of 2: $(share "$whole" "$(one "$2" 2 2)")," \
    "4 batches of 1: $(share "$whole" "$(one "$2" 1 4)")," \
    "2 processes: $(share "$whole" "$(two "$2" 2 1)")"
}
{
  row Segformer Segformer
  row DPT DPT
  row MobileViT MobileViT
  row "Segformer, accepts_loss_kwargs = False" Segformer=False
  row "ViT for images" ViT
} 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
