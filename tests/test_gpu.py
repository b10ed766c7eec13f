"""What would break on a GPU, found without one, on fake tensors; gpu.py and page.py on a CPU."""

import contextlib
import importlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from benchmarks import gpu, gpu_checks, page, steps
from common import Refusal, distributed, run
from common.distributed import Group
from tiny import draw_tree

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
    pytest.skip("fake CUDA tensors need torch 2.9 or newer", allow_module_level=True)

from benchmarks import fake_cuda  # noqa: E402
from benchmarks.fake_cuda import GPU, MPS  # noqa: E402

MODES = [(name, mode) for name, modes in steps.MODES.items() for mode in modes]
FIRST = {name: next(iter(modes)) for name, modes in steps.MODES.items()}
SIZE = ["--crop-size", "32", "--batch-size", "2", "--device", "cuda"]
# one copy to the host in each step: AEL's boxes are drawn there from what its teacher sees
NAMED = {"ael_fpl": "distributed.to_host"}


def seen(name, mode, *more, tiny=True, device=GPU):
    """Returns what fake CUDA noted of two steps."""
    flags = steps.MODES[name][mode].split() + SIZE + list(more)
    if name != "supervised":
        flags += ["--batch-size-unlabeled", "2"]
    return fake_cuda.fake_steps(name, flags, tiny=tiny, device=device)


def check(name, found):
    """Asserts that nothing waits but what is named, and that no two float types meet.

    But in U2PL's percentiles: between two numbers of float32, at a place in float64.
    """
    assert [wrong for wrong in found.mixed if "quantiles(" not in wrong.where] == []
    waits = {wait.where for wait in found.waits}
    assert len(found.waits) == 2 * len(waits)  # once in each of the two steps
    assert len(waits) == (name in NAMED)
    assert all(NAMED[name] in where for where in waits)
    assert sum(found.operations.values()) > 100


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_step_waits_nowhere_and_stays_on_the_device(name, mode):
    check(name, seen(name, mode))


@pytest.mark.parametrize("name", ["supervised", "cps_fpl", "u2pl"])  # esl.py has u2pl.py's head
def test_under_autocast_no_two_types_meet(name):
    """bilinear interpolate is on CUDA's list of float32: its result is cast to its partner's."""
    more = "--amp bf16 --backbone resnet18 --output-stride 16".split()
    more += ["--aux-weight", "0.4"] * (name != "cps_fpl")
    check(name, seen(name, FIRST[name], *more, tiny=False))


def test_what_waits_and_what_meets_is_noted():
    with fake_cuda.fake_cuda() as mode:
        x = torch.ones(2, 3).to(GPU, non_blocking=True)
        for wait in (x.tolist, x.cpu, lambda: x[x > 0], lambda: torch.tensor([1.0], device=GPU)):
            before = len(mode.waits)
            with contextlib.suppress(Exception):  # torch's own: the number is not there
                wait()
            assert len(mode.waits) == before + 1
        with pytest.raises(Exception, match="cuda:0, cpu|cuda:0 and cpu|two devices"):
            x + torch.ones(2, 3)
        assert mode.mixed == []
        x.bfloat16() * x.sum()  # a scalar takes the type of the rest
        x.bfloat16() * x
        assert [wrong.what for wrong in mode.mixed] == ["mul of bfloat16 and float32"]


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    """Two GPUs, and a third process."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "fresh_store", lambda *of: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *what, **how: None)
    for name, value in {"MASTER_ADDR": "localhost", "MASTER_PORT": 29500, "WORLD_SIZE": 3}.items():
        monkeypatch.setenv(name, str(value))
    for local in range(3):
        monkeypatch.setenv("RANK", str(local))
        monkeypatch.setenv("LOCAL_RANK", str(local))
        if local < 2:
            assert distributed.setup("auto") == Group(local, 3, torch.device("cuda", local))
    with pytest.raises(Refusal, match="no GPU for process 2, this machine has 2"):
        distributed.setup("auto")
    assert chosen == [0, 1]


def test_mps_is_accepted_where_torch_has_it(monkeypatch):
    assert not torch.backends.mps.is_available()
    with pytest.raises(Refusal, match="--device mps: torch sees no MPS device here"):
        distributed.setup("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.setup("mps") == Group(0, 1, torch.device("mps"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Refusal, match="--device mps: one process alone"):
        distributed.setup("mps")


@pytest.mark.parametrize("name", steps.MODES)
def test_what_mps_cannot_run_is_named(name):
    """The others bring float64 onto a device for the sums of the log alone."""
    if name in ("ael_fpl", "u2pl", "esl"):
        with pytest.raises(Refusal, match="--device mps: .* in float64, which MPS does not have"):
            seen(name, FIRST[name], device=MPS)
    else:
        found = seen(name, FIRST[name], device=GPU).wide
        assert {wide.where.split(":")[0] for wide in found} == {"run.py"}


def test_the_sums_of_the_log_are_float32_on_mps():
    one = object.__new__(run.Run)
    never = dict.fromkeys(["log_every", "eval_every", "save_every", "pictures_every"], 0)
    one.args = SimpleNamespace(total_iters=9, **never)
    one.first = one.signalled = False
    one.begin = 1  # no word on the first step
    one.clock, one.bad_step = Counter(), torch.tensor(run.NEVER)
    for device, kind in (("mps", torch.float32), ("cpu", torch.float64)):
        one.group, one.meter = Group(0, 1, SimpleNamespace(type=device)), torch.zeros(0)
        one.log_step(1, {"loss": torch.tensor(0.5)}, 0.1, 0.0, {})
        assert one.meter.dtype == kind and one.meter.tolist() == [1, 0.5]


@pytest.fixture
def report(tmp_path):
    """A part's Report, and its rows as a function."""
    options = gpu.Options(out=str(tmp_path / "out.json"), device="cpu", tiny=True, seconds=600)
    options.part, options.rows = "part", str(tmp_path / "rows")
    found = gpu.Report(options)
    found.rows = lambda: [json.loads(x) for x in (tmp_path / "rows").read_text().splitlines()]
    return found


LONG = ("processes", "repeats", "camvid")  # start processes, as test_faults.py does


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] * (part.name in LONG)) for part in gpu.PLAN],
    ids=lambda part: part.name,
)
def test_every_part_runs_on_a_cpu(part, report, tmp_path):
    report.options.camvid = str(draw_tree(tmp_path / "camvid"))
    getattr(importlib.import_module(part.module), part.function)(report.options, report)
    rows = report.rows()
    assert rows and all(row.get("ok") is not False for row in rows), rows
    if part.name in ("steps", "waits"):
        assert {row["name"].split(".py")[0] for row in rows} == set(steps.MODES)
    counts = {"shares": 1 + len(steps.MODES), "losses": 2 * len(gpu_checks.CASES) + 1}
    assert len(rows) == counts.get(part.name, len(rows))


def test_a_wrong_number_of_the_device_is_found(report):
    """Rows: the error of what was found, that of the CPU's float32, whether it is right."""
    truth = {name: torch.ones(3).double() for name in ("loss", "gradient 0")}
    for *errors, right in (
        (1e-3, 0.0, False),
        (9e-6, 0.0, True),  # below the floor
        (7e-3, 1e-3, True),  # float32 costs as much there
        (float("nan"), 0.0, False),
    ):
        found, own = ({**truth, "loss": truth["loss"] + error} for error in errors)
        gpu_checks.judge(report, "loss", found, own, truth, gpu_checks.FLOOR)
        assert report.rows()[-1]["ok"] is right, errors


def test_a_part_that_fails_costs_itself_alone(tmp_path, monkeypatch, capsys):
    out = tmp_path / "deep" / "out.json"
    monkeypatch.setattr(gpu, "PLAN", [gpu.Part("fails", "broken", "failing", 90, "?")])
    assert gpu.main(gpu.Options(out=str(out), device="cpu")) == 1
    assert "FAILED" in capsys.readouterr().out
    (row,) = json.loads(out.read_text())["rows"]
    assert row["name"] == "the part itself" and "No module named 'broken'" in row["note"]


def test_the_pages_are_what_page_py_writes():
    for path, text in page.pages().items():
        assert path.read_text() == text, f"python benchmarks/page.py: {path.name}"
