"""Parts of gpu.py that measure time and memory.

Contenders of one table run in turn, round by round, in one process; their numbers are asserted
equal before the first round. Medians with the smallest and the largest round.
"""

import contextlib
import importlib
import statistics
import time
from unittest.mock import patch

import torch
import torch.nn.functional as F

from benchmarks import released, steps
from common.distributed import Group

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
    """cps_fpl.py, Eq. (7) times Eq. (11), as printed."""
    loss, weight = importlib.import_module("cps_fpl").fuzzy_positive_loss(logits_s, logits_t, T)
    return (loss * weight).mean()


def product_official(logits_s, logits_t, T):
    """cps_fpl.py by the released rules."""
    script = importlib.import_module("cps_fpl")
    rules = {"k_max": 3, "strict": False, "mean_over": "positives_and_next"}
    loss, weight = script.fuzzy_positive_loss(logits_s, logits_t, T, **rules)
    return (loss * weight).mean()


def released_order(logits_s, logits_t, T):
    """The same numbers in the released order of work."""
    loss, weight = released.released_loss(logits_s, logits_t, T)
    return (loss * weight).mean()


def contenders(options):
    """Returns {name: call}; the first is the baseline."""
    compile_it = {"backend": "eager"} if options.tiny else {}
    return {
        "argmax + cross-entropy": argmax_ce,
        "max + cross-entropy": max_ce,
        "cross-entropy, compiled": torch.compile(argmax_ce, **compile_it),
        "FPL": product,
        "FPL, official": product_official,
        "FPL, compiled": torch.compile(product, **compile_it),
        "released order of work": released_order,
    }


EQUAL = [
    ("argmax + cross-entropy", "max + cross-entropy"),
    ("argmax + cross-entropy", "cross-entropy, compiled"),
    ("FPL", "FPL, compiled"),
    ("FPL, official", "released order of work"),
]


def loss_speed(options, report):
    """Forward and backward of one direction, per teacher; ratio to argmax + cross-entropy.

    The limit reads both logits and writes one gradient, once, at the measured copy bandwidth.
    """
    shapes = [(2, 5, 16, 16)] if options.tiny else [(8, 19, 800, 800), (8, 21, 512, 512)]
    calls, rounds = contenders(options), 2 if options.tiny else 7
    report.attempt("equal first", lambda: asserted_equal(calls, report))
    bandwidth = copy_bandwidth(report, 2**20 if options.tiny else 2**30)
    report.row("copy bandwidth", gb_per_s=round(bandwidth / 1e9, 1))
    for shape in shapes:
        size = 4 * shape[0] * shape[1] * shape[2] * shape[3]
        limit = 1e3 * 3 * size / bandwidth
        report.row(f"{shape} limit", ms=limit, note="three tensors of traffic")
        for kind, logits_t in teachers(shape, report.device).items():
            if report.left() < 10 and not options.tiny:
                report.row(f"{shape} {kind}", note="no time left")
                return
            timed_round_by_round(shape, kind, logits_t, calls, rounds, limit, report)


def asserted_equal(calls, report):
    """Adds a row for each pair that has to have one loss and one gradient."""
    for kind, logits_t in teachers((2, 7, 24, 24), report.device).items():
        torch.manual_seed(0)
        start = torch.randn(2, 7, 24, 24).to(report.device)
        found = {}
        for name, call in calls.items():
            z = start.clone().requires_grad_()
            loss = call(z, logits_t, 0.9)
            loss.backward()
            found[name] = loss.detach(), z.grad
        for one, other in EQUAL:
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


def configurations(options):
    """Yields (script, backbone, crop, amp, compile), sorted by worth."""
    if options.tiny:
        for name in steps.MODES:
            yield name, "resnet50", 32, "none", False
        return
    names = ["cps_fpl", "mean_teacher", "ael_fpl", "u2pl", "esl", "supervised"]
    compilations = [False, True]
    for compilation in compilations:
        for backbone, crop in (("resnet50", 512), ("resnet101", 800), ("resnet101", 769)):
            for amp in ("bf16", "none"):
                for name in names:
                    yield name, backbone, crop, amp, compilation
        for backbone, crop in (("resnet101", 512), ("resnet50", 769), ("resnet50", 800)):
            for amp in ("bf16", "none"):
                for name in names:
                    yield name, backbone, crop, amp, compilation


def step_flags(name, backbone, crop, amp, compilation):
    """Returns the flags of a step as a process of a large run has it: 2 images of each stream."""
    flags = ["--backbone", backbone, "--stem", "v1c", "--output-stride", 16, "--weights", "none"]
    flags += ["--crop-size", crop, "--amp", amp, "--batch-size", 2, "--aspp-rates", 6, 12, 18]
    if name != "supervised":
        flags += ["--batch-size-unlabeled", 2]
    if name in ("mean_teacher", "u2pl"):
        flags += ["--warmup-iters", 0]
    if name in ("mean_teacher", "u2pl", "esl"):
        flags += ["--cutmix"]
    return flags + ["--compile"] * compilation


def step_speed(options, report):
    """Steps and images per second and peak memory of a step with 2 + 2 images.

    Counted are labelled and unlabelled images, as --batch-size does, not what is mixed into them.
    """
    for name, backbone, crop, amp, compilation in configurations(options):
        if report.left() < 15:
            report.row("the rest", note="no time left")
            return
        words = f"{name}.py {backbone} {crop} {amp}{' compiled' * compilation}"
        flags = step_flags(name, backbone, crop, amp, compilation)
        report.attempt(words, lambda n=name, f=flags, w=words: one_speed(n, f, w, options, report))


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
    watch = take(name, flags, warm + count, report, **how)
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


def take(name, flags, count, report, **how):
    """As steps.take; esl.py's first prototypes, made once before the first step, are left out."""
    script = importlib.import_module(name)

    def prototypes(net, data, width, args, group):
        return torch.randn(data.num_classes, args.parts, width).to(group.device)

    with contextlib.ExitStack() as stack:
        if name == "esl":
            stack.enter_context(patch.object(script, "first_prototypes", prototypes))
        return steps.take(script, flags, Group(0, 1, report.device), count, **how)


# ---- where the time of a step goes ----

LOSSES = "supervised_loss cross_loss consistency_loss consistency_ce consistency_mse"
LOSSES += " soft_cross_entropy unreliable_loss part_contrast cross_entropy watch soft_label"
BANKS = "draw_partners partner_mask copy_paste class_confidence update_confidence presence"
BANKS += " draw_classes draw_keys push_keys negative_masks anchor_masks class_ranks quantiles"
BANKS += " entropy part_ids part_sums update_prototypes cutmix toggled_mask"


class Clock:
    """Seconds by name, each without what it calls that has a name of its own."""

    def __init__(self, cuda):
        self.cuda, self.seconds, self.open = cuda, {}, []

    def now(self):
        """The time when all that was asked for is done."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def wrapped(self, function, name):
        """Returns the function with its time noted."""

        def call(*args, **kwargs):
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

    Batches lie in pinned memory already: data is what the loop itself takes of them.
    """
    crop = 32 if options.tiny else 512
    for name in steps.MODES:
        if report.left() < 8:
            report.row("the rest", note="no time left")
            return
        for amp in ("bf16", "none"):
            flags = step_flags(name, "resnet50", crop, amp, False)
            words = f"{name}.py resnet50 {crop} {amp}"
            call = lambda n=name, f=flags, w=words: one_share(n, f, w, options, report)  # noqa: E731
            report.attempt(words, call)
            if options.tiny:
                break


def one_share(name, flags, words, options, report):
    """Adds a row for one configuration."""
    script, clock = importlib.import_module(name), Clock(report.cuda)
    warm, count, begin, end = (1, 2, [], []) if options.tiny else (3, 8, [], [])

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

        for part, functions in (("losses", LOSSES), ("banks and mixing", BANKS)):
            for function in functions.split():
                if hasattr(script, function):
                    replace(script, function, part)
        if hasattr(script, "update_teacher"):
            replace(script, "update_teacher", "EMA")
        forward = script.Network.forward
        timed = {
            grad: clock.wrapped(forward, f"forward, {'student' if grad else 'teacher'}")
            for grad in (True, False)
        }

        def network(self, x):
            return timed[torch.is_grad_enabled()](self, x)

        stack.enter_context(patch.object(script.Network, "forward", network))
        replace(torch.Tensor, "backward", "backward")
        replace(torch.optim.SGD, "step", "optimizer")
        batches = steps.random_batches(classes=19, pin=report.cuda)
        how = {"after": after, "batches": batches, "classes": 19, "tiny": options.tiny}
        watch = take(name, flags, warm + count, report, **how)
    whole = end[0] - begin[0]
    clock.seconds["data"] = sum(spent["data"] for spent in watch.spent[warm:])
    parts = {part: round(100 * s / whole, 1) for part, s in sorted(clock.seconds.items())}
    parts["all else"] = round(100 - sum(parts.values()), 1)
    report.row(words, step_ms=1e3 * whole / count, **parts, note="per cent of a step")
