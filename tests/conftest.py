"""One thread: results do not depend on the machine. Triton interprets: no GPU is needed."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest  # noqa: E402

import tiny  # noqa: E402  # parsers of flags are made once from here on


@pytest.fixture
def empty_folder(tmp_path, monkeypatch):
    """The current folder is an empty one, where fetched lists would be kept; none is fetched."""
    monkeypatch.setattr("urllib.request.build_opener", None)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="session")
def tree(tmp_path_factory):
    """A drawn data set, which no test changes."""
    return tiny.draw_tree(tmp_path_factory.mktemp("drawn") / "tree")
