"""Makes docs/performance.md from results/gpu/*.json and the JSON files of the other benchmarks, the
tables of docs/scaling.md, the speed in docs/predict.md and the memory in docs/unimatch_v2.md.

python benchmarks/page.py           # writes the pages
python benchmarks/page.py --check   # exit code 1 if one of them is not what it would write
"""

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = ROOT / "results" / "gpu"
PERFORMANCE, SCALING = ROOT / "docs" / "performance.md", ROOT / "docs" / "scaling.md"
UNIMATCH_V2 = ROOT / "docs" / "unimatch_v2.md"
PREDICT = ROOT / "docs" / "predict.md"
MEMORY = ROOT / "results" / "memory.json"
FPL_LOSS = ROOT / "results" / "fpl_loss.json"
KERNEL = ROOT / "results" / "kernel.json"
UNIMATCH_STEP = ROOT / "results" / "unimatch_step.json"
FPL_STEP = ROOT / "results" / "fpl_step.json"
INPUT = ROOT / "results" / "input.json"
GROWTH = ROOT / "results" / "growth.json"
BEFORE = ROOT / "results" / "before.json"
NETWORKS = ROOT / "results" / "networks.json"
CONTRASTIVE = ROOT / "results" / "contrastive.json"
DINOV2 = ROOT / "results" / "dinov2_memory.json"
ESTIMATES = ROOT / "results" / "scaling.json"
PER_PROCESS = ROOT / "results" / "per_process.json"
PREDICTED = ROOT / "results" / "predict.json"
END = "<!-- end of table -->\n"
HEAD = """# Performance

This page is made by `python benchmarks/page.py`, from JSON files that the benchmarks write.

* On a GPU: `python benchmarks/gpu.py --minutes 8 --out results/gpu/NAME.json`, a section for each
  machine. It needs a checkout and requirements.txt alone; for `--compile` and FPL's kernel
  (`--fused on`) also a C compiler and Python's headers, with which Triton builds its launchers.
* Without one: each section names its benchmark. All of these, one after another: `python
  benchmarks/all.py`, with `--quick` in some minutes.

What gpu.py does, by worth, so that a short time has the first parts:

1. every loss and a whole step of every script against the CPU in float64;
2. that in one process the host waits nowhere between two lines of the log, as far as torch reports
   it (with several GPUs torch's SyncBN waits in every layer);
3. `--deterministic`, kills, NCCL, checkpoints between devices, signals;
4. speed and memory, and `--compile`.

What fits on which card is in [scaling.md](scaling.md#what-fits).
"""
NONE = """
## Not measured on a GPU

There is no file in `results/gpu/` yet: nothing in this repository was run on a GPU. Two things
stand in for it:

* On CPUs the same code runs in the suite (tests/test_gpu.py).
* Every script's step runs there on torch's fake CUDA tensors (`benchmarks/fake_cuda.py`): no wait
  between two lines of the log but the one that ael_fpl.py and u2pl_ael.py name, no operation on two
  devices, no floats of two types that meet under autocast. What has no fake or no deterministic
  kernel is listed in [reliability.md](reliability.md#without-a-gpu-fake-cuda-tensors).
"""
BEFORE_HEAD = """
## Beside an earlier commit

`python benchmarks/before.py` runs both commits in turns and writes medians, with ratios [low..high]
to the earlier one.
"""
FPL_LOSS_HEAD = """
## FPL's loss on a CPU

`python benchmarks/fpl_loss.py`, forward and backward, torch {torch}, {threads} thread(s).

* Cells: the time's ratio to cross-entropy with the likeliest class by argmax, median and
  [low..high] of the rounds. ms: the median time. peak: memory above the inputs, in tensors of the
  logits' size.
* By the rules of the released code the twin is {least:.0f} to {most:.0f} times as fast as its order
  of work.
* Large tensors cost a CPU page faults, and the baseline most of all. Where they fit the caches or
  memory is kept, the ratios are larger: see the table
  [by the number of classes](#fpls-loss-by-the-number-of-classes).
"""
KERNEL_HEAD = """
## FPL's kernel, as compiled for a GPU

`python benchmarks/kernel.py`: what Triton {triton} makes of `common/fpl_triton.py`, of logits in
channels-last, without a GPU. Its time was **not measured on a GPU**.

* instructions: of a pixel, whose classes are all in one thread. exchanges: between threads, or
  through shared memory. float64: additions in the sums of probabilities.
* registers: of a thread, at most 255. spilt: reads and writes of what they do not hold.

"""
CONTRASTIVE_HEAD = """
## U2PL's contrastive loss

`python benchmarks/contrastive.py`: a call, from the teacher's outputs to the gradient, processor
time of {threads} thread(s), torch {torch}, load {load:.1f}; {images} images, features
{size}x{size}x{channels}, {classes} classes, full bank, M {anchors}, N {negatives}, {rounds} rounds.
{gradient_mib:.0f} MiB of either peak are the gradient of the features.

"""
UNIMATCH_STEP_HEAD = """
## UniMatch's step

`python benchmarks/unimatch_step.py`: the two recipes against the released order of work
([unimatch.md](unimatch.md#implementation-details), D10, D11, D17); torch {torch}.

Seconds of a step, on a CPU, {threads} thread(s), ResNet-50, 2 + 2 images of {crop}x{crop}, {rounds}
rounds, load {load:.1f}; ratio [low..high] to the released order:

"""
FPL_STEP_HEAD = """
## What FPL adds to a whole step

`python benchmarks/fpl_step.py`, seconds of a step on {device}, torch {torch}, {backbone} at stride
{stride}, crop {crop}, {batch} labelled and as many unlabelled images, medians of {rounds} rounds of
{steps} steps, load {load:.1f}; ratio [low..high] to cross-entropy. FPL supplement Table 7 has, for
an epoch on 8 V100: AEL 730 s, FPL+AEL 820 s (+12 %) on Cityscapes; 835 s and 985 s (+18 %) on VOC.

"""
INPUT_HEAD = """
## Input

`python benchmarks/input.py`: processor time of a training sample, torch {torch}, {rounds} rounds,
load {load:.1f}. The files are in the system's memory. All ways give the same samples bit for bit,
as asserted, but warp, which is within two grey levels.

* files: from the image's files; of it reading: the share that decodes them.
* Ratios [low..high] to files: cache, from the cache of decoded images
  ([data.md](data.md#decoded-once---cache)); first time, with the check of the pixels' sha1; warp,
  files with Pillow's affine warp, as once, where torch now scales what the crop shows.

"""
BF16 = """
On a CPU without such instructions `--amp bf16` takes longer than float32, twice to nine times as
long ([findings/bf16_autocast_cpu.sh](../findings/bf16_autocast_cpu.sh)); on Linux a run says so.
"""


def table(titles, rows):
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(titles) + " |", "|-" * len(titles) + "|"]
    lines += ["| " + " | ".join(cell(x) for x in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def cell(value):
    """Returns a value as the pages show it."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1e4 else f"{value:.0f}"
    return str(value).replace("|", "\\|")


def of(rows, part):
    """Returns the rows of one part, without the one that says how it ended."""
    return [row for row in rows if row["part"] == part and row["name"] != "the part itself"]


def measured(rows, part, columns):
    """Returns the table of a part's measurements, or nothing if it has none."""
    found = [row for row in of(rows, part) if any(key in row for key in columns)]
    if not found:
        return ""
    titles = ["", *columns]
    return table(titles, [[row["name"], *(row.get(key) for key in columns)] for row in found])


def shares(rows):
    """Returns the table of the parts of a step, in per cent."""
    found = of(rows, "shares")
    names = sorted(
        {key for row in found if "step_ms" in row for key in row}
        - {"part", "name", "note", "step_ms", "ok"}
    )
    return measured(rows, "shares", ["step_ms", *names]) if names else ""


def section(found):
    """Returns the section of one run of gpu.py."""
    versions = found["versions"]
    rows = found["rows"]
    checks = [row for row in rows if row.get("ok") is not None]
    failed = [row for row in checks if not row["ok"]]
    unsaid = [row for row in rows if "ok" in row and row["ok"] is None]
    state = found["git"] or "?"
    commit = state[:12] + "-dirty" * state.endswith("-dirty")
    text = f"\n## {found['device']}\n\n"
    text += f"{found['date']}, commit {commit}, torch {versions['torch']}, "
    text += f"CUDA {versions['cuda']}, cuDNN {versions['cudnn']}, {found['gpus']} GPU(s) of "
    text += f"{found['memory_gb']} GB, {found['minutes']:g} minutes.\n"
    text += (
        f"{len(checks) - len(failed)} of {len(checks)} checks passed, {len(unsaid)} say nothing: "
    )
    text += "no time left, no memory, or nothing to compare.\n"
    for title, some in (("Failed", failed), ("Not said", unsaid)):
        if some:
            text += f"\n{title}:\n\n" + judged(some)
    compiled = ["error", "graphs", "graph_breaks", "first_step_s"]
    speed = ["ms", "low", "high", "ratio", "over_limit", "peak_tensors", "gb_per_s"]
    steps = ["steps_per_s", "images_per_s", "peak_gb"]
    parts = {
        "FPL's loss, forward and backward": measured(rows, "loss speed", speed),
        "Steps": measured(rows, "step speed", steps),
        "Shares of a step, per cent": shares(rows),
        "Evaluation, an image or a window": measured(rows, "evaluation", ["ms"]),
        "The loader": measured(rows, "shares", ["images_per_s"]),
        "`--compile`": measured(rows, "compile", compiled),
        "camvid-small": measured(rows, "camvid", ["last", "best", "minutes"]),
    }
    for title, body in parts.items():
        text += f"\n### {title}\n\n{body}" if body else ""
    return text + "\n### All checks\n\n" + judged([row for row in checks if row["ok"]])


def judged(rows):
    """Returns a table of rows of checks."""
    titles = ["part", "check", "error", "limit", "note"]
    keys = ["part", "name", "error", "limit", "note"]
    return table(titles, [[row.get(key) for key in keys] for row in rows])


def ratio(row):
    """Returns a ratio with its spread."""
    return f"{row['ratio']:.2f} [{row['low']:.2f}..{row['high']:.2f}]"


def performance(runs):
    """Returns docs/performance.md. runs: what gpu.py wrote, as dicts."""
    real = [run for run in runs if not run["tiny"] and run["gpus"]]
    return HEAD + ("".join(section(run) for run in real) or NONE)


def before(found):
    """Returns the section of the comparison with an earlier commit. found: what before.py wrote."""
    text = BEFORE_HEAD
    if part := found.get("command"):
        text += about(part, "The README's first command")
        text += (
            f"{part['threads']} threads, wall time.\nThe recipe has changed as well: 24 steps for "
        )
        text += "40, heads of 64 channels for 256, BN's statistics made\nanew before a score.\n\n"
        rows = [[r["commit"], f"{r['s']:.1f}", ratio(r), f"{r['miou']:.2f}"] for r in part["rows"]]
        text += table(["commit", "s", "ratio", "mIoU of the last weights on test, %"], rows)
    if part := found.get("cps"):
        text += about(part, "Two steps of CPS with CutMix")
        text += (
            f"ResNet-18, crop\n{part['crop']}, 2 images of each kind. Time without imports; memory "
            "above libraries, weights and\nmomentum. The official recipe has `--balance True`: its "
            "factor takes both losses, so a pass more.\n\n"
        )
        titles = {"cpu_s": "processor time, s", "peak_mib": "peak memory, MiB"}
        rows = [
            [r["recipe"], titles[r["what"]], r["commit"], r["s"], ratio(r)] for r in part["rows"]
        ]
        text += table(["recipe", "", "commit", "", "ratio"], rows)
    if part := found.get("input"):
        text += about(part, "Samples")
        text += (
            "One image, processor time of one\nthread; data_ms: wall time in the log of a step of "
            "two images of the first kind with masks, without workers.\n\n"
        )
        rows = []
        for r in part["rows"]:
            masks = {True: "with its mask", False: "alone"}.get(r.get("masks"), "a step")
            rows.append([f"{r['what']}, {masks}", r["commit"], 1e3 * r["s"], ratio(r)])
        text += table(["", "commit", "ms", "ratio"], rows)
    if part := found.get("calls"):
        text += about(part, "Single calls")
        text += "Equal in what they\nreturn, as asserted; processor time of one thread.\n\n"
        titles = {
            "cross_loss": "FPL of both networks, recipe official, with its gradient",
            "confusion": "confusion matrix, 1024x2048",
            "slide": "argmax of summed windows of 800, 1024x2048",
        }
        rows = []
        for r in part["rows"]:
            rows.append([titles[r["what"]], r["classes"], r["commit"], r["s"], ratio(r)])
        text += table(["", "C", "commit", "s", "ratio"], rows)
    return text


def fpl_loss(found):
    """Returns the section of FPL's loss on a CPU. found: what fpl_loss.py wrote."""
    rows = found["rows"]
    ms = {(row["classes"], row["teacher"], row["call"]): row["ms"] for row in rows}
    faster = [
        ms[(*case, "released order of work")] / ms[(*case, "twin, official")]
        for case in {key[:2] for key in ms}
    ]
    text = FPL_LOSS_HEAD.format(**found, least=min(faster), most=max(faster))
    for size in dict.fromkeys((row["classes"], row["side"]) for row in rows):
        here = [row for row in rows if (row["classes"], row["side"]) == size]
        teachers = list(dict.fromkeys(row["teacher"] for row in here))
        lines = {}
        for row in here:
            line = lines.setdefault(row["call"], [row["call"]])
            line.append(ratio(row))
        for row in here[: len(lines)]:
            lines[row["call"]] += [f"{row['ms']:.0f}", f"{row['peak_tensors']:.1f}"]
        when = f"{here[0]['rounds']} rounds, load {here[0]['load']:.1f}"
        titles = [f"{size[0]} classes, 2x{size[1]}x{size[1]}; {when}", *teachers]
        text += "\n" + table([*titles, f"ms, {teachers[0]}", "peak"], lines.values())
    return text


def kernel(found):
    """Returns the section of FPL's kernel. found: what kernel.py wrote."""
    titles = "classes kind capability instructions exchanges float64 registers spilt".split()
    rows = []
    for row in found["rows"]:
        if row["layout"] == "channels last":
            both = row["exchanges"] + row["shared"]
            rows.append([str(row[name]) for name in titles])
            rows[-1][titles.index("exchanges")] = str(both)
    return KERNEL_HEAD.format(**found) + table(titles, rows)


def contrastive(found):
    """Returns the section of U2PL's contrastive loss. found: what contrastive.py wrote."""
    words = {"definition": "`--fused off`", "fused": "`--fused on`"}
    rows = []
    for row in found["rows"]:
        rows.append([words[row["name"]], f"{row['ms']:.0f}", ratio(row), f"{row['peak_mib']:.0f}"])
    text = CONTRASTIVE_HEAD.format(**found["args"], **found)
    return text + table(["", "ms", "ratio", "peak above inputs and bank, MiB"], rows)


def unimatch_step(found):
    """Returns the section of UniMatch's step. found: what unimatch_step.py wrote."""
    rows = []
    for order, row in found["time"].items():
        rows.append([order, row["s"], ratio(row)])
    text = UNIMATCH_STEP_HEAD.format(**found) + table(["order", "s a step", "ratio"], rows)
    orders = list(found["time"])
    rows = []
    for row in found["memory"]:
        shares = [f"{row[name]:.2f} ({row[name] / row[orders[0]]:.2f})" for name in orders]
        rows.append([row["dataset"], row["backbone"], row["images"], *shares])
    text += "\nPeak memory in GB, computed on fake CUDA tensors; in brackets the ratio:\n\n"
    text += table(["recipe", "backbone", "images of each kind", *orders], rows)
    rows = [[side, row["tensor"], row["blur"], row["PIL"]] for side, row in found["views"].items()]
    text += "\nA strong view on a CPU, ms, means over what is drawn:\n\n"
    return text + table(["side", "tensors, as here", "of it blur", "Pillow, as released"], rows)


def fpl_step(found):
    """Returns the section of FPL supplement Table 7. found: what fpl_step.py wrote."""
    text = FPL_STEP_HEAD.format(**found)
    rows = []
    for row in found["rows"]:
        cells = [f"{row['script']}.py, {row['classes']} classes", f"{row['modes']['ce']['s']:.2f}"]
        for mode in ("fpl", "definition"):
            cells.append(f"{row['modes'][mode]['s']:.2f}, {ratio(row['modes'][mode])}")
        rows.append([*cells, "not measured on a GPU" if found["device"] == "cpu" else "this row"])
    return text + table(["", "cross-entropy", "FPL", "FPL, `--fused off`", "GPU"], rows)


def samples(found):
    """Returns the section of the input. found: what input.py wrote."""
    rows = []
    for row in found["rows"]:
        ways = row["ways"]
        mask = "with its mask" if row["mask"] else "alone"
        cells = [f"{row['kind']} of {row['file_mb']:.2g} MB, crop {row['crop']}, {mask}"]
        cells += [ways["files"]["ms"], ways["files, reading alone"]["ratio"]]
        others = ("cache", "cache, first time", "files, Pillow's warp")
        rows.append(cells + [ratio(ways[name]) for name in others])
    titles = ["image", "files, ms", "of it reading", "cache", "cache, first time", "warp"]
    text = INPUT_HEAD.format(**found) + table(titles, rows)
    text += "\nWhich image a sample shows, microseconds: the order of a lap is drawn once, not for "
    text += "every sample.\n\n"
    rows = [[f"{row['images']:,}", row["us"], row["drawn_us"]] for row in found["orders"]]
    return text + table(["images", "drawn once", "drawn for every sample"], rows)


def about(part, name):
    """Returns the heading of a part of a JSON file that has parts, and its circumstances."""
    text = f"\n### {name}\n\n"
    text += f"torch {part['torch']}, {part['rounds']} rounds, load {part['load']:.1f}. "
    return text


def growth(found):
    """Returns the section of growth. found: what growth.py wrote."""
    text = (
        "\n## Growth, and two parts of a step\n\n`python benchmarks/growth.py`, processor time of "
    )
    text += "one thread, ResNet-18 at stride 16 where there is a network.\n"
    if part := found.get("classes"):
        text += about(part, "FPL's loss by the number of classes")
        text += "Nanoseconds of a pixel\nand class, forward and backward, in channels-last; in "
        text += "brackets the ratio to cross-entropy with the likeliest\nclass by argmax.\n\n"
        lines = {}
        for row in part["rows"]:
            cell = f"{row['ns']:.3g} ({row['ratio']:.2f})"
            lines.setdefault((row["classes"], row["side"]), []).append(cell)
        rows = [[C, f"2x{side}x{side}", *cells] for (C, side), cells in lines.items()]
        names = list(dict.fromkeys(row["call"] for row in part["rows"]))
        teachers = list(dict.fromkeys(row["teacher"] for row in part["rows"]))
        text += table(["C", "pixels", *(f"{n}, {t}" for t in teachers for n in names)], rows)
    if part := found.get("crop"):
        text += about(part, "A step of cps_fpl.py by its crop")
        text += "2 + 2 + 2 images.\n\n"
        rows = [[row["crop"], row["s"], row["us_a_pixel"]] for row in part["rows"]]
        text += table(["crop", "s a step", "microseconds a pixel of the crop"], rows)
    if part := found.get("batch"):
        text += about(part, "Memory of cps_fpl.py by its batch")
        text += "Crop 128, resident at the peak, MiB.\n\n"
        rows = [
            [r["images"], f"{r['libraries_mib']:.0f}", f"{r['peak_mib']:.0f}"] for r in part["rows"]
        ]
        text += table(["images of each kind", "libraries", "peak"], rows)
    if part := found.get("processes"):
        text += about(part, "A step of cps_fpl.py shared by two processes")
        text += "Crop 128, 4 images of each\nkind in all, one thread a process, wall time: on a "
        text += "shared machine two cores are seldom both free.\n\n"
        rows = [[r["processes"], r["wall_s"], r["peak_mib"], r["load"]] for r in part["rows"]]
        text += table(["processes", "s a step", "MiB at the peak of one", "load"], rows)
    if part := found.get("teacher"):
        text += about(part, "mean_teacher.py's pass that only moves BN")
        text += "A step, crop 128, 4 + 4\nimages. `--teacher-bn own`, the released code's way and "
        text += "the default, has a pass of the teacher that\n`average` has not.\n\n"
        rows = [[f"`--teacher-bn {r['teacher_bn']}`", r["s"], ratio(r)] for r in part["rows"]]
        text += table(["", "s a step", "ratio"], rows)
    if part := found.get("labels"):
        text += about(part, "ESL's `--label topk`")
        text += (
            "The labels of k = 5, by topk as in\nesl.py and by a full sort: equal, as asserted.\n\n"
        )
        rows = [[r["classes"], r["call"], 1e3 * r["s"], ratio(r)] for r in part["rows"]]
        text += table(["C", "", "ms", "ratio"], rows)
    return text


def networks(found):
    """Returns the section of large networks. found: what networks.py wrote."""
    text = "\n## Large networks on a CPU\n\n`python benchmarks/networks.py`, processor time of one "
    text += "thread, stride 16, 19 classes.\n"
    if part := found.get("step"):
        names = part["instructions"]
        has = "unknown" if names is None else ", ".join(names) or "none"
        text += about(part, "A step of cps_fpl.py")
        text += (
            f"{part['rows'][0]['backbone']}, crop\n{part['rows'][0]['crop']}, 2 + 2 + 2 images, "
        )
        text += f"{part['steps']} step(s) a round. Instructions of this CPU for bf16: {has}.\n\n"
        rows = [[row["mode"], row["s"], ratio(row)] for row in part["rows"]]
        text += table(["", "s a step", "ratio"], rows)
        text += BF16
    if part := found.get("sizes"):
        text += about(part, "A step of supervised.py by network and crop")
        text += "2 images, a single step each.\nSurplus: what FPL's loss of 2 such images takes "
        text += "more than cross-entropy, as a share of that step.\n\n"
        rows = []
        for row in part["rows"]:
            own = row["none"]
            surplus = round(100 * (row["fpl_s"] - row["ce_s"]) / own["s"], 1) + 0.0  # no -0.0
            cells = [row["backbone"], row["crop"], own["s"], 2 / own["s"], f"{own['peak_mib']:.0f}"]
            rows.append([*cells, row["bf16"] and row["bf16"]["s"], f"{surplus:.1f} %"])
        titles = ["backbone", "crop", "s a step", "images a s", "peak MiB", "bf16, s a step"]
        text += table([*titles, "surplus"], rows)
    return text


def cards(memory):
    """Returns the table of docs/scaling.md. memory: what memory.py wrote."""
    names = sorted(memory["rows"][0]["fits"], key=int)
    titles = ["script", "recipe", "backbone", "crop", "amp", "GB", "+ GB an image"]
    titles += [f"{name} GB" for name in names]
    rows = []
    for row in memory["rows"]:
        cells = [f"{row['script']}.py", row["recipe"], row["backbone"], row["crop"], row["amp"]]
        cells += [f"{row['fixed_gb']:.1f}", f"{row['image_gb']:.2f}"]
        rows.append(cells + [row["fits"][name] or "-" for name in names])
    return table(titles, rows)


def estimates(found):
    """Returns the table of estimates of docs/scaling.md. found: what scaling.py wrote."""
    rows = []
    for row in found["rows"]:
        cells = [f"{row['script']}.py", row["crop"], row["tflop"], f"{row['gradient_mb']:.0f}"]
        cells.append(row["exchanges"])
        for gpus in row["gpus"].values():
            cells.append(f"{gpus['s']:.2f} s, {100 * gpus['computing']:.0f} %")
        rows.append(cells)
    titles = ["script", "crop", "TFLOP", "MB of gradients", "exchanges of BN"]
    return table([*titles, *(f"{n} GPUs" for n in found["rows"][0]["gpus"])], rows)


def per_process(found):
    """Returns the table of gradients of docs/scaling.md. found: what per_process.py wrote."""
    rows = []
    for name, far in found["rows"].items():
        rows.append([name, *(f"{x:.1f} %" if x is not None else "refused" for x in far.values())])
    text = table(["loss", *(f"{n} processes" for n in found["processes"])], rows)
    text += "\nL_c draws its anchors and negatives: two draws of one process are "
    return text + f"{found['draws']:.1f} % apart.\n"


def predicted(found):
    """Returns the table of docs/predict.md. found: what benchmarks/predict.py wrote."""
    rows = []
    for row in found["rows"]:
        network = f"ResNet-18, {found['threads']} threads"
        if row["elsewhere"]:
            network = f"another device's, {row['elsewhere']:g} ms an image"
        cells = [f"{row[kind]['rate']:.2f}" for kind in ("plain", "overlapped")]
        peaks = [f"{row[kind]['peak_gib']:.2f}" for kind in ("plain", "overlapped")]
        rows.append([network, *cells, f"{row['ratio']:.2f}", *peaks])
    size = f"{found['width']}x{found['height']}"
    text = f"{found['images']} images of {size}, medians of {found['repeats']}, "
    text += f"torch {found['torch']}, load {found['load']:.1f}.\n\n"
    titles = ["network", "plain, images a s", "overlapped", "ratio"]
    return text + table([*titles, "plain, peak GiB", "overlapped"], rows)


def replaced(text, body, script):
    """Returns a page with the table between the marks of a script replaced."""
    begin = f"<!-- table: benchmarks/{script} -->\n"
    pattern = re.escape(begin) + ".*?" + re.escape(END)
    text, count = re.subn(pattern, lambda _: begin + body + END, text, flags=re.DOTALL)
    assert count == 1, f"the page has {count} tables of {script}"
    return text


def dinov2(found):
    """Returns the table of memory of unimatch_v2.py's network. found: what dinov2.py wrote."""
    cells = {}
    for row in found["rows"]:
        line = cells.setdefault((row["backbone"], row["crop"]), [])
        line.append(f"{row['fixed_gb']:.2f} + {row['image_gb']:.2f}")
    modes = ["as it is", "`--checkpoint-activations`", "`--freeze` of all blocks"]
    return table(["backbone", "crop", *modes], [[*key, *line] for key, line in cells.items()])


def made(path, section_of):
    """Returns what a function makes of a JSON file; ends with its name where it has other keys."""
    try:
        return section_of(json.loads(path.read_text()))
    except KeyError as error:
        sys.exit(f"{path.relative_to(ROOT)} has no {error}: make it again with its benchmark")


def pages():
    """Returns {path: text} of the pages as they should be."""
    runs = [json.loads(path.read_text()) for path in sorted(RUNS.glob("*.json"))]
    text = performance(runs)
    for path, section_of in (
        (BEFORE, before),
        (FPL_LOSS, fpl_loss),
        (KERNEL, kernel),
        (CONTRASTIVE, contrastive),
        (UNIMATCH_STEP, unimatch_step),
        (FPL_STEP, fpl_step),
        (INPUT, samples),
        (GROWTH, growth),
        (NETWORKS, networks),
    ):
        if path.exists():
            text += made(path, section_of)
    scaling = SCALING.read_text()
    if MEMORY.exists():
        scaling = replaced(scaling, made(MEMORY, cards), "page.py")
    if ESTIMATES.exists():
        scaling = replaced(scaling, made(ESTIMATES, estimates), "scaling.py")
    if PER_PROCESS.exists():
        scaling = replaced(scaling, made(PER_PROCESS, per_process), "per_process.py")
    predict = PREDICT.read_text()
    if PREDICTED.exists():
        predict = replaced(predict, made(PREDICTED, predicted), "predict.py")
    own = UNIMATCH_V2.read_text()
    if DINOV2.exists():
        own = replaced(own, made(DINOV2, dinov2), "page.py")
    return {PERFORMANCE: text, SCALING: scaling, UNIMATCH_V2: own, PREDICT: predict}


if __name__ == "__main__":
    if sys.argv[1:] not in ([], ["--check"]):
        sys.exit(f"page.py {' '.join(sys.argv[1:])}: --check or nothing")
    wrong = [
        path for path, text in pages().items() if not path.exists() or path.read_text() != text
    ]
    for path in wrong:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not what benchmarks/page.py writes")
        else:
            path.write_text(pages()[path])
    sys.exit(1 if wrong and "--check" in sys.argv else 0)
