"""Full ranking beside the C++ of `implicit` (extra `peers`), in one run: `pytest
tests/benchmarks/test_ranking_peer.py`, on an otherwise idle machine."""
from time import perf_counter
import numpy as np, pytest, torch
from scipy.sparse import csr_matrix
from recbook.metrics import dot, evaluate

SHAPE, D, K = (29_858, 40_981), 64, 20 # Gowalla's size


def clicks(rng, n):
    "About `n` clicks, popular items more often."
    users, items = rng.integers(SHAPE[0], size=n), (SHAPE[1]*rng.random(n)**3).astype(int)
    return csr_matrix((np.ones(n, np.float32), (users, items)), SHAPE)


def peer(U, I):
    "Fixed vectors as a model of `implicit`."
    base = pytest.importorskip("implicit.cpu.matrix_factorization_base", reason="the extra `peers` is not installed")

    class Fixed(base.MatrixFactorizationBase):
        def __init__(self):
            super().__init__(num_threads=torch.get_num_threads())
            self.user_factors, self.item_factors = U.numpy(), I.numpy()
        def fit(self, *a): pass
        def save(self, *a): pass
        @staticmethod
        def load(*a): pass
    return Fixed()


def test_full_ranking_is_no_slower_than_c_plus_plus(capsys):
    rng = np.random.default_rng(0)
    train, test = clicks(rng, 800_000), clicks(rng, 200_000)
    test = test - test.multiply(train.astype(bool))
    test.eliminate_zeros()
    test.data[:], train.data[:] = 1, 1
    U, I = torch.randn(SHAPE[0], D), torch.randn(SHAPE[1], D)
    model = peer(U, I)
    from implicit.evaluation import ranking_metrics_at_k
    ours, theirs = [], []
    for _ in range(3): # in turn, so that both meet the same machine
        t = perf_counter()
        a = evaluate(dot(U, I), test, train, k=K).mean()
        ours.append(perf_counter() - t)
        t = perf_counter()
        b = ranking_metrics_at_k(model, train, test, K=K, show_progress=False, num_threads=torch.get_num_threads())
        theirs.append(perf_counter() - t)
    assert a[f"ndcg@{K}"] == pytest.approx(b["ndcg"], rel=1e-6)
    ratio = np.median(np.array(ours)/theirs)
    with capsys.disabled():
        print(f"\nours {np.median(ours):.1f} s, implicit {np.median(theirs):.1f} s, ratio {ratio:.2f}")
    assert ratio <= 1.1
