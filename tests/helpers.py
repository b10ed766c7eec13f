"""What the tests of whole runs share: a tiny data set and network, scripts started and compared.

As a program (python -m tests.helpers SCRIPT JSON) it is SCRIPT with the tiny network, called once
for each list of flags in JSON; beside each --out it leaves <out>.rank<k>: a digest of the networks
of process k at every checkpoint.
"""

import contextlib
import functools
import hashlib
import importlib
import json
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
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

    class HeadWithParts(HeadWithFeatures):
        width = 8

        def forward(self, stages, size):
            return super().forward(stages, size) | ({"encoder": stages[3]} if self.training else {})

    parts = {"make_backbone": make_backbone, "DeepLabV3Plus": Head, "CPSHead": HeadWithoutDropout}
    parts |= {"U2PLHead": HeadWithFeatures, "ESLHead": HeadWithParts}
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


class Nursery:
    """A process that has imported all and forks others: each begins at once, not after seconds."""

    def __init__(self):
        scripts = "supervised, mean_teacher, cps_fpl, ael_fpl, u2pl, esl"
        words = f"import {scripts}; from tests import helpers; helpers.nurse()"
        command = [sys.executable, "-c", words]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT)
        self.process = subprocess.Popen(command, **pipes)
        self.lock = threading.Lock()

    def ask(self, **what):
        """Returns the answer to one question, see nurse()."""
        with self.lock:
            self.process.stdin.write(json.dumps(what) + "\n")
            self.process.stdin.flush()
            return json.loads(self.process.stdout.readline())


@functools.cache
def nursery():
    """The one of this process; it ends with it."""
    return Nursery()


def nurse():
    """Answers a Nursery's questions: {"born": {...}} by a pid, {"gone": pid} by a code or null."""
    answers, codes = os.dup(1), {}
    os.dup2(2, 1)
    for line in sys.stdin:
        question = json.loads(line)
        if "born" in question:
            answer = os.fork()
            if not answer:
                os.close(answers)
                grow(**question["born"])
        else:
            answer = codes.get(question["gone"])
            pid, status = (0, 0) if answer is not None else os.waitpid(question["gone"], os.WNOHANG)
            if pid:
                answer = codes[pid] = os.waitstatus_to_exitcode(status)
        os.write(answers, (json.dumps(answer) + "\n").encode())


def grow(argv, folder, variables, out, err):
    """In a forked process: is `python argv` in a folder, with its output in two files; ends."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, path in ((1, out), (2, err)):
            os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
        os.environ.clear()
        os.environ.update(variables)
        os.chdir(folder)
        module = argv[0] == "-m"
        sys.argv = argv[module:]
        sys.modules.pop(sys.argv[0], None)  # it is __main__ from here on
        run_it = runpy.run_module if module else runpy.run_path
        run_it(sys.argv[0], run_name="__main__", **{"alter_sys": True} if module else {})
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


class Forked:
    """One or more processes of a command, as subprocess.Popen has one: stdout, stderr in one text.

    Several: a process group as torchrun makes one; each has RANK and the rest.
    """

    def __init__(self, argv, processes=1, folder=ROOT, variables=None, apart=False):
        self.folder = tempfile.TemporaryDirectory()
        self.files = [Path(self.folder.name) / name for name in ("out", "err" if apart else "out")]
        several = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port()}
        self.pids = []
        for rank in range(processes):
            own = several | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            environ = os.environ | (variables or {}) | {name: str(x) for name, x in own.items()}
            born = dict(argv=argv, folder=str(folder), variables=environ)
            born |= dict(zip(("out", "err"), map(str, self.files), strict=True))
            self.pids.append(nursery().ask(born=born))
        self.pid, self.returncode = self.pids[0], None

    def poll(self):
        """The first code that is not 0, 0 if all are, None while one is at work."""
        codes = [nursery().ask(gone=pid) for pid in self.pids]
        wrong = [code for code in codes if code]
        self.returncode = None if None in codes else (wrong or [0])[0]
        if wrong and None in codes:  # as torchrun: one that failed ends the others
            for pid, code in zip(self.pids, codes, strict=True):
                if code is None:
                    os.kill(pid, signal.SIGKILL)
        return self.returncode

    def wait(self, timeout=300):
        until = time.time() + timeout
        while self.poll() is None:
            if time.time() > until:
                raise subprocess.TimeoutExpired(str(self.pids), timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=300):
        self.wait(timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self.files)

    def send_signal(self, number):
        for pid in self.pids:
            os.kill(pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def start(script, *argvs, processes=1, program="tests.helpers", hold=0):
    """Starts the tiny SCRIPT once for each list of flags, as a process of its own.

    program: the module to start; it takes SCRIPT and JSON as this one does. hold: the step after
    which this one waits to be killed.
    """
    argv = ["-m", program, script, json.dumps(argvs)]
    return Forked(argv, processes, variables={"HOLD": str(hold)})


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
    pids = list(getattr(process, "pids", [process.pid]))
    for pid in pids:  # grows: torchrun's workers are sessions of their own
        children = Path(f"/proc/{pid}/task/{pid}/children")
        pids += map(int, children.read_text().split()) if children.exists() else ()
    if process.poll() is None:
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
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
            for name in ("time", "argv", "git", "job"):  # git: others may commit meanwhile
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


def hold_at(number, rank=0, until=lambda run: False):
    """Lets a process wait before a step ends, until a call on its Run says yes, or for good.

    What is to be signalled in the middle of its work cannot end before, on however busy a machine.
    """
    step = run.Run.step

    def held(self, done, *rest):
        while done == number and self.group.rank == rank and not until(self):
            time.sleep(0.005)
        step(self, done, *rest)

    run.Run.step = held


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
    if int(os.environ.get("HOLD", "0")):
        hold_at(int(os.environ["HOLD"]))
    in_one_group(
        script, [lambda argv=argv: train(script, argv) for argv in json.loads(sys.argv[2])]
    )
