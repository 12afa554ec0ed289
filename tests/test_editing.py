"editing: closed forms against dense algebra, edits against the model's own output, LTE's data and memory, bad input."
import copy
import numpy as np, pandas as pd, pytest, torch
from transformers import GPT2Config, GPT2LMHeadModel
from recbook.lm import load_lm, mark_ids, nano_tokenizer
from recbook.answers import completion_ids, encode, prompt_ids
from recbook.trust import editing as E

torch.set_num_threads(1)
DOWN = "model.layers.{}.mlp.down_proj"


@pytest.fixture(scope="module")
def facts(): return E.Facts(24, 3)

@pytest.fixture(scope="module")
def tok(facts): return nano_tokenizer(facts.corpus(), 1024)

@pytest.fixture
def model(tok):
    torch.manual_seed(0)
    return E.blank_causal(tok, 32, 3, 96, 256).double().eval()

def random_keys(n, d=40, rank=None, seed=0):
    g = torch.Generator().manual_seed(seed)
    X = torch.randn(d, n, generator=g, dtype=torch.float64)
    return X if rank is None else torch.randn(d, rank, generator=g, dtype=torch.float64) @ X[:rank]


def test_facts_are_consistent(facts):
    t = facts.table
    assert len(t) == 24*5 and t.groupby("subject").relation.nunique().eq(5).all()
    assert all(facts.belongs[r][o] == h for r, o, h in zip(t.relation, t.object, t.hop))
    assert all(pd.Series(b.values()).value_counts().eq(2).all() for b in facts.belongs.values())
    text = facts.corpus()
    assert all(f"{p} {a}." in text for p, a in zip(facts.ask(range(9), E.ONE_HOP[2]), facts.answers(range(9))))
    assert E.Facts(24, 3).corpus() == text != E.Facts(24, 4).corpus()

def test_edits_say_what_follows(facts):
    for k, e in zip([3, 8, 50], facts.edits([3, 8, 50], 1)):
        f = facts.table.iloc[k]
        assert e.subject in e.prompt and e.old == f.object != e.new and len(e.paraphrases) == 3
        assert all(a == e.old and e.subject not in p for p, a in e.neighbours)
        assert all(a == facts.belongs[f.relation][e.new] for _, a in e.two_hop)

def test_answer_scores_against_one_by_one(model, tok):
    P, A = (
        ["The brand of Quiet Elf:", "For Grim Clue we note the shelf:", "The brand of Quiet Elf:"],
        ["Acme", "games and toys", "Bolt"],
    )
    lp, hit = E.answer_scores(model, tok, P, A, batch_size=2)
    for p, a, l, h in zip(P, A, lp, hit):
        x, y = prompt_ids(tok, [p])[0], completion_ids(tok, " "+a)
        z = model(input_ids=torch.tensor([x+y])).logits[0, len(x)-1:-1].log_softmax(-1)
        assert l.item() == pytest.approx(z[range(len(y)), y].sum().item(), abs=1e-5) and h == (
            z.argmax(-1).tolist() == y
        )

def test_drift_is_the_divergence():
    p = torch.tensor([[.5, .5], [.9, .1]]).log()
    q = torch.tensor([[.25, .75], [.9, .1]]).log()
    assert E.drift(p, p) == 0 and E.drift(p, q) == pytest.approx(.5*(.5*np.log(2) + .5*np.log(2/3)))

def test_free_text_is_measured():
    from scipy.stats import entropy
    from recbook.text import consistency, fluency
    words = "a b a b c a b".split()
    h = [entropy(pd.Series(list(zip(*(words[k:] for k in range(n))))).value_counts(), base=2) for n in (2, 3)]
    assert fluency([" ".join(words)]*2) == pytest.approx(h[0]/3 + 2*h[1]/3) and fluency(["no no no"]) == 0
    assert consistency(["oak and tin", "oak"], ["tin and oak", "silk"]) == pytest.approx(.5)
    with pytest.raises(ValueError, match="pairs"):
        consistency(["a"], [])

def test_rome_writes_its_key_and_is_the_least_change():
    K = random_keys(200)
    C = K @ K.T/200
    W, k, v = random_keys(40, 8, seed=1), random_keys(1, seed=2)[:, 0], random_keys(1, 8, seed=3)[:, 0]
    D = E.rome_update(W, k, v, C)
    assert torch.allclose((W+D) @ k, v, atol=1e-10) and torch.linalg.matrix_rank(D) == 1
    other = D + torch.outer(
        torch.ones(8, dtype=k.dtype), (u := random_keys(1, seed=4)[:, 0]) - k * (u @ k) / (k @ k)
    )  # also writes the key
    assert torch.allclose((W+other) @ k, v, atol=1e-9) and torch.trace(D @ C @ D.T) < torch.trace(other @ C @ other.T)

def test_memit_solves_the_normal_equations():
    K, R, C, Kp = random_keys(5), random_keys(5, 8, seed=1), random_keys(90, seed=2), random_keys(7, seed=3)
    C, Kp, lam = C @ C.T/90, Kp @ Kp.T, 3.
    for past in (None, Kp):
        D = E.memit_update(R, K, C, lam, past)
        grad = (D @ K - R) @ K.T + D @ (
            lam * C + (0 if past is None else past)
        )  # of |DK-R|^2 + lam tr(DCD') + tr(D Kp D')
        assert grad.abs().max() < 1e-9

def test_alphaedit_leaves_preserved_keys_alone():
    K0, K, R, Kp = random_keys(60, rank=25), random_keys(4, seed=5), random_keys(4, 8, seed=6), random_keys(3, seed=7)
    P = E.null_space(K0 @ K0.T, 1e-10)
    assert torch.allclose(P @ P, P, atol=1e-10) and round(torch.trace(P).item()) == 15
    D = E.alphaedit_update(R, K, P, Kp @ Kp.T, .5)
    assert (D @ K0).abs().max() < 1e-9*K0.abs().max() and (D @ K - R).norm() < R.norm()
    X = random_keys(40, 8, seed=8).requires_grad_() # D = X P minimises the constrained objective: its gradient vanishes
    Y = D.clone().requires_grad_()
    loss = ((Y @ P @ K - R)**2).sum() + (Y @ P @ (Kp @ Kp.T) @ P @ Y.T).trace() + .5*(Y @ P).square().sum()
    assert torch.autograd.grad(loss, Y)[0].abs().max() < 1e-8 and X is not Y

def test_without_anything_to_preserve_alphaedit_is_ridge():
    K, R, I = random_keys(6), random_keys(6, 8, seed=1), torch.eye(40, dtype=torch.float64)
    assert torch.allclose(E.alphaedit_update(R, K, I, 0., 2.), E.memit_update(R, K, I, 2.), atol=1e-10)

def test_names_are_read_without_facts():
    es = [
        E.Edit("Ann", "Ann sings:", "alto", "bass", neighbours=[("Ann lives in:", "Bonn")]),
        E.Edit("Bob", "Bob sings:", "bass", "alto"),
    ]
    read = E.name_texts(es)
    assert sorted({t.split()[-1] for t in read}) == ["Bonn.", "alto.", "bass."]
    assert not any(s in t for t in read for s in ("Ann", "Bob"))
    assert "Ann lives in: Bonn." in E.known_texts(es) and "Ann sings: bass." in E.known_texts(es)

def test_exact_null_space_keeps_logits(model, tok, facts):
    keep = [f"{p} {a}." for p, a in zip(facts.ask(range(2), E.ONE_HOP[0]), facts.answers(range(2)))]
    mem = E.remember(model, tok, keep, (0, 1), threshold=1e-12)
    x = encode(tok, keep)
    before = model(**x).logits
    old = copy.deepcopy(model)
    es = facts.edits([50, 60, 70], 0)
    after = E.edit(model, tok, es, "alphaedit", memory=mem, mu=.01)
    assert (model(**x).logits - before).abs()[x["attention_mask"].bool()].max() < 1e-8
    nll = lambda m: -E.answer_scores(m, tok, [e.prompt for e in es], [e.new for e in es])[0].mean()
    assert nll(model) < nll(old) - .5
    assert all(after.Kp[l].trace() > 0 == mem.Kp[l].trace() for l in (0, 1)) and all(
        torch.equal(after.P[l], mem.P[l]) for l in (0, 1)
    )

@pytest.mark.parametrize("module", [DOWN])
def test_rome_in_the_model_puts_z_at_the_site(model, tok, facts, module):
    e = facts.edits([7], 0)[0]
    mem = E.remember(model, tok, facts.corpus()[:50], (1,))
    z = E.compute_z(model, tok, [e], 1)
    E.edit(model, tok, [e], "rome", layers=(1,), memory=mem)
    at = E.read_at(model, tok, E.sites(tok, [e]), model.model.layers[1])
    assert torch.allclose(at, z, atol=1e-8)

def test_only_the_named_weights_change(model, tok, facts):
    mem = E.remember(model, tok, facts.corpus()[:3], (0, 1))
    for method in E.METHODS:
        m = copy.deepcopy(model)
        E.edit(m, tok, facts.edits([7], 0), method, memory=mem)
        moved = {n for (n, a), b in zip(m.named_parameters(), model.parameters()) if not torch.equal(a, b)}
        layers = (1,) if method in ("ft", "ft-clamp", "rome") else (0, 1)
        assert moved == {DOWN.format(l)+".weight" for l in layers}, method
        assert all(p.requires_grad for p in m.parameters())

def test_editing_nothing_changes_nothing(model, tok, facts):
    "A request that is fulfilled from the start (its loss is below `stop`) has z = h, and no method moves a weight."
    mem, es = E.remember(model, tok, facts.corpus()[:3], (0, 1)), facts.edits([7, 33], 0)
    for method in ("rome", "memit", "memit-seq", "rect", "alphaedit"):
        m = copy.deepcopy(model)
        E.edit(m, tok, es, method, memory=mem, stop=1e9)
        assert all(torch.allclose(a, b, atol=1e-12, rtol=0) for a, b in zip(m.parameters(), model.parameters())), method

def test_z_lowers_the_loss_and_does_not_depend_on_the_batch(model, tok, facts):
    es = facts.edits([7, 33, 90], 0)
    es[1] = E.Edit(
        es[1].subject, "Tell me, friend, and be quick about it: " + es[1].prompt, es[1].new
    )  # another length: padding
    together = E.compute_z(model, tok, es, 1)
    alone = torch.cat([E.compute_z(model, tok, [e], 1) for e in es])
    assert torch.allclose(together, alone, atol=1e-6)
    for e, z in zip(es, together):
        with E.hooked(model.model.layers[1], lambda h, z=z: torch.cat([h[:, :-1], z[None, None]], 1)):
            inside = E.answer_scores(model, tok, [e.prompt], [e.new])[0]
        assert inside > E.answer_scores(model, tok, [e.prompt], [e.new])[0]

def test_prefixes_and_subject_site(model, tok, facts):
    es = facts.edits([7, 33], 0)
    ids, at = E.sites(tok, es, "subject_last")
    assert all(tok.decode(x[:k+1], skip_special_tokens=True).endswith(e.subject) for x, k, e in zip(ids, at, es))
    z = E.compute_z(model, tok, es, 1, site="subject_last", prefixes=["One more thing.", "Look here."])
    assert z.shape == (2, 32) and torch.isfinite(z).all()
    down = model.model.layers[0].mlp.down_proj
    bare, both = (E.mean_keys(model, tok, es, down, "last", p) for p in ([], ["Look here."]))
    assert bare.shape == (96, 2) and not torch.allclose(bare, both)

def test_gpt2_edits_too(tok, facts):
    "Weights stored transposed (Conv1D), learned positions: ROME puts z at the site there as well."
    torch.manual_seed(0)
    m = (
        GPT2LMHeadModel(
            GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, n_positions=128, **mark_ids(tok))
        )
        .double()
        .eval()
    )
    e = facts.edits([7], 0)[0]
    z = E.compute_z(m, tok, [e], 0, module="transformer.h.{}")
    mem = E.edit(m, tok, [e], "rome", layers=(0,), module="transformer.h.{}.mlp.c_proj", preserve=facts.corpus()[:50])
    assert torch.allclose(E.read_at(m, tok, E.sites(tok, [e]), m.transformer.h[0]), z, atol=1e-6)
    assert mem.C[0].shape == (128, 128)

def test_a_gpt2_folder_learns_forgets_and_keeps(tok, facts, tmp_path):
    "The way of a hub model: trained elsewhere, saved, loaded by folder, edited by name of its modules."
    torch.manual_seed(0)
    m, rows = (
        GPT2LMHeadModel(
            GPT2Config(
                vocab_size=len(tok),
                n_embd=64,
                n_layer=2,
                n_head=2,
                n_inner=512,
                n_positions=64,
                resid_pdrop=0,
                embd_pdrop=0,
                attn_pdrop=0,
                initializer_range=0.05,
                **mark_ids(tok),
            )
        ),
        range(40),
    )
    ask, answers = facts.ask(rows, E.ONE_HOP[0]), facts.answers(rows)
    x, opt = encode(tok, [f"{p} {a}" for p, a in zip(ask, answers)]), torch.optim.Adam(m.parameters(), 3e-3)
    for _ in range(100):
        opt.zero_grad()
        m(**x, labels=x["input_ids"].masked_fill(x["attention_mask"] == 0, -100)).loss.backward()
        opt.step()
    m.save_pretrained(tmp_path)
    tok.save_pretrained(tmp_path)
    hub, hub_tok = load_lm(str(tmp_path))
    assert E.accuracy(hub, hub_tok, ask, answers) == 1
    es, keep = facts.edits([0, 7, 13], 0), [k for k in rows if k not in (0, 7, 13)]
    E.edit(
        hub,
        hub_tok,
        es,
        "memit",
        layers=(0, 1),
        module="transformer.h.{}.mlp.c_proj",
        preserve=[f"{ask[k]} {answers[k]}." for k in keep],
        lam=1.0,
        clamp=6.0,
    )
    assert E.accuracy(hub, hub_tok, [e.prompt for e in es], [e.new for e in es]) == 1
    assert E.accuracy(hub, hub_tok, [ask[k] for k in keep], [answers[k] for k in keep]) > .8

def test_trace_restores_the_clean_run(model, tok, facts):
    f = facts.table.iloc[0]
    t = E.causal_trace(model, tok, facts.ask([0], E.ONE_HOP[0])[0], f.subject, f.object, samples=3)
    end = t[(t.place == "last token") & (t.layer == 2)].iloc[0]
    assert end.effect == pytest.approx(end.clean - end.corrupted, abs=1e-6) # the last state decides the answer
    assert t[t.place == "before subject"].effect.abs().max() < 1e-9 # the past does not know the subject

def test_memory_finds_and_replaces(facts):
    es = facts.edits([3, 8, 50, 71], 1)
    mem = E.EditMemory(facts.corpus()).add(es)
    assert (mem.search([e.prompt for e in es], 1)[:, 0] == np.arange(4)).all()
    V = mem.embed([e.prompt for e in es])
    want = np.argsort(-(V @ mem.vectors.T), 1, kind="stable")
    assert (mem.search([e.prompt for e in es], 4) == want).all()
    newer = copy.copy(es[0])
    newer.new = "Nova"
    mem.add([newer])
    assert (
        len(mem) == 4
        and sum(es[0].prompt == p for p, _ in mem.lines) == 1
        and f"{newer.prompt} Nova" in mem.prompts([newer.prompt], 1)[0]
    )
    assert E.EditMemory(facts.corpus()).prompts(["a"]) == ["a"]

def test_alignment_rows_are_the_grid(facts):
    train = facts.subjects[:16]
    R = E.alignment_rows(facts, train, 200, E.Level(fresh=0.))
    n = R.kind.value_counts()
    assert (n[E.KINDS[:4]] == 200).all() and ((20 < n[E.KINDS[4:]]) & (n[E.KINDS[4:]] < 60)).all()
    answer = {(facts.ask([k], T)[0]): a for T in E.ONE_HOP for k, a in enumerate(facts.table.object)} | {
        facts.ask([k], T)[0]: a for T in E.TWO_HOP for k, a in enumerate(facts.table.hop)
    }
    query = R.prompt.str.split("[Question]: ", regex=False).str[-1]
    first = R.answer.str.split(".").str[0]
    old = np.array([answer.get(q) == a for q, a in zip(query, first)])
    assert old[R.kind.isin(["in, no edit", "out", "out, no edit"])].all() and old[R.kind == "in"].mean() < .2
    assert (R.prompt.str.contains("Updated") == ~R.kind.str.endswith("no edit")).all()
    edited = R[R.kind == "in"].prompt.str.split("[Question]").str[0]
    assert not edited.str.contains("|".join(facts.subjects[16:])).any()
    n = R[R.kind == "in"].prompt.str.count(r" \d\. ")
    assert abs((n == 1).mean() - .5) < .12 and abs((n == 2).mean() - .25) < .1
    assert not E.alignment_rows(facts, train, 50, E.Level(more=(1.,))).prompt.str.contains(" 2. ", regex=False).any()

def test_rehearsal_learns_the_answers(model, tok, facts):
    R = E.alignment_rows(facts, facts.subjects[:16], 14)
    numbers, x, start = next(E.answer_batches(tok, R, len(R), 0))
    assert sorted(numbers) == list(range(len(R)))
    before = E.rehearsal_loss(model, x, start)[0].item()
    seen = E.rehearse(model, E.answer_batches(tok, R, 16), 25, 3e-3, .3)
    assert len(seen) == 25 and E.rehearsal_loss(model, x, start)[0].item() < before - .5

def test_rehearsal_loss_is_the_weighted_cross_entropy_of_the_answer(model, tok):
    rows = pd.DataFrame(dict(prompt=["The brand of Quiet Cup:", "a:"], answer=["Acme", "Nova. Kite"]))
    _, x, start = next(E.answer_batches(tok, rows, 2, 0))
    with torch.no_grad():
        loss, hit = E.rehearsal_loss(model, x, start)
        logits = model(**x).logits.log_softmax(-1)
    total = weight = 0.
    for i in range(2):
        for t in range(int(start[i]), int(x["attention_mask"][i].sum())):
            w = 1. if t == start[i] else .3
            total, weight = total - w*float(logits[i, t-1, x["input_ids"][i, t]]), weight + w
        assert bool(hit[i]) == (int(logits[i, start[i]-1].argmax()) == int(x["input_ids"][i, start[i]]))
    assert abs(float(loss) - total/weight) < 1e-4

def test_slow_zero_leaves_all_but_attention(model, tok):
    m = copy.deepcopy(model)
    rows = pd.DataFrame(dict(prompt=["The brand of Quiet Cup:"], answer=["Acme"]))
    E.rehearse(m, E.answer_batches(tok, rows, 1), 1, 1e-2, 0.)
    moved = {n for (n, a), b in zip(m.named_parameters(), model.parameters()) if not torch.equal(a, b)}
    assert moved and all("attn" in n or "norm" in n for n in moved)

def test_learning_to_edit_is_cached_and_leaves_the_model_alone(model, tok, facts, tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path))
    before = copy.deepcopy(model)
    m, h = E.learn_to_edit(model, tok, facts, facts.subjects[:16], steps=2)
    assert h.level.tolist() == [0]*len(h)
    assert not all(torch.equal(a, b) for a, b in zip(m.parameters(), model.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))
    again, h2 = E.learn_to_edit(model, tok, facts, facts.subjects[:16], steps=2)
    assert h2.equals(h) and all(torch.equal(a, b) for a, b in zip(m.parameters(), again.parameters()))

def test_the_curriculum_goes_through_all_levels(facts):
    parts = list(E.lessons(facts, facts.subjects[:16], E.LEVELS, E.KINDS, 160, 0))
    assert [p.level.iloc[0] for p in parts] == [0, 0, 1, 1, 2, 2, 3, 3]
    single = parts[0]
    assert (single[single.kind == "in"].prompt.str.count(r" \d\. ") == 1).all()

def test_a_model_knows_what_it_has_read(facts, tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path))
    es = facts.edits([0, 6, 12], 0)
    m, tok = E.fact_lm(E.known_texts(es), 60, 256)
    assert E.accuracy(m, tok, [e.prompt for e in es], [e.old for e in es]) == 1


@pytest.mark.parametrize(
    "bad,kw,match",
    [
        ([], {}, "no requests"),
        ([dict(subject="Elf", prompt="The brand of Quiet Cup:", new="Acme")], {}, "subject 'Elf' does not occur"),
        ([dict(subject="", prompt="x", new="Acme")], {}, "does not occur"),
        ([dict(subject="Elf", prompt="Elf:", new=" ")], {}, "no new answer"),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], dict(method="mend"), "method='mend'"),
        (
            [dict(subject="Elf", prompt="Elf:", new="Acme")],
            dict(module="model.layers.{}.mlp.down"),
            "did you mean model.layers.{}.mlp.down_proj",
        ),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], dict(module="down_proj"), "layer's number"),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], dict(layers=(9,)), "layers count from 0 to 2"),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], dict(layers=()), "no layers"),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], dict(module="model.layers.{}.mlp"), "only linear maps"),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], {}, "preserve is empty"),
        (
            [dict(subject="Elf", prompt="Elf:", new="Acme")],
            dict(
                preserve=["The brand of Quiet Elf: Acme."] * 3
                + [f"{a}{b} is {c}" for a in "abcdef" for b in "uvwxyz" for c in "klmnop"]
            ),
            "null space of layer 0 is empty",
        ),
        ([dict(subject="Elf", prompt="Elf:", new="Acme")], dict(site="first", preserve=["a b"]), "site='first'"),
    ],
)
def test_bad_requests(model, tok, bad, kw, match):
    before = copy.deepcopy(model)
    with pytest.raises(ValueError, match=match.replace("{}", r"\{\}")):
        E.edit(model, tok, bad, **kw)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), before.parameters()))

def test_the_old_name_of_the_loss(): assert E.answer_loss is E.rehearsal_loss

def test_bad_memory_and_world(facts):
    with pytest.raises(ValueError, match="empty"):
        E.EditMemory(facts.corpus()).search(["a"])
    with pytest.raises(ValueError, match="no requests"):
        E.EditMemory(facts.corpus()).add([])
    with pytest.raises(ValueError, match="does not occur"):
        E.causal_trace(None, None, "a prompt", "nobody", "x")


@pytest.mark.parametrize(
    "text, subject, at",
    [
        ("Fans of C++ and C", "C", 16),
        ("Ann-Marie saw Ann", "Ann", 14),
        ("Cafe\u0301 and Cafe", "Cafe", 10),
        ("Ann-Marie", "Ann", 0),
        ("carpet", "pet", 3),
        ("Ann's hat", "Ann", 0),
    ],
)
def test_a_subject_is_found_as_the_whole_name(text, subject, at):
    from recbook.answers import place_in
    assert place_in(text, subject) == at

def test_rect_and_prune():
    W, D = random_keys(30, 10), random_keys(30, 10, seed=1)
    kept = E.rect(W, D, .3)
    assert 85 <= (kept != 0).sum() <= 95 and (D/W).abs()[kept != 0].min() >= (D/W).abs()[kept == 0].max()
    top = torch.linalg.matrix_norm(W, 2)
    assert torch.allclose(E.prune(W, D*1e-3), D*1e-3, atol=1e-12)
    assert top < torch.linalg.matrix_norm(E.prune(W, D*50), 2) < torch.linalg.matrix_norm(D*50, 2)

def test_prune_with_the_smooth_base_compresses_whatever_the_size():
    W, D = (
        torch.diag(torch.tensor([0.5, 0.1], dtype=torch.float64)),
        torch.diag(torch.tensor([1.0, 0.2], dtype=torch.float64)),
    )
    assert torch.allclose(E.prune(W, D), D)  # .5 lies below 1/ln 1.2: the paper's base compresses nothing
    assert torch.allclose(
        torch.linalg.svdvals(E.prune(W, D, None)), torch.tensor([0.5 + 0.5 * np.log(2), 0.2], dtype=torch.float64)
    )


# --- On a real model -----------------------------------------------------------------------------

@pytest.fixture
def llama(tok):
    "Two layers, random weights, the shape of a hub's Llama: a head of its own, grouped queries, no padding."
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(1)
    heads = dict(num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
    c = LlamaConfig(vocab_size=len(tok), hidden_size=32, intermediate_size=96, **heads, **mark_ids(tok))
    return LlamaForCausalLM(c).double().eval()

def test_countries_are_the_statements_of_knowedit():
    same = dict(prompt="The name of the country of citizenship of Ann is", ground_truth="Peru")
    same = dict(Relation_Specificity=[same])
    more = dict(Relation_Specificity=[dict(prompt="The gender of Bob is", ground_truth="male")])
    home = "The name of the country which {} is associated with is"
    rows = [dict(subject="Ann", prompt="The gender of Ann is", ground_truth="female", locality=same)]
    rows += [dict(subject="Bob", prompt=home.format("Bob"), ground_truth=c, locality=more) for c in ("Mali", "x")]
    rows += [dict(subject="Eve", prompt=home.format("Eva"), ground_truth="Cuba", locality={})]
    rows += [dict(subject="E"*41, prompt=home.format("E"*41), ground_truth="Cuba", locality={})]
    assert E.countries(rows)[["subject", "answer"]].to_numpy().tolist() == [["Ann", "Peru"], ["Bob", "Mali"]]

def test_what_is_known_is_what_greedy_decoding_writes(llama, tok):
    t = pd.DataFrame(dict(subject=["Quiet Elf", "Grim Clue", "Calm Fox"], prompt="", answer=["Acme", "oak", "Riga"]))
    ids = encode(tok, [s + " is from the country of" for s in t.subject])
    with torch.no_grad():
        said = [llama(input_ids=x[m.bool()][None]).logits[0, -1].argmax().item() for x, m in zip(*ids.values())]
    t.loc[1, "answer"] = tok.decode([said[1]]).strip() or "oak"
    got = E.known_countries(llama, tok, t)
    want = [tok(" "+a, add_special_tokens=False).input_ids == [y] for a, y in zip(t.answer, said)]
    assert got.subject.tolist() == t.subject[want].tolist()

def test_values_found_before_are_those_found_inside(llama, tok, facts):
    es, how = facts.edits([7, 33, 90], 0), dict(site="subject_last", steps=5)
    mem = E.remember(llama, tok, facts.corpus()[:60], (0, 1), threshold=.1)
    for method, n in (("memit", 3), ("alphaedit", 3), ("rome", 1)):
        a, b = copy.deepcopy(llama), copy.deepcopy(llama)
        z = E.compute_z(a, tok, es[:n], 1, **how)
        E.edit(a, tok, es[:n], method, memory=mem, lam=1., **how)
        E.edit(b, tok, es[:n], method, memory=mem, lam=1., **how, z=z)
        assert all(torch.allclose(p, q, atol=1e-12) for p, q in zip(a.parameters(), b.parameters())), method
        assert not torch.equal(b.model.layers[1].mlp.down_proj.weight, llama.model.layers[1].mlp.down_proj.weight)
    with pytest.raises(ValueError, match="z has 2 rows for 3 requests"):
        E.edit(llama, tok, es, "memit", memory=mem, z=z.expand(2, -1))

def test_rome_takes_each_request_with_its_own_value(llama, tok, facts):
    es = facts.edits([7, 90], 0)
    z = E.compute_z(llama, tok, es, 1, steps=5)
    mem = E.remember(llama, tok, facts.corpus()[:60], (1,))
    E.edit(llama, tok, es, "rome", layers=(1,), memory=mem, z=z)
    at = E.read_at(llama, tok, E.sites(tok, es), llama.model.layers[1])
    assert torch.allclose(at[1], z[1], atol=1e-8) # the last one is exact

def test_a_memory_of_kept_moments_is_that_of_the_texts(llama, tok, facts):
    a = E.remember(llama, tok, facts.corpus()[:60], (0, 1), threshold=1e-2)
    b = E.fresh_memory(E.remember(llama, tok, facts.corpus()[:60], (0, 1), threshold=None).C, 1e-2)
    assert all(torch.equal(x[l], y[l]) for x, y in zip(a, b) for l in (0, 1))
