"The planted faults of an unfair comparison are each caught; trials are computed once and never stale."
import functools, json, sys
from functools import partial
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from recbook import datasets, provenance, trials
from recbook.provenance import Store, digest
from recbook.training import costs
from recbook.trials import (
    Case,
    Method,
    NotAlive,
    Outcome,
    alive,
    best_rival,
    beyond,
    climbing,
    derive,
    over_seeds,
    per_seed,
    run_all,
    settings,
    trial_key,
    tune,
    values,
)

scale = 1.


def quadratic(case, seed, lr=.1, best=.1, noise=0.):
    "Validation peaks at lr = best; three users."
    v = scale - (np.log(lr) - np.log(best))**2 + noise*np.random.default_rng(seed).normal()
    return Outcome(dict(recall=np.full(3, v) + case, seconds=1.), valid=v, curve=1 - np.exp(-np.arange(20.)))


def short(case, seed, lr=.1): return Outcome(dict(recall=lr), valid=lr, curve=np.arange(20.))


def world(seed): return float(seed)


WORLD = Case("world", world)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def test_tuning_averages_over_seeds_and_reports_on_others(store):
    ms = [
        Method("A", quadratic, dict(lr=[0.01, 0.1, 1.0])),
        Method("B", partial(quadratic, best=1.0), dict(lr=[0.1, 1.0, 10.0])),
    ]
    t = tune(ms, [WORLD], [100, 101], store=store)
    assert [t.of("world", m)[0]["lr"] for m in "AB"] == [.1, 1.] and t.of("world", "A")[1] == ()
    df = over_seeds(ms, [WORLD], [0, 1, 2], t, store=store)
    assert values(df, "A", "seconds").tolist() == [1, 1, 1]
    assert per_seed(df).groupby("method").size().to_dict() == dict(A=3, B=3)
    with pytest.raises(ValueError, match="were used for tuning"):
        over_seeds(ms, [WORLD], [100, 5], t, store=store)


def test_unequal_numbers_of_settings_are_refused(store):
    ms = [Method("A", quadratic, dict(lr=[.01, .1, 1.])), Method("B", quadratic, dict(lr=[.1, 1.]))]
    with pytest.raises(ValueError, match="unequal numbers of settings.*'A': 3.*'B': 2"):
        tune(ms, [WORLD], [100, 101], store=store)


def test_one_tuning_seed_is_refused(store):
    with pytest.raises(ValueError, match="at least two"):
        tune([Method("A", quadratic, dict(lr=[.1, 1.]))], [WORLD], [100], store=store)
    with pytest.raises(ValueError, match="repeat one"):
        tune([Method("A", quadratic, dict(lr=[.1, 1.]))], [WORLD], [1, 1], store=store)


def test_an_optimum_at_the_edge_widens_the_grid_until_it_is_inside(store):
    t = tune([Method("A", partial(quadratic, best=1.), dict(lr=[.01, .1]))], [WORLD], [100, 101], store=store)
    s, caveats = t.of("world", "A")
    assert s["lr"] == pytest.approx(1.) and caveats == () and len(t.tried) == 4


def test_an_optimum_that_runs_away_is_flagged(store):
    t = tune([Method("A", partial(quadratic, best=1e6), dict(lr=[.01, .1]))], [WORLD], [100, 101], store=store)
    assert t.of("world", "A")[0]["lr"] == pytest.approx(10.) and t.of("world", "A")[1] == ("edge: lr=10",)


def test_a_natural_limit_is_no_edge(store):
    t = tune(
        [Method("A", partial(quadratic, best=1e6), dict(lr=[0.01, 0.1]), limits=dict(lr=(0, 0.1)))],
        [WORLD],
        [100, 101],
        store=store,
    )
    assert t.of("world", "A") == (dict(lr=.1), ())


def test_a_tie_is_flagged(store):
    flat = Method("A", lambda case, seed, lr: Outcome(dict(recall=1.), valid=1.), dict(lr=[.1, .2, .3]))
    assert "tie" in tune([flat], [WORLD], [100, 101], store=store).of("world", "A")[1]


def test_half_a_budget_is_flagged_unfinished(store):
    ms = [Method("A", short, dict(lr=[.1, .2, .3])), Method("B", quadratic, dict(lr=[.01, .1, 1.]))]
    df = over_seeds(ms, [WORLD], [0, 1], tune(ms, [WORLD], [100, 101], store=store), store=store)
    caveats = df.groupby("method")["caveats"].first()
    assert "unfinished" in caveats["A"] and "unfinished" not in caveats["B"]


def test_a_single_setting_is_flagged_as_untuned(store):
    df = over_seeds(
        [Method("A", quadratic, dict(lr=[0.1])), Method("pop", lambda c, s: dict(recall=0.1), role="rival")],
        [WORLD],
        [0, 1],
        store=store,
    )
    assert df.groupby("method")["caveats"].first().to_dict() == dict(A="untuned", pop="")


def test_an_ablation_may_follow_another_and_says_so(store):
    ms = [Method("A", quadratic, dict(lr=[.01, .1, 1.])), Method("A-", quadratic, role="ablation", like="A")]
    t = tune(ms, [WORLD], [100, 101], store=store)
    assert t.of("world", "A-") == (dict(lr=.1), ("setting of A",))


def test_more_settings_of_whole_numbers_stay_whole():
    assert (
        beyond([2, 4], 1) == 8
        and isinstance(beyond([2, 4], 1), int)
        and beyond([1, 2], -1) == 1
        and beyond([0, 1e-3], -1) == 0
        and beyond([8, 10], 1, (1, 10.4)) == 10
    )
    assert (
        beyond([0.0, 0.5], 1) == 1.0
        and beyond([0.1, 0.01], -1) == pytest.approx(0.001)
        and beyond([0.5, 0.9], 1, (0, 1)) == 1
    )


# --- computed once

def test_a_trial_is_computed_once_and_an_interrupted_run_resumes(store, monkeypatch):
    m, ran, run = Method("A", quadratic), [], trials.run_trial
    monkeypatch.setattr(trials, "run_trial", lambda *t: ran.append(t[2]) or run(*t))
    run_all([(m, WORLD, s, dict(lr=.1)) for s in (0, 1)], store=store)
    run_all([(m, WORLD, s, dict(lr=.1)) for s in (0, 1, 2)], store=store)
    assert ran == [0, 1, 2]
    failing = Method("B", lambda case, seed: dict(x=1.) if seed < 2 else 1/0)
    with pytest.raises(ZeroDivisionError):
        run_all([(failing, WORLD, s, {}) for s in (0, 1, 2)], store=store)
    assert sum(store.get(trial_key(failing, WORLD, s, {})) is not None for s in (0, 1, 2)) == 2


def test_what_is_stored_comes_back_exactly(store):
    m = Method("A", quadratic)
    one, two = (run_all([(m, WORLD, 3, dict(lr=.3))], store=store)[0] for _ in range(2))
    assert (
        one.valid == two.valid
        and np.array_equal(one.curve, two.curve)
        and all(np.array_equal(one.values[k], two.values[k]) for k in one.values)
    )


def test_the_key_changes_with_code_value_setting_seed_and_data(monkeypatch):
    m = Method("A", quadratic)
    key = lambda m=m, c=WORLD, s=0, k=dict(lr=.1): trial_key(m, c, s, k)
    base = key()
    assert key() == base
    assert (
        len(
            {
                base,
                key(s=1),
                key(k=dict(lr=0.2)),
                key(c=Case("other", world)),
                key(c=Case("world", lambda seed: 1.0)),
                key(m=Method("A", short)),
            }
        )
        == 6
    )
    monkeypatch.setitem(globals(), "scale", 2.)
    assert key() != base


def test_a_changed_data_set_changes_the_key(monkeypatch):
    m, c = Method("A", short), Case("movielens-100k", world)
    base = trial_key(m, c, 0, {})
    reg = datasets._registry()
    new = json.loads(json.dumps(reg))
    new["movielens-100k"]["file"][0]["sha256"] = "0"*64
    monkeypatch.setattr(datasets, "_registry", lambda: new)
    assert trial_key(m, c, 0, {}) != base


def test_a_changed_mechanism_or_foundation_changes_the_key_and_its_words_do_not(monkeypatch, tmp_path):
    from recbook.metrics import evaluate
    real, module = Path(provenance.find_spec("recbook.metrics").origin), provenance.module_of("recbook.metrics")
    base, source = digest(evaluate), real.read_text(encoding="utf-8")
    def with_source(text):
        new, old = provenance.Module("recbook.metrics", text), provenance.module_of
        monkeypatch.setattr(provenance, "module_of", lambda n: new if n == "recbook.metrics" else old(n))
        d = digest(evaluate)
        monkeypatch.undo()
        return d
    assert with_source(source) == base and module
    assert (
        with_source(source.replace("def topk(", "def topk(").replace("# (n, m) scores", "# scores of m items")) == base
    )
    assert with_source(source.replace("The k best columns", "The very best columns")) == base
    assert (
        with_source(source.replace("gain = np.arange(1, k+1), 1/np.log2", "gain = np.arange(1, k+1), 1/np.log")) != base
    )
    assert with_source(source.replace("def gini(", "def gini_(")) == base


def test_processes_give_the_same(store, tmp_path):
    todo = [(Method("A", quadratic), WORLD, s, dict(lr=.1)) for s in range(4)]
    one, two = run_all(todo, store=store), run_all(todo, jobs=2, store=Store(tmp_path/"other"))
    assert [o.valid for o in one] == [o.valid for o in two]


def test_a_two_node_ray_cluster_gives_the_same(store, tmp_path):
    ray = pytest.importorskip("ray", reason="the extra `ray` is not installed")
    import joblib
    from ray.cluster_utils import Cluster
    from ray.util.joblib import register_ray
    cluster = Cluster(initialize_head=True, head_node_args=dict(num_cpus=1))
    cluster.add_node(num_cpus=1)
    try:
        ray.init(address=cluster.address, log_to_driver=False)
        ray.cloudpickle.register_pickle_by_value(sys.modules[__name__])
        register_ray()
        todo = [(Method("A", short), WORLD, s, dict(lr=.1)) for s in range(4)]
        with joblib.parallel_config(backend="ray"):
            two = run_all(todo, jobs=2, store=Store(tmp_path/"other"))
        assert [o.valid for o in run_all(todo, store=store)] == [o.valid for o in two]
    finally:
        ray.shutdown()
        cluster.shutdown()


# --- reading the frame

def frame(**rows):
    "method -> (n_seeds, n_units) values on one real set."
    ms = [
        Method(
            n,
            partial(lambda case, seed, v: dict(recall=v[seed]), v=np.asarray(v)),
            role="rival" if n.startswith("r") else "method",
        )
        for n, v in rows.items()
    ]
    return over_seeds(ms, [Case("set", world, same_units=True)], [0, 1], store=Store("/nonexistent/x"))


def test_values_pair_units_that_are_the_same_at_every_seed():
    df = frame(A=[[1, 2, 3], [4, 5, 6]], r1=[[1, 1, 1], [2, 2, 2]], r2=[[3, 3, 3], [0, 0, 0]])
    assert values(df, "A", "recall", dataset="set").tolist() == [[1, 2, 3], [4, 5, 6]]
    assert (
        best_rival(df, "recall", "set") in ("r1", "r2")
        and best_rival(frame(A=[[1], [1]], r1=[[2], [2]], r2=[[3], [1]], r3=[[3], [3]]), "recall", "set") == "r3"
    )
    gain = derive(df, "A - r1", lambda a, b: a-b, "A", "r1", y="recall")
    assert values(gain, "A - r1", "recall").tolist() == [[0, 1, 2], [2, 3, 4]]


def test_units_of_other_worlds_are_not_paired():
    run = lambda case, seed: dict(recall=np.arange(3.) + seed)
    df = over_seeds([Method("A", run)], [WORLD], [0, 1, 2], store=Store("/nonexistent/x"))
    assert values(df, "A", "recall").tolist() == [1, 2, 3] and df.unit.nunique() == 9


def test_missing_and_doubled_values_are_errors():
    df = frame(A=[[1, 2], [3, 4]], B=[[1, 2], [3, 4]])
    with pytest.raises(ValueError, match=r"no recall for seed\(s\) \[1\]"):
        values(df[(df.method != "A") | (df.seed == 0)], "A", "recall")
    with pytest.raises(ValueError, match="doubled"):
        values(pd.concat([df, df]), "A", "recall")
    with pytest.raises(ValueError, match="no recall of 'C'"):
        values(df, "C", "recall")
    with pytest.raises(ValueError, match="no column 'ndcg'"):
        values(df, "A", "ndcg")


@pytest.mark.parametrize(
    "make, says",
    [
        (lambda: Method("A", short, dict(lr=0.1)), "must be a list"),
        (lambda: Method("A", short, dict(lr=[0.1, 0.1])), "repeats"),
        (lambda: Method("A", short, dict(lr=[np.nan])), "finite"),
        (lambda: Method("A", short, role="best"), "role='best'"),
        (lambda: tune([Method("A", short), Method("A", short)], [WORLD], [1, 2]), "same name"),
        (lambda: tune([], [WORLD], [1, 2]), "no methods"),
        (lambda: tune([Method("A", short, like="B")], [WORLD], [1, 2]), "like='B'"),
        (
            lambda: run_all([(Method("A", lambda c, s: 1.0), WORLD, 0, {})], store=Store("/nonexistent/x")),
            "returned float",
        ),
        (
            lambda: run_all([(Method("A", lambda c, s: dict(x=np.nan)), WORLD, 0, {})], store=Store("/nonexistent/x")),
            "x is nan",
        ),
        (lambda: run_all([(Method("A", short), WORLD, 0, {})] * 2, jobs=0), "jobs=0"),
        (lambda: over_seeds([Method("A", short)], [WORLD], [1, 1]), "repeat one"),
        (
            lambda: tune(
                [Method("A", lambda c, s, lr: dict(x=1.0), dict(lr=[1, 2]))],
                [WORLD],
                [1, 2],
                store=Store("/nonexistent/x"),
            ),
            "cannot be tuned",
        ),
    ],
)
def test_bad_input_is_named(make, says):
    with pytest.raises((ValueError, TypeError), match=says):
        make()


def test_alive_is_a_gate():
    assert alive([.5, .6], .1, .9)
    for dead in (.1, .15, .95):
        with pytest.raises(NotAlive):
            alive(dead, .1, .9)


def test_climbing_sees_the_last_fifth_only():
    assert climbing(np.arange(10.)) and not climbing(np.r_[np.arange(8.), 7., 7.]) and not climbing([1, 2, 3])
    rng = np.random.default_rng(0)
    assert np.mean([climbing(1-np.exp(-np.arange(50)/3) + .003*rng.normal(size=50)) for _ in range(200)]) < .05


def test_settings_are_all_combinations(): assert len(settings(dict(a=[1, 2], b=[1, 2, 3], c=["x"]))) == 6


def test_classes_of_libraries_count_by_version_and_annotations_by_name():
    import torch
    from torch import Tensor

    def f(x: Tensor) -> Tensor: return x
    assert digest(Tensor) == digest(torch.Tensor) != digest(torch.nn.Linear)
    assert digest(f) == digest(f)


class Node:
    def __init__(self, value): self.value, self.next = value, self


def test_what_contains_itself_has_a_digest_and_aliases_count_as_equal():
    loop = [1]
    loop.append(loop)
    assert digest(loop) == digest(loop) and digest(Node(1)) == digest(Node(1)) != digest(Node(2))
    one = np.arange(3)
    assert digest([one, one]) == digest([np.arange(3), np.arange(3)])

    def even(n): return n == 0 or odd(n-1)

    def odd(n): return n != 0 and even(n-1)
    assert digest(even) == digest(even) != digest(odd)


def test_digests_tell_values_apart_that_look_alike():
    import torch
    frame = pd.DataFrame(dict(a=[1, 2], b=[3, 4]), index=[0, 0])
    others = [
        pd.DataFrame(dict(a=[9, 2], b=[3, 4]), index=[0, 0]),
        frame.iloc[::-1],
        frame[["b", "a"]],
        frame.astype("float32"),
        frame.reset_index(drop=True),
    ]
    assert digest(frame) == digest(frame.copy()) and all(digest(frame) != digest(o) for o in others)
    assert digest(pd.Series([1, 2], [0, 1])) != digest(pd.Series([1, 2], [1, 0]))
    assert digest(torch.tensor([2**24])) != digest(torch.tensor([2**24 + 1]))
    assert digest(torch.tensor(1., dtype=torch.float64)) != digest(torch.tensor(1 + 1e-9, dtype=torch.float64))
    assert digest(torch.tensor(1 + 1j)) != digest(torch.tensor(1 + 2j)) and digest(torch.ones(2, dtype=torch.bfloat16))

    def f(a, b): return b
    def g(a, *b): return b
    def h(a, *, b): return b
    assert len({digest(f), digest(g), digest(h)}) == 3


def test_a_model_is_more_than_its_weights():
    import torch

    class Cold(torch.nn.Module):
        def __init__(self, t):
            super().__init__()
            self.t = t

    assert digest(Cold(0.1)) == digest(Cold(0.1)) != digest(Cold(10.0)) and digest(
        torch.nn.Sequential(Cold(0.1))
    ) != digest(torch.nn.Sequential(Cold(10.0)))


def test_imports_inside_a_function_and_modules_beside_it_are_followed(monkeypatch, tmp_path):
    def inside():
        from recbook.metrics import evaluate
        return evaluate
    old, source = provenance.module_of, Path(provenance.find_spec("recbook.metrics").origin).read_text(encoding="utf-8")
    before = digest(inside)
    new = provenance.Module(
        "recbook.metrics", source.replace("gain = np.arange(1, k+1), 1/np.log2", "gain = np.arange(1, k+1), 1/np.log")
    )
    monkeypatch.setattr(provenance, "module_of", lambda n: new if n == "recbook.metrics" else old(n))
    assert digest(inside) != before
    monkeypatch.undo()
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path/"beside.py").write_text("def f(): return 1\n")
    import beside
    before = digest(beside)
    (tmp_path/"beside.py").write_text("def f(): return 2\n")
    assert digest(beside) != before


def test_an_attribute_is_no_global(monkeypatch):
    def f(x): return x.scale
    before = digest(f)
    monkeypatch.setitem(globals(), "scale", 2.)
    assert digest(f) == before


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda m: tune([m], [WORLD], [0, 0.5]), "no whole numbers"),
        (lambda m: over_seeds([Method("B", short)], [WORLD], [0.5, 2]), "no whole numbers"),
        (lambda m: over_seeds([Method("B", short)], [WORLD], []), "no seeds"),
        (
            lambda m: tune([m, Method("B", short, like="C"), Method("C", short, like="B")], [WORLD], [0, 1]),
            "settings of their own",
        ),
    ],
)
def test_odd_seeds_and_circles_are_refused(call, says):
    with pytest.raises(ValueError, match=says):
        call(Method("A", quadratic, dict(lr=[.1, 1.])))


def test_numpy_numbers_have_edges_and_positive_axes_stay_positive(store):
    t = tune(
        [Method("A", lambda case, seed, k: Outcome(dict(x=1.0), valid=float(k)), dict(k=list(np.array([8, 16, 32]))))],
        [WORLD],
        [0, 1],
        store=store,
    )
    assert t.of("world", "A")[1][0].startswith("edge")
    t = tune(
        [Method("A", lambda case, seed, k: Outcome(dict(x=1.0), valid=-float(k)), dict(k=[1, 2, 4]))],
        [WORLD],
        [0, 1],
        store=store,
    )
    assert t.of("world", "A") == (dict(k=1), ("edge: k=1",))


def test_a_gap_in_the_curve_hides_nothing(): assert climbing([0, 1, 2, np.nan, 4, 5, 6, 7, 8, 9])


def test_a_parameter_is_no_global(monkeypatch):
    def f(gain:"Kind"): return gain # noqa: F821
    before = digest(f)
    monkeypatch.setitem(globals(), "gain", 2.)
    assert digest(f) == before
    monkeypatch.setitem(globals(), "Kind", int)
    assert digest(f) != before


# ---- one walk for many digests

def even(n): return n == 0 or odd(n - 1)

def odd(n): return n != 0 and even(n - 1)

def uses_both(n): return even(n) + odd(n)

def test_digests_do_not_depend_on_what_was_walked_before(monkeypatch):
    "Also where functions call each other, from whichever of them the walk begins."
    from recbook.provenance import digest, still
    things = [even, odd, uses_both, [odd, even], functools.partial(even, 3)]
    alone = [digest(x) for x in things]
    for order in ([0, 1, 2, 3, 4], [4, 3, 2, 1, 0], [2, 0, 4, 1, 3]):
        with still():
            assert [digest(things[k]) for k in order] == [alone[k] for k in order]
            with still():
                assert digest(even) == alone[0]
    before = digest(uses_both)
    monkeypatch.setitem(globals(), "odd", lambda n: n % 2 == 1)
    assert digest(uses_both) != before


def uses_weights(): # loads what came with the book
    from recbook.lm import nano_lm
    return nano_lm()

def test_other_weights_are_another_digest(tmp_path, monkeypatch):
    "What a trial gets from shipped weights is not kept for other weights; trials without them don't mind."
    from recbook import provenance as P
    monkeypatch.setattr(P, "root", lambda: tmp_path)
    file = tmp_path/"data"/"models"/"nano"/"model.safetensors"
    file.parent.mkdir(parents=True)
    seen = []
    for content in (b"old", b"new weights", b"old"):
        file.write_bytes(content)
        seen.append((P.digest(uses_weights), P.digest(uses_both)))
    assert seen[0] == seen[2] != seen[1] and seen[0][1] == seen[1][1]


def test_what_language_models_did_stands_beside_the_values(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM
    shape = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=20)
    lm = LlamaForCausalLM(LlamaConfig(**shape, pad_token_id=0, bos_token_id=1, eos_token_id=2))

    def run(case, seed, passes):
        for _ in range(passes):
            lm(torch.ones(2, 3, dtype=torch.long)).logits.sum().backward()
        return dict(x=1.)

    methods = [Method(n, partial(run, passes=k)) for n, k in (("one", 1), ("three", 3))]
    methods.append(Method("none", lambda case, seed: dict(x=2.)))
    store = Store(tmp_path)
    first, kept = (over_seeds(methods, [Case("world", lambda seed: 0)], [0, 1], store=store) for _ in range(2))
    got = costs(first)
    body = sum(p.numel() for p in lm.model.parameters())
    assert got.loc["world", ["passes", "tokens", "trainable"]].loc["three"].tolist() == [3, 18, body]
    assert got.loc["world"].tokens["one"] == 6 and got.loc["world"].tokens.isna()["none"]
    assert costs(kept).equals(got) and "lm_tokens" not in per_seed(first)
    with pytest.raises(ValueError, match="no language model ran"):
        costs(first[["dataset", "method", "seed", "x"]])
