"""Kills and restarts: every run that was killed must end as the run that was not.

python benchmarks/faults.py                      # 100 SIGKILLs and 50 in writes, seed printed
python benchmarks/faults.py --seed 7 --kills 20 --scripts u2pl --processes 2
python benchmarks/faults.py --files              # kills at every file operation, two writers, moves
python benchmarks/faults.py --memory             # 2,000 steps: resident memory, handles, workers

A case is a script with one process or with two (torchrun, gloo). Its run is done once undisturbed;
then again, killed several times and each time started again with --resume, until it has ended:
weights, optimizer, state and log have to be equal, bit for bit but for times. Kills: at a random
moment, up to 0.2 s after a random step; and half as many inside the write of a checkpoint after a
random share of its bytes, between its two renames, and inside the write of a line of the log. All
networks are those of tests/tiny.py: what is tested is everything around them. --files:
benchmarks/faults_files.py. Linux.
"""

import importlib
import io
import json
import os
import random
import re
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parent.parent
for folder in (ROOT / "tests", ROOT):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch  # noqa: E402

import tiny  # noqa: E402
from benchmarks.runs import differences, kill, running  # noqa: E402
from common import run  # noqa: E402
from common.flags import cli  # noqa: E402

SCRIPTS = ("supervised", "mean_teacher", "cps_fpl", "ael_fpl", "u2pl", "u2pl_ael", "esl")
SCRIPTS += ("unimatch", "unimatch_v2")
MORE = {  # flags that make a run of a few steps do all that a long one does
    "mean_teacher": "--cutmix --warmup-iters 3",
    "esl": "--anchors 6 --queue 5 --zeta 0.12",
    "u2pl": "--warmup-iters 3 --bank-sizes 40 20 --keys 7",
    "u2pl_ael": "--warmup-iters 3 --bank-sizes 40 20 --keys 7",
}
WRITES = ("checkpoint", "renames", "log")
PARTS = ("operations", "writers", "moves", "contents")  # of --files


@dataclass
class Args:
    """What is killed, and how often."""

    kills: int = 100  # at random moments, over all cases; and half as many inside writes
    seed: int = 0  # of the moments
    scripts: tuple[Literal[SCRIPTS], ...] = SCRIPTS
    processes: tuple[Literal[1, 2], ...] = (1, 2)
    steps: int = 40  # of a run; a checkpoint every 3, an evaluation every 7
    memory: bool = False  # measure memory instead
    files: bool = False  # faults of files instead; of these: --parts
    parts: tuple[Literal["operations", "writers", "moves", "contents"], ...] = PARTS
    every: int = 1  # of file operations and of contents every so many
    child: str = ""  # JSON, for a process of its own: script, flags, fault


# ---- in the process that is killed ----


def die(folder):
    """Notes that the fault was reached, and kills this process."""
    Path(f"{folder}.dead").touch()
    os.kill(os.getpid(), signal.SIGKILL)


def install(kind, call, share):
    """Lets the call-th write of a kind in process 0 stop after a share of its bytes, by SIGKILL.

    Kinds: checkpoint, renames, log. Others fail and live on: full (no file may grow beyond 1,000
    bytes from there on), locked (a folder without write permission, and no privileges), error
    (of the call-th step) and held (in the call-th step, until the file `share` is there).
    """
    if os.environ.get("RANK", "0") != "0":
        return
    count, save, rename = [0], torch.save, os.replace

    def reached():
        count[0] += 1
        return count[0] == call

    def cut_save(content, file):
        if not reached():
            return save(content, file)
        if kind == "full":
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
            return save(content, file)
        whole = io.BytesIO()
        save(content, whole)
        file.write(whole.getvalue()[: int(share * whole.tell())])
        file.flush()
        die(folder())

    def cut_rename(old, new):
        if kind == "renames" and str(new).endswith("last.pt") and reached():
            die(folder())
        if kind == "locked" and str(new).endswith("previous.pt") and reached():
            os.chmod(folder(), 0o555)
            os.seteuid(65534)
        rename(old, new)

    def cut_log(self, entry):
        if reached():
            line = json.dumps(entry).encode()
            self.file.write(line[: int(share * len(line))])
            self.file.flush()
            die(folder())
        write(self, entry)

    def folder():
        return started[0].folder

    def raised(*_):
        if reached():
            raise RuntimeError("as torch raises")

    def held(self, *rest):
        while reached() and not Path(share).exists():
            count[0] -= 1
            time.sleep(0.01)
        log_step(self, *rest)

    write, init, started = run.Run._write, run.Run.__init__, []
    log_step = run.Run.log_step

    def noted(self, *rest):
        init(self, *rest)
        started.append(self)

    run.Run.__init__ = noted
    if kind in ("checkpoint", "full"):
        torch.save = cut_save
    elif kind in ("renames", "locked"):
        os.replace = cut_rename
    elif kind == "error":
        run.Run.log_step = raised
    elif kind == "held":
        run.Run.log_step = held
    elif kind == "log":
        run.Run._write = cut_log


def child(words):
    """Runs a script with the tiny network and a fault, as its command line would."""
    name, argv, fault = json.loads(words)
    script = importlib.import_module(name)
    for part, value in tiny.tiny_modules(script).items():
        setattr(script, part, value)
    if fault:
        install(*fault)
    with run.refusals():
        tiny.train(script, argv)


# ---- in the process that kills ----


def started(name, argv, processes, fault=None, folder=ROOT):
    """Returns the started process of a child, in a folder."""
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone"]
        command += ["--nproc_per_node", str(processes)]
    command += [__file__, "--child", json.dumps([name, argv, fault])]
    quiet = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    return subprocess.Popen(command, cwd=folder, **quiet)


def finished(process):
    """Waits; fails with the errors of a process that did not end well."""
    _, text = process.communicate(timeout=900)
    assert process.returncode == 0, text


def logged(out):
    """Returns (bytes of a run's log, its last step there, 0 if it has none)."""
    path = out / "log.jsonl"
    text = path.read_bytes() if path.exists() else b""
    steps = re.findall(rb'^{"kind": "train", "step": (\d+)', text, re.M)
    return len(text), int(steps[-1]) if steps else 0


def killed(kind, name, argv, processes, rng, args):
    """Starts a run and kills it; returns the step it had logged, or None if it ended before.

    moment: after a random step, or the first one if it goes on beyond, and a random time.
    """
    out = Path(argv[argv.index("--out") + 1])
    call, share, after, delay = rng.randint(1, 6), rng.random(), rng.randrange(args.steps), None
    fault = None if kind == "moment" else (kind, call, share)
    before, dead = logged(out), Path(f"{out}.dead")
    process = started(name, argv, processes, fault)
    while process.poll() is None and not dead.exists():
        if kind == "moment" and delay is None:
            now = logged(out)
            if now != before and now[1] >= after:  # cut back, or longer: it trains
                delay, begin = rng.uniform(0, 0.2), time.time()
        elif kind == "moment" and time.time() - begin > delay:
            break
        time.sleep(0.002)
    ended = process.poll() == 0
    kill(process)
    assert ended or dead.exists() or kind == "moment", process.communicate()[1]
    dead.unlink(missing_ok=True)
    return None if ended else logged(out)[1]


def case(name, processes, kinds, args, rng, folder):
    """Runs one case; returns [(kind, steps logged)] of its kills. Raises AssertionError."""
    numbers = dict(iters=args.steps, log=1, evaluate=7, save=3, pictures=9, batch=4)
    words = MORE.get(name, "").split() + ["--resume", "--workers", "1"]
    whole, tree = folder / f"{name}{processes}", folder / "tree"
    finished(started(name, tiny.flags(tree, whole, **numbers) + words, processes))
    found, turn = [], 0
    while len(found) < len(kinds):
        turn += 1
        cut = folder / f"{name}{processes}-cut{turn}"
        argv = tiny.flags(tree, cut, **numbers) + words
        while len(found) < len(kinds):
            kind = kinds[len(found)]
            step = killed(kind, name, argv, processes, rng, args)
            if step is None:
                break
            found.append((kind, step))
        finished(started(name, argv, processes))
        wrong = differences(whole, cut)
        assert not wrong, (name, processes, found, wrong)
    return found


def kill_all(args):
    """All cases, the kills spread evenly; prints a line for each, and a total."""
    rng, begin, done = random.Random(args.seed), time.time(), 0
    cases = [(name, count) for name in args.scripts for count in args.processes]
    kinds = ["moment"] * args.kills + [WRITES[i % 3] for i in range(args.kills // 2)]
    rng.shuffle(kinds)
    print(f"seed {args.seed}, torch {torch.__version__}, {args.steps} steps, checkpoint every 3")
    with tempfile.TemporaryDirectory() as path:
        tiny.draw_tree(Path(path) / "tree")
        for i, (name, count) in enumerate(cases):
            mine = kinds[i :: len(cases)]
            found = case(name, count, mine, args, rng, Path(path))
            done += len(found)
            print(f"{name} with {count} process(es): {len(found)} kills, ends equal", flush=True)
            for kind in ("moment", *WRITES):
                steps = " ".join(str(step) for k, step in found if k == kind)
                print(f"  {kind:10} after step {steps}", flush=True)
    minutes = (time.time() - begin) / 60
    print(f"{done} kills, {minutes:.0f} minutes: every run ends equal to its undisturbed one")


def files(args):
    """All faults of benchmarks/faults_files.py that are asked for; prints a line for each."""
    # this module as `benchmarks.faults` is another one than __main__
    from benchmarks import faults_files

    with tempfile.TemporaryDirectory() as path:
        folder = Path(path)
        tiny.draw_tree(folder / "tree")
        print(f"torch {torch.__version__}, {faults_files.NUMBERS}")
        for name in args.scripts if "operations" in args.parts else ():
            kinds = faults_files.kill_operations(name, folder, args.every)
            words = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items()))
            print(f"{name}: {sum(kinds.values())} kills, all end equal: {words}", flush=True)
        for count in args.processes if "writers" in args.parts else ():
            for line in faults_files.two_writers(count, folder):
                print(f"two starts, {count} process(es) each: {line}", flush=True)
        for line in faults_files.moves(folder) if "moves" in args.parts else ():
            print(line, flush=True)
        for name in args.scripts if "contents" in args.parts else ():
            refused, harmless = faults_files.contents(name, folder, args.every)
            words = f"{refused} refused in one line, {harmless} harmless"
            print(f"{name}: {refused + harmless} wrong contents of last.pt: {words}", flush=True)


# ---- memory ----


def tree_of(pid):
    """Returns the pids of a process and all that it started."""
    pids = [pid]
    for parent in pids:
        children = Path(f"/proc/{parent}/task/{parent}/children")
        pids += map(int, children.read_text().split()) if children.exists() else ()
    return pids


def sizes(pids):
    """Returns (MiB resident of the first, of the others, open handles of the first)."""
    resident = []
    for pid in pids:
        try:
            text = Path(f"/proc/{pid}/status").read_text()
            resident.append(int(text.split("VmRSS:")[1].split()[0]) / 1024)
        except (OSError, IndexError):  # it has just ended
            resident.append(0)
    return resident[0], sum(resident[1:]), len(os.listdir(f"/proc/{pids[0]}/fd"))


def memory(args):
    """2,000 steps of shapes for each script: sizes in the second and in the last quarter."""
    print("script        main MiB        workers MiB     handles     left over")
    for name in args.scripts:
        with tempfile.TemporaryDirectory() as path:
            out, shared = Path(path) / "run", set(os.listdir("/dev/shm"))
            argv = f"--out {out} --total-iters 2000 --log-every 20 --eval-every 500 --workers 2"
            argv += f" --save-every 500 --pictures-every 500 --device cpu {MORE.get(name, '')}"
            process, seen = started(name, argv.split(), 1), []
            while process.poll() is None:
                lines = (out / "log.jsonl").read_text().splitlines() if out.exists() else []
                step = json.loads(lines[-1])["step"] if lines[1:] and lines[-1][-1] == "}" else 0
                pids = tree_of(process.pid)
                if step and len(pids) > 1:
                    seen.append((step, *sizes(pids)))
                time.sleep(0.25)
            finished(process)
            left = [pid for pid in pids if running(pid)]
            left += sorted(set(os.listdir("/dev/shm")) - shared)
        quarters = [[x[1:] for x in seen if a < x[0] <= a + 500] for a in (500, 1500)]
        early, late = ([statistics.median(c) for c in zip(*q, strict=True)] for q in quarters)
        cells = [f"{a:6.0f} -> {b:6.0f}" for a, b in zip(early, late, strict=True)]
        print(f"{name:13} {'  '.join(cells)}   {left or 'nothing'}", flush=True)
        assert late[0] < 1.03 * early[0] + 5 and late[1] < 1.03 * early[1] + 5, "memory grows"
        assert late[2] <= early[2] and not left, "something is left open"


def main(args):
    """One of the four."""
    if args.child:
        child(args.child)
    elif args.memory:
        memory(args)
    elif args.files:
        files(args)
    else:
        kill_all(args)


if __name__ == "__main__":
    with run.refusals("start again"):
        main(cli(Args))
