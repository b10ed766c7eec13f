"""What another number of processes changes: losses of one batch, whole and in parts.

    python benchmarks/per_process.py   # writes results/per_process.json, seconds

8 images of 32x32 pixels with 19 classes and random logits, some surer than others, up to half of
an image padding, a fifth of the labels void. The batch is what 1, 2, 4 or 8 processes share; the
gradient of a step is the mean of theirs, as DDP makes it. Printed and written: how far it is from
that of one process, |difference| / |gradient|, in per cent. L_c of U2PL draws anchors and
negatives: the last line is how far two draws of one process are apart.
"""

import argparse
import importlib
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

ael_fpl, cps_fpl, supervised, u2pl = map(
    importlib.import_module, ("ael_fpl", "cps_fpl", "supervised", "u2pl")
)

RESULT = ROOT / "results" / "per_process.json"
COUNTS = (2, 4, 8)  # processes
N, C, SIDE = 8, 19, 32
FPL = SimpleNamespace(
    T=(0.9,), k_max=3, strict=False, weight="concave", mean_over="positives_and_next", fused="off"
)
FPL.k_strategy = "n-1"
FPL.unsup_loss = "fpl"


def batch():
    """Returns a batch as a dict: logits z, t (N, C, H, W), inside, label (N, H, W)."""
    torch.manual_seed(0)
    coarse = torch.randn(2, N, C, 4, 4)
    t, z = (F.interpolate(x, (SIDE, SIDE), mode="bilinear") for x in coarse)
    z = 2 * (z + t)
    t = t * torch.linspace(1, 6, N).view(-1, 1, 1, 1)
    inside = torch.zeros(N, SIDE, SIDE, dtype=torch.bool)
    for i in range(N):
        inside[i, : SIDE - 2 * i] = True
    label = (t + torch.randn_like(t)).argmax(1)
    label[(torch.rand(label.shape) < 0.2) | ~inside] = 255
    return {"z": z, "t": t, "inside": inside, "label": label}


def cross_entropy(z, t, inside, label):
    return supervised.cross_entropy(z, label)


def ohem(z, t, inside, label):
    return supervised.ohem_cross_entropy(z, label, 0.7, SIDE * SIDE // 10)


def fpl(z, t, inside, label):
    args = SimpleNamespace(**vars(FPL), balance=False)
    return cps_fpl.cross_loss((z, z), (t, t), inside, 0.0, args)[0]


def fpl_balanced(z, t, inside, label):
    args = SimpleNamespace(**vars(FPL), balance=True)
    return cps_fpl.cross_loss((z, z), (t, t), inside, 0.0, args)[0]


def one_balance(z, t, inside, label):
    """As fpl_balanced, but with one factor for all images of a process."""
    args = SimpleNamespace(**vars(FPL), balance=False)
    loss = cps_fpl.cross_loss((z, z), (t, t), inside, 0.0, args)[0]
    ce = 2 * supervised.cross_entropy(z, t.argmax(1).masked_fill(~inside, 255))
    return loss * (ce / loss).detach()


def ael(pooled):
    def consistency(z, t, inside, label):
        args = SimpleNamespace(**vars(FPL), balance=False, gamma=2.0, threshold=0.0)
        rate = torch.ones(C)  # every pixel is kept: nothing is drawn
        return ael_fpl.consistency_loss(z, t, inside, rate, pooled, args)[0]

    return consistency


def u2pl_labels(z, t, inside, label):
    """L_u and its weight, Eq. (6) and (8), with the percentile of the process."""
    H = u2pl.entropy(t.softmax(1))
    (gamma,) = u2pl.quantiles(H, inside, 0.8)
    y = u2pl.reliable_labels(t.argmax(1).masked_fill(~inside, 255), H, gamma)
    return u2pl.unsup_weight(y, inside, 1.0) * u2pl.cross_entropy(z, y)


def u2pl_contrast(seed):
    def contrast(z, t, inside, label):
        """L_c, Eq. (4): z+ and 50 anchors of a class are of the process, its queue of all."""
        torch.manual_seed(seed + int(inside.sum()))
        args = SimpleNamespace(anchors=50, negatives=64, unreliable_loss="contrastive", tau=0.5)
        bank = F.normalize(
            torch.randn(20 * C + 1, C, generator=torch.Generator().manual_seed(1)), dim=1
        )
        A_c = u2pl.anchor_masks(u2pl.as_rows(t.softmax(1)), label.flatten(), 0.3)
        sizes = torch.full((C,), 20)
        u = torch.rand(C, 50 + 50 * 64, dtype=torch.float64)
        maps = A_c, bank, sizes.clone(), sizes, u
        return u2pl.unreliable_loss(u2pl.as_rows(z), u2pl.as_rows(t), *maps, args)[0]

    return contrast


GROUPS = "AEL Eq. (12), groups of 2"
LOSSES = {
    "cross-entropy, mean over valid pixels": cross_entropy,
    "OHEM, per image": ohem,
    "FPL on CPS, mean over pixels inside": fpl,
    "FPL on CPS, balance per image": fpl_balanced,
    "FPL on CPS, one balance a process": one_balance,
    "AEL Eq. (12), mixed images": ael(1),
    GROUPS: ael(2),
    "U2PL L_u, percentile and lambda_u": u2pl_labels,
    "U2PL L_c, anchors and z+": u2pl_contrast(0),
}


def gradient(loss_of, given, processes):
    """Returns the gradient by z of the mean over processes, (N, C, H, W)."""
    z = given["z"].clone().requires_grad_()
    parts = {key: x.chunk(processes) for key, x in given.items()} | {"z": z.chunk(processes)}
    losses = [
        loss_of(*(parts[key][i] for key in ("z", "t", "inside", "label"))) for i in range(processes)
    ]
    return torch.autograd.grad(sum(losses) / processes, z)[0]


def apart(found, whole):
    """Returns |found - whole| / |whole| in per cent."""
    return 100 * float((found - whole).norm() / whole.norm())


def rows(given):
    """Yields (loss, {processes: per cent, or None where the script refuses so many})."""
    for name, loss_of in LOSSES.items():
        whole = gradient(loss_of, given, 1)
        found = {}
        for count in COUNTS:
            refused = name == GROUPS and N // count < 2  # --pooled 2 does not divide one image
            far = None if refused else apart(gradient(loss_of, given, count), whole)
            found[str(count)] = far
        yield name, found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", default=str(RESULT))
    options = parser.parse_args()
    torch.set_num_threads(1)
    found = {}
    given = batch()
    print(" " * 40 + "".join(f"{count:>10}" for count in COUNTS))
    for name, row in rows(given):
        found[name] = row
        cells = ("refused" if far is None else f"{far:.1f} %" for far in row.values())
        print(f"{name:40}" + "".join(f"{cell:>10}" for cell in cells))
    again = apart(*(gradient(u2pl_contrast(seed), given, 1) for seed in (1, 0)))
    print(f"U2PL L_c, two draws of one process: {again:.1f} %")
    written = {"torch": torch.__version__, "processes": COUNTS, "rows": found, "draws": again}
    Path(options.out).write_text(json.dumps(written, indent=1) + "\n")


if __name__ == "__main__":
    main()
