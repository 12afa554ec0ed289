"""The same kinds where models are edited, aligned and made to forget: families, heads, dropout, adapters, shipped
settings, bad input."""
import copy
import numpy as np, pandas as pd, pytest, torch
from datasets import Dataset
from peft import LoraConfig
from recbook.answers import last_logits, padded, place_in, prompt_ids, token_columns
from recbook.decode import ItemTrie
from recbook.finetune import active_adapter, lora
from recbook.llm import alignment as A
from recbook.trust import editing as E, unlearning as U
from tiny import FAMILIES, TEXTS, TITLES, WORDS, byte_tokenizer, tiny_model

torch.set_num_threads(1)
MLP = dict(
    llama="model.layers.{}.mlp.down_proj",
    gpt2="transformer.h.{}.mlp.c_proj",
    gpt_neox="gpt_neox.layers.{}.mlp.dense_4h_to_h",
    gemma2="model.layers.{}.mlp.down_proj",
    opt="model.decoder.layers.{}.fc2",
    phi="model.layers.{}.mlp.fc2",
    mistral="model.layers.{}.mlp.down_proj",
    bloom="transformer.h.{}.mlp.dense_4h_to_h",
    gpt_neo="transformer.h.{}.mlp.c_proj",
    starcoder2="model.layers.{}.mlp.c_proj",
)
ASKS = [E.Edit("France", "The capital of France is", "red"), E.Edit("fox", "Who likes fox ?", "blue")]
FREE = dict(decay=0., kl=0., clamp=1e3, steps=40, mu=1e-3, lam=1.)

@pytest.fixture(scope="module")
def tok(): return byte_tokenizer()

@pytest.fixture(scope="module")
def texts():
    rng = np.random.default_rng(0)
    return TEXTS[:3] + [" ".join(rng.choice(WORDS, 8)) for _ in range(60)]

def scores(m, tok): return E.answer_scores(m, tok, [r.prompt for r in ASKS], [r.new for r in ASKS])[0]

# ---- editing

@pytest.mark.filterwarnings("ignore:layer")
@pytest.mark.parametrize("kind", MLP)
@pytest.mark.parametrize("method", ["rome", "memit", "alphaedit", "ft"])
def test_edits_are_written_into_any_family(kind, method, tok, texts):
    m, before = tiny_model(kind, tok), scores(tiny_model(kind, tok), tok)
    memory = None
    if method == "alphaedit":
        memory = E.remember(m, tok, texts[:3], (0, 1), MLP[kind], 1e-2)
    E.edit(m, tok, ASKS, method, module=MLP[kind], memory=memory, preserve=texts, ft=dict(steps=40, lr=1e-2), **FREE)
    assert (scores(m, tok) > before).all()

def test_opt_shows_its_keys_in_rows(tok):
    "The inputs of fc2, flattened by the model, against the MLP computed by hand."
    m = tiny_model("opt", tok)
    l = m.model.decoder.layers[1]
    seen = {}
    h = l.fc1.register_forward_hook(lambda mod, i, o: seen.update(o=o))
    ids = prompt_ids(tok, TEXTS[:3])
    x = padded(tok, ids)
    with torch.no_grad():
        m(**x)
    h.remove()
    want = l.activation_fn(seen["o"]).view(3, -1, seen["o"].shape[-1])
    got = E.passes(m, l.fc2, x)[0]
    assert torch.allclose(got, want, atol=1e-5)
    K = want[x["attention_mask"].bool()].double()
    assert torch.allclose(E.key_moments(m, tok, TEXTS[:3], l.fc2), K.T @ K/len(K), atol=1e-5)
    at = E.read_at(m, tok, (ids, [len(i)-1 for i in ids]), l.fc2, "in")
    assert torch.allclose(at, torch.stack([want[k, len(i)-1] for k, i in enumerate(ids)]), atol=1e-5)

@pytest.mark.parametrize("kind", FAMILIES)
def test_answer_loss_is_that_of_the_models_own_logits(kind, tok):
    m = tiny_model(kind, tok)
    P, C = token_columns(tok, ["The capital of France is", "Answer:"], [" Paris.", " yes no A"])
    x, start = padded(tok, [p + c for p, c in zip(P, C)]), torch.tensor([len(p) for p in P])
    loss, hit = E.rehearsal_loss(m, x, start, rest=1.)
    with torch.no_grad():
        z = [m(torch.tensor([p + c])).logits[0, len(p)-1:-1] for p, c in zip(P, C)]
        want = torch.nn.functional.cross_entropy(torch.cat(z), torch.tensor(sum(C, [])))
    assert loss.item() == pytest.approx(want.item(), abs=1e-3) and hit.tolist() == [
        (a[0].argmax() == c[0]).item() for a, c in zip(z, C)
    ]

@pytest.mark.parametrize(
    "kind, module",
    [("gpt2", "transformer.h.{}"), ("opt", "model.decoder.layers.{}"), ("opt", "model.decoder.layers.{}.fc2")],
)
def test_tracing_and_scoring_with_dropout_off(kind, module, tok):
    m = tiny_model(kind, tok)

    def trace():
        return E.causal_trace(
            m, tok, "The capital of France is", "France", "Paris", module=module, samples=3
        ).effect.to_numpy()
    want, s = trace(), scores(m, tok)
    m.train()
    kept = [x.training for x in m.modules()]
    assert (
        np.array_equal(trace(), want)
        and torch.equal(scores(m, tok), s)
        and torch.equal(E.next_logprobs(m, tok, ["A"]), E.next_logprobs(m, tok, ["A"]))
    )
    E.edit(m, tok, ASKS[:1], "ft", module=MLP[kind], ft=dict(steps=1))
    assert [x.training for x in m.modules()] == kept

class Int8(torch.nn.Linear):
    def __init__(self, l):
        torch.nn.Module.__init__(self)
        self.scale, self.bias = l.weight.abs().max()/127, None
        self.weight = torch.nn.Parameter((l.weight/self.scale).round().to(torch.int8), requires_grad=False)
    def forward(self, x): return x @ (self.weight.float()*self.scale).T

@pytest.mark.parametrize("method", E.METHODS)
@pytest.mark.parametrize("dtype", [torch.int8, torch.uint8, torch.float8_e4m3fn])
def test_weights_that_cannot_hold_an_edit_are_refused(method, dtype, tok, texts):
    m = tiny_model("llama", tok)
    for b in m.model.layers:
        b.mlp.down_proj = Int8(b.mlp.down_proj)
        b.mlp.down_proj.weight = torch.nn.Parameter(b.mlp.down_proj.weight.to(dtype), requires_grad=False)
    before = m.model.layers[1].mlp.down_proj.weight.clone()
    with pytest.raises(ValueError, match=str(dtype)[6:]):
        E.edit(m, tok, ASKS, method, preserve=texts, **FREE)
    assert torch.equal(before.float(), m.model.layers[1].mlp.down_proj.weight.float())

def test_half_precision_and_wrapped_models(tok, texts):
    m = tiny_model("llama", tok).to(torch.bfloat16)
    before = scores(m, tok)
    with pytest.warns(UserWarning, match="rank"):
        E.edit(m, tok, ASKS, "rome", preserve=texts[:3], **FREE)
    assert (scores(m, tok) > before + .3).all() and m.dtype == torch.bfloat16
    m = lora(tiny_model("llama", tok), 4)
    with pytest.raises(ValueError, match="merge"):
        E.edit(m, tok, ASKS, "rome", preserve=texts, module="base_model.model.model.layers.{}.mlp.down_proj")
    before = scores(m, tok)
    m = lora(tiny_model("llama", tok), 4, target_modules=["q_proj"])
    E.edit(m, tok, ASKS, "memit", preserve=texts, module="base_model.model.model.layers.{}.mlp.down_proj", **FREE)
    assert (scores(m, tok) > before).all()

@pytest.mark.parametrize("method", ["rome", "memit", "memit-seq", "rect"])
def test_few_texts_get_a_ridge_and_a_word(method, tok, texts):
    where = dict(layers=(1,), module=MLP["gpt2"])
    def run(change):
        m = tiny_model("gpt2", tok)
        W = m.transformer.h[1].mlp.c_proj.weight
        W0 = W.detach().clone()
        mem = E.remember(m, tok, TEXTS[:3], *where.values())
        if change:
            mem.C[1] = mem.C[1] + 1e-2*mem.C[1].diagonal().mean()*torch.eye(len(mem.C[1])).double()
        E.edit(m, tok, ASKS[1:], method, memory=mem, **where, **FREE)
        return (W.detach() - W0).norm()/W0.norm()
    with pytest.warns(UserWarning, match="rank .* of 128"):
        few = run(False)
    import warnings
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ridge = run(True)
    assert few.item() == pytest.approx(ridge.item(), rel=1e-3)

def test_subjects_are_found_as_words_and_in_any_alphabet(tok):
    assert (
        place_in("Part of art", "art") == 8
        and place_in("Parts", "art") == 1
        and place_in("art art", "art", 1) == 4
    )
    for text, s in (
        ("Who likes Amélie ?", "Amélie"),
        ("Who wrote 千と千尋 ?", "千と千尋"),
        ("the 🙂 song", "🙂"),
        ("Also Al likes it", "Al"),
    ):
        (ids,), (at,) = E.sites(tok, [E.Edit(s, text, " x")], "subject_last")
        end = place_in(text, s) + len(s)
        assert tok.decode(ids[:at+1], skip_special_tokens=True) == text[:end]
        double, _ = E.sites(tok, [E.Edit(s, "<bos>" + text, " x")], "subject_last")
        assert double[0] == ids

E_BAD = [
    (dict(layers=(1, 0)), "rising"),
    (dict(layers=(0, 0)), "once"),
    (dict(layers=()), "no layers"),
    (dict(lam=-1.0), "lam=-1"),
    (dict(mu=0.0), "mu=0"),
    (dict(share=2.0), "share=2"),
    (dict(typo=3), "typo"),
    (dict(ft=dict(stepz=3)), "stepz"),
    (dict(steps=0), "steps=0"),
]

@pytest.mark.parametrize("method", ["ft", "memit", "alphaedit"])
@pytest.mark.parametrize("kw, word", E_BAD)
def test_bad_settings_of_an_edit(method, kw, word, tok, texts):
    m = tiny_model("llama", tok)
    W = copy.deepcopy(m.state_dict())
    with pytest.raises(ValueError, match=word):
        E.edit(m, tok, ASKS, method, preserve=texts, **kw)
    assert all(torch.equal(v, W[k]) for k, v in m.state_dict().items())

def test_bad_requests(tok, texts):
    m = tiny_model("llama", tok)
    for bad, word in (
        (E.Edit("fox", "Who likes fox ?", " blue"), "blank"),
        (E.Edit("fox", "Who likes fox ? ", "blue"), "blank"),
        (E.Edit("fox", "Who likes fox ?", " "), "no new"),
    ):
        with pytest.raises(ValueError, match=word):
            E.edit(m, tok, [bad], "ft")
    with pytest.raises(ValueError, match="two answers"):
        E.edit(m, tok, [ASKS[0], E.Edit("France", ASKS[0].prompt, "green")], "ft")
    with pytest.raises(ValueError, match=r"layer \[1\]"):
        E.edit(m, tok, ASKS, "memit", memory=E.remember(m, tok, texts, (0,)))
    with pytest.raises(ValueError, match="no old"):
        E.evaluate_edits(m, tok, ASKS)
    with pytest.raises(ValueError, match="k=0"):
        E.EditMemory(TEXTS).add(ASKS).search(["fox"], 0)

# ---- plain sampling

@pytest.mark.parametrize("k, v", [("top_k", 1), ("min_p", .9), ("repetition_penalty", 9.), ("num_beams", 3)])
def test_shipped_settings_do_not_reach_the_users(k, v, tok):
    m, trie, p = tiny_model("llama", tok), ItemTrie(tok, TITLES), ["Liked: red fox. Next:"]*8
    m.lm_head.weight.data *= 3
    calls = [
        lambda: A.draw_items(m, tok, p, trie, seed=1).tolist(),
        lambda: A.draw_items(m, tok, p[:1], trie, greedy=True).tolist(),
        lambda: E.continuations(m, tok, p, 4),
        lambda: E.sample_prefixes(m, tok, 8, 4),
        lambda: A.explore_profiles({"w": m}, tok, p[:2], 4).profile.tolist(),
    ]
    want = [f() for f in calls]
    setattr(m.generation_config, k, v)
    assert [f() for f in calls] == want

# ---- unlearning

def test_next_logits_of_any_family(tok):
    rows = pd.DataFrame(
        dict(prompt=["Liked: red fox; blue sky. Next: green tea? Answer:", "Answer:"], completion=[" yes", " no"])
    )
    R = U.encode_prompts(tok, rows)
    for kind in FAMILIES:
        m = tiny_model(kind, tok)
        with torch.no_grad():
            want = torch.cat([m(torch.tensor([tok(p).input_ids])).logits[:, -1] for p in rows.prompt])
            assert torch.allclose(U.next_logits(m, R), want, atol=1e-3), kind

@pytest.mark.parametrize("make", [dict(), dict(pad=None), dict(add="<bos> $A <eos>"), dict(bos=None, add=None)])
def test_rows_are_encoded_alike_whatever_the_marks(make):
    t = byte_tokenizer(**make)
    R = U.encode_prompts(
        t, [dict(prompt="Liked: red fox. Answer:", completion=" yes"), dict(prompt="Answer:", completion=" no")]
    )
    assert [i[m.bool()].tolist() for i, m in zip(R.ids, R.mask)] == prompt_ids(
        t, ["Liked: red fox. Answer:", "Answer:"]
    )
    assert t.convert_ids_to_tokens(R.y.tolist()) == ["Ġyes", "Ġno"]

def two_adapters(tok, active):
    m = lora(tiny_model("llama", tok), 4, target_modules=["q_proj", "v_proj"])
    m.add_adapter("other", LoraConfig(r=4, target_modules=["q_proj", "k_proj"], task_type="CAUSAL_LM"))
    torch.manual_seed(0)
    for k, p in m.named_parameters():
        if "lora_" in k:
            p.data = torch.randn_like(p)*.3
    m.set_adapter(active)
    return m

@pytest.mark.parametrize("active", ["default", "other"])
def test_the_adapter_in_use_moves_and_no_other(active, tok):
    rows = [
        dict(prompt=f"Liked: {a}. Next: {b}? Answer:", completion=c)
        for a, b, c in (
            ("red fox", "blue sky", " yes"),
            ("green tea", "red fox", " no"),
            ("blue sky", "song", " yes"),
            ("movie", "story", " no"),
        )
    ]
    m = two_adapters(tok, active)
    mine, before = set(active_adapter(m)), {k: p.detach().clone() for k, p in m.named_parameters()}
    moved = lambda x: {k for k, p in x.named_parameters() if not torch.equal(p, before[k])}
    s, _ = U.settle(m, U.encode_prompts(tok, rows), ridge=.1, steps=10)
    assert moved(s) and moved(s) <= mine and not moved(m)
    e = U.llmeraser(m, tok, rows[:1], rows[1:], solver="cg", damping=.1, tol=1e-2)
    assert moved(e) and moved(e) <= mine

EDGES = np.array([[0, 0], [0, 1], [1, 1], [2, 0], [2, 2]])

def test_bad_input_of_unlearning(tok):
    from recbook.collaborative.graph_cf import LightGCN
    g = U.edge_graph(EDGES, 3, 3)
    m = LightGCN(g, 3, 4)
    cases = [
        (r"outside 0..2", lambda: U.edge_graph(np.array([[3, 0]]), 3, 3)),
        ("float", lambda: U.edge_graph(EDGES + 0.5, 3, 3)),
        ("outside", lambda: U.edge_graph(EDGES - 1, 3, 3)),
        ("not what the model was trained on", lambda: U.unlearn_edges(m, [[1, 2]], EDGES, 3, 3)),
        ("both sets", lambda: U.unlearn_edges(m, EDGES[:1], EDGES, 3, 3)),
        ("repeated", lambda: U.unlearn_edges(m, EDGES[[0, 0]], EDGES[1:], 3, 3)),
        ("n_users=2", lambda: U.unlearn_edges(m, EDGES[:1], EDGES[1:3], 2, 4)),
        ("n_users=4", lambda: U.unlearn_edges(m, EDGES[:1], EDGES[1:], 4, 3)),
        ("float", lambda: U.unlearn_edges(m, EDGES[:1] * 1.0, EDGES[1:], 3, 3)),
        ("steps=-1", lambda: U.unlearn_edges(m, EDGES[:1], EDGES[1:], 3, 3, steps=-1)),
        ("shape", lambda: U.InfluenceEncoder(m.E0, m.E0[:4])),
        ("L=0", lambda: U.InfluenceEncoder(m.E0, m.E0, 0)),
        (
            "scale of 1 to 5",
            lambda: U.click_prompts(
                pd.DataFrame(dict(user=[0, 1], item=[0, 1], rating=[0, 1])), ["a", "b"], [["x"], ["y"]]
            ),
        ),
        (
            "titles",
            lambda: U.click_prompts(
                pd.DataFrame(dict(user=[0, 1], item=[0, 2], rating=[1, 5])), ["a", "b"], [["x"], ["y"]]
            ),
        ),
    ]
    for word, f in cases:
        with pytest.raises(ValueError, match=word):
            f()
    rows = [dict(prompt="Liked: red fox. Answer:", completion=" yes"), dict(prompt="Answer:", completion=" no")]
    R = U.encode_prompts(tok, rows)
    lm = tiny_model("llama", tok)
    ad = lora(tiny_model("llama", tok), 2)
    y, n = R.y.tolist()
    for word, f in (
        ("same token", lambda: U.evaluate_unlearning(lm, lm, R, R, R, y, y)),
        ("both classes", lambda: U.evaluate_unlearning(lm, lm, U.take(R, [0]), R, R, y, n)),
        ("steps=-3", lambda: U.e2urec(lm, tok, rows[:1], rows[1:], steps=-3)),
        ("beta=3", lambda: U.e2urec(lm, tok, rows[:1], rows[1:], beta=3)),
        ("alpha=-2", lambda: U.e2urec(lm, tok, rows[:1], rows[1:], alpha=-2)),
        ("damping=-1", lambda: U.llmeraser(ad, tok, rows[:1], rows[1:], damping=-1)),
        (
            "model reads",
            lambda: U.predictions(
                lm, U.encode_prompts(tok, [dict(prompt="red fox " * 200 + "Answer:", completion=" yes")])
            ),
        ),
    ):
        with pytest.raises(ValueError, match=word):
            f()

def test_predictions_give_the_mode_back(tok):
    m = tiny_model("opt", tok).train()
    R = U.encode_prompts(tok, [dict(prompt="Answer:", completion=" yes")])
    assert torch.equal(U.predictions(m, R), U.predictions(m, R)) and m.training
    assert torch.equal(U.request_gradient(m, 1, R), U.request_gradient(m, 1, R)) and m.training

# ---- alignment

PAIRS = pd.DataFrame(
    dict(
        prompt=["Liked: red fox. Next:", "Liked: blue sky. Next:"] * 4,
        chosen=[" green tea", " red fox"] * 4,
        rejected=[" movie", " song"] * 4,
        epsilon=[0.1, 0.2] * 4,
    )
)
WRAPPED = {
    "attention": lambda t: lora(tiny_model("llama", t), 4, target_modules=["q_proj"]),
    "all-linear": lambda t: lora(tiny_model("llama", t), 4, dropout=0.3),
    "embeddings": lambda t: lora(tiny_model("llama", t), 4, target_modules=["embed_tokens", "q_proj"]),
    "tied": lambda t: lora(tiny_model("llama", t, tie_word_embeddings=True), 4, target_modules=["embed_tokens"]),
    "gpt2": lambda t: lora(tiny_model("gpt2", t), 4),
    "other of two": lambda t: two_adapters(t, "other"),
}

def train_of(Trainer, m, tok, **kw):
    pairs = PAIRS.assign(rejected=[[r, " story"] for r in PAIRS.rejected]) if Trainer.several else PAIRS
    return A.align(m, tok, pairs, Trainer, steps=2, lr=1e-2, batch_size=4, **kw)

@pytest.mark.parametrize("Trainer", [A.PairTrainer, A.SDPOTrainer, A.SimPOTrainer, A.RosePOTrainer, A.AlphaDPOTrainer])
@pytest.mark.parametrize("wrap", WRAPPED)
def test_every_trainer_takes_a_peft_model(Trainer, wrap, tok):
    m = WRAPPED[wrap](tok)
    mine, before = set(active_adapter(m)), {k: p.detach().clone() for k, p in m.named_parameters()}
    new = train_of(Trainer, m, tok)
    moved = {k for k, p in new.named_parameters() if k not in before or not torch.equal(p, before[k])}
    assert moved and moved <= mine and all(torch.equal(p, before[k]) for k, p in m.named_parameters())
    assert new.peft_config.keys() == m.peft_config.keys()

@pytest.mark.parametrize("Trainer", [A.PairTrainer, A.AlphaDPOTrainer])
def test_the_reference_of_a_peft_model_is_the_model_with_its_adapter(Trainer, tok):
    m, seen = two_adapters(tok, "other"), []
    class Look(Trainer):
        def pair_loss(self, b):
            seen.append((b.w.detach(), b.rw))
            return super().pair_loss(b)
    train_of(Look, m, tok)
    w, rw = seen[0]
    assert torch.allclose(w, rw, atol=1e-4) and not torch.allclose(*seen[1], atol=1e-3)

def test_other_trainers_take_a_peft_model(tok):
    m = lora(tiny_model("llama", tok), 4)
    before = {k: p.detach().clone() for k, p in m.named_parameters()}
    new = A.sft(m, tok, PAIRS.rename(columns=dict(chosen="completion")), 2, 1e-2, 4)
    moved = {k for k, p in new.named_parameters() if not torch.equal(p, before[k])}
    assert moved and moved <= set(active_adapter(m))
    assert A.sft(tiny_model("llama", tok), tok, Dataset.from_pandas(PAIRS.rename(columns=dict(chosen="completion"))), 1)
    t = U.sft(
        m,
        U.encode_prompts(tok, [dict(prompt="Answer:", completion=" yes"), dict(prompt="A:", completion=" no")]),
        2,
        1e-2,
        device="cpu",
        progress=False,
    )
    assert {k for k, p in t.named_parameters() if not torch.equal(p, before[k])} <= set(active_adapter(m))

@pytest.mark.parametrize("kind", ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "bloom", "mpt"])
def test_log_probabilities_of_pairs_are_the_models_own(kind, tok):
    m, seen = tiny_model(kind, tok).train(), []
    class Look(A.PairTrainer):
        def pair_loss(self, b):
            seen.append(torch.stack([b.w, b.l, b.rw, b.rl]).detach())
            return super().pair_loss(b)
    rates = [getattr(x, "p", getattr(x, "dropout", None)) for x in m.modules()]
    new = A.align(m, tok, PAIRS.iloc[:1], Look, steps=1, lr=1e-6, batch_size=1)
    m.eval()
    def logp(c):
        (p,), (x,) = token_columns(tok, [PAIRS.prompt[0]], [c])
        with torch.no_grad():
            lp = m(torch.tensor([p + x])).logits[0].log_softmax(-1)
        return sum(lp[len(p)-1+j, t] for j, t in enumerate(x))
    want = torch.stack([logp(PAIRS.chosen[0]), logp(PAIRS.rejected[0])])
    assert torch.allclose(seen[0][:, 0], want.repeat(2), atol=1e-2)
    flat = lambda x: [r if isinstance(r, (float, type(None))) else type(r) for r in x]
    assert flat([getattr(x, "p", getattr(x, "dropout", None)) for x in new.modules()]) == flat(rates) # as found

def test_a_head_that_pads_with_the_end_mark_reads_the_end_mark(tmp_path):
    t = byte_tokenizer(pad=None)
    t.pad_token = t.eos_token
    tiny_model("llama", t).save_pretrained(tmp_path)
    m = A.head_of(tmp_path, 3, t).eval()
    texts = ["red fox", "blue sky and green tea"]
    got = A.outputs(m, t, texts)
    with torch.no_grad():
        body = [
            m.score(m.model(torch.tensor([prompt_ids(t, [x])[0] + [t.eos_token_id]])).last_hidden_state[0, -1])
            for x in texts
        ]
    assert torch.allclose(got, torch.stack(body), atol=1e-4)
    m.train()
    assert torch.equal(A.outputs(m, t, texts), got) and m.training

def test_bad_input_of_alignment(tok):
    m = tiny_model("llama", tok)
    al = lambda p=PAIRS, T=A.PairTrainer, **k: A.align(m, tok, p, T, **(dict(steps=1) | k))
    half, zero = torch.tensor([.5, .5]), torch.tensor([1., 0.])
    c = torch.tensor([0., 1.])
    cases = [
        ("beta=-1", lambda: al(beta=-1)),
        ("steps=0", lambda: al(steps=0)),
        ("lr=nan", lambda: al(lr=float("nan"))),
        ("gama", lambda: al(T=A.SimPOTrainer, knobs=dict(gama=1.0))),
        ("gamma=nan", lambda: al(T=A.SimPOTrainer, knobs=dict(gamma=float("nan")))),
        ("both chosen", lambda: al(PAIRS.assign(rejected=PAIRS.chosen))),
        ("one rejected", lambda: al(PAIRS.assign(rejected=[[r, " x"] for r in PAIRS.rejected]), A.SimPOTrainer)),
        ("epsilon", lambda: al(PAIRS.assign(epsilon=1.7), A.RosePOTrainer)),
        ("epsilon", lambda: al(PAIRS.assign(epsilon=np.nan), A.RosePOTrainer)),
        ("p is no", lambda: A.sinkhorn(half[None] * 2, half[None], torch.rand(2, 2))),
        ("q is no", lambda: A.sinkhorn(half[None], half[None] * 3, torch.rand(2, 2))),
        ("costs", lambda: A.sinkhorn(half[None], half[None], torch.full((2, 2), -1.0))),
        ("p_hat", lambda: A.ot_loss(half[None] * 2, half[None], c)),
        ("p is no", lambda: A.ot_loss(half[None], -half[None], c)),
        ("p1", lambda: A.prefers(half[None] * 2, half[None])),
        ("shape", lambda: A.prefers(half[None], torch.ones(1, 3) / 3)),
        ("finite", lambda: A.flip_probability([np.nan], [1.0])),
        ("tau=-1", lambda: A.flip_probability([1.0], [1.0], tau=-1)),
        ("most=0.7", lambda: A.flip_probability([1.0], [1.0], most=0.7)),
        ("shape", lambda: A.fit_tau([], [])),
        ("finite", lambda: A.fit_tau([np.inf], [1.0])),
        ("beta=-1", lambda: A.dpo_optimum(half, half, half, -1)),
        ("q is 0", lambda: A.dpo_optimum(half, half, zero, 1.0)),
        ("ref is no", lambda: A.dpo_population(half, half * 2, half, half, 1.0)),
        ("item -1", lambda: A.next_item_rows([[0, -1]], ["a", "b"])),
        ("item 2", lambda: A.next_item_rows([[0, 2]], ["a", "b"])),
        ("history=0", lambda: A.next_item_rows([[0, 1]], ["a", "b"], 0)),
        ("most=0", lambda: A.or_ratio([[1, 2]], 0)),
        ("item -1", lambda: A.or_ratio([[1, -1]])),
        ("no recommendations", lambda: A.div_ratio([])),
        ("population", lambda: A.group_weights([-1.0, 2.0], [0.5, 0.5])),
        ("population", lambda: A.group_weights([np.nan, 2.0], [0.5, 0.5])),
        ("temperature=-1", lambda: A.explore_profiles({"w": m}, tok, ["A"], 1, temperature=-1)),
        ("0 new", lambda: A.explore_profiles({"w": m}, tok, ["A"], 1, max_new_tokens=0)),
    ]
    for word, f in cases:
        with pytest.raises(ValueError, match=word):
            f()
    assert A.sinkhorn(half[None], half[None], torch.zeros(2, 2)).tolist() == [0.]
