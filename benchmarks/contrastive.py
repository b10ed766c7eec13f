"""U2PL's contrastive loss: u2pl.py's definition and common/fused.py, in time and peak memory.

python benchmarks/contrastive.py             # writes results/contrastive.json
python benchmarks/contrastive.py --negatives 50 --anchors 256
python benchmarks/contrastive.py --check     # only that both compute the same, on a small case

A call is: ranks, masks, features into the bank, anchors, negatives, Eq. (4), backward. The
definition goes through it one class at a time (--fused off), its twin in common/fused.py all
classes at once (--fused on). Both get the same random numbers, and their loss, gradient and banks
are asserted to be equal before anything is timed. Then they take turns in one process; ratios are
to the definition, median and [lowest..highest] of the rounds. Memory is what a call adds to the
inputs and the bank, at its peak, in a process of its own (on a CPU: resident pages, each allocation
above 64 KiB returned when it is freed); the gradient of the features alone is one of its parts, the
same for both.
"""

import json
import os
import statistics
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402

import u2pl  # noqa: E402
from common import fused  # noqa: E402
from common.distributed import setup  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402

RESULT = ROOT / "results" / "contrastive.json"


@dataclass
class Args:
    """The size of the problem."""

    images: int = 8  # half of them labelled
    size: int = 129  # of the features, square
    channels: int = 256  # of the features
    classes: int = 21
    anchors: int = 50  # M
    negatives: int = 256  # N
    keys: int = 512  # features that enter a class's queue
    first: int = 50_000  # in the queue of class 0
    rest: int = 30_000  # and of each other class
    bank_dtype: Literal["fp32", "bf16"] = "fp32"  # u2pl.py's
    unreliable_loss: Literal["contrastive"] = "contrastive"
    tau: float = 0.5
    rounds: int = 5  # the median counts
    device: Literal["cpu", "cuda"] = "cpu"
    check: bool = False  # compare on a small case and stop
    only: Literal["", "definition", "fused"] = ""  # one of the two, for a process of its own


def inputs(args):
    """Returns ({argument of call: tensor}, full bank): blobs of labels, and a teacher that is
    mostly right about them."""
    torch.manual_seed(0)
    B = args.images
    C = args.classes
    n = args.size
    blobs = torch.randint(0, C, (B, 1, n // 12 + 1, n // 12 + 1)).float()
    truth = F.interpolate(blobs, (n, n))[:, 0].long()
    logits = 2.5 * torch.randn(B, C, n, n) + 6 * F.one_hot(truth, C).movedim(3, 1)
    prob = logits.softmax(1)
    H = u2pl.entropy(prob[B // 2 :])
    inside = torch.ones_like(H, dtype=torch.bool)
    gamma, lower = u2pl.quantiles(H, inside, 0.8, 0.2)
    y_u = u2pl.reliable_labels(prob[B // 2 :].argmax(1), H, gamma)
    sizes = torch.tensor([args.first] + [args.rest] * (C - 1))
    tensors = {
        "prob": u2pl.as_rows(prob).contiguous(),
        "label": torch.cat([truth[: B // 2], y_u]).flatten(),
        "candidate": u2pl.candidates(H, inside, gamma, lower, "unreliable").flatten(),
        "rep_s": torch.randn(B * n * n, args.channels),
        "rep_t": torch.randn(B * n * n, args.channels),
        "sizes": sizes,
        "u_offered": torch.rand(C, args.keys + 1, dtype=torch.float64),
        "u_pairs": torch.rand(C, args.anchors * (args.negatives + 1), dtype=torch.float64),
    }
    tensors = {name: x.to(args.device) for name, x in tensors.items()}
    tensors["rep_s"].requires_grad_()
    bank = F.normalize(torch.randn(int(sizes.sum()) + 1, args.channels), dim=1)
    bank[-1] = 0
    dtype = torch.float32 if args.bank_dtype == "fp32" else torch.bfloat16
    return tensors, (bank.to(args.device, dtype), sizes.clone().to(args.device))


CALLS = {"definition": u2pl, "fused": fused}


def call(name, bank, args, *, prob, label, candidate, rep_s, rep_t, sizes, u_offered, u_pairs):
    """One of the two. bank: (all rings, how many features ever entered each), which it changes.

    Returns the loss, after backward.
    """
    module = CALLS[name]
    r_h = min(20, args.classes)
    N_c = u2pl.negative_masks(u2pl.class_ranks(prob), label, candidate, 3, r_h)
    A_c = u2pl.anchor_masks(prob, label, 0.3)
    offered = module.draw_features(rep_t, N_c, u_offered)
    module.push_features(*bank, sizes, offered)
    loss, _ = module.unreliable_loss(rep_s, rep_t, A_c, *bank, sizes, u_pairs, args)
    loss.backward()
    return loss.detach()


def compared(args):
    """Asserts that both compute the same; returns the largest differences."""
    tensors, full = inputs(args)
    losses = {}
    gradients = {}
    banks = {}
    for name in CALLS:
        banks[name] = [x.clone() for x in full]
        tensors["rep_s"].grad = None
        # twice: a bank that has turned
        losses[name] = [call(name, banks[name], args, **tensors).item() for _ in range(2)]
        gradients[name] = tensors["rep_s"].grad.clone()
    pairs = zip(losses["fused"], losses["definition"], strict=True)
    error = max(abs(a / b - 1) for a, b in pairs)
    truth = gradients["definition"]
    gap = float((gradients["fused"] - truth).abs().max() / truth.abs().max())
    assert (truth.abs().sum(1) > 0).sum() > args.classes
    assert losses["definition"][0] != losses["definition"][1]
    for ring, definition in zip(banks["fused"], banks["definition"], strict=True):
        assert torch.allclose(ring.float(), definition.float(), atol=1e-6)
    assert error < 1e-5 and gap < 1e-3, (error, gap)
    return error, gap


def resident(name):
    """Returns VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024


def seconds(name, tensors, bank, args):
    """Returns the time of a call: of the processor on a CPU, else of the clock."""
    tensors["rep_s"].grad = None
    clock = time.process_time
    if args.device == "cuda":
        torch.cuda.synchronize()
        clock = time.perf_counter
    begin = clock()
    call(name, bank, args, **tensors)
    if args.device == "cuda":
        torch.cuda.synchronize()
    return clock() - begin


def warm(name, args):
    """Sets up whatever a first call sets up."""
    tensors, bank = inputs(Args(images=2, size=9, keys=8, first=20, rest=10, device=args.device))
    call(name, bank, args, **tensors)


def timed(args):
    """Returns {name: seconds of each round}; the two take turns."""
    for name in CALLS:
        warm(name, args)
    tensors, bank = inputs(args)
    found = {name: [] for name in CALLS}
    for _ in range(args.rounds):
        for name, times in found.items():
            times.append(seconds(name, tensors, bank, args))
    return found


def peak(args):
    """Returns what a call of one of the two adds to its inputs and the bank, in MiB."""
    warm(args.only, args)
    tensors, bank = inputs(args)
    if args.device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        seconds(args.only, tensors, bank, args)
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = resident("VmRSS")
    seconds(args.only, tensors, bank, args)
    return resident("VmHWM") - before


def peak_in_a_process(name, args):
    """Returns the peak of one of the two, in a process that returns memory when it is freed."""
    values = asdict(args) | {"only": name}
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in values.items() if k != "check"]
    environment = os.environ | {"MALLOC_MMAP_THRESHOLD_": "65536"}
    command = [sys.executable, __file__, *flags]
    done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    return float(done.stdout.splitlines()[-1])


def main(args):
    """Checks, measures both, prints the table, and writes it where no flag is given."""
    if args.only:
        return print(peak(args))
    setup(args.device)  # is it there?
    small = {"images": 4, "size": 33, "channels": 32, "first": 3000, "rest": 2000}
    for M, N in ((50, 256), (256, 50)):
        error, gap = compared(Args(**asdict(args) | small | {"anchors": M, "negatives": N}))
        print(f"small case, M {M}: loss {error:.0e}, gradient {gap:.0e} apart")
    if args.check:
        return
    error, gap = compared(args)
    print(f"this case: loss {error:.0e}, gradient {gap:.0e} apart (relative); banks equal")
    times = timed(args)
    rows = []
    for name, own in times.items():
        ratios = [a / b for a, b in zip(own, times["definition"], strict=True)]
        row = {"name": name, "ms": 1e3 * statistics.median(own)}
        row |= {"ratio": statistics.median(ratios), "low": min(ratios), "high": max(ratios)}
        rows.append(row | {"peak_mib": peak_in_a_process(name, args)})
        print(
            f"{name:10} {row['ms']:8.0f} ms  {row['ratio']:.2f} [{row['low']:.2f}.."
            f"{row['high']:.2f}]  peak {rows[-1]['peak_mib']:6.0f} MiB"
        )
    found = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    found |= {"load": os.getloadavg()[0], "args": asdict(args), "rows": rows}
    found["gradient_mib"] = args.images * args.size**2 * args.channels * 4 / 2**20
    if args == Args():
        RESULT.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Args))
