#!/usr/bin/env bash
# torch 2.14.1 (AveragedModel), timm 1.0.31 (ModelEmaV2, ModelEmaV3), ema-pytorch 0.8.3 (EMA), mmengine 0.10.7
# (ExponentialMovingAverage): the teacher of Mean Teacher, "an EMA of decay 0.9", after the same 20 steps.
#
# One would guess: an exponential moving average with one decay is one network, whichever library keeps it; it holds what
#   the student's state_dict holds, averaged; and a teacher made of a student is ready to teach.
# Behaviour: for one decay four weights from 12 to 16, and teachers in two modes. A convolution of one weight, which is 1
#   at first and 1 + n after step n, and the statistics of a BN behind it:
#   - First step: AveragedModel and mmengine take a copy of the student, timm averages with the first weights, which a
#     short run keeps in its teacher (0.9^20 = 12 % of them after 20 steps).
#   - ema-pytorch's `beta` is the end of a ramp, and by default it looks at every tenth step and copies for the first 100:
#     after 20 steps it is the student of step 11. Mean Teacher's own ramp, 1 - 1/(n + 1), is none of these.
#   - mmengine's `momentum` is 1 - decay: 0.9 gives nearly the student.
#   - BN's statistics are copied from the student (AveragedModel, mmengine and timm with exclude_buffers), which puts an
#     average of weights beside statistics of the last ones; or averaged once more, as BN averages already (timm and
#     ema-pytorch by default, use_buffers=True, update_buffers=True), so behind by as many steps again.
#   - num_batches_tracked, an integer, is copied (20: AveragedModel, ModelEmaV3, mmengine), averaged and cut to a whole
#     number (10: ModelEmaV2 and use_buffers; 1: update_buffers) or left at 0 (ema-pytorch).
#   - Mode: timm's teacher is in eval mode; the others have that of the student they were made of, here train: pseudo
#     labels with the statistics of their own batch until someone calls eval().
#   (Source: torch/optim/swa_utils.py, timm/utils/model_ema.py, ema_pytorch.py, mmengine/model/averaged_model.py.)
# Output seen (weight, running mean, running variance, num_batches_tracked, mode):
#   by hand, from the first weights: 13.0942
#   by hand, from a copy at step 1: 13.2158
#   by hand, Mean Teacher's ramp: 13.5691
#   the student: 21.0000 2042.50 307.66 20 train
#   AveragedModel: 13.2158 2042.50 307.66 20 train
#   AveragedModel use_buffers: 13.2158 886.03 135.47 10 train
#   ModelEmaV2: 13.0942 885.75 135.41 10 eval
#   ModelEmaV3: 13.0942 885.75 135.41 20 eval
#   ModelEmaV3 exclude_buffers: 13.0942 2042.50 307.66 20 eval
#   EMA: 12.0000 459.89 72.70 0 train
#   EMA update_every=1, update_after_step=0: 15.9918 1145.86 174.67 0 train
#   ExponentialMovingAverage momentum 0.1: 13.2158 2042.50 307.66 20 train
#   ExponentialMovingAverage momentum 0.1 update_buffers: 13.2158 886.03 135.47 1 train
#   ExponentialMovingAverage momentum 0.9: 20.8889 2042.50 307.66 20 train
# Fails if that changes.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/teachers.py" <<'PY'
import torch
from ema_pytorch import EMA
from mmengine.model import ExponentialMovingAverage
from timm.utils import ModelEmaV2, ModelEmaV3
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

STEPS = 20


def new():
    net = nn.Sequential(nn.Conv2d(1, 1, 1, bias=False), nn.BatchNorm2d(1))
    net[0].weight.data.fill_(1)
    return net


def learn(net, step):
    """A step of training: the weight moves, BN sees a batch."""
    net[0].weight.data.fill_(1 + step)
    image = 10.0 * step + torch.arange(4.0).view(1, 1, 2, 2)
    with torch.no_grad():
        net.train()(image.expand(2, -1, -1, -1))


def say(name, net):
    weight, bn = net[0].weight.item(), net[1]
    statistics = f"{bn.running_mean.item():.2f} {bn.running_var.item():.2f} {bn.num_batches_tracked.item()}"
    print(f"{name}: {weight:.4f} {statistics} {'train' if bn.training else 'eval'}")


def by_hand(weight, keep):
    for step in range(STEPS):
        weight += (1 - keep(step)) * (2 + step - weight)
    return weight


print(f"by hand, from the first weights: {by_hand(1, lambda n: 0.9):.4f}")
print(f"by hand, from a copy at step 1: {by_hand(1, lambda n: 0.9 * (n > 0)):.4f}")
print(f"by hand, Mean Teacher's ramp: {by_hand(1, lambda n: min(1 - 1 / (n + 1), 0.9)):.4f}")
student = new()
for step in range(1, STEPS + 1):
    learn(student, step)
say("the student", student)

average = get_ema_multi_avg_fn(0.9)
KINDS = {
    "AveragedModel": lambda net: AveragedModel(net, multi_avg_fn=average),
    "AveragedModel use_buffers": lambda net: AveragedModel(net, multi_avg_fn=average, use_buffers=True),
    "ModelEmaV2": lambda net: ModelEmaV2(net, 0.9),
    "ModelEmaV3": lambda net: ModelEmaV3(net, 0.9),
    "ModelEmaV3 exclude_buffers": lambda net: ModelEmaV3(net, 0.9, exclude_buffers=True),
    "EMA": lambda net: EMA(net, beta=0.9),
    "EMA update_every=1, update_after_step=0": lambda net: EMA(
        net, beta=0.9, update_every=1, update_after_step=0
    ),
    "ExponentialMovingAverage momentum 0.1": lambda net: ExponentialMovingAverage(net, 0.1),
    "ExponentialMovingAverage momentum 0.1 update_buffers": lambda net: ExponentialMovingAverage(
        net, 0.1, update_buffers=True
    ),
    "ExponentialMovingAverage momentum 0.9": lambda net: ExponentialMovingAverage(net, 0.9),
}
for name, make in KINDS.items():
    student = new()
    teacher = make(student)
    for step in range(1, STEPS + 1):
        learn(student, step)
        if isinstance(teacher, EMA):
            teacher.update()
        elif isinstance(teacher, (ModelEmaV2, ModelEmaV3)):
            teacher.update(student)
        else:
            teacher.update_parameters(student)
    say(name, teacher.ema_model if isinstance(teacher, EMA) else teacher.module)
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 numpy timm==1.0.31 \
  ema-pytorch==0.8.3 mmengine==0.10.7 setuptools
# mmengine's logger warns of momentum 0.9 on the same stream
"$folder/env/bin/python" "$folder/teachers.py" 2> "$folder/errors" | grep -v WARNING |
  tee "$folder/seen" || { cat "$folder/errors"; exit 1; }
diff "$folder/seen" <(sed -n 's/^#   \([A-Za-z].*: [0-9.]* .*\(train\|eval\)\)$/\1/p; s/^#   \(by hand.*\)/\1/p' "$0")
