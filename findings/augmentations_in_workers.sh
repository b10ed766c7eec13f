#!/usr/bin/env bash
# albumentations 2.0.8, albumentationsx 2.5.1, monai 1.6.1, kornia 0.9.0, batchgeneratorsv2 0.3.6, torchvision 0.29.1
# (torch 2.14.1): random transforms inside a Dataset that two processes of torch's DataLoader read, two epochs.
#
# One would guess: since torch seeds numpy in every worker, too, random transforms differ between workers and epochs.
# Behaviour: a library, or a Dataset, with a numpy Generator or RandomState of its own takes no part in that seeding. Its
#   state is copied into every worker as it was before the loop, again at each epoch: all workers draw the same, image
#   for image, and each epoch repeats the one before. "Strong views" are one short list then, and no seed had been set.
#   - albumentations 2.0.8 (the last release of that name), MONAI in torch's own loader, default_rng() in a Dataset.
#   - persistent_workers=True goes on drawing in later epochs; the workers are still equal.
#   - albumentationsx and what draws from torch, numpy's or Python's global states differ everywhere.
#   - Remedies: monai.data.DataLoader; set_random_seed(torch.initial_seed() % 2**32) of the Compose in worker_init_fn.
#   (Source: albumentations/core/composition.py; torch/utils/data/_utils/worker.py; known as AlbumentationsX's issue 266.)
# Output seen (workers, second epoch):
#   albumentations: equal, repeated
#   albumentations, persistent workers: equal, goes on
#   albumentations, worker_init_fn: differ, goes on
#   monai: equal, repeated
#   monai, its DataLoader: differ, goes on
#   numpy Generator of the Dataset: equal, repeated
#   numpy, global: differ, goes on
#   torchvision: differ, goes on
#   kornia: differ, goes on
#   batchgeneratorsv2: differ, goes on
#   albumentationsx: differ, goes on
# Fails if that changes. Installs into a temporary folder (5 GB).
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/draws.py" <<'PY'
import sys

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info


def chw(image):
    return torch.from_numpy(image).permute(2, 0, 1).float() / 255


def with_albumentations():
    import albumentations

    change = albumentations.RandomBrightnessContrast((-0.5, 0.5), (0, 0), p=1)
    compose = albumentations.Compose([change])
    return compose, lambda image: compose(image=image)["image"]


def with_monai():
    from monai.transforms import Compose, RandScaleIntensity

    compose = Compose([RandScaleIntensity(factors=0.5, prob=1.0)])
    return compose, lambda image: compose(chw(image))


def with_generator():
    rng = np.random.default_rng()
    return rng, lambda image: image * rng.uniform(0.5, 1.5)


def with_global_state():
    return None, lambda image: image * np.random.uniform(0.5, 1.5)


def with_torchvision():
    from torchvision.transforms import v2

    change = v2.ColorJitter(brightness=0.5)
    return change, lambda image: change(chw(image))


def with_kornia():
    from kornia.augmentation import RandomBrightness

    change = RandomBrightness((0.5, 1.5), p=1.0)
    return change, lambda image: change(chw(image))


def with_batchgenerators():
    from batchgeneratorsv2.transforms.intensity import brightness

    change = brightness.MultiplicativeBrightnessTransform((0.5, 1.5), False, 1.0)
    return change, lambda image: change(image=chw(image))["image"]


class Pictures(Dataset):
    """Eight grey pictures; an item is the mean of one after its transform."""

    def __init__(self, make):
        self.change, self.changed = make()

    def __len__(self):
        return 8

    def __getitem__(self, i):
        return float(self.changed(np.full((8, 8, 3), 100, np.uint8)).mean())


def reseed(worker):
    get_worker_info().dataset.change.set_random_seed(torch.initial_seed() % 2**32)


def show(name, make, kind=DataLoader, **options):
    loader = kind(Pictures(make), batch_size=1, num_workers=2, **options)
    first, second = ([float(x) for x in loader] for _ in range(2))
    workers = "equal" if first[0::2] == first[1::2] else "differ"
    print(f"{name}: {workers}, {'repeated' if first == second else 'goes on'}")


if sys.argv[1:] == ["x"]:
    show("albumentationsx", with_albumentations)
    sys.exit()

import monai.data

show("albumentations", with_albumentations)
show("albumentations, persistent workers", with_albumentations, persistent_workers=True)
show("albumentations, worker_init_fn", with_albumentations, worker_init_fn=reseed)
show("monai", with_monai)
show("monai, its DataLoader", with_monai, monai.data.DataLoader)
show("numpy Generator of the Dataset", with_generator)
show("numpy, global", with_global_state)
show("torchvision", with_torchvision)
show("kornia", with_kornia)
show("batchgeneratorsv2", with_batchgenerators)
PY
export NO_ALBUMENTATIONS_UPDATE=1 PYTHONWARNINGS=ignore
python3 -m venv "$folder/env"
"$folder/env/bin/pip" install -q torch==2.14.1 torchvision==0.29.1 albumentations==2.0.8 \
  monai==1.6.1 kornia==0.9.0 batchgeneratorsv2==0.3.6
"$folder/env/bin/pip" install -q --target "$folder/x" --no-deps albumentationsx==2.5.1 \
  albucore==0.3.1 numkong==7.8.6
{
  "$folder/env/bin/python" "$folder/draws.py"
  PYTHONPATH=$folder/x "$folder/env/bin/python" "$folder/draws.py" x
} 2> "$folder/errors" | tee "$folder/seen" || cat "$folder/errors"
diff "$folder/seen" <(sed -n '/^# Output seen/,/^# Fails/s/^#   //p' "$0")
