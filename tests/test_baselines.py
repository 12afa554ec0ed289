"Popularity, matrix factorisation, its loss and its negatives against counts, autograd by hand and sets."
import numpy as np, pandas as pd, pytest, torch
from recbook import baselines as B
from recbook.baselines import MF, bpr_loss, clicked, popularity, train_bpr, uniform_negatives
from recbook.data import Interactions, ratio_split
from recbook.metrics import dot, evaluate
from recbook.world import World


@pytest.fixture(scope="module")
def split(): return ratio_split(World(0, 120, 60, clicks_per_user=10).interactions, test=.2, valid=.1, seed=0)


def test_popularity_counts_clicks(split):
    scores = popularity(split.train)(torch.arange(3))
    counts = split.train.df.item.value_counts().reindex(range(60), fill_value=0)
    assert scores.shape == (3, 60) and (scores.numpy() == counts.to_numpy()).all()


def test_bpr_gradient_is_rendles(split):
    "d/de_u = -sigmoid(-x) (e_i - e_j) + l2 e_u for one triple."
    torch.manual_seed(0)
    m = MF(2, 3, dim=4)
    bpr_loss(m, (torch.tensor([1]), torch.tensor([0]), torch.tensor([2])), l2=.3).backward()
    eu, ei, ej = m.E0[1].detach(), m.E0[2].detach(), m.E0[4].detach()
    pull = torch.sigmoid(-(eu @ (ei - ej)))
    torch.testing.assert_close(m.E0.grad[1], -pull*(ei - ej) + .3*eu)
    torch.testing.assert_close(m.E0.grad[2], -pull*eu + .3*ei)
    torch.testing.assert_close(m.E0.grad[4], pull*eu + .3*ej)
    assert (m.E0.grad[[0, 3]] == 0).all()


def test_negatives_are_never_clicked_and_uniform():
    train = Interactions(pd.DataFrame(dict(user=[0, 0, 1], item=[1, 3, 0])), 2, 5)
    u, i = torch.zeros(30_000, dtype=torch.long), torch.ones(30_000, dtype=torch.long)
    _, _, j = uniform_negatives(train, 0)(u, i)
    share = np.bincount(j, minlength=5)/len(j)
    assert share[[1, 3]].sum() == 0
    np.testing.assert_allclose(share[[0, 2, 4]], 1/3, atol=.015)


def test_a_user_without_negatives_is_named():
    with pytest.raises(ValueError, match="a user has all 2 items"):
        uniform_negatives(Interactions(pd.DataFrame(dict(user=[0, 0], item=[0, 1])), 1, 2))


def test_clicked_finds_pairs_as_a_set_does():
    keys, asked = torch.tensor([2, 5, 9]), torch.arange(12)
    assert clicked(keys, asked).tolist() == [a in {2, 5, 9} for a in range(12)]


def test_training_beats_what_was_not_trained(split):
    torch.manual_seed(0)
    m = MF(120, 60, dim=16)
    before = evaluate(dot(*m()), split.valid, split.train).mean()["recall@20"]
    history = train_bpr(m, split.train, split.valid, epochs=10, batch_size=128, lr=.02, l2=1e-3)
    after = evaluate(dot(*m()), split.valid, split.train).mean()["recall@20"]
    assert after > before + .05 and len(history)


def test_the_baselines_are_still_found_in_the_chapter_they_come_from():
    space = {}
    exec("from recbook.collaborative.graph_cf import *", space)
    assert {"MF", "bpr_loss", "clicked", "popularity", "train_bpr", "uniform_negatives"} <= set(space)


def test_shard_models_train_what_was_asked_and_give_back_the_rest():
    done = []
    def train(k):
        done.append(k)
        return object()
    first = B.shard_models(train, 3)
    after = B.shard_models(train, 3, first, [1, 1])
    assert done == [0, 1, 2, 1] and after[0] is first[0] and after[2] is first[2] and after[1] is not first[1]
    with pytest.raises(ValueError, match="2 models for 3 shards"):
        B.shard_models(train, 3, first[:2])
    with pytest.raises(ValueError, match=r"shards \[3\] beside 0..2"):
        B.shard_models(train, 3, first, [3])

def test_balanced_shards_are_equal_in_size_and_keep_clusters():
    rng = np.random.default_rng(0)
    centres = np.array([[0, 0], [9, 0], [0, 9], [9, 9]])
    truth = rng.permutation(np.repeat(range(4), 10))
    found = B.balanced_shards(centres[truth] + rng.normal(size=(40, 2)), 4, seed=3)
    assert (np.bincount(found) == 10).all()
    from sklearn.metrics import adjusted_rand_score
    assert max(adjusted_rand_score(truth, B.balanced_shards(centres[truth] + rng.normal(size=(40, 2)), 4, seed=s))
        for s in range(4)) == 1
    assert np.bincount(B.balanced_shards(rng.normal(size=(11, 3)), 4)).max() <= 3
    with pytest.raises(ValueError, match="n_shards=5 for 3 users"):
        B.balanced_shards(np.zeros((3, 2)), 5)
    with pytest.raises(ValueError, match="not finite"):
        B.balanced_shards(np.full((3, 2), np.nan), 2)

def test_shard_mixture_against_loops():
    torch.manual_seed(0)
    E = torch.randn(7, 3, 4)
    m = B.ShardMixture(E, 4)
    for p in m.parameters():
        torch.nn.init.normal_(p)
    for v in range(7):
        X = torch.stack([m.W[s] @ E[v, s] + m.b[s] for s in range(3)])
        a = (m.of_users if v < 4 else m.of_items)(X)[:, 0].softmax(0)
        torch.testing.assert_close(m.E0[v], sum(a[s]*X[s] for s in range(3)), atol=1e-5, rtol=1e-4)
    assert [len(x) for x in m()] == [4, 3]
    with pytest.raises(ValueError, match="n_users=7: E has 7 rows"):
        B.ShardMixture(E, 7)

def test_mixing_trains_the_mixture_only_and_beats_a_single_shard():
    x = World(0, 60, 50, clicks_per_user=8).interactions
    shard = x.user % 2
    def train(k):
        torch.manual_seed(k)
        m = B.MF(60, 50, 8)
        B.train_bpr(m, x.subset(shard == k), epochs=20, lr=.02)
        return m
    models = B.shard_models(train, 2)
    before = [m.E0.detach().clone() for m in models]
    loss = lambda m: B.bpr_loss(m, B.uniform_negatives(x)(*torch.tensor(np.array([x.user, x.item]))), 0.).item()
    mix = B.mix_shards(models, x, epochs=30, lr=.01)
    assert loss(mix) < min(map(loss, models))
    assert all(torch.equal(a, m.E0) for a, m in zip(before, models))
    again = B.mix_shards(models, x, epochs=30, lr=.01)
    assert torch.equal(mix.E0, again.E0)
