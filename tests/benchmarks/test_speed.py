"""Seconds and peak memory at Gowalla's size.

Not part of the test run: `pytest tests/benchmarks`, on an otherwise idle machine.

Uses the real graph when RECBOOK_MIRROR is set, else a random one of the same size.
"""
import json, subprocess, sys
import pytest

GRAPH = """
import os, resource, sys, json, numpy as np, pandas as pd, torch
from time import perf_counter
from recbook.data import Interactions, given_split, load
from recbook.metrics import dot, evaluate
from recbook.baselines import MF, train_bpr
from recbook.collaborative.graph_cf import NGCF, LightGCN, adjacency, sparse_tensor, sym_norm
def graph():
    if os.environ.get("RECBOOK_MIRROR"): s = given_split(load("gowalla")); return s.train, s.test
    rng = np.random.default_rng(0); n, m, e = 29_858, 40_981, 1_100_000
    pairs = np.unique(rng.zipf(1.4, e).clip(max=n*50) % n*m + rng.zipf(1.3, e).clip(max=m*50) % m)
    df = pd.DataFrame(dict(user=pairs // m, item=pairs % m)); held = rng.random(len(df)) < .2
    return Interactions(df[~held], n, m), Interactions(df[held], n, m)
def report(t, base=0):
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20 - base
    print(json.dumps(dict(seconds=t, peak_gib=peak)))
train, test = graph()
base = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss/2**20
"""
EPOCH = (
    GRAPH
    + """
A = sparse_tensor(sym_norm(adjacency(train)))
build = dict(
    MF=lambda: MF(train.n_users, train.n_items),
    NGCF=lambda: NGCF(A, train.n_users),
    LightGCN=lambda: LightGCN(A, train.n_users),
)
model = build[sys.argv[1]]()
h = train_bpr(model, train, epochs=1, batch_size=int(sys.argv[2]), lr=1e-3, l2=1e-4, device="cpu", progress=False)
report(h.seconds.iloc[-1])
"""
)
EVALUATE = GRAPH + '''
U, I = torch.randn(train.n_users, 64), torch.randn(train.n_items, 64)
t = perf_counter(); evaluate(dot(U, I), test, train, k=20); report(perf_counter()-t, base)
'''


def measure(script, *args):
    r = subprocess.run([sys.executable, "-c", script, *map(str, args)], capture_output=True, text=True)
    assert r.returncode == 0, r.stderr[-2000:]
    return json.loads(r.stdout.splitlines()[-1])


@pytest.mark.parametrize("model, batch_size", [("LightGCN", 2048), ("LightGCN", 32768), ("NGCF", 32768), ("MF", 2048)])
def test_one_epoch(model, batch_size, capsys):
    got = measure(EPOCH, model, batch_size)
    with capsys.disabled():
        print(f"\n{model}, batch {batch_size}: {got['seconds']:.1f} s an epoch, peak {got['peak_gib']:.2f} GiB")


def test_full_ranking(capsys):
    got = measure(EVALUATE)
    with capsys.disabled():
        print(f"\nfull ranking of every user at k=20: {got['seconds']:.1f} s, {got['peak_gib']:.2f} GiB above the data")
