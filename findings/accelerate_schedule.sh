#!/usr/bin/env bash
# accelerate 1.15.0 (torch 2.14.1): a script of ten steps with PolynomialLR, by one process and by two.
#
# One would guess: prepare() shares out batches and averages gradients, and a loop that calls schedule.step() once a step
#   has one curve of rates for any number of processes.
# Behaviour: the prepared schedule steps once for each process at every call, as if its length had been counted in batches
#   before they were shared out. A schedule that is as long as the loop is over at 1/processes of it:
#   - Two processes: rate 0 from the sixth step on; eight: seven eighths of the run learn nothing. No word is said.
#   - As one process has it: with split_batches=True, or with a schedule that is not given to prepare(), or with
#     total_iters times the number of processes.
#   - With gradient_accumulation_steps=2 it steps at every second call, again once for each process: ten calls are five
#     steps there, of two processes ten.
#   (Source: AcceleratedScheduler.step in accelerate/scheduler.py; its documentation says so.)
# Output seen (1000 times the rate of each step of the loop):
#   1 process, as it is: 10.0 9.1 8.2 7.3 6.3 5.4 4.4 3.4 2.3 1.3
#   1 process, accumulating 2: 10.0 10.0 9.1 9.1 8.2 8.2 7.3 7.3 6.3 6.3
#   2 processes, as it is: 10.0 8.2 6.3 4.4 2.3 0.0 0.0 0.0 0.0 0.0
#   2 processes, split_batches: 10.0 9.1 8.2 7.3 6.3 5.4 4.4 3.4 2.3 1.3
#   2 processes, not prepared: 10.0 9.1 8.2 7.3 6.3 5.4 4.4 3.4 2.3 1.3
#   2 processes, accumulating 2: 10.0 10.0 8.2 8.2 6.3 6.3 4.4 4.4 2.3 2.3
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/rates.py" <<'PY'
import sys

import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration

STEPS, BATCH = 10, 4
kind = sys.argv[1]
split = kind == "split_batches"
accelerator = Accelerator(
    cpu=True,
    gradient_accumulation_steps=2 if kind == "accumulating 2" else 1,
    dataloader_config=DataLoaderConfiguration(split_batches=split),
)
world = accelerator.num_processes
net = torch.nn.Linear(1, 1)
optimizer = torch.optim.SGD(net.parameters(), lr=0.01)
schedule = torch.optim.lr_scheduler.PolynomialLR(optimizer, STEPS, 0.9)
pictures = torch.zeros(STEPS * BATCH * world, 1)
loader = torch.utils.data.DataLoader(pictures, batch_size=BATCH * world if split else BATCH)
net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
if kind != "not prepared":
    schedule = accelerator.prepare(schedule)
rates = []
for batch in loader:
    with accelerator.accumulate(net):
        rates.append(f"{1000 * optimizer.param_groups[0]['lr']:.1f}")
        accelerator.backward(net(batch).mean())
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
if accelerator.is_main_process:
    print(f"{world} process{'es' * (world > 1)}, {kind}: {' '.join(rates)}", flush=True)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 numpy accelerate==1.15.0
run() {
  ACCELERATE_USE_CPU=true OMP_NUM_THREADS=1 "$folder/env/bin/torchrun" --standalone --nproc_per_node "$1" \
    "$folder/rates.py" "$2" 2> "$folder/errors" || { cat "$folder/errors" >&2; exit 1; }
}
{
  run 1 "as it is"
  run 1 "accumulating 2"
  for kind in "as it is" split_batches "not prepared" "accumulating 2"; do run 2 "$kind"; done
} | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
