"""Scripts started as processes of their own, killed, and their run folders compared.

As a program (python tests/processes.py SCRIPT JSON JSON) it is SCRIPT with the tiny network and the
flags in the first JSON; the second has the settings of `main`.
"""

import contextlib
import functools
import hashlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

ROOT = Path(__file__).resolve().parents[1]
PATHS = ROOT, Path(__file__).resolve().parent
os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path += [str(folder) for folder in PATHS if str(folder) not in sys.path]

import torch.distributed as dist  # noqa: E402

import tiny  # noqa: E402
from benchmarks.runs import bits, flat, kill  # noqa: E402
from common import distributed, run  # noqa: E402


@functools.cache
def forks():
    """Makes processes by forking one that has imported all: each begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*tiny.SCRIPTS, "processes"])
    with patch.dict(os.environ, PYTHONPATH=os.pathsep.join(map(str, PATHS))):
        forkserver.ensure_running()
    return context


def grow(argv, folder, variables, out, err):
    """In a forked process: is `python argv` in a folder, with its output in two files."""
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = argv
    multiprocessing.set_start_method(None, force=True)  # loaders begin as they do elsewhere
    runpy.run_path(argv[0], run_name="__main__")


class Forked:
    """Processes of a command, as subprocess.Popen has one; several are a group as torchrun's.

    apart: stderr is a text of its own. output: the file for the text.
    """

    def __init__(self, argv, processes=1, folder=ROOT, apart=False, output=None):
        self.folder = tempfile.TemporaryDirectory()
        out = output or f"{self.folder.name}/out"
        self.processes = []
        self.files = [Path(out), Path(f"{self.folder.name}/err" if apart else out)]
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        several = {"WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for rank in range(processes):
            own = several | {"RANK": rank, "LOCAL_RANK": rank} if processes > 1 else {}
            variables = os.environ | {name: str(x) for name, x in own.items()}
            given = [str(word) for word in argv], str(folder), variables, *map(str, self.files)
            self.processes.append(forks().Process(target=grow, args=given))
            self.processes[-1].start()
        self.pids = [process.pid for process in self.processes]
        self.pid, self.returncode = self.pids[0], None
        self.failed = None  # the time when one did

    def poll(self):
        """The first code that is not 0, 0 if all are, None while one is at work."""
        codes = [process.exitcode for process in self.processes]
        wrong = [code for code in codes if code]
        self.returncode = None if None in codes else (wrong or [0])[0]
        if wrong and self.returncode is None:  # as torchrun: one that failed ends the others
            self.failed = self.failed or time.time()
            if time.time() > self.failed + 30:  # seconds, as torchrun's
                self.kill()
        return self.returncode

    def wait(self, timeout=300):
        until = time.time() + timeout
        while self.poll() is None:
            if time.time() > until:
                kill(self)
                raise subprocess.TimeoutExpired(str(self.pids), timeout)
            time.sleep(0.005)
        return self.returncode

    def communicate(self, timeout=300):
        self.wait(timeout)
        return tuple(path.read_text() if path.exists() else "" for path in self.files)

    def send_signal(self, number):
        for process in self.processes:
            if process.exitcode is None:
                with contextlib.suppress(ProcessLookupError):  # it has just ended
                    os.kill(process.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def start(script, argv, processes=1, **settings):
    """Starts this program: the tiny SCRIPT with its flags; settings: see main."""
    return Forked([__file__, script, json.dumps(argv), json.dumps(settings)], processes)


def finish(process):
    """Waits for a started process; returns its output, or fails with it if it did not end well."""
    text, _ = process.communicate()
    assert process.returncode == 0, text
    return text


def reach(process, folder, step):
    """Waits until the log of a started run has a step."""
    until = time.time() + 300  # a busy machine
    path = folder / "log.jsonl"
    while not path.exists() or not re.search(rf'"train", "step": {step}\b', path.read_text()):
        if process.poll() is not None or time.time() > until:
            kill(process)
            raise AssertionError(process.communicate()[0])
        time.sleep(0.005)


def snapshot(folder):
    """Returns {file: hash} of everything under a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(networks):
    """Returns a hash of all parameters and buffers of {name: network or its state}."""
    state = flat({k: x if isinstance(x, dict) else x.state_dict() for k, x in networks.items()})
    return hashlib.sha256(b"".join(bits(state[key]) for key in sorted(state))).hexdigest()


def in_one_group(script, calls):
    """Makes calls, each a run of the script's main, with one process group for all of them."""
    group = distributed.setup("cpu")
    script.distributed.setup = lambda device: group
    script.distributed.teardown = lambda: None
    for call in calls:
        call()
    if dist.is_initialized():
        dist.destroy_process_group()


def main(name, argv, hold=0, rank=0, go="no", agent=0):
    """Is a script with the tiny network, as its command line; or torchrun with `agent` of them.

    In step `hold` process `rank` waits for what is to meet it at work: SIGTERM, or the file `go`.
    """
    if agent:
        from torch.distributed.launcher.api import LaunchConfig, elastic_launch

        own = dict(min_nodes=1, max_nodes=1, nproc_per_node=agent, run_id="tiny", max_restarts=3)
        own |= dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1)
        config = LaunchConfig(**own, start_method="fork")
        return elastic_launch(config, main)(name, argv, hold, rank, go)
    script = tiny.script(name)
    for part, value in tiny.tiny_modules(script).items():
        setattr(script, part, value)
    step = run.Run.log_step

    def held(self, done, *rest):
        while (
            done == hold and self.group.rank == rank and not (self.signalled or os.path.exists(go))
        ):
            time.sleep(0.005)
        step(self, done, *rest)

    run.Run.log_step = held
    sys.argv = [script.__file__, *argv]
    with run.refusals():
        tiny.train(script, argv)


if __name__ == "__main__":
    main(sys.argv[1], json.loads(sys.argv[2]), **json.loads(sys.argv[3]))
