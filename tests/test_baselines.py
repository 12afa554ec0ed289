"Popularity, matrix factorisation, its loss and its negatives against counts, autograd by hand and sets."
import numpy as np, pandas as pd, pytest, torch
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
