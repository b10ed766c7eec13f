"""One thread: results do not depend on the machine. Triton interprets: no GPU is needed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import tiny  # noqa: E402, F401  # parsers of flags are made once from here on
