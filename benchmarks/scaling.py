"""Estimates for 8, 64 and 512 GPUs, out of counted operations and stated assumptions.

    python benchmarks/scaling.py                    # results/scaling.json, minutes
    python benchmarks/scaling.py --scripts cps_fpl  # rows of one script are made again
    python benchmarks/scaling.py --quick            # ResNet-18, nothing written

Counted, on fake tensors (benchmarks/fake_cuda.py, no GPU): the floating-point operations of the
convolutions of a step with one labelled image a process and what belongs to it, at the recipe for
Cityscapes with ResNet-101; the bytes of the gradients; the BN layers that a step goes through, each
of which is one exchange of SyncBN, forward or backward (those of a teacher in eval mode are counted
too, and exchange nothing: a bound). Assumed: RATE, LINKS and LATENCY below, and
that nothing of the exchange hides behind the computing, though DDP hides some. docs/scaling.md has
the table: benchmarks/page.py.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from torch.utils.flop_counter import FlopCounterMode  # noqa: E402

from benchmarks import fake_cuda, memory, steps  # noqa: E402

RESULT = ROOT / "results" / "scaling.json"
RATE = 60e12  # operations a second: an A100's TF32 at 40 % of its peak
LINKS = {8: 200e9, 64: 20e9, 512: 20e9}  # bytes a second: NVLink; a card of 200 Gb/s a machine of 8
LATENCY = {8: 30e-6, 64: 60e-6, 512: 100e-6}  # seconds of a small exchange
IMAGES = 4  # labelled ones of the steps that are counted


def counted(name, backbone):
    """Returns what one step of a script does for each labelled image of a process, and its size."""
    args = memory.arguments(name, "cityscapes", backbone, "none", IMAGES)
    trained = []

    def after(watch, done):
        """Notes the bytes of the parameters that train."""
        found = [p for net in watch.networks.values() for p in net.parameters() if p.requires_grad]
        trained.append(sum(p.numel() * p.element_size() for p in found))

    more = {"batches": steps.random_batches(classes=19), "classes": 19, "after": after}
    with FlopCounterMode(display=False) as flops:
        mode = fake_cuda.fake_steps(name, args, **more)
    norms = mode.operations["native_batch_norm"] + mode.operations["native_batch_norm_backward"]
    return {
        "script": name,
        "backbone": backbone,
        "crop": args.crop_size,
        "tflop": flops.get_total_flops() / 2 / IMAGES / 1e12,
        "gradient_mb": trained[-1] / 1e6,
        "exchanges": norms // 2,
    }


def estimate(row):
    """Returns {GPUs: seconds a step and share of it that computes}, one labelled image on each."""
    found = {}
    compute = row["tflop"] * 1e12 / RATE
    for gpus in LINKS:
        gradients = 2 * row["gradient_mb"] * 1e6 / LINKS[gpus]  # a ring moves them twice
        norms = row["exchanges"] * LATENCY[gpus]
        total = compute + gradients + norms
        found[str(gpus)] = {"s": total, "computing": compute / total}
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--scripts", nargs="*", choices=memory.SCRIPTS, default=memory.SCRIPTS)
    options = parser.parse_args()
    rows = {}
    backbone = "resnet101"
    if options.quick:
        backbone = "resnet18"
        options.scripts = ["supervised"]
    elif RESULT.exists():
        rows = {row["script"]: row for row in json.loads(RESULT.read_text())["rows"]}
    for name in options.scripts:
        rows[name] = counted(name, backbone)
        rows[name]["gpus"] = estimate(rows[name])
        print(rows[name], flush=True)
        if not options.quick:
            found = {"torch": torch.__version__, "rows": list(rows.values())}
            RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
