"""What the command does with bad input, broken files, kills, full disks and odd terminals: it names the file or the
value, and spares the rest."""
import json, os, pathlib, shutil, signal, subprocess, sys, time
from pathlib import Path

import nbformat, numpy as np, pytest
from tiny_book import BROKEN, DEMO, PLAIN, cli, no_nan, write_page

from recbook import book as B, cli as L, publish as P, records as K, run as R
from recbook.data import read_json, root

ROOT = Path(root())
ENV = os.environ | dict(PYTHONPATH=str(ROOT), NO_COLOR="1")

def command(*args, cwd, env=(), **kw):
    return subprocess.run(
        [sys.executable, "-m", "recbook.cli", *map(str, args)],
        cwd=cwd,
        env=ENV | dict(env),
        capture_output=True,
        timeout=200,
        **kw,
    )

def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content) if isinstance(content, bytes) else path.write_text(content)
    return path

# --- values: typed, in settings.ini, in the parameters cell, from Python ---

@pytest.mark.parametrize(
    "text,want",
    [
        ("50% #1", "50% #1"),
        ("5 # x", "5 # x"),
        ("'a # b'", "a # b"),
        ("[1, 2] # x", "[1, 2] # x"),
        ("a=b", "a=b"),
        ("", ""),
        ("[]", []),
        ("it's", "it's"),
        ("1, 2", (1, 2)),
        ("1], [2", "1], [2"),
        ("{'a': 1}", {"a": 1}),
        ("[" * 500, "[" * 500),
        ("-3", -3),
        ("C:\\new", "C:\\new"),
    ],
)
def test_value_typed(text, want):
    assert B.value(text) == want

@pytest.mark.parametrize(
    "text,want",
    [
        ("5 # five", 5),
        ('"a #b"', "a #b"),
        ('"a #b"   # c', "a #b"),
        ("'it''s' # x", "its"),
        ("ml-1m # name", "ml-1m"),
        ("a#b", "a#b"),
        ("# nothing", ""),
        ("true # yes", True),
        ("[1, # one\n 2]", [1, 2]),
        ("a = b", "a = b"),
        ("50%", "50%"),
        ("none", None),
        ("1;2", "1;2"),
    ],
)
def test_value_in_settings(tmp_path, text, want):
    (tmp_path/"settings.ini").write_text(f"[cpu]\nx = {text}\n")
    assert B.profiles(tmp_path)["cpu"]["x"] == want

CELLS = {
    's = "a=b"': dict(s="a=b"),
    "s = 'a #b' # text": dict(s="a #b"),
    "grid = [\n  1, # one\n  2,\n]": dict(grid=[1, 2]),
    "n: int = 3": dict(n=3),
    "a = b = 2": dict(a=2, b=2),
    "x = 'p=1'; y = {'q': '='}": dict(x="p=1", y={"q": "="}),
    "n = -2": dict(n=-2),
    "n: int": {},
    "d = dict(a=1)": dict(d="dict(a=1)"),
    "%matplotlib inline\nn = 1": dict(n=1),
    "t = '''two\nlines = 2'''": dict(t="two\nlines = 2"),
    "lr = 10**-3": dict(lr="10 ** (-3)"),
    "ok = n == 2": dict(ok="n == 2"),
    "print('x = 1')\nn = 1": dict(n=1),
}

@pytest.mark.parametrize("cell", CELLS)
def test_declared_reads_python(tmp_path, cell):
    assert B.declared(write_page(tmp_path, "01_x", ["# X", cell])) == CELLS[cell]

@pytest.mark.parametrize(
    "v,want",
    [
        (np.int64(3), 3),
        (np.float32(0.5), 0.5),
        (np.bool_(True), True),
        (np.str_("a"), "a"),
        (np.arange(3), [0, 1, 2]),
        (range(2), [0, 1]),
        ((1, (2,)), [1, [2]]),
        ({2, 1}, [1, 2]),
        (Path("/a"), "/a"),
        ({"a": np.float64(1)}, {"a": 1.0}),
        (None, None),
        ([np.int64(1), None], [1, None]),
    ],
)
def test_portable(v, want):
    got = B.portable(v)
    assert got == want and type(got) is type(want) and json.dumps(got)

@pytest.mark.parametrize("v", [object(), {1: 2}, [lambda: 0], b"x", 1j])
def test_not_portable(v):
    with pytest.raises(B.UsageError, match="can't be given to a notebook"):
        B.portable(v)

# --- parameters against their defaults, before a kernel starts ---

PAGE = [
    "# Page",
    "seed = 0\nepochs = 10\nn_seeds = 2\nworld_users = 400\nlr = 0.01\nlr_grid = [0.1, 0.2]\nflip_rates = [0.0, "
    "0.3]\nshare = .2\nreal = []\ndataset = ''\nname = 'x'\n"
    "flag = False\ndevice = 'auto'\nlayers = [4, 5]\noff = 0\nopts = {'a': 1}\ntokens = [1, 4]\nwhere = 'coat'\nshift "
    "= -1\nauto = 3*4",
    "print('hello')",
]

@pytest.fixture
def pages(book):
    write_page(book, "02_page", PAGE)
    shutil.copy2(ROOT/"data/datasets.toml", write(book/"data/datasets.toml", "").parent)
    return book

@pytest.mark.parametrize(
    "bad",
    [
        "epochs=0",
        "epochs=-1",
        "epochs=nan",
        "epochs=1e9",
        "epochs=2.5",
        "epochs=none",
        "epochs=abc",
        "epochs=true",
        "epochs=10**9",
        "n_seeds=0",
        "n_seeds=1e9",
        "n_seeds=1000000000",
        "seed=-1",
        "seed=2.5",
        "seed=x",
        "seed=none",
        "seed=99999999999",
        "world_users=abc",
        "world_users=10**9",
        "world_users=1000000000",
        "world_users=[1]",
        "lr=0",
        "lr=-1",
        "lr=1e400",
        "lr=nan",
        "lr=x",
        "lr=true",
        "lr_grid=[]",
        "lr_grid=0.1",
        "lr_grid=[0.1, -1]",
        "lr_grid=['a']",
        "lr_grid=[1e999]",
        "flip_rates=[0.1, 1.5]",
        "share=1.5",
        "name=5",
        "name=[1]",
        "flag=1",
        "flag=yes",
        "device=gpu",
        "device=cuda:x",
        "device=''",
        "opts=3",
        "off=-1",
        "layers=[4.5]",
        "tokens=[]",
        "shift=x",
    ],
)
def test_senseless_values_are_refused_before_the_start(pages, bad):
    name, given = bad.split("=", 1)
    out = cli("run", "page", "--set", bad, code=2)
    assert f"page: {name}=" in out and "must be" in out and not (pages/"runs").exists()

@pytest.mark.parametrize(
    "good",
    [
        "epochs=1",
        "seed=4294967295",
        "lr=1",
        "lr_grid=[1]",
        "lr_grid=(0.1, 0.2)",
        "flip_rates=[0, 1]",
        "real=['coat']",
        "dataset=filmtrust/trust",
        "where=gowalla",
        "flag=true",
        "layers=[0]",
        "off=3",
        "opts={}",
        "name=''",
        "shift=-5",
        "shift=none",
        "auto=abc",
        "world_users=100000",
        "device=cpu",
        "dataset=''",
    ],
)
def test_sensible_values_pass(pages, good):
    from recbook.book import pairs, plan
    (_, params), = plan(["page"], sets=pairs([good]))
    assert len(params) == 1

@pytest.mark.parametrize(
    "bad,says",
    [
        ("real=['movielens-100']", "Did you mean 'movielens-100k'"),
        ("real=movielens-100k", "must be a list"),
        ("dataset=movielens-100", "movielens-100k"),
        ("real=['coat', 'goat']", "'goat'"),
        ("real=[3]", "'3'"),
        ("where=cot", "'coat'"),
    ],
)
def test_unknown_data_sets_are_refused_before_the_start(pages, bad, says):
    assert says in cli("run", "page", "--set", bad, code=2) and not (pages/"runs").exists()

@pytest.mark.parametrize(
    "section,says",
    [
        ("[cpu]\nepochs = 0", "epochs=0"),
        ("[cpu]\n[cpu.page]\nreal = ['movielens-100']", "movielens-100k"),
        ("[cpu]\nlr_grid = []", "not empty"),
    ],
)
def test_values_of_settings_are_checked_too(pages, section, says):
    (pages/"settings.ini").write_text(section + "\n")
    assert says in cli("run", "page", "--profile", "cpu", code=2)

def test_every_value_of_the_book_passes():
    for profile in (p for p in B.profiles(ROOT) if "." not in p):
        assert B.plan(["all"], profile, root=ROOT)

def test_a_registry_that_is_missing_is_named(pages):
    (pages/"data/datasets.toml").unlink()
    assert "datasets.toml" in cli("run", "page", "--set", "real=['coat']", code=2)
    assert "datasets.toml" in cli("data", "list", code=2) and "datasets.toml" in cli("data", "get", "coat", code=2)

@pytest.mark.parametrize(
    "args,says",
    [(["--seed", "3", "--set", "seed=5"], "seed twice"), (["--set", "epochs=1", "--set", "epochs=2"], "epochs twice")],
)
def test_two_values_for_one_name(pages, args, says):
    assert says in cli("run", "page", *args, code=2)

def test_the_same_value_twice_is_fine(pages): assert B.pairs(["seed=3", "seed=3"]) == dict(seed=3)

def test_device_that_is_not_there(pages, monkeypatch):
    import torch
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert (
        "this machine has" in cli("run", "page", "--set", "device=cuda", code=2)
        and not (pages / "runs/smoke/page.json").exists()
    )
    assert K.true_device("cpu") == "cpu" and K.true_device("auto") in ("cpu", "mps")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert (K.true_device("cuda"), K.true_device("cuda:0")) == ("cuda", "cuda:0")
    with pytest.raises(B.UsageError, match="cuda:1"):
        K.true_device("cuda:1")

# --- settings.ini ---

@pytest.mark.parametrize(
    "text,says",
    [
        ("n = 1\n", "line 1"),
        ("[cpu]\nn = 1\n[cpu]\n", "line 3"),
        ("[cpu]\nn = 1\nn = 2\n", "line 3"),
        ("[cpu]\nwhat\n", "line 2"),
        ("[cpu]\nn = \xe9\n".encode("latin-1"), "UTF-8"),
        ("[smoke]\n[bad.metriks]\n", "[bad.metriks]"),
        ("[cpu]\n[cpu.dmo]\n", "Did you mean 'demo'"),
        ("[cpu]\n[cpuu.demo]\n", "Did you mean 'cpu'"),
        ("[cpu\nn = 1\n", "line 1"),
        (b"\xff\xfe\x00", "UTF-8"),
    ],
)
def test_broken_settings(book, text, says):
    write(book/"settings.ini", text)
    out = cli("run", "demo", code=2)
    assert "settings.ini" in out and says in out and len(out.strip().splitlines()) == 1

def test_settings_with_a_mark_of_byte_order(book):
    write(book/"settings.ini", b"\xef\xbb\xbf[cpu]\nn = 3.0\n")
    assert B.profiles(book)["cpu"] == dict(n=3.)

def test_missing_settings(book):
    (book/"settings.ini").unlink()
    for args in (["run"], ["list"], ["claims"]):
        assert "settings.ini is missing" in cli(*args, code=2)

# --- broken notebooks, catalogues, records: named, the others go on ---

NOTEBOOKS = [
    '{"cells": [',
    "[]",
    "null",
    '{"cells": 3}',
    '{"cells": [3]}',
    '{"cells": [{"cell_type": "code"}]}',
    b"\xff\xfe",
    "",
    "[" * 100_000,
    '{"cells": [{"cell_type": "x", "source": ""}]}',
]

@pytest.mark.parametrize("text", NOTEBOOKS, ids=range(len(NOTEBOOKS)))
def test_a_broken_notebook_fails_by_name(book, text):
    write(book/"nbs/basics/02_bad.ipynb", text)
    bad, = R.run_chapters(["bad"])
    assert not bad.ok and "02_bad.ipynb" in bad.error["evalue"]
    assert "demo" in cli("list")

def test_a_broken_notebook_spares_the_others(book):
    write(book/"nbs/basics/02_bad.ipynb", "[]")
    write_page(book, "03_plain", PLAIN)
    out = cli("run", "bad", "plain", "--seed", 1, code=1)
    assert "02_bad.ipynb" in out and json.loads((book/"runs/smoke/plain.json").read_text())["parameters"]["seed"] == 1

CATALOGUES = [
    "[[paper]\n",
    "[paper]\nid = 'x'\n",
    "title = 'x'\n",
    "[[paper]]\nname = 'x'\n",
    b"\xff",
    "[[paper]]\nid = 'x'\n[[paper.claim]]\nmetric = 'm'\n",
    "paper = 3\n",
]

@pytest.mark.parametrize("text", CATALOGUES, ids=range(len(CATALOGUES)))
def test_a_broken_catalogue_is_named_and_spares_other_areas(book, text):
    write(book/"data/papers/demo.toml", text)
    write_page(book, "02_plain", PLAIN)
    assert "demo.toml" in cli("list") and "plain" in cli("list")
    bad, good = R.run_chapters(["demo", "plain"])
    assert "demo.toml" in bad.error["evalue"] and good.ok
    with pytest.raises(B.UsageError, match="demo.toml"):
        P.bibliography(book)

SOUND = dict(
    id="demo.1",
    paper="demo",
    statement="S.",
    metric="recall",
    dataset="world",
    systems=["A", "B"],
    direction="higher",
    seeds=[0, 1],
    ours=[0.3, 0.4],
    theirs=[0.1, 0.2],
    effect=0.2,
    ci=[0.1, 0.3],
    p=0.01,
    verdict="supported",
    reported=None,
)
RECORD = dict(area="demo", profile="cpu", started="2026-01-31T00:00:00+00:00", claims=[SOUND])
BAD_RECORDS = ["{", "[1]", "null", "3", b"\xff", "", "[]"] + [
    json.dumps(r)
    for r in (
        RECORD | dict(claims="oops"),
        RECORD | dict(claims=None),
        RECORD | dict(claims=[{}]),
        RECORD | dict(claims=[3]),
        {},
        RECORD | dict(area=3),
        RECORD | dict(claims=[SOUND | dict(verdict="won")]),
        RECORD | dict(claims=[SOUND | dict(ci=[1])]),
        RECORD | dict(claims=[SOUND | dict(ours=["a"])]),
        RECORD | dict(claims=[SOUND | dict(effect=None)]),
        RECORD | dict(claims=[SOUND | dict(ours=[])]),
        RECORD | dict(started=[1], claims=None),
    )
]

@pytest.mark.parametrize("text", BAD_RECORDS, ids=range(len(BAD_RECORDS)))
def test_a_broken_record_is_named_and_spares_the_others(book, text):
    write(book/"data/results/cpu/bad.json", text)
    write(book/"data/results/cpu/demo.json", json.dumps(RECORD))
    write(book/"runs/smoke/demo.json", text)
    out = cli("claims", "--profile", "cpu")
    assert "bad.json" in out and "1 supported; 1 in all" in out
    assert "cpu 2026-01-31" in cli("list")

def test_claims_of_a_profile_that_does_not_exist(book):
    assert "Did you mean 'cpu'" in cli("claims", "--profile", "cpuu", code=2) and "'demo'" in cli(
        "claims", "dmo", code=2
    )
    write(book/"data/results/tpu/demo.json", json.dumps(RECORD | dict(profile="tpu")))
    assert "1 in all" in cli("claims", "--profile", "tpu")

# --- --resume believes nothing ---

def tamper(record, notebook):
    "Ways to spoil what a run has left: {name: function}."
    edit = lambda f, change: lambda: f.write_text(json.dumps(change(json.loads(f.read_text()))))
    ways = {f"record {t[:20]}": (lambda t=t: record.write_text(t)) for t in ("{", "[]", "null", "[1, 2]", "3")}
    ways |= {f"claims {v!r}": edit(record, lambda d, v=v: d | dict(claims=v)) for v in ("oops", None, [{}], [])}
    ways |= {
        f"{k} changed": edit(record, lambda d, k=k: d | {k: "x"}) for k in ("area", "profile", "fingerprint", "threads")
    }
    ways |= {
        "verdict edited": edit(record, lambda d: d | dict(claims=[d["claims"][0] | dict(verdict="refuted")])),
        "record gone": record.unlink,
    }
    ways |= {
        "notebook gone": notebook.unlink,
        "notebook empty": lambda: notebook.write_text(""),
        "notebook short": lambda: notebook.write_text(notebook.read_text()[:-30]),
        "notebook without its end": edit(notebook, lambda d: d | dict(cells=d["cells"][:-1])),
        "notebook list": lambda: notebook.write_text("[]"),
        "outputs gone": edit(
            notebook, lambda d: d | dict(cells=[c | (dict(outputs=[]) if "outputs" in c else {}) for c in d["cells"]])
        ),
    }
    return ways

def test_resume_runs_again_whatever_was_spoiled(book, monkeypatch):
    record, notebook = book/"runs/smoke/demo.json", book/"runs/smoke/demo.ipynb"
    assert R.run_chapters(["demo"])[0].ok and R.run_chapters(["demo"], resume=True)[0].skipped
    whole = record.read_bytes(), notebook.read_bytes()
    class Ran(Exception):
        pass
    monkeypatch.setattr(R, "execute", lambda *a, **k: (_ for _ in ()).throw(Ran("it ran")))
    for name, spoil in tamper(record, notebook).items():
        record.write_bytes(whole[0])
        notebook.write_bytes(whole[1])
        assert R.run_chapters(["demo"], resume=True)[0].skipped, name
        spoil()
        assert R.run_chapters(["demo"], resume=True)[0].error["ename"] == "Ran", name

# --- terminals ---

TERMINALS = {
    "latin-1": dict(PYTHONIOENCODING="latin-1"),
    "cp1252": dict(PYTHONIOENCODING="cp1252"),
    "ascii": dict(PYTHONIOENCODING="ascii"),
    "strict utf-8": dict(PYTHONIOENCODING="utf-8:strict"),
    "C": dict(LC_ALL="C", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0"),
}

@pytest.mark.parametrize("name", TERMINALS)
def test_output_never_fails_for_its_encoding(book, name):
    write_page(
        book,
        "02_odd",
        [
            "# Ödd ✓ 日本",
            "seed = 0",
            "# ## Méthode → ✗",
            "print('é✓日', open('é.txt', 'w').write('日✓'))\nprint(open('é.txt').read())",
        ],
    )
    r = command("run", "odd", cwd=book, env=TERMINALS[name])
    assert r.returncode == 0, r.stdout + r.stderr
    assert "日✓" in json.dumps(no_nan((book/"runs/smoke/odd.ipynb").read_text()), ensure_ascii=False)
    for args in (["list"], ["--help"], ["run", "--help"], ["claims"]):
        r = command(*args, cwd=book, env=TERMINALS[name])
        assert r.returncode == 0 and not r.stderr, r.stdout + r.stderr

@pytest.mark.skipif(os.name == "nt", reason="POSIX pipes")
def test_a_reader_that_leaves_is_no_failure(book):
    p = subprocess.Popen(
        [sys.executable, "-m", "recbook.cli", "run", "demo"],
        cwd=book,
        env=ENV,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    p.stdout.readline()
    p.stdout.close()
    err = p.stderr.read()
    assert p.wait(120) == 0 and json.loads((book/"runs/smoke/demo.json").read_text())["claims"] and b"Error" not in err
    shell = subprocess.run(
        f"set -o pipefail; {sys.executable} -m recbook.cli list | head -0",
        shell=True,
        executable="/bin/bash",
        cwd=book,
        env=ENV,
        capture_output=True,
        text=True,
    )
    assert shell.returncode == 0 and not shell.stderr, shell.stderr

@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no /dev/full")
def test_output_to_a_full_disk_is_no_failure(book):
    with open("/dev/full", "w") as full:
        code = subprocess.run(
            [sys.executable, "-m", "recbook.cli", "run", "demo"], cwd=book, env=ENV, stdout=full, stderr=subprocess.PIPE
        ).returncode
    assert (
        (book / "runs/smoke/demo.json").is_file()
        and not (book / "runs/smoke/demo.failed.json").exists()
        and code in (0, 1)
    )

# --- places ---

def test_out_that_is_a_file(book):
    (book/"taken").write_text("")
    for out in ("taken", "taken/below", "/dev/null/x", "/proc/nowhere"):
        assert "Can't write into" in cli("run", "demo", "--out", out, code=2)
    assert (book/"taken").read_text() == ""

def test_full_disk_is_told_before_the_start(book, monkeypatch):
    class Full:
        def __enter__(self): return self
        def __exit__(self, *a): pass
        def write(self, b): raise OSError(28, "No space left on device")
    monkeypatch.setattr(R.tempfile, "TemporaryFile", lambda dir: Full())
    assert "No space left" in cli("run", "demo", code=2)
    monkeypatch.undo()
    monkeypatch.chdir(book)
    monkeypatch.setattr(R.shutil, "disk_usage", lambda p: shutil._ntuple_diskusage(1 << 40, 1 << 40, 1000))
    assert "10 MB" in cli("run", "demo", code=2) and not list((book/"runs/smoke").iterdir())

def read_only(monkeypatch, folder):
    "Let writing into `folder` fail, root or not."
    real = R.tempfile.TemporaryFile
    def file(dir):
        if Path(dir) == folder:
            raise PermissionError(13, "Permission denied")
        return real(dir=dir)
    monkeypatch.setattr(R.tempfile, "TemporaryFile", file)

@pytest.mark.parametrize("place", ["nbs/basics", "data/results/smoke"])
def test_save_into_a_read_only_checkout_is_refused_before_the_start(book, monkeypatch, place):
    read_only(monkeypatch, book/place)
    monkeypatch.setattr(R, "execute", lambda *a, **k: pytest.fail("it ran"))
    out = cli("run", "demo", "--save", code=2)
    assert place in out and "--save needs a checkout you may write to" in out

@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="root may write everywhere")
def test_folder_without_permission(book):
    (book/"shut").mkdir(mode=0o500)
    assert "Can't write into" in cli("run", "demo", "--out", "shut", code=2)

def test_a_write_that_fails_leaves_nothing(tmp_path, monkeypatch):
    B.write_json(tmp_path/"a.json", dict(x=1))
    monkeypatch.setattr(B.os, "replace", lambda *a: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError):
        B.write_json(tmp_path/"a.json", dict(x=2))
    assert [f.name for f in tmp_path.iterdir()] == ["a.json"] and read_json(tmp_path/"a.json") == dict(x=1)

def test_folder_with_braces_blanks_and_letters(tmp_path, monkeypatch):
    odd = tmp_path/"my {bö} {0} dir"
    odd.mkdir()
    (odd/"recbook").mkdir()
    (odd/"settings.ini").write_text("[smoke]\n")
    write_page(odd, "01_plain", PLAIN)
    monkeypatch.chdir(odd)
    assert R.run_chapters(["plain"])[0].ok

# --- kills and leftovers ---

@pytest.mark.skipif(os.name == "nt", reason="POSIX signals")
@pytest.mark.parametrize("sig", [signal.SIGKILL, signal.SIGTERM])
def test_a_killed_run_leaves_nothing_for_long(book, tmp_path, sig):
    tmp = tmp_path/"tmp"
    tmp.mkdir()
    write_page(
        book,
        "02_slow",
        ["# Slow", "seed = 0\nwait = 60.0", "import time\nopen('started', 'w').close()\ntime.sleep(wait)"],
    )
    p = subprocess.Popen(
        [sys.executable, "-m", "recbook.cli", "run", "slow"],
        cwd=book,
        env=ENV | dict(TMPDIR=str(tmp)),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    for _ in range(300):
        if (book/"started").exists():
            break
        time.sleep(.1)
    assert list((book/"runs/smoke").glob(f".slow.{p.pid}.*"))
    p.send_signal(sig)
    p.wait(30)
    assert not list(tmp.glob("tmp*.json"))
    r = command("run", "slow", "--set", "wait=0", "--resume", cwd=book)
    assert r.returncode == 0 and sorted(f.name for f in (book/"runs/smoke").iterdir()) == ["slow.ipynb", "slow.json"]

def test_sweep_spares_the_living_and_others(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    mine = [
        f".demo.{dead.pid}.ipynb",
        f".demo.{dead.pid}.kernel.json",
        f".demo.json.{dead.pid}",
        f".demo.failed.json.{dead.pid}",
        f".01_demo.ipynb.{dead.pid}",
    ]
    spared = [
        f".demo.{os.getpid()}.ipynb",
        f".demo2.{dead.pid}.ipynb",
        f"demo.{dead.pid}.ipynb",
        ".demo.x.ipynb",
        "demo.ipynb",
        ".demo.ipynb",
    ]
    for f in mine + spared:
        (tmp_path/f).touch()
    R.sweep(tmp_path, ["demo"])
    assert sorted(f.name for f in tmp_path.iterdir()) == sorted(spared)

def test_a_young_process_with_an_old_number_does_not_count():
    assert R.alive(os.getpid(), time.time()) and not R.alive(os.getpid(), 0.0)

# --- notebooks without ids (Colab) ---

def without_ids(path, minor=0):
    d = json.loads(path.read_text())
    d["nbformat_minor"] = minor
    for c in d["cells"]:
        c["metadata"]["id"] = c.pop("id")
    path.write_text(json.dumps(d))

def test_notebook_without_ids_runs_saves_and_fails_with_its_cell(book):
    path = write_page(book, "01_demo", DEMO)
    without_ids(path)
    cli("run", "demo", "--save", "--seed", 3)
    assert nbformat.read(path, 4).cells[3].outputs[0].text.endswith("3 False\n")
    without = write_page(book, "02_broken", BROKEN)
    without_ids(without)
    for sets in ({}, dict(seed=0)):
        res, = R.run_chapters(["broken"], sets=sets)
        assert res.error["cell"] == 4 and res.error["source"] == BROKEN[3]
    path.write_text(path.read_text().replace("n-6.0", "n-5.0"))
    done = K.Result(
        B.pick(["demo"])[0], book / "runs/smoke/demo.ipynb", json.loads((book / "runs/smoke/demo.json").read_text())
    )
    with pytest.raises(B.UsageError, match="run the chapter again"):
        R.publish(done)

def test_the_same_id_twice(book):
    path = write_page(book, "01_demo", DEMO)
    d = json.loads(path.read_text())
    for c in d["cells"]:
        c["id"] = "same"
    path.write_text(json.dumps(d))
    res, = R.run_chapters(["demo"])
    assert res.ok and R.publish(res)

# --- data, doctor, new ---

@pytest.fixture
def data_book(book, monkeypatch):
    "A book whose registry knows one small set, in the cache."
    import hashlib
    sha = lambda b: hashlib.sha256(b).hexdigest()
    files = "".join(
        f'[[dataset.file]]\nname = "{n}"\nurl = "https://localhost/{n}"\nbytes = 3\nsha256 = "{sha(b)}"\n'
        for n, b in dict(a=b"one", b=b"two").items()
    )
    write(
        book / "data/datasets.toml",
        f'[[dataset]]\nname = "tiny"\ntitle = "Tiny"\nwhat = "x"\nterms = "free"\ncite = "c"\nhome = "h"\n{files}',
    )
    monkeypatch.setenv("RECBOOK_CACHE", str(book/"cache"))
    monkeypatch.delenv("RECBOOK_MIRROR", raising=False)
    for n, b in dict(a=b"one", b=b"two").items():
        write(book/"cache/tiny"/n, b)
    return book

def test_data_get_and_verify(data_book):
    assert (
        "tiny: 2 files" in cli("data", "get", "all")
        and "tiny: 2 ok" in cli("data", "verify", "all")
        and "tiny" in cli("data", "list")
    )
    stat = (data_book/"cache/tiny/a").stat()
    write(data_book/"cache/tiny/a", b"onf")
    os.utime(data_book/"cache/tiny/a", ns=(stat.st_atime_ns, stat.st_mtime_ns)) # bit rot
    out = cli("data", "verify", "tiny", code=1)
    assert "cache/tiny/a" in out and "delete it" in out and "tiny/b" not in out
    assert "https://localhost/a" in cli("data", "get", "tiny", code=1), "a damaged copy is fetched again"
    assert "1 ok" in cli("data", "verify", "tiny") and not (data_book/"cache/tiny/a").exists()

@pytest.mark.parametrize("text", ["{", "[[dataset]]\n", "x = 1\n", b"\xff"])
def test_broken_registry_is_named(data_book, text):
    write(data_book/"data/datasets.toml", text)
    for args in (["list"], ["get", "all"], ["verify"]):
        assert "datasets.toml" in cli("data", *args, code=2)

@pytest.mark.parametrize(
    "text,ok",
    [
        ("{", False),
        ("[]", False),
        ('{"argv": ["/no/such/python"], "display_name": "x", "language": "python"}', False),
        ('{"argv": [], "display_name": "x", "language": "python"}', False),
        (json.dumps(dict(argv=[sys.executable], display_name="x", language="python")), True),
    ],
)
def test_doctor_reads_the_kernel(tmp_path, monkeypatch, text, ok):
    write(tmp_path/"kernels/python3/kernel.json", text)
    monkeypatch.setenv("JUPYTER_PATH", str(tmp_path))
    monkeypatch.setenv("JUPYTER_PREFER_ENV_PATH", "0")
    assert next(c for c in L.checkup() if c.name == "kernel python3").ok == ok

def test_a_user_without_a_home(book, monkeypatch):
    monkeypatch.setattr(
        pathlib.Path,
        "home",
        classmethod(lambda c: (_ for _ in ()).throw(RuntimeError("Could not determine home directory."))),
    )
    monkeypatch.delenv("HOME", raising=False)
    assert R.run_chapters(["demo"], save=True)[0].ok

def test_new_is_all_or_nothing(tmp_path, monkeypatch):
    from recbook import scaffold as C
    for f in ("nbs", "recbook", "data/papers"):
        shutil.copytree(ROOT/f, tmp_path/f)
    (tmp_path/"tests").mkdir()
    for f in ("pyproject.toml", "settings.ini", "_quarto.yml"):
        shutil.copy2(ROOT/f, tmp_path/f)
    files = lambda: {f.relative_to(tmp_path): f.read_bytes() for f in tmp_path.rglob("*") if f.is_file()}
    whole, real = files(), C.write_text
    def failing(at): # the file with this number can't be written
        n = iter(range(9))
        return lambda f, t: (
            real(f, t) if next(n) < at else (_ for _ in ()).throw(OSError(28, "No space left on device", str(f)))
        )
    for at in range(5):
        monkeypatch.setattr(C, "write_text", failing(at))
        with pytest.raises(B.UsageError, match="nothing was written"):
            C.new("demo", "trust", tmp_path)
        assert files() == whole
    monkeypatch.setattr(C, "write_text", real)
    other = write(tmp_path/"data/papers/editing.toml", "[[paper]\n")
    with pytest.raises(B.UsageError, match="editing.toml"):
        C.new("demo", "trust", tmp_path)
    other.write_bytes(whole[Path("data/papers/editing.toml")])
    assert files() == whole
    assert len(C.new("demo", "trust", tmp_path)) == 5


def test_save_refuses_a_tree_with_uncommitted_changes(book):
    import subprocess
    git = lambda *a: subprocess.run(["git", "-C", str(book), *a], check=True, capture_output=True)
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x")
    (book/"settings.ini").write_text((book/"settings.ini").read_text() + "\n# changed\n")
    assert "uncommitted changes" in cli("run", "demo", "--save", code=2)
    assert not (book/"runs/smoke/demo.json").exists(), "refused before anything ran"


FOLDED = "<details><summary>Solution</summary>\n\n```python\n{}\n```\n\n</details>"


def with_page(book, *cells):
    "A chapter `solved` whose cells are (type, source) pairs behind a parameters cell."
    made = [dict(cell_type="markdown", id="t", metadata={}, source="# Solved")]
    made.append(
        dict(
            cell_type="code",
            id="p",
            metadata=dict(tags=["parameters"]),
            source="seed = 0",
            outputs=[],
            execution_count=None,
        )
    )
    for k, (kind, text) in enumerate(cells):
        own = dict(outputs=[], execution_count=None) if kind == "code" else {}
        made.append(dict(cell_type=kind, id=f"c{k}", metadata={}, source=text) | own)
    kernel = dict(kernelspec=dict(name="python3", display_name="python3", language="python"))
    page = book/"nbs/trust/07_solved.ipynb"
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(json.dumps(dict(cells=made, metadata=kernel, nbformat=4, nbformat_minor=5)))
    return page


def test_folded_solutions_run_in_the_kernel_of_the_chapter_and_leave_no_cell(book):
    with_page(book, ("code", "x = 20"), ("markdown", FOLDED.format("y = x + 1\nassert y == 21")), ("code", "print(y)"))
    cli("run", "solved")
    nb = json.loads((book/"runs/smoke/solved.ipynb").read_text())
    assert [c["id"] for c in nb["cells"]] == ["t", "p", "c0", "c1", "c2"]
    assert "21" in str(nb["cells"][-1]["outputs"])


def test_a_wrong_solution_fails_the_chapter(book):
    with_page(book, ("markdown", FOLDED.format("assert 1 == 2")))
    assert "AssertionError" in cli("run", "solved", code=1)


@pytest.mark.parametrize(
    "text, codes",
    [
        ("<details>\r\n\r\n```python\r\nx = 1\r\n```\r\n\r\n</details>", ["x = 1\n"]),
        ("<DETAILS open>\n\n```python \nx = 1\n```\n</DETAILS>", ["x = 1\n"]),
        ("no fold\n\n```python\nx = 1\n```", []),
        ("<details>\nonly words\n</details>", []),
    ],
)
def test_folded_code_is_found(text, codes):
    cell = dict(cell_type="markdown", id="a", metadata={}, source=text)
    assert [c["source"] for c in R.with_solutions(dict(cells=[cell]))["cells"][1:]] == codes


@pytest.mark.parametrize(
    "fence",
    [
        "~~~python\nx = 1\n~~~",
        "````python\nx = 1\n````",
        "  ```python\n  x = 1\n  ```",
        "```py\nx = 1\n```",
        "```python\nx = 1\n",
    ],
)
def test_folded_code_that_would_be_skipped_is_refused(fence):
    cell = dict(cell_type="markdown", id="a", metadata={}, source=f"<details>\n\n{fence}\n\n</details>")
    with pytest.raises(B.UsageError, match="can't be read"):
        R.with_solutions(dict(cells=[cell]))


def test_a_tree_git_cannot_look_at_is_not_clean(book):
    git = lambda *a: subprocess.run(["git", "-C", str(book), *a], check=True, capture_output=True)
    git("init", "-q")
    git("add", "-A")
    git("-c", "user.name=x", "-c", "user.email=x@example.org", "commit", "-qm", "x")
    assert not K.commit(book).endswith("+dirty")
    (book/".git/index").write_bytes(b"junk")
    assert K.commit(book).endswith("+dirty")
