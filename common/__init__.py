"""Facts, plumbing, and fast twins of losses that each script defines (fused.py)."""

import contextlib
import importlib
import os
import sys


class Refusal(Exception):
    """Something the user gave cannot be used; the message is one line: the thing and the remedy."""

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    """Returns a text that any terminal takes: names of files may be no UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()


def note(text, stream=None):
    """Prints a note on a stream, stderr if left out, from process 0; nobody need read it."""
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError, ValueError):
            print(f"note: {printable(text)}", file=stream or sys.stderr, flush=True)


def needs(module):
    """Returns a module that not every command needs. Raises Refusal if it is not installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.split(".")[0]
        file = "requirements.txt"
        if package == "matplotlib":
            file = "requirements-dev.txt"
        remedy = f"pip install {package}, or -r {file}"
        raise Refusal(f"{package} cannot be imported ({error}): {remedy}") from None
