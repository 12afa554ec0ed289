"The curriculum, its training, the shipped weights, and their examination."
import os, re, signal, subprocess, sys, time
from collections import Counter
from pathlib import Path
import numpy as np, pytest, torch
from recbook import exercises as X, lm as L, nano as N
from recbook.world import CUES, World

TINY = dict(hidden_size=32, n_layers=2, intermediate_size=48)
CUE = {w: v for vs in CUES.values() for v, ws in vs.items() for w in ws}
SHELF = X.Shelf(1234)

def drawn(name, n, k=60):
    "k exercises as (prompt, answer), answers being the last piece."
    e = X.EXERCISES[name]
    for j in range(k):
        *q, (a, w) = e.make(SHELF, np.random.default_rng(j), n)
        yield "".join(x for x, _ in q), a.strip()

def value(a, title):
    "Read an attribute off a title with the table of cues alone."
    return next(CUE[w] for w in title.replace(" of the ", " ").split() if CUE[w] in CUES[a])

def item(text): return re.search(r"([A-Z]\w+ [A-Z]\w+ of the [A-Z]\w+ [A-Z]\w+)", text).group(1)

def options_in(text): return dict(re.findall(r"([A-T])\) (.+?)(?= [A-T]\) | Answer:)", text))

# ---- the answers are right

def test_questions_and_yes_or_no():
    for p, a in drawn("question", 1):
        attribute = re.search(r"what is the (\w+) of", p).group(1)
        if " of the " in p:
            assert value(attribute, item(p)) == a
        else:
            assert a in p and a in CUES[attribute]
    said = Counter()
    for p, a in drawn("yesno", 1, 200):
        attribute, v = re.search(r"is the (\w+) of .* (\w+)\? Answer:", p).groups()
        described = p.split("? Answer")[0].rsplit(" ", 1)[0]
        truth = value(attribute, item(p)) == v if " of the " in p else f" {v} " in described
        assert (a == "yes") == truth
        said[a] += 1
    assert min(said.values()) > 70

@pytest.mark.parametrize("n", [2, 4, 20])
def test_letters_name_the_only_right_option(n):
    places = Counter()
    for p, a in drawn("letters", n, 150):
        attribute, o = re.search(r"what is the (\w+) of", p).group(1), options_in(p)
        assert len(o) == n and len(set(o.values())) == n
        titled = " of the " in p
        said = value(attribute, item(p)) if titled else next(v for v in CUES[attribute] if v in p.split("?")[0])
        right = [l for l, v in o.items() if v == said]
        assert right == [a]
        places[a] += 1
    assert len(places) == n # every place occurs
    for p, a in drawn("which", n, 60):
        attribute, v = re.search(r"which has (\w+) (\w+)\?", p).groups()
        assert [l for l, t in options_in(p).items() if value(attribute, t) == v] == [a]

def test_looking_up_copying_and_being_told():
    for p, a in drawn("lookup", 8):
        first, asked = p.split(". ", 1)
        pairs = dict(re.match(r"(\S+?):? (\S+)$", x).groups() for x in first.split("; "))
        assert pairs[asked.split()[-1].rstrip(":")] == a and len(pairs) == 8
    for p, a in drawn("again", 9):
        words = (p + " " + a).replace(":", "").replace(";", "").replace(".", "").split()
        first, *asked = " ".join(words[1:]).split(" Again ")
        assert len(first.split()) == 9 and len(asked) == 4
        assert all(f" {x} " in f" {first} " and len(x.split()) == 3 for x in asked)
    told = 0
    for p, a in drawn("told", 5, 200):
        facts = dict(re.findall(r"The \w+ of (.+?) is (\w+)\.", p.split(" Question")[0]))
        asked = re.search(r"what is the (\w+) of (.+)\? Answer", p)
        told += asked[2] in facts
        assert a == facts.get(asked[2], value(asked[1], asked[2]))
    assert .6 < told/200 < .9

def test_drills():
    for j in range(40):
        rng = np.random.default_rng(j)
        means = lambda w: CUE.get(w, w)
        text = "".join(x for x, _ in X.EXERCISES["same"].make(SHELF, rng, 5))
        pairs = re.findall(r"(\w+) (\w+): (yes|no)\.", text)
        assert len(pairs) == 5 and all((means(a) == b) == (y == "yes") for a, b, y in pairs)
        text = "".join(x for x, _ in X.EXERCISES["place"].make(SHELF, rng, 12))
        listed, asked = text.split(". ", 1)
        o = dict(re.findall(r"([A-T])\) (\w+)", listed))
        found = re.findall(r"(\w+): ([A-T]);", asked)
        assert len(o) == 12 and len(found) == 4 and all(o[l] == means(w) for w, l in found)

def test_rules_profiles_descriptions_reviews():
    for j in range(30):
        d = X.EXERCISES["rule"].make(SHELF, np.random.default_rng(j), 4)
        rows = [(t.strip(" :"), l == " yes") for (t, _), (l, _) in zip(d[1::3], d[2::3])]
        has = [{CUE[w] for w in t.replace(" of the ", " ").split()} for t, _ in rows]
        assert any(all((v in h) == y for h, (_, y) in zip(has, rows)) for vs in CUES.values() for v in vs)
    for p, a in drawn("profile", 3):
        v, u = re.match(r"(\w+) and (\w+)\.", a).groups()
        titles = [{CUE[w] for w in t.replace(" of the ", " ").split()} for t in p[6:].split(". Profile")[0].split("; ")]
        assert v < u and sum(v in t for t in titles) >= 3 and sum(u in t for t in titles) >= 3
    for p, a in drawn("describe", 1):
        assert {CUE[w] for w in item(p).replace(" of the ", " ").split()} <= set(re.findall(r"\w+", a))
    tones = {"hated": "1", "bored": "2", "fine:": "3", "liked": "4", "loved": "5"}
    for p, a in drawn("review", 1):
        assert tones[next(t for t in tones if t in p.split(" and I ")[1])] == a

def test_weights_of_an_answer_sum_to_three():
    for name, e in X.EXERCISES.items():
        for n in (e.first, e.last):
            d = e.make(SHELF, np.random.default_rng(3), n)
            ids, w, answer = X.encoded(TOK, [(name, n, d)], np.random.default_rng(0))
            if name not in ("rule", "describe", "review", "profile"):
                assert w[answer].sum() == pytest.approx(3, rel=.2), name

TOK = X.book_tokenizer(4)

def test_every_word_of_every_world_is_one_token():
    other = World(77).items
    for t in other.title[:50]:
        assert len(TOK(f" {t}", add_special_tokens=False).input_ids) == 6
    assert X.book_tokenizer(4).get_vocab() == TOK.get_vocab()

# ---- what is set when

def test_an_exercise_opens_when_what_it_needs_is_mastered():
    p = X.Progress()
    assert "letters" not in p.open() and "question" in p.open()
    for name in ("question", "lookup", "same", "place"):
        for _ in range(39):
            X.note(p, name, 1.)
        assert name not in p.passed
        X.note(p, name, 1.)
    assert {"letters", "told", "yesno"} <= set(p.open()) and "taste" not in p.open() and p.level["lookup"] == 3
    for _ in range(200):
        X.note(p, "letters", .5)
    assert p.level["letters"] == 2 and "which" not in p.open()

def test_documents_follow_from_the_step_and_never_use_worlds_kept_for_exams():
    p = X.Progress(passed=list(X.EXERCISES))
    X.shelf_of.cache_clear()
    a = X.documents(41, p)
    assert a == X.documents(41, p) != X.documents(42, p)
    seeds = []
    class Spy(X.Shelf):
        def __init__(self, seed, *a, **k):
            seeds.append(seed)
            super().__init__(seed, *a, **k)
    old, X.Shelf = X.Shelf, Spy
    try:
        X.shelf_of.cache_clear()
        for step in (0, 19, 5000):
            X.documents(step, p, tokens=100)
    finally:
        X.Shelf = old
        X.shelf_of.cache_clear()
    assert seeds == [1000, 1019, 6000]
    with pytest.raises(ValueError, match="1000"):
        N.examine(None, TOK, [3, 1000])

# ---- training

def test_losses_are_those_of_plain_forward_passes():
    t = N.Training("causal", **TINY, steps=10)
    docs = X.documents(0, X.Progress())[:6]
    x = X.encoded(t.tok, docs, np.random.default_rng(1))
    z, y, w, on, _ = N.causal_part(t.model, t.tok, *x, None)
    ce = torch.nn.functional.cross_entropy
    plain = ce(t.model(x[0]).logits[:, :-1].flatten(0, 1), x[0][:, 1:].flatten(), reduction="none")
    want = (plain*x[1][:, 1:].flatten()).sum()/x[1][:, 1:].sum()
    got = (torch.nn.functional.cross_entropy(z, y, reduction="none")*w).sum()/w.sum()
    assert float(got) == pytest.approx(float(want), rel=.02)
    t = N.Training("masked", **TINY, steps=10)
    z, y, w, hide, answer = N.masked_part(t.model, t.tok, *x, np.random.default_rng(0))
    assert (hide & answer).sum() == (answer & ~torch.isin(x[0], torch.tensor(t.tok.all_special_ids))).sum()
    ids = x[0].masked_fill(hide, t.tok.mask_token_id)
    full = t.model(input_ids=ids, attention_mask=(x[0] != t.tok.pad_token_id).long()).logits[hide]
    assert torch.allclose(z.float(), full.float(), atol=.05)

def test_a_killed_training_goes_on_to_the_same_bits(tmp_path):
    whole = N.train("nano", tmp_path/"whole", **TINY, steps=14, every=3)
    code = (f"import torch; torch.set_num_threads(1)\nfrom recbook import nano as N\n"
            f"N.train('nano', {str(tmp_path/'cut')!r}, **{TINY!r}, steps=14, every=3)")
    run = subprocess.Popen([sys.executable, "-c", code])
    file = tmp_path/"cut"/"checkpoint.pt"
    until = time.time() + 120
    while not file.exists() and time.time() < until and run.poll() is None:
        time.sleep(.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert file.exists()
    again = N.train("nano", tmp_path/"cut", **TINY, steps=14, every=3)
    assert (again/"model.safetensors").read_bytes() == (whole/"model.safetensors").read_bytes()
    longer = N.train("nano", tmp_path/"cut", **TINY, steps=16)
    assert (longer/"model.safetensors").read_bytes() != (whole/"model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="belongs to"):
        N.train("nano", tmp_path/"cut", **TINY | dict(n_layers=1), steps=14)
    with pytest.raises(ValueError, match="nanno"):
        N.train("nanno", tmp_path/"x")

def test_pace_rises_stays_and_falls():
    p = [N.pace(s, 1000) for s in range(1000)]
    assert p[0] == .01 and p[99] == p[500] == p[749] == 1 and p[875] == .5 and p[999] < .01

# ---- what came with the book

@pytest.fixture(scope="module")
def nano(): return L.nano_lm()

def test_shipped_models_load_at_once_and_weigh_little():
    home = L.shipped("nano").parent
    assert sum(f.stat().st_size for f in home.rglob("*") if f.is_file()) < 12e6
    code = "import time\nimport recbook.lm as L\nfrom transformers import LlamaForCausalLM\nt=time.process_time()\n" \
           "m,_=L.nano_lm()\nprint(time.process_time()-t)"
    run = lambda: subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    took = min(float(run()) for _ in range(2))
    assert took < 1
    m, tok = L.nano_lm()
    assert m.dtype == torch.float32 and not m.training and tok.padding_side == "left"
    for n in ("nano", "nano-mlm"):
        kind = (L.nano_mlm if n == "nano-mlm" else L.nano_lm)(name=n)[0]
        assert 1.7e6 <= kind.num_parameters() <= 5e6
    assert L.load_lm("nano")[0].config.hidden_size == 192

def test_models_that_are_not_there_and_sizes_that_are_theirs():
    with pytest.raises(OSError, match="recbook model train nano-9 --to"):
        L.nano_lm(name="nano-9")
    for load, name in ((L.nano_lm, "nano-mlm"), (L.nano_mlm, "nano")):
        with pytest.raises(ValueError, match=name): # never weights of another kind, filled up at random
            load(name=name)
    with pytest.raises(ValueError, match="hidden_size"):
        L.nano_lm(hidden_size=64)
    with pytest.raises(ValueError, match="hidden"):
        L.nano_lm(corpus=["a b"]*4, hidden=64)

def test_the_shipped_model_passes_its_examination(nano):
    got = N.examine(*nano, [11], 60)
    least = {**{f"{a} from title": .97 for a in CUES}, "yes or no": .93, "letters of 4": .88}
    least |= {"letters in every order": .88, "letters of 20": .3, "look-up, 8 pairs": .93}
    least |= {"title with the asked attributes": .9}
    assert not {k: got[k] for k in least if got[k] < least[k]}
    assert got["entropy of a title"] <= got["nats a title"] < got["entropy of a title"] + .5
    assert got["will it be liked"] <= got["best possible"]

def test_it_reads_on_and_then_names_titles_of_a_catalogue():
    w = World(12, 50, 40, clicks_per_user=5)
    texts = [f"Title of an item that is {r.mood}, {r.genre}, {r.setting}, {r.era}: "
             f"{r.title}" for r in w.items.itertuples()]*4
    model, tok = L.read_on(texts, steps=60, lr=.001)
    before = L.nano_lm()[0]
    P = [t.rsplit(":", 1)[0] + ":" for t in texts[:40]]
    made = lambda m: [t.strip() in set(w.items.title) for t in N.sampled_texts(m, tok, P, 12, greedy=True)]
    assert np.mean(made(model)) > .8 > .2 > np.mean(made(before))
    again = L.read_on(texts, steps=60, lr=.001)[0]
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), model.parameters()))
