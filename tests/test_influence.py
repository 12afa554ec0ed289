"influence: invariants against independent oracles."
import copy
import numpy as np, pytest, torch
from lightgbm import LGBMClassifier, LGBMRegressor
from scipy.optimize import minimize
from scipy.special import expit
from sklearn.datasets import load_breast_cancer, load_diabetes, load_wine
from sklearn.ensemble import GradientBoostingClassifier, GradientBoostingRegressor
from torch import nn
from recbook.gradients import dense, flatten, ggn_vp, params_of, per_sample_grads, unflatten
from recbook import gradients as G_
from recbook.trust import influence as I

light = dict(
    n_estimators=15, num_leaves=6, min_child_samples=5, verbose=-1, n_jobs=1, deterministic=True, force_row_wise=True
)
close = np.testing.assert_allclose


def double(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.fixture(scope="module")
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


@pytest.fixture(scope="module")
def data(): return double(30, 4), torch.randint(3, (30,), generator=torch.Generator().manual_seed(1))


class Tagger(nn.Module):
    "A label for each token: layers without and with bias, mixing over time, so that tokens meet."
    def __init__(self):
        super().__init__()
        self.up,self.out = nn.Linear(4, 6, bias=False),nn.Linear(6, 3)
    def forward(self, x): return self.out(torch.tanh(self.up(x).cumsum(1)))


def sequences(n=20, length=5, pad=0):
    x, y = double(n, length, 4), torch.randint(3, (n, length), generator=torch.Generator().manual_seed(2))
    y[: n//2, -2:] = -100
    return torch.cat([x, 7*torch.ones(n, pad, 4).double()], 1), torch.cat([y, torch.full((n, pad), -100)], 1)


def tagger():
    torch.manual_seed(0)
    return Tagger().double()


TAGS = I.Task(mask=lambda b: b[1] >= 0)


# linear models: influence is what retraining does

@pytest.mark.parametrize("method", ["hessian", "ggn", "ekfac"])
def test_ridge_equals_retraining(method):
    X, y, l2 = double(50, 4), double(50, 1, seed=1), .1
    fit = lambda w: torch.linalg.solve((X*w[:, None]).T @ X/50 + l2*torch.eye(4).double(), (X*w[:, None]).T @ y/50)
    lin = nn.Linear(4, 1, bias=False).double()
    with torch.no_grad():
        lin.weight.copy_(fit(torch.ones(50).double()).T)
    loss = lambda w: .5*(X[:6] @ fit(w) - y[:6])[:, 0]**2
    e, one = 1e-4, torch.eye(50).double()
    real = torch.stack([(loss(1 - e*one[i]) - loss(1 + e*one[i]))/(2*e) for i in range(50)])
    task = I.Task(kind="squares")
    factors = I.ekfac_factors(lin, task, (X, y), labels="exact") if method == "ekfac" else None
    got = I.influence(lin, (X, y), (X[:6], y[:6]), task, method, damping=l2, factors=factors)
    close(got, real, rtol=1e-4, atol=1e-8)


def test_logistic_regression_equals_retraining():
    X, y, l2 = double(60, 3).numpy(), (np.arange(60) % 3 > 0).astype(int), .05
    def fit(w):
        v = np.zeros(3)
        for _ in range(20):
            p = expit(X @ v)
            v = v - np.linalg.solve((X*(w*p*(1-p))[:, None]).T @ X/60 + l2*np.eye(3), X.T @ (w*(p - y))/60 + l2*v)
        return v
    v = fit(np.ones(60))
    loss = lambda w: np.logaddexp(0, X[:5] @ fit(w)) - y[:5]*(X[:5] @ fit(w))
    real = np.array([(loss(1 - 1e-4*np.eye(60)[i]) - loss(1 + 1e-4*np.eye(60)[i]))/2e-4 for i in range(60)])
    close(I.head_influence(X, y, v, l2, X[:5], y[:5]), real, rtol=1e-4, atol=1e-8)
    lin = nn.Linear(3, 1, bias=False).double()
    with torch.no_grad():
        lin.weight.copy_(torch.tensor(v)[None])
    task = I.Task(lambda m, b: torch.cat([torch.zeros_like(z := m(b[0])), z], 1))
    tensors = torch.tensor(X), torch.tensor(y)
    close(
        I.influence(lin, tensors, tuple(t[:5] for t in tensors), task, "hessian", damping=l2),
        real,
        rtol=1e-4,
        atol=1e-8,
    )


# curvature

@pytest.mark.parametrize("kind", ["classes", "squares"])
def test_gauss_newton_matrix(net, data, kind):
    task, batch = I.Task(kind=kind), data if kind == "classes" else (data[0], double(30, 3))
    theta = params_of(net)
    G = dense(
        lambda v: ggn_vp(net, task.outputs, lambda y, b: I.row_losses(y, b[1], kind).mean(), batch, v, theta),
        flatten(theta),
    )
    close(I.ggn_matrix(net, task, batch, theta), G, atol=1e-10)
    V = double(4, len(G))
    close(I.ggn_products(net, task, batch, theta, V), V @ G, atol=1e-10)
    B = G_.blocks(theta)
    assert B[:25, :25].all() and not B[:25, 25:].any() and B[25:, 25:].all()


def block(model, task, batch, layer, labels):
    "Rows of one layer's pseudo-gradients and their exact block."
    R = torch.cat(
        [I.weight_grads(io[layer]) for io in I.layer_grads(model, task, batch, I.linear_layers(model), labels)]
    )
    return R, torch.einsum("noi,npj->oipj", R, R)/len(batch[0])


@pytest.mark.parametrize("layer", ["0", "2"])
def test_corrected_eigenvalues_are_the_diagonal_in_the_basis(net, data, layer):
    f = I.ekfac_factors(net, I.Task(), data, labels="exact")[layer]
    for Q in (f.Q_A, f.Q_S):
        close(Q.T @ Q, np.eye(len(Q)), atol=1e-10)
    _, B = block(net, I.Task(), data, layer, "exact")
    turned = torch.einsum("oipj,oa,ib,pc,jd->abcd", B, f.Q_S, f.Q_A, f.Q_S, f.Q_A)
    close(torch.einsum("abab->ab", turned), f.Lambda, atol=1e-12)
    plain = I.ekfac_factors(net, I.Task(), data, labels="exact", basis=False)[layer]
    close(torch.einsum("oioi->oi", B), plain.Lambda, atol=1e-12)
    assert (f.Lambda - torch.outer(f.L_S, f.L_A)).abs().max() > 1e-3*f.Lambda.max()
    err = lambda L: (torch.diag(L.flatten()) - turned.flatten(2).flatten(0, 1)).norm()
    assert err(f.Lambda) < err(torch.outer(f.L_S, f.L_A)) # optimal in its basis


def test_with_one_example_ekfac_is_exact(net, data):
    one = tuple(x[:1] for x in data)
    for k, f in I.ekfac_factors(net, I.Task(), one, labels="exact").items():
        _, B = block(net, I.Task(), one, k, "exact")
        W = double(*f.Lambda.shape)
        exact = torch.linalg.solve(B.flatten(2).flatten(0, 1) + .1*torch.eye(W.numel()).double(), W.flatten())
        for m in ("ekfac", "kfac"):
            close(I.precondition(f, W, m, .1).flatten(), exact, atol=1e-8)


def test_kfac_inverts_the_kronecker_product(net, data):
    f = I.ekfac_factors(net, I.Task(), data, labels="data")["2"]
    W = double(*f.Lambda.shape)
    a, s = next(I.layer_grads(net, I.Task(), data, I.linear_layers(net)))["2"]
    A, S = a[:, 0].T @ a[:, 0]/30, s[:, 0].T @ s[:, 0]/30
    close(
        I.precondition(f, W, "kfac", 0.01).flatten(),
        torch.linalg.solve(torch.kron(S, A) + 0.01 * torch.eye(W.numel()).double(), W.flatten()),
        atol=1e-8,
    )
    lam = .1*f.Lambda.mean()
    close(I.precondition(f, W), I.precondition(f, W, damping=lam))


def test_squares_are_those_of_sequences_not_of_tokens():
    m, batch = tagger(), sequences()
    F = I.ekfac_factors(m, TAGS, batch, labels="data")
    theta = params_of(m)
    g = per_sample_grads(m, TAGS.mean, batch, theta)
    plain = I.ekfac_factors(m, TAGS, batch, labels="data", basis=False)["up"].Lambda
    close(plain, unflatten(g, theta)["up.weight"].square().mean(0), atol=1e-10)
    R = unflatten(g, theta)["up.weight"]
    close(F["up"].Lambda, (F["up"].Q_S.T @ R @ F["up"].Q_A).square().mean(0), atol=1e-10)
    a, s = next(I.layer_grads(m, TAGS, batch, I.linear_layers(m)))["up"]
    by_token = torch.einsum("nto,nti->oi", s**2, a**2)/len(a)
    assert (by_token - plain).abs().max() > .05*by_token.max()


def test_padding_changes_nothing():
    m = tagger()
    for x, y in zip(
        I.ekfac_factors(m, TAGS, sequences(), labels="data").values(),
        I.ekfac_factors(m, TAGS, sequences(pad=3), labels="data").values(),
    ):
        close(x.Lambda, y.Lambda, atol=1e-10)
        close(x.L_A, y.L_A, atol=1e-10)
        close(x.L_S, y.L_S, atol=1e-10)
        assert x.length == y.length


def test_drawn_labels_give_the_exact_factors_on_average(net, data):
    many = tuple(torch.cat([x]*400) for x in data)
    fit = lambda l: I.ekfac_factors(net, I.Task(), many, labels=l, batch_size=4000, basis=False)["0"].Lambda
    close(fit("model"), fit("exact"), rtol=.15, atol=2e-3)


# scores

def test_scores_split_and_compress():
    m, batch = tagger(), sequences()
    query = tuple(x[:4] for x in batch)
    F = I.ekfac_factors(m, TAGS, batch, labels="data")
    V = I.preconditioned(m, batch, query, TAGS, "ekfac", factors=F)
    thin = {k: I.low_rank(v, min(v.shape[1:])) for k, v in V.items()}
    run = lambda V=V, **kw: I.pair_scores(m, TAGS, batch, V, **kw)
    whole = run()
    assert whole.shape == (20, 4)
    close(I.influence(m, batch, query, TAGS, factors=F)*20, whole, atol=1e-12)
    close(run(by="layer").sum(0), whole, atol=1e-12)
    close(run(by="token").sum(1), whole, atol=1e-12)
    close(run(thin), whole, atol=1e-10)
    close(run(thin, by="token").sum(1), whole, atol=1e-10)
    close(run(batch_size=3), whole, atol=1e-10)
    g = lambda b: per_sample_grads(m, TAGS.mean, b).detach()
    close(I.influence(m, batch, query, TAGS, "dot"), g(batch) @ g(query).T/20, atol=1e-12)


def test_whole_matrix_methods_agree_with_dense_solves(net, data):
    theta, task = params_of(net), I.Task()
    g = per_sample_grads(net, task.mean, data, theta).detach()
    G = I.ggn_matrix(net, task, data, theta).detach()
    exact = (g @ torch.linalg.solve(G + .05*torch.eye(len(G)).double(), g[:3].T)/30).numpy()
    query = tuple(x[:3] for x in data)
    close(I.influence(net, data, query, method="ggn", damping=.05), exact, atol=1e-10)
    cg = G_.solve_curvature(net, task, data, theta, g[:3], damping=.05, dense_below=1) # by conjugate gradients
    close(g @ cg.T/30, exact, atol=1e-5)
    got = g @ I.lissa(net, task, data, theta, g[:3], .05, steps=800).T
    assert I.agreement(got, exact).min() > .99
    only = I.influence(net, data, query, method="ggn", damping=.05, modules=["2"])
    some = params_of(net, ["2.weight", "2.bias"])
    s = per_sample_grads(net, task.mean, data, some)
    close(only, s @ G_.solve_curvature(net, task, data, some, s[:3], damping=.05).T/30)


def test_pbrf_is_the_brute_force_minimum_and_gauss_newton_its_derivative(net, data):
    theta, task, lam, n = params_of(net), I.Task(), .05, 30
    p0, y0 = flatten(theta).detach().clone(), net(data[0]).detach()
    def objective(v, eps):
        v = torch.tensor(v, requires_grad=True)
        m = I.Bound(net, unflatten(v, theta))
        f = (
            (y0.softmax(1) * (y0.log_softmax(1) - m(data[0]).log_softmax(1))).sum() / n
            + eps * task.losses(m, tuple(x[3:4] for x in data))[0]
            + lam / 2 * ((v - p0) ** 2).sum()
        )
        return f.item(), torch.autograd.grad(f, v)[0].numpy()
    def fall(eps):
        v = minimize(
            objective, p0.numpy(), (eps,), "L-BFGS-B", jac=True, options=dict(maxiter=5000, ftol=1e-16, gtol=1e-11)
        ).x
        return (
            (task.losses(net, data) - task.losses(I.Bound(net, unflatten(torch.tensor(v), theta)), data))
            .detach()
            .numpy()
        )
    close(I.pbrf(net, task, data, data, [3], lam)[0], fall(1/n), atol=1e-6)
    slope = (fall(1e-4) - fall(-1e-4))/2e-4
    close(I.influence(net, data, data, method="ggn", damping=lam)[3]*n, slope, atol=1e-4*np.abs(slope).max() + 1e-6)


def test_factors_leave_the_model_as_it_was(net, data):
    before = copy.deepcopy(net.state_dict())
    I.influence(net, data, data)
    assert all((before[k] == v).all() for k, v in net.state_dict().items()) and not net[0]._forward_hooks


# kronfluence

def kron(model, task, loss, train, query, tmp, mask=None, **kw):
    pytest.importorskip("kronfluence")
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments, ScoreArguments
    from kronfluence.task import Task
    from torch.utils.data import TensorDataset
    class Its(Task):
        def compute_train_loss(self, batch, model, sample=False): return loss(model, batch)
        def compute_measurement(self, batch, model): return loss(model, batch)
        def get_influence_tracked_modules(self): return None
        def get_attention_mask(self, batch): return mask(batch) if mask else None
    t = Its()
    an = Analyzer(
        "t", prepare_model(copy.deepcopy(model).float(), t), t, cpu=True, output_dir=str(tmp), disable_tqdm=True
    )
    one = lambda b: TensorDataset(*(x.float() if x.is_floating_point() else x for x in b))
    an.fit_all_factors(
        "f", one(train), per_device_batch_size=8, factor_args=FactorArguments("ekfac", use_empirical_fisher=True)
    )
    an.compute_pairwise_scores(
        "s",
        "f",
        one(query),
        one(train),
        per_device_query_batch_size=4,
        per_device_train_batch_size=8,
        score_args=ScoreArguments(damping_factor=None),
    )
    return an.load_pairwise_scores("s")["all_modules"].T.numpy()


@pytest.mark.parametrize("which", ["rows", "sequences"])
def test_equal_to_kronfluence(which, net, data, tmp_path):
    """The library does not divide by the number of rows and cannot sum over all labels; with the data's labels all else
    is the same."""
    model, task, batch, mask = (
        (net, I.Task(), data, None) if which == "rows" else (tagger(), TAGS, sequences(pad=2), TAGS.mask)
    )
    query = tuple(x[:4] for x in batch)
    theirs = kron(model, task, lambda m, b: I.row_losses(m(b[0]), b[1]).sum(), batch, query, tmp_path, mask)
    factors = I.ekfac_factors(model, task, batch, labels="data")
    close(
        len(batch[0])*I.influence(model, batch, query, task, factors=factors),
        theirs,
        rtol=2e-3,
        atol=2e-4 * np.abs(theirs).max(),
    )


# boosters

XY = {
    k: f(return_X_y=True) for k, f in dict(binary=load_breast_cancer, classes=load_wine, squares=load_diabetes).items()
}
BOOSTERS = {
    "sklearn binary": (GradientBoostingClassifier(n_estimators=15), "binary"),
    "sklearn classes": (GradientBoostingClassifier(n_estimators=10), "classes"),
    "sklearn squares": (GradientBoostingRegressor(n_estimators=15), "squares"),
    "lightgbm binary": (LGBMClassifier(**light), "binary"),
    "lightgbm l2": (LGBMClassifier(**light, reg_lambda=3.0), "binary"),
    "lightgbm from zero": (LGBMClassifier(**light, boost_from_average=False), "binary"),
    "lightgbm classes": (LGBMClassifier(**light), "classes"),
    "lightgbm squares": (LGBMRegressor(**light, reg_lambda=0.5), "squares"),
}


def opened(name):
    model, kind = BOOSTERS[name]
    X, y = (v[::2] for v in XY[kind])
    y = y/np.std(y) if kind == "squares" else y
    model.fit(X, y)
    b = I.open_booster(model, y)
    return model, b, I.rounds(b, X, y), (X, y)


@pytest.mark.parametrize("name", BOOSTERS)
def test_leaves_and_predictions_are_the_librarys(name):
    model, b, r, (X, y) = opened(name)
    assert I.leaf_values(b, r).error < 1e-6
    raw = (
        model.predict(X, raw_score=True)
        if "lightgbm" in name
        else model.predict(X)
        if "squares" in name
        else model.decision_function(X)
    )
    close(r.F[:, -1], np.reshape(raw, (len(X), -1)), atol=1e-6)


@pytest.mark.parametrize("name", BOOSTERS)
def test_boostin_is_a_finite_difference_of_leaf_values(name):
    _, b, r, (X, y) = opened(name)
    n, i, e = len(X), 3, 1e-5
    nudge = lambda w: I.leaf_values(b, r, 1 + w*(np.arange(n) == i), tol=None).theta
    slope = (nudge(e) - nudge(-e))/(2*e)
    brute = sum(-b.eta*slope[r.L[:, t, k]]*r.g[:, t, k] for t in range(r.L.shape[1]) for k in range(r.L.shape[2]))
    close(I.boostin(b, r, r)[i], brute, atol=1e-6)


def refit(b, r, w):
    "Losses after training again with weights w, every tree's structure fixed."
    F = r.F[:, 0].copy()
    for t in range(r.L.shape[1]):
        g, h = I.derivatives(b.kind, F, r.Y)
        L = r.L[:, t]
        new = np.zeros_like(F)
        for k in range(F.shape[1]):
            for l in np.unique(L[:, k]):
                m = L[:, k] == l
                new[m, k] = -(w[m]*g[m, k]).sum()/max((w[m]*h[m, k]).sum() + b.lam, 1e-12)
        F = F + b.eta*new
    return I.raw_losses(b.kind, F, r.Y)


@pytest.mark.parametrize("name", ["sklearn binary", "lightgbm l2", "sklearn squares"])
def test_leaf_influence_is_the_derivative_of_fixed_structure_training(name):
    _, b, r, (X, _) = opened(name)
    n, e = len(X), 1e-5
    L = I.leaf_influence(b, r, r)
    close(refit(b, r, np.ones(n)), I.raw_losses(b.kind, r.F[:, -1], r.Y), atol=1e-6)
    for i in (0, 7):
        one = e*(np.arange(n) == i)
        close(L[i], (refit(b, r, 1 - one) - refit(b, r, 1 + one))/(2*e), atol=1e-6)


def test_boostin_follows_brute_force_leave_one_out_on_a_tiny_set():
    X, y = (v[:60] for v in XY["binary"])
    model = GradientBoostingClassifier(n_estimators=10, max_depth=2, random_state=0).fit(X, y)
    b = I.open_booster(model, y)
    r = I.rounds(b, X, y)
    before = refit(b, r, np.ones(60))
    loo = np.stack([refit(b, r, 1.*(np.arange(60) != i)) - before for i in range(60)])
    off = ~np.eye(60, dtype=bool)
    assert (
        np.corrcoef(I.boostin(b, r, r)[off], loo[off])[0, 1]
        > 0.9
        > 0.7
        > np.corrcoef(I.boostin(b, r, r, same_leaf=False)[off], loo[off])[0, 1]
    )
    retrain = I.retrainer(model, (X, y), (X[:2], y[:2]))
    really = I.leave_one_out(retrain, 60, [4, 5])
    again = GradientBoostingClassifier(n_estimators=10, max_depth=2, random_state=0).fit(
        np.delete(X, 5, 0), np.delete(y, 5)
    )
    p = again.predict_proba(X[:2])[np.arange(2), y[:2]]
    close(really[1], -np.log(p) + np.log(model.predict_proba(X[:2])[np.arange(2), y[:2]]), atol=1e-8)


@pytest.mark.parametrize("name", ["sklearn binary", "lightgbm classes", "lightgbm squares"])
def test_trex_terms_sum_to_the_surrogates_prediction(name):
    _, b, r, (X, y) = opened(name)
    l2, n = .003, len(X)
    alpha, f, K = I.representers(b, r, r, l2)
    close(K @ alpha, f)
    # the representer weights solve the penalised problem: w = Phi' alpha has zero gradient
    slope = (
        expit(f) if b.kind == "binary" else np.exp(f) / np.exp(f).sum(1, keepdims=True) if b.kind == "classes" else f
    ) - r.Y
    close(K @ (slope/n + 2*l2*alpha), 0, atol=1e-5)
    S = I.trex(b, r, r, l2)
    without = f - alpha[5]*K[:, 5:6]
    close(S[5], I.raw_losses(b.kind, without, r.Y) - I.raw_losses(b.kind, f, r.Y), atol=1e-10)


def test_tree_similarity():
    _, b, r, (X, y) = opened("lightgbm binary")
    S = I.tree_sim(b, r, r)
    assert (np.diag(S) > 0).all()
    assert (np.sign(S)[S != 0] == np.where(y[:, None] == y, 1, -1)[S != 0]).all()
    count = np.bincount(r.L.ravel())
    close(abs(S[4, 9]), (1/count[r.L[4]]**2)[r.L[4] == r.L[9]].sum())


@pytest.mark.parametrize(
    "model",
    [
        LGBMClassifier(**light, subsample=0.5, subsample_freq=1),
        LGBMClassifier(**light, reg_alpha=2.0),
        LGBMClassifier(**light, class_weight="balanced"),
    ],
)
def test_boosters_with_other_leaves_are_refused(model):
    X, y = XY["binary"]
    model.fit(X, y)
    with pytest.raises(ValueError, match="differ from Newton steps"):
        I.influence(model, (X, y), (X[:3], y[:3]))


# harnesses and label repair

def test_harnesses():
    S = np.random.default_rng(0).normal(size=(40, 3))
    close(I.agreement(S, 3*S - 1), 1)
    close(I.agreement(S, np.exp(S), "spearman"), 1)
    c = I.removal_curve(S, lambda keep: S[~keep].sum(0), [1, 5])
    close(c[(c["query"] == 2) & (c.k == 5)].rise, np.sort(S[:, 2])[-5:].sum())


def test_no_row_is_its_own_influencer():
    rng = np.random.default_rng(0)
    X = I.with_one(rng.normal(size=(60, 3)))
    y = (X[:, 0] > 0).astype(int)
    A, p = I.cross_influence(X, y, .01, 4, 1)
    for t in I.folds_of(y, 4, 1):
        r = np.setdiff1d(np.arange(60), t)
        w = I.fit_head(X[r], y[r], .01)
        assert not A[np.ix_(t, t)].any()
        close(p[t], expit(X[t] @ w), atol=1e-6)
        close(A[np.ix_(r, t)], I.head_influence(X[r], y[r], w, .01, X[t], p[t] > .5), atol=1e-8)


def test_repair_finds_planted_flips_and_never_lowers_dev():
    rng = np.random.default_rng(0)
    X = I.with_one(rng.normal(size=(500, 4)))
    y = (X[:, 0] + .3*X[:, 1] > 0).astype(int)
    bad = rng.random(300) < .25
    noisy = np.where(bad, 1 - y[:300], y[:300])
    new, history = I.repair(X[:300], noisy, X[300:], y[300:], I.inf_relabel(10, .6, .01), .01, 3)
    assert (np.diff(history) > 0).all() and (new == y[:300]).mean() > (noisy == y[:300]).mean() + .1
    same, h = I.repair(X[:300], noisy, X[300:], y[300:], lambda X, y, t: 1 - y, .01, 3)
    assert (same == noisy).all() and len(h) == 1
    given = I.inf_relabel(10, .6, .01, about="given")(X[:300], noisy, 0)
    assert (given != noisy).mean() < .05 # a wrong label is helped by others that are wrong in the same way


def test_silver_orders():
    rng = np.random.default_rng(0)
    X = I.with_one(rng.normal(size=(200, 3)))
    y = (X[:, 0] > 0).astype(int)
    gold = np.arange(200) < 30
    wrong = np.where(np.arange(200) == 150, 1 - y, y)
    for how in ("influence", "confidence", "random"):
        assert sorted(I.silver_order(X, wrong, gold, .01, X[:50], y[:50], how)) == list(range(30, 200))
    far = int(np.argmax(np.where(gold, -1, X[:, 0])))
    wrong = np.where(np.arange(200) == far, 1 - y, y)
    assert I.silver_order(X, wrong, gold, .01, X[:30], y[:30])[0] == far


def test_completions_only():
    from recbook.lm import nano_tokenizer
    tok = nano_tokenizer(["The partner of A is B."]*9)
    x, y = I.lm_batch(tok, ["The partner of A is B.", "A is"], ["The partner of A is", ""])
    assert tok.decode(y[0][y[0] >= 0]) == " B." and x.shape == y.shape
    with pytest.raises(ValueError, match="does not begin"):
        I.lm_batch(tok, ["A is B"], ["B is"])


class Shaky(nn.Module):
    "Dropout that no mode switches off, or normalisation by the batch."
    def __init__(self, net, how="dropout"):
        super().__init__()
        self.net,self.how = net,how
    def forward(self, x):
        y = self.net(x)
        return (
            nn.functional.dropout(y, 0.5)
            if self.how == "dropout"
            else nn.functional.batch_norm(y, None, None, training=True)
        )


@pytest.mark.parametrize("how", ["dropout", "batch"])
@pytest.mark.parametrize("method", I.LAYERWISE + I.WHOLE)
def test_what_cannot_be_switched_off_is_refused(net, data, method, how):
    with pytest.raises(ValueError, match="random numbers|statistics|more than 1 value"):
        I.influence(Shaky(net, how), data, data, method=method, damping=.1)


@pytest.mark.parametrize("method", I.LAYERWISE + I.WHOLE)
def test_modes_are_switched_inside_and_given_back(net, data, method):
    m = nn.Sequential(nn.Dropout(.5), *net, nn.Dropout(.5).eval()).train()
    m[-1].eval()
    found = [k.training for k in m.modules()]
    close(
        I.influence(m, data, data, method=method, damping=0.1), I.influence(net, data, data, method=method, damping=0.1)
    )
    assert [k.training for k in m.modules()] == found and found.count(False) == 1
    close(I.pbrf(m, I.Task(), data, data, [0], .1), I.pbrf(net, I.Task(), data, data, [0], .1))
    assert [k.training for k in m.modules()] == found


def test_default_damping_is_a_tenth_of_the_mean_eigenvalue(net, data):
    lam = .1*float(I.ggn_matrix(net, I.Task(), data, params_of(net)).diagonal().mean())
    few = tuple(x[:4] for x in data)
    ask = lambda method, **kw: I.influence(net, data, few, method=method, **kw)
    close(ask("ggn"), ask("ggn", damping=lam), rtol=1e-6, atol=1e-12)
    scale = np.abs(ask("ggn")).max()
    theta = params_of(net)
    g = per_sample_grads(net, I.Task().mean, data, theta)
    cg = g @ G_.solve_curvature(net, I.Task(), data, theta, g[:4], dense_below=1).T/30
    for got in (cg.numpy(), ask("lissa")):
        assert np.corrcoef(got.ravel(), ask("ggn").ravel())[0, 1] > 0.95 and np.abs(got).max() < 2*scale
    est = I.tenth_of_mean(
        lambda v: I.ggn_products(net, I.Task(), data, params_of(net), v[None])[0], 43, double(1), 4000
    )
    assert est == pytest.approx(lam, rel=.05)


@pytest.mark.parametrize("damping", [-1, float("nan"), "x", True])
@pytest.mark.parametrize("method", ["ekfac", "dot", "ggn", "hessian", "block", "lissa"])
def test_dampings_without_sense_are_refused(net, data, method, damping):
    with pytest.raises(ValueError, match=f"damping={damping!r}"):
        I.influence(net, data, data, method=method, damping=damping)


def test_options_without_effect_are_refused(net, data):
    F = I.ekfac_factors(net, I.Task(), data)
    for method in ("ggn", "lissa", "dot"):
        with pytest.raises(ValueError, match="factors"):
            I.influence(net, data, data, method=method, factors=F)
    with pytest.raises(TypeError, match="dampning"):
        I.influence(net, data, data, dampning=.1)
    X, y = XY["binary"]
    forest = GradientBoostingClassifier(n_estimators=2).fit(X, y)
    for kw in (dict(damping=.1), dict(task=I.Task()), dict(modules=["0"]), dict(factors=F)):
        with pytest.raises(ValueError, match="no option of"):
            I.influence(forest, (X, y), (X[:2], y[:2]), **kw)
    with pytest.raises(ValueError, match="l2=0"):
        I.trex(None, None, None, l2=0)
    for by, r in (("tokens", 1), (None, 0), (None, 1.5)):
        with pytest.raises(ValueError, match="by='tokens'|rank="):
            I.pair_scores(net, I.Task(), data, {"0": I.low_rank(torch.ones(2, 5, 5), r)}, by)


def test_a_curvature_without_inverse_is_refused(net, data):
    single = copy.deepcopy(net).float(), tuple(x.float() if x.is_floating_point() else x for x in data)
    with pytest.raises(ValueError, match="raise damping"):
        I.influence(single[0], single[1], single[1], method="ggn", damping=0.)


def gpt2(tie=True):
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=12, n_embd=8, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=tie)
    ).double()


def test_conv1d_layers_of_gpt2_are_linear_layers():
    m = gpt2()
    ids = torch.randint(1, 12, (5, 6), generator=torch.Generator().manual_seed(0))
    batch = ids, ids.clone()
    task = I.Task(lambda m, b: m(input_ids=b[0]).logits[:, :-1], lambda b: b[1][:, 1:])
    assert (
        len(I.linear_layers(m)) == 8
        and "lm_head" not in I.linear_layers(m)
        and "lm_head" in I.linear_layers(gpt2(False))
        and "lm_head" in I.linear_layers(m, ["lm_head"])
    )
    name = "transformer.h.1.mlp.c_fc"
    W = I.weight_grads(next(I.layer_grads(m, task, batch, I.linear_layers(m, [name])))[name])
    G = per_sample_grads(m, task.mean, batch, params_of(m, [name + ".weight", name + ".bias"]))
    want = torch.cat([W[..., :-1].transpose(1, 2).flatten(1), W[..., -1]], 1)
    close(want, G, atol=1e-10)
    close(I.influence(m, batch, batch, task, "dot", modules=[name]), (G @ G.T/5).numpy(), atol=1e-10)
    assert np.isfinite(I.influence(m, batch, batch, task)).all() and m.training


# boosters as people have them

@pytest.mark.parametrize("scale", [1e-6, 1e-3, 1., 1e3, 1e6, 1e9])
@pytest.mark.parametrize("make", [lambda: LGBMRegressor(**light), lambda: GradientBoostingRegressor(n_estimators=10)])
def test_influence_scales_with_the_square_of_the_targets(make, scale):
    X, y = XY["squares"]
    y = (y - y.mean())/y.std() + 5
    one = I.influence(make().fit(X, y), (X, y), (X[:5], y[:5]))
    got = I.influence(make().fit(X, y*scale), (X, y*scale), (X[:5], y[:5]*scale))/scale**2
    assert np.abs(got - one).max() < 1e-3*np.abs(one).max()


def test_wrong_rows_are_refused_at_every_scale():
    X, y = XY["squares"]
    for scale in (1e-6, 1., 1e6):
        m = LGBMRegressor(**light).fit(X, y*scale)
        other = y.copy()
        other[:20] += y.std()
        with pytest.raises(ValueError, match="differ from Newton"):
            I.influence(m, (X, other*scale), (X[:2], y[:2]*scale))


def test_tables_sparse_rows_and_categories():
    import pandas as pd, scipy.sparse as sp
    rng = np.random.default_rng(0)
    X, y = XY["binary"]
    X, y = X[:200, :4], y[:200]
    plain = LGBMClassifier(**light).fit(X, y)
    want = I.influence(plain, (X, y), (X[:3], y[:3]))
    close(I.influence(plain, (sp.csr_matrix(X), y), (sp.csr_matrix(X[:3]), y[:3])), want)
    df = pd.DataFrame(X, columns=["a b", "c", "d", "e"])
    named = LGBMClassifier(**light).fit(df, y)
    close(I.influence(named, (df, pd.Series(y, index=range(200, 0, -1))), (df[:3], y[:3])), want)
    with pytest.raises(ValueError, match="same order"):
        I.influence(named, (df[["c", "a b", "d", "e"]], y), (df[:3], y[:3]))
    cat = df.assign(k=pd.Categorical(rng.choice(["x", "y", "z"], 200)))
    booster = LGBMClassifier(**light).fit(cat, y)
    assert np.isfinite(I.influence(booster, (cat, y), (cat[:3], y[:3]))).all()
    r = I.rounds(I.open_booster(booster, y), cat, y)
    close(r.F[:, -1, 0], booster.predict(cat, raw_score=True), atol=1e-9)
    close(
        I.rounds(I.open_booster(booster, y), cat[:3].assign(k=pd.Categorical(cat.k[:3].astype(str))), y[:3]).L, r.L[:3]
    )  # fewer categories in the queries
    assert I.influence(booster, (cat[:40], y[:40]), (cat[:2], y[:2]), method="loo").shape == (40, 2)
    sk = GradientBoostingClassifier(n_estimators=3).fit(df, y)
    close(
        I.influence(sk, (df, y), (df[:3], y[:3])),
        I.influence(GradientBoostingClassifier(n_estimators=3).fit(X, y), (X, y), (X[:3], y[:3])),
    )
    with pytest.raises(ValueError, match="same order"):
        I.influence(sk, (df[["c", "a b", "d", "e"]], y), (df[:3], y[:3]))


@pytest.mark.parametrize("y", [[0, 1, 2, 0], [-1, 1, -1, 1], [.3, 1, 0, 1], ["a", "b", "a", "b"]])
def test_a_head_for_two_classes_wants_0_and_1(y):
    X = np.ones((4, 2))
    for call in (
        lambda: I.fit_head(X, np.array(y)),
        lambda: I.head_influence(X, np.array(y), np.zeros(2), 0.1, X, np.array([0, 1, 0, 1])),
        lambda: I.head_influence(X, np.array([0, 1, 0, 1]), np.zeros(2), 0.1, X, np.array(y)),
    ):
        with pytest.raises(ValueError, match="needs 0 and 1"):
            call()
    with pytest.raises(ValueError, match="l2=0"):
        I.fit_head(X, np.array([0, 1, 0, 1]), 0)
    with pytest.raises(ValueError, match="one label a row"):
        I.fit_head(X, np.array([0, 1]))
    with pytest.raises(ValueError, match="not finite"):
        I.removal_curve([[np.nan], [1]], lambda k: [0], [1])


# bad input

def test_bad_input(net, data):
    q = tuple(x[:2] for x in data)
    X, y = XY["binary"]
    forest = GradientBoostingClassifier(n_estimators=3).fit(X, y)
    for match, call in {
        "method='newton'": lambda: I.influence(net, data, q, method="newton"),
        "method='ekfac'": lambda: I.influence(forest, (X, y), (X, y), method="ekfac"),
        "no linear layers": lambda: I.influence(net, data, q, modules=["7"]),
        "rows must correspond": lambda: I.influence(net, (data[0], data[1][:5]), q),
        "query is empty": lambda: I.influence(net, data, tuple(x[:0] for x in data)),
        "no factors for layers": lambda: I.influence(net, data, q, factors=I.ekfac_factors(net, I.Task(), data, ["0"])),
        "random numbers": lambda: I.influence(Shaky(net), data, q),
        "positive damping": lambda: I.influence(net, data, q, method="lissa", damping=0.0),
        "labels='true'": lambda: I.ekfac_factors(net, I.Task(), data, labels="true"),
        "without tokens": lambda: I.ekfac_factors(tagger(), TAGS, sequences(), labels="exact"),
        "rank=": lambda: I.low_rank(torch.ones(2, 3, 4), 9),
        "not a fitted": lambda: I.influence(object(), (X, y), (X, y)),
        "unknown to the booster": lambda: I.influence(forest, (X, y), (X[:2], [5, 5])),
        "subsample=0.5": lambda: I.influence(
            GradientBoostingClassifier(n_estimators=3, subsample=0.5).fit(X, y), (X, y), (X, y)
        ),
        "more than once": lambda: I.influence(
            nn.Sequential(*[net[0]], nn.Linear(5, 4).double(), net[0], nn.Linear(5, 3).double()), data, q
        ),
        "one tree a round": lambda: I.influence(
            LGBMClassifier(**light).fit(*XY["classes"]), XY["classes"], XY["classes"], method="leafinfluence"
        ),
        "same rows and queries": lambda: I.agreement(np.ones((2, 2)), np.ones((3, 2))),
        "k=9": lambda: I.removal_curve(np.ones((9, 1)), lambda k: [0], [9]),
        "about='x'": lambda: I.cross_influence(np.ones((4, 2)), [0, 1, 0, 1], about="x"),
        "how='x'": lambda: I.silver_order(I.with_one(X), y, y == 0, 0.1, I.with_one(X), y, "x"),
    }.items():
        with pytest.raises(ValueError, match=match):
            call()


# texts

def tiny_tokenizer(pad):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast
    t = Tokenizer(models.BPE())
    t.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    t.decoder = decoders.ByteLevel()
    specials = ["<bos>", "<eos>", "<pad>"]
    t.train_from_iterator(
        ["Answer: yes no red fox"] * 20,
        trainers.BpeTrainer(special_tokens=specials, initial_alphabet=pre_tokenizers.ByteLevel.alphabet()),
    )
    t.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 0)])
    return PreTrainedTokenizerFast(tokenizer_object=t, bos_token="<bos>", eos_token="<eos>", pad_token=pad)


@pytest.mark.parametrize("pad", ["<eos>", "<pad>"])
def test_every_token_and_the_end_mark_count_whatever_pads(pad):
    tok = tiny_tokenizer(pad)
    texts = ["yes", "Answer: red fox", "<bos>no"]
    x, y = I.lm_batch(tok, texts)
    want = [tok(t.removeprefix("<bos>")).input_ids + [1] for t in texts]
    assert [r[r >= 0].tolist() for r in y] == want and [a[m].tolist() for a, m in zip(x, I.real_tokens(tok, x))] == want
    _, y = I.lm_batch(tok, ["Answer: yes", "Answer: yes", "Answer: no"], ["Answer: ", "Answer:", "Answer: no"])
    assert [tok.convert_ids_to_tokens(r[r >= 0].tolist()) for r in y] == [["Ġyes"], ["Ġyes"], []]
    with pytest.raises(ValueError, match="1 prompts for 2"):
        I.lm_batch(tok, ["a", "b"], ["a"])
    tok.pad_token = None
    with pytest.raises(ValueError, match="pad token"):
        I.lm_batch(tok, ["a"])


def test_activations_that_write_over_their_input_change_nothing():
    def net(inplace):
        torch.manual_seed(0)
        return torch.nn.Sequential(torch.nn.Linear(4, 8), torch.nn.ReLU(inplace=inplace), torch.nn.Linear(8, 2))
    x = torch.randn(60, 4, generator=torch.Generator().manual_seed(1))
    y = (x[:, 0] > 0).long()
    from recbook.trust.influence import influence
    one, two = (influence(net(i), (x, y), (x[:5], y[:5]), method="ekfac") for i in (False, True))
    np.testing.assert_allclose(np.asarray(one), np.asarray(two), rtol=1e-4, atol=1e-6)
