"""Learning from implicit feedback: estimators against Monte Carlo and closed forms, samplers against their laws,
gradients against autograd."""
from functools import partial
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from scipy.special import expit
from scipy.stats import chisquare, norm
from sklearn.metrics import mutual_info_score
from recbook.baselines import MF, aobpr_sampler, dns_sampler, fixed_sampler, inbatch_sampler, pair_scores, sampled_bpr
from recbook.collaborative.graph_cf import LightGCN, adjacency, sparse_tensor, sym_norm
from recbook.collaborative.implicit import auto_sample, BiasMF, CatalogueTowers, dcg, expomf, exposure_posterior
from recbook.collaborative.implicit import field_relatedness, ips_bias_variance, ips_loss, item_propensity, ItemTower
from recbook.collaborative.implicit import mixture_loss, mutual_information, NBPO, nbpo_loss, nbpo_weights
from recbook.collaborative.implicit import point_losses, RandomPairs, SamplerSearch, search_gradient, SelfSupervision
from recbook.collaborative.implicit import train_pairs, train_sampled, train_two_tower, view_mask, wmf_loss
from recbook.data import Interactions, ratio_split
from recbook.towers import batch_softmax
from recbook.training import set_seed
from recbook.world import World


@pytest.fixture(scope="module")
def w(): return World(3, 60, 40, clicks_per_user=6)


@pytest.fixture(scope="module")
def train(w): return w.interactions


@pytest.fixture(scope="module")
def truth():
    g = torch.Generator().manual_seed(5)
    theta = torch.rand(20, 15, generator=g)**3*.97 + .003
    return torch.rand(20, 15, generator=g), theta, torch.randn(20, 15, generator=g)*2 # gamma, theta, logits


def clicks(gamma, theta, n, seed=11):
    g = torch.Generator().manual_seed(seed)
    return (torch.rand(n, *gamma.shape, generator=g) < theta).double() * (
        torch.rand(n, *gamma.shape, generator=g) < gamma
    )  # exposure and relevance drawn apart


# Rel-MF

@pytest.mark.parametrize("kind", ["log", "squared"])
@pytest.mark.parametrize("M", [0., .05, .3, 1.])
def test_estimator_mean_and_variance_by_monte_carlo(truth, M, kind):
    gamma, theta, logits = (x.double() for x in truth)
    est = np.array([ips_loss(logits, y, theta, M, kind).item() for y in clicks(gamma, theta, 6000)])
    bias, var = ips_bias_variance(logits, gamma, theta, M, kind)
    ideal = ips_loss(logits, gamma, kind=kind).item()
    assert abs(est.mean() - ideal - bias) < 4*(var/len(est))**.5
    d = (est-est.mean())**2 # the error of a variance from the fourth moment
    assert abs(est.var(ddof=1) - var) < 5*d.std()/len(est)**.5
    if M == 0:
        assert bias == 0


def test_unbiased_estimator_exactly_by_enumerating_all_clicks():
    gamma, theta, logits = torch.tensor([[.3, .9, .5]]), torch.tensor([[.2, .05, .7]]), torch.tensor([[1., -2, .5]])
    p = gamma*theta
    mean = square = 0.
    for k in range(8):
        y = torch.tensor([[k & 1, k >> 1 & 1, k >> 2 & 1]]).float()
        q = torch.where(y > 0, p, 1-p).prod().item()
        l = ips_loss(logits, y, theta).item()
        mean += q*l
        square += q*l*l
    bias, var = ips_bias_variance(logits, gamma, theta)
    assert (
        mean == pytest.approx(ips_loss(logits, gamma).item(), rel=1e-5)
        and square - mean**2 == pytest.approx(var, rel=1e-3)
        and bias == 0
    )


def test_variance_is_the_papers_formula(truth):
    gamma, theta, logits = (x.double() for x in truth)
    d1, d0 = point_losses(logits)
    assert ips_bias_variance(logits, gamma, theta)[1] == pytest.approx(
        (gamma * (1 / theta - gamma) * (d1 - d0) ** 2).sum().item() / gamma.numel() ** 2
    )


def test_limits_of_clipping(truth):
    gamma, theta, logits = truth
    y = clicks(gamma, theta, 1)[0].float()
    assert ips_loss(logits, y, theta, 1.0).item() == pytest.approx(
        F.binary_cross_entropy_with_logits(logits, y).item(), rel=1e-5
    )  # naive
    assert ips_loss(logits, y, theta, theta.min().item()*.5).item() == pytest.approx(ips_loss(logits, y, theta).item())
    v = [ips_bias_variance(logits, gamma, theta, M)[1] for M in (0, .01, .1, .5, 1)]
    assert all(a >= b for a, b in zip(v, v[1:])) # clipping never adds variance
    assert wmf_loss(logits, y, 1.).item() == pytest.approx(ips_loss(logits, y).item())


def test_negative_weights_are_kept():
    l = torch.tensor([0.], requires_grad=True)
    ips_loss(l, torch.tensor([1.]), torch.tensor([.5])).backward()
    assert l.grad.item() == pytest.approx(expit(0) - 2) # gradient of BCE is sigma - Y/theta


def test_losses_plug_into_any_scorer():
    net = torch.nn.Linear(4, 1)
    x = torch.randn(64, 4)
    for loss in (
        lambda l, y: ips_loss(l, y, torch.full_like(y, 0.3), 0.1),
        wmf_loss,
        lambda l, y: nbpo_loss(l, l.detach() * 0, True),
    ):
        net.zero_grad()
        loss(net(x)[:, 0], torch.ones(64)).backward()
        assert net.weight.grad.abs().sum() > 0


def test_training_recovers_a_constant_relevance():
    theta = torch.full((30, 30), .2)
    y = (torch.rand(30, 30, generator=torch.Generator().manual_seed(0)) < .2*.6).float()
    m = train_pairs(
        lambda l, y, t: ips_loss(l, y, t, kind="squared"), y, theta, dim=1, steps=300, lr=0.02, l2=1e-2, batch_size=900
    )
    assert m.all().sigmoid().mean().item() == pytest.approx(y.mean().item()/.2, abs=.08)


def test_random_pairs_carry_their_entries():
    t = torch.arange(12.).view(3, 4)
    for u, i, a, b in RandomPairs(t, 2*t, batch_size=50, steps=3):
        assert torch.equal(a, t[u, i]) and torch.equal(b, 2*t[u, i])
    with pytest.raises(ValueError, match="different shapes"):
        RandomPairs(t, t.T)


def test_propensity_and_dcg():
    Y = torch.tensor([[1., 1, 0], [1, 0, 0], [1, 0, 0], [1, 0, 0]])
    assert torch.allclose(item_propensity(Y), torch.tensor([1., .5, .5]))
    s, gain = torch.randn(6, 9), (torch.rand(6, 9) < .4).float()
    want = []
    for a, g in zip(s, gain):
        order = a.argsort(descending=True)[:3]
        if g.sum():
            want.append(sum(g[j].item()/np.log2(r+2) for r, j in enumerate(order)))
    assert dcg(s, gain, torch.ones(6, 9), 3) == pytest.approx(np.mean(want), rel=1e-5)


def test_expomf_e_step_is_bayes():
    Y = np.array([[1, 0, 0]])
    S, mu, lam = np.array([[.3, .7, -.2]]), np.array([.1, .2, .9]), 4.
    p = exposure_posterior(Y, S, mu, lam)
    for j in (1, 2):
        shown, hidden = (
            mu[j] * norm.pdf(0, S[0, j], lam**-0.5),
            1 - mu[j],
        )  # a pair that was not shown is silent with probability 1
        assert p[0, j] == pytest.approx(shown/(shown+hidden))
    assert p[0, 0] == 1


def test_expomf_finds_what_is_shown_to_everyone():
    rng = np.random.default_rng(0)
    Y = (rng.random((80, 30)) < np.where(np.arange(30) < 10, .6, .03)).astype(float)
    S, P = expomf(Y, dim=4, iters=8, prior=(1., 20.))
    silent = Y == 0
    assert P[:, :10][silent[:, :10]].mean() > P[:, 10:][silent[:, 10:]].mean() and np.isfinite(S).all()


# NBPO

@pytest.mark.parametrize("version, f", [("original", torch.log), ("surrogate", lambda p: p)])
@pytest.mark.parametrize("click", [True, False])
def test_nbpo_weights_are_the_gradient_of_their_objective(version, f, click):
    x = torch.randn(2, 200, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    s, g = x.sigmoid()
    p = s*(1-g) if click else 1-s + g*s
    want, = torch.autograd.grad(f(p).sum(), x)
    got = torch.stack(nbpo_weights(s.detach(), g.detach(), click, version))
    assert torch.allclose(want, got, atol=1e-9)
    assert torch.allclose(torch.autograd.grad(nbpo_loss(*x, click, version), x)[0], -want, atol=1e-9)


def test_hybrid_pulls_up_when_the_flip_is_likely_and_is_bpo_without_flips():
    s = np.linspace(.01, .99, 50)
    for click in (True, False):
        np.testing.assert_allclose(nbpo_weights(s, 0*s, click)[0], nbpo_weights(s, 0*s, click, "bpo")[0])
    g = np.full_like(s, .6)
    up = nbpo_weights(s, g, False)[0]
    assert ((up > 0) == (g*(1-s) > s)).all() and (up > 0).any() and (up < 0).any()


def test_hybrid_is_not_a_gradient():
    "Mixed derivatives differ, so no scalar has these two weights as its partial derivatives."
    x = torch.tensor([.4, -.3], dtype=torch.float64, requires_grad=True)
    a, b = nbpo_weights(x[0].sigmoid(), x[1].sigmoid(), False)
    assert abs(torch.autograd.grad(a, x, retain_graph=True)[0][1] - torch.autograd.grad(b, x)[0][0]) > .01


@pytest.mark.parametrize("version", ["hybrid", "original", "surrogate", "bpo", "bpr"])
def test_nbpo_step_against_autograd(version):
    m = NBPO(6, 8, version, K=3, n_neg=2, lr=.1, l2=(.3, .7))
    rng = np.random.default_rng(1)
    u, i = np.array([0, 3, 3]), np.array([1, 5, 2])
    u_, j = u.repeat(2), rng.integers(8, size=6)
    U, V, P, Q = (torch.tensor(X, dtype=torch.float64, requires_grad=True) for X in (m.U, m.V, m.P, m.Q))
    at = lambda A, B, a, b: (A[a]*B[b]).sum(1)
    if version == "bpr":
        l = -F.logsigmoid(at(U, V, u.repeat(2), i.repeat(2)) - at(U, V, u_, j)).sum()
    else:
        l = nbpo_loss(
            at(U, V, u.repeat(2), i.repeat(2)), at(P, Q, u.repeat(2), i.repeat(2)), True, version
        ) + nbpo_loss(at(U, V, u_, j), at(P, Q, u_, j), False, version)
    (
        l
        + 0.15 * (U.square().sum() + V.square().sum())
        + 0.35 * (P.square().sum() + Q.square().sum())
    ).backward()
    m.step(u, i, u_, j)
    for new, old in zip((m.U, m.V, m.P, m.Q), (U, V, P, Q)):
        want = old.detach() - (.1*old.grad if old.grad is not None else 0)
        np.testing.assert_allclose(new, want.numpy(), atol=1e-5)


def test_nbpo_starts_without_flips_and_is_deterministic(train):
    a, b = (NBPO(60, 40, K=8, seed=2) for _ in range(2))
    assert a.flip().mean() < .05
    for _ in a.epochs(train, 2):
        pass
    before = b.U
    b.epochs(train, 2) # a generator: called alone it trains nothing
    assert b.U is before and b.fit(train, 2) is b
    assert np.array_equal(a.U, b.U) and np.array_equal(a.Q, b.Q)


# samplers

def zoo(train, n=1):
    return dict(
        uniform=fixed_sampler(train, n),
        popularity=fixed_sampler(train, n, 0.75),
        dns=dns_sampler(train, n, 4),
        aobpr=aobpr_sampler(train, n),
        inbatch=inbatch_sampler(train, n),
    )


@pytest.mark.parametrize("name", ["uniform", "popularity", "dns", "aobpr", "inbatch"])
@pytest.mark.parametrize("n", [1, 3])
def test_no_sampler_returns_a_click(train, name, n):
    u, i = torch.tensor(train.user), torch.tensor(train.item)
    set_seed(0)
    J = zoo(train, n)[name](u, i, MF(60, 40, 4))
    assert J.shape == (len(u), n) and J.dtype == torch.long and 0 <= J.min() and J.max() < 40
    assert train.csr().toarray()[np.repeat(train.user, n), J.flatten().numpy()].sum() == 0


def law(train, sampler, model=None, u=5, rows=20_000):
    free = np.flatnonzero(train.csr()[[u]].toarray()[0] == 0)
    r = torch.full((rows,), u)
    return free, np.bincount(sampler(r, r*0, model).flatten().numpy(), minlength=train.n_items)[free]


def agree(counts, p): return chisquare(counts, counts.sum()*(p/p.sum())).pvalue > 1e-4


@pytest.mark.parametrize("power", [0., .75, 1.])
def test_fixed_law(train, power):
    free, c = law(train, fixed_sampler(train, power=power, seed=4))
    assert agree(c, np.maximum(np.bincount(train.item, minlength=40), 1.)[free]**power)


@pytest.mark.parametrize("M", [1, 3, 10])
def test_dns_law_by_order_statistics(train, M):
    set_seed(1)
    m = MF(60, 40, 4)
    free, c = law(train, dns_sampler(train, M=M, seed=4), m)
    s = (m()[1] @ m()[0][5]).detach().numpy()[free]
    rank, n = (-s).argsort().argsort(), len(free)
    p = ((n-rank)/n)**M - ((n-rank-1)/n)**M
    keep = p*c.sum() > 5
    assert (
        agree(np.append(c[keep], c[~keep].sum() + 1e-9), np.append(p[keep], p[~keep].sum() + 1e-12) * 1.0)
        if (~keep).any()
        else agree(c, p)
    )


def test_aobpr_law_with_one_factor(train):
    set_seed(2)
    m = MF(60, 40, 1)
    m.E0.data[5] = -.7 # a negative factor reads the list from its end
    free, c = law(train, aobpr_sampler(train, lam=.2, seed=3), m)
    order = m()[1][:, 0].argsort(descending=True).flip(0).numpy()
    rank = np.empty(40)
    rank[order] = np.arange(40)
    assert agree(c, np.exp(-rank[free]/(.2*40)))


def test_inbatch_law(train):
    free = np.flatnonzero(train.csr()[[5]].toarray()[0] == 0)
    pool = torch.tensor(np.repeat(free[:3], [1, 2, 3]))
    u = torch.full((6,), 5)
    s = inbatch_sampler(train, 500, seed=1)
    c = np.bincount(s(u, pool).flatten().numpy(), minlength=40)[free[:3]]
    assert c.sum() == 3000 and agree(c, np.array([1., 2, 3]))


def test_inbatch_falls_back_when_a_batch_holds_only_clicks(train):
    mine = torch.from_numpy(train.csr()[[5]].indices.astype(np.int64))
    u = torch.full_like(mine, 5)
    J = inbatch_sampler(train)(u, mine)
    assert not set(J.flatten().tolist()) & set(mine.tolist())


def test_a_scorer_of_its_own_is_asked():
    class Scorer:
        def score(self, u, J): return -J.float()
    x = Interactions(pd.DataFrame(dict(user=[0], item=[9])), 1, 10)
    J = dns_sampler(x, M=200)(torch.zeros(50, dtype=torch.long), torch.zeros(50), Scorer())
    assert (J == 0).all()


@pytest.mark.parametrize("name", ["uniform", "popularity", "dns", "aobpr", "inbatch"])
def test_no_sampler_returns_what_is_excluded(name):
    split = ratio_split(World(3, 60, 40, clicks_per_user=6).interactions, .2, .2)
    make = dict(uniform=fixed_sampler, popularity=partial(fixed_sampler, power=.75), dns=partial(dns_sampler, M=16),
        aobpr=aobpr_sampler, inbatch=inbatch_sampler)[name]
    u, i = torch.tensor(split.train.user), torch.tensor(split.train.item)
    set_seed(0)
    m, held = MF(60, 40, 4), split.valid.csr().toarray()
    drawn = lambda **kw: held[np.repeat(u.numpy(), 5), make(split.train, 5, **kw)(u, i, m).flatten().numpy()].sum()
    assert drawn() > 0 and drawn(exclude=split.valid) == 0


# AutoSample

def test_a_search_needs_two_samplers_of_one_negative(train):
    split = ratio_split(train, .2, .1)
    with pytest.raises(ValueError, match="at least two"):
        SamplerSearch({"uniform": fixed_sampler(split.train)}, split.valid, 10)
    with pytest.raises(ValueError, match="n=1"):
        samplers = {"a": fixed_sampler(split.train), "b": fixed_sampler(split.train, 2)}
        auto_sample(MF(60, 40, 4), split.train, split.valid, samplers, steps=2)


def test_jensen_and_equality():
    g = torch.Generator().manual_seed(0)
    U, I = torch.randn(5, 4, generator=g), torch.randn(9, 4, generator=g)
    u, i, J, a = (
        torch.randint(5, (30,), generator=g),
        torch.randint(9, (30,), generator=g),
        torch.randint(9, (30, 3), generator=g),
        torch.tensor([0.2, 0.5, 0.3]),
    )
    assert mixture_loss(U, I, u, i, J, a) < mixture_loss(U, I, u, i, J, a, False)
    same = J[:, :1].expand(30, 3)
    assert mixture_loss(U, I, u, i, same, a).item() == pytest.approx(
        mixture_loss(U, I, u, i, same, a, False).item(), rel=1e-5
    )
    one = torch.tensor([0., 1., 0.])
    assert mixture_loss(U, I, u, i, J, one).item() == pytest.approx(
        mixture_loss(U, I, u, i, J, one, False).item(), rel=1e-5
    )
    want = np.mean(
        [
            sum(a[n].item() * np.log1p(np.exp((U[p] @ (I[J[k, n]] - I[q])).item())) for n in range(3))
            for k, (p, q) in enumerate(zip(u, i))
        ]
    )
    assert mixture_loss(U, I, u, i, J, a, False).item() == pytest.approx(want, rel=1e-5)


def held_out_loss(m, held):
    U, I = m()
    pos = (U[held[0]]*I[held[1]]).sum(1)
    return torch.cat([pos[:, None], U[held[0]] @ I[held[2]].T], 1).logsumexp(1).sub(pos).mean()


def after_step(m, batch, held, a, eta=1e-4):
    "The held-out loss after a training step of size eta; the model is left as it was."
    step, = torch.autograd.grad(mixture_loss(*m(), *batch, torch.softmax(a, 0)), m.E0)
    m.E0.data.sub_(eta*step)
    out = held_out_loss(m, held).item()
    m.E0.data.add_(eta*step)
    return out


@pytest.mark.parametrize("kind", ["mf", "lightgcn"])
def test_search_gradient_is_the_derivative_through_one_step(train, kind):
    A = sparse_tensor(sym_norm(adjacency(train)).astype(np.float64)).to(torch.float64)
    set_seed(4)
    m = (MF(60, 40, 3) if kind == "mf" else LightGCN(A, 60, 3, 2)).double()
    m.E0.data *= 4
    start = m.E0.detach().clone()
    g = torch.Generator().manual_seed(1)
    r = lambda n, *s: torch.randint(n, s, generator=g)
    batch, held, a = (
        (r(60, 20), r(40, 20), r(40, 20, 3)),
        (r(60, 10), r(40, 10), r(40, 12)),
        torch.tensor([0.3, -0.2, 0.1], dtype=torch.double),
    )
    got, val = search_gradient(m, batch, held, a, eps=1e-3)
    assert torch.allclose(m.E0, start, atol=1e-12) and val == pytest.approx(held_out_loss(m, held).item())
    for n, e in enumerate(torch.eye(3, dtype=torch.double)*1e-2):
        want = (after_step(m, batch, held, a+e) - after_step(m, batch, held, a-e))/2e-2/1e-4
        assert got[n].item() == pytest.approx(want, rel=.02, abs=1e-4)


def test_auto_sample_ends_with_a_candidate_and_repeats(train):
    split = ratio_split(train, .2, .1)
    def run():
        set_seed(0)
        m = MF(60, 40, 4)
        return (
            *auto_sample(
                m,
                split.train,
                split.valid,
                {"uniform": fixed_sampler(split.train), "dns": dns_sampler(split.train)},
                steps=20,
                stride=2,
                batch_size=64,
            )[:2],
            m.E0.detach(),
        )
    (a, ha, Ea), (b, _, Eb) = run(), run()
    assert (
        a == b
        and a in ("uniform", "dns")
        and torch.equal(Ea, Eb)
        and np.allclose(ha[["uniform", "dns"]].sum(axis=1), 1)
    )


def test_sampled_bpr_with_a_fixed_negative_is_bpr(train):
    m = MF(60, 40, 4)
    u, i = torch.tensor([0, 1]), torch.tensor([3, 4])
    fixed = lambda u, p, m: torch.tensor([[7], [8]])
    U, I = m()
    want = F.softplus((U[u]*(I[[7, 8]]-I[i])).sum(1)).mean()
    assert sampled_bpr(m, (u, i), fixed, 0.).item() == pytest.approx(want.item(), rel=1e-6)


# two towers

def test_mutual_information_is_sklearns():
    rng = np.random.default_rng(0)
    a = rng.integers(5, size=400)
    b = (a + rng.integers(3, size=400)) % 7
    assert mutual_information(a, b) == pytest.approx(mutual_info_score(a, b), rel=1e-9)
    assert mutual_information(a, a) == pytest.approx(mutual_info_score(a, a)) and mutual_information(a, 0*a) == 0


def test_planted_blocks_are_found():
    f = World(1, 50, 800, clicks_per_user=10).item_fields
    M = field_relatedness(f)
    block = np.array([c[:-1] for c in f.columns[:9]])
    same = block[:, None] == block
    off = M[:9, :9][~same]
    on = M[:9, :9][same & ~np.eye(9, dtype=bool)]
    assert on.min() > 1.3*off.max() and not M[9].any() and np.allclose(M, M.T)


def test_cfm_hides_related_fields_together():
    f = World(1, 50, 800, clicks_per_user=10).item_fields
    M = field_relatedness(f)
    block = np.array([c[:-1] for c in f.columns[:9]])
    for s in range(30):
        a, b = view_mask(10, "cfm", M, np.random.default_rng(s))
        assert (a ^ b).all() and a.sum() == 6
        whole = [a[:9][torch.from_numpy(block == x)].float().mean().item() for x in set(block)]
        assert max(whole) == 1 or a[9] # the seed's block is hidden as a whole, unless the id was the seed
    a, b = view_mask(10, "rfm", rng=np.random.default_rng(0))
    assert (a ^ b).all() and a.sum() == 5
    a, b = view_mask(10, "fd", rng=np.random.default_rng(0))
    assert torch.equal(a, b) and a.sum() == 5
    assert not torch.stack(view_mask(10, "spread")).any()


def test_tower_ignores_what_is_hidden_and_what_is_padding():
    many = np.array([[0, 1, -1], [2, -1, -1], [1, 0, -1], [-1, -1, -1]])
    one = np.array([0, 1, 0, 1])
    set_seed(0)
    t = ItemTower([one, many], dim=4).eval()
    all_ = torch.arange(4)
    z = t(all_)
    assert (
        torch.allclose(z[0], z[2], atol=1e-6)
        and not torch.allclose(z[1], z[3])
        and torch.allclose(z.norm(dim=1), torch.ones(4))
    )
    h = t(all_, torch.tensor([False, True]))
    assert torch.allclose(h[1], h[3], atol=1e-6) # differ only in the hidden field
    assert torch.allclose(t(all_, drop=1.), t(all_, torch.tensor([True, True])), atol=1e-6)


def test_batch_softmax_options():
    g = torch.Generator().manual_seed(0)
    Q, X = (F.normalize(torch.randn(4, 5, generator=g), dim=1) for _ in range(2))
    lf = torch.rand(4, generator=g)
    S = Q @ X.T/.2 - lf
    assert batch_softmax(Q, X, .2, lf).item() == pytest.approx((S.logsumexp(1) - S.diag()).mean().item(), rel=1e-5)
    ids = torch.tensor([1, 1, 2, 3])
    S = Q @ X.T/.1
    S[0, 1] = S[1, 0] = -torch.inf
    assert batch_softmax(Q, X, ids=ids).item() == pytest.approx((S.logsumexp(1) - S.diag()).mean().item(), rel=1e-5)


@pytest.mark.parametrize("how", [None, "fd", "spread", "rfm", "cfm"])
def test_two_tower_learns_and_repeats(w, train, how):
    f = w.item_fields
    out = []
    for _ in range(2):
        set_seed(0)
        m = CatalogueTowers(60, ItemTower([f[c] for c in f], dim=4, hidden=16, out=8))
        out.append(train_two_tower(m, train, how, field_relatedness(f), steps=30, batch_size=64).loss.tolist())
    assert out[0] == out[1] and out[0][-1] < out[0][0]


@pytest.mark.parametrize("uniform", [True, False])
def test_items_of_the_contrastive_task_follow_their_distribution(train, uniform):
    task, seen = SelfSupervision(train, "rfm", uniform=uniform, n=400), []
    f = World(3, 60, 40, clicks_per_user=6).item_fields
    tower = ItemTower([f[c] for c in f], dim=4, hidden=8, out=4)
    tower.register_forward_pre_hook(lambda m, args: seen.append(set(args[0].tolist())))
    assert torch.isfinite(task(tower)) and seen[0] == seen[1]
    clicked_items = set(train.item.tolist())
    assert seen[0] <= clicked_items if not uniform else seen[0] - clicked_items


# bad input

def test_bad_input(train, truth):
    gamma, theta, logits = truth
    with pytest.raises(ValueError, match="cannot be weighed"):
        ips_loss(logits, gamma, theta*0)
    with pytest.raises(ValueError, match="kind='hinge'"):
        point_losses(logits, "hinge")
    with pytest.raises(ValueError, match="weight=0"):
        wmf_loss(logits, gamma, 0)
    with pytest.raises(ValueError, match="version='sum'"):
        nbpo_weights(.5, .5, True, "sum")
    with pytest.raises(ValueError, match="version='x'"):
        NBPO(3, 3, "x")
    with pytest.raises(ValueError, match="prior"):
        expomf(np.eye(3), prior=(.5, 3.))
    with pytest.raises(ValueError, match="n=0"):
        fixed_sampler(train, 0)
    with pytest.raises(ValueError, match="M=0"):
        dns_sampler(train, M=0)
    with pytest.raises(ValueError, match="lam=0"):
        aobpr_sampler(train, lam=0)
    with pytest.raises(ValueError, match="asks the model"):
        dns_sampler(train)(torch.tensor([0]), torch.tensor([0]), None)
    with pytest.raises(ValueError, match="no negative exists"):
        fixed_sampler(Interactions(pd.DataFrame(dict(user=[0, 0], item=[0, 1])), 1, 2))
    with pytest.raises(ValueError, match="relatedness"):
        view_mask(4, "cfm")
    with pytest.raises(ValueError, match="how='all'"):
        view_mask(4, "all")
    with pytest.raises(ValueError, match="one value per item"):
        mutual_information([1, 2], [1])
    with pytest.raises(ValueError, match="different lengths"):
        ItemTower([np.arange(3), np.arange(4)])
    with pytest.raises(ValueError, match="tau=0"):
        batch_softmax(torch.eye(2), torch.eye(2), 0)
    with pytest.raises(ValueError, match="nothing|no user"):
        dcg(torch.zeros(2, 5), torch.zeros(2, 5), torch.ones(2, 5))


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(theta=1.5), "theta"),
        (dict(theta=torch.tensor([0.5, float("nan")])), "theta"),
        (dict(theta=-0.1), "theta"),
        (dict(Y=torch.tensor([0.0, 5.0])), "Y from 0 to 5"),
        (dict(Y=torch.tensor([-1.0, 1.0])), "Y"),
        (dict(M=2.0), "M from 2"),
    ],
)
def test_shares_outside_0_to_1_are_refused(kw, says):
    with pytest.raises(ValueError, match=says):
        ips_loss(torch.zeros(2), **(dict(Y=torch.tensor([0., 1.])) | kw))


@pytest.mark.parametrize("alpha", [[.5, .6], [1.5, -.5], [0., 0.], [float("nan"), 1.]])
def test_a_mixture_off_the_simplex_is_refused(alpha):
    U, I, one = torch.ones(2, 3), torch.ones(4, 3), torch.tensor([0, 1])
    for instance in (True, False):
        with pytest.raises(ValueError, match="sum to 1"):
            mixture_loss(U, I, one, one, torch.tensor([[2, 3], [2, 3]]), torch.tensor(alpha), instance)


def test_a_search_on_training_clicks_is_refused():
    x = Interactions(pd.DataFrame(dict(user=[0, 0, 1], item=[0, 1, 2])), 2, 5)
    with pytest.raises(ValueError, match="3 of 3 validation clicks"):
        auto_sample(MF(2, 5, 4), x, x, {"uniform": fixed_sampler(x)}, steps=2)


def test_the_search_differentiates_the_model_that_is_scored():
    class Dropping(MF):
        def forward(self): return tuple(F.dropout(x, .5, self.training) for x in super().forward())
    set_seed(0)
    m = Dropping(5, 8, 4)
    b = torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), torch.randint(8, (3, 2))
    held = torch.tensor([0, 1]), torch.tensor([6, 7]), torch.arange(4)
    a, c = (search_gradient(m, b, held, torch.zeros(2)) for _ in range(2))
    assert torch.equal(a[0], c[0]) and a[1] == c[1] and m.training


def test_dcg_sees_small_differences_refuses_nan_and_breaks_ties_by_item():
    from recbook.collaborative.implicit import dcg
    one = np.ones((1, 2))
    assert dcg(np.array([[1., 1 + 1e-9]]), np.array([[0, 1.]]), one, 1) == 1
    with pytest.raises(ValueError, match="NaN"):
        dcg(np.full((1, 4), np.nan), np.eye(1, 4), np.ones((1, 4)), 1)
    assert dcg(np.zeros((1, 50)), np.eye(1, 50), np.ones((1, 50)), 1) == 1


def test_a_missing_value_is_a_category():
    from recbook.collaborative.implicit import mutual_information
    assert mutual_information([0, 1, 1, 0], [0., 1, np.nan, 1]) == pytest.approx(.3466, abs=1e-3)


def test_scoring_candidates_leaves_batch_statistics_alone_and_lists_belong_to_their_model():
    from recbook.baselines import SortedFactors
    class Normed(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.U, self.I, self.bn = (
                torch.nn.Parameter(torch.randn(6, 4)),
                torch.nn.Parameter(torch.randn(9, 4)),
                torch.nn.BatchNorm1d(4),
            )
        def forward(self): return self.U, self.bn(self.I)
    m = Normed().train()
    pair_scores(m, torch.arange(6), torch.zeros(6, 2, dtype=torch.long))
    assert m.bn.num_batches_tracked == 0 and m.training and m.bn.training
    lists, up, down = (
        SortedFactors(20),
        lambda: (torch.ones(6, 1), torch.arange(9.0)[:, None]),
        lambda: (torch.ones(6, 1), -torch.arange(9.0)[:, None]),
    )
    assert lists(up)[1][0] == 8 and lists(down)[1][0] == 0
