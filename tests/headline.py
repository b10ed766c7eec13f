"""A script as its command line is, with the tiny network and published lists of a test's own.

python -m tests.headline SCRIPT FLAGS; HEADLINE: JSON {data set: {family: {split: entry}}}, in place
of what common/splits.json says of the data set; addresses may be files.
"""

import importlib
import json
import os
import sys

import sources
from common import data, run
from tests.helpers import tiny_modules

if __name__ == "__main__":
    name, *flags = sys.argv[1:]
    script = importlib.import_module(name)
    sys.argv = [script.__file__, *flags]
    for part, value in tiny_modules(script).items():
        setattr(script, part, value)
    data.SPLITS.update(json.loads(os.environ["HEADLINE"]))
    sources.SCHEMES = ("file",)
    run.launch(script.Args, script.preset, script.main)
