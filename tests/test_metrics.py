"Metrics against ranx, scikit-learn, a full sort and closed forms."
import numpy as np, pandas as pd, pytest, torch
from scipy.sparse import csr_array, csr_matrix
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score
from recbook.data import Interactions, leave_one_out, new_pairs
from recbook.metrics import (
    auc,
    coverage,
    diversity,
    dot,
    ece,
    entropy,
    evaluate,
    exposures,
    gauc,
    gini,
    hits,
    individual_unfairness,
    logloss,
    mean_popularity,
    ranking_values,
    recommend,
    table,
    topk,
)


@pytest.fixture(scope="module")
def case():
    rng = np.random.default_rng(1)
    n, m = 80, 120
    test = csr_matrix((rng.random((n, m)) < .05).astype(np.float32))
    seen = csr_matrix(((rng.random((n, m)) < .1) & (test.toarray() == 0)).astype(np.float32))
    return rng.normal(size=(n, m)).astype(np.float32), test, seen


@pytest.mark.parametrize("k", [1, 5, 20])
def test_agrees_with_ranx(case, k):
    ranx = pytest.importorskip("ranx")
    S, test, seen = case
    ours = evaluate(table(S), test, seen, k=k)
    masked = np.where(seen.toarray() > 0, -1e9, S)
    ids = {u: np.argsort(-masked[u], kind="stable") for u in ours.index}
    qrels = ranx.Qrels({str(u): {str(i): 1 for i in test[u].indices} for u in ours.index})
    run = ranx.Run({str(u): {str(i): float(len(ids[u])-r) for r, i in enumerate(ids[u])} for u in ours.index})
    names = {"recall": "recall", "precision": "precision", "hr": "hit_rate", "ndcg": "ndcg", "mrr": "mrr", "map": "map"}
    theirs = ranx.evaluate(qrels, run, [f"{v}@{k}" for v in names.values()])
    theirs = theirs if isinstance(theirs, dict) else {f"{list(names.values())[0]}@{k}": theirs}
    for a, b in names.items():
        assert ours[f"{a}@{k}"].mean() == pytest.approx(theirs[f"{b}@{k}"], abs=1e-6), a


def test_ndcg_agrees_with_sklearn_on_unmasked_lists(case):
    S, test, _ = case
    ours = evaluate(table(S), test, k=10)
    assert ours["ndcg@10"].mean() == pytest.approx(
        ndcg_score(test[ours.index].toarray(), S[ours.index], k=10), abs=1e-6
    )


def test_topk_is_a_stable_sort_even_when_everything_ties():
    rng = np.random.default_rng(0)
    for levels in (1, 2, 5, 1000):
        S = torch.from_numpy(rng.integers(0, levels, (40, 60)).astype(np.float32))
        for k in (1, 10, 60):
            assert torch.equal(topk(S, k), (-S).sort(dim=1, stable=True).indices[:, :k])


def test_seen_items_never_come_back_and_chunks_do_not_matter(case):
    S, _, seen = case
    users = np.arange(len(S))
    a, b = (recommend(table(S - 10), users, 20, seen, chunk=c) for c in (7, 1000))
    assert (a == b).all() and seen[users.repeat(20), a.ravel()].sum() == 0


def test_dense_sparse_and_dot_scorers_agree():
    rng = np.random.default_rng(2)
    U, I = (
        torch.from_numpy(rng.integers(-2, 3, (30, 4)).astype(np.float32)),
        torch.from_numpy(rng.integers(-2, 3, (50, 4)).astype(np.float32)),
    )
    S = (U @ I.T).numpy()
    tops = [recommend(s, np.arange(30), 10) for s in (dot(U, I), table(S), table(csr_matrix(S)))]
    assert (tops[0] == tops[1]).all() and (tops[0] == tops[2]).all()


def test_pointwise_metrics_agree_with_sklearn():
    rng = np.random.default_rng(3)
    p = rng.random(5000).round(2)
    y = (rng.random(5000) < p).astype(int)
    g = rng.integers(0, 40, 5000)
    assert auc(y, p) == pytest.approx(roc_auc_score(y, p))
    assert logloss(y, p) == pytest.approx(log_loss(y, p.clip(1e-7, 1-1e-7)), abs=1e-6)
    by_hand = [(roc_auc_score(y[g == k], p[g == k]), (g == k).sum()) for k in range(40)]
    assert gauc(y, p, g) == pytest.approx(
        np.average([a for a, _ in by_hand], weights=[n for _, n in by_hand]), abs=1e-9
    )
    assert ece(y, p) < .03 and ece(y, np.full(5000, .9)) == pytest.approx(abs(y.mean()-.9))


def test_gini_is_the_mean_absolute_difference():
    x = np.random.default_rng(4).exponential(size=50)
    assert gini(x) == pytest.approx(np.abs(x[:, None]-x).mean()/(2*x.mean()))


def test_diversity_by_brute_force():
    rng = np.random.default_rng(5)
    V = rng.normal(size=(20, 3))
    top = np.array([[1, 5, 7], [2, 9, 4]])
    W = V/np.linalg.norm(V, axis=1, keepdims=True)
    want = [np.mean([1-W[a] @ W[b] for a in l for b in l if a != b]) for l in top]
    assert diversity(top, V) == pytest.approx(want)


def test_beyond_accuracy_edges():
    assert coverage([[0, 0]], 4) == .25 and exposures([[0, 2], [2, 1]], 4).tolist() == [1, 1, 2, 0]
    assert entropy([0, 5]) == 0 and mean_popularity([[0, 1]], [2, 4]).tolist() == [3]
    assert individual_unfairness([0, 1]*5, np.zeros((10, 1)) + np.arange(10)[:, None] % 2, 4) < 1e-9


@pytest.mark.parametrize("call, says", [
    (lambda: topk(torch.zeros(2, 3), 4), "k=4"),
    (lambda: recommend(table(np.full((2, 3), np.nan)), [0], 1), "NaN"),
    (lambda: recommend(table(np.zeros((1, 3))), [0], 2, csr_matrix([[1., 1., 0.]])), "unseen"),
    (lambda: evaluate(table(np.zeros((2, 3))), csr_matrix((2, 3))), "empty"),
    (lambda: ece([0, 1], [0, 2.]), "probabilities"),
    (lambda: gini([-1, 2]), "non-negative"),
    (lambda: gauc([1, 1], [.1, .2], [0, 0]), "both classes")])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    "S",
    [
        np.array([[1.7e9, 1.7e9 + 30, 1.7e9 + 60, 1.7e9 + 10]]),
        np.array([[2**24, 2**24 + 1, 2**24 + 3, 2**24 + 2]]),
        np.array([[1e-30, 2e-30, 4e-30, 3e-30]]) + 1e-46,
        np.array([[1, 5, 9, 7]], np.int8),
        np.array([[False, True, True, False]]),
        np.array([[1, 5, 9, 7]], np.float16),
        np.array([[3, 2**31, 2**32 + 1, 2**32]]),
    ],
)
def test_scores_are_ranked_as_finely_as_they_are_given(S):
    want = np.argsort(-S.astype(np.float64)[0], kind="stable").tolist()
    assert recommend(table(S), [0], 4)[0].tolist() == want
    assert recommend(table(torch.from_numpy(S)), [0], 4)[0].tolist() == want
    if S.dtype != np.float16:
        assert recommend(table(csr_matrix(S)), [0], 4)[0].tolist() == want


def test_whole_numbers_that_no_float_tells_apart_are_refused():
    with pytest.raises(ValueError, match="2\\^53"):
        recommend(table(np.array([[2**60, 2**60+1]])), [0], 1)


@pytest.mark.parametrize("seed", range(20))
def test_ruled_out_items_come_last_and_seen_ones_never(seed):
    rng = np.random.default_rng(seed)
    n, m = 6, 12
    S = rng.integers(0, 3, (n, m)).astype([np.float32, np.float64][seed % 2])
    S[rng.random((n, m)) < .6] = -np.inf
    S[0] = -np.inf
    seen = rng.random((n, m)) < .3
    seen[1] = seen[2] = False
    k = int((~seen).sum(1).min())
    by_hand = [sorted(np.flatnonzero(~seen[u]), key=lambda i: (-S[u, i], i))[:k] for u in range(n)]
    assert recommend(table(S), np.arange(n), k, csr_matrix(seen)).tolist() == np.array(by_hand).tolist()
    with pytest.raises(ValueError, match="unseen items"):
        recommend(table(S), np.arange(n), k+1, csr_matrix(seen))


def odd_forms(M):
    "The same matrix as it must not matter: repeated, unsorted and zero entries; other formats."
    A = csr_matrix(M)
    r, c = M.nonzero()
    rows = [np.r_[c[r == u][::-1], c[r == u][:1], (M[u] == 0).nonzero()[0][:2]] for u in range(len(M))]
    twice = csr_matrix(
        (
            np.concatenate(
                [
                    np.r_[
                        np.ones((r == u).sum() + min(1, (r == u).sum())),
                        np.zeros(len(x) - (r == u).sum() - min(1, (r == u).sum())),
                    ]
                    for u, x in enumerate(rows)
                ]
            ),
            np.concatenate(rows),
            np.cumsum([0] + [len(x) for x in rows]),
        ),
        M.shape,
    )
    return [A, twice, A.tocsc(), A.tocoo(), A.tolil(), csr_array(A)]


def test_the_form_of_sparse_input_does_not_matter():
    rng = np.random.default_rng(0)
    n, m = 30, 40
    T = rng.random((n, m)) < .08
    R = (rng.random((n, m)) < .15) & ~T
    S = rng.normal(size=(n, m))
    want = evaluate(table(S), csr_matrix(T.astype(float)), csr_matrix(R.astype(float)), k=[3, 10])
    for t, r in zip(odd_forms(T.astype(float)), odd_forms(R.astype(float))):
        assert evaluate(table(S), t, r, k=[3, 10]).equals(want)
        assert (
            recommend(table(S), np.arange(n), 5, r) == recommend(table(S), np.arange(n), 5, csr_matrix(R.astype(float)))
        ).all()
        top = recommend(table(S), np.arange(n), 5)
        assert (hits(top, t, np.arange(n)) == np.take_along_axis(T, top, 1)).all()
    for s in odd_forms(np.maximum(S, 0).round(1))[::2]:
        assert evaluate(table(s), csr_matrix(T.astype(float))).equals(
            evaluate(table(s.toarray()), csr_matrix(T.astype(float)))
        )


def test_repeats_are_refused_and_the_two_ways_out_work():
    x = Interactions(
        pd.DataFrame(dict(user=[0] * 5 + [1] * 5, item=[0, 1, 0, 2, 0, 3, 2, 1, 4, 3], time=list(range(5)) * 2)),
        2,
        5,
        allow_duplicates=True,
    )
    train, _, test = leave_one_out(x)
    S = np.zeros((2, 5))
    S[0, 0] = S[1, 3] = 1
    with pytest.raises(ValueError, match="2 of 2 held-out pairs.*new_pairs"):
        evaluate(table(S), test, train, k=2)
    assert evaluate(table(S), test, k=2)["recall@2"].mean() == 1
    mixed = Interactions(pd.DataFrame(dict(user=[0, 0, 1], item=[0, 4, 3])), 2, 5)
    S[0, 4] = 2
    assert evaluate(table(S), new_pairs(mixed, train), train, k=2)["recall@2"].tolist() == [1.]


one = csr_matrix(np.eye(2, 50))
@pytest.mark.parametrize(
    "call, says",
    [
        *[(lambda w=w: evaluate(table(np.random.rand(2, w)), one), "the scorer gives") for w in (40, 70)],
        *[
            (lambda w=w: evaluate(table(np.random.rand(2, w)), one, csr_matrix((2, 50))), "the scorer gives")
            for w in (40, 70)
        ],
        (lambda: evaluate(table(np.random.rand(1, 50)), one), "users .1."),
        (lambda: evaluate(lambda u: torch.rand(50), one), "the scorer gives"),
        (lambda: evaluate(table(np.random.rand(2, 50)), one, csr_matrix((3, 50))), "both must be"),
        (lambda: table(np.zeros(3)), "1 dimensions"),
        *[
            (lambda k=k: evaluate(table(np.random.rand(2, 50)), one, k=k), "k=")
            for k in ([], 2.5, True, [5, 2.5], 0, [None])
        ],
        (lambda: recommend(table(np.random.rand(2, 50)), [0], 2, chunk=0), "chunk=0"),
        (lambda: recommend(table(np.random.rand(2, 50)), [0], 2.0), "k=2.0"),
        (lambda: recommend(table(np.random.rand(2, 50)), [-1], 2), "users"),
        (lambda: recommend(table(np.random.rand(2, 50)), [True, False], 2), "users"),
        (lambda: hits([[60]], one, [0]), "items 60"),
        (lambda: hits([[-1]], one, [0]), "items -1"),
        (lambda: ranking_values([[1, 0]], [1], 3), "k=3"),
        (lambda: ranking_values([[1, 0]], [0], 2), "0 items"),
        (lambda: coverage([[0, 99]], 10), "0..9"),
        (lambda: exposures([[0, -1]], 10), "items -1"),
        (lambda: exposures([[0.5]], 10), "whole numbers"),
        (lambda: mean_popularity([[3]], [1, 2]), "0..1"),
        (lambda: diversity([[0, 3]], np.eye(2)), "0..1"),
        (lambda: diversity([[0]], np.eye(2)), "at least 2"),
        *[(lambda f=f: f([0, 1], [0.5, np.nan]), "NaN") for f in (auc, logloss, ece)],
        (lambda: gauc([0, 1], [0.5, np.nan], [0, 0]), "NaN"),
        *[(lambda f=f: f([0, 1, 1], [[0.5], [0.5], [0.5]]), "one prediction for each") for f in (auc, logloss, ece)],
        *[(lambda f=f: f([0, 0.5], [0.5, 0.5]), "0 or 1") for f in (auc, logloss, ece)],
        *[(lambda f=f: f([], []), "at least one") for f in (auc, logloss, ece)],
        (lambda: logloss([0, 1], [0.5, 1.5]), "sigmoid"),
        (lambda: ece([0, 1], [0.5, 0.5], bins=0), "bins=0"),
        (lambda: ece([0, 1], [0.5, 0.5], bins=2.5), "bins=2.5"),
        (lambda: auc([1, 1], [0.1, 0.2]), "both classes"),
        (lambda: gauc([0, 1], [0.1, 0.2], [0]), "one group"),
        (lambda: gauc([0, 1], [0.1, 0.2], [0, np.nan]), "missing"),
        *[
            (lambda f=f, x=x: f(x), "amounts")
            for f in (gini, entropy)
            for x in ([0, 0], [1, np.nan], [1, np.inf], [-1, 2], [[1, 2]])
        ],
    ],
)
def test_what_would_be_silently_wrong_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_a_stranger_item_is_nobodys_hit():
    with pytest.raises(ValueError, match="0..9"):
        hits([[16]], csr_matrix(([1.], ([1], [6])), (2, 10)), [0])


def test_a_wrapper_with_a_memory_is_not_written_into():
    import functools
    kept, score = {}, table(np.array([[5., 4, 3, 2, 1]]))
    remembered = functools.wraps(score)(lambda u: kept.setdefault(tuple(u.tolist()), score(u)))
    assert recommend(remembered, [0], 2, csr_matrix([[1, 1, 0, 0, 0]])).tolist() == [[2, 3]]
    assert recommend(remembered, [0], 2).tolist() == [[0, 1]]


def test_nobody_is_their_own_neighbour():
    from recbook.metrics import individual_unfairness
    assert individual_unfairness([0, 1, 0, 1], np.zeros((4, 1)), 3) == pytest.approx(2/3)
