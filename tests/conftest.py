"Where the real data lie, one thread per process, and a quiet console."
import os
import pytest
from tiny_book import DEMO, write_page

os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1") # two processes share the cores


def pytest_collection_modifyitems(items):
    "Tests that want the real data can be chosen with `-m mirror`."
    for item in items:
        if "mirror" in getattr(item, "fixturenames", ()):
            item.add_marker("mirror")


@pytest.fixture(scope="session")
def mirror():
    "The mirror folder with the real data sets; tests that need it are skipped without."
    folder = os.environ.get("RECBOOK_MIRROR")
    if not folder or not os.path.isdir(folder):
        pytest.skip("RECBOOK_MIRROR is not set: no real data")
    return folder


@pytest.fixture
def book(tmp_path, monkeypatch):
    "A checkout with the one chapter `demo`, and the shell standing in it."
    (tmp_path/"recbook").mkdir()
    (tmp_path/"recbook"/"dummy.py").write_text("x = 1\n")
    (tmp_path/"settings.ini").write_text("[smoke]\n[cpu]\nn = 8.0\nn_seeds = 5\n[cpu.demo]\nflag = true  # only here\n")
    write_page(tmp_path, "01_demo", DEMO)
    monkeypatch.chdir(tmp_path)
    return tmp_path
