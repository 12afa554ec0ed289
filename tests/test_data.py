"The data foundation: container, splits, registry, downloads."
import functools, hashlib, http.server, io, os, platform, subprocess, sys, threading, zipfile
from pathlib import Path
import numpy as np, pandas as pd, pytest
from recbook import data, datasets
from recbook.data import (
    Interactions,
    cache_dir,
    canonical,
    cold_items,
    cold_users,
    datasets_list,
    fetch,
    given_split,
    head_tail,
    k_core,
    leave_one_out,
    load,
    new_pairs,
    ratio_split,
    root,
    temporal_split,
    verify,
)

SPLITS = [
    leave_one_out,
    lambda x: leave_one_out(x, 2),
    lambda x: ratio_split(x, 0.3, 0.2, 1),
    lambda x: temporal_split(x, 0.2, 0.2),
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path/"cache"))
    monkeypatch.setattr(datasets, "_shown", set())
    return tmp_path/"cache"


@pytest.fixture
def mirror(monkeypatch):
    import os
    near = root().parent/"shared"/"data"
    path = os.environ.get("RECBOOK_MIRROR") or (str(near) if near.is_dir() else None)
    if path is None:
        pytest.skip("no RECBOOK_MIRROR")
    monkeypatch.setenv("RECBOOK_MIRROR", path)
    return Path(path)


@pytest.fixture
def no_mirror(monkeypatch): monkeypatch.delenv("RECBOOK_MIRROR", raising=False)


def random_log(seed, n=300, n_users=25, n_items=40, ties=False):
    rng = np.random.default_rng(seed)
    df = pd.DataFrame(dict(user=rng.integers(0, n_users, n), item=rng.integers(0, n_items, n))).drop_duplicates(
        ignore_index=True
    )
    df["time"] = rng.integers(0, 30, len(df)) if ties else rng.permutation(len(df))
    return Interactions(df, n_users, n_items)


def keys(x): return set(zip(x.user.tolist(), x.item.tolist()))


# container

def test_views_agree():
    x = random_log(0)
    dense = np.zeros((25, 40))
    for u,i in zip(x.user, x.item):
        dense[u,i] = 1
    assert (x.csr().toarray()==dense).all() and x.csr().dtype==np.float32
    assert x.density == pytest.approx(dense.mean())
    seqs = x.by_user()
    assert len(seqs)==25 and [set(s) for s in seqs] == [set(np.flatnonzero(r)) for r in dense]
    for u,s in enumerate(seqs):
        assert list(s)==list(x.df[x.df.user==u].sort_values("time")["item"])
    assert "25 users" in repr(x) and len(repr(x)) < 150


def test_ratings_in_matrix():
    x = Interactions(pd.DataFrame(dict(user=[0,1], item=[1,0], rating=[4,2.5])), 2, 2)
    assert x.csr(binary=False).toarray().tolist() == [[0,4],[2.5,0]]
    assert x.df.rating.dtype==np.float32 and x.df.user.dtype==np.int64


@pytest.mark.parametrize("df,n,words", [
    (dict(user=[0,5], item=[0,1]), (2,2), ["user outside 0..1", "5", "Fix"]),
    (dict(user=[0,1], item=[0,-1]), (2,2), ["item outside 0..1", "-1"]),
    (dict(user=[0,np.nan], item=[0,1]), (2,2), ["missing user", "NaN"]),
    (dict(user=[0,0], item=[1,1]), (2,2), ["repeated (user, item)", "duplicates='last'"]),
    (dict(user=[], item=[]), (2,2), ["no interactions"]),
    (dict(user=[0], thing=[0]), (2,2), ["missing column", "item"]),
    (dict(user=["a"], item=[0]), (2,2), ["integers", "from_frame"]),
    (dict(user=[0], item=[0], rating=[np.nan]), (2,2), ["missing rating"]),
    (dict(user=[0], item=[0], time=["noon"]), (2,2), ["time is not a number", "noon"]),
    (dict(user=[0], item=[0], split=["dev"]), (2,2), ["train, valid or test", "dev"]),
])
def test_bad_frames_are_refused(df, n, words):
    with pytest.raises(ValueError) as e:
        Interactions(pd.DataFrame(df), *n)
    for w in words:
        assert w in str(e.value)


@pytest.mark.parametrize(
    "make,says",
    [
        (lambda: Interactions(dict(user=[0], item=[0]), 1, 1), "dict instead of a table"),
        (lambda: Interactions.from_frame(dict(user=[0], item=[0])), "dict instead of a table"),
        (
            lambda: Interactions(pd.DataFrame([[0, 0, 1]], columns=["user", "item", "user"]), 1, 1),
            "'user' occurs twice",
        ),
        (
            lambda: Interactions.from_frame(pd.DataFrame([[0, 0, 1]], columns=["user", "item", "user"])),
            "'user' occurs twice",
        ),
        (
            lambda: Interactions.from_frame(pd.DataFrame(dict(user=[[1], [2]], item=[0, 1]))),
            "user ids cannot be compared",
        ),
        (
            lambda: Interactions.from_frame(pd.DataFrame(dict(user=[1, 2], item=[{}, {}]))),
            "item ids cannot be compared",
        ),
        (
            lambda: Interactions.from_frame(pd.DataFrame(dict(user=[1], item=[1])), items=dict(item=[1])),
            "items table is a dict",
        ),
        (lambda: Interactions(pd.DataFrame(dict(user=[0], item=[0])), 2.5, 1), "n_users=2.5"),
        (lambda: Interactions(pd.DataFrame(dict(user=[0], item=[0])), 1, True), "n_items=True"),
        *[
            (lambda v=v: Interactions(pd.DataFrame(dict(user=[0], item=[0], **v)), 1, 1), f"{list(v)[0]} is infinite")
            for v in (dict(rating=[np.inf]), dict(rating=[1e300]), dict(time=[-np.inf]))
        ],
        (lambda: leave_one_out(random_log(0), 1.5), "n=1.5"),
        (lambda: leave_one_out(random_log(0), True), "n=True"),
        (lambda: k_core(random_log(0), 2.5), "k=2.5"),
        (lambda: random_log(0).subset(np.ones(3, bool)), "a mask of"),
        (lambda: random_log(0).subset([0, 10**6]), "row positions"),
        (lambda: random_log(0).subset([-1]), "row positions"),
        (lambda: random_log(0).subset([0.5]), "row positions"),
        (lambda: canonical([[0, np.nan]]), "not finite"),
        (lambda: new_pairs(random_log(0), random_log(0, n_items=50)), "one split"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(make, says):
    with pytest.raises(ValueError, match=says):
        make()


def test_subset_takes_masks_rows_and_nothing():
    x = random_log(0)
    m = np.arange(len(x)) % 3==0
    assert (
        x.subset(m).df.equals(x.subset(np.flatnonzero(m)).df)
        and x.subset(pd.Series(m)).df.equals(x.subset(m).df)
        and len(x.subset([])) == 0
    )


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
def test_durations_become_seconds_whatever_their_unit(unit):
    df = pd.DataFrame(
        dict(user=[0, 0], item=[0, 1], t=pd.Series(pd.to_timedelta([1, 90], "s")).astype(f"timedelta64[{unit}]"))
    )
    assert Interactions.from_frame(df, time="t").df.time.tolist()==[1,90]
    assert Interactions(df.rename(columns=dict(t="time")), 1, 2).df.time.tolist()==[1,90]


def test_a_sum_does_not_move_rows_between_parts():
    df = pd.DataFrame(dict(user=list("aab"), item=list("xxy"), t=[1,2,3], split=["train","test","train"]))
    with pytest.raises(ValueError, match="different parts"):
        Interactions.from_frame(df, time="t", split="split", duplicates="sum")
    x = Interactions.from_frame(df.assign(split="train"), time="t", split="split", duplicates="sum")
    assert x.df.rating.tolist()==[2,1]


@pytest.mark.parametrize("form", ["coo", "csr", "csc", "lil", "dok", "bsr"])
def test_canonical_is_the_same_matrix_without_surprises(form):
    import scipy.sparse as sp
    rng = np.random.default_rng(0)
    r,c,v = rng.integers(6, size=40), rng.integers(5, size=40), rng.integers(-1, 2, 40).astype(float)
    raw = sp.coo_matrix((v, (r, c)), (6, 5))
    want = raw.toarray()
    A = raw if form=="coo" else raw.asformat(form)
    got = canonical(A)
    assert (
        (got.toarray() == want).all()
        and got.nnz == (want != 0).sum()
        and got.has_sorted_indices
        and (A.toarray() == want).all()
    )
    odd = sp.csr_matrix((np.array([1.,1.,0.,2.]), np.array([3,3,1,0]), np.array([0,3,4])), (2, 4))
    kept = odd.indices.copy()
    assert (
        canonical(odd).toarray().tolist() == [[0, 0, 0, 2], [2, 0, 0, 0]]
        and canonical(odd).nnz == 2
        and (odd.indices == kept).all()
    )


def test_new_pairs():
    x = Interactions(pd.DataFrame(dict(user=[0,0,1,1,0], item=[0,1,0,1,0])), 2, 2, allow_duplicates=True)
    assert keys(new_pairs(x.subset([2,3,4]), x.subset([0,1])))=={(1,0), (1,1)} and len(new_pairs(x, x))==0


def test_table_of_wrong_length():
    with pytest.raises(ValueError, match="items table has 1 rows, not 2"):
        Interactions(pd.DataFrame(dict(user=[0], item=[0])), 1, 2, items=pd.DataFrame(dict(title=["a"])))


def test_input_is_not_changed_and_frozen():
    df = pd.DataFrame(dict(user=[1,0], item=[0,1]), index=[7,9])
    old = df.copy()
    x = Interactions(df, 2, 2)
    pd.testing.assert_frame_equal(df, old)
    assert list(x.df.index)==[0,1]
    with pytest.raises(AttributeError):
        x.n_users = 3


# from_frame

def test_from_frame_round_trip():
    rng = np.random.default_rng(0)
    raw = pd.DataFrame(
        dict(who=[f"u{i}" for i in rng.integers(0, 9, 80)], what=rng.integers(100, 130, 80))
    ).drop_duplicates()
    raw["stars"], raw["at"] = (
        rng.integers(1, 6, len(raw)),
        pd.Timestamp("2024-01-01") + pd.to_timedelta(rng.integers(0, 999, len(raw)), "s"),
    )
    titles = pd.DataFrame(dict(what=range(90,140), title=[f"film {i}" for i in range(90,140)]))
    a, b = (
        Interactions.from_frame(d, "who", "what", "stars", "at", items=titles)
        for d in (raw, raw.sample(frac=1, random_state=3))
    )
    back = set(zip(a.users.id[a.user], a.items.id[a.item], a.df.rating))
    assert back == set(zip(raw.who, raw.what, raw.stars))
    assert all(a.items.title == "film " + a.items.id.astype(str))
    assert (a.csr(False) != b.csr(False)).nnz == 0
    assert a.df.time.min() >= pd.Timestamp("2024-01-01").timestamp()


@pytest.mark.parametrize("rule,want", [("first", 1), ("last", 5), ("sum", 8)])
def test_duplicates(rule, want):
    df = pd.DataFrame(dict(user=list("aaab"), item=list("xxxy"), r=[2,1,5,3], t=[2,1,3,4]))
    x = Interactions.from_frame(df, rating="r", time="t", duplicates=rule)
    assert len(x)==2 and x.csr(False)[0,0]==want


def test_duplicates_errors():
    df = pd.DataFrame(dict(user=list("aa"), item=list("xx")))
    with pytest.raises(ValueError, match="repeated"):
        Interactions.from_frame(df)
    with pytest.raises(ValueError, match="one of"):
        Interactions.from_frame(df, duplicates="mean")
    with pytest.raises(ValueError, match="no column"):
        Interactions.from_frame(df, user="who")
    with pytest.raises(ValueError, match="missing user"):
        Interactions.from_frame(pd.DataFrame(dict(user=["a",None], item=["x","y"])))
    with pytest.raises(ValueError, match="no row in the items table"):
        Interactions.from_frame(
        df.iloc[:1], items=pd.DataFrame(dict(item=["z"], title=["t"])))


# splits

@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("ties", [False, True])
def test_splits_partition(split, ties):
    for seed in range(10):
        x = random_log(seed, ties=ties)
        a,b = split(x), split(x)
        parts = [keys(p) for p in a]
        assert sum(map(len, parts))==len(x) and set.union(*parts)==keys(x)
        assert all(p.df.equals(q.df) for p,q in zip(a,b))
        assert all((p.n_users,p.n_items)==(x.n_users,x.n_items) for p in a)
        if split is not SPLITS[3]:
            assert set(np.unique(x.user)) == set(np.unique(a.train.user))


@pytest.mark.parametrize("n", [1, 2])
def test_leave_one_out_takes_the_last(n):
    for seed in range(10):
        x = random_log(seed, n=120)
        s = leave_one_out(x, n)
        for u,seq in enumerate(x.by_user()):
            got = [p.by_user()[u].tolist() for p in s]
            want = [seq[:-2*n], seq[-2*n:-n], seq[-n:]] if len(seq)>2*n else [seq, [], []]
            assert got == [list(w) for w in want]


def test_leave_one_out_without_time_is_random_and_seeded():
    x = random_log(0)
    x = x._with(x.df.drop(columns="time"))
    assert keys(leave_one_out(x).test)==keys(leave_one_out(x).test) != keys(leave_one_out(x, seed=1).test)


def test_ratio_shares():
    for seed in range(5):
        x = random_log(seed)
        s = ratio_split(x, .2, .1, seed)
        n = np.bincount(x.user, minlength=25)
        assert (np.bincount(s.test.user, minlength=25)==np.floor(.2*n+.5)).all()
    assert keys(ratio_split(x, seed=0).test) != keys(ratio_split(x, seed=1).test)
    assert len(ratio_split(x, valid=0).valid)==0


def test_temporal_order():
    for seed in range(10):
        for ties in (False, True):
            s = temporal_split(random_log(seed, ties=ties), .2, .2)
            assert s.train.df.time.max() < s.valid.df.time.min() <= s.valid.df.time.max() < s.test.df.time.min()
    assert abs(len(temporal_split(random_log(0), .1, .1).test)/len(random_log(0)) - .1) < .01


def test_temporal_warns_about_positions():
    df = pd.DataFrame(dict(user=[0,0,1,1,1], item=[0,1,0,1,2], time=[0,1,0,1,2]))
    with pytest.warns(UserWarning, match="not a common clock"):
        temporal_split(Interactions(df, 2, 3), .2, .2)


def test_given_split():
    df = random_log(0).df.drop(columns="time")
    df["split"] = np.where(np.arange(len(df))%4==0, "test", "train")
    x = Interactions(df, 25, 40)
    a,b = given_split(x), given_split(x, .25, seed=1)
    assert keys(a.test)==keys(b.test) and not len(a.valid) and len(b.valid)
    assert keys(b.train)|keys(b.valid)==keys(a.train) and not keys(b.train)&keys(b.valid)
    assert keys(b.valid)==keys(given_split(x, .25, seed=1).valid)
    y = Interactions(df.assign(split=np.resize(["train","valid","test"], len(df))), 25, 40)
    assert keys(given_split(y).valid)==keys(given_split(y, .5).valid)


def test_split_errors():
    x = random_log(0)
    bare = x._with(x.df.drop(columns="time"))
    two = Interactions(pd.DataFrame(dict(user=[0,0,1,1], item=[0,1,0,1])), 2, 2)
    with pytest.raises(ValueError, match="time column"):
        temporal_split(bare)
    with pytest.raises(ValueError, match="no split column"):
        given_split(bare)
    with pytest.raises(ValueError, match="no test rows"):
        leave_one_out(two)
    with pytest.raises(ValueError, match="no test rows"):
        ratio_split(two, .2, .1)
    for f in (ratio_split, temporal_split):
        with pytest.raises(ValueError, match="sum under 1"):
            f(x, .6, .4)
    with pytest.raises(ValueError, match="n=0. Fix: a whole number"):
        leave_one_out(x, 0)
    same = Interactions(pd.DataFrame(dict(user=[0,1], item=[0,1], time=[3,3])), 2, 2)
    with pytest.raises(ValueError, match="no train rows"):
        temporal_split(same)


# slices

def test_slices():
    x = random_log(0)
    tr = temporal_split(x).train
    n = np.bincount(tr.item, minlength=40)
    h = head_tail(tr)
    assert h.sum()==8 and n[h].min() >= n[~h].max()
    assert (cold_items(tr)==(n==0)).all() and (cold_users(tr)==(np.bincount(tr.user, minlength=25)==0)).all()


def test_k_core_is_maximal_and_keeps_ids():
    for seed in range(5):
        x = random_log(seed, n=500)
        c = k_core(x, 8)
        df = x.df
        while True: # an independent peeling, users and items in turn
            u,i = df.user.value_counts(), df["item"].value_counts()
            if min(u.min(), i.min()) >= 8:
                break
            df = df[~df.user.isin(u.index[u<8])] if u.min()<8 else df[~df["item"].isin(i.index[i<8])]
        assert 0 < len(df) < len(x)
        assert set(zip(c.users.id[c.user], c.items.id[c.item])) == set(zip(df.user, df["item"]))
    with pytest.raises(ValueError, match="100-core is empty"):
        k_core(x, 100)


# registry and files

def test_registry_is_complete():
    df = datasets_list()
    assert df.name.is_unique and len(df) >= 15 and df[["what","grade","terms","cite","home"]].notna().all(axis=None)
    for name in df.name:
        for f in datasets._spec(name)["file"]:
            assert (
                len(f["sha256"]) == 64
                and f["bytes"] > 0
                and ("url" in f) != ("archive" in f)
                and not f["name"].startswith("/")
            )
        assert any(n.split("/")[0]==name for n in datasets._loaders)


def test_unknown_names():
    for f in (fetch, load, verify):
        with pytest.raises(ValueError, match="Did you mean gowalla"):
            f("gowala")
    with pytest.raises(ValueError, match="has no file"):
        fetch("coat", ["nope.txt"])
    with pytest.raises(ValueError, match="influence-graphs/nethept"):
        load("influence-graphs")


def test_root_and_cache(monkeypatch, tmp_path):
    assert (root()/"data"/"datasets.toml").exists()
    for d in ("nbs","recbook","deep/er"):
        (tmp_path/"fork"/d).mkdir(parents=True)
    (tmp_path/"fork"/"settings.ini").touch()
    monkeypatch.chdir(tmp_path/"fork"/"deep"/"er")
    assert root()==(tmp_path/"fork").resolve()
    assert cache_dir()==(tmp_path/"cache").resolve()
    monkeypatch.delenv("RECBOOK_CACHE")
    (tmp_path/"fork"/"data").mkdir()
    assert cache_dir()==(tmp_path/"fork"/"data"/"cache").resolve()


BODY = bytes(range(256))*400


class Home(http.server.BaseHTTPRequestHandler):
    "Serves BODY or a zip; breaks off while `breaks` lasts."
    breaks,hits = 0,0
    def do_GET(self):
        Home.hits += 1
        body = BODY
        if self.path.endswith(".zip"):
            buf = io.BytesIO()
            with zipfile.ZipFile(buf, "w") as z:
                z.writestr("in/a.bin", BODY)
            body = buf.getvalue()
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if Home.breaks:
            Home.breaks -= 1
            body = body[:len(body)//2]
        self.wfile.write(body)
    def log_message(self, *a): pass


@pytest.fixture
def home(no_mirror, monkeypatch):
    "A registry of sets that live on a local server."
    srv = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Home)
    threading.Thread(target=srv.serve_forever, args=(.01,), daemon=True).start()
    Home.breaks = Home.hits = 0
    url = f"http://127.0.0.1:{srv.server_port}"
    sha = hashlib.sha256(BODY).hexdigest()
    file = dict(name="sub/a.bin", sha256=sha, bytes=len(BODY))
    spec = lambda name, **kw: dict(
        name=name, title=name, terms="research only", cite="me", home=url, file=[{**file, **kw}]
    )
    reg = [spec("plain", url=f"{url}/a.bin"), spec("zipped", archive=f"{url}/a.zip", member="in/a.bin"),
           spec("changed", url=f"{url}/a.bin", sha256="0"*64),
           spec("changed-zip", archive=f"{url}/a.zip", member="in/a.bin", sha256="0"*64),
           spec("rar", archive=f"{url}/a.rar", member="in/a.bin")]
    monkeypatch.setattr(datasets, "_registry", lambda: {d["name"]: d for d in reg})
    import requests # the loopback server speaks http; that all else is refused has tests of its own
    monkeypatch.setattr(datasets, "_check_url", lambda url: None)
    monkeypatch.setattr(datasets, "_session", requests.Session)
    srv.registry = reg
    yield srv
    srv.shutdown()
    srv.server_close()


def whole_files(folder): return [p for p in folder.rglob("*") if p.is_file() and ".terms" not in p.parts]


@pytest.mark.parametrize("name", ["plain", "zipped"])
def test_download_survives_a_break(home, own_cache, name):
    Home.breaks = 1
    with pytest.raises(ConnectionError, match="RECBOOK_MIRROR"):
        fetch(name)
    assert whole_files(own_cache)==[]
    p = fetch(name)["sub/a.bin"]
    assert p.read_bytes()==BODY and whole_files(own_cache)==[p]
    hits = Home.hits
    assert fetch(name)["sub/a.bin"]==p and Home.hits==hits


def test_damaged_cache_is_fetched_anew(home):
    p = fetch("plain")["sub/a.bin"]
    p.write_bytes(BODY[:-1])
    assert verify("plain").status.tolist()==["wrong"]
    assert fetch("plain")["sub/a.bin"].read_bytes()==BODY
    assert verify("plain").status.tolist()==["ok"]


@pytest.mark.parametrize("name", ["changed", "changed-zip"])
def test_wrong_file_from_home(home, own_cache, name):
    with pytest.raises(ValueError, match="0000") as e:
        fetch(name)
    assert "RECBOOK_MIRROR" in str(e.value) and whole_files(own_cache)==[]


def test_offline(home):
    home.shutdown()
    home.server_close()
    with pytest.raises(ConnectionError, match="set RECBOOK_MIRROR="):
        fetch("plain")


def test_rar_without_tool(home, monkeypatch):
    monkeypatch.setattr(data.shutil, "which", lambda _: None)
    with pytest.raises(RuntimeError, match="bsdtar.*\n.*RECBOOK_MIRROR"):
        fetch("rar")
    assert Home.hits==0


def test_mirror_is_used_in_place_and_checked_once(home, tmp_path, monkeypatch):
    m = tmp_path/"m"
    (m/"plain"/"sub").mkdir(parents=True)
    f = m/"plain"/"sub"/"a.bin"
    f.write_bytes(BODY)
    monkeypatch.setenv("RECBOOK_MIRROR", str(m))
    assert fetch("plain")["sub/a.bin"]==f and Home.hits==0
    monkeypatch.setattr(datasets, "_sha256", lambda p: pytest.fail("read again"))
    fetch("plain")


def test_wrong_file_in_mirror(home, tmp_path, monkeypatch):
    m = tmp_path/"m"
    (m/"plain"/"sub").mkdir(parents=True)
    f = m/"plain"/"sub"/"a.bin"
    f.write_bytes(b"junk")
    monkeypatch.setenv("RECBOOK_MIRROR", str(m))
    with pytest.raises(ValueError) as e:
        fetch("plain")
    for w in (str(f), hashlib.sha256(BODY).hexdigest(), hashlib.sha256(b"junk").hexdigest(), "Fix"):
        assert w in str(e.value)
    assert f.read_bytes()==b"junk" and Home.hits==0


def test_missing_mirror(home, monkeypatch):
    monkeypatch.setenv("RECBOOK_MIRROR", "/no/such/folder")
    with pytest.raises(FileNotFoundError, match="RECBOOK_MIRROR is '/no/such/folder'"):
        fetch("plain")


def test_read_only_cache(home, own_cache, monkeypatch):
    def no(*a, **k): raise PermissionError("read-only")
    monkeypatch.setattr(Path, "mkdir", no)
    with pytest.raises(PermissionError, match="RECBOOK_CACHE") as e:
        fetch("plain")
    assert str(own_cache) in str(e.value)


def test_terms_show_once(home, capsys):
    fetch("plain")
    assert "research only" in capsys.readouterr().err
    datasets._shown.clear()
    fetch("plain")
    assert capsys.readouterr().err==""


# nothing leaves the cache, nothing is run, nothing swells

ESCAPES = [
    "../esc.txt",
    "../../esc.txt",
    "a/../../esc.txt",
    "/tmp/esc.txt",
    "..",
    "",
    "C:/esc.txt",
    "..\\esc.txt",
    "\\\\host\\esc.txt",
    "a\0b",
]
@pytest.mark.parametrize("name", ESCAPES)
@pytest.mark.parametrize("kind", ["plain", "zipped"])
def test_file_names_stay_inside_the_cache(home, own_cache, tmp_path, name, kind):
    before = {p for p in tmp_path.rglob("*")}
    spec = next(d for d in home.registry if d["name"]==kind)
    spec["file"][0]["name"] = name
    with pytest.raises(ValueError, match="outside the cache"):
        fetch(kind)
    assert Home.hits==0 and {p for p in tmp_path.rglob("*") if ".terms" not in p.parts and p!=own_cache}==before


@pytest.mark.parametrize("name", ESCAPES)
def test_set_names_stay_inside_the_cache(home, name):
    home.registry.append({**home.registry[0], "name": name})
    for f in (fetch, verify):
        with pytest.raises(ValueError):
            f(name)
    assert Home.hits==0


@pytest.mark.parametrize("linked", ["plain", "plain/sub", "plain/sub/a.bin"])
def test_links_do_not_lead_out_of_the_cache(home, own_cache, tmp_path, linked):
    outside = tmp_path/"outside"
    outside.mkdir()
    at = own_cache/linked
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(outside/"a.bin" if linked.endswith("bin") else outside)
    with pytest.raises(ValueError, match="outside the cache"):
        fetch("plain")
    assert not any(outside.iterdir())


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/a.bin", "ftp://x.org/a", "file:///etc/passwd", "x.org/a", "HTTP://x.org"]
)
def test_only_https(no_mirror, monkeypatch, url):
    d = dict(name="x", title="", terms="", cite="", home="", file=[dict(name="a", sha256="0"*64, bytes=3, url=url)])
    monkeypatch.setattr(datasets, "_registry", lambda: dict(x=d))
    with pytest.raises(ValueError, match="not an https address"):
        fetch("x")


def test_a_redirect_to_http_is_not_followed():
    import requests
    with datasets._session() as s, pytest.raises(requests.exceptions.InvalidSchema):
        s.get("http://127.0.0.1:1/a")


def test_a_longer_file_than_stated_is_cut_off(home, own_cache):
    home.registry[0]["file"][0]["bytes"] = 1000
    with pytest.raises(ValueError, match="longer than the 1000 bytes"):
        fetch("plain")
    assert whole_files(own_cache)==[]


class Bomb(Home):
    "A zip whose member is much longer than the registry says, perhaps with a header that lies about it."
    lies = False
    def do_GET(self):
        buf = io.BytesIO()
        with zipfile.ZipFile(buf, "w", zipfile.ZIP_DEFLATED) as z:
            z.writestr("in/a.bin", bytes(50_000_000))
        body = buf.getvalue()
        if self.lies:
            body = body.replace((50_000_000).to_bytes(4, "little"), (10).to_bytes(4, "little"))
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


@pytest.mark.parametrize("lies", [False, True])
def test_a_zip_bomb_is_refused_before_it_unfolds(home, own_cache, monkeypatch, lies):
    monkeypatch.setattr(Bomb, "lies", lies)
    home.RequestHandlerClass = Bomb
    home.registry[1]["file"][0]["bytes"] = 10
    with pytest.raises(ValueError, match="unpacks to|whole archive|expected sha256"):
        datasets._unpack("zipped", home.registry[1]["file"][0]["archive"], own_cache/"zipped")
    assert whole_files(own_cache)==[]


def test_members_never_exceed_their_size(tmp_path):
    import tracemalloc
    with zipfile.ZipFile(tmp_path/"b.zip", "w", zipfile.ZIP_DEFLATED) as z:
        z.writestr("a", bytes(30_000_000))
    tracemalloc.start()
    with pytest.raises(ValueError, match="unpacks to 30000000 bytes"):
        datasets._member(tmp_path/"b.zip", "a", 10)
    assert tracemalloc.get_traced_memory()[1] < 1_000_000
    tracemalloc.stop()


def test_an_archive_is_hashed_before_it_is_opened(home, monkeypatch):
    home.registry[1]["file"][0]["archive_sha256"] = "0"*64
    monkeypatch.setattr(datasets, "_member", lambda *a: pytest.fail("opened"))
    with pytest.raises(ValueError, match="0000"):
        fetch("zipped")


@pytest.mark.parametrize("name", ["cora", "gowalla", "diffrec"])
def test_planted_pickles_do_not_run(tmp_path, name):
    class Evil:
        def __reduce__(self): return (Path.touch, (tmp_path/"ran",))
    evil = np.array([Evil()], dtype=object)
    if name=="diffrec":
        f = tmp_path/"x.npy"
        np.save(f, evil, allow_pickle=True)
    else:
        f = tmp_path/"x.npz"
        np.savez(
            f, adj_data=evil, adj_indices=evil, adj_indptr=evil, adj_shape=evil, data=evil, format=evil, shape=evil
        )
    with pytest.raises(ValueError, match="pickle"):
        datasets._loaders[dict(cora="citation-graphs", gowalla="gowalla", diffrec="movielens-1m-diffrec")[name]](
            lambda n: f
        )
    assert not (tmp_path/"ran").exists()


def test_data_archives_have_a_limit(tmp_path):
    import tarfile
    with pytest.raises(ValueError, match="unpacks to"):
        data._check_room("x", [1<<30, 1])
    with tarfile.open(tmp_path/"x.tar.gz", "w:gz") as t:
        m = tarfile.TarInfo("../train.txt")
        m.size = 6
        t.addfile(m, io.BytesIO(b"a\tb\tc\n"))
        for n in ("valid.txt", "test.txt"):
            m = tarfile.TarInfo(n)
            m.size = 6
            t.addfile(m, io.BytesIO(b"a\tb\tc\n"))
    assert (
        len(datasets._triples(lambda f: tmp_path / "x.tar.gz", "umls")) == 3
        and not (tmp_path.parent / "train.txt").exists()
    )


def test_bit_rot_with_the_old_time_is_noticed(home, tmp_path):
    p = fetch("plain")["sub/a.bin"]
    st = p.stat()
    p.write_bytes(b"!" + BODY[1:])
    os.utime(p, ns=(st.st_atime_ns, st.st_mtime_ns))
    assert fetch("plain")["sub/a.bin"].read_bytes()==BODY and verify("plain").status.tolist()==["ok"]


def test_leftovers_of_killed_downloads_go(home, own_cache):
    dead = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"], capture_output=True, text=True
    ).stdout.strip()
    mine,theirs,gone = (own_cache/"plain"/"sub"/f".part-{pid}@{host}@abc" for pid,host in
        ((os.getpid(), platform.node()), (dead, "elsewhere"), (dead, platform.node())))
    for p in (mine, theirs, gone):
        p.mkdir(parents=True)
        (p/"tmp123").write_bytes(b"half")
    fetch("plain")
    assert mine.exists() and theirs.exists() and not gone.exists()


def test_a_full_disk_is_told(home, own_cache, monkeypatch):
    def full(*a): raise OSError(28, "No space left on device")
    monkeypatch.setattr(data.os, "replace", full)
    for name in ("plain", "zipped"):
        with pytest.raises(PermissionError, match="No space left.*RECBOOK_CACHE"):
            fetch(name)
        assert whole_files(own_cache)==[]


@pytest.mark.parametrize(
    "text,says",
    [
        (None, "cannot read"),
        ("[[dataset]", "not a registry"),
        ("x=1", "not a registry"),
        ("[[dataset]]\ntitle='a'", "not a registry"),
        ("[[dataset]]\nname='a'", "'a' lacks 'title'"),
        (b"\xff\xfe", "not a registry"),
        (
            "[[dataset]]\nname='a'\ntitle='a'\nterms=''\ncite=''\nhome=''\n[[dataset.file]]\nname='../x'\nsha256='%s'\nbytes=1\nurl=''"
            % ("0" * 64),
            "outside the cache",
        ),
        (
            "[[dataset]]\nname='a'\ntitle='a'\nterms=''\ncite=''\nhome=''\n[[dataset.file]]\nname='x'\nsha256='abc'\nbytes=1\nurl=''",
            "64 hexadecimal",
        ),
    ],
)
def test_a_missing_or_broken_registry_is_named(tmp_path, monkeypatch, text, says):
    monkeypatch.setattr(datasets, "root", lambda: tmp_path)
    (tmp_path/"data").mkdir()
    if text is not None:
        (tmp_path/"data"/"datasets.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
    for f in (datasets_list, lambda: fetch("a"), lambda: load("a")):
        with pytest.raises(ValueError, match=says) as e:
            f()
        assert "datasets.toml" in str(e.value) and "Fix" in str(e.value)


@pytest.mark.parametrize("name", [None, 3, [], ("a",)])
def test_odd_names_are_refused(name):
    for f in (load, fetch, verify):
        with pytest.raises(ValueError, match="no data set"):
            f(name)


def test_no_home_folder(monkeypatch):
    def no(): raise RuntimeError("Could not determine home directory.")
    monkeypatch.delenv("RECBOOK_CACHE")
    monkeypatch.setattr(data, "_is_checkout", lambda p: False)
    monkeypatch.setattr(Path, "home", no)
    with pytest.raises(ValueError, match="RECBOOK_CACHE"):
        cache_dir()


def test_malformed_line(tmp_path):
    p = tmp_path/"u.data"
    p.write_text("1\t2\n3\n")
    with pytest.raises(ValueError, match="line 2: 1 fields instead of 2") as e:
        data._lines(p, data._fields("\t", int, int))
    assert str(p) in str(e.value) and "'3'" in str(e.value)


loaded = functools.cache(load) # each real set is read once


# the real sets against the counts published with them

COUNTS = { # users, items, all, train, valid, test
    "movielens-100k": (943, 1682, 100_000, 80_000, 0, 20_000),
    "gowalla": (29_858, 40_981, 1_027_370, 810_128, 0, 217_242),
    "coat": (290, 300, 6_960+4_640-366, 6_960, 0, 4_640-366),
    "movielens-1m-diffrec": (5_949, 2_810, 571_531, 403_277, 110_722, 57_532),
    "amazon-beauty": (22_363, 12_101, 198_502),
    "microlens-50k": (50_000, 19_220, 359_708),
    "nbpo-amazon": (1_435, 1_522, 39_975, 31_887, 4_044, 4_044),
    "filmtrust": (1_508, 2_071, 35_494),
    "foursquare-sg": (2_321, 5_596, 98_258, 69_159, 0, 29_099),
    "movielens-latest-small": (610, 9_724, 100_836),
}


@pytest.mark.parametrize("name", COUNTS)
def test_counts(mirror, name):
    x = loaded(name)
    want = COUNTS[name]
    assert (x.n_users, x.n_items, len(x))==want[:3]
    assert len(np.unique(x.user))==x.n_users
    reg = datasets_list().set_index("name").loc[name]
    assert (reg["users"], reg["items"], reg["interactions"])==want[:3]
    if len(want)>3:
        assert tuple(map(len, given_split(x)))==want[3:]
    else:
        assert "split" not in x.df


def test_details(mirror):
    ml = loaded("movielens-100k")
    assert ml.df.rating.value_counts().sort_index().tolist()==[6110, 11370, 27145, 34174, 21201]
    assert ml.users.gender.value_counts().to_dict()==dict(M=670, F=273) and ml.items.title.nunique()==1664
    assert ml.items.loc[0, ["title","year"]].tolist()==["Toy Story (1995)", 1995]
    b = loaded("amazon-beauty")
    assert b.items.asin.is_unique and b.items["words"].map(len).value_counts().to_dict()=={7: 12_101-433, 8: 433}
    assert len(set().union(*b.items.attributes))==637
    assert loaded("microlens-50k").items.title.nunique()==19_133
    f = loaded("foursquare-sg")
    assert (
        f.df.rating.sum() == 156_772
        and f.items.lat.between(1.222, 1.466).all()
        and f.items.lon.between(103.64, 104.01).all()
    )
    assert set(loaded("filmtrust").users.id) - set(range(1, 1509))==set()


def test_beauty_popularity_matches_print(mirror):
    x = loaded("amazon-beauty")
    test = leave_one_out(x).test
    seen = (x.csr() - test.csr()).tocsr()
    pop = -np.bincount(x.item, minlength=x.n_items).astype(float)
    top = np.argsort(pop, kind="stable")[:400]
    hits = []
    for u,i in zip(test.user, test.item):
        own = set(seen.indices[seen.indptr[u]:seen.indptr[u+1]][seen.data[seen.indptr[u]:seen.indptr[u+1]]>0])
        hits.append(i in [t for t in top if t not in own][:10])
    assert round(np.mean(hits), 4)==.0152 # HR@10 of PopRec in the S3-Rec repository


def test_tables(mirror):
    assert len(loaded("filmtrust/trust"))==1_853
    n = loaded("influence-graphs/nethept")
    assert len(n)==32_235 and np.allclose(n.weight, 1/n.groupby("dst").dst.transform("size"), atol=1e-6)
    h = loaded("influence-graphs/higgs")
    assert len(h)==150_818 and h.weight.sum()==171_237 and (h.src==h.dst).sum()==5_353
    assert len(loaded("citation-graphs"))==5_429
    c = loaded("citation-graphs/nodes")
    assert (
        c.label.value_counts().sort_index().tolist() == [298, 418, 818, 426, 217, 180, 351]
        and c["words"].map(len).sum() == 49_216
    )
    for g,(e,r,*n) in dict(fb15k237=(14_541,237,272_115,17_535,20_466), wn18rr=(40_943,11,86_835,3_034,3_134),
                           umls=(135,46,5_216,652,661), kinship=(104,25,8_544,1_068,1_074)).items():
        t = loaded(f"kg-link-prediction/{g}")
        assert pd.concat([t["head"], t["tail"]]).nunique()==e and t.relation.nunique()==r
        assert [int((t.split==s).sum()) for s in ("train","valid","test")]==n and not t["tail"].str.contains("\r").any()
    assert (
        loaded("movielens-100k/kg").shape == (91_631, 3)
        and loaded("movielens-100k/link")["item"].between(0, 1681).all()
    )
    t = loaded("tallrec")
    assert t.groupby("split").output.value_counts().to_dict()=={
        ("valid","Yes."): 658, ("valid","No."): 342, ("test","Yes."): 528, ("test","No."): 472}
    assert len(loaded("goodreads-sprec"))==5_000
    assert loaded("text-classification").groupby("split").label.agg(["size", "sum"]).to_numpy().tolist() == [
        [1_821, 909],
        [6_920, 3_610],
        [872, 444],
    ]
    p = loaded("coat/propensities").propensity
    assert len(p)==87_000 and p.between(.0025, .6903).all()


def test_all_files_of_the_mirror(mirror):
    for name in datasets_list().name:
        assert set(verify(name).status)=={"ok"}


def test_import_is_light():
    import subprocess, sys

    heavy = ('torch', 'transformers', 'datasets', 'matplotlib')
    code = f"import sys, recbook.data; print([m for m in {heavy} if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()=="[]"
