"alignment: losses against hand-computed values and trl's own, gradients, the theorem, decoding inside the catalogue, bad input."
import copy
from types import SimpleNamespace
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from datasets import Dataset
from transformers import LlamaConfig, LlamaForCausalLM
from trl import DPOConfig, DPOTrainer
from recbook.lm import ItemTrie, completion_ids, lora, mark_ids, nano_tokenizer, rank_items, sequence_logprob
from recbook.llm.alignment import (AlphaDPOTrainer, PairTrainer, RosePOTrainer, SDPOTrainer, SimPOTrainer, align, catalogue_policy, check_pairs, dgu,
    div_ratio, dpo_optimum, dpo_population, draw_items, fit_tau, flip_probability, fresh_copy, genre_gaps, history_prompt, mgu, next_item_rows, or_ratio,
    own_losers, pairs_of, popular_losers, self_play, semantic_losers, sft, train_with, trl_args, world_sequences)

TITLES = ["Gloomy Ghost", "Gloomy Ghost Tide", "Sunny Kiss", "Merry Prank Oak", "Silver Sword", "Quiet Mill", "Bitter Clue Reef"]


@pytest.fixture(scope="module")
def tok(): return nano_tokenizer([history_prompt(TITLES)]*30, 360)


@pytest.fixture(scope="module")
def model(tok):
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=96, tie_word_embeddings=True, initializer_range=.2, **mark_ids(tok))).eval()


@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    return next_item_rows([rng.permutation(len(TITLES))[:6] for _ in range(20)], TITLES, history=2)


@pytest.fixture(scope="module")
def pairs(rows): return pairs_of(rows.iloc[:40], (rows.item.iloc[:40] + 1 + np.arange(40) % 3) % len(TITLES), TITLES, epsilon=np.linspace(0, .4, 40))


def vector(m): return torch.cat([p.detach().flatten() for p in m.parameters()])


def first_loss(Trainer, model, tok, pairs, **kw):
    "Loss and gradient of one batch holding all pairs, in the order given, with the policy moved off the reference."
    policy, ref = fresh_copy(model), fresh_copy(model)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in policy.parameters(): p += .05*torch.randn(p.shape, generator=g)
    beta, knobs = kw.pop("beta", .3), kw
    args = trl_args(DPOConfig, 1, 1e-3, len(pairs), beta=beta)
    t = Trainer(model=policy, ref_model=ref, args=args, train_dataset=check_pairs(model, tok, pairs), processing_class=tok, **knobs)
    batch = t.data_collator([{k: v for k, v in r.items() if k in ("prompt_ids", "chosen_ids", "rejected_ids", *getattr(t, "extra", ()))} for r in t.train_dataset])
    loss = t._compute_loss(policy, batch, False)
    loss.backward()
    return loss.item(), torch.cat([p.grad.flatten() for p in policy.parameters()]), policy, ref


def logps(policy, ref, tok, pairs, column, norm=False):
    for m in (policy, ref): m.__dict__.pop("forward", None)
    s = lambda m: sequence_logprob(m, tok, pairs.prompt.tolist(), pairs[column].tolist(), eos=True, length_norm=norm)
    return s(policy), s(ref)


def test_dpo_equals_trl_in_loss_and_gradient(model, tok, pairs):
    a, ga, *_ = first_loss(PairTrainer, model, tok, pairs)
    b, gb, *_ = first_loss(DPOTrainer, model, tok, pairs)
    assert a == pytest.approx(b, abs=1e-6) and a != pytest.approx(np.log(2), abs=1e-3)
    torch.testing.assert_close(ga, gb, atol=1e-6, rtol=1e-4)


def test_whole_training_equals_trl(model, tok, pairs):
    runs = [train_with(T, fresh_copy(model), check_pairs(model, tok, pairs), tok, trl_args(DPOConfig, 6, 1e-3, 8, 5, beta=.2), ref_model=fresh_copy(model)) for T in (PairTrainer, DPOTrainer)]
    np.testing.assert_allclose(*runs, rtol=1e-5); assert len(runs[0]) == 6 and runs[0][0] == pytest.approx(np.log(2), abs=1e-5)


def test_losses_against_log_probabilities_scored_elsewhere(model, tok, pairs):
    "Each loss from `sequence_logprob`, which shares no code with the trainer."
    for T, knobs in [(RosePOTrainer, {}), (SimPOTrainer, dict(gamma=.7)), (AlphaDPOTrainer, dict(gamma=.7, alpha=.4)), (AlphaDPOTrainer, dict(gamma=.7, alpha=.4, normalise=False))]:
        loss, _, policy, ref = first_loss(T, model, tok, pairs, beta=.3, **knobs)
        norm = T is not RosePOTrainer
        (w, rw), (l, rl) = (logps(policy, ref, tok, pairs, c, norm) for c in ("chosen", "rejected"))
        e = torch.tensor(pairs.epsilon.to_numpy())
        if T is RosePOTrainer: h = .3*((w-rw)-(l-rl)); want = -(1-e)*F.logsigmoid(h) - e*F.logsigmoid(-h)
        else:
            u, M = w-l, (w-l)-(rw-rl)
            if knobs.get("normalise", True): M = (M - M.mean())/M.std(unbiased=False)
            want = -F.logsigmoid(.3*(u - .7/.3 - knobs.get("alpha", 0)*M))
        assert loss == pytest.approx(want.mean().item(), rel=1e-4), T


def test_simpo_equals_trls_formula(model, tok, pairs):
    from trl.experimental.cpo import CPOTrainer
    w, l = torch.tensor([-1.2, -.4, -3.]), torch.tensor([-2., -.3, -2.5])
    stock = SimpleNamespace(loss_type="simpo", simpo_gamma=.6, beta=1.5, label_smoothing=0., alpha=0., accelerator=SimpleNamespace(device="cpu"))
    theirs = CPOTrainer.cpo_loss(stock, w, l)[0]
    n = torch.tensor([3., 4., 5.])
    ours = SimPOTrainer.pair_loss(SimpleNamespace(beta=1.5, gamma=.6), SimpleNamespace(w=w*n, l=l*n, nw=n, nl=n))
    torch.testing.assert_close(ours, theirs)


def test_coincidences(model, tok, pairs):
    dpo, g, *_ = first_loss(PairTrainer, model, tok, pairs)
    plain, h, *_ = first_loss(RosePOTrainer, model, tok, pairs.assign(epsilon=0.))
    assert plain == pytest.approx(dpo); torch.testing.assert_close(g, h)
    simpo, g, *_ = first_loss(SimPOTrainer, model, tok, pairs, gamma=.5)
    zero, h, *_ = first_loss(AlphaDPOTrainer, model, tok, pairs, gamma=.5, alpha=0.)
    assert zero == pytest.approx(simpo); torch.testing.assert_close(g, h)
    one, g, *_ = first_loss(SDPOTrainer, model, tok, pairs.assign(rejected=[[r] for r in pairs.rejected]))
    _, h, *_ = first_loss(PairTrainer, model, tok, pairs)
    assert one == pytest.approx(dpo); torch.testing.assert_close(g, h, atol=1e-6, rtol=1e-4)


def test_sdpo_with_several_losers(model, tok, rows):
    three = pairs_of(rows.iloc[:10], np.stack([(rows.item.iloc[:10] + k) % len(TITLES) for k in (1, 2, 4)], 1), TITLES)
    loss, _, policy, ref = first_loss(SDPOTrainer, model, tok, three)
    w, rw = logps(policy, ref, tok, three, "chosen")
    each = [logps(policy, ref, tok, three.assign(rejected=[r[k] for r in three.rejected]), "rejected") for k in range(3)]
    s = torch.stack([.3*((l-rl)-(w-rw)) for l, rl in each]).exp().sum(0)
    assert loss == pytest.approx(torch.log1p(s).mean().item(), rel=1e-4) # -log sigmoid(-log s) = log(1+s)
    same = train_with(SDPOTrainer, fresh_copy(model), check_pairs(model, tok, three), tok, trl_args(DPOConfig, 1, 1e-4, 5), ref_model=fresh_copy(model))
    assert same[0] == pytest.approx(np.log(4), abs=1e-5)


def test_rosepo_gradient_stops_where_the_label_is_as_sure_as_epsilon():
    h = torch.tensor([.3, 1., np.log(.8/.2)], requires_grad=True)
    b = SimpleNamespace(w=h, l=torch.zeros(3), rw=torch.zeros(3), rl=torch.zeros(3), epsilon=torch.full((3,), .2))
    g, = torch.autograd.grad(RosePOTrainer.pair_loss(SimpleNamespace(beta=1.), b).sum(), h)
    torch.testing.assert_close(g, torch.sigmoid(h.detach()) - .8); assert abs(g[2]) < 1e-6


def fake_alpha(**kw):
    t = SimpleNamespace(beta=2., gamma=1., alpha=.5, momentum=.9, normalise=True, stop=True, mean=None, spread=None, accelerator=SimpleNamespace(gather=lambda x: x)); t.__dict__.update(kw)
    t.standardised = lambda M: AlphaDPOTrainer.standardised(t, M)
    return t


def test_alpha_dpo_margin_carries_no_gradient_unless_asked():
    w = torch.tensor([-1., -2.5], requires_grad=True)
    b = SimpleNamespace(w=w, l=torch.tensor([-2., -2.]), rw=torch.tensor([-1.5, -2.]), rl=torch.tensor([-2., -2.]), nw=torch.tensor([1, 1]), nl=torch.tensor([1, 1]))
    grad = lambda **kw: torch.autograd.grad(AlphaDPOTrainer.pair_loss(fake_alpha(normalise=False, **kw), b).sum(), w)[0]
    u = (b.w - b.l).detach(); M = u - (b.rw - b.rl); x = 2*(u - .5 - .5*M)
    torch.testing.assert_close(grad(), -2*torch.sigmoid(-x)); torch.testing.assert_close(grad(stop=False), -2*torch.sigmoid(-x)*.5)


def test_alpha_dpo_statistics_start_at_the_first_difference():
    t = fake_alpha()
    assert t.standardised(torch.zeros(6)).abs().max() == 0
    z = t.standardised(torch.tensor([1., 2., 3., 6.]))
    assert z.mean().abs() < 1e-5 and z.std(unbiased=False) == pytest.approx(1, abs=1e-4) # the official state would give ten times that
    t.standardised(torch.tensor([3., 3.]))
    assert t.mean == pytest.approx(.9*3 + .1*3) and t.spread == pytest.approx(.9*np.std([1, 2, 3, 6]), rel=1e-4)


def test_theorem_by_newton():
    "The minimiser, found by another optimiser on another expression of the loss."
    from scipy.optimize import minimize
    rng = np.random.default_rng(0); p, q, ref = rng.dirichlet(np.ones(5), 3); beta = .7
    loss = lambda t: sum(p[a]*q[b]*np.logaddexp(0, -beta*((t[a]-np.log(ref[a])) - (t[b]-np.log(ref[b])))) for a in range(5) for b in range(5))
    t = minimize(loss, np.zeros(5), method="BFGS", options=dict(gtol=1e-10)).x
    to = lambda x: torch.tensor(x)
    np.testing.assert_allclose(np.exp(t)/np.exp(t).sum(), dpo_optimum(to(ref), to(p), to(q), beta), atol=1e-5)
    assert dpo_population(to(t), to(ref), to(p), to(q), beta).item() == pytest.approx(loss(t), rel=1e-9)


def test_first_step_of_self_play_is_an_sft_step(model, tok):
    "In a language model, too: expected DPO gradient with own losers = beta/2 times the SFT gradient, exactly, over a whole catalogue."
    trie, x = ItemTrie(tok, TITLES), [history_prompt(TITLES[:2])]
    def table(m): # the policy over the catalogue with gradients, normalised
        ids = [tok(x[0]).input_ids + completion_ids(tok, " "+t, True) for t in TITLES]; n = len(tok(x[0]).input_ids)
        return torch.stack([m(torch.tensor([i])).logits[0, :-1].log_softmax(-1).gather(1, torch.tensor(i[1:])[:, None])[n-1:].sum() for i in ids]).log_softmax(0)
    m = fresh_copy(model); lp = table(m); p = torch.tensor(np.random.default_rng(0).dirichlet(np.ones(len(TITLES))), dtype=torch.float32)
    pi = lp.detach().exp()
    torch.testing.assert_close(lp.detach().double(), catalogue_policy(m, tok, x, trie)[0][0], atol=1e-4, rtol=1e-4)
    grad = lambda loss: torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(m.parameters()), retain_graph=True)])
    dpo = grad(dpo_population(lp, pi, p, pi, .2))
    torch.testing.assert_close(dpo, .1*grad(-(p*lp).sum()), atol=1e-6, rtol=1e-3)


def test_copies_of_a_trained_model_compute_with_their_own_weights(model, tok, pairs):
    m = fresh_copy(model)
    t = PairTrainer(model=m, ref_model=fresh_copy(model), args=trl_args(DPOConfig, 1, 1e-3, 4), train_dataset=check_pairs(model, tok, pairs), processing_class=tok)
    ids = torch.tensor([[1, 5, 7]])
    with torch.no_grad():
        before = m(input_ids=ids).logits
        trap, safe = copy.deepcopy(m), fresh_copy(m)
        assert "forward" in m.__dict__ and t.model is m, "the trainer's forward must stay in place"
        for p in m.parameters(): p.zero_()
        assert trap(input_ids=ids).logits.abs().max() == 0, "trl no longer binds forward: fresh_copy can go"
        torch.testing.assert_close(safe(input_ids=ids).logits, before)


def test_align_leaves_its_model_alone_and_raises_the_winner(model, tok, pairs):
    before = vector(model)
    new = align(model, tok, pairs, steps=15, lr=3e-3, batch_size=20, beta=.5)
    assert torch.equal(vector(model), before) and "forward" not in new.__dict__ and not torch.equal(vector(new), before)
    gap = lambda m: (sequence_logprob(m, tok, pairs.prompt.tolist(), pairs.chosen.tolist(), eos=True) - sequence_logprob(m, tok, pairs.prompt.tolist(), pairs.rejected.tolist(), eos=True)).mean()
    assert gap(new) > gap(model) + .1
    again = align(model, tok, Dataset.from_pandas(pairs), steps=15, lr=3e-3, batch_size=20, beta=.5)
    assert torch.equal(vector(again), vector(new)), "same seed, same model; a Dataset is as good as a table"


def test_arguments_have_cpu_settings():
    a = trl_args(DPOConfig, 3, 1e-3)
    if not torch.cuda.is_available(): assert a.use_cpu and not a.bf16
    assert not a.gradient_checkpointing and a.max_length is None and a.learning_rate == 1e-3


def test_works_with_adapters(model, tok, pairs):
    m = lora(fresh_copy(model), r=2)
    h = train_with(PairTrainer, m, check_pairs(model, tok, pairs), tok, trl_args(DPOConfig, 4, 1e-2, 20, beta=.5), ref_model=None)
    assert h[0] == pytest.approx(np.log(2), abs=1e-5) and h[-1] < h[0]


def test_self_play_compounds_rounds(model, tok, rows):
    trie, seen = ItemTrie(tok, TITLES), []
    a = self_play(model, tok, rows, trie, rounds=2, sft_steps=2, dpo_steps=2, lr=1e-3, batch_size=8, seed=4, each=lambda t, m: seen.append(vector(m)))
    first, part = model, None
    for t in range(2): # the same two rounds by hand
        part = rows.sample(16, random_state=4000 + t); bad = own_losers(first, tok, part, trie, 4000 + t)
        mid = sft(first, tok, part, 2, 1e-3, 8, 4)
        first = align(mid, tok, pairs_of(part, bad, TITLES), steps=2, beta=.1, lr=1e-3, batch_size=8, seed=4)
        assert torch.equal(vector(first), seen[t+1])
    assert torch.equal(vector(a), seen[-1]) and not torch.equal(seen[1], seen[2])


def test_decoding_never_leaves_the_catalogue(model, tok, rows):
    trie, prompts = ItemTrie(tok, TITLES), rows.prompt.tolist()[:60]
    got = draw_items(model, tok, prompts, trie, seed=1)
    assert got.min() >= 0 and got.max() < len(TITLES) and len(set(got)) > 2
    assert (draw_items(model, tok, prompts, trie, seed=1) == got).all() and (draw_items(model, tok, prompts, trie, seed=2) != got).any()
    assert (draw_items(model, tok, prompts, trie, seed=1, batch_size=7) >= 0).all()
    g = draw_items(model, tok, prompts[:1]*3, trie, greedy=True); assert len(set(g)) == 1


def test_draws_follow_the_policy(model, tok):
    trie, x = ItemTrie(tok, TITLES), history_prompt(TITLES[:2])
    got = np.bincount(draw_items(model, tok, [x]*3000, trie, seed=0, batch_size=1000), minlength=len(TITLES))/3000
    p, at = np.ones(len(TITLES)), [completion_ids(tok, " "+t, True) for t in TITLES]
    start = tok(x).input_ids
    for i, ids in enumerate(at): # locally normalised inside the trie, by hand
        for k, t in enumerate(ids):
            with torch.no_grad(): s = model(torch.tensor([start + ids[:k]])).logits[0, -1]
            ok = sorted({j[k] for j in at if j[:k] == ids[:k] and len(j) > k})
            p[i] *= s[ok].softmax(0)[ok.index(t)].item()
    assert p.sum() == pytest.approx(1, abs=1e-4) and np.abs(got - p).max() < .03


def test_world_sequences_are_drawn_without_replacement():
    p = np.tile([.6, .3, .1, 0], (30000, 1)); s = world_sequences(p, 2, 0)
    assert (s[:, 0] != s[:, 1]).all() and not (s == 3).any()
    np.testing.assert_allclose(np.bincount(s[:, 0], minlength=4)/30000, p[0], atol=.01)
    np.testing.assert_allclose((s[s[:, 0] == 1, 1] == 0).mean(), .6/.7, atol=.015)
    with pytest.raises(ValueError, match="positive probability"): world_sequences(p, 4)


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
    np.testing.assert_allclose(g, [4/7 - 2/4, 3/7 - 2/4]); assert mgu(g) == pytest.approx(1/14) and dgu(g) == pytest.approx(2/14)
    np.testing.assert_allclose(genre_gaps(np.arange(4), [[0, 1], [3]], G, [3, 1, 1, 1]), g)


def test_losers_on_purpose():
    r = pd.DataFrame(dict(item=[0]*5000, seen=[[2]]*5000))
    n = np.bincount(popular_losers(r, [50, 6, 30, 3, 1], 0), minlength=5)/5000
    np.testing.assert_allclose(n, [0, .6, 0, .3, .1], atol=.03)
    V = np.array([[1, 0], [.9, .1], [1, .01], [0, 1]])
    assert semantic_losers(pd.DataFrame(dict(item=[0, 0, 3], seen=[[], [2], []])), list("abcd"), V).tolist() == [2, 1, 1]


def test_flip_probability_and_its_sharpness():
    e = flip_probability([2., 0, 0], [0., 0, 5], .5)
    np.testing.assert_allclose(e, [1/(1+np.exp(1)), .45, .45])
    rng = np.random.default_rng(0); gap = rng.normal(0, 3, 20000); win = rng.random(20000) < 1/(1+np.exp(-.3*gap))
    from sklearn.linear_model import LogisticRegression
    lr = LogisticRegression(fit_intercept=False, C=1e6).fit(gap[:, None], win).coef_[0, 0]
    assert fit_tau(np.where(win, gap, -gap), 0) == pytest.approx(lr, rel=.1)


@pytest.mark.parametrize("change, text", [(dict(rejected=" Nowhere Land"), "not in the trie"), (dict(chosen="  "), "empty answer"), (dict(rejected=[[]]*40), r"lengths \[0\]"),
    (dict(rejected=[[" Quiet Mill"]*(1 + k % 2) for k in range(40)]), r"lengths \[1, 2\]"), (dict(prompt=history_prompt(TITLES*6)), "the model reads 96")])
def test_bad_pairs(model, tok, pairs, change, text):
    with pytest.raises(ValueError, match=text): check_pairs(model, tok, pairs.assign(**change), ItemTrie(tok, TITLES))


def test_more_bad_input(model, tok, pairs):
    with pytest.raises(ValueError, match="no column"): check_pairs(model, tok, pairs.drop(columns="chosen"))
    with pytest.raises(ValueError, match="no pairs"): check_pairs(model, tok, pairs.iloc[:0])
    with pytest.raises(ValueError, match="epsilon"): align(model, tok, pairs.drop(columns="epsilon"), RosePOTrainer, steps=1)
    with pytest.raises(ValueError, match="precompute"): align(model, tok, pairs.assign(rejected=[[r]*2 for r in pairs.rejected]), SDPOTrainer, steps=1, precompute_ref_log_probs=True)


def test_precomputed_reference_gives_the_same_model(model, tok, pairs):
    a, b = (align(model, tok, pairs, steps=4, lr=1e-3, batch_size=10, precompute_ref_log_probs=k) for k in (False, True))
    torch.testing.assert_close(vector(a), vector(b), atol=1e-6, rtol=1e-4)


def test_simpo_keeps_no_reference_model(model, tok, pairs):
    seen = []
    class Spy(SimPOTrainer):
        def train(self): seen.append(self.ref_model); return super().train()
    align(model, tok, pairs, Spy, steps=1, batch_size=8)
    assert seen == [None]


def test_exact_ranking(model, tok, rows):
    trie, prompts = ItemTrie(tok, TITLES), rows.prompt.tolist()[:3]
    lp, mass = catalogue_policy(model, tok, prompts, trie)
    raw = rank_items(model, tok, prompts, trie).double()
    torch.testing.assert_close(lp.exp().sum(1), torch.ones(3, dtype=torch.double)); torch.testing.assert_close(mass, raw.exp().sum(1))
    assert (mass < 1).all() and (lp.argsort(1) == raw.argsort(1)).all()
