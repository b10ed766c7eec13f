"""Facts and plumbing: nothing here can change a loss, a gradient, a sample or a pseudo label."""


class Refusal(Exception):
    """Something the user gave cannot be used; the message is one line: the thing and the remedy."""
