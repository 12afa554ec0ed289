"The front door: README, Colab cells, the wheel, workflows, and a new chapter by the ten steps."
import importlib.util, json, os, re, shutil, subprocess, sys, types
from pathlib import Path

import nbformat, pytest, yaml
from recbook import scaffold as C
from recbook.data import root
from recbook.book import UsageError, chapters, tomllib
from recbook.run import run_chapters

ROOT = Path(root())
BADGED = [c for c in chapters(ROOT) if C.COLAB in [x.source for x in nbformat.read(c.path, 4).cells]]
ENV = os.environ | dict(PYTHONPATH="", OMP_NUM_THREADS="1", NO_COLOR="1")

def sh(*args, cwd, env=ENV):
    r = subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=600)
    assert r.returncode == 0, r.stdout[-3000:] + r.stderr[-3000:]
    return r.stdout

# --- the front page ---

def test_readme_is_the_index_notebook():
    assert (ROOT/"README.md").read_text(encoding="utf-8") == C.readme(ROOT), "run: python -m recbook.scaffold"

def test_readme_has_the_published_scores_and_picture():
    text, nb = (ROOT/"README.md").read_text(encoding="utf-8"), nbformat.read(ROOT/"nbs/index.ipynb", 4)
    records = C.published(ROOT)
    assert C.scores(records) in text, "run: python -m recbook.scaffold"
    assert (
        ("nbs/front.png" in text)
        == (ROOT / "nbs/front.png").is_file()
        == bool(C.relative([c for r in records for c in r["claims"]]))
    )
    if (ROOT/"nbs/front.png").is_file():
        assert (ROOT/"nbs/front.png").read_bytes() == C._png(nb)

def test_the_two_commands_stand_on_lines_of_their_own():
    lines = [l for l in (ROOT/"README.md").read_text(encoding="utf-8").splitlines() if l.startswith("pip install")]
    assert lines == [
        "pip install -c constraints.txt . && recbook run",
        'pip install -c constraints.txt ".[dev]" && pytest',
    ]

def test_readme_links_lead_somewhere():
    text = (ROOT/"README.md").read_text(encoding="utf-8")
    here = [l for l in re.findall(r"\]\(([^)#\s]+)", text) if not l.startswith("http")]
    blob = f"https://github.com/{C.REPO}/blob/main/"
    here += [l[len(blob):] for l in re.findall(r"\]\(([^)#\s]+)", text) if l.startswith(blob)]
    assert here and all((ROOT/l).exists() for l in here)

def test_one_address_everywhere():
    urls = tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["urls"]
    assert urls == dict(Homepage=C.BOOK, Repository=f"https://github.com/{C.REPO}")
    cff = yaml.safe_load((ROOT/"CITATION.cff").read_text())
    assert cff["repository-code"] == urls["Repository"] and cff["url"] == urls["Homepage"]
    assert cff["version"] == tomllib.loads((ROOT/"pyproject.toml").read_text())["project"]["version"]

# --- Colab ---

def test_foundations_install_themselves_in_colab():
    assert {"data", "world", "metrics", "training", "lm", "claims", "plots", "scaffold"} <= {c.area for c in BADGED}

@pytest.mark.parametrize("chapter", BADGED, ids=lambda c: c.area)
def test_first_code_cell_and_badge(chapter):
    cells = nbformat.read(chapter.path, 4).cells
    assert next(c for c in cells if c.cell_type == "code").source == C.COLAB
    assert C.badge(f"{chapter.part}/{chapter.path.name}") in cells[0].source

def colab_calls(monkeypatch):
    calls = []
    shell = types.SimpleNamespace(run_line_magic=lambda *a: calls.append(a))
    exec(C.COLAB, dict(get_ipython=lambda: shell))
    return calls

def test_colab_cell_does_nothing_elsewhere(monkeypatch):
    assert colab_calls(monkeypatch) == []

def test_colab_cell_installs_in_colab(tmp_path, monkeypatch):
    (tmp_path/"google/colab").mkdir(parents=True)
    (tmp_path/"google/colab/__init__.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    for m in [m for m in sys.modules if m == "google" or m.startswith("google.")]:
        monkeypatch.delitem(sys.modules, m)
    calls = colab_calls(monkeypatch)
    for m in ("google", "google.colab"):
        sys.modules.pop(m, None)
    assert calls == [("pip", f"install -q git+https://github.com/{C.REPO}")]

# --- community files ---

@pytest.mark.parametrize("name", ["ci", "book", "gpu"])
def test_workflow_is_valid(name):
    w = yaml.safe_load((ROOT/f".github/workflows/{name}.yml").read_text())
    on = w[True] # YAML 1.1 reads the key `on` as true
    assert on and w["permissions"] and w["jobs"]
    for job in w["jobs"].values():
        assert job["runs-on"] and job["steps"]
        assert all(("run" in s) != ("uses" in s) for s in job["steps"])
        assert set([job["needs"]] if "needs" in job else []) <= set(w["jobs"])
        assert not any("${{ inputs" in s.get("run", "") for s in job["steps"]), (
            "inputs go through env, not into the shell text"
        )

def test_workflows_do_what_they_are_for():
    read = lambda n: yaml.safe_load((ROOT/f".github/workflows/{n}.yml").read_text())
    assert read("ci")["jobs"]["test"]["strategy"]["matrix"]["python"] == ["3.10", "3.11", "3.12", "3.13"]
    parts = read("ci")["jobs"]["smoke"]["strategy"]["matrix"]["part"]
    assert set(parts) == {f.parent.name for f in (ROOT/"nbs").glob("*/[0-9]*.ipynb")}, "smoke runs every part"
    assert "self-hosted" in read("gpu")["jobs"]["run"]["runs-on"] and list(read("gpu")[True]) == ["workflow_dispatch"]
    assert any("quarto-actions" in s.get("uses", "") for s in read("book")["jobs"]["build"]["steps"])

@pytest.mark.parametrize("name", ["reproduction", "paper"])
def test_issue_form_is_valid(name):
    form = yaml.safe_load((ROOT/f".github/ISSUE_TEMPLATE/{name}.yml").read_text())
    assert form["name"] and form["description"]
    ids = [b["id"] for b in form["body"] if b["type"] != "markdown"]
    assert len(ids) == len(set(ids)) and all(b["attributes"]["label"] for b in form["body"])

def test_ten_steps():
    text = (ROOT/"CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^(\d+)\. ", text, re.M) == [str(i) for i in range(1, 11)]

# --- the package ---

def test_import_is_light():
    code = "import sys, recbook, recbook.cli; assert not {'torch', 'transformers', 'pandas', 'trl'} & set(sys.modules)"
    sh(sys.executable, "-c", code, cwd=ROOT, env=ENV | dict(PYTHONPATH=str(ROOT)))

@pytest.fixture(scope="session")
def wheel(tmp_path_factory):
    "The wheel of this checkout, built from a copy without data/results, and again with it."
    out = tmp_path_factory.mktemp("wheel")
    src = copy(out/"src")
    how = ["--no-build-isolation"] if importlib.util.find_spec("hatchling") else []
    env = os.environ | dict(PIP_DISABLE_PIP_VERSION_CHECK="1")
    shutil.rmtree(src/"data/results", ignore_errors=True)
    sh(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", *how, "-w", out/"bare", cwd=src, env=env)
    if (ROOT/"data/results").is_dir():
        shutil.copytree(ROOT/"data/results", src/"data/results")
    sh(sys.executable, "-m", "pip", "wheel", ".", "--no-deps", *how, "-w", out/"full", cwd=src, env=env)
    site = out/"site"
    sh(
        sys.executable,
        "-m",
        "pip",
        "install",
        "--no-deps",
        "--target",
        site,
        next((out / "full").glob("*.whl")),
        cwd=out,
        env=env,
    )
    return site

def copy(to):
    "This checkout without its history, runs and caches."
    to.mkdir(parents=True)
    for d in ("nbs", "recbook", "tests"):
        shutil.copytree(ROOT/d, to/d, ignore=shutil.ignore_patterns("__pycache__", ".*", ".ipynb_checkpoints"))
    shutil.copytree(ROOT/"data", to/"data", ignore=shutil.ignore_patterns("cache"))
    for f in ("pyproject.toml", "settings.ini", "README.md", "LICENSE", "_quarto.yml", ".gitignore"):
        if (ROOT/f).is_file():
            shutil.copy2(ROOT/f, to/f)
    return to

def test_wheel_carries_the_book(wheel):
    book = wheel/"recbook/_book"
    names = lambda r: {
        f.relative_to(r)
        for d in ("nbs", "data/papers", "data/results")
        for f in (r / d).rglob("*.*")
        if not f.name.startswith(".")
    }
    keep = lambda s: {f for f in s if ".ipynb_checkpoints" not in f.parts}
    assert keep(names(book)) == keep(names(ROOT))
    assert (
        (book / "settings.ini").is_file()
        and (book / "data/datasets.toml").is_file()
        and not (book / "data/cache").exists()
    )

def test_wheel_works_in_an_empty_folder(wheel, tmp_path):
    env = ENV | dict(PYTHONPATH=str(wheel), RECBOOK_CACHE=str(tmp_path/"cache"))
    cli = lambda *a: sh(sys.executable, "-m", "recbook.cli", *a, cwd=tmp_path, env=env)
    where = sh(
        sys.executable,
        "-c",
        "import recbook, recbook.cli; print(recbook.__file__, recbook.cli.home())",
        cwd=tmp_path,
        env=env,
    )
    assert where.split() == [str(wheel/"recbook/__init__.py"), str(wheel/"recbook/_book")]
    assert "graph_cf" in cli("list")
    assert "movielens-100k" in cli("data", "list")
    cli("run", "plots")
    assert (tmp_path / "runs/smoke/plots.ipynb").is_file() and json.loads(
        (tmp_path / "runs/smoke/plots.json").read_text()
    )["area"] == "plots"
    assert (wheel/"bin/recbook").is_file() or (wheel/"Scripts/recbook.exe").is_file()

# --- a new chapter ---

def steps():
    "The commands of the ten steps in CONTRIBUTING.md, without the last, bare `pytest`."
    text = (
        (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Add a paper in ten steps")[1].split("\n## ")[0]
    )
    lines = [l.strip() for block in re.findall(r"```sh\n(.*?)```", text, re.S) for l in block.splitlines() if l.strip()]
    return [l for l in lines if l != "pytest"]

def test_the_steps_have_their_commands():
    assert steps()[0] == "recbook new demo --part trust" and {
        "nbdev-export",
        "nbdev-clean",
        "python -m recbook.scaffold",
    } <= set(steps())

@pytest.fixture(scope="session")
def grown(tmp_path_factory):
    "A copy of the checkout with the chapter `demo`, made by the commands of the ten steps."
    to, bin = copy(tmp_path_factory.mktemp("grown")/"book"), Path(sys.executable).parent
    how = dict(
        recbook=[sys.executable, "-m", "recbook.cli"], python=[sys.executable], pytest=[sys.executable, "-m", "pytest"]
    )
    for line in steps():
        tool, *args = line.split()
        sh(*how.get(tool, [bin/tool]), *args, cwd=to, env=ENV | dict(PYTHONPATH=str(to)))
    ch = next(c for c in chapters(to) if c.area == "demo")
    record = json.loads((to/"data/results/cpu/demo.json").read_text())
    return types.SimpleNamespace(
        root=to, chapter=ch, result=types.SimpleNamespace(ok=True, error=None, record=record, claims=record["claims"])
    )

def test_new_chapter_passes_the_checks_of_every_chapter(grown, monkeypatch):
    import test_chapters as T
    monkeypatch.chdir(grown.root)
    T.test_every_claim_of_the_area_is_measured({"demo": grown.result}, "demo")
    T.test_is_well_formed(grown.chapter)

def test_new_chapter_runs_in_the_smoke_profile(grown, tmp_path):
    done = run_chapters(["demo"], profile="smoke", root=grown.root, out=tmp_path)
    assert done[0].ok and done[0].record["wall_s"] < 60 and [c["id"] for c in done[0].claims] == ["demo_example.1"]

def test_new_chapter_is_in_step_and_listed(grown):
    nb, page = nbformat.read(grown.chapter.path, 4), f"trust/{grown.chapter.path.name}"
    assert C.badge(page) in nb.cells[0].source and next(c for c in nb.cells if c.cell_type == "code").source == C.COLAB
    yml = yaml.safe_load((grown.root/"_quarto.yml").read_text())
    assert any(isinstance(c, dict) and c["chapters"][-1] == page for c in yml["book"]["chapters"])
    assert "@misc{demo_example" in (grown.root/"nbs/references.bib").read_text()
    before = {f: f.read_bytes() for f in [*grown.root.glob("recbook/**/*.py"), grown.chapter.path]}
    for tool in ("nbdev-export", "nbdev-clean"):
        sh(Path(sys.executable).parent/tool, cwd=grown.root, env=ENV | dict(PYTHONPATH=str(grown.root)))
    assert [f.name for f, b in before.items() if f.read_bytes() != b] == []

def test_front_page_shows_the_new_claims(grown):
    text = (grown.root/"README.md").read_text()
    assert "| demo | cpu | 1 | 1 |" in text and "(nbs/front.png)" in text
    assert (grown.root/"nbs/front.png").read_bytes()[:4] == b"\x89PNG"
    assert text == C.readme(grown.root)

def test_new_uses_the_papers_of_the_catalogue(tmp_path):
    to = copy(tmp_path/"book")
    written = {f.stem.split("_", 1)[1] for f in ROOT.glob("nbs/*/[0-9]*_*.ipynb")}
    catalogue = next((f for f in sorted((to/"data/papers").glob("*.toml")) if f.stem not in written), None)
    if catalogue is None:
        pytest.skip("every chapter of the catalogue is written")
    papers = tomllib.loads(catalogue.read_text())["paper"]
    made = C.new(catalogue.stem, "trust", to)
    after = tomllib.loads(catalogue.read_text())["paper"]
    assert [p["id"] for p in after] == [p["id"] for p in papers] and after[0]["claim"][0]["id"] == papers[0]["id"]+".1"
    before = made[0].read_bytes()
    sh(Path(sys.executable).parent/"nbdev-clean", "--fname", made[0], cwd=to, env=ENV)
    assert made[0].read_bytes() == before, "nbdev-clean has nothing to do"
    assert all(p["arxiv"] in nbformat.read(made[0], 4).cells[0].source for p in papers)

@pytest.mark.parametrize(
    "area,part,says",
    [
        ("graph_cf", "trust", "exists already"),
        ("data", "trust", "exists already"),
        ("trust", "trust", "exists already"),
        ("My chapter", "trust", "can't be the name"),
        ("../up", "trust", "can't be the name"),
        ("class", "trust", "can't be the name"),
        ("_x", "trust", "can't be the name"),
        ("claims", "llm", "exists already"),
        ("front", "trust", "exists already"),
        ("other", "trst", "Did you mean 'trust'"),
        ("other", "foundations", "Unknown part"),
    ],
)
def test_new_refuses(area, part, says):
    before = sorted(ROOT.glob("nbs/**/*.ipynb"))
    with pytest.raises(UsageError, match=says):
        C.new(area, part, ROOT)
    assert sorted(ROOT.glob("nbs/**/*.ipynb")) == before

def test_new_needs_a_checkout(tmp_path):
    with pytest.raises(UsageError, match="not a checkout"):
        C.new("demo", "trust", tmp_path)
