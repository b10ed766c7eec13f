"""What Triton's compiler makes of FPL's kernel (common/fpl_triton.py) for GPUs that are not there.

    python benchmarks/kernel.py          # a minute or two; writes results/kernel.json
    python benchmarks/kernel.py --classes 19 --capabilities 90 --out FILE

Each row: classes, type, layout of the logits, compute capability of the GPU. Then, from the machine
code: instructions a pixel takes, exchanges between threads (SHFL), reads and writes of memory on
the chip, additions in float64, registers of a thread, and what of them did not fit (bytes). It says
what a GPU would do, not how long that takes: benchmarks/gpu.py does. Needs Triton with the tools
that its Linux wheels have (ptxas, cuobjdump, nvdisasm), and no GPU.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))
os.environ.pop("TRITON_INTERPRET", None)  # the tests', under which nothing is compiled

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from common import fpl_triton  # noqa: E402
from common.flags import cli  # noqa: E402
from common.run import refusals  # noqa: E402

FILE = ROOT / "results" / "kernel.json"
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
TYPES = {"float32": "fp32", "bfloat16": "bf16"}
COUNTED = {  # of the machine code: what, by its instructions
    "exchanges": r"\bSHFL",
    "shared": r"\b(?:LDS|STS)",
    "spilt": r"\b(?:LDL|STL)",
    "float64": r"\bDADD",
}


@dataclass
class Options:
    """Which rows to make."""

    classes: tuple[int, ...] = (11, 19, 21, 32)
    capabilities: tuple[int, ...] = (80, 90)  # 80: A100, 90: H100 and H200
    out: str = str(FILE)


def compiled(classes, kind, channels_last, capability):
    """Returns the kernel as `launch` would have it, compiled for a GPU."""
    integers = dict.fromkeys("pixels total image_step class_step pixel_step".split(), "i32")
    pointers = dict.fromkeys(("z_from", "t_from", "gradient_to"), f"*{kind}")
    constants = dict(C=classes, WIDTH=triton.next_power_of_2(classes), BLOCK=fpl_triton.BLOCK)
    constants |= dict(STRICT=True, MINUS=1, LEAST=1, MOST=classes, WEIGHT="concave", FOLLOWING=0)
    if not channels_last:
        constants["pixel_step"] = 1  # known to the compiler, as Triton tells it
    names = [parameter.name for parameter in fpl_triton.kernel.params]
    kinds = integers | pointers | {"loss_to": "*fp32", "pseudo_to": "*i64", "T": "fp32"}
    kinds |= dict.fromkeys(constants, "constexpr")
    aligned = {(i,): [["tt.divisibility", 16]] for i in range(5)}  # the pointers
    source = ASTSource(
        fpl_triton.kernel,
        signature={name: kinds[name] for name in names},
        constexprs=constants,
        attrs=aligned,
    )
    return triton.compile(
        source, target=GPUTarget("cuda", capability, 32), options={"num_warps": fpl_triton.WARPS}
    )


def tool(name, *words):
    """Returns what one of Triton's tools prints."""
    return subprocess.run([TOOLS / name, *words], check=True, capture_output=True, text=True).stdout


def row(classes, kind, channels_last, capability):
    """Returns one row: counts of the compiled kernel."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(compiled(classes, TYPES[kind], channels_last, capability).asm["cubin"])
        code = tool("nvdisasm", "-c", path)
        used = tool("cuobjdump", "--dump-resource-usage", path)
    instructions = len(re.findall(r"^\s+/\*[0-9a-f]{4,}\*/", code, re.MULTILINE))
    found = {"classes": classes, "kind": kind, "capability": capability}
    found["layout"] = "channels last" if channels_last else "contiguous"
    found["instructions"] = instructions * fpl_triton.WARPS * 32 // fpl_triton.BLOCK
    found |= {name: len(re.findall(pattern, code)) for name, pattern in COUNTED.items()}
    found["registers"] = int(re.search(r"REG:(\d+)", used)[1])
    return found


def main(options):
    """Compiles, prints and writes all rows."""
    rows = []
    for capability in options.capabilities:
        for classes in options.classes:
            for kind in TYPES:
                for channels_last in (True, False):
                    rows.append(row(classes, kind, channels_last, capability))
                    print(rows[-1], flush=True)
    found = {"torch": torch.__version__, "triton": triton.__version__, "rows": rows}
    Path(options.out).write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    with refusals("start again"):
        main(cli(Options))
