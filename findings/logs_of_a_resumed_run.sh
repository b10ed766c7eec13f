#!/usr/bin/env bash
# tensorboard 2.21.0, tbparse 0.0.9, pytorch-lightning 2.6.6, dvclive 3.49.1, mlflow-skinny 3.17.2 (torch 2.14.1): a run
# logs mIoU at every step, saves at 50 and is killed at 80. It goes on from 50 and ends at 100. Step 70 of the killed part had
# its best score, 0.90; no weights of it are left.
#
# One would guess: whoever reads the log finds 100 points, a step's value being that of the run that went on.
# Behaviour: most find 130, two for each step from 51 to 80, and with a maximum the score of weights that were lost.
#   - torch's SummaryWriter(purge_step=51) writes where the run went on, and TensorBoard obeys. tbparse does not: it opens
#     one file of a folder at a time, and what is to be purged lies in another.
#   - Lightning's TensorBoardLogger passes purge_step on where it is given and sets none itself. Its CSVLogger with the same
#     version deletes the log of steps 1 to 50 (with a warning).
#   - DVCLive(resume=True) counts on from the last step that was logged, 80, not from the last that was saved.
#   - What to do: the last value of each step in the order of time; the maximum only after that.
#   (Source: tbparse/summary_reader.py, __init__; tensorboard, event_accumulator.py, _CheckForRestartAndMaybePurge.)
# Output seen (points, best mIoU):
#   torch, by EventAccumulator: 130 0.90
#   torch with purge_step, by EventAccumulator: 100 0.60
#   torch with purge_step, by tbparse: 130 0.90
#   the last value of each step, by tbparse: 100 0.60
#   Lightning's TensorBoardLogger, by EventAccumulator: 130 0.90
#   Lightning's CSVLogger: 50 0.60
#   DVCLive: 130 0.90
#   DVCLive goes on at step 81
#   MLflow: 130 0.90
# Fails if that changes. Installs into a temporary folder (6 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resumed.py" <<'PY'
import csv
import logging
import sys
import time
import warnings
from pathlib import Path

import mlflow
from dvclive import Live
from pytorch_lightning.loggers import CSVLogger, TensorBoardLogger
from tbparse import SummaryReader
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.utils.tensorboard import SummaryWriter

warnings.simplefilter("ignore")
logging.disable(logging.WARNING)
ROOT = Path(sys.argv[1])
KILLED = {step: 0.9 if step == 70 else 0.5 + step / 1000 for step in range(1, 81)}
WENT_ON = {step: 0.5 + step / 1000 for step in range(51, 101)}


def show(what, values):
    print(f"{what}: {len(values)} {max(values):.2f}")


def board(name, **options):
    """A run's folder as torch writes it."""
    for part in (KILLED, WENT_ON):
        writer = SummaryWriter(str(ROOT / name), **(options if part is WENT_ON else {}))
        for step, value in part.items():
            writer.add_scalar("mIoU", value, step)
        writer.close()
        time.sleep(1.1)  # the names of the files are in seconds
    return str(ROOT / name)


def accumulated(path):
    events = EventAccumulator(str(path))
    events.Reload()
    return [event.value for event in events.Scalars("mIoU")]


show("torch, by EventAccumulator", accumulated(board("plain")))
purged = board("purged", purge_step=51)
show("torch with purge_step, by EventAccumulator", accumulated(purged))
table = SummaryReader(purged, extra_columns={"wall_time"}).scalars
show("torch with purge_step, by tbparse", list(table.value))
last = table.sort_values("wall_time").groupby("step").value.last()
show("the last value of each step, by tbparse", list(last))

for kind in (TensorBoardLogger, CSVLogger):
    for part in (KILLED, WENT_ON):
        logger = kind(str(ROOT), name=kind.__name__, version=0)
        for step, value in part.items():
            logger.log_metrics({"mIoU": value}, step)
        logger.finalize("success")
        time.sleep(1.1)
    if kind is TensorBoardLogger:
        values = accumulated(ROOT / kind.__name__ / "version_0")
        show("Lightning's TensorBoardLogger, by EventAccumulator", values)
    else:
        with open(ROOT / kind.__name__ / "version_0" / "metrics.csv") as file:
            show("Lightning's CSVLogger", [float(row["mIoU"]) for row in csv.DictReader(file)])

for part in (KILLED, WENT_ON):
    again = part is WENT_ON
    with Live(str(ROOT / "live"), resume=again, save_dvc_exp=False, report=None) as live:
        begin = live.step
        for step, value in part.items():
            live.step = step
            live.log_metric("mIoU", value)
            live.make_summary()
with open(next((ROOT / "live").rglob("mIoU.tsv"))) as file:
    show("DVCLive", [float(row["mIoU"]) for row in csv.DictReader(file, delimiter="\t")])
print(f"DVCLive goes on at step {begin}")

mlflow.set_tracking_uri(f"sqlite:///{ROOT}/mlflow.db")
run = None
for part in (KILLED, WENT_ON):
    with mlflow.start_run(run_id=run):
        run = mlflow.active_run().info.run_id
        for step, value in part.items():
            mlflow.log_metric("mIoU", value, step=step)
history = mlflow.MlflowClient().get_metric_history(run, "mIoU")
show("MLflow", [point.value for point in history])
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 tensorboard==2.21.0 tbparse==0.0.9 \
    pytorch-lightning==2.6.6 dvclive==3.49.1 mlflow-skinny==3.17.2 sqlalchemy==2.1.9 alembic==1.20.1
(cd "$folder" && DVC_NO_ANALYTICS=1 MLFLOW_DISABLE_TELEMETRY=true env/bin/python resumed.py \
    "$folder/logs" 2> said || { cat said >&2; exit 1; }) | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
