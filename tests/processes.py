"""Scripts started as processes of their own, killed, and their run folders compared.

As a program of Forked (processes.py WORDS) it is torchrun with two children of
benchmarks/faults.py of these WORDS: it starts both again when one dies.
"""

import functools
import hashlib
import multiprocessing
import os
import re
import runpy
import socket
import sys
import tempfile
import time
from multiprocessing import forkserver
from pathlib import Path
from unittest.mock import patch

from benchmarks.runs import bits, flat, kill
from tiny import ROOT, SCRIPTS


@functools.cache
def forks():
    """Makes processes by forking one that has imported all: each begins at once."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*SCRIPTS, "processes"])
    with patch.dict(os.environ, PYTHONPATH=f"{ROOT}{os.pathsep}{ROOT / 'tests'}"):
        forkserver.ensure_running()
    return context


def grow(argv, folder, variables, out):
    """In a forked process: is `python argv` in a folder, with its output in a file."""
    for number in (1, 2):
        os.dup2(os.open(out, os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(variables)
    os.chdir(folder)
    sys.argv = argv
    multiprocessing.set_start_method(None, force=True)  # loaders begin as they do elsewhere
    runpy.run_path(argv[0], run_name="__main__")


class Forked:
    """Processes of a command, as subprocess.Popen has one; several are a group as torchrun's."""

    def __init__(self, argv, processes=1, folder=ROOT):
        self.folder = tempfile.TemporaryDirectory()
        self.output = Path(self.folder.name) / "output"
        self.processes = []
        with socket.create_server(("127.0.0.1", 0)) as free:
            port = free.getsockname()[1]
        for rank in range(processes):
            own = dict(RANK=rank, LOCAL_RANK=rank, WORLD_SIZE=processes)
            own |= dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            own = {name: str(x) for name, x in own.items() if processes > 1}
            given = [str(word) for word in argv], str(folder), os.environ | own, str(self.output)
            self.processes.append(forks().Process(target=grow, args=given))
            self.processes[-1].start()
        self.pids = [process.pid for process in self.processes]
        self.pid, self.returncode = self.pids[0], None

    def poll(self):
        """The first code that is not 0, 0 if all are, None while one is at work."""
        codes = [process.exitcode for process in self.processes]
        if None not in codes:
            self.returncode = next(filter(None, codes), 0)
        return self.returncode

    def wait(self):
        until = time.time() + 300  # a busy machine
        while self.poll() is None and time.time() < until:
            time.sleep(0.005)
        if self.returncode is None:
            kill(self)
            raise TimeoutError(self.output.read_text())


def finish(process, code=0):
    """Waits for a started process; returns its output, or fails with it if it ends otherwise."""
    process.wait()
    text = process.output.read_text()
    assert process.returncode == code, text
    return text


def reach(process, folder, step):
    """Waits until the log of a started run has a step."""
    until = time.time() + 300  # a busy machine
    path = folder / "log.jsonl"
    while not path.exists() or not re.search(rf'"train", "step": {step}\b', path.read_text()):
        if process.poll() is not None or time.time() > until:
            kill(process)
            raise AssertionError(process.output.read_text())
        time.sleep(0.005)


def snapshot(folder):
    """Returns {file: hash} of everything under a folder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def digest(networks):
    """Returns a hash of all parameters and buffers of {name: network or its state}."""
    state = flat({k: x if isinstance(x, dict) else x.state_dict() for k, x in networks.items()})
    return hashlib.sha256(b"".join(bits(state[key]) for key in sorted(state))).hexdigest()


if __name__ == "__main__":
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    from benchmarks import faults

    own = dict(min_nodes=1, max_nodes=1, nproc_per_node=2, run_id="tiny", max_restarts=3)
    own |= dict(rdzv_backend="c10d", rdzv_endpoint="localhost:0", monitor_interval=0.1)
    elastic_launch(LaunchConfig(**own, start_method="fork"), faults.child)(sys.argv[1])
