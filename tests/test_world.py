"World: deterministic across processes, true to its own probabilities, and honest about rho."
import hashlib, subprocess, sys
from time import perf_counter
import numpy as np, pandas as pd, pytest
from recbook.world import CUES, World

DIGEST = (
    "import hashlib; from recbook.world import World; w = World(3, 200, 100, clicks_per_user=10); "
    "h = hashlib.sha256(); h.update(w.events.to_csv().encode()); h.update(w.relevance.tobytes()); "
    "h.update(w.policy.tobytes()); "
    "h.update('|'.join(w.corpus()).encode()); h.update(w.random_exposure(5).to_csv().encode()); print(h.hexdigest())"
)


@pytest.fixture(scope="module")
def w(): return World(0)


def test_the_same_bytes_in_every_process():
    outs = {
        subprocess.run([sys.executable, "-c", DIGEST], capture_output=True, text=True, check=True, env=None).stdout
        for _ in range(2)
    }
    assert len(outs) == 1


def test_order_of_asking_does_not_matter():
    a, b = World(1, 100, 60, clicks_per_user=5), World(1, 100, 60, clicks_per_user=5)
    b.corpus()
    b.random_exposure(3)
    assert b.policy.any()
    assert a.events.equals(b.events) and a.items.equals(b.items) and a.corpus() == b.corpus()


def test_clicks_follow_their_probabilities(w):
    p = w.click_probability
    got = w.interactions.csr().toarray()
    z = (got.sum(0)-p.sum(0))/np.sqrt((p*(1-p)).sum(0))
    assert abs(z.mean()) < 4/500**.5 and .85 < z.std() < 1.15
    bins = np.digitize(p.ravel(), np.quantile(p, np.linspace(0, 1, 11)[1:-1]))
    for b in range(10):
        want = float(p.ravel()[bins == b].mean())
        assert got.ravel()[bins == b].mean() == pytest.approx(want, abs=5*(want/5e4)**.5)


def test_random_exposure_shows_items_uniformly_and_clicks_by_relevance(w):
    t = w.random_exposure(50)
    assert not t.duplicated(["user", "item"]).any() and (t.groupby("user").size() == 50).all()
    assert t.click.mean() == pytest.approx(w.relevance[t.user, t.item].mean(), abs=.01)
    shown = np.bincount(t.item, minlength=500)
    assert shown.std() < 1.5*(50_000/500*.9)**.5


@pytest.mark.parametrize("rho", [0., .5, 1.])
def test_rho_is_the_share_that_text_explains(rho):
    w = World(2, 400, 2000, rho=rho)
    X = pd.get_dummies(w.items[list(CUES)]).to_numpy(float)
    X -= X.mean(0)
    S = w.affinity - w.affinity.mean(1, keepdims=True)
    assert (X @ np.linalg.lstsq(X, S.T, rcond=None)[0]).var()/S.var() == pytest.approx(rho, abs=.05)


def test_titles_are_unique_and_say_the_attributes():
    w = World(5, 10, 3000)
    assert w.items.title.is_unique
    for r in w.items.head(200).itertuples():
        mood, genre, _, _, era, setting = r.title.split()[:6]
        assert era in CUES["era"][r.era]
        assert (
            mood in CUES["mood"][r.mood] and genre in CUES["genre"][r.genre] and setting in CUES["setting"][r.setting]
        )


def test_reviews_come_from_everybody_who_was_shown_the_item_and_say_their_stars(w):
    r = w.reviews(4000)
    shown = set(zip(w.impressions.user, w.impressions.item))
    assert set(zip(r.user, r.item)) <= shown
    clicked = set(zip(w.events.user, w.events.item))
    assert .05 < np.mean([k not in clicked for k in zip(r.user, r.item)]) < .95
    share = r.rating.value_counts(normalize=True)
    assert share[1] > .02 and share[2] > .05 and share[5] > share[3] > share[1]
    tone = {1: "hated", 2: "bored", 3: "fine:", 4: "liked", 5: "loved"}
    for x in r.head(300).itertuples():
        it = w.items.iloc[x.item]
        assert it.title in x.text and tone[int(x.rating)] in x.text.split(" and I ")[1]
        said = x.text.split(": ")[1]
        assert any(it[a] in said for a in ("mood", "genre", "setting"))
    truth = w.impressions.set_index(["user", "item"]).rating
    assert all(truth[(u, i)] == s for u, i, s in zip(r.user[:200], r.item[:200], r.rating[:200]))


def test_times_rise_and_sessions_are_short(w):
    e = w.events
    assert (e.groupby("user").time.diff().dropna() >= 0).all() and (e.time >= 0).all()
    assert e.groupby("session").user.nunique().max() == 1
    length = e.groupby("session").time.agg(np.ptp)
    assert length.median() < .1


def test_policy_and_exposure_are_probabilities(w):
    assert w.policy.sum(1) == pytest.approx(np.ones(1000), abs=1e-4)
    assert (
        0 <= w.exposure.min() and w.exposure.max() <= 1 and w.relevance.mean() == pytest.approx(w.like_rate, abs=1e-3)
    )
    assert w.click_probability.sum(1).mean() == pytest.approx(w.clicks_per_user, rel=.01)


def test_the_corpus_never_says_who_clicked(w):
    assert not any("user" in t.lower() for t in w.corpus(1))


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(rho=1.5), "rho=1.5"),
        (dict(n_items=0), "n_items=0"),
        (dict(clicks_per_user=400), "clicks_per_user=400"),
        (dict(like_rate=0), "like_rate=0"),
    ],
)
def test_bad_sizes(kw, says):
    with pytest.raises(ValueError, match=says):
        World(**kw)


def test_random_exposure_of_too_many():
    with pytest.raises(ValueError, match="n=600"):
        World(0, 10, 500).random_exposure(600)


@pytest.mark.parametrize(
    "kw",
    [
        dict(kappa=float("nan")),
        dict(zipf=float("inf")),
        dict(rho=float("nan")),
        dict(like_rate=float("nan")),
        dict(clicks_per_user=float("nan")),
        dict(kappa="1"),
        dict(zipf=None),
        dict(n_users=2.5),
        dict(n_items=True),
        dict(dim=0),
        dict(seed=-1),
        dict(seed=2.5),
    ],
)
def test_a_world_that_cannot_be_is_refused_by_name(kw):
    with pytest.raises(ValueError, match=f"{list(kw)[0]}="):
        World(**kw)


def test_how_many_is_a_whole_number():
    w = World(0, 20, 60, clicks_per_user=5)
    for call in (
        lambda: w.random_exposure(2.5),
        lambda: w.random_exposure(0),
        lambda: w.reviews(0),
        lambda: w.reviews(2.5),
        lambda: w.corpus(0),
    ):
        with pytest.raises(ValueError, match="whole number"):
            call()


def test_an_aspect_name_is_taken_once():
    from recbook.world import aspect
    def made(name, module):
        def f(self, rng): return 0
        f.__name__, f.__module__ = name, module
        return f
    aspect(made("only_here", "a"))
    aspect(made("only_here", "a"))
    with pytest.raises(ValueError, match="from a"):
        aspect(made("only_here", "b"))


def test_a_world_is_the_same_before_and_after_it_is_looked_at():
    from recbook.provenance import digest
    w = World(0, 50, 40, clicks_per_user=5)
    before = digest(w)
    assert len(w.interactions)
    assert (
        digest(w)
        == before
        == digest(World(0, 50, 40, clicks_per_user=5))
        != digest(World(1, 50, 40, clicks_per_user=5))
    )
