#!/usr/bin/env bash
# torchdata 0.11.0 (torch 2.14.1) and datasets 5.0.1: loaders whose state is saved in the middle of a run and loaded by
# the script that begins again, which sets its seed at the start as scripts do. 12 images, batches of 2, two epochs.
#
# One would guess: a StatefulDataLoader that is resumed goes on as the run would have, and each epoch has its images once.
# Behaviour: which images come is restored, and no generator of random numbers.
#   - What a Dataset draws from torch's generator, crops and flips, begins again in the middle of an epoch with the first
#     draws of the run: one that is killed each night sees new images by the crops of its first batches, with workers and
#     without. (At an epoch's end it goes on with workers, as those are seeded by epoch; without, the draws are others.)
#   - Where the state is that of after an epoch's last batch the next loop over the loader has no batch: a loop that counts
#     epochs ends one early, and the mean loss of an epoch is 0 / 0. A state of batch 2 gives the rest of its epoch.
#   - A shuffled stream of datasets loses what lies in its buffer (its warning says that it is filled anew): with one of
#     12 images after 6 of 24, twelve are not seen in this epoch. The default buffer has 1,000.
#   (Source: torchdata/stateful_dataloader; datasets/iterable_dataset.py, BufferShuffledExamplesIterable.)
# What to do: draw an image's randomness from a hash of seed, epoch and index, so that nothing has to be saved; save in
#   the middle of an epoch, or skip a loop without a batch; read a stream's epoch again from its beginning.
# Output seen:
#   0 workers, saved after batch 2: batches 4, images go on, draws of batch 1 again
#   0 workers, saved after batch 6: batches 0, images go on, draws others
#   2 workers, saved after batch 2: batches 4, images go on, draws of batch 1 again
#   2 workers, saved after batch 6: batches 0, images go on, draws go on
#   datasets, saved after image 6: 6 follow, 12 never
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/resumed.py" <<'PY'
import datasets
import torch
from torch.utils.data import Dataset
from torchdata.stateful_dataloader import StatefulDataLoader


class Images(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, i):
        return i, torch.rand(()).item()


def loader(workers):
    torch.manual_seed(1)
    return StatefulDataLoader(
        Images(), batch_size=2, shuffle=True, num_workers=workers, collate_fn=list
    )


def parts(batches):
    """The images of batches, and what was drawn for them."""
    return tuple([[item[part] for item in batch] for batch in batches] for part in (0, 1))


for workers in (0, 2):
    one = loader(workers)
    run, states = [], []
    for _ in range(2):
        for batch in one:
            run.append(batch)
            states.append(one.state_dict())
    for saved in (2, 6):
        one = loader(workers)
        one.load_state_dict(states[saved - 1])
        epochs = [list(one) for _ in range(3)]
        again = sum(epochs, [])[: 12 - saved]
        images, draws = parts(run[saved:])
        images_again, draws_again = parts(again)
        first = parts(run)[1]
        kind = "others"
        if draws_again == draws:
            kind = "go on"
        elif draws_again[:4] == first[:4]:
            kind = "of batch 1 again"
        print(
            f"{workers} workers, saved after batch {saved}: batches {len(epochs[0])}, "
            f"images {'go on' if images_again == images else 'are others'}, draws {kind}"
        )


def stream():
    whole = datasets.Dataset.from_dict({"i": list(range(24))}).to_iterable_dataset()
    return whole.shuffle(seed=0, buffer_size=12)


one = stream()
images = iter(one)
seen = [next(images)["i"] for _ in range(6)]
state = one.state_dict()
one = stream()
one.load_state_dict(state)
rest = [item["i"] for item in one]
never = set(range(24)) - set(seen) - set(rest)
print(f"datasets, saved after image 6: {len(rest)} follow, {len(never)} never")
PY
export PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchdata==0.11.0 datasets==5.0.1
"$folder/env/bin/python" "$folder/resumed.py" 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
