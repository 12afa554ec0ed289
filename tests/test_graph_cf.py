"Graph collaborative filtering: mechanisms against dense algebra, loops over messages, and autograd."
import json, subprocess, sys
import networkx as nx
import numpy as np, pandas as pd, pytest, scipy.sparse as sp, torch
import torch.nn.functional as F
from recbook.collaborative.graph_cf import (MF, NGCF, LightGCN, Smooth, SymMM, adjacency, bpr_loss, closeness, drop_nodes, gte, path_weights, popularity,
                                            sparse_tensor, sym_norm, train_bpr, uniform_negatives)
from recbook.data import Interactions, ratio_split
from recbook.metrics import dot, evaluate, recommend
from recbook.training import set_seed
from recbook.world import World


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    R = rng.random((12, 9)) < .3
    R[:, 0] |= ~R.any(1); R[0] |= ~R.any(0)
    u, i = R.nonzero()
    return Interactions(pd.DataFrame(dict(user=u, item=i)), 12, 9)


@pytest.fixture(scope="module")
def A(train): return sym_norm(adjacency(train))


def dense(A): return torch.from_numpy(A.toarray())


def test_adjacency_is_networkx_normalised_laplacian(train, A):
    B = nx.Graph(); B.add_nodes_from(range(21)); B.add_edges_from((u, 12+i) for u, i in zip(train.user.tolist(), train.item.tolist()))
    L = nx.normalized_laplacian_matrix(B, nodelist=range(21)).toarray()
    assert np.eye(21) - L == pytest.approx(A.toarray(), abs=1e-6)


def test_a_node_without_edges_gets_a_zero_row():
    x = Interactions(pd.DataFrame(dict(user=[0, 1], item=[0, 0])), 3, 2)
    A = sym_norm(adjacency(x)).toarray()
    assert np.isfinite(A).all() and not A[2].any() and not A[4].any()


@pytest.mark.parametrize("K", [0, 1, 3])
def test_lightgcn_is_the_mean_of_powers_forwards_and_backwards(A, K):
    set_seed(0); m = LightGCN(sparse_tensor(A), 12, dim=5, K=K)
    out = torch.cat(m()); G = torch.randn_like(out); out.backward(G)
    P = sum(torch.linalg.matrix_power(dense(A), k) for k in range(K+1))/(K+1)
    assert torch.allclose(out, P @ m.E0, atol=1e-5) and torch.allclose(m.E0.grad, P.T @ G, atol=1e-5)


def test_single_uses_the_last_layer_only(A):
    m = LightGCN(sparse_tensor(A), 12, dim=5, K=3, single=True)
    assert torch.allclose(torch.cat(m()), torch.linalg.matrix_power(dense(A), 3) @ m.E0, atol=1e-5)


def test_smoothing_gradients_numerically(A):
    S, X = sparse_tensor(A).to(torch.float64), torch.randn(21, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda X: Smooth.apply(S, X, 3), X) and torch.autograd.gradcheck(lambda X: SymMM.apply(S, X), X)


def test_lightgcn_without_layers_trains_exactly_like_matrix_factorisation(train, A):
    set_seed(1); a = MF(12, 9, dim=4); b = LightGCN(sparse_tensor(A), 12, dim=4, K=0)
    b.load_state_dict(a.state_dict())
    ha, hb = (train_bpr(m, train, epochs=3, batch_size=8, lr=.05, seed=4, device="cpu", progress=False) for m in (a, b))
    assert np.allclose(ha.loss, hb.loss) and torch.allclose(a.E0, b.E0, atol=1e-6)


@pytest.mark.parametrize("transform, nonlinear, affinity", [(True, True, True), (False, True, True), (True, False, True), (False, False, True), (True, True, False)])
def test_ngcf_message_by_message(train, A, transform, nonlinear, affinity):
    set_seed(2); m = NGCF(sparse_tensor(A), 12, dim=3, K=2, transform=transform, nonlinear=nonlinear, affinity=affinity).eval()
    with torch.no_grad():
        for l in (*m.W1, *m.W2):
            if transform: l.bias.normal_()
    N = adjacency(train).toarray(); d = N.sum(1)
    apply = lambda W, x: F.linear(x, W.weight, W.bias) if transform else x
    E, out = m.E0.detach(), [m.E0.detach()]
    for W1, W2 in zip(m.W1, m.W2):
        rows = []
        for u in range(21): # both transforms act on the summed messages, so that a bias counts once
            nb = [v for v in range(21) if N[u, v]]
            plain = E[u] + sum(E[v]/np.sqrt(d[u]*d[v]) for v in nb)
            product = sum(E[v]*E[u]/np.sqrt(d[u]*d[v]) for v in nb)
            x = apply(W1, plain) + (apply(W2, product) if affinity else 0)
            rows.append(F.leaky_relu(x, .2) if nonlinear else x)
        E = torch.stack(rows).detach(); out.append(F.normalize(E, dim=1))
    assert torch.allclose(torch.cat(m()).detach(), torch.cat(out, 1), atol=1e-5)


def test_node_dropout_drops_rows_and_columns_and_keeps_the_mean(A):
    S = sparse_tensor(A); set_seed(0)
    draws = [drop_nodes(S, .3).to_dense() for _ in range(400)]
    assert all(torch.allclose(D, D.T) for D in draws[:5])
    gone = [(D.sum(1) == 0).float().mean() for D in draws]
    assert np.mean(gone) >= .3
    assert torch.allclose(torch.stack(draws).mean(0), dense(A)*.7, atol=.15) # both ends must stay: (1-p)^2/(1-p)


def test_bpr_loss_by_hand():
    m = MF(2, 3, dim=2); E = m.E0.detach().numpy()
    u, i, j = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([1, 1])
    want = np.mean([np.log1p(np.exp(E[a] @ (E[2+c]-E[2+b]))) + .3/2*(E[a] @ E[a] + E[2+b] @ E[2+b] + E[2+c] @ E[2+c]) for a, b, c in zip(u, i, j)])
    assert bpr_loss(m, (u, i, j), l2=.3).item() == pytest.approx(want, rel=1e-5)


def test_negatives_are_uniform_over_what_was_not_clicked(train):
    sample, R = uniform_negatives(train, 0), train.csr().toarray()
    u = torch.zeros(9000, dtype=torch.long) + 3
    j = sample(u, u)[2].numpy()
    free = np.flatnonzero(R[3] == 0)
    counts = np.bincount(j, minlength=9)
    assert counts[R[3] > 0].sum() == 0 and ((counts[free]-9000/len(free))**2/(9000/len(free))).sum() < 30 # chi-square, at most 8 degrees of freedom


def test_a_user_with_everything_has_no_negative():
    x = Interactions(pd.DataFrame(dict(user=[0, 0, 1], item=[0, 1, 0])), 2, 2)
    with pytest.raises(ValueError, match="no negative exists"): uniform_negatives(x)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_gte_is_its_recursion(train, k):
    R = train.csr().toarray(); U, I = np.zeros_like(R), np.eye(9)
    for _ in range(k): U, I = R @ I + U, R.T @ U + I
    assert gte(train, k)(torch.arange(12)).numpy() == pytest.approx(U)


def test_gte_counts_paths_of_length_three(train):
    B = nx.Graph(); B.add_edges_from((("u", u), ("i", i)) for u, i in zip(train.user.tolist(), train.item.tolist()))
    S, R = gte(train)(torch.arange(12)).numpy(), train.csr().toarray()
    for u in range(12):
        for i in range(9):
            walks = sum(B.has_edge(("u", v), ("i", i)) for _, j in B[("u", u)] for _, v in B[("i", j)])
            assert S[u, i] == walks + 3*R[u, i]
    with pytest.raises(ValueError, match="k=0"): path_weights(0)


def test_gte_sparse_and_dense_products_agree():
    w = World(0, 300, 2000, clicks_per_user=3)
    x = w.interactions; R = x.csr()
    thin = Interactions(x.df.iloc[::8], 300, 2000); T = thin.csr()
    for data, M in ((x, R), (thin, T)): assert gte(data)(torch.arange(300)).numpy() == pytest.approx((M @ M.T @ M + 3*M).toarray())


def test_closeness_is_one_for_gte_and_near_zero_for_noise(train):
    from recbook.metrics import table
    assert closeness(gte(train), train) == pytest.approx(1)
    w = World(1, 60, 80, clicks_per_user=8)
    noise = closeness(table(np.random.default_rng(0).normal(size=(60, 80))), w.interactions)
    assert abs(noise) < .1 and closeness(popularity(w.interactions), w.interactions) > .2
    with pytest.raises(ValueError, match="hops=2"): closeness(gte(train), train, hops=2)


def test_training_learns_and_repeats():
    w = World(2, 150, 100, clicks_per_user=12); tr, va, te = ratio_split(w.interactions, seed=0)
    A, got = sparse_tensor(sym_norm(adjacency(tr))), []
    for _ in range(2):
        set_seed(0); m = LightGCN(A, tr.n_users, dim=16)
        h = train_bpr(m, tr, va, epochs=15, batch_size=256, lr=.02, l2=1e-3, device="cpu", progress=False)
        got.append((h.drop(columns="seconds"), evaluate(dot(*m()), te, tr).mean()))
    assert got[0][0].equals(got[1][0]) and got[0][1].equals(got[1][1])
    chance = 20/100
    assert got[0][1]["recall@20"] > 1.3*chance and h.loss.iloc[-1] < h.loss.iloc[0]


def test_popularity_recommends_the_most_clicked(train):
    top = recommend(popularity(train), np.arange(12), 3)
    counts = np.bincount(train.item, minlength=9)
    assert (top == np.argsort(-counts, kind="stable")[:3]).all()


def test_the_graph_trains_on_two_processes(tmp_path):
    (tmp_path/"two.py").write_text('''
from recbook.world import World
from recbook.collaborative.graph_cf import LightGCN, adjacency, sparse_tensor, sym_norm, train_bpr
from recbook.training import set_seed
x = World(0, 60, 40, clicks_per_user=6).interactions
set_seed(0); m = LightGCN(sparse_tensor(sym_norm(adjacency(x))), x.n_users, dim=8)
h = train_bpr(m, x, epochs=3, batch_size=64, lr=.05, device="cpu", progress=False)
import json, os, sys; json.dump(h.loss.tolist(), open(sys.argv[1] + os.environ["RANK"], "w"))
''')
    r = subprocess.run([sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0", str(tmp_path/"two.py"), str(tmp_path/"losses")], capture_output=True, text=True, timeout=300)
    assert r.returncode == 0, r.stderr[-2000:]
    losses = [json.loads((tmp_path/f"losses{k}").read_text()) for k in (0, 1)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
