"""A script's own `main`, run for a few steps under observation: for benchmarks and tests.

Nothing of a script is written again here: its networks, streams, losses and optimizer are what
`main` makes them. What changes is what stands around: the process group is given, nothing is
written, and after the last step asked for `main` is left.

As a program (python benchmarks/steps.py SCRIPT FLAGS) it is a script as its command line is, with
the tests' tiny network.
"""

import contextlib
import dataclasses
import importlib
import itertools
import sys
import zlib
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from common import distributed, flags, run  # noqa: E402

# every loss of every script: {script: {mode: flags}}; the first is the script's own default, with
# its warm-up cut short so that the second step is a whole one
MODES = {
    "supervised": {
        "cross-entropy": "",
        "OHEM and auxiliary head": "--ohem-kept 0.1 --aux-weight 0.4",
    },
    "mean_teacher": {
        "CutMix": "--cutmix --cutmix-prob 1 --warmup-iters 1",
        "squared error": "--consistency mse --warmup-iters 0",
    },
    "cps_fpl": {
        "FPL": "",
        "FPL, recipe official": "--recipe official",
        "FPL, twin": "--fused on",
        "CPS": "--unsup-loss ce",
        "FPL without CutMix": "--no-cutmix",
        "soft labels": "--unsup-loss soft",
        "negative learning": "--unsup-loss negative",
    },
    "ael_fpl": {
        "FPL+AEL": "",
        "FPL+AEL, recipe official": "--recipe official",
        "AEL": "--unsup-loss ce",
    },
    "u2pl": {
        "L_c": "--cutmix-prob 1 --warmup-iters 1",
        "L_b": "--unreliable-loss binary --warmup-iters 0",
        "neither": "--unreliable-loss none --warmup-iters 0",
    },
    "u2pl_ael": {
        "U2PL with AEL": "--warmup-iters 0",
        "U2PL with AEL, recipe official": "--recipe official --contrast-after 0",
        "AEL with U2PL's labels": "--unreliable-loss none --warmup-iters 0",
    },
    "unimatch": {
        "UniMatch": "--threshold 0.13",
        "FixMatch": "--threshold 0.13 --views 1 --no-feature-perturbation",
        "UniMatch, recipe official": "--threshold 0.13 --recipe official",
        "UniMatch with FPL": "--unsup-loss fpl",
        "UniMatch with FPL, several T": "--unsup-loss fpl --T 0.84 0.89 0.94 0.99",
    },
    "unimatch_v2": {
        "UniMatch V2": "--threshold 0.13",
        "FixMatch on DINOv3": "--threshold 0.13 --views 1 --backbone dinov3_vits16",
        "UniMatch V2, recipe official": "--threshold 0.13 --recipe official",
        "UniMatch V2 with FPL": "--unsup-loss fpl",
        "UniMatch V2 with FPL, several T": "--unsup-loss fpl --T 0.84 0.89 0.94 0.99",
    },
    "esl": {
        "ESL": "--cutmix-prob 1",
        "dynamic soft labels": "--no-contrast",
        "hard labels": "--no-contrast --label hard",
    },
}
# kept on the device and without a wait in between: a run that is never due for anything
QUIET = {"log_every": 10**6, "eval_every": 10**6, "save_every": 10**6, "pictures_every": 0}


class Enough(Exception):
    """Leaves `main` after the last step asked for."""


class Watch:
    """What a run of `steps` steps shows: networks, optimizer, state, and what each step logs."""

    def __init__(self):
        self.args, self.networks, self.optimizer, self.state = None, {}, None, {}
        self.logged = []  # of each step: {name: 0-dim tensor}
        self.spent = []  # of each step: {name: seconds}

    def gradients(self):
        """Returns {network.parameter: gradient} of all parameters that have one, on the CPU."""
        found = {}
        for name, net in self.networks.items():
            for key, parameter in net.named_parameters():
                if parameter.grad is not None:
                    found[f"{name}.{key}"] = parameter.grad.detach().cpu()
        return found

    def values(self):
        """Returns {network.name: tensor} of all parameters, buffers and banks, on the CPU."""
        found = {}
        for name, net in self.networks.items():
            found |= {f"{name}.{key}": value.cpu() for key, value in net.state_dict().items()}
        found |= {f"state.{k}": v.cpu() for k, v in self.state.items() if torch.is_tensor(v)}
        return found


def tiny_modules(script):
    """Returns the tests' stand-ins for a script's backbone and heads."""
    if str(ROOT / "tests") not in sys.path:
        sys.path.append(str(ROOT / "tests"))
    tiny = importlib.import_module("tiny")
    return tiny.tiny_modules(script)


def drawn_prototypes(net, data, width, args, group):
    """In place of esl.py's first_prototypes, whose K-means reads all labelled images: the same
    random ones on every device."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(data.num_classes, args.parts, width, generator=generator)
    return drawn.to(group.device, non_blocking=True).float()


def resolved(script, words):
    """Returns the arguments that a script's `main` would get from a list of flags."""
    argv = [str(word) for word in words]
    return flags.fill(flags.parse(script.Args, script.preset, argv), script.preset, argv)


def take(
    script,
    flags,
    group,
    steps,
    before=None,
    after=None,
    batches=None,
    classes=None,
    tiny=False,
    kmeans=False,
):
    """Runs the first steps of a script's `main` on the generated data set; returns a Watch.

    script: a module or its name. flags: a list, or resolved arguments. group: the Group to run in.
    before(watch): called when all is made, before the first step. after(watch, done): at the end
    of each step. batches(name, images, with_label, args): in place of a stream's loader, an endless
    iterator. classes: how many the data set pretends to have. tiny: the tests' network in place of
    the script's, whose step takes milliseconds. kmeans: esl.py finds its first prototypes itself.
    """
    if isinstance(script, str):
        script = importlib.import_module(script)
    args = resolved(script, flags) if isinstance(flags, list) else flags
    args = dataclasses.replace(args, workers=0, **QUIET)
    args = dataclasses.replace(args, total_iters=max(args.total_iters, steps + 1))
    watch = Watch()
    watch.args = args

    class WatchedRun(run.Run):
        """Writes nothing, and ends after `steps` steps."""

        def restore(self, networks, optimizer, state):
            watch.networks, watch.optimizer, watch.state = networks, optimizer, state
            if before is not None:
                before(watch)
            return 0

        def log_step(self, done, logged, lr, begin, spent):
            super().log_step(done, logged, lr, begin, spent)
            watch.logged.append({name: value.detach() for name, value in logged.items()})
            watch.spent.append(spent)
            if after is not None:
                after(watch, done)
            if done == steps:
                raise Enough

    def stream(name, data, args, group, start):
        """In place of open_stream: batches of the size that this process would get."""
        opened = script.streams(data, args)[name]
        images = distributed.share(opened.batch, group, name)
        return batches(name, images, opened.with_label, args)

    def load(args):
        """The data set, with as many classes as are asked for."""
        data = original_load(args)
        data.num_classes = classes
        data.classes = [f"class {i}" for i in range(classes)]
        data.palette = np.zeros((classes, 3), np.uint8)
        return data

    original_load = script.load
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(distributed, "setup", lambda device: group))
        stack.enter_context(patch.object(script, "Run", WatchedRun))
        for name, stand_in in tiny_modules(script).items() if tiny else ():
            stack.enter_context(patch.object(script, name, stand_in))
        if hasattr(script, "first_prototypes") and not kmeans:
            stack.enter_context(patch.object(script, "first_prototypes", drawn_prototypes))
        if classes:
            stack.enter_context(patch.object(script, "load", load))
        if batches:
            stack.enter_context(patch.object(script, "open_stream", stream))
        with contextlib.suppress(Enough):
            script.main(args)
    return watch


def random_batches(device="cpu", classes=7, pin=False):
    """Returns a function for take(batches=...): two fixed random batches a stream, again and again.

    Images of noise on blocks of one colour, labels of the blocks, all inside. pin: in pinned
    memory, as a loader on CUDA gives them.
    """

    def batches(name, images, with_label, args):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        made = [sample(generator, images, with_label, args.crop_size) for _ in range(2)]
        # the loop overwrites the entries of a batch with what lies on the device: copies
        return (dict(batch) for batch in itertools.cycle(made))

    def sample(generator, images, with_label, crop):
        cells = (images, max(crop // 32, 2), max(crop // 32, 2))
        blocks = torch.randint(0, classes, cells, generator=generator)
        size = (crop, crop)
        labels = torch.nn.functional.interpolate(blocks[:, None].float(), size)[:, 0].long()
        noise = torch.randint(0, 60, (images, 3, crop, crop), generator=generator)
        colours = torch.randint(0, 190, (classes, 3), generator=generator)
        image = (noise + colours[labels].movedim(3, 1)).byte()
        batch = {"image": image, "inside": torch.ones(images, crop, crop, dtype=torch.bool)}
        if with_label:
            batch["label"] = labels
        return {key: x.pin_memory() for key, x in batch.items()} if pin else batch

    return batches


# ---- whole runs ----


def whole_run(name, flags, tiny=False):
    """Runs a script's `main` to its end in this process, as its command line would."""
    script = importlib.import_module(name)
    with contextlib.ExitStack() as stack:
        for part, stand_in in tiny_modules(script).items() if tiny else ():
            stack.enter_context(patch.object(script, part, stand_in))
        try:
            script.main(resolved(script, flags))
        finally:
            torch.use_deterministic_algorithms(False)


def command(name, flags, tiny=False):
    """Returns the command line of a script as a process of its own."""
    flags = [str(flag) for flag in flags]
    if tiny:
        return [sys.executable, str(Path(__file__).resolve()), name, *flags]
    return [sys.executable, str(ROOT / f"{name}.py"), *flags]


if __name__ == "__main__":
    if sys.argv[1:2] == [] or sys.argv[1] not in MODES:
        sys.exit(f"steps.py SCRIPT FLAGS: SCRIPT is one of {', '.join(MODES)}")
    script = importlib.import_module(sys.argv[1])
    sys.argv = [script.__file__, *sys.argv[2:]]
    for name, stand_in in tiny_modules(script).items():
        setattr(script, name, stand_in)
    with run.refusals():
        script.main(resolved(script, sys.argv[1:]))
