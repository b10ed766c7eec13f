#!/usr/bin/env bash
# torch 2.14.1, timm 1.0.31, transformers 5.24.0, mmengine 0.10.7: a run of 10 steps goes on to 20, from what it saved.
#
# One would guess: whoever builds the schedule for 20 steps, loads the states of optimizer and schedule, as every tutorial
#   does, and trains on gets the rates of a schedule of 20 steps from there; or an error.
# Behaviour: the length is part of the saved state and overwrites the new one without a word, in all but what holds the
#   schedule as a function. The run trains on, at the rate 0 or on another curve:
#   - PolynomialLR (the rate of this field), also within SequentialLR behind a warm-up, timm's PolyLRScheduler and
#     mmengine's PolyLR: rate 0 (or their least rate) from step 11 on, whether the run was ended after 5 steps or after
#     10. Loss and score stay where they are, as those of a network that has converged do.
#   - CosineAnnealingLR rises again, to the full rate in step 21. (timm's and SGDR's restarts do so on purpose.)
#   - OneCycleLR alone says so, after the eleventh step.
#   - LambdaLR, and so transformers' schedules, leave functions out of the state: the rates are those of 20 steps. But the
#     first step after the load has the last rate of the old schedule, which the optimizer's state holds.
#   - None gives the rates of a run of 20 steps as a whole: the first steps had those of 10.
#   - Beside it: mmengine divides by one step less than it is given. With its least rate at 0 the tenth step of 10 learns
#     nothing; the others reach 0 after it.
#   (Source: LRScheduler.state_dict and LambdaLR.state_dict in torch/optim/lr_scheduler.py; timm/scheduler/scheduler.py;
#   mmengine/optim/scheduler/param_scheduler.py.)
# Output seen (1000 times the rate of each step):
#   10 steps, none resumed: 10.0 9.1 8.2 7.3 6.3 5.4 4.4 3.4 2.3 1.3
#   20 steps, none resumed: 10.0 9.5 9.1 8.6 8.2 7.7 7.3 6.8 6.3 5.8 5.4 4.9 4.4 3.9 3.4 2.9 2.3 1.8 1.3 0.7
#   PolynomialLR, after 5: 5.4 4.4 3.4 2.3 1.3 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   PolynomialLR, after 10: 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   warm-up, PolynomialLR, after 5: 6.6 5.4 4.1 2.9 1.5 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   warm-up, PolynomialLR, after 10: 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   timm PolyLRScheduler, after 5: 5.4 4.4 3.4 2.3 1.3 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   timm PolyLRScheduler, after 10: 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   mmengine PolyLR, after 5: 4.8 3.7 2.6 1.4 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   mmengine PolyLR, after 10: 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0 0.0
#   CosineAnnealingLR, after 5: 5.0 3.5 2.1 1.0 0.2 0.0 0.2 1.0 2.1 3.5 5.0 6.5 7.9 9.0 9.8
#   CosineAnnealingLR, after 10: 0.0 0.2 1.0 2.1 3.5 5.0 6.5 7.9 9.0 9.8
#   OneCycleLR, after 5: 6.1 3.9 1.9 0.5 0.0 0.5 then ValueError
#   OneCycleLR, after 10: 0.5 then ValueError
#   LambdaLR, after 5: 5.4 7.3 6.8 6.3 5.8 5.4 4.9 4.4 3.9 3.4 2.9 2.3 1.8 1.3 0.7
#   LambdaLR, after 10: 0.0 4.9 4.4 3.9 3.4 2.9 2.3 1.8 1.3 0.7
#   transformers polynomial, after 5: 5.4 7.3 6.8 6.3 5.8 5.4 4.9 4.4 3.9 3.4 2.9 2.3 1.8 1.3 0.7
#   transformers polynomial, after 10: 0.0 4.9 4.4 3.9 3.4 2.9 2.3 1.8 1.3 0.7
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/longer.py" <<'PY'
import torch
from mmengine.optim import PolyLR
from timm.scheduler import PolyLRScheduler
from torch.optim import lr_scheduler as torch_lr
from transformers import get_polynomial_decay_schedule_with_warmup

FIRST, LONGER, POWER = 10, 20, 0.9


def warm(optimizer, total):
    parts = [
        torch_lr.LinearLR(optimizer, 0.1, total_iters=2),
        torch_lr.PolynomialLR(optimizer, total - 2, POWER),
    ]
    return torch_lr.SequentialLR(optimizer, parts, [2])


def by_lambda(optimizer, total):
    return torch_lr.LambdaLR(optimizer, lambda step: max(1 - step / total, 0) ** POWER)


def of_transformers(optimizer, total):
    return get_polynomial_decay_schedule_with_warmup(optimizer, 0, total, lr_end=0, power=POWER)


KINDS = {
    "PolynomialLR": lambda optimizer, total: torch_lr.PolynomialLR(optimizer, total, POWER),
    "warm-up, PolynomialLR": warm,
    "timm PolyLRScheduler": lambda optimizer, total: PolyLRScheduler(
        optimizer, t_initial=total, power=POWER, t_in_epochs=False
    ),
    "mmengine PolyLR": lambda optimizer, total: PolyLR(
        optimizer, power=POWER, begin=0, end=total, by_epoch=False
    ),
    "CosineAnnealingLR": lambda optimizer, total: torch_lr.CosineAnnealingLR(optimizer, total),
    "OneCycleLR": lambda optimizer, total: torch_lr.OneCycleLR(optimizer, 0.01, total_steps=total),
    "LambdaLR": by_lambda,
    "transformers polynomial": of_transformers,
}


def build(make, total):
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.01)
    return optimizer, make(optimizer, total)


def train(optimizer, schedule, steps):
    """Returns the rates of the steps as text, and the error that ended them."""
    rates, error = [], ""
    try:
        for step in steps:
            rates.append(f"{1000 * optimizer.param_groups[0]['lr']:.1f}")
            optimizer.step()
            if isinstance(schedule, PolyLRScheduler):
                schedule.step_update(step)
            else:
                schedule.step()
    except ValueError:
        error = " then ValueError"
    return " ".join(rates) + error


for total in (FIRST, LONGER):
    rates = train(*build(KINDS["PolynomialLR"], total), range(1, total + 1))
    print(f"{total} steps, none resumed: {rates}")
for name, make in KINDS.items():
    for ended in (FIRST // 2, FIRST):
        optimizer, schedule = build(make, FIRST)
        train(optimizer, schedule, range(1, ended + 1))
        saved = optimizer.state_dict(), schedule.state_dict()
        optimizer, schedule = build(make, LONGER)
        optimizer.load_state_dict(saved[0])
        schedule.load_state_dict(saved[1])
        print(f"{name}, after {ended}: {train(optimizer, schedule, range(ended + 1, LONGER + 1))}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy timm==1.0.31 \
  transformers==5.24.0 mmengine==0.10.7 setuptools
"$folder/env/bin/python" -W ignore "$folder/longer.py" 2> "$folder/errors" | grep ": [0-9]" |
  tee "$folder/seen" || { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
