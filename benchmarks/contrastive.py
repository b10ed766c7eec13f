"""U2PL's contrastive loss: u2pl.py against a class loop, in time and peak memory.

python benchmarks/contrastive.py             # 8 images, 129x129x256 features, 21 classes, full bank
python benchmarks/contrastive.py --negatives 50 --anchors 256
python benchmarks/contrastive.py --check     # only that both compute the same, on a small case

A call is: ranks, masks, keys into the bank, anchors, negatives, Eq. (4), backward. The class loop
is the paper's equations one class at a time, with the operations of the released code (boolean
masks, a queue as torch.cat, one cross-entropy for each class) but none of its defects. Both get the
same random numbers, and their loss, gradient and banks are asserted to be equal before anything is
timed. Time and memory are measured in processes of their own. Memory is what a call adds to the
inputs and the bank, at its peak (on a CPU: resident pages, each allocation above 64 KiB returned
when it is freed); the gradient of the features alone is one of its parts, the same for both.
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
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch  # noqa: E402
import torch.nn.functional as F  # noqa: E402
import tyro  # noqa: E402

import u2pl  # noqa: E402


@dataclass
class Args:
    """The size of the problem."""

    images: int = 8  # half of them labelled
    size: int = 129  # of the features, square
    channels: int = 256  # of the features
    classes: int = 21
    anchors: int = 50  # M
    negatives: int = 256  # N
    keys: int = 512  # that enter a class's queue
    first: int = 50_000  # keys in the queue of class 0
    rest: int = 30_000  # and of each other class
    bank_dtype: Literal["fp32", "bf16"] = "fp32"  # u2pl.py's
    unreliable_loss: Literal["contrastive"] = "contrastive"
    tau: float = 0.5
    rounds: int = 5  # the median counts
    device: Literal["cpu", "cuda"] = "cpu"
    check: bool = False  # compare on a small case and stop
    only: str = ""  # one of the two, for a process of its own


def inputs(args):
    """Returns what both take: blobs of labels, and a teacher that is mostly right about them."""
    torch.manual_seed(0)
    B, C, n, D, device = args.images, args.classes, args.size, args.channels, args.device
    blobs = torch.randint(0, C, (B, 1, n // 12 + 1, n // 12 + 1)).float()
    truth = F.interpolate(blobs, (n, n))[:, 0].long()
    logits = 2.5 * torch.randn(B, C, n, n) + 6 * F.one_hot(truth, C).movedim(3, 1)
    prob = logits.softmax(1)
    H = u2pl.entropy(prob[B // 2 :])
    inside = torch.ones_like(H, dtype=torch.bool)
    gamma, lower = u2pl.quantiles(H, inside, 0.8, 0.2)
    y_u = u2pl.reliable_labels(prob[B // 2 :].argmax(1), H, gamma)
    label = torch.cat([truth[: B // 2], y_u]).flatten()
    some = u2pl.candidates(H, inside, gamma, lower, "unreliable").flatten()
    prob = u2pl.as_rows(prob).contiguous()
    rep_s, rep_t = torch.randn(len(prob), D), torch.randn(len(prob), D)
    sizes = torch.tensor([args.first] + [args.rest] * (C - 1))
    bank = torch.randn(int(sizes.sum()) + 1, D)
    bank.div_(bank.norm(dim=1, keepdim=True))[-1] = 0
    u = torch.rand(C, args.keys + 1, dtype=torch.float64)
    v = torch.rand(C, args.anchors * (args.negatives + 1), dtype=torch.float64)
    given = [x.to(device) for x in (prob, label, some, rep_s, rep_t, sizes, u, v, bank)]
    given[3].requires_grad_()
    return given


def ours(prob, label, some, rep_s, rep_t, sizes, u, v, bank, args):
    """u2pl.py. bank: (tensor of all rings, keys ever). Returns the loss, after backward."""
    ranks = 3, min(20, args.classes)
    masks = u2pl.negative_masks(u2pl.class_ranks(prob), label, some, *ranks)
    u2pl.push_keys(*bank, sizes, u2pl.draw_keys(rep_t, masks, u))
    masks = u2pl.anchor_masks(prob, label, 0.3)
    loss, _ = u2pl.unreliable_loss(rep_s, rep_t, masks, *bank, sizes, v, args)
    loss.backward()
    return loss.detach()


def literal(prob, label, some, rep_s, rep_t, sizes, u, v, bank, args):
    """One class at a time. bank: queues, oldest key first, and keys pushed. As ours."""
    M, K, losses, (bank, pushed) = args.anchors, args.keys, [], bank
    order = prob.argsort(dim=1, descending=True, stable=True).argsort(dim=1)  # O_ij
    labeled = len(label) - len(some)
    for c in range(args.classes):
        A_c = (label == c) & (prob[:, c] > 0.3)  # Eq. (9)-(11)
        n_l = (label != c) & (label != 255) & (order[:, c] < 3)  # Eq. (14)
        n_u = (order[:, c] >= 3) & (order[:, c] < 20)  # Eq. (15)
        N_c = torch.cat([n_l[:labeled], n_u[labeled:] & some])  # Eq. (13), (16)
        keys = rep_t[N_c]
        if len(keys) > K:  # one of each of K parts, counted from anywhere
            border = torch.arange(K + 1, device=keys.device) * len(keys) // K
            part = border[:-1] + (u[c, 1:] * border.diff()).long()
            keys = keys[(part + (u[c, 0] * len(keys)).long()) % len(keys)]
        size = int(sizes[c])
        bank[c], pushed[c] = torch.cat([bank[c], keys])[-size:], pushed[c] + len(keys)
        anchors = rep_s[A_c]
        if len(anchors) == 0 or len(bank[c]) == 0:
            continue
        center = rep_t[A_c].mean(0)  # Eq. (12)
        z = anchors[(v[c, :M] * len(anchors)).long()]
        # a full ring's row r is this queue's key r - (keys pushed since it was full)
        rows = ((v[c, M:] * len(bank[c])).long() - pushed[c]) % len(bank[c])
        negatives = bank[c][rows].view(M, args.negatives, -1)
        every = torch.cat([center.expand(M, 1, -1), negatives], 1)
        scores = F.cosine_similarity(z[:, None], every, dim=2) / args.tau
        target = torch.zeros(M, dtype=torch.int64, device=z.device)
        losses.append(F.cross_entropy(scores, target))  # Eq. (4)
    loss = sum(losses) / len(losses)
    loss.backward()
    return loss.detach()


CALLS = {"ours": ours, "literal": literal}


def bank_of(name, bank, sizes, args):
    """Returns the full bank as one of the two keeps it."""
    if name == "literal":
        return [x.clone() for x in bank[:-1].split(sizes.tolist())], [0] * len(sizes)
    dtype = torch.float32 if args.bank_dtype == "fp32" else torch.bfloat16
    return bank.clone().to(dtype), sizes.clone()


def compared(args):
    """Asserts that both compute the same; returns the largest differences."""
    *given, bank = inputs(args)
    sizes, found = given[5], {}
    for name, call in CALLS.items():
        mine, given[3].grad = bank_of(name, bank, sizes, args), None
        losses = [call(*given, mine, args).item() for _ in range(2)]  # a bank that has turned
        found[name] = losses, given[3].grad.clone(), mine
    (one, g, (rings, pushed)), (two, h, (queues, _)) = found["ours"], found["literal"]
    error = max(abs(a / b - 1) for a, b in zip(one, two, strict=True))
    gap = float((g - h).abs().max() / h.abs().max())
    assert (h.abs().sum(1) > 0).sum() > args.classes and one[0] != one[1]
    for ring, queue, turned in zip(rings[:-1].split(sizes.tolist()), queues, pushed, strict=True):
        queue = F.normalize(queue, dim=1).roll(int(turned) % len(queue), 0)
        assert torch.allclose(ring.float(), queue, atol=1e-6 if args.bank_dtype == "fp32" else 1e-2)
    limit = 1e-5 if args.bank_dtype == "fp32" else 1e-2
    assert error < limit and gap < 100 * limit, (error, gap)
    return error, gap


def resident(name):
    """Returns VmRSS (now) or VmHWM (peak) of this process, in MiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(name):
            return int(line.split()[1]) / 1024


def measured(args):
    """Returns seconds of each round and the peak in MiB of one of the two."""
    small = Args(images=2, size=9, keys=8, first=20, rest=10, device=args.device)
    *given, bank = inputs(small)  # whatever a first call sets up
    CALLS[args.only](*given, bank_of(args.only, bank, given[5], small), small)
    *given, bank = inputs(args)
    mine, cuda = bank_of(args.only, bank, given[5], args), args.device == "cuda"
    del bank
    seconds, peaks = [], []
    for _ in range(args.rounds + 1):
        given[3].grad = None
        if cuda:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
            before = resident("VmRSS")
        begin = time.perf_counter()
        CALLS[args.only](*given, mine, args)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
        after = torch.cuda.max_memory_allocated() / 2**20 if cuda else resident("VmHWM")
        peaks.append(after - (before / 2**20 if cuda else before))
    return {"seconds": seconds[1:], "peak": max(peaks[1:])}


def main(args):
    """Checks, measures both and prints the table."""
    if args.only:
        return print(json.dumps(measured(args)))
    small = {"images": 4, "size": 33, "channels": 32, "first": 3000, "rest": 2000}
    for more in (dict(anchors=50, negatives=256), dict(anchors=256, negatives=50)):
        which = asdict(args) | small | more
        error, gap = compared(Args(**which))
        print(f"small case, M {more['anchors']}: loss {error:.0e}, gradient {gap:.0e} apart")
    if args.check:
        return
    error, gap = compared(args)
    print(f"this case: loss {error:.0e}, gradient {gap:.0e} apart (relative); banks equal")
    found = {}
    for name in CALLS:
        flags = [f"--{k.replace('_', '-')}={v}" for k, v in asdict(args).items() if k != "check"]
        command = [sys.executable, __file__, *flags[:-1], f"--only={name}"]
        runs = {"seconds": {}, "peak": {"MALLOC_MMAP_THRESHOLD_": "65536"}}
        for what, more in runs.items():
            quiet = dict(check=True, capture_output=True, text=True, env=os.environ | more)
            out = json.loads(subprocess.run(command, **quiet).stdout.splitlines()[-1])
            found.setdefault(name, {})[what] = out[what]
    gradient = args.images * args.size**2 * args.channels * 4 / 2**20
    print(
        f"{torch.get_num_threads()} thread(s), {args.device}, torch {torch.__version__}, load "
        f"{os.getloadavg()[0]:.1f}; the features' gradient alone is {gradient:.0f} MiB"
    )
    for name, result in found.items():
        s = [1e3 * x for x in result["seconds"]]
        print(
            f"{name:8} {statistics.median(s):8.0f} ms  [{min(s):.0f}..{max(s):.0f}]  "
            f"peak {result['peak']:6.0f} MiB"
        )
    a, b = found["ours"], found["literal"]
    fast = statistics.median(b["seconds"]) / statistics.median(a["seconds"])
    print(f"{fast:.1f} times faster, at {a['peak'] / b['peak']:.2f} of the peak memory")


if __name__ == "__main__":
    main(tyro.cli(Args))
