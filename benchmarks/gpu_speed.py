"""Parts of gpu.py that measure time and memory.

Contenders of one table run in turn, round by round, in one process; their numbers are asserted
equal before the first round. Medians with the smallest and the largest round.
"""

import contextlib
import dataclasses
import importlib
import itertools
import math
import statistics
import time
from importlib.util import find_spec
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks import released, steps
from common import fused
from common.distributed import Group

TYPES = {"none": "fp32 (TF32)", "bf16": "bf16"}  # by --amp
SMALL = (2, 7, 24, 24)  # logits whose losses are compared

# ---- FPL's loss ----


def teachers(shape, device):
    """Returns {name: logits (B, C, H, W)}, channels-last as the networks give them."""
    generator = torch.Generator(device).manual_seed(0)

    def normal():
        x = torch.randn(shape, generator=generator, device=device)
        return x.contiguous(memory_format=torch.channels_last)

    confident, likeliest = normal(), torch.randint(0, shape[1], (shape[0], 1, *shape[2:]))
    confident.scatter_add_(1, likeliest.to(device), torch.full_like(confident[:, :1], 8.0))
    return {"confident": confident, "diffuse": 1.5 * normal(), "flat": 0.1 * normal()}


def argmax_ce(logits_s, logits_t, T):
    """The baseline: cross-entropy with the teacher's likeliest class by argmax."""
    return F.cross_entropy(logits_s, logits_t.argmax(1))


def max_ce(logits_s, logits_t, T):
    """The same by max, which gives value and index."""
    return F.cross_entropy(logits_s, logits_t.max(1)[1])


def product(logits_s, logits_t, T):
    """FPL, Eq. (7) times Eq. (11), as printed."""
    return importlib.import_module("ael_fpl").fuzzy_positive_loss(logits_s, logits_t, T).mean()


def twin(logits_s, logits_t, T):
    """FPL by common/fused.py: on a GPU the kernel of common/fpl_triton.py."""
    return fused.fuzzy_positive_loss(logits_s, logits_t, T).mean()


def product_official(logits_s, logits_t, T):
    """FPL by the released rules."""
    script = importlib.import_module("ael_fpl")
    rules = {"k_max": 3, "strict": False, "mean_over": "positives_and_next"}
    return script.fuzzy_positive_loss(logits_s, logits_t, T, **rules).mean()


def released_order(logits_s, logits_t, T):
    """The same numbers in the released order of work."""
    loss, weight = released.released_loss(logits_s, logits_t, T)
    return (loss * weight).mean()


BASELINE = "argmax + cross-entropy"
CONTENDERS = {
    BASELINE: argmax_ce,
    "max + cross-entropy": max_ce,
    "FPL": product,
    "FPL, official": product_official,
    "FPL, twin": twin,
    "released order of work": released_order,
}


def compiled_contenders(options):
    """Returns {name: call}: what torch.compile makes of two of them."""
    compile_it = {"backend": "eager"} if options.tiny else {"dynamic": False}
    return {
        "cross-entropy, compiled": torch.compile(argmax_ce, **compile_it),
        "FPL, compiled": torch.compile(product, **compile_it),
    }


EQUAL = [
    (BASELINE, "max + cross-entropy"),
    (BASELINE, "cross-entropy, compiled"),
    ("FPL", "FPL, compiled"),
    ("FPL", "FPL, twin"),
    ("FPL, official", "released order of work"),
]


def loss_speed(options, report):
    """Forward and backward of one direction, per teacher; ratio to argmax + cross-entropy.

    The limit reads both logits and writes one gradient, once, at the measured copy bandwidth. The
    released order, which takes seconds, is timed at the smaller size alone. What torch.compile
    makes comes last, beside the baseline again: each shape is compiled for tens of seconds.
    """
    rounds = 2 if options.tiny else 7
    calls = {}
    for name, call in CONTENDERS.items():  # one that fails here costs itself alone
        if report.attempt(name, lambda c=call: works(c, report)):
            calls[name] = call
    report.attempt("equal first", lambda: asserted_equal(calls, report))
    bandwidth = copy_bandwidth(report, 2**20 if options.tiny else 2**30)
    report.row("copy bandwidth", gb_per_s=round(bandwidth / 1e9, 1))
    shapes = [(2, 5, 16, 16)] if options.tiny else [(8, 19, 800, 800), (8, 21, 512, 512)]
    limits = {}
    for shape in shapes:
        limits[shape] = 1e3 * 3 * 4 * math.prod(shape) / bandwidth
        report.row(f"{shape} limit", ms=limits[shape], note="three tensors of traffic")
    timed_at_all_shapes(calls, limits, rounds, report)
    compiled = compiled_contenders(options)
    what = compiled | {BASELINE: argmax_ce, "FPL": product}
    report.attempt("equal first, compiled", lambda: asserted_equal(what, report), seconds=30)
    timed_at_all_shapes({f"{BASELINE}, again": argmax_ce, **compiled}, limits, rounds, report)


def timed_at_all_shapes(calls, limits, rounds, report):
    """Times calls with every teacher. limits: {shape: milliseconds that its traffic takes}."""
    for shape, limit in limits.items():
        for kind, logits_t in teachers(shape, report.device).items():
            few = calls
            if shape[2] > 512:
                few = {name: call for name, call in calls.items() if call is not released_order}
            what = shape, kind, logits_t, few, rounds, limit, report
            report.attempt(f"{shape} {kind}", lambda w=what: timed_round_by_round(*w), seconds=8)


def works(call, report):
    """Returns True if forward and backward run, of the sizes that asserted_equal has."""
    logits_t = next(iter(teachers(SMALL, report.device).values()))
    z = torch.randn_like(logits_t).requires_grad_()
    call(z, logits_t, 0.9).backward()
    return z.grad is not None


def asserted_equal(calls, report):
    """Adds a row for each pair that has to have one loss and one gradient."""
    for kind, logits_t in teachers(SMALL, report.device).items():
        torch.manual_seed(0)
        start = torch.randn(SMALL).contiguous(memory_format=torch.channels_last)
        start = start.to(report.device)
        if report.cuda and find_spec("triton"):
            kernel = fused.kernels(start, logits_t)
            report.check(f"{kind}: the twin is the kernel", float(kernel is None), 0.5)
        elif report.cuda:
            report.row(f"{kind}: the twin is the kernel", ok=None, note="no triton: it is not")
        found = {}
        for name, call in calls.items():
            z = start.clone().requires_grad_()
            loss = call(z, logits_t, 0.9)
            loss.backward()
            found[name] = loss.detach(), z.grad
        for one, other in EQUAL:
            if not {one, other} <= calls.keys():
                continue
            (a, g), (b, h) = found[one], found[other]
            error = max(float((a - b).abs() / b.abs()), float((g - h).norm() / h.norm()))
            report.check(f"{kind}: {other} is {one}", error, 1e-4)


def timed_round_by_round(shape, kind, logits_t, calls, rounds, limit, report):
    """Adds a row for every contender."""
    z = torch.randn_like(logits_t).requires_grad_()
    milliseconds, peaks = {name: [] for name in calls}, {}
    for number in range(rounds + 1):  # the first one compiles and warms up
        for name, call in calls.items():
            z.grad = None
            if report.cuda:
                torch.cuda.synchronize()
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            begin = time.perf_counter()
            call(z, logits_t, 0.9).backward()
            if report.cuda:
                torch.cuda.synchronize()
                peaks[name] = (torch.cuda.max_memory_allocated() - before) / logits_t.nbytes
            if number:
                milliseconds[name].append(1e3 * (time.perf_counter() - begin))
    base = statistics.median(next(iter(milliseconds.values())))
    for name, times in milliseconds.items():
        median = statistics.median(times)
        report.row(
            f"{shape} {kind}: {name}",
            ms=median,
            low=min(times),
            high=max(times),
            ratio=median / base,
            over_limit=median / limit,
            peak_tensors=peaks.get(name),
        )


def copy_bandwidth(report, size):
    """Returns bytes per second, read and written, of the best of five copies."""
    x = torch.empty(size, dtype=torch.uint8, device=report.device)
    y, best = torch.empty_like(x), float("inf")
    for _ in range(5):
        if report.cuda:
            torch.cuda.synchronize()
        begin = time.perf_counter()
        y.copy_(x)
        if report.cuda:
            torch.cuda.synchronize()
        best = min(best, time.perf_counter() - begin)
    return 2 * size / best


# ---- steps ----


VITS = "dinov2_vits14"


def configurations(options):
    """Yields (script, backbone, crop, amp, compile), sorted by worth."""
    names = "cps_fpl unimatch mean_teacher ael_fpl u2pl u2pl_ael esl supervised".split()
    if options.tiny:
        for name in names:
            yield name, "resnet50", 32, "none", False
        yield "unimatch_v2", VITS, 28, "none", False
        return
    sizes = [("resnet50", 512), ("resnet101", 800), ("resnet101", 769)]
    sizes += [("resnet101", 512), ("resnet50", 769), ("resnet50", 800)]
    for number, (backbone, crop) in enumerate(sizes):
        for amp in ("bf16", "none"):
            for name in names:
                yield name, backbone, crop, amp, False
            if not number and amp == "bf16":
                yield "unimatch_v2", VITS, 518, amp, False
        for name in names if number else names[:1]:
            yield name, backbone, crop, "bf16", True
    for backbone, crop in sizes:
        for name in names:
            yield name, backbone, crop, "none", True
    for name in names[1:]:
        yield name, *sizes[0], "bf16", True
    for backbone in (VITS, "dinov2_vitb14", "dinov2_vitl14", "dinov3_vits16", "dinov3_vitl16"):
        crops = (518, 798) if "dinov2" in backbone else (512, 800)
        for crop, amp in itertools.product(crops, ("bf16", "none")):
            if (backbone, crop, amp) != (VITS, 518, "bf16"):
                yield "unimatch_v2", backbone, crop, amp, False


def step_flags(name, backbone, crop, amp, compilation):
    """Returns the flags of a step as a process of a large run has it: 2 images of each stream."""
    flags = ["--backbone", backbone, "--weights", "none"]
    flags += ["--crop-size", crop, "--amp", amp, "--batch-size", 2]
    if name != "unimatch_v2":
        flags += ["--stem", "v1c", "--output-stride", 16, "--aspp-rates", 6, 12, 18]
        flags += ["--head-channels", 256]
    if name != "supervised":
        flags += ["--batch-size-unlabeled", 2]
    if name in ("mean_teacher", "u2pl", "u2pl_ael"):
        flags += ["--warmup-iters", 0]
    if name in ("mean_teacher", "u2pl", "esl"):
        flags += ["--cutmix", "--cutmix-prob", 1]
    if crop > 100 and name in ("u2pl", "u2pl_ael"):  # the generated data set has a tenth
        flags += ["--bank-sizes", 50_000, 30_000]
    if crop > 100 and name == "esl":
        flags += ["--anchors", 256, "--queue", 256]
    return flags + ["--compile"] * compilation


def words_of(name, backbone, crop, amp, compilation):
    """Returns a configuration in words. TF32: of convolutions alone, torch's default."""
    return f"{name}.py {backbone} {crop} {TYPES[amp]}{' compiled' * compilation}"


def step_speed(options, report):
    """Steps and images per second and peak memory of a step with 2 + 2 images.

    Counted are labelled and unlabelled images, as --batch-size does, not what is mixed into them.
    """
    for configuration in configurations(options):
        expected = 60 if configuration[-1] else 5
        if report.left() < expected and not options.tiny:
            continue  # a shorter one may still fit
        words = words_of(*configuration)
        what = configuration[0], step_flags(*configuration), words, options, report
        report.attempt(words, lambda w=what: one_speed(*w))
        if configuration[-1]:
            torch._dynamo.reset()


def one_speed(name, flags, words, options, report):
    """Adds a row for one configuration."""
    warm, count = (1, 2) if options.tiny else (3, 10)
    ends = []

    def after(watch, done):
        if done in (warm, warm + count):
            if report.cuda:
                torch.cuda.synchronize()
            ends.append(time.perf_counter())
        if done == warm and report.cuda:
            torch.cuda.reset_peak_memory_stats()

    batches = steps.random_batches(classes=19, pin=report.cuda)
    how = {"after": after, "batches": batches, "classes": 19, "tiny": options.tiny}
    watch = steps.take(name, flags, Group(0, 1, report.device), warm + count, **how)
    seconds = (ends[1] - ends[0]) / count
    args = watch.args
    images = args.batch_size + getattr(args, "batch_size_unlabeled", 0)
    report.row(
        words,
        steps_per_s=1 / seconds,
        images_per_s=images / seconds,
        images=images,
        peak_gb=torch.cuda.max_memory_allocated() / 1e9 if report.cuda else None,
    )


# ---- where the time of a step goes ----

# the functions of each script by what they are for; a name that no step calls is an error
LOSSES = {
    "supervised": ["supervised_loss"],
    "mean_teacher": ["supervised_loss", "consistency_ce"],
    "cps_fpl": "supervised_loss taught_loss teacher_statistics label_statistics".split(),
    "ael_fpl": ["supervised_loss", "consistency_loss"],
    "u2pl": ["supervised_loss", "cross_entropy", "unreliable_loss"],
    "u2pl_ael": ["supervised_loss", "equalized_cross_entropy", "unreliable_loss"],
    "esl": ["supervised_loss", "soft_cross_entropy", "part_contrast"],
    "unimatch": ["supervised_loss", "consistency", "statistics"],
    "unimatch_v2": ["supervised_loss", "consistency", "statistics"],
}
AEL = """draw_partners partner_mask adaptive_copy_paste copy_paste adaptive_cutmix class_confidence
presence"""
U2PL = """entropy quantiles nearest class_ranks negative_masks anchor_masks draw_features
push_features"""
BANKS = {
    "supervised": [],
    "mean_teacher": ["cutmix"],
    "cps_fpl": ["cutmix_masks"],
    "ael_fpl": AEL.split(),
    "u2pl": f"cutmix candidates {U2PL}".split(),
    "u2pl_ael": f"{AEL} {U2PL}".split(),
    "esl": "cutmix push_features part_ids part_sums update_prototypes soft_label".split(),
    "unimatch": ["strong_views", "mixed", "make_target"],
    "unimatch_v2": "strong_views mixed make_target complementary_masks".split(),
}


class Clock:
    """Seconds by name, each without what it calls that has a name of its own."""

    def __init__(self, cuda):
        self.cuda, self.seconds, self.open = cuda, {}, []
        self.called = set()  # names of functions

    def now(self):
        """The time when all that was asked for is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrapped(self, function, name):
        """Returns the function with its time noted."""

        def call(*args, **kwargs):
            self.called.add(function.__name__)
            begin = self.now()
            self.open.append(0.0)
            try:
                return function(*args, **kwargs)
            finally:
                whole = self.now() - begin
                inside = self.open.pop()
                self.seconds[name] = self.seconds.get(name, 0.0) + whole - inside
                if self.open:
                    self.open[-1] += whole

        return call


def shares(options, report):
    """The share of each part of a step, with a wait after each: forward, losses, backward, ...

    Batches lie in pinned memory already; what a loader gives a second has a row of its own.
    """
    crop = 32 if options.tiny else 512
    report.attempt("the loader", lambda: loader_speed(options, report), seconds=6)
    for amp in ("bf16",) if options.tiny else ("bf16", "none"):
        for name in sorted(steps.MODES, key=lambda name: name != "cps_fpl"):
            backbone = VITS if name == "unimatch_v2" else "resnet50"
            flags = step_flags(name, backbone, crop, amp, False)
            what = name, flags, words_of(name, backbone, crop, amp, False), options, report
            report.attempt(what[2], lambda w=what: one_share(*w), seconds=4)


def loader_speed(options, report):
    """Images a second of a loader with 4 workers, crop 512, of the generated pictures."""
    script = importlib.import_module("supervised")
    count, crop = (2, 32) if options.tiny else (20, 512)
    flags = ["--batch-size", "16", "--crop-size", str(crop), "--total-iters", str(count + 2)]
    args = steps.resolved(script, [*flags, "--workers", "0" if options.tiny else "4"])
    group = Group(0, 1, report.device)
    stream = script.open_stream("labeled", script.load(args), args, group, 0)
    next(stream)  # the workers are there
    begin = time.perf_counter()
    for _ in range(count):
        next(stream)
    seconds = time.perf_counter() - begin
    report.row("the loader", images_per_s=16 * count / seconds, note="4 workers, crop 512, PIL")


def one_share(name, flags, words, options, report):
    """Adds a row for one configuration."""
    script, clock = importlib.import_module(name), Clock(report.cuda)
    warm, count = (1, 2) if options.tiny else (3, 8)
    begin, end = [], []

    def after(watch, done):
        if done == warm:
            clock.seconds.clear()
            begin.append(clock.now())
        if done == warm + count:
            end.append(clock.now())

    with contextlib.ExitStack() as stack:

        def replace(owner, attribute, part):
            call = clock.wrapped(getattr(owner, attribute), part)
            stack.enter_context(patch.object(owner, attribute, call))

        for functions, part in ((LOSSES[name], "losses"), (BANKS[name], "banks and mixing")):
            for function in functions:
                replace(fused if hasattr(fused, function) else script, function, part)
        if hasattr(script, "update_teacher"):
            replace(script, "update_teacher", "EMA")
        forward = script.Network.forward
        timed = {
            grad: clock.wrapped(forward, f"forward, {'student' if grad else 'teacher'}")
            for grad in (True, False)
        }

        def network(self, *inputs):
            return timed[torch.is_grad_enabled()](self, *inputs)

        stack.enter_context(patch.object(script.Network, "forward", network))
        replace(torch.Tensor, "backward", "backward")
        for kind in (torch.optim.SGD, torch.optim.AdamW):
            replace(kind, "step", "optimizer")
        batches = steps.random_batches(classes=19, pin=report.cuda)
        how = {"after": after, "batches": batches, "classes": 19, "tiny": options.tiny}
        steps.take(name, flags, Group(0, 1, report.device), warm + count, **how)
    whole = end[0] - begin[0]
    parts = {part: round(100 * s / whole, 1) for part, s in sorted(clock.seconds.items())}
    parts["all else"] = round(100 - sum(parts.values()), 1)
    report.row(words, step_ms=1e3 * whole / count, **parts, note="per cent of a step")
    never = {*LOSSES[name], *BANKS[name]} - clock.called
    assert not never, f"{name}.py calls nowhere {', '.join(sorted(never))}"


# ---- evaluation ----


def evaluation_speed(options, report):
    """predict of one image by both protocols; its windows one by one, and three at a time.

    slide takes them one by one: the last two rows say whether this device would gain by batches.
    """
    for amp in ("none",) if options.tiny else ("bf16", "none"):
        what = amp, options, report
        report.attempt(f"evaluation, {amp}", lambda w=what: one_evaluation(*w), seconds=4)


def one_evaluation(amp, options, report):
    """Adds the rows of one precision: milliseconds of an image, or of a window."""
    script = importlib.import_module("supervised")
    height, width, side = (40, 72, 33) if options.tiny else (1024, 2048, 800)
    backbone = "resnet18" if options.tiny else "resnet101"
    args = steps.resolved(script, step_flags("supervised", backbone, side, amp, False))
    group = Group(0, 1, report.device)
    net = script.build(args, 19, script.DeepLabV3Plus, group).eval()
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8, device=report.device)
    windows = image[:, :side, :side].repeat(3, 1, 1, 1)
    clock = Clock(report.cuda)

    def measure(name, call, count=1):
        """Adds a row: milliseconds of a call for each of the images or windows in it."""
        seconds = []
        for _ in range(2 if options.tiny else 6):
            begin = clock.now()
            call()
            seconds.append(clock.now() - begin)
        report.row(f"{name}, {TYPES[amp]}", ms=1e3 * statistics.median(seconds[1:]) / count)

    with torch.no_grad():
        for protocol in ("whole", "slide"):
            how = dataclasses.replace(args, protocol=protocol)
            measure(
                f"{height}x{width}, {protocol}", lambda a=how: script.predict(net, image, a, 19)
            )
        measure(f"a window of {side}, one by one", lambda: net(windows[:1]))
        measure(f"a window of {side}, three at a time", lambda: net(windows), 3)
