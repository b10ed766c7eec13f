#!/usr/bin/env bash
# datasets 5.2.0: a stream of 400 pictures in 8 shards, split by take(80), to be scored, and skip(80), to be trained on.
#
# One would guess: take(n) and skip(n) of one stream with one seed are two parts of it that have nothing in common, for
#   the whole run. The documentation says "You should shuffle your dataset before splitting it".
# Behaviour: take and skip count what comes out, and what comes out is shuffled anew after set_epoch, which training code
#   calls so that the order changes. Another order has other first pictures: "20 labelled pictures" are 20 others in each
#   epoch, and after five epochs all pictures that are scored have been trained on. The count is also dealt out to the
#   processes: each takes and skips its share of its own shards. Scored by one process and trained on by four, the two
#   parts overlap from the first epoch on, without any shuffle, too. The numbers of pictures are right throughout.
#   - Workers of a DataLoader count as processes do: none for one part and four for the other overlap as well.
#   - As meant: choose by something that a picture has itself (filter by a hash of its name). Or shuffle after the split,
#     the reverse of what is documented, with as many processes and workers for both parts. Or split what is no stream,
#     Dataset.train_test_split, and make the streams of its parts.
#   (Source: datasets/iterable_dataset.py, shift_ex_examples_rngs goes through TakeExamplesIterable and
#   SkipExamplesIterable, which refuse only the shards' shuffle; split_number; docs/source/stream.mdx, "Split dataset".)
# Output seen (pictures trained on in the first epoch and in all epochs, and how many of these are scored):
#   shuffled and split, 1 epoch: 320 and 320, scored 0
#   shuffled and split, 5 epochs: 320 and 400, scored 80
#   shuffled and split, trained by 4 processes: 320 and 320, scored 65
#   not shuffled, trained by 4 processes: 320 and 320, scored 40
#   split and shuffled, 5 epochs: 320 and 320, scored 0
#   by a hash and shuffled, 5 epochs, 4 processes: 328 and 328, scored 0
#   take(20), after 1, 2, 5, 20 epochs: 20 38 89 252
# Fails if that changes. Installs into a temporary folder (400 MB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/parts.py" <<'PY'
import zlib

from datasets import Dataset
from datasets.distributed import split_dataset_by_node

SCORED = 80
pictures = Dataset.from_dict({"id": list(range(400))}).to_iterable_dataset(num_shards=8)


def seen(stream, epochs=1, processes=1):
    """The ids that all processes have met in each epoch."""
    found = []
    for epoch in range(epochs):
        found.append(set())
        for rank in range(processes):
            part = stream
            if processes > 1:
                part = split_dataset_by_node(stream, rank=rank, world_size=processes)
            part.set_epoch(epoch)
            found[-1].update(example["id"] for example in part)
    return found


def show(name, scored, trained, **run):
    (held,) = seen(scored)
    epochs = seen(trained, **run)
    met = set().union(*epochs)
    print(f"{name}: {len(epochs[0])} and {len(met)}, scored {len(held & met)}")


def is_scored(example):
    return zlib.crc32(str(example["id"]).encode()) % 5 == 0


def is_trained(example):
    return not is_scored(example)


mixed = pictures.shuffle(seed=0)
parts = mixed.take(SCORED), mixed.skip(SCORED)
show("shuffled and split, 1 epoch", *parts)
show("shuffled and split, 5 epochs", *parts, epochs=5)
show("shuffled and split, trained by 4 processes", *parts, processes=4)
parts = pictures.take(SCORED), pictures.skip(SCORED)
show("not shuffled, trained by 4 processes", *parts, processes=4)
parts = pictures.take(SCORED), pictures.skip(SCORED).shuffle(seed=0)
show("split and shuffled, 5 epochs", *parts, epochs=5)
parts = pictures.filter(is_scored), pictures.filter(is_trained).shuffle(seed=0)
show("by a hash and shuffled, 5 epochs, 4 processes", *parts, epochs=5, processes=4)
few = [len(set().union(*seen(mixed.take(20), epochs))) for epochs in (1, 2, 5, 20)]
print(f"take(20), after 1, 2, 5, 20 epochs: {' '.join(map(str, few))}")
PY
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q datasets==5.2.0
"$folder/env/bin/python" "$folder/parts.py" | tee "$folder/seen"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
