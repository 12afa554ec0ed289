"""alignment: losses against hand-computed values and trl's own, gradients, the theorem, decoding inside the catalogue,
profiles, crowds and transport, bad input."""
import copy, gc
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, scipy.stats, torch
import torch.nn.functional as F
from datasets import Dataset
from scipy.optimize import linprog
from transformers import LlamaConfig, LlamaForCausalLM, TrainingArguments
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer
from recbook.lm import mark_ids, nano_tokenizer
from recbook.answers import answer_logits, completion_ids, sequence_logprob
from recbook.decode import ItemTrie, rank_items
from recbook.finetune import lora
from recbook.llm.alignment import (
    AlphaDPOTrainer,
    BayesianUpdater,
    Crowd,
    OCCASIONS,
    PairTrainer,
    RosePOTrainer,
    SDPOTrainer,
    SimPOTrainer,
    TASTES,
    align,
    answers_loss,
    catalogue_policy,
    check_lengths,
    check_pairs,
    dgu,
    distinct,
    div_ratio,
    dpo_optimum,
    dpo_population,
    draw_items,
    expected_reward,
    explore_profiles,
    fit_crowd,
    fit_pairs,
    fit_tau,
    flip_probability,
    fresh_copy,
    genre_gaps,
    group_weights,
    grpo,
    head_of,
    history_prompt,
    judge_prompt,
    majority_ce,
    mean_mse,
    mentions,
    mgu,
    next_item_rows,
    or_ratio,
    ot,
    ot_loss,
    outputs,
    own_rejected,
    pairs_of,
    popular_rejected,
    prefers,
    profile_pairs,
    profile_success,
    profile_users_of,
    reward_function,
    self_play,
    semantic_rejected,
    sft,
    sinkhorn,
    soft_ce,
    spoken,
    task_lm,
    token_columns,
    train_with,
    trl_args,
    world_sequences,
    writer_prompt,
)
from recbook.world import CUES, World

TITLES = [
    "Gloomy Ghost",
    "Gloomy Ghost Tide",
    "Sunny Kiss",
    "Merry Prank Oak",
    "Silver Sword",
    "Quiet Mill",
    "Bitter Clue Reef",
]


@pytest.fixture(scope="module")
def tok(): return nano_tokenizer([history_prompt(TITLES)]*30, 360)


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=96,
            tie_word_embeddings=True,
            initializer_range=0.2,
            **mark_ids(tok),
        )
    ).eval()


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return next_item_rows([rng.permutation(len(TITLES))[:6] for _ in range(20)], TITLES, history=2)


@pytest.fixture(scope="module")
def pairs(rows):
    return pairs_of(
        rows.iloc[:40],
        (rows.item.iloc[:40] + 1 + np.arange(40) % 3) % len(TITLES),
        TITLES,
        epsilon=np.linspace(0, 0.4, 40),
    )


def vector(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


def first_loss(Trainer, model, tok, pairs, **kw):
    "Loss and gradient of one batch holding all pairs, in the order given, with the policy moved off the reference."
    policy, ref = fresh_copy(model), fresh_copy(model)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters():
            p += .05*torch.randn(p.shape, generator=g)
    beta, knobs = kw.pop("beta", .3), kw
    args = trl_args(DPOConfig, 1, 1e-3, len(pairs), beta=beta)
    t = Trainer(
        model=policy,
        ref_model=ref,
        args=args,
        train_dataset=check_pairs(model, tok, pairs),
        processing_class=tok,
        **knobs,
    )
    batch = t.data_collator(
        [
            {k: v for k, v in r.items() if k in ("prompt_ids", "chosen_ids", "rejected_ids", *getattr(t, "extra", ()))}
            for r in t.train_dataset
        ]
    )
    loss = t._compute_loss(policy, batch, False)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in policy.parameters()]), policy, ref


def logps(policy, ref, tok, pairs, column, norm=False):
    for m in (policy, ref):
        m.__dict__.pop("forward", None)
    s = lambda m: sequence_logprob(m, tok, pairs.prompt.tolist(), pairs[column].tolist(), eos=True, length_norm=norm)
    return s(policy), s(ref)


def test_dpo_equals_trl_in_loss_and_gradient(model, tok, pairs):
    a, ga, *_ = first_loss(PairTrainer, model, tok, pairs)
    b, gb, *_ = first_loss(DPOTrainer, model, tok, pairs)
    assert a == pytest.approx(b, abs=1e-6) and a != pytest.approx(np.log(2), abs=1e-3)
    torch.testing.assert_close(ga, gb, atol=1e-6, rtol=1e-4)


def test_whole_training_equals_trl(model, tok, pairs):
    runs = [
        train_with(
            T,
            fresh_copy(model),
            check_pairs(model, tok, pairs),
            tok,
            trl_args(DPOConfig, 6, 1e-3, 8, 5, beta=0.2),
            ref_model=fresh_copy(model),
        )
        for T in (PairTrainer, DPOTrainer)
    ]
    np.testing.assert_allclose(*runs, rtol=1e-5)
    assert len(runs[0]) == 6 and runs[0][0] == pytest.approx(np.log(2), abs=1e-5)


def test_tokens_are_trls(model, tok, pairs):
    t = DPOTrainer(
        model=fresh_copy(model),
        ref_model=fresh_copy(model),
        args=trl_args(DPOConfig, 1, 1e-3, 4),
        train_dataset=check_pairs(model, tok, pairs),
        processing_class=tok,
    )
    P, A, B = token_columns(tok, pairs.prompt, pairs.chosen, pairs.rejected)
    assert (
        P == t.train_dataset["prompt_ids"][:]
        and A == t.train_dataset["chosen_ids"][:]
        and B == t.train_dataset["rejected_ids"][:]
    )
    P, A = token_columns(
        tok, ["Liked: A. Next:", "x"], [" Quiet Mill" + tok.eos_token, " y"]
    )  # an end mark that is there is not doubled
    assert P == [tok(p).input_ids for p in ("Liked: A. Next:", "x")] and A == [
        completion_ids(tok, a, True) for a in (" Quiet Mill", " y")
    ]


def test_sft_equals_trls_own_tokenization(model, tok, rows):
    data = rows[["prompt", "completion"]].iloc[:24]
    a, b = sft(model, tok, data, 4, 1e-3, 8, 2), fresh_copy(model)
    train_with(SFTTrainer, b, Dataset.from_pandas(data, preserve_index=False), tok, trl_args(SFTConfig, 4, 1e-3, 8, 2))
    torch.testing.assert_close(vector(a), vector(b))
    with pytest.raises(ValueError, match="the model reads 96"):
        sft(model, tok, data.assign(prompt=history_prompt(TITLES*6)))
    with pytest.raises(ValueError, match="no rows"):
        sft(model, tok, data[:0])


def test_losses_against_log_probabilities_scored_elsewhere(model, tok, pairs):
    "Each loss from `sequence_logprob`, which shares no code with the trainer."
    for T, knobs in [
        (RosePOTrainer, {}),
        (SimPOTrainer, dict(gamma=0.7)),
        (AlphaDPOTrainer, dict(gamma=0.7, alpha=0.4)),
        (AlphaDPOTrainer, dict(gamma=0.7, alpha=0.4, normalise=False)),
    ]:
        loss, _, policy, ref = first_loss(T, model, tok, pairs, beta=.3, **knobs)
        norm = T is not RosePOTrainer
        (w, rw), (l, rl) = (logps(policy, ref, tok, pairs, c, norm) for c in ("chosen", "rejected"))
        e = torch.tensor(pairs.epsilon.to_numpy())
        if T is RosePOTrainer:
            h = .3*((w-rw)-(l-rl))
            want = -(1-e)*F.logsigmoid(h) - e*F.logsigmoid(-h)
        else:
            u, M = w-l, (w-l)-(rw-rl)
            if knobs.get("normalise", True):
                M = (M - M.mean())/M.std(unbiased=False)
            want = -F.logsigmoid(.3*(u - .7/.3 - knobs.get("alpha", 0)*M))
        assert loss == pytest.approx(want.mean().item(), rel=1e-4), T


def test_simpo_equals_trls_formula(model, tok, pairs):
    from trl.experimental.cpo import CPOTrainer
    w, l = torch.tensor([-1.2, -.4, -3.]), torch.tensor([-2., -.3, -2.5])
    stock = SimpleNamespace(
        loss_type="simpo",
        simpo_gamma=0.6,
        beta=1.5,
        label_smoothing=0.0,
        alpha=0.0,
        accelerator=SimpleNamespace(device="cpu"),
    )
    theirs = CPOTrainer.cpo_loss(stock, w, l)[0]
    n = torch.tensor([3., 4., 5.])
    ours = SimPOTrainer.pair_loss(SimpleNamespace(beta=1.5, gamma=.6), SimpleNamespace(w=w*n, l=l*n, nw=n, nl=n))
    torch.testing.assert_close(ours, theirs)


def test_coincidences(model, tok, pairs):
    dpo, g, *_ = first_loss(PairTrainer, model, tok, pairs)
    plain, h, *_ = first_loss(RosePOTrainer, model, tok, pairs.assign(epsilon=0.))
    assert plain == pytest.approx(dpo)
    torch.testing.assert_close(g, h)
    simpo, g, *_ = first_loss(SimPOTrainer, model, tok, pairs, gamma=.5)
    zero, h, *_ = first_loss(AlphaDPOTrainer, model, tok, pairs, gamma=.5, alpha=0.)
    assert zero == pytest.approx(simpo)
    torch.testing.assert_close(g, h)
    one, g, *_ = first_loss(SDPOTrainer, model, tok, pairs.assign(rejected=[[r] for r in pairs.rejected]))
    _, h, *_ = first_loss(PairTrainer, model, tok, pairs)
    assert one == pytest.approx(dpo)
    torch.testing.assert_close(g, h, atol=1e-6, rtol=1e-4)


def test_sdpo_with_several_rejected(model, tok, rows):
    three = pairs_of(rows.iloc[:10], np.stack([(rows.item.iloc[:10] + k) % len(TITLES) for k in (1, 2, 4)], 1), TITLES)
    loss, _, policy, ref = first_loss(SDPOTrainer, model, tok, three)
    w, rw = logps(policy, ref, tok, three, "chosen")
    each = [
        logps(policy, ref, tok, three.assign(rejected=[r[k] for r in three.rejected]), "rejected") for k in range(3)
    ]
    s = torch.stack([.3*((l-rl)-(w-rw)) for l, rl in each]).exp().sum(0)
    assert loss == pytest.approx(torch.log1p(s).mean().item(), rel=1e-4)  # -log sigmoid(-log s) = log(1+s)
    same = train_with(
        SDPOTrainer,
        fresh_copy(model),
        check_pairs(model, tok, three),
        tok,
        trl_args(DPOConfig, 1, 1e-4, 5),
        ref_model=fresh_copy(model),
    )
    assert same[0] == pytest.approx(np.log(4), abs=1e-5)


def test_rosepo_gradient_stops_where_the_label_is_as_sure_as_epsilon():
    h = torch.tensor([.3, 1., np.log(.8/.2)], requires_grad=True)
    b = SimpleNamespace(w=h, l=torch.zeros(3), rw=torch.zeros(3), rl=torch.zeros(3), epsilon=torch.full((3,), .2))
    g, = torch.autograd.grad(RosePOTrainer.pair_loss(SimpleNamespace(beta=1.), b).sum(), h)
    torch.testing.assert_close(g, torch.sigmoid(h.detach()) - .8)
    assert abs(g[2]) < 1e-6


def fake_alpha(**kw):
    t = SimpleNamespace(
        beta=2.0,
        gamma=1.0,
        alpha=0.5,
        momentum=0.9,
        normalise=True,
        stop=True,
        mean=None,
        spread=None,
        accelerator=SimpleNamespace(gather=lambda x: x),
    )
    t.__dict__.update(kw)
    t.standardised = lambda M: AlphaDPOTrainer.standardised(t, M)
    return t


def test_alpha_dpo_margin_carries_no_gradient_unless_asked():
    w = torch.tensor([-1., -2.5], requires_grad=True)
    b = SimpleNamespace(
        w=w,
        l=torch.tensor([-2.0, -2.0]),
        rw=torch.tensor([-1.5, -2.0]),
        rl=torch.tensor([-2.0, -2.0]),
        nw=torch.tensor([1, 1]),
        nl=torch.tensor([1, 1]),
    )
    grad = lambda **kw: torch.autograd.grad(AlphaDPOTrainer.pair_loss(fake_alpha(normalise=False, **kw), b).sum(), w)[0]
    u = (b.w - b.l).detach()
    M = u - (b.rw - b.rl)
    x = 2*(u - .5 - .5*M)
    torch.testing.assert_close(grad(), -2*torch.sigmoid(-x))
    torch.testing.assert_close(grad(stop=False), -2*torch.sigmoid(-x)*.5)


def test_alpha_dpo_statistics_start_at_the_first_difference():
    t = fake_alpha()
    assert t.standardised(torch.zeros(6)).abs().max() == 0
    z = t.standardised(torch.tensor([1., 2., 3., 6.]))
    assert z.mean().abs() < 1e-5 and z.std(unbiased=False) == pytest.approx(
        1, abs=1e-4
    )  # the official state would give ten times that
    t.standardised(torch.tensor([3., 3.]))
    assert t.mean == pytest.approx(.9*3 + .1*3) and t.spread == pytest.approx(.9*np.std([1, 2, 3, 6]), rel=1e-4)


def test_theorem_by_newton():
    "The minimiser, found by another optimiser on another expression of the loss."
    from scipy.optimize import minimize
    rng = np.random.default_rng(0)
    p, q, ref = rng.dirichlet(np.ones(5), 3)
    beta = .7
    loss = lambda t: sum(
        p[a] * q[b] * np.logaddexp(0, -beta * ((t[a] - np.log(ref[a])) - (t[b] - np.log(ref[b]))))
        for a in range(5)
        for b in range(5)
    )
    t = minimize(loss, np.zeros(5), method="BFGS", options=dict(gtol=1e-10)).x
    to = lambda x: torch.tensor(x)
    np.testing.assert_allclose(np.exp(t)/np.exp(t).sum(), dpo_optimum(to(ref), to(p), to(q), beta), atol=1e-5)
    assert dpo_population(to(t), to(ref), to(p), to(q), beta).item() == pytest.approx(loss(t), rel=1e-9)


def test_first_step_of_self_play_is_an_sft_step(model, tok):
    """In a language model, too: expected DPO gradient with the model's own answers rejected = beta/2 times the SFT
    gradient, exactly, over a whole catalogue."""
    trie, x = ItemTrie(tok, TITLES), [history_prompt(TITLES[:2])]
    def table(m): # the policy over the catalogue with gradients, normalised
        ids = [tok(x[0]).input_ids + completion_ids(tok, " "+t, True) for t in TITLES]
        n = len(tok(x[0]).input_ids)
        return torch.stack(
            [
                m(torch.tensor([i]))
                .logits[0, :-1]
                .log_softmax(-1)
                .gather(1, torch.tensor(i[1:])[:, None])[n - 1 :]
                .sum()
                for i in ids
            ]
        ).log_softmax(0)
    m = fresh_copy(model)
    lp = table(m)
    p = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(len(TITLES))), dtype=torch.float32)
    pi = lp.detach().exp()
    torch.testing.assert_close(lp.detach().double(), catalogue_policy(m, tok, x, trie)[0][0], atol=1e-4, rtol=1e-4)
    grad = lambda loss: torch.cat(
        [g.flatten() for g in torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)]
    )
    dpo = grad(dpo_population(lp, pi, p, pi, .2))
    torch.testing.assert_close(dpo, .1*grad(-(p*lp).sum()), atol=1e-6, rtol=1e-3)


def test_copies_of_a_trained_model_compute_with_their_own_weights(model, tok, pairs):
    m = fresh_copy(model)
    t = PairTrainer(
        model=m,
        ref_model=fresh_copy(model),
        args=trl_args(DPOConfig, 1, 1e-3, 4),
        train_dataset=check_pairs(model, tok, pairs),
        processing_class=tok,
    )
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        before = m(input_ids=ids).logits
        trap, safe = copy.deepcopy(m), fresh_copy(m)
        assert "forward" in m.__dict__ and t.model is m, "the trainer's forward must stay in place"
        for p in m.parameters():
            p.zero_()
        assert trap(input_ids=ids).logits.abs().max() == 0, "trl no longer binds forward: fresh_copy can go"
        torch.testing.assert_close(safe(input_ids=ids).logits, before)


def test_align_leaves_its_model_alone_and_raises_the_winner(model, tok, pairs):
    before = vector(model)
    new = align(model, tok, pairs, steps=15, lr=3e-3, batch_size=20, beta=.5)
    assert torch.equal(vector(model), before) and "forward" not in new.__dict__ and not torch.equal(vector(new), before)
    gap = lambda m: (
        sequence_logprob(m, tok, pairs.prompt.tolist(), pairs.chosen.tolist(), eos=True)
        - sequence_logprob(m, tok, pairs.prompt.tolist(), pairs.rejected.tolist(), eos=True)
    ).mean()
    assert gap(new) > gap(model) + .1
    again = align(model, tok, Dataset.from_pandas(pairs), steps=15, lr=3e-3, batch_size=20, beta=.5)
    assert torch.equal(vector(again), vector(new)), "same seed, same model; a Dataset is as good as a table"


def test_a_training_can_be_watched_and_leaves_nothing_frozen(model, tok, pairs):
    seen, frozen = [], gc.get_freeze_count()
    align(model, tok, pairs, steps=10, batch_size=8, watch=lambda t, m: seen.append((t, vector(m))))
    assert [t for t, _ in seen] == [0, 2, 4, 6, 8, 10] and torch.equal(seen[0][1], vector(model))
    assert not torch.equal(seen[0][1], seen[1][1]) and gc.get_freeze_count() == frozen


def test_a_weight_counts_like_a_repetition():
    assert or_ratio([0, 1, 2, 3], 1, weight=[3, 1, 1, 1]) == or_ratio([0, 0, 0, 1, 2, 3], 1) == .5


def test_arguments_have_cpu_settings():
    a = trl_args(DPOConfig, 3, 1e-3)
    if not torch.cuda.is_available():
        assert a.use_cpu and not a.bf16
    assert not a.gradient_checkpointing and a.max_length is None and a.learning_rate == 1e-3


def test_works_with_adapters(model, tok, pairs):
    m = lora(fresh_copy(model), r=2)
    h = train_with(
        PairTrainer, m, check_pairs(model, tok, pairs), tok, trl_args(DPOConfig, 4, 1e-2, 20, beta=0.5), ref_model=None
    )
    assert h[0] == pytest.approx(np.log(2), abs=1e-5) and h[-1] < h[0]


def test_self_play_compounds_rounds(model, tok, rows):
    trie, seen = ItemTrie(tok, TITLES), []
    a = self_play(
        model,
        tok,
        rows,
        trie,
        rounds=2,
        n_rows=16,
        sft_steps=2,
        dpo_steps=2,
        lr=1e-3,
        batch_size=8,
        seed=4,
        each=lambda t, m: seen.append(vector(m)),
    )
    first, part = model, None
    for t in range(2): # the same two rounds by hand
        part = rows.sample(16, random_state=4000 + t)
        bad = own_rejected(first, tok, part, trie, 4000 + t)
        mid = sft(first, tok, part, 2, 1e-3, 8, 4000 + t)
        first = align(mid, tok, pairs_of(part, bad, TITLES), steps=2, beta=.1, lr=1e-3, batch_size=8, seed=4000 + t)
        assert torch.equal(vector(first), seen[t+1])
    assert torch.equal(vector(a), seen[-1]) and not torch.equal(seen[1], seen[2])


def test_decoding_never_leaves_the_catalogue(model, tok, rows):
    trie, prompts = ItemTrie(tok, TITLES), rows.prompt.tolist()[:60]
    got = draw_items(model, tok, prompts, trie, seed=1)
    assert got.min() >= 0 and got.max() < len(TITLES) and len(set(got)) > 2
    assert (draw_items(model, tok, prompts, trie, seed=1) == got).all() and (
        draw_items(model, tok, prompts, trie, seed=2) != got
    ).any()
    assert (draw_items(model, tok, prompts, trie, seed=1, batch_size=7) >= 0).all()
    g = draw_items(model, tok, prompts[:1]*3, trie, greedy=True)
    assert len(set(g)) == 1


def test_draws_follow_the_policy(model, tok):
    trie, x = ItemTrie(tok, TITLES), history_prompt(TITLES[:2])
    got = np.bincount(draw_items(model, tok, [x]*3000, trie, seed=0, batch_size=1000), minlength=len(TITLES))/3000
    p, at = np.ones(len(TITLES)), [completion_ids(tok, " "+t, True) for t in TITLES]
    start = tok(x).input_ids
    for i, ids in enumerate(at): # locally normalised inside the trie, by hand
        for k, t in enumerate(ids):
            with torch.no_grad():
                s = model(torch.tensor([start + ids[:k]])).logits[0, -1]
            ok = sorted({j[k] for j in at if j[:k] == ids[:k] and len(j) > k})
            p[i] *= s[ok].softmax(0)[ok.index(t)].item()
    assert p.sum() == pytest.approx(1, abs=1e-4) and np.abs(got - p).max() < .03


def test_world_sequences_are_drawn_without_replacement():
    p = np.tile([.6, .3, .1, 0], (30000, 1))
    s = world_sequences(p, 2, 0)
    assert (s[:, 0] != s[:, 1]).all() and not (s == 3).any()
    np.testing.assert_allclose(np.bincount(s[:, 0], minlength=4)/30000, p[0], atol=.01)
    np.testing.assert_allclose((s[s[:, 0] == 1, 1] == 0).mean(), .6/.7, atol=.015)
    with pytest.raises(ValueError, match="positive probability"):
        world_sequences(p, 4)


def test_rows_and_pairs(rows):
    r = rows[rows.user == 3]
    assert r.split.tolist() == ["train"]*3 + ["valid", "test"] and all(len(s) == t+1 for t, s in enumerate(r.seen))
    assert all(p.count(";") <= 1 for p in r.prompt) and (rows.completion == [" " + TITLES[i] for i in rows.item]).all()
    x = pairs_of(r, [r.item.iloc[0], -1, *((r.item.iloc[2:] + 1) % 7)], TITLES, weight=np.arange(5))
    assert x.weight.tolist() == [2, 3, 4]


def test_concentration_metrics():
    top = np.array([[0, 1], [0, 2], [0, 3]])
    assert div_ratio(top) == 4/6 and or_ratio(top, 1) == 3/6 and or_ratio(top) == 5/6
    G = np.array([[1, 0], [1, 1], [0, 1], [0, 1]])
    g = genre_gaps(top, [[0, 1], [3]], G)
    np.testing.assert_allclose(g, [4/7 - 2/4, 3/7 - 2/4])
    assert mgu(g) == pytest.approx(1/14) and dgu(g) == pytest.approx(2/14)
    np.testing.assert_allclose(genre_gaps(np.arange(4), [[0, 1], [3]], G, [3, 1, 1, 1]), g)


def test_rejected_on_purpose():
    r = pd.DataFrame(dict(item=[0]*5000, seen=[[2]]*5000))
    n = np.bincount(popular_rejected(r, [50, 6, 30, 3, 1], 0), minlength=5)/5000
    np.testing.assert_allclose(n, [0, .6, 0, .3, .1], atol=.03)
    V = np.array([[1, 0], [.9, .1], [1, .01], [0, 1]])
    assert semantic_rejected(pd.DataFrame(dict(item=[0, 0, 3], seen=[[], [2], []])), list("abcd"), V).tolist() == [
        2,
        1,
        1,
    ]


def test_flip_probability_and_its_sharpness():
    e = flip_probability([2., 0, 0], [0., 0, 5], .5)
    np.testing.assert_allclose(e, [1/(1+np.exp(1)), .45, .45])
    rng = np.random.default_rng(0)
    gap = rng.normal(0, 3, 20000)
    win = rng.random(20000) < 1/(1+np.exp(-.3*gap))
    from sklearn.linear_model import LogisticRegression
    lr = LogisticRegression(fit_intercept=False, C=1e6).fit(gap[:, None], win).coef_[0, 0]
    assert fit_tau(np.where(win, gap, -gap), 0) == pytest.approx(lr, rel=.1)


@pytest.mark.parametrize(
    "change, text",
    [
        (dict(rejected=" Nowhere Land"), "not in the trie"),
        (dict(chosen="  "), "empty answer"),
        (dict(rejected=[[]] * 40), r"lengths \[0\]"),
        (dict(rejected=[[" Quiet Mill"] * (1 + k % 2) for k in range(40)]), r"lengths \[1, 2\]"),
        (dict(prompt=history_prompt(TITLES * 6)), "the model reads 96"),
        (dict(chosen=[[dict(role="assistant", content="Quiet Mill")]] * 40), "messages into text"),
    ],
)
def test_bad_pairs(model, tok, pairs, change, text):
    with pytest.raises(ValueError, match=text):
        check_pairs(model, tok, pairs.assign(**change), ItemTrie(tok, TITLES))


def test_more_bad_input(model, tok, pairs):
    with pytest.raises(ValueError, match="no column"):
        check_pairs(model, tok, pairs.drop(columns="chosen"))
    with pytest.raises(ValueError, match="no pairs"):
        check_pairs(model, tok, pairs.iloc[:0])
    with pytest.raises(ValueError, match="epsilon"):
        align(model, tok, pairs.drop(columns="epsilon"), RosePOTrainer, steps=1)
    with pytest.raises(ValueError, match="precompute"):
        align(
            model,
            tok,
            pairs.assign(rejected=[[r] * 2 for r in pairs.rejected]),
            SDPOTrainer,
            steps=1,
            precompute_ref_log_probs=True,
        )


def test_precomputed_reference_gives_the_same_model(model, tok, pairs):
    a, b = (
        align(model, tok, pairs, steps=4, lr=1e-3, batch_size=10, precompute_ref_log_probs=k) for k in (False, True)
    )
    torch.testing.assert_close(vector(a), vector(b), atol=1e-6, rtol=1e-4)


def test_simpo_keeps_no_reference_model(model, tok, pairs):
    seen = []
    class Spy(SimPOTrainer):
        def train(self):
            seen.append(self.ref_model)
            return super().train()
    align(model, tok, pairs, Spy, steps=1, batch_size=8)
    assert seen == [None]


def test_exact_ranking(model, tok, rows):
    trie, prompts = ItemTrie(tok, TITLES), rows.prompt.tolist()[:3]
    lp, mass = catalogue_policy(model, tok, prompts, trie)
    raw = rank_items(model, tok, prompts, trie).double()
    torch.testing.assert_close(lp.exp().sum(1), torch.ones(3, dtype=torch.double))
    torch.testing.assert_close(mass, raw.exp().sum(1))
    assert (mass < 1).all() and (lp.argsort(1) == raw.argsort(1)).all()


# LettinGo

WORDS = ["dark", "calm", "sea", "city", "mystery"]
PROMPTS = [f"seen {a.upper()} {b} ; profile :" for a, b in zip(WORDS, reversed(WORDS))]


@pytest.fixture(scope="module")
def chatter():
    return nano_tokenizer(
        [
            f"{p} {w} {w.upper()} ; answer : yes told likes avoids nothing for party evening"
            for p in PROMPTS
            for w in WORDS
        ]
        * 20,
        420,
    )


def tiny(tok, seed=0):
    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.2,
            **mark_ids(tok),
        )
    ).eval()


@pytest.fixture(scope="module")
def speaker(chatter): return tiny(chatter)


def test_opinions_follow_from_words():
    w = World(3, 40, 200)
    e = w.taste_words
    assert (
        e.shape == (40, 26)
        and list(e.columns) == TASTES
        and ((e == 1).sum(axis=1) == 4).all()
        and ((e == -1).sum(axis=1) == 4).all()
    )
    for u, i in [(0, 0), (7, 33), (39, 179)]:
        s = sum(e.loc[u, w.items.loc[i, a]] for a in ("mood", "genre", "setting"))
        assert w.opinions[u, i] == pytest.approx(1/(1 + np.exp(-3*s)))


def test_profile_users_are_split_and_balanced():
    w = World(1, 80, 200)
    U = profile_users_of(w, np.random.default_rng(0), n_targets=6)
    assert len(U) > 40
    for r in U.itertuples():
        parts = [r.long, r.recent, r.score, r.test]
        assert [len(x) for x in parts] == [14, 3, 6, 6] and len(np.unique(np.concatenate(parts))) == 29
        assert (
            r.likes[r.score].sum() == r.likes[r.test].sum() == 3
            and (abs(w.opinions[r.user, np.r_[r.score, r.test]] - 0.5) > 0.3).all()
        )
        assert r.prompt == writer_prompt(w.item_words[r.long], r.likes[r.long])
    for n in (0, 1, 5):
        with pytest.raises(ValueError, match=f"n_targets={n}"):
            profile_users_of(w, np.random.default_rng(0), n)


def test_texts():
    assert spoken([["a", "b"], ["c", "d"]], [True, False]) == "A B c d"
    assert mentions("SEA calm sea seaside", "sea") == "likes avoids" and mentions("calm", "sea") == "nothing"
    assert judge_prompt(["sea"], "SEA", "sea", True) == "sea seen avoids told likes ; answer :"
    assert writer_prompt([["sea", "calm"], ["dark", "sea"]], [True, False]) == "seen CALM dark SEA sea ; profile :"
    with pytest.raises(ValueError, match="empty history"):
        writer_prompt([], [])


def test_answers_loss_by_hand(speaker, chatter):
    texts = ["for party : dark sea", "for : evening : calm"]
    ids = chatter([t + chatter.eos_token for t in texts]).input_ids
    n = max(map(len, ids))
    x = torch.tensor([i + [chatter.pad_token_id]*(n-len(i)) for i in ids])
    mark = chatter(" :", add_special_tokens=False).input_ids[-1]
    total, count = 0., 0
    for i in ids:
        last = max(k for k, t in enumerate(i) if t == mark)
        with torch.no_grad():
            lp = speaker(torch.tensor([i])).logits[0].log_softmax(-1)
        for k in range(last+1, len(i)):
            total -= lp[k-1, i[k]].item()
            count += 1
    assert answers_loss(speaker, x, mark, chatter.pad_token_id).item() == pytest.approx(total/count, rel=1e-4)


def test_task_lm_learns_and_is_cached(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path))
    made = []

    def docs():
        made.append(1)
        return [f"for {w} ; answer : {'yes' if k % 2 else 'no'}" for k, w in enumerate(WORDS)] * 20
    kw = dict(key=["k"], hidden=32, layers=1, steps=80, lr=.01)
    (m, tok), _ = task_lm(docs, **kw), task_lm(docs, **kw)
    assert len(made) == 1
    s = answer_logits(m, tok, [f"for {w} ; answer :" for w in WORDS], [" yes", " no"])
    assert ((s[:, 0] > s[:, 1]).numpy() == np.arange(5) % 2).all()


def test_exploration_shares_out_and_repeats(speaker, chatter):
    two = {"a": speaker, "b": tiny(chatter, 1)}
    E = explore_profiles(two, chatter, PROMPTS, 5, seed=3)
    assert E.groupby(["row", "writer"]).size().unstack().to_numpy().tolist() == [[2, 3]]*5
    assert E.equals(explore_profiles(two, chatter, PROMPTS, 5, seed=3)) and not E.equals(
        explore_profiles(two, chatter, PROMPTS, 5, seed=4)
    )
    best = explore_profiles({"a": speaker}, chatter, PROMPTS, 1, temperature=0)
    for r, t in best[["row", "profile"]].itertuples(index=False): # greedy decoding by hand, without padding
        ids = chatter(PROMPTS[r]).input_ids
        n = len(ids)
        with torch.no_grad():
            while len(ids) < n + 6 and (len(ids) == n or ids[-1] != chatter.eos_token_id):
                ids.append(int(speaker(torch.tensor([ids])).logits[0, -1].argmax()))
        assert t == chatter.decode(ids[n:], skip_special_tokens=True)
    with pytest.raises(ValueError, match="n=1 profiles for 2 writers"):
        explore_profiles(two, chatter, PROMPTS, 1)
    with pytest.raises(ValueError, match="no prompts"):
        explore_profiles(two, chatter, [])
    with pytest.raises(ValueError, match="the model reads 64"):
        explore_profiles(two, chatter, [" ".join(WORDS*30)], 2)


def test_success_is_the_share_of_right_answers(speaker, chatter):
    P = pd.DataFrame(dict(row=[0, 0, 1, 1], profile=["dark", "sea", "dark", "dark"]))
    ask, truth = (
        lambda r, p: [f"{WORDS[r]} told {p} ; answer :", f"{WORDS[r + 1]} told {p} ; answer :"],
        np.array([[True, False], [False, False]]),
    )
    got = profile_success(speaker, chatter, P, ask, truth, (" yes", " nothing"))
    for g, (r, p) in zip(got, P.itertuples(index=False)):
        s = [answer_logits(speaker, chatter, [q], [" yes", " nothing"])[0] for q in ask(r, p)]
        assert g == np.mean([bool(a > b) == t for (a, b), t in zip(s, truth[r])])
    with pytest.raises(ValueError, match="no profiles"):
        profile_success(speaker, chatter, P[:0], ask, truth)


def test_pairs_of_profiles():
    P = pd.DataFrame(
        dict(
            row=[0] * 6 + [1] * 3 + [2] * 2,
            profile=["a", "b", "c", "d", "e", "e"] + ["f", "g", " "] + ["h", "i"],
            success=[0.9, 0.1, 0.8, 0.3, 0.5, 0.5] + [0.5, 0.6, 0] + [0.5, 0.5],
        )
    )
    pairs, share = profile_pairs(P, ["x", "y", "z"], margin=.2)
    assert pairs.to_list() == [
        dict(prompt="x", chosen="a", rejected="b"),
        dict(prompt="x", chosen="c", rejected="d"),
    ] and share == pytest.approx(1 / 3)
    assert len(profile_pairs(P, ["x", "y", "z"], 0.2, per_row=1)[0]) == 1 and profile_pairs(
        P, ["x", "y", "z"], margin=0.05
    )[1] == pytest.approx(2 / 3)
    with pytest.raises(ValueError, match="margin=0.1"):
        profile_pairs(P[9:], ["x", "y", "z"])


def test_aligned_writer_prefers_what_succeeded(speaker, chatter):
    pairs = Dataset.from_list([dict(prompt=p, chosen=" dark sea", rejected=" calm city") for p in PROMPTS])
    m = align(speaker, chatter, pairs, steps=10, lr=3e-3, beta=.5, batch_size=5, precompute_ref_log_probs=True)
    gap = lambda m: (
        sequence_logprob(m, chatter, PROMPTS, [" dark sea"] * 5, eos=True)
        - sequence_logprob(m, chatter, PROMPTS, [" calm city"] * 5, eos=True)
    ).mean()
    assert gap(m) > gap(speaker) + .5


def test_diversity():
    assert distinct(["a b c", "a b"]) == 2/3 and distinct(["a b c", "a b"], 1) == 3/5
    with pytest.raises(ValueError, match="3 words"):
        distinct(["a b"], 3)


# DPRM

def cost(p, q, C):
    "Optimal transport as a linear program."
    n, k = C.shape
    A = np.r_[np.kron(np.eye(n), np.ones(k)).reshape(n, -1), np.tile(np.eye(k), n)]
    return linprog(np.ravel(C), A_eq=A, b_eq=np.r_[p, q]).fun


def test_transport_on_a_line_against_scipy_and_a_linear_program():
    rng = np.random.default_rng(1)
    c = np.array([-1., 0, .5, 3])
    p, q = rng.dirichlet(np.ones(4), (2, 6))
    got = ot_loss(torch.tensor(p), torch.tensor(q), torch.tensor(c)).numpy()
    np.testing.assert_allclose(got, [scipy.stats.wasserstein_distance(c, c, a, b) for a, b in zip(p, q)])
    np.testing.assert_allclose(got, [cost(a, b, abs(c[:, None]-c)) for a, b in zip(p, q)], atol=1e-7)


def test_sinkhorn_for_any_cost():
    rng = np.random.default_rng(2)
    p, q, C = rng.dirichlet(np.ones(4), 3), rng.dirichlet(np.ones(5), 3), rng.random((4, 5))
    to = torch.tensor
    np.testing.assert_allclose(
        sinkhorn(to(p), to(q), to(C), 0.004, 3000), [cost(a, b, C) for a, b in zip(p, q)], atol=3e-3
    )
    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda z: sinkhorn(z.softmax(-1), to(q[:2]), to(C), .1, 50), z)


def test_smooth_relatives_and_gradients():
    c = torch.tensor([0., 1, 3], dtype=torch.float64)
    p, q = torch.tensor([[.2, .3, .5]]).double(), torch.tensor([[.5, .1, .4]]).double()
    assert ot_loss(p, q, c).item() == pytest.approx(0.3 + 2 * 0.1) and ot_loss(
        p, q, c, "cramer"
    ).item() == pytest.approx(0.09 + 2 * 0.01)
    assert ot_loss(p, q, c, "huber", 0.05).item() == pytest.approx((0.3 - 0.025) + 2 * (0.1 - 0.025)) and ot_loss(
        p, q, c, "huber", 0.2
    ).item() == pytest.approx((0.3 - 0.1) + 2 * 0.01 / 0.4)
    z = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    for k in ("abs", "huber", "cramer"):
        assert torch.autograd.gradcheck(lambda z, k=k: ot_loss(z.softmax(-1), q.expand(4, 3), c, k), z)
    with pytest.raises(ValueError, match="utilities must increase"):
        ot_loss(p, q, torch.tensor([0., 2, 1]))
    with pytest.raises(ValueError, match="do not fit"):
        ot_loss(p, q, torch.tensor([0., 1]))
    with pytest.raises(ValueError, match="kind='l1'"):
        ot_loss(p, q, c, "l1")


def test_the_other_losses():
    z, p, c = (
        torch.randn(5, 4),
        torch.tensor(np.random.default_rng(0).dirichlet(np.ones(4), 5), dtype=torch.float32),
        torch.tensor([1.0, 2, 4, 5]),
    )
    torch.testing.assert_close(soft_ce(z, p, c), F.cross_entropy(z, p, reduction="none"))
    torch.testing.assert_close(majority_ce(z, p, c), F.cross_entropy(z, p.argmax(1), reduction="none"))
    torch.testing.assert_close(
        mean_mse(z, p, c), torch.stack([((a.softmax(0) * c).sum() - (b * c).sum()) ** 2 for a, b in zip(z, p)])
    )
    torch.testing.assert_close(ot("cramer")(z, p, c), ot_loss(z.softmax(1), p, c, "cramer"))


def test_updater_counts_forgets_and_is_the_beta_for_two():
    b = BayesianUpdater([2., 3], n=1).update([[4, 1]])
    assert b.target[0, 1] == pytest.approx(scipy.stats.beta(3+1, 2+4).mean())
    x, n = BayesianUpdater(np.ones((2, 3)), rho=.5), np.array([[4., 0, 2], [0, 0, 1]])
    for _ in range(60):
        x.update(n)
    np.testing.assert_allclose(x.alpha, 1 + 2*n) # prior + n/(1-rho)
    for _ in range(60):
        x.update(0*n)
    np.testing.assert_allclose(x.alpha, 1) # forgets down to the prior, not to nothing
    for bad in ([0, 1], [1.]):
        with pytest.raises(ValueError, match="prior of shape"):
            BayesianUpdater(bad, n=2)
    with pytest.raises(ValueError, match="rho=2"):
        BayesianUpdater([1, 1], rho=2)
    with pytest.raises(ValueError, match="none negative"):
        x.update(-n)


def test_prefers_by_enumeration():
    p, q = np.random.default_rng(0).dirichlet(np.ones(5), (2, 3))
    want = [sum(a[i]*b[j]*((i > j) + .5*(i == j)) for i in range(5) for j in range(5)) for a, b in zip(p, q)]
    np.testing.assert_allclose(prefers(p, q), want)
    np.testing.assert_allclose(prefers(p, q) + prefers(q, p), 1)


def test_group_weights_undo_a_biased_panel():
    w, panel = World(0, 120, 200, rho=1.), np.array([.7, .1, .1, .05, .05])
    crowd = Crowd(w)
    x, A = ["party"]*2, [["dark", "mystery", "sea"], ["calm", "comedy", "city"]]
    n = crowd.labels(x, A, 200000, np.random.default_rng(0), panel)*group_weights(crowd.shares, panel)[:, None]
    np.testing.assert_allclose(n.sum(1)/n.sum((1, 2))[:, None], crowd.population(x, A), atol=.01)
    raw = crowd.labels(x, A, 200000, np.random.default_rng(0), panel).sum(1)/200000
    assert abs(raw - crowd.population(x, A)).max() > .03
    with pytest.raises(ValueError, match="at least one annotator"):
        group_weights([.5, .5], [1, 0])


def test_crowd_against_simulated_judges():
    c = Crowd(World(0, 120, 200, rho=1.))
    a = ("tense", "travel", "forest")
    rng = np.random.default_rng(0)
    mean = 3 + sum(c.effects[v] for v in a).to_numpy() + sum(c.suits.loc["study", v] for v in a)
    stars = np.clip(np.round(mean[:, None] + .4*rng.normal(size=(100, 20000))), 1, 5).reshape(5, -1)
    want = np.stack([(stars == k).mean(1) for k in range(1, 6)], 1)
    np.testing.assert_allclose(c.by_group(["study"], [a])[0], want, atol=.01)
    np.testing.assert_allclose(c.population(["study"], [a], [0, 0, 0, .6, .4])[0], .6*want[3] + .4*want[4], atol=.01)
    assert set(OCCASIONS) == set(c.suits.index) and all(v in c.effects for v in CUES["mood"])
    with pytest.raises(ValueError, match="per_group=0"):
        Crowd(World(0, 30, 200), 0)


@pytest.fixture(scope="module")
def folder(speaker, chatter, tmp_path_factory):
    to = tmp_path_factory.mktemp("lm")
    speaker.save_pretrained(to)
    chatter.save_pretrained(to)
    return str(to)


def test_reward_models_learn_their_target(folder, chatter):
    texts, c = ["for party : dark", "for party : sea"], [1., 2, 3]
    target = np.array([[.7, .2, .1], [.1, .1, .8]])
    for loss in (ot("abs"), ot("cramer"), soft_ce):
        m = fit_crowd(head_of(folder, 3, chatter), chatter, texts, target, loss, c, steps=60, lr=3e-3, batch_size=2)
        z = outputs(m, chatter, texts)
        np.testing.assert_allclose(z.softmax(1), target, atol=.1)
        np.testing.assert_allclose(expected_reward(m, chatter, texts, c), z.softmax(1) @ torch.tensor(c), rtol=1e-5)
    torch.testing.assert_close(
        outputs(m, chatter, ["for party : sea ; told likes", *texts])[1:], z, atol=1e-4, rtol=1e-4
    )  # padding does not matter
    with pytest.raises(ValueError, match="targets of shape"):
        fit_crowd(m, chatter, texts, target[:, :2], soft_ce, c)
    with pytest.raises(ValueError, match="no prompts"):
        fit_crowd(m, chatter, [], np.zeros((0, 3)), soft_ce, c)
    with pytest.raises(ValueError, match="no texts"):
        outputs(m, chatter, [])
    with pytest.raises(ValueError, match="the model reads 64"):
        fit_crowd(m, chatter, [" ".join(WORDS*30)], target[:1], soft_ce, c)


def test_one_step_of_the_crowd_trainer_by_hand(folder, chatter):
    texts, t = ["for party : dark", "for evening : sea calm"], np.array([[.7, .2, .1], [.1, .1, .8]])
    kw = dict(steps=1, lr=1e-3, batch_size=2)
    m = fit_crowd(head_of(folder, 3, chatter), chatter, texts, t, soft_ce, [1., 2, 3], **kw)
    by_hand = head_of(folder, 3, chatter).train()
    loss = (
        sum(
            -(
                torch.tensor(t[k])
                * by_hand(torch.tensor([chatter(x).input_ids + [chatter.eos_token_id]])).logits[0].log_softmax(-1)
            ).sum()
            for k, x in enumerate(texts)
        )
        / 2
    )
    loss.backward()
    torch.nn.utils.clip_grad_norm_(by_hand.parameters(), 1.)
    torch.optim.AdamW(by_hand.parameters(), lr=1e-3, weight_decay=0.).step()
    z = [outputs(x, chatter, texts) for x in (m, by_hand, head_of(folder, 3, chatter))]
    torch.testing.assert_close(z[0], z[1], atol=2e-3, rtol=1e-3)
    assert (z[0] - z[2]).abs().max() > .01


def test_bradley_terry_ranks_the_preferred_higher(folder, chatter):
    good, bad = ["for party : dark", "for evening : dark"], ["for party : sea", "for evening : sea"]
    m = fit_pairs(head_of(folder, 1, chatter), chatter, good, bad, steps=20, lr=3e-3, batch_size=2)
    r = [expected_reward(m, chatter, t, [1., 2]) for t in (good, bad)]
    assert (r[0] > r[1] + .5).all() and r[0].shape == (2,)


def test_malformed_answers_get_the_lowest_reward(folder, chatter):
    m = head_of(folder, 3, chatter)
    p, c = ["for party :"]*3, [" dark", " sea", " nonsense"]
    free, strict = (
        reward_function(m, chatter, [1.0, 2, 3])(p, c),
        reward_function(m, chatter, [1.0, 2, 3], lambda a: a.strip() in WORDS)(p, c),
    )
    np.testing.assert_allclose(free, expected_reward(m, chatter, [a+b for a, b in zip(p, c)], [1., 2, 3]))
    assert strict[:2] == free[:2] and strict[2] == min(free)


def test_policy_moves_towards_the_reward(folder, chatter, speaker):
    capital = lambda completions, **kw: [float(sum(x.isupper() for x in c)) for c in completions]
    m = grpo(folder, chatter, PROMPTS, capital, steps=8, lr=3e-3, batch_size=16, max_new_tokens=3)
    mean = lambda m: np.mean(capital(explore_profiles({"m": m}, chatter, PROMPTS, 40, max_new_tokens=3).profile))
    assert mean(m) > mean(speaker) and "forward" not in m.__dict__
    with pytest.raises(ValueError, match="no prompts"):
        grpo(folder, chatter, [], capital)


def test_lengths_and_configurations(speaker, chatter):
    check_lengths(speaker, chatter, PROMPTS, 10)
    with pytest.raises(ValueError, match="the model reads 64"):
        check_lengths(speaker, chatter, PROMPTS, 60)
    assert (
        not hasattr(trl_args(TrainingArguments, 2, 1e-3), "max_length")
        and trl_args(DPOConfig, 2, 1e-3, max_length=9).max_length == 9
    )
