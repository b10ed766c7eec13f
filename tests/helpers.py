"""What the tests of whole runs share: a tiny data set and network, scripts started and compared.

As a program (python -m tests.helpers SCRIPT JSON) it is SCRIPT with the tiny network, called once
for each list of flags in JSON; beside each --out it leaves <out>.rank<k>: a digest of the networks
of process k at every checkpoint.
"""

import hashlib
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import numpy as np  # noqa: E402
import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402
from PIL import Image  # noqa: E402
from torch import nn  # noqa: E402

from common import distributed, run  # noqa: E402

# ---- a tiny data set, a tiny network ----


def draw_tree(root, train=8, val=2, test=2, ids=12):
    """Draws a tree in CamVid's layout: JPEGs of 48x36 pixels, masks of blocks with ids 0 to 11.

    ids: how many occur; of all twelve the last is CamVid's void.
    """
    rng = np.random.default_rng(0)
    for part, count in (("train", train), ("val", val), ("test", test)):
        for folder in (root / part, root / f"{part}annot"):
            folder.mkdir(parents=True)
        for i in range(count):
            mask = rng.integers(0, ids, (6, 8)).astype(np.uint8).repeat(6, 0).repeat(6, 1)
            noise = rng.integers(0, 40, (36, 48, 3))
            pixels = (mask[..., None] * np.array([18, 7, 13]) + noise).astype(np.uint8)
            Image.fromarray(pixels).save(root / part / f"{part}{i}.jpg")
            Image.fromarray(mask).save(root / f"{part}annot" / f"{part}{i}.png")
    return root


def tiny_modules(module):
    """Returns stand-ins for make_backbone and the heads of a script: a step takes milliseconds."""

    def block(inputs, outputs, stride):
        layers = [nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False), nn.BatchNorm2d(outputs)]
        return nn.Sequential(*layers, nn.ReLU())

    def make_backbone(args):
        net = nn.Module()
        net.conv1, net.bn1 = nn.Conv2d(3, 8, 3, 2, 1, bias=False), nn.BatchNorm2d(8)
        net.relu, net.maxpool = nn.ReLU(), nn.MaxPool2d(3, 2, 1)
        net.layer1, net.layer2 = block(8, 8, 1), block(8, 8, 2)
        net.layer3, net.layer4 = block(8, 8, 1), block(8, 8, 1)
        return net

    class Head(nn.Module):
        dropout = 0.1

        def __init__(self, channels, num_classes, args):
            super().__init__()
            self.classify = nn.Sequential(nn.Dropout2d(self.dropout), nn.Conv2d(8, num_classes, 1))

        def forward(self, stages, size):
            return {"logits": module.upsample(self.classify(stages[3]).float(), size)}

    class HeadWithoutDropout(Head):
        dropout = 0.0

    class HeadWithFeatures(Head):
        def __init__(self, channels, num_classes, args):
            super().__init__(channels, num_classes, args)
            self.represent = nn.Sequential(nn.Dropout2d(self.dropout), nn.Conv2d(8, 6, 1))
            self.aux = nn.Conv2d(8, num_classes, 1) if args.aux_weight else None

        def forward(self, stages, size):
            fused = stages[0] + module.upsample(stages[3], stages[0].shape[2:])
            coarse = self.classify(fused).float()
            out = {"logits": module.upsample(coarse, size), "coarse": coarse}
            if self.aux is not None:
                out["aux"] = module.upsample(self.aux(stages[2]).float(), size)
            return out | ({"rep": self.represent(fused)} if self.training else {})

    parts = {"make_backbone": make_backbone, "DeepLabV3Plus": Head, "CPSHead": HeadWithoutDropout}
    parts["U2PLHead"] = HeadWithFeatures
    return {name: part for name, part in parts.items() if hasattr(module, name)}


def shrink(module, monkeypatch):
    """Gives a script the tiny network for the length of a test."""
    for name, value in tiny_modules(module).items():
        monkeypatch.setattr(module, name, value)


# ---- runs ----


def flags(tree, out, iters=8, log=2, evaluate=4, save=4, pictures=0, workers=0, batch=2):
    """Returns the flags of a small run on a drawn tree: two of eight images labelled at 1/4."""
    numbers = dict(total_iters=iters, log_every=log, eval_every=evaluate, save_every=save)
    numbers |= dict(pictures_every=pictures, workers=workers, batch_size=batch, crop_size=32)
    words = ["--dataset", "camvid", "--data-root", tree, "--out", out, "--split", "1/4"]
    for name, value in numbers.items():
        words += ["--" + name.replace("_", "-"), value]
    return [str(word) for word in words] + ["--device", "cpu"]


def train(module, argv):
    """Runs a script's main in this process, as its command line would; a Refusal goes through."""
    module.main(run.resolve(run.parse(module.Args, argv), module.preset))


def start(script, *argvs, processes=1, program="tests.helpers"):
    """Starts the tiny SCRIPT once for each list of flags, as a process of its own.

    program: the module to start; it takes SCRIPT and JSON as this one does.
    """
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node"]
        command += [str(processes)]
    command += ["-m", program, script, json.dumps(argvs)]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(command, cwd=ROOT, **quiet)


def finish(process, seconds=300):
    """Waits for a started process; returns its output, or fails with it if it did not end well."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, text
    return text


def kill_at_step(process, folder, step):
    """SIGKILLs a started process and its children once its log has reached a step and it saved."""
    until = time.time() + 300  # a busy machine
    while True:
        text = (folder / "log.jsonl").read_text() if (folder / "last.pt").exists() else ""
        steps = re.findall(r'^{"kind": "train", "step": (\d+)', text, re.M)
        if steps and int(steps[-1]) >= step:
            return kill(process)
        if process.poll() is not None or time.time() > until:
            kill(process)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)


def kill(process):
    """SIGKILLs a started process and all that it started, torchrun's workers too; waits."""
    pids = [process.pid]
    for pid in pids:  # grows: torchrun's workers are sessions of their own
        children = Path(f"/proc/{pid}/task/{pid}/children")
        pids += map(int, children.read_text().split()) if children.exists() else ()
    if process.poll() is None:
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
    process.wait()
    while any(running(pid) for pid in pids):
        time.sleep(0.01)


def running(pid):
    """Returns whether a process is there and not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# ---- comparisons ----


def flat(value, name=""):
    """Returns a checkpoint as {path: leaf}: tensors and plain values."""
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, (list, tuple)):
        items = enumerate(value)
    else:
        return {name: value}
    leaves = {}
    for key, part in items:
        leaves |= flat(part, f"{name}.{key}")
    return leaves


def differences(folder, other):
    """Returns the names of all that differs between two run folders, but for their place and times.

    Checkpoints are compared bit for bit, the log line by line.
    """
    wrong = []
    for name in ("last.pt", "best.pt"):
        one, two = (flat(torch.load(f / name, weights_only=True)) for f in (folder, other))
        clock = {".args.out", ".args.resume", ".time.elapsed_s"}
        for key in sorted((set(one) | set(two)) - clock):
            a, b = one.get(key), two.get(key)
            if torch.is_tensor(a) and torch.is_tensor(b):
                same = a.dtype == b.dtype and a.shape == b.shape
                same = same and a.numpy().tobytes() == b.numpy().tobytes()
            else:
                same = type(a) is type(b) and a == b
            wrong += [] if same else [f"{name}{key}"]
    one, two = log(folder), log(other)
    if len(one) != len(two):
        wrong.append(f"log.jsonl: {len(one)} and {len(two)} lines")
    for number, (a, b) in enumerate(zip(one, two, strict=False), 1):
        for line in (a, b):
            for name in ("time", "argv", "git"):  # git: others may commit meanwhile
                line.pop(name, None)
            for name in ("out", "resume"):
                line.get("args", {}).pop(name, None)
        wrong += [] if a == b else [f"log.jsonl:{number}: {a} and {b}"]
    return wrong


def log(folder):
    """Returns the lines of a run's log as dicts."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def snapshot(folder):
    """Returns {file: hash} of everything under a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(networks):
    """Returns a hash of all parameters and buffers."""
    state = flat({name: net.state_dict() for name, net in networks.items()})
    bits = b"".join(state[key].numpy().tobytes() for key in sorted(state))
    return hashlib.sha256(bits).hexdigest()


def in_one_group(script, calls):
    """Makes calls, each a run of the script's main, with one process group for all of them.

    torchrun's store does not take the same processes twice.
    """
    group = distributed.setup("cpu")
    script.distributed.setup, script.distributed.teardown = lambda device: group, lambda: None
    for call in calls:
        call()
    dist.destroy_process_group() if dist.is_initialized() else None


if __name__ == "__main__":
    script = importlib.import_module(sys.argv[1])
    for name, value in tiny_modules(script).items():
        setattr(script, name, value)
    keep_last = run.Run.keep_last

    def keep_last_and_digest(self, step, networks, *rest):
        with open(f"{self.args.out}.rank{self.group.rank}", "a") as file:
            file.write(f"{step} {digest(networks)}\n")
        keep_last(self, step, networks, *rest)

    run.Run.keep_last = keep_last_and_digest
    in_one_group(
        script, [lambda argv=argv: train(script, argv) for argv in json.loads(sys.argv[2])]
    )
