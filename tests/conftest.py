"""One thread: results do not depend on the machine. Triton interprets: no GPU is needed."""

import contextlib
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")


def made_once(make):
    """Returns make with a memory: tyro makes its parser of sixty flags anew for each parse.

    That is a third of a run of the tiny network, and every test of a run parses twice.
    """
    known = {}

    def recall(kind, *given, **more):
        key = (kind, repr(given), repr(more))
        if key not in known:
            known[key] = make(kind, *given, **more)
        return known[key]

    return recall


with contextlib.suppress(ImportError, AttributeError):  # another tyro: slower, nothing else
    from tyro._parsers import ParserSpecification as Specification

    Specification.from_callable_or_type = staticmethod(
        made_once(Specification.from_callable_or_type)
    )
