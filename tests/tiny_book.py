"Tiny books in temporary folders, for the tests of the command."
import json

import nbformat, pytest
from typer.testing import CliRunner

from recbook import cli as L

CLAIM = """from IPython.display import display
display({"application/vnd.recbook.claim+json": {"id": "demo.1", "paper": "demo", "statement": "Seven is larger.",
    "metric": "size", "dataset": "world", "systems": ["seven", "six"], "seeds": [seed], "ours": [n], "theirs": [6.0],
    "effect": n-6.0, "ci": [0.5, 1.5],
    "p": float("nan"), "verdict": "supported", "reported": None}, "text/plain": "demo.1 supported"}, raw=True)"""
DEMO = ["# Demo: [a page]\n\n> It shows.", "seed = 0\nn = 7.0\nflag = False", "# ## Measure {#sec-measure}",
    "import os, sys\nprint(os.getcwd(), sys.prefix, seed, flag)", CLAIM]
PLAIN = ["# Plain\n\n> Nothing.", "seed = 0", "print('hello')"]
BROKEN = ["# Broken\n\n> It fails.", "seed = 0", "# ## Here", "z = 3\nz / seed", "print('never')"]

def page(cells):
    new = lambda c: (nbformat.v4.new_markdown_cell if c.startswith("# ") else nbformat.v4.new_code_cell)(c)
    nb = nbformat.v4.new_notebook(cells=[new(c) for c in cells])
    nb.metadata["kernelspec"] = dict(name="python3", display_name="Python 3 (ipykernel)", language="python")
    next(c for c in nb.cells if c.cell_type == "code").metadata["tags"] = ["parameters"]
    return nb

def write_page(root, name, cells, part="basics"):
    path = root/"nbs"/part/f"{name}.ipynb"
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(page(cells), path)
    return path

def cli(*args, code=0):
    res = CliRunner().invoke(L.app, [str(a) for a in args])
    assert res.exit_code == code, res.output + repr(res.exception)
    return res.output

def no_nan(text): return json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} in JSON"))
