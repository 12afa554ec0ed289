"""The recbook command on tiny books in temporary folders: what it runs, what it records, how it fails, what it
publishes."""
import json, os, signal, subprocess, sys, time
from pathlib import Path

import nbformat, pytest
from tiny_book import BROKEN, DEMO, PLAIN, cli, no_nan, write_page

from recbook import book as B, cli as L, records as K, run as R

# --- names, profiles, parameters: nothing runs ---

def test_chapters_in_reading_order(book):
    write_page(book, "02_late", PLAIN, "trust")
    write_page(book, "01_early", PLAIN, "foundations")
    assert [c.area for c in B.chapters()] == ["early", "late", "demo"]
    assert B.pick(["demo"])[0].title == "Demo: [a page]"

def test_home_is_the_checkout_around_us(book, monkeypatch):
    monkeypatch.chdir(book/"nbs"/"basics")
    assert B.home() == book.resolve()

@pytest.mark.parametrize(
    "text,want",
    [
        ("5", 5),
        ("1e-3", 1e-3),
        ("true", True),
        ("False", False),
        ("None", None),
        ("[1, 2]", [1, 2]),
        ("ml-1m", "ml-1m"),
        ("'5'", "5"),
        ("/a/b c", "/a/b c"),
    ],
)
def test_value(text, want):
    assert B.value(text) == want and type(B.value(text)) is type(want)

def test_layers_of_parameters(book):
    assert B.parameters("demo") == {}
    assert B.parameters("demo", "cpu") == dict(n=8.0, flag=True) # n_seeds is not declared in this chapter
    assert B.parameters("demo", "cpu", dict(flag=False)) == dict(n=8.0, flag=False)

def test_override_for_a_chapter_must_exist(book):
    (book/"settings.ini").write_text("[cpu]\n[cpu.demo]\nfleg = 1\n")
    with pytest.raises(B.UsageError, match="Did you mean 'flag'"):
        B.parameters("demo", "cpu")

def test_set_goes_where_it_is_declared(book):
    write_page(book, "02_plain", PLAIN)
    assert [p for _,p in B.plan(["all"], sets=dict(n=1, seed=4))] == [dict(n=1, seed=4), dict(seed=4)]

@pytest.mark.parametrize("args,says", [(["demmo"], "'demo'"), (["demo", "--profile", "cpuu"], "'cpu'"),
    (["demo", "--set", "flga=1"], "'flag'"),
    (["demo", "--set", "flag"], "name=value"), ([], "'graph_cf'"), (["demo", "--profile", "cpu.demo"], "profile")])
def test_wrong_names_end_with_2_and_run_nothing(book, args, says):
    assert says in cli("run", *args, code=2)
    assert not (book/"runs").exists()

def test_save_needs_a_checkout(book):
    (book/"recbook"/"dummy.py").unlink()
    (book/"recbook").rmdir()
    with pytest.raises(B.UsageError, match="checkout"):
        R.run_chapters(["demo"], root=book, save=True)

def test_bare_folder_says_what_to_do(tmp_path):
    with pytest.raises(B.UsageError, match="checkout"):
        B.pick(["all"], tmp_path)

# --- running ---

def test_run_record_resume_save(book):
    out = cli("run", "demo", "--seed", 3, "--set", "n=7.5", "--save")
    assert "supported" in out and "runs/smoke/demo.ipynb" in out

    rec = no_nan((book/"runs/smoke/demo.json").read_text())
    assert set(rec) == {
        "area",
        "profile",
        "commit",
        "started",
        "wall_s",
        "machine",
        "device",
        "threads",
        "versions",
        "parameters",
        "fingerprint",
        "code",
        "datasets",
        "claims",
    }
    assert rec["parameters"] == dict(seed=3, n=7.5, flag=False)
    assert rec["datasets"] == ["world"] and rec["wall_s"] > 0
    c, = rec["claims"]
    assert (c["ours"], c["seeds"], c["p"], c["at"]) == ([7.5], [3], None, "sec-measure")
    assert set(rec["machine"]) == {"cpu", "cores", "memory_gb", "gpu", "platform"} and rec["versions"]["python"]

    text = (book/"nbs/basics/01_demo.ipynb").read_text()
    nb = nbformat.reads(text, 4)
    nbformat.validate(nb)
    assert [c.source for c in nb.cells] == DEMO # the injected cell is not in
    assert nb.cells[1].metadata == {"tags": ["parameters"]} and "papermill" not in nb.metadata
    assert nb.cells[3].outputs[0].text.endswith("3 False\n") and "demo.1" in nb.cells[4].outputs[0].data["text/plain"]
    assert str(book) not in text and sys.prefix not in text and str(Path.home()) + "/" not in text
    assert all(c.execution_count is None for c in nb.cells if c.cell_type == "code")
    saved = no_nan((book/"data/results/smoke/demo.json").read_text())
    assert saved["claims"] == rec["claims"] and str(book) not in json.dumps(saved)

    # publishing changed outputs only, so nothing runs again; another seed does
    again = ["run", "demo", "--set", "n=7.5", "--resume", "--seed"]
    assert "skipped" in cli(*again, 3)
    assert "skipped" not in cli(*again, 4)
    assert sorted(f.name for f in (book/"runs/smoke").iterdir()) == ["demo.ipynb", "demo.json"]
    subprocess.run(
        [sys.executable, "-c", "from nbdev.clean import nbdev_clean; nbdev_clean('nbs/basics/01_demo.ipynb')"],
        check=True,
        cwd=_with_config(book),
    )
    assert (book/"nbs/basics/01_demo.ipynb").read_text() == text # already as nbdev-clean leaves it

def _with_config(book):
    (book / "pyproject.toml").write_text(
        '[project]\nname="x"\nversion="0"\n[tool.nbdev]\nallowed_cell_metadata_keys = ["tags"]\n'
    )
    return book

def test_failure_spares_others_and_the_good_result(book):
    write_page(book, "02_broken", BROKEN)
    write_page(book, "03_plain", PLAIN)
    assert R.run_chapters(["broken"], sets=dict(seed=1))[0].ok
    whole = {f: (book/"runs/smoke"/f).read_bytes() for f in ("broken.ipynb", "broken.json")}

    out = cli("run", "broken", "plain", "--seed", 0, "--jobs", 2, code=1)
    assert "broken, cell 4: ZeroDivisionError" in out and "z / seed" in out and "never" not in out
    assert {f: (book/"runs/smoke"/f).read_bytes() for f in whole} == whole
    assert (book/"runs/smoke/plain.json").is_file()
    err = no_nan((book/"runs/smoke/broken.failed.json").read_text())["error"]
    assert err["cell"] == 4 and err["evalue"] == "division by zero" and "\x1b" not in err["traceback"]
    partial = nbformat.read(book/"runs/smoke/broken.failed.ipynb", 4)
    assert any(o.get("ename") == "ZeroDivisionError" for c in partial.cells for o in c.get("outputs", []))

    # --resume after a failure runs what failed, and a success clears the failure away
    write_page(book, "02_broken", [c.replace("z / seed", "z / 3") for c in BROKEN])
    first, second = R.run_chapters(["broken", "plain"], sets=dict(seed=0), resume=True)
    assert (first.ok, first.skipped, second.skipped) == (True, False, True)
    assert not list((book/"runs/smoke").glob("*.failed.*"))

def test_lost_kernel_is_a_failure_with_its_cell(book):
    write_page(book, "02_gone", ["# Gone", "seed = 0", "import os\nos._exit(7)"])
    res, = R.run_chapters(["gone"])
    assert not res.ok and res.error["cell"] == 3 and "os._exit" in res.error["source"]
    assert "gone, cell 3" in _text(L.failure_panel(res))

def _text(x):
    con = L.Console(width=120, record=True, file=open(os.devnull, "w"))
    con.print(x)
    return con.export_text()

def env_page(root):
    return write_page(
        root,
        "02_env",
        [
            "# Env",
            "seed = 0",
            "import os\nprint(os.environ['PYTHONPATH'].split(os.pathsep)[0], os.environ['OMP_NUM_THREADS'], "
            "os.environ['MKL_NUM_THREADS'])",
        ],
    )

def printed(res): return "".join(json.loads(res.notebook.read_text())["cells"][2]["outputs"][0]["text"]).split()

def test_kernels_see_the_book_first(book):
    env_page(book)
    before = dict(os.environ)
    res = R.run_chapters(["env"], jobs=2, out=book/"elsewhere")[0]
    assert dict(os.environ) == before and not (book/"runs").exists()
    assert printed(res)[0] == str(book)

@pytest.mark.parametrize(
    "jobs,given,env,want",
    [
        (1, None, None, 1),
        (2, None, None, 1),
        (8, None, None, 1),
        (8, None, "3", 3),
        (1, 2, "3", 2),
        (1, None, "none", 1),
    ],
)
def test_threads_do_not_depend_on_jobs_and_stand_in_the_record(book, monkeypatch, jobs, given, env, want):
    env_page(book)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if env:
        monkeypatch.setenv("OMP_NUM_THREADS", env)
    res, = R.run_chapters(["env"], jobs=jobs, threads=given)
    assert printed(res)[1:] == [str(want)]*2 and res.record["threads"] == want

def test_other_threads_are_another_run(book):
    write_page(book, "02_plain", PLAIN)
    again = lambda n: R.run_chapters(["plain"], resume=True, threads=n)[0].skipped
    assert [again(1), again(1), again(2)] == [False, True, False]

def test_fingerprint_knows_what_matters(book):
    ch, toml = B.chapters()[0], book/"data/papers/demo.toml"
    seen = {K.fingerprint(ch, {})}
    def new():
        n = len(seen)
        seen.add(K.fingerprint(ch, {}))
        return len(seen) > n
    nb = nbformat.read(ch.path, 4)
    nb.cells[0].source += " Better prose."
    nb.cells[3].outputs = [nbformat.v4.new_output("stream", text="x")]
    nbformat.write(nb, ch.path)
    assert not new()
    nb.cells[3].source += "\n1"
    nbformat.write(nb, ch.path)
    assert new()
    (book/"recbook/dummy.py").write_text("x = 2\n")
    assert new()
    toml.parent.mkdir(parents=True)
    toml.write_text("")
    assert new()
    assert K.fingerprint(ch, dict(seed=1)) not in seen

def test_publish_refuses_outputs_of_other_code(book):
    res, = R.run_chapters(["demo"])
    write_page(book, "01_demo", DEMO)
    with pytest.raises(B.UsageError, match="run the chapter again"):
        R.publish(res)

def test_save_that_fails_is_reported_and_spares_others(book, monkeypatch):
    write_page(book, "02_plain", PLAIN)
    real = R.publish

    def publish(res, root):
        return real(res, root) if res.chapter.area == "plain" else (_ for _ in ()).throw(OSError("disk full"))
    monkeypatch.setattr(R, "publish", publish)
    assert "demo: OSError: disk full" in cli("run", "demo", "plain", "--save", "--jobs", 2, code=1)
    assert (book/"data/results/smoke/plain.json").is_file()

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
def test_ctrl_c_ends_at_once_and_leaves_no_half_notebook(book):
    write_page(book, "02_slow", ["# Slow", "seed = 0", "import time\nopen('started', 'w').close()\ntime.sleep(60)"])
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from recbook.cli import app; app()"
    p = subprocess.Popen(
        [sys.executable, "-c", code, "run", "slow"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        cwd=book,
    )
    for _ in range(200):
        if (book/"started").exists():
            break
        time.sleep(0.1)
    p.send_signal(signal.SIGINT)
    assert "Stopped" in p.communicate(timeout=10)[1] and p.returncode == 130
    assert not list((book/"runs/smoke").iterdir())

# --- the smaller parts ---

def test_harvest_keeps_the_last_of_an_id_and_data_set():
    out = lambda i, v, d="w": dict(output_type="display_data", data={B.MIME: dict(id=i, dataset=d, v=v)}, metadata={})
    cell = lambda *o: dict(cell_type="code", source="", outputs=list(o))
    md = dict(cell_type="markdown", source=["## A {#sec-a}\n", "text"])
    stream = dict(output_type="stream", text="")
    got = K.harvest(
        dict(cells=[cell(out("x", 0)), md, cell(out("y", 1), stream), cell(out("x", 2), out("x", 3, "real"))])
    )
    assert [(c["id"], c["dataset"], c["v"]) for c in got] == [("x", "w", 2), ("y", "w", 1), ("x", "real", 3)]
    assert {c["at"] for c in got} == {"sec-a"}

def test_scrub_only_whole_paths(monkeypatch):
    monkeypatch.setenv("RECBOOK_MIRROR", "/mnt/mirror")
    root = Path("/srv/book")
    assert R.scrub("/srv/book/nbs /srv/bookshop /mnt/mirror/x", root) == "./nbs /srv/bookshop $RECBOOK_MIRROR/x"
    assert R.scrub(f"{sys.prefix}/lib", root) == "<python>/lib"

def test_commit_without_git_is_the_version(tmp_path): assert K.commit(tmp_path) == (K._version("recbook") or "unknown")

def test_commit_in_git(tmp_path):
    git = lambda *a: subprocess.run(
        ["git", "-c", "user.name=t", "-c", "user.email=t@t", *a], cwd=tmp_path, check=True, capture_output=True
    )
    git("init")
    (tmp_path/"a").write_text("1")
    git("add", "a")
    git("commit", "-m", "a")
    clean = K.commit(tmp_path)
    (tmp_path/"a").write_text("2")
    assert len(clean) >= 7 and K.commit(tmp_path) == clean + "+dirty"

def test_list_shows_papers_claims_and_runs(book):
    p = book/"data/papers/demo.toml"
    p.parent.mkdir(parents=True)
    p.write_text(
        '[[paper]]\nid = "demo"\nname = "DemoNet"\n[[paper.claim]]\nid = "demo.1"\n[[paper.claim]]\nid = "demo.2"\n'
    )
    B.write_json(book/"data/results/cpu/demo.json", dict(started="2026-01-31T00:00:00+00:00"))
    out = cli("list")
    assert "Demo: [a page]" in out and "DemoNet" in out and " 2 " in out and "cpu 2026-01-31" in out

def test_scoreboard_of_published_records(book):
    assert "No published claims" in cli("claims")
    claim = dict(id="demo.1", paper="demo", statement="S.", metric="recall@20", dataset="world", systems=["A", "B"],
        direction="higher", seeds=[0, 1], ours=[.3, .4], theirs=[.1, .2], effect=.2, ci=[.1, .3],
        p=.01, verdict="supported", reported=dict(ours=.5, on="gowalla"))
    both = [claim, claim | dict(dataset="coat", verdict="refuted")]
    B.write_json(book/"data/results/cpu/demo.json", dict(area="demo", profile="cpu", claims=both))
    out = cli("claims", "--profile", "cpu")
    assert "1 supported, 1 refuted; 2 in all" in out and "0.5 on gowalla" in out and "coat" in out
    assert "No published claims" in cli("claims", "--profile", "smoke")
    assert "0.5 on gowalla" in _text(L.claims_table([claim]))

def test_claims_table_takes_incomplete_records():
    t = _text(
        L.claims_table(
            [
                dict(id="a.1", verdict=None),
                dict(
                    id="b.1",
                    ours=[1, None, 2],
                    theirs=[],
                    ci=[None, None],
                    effect=None,
                    systems=["A[x]", "B"],
                    verdict="refuted",
                ),
            ]
        )
    )
    assert "a.1" in t and "A[x] 1.5" in t and "refuted" in t

def test_help_and_list_stay_light(book):
    for args in (["--help"], ["list"]):
        code = f"import sys; from recbook.cli import app; app({args}, standalone_mode=False)\n" \
            "print('HEAVY', [m for m in ('torch', 'transformers', 'pandas', 'papermill', 'numpy') if m in sys.modules])"
        out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=book)
        assert "HEAVY []" in out.stdout, out.stdout + out.stderr


def test_a_kernel_that_does_not_start_is_tried_once_more(tmp_path, monkeypatch):
    import papermill
    from recbook.run import execute
    write_page(tmp_path, "01_demo", DEMO)
    tries, real = [], papermill.execute_notebook
    def flaky(*args, **kwargs):
        tries.append(1)
        if len(tries) == 1:
            raise RuntimeError("Kernel didn't respond in 60 seconds")
        return real(*args, **kwargs)
    monkeypatch.setattr(papermill, "execute_notebook", flaky)
    page = next(tmp_path.rglob("01_demo.ipynb"))
    execute(page, tmp_path/"out.ipynb", {}, tmp_path)
    assert len(tries) == 2 and (tmp_path/"out.ipynb").is_file()
    monkeypatch.setattr(
        papermill,
        "execute_notebook",
        lambda *a, **k: (_ for _ in ()).throw(RuntimeError("Kernel didn't respond in 60 seconds")),
    )
    with pytest.raises(RuntimeError):
        execute(page, tmp_path/"out.ipynb", {}, tmp_path)

def test_code_is_read_from_many_threads():
    "In Python 3.11, ast.parse loses count of its depth when a finalizer lets another thread parse in between."
    code = """import ast, gc, sys, threading
from recbook.book import syntax
text, wrong = open(syntax.__code__.co_filename).read(), []
class Cycle:
    def __init__(self): self.me = self
    def __del__(self): sum(range(200))
def deep(n): return work() if n == 0 else deep(n-1)
def work():
    for _ in range(5):
        [Cycle() for _ in range(50)]
        try: syntax(text)
        except SystemError as e: wrong.append(e)
sys.setswitchinterval(1e-6); gc.set_threshold(100, 5, 5)
ts = [threading.Thread(target=deep, args=(3*i,)) for i in range(6)]
[t.start() for t in ts]; [t.join() for t in ts]
assert not wrong, wrong"""
    subprocess.run([sys.executable, "-c", code], check=True)

def test_the_slowest_cells_are_named(book):
    write_page(book, "03_slow", ["# Slow\n\n> It sleeps.", "seed = 0", "import time\ntime.sleep(.5)", "x = 1"])
    res = R.run_chapters(["slow"], root=book)[0]
    (took, name), *rest = R.slowest(B.read_notebook(res.notebook), 3)
    assert .5 < took < 5 and name == "import time" and all(s < .5 for s, _ in rest)
