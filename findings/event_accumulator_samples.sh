#!/usr/bin/env bash
# tensorboard 2.21.0 and tbparse 0.0.9, logs written by tensorboardX 2.6.5: a run's log, read to plot it or to take its
# pictures out.
#
# One would guess: EventAccumulator(folder) gives what was logged; Scalars("loss") is every point, Images("val") every picture
#   or the latest of them.
# Behaviour: it gives a random sample, always the same one, with the last entry: 10,000 scalars, 4 pictures, 1 histogram and
#   10 tensors, as which TensorFlow's summaries keep scalars. Nothing says so. A lowest loss, or a spike of it, is mostly gone.
#   - EventAccumulator(folder, size_guidance={"scalars": 0, "images": 0}) gives all; 0 is no limit.
#   - tbparse reads scalars without a limit.
#   (Source: tensorboard/backend/event_processing/event_accumulator.py, DEFAULT_SIZE_GUIDANCE; reservoir.py.)
# Output seen (20,000 losses, the lowest 0.1 at step 7,001; 60 pictures):
#   EventAccumulator: 10000 losses, the lowest 1.0
#   its pictures, by step: 5 45 53 59
#   its histograms, by step: 59
#   without limits: 20000 losses, the lowest 0.1; 60 pictures
#   tbparse: 20000 losses, the lowest 0.1
# Fails if that changes. Installs into a temporary folder (0.4 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/sampled.py" <<'PY'
import sys

import numpy as np
from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboardX import SummaryWriter

log = sys.argv[1]
with SummaryWriter(log) as writer:
    for step in range(1, 20001):
        writer.add_scalar("loss", 0.1 if step == 7001 else 1.0, step)
    for step in range(60):
        writer.add_image("val", np.zeros((3, 4, 4), np.uint8), step)
        writer.add_histogram("weights", np.arange(10.0), step)


def losses(values):
    return f"{len(values)} losses, the lowest {min(values):.1f}"


def steps(events):
    return " ".join(str(event.step) for event in events)


sample = EventAccumulator(log)
sample.Reload()
print("EventAccumulator:", losses([event.value for event in sample.Scalars("loss")]))
print("its pictures, by step:", steps(sample.Images("val")))
print("its histograms, by step:", steps(sample.Histograms("weights")))
whole = EventAccumulator(log, size_guidance={"scalars": 0, "images": 0})
whole.Reload()
found = losses([event.value for event in whole.Scalars("loss")])
print(f"without limits: {found}; {len(whole.Images('val'))} pictures")
print("tbparse:", losses(list(SummaryReader(log).scalars.value)))
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q tensorboard==2.21.0 tbparse==0.0.9 tensorboardX==2.6.5 numpy==2.4.6
"$folder/env/bin/python" "$folder/sampled.py" "$folder/log" 2> "$folder/said" | tee "$folder/seen" \
    || { cat "$folder/said" >&2; exit 1; }
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
