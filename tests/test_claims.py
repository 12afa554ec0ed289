"Intervals against scipy and simulation, verdicts by hand, records that survive JSON."
import json
import numpy as np, pytest
from scipy.stats import ttest_rel
from recbook.claims import claim, find_claim, holm, ledger, level, paired_interval, papers, two_way_error, verdict


def test_interval_is_students_for_one_value_a_seed():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 30):
        a, b = rng.normal(size=(2, n))
        r = ttest_rel(a, b); ci = r.confidence_interval()
        assert paired_interval(a-b) == pytest.approx((np.mean(a-b), ci.low, ci.high, r.pvalue))


def test_two_way_interval_covers_new_seeds_and_new_users():
    rng = np.random.default_rng(1)
    hit = []
    for _ in range(150):
        d = .3 + rng.normal(0, .2, (8, 1)) + rng.normal(0, 1, (1, 200)) + rng.normal(0, .5, (8, 200))
        _, lo, hi, _ = paired_interval(d, draws=200)
        hit.append(lo <= .3 <= hi)
    assert .88 < np.mean(hit) <= 1


def test_two_way_error_is_deterministic_and_sees_both_sources():
    rng = np.random.default_rng(2)
    seeds_only, users_only = np.repeat(rng.normal(size=(10, 1)), 50, 1), np.repeat(rng.normal(size=(1, 50)), 10, 0)
    assert two_way_error(seeds_only, 500) == two_way_error(seeds_only, 500)
    assert two_way_error(seeds_only, 4000) == pytest.approx(seeds_only[:, 0].std()/10**.5, rel=.1)
    assert two_way_error(users_only, 4000) == pytest.approx(users_only[0].std()/50**.5, rel=.1)


@pytest.mark.parametrize("lo, hi, direction, margin, want", [
    (.1, .2, "higher", 0, "supported"), (-.2, -.1, "higher", 0, "refuted"), (-.1, .1, "higher", 0, "inconclusive"), (0, .1, "higher", 0, "inconclusive"),
    (.1, .2, "lower", 0, "refuted"), (-.2, -.1, "lower", 0, "supported"), (-.2, -.1, "lower", .15, "inconclusive"), (-.3, -.2, "lower", .15, "supported"),
    (.1, .2, "higher", .05, "supported"), (.1, .2, "higher", .3, "refuted"),
    (-.1, .1, "equal", .2, "supported"), (-.3, .1, "equal", .2, "inconclusive"), (.3, .4, "equal", .2, "refuted")])
def test_verdicts(lo, hi, direction, margin, want): assert verdict(lo, hi, direction, margin) == want


def test_holm_by_its_definition():
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = rng.random(6)**3
        for alpha in (.01, .05, .2):
            rejected = set()
            for rank, k in enumerate(np.argsort(p)):
                if p[k] > alpha/(6-rank): break
                rejected.add(k)
            assert rejected == set(np.flatnonzero(holm(p) <= alpha))


def test_record_is_complete_and_plain_json():
    r = claim("lightgcn.1", [.2, .21, .22], [.1, .12, .11], "world", seeds=[5, 6, 7])
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    assert r["verdict"] == "supported" and r["effect"] == pytest.approx(.1) and r["seeds"] == [5, 6, 7] and r["reported"]["ours"] == .1823
    assert {"id", "paper", "statement", "metric", "dataset", "seeds", "ours", "theirs", "effect", "ci", "verdict", "reported"} <= set(r)


def test_one_seed_gives_no_interval_and_no_verdict():
    r = claim("lightgcn.1", [.2], [.1])
    assert r["ci"] == [None, None] and r["verdict"] == "inconclusive"
    json.dumps(r, allow_nan=False)


def test_users_and_thresholds():
    rng = np.random.default_rng(4)
    r = claim("lightgcn.1", rng.normal(1, .1, (4, 100)), rng.normal(0, .1, (4, 100)))
    assert len(r["ours"]) == 4 and r["verdict"] == "supported"
    assert claim("gte.3", [.01, .011, .012], 1/20)["verdict"] == "supported"


def test_a_star_marks_verdicts_that_do_not_survive_holm():
    weak = claim("lightgcn.1", [.012, .01, .03, .021, .009], [0]*5)
    rows = ledger([weak]*40)
    assert weak["verdict"] == "supported" and set(rows.verdict) == {"supported*"} and set(ledger([weak]).verdict) == {"supported"}


@pytest.mark.parametrize("call, says", [
    (lambda: claim("lightgcm.1", [1], [1]), "did you mean lightgcn.1"), (lambda: claim("lightgcn.1", [1, 2], [1]), "pair up"),
    (lambda: claim("lightgcn.1", [np.nan], [1]), "NaN"), (lambda: claim("lightgcn.1", [1, 2], [1, 2], seeds=[0]), "1 seeds for 2 values"),
    (lambda: verdict(0, 1, "up"), "direction='up'"), (lambda: papers("graph"), "unknown area"), (lambda: find_claim("x"), "unknown claim")])
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says): call()


def test_ladder():
    rec = dict(dataset="gowalla", ours=[.181, .182], reported=dict(ours=.1823, on="gowalla"))
    assert [level([], False), level([], True), level([rec | dict(dataset="world, thin")], True), level([rec | dict(ours=[.16])], True), level([rec], True)] == [0, 1, 2, 3, 4]
    assert level([rec | dict(dataset="movielens-100k, semi-synthetic, p=2")], True) == 2
