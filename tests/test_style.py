"""The house style that can be counted: sizes of chapters, cells and functions; experiments that go through `trials`;
imports in reading order."""
import ast, io, json, re, tokenize
from pathlib import Path
import numpy as np, pytest, yaml
from recbook.data import root

BOOK = yaml.safe_load((root()/"_quarto.yml").read_text(encoding="utf-8"))["book"]["chapters"]
ORDER = [c for part in BOOK for c in (part["chapters"] if isinstance(part, dict) else [part])]
CHAPTERS = [c for c in ORDER if c.split("/")[0] not in ("foundations", "workshop") and "/" in c]
NO_WORDS = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def area(rel): return Path(rel).stem.split("_", 1)[1]


def cells(rel): return json.loads((root()/"nbs"/rel).read_text(encoding="utf-8"))["cells"]


def code(rel):
    "Code cells that are Python, without the install cell and empty ones."
    found = ["".join(c["source"]) for c in cells(rel) if c["cell_type"] == "code"]
    return [s for s in found if s.strip() and "default_exp" not in s and "google.colab" not in s]


def tokens(source):
    "Number of tokens, comments and line breaks not counted."
    return sum(t.type not in NO_WORDS for t in tokenize.generate_tokens(io.StringIO(source + "\n").readline))


def functions(rel):
    "(name, tokens, number of parameters) of every function and method of a notebook."
    out = []
    for s in code(rel):
        for n in ast.walk(ast.parse(s)):
            if not isinstance(n, ast.FunctionDef):
                continue
            a = n.args
            known = [*a.posonlyargs, *a.args, *a.kwonlyargs]
            own = len(known) - (bool(known) and known[0].arg in ("self", "cls"))
            out.append((n.name, tokens(ast.unparse(n)), own))
    return out


@pytest.mark.parametrize("rel", CHAPTERS, ids=area)
def test_a_chapter_keeps_its_size(rel):
    lines = sum(bool(l.strip()) for s in code(rel) for l in s.splitlines())
    pictures = sum("#| label: fig-" in s for s in code(rel))
    assert len(cells(rel)) <= 140, "cells"
    assert lines <= 900, "lines of code"
    assert pictures <= 12, "pictures"


@pytest.mark.parametrize("rel", CHAPTERS, ids=area)
def test_cells_and_functions_can_be_read(rel):
    sizes = [tokens(s) for s in code(rel)]
    assert np.median(sizes) <= 80 and np.quantile(sizes, 0.9) <= 200, (
        f"tokens a cell: median {np.median(sizes)}, 9 of 10 {np.quantile(sizes, 0.9)}"
    )
    fs = functions(rel)
    assert np.quantile([t for _, t, _ in fs], .9) <= 160, sorted(fs, key=lambda f: -f[1])[:8]
    assert max(p for _, _, p in fs) <= 8, [f for f in fs if f[2] > 8]


def test_the_book_as_a_whole_can_be_read():
    "All pages together: foundations, chapters, workshop."
    pages = [c for c in ORDER if "/" in c]
    sizes = [tokens(s) for rel in pages for s in code(rel)]
    fs = [(area(rel), *f) for rel in pages for f in functions(rel)]
    assert np.median(sizes) <= 80 and np.quantile(sizes, .9) <= 200, (
        f"tokens a cell: median {np.median(sizes)}, 9 of 10 {np.quantile(sizes, .9)}"
    )
    assert np.quantile([f[2] for f in fs], .9) <= 160, sorted(fs, key=lambda f: -f[2])[:20]


@pytest.mark.parametrize("rel", CHAPTERS, ids=area)
def test_experiments_go_through_trials(rel):
    text = "\n".join(code(rel))
    assert re.search(r"\bover_seeds\(", text) and re.search(r"\bmeasure\(", text)
    bad = re.findall(r"^.*(?:\bclaim\(|def \w*tune\w*\(|for \w+ in seeds\b|for \w+ in range\(n_seeds\)).*$", text, re.M)
    assert not bad, f"a tuner, a seed loop or a claim paired by hand: {bad}"


@pytest.mark.parametrize("rel", [c for c in ORDER if "/" in c], ids=area)
def test_a_page_imports_what_stands_before_it(rel):
    module = lambda c: (
        f"recbook.{area(c)}"
        if c.split("/")[0] in ("foundations", "workshop")
        else f"recbook.{c.split('/')[0]}.{area(c)}"
    )
    place = {module(c): i for i, c in enumerate(ORDER) if "/" in c}
    here = ORDER.index(rel)
    later = set()
    for s in code(rel):
        for n in ast.parse(re.sub(r"^\s*[%!].*$", "", s, flags=re.M)).body:
            names = (
                [n.module]
                if isinstance(n, ast.ImportFrom) and n.module
                else [a.name for a in n.names]
                if isinstance(n, ast.Import)
                else []
            )
            later |= {m for m in names if place.get(m, -1) > here}
    assert not later - {"recbook.trials"} if rel.endswith("claims.ipynb") else not later, (
        f"{rel} imports later pages: {sorted(later)}"
    )


def test_no_module_of_the_house_is_too_large():
    big = {f.name: f.stat().st_size for f in (root()/"recbook").glob("*.py") if f.name != "_modidx.py"}
    assert max(big.values()) <= 25 * 1024, {n: s for n, s in big.items() if s > 25 * 1024}


@pytest.mark.parametrize("rel", [c for c in ORDER if "/" in c], ids=area)
def test_no_book_only_syntax_shows_in_a_notebook(rel):
    bad = [s for c in cells(rel) if c["cell_type"] == "markdown" for s in [("".join(c["source"]))] if ":::" in s]
    assert not bad, "Quarto's blocks show as text in Jupyter, GitHub and Colab: fold with <details>"
