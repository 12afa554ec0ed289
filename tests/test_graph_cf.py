"Graph collaborative filtering: mechanisms against dense algebra, loops over messages, and autograd."
import json, subprocess, sys
import networkx as nx
import numpy as np, pandas as pd, pytest, scipy.sparse as sp, torch
import torch.nn.functional as F
from recbook.baselines import MF, bpr_loss, popularity, train_bpr, uniform_negatives
from recbook.collaborative.graph_cf import (
    NGCF,
    LightGCN,
    Smooth,
    SymMM,
    adjacency,
    closeness,
    drop_nodes,
    gte,
    path_weights,
    sparse_tensor,
    sym_norm,
)
from recbook.data import Interactions, ratio_split
from recbook.metrics import dot, evaluate, recommend
from recbook.training import set_seed
from recbook.world import World


@pytest.fixture(scope="module")
def train():
    rng = np.random.default_rng(0)
    R = rng.random((12, 9)) < .3
    R[:, 0] |= ~R.any(1)
    R[0] |= ~R.any(0)
    u, i = R.nonzero()
    return Interactions(pd.DataFrame(dict(user=u, item=i)), 12, 9)


@pytest.fixture(scope="module")
def A(train): return sym_norm(adjacency(train))


def dense(A): return torch.from_numpy(A.toarray())


def test_adjacency_is_networkx_normalised_laplacian(train, A):
    B = nx.Graph()
    B.add_nodes_from(range(21))
    B.add_edges_from((u, 12+i) for u, i in zip(train.user.tolist(), train.item.tolist()))
    L = nx.normalized_laplacian_matrix(B, nodelist=range(21)).toarray()
    assert np.eye(21) - L == pytest.approx(A.toarray(), abs=1e-6)


def test_a_node_without_edges_gets_a_zero_row():
    x = Interactions(pd.DataFrame(dict(user=[0, 1], item=[0, 0])), 3, 2)
    A = sym_norm(adjacency(x)).toarray()
    assert np.isfinite(A).all() and not A[2].any() and not A[4].any()


@pytest.mark.parametrize("K", [0, 1, 3])
def test_lightgcn_is_the_mean_of_powers_forwards_and_backwards(A, K):
    set_seed(0)
    m = LightGCN(sparse_tensor(A), 12, dim=5, K=K)
    out = torch.cat(m())
    G = torch.randn_like(out)
    out.backward(G)
    P = sum(torch.linalg.matrix_power(dense(A), k) for k in range(K+1))/(K+1)
    assert torch.allclose(out, P @ m.E0, atol=1e-5) and torch.allclose(m.E0.grad, P.T @ G, atol=1e-5)


def test_single_uses_the_last_layer_only(A):
    m = LightGCN(sparse_tensor(A), 12, dim=5, K=3, single=True)
    assert torch.allclose(torch.cat(m()), torch.linalg.matrix_power(dense(A), 3) @ m.E0, atol=1e-5)


def test_what_another_user_says_in_two_steps(train, A):
    R = train.csr().toarray() # LightGCN, eq. 14
    du, di = R.sum(1), R.sum(0)
    for u, v in [(0, 1), (3, 7), (5, 2)]:
        c = sum(1/di[i] for i in range(9) if R[u, i] and R[v, i])/np.sqrt(du[u]*du[v])
        assert (A @ A)[u, v] == pytest.approx(c, abs=1e-6)


def test_smoothing_gradients_numerically(A):
    S, X = sparse_tensor(A).to(torch.float64), torch.randn(21, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda X: Smooth.apply(S, X, 3), X) and torch.autograd.gradcheck(
        lambda X: SymMM.apply(S, X), X
    )


def test_lightgcn_without_layers_trains_exactly_like_matrix_factorisation(train, A):
    set_seed(1)
    a = MF(12, 9, dim=4)
    b = LightGCN(sparse_tensor(A), 12, dim=4, K=0)
    b.load_state_dict(a.state_dict())
    ha, hb = (train_bpr(m, train, epochs=3, batch_size=8, lr=.05, seed=4, device="cpu", progress=False) for m in (a, b))
    assert np.allclose(ha.loss, hb.loss) and torch.allclose(a.E0, b.E0, atol=1e-6)


@pytest.mark.parametrize(
    "transform, nonlinear, affinity",
    [(True, True, True), (False, True, True), (True, False, True), (False, False, True), (True, True, False)],
)
def test_ngcf_message_by_message(train, A, transform, nonlinear, affinity):
    set_seed(2)
    m = NGCF(sparse_tensor(A), 12, dim=3, K=2, transform=transform, nonlinear=nonlinear, affinity=affinity).eval()
    with torch.no_grad():
        for l in (W for layer in m.layers for W in (layer.W1, layer.W2)):
            if transform:
                l.bias.normal_()
    N = adjacency(train).toarray()
    d = N.sum(1)
    apply = lambda W, x: F.linear(x, W.weight, W.bias) if transform else x
    E, out = m.E0.detach(), [m.E0.detach()]
    for W1, W2 in ((layer.W1, layer.W2) for layer in m.layers):
        rows = []
        for u in range(21): # both transforms act on the summed messages, so that a bias counts once
            nb = [v for v in range(21) if N[u, v]]
            plain = E[u] + sum(E[v]/np.sqrt(d[u]*d[v]) for v in nb)
            product = sum(E[v]*E[u]/np.sqrt(d[u]*d[v]) for v in nb)
            x = apply(W1, plain) + (apply(W2, product) if affinity else 0)
            rows.append(F.leaky_relu(x, .2) if nonlinear else x)
        E = torch.stack(rows).detach()
        out.append(F.normalize(E, dim=1))
    assert torch.allclose(torch.cat(m()).detach(), torch.cat(out, 1), atol=1e-5)


@pytest.mark.parametrize("p", [.1, .3, .5])
def test_node_dropout_silences_senders_and_keeps_the_mean(A, p):
    S = sparse_tensor(A)
    set_seed(0)
    draws = torch.stack([drop_nodes(S, p).to_dense() for _ in range(3000)])
    silent = (draws == 0).all(1) & (dense(A) > 0).any(0)
    assert abs(silent.float().mean().item()/(dense(A) > 0).any(0).float().mean().item() - p) < .02
    for D, gone in zip(draws[:20], silent):
        assert torch.allclose(D, dense(A)*~gone/(1-p)) # whole columns: messages of a node, not to it
    assert torch.allclose(draws.mean(0), dense(A), atol=.05)


def test_gradients_under_node_dropout_are_those_of_the_dropped_graph(A):
    set_seed(0)
    m = NGCF(sparse_tensor(A), 12, dim=4, K=2, message_dropout=0., node_dropout=.5).train()
    G = torch.randn(21, 12)
    set_seed(5)
    (torch.cat(m())*G).sum().backward()
    got = m.E0.grad.clone()
    m.E0.grad = None
    set_seed(5)
    D = drop_nodes(m.A, .5).to_dense()
    E, out = m.E0, [m.E0]
    for layer in m.layers:
        E = F.leaky_relu(layer.W1(D @ E + E) + layer.W2((D @ E)*E), .2)
        out.append(F.normalize(E, dim=1))
    (torch.cat(out, 1)*G).sum().backward()
    assert torch.allclose(got, m.E0.grad, atol=1e-5)


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda A: LightGCN(sparse_tensor(A), 12, K=-1), "K=-1"),
        (lambda A: LightGCN(sparse_tensor(A), 12, K=1.5), "K=1.5"),
        (lambda A: NGCF(sparse_tensor(A), 12, K=-1), "K=-1"),
        *[(lambda A, p=p: NGCF(sparse_tensor(A), 12, node_dropout=p), "node_dropout") for p in (1, -0.1, np.nan)],
        (lambda A: NGCF(sparse_tensor(A), 12, message_dropout=1), "message_dropout=1"),
        (lambda A: drop_nodes(sparse_tensor(A), 1), "p=1"),
        (lambda A: drop_nodes(sparse_tensor(A), -0.5), "p=-0.5"),
        (lambda A: LightGCN(sparse_tensor(A)*np.nan, 12), "transpose"),
        (lambda A: LightGCN(sparse_tensor(sym_norm(A, 1, 0)), 12), "transpose"),
        (lambda A: NGCF(sparse_tensor(sym_norm(A, 1, 0)), 12), "transpose"),
        (lambda A: LightGCN(sparse_tensor(A[:12]), 12), "must be"),
        (lambda A: LightGCN(sparse_tensor(A), 22), "22 users"),
        (lambda A: sym_norm(A[:5]), "square"),
        (lambda A: sym_norm(-A), "negative"),
        (lambda A: path_weights(0), "k=0"),
        (lambda A: path_weights(1.5), "k=1.5"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(A, call, says):
    with pytest.raises(ValueError, match=says):
        call(A)


def test_closeness_of_nobody_is_refused(train):
    with pytest.raises(ValueError, match="none of 0 users"):
        closeness(popularity(train), train, [])


def test_sparse_input_in_any_form_is_the_same_graph(A):
    B = sp.csr_matrix((A > 0).astype(float))
    want = sym_norm(B).toarray()
    rows = [np.r_[B.indices[a:b][::-1], B.indices[a:b][:1]] for a, b in zip(B.indptr, B.indptr[1:])]
    half = [
        np.r_[np.ones(len(r) - 1), np.zeros(1)] if len(r) else np.ones(0) for r in rows
    ]  # unsorted, with a stored zero
    odd = sp.csr_matrix((np.concatenate(half), np.concatenate(rows), np.cumsum([0] + [len(r) for r in rows])), B.shape)
    for X in (odd, B.tocoo(), B.tocsc(), B.tolil()):
        assert np.allclose(sym_norm(X).toarray(), want) and torch.allclose(
            sparse_tensor(X).to_dense(), torch.from_numpy(B.toarray()).float()
        )
        assert len(sparse_tensor(X).values()) == B.nnz
    W = B*.01
    d = np.asarray(W.sum(1)).ravel()
    assert np.allclose(
        sym_norm(W).toarray(), W.toarray() / np.sqrt(np.outer(d, d).clip(1e-12)), atol=1e-6
    )  # light weights are normalised, too


def test_counts_above_two_to_the_24_do_not_tie():
    x = Interactions(pd.DataFrame(dict(user=[0], item=[0])), 1, 2)
    assert popularity(x)(torch.tensor([0])).dtype == torch.float64


@pytest.mark.parametrize("make", [lambda S: NGCF(S, 12, 4, node_dropout=.2), lambda S: LightGCN(S, 12, 4)])
@pytest.mark.parametrize("with_valid", [False, True])
def test_a_trained_model_scores_the_same_twice(train, A, make, with_valid):
    m = make(sparse_tensor(A))
    tr, va, _ = ratio_split(train, .2, .2) if with_valid else (train, None, None)
    train_bpr(m, tr, va, epochs=2, progress=False, device="cpu", k=2)
    assert all(torch.equal(a, b) for a, b in zip(m(), m()))


def test_bpr_loss_by_hand():
    m = MF(2, 3, dim=2)
    E = m.E0.detach().numpy()
    u, i, j = torch.tensor([0, 1]), torch.tensor([2, 0]), torch.tensor([1, 1])
    want = np.mean(
        [
            np.log1p(np.exp(E[a] @ (E[2 + c] - E[2 + b])))
            + 0.3 / 2 * (E[a] @ E[a] + E[2 + b] @ E[2 + b] + E[2 + c] @ E[2 + c])
            for a, b, c in zip(u, i, j)
        ]
    )
    assert bpr_loss(m, (u, i, j), l2=.3).item() == pytest.approx(want, rel=1e-5)


def test_negatives_are_uniform_over_what_was_not_clicked(train):
    sample, R = uniform_negatives(train, 0), train.csr().toarray()
    u = torch.zeros(9000, dtype=torch.long) + 3
    j = sample(u, u)[2].numpy()
    free = np.flatnonzero(R[3] == 0)
    counts = np.bincount(j, minlength=9)
    assert (
        counts[R[3] > 0].sum() == 0 and ((counts[free] - 9000 / len(free)) ** 2 / (9000 / len(free))).sum() < 30
    )  # chi-square, at most 8 degrees of freedom


def test_a_user_with_everything_has_no_negative():
    x = Interactions(pd.DataFrame(dict(user=[0, 0, 1], item=[0, 1, 0])), 2, 2)
    with pytest.raises(ValueError, match="no negative exists"):
        uniform_negatives(x)


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 7])
def test_gte_is_its_recursion(train, k):
    R = train.csr().toarray()
    U, I = np.zeros_like(R), np.eye(9)
    for _ in range(k):
        U, I = R @ I + U, R.T @ U + I
    assert gte(train, k)(torch.arange(12)).numpy() == pytest.approx(U)


def test_gte_counts_paths_of_length_three(train):
    B = nx.Graph()
    B.add_edges_from((("u", u), ("i", i)) for u, i in zip(train.user.tolist(), train.item.tolist()))
    S, R = gte(train)(torch.arange(12)).numpy(), train.csr().toarray()
    for u in range(12):
        for i in range(9):
            walks = sum(B.has_edge(("u", v), ("i", i)) for _, j in B[("u", u)] for _, v in B[("i", j)])
            assert S[u, i] == walks + 3*R[u, i]
    with pytest.raises(ValueError, match="k=0"):
        path_weights(0)


def test_gte_sparse_and_dense_products_agree():
    w = World(0, 300, 2000, clicks_per_user=3)
    x = w.interactions
    R = x.csr()
    thin = Interactions(x.df.iloc[::8], 300, 2000)
    T = thin.csr()
    for data, M in ((x, R), (thin, T)):
        assert gte(data)(torch.arange(300)).numpy() == pytest.approx((M @ M.T @ M + 3*M).toarray())


def test_closeness_is_one_for_gte_and_near_zero_for_noise(train):
    from recbook.metrics import table
    assert closeness(gte(train), train) == pytest.approx(1)
    w = World(1, 60, 80, clicks_per_user=8)
    noise = closeness(table(np.random.default_rng(0).normal(size=(60, 80))), w.interactions)
    assert abs(noise) < .1 and closeness(popularity(w.interactions), w.interactions) > .2
    with pytest.raises(ValueError, match="hops=2"):
        closeness(gte(train), train, hops=2)


def test_training_learns_and_repeats():
    w = World(2, 150, 100, clicks_per_user=12)
    tr, va, te = ratio_split(w.interactions, seed=0)
    A, got = sparse_tensor(sym_norm(adjacency(tr))), []
    for _ in range(2):
        set_seed(0)
        m = LightGCN(A, tr.n_users, dim=16)
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
from recbook.baselines import train_bpr
from recbook.collaborative.graph_cf import LightGCN, adjacency, sparse_tensor, sym_norm
from recbook.training import set_seed
x = World(0, 60, 40, clicks_per_user=6).interactions
set_seed(0); m = LightGCN(sparse_tensor(sym_norm(adjacency(x))), x.n_users, dim=8)
h = train_bpr(m, x, epochs=3, batch_size=64, lr=.05, device="cpu", progress=False)
import json, os, sys; json.dump(h.loss.tolist(), open(sys.argv[1] + os.environ["RANK"], "w"))
''')
    r = subprocess.run(
        [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--multi_gpu",
            "--num_processes",
            "2",
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--main_process_port",
            "0",
            str(tmp_path / "two.py"),
            str(tmp_path / "losses"),
        ],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert r.returncode == 0, r.stderr[-2000:]
    losses = [json.loads((tmp_path/f"losses{k}").read_text()) for k in (0, 1)]
    assert losses[0] == losses[1] and losses[0][-1] < losses[0][0]
