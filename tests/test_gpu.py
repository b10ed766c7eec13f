"""What would break on a GPU, found without one, on fake tensors; gpu.py and page.py on a CPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from torch import nn

import supervised
from benchmarks import gpu, gpu_checks, page, steps
from common import Refusal, distributed, run
from common.distributed import Group
from test_steps import joined
from tiny import draw_tree, resolved, tiny_modules

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
    pytest.skip("fake CUDA tensors need torch 2.9 or newer", allow_module_level=True)

from benchmarks import fake_cuda  # noqa: E402
from benchmarks.fake_cuda import GPU, MPS  # noqa: E402

MODES = [(name, mode) for name, modes in steps.MODES.items() for mode in modes]
FIRST = {name: dict([next(iter(modes.items()))]) for name, modes in steps.MODES.items()}
FEW = {name: FIRST[name] for name in ("cps_fpl", "ael_fpl", "esl", "unimatch")}
# torch raises there on CUDA with deterministic algorithms; docs/reliability.md has the two others
# that come in a step, upsample_bilinear2d_backward and kthvalue
RAISES = set("""_adaptive_avg_pool2d_backward adaptive_max_pool2d_backward put_ put histc median
fractional_max_pool2d_backward max_unpool2d upsample_linear1d_backward grid_sampler_2d_backward
upsample_bicubic2d_backward reflection_pad2d_backward nanmedian _embedding_bag scatter_reduce
scatter_reduce_ _ctc_loss_backward""".split())  # fmt: skip
IN_FLOAT64 = ("ael_fpl", "u2pl", "u2pl_ael", "esl")


def seen(name, flags, count=1, device=GPU, tiny=True):
    """Returns what fake CUDA noted of some steps.

    Nothing waits but for AEL's boxes, drawn on the host from what its teacher sees. No two float
    types meet but in U2PL's percentiles, between two numbers of float32, at a place in float64, and
    in the sums in float64 of FPL's twin (where there is Triton, its kernel's own).
    """
    unlabeled = "" if name == "supervised" else "--batch-size-unlabeled 2"
    words = f"{flags} --crop-size 32 --batch-size 2 --device cuda {unlabeled}".split()
    found = fake_cuda.fake_steps(name, words, count, device, tiny=tiny)
    assert [x for x in found.mixed if not re.search(r"quantiles\(|running_sum\(", x.where)] == []
    waits = Counter(wait.where for wait in found.waits)
    assert list(waits.values()) == [count] * ("ael" in name)
    assert all("distributed.to_host" in where for where in waits)
    assert sum(found.operations.values()) > 100 and not RAISES & found.operations.keys()
    return found


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_step_waits_nowhere_and_stays_on_the_device(name, mode):
    """Nor does float64 come there, which MPS does not have, but for the sums of the log."""
    found = seen(name, steps.MODES[name][mode], count=2 if mode in FIRST[name] else 1)
    if name not in IN_FLOAT64:
        files = {"run.py"} | ({"fused.py"} if mode == "FPL, twin" else set())
        assert {wide.where.split(":")[0] for wide in found.wide} == files


@pytest.mark.parametrize(("name", "recipe"), [("cps_fpl", "official"), ("ael_fpl", "paper")])
def test_a_graph_is_gone_before_the_next_one_is_built(name, recipe, tmp_path):
    """A step whose text has one backward pass for all holds a third more at its peak, or above."""
    spec = importlib.util.spec_from_file_location(name, joined(name, tmp_path))
    whole = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(whole)
    words = f"--recipe {recipe} --backbone resnet18 --output-stride 16 --crop-size 96"
    words += " --batch-size 2 --batch-size-unlabeled 2 --device cuda --weights none --fused on"
    peaks = []
    for script in (name, whole):
        found = fake_cuda.fake_steps(script, words.split(), 2)
        peaks.append(found.peak - found.live)  # without weights, moments and what is kept
    assert peaks[0] < 0.75 * peaks[1]


def test_no_sum_over_classes_leaves_a_thread(tmp_path):
    """Of FPL's kernel as compiled for a GPU of capability 9.0; TRITON_INTERPRET is for this run."""
    triton = pytest.importorskip("triton")
    if not Path(triton.__file__).parent.joinpath("backends/nvidia/bin/nvdisasm").exists():
        pytest.skip("no tools beside this Triton")
    words = "benchmarks/kernel.py --classes 3 --capabilities 90 --out".split()
    subprocess.run([sys.executable, *words, tmp_path / "out.json"], cwd=steps.ROOT, check=True)
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["layout"] for row in rows] == ["channels last", "contiguous"] * 2
    for row in rows:
        assert row["exchanges"] == row["shared"] == row["spilt"] == 0
        assert 100 < row["instructions"] < 1500 and row["registers"] < 128


RESNET = "--backbone resnet18 --output-stride 16 --amp bf16"
AUTOCAST = {  # esl: u2pl's
    "supervised": f"{RESNET} --aux-weight 0.4",
    "cps_fpl": RESNET,
    "u2pl": f"{RESNET} --aux-weight 0.4 --cutmix-prob 1 --warmup-iters 0",
    "unimatch_v2": "--amp bf16",
}


@pytest.mark.parametrize("name", AUTOCAST)
def test_under_autocast_no_two_types_meet(name, monkeypatch):
    """bilinear interpolate is on CUDA's list of float32: its result is cast to its partner's."""
    script = importlib.import_module(name)
    if name == "unimatch_v2":  # small, but whole
        monkeypatch.setattr(script, "SIZES", tiny_modules(script)["SIZES"])
    seen(name, AUTOCAST[name], tiny=False)


@pytest.mark.parametrize("world", [1, 2])
def test_processes_with_a_gpu_each_have_sync_bn(world):
    args = resolved(supervised, ["--weights", "none"])
    with fake_cuda.fake_cuda():
        net = supervised.build(args, 4, supervised.DeepLabV3Plus, Group(0, world, GPU))
    norms = [type(m) for m in net.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert set(norms) == {nn.SyncBatchNorm if world == 2 else nn.BatchNorm2d}


def test_a_process_without_a_gpu_is_refused(monkeypatch):
    chosen, nothing = [], lambda *what, **how: None
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "fresh_store", nothing)
    monkeypatch.setattr(torch.distributed, "init_process_group", nothing)
    group = dict(MASTER_ADDR="localhost", MASTER_PORT="1", WORLD_SIZE="3")
    refusal = pytest.raises(Refusal, match="no GPU for process 2, this machine has 2")
    for local in (0, 1, 2):
        monkeypatch.setattr(os, "environ", group | dict(RANK=str(local), LOCAL_RANK=str(local)))
        with refusal if local == 2 else nullcontext():
            assert distributed.setup("auto") == Group(local, 3, torch.device("cuda", local))
    assert chosen == [0, 1]
    monkeypatch.setattr(distributed, "from_first", lambda value: False)
    monkeypatch.setattr(os, "environ", group | dict(RANK="1", LOCAL_RANK="1"))
    with pytest.raises(Refusal, match="process 0 has another kind of device"):
        distributed.setup("auto")


def test_mps_is_accepted_where_torch_has_it(monkeypatch):
    with pytest.raises(Refusal, match="--device mps: torch sees no MPS device here"):
        distributed.setup("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.setup("mps") == Group(0, 1, torch.device("mps"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Refusal, match="--device mps: one process alone"):
        distributed.setup("mps")


@pytest.mark.parametrize("name", IN_FLOAT64)
def test_what_mps_cannot_run_is_named(name):
    with pytest.raises(Refusal, match="--device mps: .* in float64, which MPS does not have"):
        seen(name, "", device=MPS)


def test_the_layout_of_mps_is_contiguous():
    """Its BN had wrong gradients otherwise."""
    found = {name: distributed.layout(torch.device(name)) for name in ("cpu", "cuda", "mps")}
    assert found.pop("mps") == torch.contiguous_format
    assert set(found.values()) == {torch.channels_last}


def test_the_sums_of_the_log_are_float32_on_mps():
    one = Mock(signalled=False, begin=9, meter=torch.zeros(0), bad_step=torch.tensor(run.NEVER))
    one.group = Group(0, 1, torch.device("mps"))
    one.due.return_value = False
    one._precise = lambda: run.Run._precise(one)
    run.Run.log_step(one, 1, {"loss": torch.tensor(0.5)}, 0.1, 0.0, {})
    assert one.meter.dtype == torch.float32 and one.meter.tolist() == [1, 0.5]


LONG = ("processes", "repeats", "camvid")  # start processes, as test_faults.py does
PARTS = [
    pytest.param(part, id=part.name, marks=[pytest.mark.slow] * (part.name in LONG))
    for part in gpu.PLAN
]


@pytest.mark.parametrize("part", PARTS)
def test_every_part_runs_on_a_cpu(part, tmp_path, monkeypatch):
    monkeypatch.setattr(steps, "MODES", FEW)
    camvid, rows = draw_tree(tmp_path / "camvid"), tmp_path / "rows"
    options = gpu.Options(str(tmp_path / "out.json"), device="cpu", tiny=True)
    options.part, options.rows, options.camvid = "part", str(rows), str(camvid)
    report = gpu.Report(options)
    getattr(importlib.import_module(part.module), part.function)(options, report)
    found = [json.loads(line) for line in rows.read_text().splitlines()]
    assert found and all(row.get("ok") is not False for row in found), found
    if part.name in ("steps", "waits"):
        assert {row["name"].split(".py")[0] for row in found} == set(FEW)
    wrong, right = ({"loss": torch.tensor(x)} for x in (1.001, 1.0))
    gpu_checks.judge(report, "loss", wrong, right, right, gpu_checks.FLOOR)
    assert '"ok": false' in rows.read_text().splitlines()[-1]


def test_a_machine_without_git_is_measured_too(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    found = gpu.header(gpu.Options("", device="cpu"))
    assert found["git"] is None and found["versions"]["torch"] == torch.__version__


def test_a_step_that_is_compared_moves_the_weights():
    watch = gpu_checks.one_step("supervised", "--crop-size 32", torch.device("cpu"), tiny=True)
    assert gpu_checks.step_values(watch)["change of the weights"].norm() > 0


def test_the_pages_are_what_page_py_writes():
    for path, text in page.pages().items():
        assert path.read_text() == text, f"python benchmarks/page.py: {path.name}"
