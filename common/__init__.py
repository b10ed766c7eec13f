"""Facts, plumbing, and fast twins of losses that each script defines (fused.py)."""


class Refusal(Exception):
    """Something the user gave cannot be used; the message is one line: the thing and the remedy."""

    def __init__(self, message):
        super().__init__(printable(message))


def printable(text):
    """Returns a text that any terminal takes: names of files may be no UTF-8."""
    return str(text).encode("utf-8", "backslashreplace").decode()
