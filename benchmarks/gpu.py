"""One command that says whether all of this is right on a GPU, and how fast it is.

python benchmarks/gpu.py --minutes 8 --out results/gpu/NAME.json
python benchmarks/gpu.py --minutes 60 --out FILE --camvid data/camvid --weights FILE
python benchmarks/gpu.py --device cpu --tiny --out FILE      # the same code in a minute, for tests

Needs a checkout and requirements.txt alone; for --compile and FPL's kernel (--fused on) also a C
compiler and Python's headers, with which Triton builds its launchers. The plan is sorted by worth;
each part is a process of its own with a limit of its own, so that a failure costs its part alone,
and what a part had found before it was cut off counts. The table on the terminal and the JSON hold
one row for each check (ok or not, its error and its limit) and each measurement. Exit code 1 if a
check failed. docs/performance.md is made from such files: python benchmarks/page.py.
"""

import contextlib
import gc
import importlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
import torchvision  # noqa: E402

from benchmarks.runs import kill  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402


class Part(NamedTuple):
    """One entry of the plan: what a function of a module looks at."""

    name: str
    module: str
    function: str
    seconds: int  # of 8 minutes, up to MORE times as many of more; 0: what is left
    question: str


CHECKS, RUNS, SPEED = (f"benchmarks.gpu_{name}" for name in ("checks", "runs", "speed"))
PLAN = [
    Part("losses", CHECKS, "losses", 30, "every loss, bank and percentile against the CPU"),
    Part("steps", CHECKS, "whole_steps", 75, "a whole step of every script against the CPU"),
    Part("waits", CHECKS, "waits", 50, "20 steps without a wait of the host"),
    Part("repeats", RUNS, "repeats", 75, "--deterministic; SIGKILL and --resume"),
    Part("processes", RUNS, "processes", 60, "NCCL, no_sync, CPU <-> CUDA, signals"),
    Part("loss speed", SPEED, "loss_speed", 45, "FPL's loss against cross-entropy"),
    Part("step speed", SPEED, "step_speed", 45, "steps and images per second, memory"),
    Part("shares", SPEED, "shares", 30, "where the time of a step goes"),
    Part(
        "evaluation", SPEED, "evaluation_speed", 15, "predict by both protocols; batches of windows"
    ),
    Part("compile", CHECKS, "compiled", 55, "--compile: losses, graphs, the first step"),
    Part("camvid", RUNS, "camvid", 0, "the protocol camvid-small"),
]
MORE = (
    3  # what is over of the time goes to all parts; with camvid up to so many times their seconds
)


@dataclass
class Options:
    """What to look at, and for how long."""

    out: str  # JSON file; written after every part
    minutes: float = 8  # for all parts together
    only: tuple[str, ...] = ()  # parts, by name; left out: all
    camvid: str = ""  # folder of CamVid, for the last part
    weights: str = ""  # file of ResNet-50 weights, for the last part
    device: Literal["auto", "cuda", "cpu"] = "auto"
    tiny: bool = False  # small networks and pictures, few rounds: does the code run?
    part: str = ""  # in a process of its own: the one part to do
    rows: str = ""  # likewise: the file that its rows go to
    until: float = 0.0  # likewise: when it has to end, seconds since 1970


class Report:
    """Where a part leaves its rows: one line of JSON each, at once."""

    def __init__(self, options):
        self.options, self.until = options, options.until
        self.cuda = options.device != "cpu" and torch.cuda.is_available()
        self.device = torch.device("cuda", 0) if self.cuda else torch.device("cpu")

    def row(self, name, **values):
        """Adds a row; its values are numbers, texts or None."""
        line = json.dumps({"part": self.options.part, "name": name, **values})
        with open(self.options.rows, "a") as file:
            file.write(line + "\n")

    def check(self, name, error, limit, note=""):
        """Adds a row of a check: ok where error <= limit; NaN is not."""
        self.row(name, error=error, limit=limit, ok=bool(error <= limit), note=note)

    def attempt(self, name, call, seconds=0.0):
        """Calls call(); an error becomes a row that failed, and the part goes on.

        seconds: what it is expected to take; without them it is not begun. What does not fit into
        the device's memory has not failed.
        """
        if self.left() < seconds and not self.options.tiny:
            return self.row(name, ok=None, note="no time left")
        try:
            return call()
        except torch.OutOfMemoryError:
            self.row(name, ok=None, note="does not fit into the memory")
        except Exception as error:
            line = (str(error).splitlines() or [""])[0]
            self.row(name, ok=False, note=f"{type(error).__name__}: {line}"[:300])
        finally:
            if self.cuda:
                gc.collect()
                torch.cuda.empty_cache()

    def left(self):
        """Returns the seconds that the part still has."""
        return self.until - time.time()


def header(options):
    """Returns what the JSON says of machine, versions and checkout."""
    git = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"]
    commit = ""
    with contextlib.suppress(OSError):  # no git on this machine
        commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    cuda = options.device != "cpu" and torch.cuda.is_available()
    found = {"device": f"CPU, {platform.machine()}", "gpus": 0, "memory_gb": None}
    if cuda:
        properties = torch.cuda.get_device_properties(0)
        found["device"] = properties.name
        found["gpus"] = torch.cuda.device_count()
        found["memory_gb"] = round(properties.total_memory / 1e9, 1)
    found["versions"] = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": torchvision.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
    }
    found["git"] = commit or None
    found["date"] = time.strftime("%Y-%m-%d")
    return found | {"minutes": options.minutes, "tiny": options.tiny}


def run_part(part, options, seconds, cache):
    """Runs one part in a process of its own; returns its rows, with one that says how it ended.

    cache: folder of what --compile makes, for all parts.
    """
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        rows = Path(folder) / "rows"
        rows.touch()
        begin = time.time()
        words = asdict(options) | {"part": part.name, "rows": str(rows), "until": begin + seconds}
        command = [sys.executable, __file__, "--child", json.dumps([part, words])]
        environment = os.environ | {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "TMPDIR": folder}
        environment.setdefault("TORCHINDUCTOR_CACHE_DIR", cache)  # what one part has compiled
        error = Path(folder) / "stderr"
        with open(error, "w") as stream:
            pipes = {"stdout": subprocess.DEVNULL, "stderr": stream}
            process = subprocess.Popen(command, env=environment, cwd=ROOT, **pipes)
            try:
                code = process.wait(seconds + 5)  # it ends by itself a little earlier
            except subprocess.TimeoutExpired:
                code = None
            finally:
                kill(process)
        found = [json.loads(line) for line in rows.read_text().splitlines()]
        end = {"part": part.name, "name": "the part itself"}
        end["seconds"] = round(time.time() - begin, 1)
        if code is None:
            end |= {"ok": False, "note": f"cut off after {seconds:.0f} s"}
        elif code:
            last = error.read_text().strip().splitlines()[-1:]
            end |= {"ok": False, "note": f"exit code {code}: {' '.join(last)[:300]}"}
        else:
            end |= {"ok": True, "note": part.question}
        return [*found, end]


def line_of(row):
    """Returns a row as one line of the table."""
    mark = {True: "ok", False: "FAILED", None: ""}[row.get("ok")]
    rest = {k: v for k, v in row.items() if k not in ("part", "name", "ok", "note")}
    words = "  ".join(
        f"{key} {value:.3g}" if isinstance(value, float) else f"{key} {value}"
        for key, value in rest.items()
        if value is not None
    )
    return (
        f"{mark:6}  {row['part']:10}  {row['name']:44}  {words}  {row.get('note') or ''}".rstrip()
    )


def child(part, words):
    """What a part's own process does."""
    part, options = Part(*part), Options(**words)
    module = importlib.import_module(part.module)
    getattr(module, part.function)(options, Report(options))


def main(options, cache):
    """Goes through the plan; returns the exit code. cache: as run_part takes it."""
    unknown = set(options.only) - {part.name for part in PLAN}
    if unknown:
        names = ", ".join(part.name for part in PLAN)
        print(f"--only {' '.join(sorted(unknown))}: the parts are {names}", file=sys.stderr)
        return 2
    if options.device == "cuda" and not torch.cuda.is_available():
        print("--device cuda: torch sees no CUDA device here", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # takes the part along
    until = time.time() + 60 * options.minutes
    found, rows = header(options), []
    plan = [part for part in PLAN if not options.only or part.name in options.only]
    if not options.camvid:
        plan = [part for part in plan if part.name != "camvid"]
    over = max(60 * options.minutes - sum(part.seconds for part in plan), 0)
    for number, part in enumerate(plan):
        rest = sum(one.seconds for one in plan[number:])
        seconds = until - time.time() - 5  # the last one's, camvid
        if part.seconds:
            seconds = part.seconds * (1 + over / rest)
            if not plan[-1].seconds:  # camvid comes: it takes what others leave
                seconds = min(seconds, MORE * part.seconds)
        if options.tiny:
            seconds = 600  # a CPU that others use too
        seconds = min(seconds, until - time.time() - 5)
        begin = time.time()
        if seconds < 5:
            rows.append(
                {"part": part.name, "name": "the part itself", "ok": None, "note": "no time left"}
            )
        else:
            rows += run_part(part, options, seconds, cache)
        over += part.seconds - (time.time() - begin)  # what a part leaves goes to the others
        over = max(over, 0)
        for row in rows:
            if row["part"] == part.name:
                print(line_of(row), flush=True)
        path = Path(options.out)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(found | {"rows": rows}, indent=1) + "\n")
    failed = [row for row in rows if row.get("ok") is False]
    checks = [row for row in rows if row.get("ok") is not None]
    print(f"{len(checks) - len(failed)} of {len(checks)} checks passed on {found['device']}")
    return 1 if failed else 0


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        child(*json.loads(sys.argv[2]))
    else:
        with refusals("start again"), tempfile.TemporaryDirectory() as folder:
            sys.exit(main(cli(Options), folder))
