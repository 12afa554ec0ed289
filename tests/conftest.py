"Where the real data lie, one thread per process, and a quiet console."
import os
import pytest

os.environ.setdefault("TQDM_DISABLE", "1")


def pytest_collection_modifyitems(items):
    "Tests that want the real data can be chosen with `-m mirror`."
    for item in items:
        if "mirror" in getattr(item, "fixturenames", ()): item.add_marker("mirror")


@pytest.fixture(scope="session")
def mirror():
    "The mirror folder with the real data sets; tests that need it are skipped without."
    folder = os.environ.get("RECBOOK_MIRROR")
    if not folder or not os.path.isdir(folder): pytest.skip("RECBOOK_MIRROR is not set: no real data")
    return folder
