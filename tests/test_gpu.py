"""What would break on a GPU, found without one, on fake tensors; gpu.py and page.py on a CPU."""

import importlib
import json
import os
from unittest.mock import Mock

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
NAMED = dict.fromkeys(("ael_fpl", "u2pl_ael"), "distributed.to_host")


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


@pytest.mark.parametrize("name", ["supervised", "cps_fpl", "u2pl", "unimatch_v2"])  # esl: u2pl's
def test_under_autocast_no_two_types_meet(name):
    """bilinear interpolate is on CUDA's list of float32: its result is cast to its partner's."""
    more, small = ["--amp", "bf16"], name == "unimatch_v2"  # whose small network is its own
    more += [] if small else "--backbone resnet18 --output-stride 16".split()
    more += ["--aux-weight", "0.4"] * (name in ("supervised", "u2pl"))
    check(name, seen(name, FIRST[name], *more, tiny=small))


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    """Two GPUs, and a third process."""
    chosen, nothing = [], lambda *what, **how: None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "fresh_store", nothing)
    monkeypatch.setattr(torch.distributed, "init_process_group", nothing)
    monkeypatch.setattr(os, "environ", dict(MASTER_ADDR="localhost", MASTER_PORT="1"))
    for local in (0, 1):
        os.environ.update(RANK=str(local), LOCAL_RANK=str(local), WORLD_SIZE="3")
        assert distributed.setup("auto") == Group(local, 3, torch.device("cuda", local))
    os.environ.update(RANK="2", LOCAL_RANK="2")
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
    if name in ("ael_fpl", "u2pl", "u2pl_ael", "esl"):
        with pytest.raises(Refusal, match="--device mps: .* in float64, which MPS does not have"):
            seen(name, FIRST[name], device=MPS)
    else:
        assert {wide.where.split(":")[0] for wide in seen(name, FIRST[name]).wide} == {"run.py"}


def test_the_sums_of_the_log_are_float32_on_mps():
    one = Mock(signalled=False, begin=9, meter=torch.zeros(0), bad_step=torch.tensor(run.NEVER))
    one.group = Group(0, 1, torch.device("mps"))
    one.due.return_value = False
    run.Run.log_step(one, 1, {"loss": torch.tensor(0.5)}, 0.1, 0.0, {})
    assert one.meter.dtype == torch.float32 and one.meter.tolist() == [1, 0.5]


LONG = ("processes", "repeats", "camvid")  # start processes, as test_faults.py does


@pytest.mark.parametrize(
    "part",
    [pytest.param(part, marks=[pytest.mark.slow] * (part.name in LONG)) for part in gpu.PLAN],
    ids=lambda part: part.name,
)
def test_every_part_runs_on_a_cpu(part, tmp_path):
    options = gpu.Options(out=str(tmp_path / "out.json"), device="cpu", tiny=True, seconds=600)
    options.part, options.rows = "part", str(tmp_path / "rows")
    options.camvid = str(draw_tree(tmp_path / "camvid"))
    report = gpu.Report(options)
    getattr(importlib.import_module(part.module), part.function)(options, report)
    rows = [json.loads(line) for line in (tmp_path / "rows").read_text().splitlines()]
    assert rows and all(row.get("ok") is not False for row in rows), rows
    if part.name in ("steps", "waits"):
        assert {row["name"].split(".py")[0] for row in rows} == set(steps.MODES)
    wrong, right = ({"loss": torch.tensor(x)} for x in (1.001, 1.0))
    gpu_checks.judge(report, "loss", wrong, right, right, gpu_checks.FLOOR)
    assert '"ok": false' in (tmp_path / "rows").read_text().splitlines()[-1]


def test_the_pages_are_what_page_py_writes():
    for path, text in page.pages().items():
        assert path.read_text() == text, f"python benchmarks/page.py: {path.name}"
