"Towers, their losses and quantisers against plain torch, scikit-learn and algebra."
import numpy as np, pytest, torch
import torch.nn.functional as F
from recbook.towers import ProductQuantizer, Tower, TwoTower, batch_softmax, kmeans, sampled_softmax


def two(q, x, d): return TwoTower(Tower(q, d), Tower(x, d))


def test_a_tower_is_a_perceptron_on_mean_values():
    torch.manual_seed(0)
    t = Tower([3, 4], 5, dim=2, hidden=6, columns=[1, 3], unit=True)
    x = torch.tensor([[2, 0, 3, -1], [0, -1, -1, -1]])
    V = t.values.weight
    first = torch.cat([V[2], (V[3] + V[6])/2])
    second = torch.cat([V[0], t.default[1]])
    want = F.normalize(t.mlp(torch.stack([first, second])), dim=1)
    torch.testing.assert_close(t(x), want)
    hidden = t(x, hide=torch.tensor([True, True]))
    torch.testing.assert_close(hidden[0], F.normalize(t.mlp(t.default.flatten()), dim=0))
    torch.testing.assert_close(t(x, drop=1.), hidden)


def test_towers_take_any_module():
    users = torch.nn.Embedding(4, 3)
    m = TwoTower(users, Tower([5], 3))
    u, x = torch.arange(4), torch.arange(5)[:, None]
    torch.testing.assert_close(m(u, x), users.weight @ m.item(x).T)


def test_sampled_softmax_never_counts_the_positive_as_negative():
    m = two([2], [3], 2)
    q, x = torch.zeros(4, 1, dtype=int), torch.arange(3)[:, None]
    assert sampled_softmax(m, (q, torch.zeros(4, dtype=int)), x[:1], 20).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("p", [None, torch.tensor([.6, .3, .1])])
def test_sampled_softmax_is_corrected_for_how_items_are_drawn(p):
    torch.manual_seed(0)
    m, q, x = two([2], [3], 2), torch.zeros(1, 1, dtype=int), torch.arange(3)[:, None]
    torch.manual_seed(1)
    loss = sampled_softmax(m, (q, torch.tensor([1])), x, 40, tau=.5, p=p)
    torch.manual_seed(1)
    neg = torch.randint(3, (40,)) if p is None else torch.multinomial(p, 40, True)
    y = m(q, x)[0]/.5 - (0 if p is None else p.log())
    assert loss.item() == pytest.approx((torch.cat([y[1:2], y[neg[neg != 1]]]).logsumexp(0) - y[1]).item(), abs=1e-5)


def test_batch_softmax_by_hand():
    torch.manual_seed(0)
    Q, X, ids, f = torch.randn(4, 3), torch.randn(4, 3), torch.tensor([7, 8, 7, 9]), torch.rand(4).log()
    total = 0
    for i in range(4):
        y = {j: Q[i] @ X[j]/.3 - f[j] for j in range(4) if j == i or ids[j] != ids[i]}
        total += torch.stack(list(y.values())).logsumexp(0) - y[i]
    torch.testing.assert_close(batch_softmax(Q, X, .3, f, ids), total/4)


def test_quantizer_passes_the_gradient_and_trains_its_words():
    torch.manual_seed(0)
    vq = ProductQuantizer(4, 2, 3)
    t = torch.randn(50, 4, requires_grad=True)
    out = vq(t)
    g = torch.randn_like(out)
    (out*g).sum().backward()
    torch.testing.assert_close(t.grad, g)
    t.grad = None
    vq(t)
    vq.loss.backward()
    c = vq.words(vq.codes(t)).detach()
    torch.testing.assert_close(t.grad, vq.beta*2*(t.detach()-c)/50)
    m, n = 0, int(vq.codes(t)[0, 0])
    mine = vq.codes(t)[:, 0] == n
    torch.testing.assert_close(vq.C.grad[m, n], (2*(vq.C[m, n]-t[mine, :2])/50).sum(0).detach())


def test_dead_words_come_back():
    torch.manual_seed(0)
    vq = ProductQuantizer(2, 1, 4)
    t = torch.randn(100, 2)
    with torch.no_grad():
        vq.C[0, 3] = 1e3
    before = vq.perplexity(t)[0]
    for _ in range(400):
        vq(t)
    assert vq.C.abs().max() < 10 and vq.perplexity(t)[0] > before


def test_kmeans_finds_what_sklearn_finds():
    from sklearn.cluster import KMeans
    X = np.repeat(np.eye(4)*5, 25, 0) + np.random.default_rng(0).normal(size=(100, 4))*.1
    ours, theirs = kmeans(X, 4), KMeans(4, n_init=5, random_state=0).fit(X).cluster_centers_
    np.testing.assert_allclose(ours[ours.argmax(1).argsort()], theirs[theirs.argmax(1).argsort()], atol=1e-4)


V = torch.eye(2)
@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: Tower([3], 2, columns=[1, 2]), "2 numbers of columns for 1"),
        (lambda: Tower([0], 2), "size=0"),
        (lambda: Tower([3], 2)(torch.tensor([[3]])), "value 3"),
        (lambda: Tower([3], 2)(torch.tensor([3])), "shape"),
        (lambda: batch_softmax(V, V, 0.), "tau=0"),
        (lambda: batch_softmax(V, V[:1]), "row of X"),
        (lambda: sampled_softmax(two([2], [2], 2), (V.long(), V[0].long()), V.long(), tau=-1.), "tau=-1|shape"),
        (lambda: kmeans(np.eye(3), 4), "4 clusters for 3"),
        (lambda: kmeans(np.eye(3)*np.nan, 2), "NaN"),
        (lambda: ProductQuantizer(5, 2), "cannot be cut"),
        (lambda: ProductQuantizer(4, 0), "M=0"),
    ],
)
def test_what_would_be_silently_wrong_is_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize("off", [0., 1e3, 3e3])
def test_codes_are_the_nearest_words_far_from_the_origin(off):
    from recbook.towers import ProductQuantizer
    torch.manual_seed(0)
    t = torch.randn(100, 8) + off
    q = ProductQuantizer(8, 2, 32)
    q.start(t)
    q.eval()
    parts = t.double().reshape(100, 2, 4).transpose(0, 1)
    want = (parts[:, :, None] - q.C.detach().double()[:, None]).square().sum(-1).argmin(2).T
    assert (q.codes(t) == want).float().mean() > .99


def test_towers_take_any_size_and_type_and_weights_must_reach_the_positives():
    from recbook.towers import Tower, sampled_softmax
    with torch.autocast("cpu", torch.bfloat16):
        assert Tower([1001], 4)(torch.tensor([[1000]])).shape == (1, 4)
    for kind in (torch.float64, torch.bfloat16):
        assert Tower([5], 4).to(kind)(torch.tensor([[4], [-1]])).dtype == kind
    with pytest.raises(ValueError, match="Fix: 0..1000"):
        Tower([1001], 4)(torch.tensor([[1001]]))
    with pytest.raises(ValueError, match="item 1 has sampling weight 0"):
        sampled_softmax(
            None, (torch.zeros(1, 1), torch.tensor([1])), torch.zeros(3, 1), 1, p=torch.tensor([0.5, 0.0, 0.5])
        )
