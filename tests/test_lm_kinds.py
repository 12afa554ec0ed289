"""Whole kinds of faults of language-model code: families, marks, padding, shipped settings, adapters, the cache,
loading."""
import json, os, subprocess, sys
from pathlib import Path
import numpy as np, pytest, torch
from peft import LoraConfig
from transformers import AutoTokenizer, BertConfig, BertModel, RobertaConfig, RobertaModel
from recbook import lm as L
from tiny import FAMILIES, TITLES, byte_tokenizer, piece_tokenizer, tiny_model

torch.set_num_threads(1)
PROMPTS = ["Liked: red fox; blue sky; green tea; movie book. Next:", "Next:"]
TINY = dict(hidden_size=32, n_layers=1, steps=4, batch_size=4, vocab_size=400)

@pytest.fixture(scope="module")
def tok(): return byte_tokenizer()

@torch.no_grad()
def plainly(model, prompts, titles, tok, eos=True):
    "Sums over whole sequences, one unpadded pass each, tokens of prompt and title taken from the whole text."
    out = torch.zeros(len(prompts), len(titles))
    for i, p in enumerate(prompts):
        for j, t in enumerate(titles):
            a, x = tok(p).input_ids, tok(p + " " + t).input_ids + [tok.eos_token_id]*eos
            lp = model(torch.tensor([x])).logits[0].float().log_softmax(-1)
            out[i, j] = sum(lp[k-1, x[k]] for k in range(len(a), len(x)))
    return out

def by_beam(model, tok, prompts, trie):
    items, s = L.constrained_beam(model, tok, prompts, trie, k=trie.n_items)
    return s.gather(1, items.argsort(1))

def by_pairs(model, tok, prompts):
    return L.sequence_logprob(
        model, tok, [p for p in prompts for _ in TITLES], [" " + t for _ in prompts for t in TITLES], eos=True
    ).view(len(prompts), -1)

@pytest.mark.parametrize("make", [byte_tokenizer, piece_tokenizer])
@pytest.mark.parametrize("kind", FAMILIES)
def test_catalogue_scores_are_those_of_plain_passes(kind, make):
    tok = make()
    m, trie = tiny_model(kind, tok), L.ItemTrie(tok, TITLES)
    want = plainly(m, PROMPTS, TITLES, tok)
    for nodes in (4, 1024):
        assert torch.allclose(L.rank_items(m, tok, PROMPTS, trie, nodes=nodes), want, atol=1e-3)
    assert torch.allclose(by_pairs(m, tok, PROMPTS), want, atol=1e-3)
    assert torch.allclose(by_beam(m, tok, PROMPTS, trie), want, atol=1e-3)

def test_which_models_read_trees(tok):
    reads = {k: L.reads_trees(tiny_model(k, tok)) for k in FAMILIES}
    assert {k for k, r in reads.items() if not r} == {
        "mistral",
        "gemma2",
        "gemma3_text",
        "phi3",
        "gpt_neo",
        "bloom",
        "mpt",
        "cohere2",
        "starcoder2",
        "mamba",
    }
    assert L.reads_trees(tiny_model("mistral", tok, sliding_window=None)) and not L.reads_on(
        tiny_model("falcon", tok, alibi=True)
    )

@pytest.mark.parametrize("kind", ["llama", "mistral", "bloom"])
def test_half_precision_and_adapters(kind, tok):
    m, trie = tiny_model(kind, tok), L.ItemTrie(tok, TITLES)
    low = tiny_model(kind, tok).to(torch.bfloat16)
    assert torch.allclose(L.rank_items(low, tok, PROMPTS, trie), plainly(low, PROMPTS, TITLES, tok), atol=1.5)
    m = L.lora(m, 4)
    for k, p in m.named_parameters():
        if "lora_" in k:
            torch.nn.init.normal_(p, std=.3)
    want = plainly(m.eval(), PROMPTS, TITLES, tok)
    for f in (
        lambda: L.rank_items(m, tok, PROMPTS, trie),
        lambda: by_pairs(m, tok, PROMPTS),
        lambda: by_beam(m, tok, PROMPTS, trie),
    ):
        assert torch.allclose(f(), want, atol=1e-3)

def test_prompt_learning_shifts_nothing(tok):
    from peft import PromptTuningConfig, get_peft_model
    m = get_peft_model(tiny_model("llama", tok), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).eval()
    full = lambda x: m(torch.tensor([x])).logits[0, 3:].log_softmax(-1)
    x = tok(PROMPTS[1] + " red fox").input_ids + [tok.eos_token_id]
    n = len(tok(PROMPTS[1]).input_ids)
    with torch.no_grad():
        want = sum(full(x)[k-1, x[k]] for k in range(n, len(x)))
    assert torch.allclose(by_pairs(m, tok, PROMPTS)[1, 0], want, atol=1e-3)
    assert torch.allclose(L.rank_items(m, tok, PROMPTS, L.ItemTrie(tok, TITLES))[1, 0], want, atol=1e-3)

@pytest.mark.parametrize(
    "make",
    [
        dict(),
        dict(pad=None),
        dict(add="<bos> $A <eos>"),
        dict(bos=None, add=None),
        dict(add=None),
        dict(pad=None, add="<bos> $A <eos>"),
    ],
)
def test_marks_added_missing_or_shared(make):
    "Whatever the tokenizer puts around a text, scores are those behind the prompt, and the end mark counts once."
    tok = byte_tokenizer(**make)
    m = tiny_model("llama", tok)
    if "pad" in make:
        tok.pad_token = tok.eos_token
    front = [tok.bos_token_id] if "<bos>" in (make.get("add", "<bos> $A") or "") else []
    bare = lambda s: tok(s, add_special_tokens=False).input_ids
    with torch.no_grad():
        z = m(torch.tensor([front + bare("Answer:")])).logits[0, -1]
        x = front + bare("Answer: yes") + [tok.eos_token_id]
        lp = m(torch.tensor([x])).logits[0].log_softmax(-1)
    n = len(front + bare("Answer:"))
    got = L.answer_logits(m, tok, ["Answer:", "A much longer prompt. Answer:"], [" yes", " no"])[0]
    assert torch.allclose(got, z[[bare(" yes")[0], bare(" no")[0]]], atol=1e-4)
    want = sum(lp[k-1, x[k]] for k in range(n, len(x)))
    got = L.sequence_logprob(m, tok, ["Answer:", "A much longer prompt. Answer:"], [" yes", " no"], eos=True)[0]
    assert torch.allclose(got, want, atol=1e-4)
    P, A = L.token_columns(tok, ["Answer:"], [" yes"])
    assert (P[0], A[0]) == (x[:n], x[n:]) and A[0].count(tok.eos_token_id) == 1
    assert L.token_columns(tok, ["Answer:"], [" yes" + tok.eos_token])[1][0] == A[0]

def test_padding_goes_by_length(tok):
    "Pad tokens with number 0, the end mark as padding, real tokens equal to it: the mask is that of the lengths."
    for t in (tok, byte_tokenizer(pad=None)):
        ids = [[5, t.eos_token_id], [t.eos_token_id]*4, [0, 0, 0]]
        for side in ("left", "right"):
            x = L.padded(t, ids, side)
            for row, mask, want in zip(x["input_ids"], x["attention_mask"], ids):
                assert row[mask.bool()].tolist() == want
            assert (x["attention_mask"][:, 0 if side == "left" else -1] == torch.tensor([0, 1, 0])).all()
    assert L.start_mark(byte_tokenizer(pad=None)) == [0] # number 0 is a token, not a missing one
    none = byte_tokenizer(bos=None, eos=None, add=None)
    with pytest.raises(ValueError, match="neither start nor end"):
        L.prompt_ids(none, [""])
    with pytest.raises(ValueError, match="eos_token"):
        L.token_columns(none, ["a"], ["b"])
    with pytest.raises(ValueError, match="eos=False"):
        L.ItemTrie(none, TITLES)

def test_a_template_writes_the_start_mark_itself(tok):
    once = L.prompt_ids(tok, ["Answer:"])
    assert L.prompt_ids(tok, ["<bos>Answer:"]) == once and L.encode(tok, ["<bos>Answer:"])["input_ids"].tolist() == once
    assert L.token_columns(tok, ["<bos>Answer:"], [" yes"])[0] == once
    assert L.label_ids(tok, ["<bos>Answer:"], [" yes"]) == L.label_ids(tok, ["Answer:"], [" yes"])
    ends = byte_tokenizer(add="<bos> $A <eos>")
    assert L.prompt_ids(tok, ["Answer: no<eos>"])[0][-1] == tok.eos_token_id # written by the caller: stays
    assert L.encode(ends, ["no<eos>"])["input_ids"][0].tolist().count(ends.eos_token_id) == 1

@pytest.mark.parametrize(
    "prompt, answer, label",
    [
        ("Answer: ", "yes", "Ġyes"),
        ("Liked: re", "d fox", None),
        ("Answer:", " yes", "Ġyes"),
        ("Wr", "ote", None),
        ("", "red", None),
    ],
)
def test_the_border_of_a_prompt_lies_in_the_whole_text(tok, prompt, answer, label):
    (p,), (a,) = L.token_columns(tok, [prompt], [answer], eos=False)
    assert p + a == tok(prompt + answer).input_ids and a
    if label:
        assert tok.convert_ids_to_tokens(a) == [label]
    m = tiny_model("llama", tok)
    with torch.no_grad():
        lp = m(torch.tensor([p+a])).logits[0].log_softmax(-1)
    assert torch.allclose(
        L.sequence_logprob(m, tok, [prompt], [answer])[0],
        sum(lp[len(p) - 1 + k, t] for k, t in enumerate(a)),
        atol=1e-4,
    )

def test_a_blank_at_the_border_of_a_catalogue_is_refused(tok):
    m = tiny_model("llama", tok)
    with pytest.raises(ValueError, match="blank"):
        L.rank_items(m, tok, ["Next: "], L.ItemTrie(tok, TITLES, prefix=""))
    with pytest.raises(ValueError, match="blank"):
        L.answer_logits(m, tok, ["Answer: "], ["yes"])

@pytest.mark.parametrize("kind", ["gpt2", "opt", "gpt_neox"])
def test_dropout_is_off_and_modes_come_back(kind, tok):
    m, trie = tiny_model(kind, tok).train(), L.ItemTrie(tok, TITLES)
    list(m.children())[-1].eval()
    before = [x.training for x in m.modules()]
    for f in (
        lambda: L.rank_items(m, tok, PROMPTS, trie),
        lambda: by_beam(m, tok, PROMPTS, trie),
        lambda: by_pairs(m, tok, PROMPTS),
        lambda: L.answer_logits(m, tok, PROMPTS, [" yes"]),
        lambda: torch.tensor(L.pooled(m, tok, PROMPTS)),
    ):
        assert torch.equal(f(), f()) and [x.training for x in m.modules()] == before
    with pytest.raises(ValueError):
        L.rank_items(m, tok, ["Next: "*200], trie)
    assert [x.training for x in m.modules()] == before

SHIPPED = dict(
    repetition_penalty=5.0,
    no_repeat_ngram_size=1,
    typical_p=0.1,
    num_beams=3,
    temperature=0.05,
    top_p=0.05,
    top_k=1,
    min_p=0.9,
    suppress_tokens=[5, 6],
    epsilon_cutoff=0.9,
)

@pytest.mark.parametrize("k", SHIPPED)
def test_shipped_settings_have_no_say(k, tok):
    m = tiny_model("llama", tok)
    m.lm_head.weight.data *= 3
    ids = L.prompt_ids(tok, ["Liked: red fox; red sky. Next:"])*3000
    def draw():
        torch.manual_seed(1)
        return L.generated(m, tok, ids, 3)
    want = draw()
    old = m.generation_config
    setattr(m.generation_config, k, SHIPPED[k])
    assert torch.equal(draw(), want) and m.generation_config is old and getattr(old, k) == SHIPPED[k]
    with torch.no_grad():
        p = m(torch.tensor(ids[:1])).logits[0, -1].softmax(-1)
    assert (torch.bincount(want[:, 0], minlength=len(p))/3000 - p).abs().sum()/2 < .18
    greedy = L.generated(m, tok, ids[:1], 1, greedy=True)
    assert greedy[0, 0] == p.argmax()

def test_end_marks_of_the_model_still_end(tok):
    m = tiny_model("llama", tok)
    m.generation_config.eos_token_id = list(range(3, len(tok)))
    assert L.generated(m, tok, L.prompt_ids(tok, ["A"]), 5).shape[1] == 1

@pytest.mark.parametrize("targets", [["q_proj"], ["embed_tokens", "q_proj"], "all-linear"])
def test_adapters_are_known_by_their_layers(tok, targets):
    m = L.lora(tiny_model("llama", tok), 4, target_modules=targets)
    m.add_adapter(
        "lora_B_default", LoraConfig(r=2, target_modules=["v_proj"], modules_to_save=["lm_head"], task_type="CAUSAL_LM")
    )  # a name made to mislead
    one = L.active_adapter(m)
    assert set(one) == {k for k, p in m.named_parameters() if p.requires_grad}
    m.set_adapter("lora_B_default")
    two = L.active_adapter(m)
    assert (
        set(two) == {k for k, p in m.named_parameters() if p.requires_grad}
        and not set(one) & set(two)
        and any("lm_head" in k for k in two)
    )
    assert L.active_adapter(tiny_model("llama", tok)) == {}
    with pytest.raises(ValueError, match="adapters already"):
        L.lora(m)

@pytest.mark.parametrize("pad", [0, 1])
@pytest.mark.parametrize("long", [False, True])
def test_encoders_keep_their_marks_when_texts_are_cut(pad, long):
    tok = byte_tokenizer(bos="[CLS]", eos="[SEP]", pad="[PAD]", add="[CLS] $A [SEP]")
    tok.cls_token, tok.sep_token = "[CLS]", "[SEP]"
    texts = ["red fox blue sky green tea Next item likes movie book song story"*(2 if long else 1), "red"]
    c = dict(vocab_size=len(tok), hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
    for m, limit in (
        (BertModel(BertConfig(**c, max_position_embeddings=16)), 16),
        (RobertaModel(RobertaConfig(**c, max_position_embeddings=18, pad_token_id=pad)), 18 - pad - 1),
    ):
        m.eval()
        assert L.context_limit(m) == limit
        x = [tok(t, truncation=True, max_length=limit, return_tensors="pt").input_ids for t in texts]
        with torch.no_grad():
            want = torch.cat([m(i).last_hidden_state.mean(1) for i in x]).numpy()
        if not (isinstance(m, RobertaModel) and pad):
            assert np.allclose(L.pooled(m, tok, texts), want, atol=1e-4)
        assert L.pooled(m, tok, texts).shape == (2, 32)
        left = L.encode(tok, texts[:1], 8, "left")["input_ids"][0].tolist()
        assert (
            left[0] == tok.cls_token_id
            and left[-1] == tok.sep_token_id
            and left[1:-1] == tok(texts[0]).input_ids[-7:-1]
        )
    with pytest.raises(ValueError, match="limit=2"):
        L.encode(tok, texts, 2, "right")

# ---- the cache

@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path))
    return tmp_path

def nano(): return L.nano_lm(corpus=["red fox and blue sky"]*8, **TINY)[0]

def flip(f):
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 1
    f.write_bytes(b)
DAMAGE = {
    "emptied": lambda d: [f.unlink() for f in d.iterdir()],
    "weights gone": lambda d: (d / "model.safetensors").unlink(),
    "cut short": lambda d: os.truncate(d / "model.safetensors", 1000),
    "one bit": lambda d: flip(d / "model.safetensors"),
    "tokenizer bit": lambda d: flip(d / "tokenizer.json"),
    "list of hashes gone": lambda d: (d / "sha256.json").unlink(),
    "list of hashes garbled": lambda d: (d / "sha256.json").write_text("[1]"),
}

@pytest.mark.parametrize("how", DAMAGE)
def test_a_damaged_cache_is_built_again(home, how):
    want = [p.clone() for p in nano().parameters()]
    (folder,) = [d for d in (home/"lm").iterdir() if d.is_dir()]
    DAMAGE[how](folder)
    assert all(torch.equal(a, b) for a, b in zip(nano().parameters(), want))
    assert L.whole(folder) and [d.name for d in (home/"lm").iterdir() if d.is_dir()] == [folder.name]

def test_leftovers_of_the_dead_are_swept_and_the_living_left_alone(home):
    (home/"lm").mkdir()
    for name in ("deadbeef00000000.abcd", "feedface00000000.efgh"):
        (home/"lm"/name).mkdir()
        (home/"lm"/name/"x").write_text("half")
    lock = str(home/"lm"/"feedface00000000.lock")
    code = (
        f"from filelock import FileLock\nimport time\nwith FileLock({lock!r}): "
        "print('held', flush=True); time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline().strip() == "held"
        nano()
        assert not (home/"lm"/"deadbeef00000000.abcd").exists() and (home/"lm"/"feedface00000000.efgh"/"x").exists()
        other.kill()

def test_a_cache_that_cannot_be_written_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path/"file").write_text("")
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path/"file"))
    with pytest.raises(OSError, match="RECBOOK_CACHE"):
        nano()
    monkeypatch.setenv("RECBOOK_CACHE", str(tmp_path/"home"))
    def full(*a, **k): raise OSError(28, "No space left on device")
    monkeypatch.setattr(L.os, "replace", full)
    with pytest.raises(OSError, match="RECBOOK_CACHE.*"):
        nano()
    monkeypatch.undo()
    assert not [d for d in (tmp_path/"home"/"lm").iterdir() if d.is_dir()]

@pytest.mark.parametrize(
    "bad",
    [
        dict(steps=0),
        dict(steps=2.5),
        dict(steps=True),
        dict(hidden_size=0),
        dict(hidden_size=70),
        dict(n_layers=0),
        dict(batch_size=0),
        dict(seed=-1),
        dict(lr=0),
        dict(lr=float("nan")),
        dict(max_length=1),
        dict(intermediate_size=0),
        dict(vocab_size="x"),
    ],
)
def test_settings_of_a_nano_model_are_checked_first(home, bad):
    for f in (L.nano_lm, L.nano_mlm):
        with pytest.raises(ValueError, match=next(iter(bad))):
            f(corpus=["a b c"]*4, **bad)
    assert not (home/"lm").exists()

# ---- loading

PLANT = (
    "open({mark!r}, 'w').write('ran')\nfrom transformers import LlamaConfig, LlamaForCausalLM, "
    "PreTrainedTokenizerFast\n"
    "class XConfig(LlamaConfig): model_type = 'planted'\nclass XModel(LlamaForCausalLM): config_class = "
    "XConfig\nclass XTok(PreTrainedTokenizerFast): pass\n"
)

@pytest.fixture
def folder(tmp_path, tok):
    d = tmp_path/"model"
    tiny_model("llama", tok).save_pretrained(d)
    tok.save_pretrained(d)
    return d

def plant(folder, tmp_path, what):
    (folder/"planted.py").write_text(PLANT.format(mark=str(tmp_path/"ran")))
    f = folder/("tokenizer_config.json" if what == "tokenizer" else "config.json")
    c = json.loads(f.read_text())
    if what == "tokenizer":
        c |= dict(tokenizer_class="XTok", auto_map={"AutoTokenizer": ["planted.XTok", "planted.XTok"]})
    else:
        c |= dict(
            model_type="planted",
            auto_map={
                "AutoConfig": "planted.XConfig",
                "AutoModel": "planted.XModel",
                "AutoModelForCausalLM": "planted.XModel",
            },
        )
    f.write_text(json.dumps(c))

@pytest.mark.parametrize("what", ["model", "tokenizer"])
@pytest.mark.parametrize("call", ["load_lm({0!r})", "load_encoder({0!r})", "text_vectors(['a'], {0!r})"])
def test_code_in_a_folder_never_runs_and_nobody_is_asked(folder, tmp_path, what, call):
    plant(folder, tmp_path, what)
    run = subprocess.run(
        [sys.executable, "-c", f"from recbook.lm import *\nfrom recbook.text import *\n{call.format(str(folder))}"],
        input="y\nyes\n" * 20,
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert not (tmp_path/"ran").exists() and "[y/N]" not in run.stdout
    if what == "model":
        assert (
            run.returncode == 1
            and "Python code of its own" in run.stderr
            and "trust_remote_code=True" not in run.stderr
        )

def test_remote_code_cannot_be_asked_for(folder):
    with pytest.raises(ValueError, match="never runs code"):
        L.load_lm(str(folder), trust_remote_code=True)
    with pytest.raises(ValueError, match="pickled"):
        L.load_lm(str(folder), use_safetensors=False)

class Planted:
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (self.mark, "w")

@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "pytorch_model-00001-of-00002.bin"])
def test_pickled_weights_are_refused(folder, tmp_path, name):
    (folder/"model.safetensors").unlink()
    torch.save(Planted(str(tmp_path/"ran")), folder/name)
    for f in (L.load_lm, L.load_encoder):
        with pytest.raises(OSError, match="not safetensors") as e:
            f(str(folder))
        assert "weights_only" not in str(e.value) and not (tmp_path/"ran").exists()

def test_pickled_adapters_and_their_bases_are_refused(folder, tmp_path, tok):
    m = L.lora(L.load_lm(str(folder))[0], 2)
    m.save_pretrained(home := tmp_path/"adapter")
    tok.save_pretrained(home)
    c = json.loads((home/"adapter_config.json").read_text()) | dict(base_model_name_or_path=str(folder))
    (home/"adapter_config.json").write_text(json.dumps(c))
    (home/"adapter_model.safetensors").unlink()
    torch.save(Planted(str(tmp_path/"ran")), home/"adapter_model.bin")
    with pytest.raises(OSError, match="adapter_model.bin"):
        L.load_lm(str(home))
    m.save_pretrained(home)
    (home/"adapter_config.json").write_text(json.dumps(c))
    (home/"adapter_model.bin").unlink()
    (folder/"model.safetensors").unlink()
    torch.save(Planted(str(tmp_path/"ran")), folder/"pytorch_model.bin")
    with pytest.raises(OSError, match="pytorch_model.bin"):
        L.load_lm(str(home))
    assert not (tmp_path/"ran").exists()

def test_refusals_say_what_is_wrong(folder, tmp_path):
    with pytest.raises(OSError, match="no folder with a model"):
        L.load_lm("./nowhere/at-all")
    (empty := tmp_path/"empty").mkdir()
    with pytest.raises(OSError, match="no config.json"):
        L.load_lm(str(empty))
    os.truncate(folder/"model.safetensors", 100)
    with pytest.raises(OSError, match="damaged"):
        L.load_lm(str(folder))

def test_a_missing_pad_token_is_borrowed(tmp_path):
    for k, make in enumerate((dict(pad=None), dict(pad=None, eos=None))):
        t = byte_tokenizer(**make)
        d = tmp_path/str(k)
        tiny_model("llama", t).save_pretrained(d)
        t.save_pretrained(d)
        assert L.load_lm(str(d))[1].pad_token is not None
    assert isinstance(AutoTokenizer.from_pretrained(d).pad_token, str | None)
