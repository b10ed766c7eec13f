"""Every benchmark of time and memory that needs no GPU, one after another.

    python benchmarks/all.py           # hours of one core; writes results/ and the pages
    python benchmarks/all.py --quick   # small, five minutes of two cores; nothing is written

--quick says that they run and that what they compare is equal; its ratios are of sizes too small to
mean much. before.py, memory.py and precise_bn.py have no short form and are left out, and kernel.py
as it wants Triton. A benchmark that fails is named at the end, and the exit code is 1.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RUNS = [  # what is run in full; and with --quick, None: not at all
    ("before.py", None),
    ("fpl_loss.py", "--quick --rounds 1"),
    ("kernel.py", None),
    ("input.py", "--quick"),
    ("growth.py", "--quick"),
    ("networks.py", "--quick"),
    ("fpl_step.py", "--quick"),
    ("unimatch_step.py", "--quick --rounds 1"),
    ("contrastive.py", "--images 4 --size 33 --channels 64 --first 3000 --rest 2000"),
    ("per_process.py", "--out /dev/null"),
    ("peaks.py", "--classes 19 --width 400 --height 300 --out /dev/null"),
    ("predict.py", "--images 2 --repeats 1 --elsewhere 10 --out /dev/null"),
    ("scaling.py", "--quick"),
    ("memory.py", None),
    ("dinov2.py", "--quick"),
    ("precise_bn.py", None),
    ("page.py", "--check"),
]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    failed = []
    begin = time.time()
    for script, quick in RUNS:
        if options.quick and quick is None:
            continue
        flags = quick.split() if options.quick else []
        print(f"\n==== {script} {' '.join(flags)}", flush=True)
        start = time.time()
        done = subprocess.run([sys.executable, ROOT / "benchmarks" / script, *flags], cwd=ROOT)
        print(
            f"==== {script}: {time.time() - start:.0f} s, exit code {done.returncode}", flush=True
        )
        if done.returncode:
            failed.append(script)
    print(f"\n{time.time() - begin:.0f} s, load {os.getloadavg()[0]:.1f}")
    print(f"failed: {', '.join(failed)}" if failed else "all of them ran")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
