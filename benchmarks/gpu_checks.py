"""Parts of gpu.py that compare a device with the CPU, and look for waits and graph breaks.

Every comparison has the CPU in float64 as its truth. The CPU's own float32 is measured beside the
device's: a limit is a multiple of what float32 costs there, or a floor that is stated.
"""

import contextlib
import importlib
import math
import time
import traceback
from argparse import Namespace
from pathlib import Path
from unittest.mock import patch

import torch
from torch import nn

from benchmarks import steps
from common import distributed, fused, metrics
from common.distributed import Group

CPU = torch.device("cpu")
TIMES = 8  # an error may be so many times the CPU's own in float32
# relative errors that are let pass in any case. float32: sums in another order
FLOOR = {"value": 1e-5, "gradient": 1e-4, "count": 1e-5}
# inputs of bfloat16, which are computed in float32: gradients are rounded to bfloat16
HALF_FLOOR = {"value": 1e-4, "gradient": 5e-3, "count": 1e-4}
# behind a network a pixel may change its class: that moves counts most
STEP_FLOOR = {"value": 1e-3, "gradient": 0.1, "count": 2e-2}
BF16 = {"value": 0.05, "gradient": 0.2, "count": 0.2}  # networks in bfloat16
CAP = {"value": 0.2, "gradient": 0.5, "count": 0.5}  # beyond it a right step looks like a wrong one
COUNTS = "K K_gt_1 pseudo_acc coverage kept regions classes anchors parts dominant banks".split()
COUNTS += "balance unsup unsup_l strong".split()  # sums over pixels of classes, which may change


@contextlib.contextmanager
def drawn_on_cpu():
    """Random numbers come from the CPU's generator, whatever the device; dropout lets all pass."""
    rand = torch.rand
    randperm = torch.randperm
    bernoulli_ = torch.Tensor.bernoulli_

    def draw(*size, device=None, dtype=None, **more):
        return rand(*size, dtype=dtype, **more).to(device or CPU)

    def draw_like(x, **more):
        return rand(x.shape, dtype=torch.float64, **more).to(x.device, x.dtype)

    def shuffle(n, device=None):
        return randperm(n).to(device or CPU)

    def toss_(x, p):
        return x.copy_(bernoulli_(torch.empty(x.shape), p))

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(torch, "rand", draw))
        stack.enter_context(patch.object(torch, "randperm", shuffle))
        stack.enter_context(patch.object(torch.Tensor, "bernoulli_", toss_))
        stack.enter_context(patch.object(torch, "rand_like", draw_like))
        for layer in (nn.Dropout, nn.Dropout2d):
            stack.enter_context(patch.object(layer, "forward", lambda self, x: x))
        stack.enter_context(patch.object(nn.functional, "dropout2d", lambda x, p: x))
        yield


@contextlib.contextmanager
def in_float64():
    """Where a script says float32, float64 is meant: the truth for all others."""
    with patch.object(torch.Tensor, "float", torch.Tensor.double):
        yield


def without_tf32():
    """fp32 means fp32, in this process; a script leaves it to torch, which takes TF32 in cuDNN."""
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False


def apart(x, truth):
    """Returns how far x is from the truth: their difference's norm over the truth's."""
    x, truth = x.detach().double().cpu(), truth.detach().double().cpu()
    return float((x - truth).norm() / truth.norm().clamp(min=1e-12))


# ---- losses, banks, percentiles ----


class Inputs:
    """Random tensors, the same ones on every device and in every type; leaves take a gradient."""

    def __init__(self, device, dtype, through, size):
        """through: the type that the numbers are rounded to first, so that all see the same."""
        self.device, self.dtype, self.through, self.size = device, dtype, through, size
        self.generator = torch.Generator().manual_seed(0)
        self.leaves = []

    def normal(self, *shape, scale=1.0, leaf=False):
        """Normal numbers."""
        x = scale * torch.randn(shape, generator=self.generator, dtype=torch.float64)
        x = x.to(self.through).to(self.device, self.dtype)
        if leaf:
            self.leaves.append(x.requires_grad_())
        return x

    def logits(self, leaf=False):
        """(2, 11, n, n), some sure and some not."""
        return self.normal(2, 11, self.size, self.size, scale=3.0, leaf=leaf)

    def probabilities(self):
        """A teacher's."""
        return self.logits().double().softmax(1).to(self.dtype)

    def integers(self, high, *shape):
        """Whole numbers below high."""
        return torch.randint(0, high, shape, generator=self.generator).to(self.device)

    def labels(self):
        """(2, n, n) of 11 classes, a seventh of them void."""
        label = self.integers(11, 2, self.size, self.size)
        return label.masked_fill(self.integers(7, *label.shape) == 0, 255)

    def inside(self):
        """(2, n, n), an eighth outside."""
        return self.integers(8, 2, self.size, self.size) > 0

    def uniform(self, *shape):
        """Numbers in [0, 1), always float64: what scripts draw from."""
        return torch.rand(shape, generator=self.generator, dtype=torch.float64).to(self.device)


def arguments(name, *flags):
    """Returns the arguments of a script by its own recipe for the generated data set."""
    return steps.resolved(importlib.import_module(name), flags)


def cps(flags):
    """Returns a case: both directions of cps_fpl.py's cross loss."""

    def case(x):
        script, args = importlib.import_module("cps_fpl"), arguments("cps_fpl", *flags.split())
        students = [x.logits(leaf=True), x.logits(leaf=True)]
        teachers = [x.logits(), x.logits()]
        loss, parts = script.cross_loss(students, teachers, x.inside(), 0.0, args)
        return {"loss": loss, **parts}

    return case


def ael(flags):
    """Returns a case: ael_fpl.py's consistency loss, its bank of confidence and the rate."""

    def case(x):
        script, args = importlib.import_module("ael_fpl"), arguments("ael_fpl", *flags.split())
        sums = script.class_confidence(x.probabilities(), x.labels(), 1)
        bank = script.update_confidence(x.uniform(11).to(sums.dtype), sums, 0.9)
        rate = script.equalization_rate(bank)
        pair = x.logits(leaf=True), x.logits()
        loss, parts = script.consistency_loss(*pair, x.inside(), rate, 1, args)
        return {"loss": loss, "bank": bank, "rate": rate, **parts}

    return case


def unimatch(flags):
    """Returns a case: what a view learns in unimatch.py."""

    def case(x):
        script, args = importlib.import_module("unimatch"), arguments("unimatch", *flags.split())
        student, teacher, inside = x.logits(leaf=True), x.logits(), x.inside()
        taught = script.make_target(teacher, inside, args)
        loss = script.consistency(student, taught, inside.sum(), args)
        return {"loss": loss, **script.statistics(teacher, inside, args)}

    return case


def u2pl(kind):
    """Returns a case: entropy, percentiles, masks, keys, queues and U2PL's loss on top of them."""

    def case(x):
        script = importlib.import_module("u2pl")
        args = arguments("u2pl", "--unreliable-loss", kind, "--anchors", 16, "--negatives", 8)
        prob, inside = x.probabilities(), x.inside()
        H = script.entropy(prob)
        gamma, lower = script.quantiles(H, inside, 0.8, 0.2)
        candidate = script.candidates(H, inside, gamma, lower, "unreliable").flatten()
        rows = script.as_rows(prob).contiguous()
        labels = script.reliable_labels(prob.argmax(1), H, gamma).flatten()
        rank = script.class_ranks(rows)
        N_c = script.negative_masks(rank, labels, candidate, 3, 11)
        rep_t = x.normal(len(rows), 32).float()
        rep_s = x.normal(len(rows), 32, leaf=True)
        sizes = torch.full((11,), 64, device=x.device)
        bank = torch.zeros(11 * 64 + 1, 32, device=x.device)
        pushed = torch.zeros(11, dtype=torch.int64, device=x.device)
        offered = fused.draw_features(rep_t, N_c, x.uniform(11, 33))
        for _ in range(3):  # the rings turn
            fused.push_features(bank, pushed, sizes, offered)
        anchors = script.anchor_masks(rows, labels, 0.3)
        u = x.uniform(11, 16 * 9)
        queues = bank, pushed, sizes
        loss, _ = fused.unreliable_loss(rep_s, rep_t, anchors, *queues, u, args)
        return {
            "loss": loss,
            "entropy": H,
            "percentiles": torch.stack([gamma, lower]),
            "bank": bank,
        }

    return case


def esl(x):
    """Soft labels and their cross-entropy, parts, prototypes, queues and L_CTR of esl.py."""
    script = importlib.import_module("esl")
    args = arguments("esl", "--anchors", 16, "--negatives", 8)
    C, K, h = 11, args.parts, (x.size + 3) // 4
    target = script.soft_label(x.probabilities(), args)
    soft = script.soft_cross_entropy(x.logits(leaf=True), target, x.inside())
    E, prototypes = x.normal(2, 16, h, h), x.normal(C, K, 16).float()
    ids = script.part_ids(E, prototypes, x.labels())
    sums = script.part_sums(E, ids, C * K)
    prototypes = script.update_prototypes(prototypes, sums.sum(0), 0.9)
    features = nn.functional.normalize(sums[..., :-1], dim=2)
    offered = torch.cat([features, sums[..., -1:]], 2).transpose(0, 1)
    bank = torch.zeros(C * K * args.queue + 1, 16, device=x.device, dtype=prototypes.dtype)
    pushed = torch.zeros(C * K, dtype=torch.int64, device=x.device)
    fused.push_features(bank, pushed, torch.full_like(pushed, args.queue), offered)
    rep = x.normal(2, 16, h, h, leaf=True)
    small = script.aligned(ids, (h, h)).flatten()
    u = x.uniform(C, args.anchors + 1), x.uniform(C, args.anchors, 1 + args.negatives)
    contrast, _ = fused.part_contrast(script.as_rows(rep), small, bank, pushed, *u, args)
    centers = script.kmeans(x.normal(200, 16).float(), K, x.uniform(K), steps=3)
    found = {"loss": soft + contrast, "L_SCE": soft, "L_CTR": contrast, "K-means": centers}
    return {**found, "prototypes": prototypes}


def supervised(x):
    """Cross-entropy, OHEM's and both heads."""
    script, logits, label = importlib.import_module("supervised"), x.logits(leaf=True), x.labels()
    plain = script.cross_entropy(logits, label)
    hard = script.ohem_cross_entropy(logits, label, 0.3, x.size**2 // 8)
    args = Namespace(ohem_kept=0.1, aux_weight=0.4, crop_size=x.size)
    both = script.supervised_loss({"logits": logits, "aux": x.logits(leaf=True)}, label, args)
    return {"loss": plain + hard + both, "cross-entropy": plain, "OHEM": hard}


def mean_teacher(x):
    """Both consistencies."""
    script, inside = importlib.import_module("mean_teacher"), x.inside()
    ce = script.consistency_ce(x.logits(leaf=True), x.probabilities(), inside)
    mse = script.consistency_mse(x.logits(leaf=True), x.probabilities(), inside)
    return {"loss": ce + mse, "hard": ce, "squared": mse}


CASES = {
    "supervised.py": supervised,
    "mean_teacher.py": mean_teacher,
    "cps_fpl.py FPL": cps(""),
    "cps_fpl.py FPL, official": cps("--recipe official"),
    "cps_fpl.py FPL, twin": cps("--fused on"),
    "cps_fpl.py FPL, official, twin": cps("--recipe official --fused on"),
    "cps_fpl.py FPL, n, convex, twin": cps("--k-strategy n --weight convex --fused on"),
    "cps_fpl.py FPL, fixed2, linear, twin": cps("--k-strategy fixed2 --weight linear --fused on"),
    "ael_fpl.py FPL+AEL, twin": ael("--fused on"),
    "cps_fpl.py CPS": cps("--unsup-loss ce"),
    "cps_fpl.py soft labels": cps("--unsup-loss soft"),
    "cps_fpl.py negative learning": cps("--unsup-loss negative"),
    "ael_fpl.py FPL+AEL": ael(""),
    "ael_fpl.py FPL+AEL, official": ael("--recipe official"),
    "ael_fpl.py AEL": ael("--unsup-loss ce"),
    "unimatch.py": unimatch("--threshold 0.5"),
    "unimatch.py FPL": unimatch("--unsup-loss fpl"),
    "unimatch.py FPL, several T": unimatch("--unsup-loss fpl --T 0.6 0.8 0.95"),
    "u2pl.py L_c": u2pl("contrastive"),
    "u2pl.py L_b": u2pl("binary"),
    "esl.py": esl,
}


def outcome(case, device, dtype, through, size):
    """Returns {name: tensor} of a case, the gradients of its leaves among them."""
    inputs = Inputs(device, dtype, through, size)
    torch.manual_seed(0)
    with drawn_on_cpu():
        values = case(inputs)
        values["loss"].backward()
    gradients = {f"gradient {i}": leaf.grad for i, leaf in enumerate(inputs.leaves)}
    return {**values, **gradients}


def losses(options, report):
    """Every case on the device: float32 against float64, and bfloat16 against the CPU's.

    Inputs of bfloat16 are the same numbers on both, and every script computes in float32.
    """
    size = 24 if options.tiny else 128
    without_tf32()
    for name, case in CASES.items():

        def compare(name=name, case=case):
            with in_float64():
                truth = outcome(case, CPU, torch.float64, torch.float32, size)
            own = outcome(case, CPU, torch.float32, torch.float32, size)
            found = outcome(case, report.device, torch.float32, torch.float32, size)
            judge(report, f"{name}, float32", found, own, truth, FLOOR)
            truth = outcome(case, CPU, torch.bfloat16, torch.bfloat16, size)
            found = outcome(case, report.device, torch.bfloat16, torch.bfloat16, size)
            judge(report, f"{name}, bfloat16", found, truth, truth, HALF_FLOOR)

        report.attempt(name, compare, seconds=2)
    report.attempt("confusion matrix", lambda: counted(report, size))
    report.attempt("strong views", lambda: viewed(report, size))


def counted(report, size):
    """The confusion matrix is made of whole numbers: equal, not near."""
    found = []
    for device in (CPU, report.device):
        x = Inputs(device, torch.float32, torch.float32, size)
        found.append(metrics.confusion_matrix(x.logits().argmax(1), x.labels(), 11).cpu())
    report.check("confusion matrix", float((found[0] != found[1]).sum()), 0.0)


def viewed(report, size):
    """unimatch.py's strong views: a rounding of one operation is a few levels after all of them."""
    script = importlib.import_module("unimatch")
    weak = torch.randint(0, 256, (8, 3, size, size), generator=torch.Generator().manual_seed(0))
    weak = nn.functional.avg_pool2d(weak.float(), 5, 1, 2).byte()
    args = Namespace(seed=0, batch_size_unlabeled=8, crop_size=size)
    found = []
    for device in (CPU, report.device):
        views, _ = script.strong_views(weak.to(device), "view0", 0, args, Group(0, 1, device))
        found.append(views.cpu().int())
    report.check("strong views", float((found[0] - found[1]).abs().max()), 4.0, "grey levels")


def judge(report, name, found, own, truth, floor, times=TIMES):
    """Adds a row: the entry of found that is furthest beyond its limit.

    own: what the CPU finds in the same type. Where that is itself so far from the truth that a
    limit would let anything pass, nothing is said of the entry.
    """
    worst, unsaid = (-1.0, 0.0, 0.0, "nothing"), []
    for key, value in found.items():
        kind = "count" if key in COUNTS else "value"
        if key.startswith(("gradient", "change")):
            kind = "gradient"
        allowed = times * apart(own[key], truth[key])
        error = apart(value, truth[key])
        if not math.isfinite(allowed) or not bool(torch.isfinite(value.double()).all()):
            error = float("inf")
            allowed = 0.0
        elif allowed > CAP[kind]:
            unsaid.append(key)
            continue
        limit = max(allowed, floor[kind])
        if not error / limit <= worst[0]:
            worst = error / limit, error, limit, key
    note = f"furthest: {worst[3]}"
    if unsaid:
        note += f"; too rough on the CPU to compare: {', '.join(unsaid)}"
    if worst[3] == "nothing":
        return report.row(name, ok=None, note=note)
    report.check(name, worst[1], worst[2], note)


# ---- whole steps ----


def one_step(name, flags, device, float64=False, tiny=False):
    """Returns the Watch of a script's first whole step on a device, from the same batches."""
    script = importlib.import_module(name)
    count = 2 if "--warmup-iters 1" in flags else 1  # the first one has labels alone

    def before(watch):
        """Notes the weights; in float64 the banks become it too."""
        watch.start = {key: value.clone() for key, value in watch.values().items()}
        for key, value in watch.state.items():
            if float64 and torch.is_tensor(value) and value.is_floating_point():
                watch.state[key] = value.double()

    with contextlib.ExitStack() as stack:
        stack.enter_context(drawn_on_cpu())
        if hasattr(script, "strong_view"):  # in whole numbers, which no device rounds
            halved = patch.object(script, "strong_view", lambda image, operations: image // 2)
            stack.enter_context(halved)
        if float64:
            build = script.build
            stack.enter_context(in_float64())
            stack.enter_context(patch.object(script, "build", lambda *a: build(*a).double()))
        how = {"batches": steps.random_batches(), "before": before}
        return steps.take(script, flags.split(), Group(0, 1, device), count, tiny=tiny, **how)


def step_values(watch):
    """Returns {name: tensor}: the parts of the loss, all networks' gradients, what changed."""
    found = dict(watch.logged[-1])
    gradients = watch.gradients()
    for name in watch.networks:
        own = [g.flatten() for key, g in gradients.items() if key.startswith(f"{name}.")]
        if own:
            found[f"gradient of {name}"] = torch.cat([g.double() for g in own])
    kinds = {"change of the weights": [], "BN statistics": [], "banks": []}
    for key, value in watch.values().items():
        if value.is_floating_point():
            kind = "change of the weights"
            if key.startswith("state."):
                kind = "banks"
            elif "running_" in key:
                kind = "BN statistics"
            else:
                value = value - watch.start[key]
            kinds[kind].append(value.double().flatten())
    return found | {kind: torch.cat(values) for kind, values in kinds.items() if values}


def whole_steps(options, report):
    """A step of every script in all its modes: float32 and, in its first mode, bfloat16.

    bfloat16 on the device may be twice as far from the truth as on the CPU. The first modes of all
    scripts come first: the CPU takes longest here.
    """
    without_tf32()
    every = list(modes(options))
    for name, mode, flags, first in sorted(every, key=lambda entry: not entry[3]):

        def step(device, more="", float64=False, name=name, flags=flags):
            watch = one_step(name, flags + more, device, float64, options.tiny)
            return step_values(watch)

        def compare(name=name, mode=mode, step=step, first=first):
            truth = step(CPU, float64=True)
            label = f"{name}.py {mode}"
            judge(report, f"{label}, float32", step(report.device), step(CPU), truth, STEP_FLOOR)
            if first:
                own = step(CPU, " --amp bf16")
                found = step(report.device, " --amp bf16")
                judge(report, f"{label}, bfloat16", found, own, truth, BF16, times=2)

        report.attempt(f"{name}.py {mode}", compare, seconds=6)


def modes(options):
    """Yields (script, mode, flags, is it the first?) of every mode at the size for checks.

    The rate is low: of two steps the first would carry its rounding into the second.
    """
    size = "--crop-size 32" if options.tiny else "--crop-size 65"
    for name, words in steps.MODES.items():
        unlabeled = "" if name == "supervised" else " --batch-size-unlabeled 2"
        for number, (mode, flags) in enumerate(words.items()):
            yield name, mode, f"{flags} {size} --lr 0.0001 --batch-size 2{unlabeled}", number == 0


# ---- waits ----

# how often a script may wait in a step, and why
BOXES = "AEL's boxes are drawn on the CPU from what its teacher sees: one copy a step"
ALLOWED = {"ael_fpl": BOXES, "u2pl_ael": BOXES}


def waits(options, report):
    """20 steps of every script between two lines of its log: the host never waits for the device.

    As far as torch reports it. The one wait that cannot be avoided (distributed.to_host) is let
    through where it is expected, counted and named.
    """
    count = 4 if options.tiny else 22
    for name, mode, flags, _ in sorted(modes(options), key=lambda entry: not entry[3]):
        label = f"{name}.py {mode}"
        if report.left() < 4:
            report.row(label, ok=None, note="no time left")
            continue
        try:
            seen = watched_steps(name, flags, count, options, report)
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            note = f"{type(error).__name__}: {line} at {product_line(error)}"
            report.row(label, ok=False, note=note[:300])
            continue
        right = seen == (count - 2) * (name in ALLOWED)
        note = ALLOWED.get(name, "")
        if not report.cuda and right:
            right, note = None, "no CUDA: only that the steps run"
        report.row(label, ok=right, steps=count - 2, allowed=seen, note=note)


def watched_steps(name, flags, count, options, report):
    """Takes steps, the first two unwatched; returns how often to_host was called in the others."""
    seen = 0
    to_host = distributed.to_host

    def counted(*tensors):
        nonlocal seen
        seen += 1
        with unwatched(report.cuda):
            return to_host(*tensors)

    def after(watch, done):
        if report.cuda and done == 2:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        if done <= 2:
            nonlocal seen
            seen = 0

    group = Group(0, 1, report.device)
    batches = steps.random_batches(pin=report.cuda)
    try:
        with patch.object(distributed, "to_host", counted):
            more = {"after": after, "batches": batches, "tiny": options.tiny, "kmeans": True}
            steps.take(name, flags.split(), group, count, **more)
    finally:
        if report.cuda:
            torch.cuda.set_sync_debug_mode("default")
    return seen


@contextlib.contextmanager
def unwatched(cuda):
    """A wait is allowed in here."""
    before = torch.cuda.get_sync_debug_mode() if cuda else 0
    if cuda:
        torch.cuda.set_sync_debug_mode("default")
    try:
        yield
    finally:
        if cuda:
            torch.cuda.set_sync_debug_mode(before)


def product_line(error):
    """Returns the innermost line of the product in an error's traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if Path(f.filename).parent in (steps.ROOT, steps.ROOT / "common")]
    return f"{Path(own[-1].filename).name}:{own[-1].lineno} {own[-1].line}" if own else "?"


# ---- compile ----


def compiled(options, report):
    """--compile: the loss of a first step, graphs and graph breaks, and the seconds until then.

    tiny: torch's tracer alone, without a compiler.
    """
    without_tf32()
    compile_it = torch.compile
    if options.tiny:
        torch.compile = lambda net: compile_it(net, backend="eager")
    else:
        importlib.import_module("torch._inductor.compile_fx")  # before random numbers are patched
    try:
        for name in ("cps_fpl",) if options.tiny else ("supervised", "cps_fpl", "u2pl", "esl"):
            flags = next(entry[2] for entry in modes(options) if entry[0] == name)
            report.attempt(
                f"{name}.py",
                lambda n=name, f=flags: compare_compiled(n, f, options, report),
                seconds=40,
            )
    finally:
        torch.compile = compile_it


def compare_compiled(name, flags, options, report):
    """Adds a row for one script. Graph breaks are shown, not judged."""
    from torch._dynamo.utils import counters

    torch._dynamo.reset()
    counters.clear()
    found, seconds = [], 0.0
    for more in ("", " --compile"):
        begin = time.time()
        how = {"batches": steps.random_batches(), "tiny": options.tiny}
        group, count = Group(0, 1, report.device), 2 if "--warmup-iters 1" in flags else 1
        with drawn_on_cpu():
            watch = steps.take(name, (flags + more).split(), group, count, **how)
        found.append(watch.logged[-1]["loss"].cpu())
        seconds = time.time() - begin
    report.row(
        f"{name}.py",
        ok=apart(found[1], found[0]) <= 1e-3,
        error=apart(found[1], found[0]),
        limit=1e-3,
        graphs=counters["stats"].get("unique_graphs", 0),
        graph_breaks=sum(counters["graph_break"].values()),
        first_step_s=round(seconds, 1),
        note="the first whole step's loss, and the seconds until it was there",
    )
