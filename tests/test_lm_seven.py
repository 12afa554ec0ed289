"Every exported function that takes a model and a tokenizer, on seven architectures, against plain forward passes."
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
from recbook import answers as A, decode as D, finetune as T, text as V
from tiny import TITLES, byte_tokenizer, tiny_model

torch.set_num_threads(1)
SEVEN = ["gpt2", "opt", "qwen2", "llama", "gemma", "phi", "gpt_neox"]
PROMPTS = ["Liked: red fox; blue sky; green tea. Next:", "Next:", "Who wrote it? Answer:"]

@pytest.fixture(scope="module")
def tok(): return byte_tokenizer()

@pytest.fixture(scope="module", params=SEVEN)
def model(request, tok): return tiny_model(request.param, tok).train() # functions must switch dropout off themselves

def ids_of(tok, text): return tok(text).input_ids

@torch.no_grad()
def logits(model, ids):
    "One unpadded pass in eval mode."
    was = model.training
    z = model.eval()(torch.tensor([ids])).logits[0].float()
    model.train(was)
    return z

def logp(model, tok, prompt, answer, eos=False):
    a, x = ids_of(tok, prompt), ids_of(tok, prompt + answer) + [tok.eos_token_id]*eos
    lp = logits(model, x).log_softmax(-1)
    return sum(lp[k-1, x[k]] for k in range(len(a), len(x)))

def test_closed_and_open_answers(model, tok):
    z = A.answer_logits(model, tok, PROMPTS, [" yes", " no", " A"], batch_size=2)
    last = lambda p: [ids_of(tok, p + l)[-1] for l in (" yes", " no", " A")]
    want = torch.stack([logits(model, ids_of(tok, p))[-1, last(p)] for p in PROMPTS])
    assert torch.allclose(z, want, atol=1e-3)
    said = [" red fox", " green tea", " yes no"]
    got = A.sequence_logprob(model, tok, PROMPTS, said, eos=True)
    assert torch.allclose(got, torch.stack([logp(model, tok, p, c, True) for p, c in zip(PROMPTS, said)]), atol=1e-3)
    assert model.training

def test_ranking_and_the_policy_over_a_catalogue(model, tok):
    trie = D.ItemTrie(tok, TITLES)
    want = torch.stack([torch.stack([logp(model, tok, p, " " + t, True) for t in TITLES]) for p in PROMPTS])
    assert torch.allclose(D.rank_items(model, tok, PROMPTS, trie), want, atol=1e-3)
    items, s = D.constrained_beam(model, tok, PROMPTS, trie, k=len(TITLES)) # as wide as the catalogue: exact
    assert torch.allclose(s.gather(1, items.argsort(1)), want, atol=1e-3)
    lp, mass = D.catalogue_policy(model, tok, PROMPTS, trie)
    assert torch.allclose(lp.float(), want.log_softmax(1), atol=1e-3)
    assert torch.allclose(mass.float(), want.exp().sum(1), atol=1e-4)

def test_generation_takes_the_likeliest_token_each_time(model, tok):
    ids = A.prompt_ids(tok, PROMPTS)
    got = D.generated(model, tok, ids, 5, greedy=True)
    for row, x in zip(got, ids):
        x = list(x)
        for t in row.tolist():
            best = int(logits(model, x)[-1].argmax())
            assert t == best
            x.append(best)
            if best == tok.eos_token_id:
                break

def test_draws_inside_the_trie_follow_the_tokens_shares(model, tok):
    trie = D.ItemTrie(tok, ["red fox", "blue sky"])
    n = 400
    got = (D.draw_items(model, tok, [PROMPTS[0]]*n, trie, seed=1) == 0).mean()
    a = ids_of(tok, PROMPTS[0])
    first = [ids_of(tok, PROMPTS[0] + " " + t)[len(a)] for t in ("red fox", "blue sky")]
    p = logits(model, a)[-1, first].softmax(0)[0].item()
    assert abs(got - p) < 4*(p*(1-p)/n)**.5 + .01

def test_losses_and_their_gradients(model, tok):
    rows = [dict(prompt=p, completion=c) for p, c in zip(PROMPTS, [" red fox", " yes", " A B C"])]
    R = T.encode_answers(tok, rows)
    model.eval()
    loss = T.answer_loss(model, R)
    loss.backward()
    got = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    total, n = 0., 0
    for r in rows:
        a, x = ids_of(tok, r["prompt"]), ids_of(tok, r["prompt"] + r["completion"]) + [tok.eos_token_id]
        z = model(torch.tensor([x])).logits[0, len(a)-1:-1]
        total, n = total + F.cross_entropy(z, torch.tensor(x[len(a):]), reduction="sum"), n + len(x) - len(a)
    (total/n).backward()
    assert float(loss) == pytest.approx(float(total/n), abs=1e-3)
    assert all(torch.allclose(got[k], p.grad, atol=1e-3) for k, p in model.named_parameters() if k in got)
    model.zero_grad()
    model.train()

def test_tuning_learns_the_answer_and_leaves_the_model_alone(model, tok):
    before = [p.clone() for p in model.parameters()]
    rows = T.encode_prompts(tok, [dict(prompt="Answer:", completion=" yes"), dict(prompt="Who wrote it? "
                                                                                         "Answer:", completion=" no")])
    own = T.lora(tiny_model(model.config.model_type, tok), 4)
    for m in (model, own):
        new = T.sft(m, rows, 30, 1e-2, device="cpu", progress=False)
        z = T.predictions(new, rows)
        lost = F.cross_entropy(z, rows.y)
        assert lost < F.cross_entropy(T.predictions(m, rows), rows.y)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters())) and model.training

def test_vectors_are_means_of_last_states(model, tok):
    texts = ["red fox", "blue sky green tea song"]
    got = V.pooled(model, tok, texts)
    model.eval()
    with torch.no_grad():
        want = [model.base_model(torch.tensor([ids_of(tok, t)])).last_hidden_state[0].mean(0) for t in texts]
    model.train()
    assert np.allclose(got, torch.stack(want).numpy(), atol=1e-3)

def test_the_meter_counts_what_was_read(model, tok):
    with T.CostMeter(model) as cost:
        A.answer_logits(model, tok, PROMPTS, [" yes"], batch_size=8)
    longest = max(len(ids_of(tok, p)) for p in PROMPTS)
    assert (cost.passes, cost.tokens, cost.total) == (1, 3*longest, model.num_parameters())
