"Metrics against ranx, scikit-learn, a full sort and closed forms."
import numpy as np, pytest, torch
from scipy.sparse import csr_matrix
from sklearn.metrics import log_loss, ndcg_score, roc_auc_score
from recbook.metrics import (auc, coverage, diversity, dot, ece, entropy, evaluate, exposures, gauc, gini, individual_unfairness, logloss,
                             mean_popularity, recommend, table, topk)


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
    for a, b in names.items(): assert ours[f"{a}@{k}"].mean() == pytest.approx(theirs[f"{b}@{k}"], abs=1e-6), a


def test_ndcg_agrees_with_sklearn_on_unmasked_lists(case):
    S, test, _ = case
    ours = evaluate(table(S), test, k=10)
    assert ours["ndcg@10"].mean() == pytest.approx(ndcg_score(test[ours.index].toarray(), S[ours.index], k=10), abs=1e-6)


def test_topk_is_a_stable_sort_even_when_everything_ties():
    rng = np.random.default_rng(0)
    for levels in (1, 2, 5, 1000):
        S = torch.from_numpy(rng.integers(0, levels, (40, 60)).astype(np.float32))
        for k in (1, 10, 60): assert torch.equal(topk(S, k), (-S).sort(dim=1, stable=True).indices[:, :k])


def test_seen_items_never_come_back_and_chunks_do_not_matter(case):
    S, _, seen = case
    users = np.arange(len(S))
    a, b = (recommend(table(S - 10), users, 20, seen, chunk=c) for c in (7, 1000))
    assert (a == b).all() and seen[users.repeat(20), a.ravel()].sum() == 0


def test_dense_sparse_and_dot_scorers_agree():
    rng = np.random.default_rng(2)
    U, I = torch.from_numpy(rng.integers(-2, 3, (30, 4)).astype(np.float32)), torch.from_numpy(rng.integers(-2, 3, (50, 4)).astype(np.float32))
    S = (U @ I.T).numpy()
    tops = [recommend(s, np.arange(30), 10) for s in (dot(U, I), table(S), table(csr_matrix(S)))]
    assert (tops[0] == tops[1]).all() and (tops[0] == tops[2]).all()


def test_pointwise_metrics_agree_with_sklearn():
    rng = np.random.default_rng(3)
    p = rng.random(5000).round(2); y = (rng.random(5000) < p).astype(int); g = rng.integers(0, 40, 5000)
    assert auc(y, p) == pytest.approx(roc_auc_score(y, p))
    assert logloss(y, p) == pytest.approx(log_loss(y, p.clip(1e-7, 1-1e-7)), abs=1e-6)
    by_hand = [(roc_auc_score(y[g == k], p[g == k]), (g == k).sum()) for k in range(40)]
    assert gauc(y, p, g) == pytest.approx(np.average([a for a, _ in by_hand], weights=[n for _, n in by_hand]), abs=1e-9)
    assert ece(y, p) < .03 and ece(y, np.full(5000, .9)) == pytest.approx(abs(y.mean()-.9))


def test_gini_is_the_mean_absolute_difference():
    x = np.random.default_rng(4).exponential(size=50)
    assert gini(x) == pytest.approx(np.abs(x[:, None]-x).mean()/(2*x.mean()))


def test_diversity_by_brute_force():
    rng = np.random.default_rng(5); V = rng.normal(size=(20, 3)); top = np.array([[1, 5, 7], [2, 9, 4]])
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
    with pytest.raises(ValueError, match=says): call()
