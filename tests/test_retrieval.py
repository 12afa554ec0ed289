"SparCode, filtered search and Online Matching against brute force, scikit-learn, scipy and matrix algebra."
from itertools import product
import numpy as np, pandas as pd, pytest, scipy.sparse as sp, torch
from recbook.collaborative.retrieval import (
    Acorn,
    AllToAll,
    CodeIndex,
    DiagLinUCB,
    FilteredVamana,
    LinUCB,
    PostFilter,
    PreFilter,
    Serf,
    SparCode,
    Ung,
    effort_curve,
    filtered_recall,
    first_distinct,
    passing,
    price,
    simulate,
    sparse_context,
)
from recbook.metrics import recall_at, recalls
from recbook.towers import item_tower, ivf_search, nearest_among, robust_prune, sampled_softmax, vamana, walk
from recbook.world import World


@pytest.fixture(scope="module")
def shop():
    "200 vectors with a label, a number and tags."
    rng = np.random.default_rng(0)
    X = rng.normal(size=(200, 6)).astype(np.float32)
    tags = [frozenset(np.array(list("abcd"))[rng.random(4) < .4]) or frozenset("a") for _ in X]
    return (
        X,
        pd.DataFrame(
            dict(
                kind=rng.choice(["x", "y", "z"], 200, p=[0.6, 0.3, 0.1]), year=rng.integers(1900, 2000, 200), tags=tags
            )
        ),
        rng.normal(size=(15, 6)).astype(np.float32),
    )


def brute(X, Q, ok, k):
    d = np.where(ok, ((Q[:, None]-X)**2).sum(2), np.inf)
    o = np.argsort(d, 1)[:, :k]
    return np.where(np.isfinite(np.take_along_axis(d, o, 1)), o, -1)


# ---- SparCode


@pytest.fixture(scope="module")
def sparcode():
    torch.manual_seed(0)
    m = SparCode([5, 4], [6, 30], d=4, K=3, M=2, N=7, E=AllToAll(4, 5))
    m.b += .2
    x = torch.stack([torch.randint(6, (30,)), torch.arange(30)], 1)
    q = torch.tensor(list(product(range(5), range(4))))
    m.vq.start(m.tokens(q).detach())
    return m.eval(), q, x


def test_index_gives_the_models_scores(sparcode):
    m, q, x = sparcode
    S, read = CodeIndex(m, x).search(q)
    np.testing.assert_allclose(S.toarray(), m(q, x).detach(), atol=1e-5)
    index = CodeIndex(m, x)
    by_hand = [sum((index.scores[z] != 0).sum() for z in zs) for zs in index.rows(q)]
    assert read.tolist() == by_hand


def test_scores_are_a_sum_over_tokens_of_nearest_codes(sparcode):
    m, q, x = sparcode
    t = m.tokens(q).reshape(len(q), 3, 4)
    for i in (0, 7):
        total = 0
        for k in range(3):
            word = torch.cat([C[((t[i, k, 2*p:2*p+2]-C)**2).sum(1).argmin()] for p, C in enumerate(m.vq.C)])
            total = total + torch.relu(m.E(word[None], m.item(x))[0] + m.b)
        torch.testing.assert_close(total, m(q[i:i+1], x)[0], atol=1e-5, rtol=1e-5)


def test_pruning_keeps_the_best_postings(sparcode):
    m, q, x = sparcode
    index = CodeIndex(m, x)
    full, cut = index.scores.toarray(), index.prune(5).scores.toarray()
    for a, b in zip(full, cut):
        np.testing.assert_allclose(np.sort(b)[::-1][:5], np.sort(a)[::-1][:5])
        assert (b > 0).sum() <= 5
    assert index.prune(30).scores.nnz == index.scores.nnz and index.density == (full != 0).mean()
    assert index.prune(5).search(q)[1].max() <= 5*m.K
    with pytest.raises(ValueError, match="R=0"):
        index.prune(0)


def test_the_bias_keeps_the_density_that_was_asked_for():
    from recbook.training import batches, fit, set_seed
    x = torch.arange(200)[:, None]
    for density in (.05, .2):
        set_seed(0)
        m = SparCode([30], [200], d=4, N=8, density=density)
        q = torch.randint(30, (800, 1))
        loader = batches(q, (q[:, 0]*6 + torch.randint(6, (800,))), batch_size=100)
        m.vq.start(m.tokens(q[:100]).detach())
        fit(m, lambda m, b: sampled_softmax(m, b, x), loader, steps=150, lr=.005, device="cpu", progress=False)
        m.settle(x)
        assert CodeIndex(m, x).density == pytest.approx(density, abs=1e-3)
    with pytest.raises(ValueError, match="density=0"):
        SparCode([2], [2], density=0)


def test_unquantised_model_uses_the_tokens_themselves(sparcode):
    m, q, x = sparcode
    m.quantise = False
    a = m(q, x)
    m.quantise = True
    t = m.tokens(q)
    torch.testing.assert_close(a, torch.relu(m.E(t, m.item(x)) + m.b).reshape(20, 3, -1).sum(1))


def test_all_to_all_equals_the_pairwise_perceptron():
    torch.manual_seed(1)
    E = AllToAll(3, 4)
    t, x = torch.randn(5, 3), torch.randn(6, 3)
    W = torch.cat([E.t.weight, E.x.weight, E.tx], 1)
    for i, j in product(range(5), range(6)):
        h = torch.relu(W @ torch.cat([t[i], x[j], t[i]*x[j]]) + E.t.bias)
        torch.testing.assert_close(E(t, x)[i, j], E.out.weight[0] @ h)


def test_recall_at_and_ivf():
    scores = np.array([[3, 2, 1, 0.], [0, 1, 2, 3.]])
    assert recall_at(scores, np.array([[0, 3], [3, 2]]), 2) == .75
    Y = np.random.default_rng(1).normal(size=(300, 5)).astype(np.float32)
    found, touched = ivf_search(Y, Y[:4], k=5, n_lists=6, n_probe=6)
    assert (np.sort(found, 1) == np.sort(np.argsort(-Y[:4] @ Y.T, 1)[:, :5], 1)).all() and (touched == 300).all()
    assert (ivf_search(Y, Y[:4], k=5, n_lists=6, n_probe=1)[1] < 300).all()


def test_requests_are_products_of_tables():
    w = World(3, 60, 40, clicks_per_user=4)
    r = w.requests
    assert r["fields"].shape == (60, 4) and np.array_equal(
        World(3, 60, 40, clicks_per_user=4).requests["logit"], r["logit"]
    )
    same = (r["fields"] == r["fields"][0]).all(1)
    assert np.ptp(r["logit"][same], 0).max() == 0


# ---- filtered search


def test_passing():
    t = pd.DataFrame(dict(a=[1, 2, 3], s=[{"x"}, {"x", "y"}, set()]))
    assert passing(t, {}).all() and passing(t, dict(a=(2, 3))).tolist() == [False, True, True]
    assert passing(t, dict(s={"x", "y"})).tolist() == [False, True, False] and passing(t, dict(a=2, s={"y"})).sum() == 1
    with pytest.raises(ValueError, match="'b'"):
        passing(t, dict(b=1))


def test_nearest_among_is_exact(shop):
    X, _, _ = shop
    rows = np.arange(0, 200, 3)
    nodes, near = nearest_among(X, 4, rows)
    for p, c in zip(nodes, near):
        d = np.linalg.norm(X[rows]-X[p], axis=1)
        assert set(c) == set(rows[np.argsort(d)[1:5]])


def test_robust_prune_keeps_only_what_no_kept_node_covers(shop):
    X, _, _ = shop
    c = nearest_among(X, 60)[1][5]
    kept = robust_prune(X, 5, c, R=99, alpha=1.2)
    dist = lambda a, b: np.linalg.norm(X[a]-X[b])
    for j in c:
        assert j in kept or any(1.2*dist(s, j) <= dist(5, j) for s in kept)
    for n, j in enumerate(kept):
        assert not any(1.2*dist(s, j) <= dist(5, j) for s in kept[:n])
    assert len(robust_prune(X, 5, c, R=3)) == 3
    none = robust_prune(X, 5, c, R=99, may=lambda s, c: np.zeros(len(c), bool))
    assert sorted(none) == sorted(c)


def test_walk_counts_each_distance_once(shop):
    X, _, Q = shop
    G = np.tile(np.arange(200), (200, 1))
    ids, d, evals = walk(X, Q, np.zeros((15, 2), int), 30, lambda q, p: G[p])
    assert (evals == 200).all() and (ids == brute(X, Q, np.ones((15, 200), bool), 30)).all()
    np.testing.assert_allclose(d, np.square(X[ids]-Q[:, None]).sum(2), rtol=1e-5)
    alone = walk(X, Q[:1], np.zeros((1, 1), int), 10, lambda q, p: vamana(X)[p])[0]
    both = walk(X, Q[:2], np.zeros((2, 1), int), 10, lambda q, p: vamana(X)[p])[0]
    assert (alone[0] == both[0]).all()


FILTERS = dict(
    kind=dict(kind="y"),
    until=dict(year=(None, 1940)),
    window=dict(year=(1920, 1960)),
    tags=dict(tags=frozenset("ab")),
    several=dict(kind="x", year=(1950, None)),
    nobody=dict(year=(None, 5)),
)
INDEXES = [
    (PreFilter, {}, FILTERS),
    (PostFilter, {}, FILTERS),
    (Acorn, {}, FILTERS),
    (Acorn, dict(gamma=4), FILTERS),
    (FilteredVamana, dict(column="kind"), ["kind"]),
    (Serf, dict(column="year"), ["until", "nobody"]),
    (Ung, dict(column="tags"), ["tags"]),
]


@pytest.mark.parametrize("make,kwargs,can", INDEXES, ids=lambda v: getattr(v, "__name__", None))
def test_index_obeys_the_filter_and_finds_the_rest(shop, make, kwargs, can):
    X, table, Q = shop
    index = make(X, table, **kwargs)
    for name in can:
        where = [FILTERS[name]]*len(Q)
        ok = passing(table, where[0])
        exact = brute(X, Q, np.tile(ok, (len(Q), 1)), 10)
        for ef in (10, 150):
            found, evals = index.search(Q, where, 10, ef)
            assert found.shape == (15, 10) and ok[found[found >= 0]].all() and (evals <= 200).all()
            for row in found:
                assert len(set(row[row >= 0])) == (row >= 0).sum()
        if ok.any():
            assert filtered_recall(found, exact) == 1 if make is PreFilter else filtered_recall(found, exact) > .95
        else:
            assert (found == -1).all()


def test_specialists_never_evaluate_what_does_not_pass(shop):
    X, table, Q = shop
    for make, kw, name in (
        (FilteredVamana, dict(column="kind"), "kind"),
        (Serf, dict(column="year"), "until"),
        (Ung, dict(column="tags"), "tags"),
    ):
        _, evals = make(X, table, **kw).search(Q, [FILTERS[name]]*len(Q), 10, 500)
        assert evals.max() <= passing(table, FILTERS[name]).sum()


def test_serf_without_any_bound_finds_the_nearest_of_all(shop):
    X, table, Q = shop
    where = [dict(year=(None, None))]*len(Q)
    assert passing(table, where[0]).all()
    found, _ = Serf(X, table, column="year").search(Q, where, 10, 150)
    assert filtered_recall(found, brute(X, Q, np.ones((len(Q), len(X)), bool), 10)) > .95


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a second device")
def test_settling_a_model_on_another_device_than_the_catalogue():
    m, x = SparCode([30], [200], d=4, N=8), torch.arange(200)[:, None]
    m.settle(x)
    here = m.b.item()
    m.cuda().settle(x)
    assert m.b.item() == pytest.approx(here, abs=1e-4)


def test_serf_graph_at_each_time_has_only_living_links(shop):
    X, table, _ = shop
    s = Serf(X, table, column="year", R=6)
    for r in (1, 50, 200):
        alive = (s.born < r) & (r <= s.died) & (s.to >= 0)
        assert alive[:r].sum(1).max() <= 6 and s.to[:r][alive[:r]].max(initial=-1) < r


def test_ung_minimal_supersets():
    table = pd.DataFrame(dict(tags=[frozenset(s) for s in ("a", "ab", "abc", "b", "bd")]))
    u = Ung(np.eye(5, dtype=np.float32), table, column="tags")
    name = lambda g: "".join(sorted(u.sets[g]))
    assert sorted(map(name, u.minimal(frozenset("b")))) == ["b"] and sorted(
        map(name, u.minimal(frozenset("b"), proper=True))
    ) == ["ab", "bd"]
    assert sorted(map(name, u.minimal(frozenset("a"), proper=True))) == ["ab"] and u.minimal(frozenset("z")) == []


def test_filtered_search_refuses_bad_input(shop):
    X, table, Q = shop
    with pytest.raises(ValueError, match="15 queries but 1"):
        PreFilter(X, table).search(Q, [{}])
    with pytest.raises(ValueError, match="200 vectors but 3"):
        PreFilter(X, table[:3])
    with pytest.raises(ValueError, match="NaN"):
        PreFilter(np.full((200, 2), np.nan), table)
    for index, bad in (
        (FilteredVamana(X, table, column="kind"), dict(kind=("x", "y"))),
        (Serf(X, table, column="year"), dict(year=(1950, None))),
        (Ung(X, table, column="tags"), dict(kind="x")),
    ):
        with pytest.raises(ValueError, match="answers"):
            index.search(Q, [bad]*len(Q))


def test_recall_and_effort(shop):
    X, table, Q = shop
    assert filtered_recall(np.array([[1, -1], [5, 6]]), np.array([[1, -1], [6, 7]])) == .75
    assert first_distinct(np.array([[4, 4, -1, 2]]), 3).tolist() == [[4, 2, -1]]
    where = [FILTERS["kind"]]*len(Q)
    exact = PreFilter(X, table).search(Q, where)[0]
    h = effort_curve(PostFilter(X, table), Q, where, exact, efs=(10, 50, 200))
    assert h.recall.is_monotonic_increasing and h.evals.is_monotonic_increasing and h.recall.iloc[-1] >= .95
    assert price(h, 7) == h.evals.iloc[-1] and price(h[:1], 7) == h.evals[0] + 7*(h.recall[0] < .95)


def test_acorn_scans_where_less_than_one_in_gamma_passes(shop):
    X, table, Q = shop
    rare = np.arange(200) < 12
    t = table.assign(rare=rare)
    for gamma, scans in ((12, True), (20, False)):
        found, evals = Acorn(X, t, gamma=gamma).search(Q, [dict(rare=True)]*len(Q), 5)
        assert (evals == 12).all() == scans and rare[found[found >= 0]].all()
    assert (found == brute(X, Q, np.tile(rare, (15, 1)), 5)).mean() > .9

# ---- Online Matching


def test_diag_equals_full_on_axis_aligned_contexts_only():
    rng = np.random.default_rng(0)
    d, f, d2, f2 = DiagLinUCB(4, 5), LinUCB(4, 5), DiagLinUCB(4, 5), LinUCB(4, 5)
    for _ in range(300):
        j, r = rng.integers(4), rng.random()
        one, two = rng.integers(5, size=1), rng.choice(5, 2, replace=False)
        w = rng.random(2)
        for m in (d, f):
            m.update(j, one, w[:1], r)
        for m in (d2, f2):
            m.update(j, two, w, r)
    items, c, w = np.arange(4), np.array([1, 3]), np.array([.4, .6])
    for a, b in zip(d.moments(items, c, w), f.moments(items, c, w)):
        np.testing.assert_allclose(a, b, atol=1e-10)
    assert not np.allclose(d2.moments(items, c, w)[0], f2.moments(items, c, w)[0], atol=1e-3)


def test_linucb_is_ridge_regression():
    from sklearn.linear_model import Ridge
    rng = np.random.default_rng(1)
    W, r = rng.random((40, 3)), rng.random(40)
    m = LinUCB(1, 3)
    for x, y in zip(W, r):
        m.update(0, np.arange(3), x, y)
    theta = Ridge(1., fit_intercept=False).fit(W, r).coef_
    x = rng.random(3)
    mean, var = m.moments(np.array([0]), np.arange(3), x)
    np.testing.assert_allclose(mean[0], theta @ x, atol=1e-10)
    np.testing.assert_allclose(var[0], x @ np.linalg.inv(W.T @ W + np.eye(3)) @ x, atol=1e-10)


@pytest.fixture(scope="module")
def arena():
    rng = np.random.default_rng(0)
    p = rng.random((20, 12))
    return dict(
        p=p,
        c=rng.integers(3, size=(20, 1)),
        x=np.ones((20, 1)),
        cand=[np.sort(rng.choice(12, 6, replace=False)) for _ in range(20)],
        tower=rng.random((20, 12)),
    )


def test_simulation_books_the_regret_of_candidates(arena):
    log = simulate(arena, DiagLinUCB(12, 3), "ucb", 300)
    for r in log.itertuples():
        assert r.item in arena["cand"][r.user] and r.regret == pytest.approx(
            arena["p"][r.user, arena["cand"][r.user]].max() - arena["p"][r.user, r.item]
        )
    assert log.regret.min() >= 0 and log.equals(simulate(arena, DiagLinUCB(12, 3), "ucb", 300))
    tower = simulate(arena, None, "tower", 50)
    assert all(
        r.item == arena["cand"][r.user][arena["tower"][r.user, arena["cand"][r.user]].argmax()]
        for r in tower.itertuples()
    )
    with pytest.raises(ValueError, match="rule='best'"):
        simulate(arena, None, "best", 5)


def test_all_policies_meet_the_same_users_and_delay_keeps_every_event(arena):
    a, b = simulate(arena, DiagLinUCB(12, 3), "ucb", 200), simulate(arena, None, "random", 200)
    assert (a.user == b.user).all()
    m = DiagLinUCB(12, 3)
    simulate(arena, m, "ucb", 200, delay=50)
    assert m.d.sum() == pytest.approx(12*3 + 200)
    still = DiagLinUCB(12, 3)
    simulate(arena, still, "ucb", 200, delay=1000)
    assert (still.d == 1).all()


def test_bandit_finds_the_best_arm():
    day = dict(
        p=np.array([[0.2, 0.8, 0.5]]),
        c=np.zeros((1, 1), int),
        x=np.ones((1, 1)),
        cand=[np.arange(3)],
        tower=np.zeros((1, 3)),
    )
    log = simulate(day, DiagLinUCB(3, 1, 1.), "ucb", 3000)
    assert (log.item.iloc[-500:] == 1).mean() > .95


def test_contexts_and_towers():
    U = np.array([[1., 0], [0, 2.], [1, 1]])
    c, w = sparse_context(U, np.eye(2), 2, .5)
    np.testing.assert_allclose(w.sum(1), 1)
    assert c[0, 0] == 0 and c[1, 0] == 1 and w[2, 0] == pytest.approx(.5)
    rng = np.random.default_rng(0)
    F = rng.normal(size=(30, 4))
    R = sp.csr_matrix(rng.random((50, 30)) < .3, dtype=float).tolil()
    R[:, :5] = 0
    U, V = item_tower(R.tocsr(), F, dim=3)
    assert U.shape == (50, 3) and V.shape == (30, 3) and np.isfinite(V).all()


def test_what_is_not_retrieved_is_no_hit():
    S = np.array([[3., -np.inf, -np.inf], [1, 2, 3]])
    np.testing.assert_allclose(recalls(S, np.array([[0, 1], [-1, -1]]), 2), [.5, np.nan])


def test_padding_does_not_count_in_recall():
    S = np.array([[3., 2, 1, 0], [0, 1, 2, 3]])
    assert recall_at(S, np.array([[0, -1], [0, 3]]), 1) == pytest.approx(2/3)


tb = pd.DataFrame(dict(year=[1., 2, np.nan], n=[1, 2, 3], tags=[{"x"}, {"y"}, {"x", "y"}]))
many = dict(
    p=np.full((2, 3), 0.5),
    c=np.zeros((2, 1), int),
    x=np.ones((2, 1)),
    cand=np.array([[0, 1], [1, 2]]),
    tower=np.zeros((2, 3)),
)
@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: recall_at(np.eye(3), np.array([[0]] * 3), 4), "k=4"),
        (lambda: recall_at(np.eye(3), np.array([[0]] * 3), 0), "k=0"),
        (lambda: recall_at(np.eye(3) * np.nan, np.array([[0]] * 3), 1), "NaN"),
        (lambda: recall_at(np.eye(3), np.array([[3]] * 3), 1), "relevant"),
        (lambda: recall_at(np.eye(3), np.full((3, 2), -1), 1), "relevant"),
        (lambda: recall_at(np.eye(3), np.array([[0]]), 1), "relevant"),
        (lambda: passing(tb, dict(tags="x")), "holds sets"),
        (lambda: passing(tb, dict(n=(3, 1))), "lower bound"),
        (lambda: passing(tb, dict(year=(1, 2))), "missing"),
        (lambda: Serf(np.ones((3, 2), np.float32), tb, column="year"), "missing"),
        (lambda: DiagLinUCB(3, 2, prior=np.ones(3)), "prior"),
        (lambda: DiagLinUCB(3, 2, prior=np.ones((2, 3))), "prior"),
        (lambda: DiagLinUCB(3, 2, alpha=-1), "alpha=-1"),
        *[(lambda t=t: sparse_context(np.eye(3), np.eye(3), 2, t), "temperature") for t in (0, -1, np.nan)],
        (lambda: sparse_context(np.eye(3), np.eye(3), 4), "K=4"),
        *[(lambda e=e: simulate(many, None, "tower", 5, epsilon=e), "epsilon") for e in (5, -1, np.nan)],
        *[
            (lambda q=q: simulate(many | dict(p=np.full((2, 3), q)), None, "tower", 5), "probabilities")
            for q in (1.5, -0.1, np.nan)
        ],
        (lambda: simulate(many, None, "tower", 2.5), "events=2.5"),
        (lambda: simulate(many, None, "tower", 5, delay=0), "delay=0"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_an_index_gives_the_models_modes_back(sparcode):
    m, q, x = sparcode
    m.train()
    m.E.eval()
    found = [k.training for k in m.modules()]
    CodeIndex(m, x).search(q)
    assert [k.training for k in m.modules()] == found and len(set(found)) == 2
    m.eval()


def test_training_gives_the_same_bits_on_one_and_two_threads():
    from recbook.training import batches, fit, set_seed
    g = torch.Generator().manual_seed(0)
    q, x, pos = (
        torch.randint(5, (2000, 2), generator=g),
        torch.stack([torch.randint(6, (500,), generator=g), torch.arange(500)], 1),
        torch.randint(500, (2000,), generator=g),
    )
    def trained(threads):
        torch.set_num_threads(threads)
        set_seed(0)
        m = SparCode([5, 5], [6, 500])
        fit(
            m,
            lambda m, b: sampled_softmax(m, b, x),
            batches(q, pos, batch_size=256),
            steps=10,
            lr=0.01,
            device="cpu",
            progress=False,
        )
        return m.state_dict()
    had = torch.get_num_threads()
    try:
        one, two = trained(1), trained(2)
    finally:
        torch.set_num_threads(had)
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("off", [0., 1e3, 1e4])
def test_a_scan_is_exact_far_from_the_origin(off):
    from recbook.collaborative.retrieval import scan
    rng = np.random.default_rng(0)
    X, Q = ((rng.normal(size=(n, 8)) + off).astype("f4") for n in (400, 5))
    want = np.square(Q.astype(float)[:, None] - X.astype(float)).sum(2).argsort(1)[:, :10]
    assert (scan(X, Q, np.ones((5, 400), bool), 10)[0] == want).all()


def test_no_more_items_are_touched_than_there_are_and_unsigned_scores_rank():
    rng = np.random.default_rng(0)
    X = rng.normal(size=(400, 8)).astype("f4")
    assert (ivf_search(X, X[:10], 10, n_lists=4, n_probe=8)[1] == 400).all()
    assert recalls(np.array([[0, 1, 2]], np.uint8), np.array([[2]]), 1).tolist() == [1]


@pytest.mark.parametrize(
    "where, says",
    [
        (dict(y="1990"), "holds numbers"),
        (dict(y=[1990, 5]), "is no value"),
        (dict(y=None), "is no value"),
        (dict(g=3), "no numbers"),
        (dict(t="a"), "holds sets"),
    ],
)
def test_filters_of_another_kind_are_refused(where, says):
    from recbook.collaborative.retrieval import passing
    table = pd.DataFrame(dict(y=[1990, 1991], g=["a", "b"], t=[None, {"a"}]))
    with pytest.raises(ValueError, match=says):
        passing(table, where)
    assert passing(table[:0], dict(y=(1, None))).tolist() == []


def test_equal_filters_are_evaluated_once_and_queries_must_be_finite(monkeypatch):
    from recbook.collaborative import retrieval as R
    rng = np.random.default_rng(0)
    index, calls, real = (
        R.PreFilter(rng.normal(size=(20, 3)).astype("f4"), pd.DataFrame(dict(y=range(20)))),
        [],
        R.passing,
    )
    monkeypatch.setattr(R, "passing", lambda *a: calls.append(1) or real(*a))
    index.search(np.zeros((5, 3), "f4"), [dict(y=(2, None))]*5, 3)
    assert len(calls) == 1
    with pytest.raises(ValueError, match="queries contain NaN"):
        index.search(np.full((1, 3), np.nan), [{}], 3)
