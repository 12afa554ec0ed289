"PinSage and LSM-GNN against exact walks, linear solves, networkx, hand-made losses and an exhaustive cache oracle."
import networkx as nx, numpy as np, pandas as pd, pytest, scipy.sparse as sp, torch
from recbook.collaborative import graph_cf as gcf
from recbook.collaborative.graph_cf import (
    UNKNOWN,
    Negatives,
    PinBatches,
    PinSage,
    SharedCache,
    VictimBuffer,
    computation_graph,
    curriculum,
    embed_all,
    hard_negatives,
    max_margin,
    neighbour_batches,
    next_reuse,
    pack,
    pair_ranks,
    personalised_pagerank,
    pin_loss,
    power_law_graph,
    reverse_pagerank,
    scaled_mrr,
    serve,
    successive_pairs,
    top_neighbours,
    unpack,
    visit_counts,
)


@pytest.fixture(scope="module")
def graph():
    "30 items x 20 users, one item without clicks."
    G = (np.random.default_rng(0).random((30, 20)) < .2).astype(np.float32)
    G[np.arange(30), np.arange(30) % 20] = 1
    G[7] = 0
    return sp.csr_matrix(G)


def hop_matrix(graph):
    G = graph.toarray().astype(float)
    return (G/np.maximum(G.sum(1, keepdims=True), 1)) @ (G.T/np.maximum(G.T.sum(1, keepdims=True), 1))


# ---- PinSage


def test_pairs_stay_in_session_and_differ():
    e = pd.DataFrame(dict(user=[0, 0, 0, 0, 1, 1], session=[0, 0, 0, 1, 2, 2], item=[1, 2, 2, 3, 3, 4]))
    q, i = successive_pairs(e)
    assert q.tolist() == [1, 3] and i.tolist() == [2, 4]


@pytest.mark.parametrize("restart,length", [(0., 1), (.3, 3), (.5, 4), (1., 2)])
def test_visits_match_exact_probabilities(graph, restart, length):
    P, p, expected = hop_matrix(graph), np.eye(30), 0
    for _ in range(length):
        p = ((1-restart)*p + restart*np.eye(30)) @ P
        expected = expected + p
    np.fill_diagonal(expected, 0)
    seen = visit_counts(graph, 4000, length, restart, seed=1).toarray()/4000
    np.testing.assert_allclose(seen, expected, atol=.06)
    exact = np.sort(expected, 1)[:, ::-1][:, :5]
    N, alpha = top_neighbours(sp.csr_matrix(expected), 5)
    some = np.arange(30) != 7
    np.testing.assert_allclose(alpha[some], (exact/np.maximum(exact.sum(1, keepdims=True), 1e-12))[some], atol=1e-6)


def test_neighbourhoods_are_normalised_and_padded(graph):
    N, alpha = top_neighbours(visit_counts(graph, 50, 3, seed=0), 25)
    np.testing.assert_allclose(alpha.sum(1), 1, rtol=1e-5)
    assert (N[7] == 7).all() and alpha[7, 0] == 1
    for u in range(30):
        real = N[u][alpha[u] > 0]
        assert len(set(real)) == len(real) and (u == 7 or u not in real) and (N[u][alpha[u] == 0] == u).all()


@pytest.mark.parametrize("K", [1, 2, 3])
def test_layerwise_equals_minibatch(graph, K):
    torch.manual_seed(0)
    N, alpha = top_neighbours(visit_counts(graph, 50, 3), 4)
    X, m = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32), PinSage(6, 16, 8, K=K)
    Z = embed_all(m, X, N, alpha)
    for nodes in (np.array([3]), np.array([7, 2, 29])):
        need, blocks = computation_graph(nodes, N, alpha, K)
        reach = set(nodes)
        for _ in range(K):
            reach |= {v for u in reach for v in N[u]}
        assert set(need) == reach and [len(b[0]) for b in blocks][-1] == len(nodes)
        torch.testing.assert_close(m(torch.from_numpy(X[need]), blocks), Z[nodes], rtol=1e-4, atol=1e-5)


def test_pooling_by_definition(graph):
    torch.manual_seed(0)
    N, alpha = top_neighbours(visit_counts(graph, 50, 3), 4)
    h = torch.randn(30, 6)
    c = PinSage(6, 5, 4, K=1).convs[0]
    M = torch.relu(c.Q(h))
    for u in (2, 7):
        n = sum(float(a)*M[v] for v, a in zip(N[u], alpha[u]))
        want = torch.relu(c.W(torch.cat([h[u], n])))
        got = c(h, torch.tensor([u]), torch.from_numpy(N[[u]]), torch.from_numpy(alpha[[u]]))[0]
        torch.testing.assert_close(got, want/want.norm().clamp(min=1e-12))


def test_no_neighbours_means_features_only(graph):
    torch.manual_seed(0)
    N, alpha = top_neighbours(visit_counts(graph, 50, 3), 4)
    X, m = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32), PinSage(6, 16, 8)
    Z, X2 = embed_all(m, X, N[:, :0], alpha[:, :0]), X.copy()
    X2[5] += 1
    changed = (embed_all(m, X2, N[:, :0], alpha[:, :0]) != Z).any(1)
    assert changed.nonzero().ravel().tolist() == [5]


def test_margin_by_hand():
    pos, neg = torch.tensor([.5, 1.]), torch.tensor([[.45, .7, .1], [1., .95, .2]])
    allowed = torch.tensor([[True, False, True], [True, True, True]])
    assert max_margin(pos, neg, allowed, .1).item() == pytest.approx((.05 + 0 + .1 + .05 + 0)/5, abs=1e-6)
    assert max_margin(pos, neg, allowed & False).item() == 0


@pytest.mark.parametrize("restart", [.15, .5])
def test_pagerank_against_solve_and_networkx(graph, restart):
    P = hop_matrix(graph)
    P[7, 7] = 1
    got = personalised_pagerank(graph, np.arange(30), restart, iters=150)
    np.testing.assert_allclose(got, restart*np.linalg.inv(np.eye(30) - (1-restart)*P), atol=1e-5)
    theirs = nx.pagerank(
        nx.from_numpy_array(P, create_using=nx.DiGraph), 1 - restart, personalization={4: 1}, tol=1e-12, max_iter=1000
    )
    np.testing.assert_allclose(got[4], [theirs[k] for k in range(30)], atol=1e-5)


def test_hard_negatives_are_the_band(graph):
    H = hard_negatives(graph, .1, .3)
    ppr = personalised_pagerank(graph, np.arange(30))
    for q in range(30):
        order = [i for i in np.argsort(-ppr[q], kind="stable") if i != q]
        assert H[q].tolist() == order[2:8] # rank 0 is the query
    with pytest.raises(ValueError, match="band"):
        hard_negatives(graph, 0, .5)


def producer(graph, **kw):
    N, alpha = top_neighbours(visit_counts(graph, 50, 3), 4)
    X = np.random.default_rng(1).normal(size=(30, 6)).astype(np.float32)
    q, i = np.arange(0, 29), np.arange(1, 30)
    p = PinBatches(X, N, alpha, Negatives((q, i), 30, hard_negatives(graph, .1, .5), n_uniform=12, **kw))
    return p, X, N, alpha, torch.from_numpy(q), torch.from_numpy(i)


def test_curriculum_adds_one_an_epoch(graph):
    assert [curriculum(e) for e in (1, 2, 5)] == [0, 1, 4]
    p, *_, q, i = producer(graph, epoch_steps=3)
    assert [p(q[:8], i[:8])[3].shape[1] - 12 for _ in range(9)] == [0]*3 + [1]*3 + [2]*3


def test_batch_masks_known_pairs_and_loss_by_hand(graph):
    p, X, N, alpha, q, i = producer(graph, epoch_steps=1, seed=5)
    p(q, i)
    x, blocks, rows, allowed = p(q, i)
    torch.manual_seed(0)
    m = PinSage(6, 16, 8)
    z, Z = m(x, blocks), embed_all(m, X, N, alpha)
    for r, want in zip(rows[:2], (q, i)):
        torch.testing.assert_close(z[r], Z[want], rtol=1e-4, atol=1e-5)
    back = {tuple(np.round(v.tolist(), 4)): k for k, v in enumerate(Z)}
    shared = [back[tuple(np.round(v.tolist(), 4))] for v in z[rows[2]]]
    hard = [back[tuple(np.round(v.tolist(), 4))] for v in z[rows[3]]]
    total, count = 0., 0
    for k, (a, b) in enumerate(zip(q.tolist(), i.tolist())):
        for c, n in enumerate(shared + [hard[k]]):
            ok = n != a and not (n == a + 1 and a < 29)
            assert bool(allowed[k, c]) == ok
            if ok:
                total, count = total + max(0., float(Z[a] @ Z[n] - Z[a] @ Z[b]) + .1), count + 1
    assert pin_loss(m, (x, blocks, rows, allowed)).item() == pytest.approx(total/count, rel=1e-3)


def test_ranks_by_full_sort():
    rng = np.random.default_rng(0)
    Z = torch.from_numpy(rng.integers(-1, 2, (40, 3)).astype(np.float32)) # many ties
    q, i = rng.integers(40, size=60), rng.integers(40, size=60)
    q, i = q[q != i], i[q != i]
    S = (Z @ Z.T).numpy()
    want = [[j for j in np.argsort(-S[a], kind="stable") if j != a].index(b) + 1 for a, b in zip(q, i)]
    assert pair_ranks(Z, q, i).tolist() == want
    assert scaled_mrr(np.array([1, 11])) == .75


def test_same_seed_same_numbers(graph):
    assert (visit_counts(graph, seed=3) != visit_counts(graph, seed=3)).nnz == 0
    assert (visit_counts(graph, seed=3) != visit_counts(graph, seed=4)).nnz > 0
    a, b = (producer(graph, seed=2)[0] for _ in range(2))
    q = torch.arange(9)
    for x, y in zip(a(q, q+1)[2], b(q, q+1)[2]):
        assert torch.equal(x, y)
    G = power_law_graph(500, seed=1)
    assert all(
        np.array_equal(x, y) for x, y in zip(neighbour_batches(G, 9, 16, seed=2), neighbour_batches(G, 9, 16, seed=2))
    )


# ---- LSM-GNN


@pytest.fixture(scope="module")
def traced():
    G = power_law_graph(600, 8, seed=0)
    return neighbour_batches(G, 40, 8, (4, 3), seed=0), reverse_pagerank(G)


def total(trace, cache, **kw): return pd.DataFrame(list(serve(trace, cache, **kw))).sum()


def test_sampler_requests_neighbours_once():
    G = power_law_graph(300, 6, seed=0)
    trace = neighbour_batches(G, 2*(300//16), 16, (3,), seed=0)
    for b in trace:
        assert len(np.unique(b)) == len(b) <= 16*4
        requested = set(b)
        parents = [v for v in b if set(G[v].indices) & requested] # whose neighbours were drawn
        assert len(parents) >= 16 and all(any(v in G[p].indices for p in parents) or v in parents for v in b)
    with pytest.raises(ValueError, match="n_seeds=400"):
        neighbour_batches(G, 1, 400)


def test_reverse_pagerank_against_networkx():
    G = power_law_graph(80, 5, seed=0)
    theirs = nx.pagerank(nx.from_numpy_array(G.toarray(), create_using=nx.DiGraph), .85, tol=1e-12, max_iter=500)
    np.testing.assert_allclose(reverse_pagerank(G, iters=200), [theirs[k] for k in range(80)], atol=1e-8)


def test_packing_orders_by_time_and_comes_back():
    rng = np.random.default_rng(0)
    tau, gpu, pos = rng.integers(1, 99, 500), rng.integers(0, 8, 500), rng.integers(0, 1 << 20, 500)
    p = pack(tau, gpu, pos)
    for a, b in zip(unpack(p), (tau, gpu, pos)):
        np.testing.assert_array_equal(a, b)
    assert (np.diff(tau[p.argsort()]) >= 0).all() and pack(UNKNOWN, 0, 0) > p.max()


def test_next_reuse_by_definition(traced):
    trace, _ = traced
    tau, gpu, pos = unpack(next_reuse(trace[5:9], 600, t=4, gpus=2))
    for v in range(600):
        uses = [k for k in range(1, 5) if v in trace[4+k]]
        assert tau[v] == (uses[0] if uses else UNKNOWN)
        if uses:
            assert trace[4+uses[0]][pos[v]] == v and gpu[v] == (4+uses[0]) % 2


def fewest_reads(requests, lines):
    "Exhaustive: all contents the cache can have after each request, insertion forced."
    states = {frozenset(): 0}
    for v in requests:
        new = {}
        for held, cost in states.items():
            for o in [held] if v in held else [held | {v}] if len(held) < lines else [held - {x} | {v} for x in held]:
                new[o] = min(new.get(o, 10**6), cost + (v not in held))
        states = new
    return min(states.values())


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("policy", ["look-ahead", "hybrid"])
def test_whole_future_is_belady(seed, policy):
    short = np.random.default_rng(seed).integers(8, size=40)
    for lines in (1, 2, 3, 5):
        c = SharedCache(8, lines, policy, np.arange(8.), gpus=1, ways=lines)
        assert total([np.array([v]) for v in short], c, window=40).reads == fewest_reads(short.tolist(), lines)


def test_lru_by_hand():
    trace = [np.array([v]) for v in (0, 1, 2, 0, 3, 0, 1)] # 3 lines: 3 evicts 1, the last 1 is read again
    got = [c["reads"] for c in serve(trace, SharedCache(4, 3, "lru", gpus=1, ways=3))]
    assert got == [1, 1, 1, 0, 1, 0, 1]


@pytest.mark.parametrize("policy", SharedCache.policies)
def test_every_request_is_counted_and_capacity_holds(traced, policy):
    trace, hot = traced
    cache = SharedCache(600, 64, policy, hot, gpus=2, ways=4)
    for t, c in enumerate(serve(trace, cache, 4, 40)):
        assert c["requested"] == len(trace[t]) == c["local"] + c["peer"] + c["pvp"] + c["reads"]
        held = np.flatnonzero(cache.slot >= 0)
        assert len(held) <= 64 and len(np.unique(cache.slot[held])) == len(held)
        if policy != "static":
            assert (cache.tags.ravel()[cache.slot[held]] == held).all() and (cache.tags >= 0).sum() == len(held)
            assert (cache.set_of[held] == cache.slot[held]//4).all() and (held % 2 == cache.slot[held]//32).all()
    if policy == "static":
        assert set(held) == set(np.argsort(-hot)[:64])


@pytest.mark.parametrize("W", [1, 3, 6])
def test_never_sees_beyond_the_window(traced, W):
    trace, hot = traced
    run = lambda tr: [c["reads"] for c in serve(tr, SharedCache(600, 64, "hybrid", hot, ways=4), W, 30)]
    assert run(trace)[:21-W] == run(trace[:20] + trace[:19:-1])[:21-W]


def test_ring_drops_unknown_and_overflow():
    b = VictimBuffer(2, 3)
    b.put(np.arange(6), pack(np.array([1, 1, 1, 1, UNKNOWN, 2]), 0, np.arange(6)+10))
    b.put(np.array([9]), pack(np.array([1]), 0, np.array([9]))) # already full
    assert b.take().tolist() == [[0, 10], [1, 11], [2, 12]]
    assert b.take().tolist() == [[5, 15]] and not len(b.take()) and not len(b.take())


def test_victims_save_reads_and_lookahead_beats_lru(traced):
    trace, hot = traced
    new = lambda p="hybrid": SharedCache(600, 64, p, hot, ways=4)
    without, with_ = total(trace, new(), window=6), total(trace, new(), window=6, pvp=600)
    assert with_.reads < without.reads and with_.pvp == without.reads - with_.reads
    assert total(trace, new("look-ahead"), window=6).reads < total(trace, new("lru")).reads


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="policy='belady'"):
        SharedCache(9, 4, "belady", ways=2)
    with pytest.raises(ValueError, match="hotness"):
        SharedCache(9, 4, "hybrid", ways=2)
    with pytest.raises(ValueError, match="lines=5"):
        SharedCache(9, 5, "lru", ways=2)


def odd(G):
    "The same graph with unsorted entries and stored zeros."
    empty = [np.setdiff1d(np.arange(G.shape[1]), G.indices[a:b])[:1] for a, b in zip(G.indptr, G.indptr[1:])]
    rows = [np.r_[e, G.indices[a:b][::-1]] for e, a, b in zip(empty, G.indptr, G.indptr[1:])]
    data = [np.r_[np.zeros(len(e)), np.ones(b-a)] for e, a, b in zip(empty, G.indptr, G.indptr[1:])]
    return sp.csr_matrix((np.concatenate(data), np.concatenate(rows), np.cumsum([0] + [len(r) for r in rows])), G.shape)


def test_the_form_of_a_graph_does_not_matter():
    rng = np.random.default_rng(0)
    G = sp.csr_matrix((rng.random((15, 20)) < .2).astype(np.float32))
    G[3] = 0
    G.eliminate_zeros()
    X = odd(G)
    assert (gcf.visit_counts(X) != gcf.visit_counts(G)).nnz == 0 and np.allclose(
        gcf.personalised_pagerank(X, np.arange(15)), gcf.personalised_pagerank(G, np.arange(15))
    )
    H = (G @ G.T).tocsr()
    H.sort_indices()
    assert np.allclose(gcf.reverse_pagerank(H.tocoo()), gcf.reverse_pagerank(H))
    C = gcf.visit_counts(G)
    D = sp.csr_matrix((np.r_[C.data, [0.]], np.r_[C.indices, [5]], np.r_[C.indptr[:-1], [C.nnz+1]]), C.shape)
    for a, b in zip(gcf.top_neighbours(D, 3), gcf.top_neighbours(C, 3)):
        assert (a == b).all()
    with pytest.raises(ValueError, match="node 3 has no neighbour"):
        gcf.random_neighbour(G, np.array([1, 3]), rng)


@pytest.mark.parametrize(
    "trace, kw, says",
    [
        ([np.array([0, -1])], {}, "distinct"),
        ([np.array([0, 0])], {}, "distinct"),
        ([np.array([0, 99])], {}, "distinct"),
        ([np.array([0.5])], {}, "distinct"),
        ([np.array([0])], dict(window=4, pvp=3), "pvp=3"),
        ([np.array([0])], dict(window=0, pvp=3), "pvp=3"),
        ([np.array([0])], dict(window=1.5), "window=1.5"),
    ],
)
def test_serving_refuses_what_it_cannot_serve(trace, kw, says):
    with pytest.raises(ValueError, match=says):
        list(gcf.serve(trace, gcf.SharedCache(20, 8, "lru", gpus=2, ways=2), **kw))
