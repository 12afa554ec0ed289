"Intervals against scipy and simulation, verdicts by hand, records that survive JSON."
import json
import numpy as np, pytest
from scipy.stats import ttest_rel
import pandas as pd
from recbook import claims
from recbook.claims import (
    card,
    claim,
    detectable,
    exact,
    find_claim,
    holm,
    is_provisional,
    ledger,
    level,
    measure,
    notes,
    paired_error,
    paired_interval,
    papers,
    results,
    two_way_error,
    verdict,
)
from recbook.provenance import Store
from recbook.trials import Case, Method, Outcome, over_seeds


def test_interval_is_students_for_one_value_a_seed():
    rng = np.random.default_rng(0)
    for n in (2, 3, 5, 30):
        a, b = rng.normal(size=(2, n))
        r = ttest_rel(a, b)
        ci = r.confidence_interval()
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


@pytest.mark.parametrize(
    "lo, hi, direction, margin, want",
    [
        (0.1, 0.2, "higher", 0, "supported"),
        (-0.2, -0.1, "higher", 0, "refuted"),
        (-0.1, 0.1, "higher", 0, "inconclusive"),
        (0, 0.1, "higher", 0, "inconclusive"),
        (0.1, 0.2, "lower", 0, "refuted"),
        (-0.2, -0.1, "lower", 0, "supported"),
        (-0.2, -0.1, "lower", 0.15, "inconclusive"),
        (-0.3, -0.2, "lower", 0.15, "supported"),
        (0.1, 0.2, "higher", 0.05, "supported"),
        (0.1, 0.2, "higher", 0.3, "refuted"),
        (-0.1, 0.1, "equal", 0.2, "supported"),
        (-0.3, 0.1, "equal", 0.2, "inconclusive"),
        (0.3, 0.4, "equal", 0.2, "refuted"),
    ],
)
def test_verdicts(lo, hi, direction, margin, want):
    assert verdict(lo, hi, direction, margin) == want


def test_holm_by_its_definition():
    rng = np.random.default_rng(3)
    for _ in range(20):
        p = rng.random(6)**3
        for alpha in (.01, .05, .2):
            rejected = set()
            for rank, k in enumerate(np.argsort(p)):
                if p[k] > alpha/(6-rank):
                    break
                rejected.add(k)
            assert rejected == set(np.flatnonzero(holm(p) <= alpha))


def test_record_is_complete_and_plain_json():
    r = claim("lightgcn.1", [.2, .21, .22], [.1, .12, .11], "world", seeds=[5, 6, 7])
    assert json.loads(json.dumps(r, allow_nan=False)) == r
    assert (
        r["verdict"] == "supported"
        and r["effect"] == pytest.approx(0.1)
        and r["seeds"] == [5, 6, 7]
        and r["reported"]["ours"] == 0.1823
    )
    assert {
        "id",
        "paper",
        "statement",
        "metric",
        "dataset",
        "seeds",
        "ours",
        "theirs",
        "effect",
        "ci",
        "verdict",
        "reported",
    } <= set(r)


def test_one_seed_gives_no_interval_and_no_verdict():
    r = claim("lightgcn.1", [.2], [.1])
    assert r["ci"] == [None, None] and r["verdict"] == "inconclusive"
    json.dumps(r, allow_nan=False)


def test_users_and_thresholds():
    rng = np.random.default_rng(4)
    r = claim("lightgcn.1", rng.normal(1, .1, (4, 100)), rng.normal(0, .1, (4, 100)))
    assert len(r["ours"]) == 4 and r["verdict"] == "supported"
    assert claim("lsm-gnn.1", [.01, .011, .012], 1/20)["verdict"] == "supported"


def test_a_star_marks_verdicts_that_do_not_survive_holm():
    weak = claim("lightgcn.1", [.012, .01, .03, .021, .009], [0]*5)
    rows = ledger([weak]*40)
    assert (
        weak["verdict"] == "supported"
        and set(rows.verdict) == {"supported*"}
        and set(ledger([weak]).verdict) == {"supported"}
    )


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: claim("lightgcm.1", [1], [1]), "did you mean lightgcn.1"),
        (lambda: claim("lightgcn.1", [1, 2], [1]), "pair up"),
        (lambda: claim("lightgcn.1", [np.nan], [1]), "NaN"),
        (lambda: claim("lightgcn.1", [1, 2], [1, 2], seeds=[0]), "1 seeds for 2 values"),
        (lambda: verdict(0, 1, "up"), "direction='up'"),
        (lambda: papers("graph"), "unknown area"),
        (lambda: find_claim("x"), "unknown claim"),
    ],
)
def test_bad_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_ladder():
    rec = dict(dataset="gowalla", verdict="supported", ours=[.181, .182], reported=dict(ours=.1823, on="gowalla"))
    assert [
        level([], False),
        level([], True),
        level([rec | dict(dataset="world, thin")], True),
        level([rec | dict(ours=[0.16])], True),
        level([rec], True),
    ] == [0, 1, 2, 3, 4]
    assert level([rec | dict(dataset="movielens-100k, semi-synthetic, p=2")], True) == 2


@pytest.mark.parametrize(
    "lo, hi, direction, want",
    [
        (-0.001, 0.002, "higher", "negligible"),
        (0.001, 0.002, "higher", "negligible"),
        (0.001, 0.02, "higher", "supported"),
        (-0.02, -0.001, "higher", "refuted"),
        (-0.02, 0.02, "higher", "inconclusive"),
        (-0.02, -0.015, "lower", "supported"),
        (-0.002, 0.001, "lower", "negligible"),
        (-0.001, 0.001, "equal", "inconclusive"),
    ],
)
def test_the_smallest_effect_of_interest_makes_some_effects_negligible(lo, hi, direction, want):
    assert verdict(lo, hi, direction, 0.0, 0.01) == want


def test_detectable_effect_is_found_in_four_of_five_experiments():
    rng = np.random.default_rng(0)
    for n in (4, 10):
        size = detectable(1/n**.5, n)
        assert np.mean([paired_interval(rng.normal(size, 1, n))[1] > 0 for _ in range(2000)]) == pytest.approx(
            0.8, abs=0.04
        )
    assert np.isnan(detectable(.1, 1)) and np.isnan(paired_error([1.]))


@pytest.mark.parametrize(
    "said, ours, theirs, want",
    [
        ("supported", [], ["unfinished"], True),
        ("supported", ["unfinished"], [], False),
        ("refuted", ["edge: lr=.1"], [], True),
        ("refuted", [], ["edge: lr=.1"], False),
        ("inconclusive", ["tie"], [], True),
        ("negligible", [], ["untuned"], True),
        ("supported", [], [], False),
        ("supported", ["not alive"], [], True),
        ("refuted", [], ["not alive"], False),
    ],
)
def test_caveats_of_the_losing_side_make_a_verdict_provisional(said, ours, theirs, want):
    assert is_provisional(said, ours, theirs) == want


def catalogue(monkeypatch, **more):
    c = dict(id="x.1", paper="x", area="graph_cf", statement="A beats B.", metric="recall", ours="A", theirs="B") | more
    monkeypatch.setattr(claims, "find_claim", lambda id: c)


def trial_frame(n=6, **means):
    "Methods with planted means over 40 users that are the same at every seed."

    def run(case, seed, m, curve=()):
        return Outcome(dict(recall=m + 0.01 * np.random.default_rng(seed).normal(size=40)), curve=curve)
    from functools import partial

    ms = [
        Method(
            k,
            partial(run, m=v, curve=np.arange(10.0) if k == "open" else ()),
            role=dict(r="rival", p="placebo").get(k[0], "method"),
        )
        for k, v in means.items()
    ]
    return over_seeds(
        ms, [Case("set", float, same_units=True, shares="users")], range(n), store=Store("/nonexistent/x")
    )


def test_measure_takes_systems_and_metric_from_the_catalogue(monkeypatch):
    catalogue(monkeypatch, smallest=.01)
    r, = measure(trial_frame(A=.3, B=.2), "x.1", "set")
    assert (
        r["verdict"] == "supported"
        and r["effect"] == pytest.approx(0.1)
        and r["units"] == 40
        and r["shares"] == "users"
        and not r["provisional"]
    )
    assert measure(trial_frame(A=.205, B=.2), "x.1", "set")[0]["verdict"] == "negligible"
    assert json.loads(json.dumps(r, allow_nan=False)) == r


def test_measure_takes_the_strongest_rival_and_names_it(monkeypatch):
    catalogue(monkeypatch, theirs="best rival")
    r, = measure(trial_frame(A=.3, r1=.2, r2=.4), "x.1", "set")
    assert r["verdict"] == "refuted" and r["systems"][1] == "best rival (r2)"


def test_a_simple_rival_that_is_stronger_is_named_whatever_the_claim_compares(monkeypatch):
    catalogue(monkeypatch)
    r, = measure(trial_frame(A=.3, B=.2, r1=.4), "x.1", "set")
    assert (
        r["verdict"] == "supported"
        and r["against_rival"]["verdict"] == "refuted"
        and any("worse than the strongest simple rival, r1" in n for n in notes(r))
    )
    catalogue(monkeypatch, rivals=False)
    assert "against_rival" not in measure(trial_frame(A=.3, B=.2, r1=.4), "x.1", "set")[0]


def test_a_placebo_as_good_as_the_method_is_no_support(monkeypatch):
    catalogue(monkeypatch, theirs="best placebo", smallest=.01)
    assert measure(trial_frame(A=.3, p1=.3), "x.1", "set")[0]["verdict"] == "negligible"


def test_an_unfinished_rival_makes_the_verdict_provisional(monkeypatch):
    catalogue(monkeypatch, theirs="open")
    r, = measure(trial_frame(A=.3, open=.2), "x.1", "set")
    assert (
        r["provisional"]
        and "supported (provisional)" in card(r)
        and ledger([r]).verdict[0].startswith("supported (provisional)")
    )


def test_a_system_that_does_not_work_is_noted(monkeypatch):
    catalogue(monkeypatch)
    assert measure(trial_frame(A=.3, B=.2), "x.1", "set", chance=.29, ceiling=.9)[0]["caveats"][0] == ["not alive"]


def test_exact_statements_are_asserted_and_never_counted(monkeypatch):
    catalogue(monkeypatch, exact=True)
    r = exact("x.1", True)
    assert r["verdict"] == "exact" and ledger([r]).verdict[0] == "exact" and level([r], True) == 1
    with pytest.raises(AssertionError, match="by construction"):
        exact("x.1", False)
    with pytest.raises(ValueError, match="exact"):
        claim("x.1", [1, 2], [0, 1])


def test_records_of_the_first_form_are_still_read():
    for r in results():
        rows = ledger(r["claims"])
        assert len(rows) == len(r["claims"]) and isinstance(r["stale"], bool)
        for c in r["claims"]:
            assert card(c)


def test_a_record_is_stale_when_its_code_has_changed(monkeypatch, tmp_path):
    import shutil
    from recbook.provenance import notebook_code
    home = tmp_path/"book"
    (home/"nbs/foundations").mkdir(parents=True)
    (home/"data/results/cpu").mkdir(parents=True)
    nb = home/"nbs/foundations/06_metrics.ipynb"
    shutil.copy(next((claims.root()/"nbs/foundations").glob("*_metrics.ipynb")), nb)
    monkeypatch.setattr(claims, "root", lambda: home)
    record = dict(area="metrics", profile="cpu", claims=[])
    put = lambda **r: (home/"data/results/cpu/metrics.json").write_text(json.dumps(record | r))
    put(code=notebook_code(nb))
    assert results()[0]["stale"] is False
    nb.write_text(nb.read_text().replace("recommend(", "recommend( ", 1))
    assert results()[0]["stale"] is False, "a blank is no change"
    nb.write_text(nb.read_text().replace("torch.inf", "torch.pi"))
    assert results()[0]["stale"] is True
    put()
    assert results()[0]["stale"] is True


@pytest.mark.parametrize(
    "text", ["{", "[1]", "null", '{"area": "x", "claims": "oops"}', '{"area": "x", "claims": [{}]}']
)
def test_a_broken_record_is_named_and_left_out(monkeypatch, tmp_path, text):
    (tmp_path/"data/results/cpu").mkdir(parents=True)
    (tmp_path/"data/results/cpu/broken.json").write_text(text)
    monkeypatch.setattr(claims, "root", lambda: tmp_path)
    with pytest.warns(UserWarning, match="broken.json"):
        assert results() == []


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda: claim("lightgcn.1", [1, 2], [1, 2], seeds=[1, 1]), "repeat one"),
        (lambda: claim("lightgcn.1", [1, 2], [1, 2], dataset=None), "dataset=None"),
        (lambda: claim("lightgcn.1", [1e300, 2], [1, 2]), "no measurement"),
        (lambda: claim("lightgcn.1", [], []), "at least one value"),
        (lambda: claim("lightgcn.1", np.zeros((2, 2, 2)), np.zeros((2, 2, 2))), "shape"),
        (lambda: verdict(0, 1, smallest=0), "smallest=0"),
    ],
)
def test_odd_values_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call()


def test_systems_are_paired_by_user_not_by_position(monkeypatch):
    catalogue(monkeypatch)
    def run(case, seed, skip, shift): # users differ much, systems do not at all
        v = np.arange(40.) + shift
        v[skip] = np.nan
        return dict(recall=v)
    from functools import partial
    ms = [Method("A", partial(run, skip=[0, 1], shift=0.)), Method("B", partial(run, skip=[38, 39], shift=0.))]
    df = over_seeds(ms, [Case("set", float, same_units=True)], range(4), store=Store("/nonexistent/x"))
    r, = measure(df, "x.1", "set")
    assert r["effect"] == 0 and r["units"] == 36
    ms = [Method("A", partial(run, skip=list(range(39)), shift=0.)), Method("B", partial(run, skip=[], shift=0.))]
    df = over_seeds(ms, [Case("set", float, same_units=True)], range(4), store=Store("/nonexistent/x"))
    with pytest.raises(ValueError, match="1 in common"):
        measure(df, "x.1", "set")


def test_a_caveat_counts_in_whatever_row_it_stands(monkeypatch):
    catalogue(monkeypatch)
    df = trial_frame(A=.3, B=.2)
    df.loc[(df.method == "B") & (df.seed == 5), "caveats"] = "unfinished"
    assert measure(df, "x.1", "set")[0]["provisional"]


def test_the_best_rival_needs_a_direction(monkeypatch):
    catalogue(monkeypatch, theirs="best rival", direction="equal", margin=.1)
    with pytest.raises(ValueError, match="needs a direction"):
        measure(trial_frame(A=.3, r1=.2), "x.1", "set")
