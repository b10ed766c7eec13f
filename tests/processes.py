"""Scripts started as processes of their own, killed, and their run folders compared.

As a program (python tests/processes.py SCRIPT JSON JSON) it is SCRIPT with the tiny network, called
once for each list of flags in the first JSON; the second has the settings of `main`.
"""

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

ROOT = Path(__file__).resolve().parents[1]
os.environ.setdefault("OMP_NUM_THREADS", "1")
for folder in (ROOT, Path(__file__).parent):
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))

import torch.distributed as dist  # noqa: E402

import sources  # noqa: E402
import tiny  # noqa: E402
from benchmarks.runs import bits, flat, kill  # noqa: E402
from common import data, distributed, run  # noqa: E402


class Nursery:
    """A process that has imported all and forks others: each begins at once, not after seconds."""

    def __init__(self):
        words = f"import sys; sys.path[:0] = {[str(ROOT), str(Path(__file__).resolve().parent)]};"
        words += f"import {', '.join(tiny.SCRIPTS)}, processes; processes.nurse()"
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


def command(script, *argvs, **settings):
    """Returns the words of this program: the tiny SCRIPT, once for each list of flags; see main."""
    return [str(Path(__file__).resolve()), script, json.dumps(argvs), json.dumps(settings)]


def start(script, *argvs, processes=1, **settings):
    """Starts the tiny SCRIPT once for each list of flags, as processes of their own; see main."""
    return Forked(command(script, *argvs, **settings), processes)


def recorded(script, *jobs, processes=2):
    """Starts recorder.py, which has the form of the jobs."""
    program = Path(__file__).with_name("recorder.py")
    return Forked([str(program), script, json.dumps(jobs)], processes)


def by_torchrun(agent, words):
    """Returns the started torchrun of a program; agent: the words of torchrun itself."""
    argv = [sys.executable, "-m", "torch.distributed.run", *agent, *words]
    quiet = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    return subprocess.Popen(argv, cwd=ROOT, **quiet)


def finish(process, seconds=300):
    """Waits for a started process; returns its output, or fails with it if it did not end well."""
    try:
        text, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        kill(process)
        raise
    assert process.returncode == 0, text
    return text


def reach(process, folder, step):
    """Waits until the log of a started run has a step."""
    until = time.time() + 300  # a busy machine
    while True:
        text = (folder / "log.jsonl").read_text() if (folder / "log.jsonl").exists() else ""
        steps = re.findall(r'^{"kind": "train", "step": (\d+)', text, re.M)
        if steps and int(steps[-1]) >= step:
            return
        if process.poll() is not None or time.time() > until:
            kill(process)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)


def kill_at_step(process, folder, step):
    """SIGKILLs a started process and its children once its log has reached a step and it saved."""
    while not (folder / "last.pt").exists() and process.poll() is None:
        time.sleep(0.005)
    reach(process, folder, step)
    kill(process)


# ---- comparisons ----


def snapshot(folder):
    """Returns {file: hash} of everything under a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(networks):
    """Returns a hash of all parameters and buffers of {name: network or its state}."""
    states = (
        (k, net if isinstance(net, dict) else net.state_dict()) for k, net in networks.items()
    )
    state = flat(dict(states))
    return hashlib.sha256(b"".join(bits(state[key]) for key in sorted(state))).hexdigest()


def hold_at(number, rank, go):
    """Lets a process wait in a step until SIGTERM or the file `go` comes, or to be killed.

    What is to be signalled in the middle of its work cannot end before, on however busy a machine.
    """
    step = run.Run.step

    def held(self, done, *rest):
        while done == number and self.group.rank == rank:
            if self.told or go and Path(go).exists():
                break
            time.sleep(0.005)
        step(self, done, *rest)

    run.Run.step = held


def note_digests():
    """Lets a run leave <out>.rank<k>: a digest of networks and state at every checkpoint."""
    keep_last = run.Run.keep_last

    def keep_and_note(self, step, networks, optimizer, state):
        held = [hashlib.sha256(bits(x)).hexdigest() for x in state.values()]
        with open(f"{self.args.out}.rank{self.group.rank}", "a") as file:
            file.write(f"{step} {digest(networks)} {held}\n")
        keep_last(self, step, networks, optimizer, state)

    run.Run.keep_last = keep_and_note


def in_one_group(script, calls):
    """Makes calls, each a run of the script's main, with one process group for all of them.

    torchrun's store does not take the same processes twice.
    """
    group = distributed.setup("cpu")
    script.distributed.setup = lambda device: group
    script.distributed.teardown = lambda: None
    for call in calls:
        call()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(name, argvs, hold=0, rank=0, go="", launch=False, published=None):
    """Is a script with the tiny network.

    hold, rank, go: see hold_at. launch: as its command line, once; with published lists of a test's
    own, {data set: {family: {split: entry}}}, whose addresses may be files.
    """
    script = importlib.import_module(name)
    for part, value in tiny.tiny_modules(script).items():
        setattr(script, part, value)
    if hold:
        hold_at(hold, rank, go)
    if published:
        data.SPLITS.update(published)
        sources.SCHEMES = ("file",)
    if launch:
        sys.argv = [script.__file__, *argvs[0]]
        return run.launch(script.Args, script.preset, script.main)
    note_digests()
    in_one_group(script, [lambda argv=argv: tiny.train(script, argv) for argv in argvs])


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
