"""What would break on a GPU, found without one; and gpu.py, page.py and memory.py on a CPU.

Fake CUDA tensors know devices, types and bytes: a step of every script in every mode makes the host
wait nowhere but where it says so, and meets no two devices and no two float types.
"""

import importlib
import json
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from benchmarks import gpu, gpu_checks, page, released, steps
from common import Refusal, distributed, run
from common.distributed import Group
from tiny import draw_tree

if tuple(map(int, torch.__version__.split(".")[:2])) < (2, 9):
    pytest.skip("fake CUDA tensors need torch 2.9 or newer", allow_module_level=True)

from benchmarks import fake_cuda, memory  # noqa: E402
from benchmarks.fake_cuda import GPU, MPS  # noqa: E402

MODES = [(name, mode) for name, modes in steps.MODES.items() for mode in modes]
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


# ---- every script on fake CUDA ----


@pytest.mark.parametrize(("name", "mode"), MODES)
def test_a_step_waits_nowhere_and_stays_on_the_device(name, mode):
    check(name, seen(name, mode))


@pytest.mark.parametrize("name", ["supervised", "cps_fpl", "u2pl"])  # esl.py has u2pl.py's head
def test_under_autocast_no_two_types_meet(name):
    """bilinear interpolate is on CUDA's list of float32: its result is cast to its partner's."""
    more = ["--amp", "bf16"] + ["--aux-weight", "0.4"] * (name != "cps_fpl")
    check(name, seen(name, next(iter(steps.MODES[name])), *more, tiny=False))


def test_a_script_is_caught_that_reads_a_number_in_its_step(monkeypatch):
    script = importlib.import_module("cps_fpl")
    watch = script.watch
    monkeypatch.setattr(script, "watch", lambda *a: print(watch(*a)["K"].item()) or watch(*a))
    with pytest.raises(Exception, match="_local_scalar_dense"):
        seen("cps_fpl", "FPL")


def test_a_head_is_caught_that_decodes_in_float32(monkeypatch):
    """As it was before the cast: the low-level features in bfloat16, the ASPP map in float32."""
    script = importlib.import_module("supervised")

    def fuse(self, stages):
        low = self.low(stages[0])
        return torch.cat([low, script.upsample(low, low.shape[2:])], 1)

    monkeypatch.setattr(script.DeepLabV3Plus, "fuse", fuse)
    found = seen("supervised", "cross-entropy", "--amp", "bf16", tiny=False)
    assert {wrong.what for wrong in found.mixed} == {"cat of bfloat16 and float32"}


WAITS = {
    "item": lambda x: x.sum().item(),
    "a truth value": lambda x: bool(x.sum() > 0),
    "tolist": lambda x: x.tolist(),
    "boolean indexing": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "unique": lambda x: x.unique(),
    "a copy to the host": lambda x: x.cpu(),
    "a copy from the host": lambda x: torch.ones(3).to(GPU),
    "torch.tensor": lambda x: torch.tensor([1.0], device=GPU),
}


@pytest.mark.parametrize("what", WAITS)
def test_what_waits_is_noted(what):
    with fake_cuda.fake_cuda() as mode:
        x = torch.ones(2, 3).to(GPU, non_blocking=True)
        assert mode.waits == []
        try:
            WAITS[what](x)
        except Exception as error:  # torch's own: the number is not there
            assert "aten" in str(error)
        assert len(mode.waits) == 1


def test_two_devices_and_two_types():
    with fake_cuda.fake_cuda() as mode:
        x = torch.ones(2, 3).to(GPU, non_blocking=True)
        with pytest.raises(Exception, match="cuda:0, cpu|cuda:0 and cpu|two devices"):
            x + torch.ones(2, 3)
        assert mode.mixed == []
        x.bfloat16() * x
        assert [wrong.what for wrong in mode.mixed] == ["mul of bfloat16 and float32"]
        x.bfloat16() * x.sum()  # a scalar takes the type of the rest
        assert len(mode.mixed) == 1


def test_bytes_alive_are_counted_in_the_allocators_blocks():
    with fake_cuda.fake_cuda() as mode:
        x = torch.zeros(1000, device=GPU)  # 4,000 bytes: eight blocks
        assert mode.live == mode.peak == 4096
        y = x + 1
        view = y[:10]
        assert mode.live == 8192
        del x, y
        assert mode.live == 4096  # the view holds it
        del view
        assert mode.live == 0 and mode.peak == 8192


def test_autocast_is_what_cuda_would_do():
    with fake_cuda.fake_cuda(), torch.autocast("cuda", torch.bfloat16):
        x = torch.zeros(1, 2, 8, 8, device=GPU)
        weight = torch.nn.Parameter(torch.zeros(3, 2, 1, 1, device=GPU))
        h = F.conv2d(x, weight)
        assert h.dtype == torch.bfloat16
        assert F.interpolate(h, (4, 4), mode="bilinear").dtype == torch.float32
        assert F.softmax(h, 1).dtype == torch.float32
        assert F.relu(h).dtype == torch.bfloat16
        h.float().sum().backward()
        assert weight.grad.dtype == torch.float32


# ---- what a GPU wants of a script ----


@pytest.mark.parametrize("name", ["supervised", "cps_fpl"])
def test_weights_lie_channels_last(name):
    """Where convolutions are fastest on a GPU; a number never shows it."""
    script = importlib.import_module(name)
    args = steps.resolved(script, ["--device", "cpu"])
    head = script.CPSHead if name == "cps_fpl" else script.DeepLabV3Plus
    net = script.build(args, 7, head, Group(0, 1, torch.device("cpu")))
    weights = [p for p in net.parameters() if p.ndim == 4]
    assert len(weights) > 20
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in weights)


@pytest.mark.parametrize(("local", "refused"), [(0, False), (1, False), (2, True)])
def test_a_process_without_a_gpu_is_refused(local, refused, monkeypatch):
    """Two GPUs, and a third process."""
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(distributed, "fresh_store", lambda *of: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *what, **how: None)
    words = {"RANK": local, "WORLD_SIZE": 3, "LOCAL_RANK": local, "MASTER_PORT": 29500}
    for name, value in words.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    if refused:
        with pytest.raises(Refusal, match="no GPU for process 2, this machine has 2"):
            distributed.setup("auto")
    else:
        assert distributed.setup("auto") == Group(local, 3, torch.device("cuda", local))
        assert chosen == [local]


# ---- Apple's GPUs ----


def test_mps_is_accepted_where_torch_has_it(monkeypatch):
    assert not torch.backends.mps.is_available()
    with pytest.raises(Refusal, match="--device mps: torch sees no MPS device here"):
        distributed.setup("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert distributed.setup("mps") == Group(0, 1, torch.device("mps"))
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(Refusal, match="--device mps: one process alone"):
        distributed.setup("mps")


FLOAT64 = {"ael_fpl", "u2pl", "esl"}  # MPS has none


@pytest.mark.parametrize("name", steps.MODES)
def test_what_mps_cannot_run_is_named(name):
    """The others bring float64 onto a device for the sums of the log alone."""
    mode = next(iter(steps.MODES[name]))
    if name in FLOAT64:
        with pytest.raises(Refusal, match="--device mps: .* in float64, which MPS does not have"):
            seen(name, mode, device=MPS)
    else:
        assert {wide.where.split(":")[0] for wide in seen(name, mode).wide} == {"run.py"}


def test_esl_without_its_contrast_wants_no_float64():
    found = seen("esl", "dynamic soft labels").wide
    assert {wide.where.split(":")[0] for wide in found} == {"run.py"}


@pytest.mark.parametrize(("device", "kind"), [("mps", torch.float32), ("cpu", torch.float64)])
def test_the_sums_of_the_log_are_float32_on_mps(device, kind):
    never = {"log_every": 0, "eval_every": 0, "save_every": 0, "pictures_every": 0}
    one = object.__new__(run.Run)
    one.group = SimpleNamespace(device=SimpleNamespace(type=device))
    one.args, one.first, one.told = SimpleNamespace(total_iters=9, **never), False, False
    one.meter, one.clock, one.bad_step = torch.zeros(0), Counter(), torch.tensor(run.NEVER)
    one.step(1, {"loss": torch.tensor(0.5)}, 0.1, 0.0, {})
    assert one.meter.dtype == kind and one.meter.tolist() == [1, 0.5]


# ---- gpu.py on a CPU ----


@pytest.fixture
def report(tmp_path):
    """A part's Report, and its rows as a function."""
    options = gpu.Options(out=str(tmp_path / "out.json"), device="cpu", tiny=True, seconds=600)
    options.part, options.rows = "part", str(tmp_path / "rows")
    found = gpu.Report(options)
    found.rows = lambda: [json.loads(x) for x in (tmp_path / "rows").read_text().splitlines()]
    return found


@pytest.mark.parametrize("part", gpu.PLAN, ids=lambda part: part.name)
def test_every_part_runs_on_a_cpu(part, report, tmp_path):
    report.options.camvid = str(draw_tree(tmp_path / "camvid"))
    getattr(importlib.import_module(part.module), part.function)(report.options, report)
    rows = report.rows()
    assert rows and all(row.get("ok") is not False for row in rows), rows
    if part.name in ("steps", "waits"):
        assert {row["name"].split(".py")[0] for row in rows} == set(steps.MODES)
    if part.name == "shares":
        assert len(rows) == 1 + len(steps.MODES)
    if part.name == "losses":
        assert len(rows) == 2 * len(gpu_checks.CASES) + 1


TRUTH = {"loss": torch.ones(3).double(), "gradient 0": torch.ones(3).double()}
JUDGED = {  # (error of what was found, of the CPU's float32): is it right?
    (0.0, 0.0): True,
    (1e-3, 0.0): False,
    (9e-6, 0.0): True,  # below the floor
    (7e-3, 1e-3): True,  # float32 costs as much there
    (9e-3, 1e-3): False,
    (0.0, 0.1): None,  # too rough there: anything would pass
    (float("nan"), 0.0): False,
    (float("inf"), 1.0): False,  # but not this
}


@pytest.mark.parametrize("errors", JUDGED)
def test_a_wrong_number_of_the_device_is_found(errors, report):
    found, own = ({**TRUTH, "loss": TRUTH["loss"] + error} for error in errors)
    gpu_checks.judge(report, "loss", found, own, TRUTH, gpu_checks.FLOOR)
    (row,) = report.rows()
    if JUDGED[errors] is None:
        assert row["note"] == "furthest: gradient 0; too rough on the CPU to compare: loss"
    else:
        assert row["ok"] is JUDGED[errors] and row["note"].startswith("furthest: loss")


def test_the_plan_fits_into_eight_minutes():
    assert sum(part.seconds for part in gpu.PLAN) <= 480


def test_the_truth_is_float64():
    for case in gpu_checks.CASES.values():
        with gpu_checks.in_float64():
            kinds = torch.float64, torch.float32, 16
            found = gpu_checks.outcome(case, torch.device("cpu"), *kinds)
        assert found["loss"].dtype == torch.float64


BROKEN = """
import time

def failing(options, report):
    report.attempt("first", lambda: report.check("first", 2.0, 1.0))
    raise RuntimeError("the device is lost")

def hanging(options, report):
    time.sleep(600)

def fine(options, report):
    report.attempt("an error", lambda: 1 / 0)
    report.check("fine", 0.0, 1.0)
"""


def test_a_part_that_fails_or_hangs_costs_itself_alone(tmp_path, monkeypatch, capsys):
    """What it had found counts, the next part runs, and the exit code is 1."""
    (tmp_path / "broken.py").write_text(BROKEN)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    plan = [
        gpu.Part("fails", "broken", "failing", 90, "?"),
        gpu.Part("hangs", "broken", "hanging", 5, "?"),
        gpu.Part("goes on", "broken", "fine", 90, "?"),
    ]
    monkeypatch.setattr(gpu, "PLAN", plan)
    out = tmp_path / "deep" / "out.json"
    options = gpu.Options(out=str(out), device="cpu", minutes=9)
    assert gpu.main(options) == 1
    found = json.loads(out.read_text())
    rows = {(row["part"], row["name"]): row for row in found["rows"]}
    assert rows["fails", "first"]["ok"] is False
    assert "the device is lost" in rows["fails", "the part itself"]["note"]
    assert rows["hangs", "the part itself"]["note"] == "cut off after 5 s"
    assert rows["goes on", "an error"]["note"].startswith("ZeroDivisionError")
    assert rows["goes on", "fine"]["ok"] and rows["goes on", "the part itself"]["ok"]
    assert found["versions"]["torch"] == torch.__version__ and found["gpus"] == 0
    assert "FAILED" in capsys.readouterr().out


def test_no_time_left_and_wrong_words(tmp_path, capsys):
    out = tmp_path / "out.json"
    assert gpu.main(gpu.Options(out=str(out), device="cpu", minutes=0.05)) == 0
    assert {row["note"] for row in json.loads(out.read_text())["rows"]} == {"no time left"}
    assert gpu.main(gpu.Options(out=str(out), only=("lossse",))) == 2
    assert "the parts are losses, steps" in capsys.readouterr().err


def test_the_released_order_of_work_is_the_official_recipe():
    torch.manual_seed(0)
    z, t = 3 * torch.randn(2, 2, 9, 20, 20)
    loss, weight = released.released_loss(z, t, 0.9)
    rules = {"k_max": 3, "strict": False, "mean_over": "positives_and_next"}
    script = importlib.import_module("cps_fpl")
    own, own_weight = script.fuzzy_positive_loss(z, t, 0.9, **rules)
    assert torch.allclose(loss, own, atol=1e-5) and torch.allclose(weight, own_weight, atol=1e-5)


# ---- the pages ----


def test_the_pages_are_what_page_py_writes():
    for path, text in page.pages().items():
        assert path.read_text() == text, f"python benchmarks/page.py: {path.name}"


def test_a_run_becomes_a_section():
    rows = [
        {"part": "losses", "name": "FPL", "ok": True, "error": 1e-7, "limit": 1e-5, "note": ""},
        {"part": "steps", "name": "u2pl.py", "ok": False, "error": 0.3, "note": "furthest: loss"},
        {"part": "step speed", "name": "cps_fpl.py", "steps_per_s": 3.14159, "images_per_s": 12.6},
        {"part": "shares", "name": "esl.py", "step_ms": 70.0, "backward": 51.0, "losses": 9.5},
    ]
    versions = {"torch": "2.14.1", "cuda": "13.0", "cudnn": 91002}
    run = {"device": "A card", "gpus": 1, "memory_gb": 79.0, "tiny": False, "minutes": 8}
    run |= {"versions": versions, "git": "a" * 40, "date": "2026-01-01", "rows": rows}
    text = page.performance([run])
    assert "## A card" in text and "1 of 2 checks passed" in text
    assert "| steps | u2pl.py | 0.3 | furthest: loss |" in text
    assert "| cps_fpl.py | 3.14 | 12.6 | - |" in text and "| esl.py | 70 | 51 | 9.5 |" in text
    assert "Not measured on a GPU" not in text
    for other in ([], [run | {"tiny": True}], [run | {"gpus": 0}]):
        assert "## Not measured on a GPU" in page.performance(other)


def test_what_fits_follows_from_two_peaks(monkeypatch):
    """2 GB at no image, 3 GB an image, half a GB of gradients: 16 GB hold 3, and so on."""
    peaks = {2: 8e9, 4: 14e9}
    monkeypatch.setattr(memory, "peak_bytes", lambda *what: (peaks[what[-1]], 0.5e9))
    found = memory.row("cps_fpl", "cityscapes", "resnet50", "none")
    assert found["fits"] == {"16": 3, "24": 6, "40": 10, "80": 22}
    assert (found["fixed_gb"], found["image_gb"]) == (2.5, 3.0)
    assert (found["crop"], found["unlabelled_a_labelled"]) == (800, 1.0)


def test_every_row_of_what_fits_is_there():
    rows = json.loads(memory.FILE.read_text())["rows"]
    found = {(row["script"], row["recipe"], row["backbone"], row["amp"]) for row in rows}
    kinds = [(r, b, a) for r in memory.RECIPES for b in ("resnet50", "resnet101") for a in AMPS]
    assert found == {(script, *kind) for script in steps.MODES for kind in kinds}


AMPS = ("none", "bf16")
