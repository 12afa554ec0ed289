"unlearning: closed forms, explicit inverses, exactness where exactness is promised, bad input."
import ast, copy, json
from functools import partial
import numpy as np, pandas as pd, pytest, torch
import torch.nn.functional as F
from datasets import Dataset
from scipy.spatial.distance import jensenshannon
from sklearn.linear_model import LogisticRegression
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration
from recbook.baselines import bpr_loss
from recbook.collaborative.graph_cf import LightGCN
from recbook.gradients import dense, flatten, grad_of, hvp, params_of
from recbook.lm import mark_ids, nano_tokenizer
from recbook.finetune import agreed_items, history_prompts, lora, macs, upper_layers
from recbook.trust import unlearning as U
from tiny import TITLES, byte_tokenizer, tiny_model

torch.set_num_threads(1)
WORDS = "dark calm merry sea city ghost"
TEXTS = [
    f"Reader {k} likes {a}: {b}?{c}"
    for k in range(4)
    for a in WORDS.split()
    for b in WORDS.split()
    for c in (" yes", " no")
]


@pytest.fixture(scope="module")
def tok(): return nano_tokenizer(TEXTS, 400)

@pytest.fixture
def model(tok):
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tok),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=64,
            tie_word_embeddings=True,
            initializer_range=0.1,
            **mark_ids(tok),
        )
    ).eval()

@pytest.fixture(scope="module")
def rows():
    rng = np.random.default_rng(0)
    df = pd.DataFrame(
        [(k, f"Reader {k} likes {a}: {b} {c}?") for k in range(6) for a, b, c in rng.choice(WORDS.split(), (8, 3))],
        columns=["user", "prompt"],
    ).drop_duplicates("prompt", ignore_index=True)
    return df.assign(completion=rng.choice([" yes", " no"], len(df)))

@pytest.fixture
def parts(tok, rows): return U.encode_prompts(tok, rows[rows.user < 2]), U.encode_prompts(tok, rows[rows.user >= 2])

def adapter(model, seed=1):
    "The model with a LoRA that is not zero."
    m = lora(copy.deepcopy(model), 2, 4, ["q_proj", "v_proj"]).eval()
    torch.manual_seed(seed)
    for p in U.adapter_params(m).values():
        nn.init.normal_(p, std=.1)
    return m

def differ(a, b): return {k for (k, p), q in zip(a.named_parameters(), b.parameters()) if not torch.equal(p, q)}


def test_prompts_have_a_profile_from_ratings_that_are_never_asked_about():
    df = pd.DataFrame(
        [(u, i, 5 if i % 2 else 1, t) for u in range(3) for t, i in enumerate(range(8))],
        columns=["user", "item", "rating", "time"],
    )
    words = [["odd" if i % 2 else "even"] for i in range(8)]
    out = U.click_prompts(df, [f"T{i}" for i in range(8)], words, k=1, history=.5)
    assert (
        set(out.item) == {4, 5, 6, 7}
        and (out[out.part == "train"].item <= 5).all()
        and (out[out.part == "test"].item > 5).all()
    )  # by time
    assert all(p == f"Reader {u} likes odd: T{i}?" for u, i, p in zip(out.user, out.item, out.prompt))
    assert (out.completion == np.where(out.item % 2, " yes", " no")).all()

def test_rows_come_as_a_dataset_a_frame_or_dicts(tok, rows):
    a, *others = (U.encode_prompts(tok, x) for x in (rows, Dataset.from_pandas(rows), rows.to_dict("records")))
    for b in others:
        assert all(torch.equal(x, y) for x, y in zip(a, b))
    assert [tok.decode(y) for y in a.y[:5]] == rows.completion[:5].tolist()
    with pytest.raises(ValueError, match="completion"):
        U.encode_prompts(tok, rows.drop(columns="completion"))
    with pytest.raises(ValueError, match="not a single token"):
        U.encode_prompts(tok, rows.assign(completion=" by no means"))

def test_logits_do_not_depend_on_padding_and_average_over_lists(tok, model, rows):
    some = rows.iloc[:6]
    x = U.encode_prompts(tok, some)
    alone = torch.cat([model(torch.tensor([tok(p).input_ids])).logits[:, -1] for p in some.prompt]).detach()
    torch.testing.assert_close(U.predictions(model, x, batch_size=4), alone, atol=1e-5, rtol=1e-4)
    other = LlamaForCausalLM(model.config).eval()
    torch.testing.assert_close(U.predictions([model, other], x), (U.predictions(model, x) + U.predictions(other, x))/2)

def test_encoder_decoder_models_answer_at_the_first_decoded_token(tok, rows):
    torch.manual_seed(0)
    t5 = T5ForConditionalGeneration(
        T5Config(
            vocab_size=len(tok),
            d_model=16,
            d_kv=8,
            d_ff=32,
            num_layers=1,
            num_heads=2,
            decoder_start_token_id=0,
            **mark_ids(tok),
        )
    ).eval()
    x = U.encode_prompts(tok, rows.iloc[:5])
    want = torch.cat(
        [
            t5(torch.tensor([tok(p).input_ids]), decoder_input_ids=torch.tensor([[0]])).logits[:, -1]
            for p in rows.prompt[:5]
        ]
    )
    torch.testing.assert_close(U.predictions(t5, x), want.detach(), atol=1e-4, rtol=1e-3)
    kw = dict(aug_steps=1, steps=1, warm_steps=1, adapt=partial(U.paper_lora, r=2, target_modules=("q", "v")))
    out = U.e2urec(t5, tok, rows[rows.user < 2], rows[rows.user >= 2], **kw)
    assert all("lora_" in k for k, p in out.named_parameters() if p.requires_grad)


def test_divergences_against_scipy():
    z1, z2 = torch.randn(4, 7, dtype=torch.float64), 3*torch.randn(4, 7, dtype=torch.float64)
    want = jensenshannon(z1.softmax(1).numpy(), z2.softmax(1).numpy(), axis=1)**2
    np.testing.assert_allclose(U.jsd(z1, z2), want, atol=1e-12)
    p, q = z1.softmax(1), z2.softmax(1)
    np.testing.assert_allclose(U.symmetric_kl(z1, z2), ((p-q)*(p/q).log()).sum(1)/2, atol=1e-10)
    far = torch.tensor([[200., 0.]])
    assert U.jsd(far, -far).item() == pytest.approx(np.log(2)) and U.symmetric_kl(far, -far) > 100

def test_the_retrained_model_is_perfect_by_its_own_measures(tok, model, parts):
    f, r = parts
    yes, no = f.y.unique().tolist()
    out = U.evaluate_unlearning(model, copy.deepcopy(model), f, r, r, yes, no)
    assert (
        out["jsd"] == pytest.approx(0, abs=1e-12)
        and out["sym_kl"] == pytest.approx(0, abs=1e-12)
        and out["d_gap"] == out["d_mia"] == 0
    )
    worse = U.sft(model, f, 30, 1e-2, 16)
    seen = U.evaluate_unlearning(worse, model, f, r, r, yes, no)
    assert seen["forget_auc"] > .95 and seen["d_gap"] > .1 and seen["mia"] > .6 and seen["jsd"] > .01


def test_sft_trains_a_copy_and_only_what_requires_a_gradient(model, parts):
    before = copy.deepcopy(model)
    assert differ(U.sft(model, parts[0], 2, seed=3), model) and not differ(model, before)
    a, b = (U.sft(model, parts[0], 3, seed=3) for _ in range(2))
    assert not differ(a, b) and not differ(U.sft(model, parts[0], 0), model)
    m = adapter(model)
    assert all("lora_" in k for k in differ(U.sft(m, parts[0], 2), m))

def test_baselines_move_the_loss_where_they_should(model, parts):
    f, r = parts
    loss = lambda m, x: U.answer_loss(m, x).item()
    start = U.sft(model, U.joined(f, r), 20, 5e-3, 16)
    assert loss(U.gradient_ascent(start, f, 5, 1e-3), f) > loss(start, f)
    assert loss(U.neg_grad(start, f, r, 10, 3e-3, weight=1.), f) > loss(start, f)
    both = f.y.unique().sum() - f.y
    bad = U.bad_teacher(start, f, r, 20, 3e-3, weight=1.)
    assert loss(bad, f._replace(y=both)) < loss(start, f._replace(y=both))
    with pytest.raises(ValueError, match="1 different answers"):
        U.bad_teacher(start, f._replace(y=f.y*0), r._replace(y=r.y*0), 1)

def test_sisa_is_exact(model, tok, rows):
    x, user = U.encode_prompts(tok, rows), torch.tensor(rows.user.to_numpy())
    first = U.sisa(model, x, user, 8, n_shards=2, batch_size=8)
    keep = user != 1
    after = U.sisa(model, U.take(x, keep), user[keep], 8, n_shards=2, before=first, asks=[1], batch_size=8)
    never = U.sisa(model, U.take(x, keep), user[keep], 8, n_shards=2, batch_size=8)  # as if user 1 had never been there
    assert (
        after[0] is first[0]
        and not differ(after[1], never[1])
        and not differ(after[0], never[0])
        and differ(after[1], first[1])
    )
    with pytest.raises(ValueError, match="1 models for 2 shards"):
        U.sisa(model, x, user, 8, n_shards=2, before=first[:1])

def test_macs_counts_matrix_products():
    a, b = torch.randn(3, 4, requires_grad=True), torch.randn(4, 5, requires_grad=True)
    assert macs(lambda: a @ b) == 60 and macs(lambda: (a @ b).sum().backward()) == 180


def test_forgetting_teacher():
    torch.manual_seed(0)
    z_o, z_aug = torch.randn(6, 9), torch.randn(6, 9)
    t = U.forgetting_teacher(z_o, z_aug, 2.)
    np.testing.assert_allclose(t, np.where(z_aug > z_o, z_o - 2*(z_aug - z_o), z_o), atol=1e-6)
    assert torch.equal(U.forgetting_teacher(z_o, z_aug, 0.), z_o) and torch.equal(U.forgetting_teacher(z_o, z_o), z_o)
    p = lambda *a, **k: U.forgetting_teacher(*a, **k).softmax(1)
    torch.testing.assert_close(p(z_o, z_aug + 7, normalise=True), p(z_o, z_aug, normalise=True))
    torch.testing.assert_close(
        p(z_o, z_aug - 20), z_o.softmax(1)
    )  # the raw form is switched off by a shift that no prediction sees
    torch.testing.assert_close(p(z_o, z_aug + 20, 1.), p(2*z_o - z_aug, z_o, 0.)) # shifted up: all is subtracted
    torch.testing.assert_close(p(z_o, z_aug, 1., one_sided=False), (2*z_o - z_aug).softmax(1))
    with pytest.raises(ValueError, match="same rows"):
        U.forgetting_teacher(z_o, z_aug[:3])

def test_e2urec_loss_against_kl(model, parts):
    f, r = (U.take(x, slice(5)) for x in parts)
    p = lambda: torch.rand(5, model.config.vocab_size).softmax(1)
    p_o, p_f = p(), p()
    zf, zr = U.predictions(model, f), U.predictions(model, r)
    ce = lambda t, z: F.kl_div(z.log_softmax(1), t, reduction="batchmean") - (t*t.log()).sum(1).mean()
    want = .3*ce(p_f, zf) + .7*(ce(p_o, zr) + F.cross_entropy(zr, r.y))
    torch.testing.assert_close(U.e2urec_loss(model, (*r, p_o, *f, p_f), beta=.3), want, atol=1e-5, rtol=1e-5)

SMALL = dict(aug_steps=3, aug_lr=1e-3, adapt=partial(U.paper_lora, r=2, alpha=4), batch_size=8, lr=1e-2)

def test_e2urec_without_steps_is_the_original_and_only_adapters_move(tok, model, rows, parts):
    original = copy.deepcopy(model)
    f, r = rows[rows.user < 2], rows[rows.user >= 2]
    nothing = U.e2urec(model, tok, f, r, warm_steps=0, steps=0, **SMALL)
    torch.testing.assert_close(U.predictions(nothing, parts[1]), U.predictions(model, parts[1]), atol=1e-5, rtol=1e-4)
    student = U.e2urec(model, tok, f, r, warm_steps=2, steps=3, **SMALL)
    base = {
        k.replace("base_model.model.", "").replace(".base_layer", ""): p
        for k, p in student.named_parameters()
        if "lora_" not in k
    }
    assert set(base) == {k for k, _ in original.named_parameters()} and all(
        torch.equal(base[k], p) for k, p in original.named_parameters()
    )
    assert not differ(model, original) # the reader's model is not touched
    assert (U.predictions(student, parts[0]) - U.predictions(model, parts[0])).abs().max() > 1e-3
    again = U.e2urec(model, tok, f, r, warm_steps=2, steps=3, **SMALL)
    assert not differ(student, again) # same seed, same numbers

def test_e2urec_on_a_peft_model_and_towards_its_teacher(tok, model, parts):
    f, r = parts
    m = adapter(model)
    original = U.merged(m)
    z_o = U.predictions(original, f)
    torch.testing.assert_close(z_o, U.predictions(m, f), atol=1e-5, rtol=1e-4)
    assert all(p.requires_grad for p in original.parameters()) # else the augmented model could not learn
    z_aug = U.predictions(U.sft(original, f, 20, 3e-3, 8, 0), f)
    t = U.forgetting_teacher(z_o, z_aug, 2., True)
    student = U.e2urec(
        m,
        tok,
        f,
        r,
        beta=1.,
        teacher=partial(U.forgetting_teacher, normalise=True),
        adapt=partial(U.paper_lora, r=4, alpha=4, dropout=0.),
        aug_steps=20,
        aug_lr=3e-3,
        warm_steps=0,
        steps=60,
        batch_size=8,
        lr=1e-2,
    )
    assert U.jsd(U.predictions(student, f), t).mean() < U.jsd(z_o, t).mean()

def test_requests_that_cannot_be_answered(tok, model, rows):
    f, r = rows[rows.user < 2], rows[rows.user >= 2]
    m = adapter(model)
    for method, x in ((U.e2urec, model), (U.llmeraser, m)):
        with pytest.raises(ValueError, match="forget set is empty"):
            method(x, tok, [], r)
        with pytest.raises(ValueError, match="everything is to be forgotten"):
            method(x, tok, rows, [])
        with pytest.raises(ValueError, match="in both sets.*Reader 1"):
            method(x, tok, f, pd.concat([r, rows[rows.user == 1].iloc[:1]]))
    with pytest.raises(ValueError, match="no adapters"):
        U.llmeraser(model, tok, f, r)
    with pytest.raises(ValueError, match="one for one"):
        U.llmeraser(m, tok, f, r, replace=f[:1])
    with pytest.raises(ValueError, match="kind='newton'"):
        U.llmeraser(m, tok, f, r, kind="newton", steps=1)
    with pytest.raises(ValueError, match="asks for nothing"):
        U.request_gradient(m, 5)


class Logistic(nn.Module):
    def __init__(self, d):
        super().__init__()
        self.f = nn.Linear(d, 1, bias=False, dtype=torch.float64)
    def forward(self, x): return self.f(x)[:, 0]

RIDGE = .02
def data_loss(m, b): return F.binary_cross_entropy_with_logits(m(b[0]), b[1])
def risk(m, b): return data_loss(m, b) + RIDGE/2*m.f.weight.square().sum()

def optimum(X, y, n):
    "The minimum of sum(loss)/n + RIDGE/2 |theta|^2, by scikit-learn."
    m = Logistic(X.shape[1])
    fit = LogisticRegression(C=1/(RIDGE*n), fit_intercept=False, tol=1e-12, max_iter=10_000).fit(X.numpy(), y.numpy())
    with torch.no_grad():
        m.f.weight.copy_(torch.from_numpy(fit.coef_))
    return m

@pytest.fixture(scope="module")
def logistic():
    rng = np.random.default_rng(0)
    X = torch.from_numpy(rng.normal(size=(400, 5)))
    y = torch.from_numpy((X.numpy() @ rng.normal(size=5) + rng.logistic(size=400) > 0).astype(float))
    X2, y2 = X.clone(), y.clone()
    X2[:12] += .5*torch.from_numpy(rng.normal(size=(12, 5)))
    y2[:12] = 1 - y[:12]
    return X, y, X2, y2

@pytest.mark.parametrize("kind", ["IR", "QM", "RC"])
def test_the_step_is_what_retraining_does(logistic, kind):
    X, y, X2, y2 = logistic
    n = len(y)
    after = None if kind == "IR" else (X2[:12], y[:12]) if kind == "QM" else (X[:12], y2[:12])
    m, P = (m := optimum(X, y, n)), params_of(m)
    b = U.request_gradient(m, n, (X[:12], y[:12]), after, P, data_loss, chunk=5)
    H = dense(lambda v: hvp(m, risk, (X, y), v, P), flatten(P).detach())
    rest = slice(12, None)
    Xn, yn = (X[rest], y[rest]) if after is None else (torch.cat([after[0], X[rest]]), torch.cat([after[1], y[rest]]))
    true = flatten(params_of(optimum(Xn, yn, n))).detach() - flatten(P).detach()
    step = -torch.linalg.solve(H, b)
    assert F.cosine_similarity(step, true, dim=0) > .99 and (step - true).norm() < .2*true.norm() # sign and size
    solved = U.stochastic_solve(U.curvature_products(m, (X, y), P, "hessian", 400, loss=risk), b, 800, .02)
    torch.testing.assert_close(solved, step, atol=2e-4*step.norm().item(), rtol=1e-2) # against the explicit inverse

def test_solver_on_minibatches_damped_and_doubled():
    g = torch.Generator().manual_seed(0)
    J = torch.randn(256, 6, generator=g, dtype=torch.float64)
    H = J.T @ J/256
    b = torch.randn(6, generator=g, dtype=torch.float64)
    def products():
        while True:
            for k in torch.randperm(256, generator=g).split(64):
                yield lambda v, R=J[k]: R.T @ (R @ v)/len(R)
    want = -torch.linalg.solve(H + .5*torch.eye(6), b)
    torch.testing.assert_close(U.stochastic_solve(products(), b, 4000, .02, damping=.5), want, atol=.03, rtol=.03)
    full = iter(lambda: lambda v: H @ v, 0)
    half = iter(lambda: lambda v: .5*(H @ v), 0)
    torch.testing.assert_close(
        U.stochastic_solve(half, b, 4000, 0.05), 2 * U.stochastic_solve(full, b, 4000, 0.05), atol=1e-3, rtol=1e-3
    )
    assert U.stochastic_solve(full, b, 20, 1e-5).abs().max() <= 20*1e-5*1.01 # the authors' default hardly moves
    with pytest.raises(ValueError, match="steps=-1"):
        U.stochastic_solve(full, b, -1, .1)

def test_adapter_curvature_against_autograd(model, parts):
    m, x = adapter(model).double(), U.take(parts[1], slice(3))
    P = U.adapter_params(m)
    v = torch.randn(sum(p.numel() for p in P.values()), dtype=torch.float64)
    n = len(x.y)
    Hv, Gv = (next(U.curvature_products(m, x, P, k, n))(v) for k in ("hessian", "ggn"))
    def moved(e):
        c = copy.deepcopy(m)
        Q = U.adapter_params(c)
        U.add_(Q, e*v/v.norm())
        return grad_of(c, U.answer_loss, x, Q).detach()
    e = 1e-3 # Llama normalises in single precision
    torch.testing.assert_close(Hv, (moved(e) - moved(-e))/(2*e)*v.norm(), atol=2e-3*Hv.norm().item(), rtol=1e-2)
    J = []
    z = U.next_logits(m, x)
    for k in range(n):
        J.append(
            torch.stack(
                [
                    flatten(dict(zip(P, torch.autograd.grad(z[k, c], list(P.values()), retain_graph=True))))
                    for c in range(z.shape[1])
                ]
            )
        )
    p = z.detach().softmax(1)
    want = sum(j.T @ (q*(j @ v) - q*(q @ (j @ v))) for j, q in zip(J, p))/n
    torch.testing.assert_close(Gv, want, atol=1e-5*want.norm().item(), rtol=1e-3)
    assert v @ Gv >= 0

def test_the_hessian_of_a_lora_is_indefinite_and_gauss_newton_is_not(model, parts):
    m, x = lora(copy.deepcopy(model), 1, 2, ["v_proj"]).double().eval(), parts[1]
    P = U.adapter_params(m)
    like = flatten(P).detach()
    H, G = (dense(next(U.curvature_products(m, x, P, k, len(x.y))), like) for k in ("hessian", "ggn"))
    torch.testing.assert_close(H, H.T, atol=1e-7, rtol=1e-3) # Llama normalises in single precision
    assert torch.linalg.eigvalsh(H)[0] < -1e-5 and torch.linalg.eigvalsh(G)[0] > -1e-7

def test_llmeraser_moves_the_adapter_only_and_nothing_for_nothing(tok, model, rows):
    f, r = rows[rows.user < 2], rows[rows.user >= 2]
    m = adapter(model)
    before = copy.deepcopy(m)
    kw = dict(steps=5, lr=1e-3, batch_size=16)
    assert not differ(U.llmeraser(m, tok, f, r, replace=f, **kw), m)  # replaced by themselves
    for replace in (
        None,
        f.assign(completion=np.where(f.completion == " yes", " no", " yes")),
        f.assign(prompt=f.prompt.str.replace("Reader", "Reader 9")),
    ):
        changed = differ(U.llmeraser(m, tok, f, r, replace=replace, **kw), m)
        assert changed and all("lora_" in k for k in changed)
    assert not differ(m, before)

def test_settle_ends_at_a_regularised_minimum_and_moves_the_adapter_only(model, parts):
    m, rows = lora(copy.deepcopy(model), 4, 32, ["lm_head"]).eval(), parts[1]
    before = copy.deepcopy(m)
    out, took = U.settle(m, rows, ridge=.05, steps=200, tol=1e-3)
    P = U.adapter_params(out)
    g = (grad_of(out, U.answer_loss, rows, P) + .05*flatten(P)).detach()
    assert (
        g.abs().max() < 1e-3 * 1.01
        and took["gradient"] == pytest.approx(g.abs().max().item(), rel=0.2, abs=1e-5)
        and took["start"] > 10 * took["gradient"]
        and took["evaluations"] > 3
    )
    assert not differ(m, before) and all("lora_" in k for k in differ(out, m))
    here, none = U.settle(out, rows, ridge=.05, steps=0)
    assert not differ(here, out) and none["evaluations"] == 0
    back = U.settle(here, rows, ridge=.05, steps=5, tol=2e-3)[0] # already there
    assert not differ(back, out)
    with pytest.raises(ValueError, match="no adapters"):
        U.settle(model, rows)

def test_full_product_and_conjugate_gradients_against_an_explicit_inverse(tok, model, rows):
    f, r = rows[rows.user < 2], rows[rows.user >= 2]
    m = lora(copy.deepcopy(model), 1, 2, ["v_proj"]).eval()
    torch.manual_seed(2)
    for p in U.adapter_params(m).values():
        nn.init.normal_(p, std=.1)
    x = U.joined(U.encode_prompts(tok, f), U.encode_prompts(tok, r))
    P = U.adapter_params(m)
    like = flatten(P).detach()
    H = dense(U.full_product(m, x, P, batch_size=7), like)
    torch.testing.assert_close(
        H, dense(next(U.curvature_products(m, x, P, batch_size=len(x.y))), like), atol=1e-6, rtol=1e-3
    )
    b = U.request_gradient(m, len(x.y), U.encode_prompts(tok, f), None, P)
    out = U.llmeraser(m, tok, f, r, solver="cg", damping=.05, tol=1e-5)
    want = -torch.linalg.solve(H + .05*torch.eye(len(like)), b)
    got = flatten(U.adapter_params(out)).detach() - like
    torch.testing.assert_close(got, want, atol=1e-3*want.abs().max().item(), rtol=1e-2)
    with pytest.raises(ValueError, match="solver='sgd'"):
        U.llmeraser(m, tok, f, r, solver="sgd")

def test_at_a_minimum_a_step_points_to_the_retrained_adapter(tok, model, parts):
    f, r = U.take(parts[0], slice(2)), parts[1]
    both = U.joined(f, r)
    n = len(both.y)
    ridge = .05
    start = lora(copy.deepcopy(model), 4, 32, ["lm_head"]).eval() # the output layer: where the formula holds well
    m = U.settle(start, both, ridge, 200, 1e-5)[0]
    true = U.settle(m, r, ridge*n/len(r.y), 200, 1e-5)[0]
    theta = lambda x: flatten(U.adapter_params(x)).detach()
    step, change = (
        theta(U.llmeraser(m, tok, f, r, solver="cg", damping=ridge, tol=1e-4)) - theta(m),
        theta(true) - theta(m),
    )
    assert F.cosine_similarity(step, change, dim=0) > .9 and (step - change).norm() < change.norm()

def test_a_small_step_raises_the_loss_of_what_is_removed(tok, model, parts):
    f, r = parts
    m = U.sft(adapter(model), U.joined(f, r), 40, 1e-2, 16)
    out = U.llmeraser(m, tok, f, r, steps=20, lr=2e-3, damping=.1)
    assert U.answer_loss(out, f) > U.answer_loss(m, f)


EDGES = np.array([(u, i) for u in range(6) for i in range(5) if (3*u + i) % 4 < 2])

def test_request_graph_against_dense():
    A = U.edge_graph(EDGES[:7], 6, 5).to_dense().numpy()
    B = np.zeros((11, 11))
    for u, i in EDGES[:7]:
        B[u, 6+i] = B[6+i, u] = 1
    d = B.sum(1)
    d[d == 0] = 1
    np.testing.assert_allclose(A, B/np.sqrt(np.outer(d, d)), atol=1e-6)
    assert U.edge_graph(EDGES[:0], 6, 5).to_dense().abs().sum() == 0

def encoder(offset=True, L=3, seed=0):
    torch.manual_seed(seed)
    return U.InfluenceEncoder(torch.randn(11, 4), torch.randn(11, 4), L=L, offset=offset)

def test_encoder_against_dense_and_as_identity():
    enc, A = encoder(), U.edge_graph(EDGES[:7], 6, 5)
    D = A.to_dense()
    assert torch.equal(enc.H0, torch.zeros(11, 4)) and torch.allclose(enc(U.edge_graph(EDGES[:0], 6, 5)), enc.E0)
    nn.init.normal_(enc.H0)
    nn.init.uniform_(enc.eta)
    H = enc.H0 + D @ enc.H0 + D @ D @ enc.H0 + D @ D @ D @ enc.H0
    x = H - .1*(D @ D @ D @ (enc.eta*enc.E))
    act = lambda t: torch.where(t > 0, t, .99*t)
    torch.testing.assert_close(enc(A), enc.E0 + act(act(x)), atol=1e-5, rtol=1e-5)
    enc.offset = False
    torch.testing.assert_close(enc(A), enc.E0 + act(act(x - enc.H0)), atol=1e-5, rtol=1e-5)

def test_only_the_form_without_offset_leaves_the_others_alone():
    few = EDGES[:3]
    touched = np.unique(np.r_[few[:, 0], 6 + few[:, 1]])
    rest = np.setdiff1d(np.arange(11), touched)
    for offset in (True, False):
        enc = encoder(offset)
        nn.init.normal_(enc.H0)
        change = (enc(U.edge_graph(few, 6, 5)) - enc.E0).abs().sum(1)
        assert (change[touched] > 0).all() and bool((change[rest] == 0).all()) != offset

def test_graph_losses():
    S, S0 = torch.randn(4, 4, dtype=torch.float64), torch.randn(4, 4, dtype=torch.float64)
    lp = lambda S: np.log(np.exp(S.numpy())/np.exp(S.numpy()).sum(1, keepdims=True)).diagonal()
    assert U.keep_loss(S, S0).item() == pytest.approx(((lp(S) - lp(S0))**2).mean()) and U.keep_loss(S, S) == 0
    assert torch.isfinite(U.keep_loss(S + 1e4, S0)) # exponentiating the raw scores would overflow
    V, I = torch.randn(6, 3), torch.randn(5, 3)
    s = (V[EDGES[:, 0]]*I[EDGES[:, 1]]).sum(1)
    torch.testing.assert_close(U.push_loss(V, I, EDGES), -torch.sigmoid(-s).log().mean(), atol=1e-6, rtol=1e-5)
    a, b = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    a.requires_grad_()
    C = (F.normalize(a, dim=1) @ F.normalize(b, dim=1).T)
    want = F.cross_entropy(C, torch.arange(5))
    got = U.contrast_loss(a, b)
    torch.testing.assert_close(got, want)
    got.backward()
    assert a.grad is None and b.grad is not None # one side is held fixed

def test_pretraining_moves_H_and_eta_only_and_pushes_requests_down():
    rng = np.random.default_rng(0)
    n, m = 30, 20
    edges = np.array([(u, i) for u in range(n) for i in range(m) if rng.random() < (.5 if u % 2 == i % 2 else .02)])
    torch.manual_seed(0)
    E0 = torch.where(torch.arange(n+m)[:, None] % 2 == 0, 1., -1.)*torch.tensor([1., 0, 0, 0]) + .1*torch.randn(n+m, 4)
    enc = U.InfluenceEncoder(E0, torch.cat(U.Graph(edges, n, m).embed(E0)))
    before = copy.deepcopy(enc.state_dict())
    U.pretrain_encoder(enc, edges, n, m, epochs=40, lr=.01, batch_size=64)
    assert {k for k, v in enc.state_dict().items() if not torch.equal(v, before[k])} == {"H0", "eta"}
    gone = rng.random(len(edges)) < .1
    f, rest = edges[gone], edges[~gone] # a request it has not been trained on
    mean = lambda E: (lambda V, I: (V[f[:, 0]]*I[f[:, 1]]).sum(1).mean())(*U.Graph(rest, n, m).embed(E))
    assert mean(enc(U.edge_graph(f, n, m))) < mean(enc.E0)
    with pytest.raises(ValueError, match="share=1"):
        U.pretrain_encoder(encoder(), EDGES, 6, 5, share=1.)

def light(edges=EDGES, seed=0):
    torch.manual_seed(seed)
    m = LightGCN(U.edge_graph(edges, 6, 5), 6, 4)
    nn.init.normal_(m.E0)
    return m

def score_of(m, f=EDGES[:3]):
    V, I = m()
    return (V[f[:, 0]]*I[f[:, 1]]).sum(1).mean()

def test_answers_to_a_request_are_models_on_the_remaining_graph():
    f, rest = EDGES[:3], EDGES[3:]
    m = light()
    enc = InfluenceEncoderOf(m)
    nn.init.normal_(enc.H0)
    before = [p.clone() for p in (*enc.parameters(), m.E0)]
    dropped = U.graph_model(U.Graph(rest, 6, 5), m.E0)
    asked = U.Graph(rest, 6, 5).sample(*torch.from_numpy(rest.T.copy())) # the pairs that `valid=rest` asks about
    def loss(x): return U.pair_loss(x.E0, *x(), asked).item()

    def margin(x):
        S = (lambda V, I: V @ I.T)(*x())[0]
        return S[[0, 1, 4]].mean() - S[[2, 3]].mean()  # of user 0, who asks

    torch.testing.assert_close(torch.cat(dropped()), torch.cat(U.Graph(rest, 6, 5).embed(m.E0)))
    torch.testing.assert_close(torch.cat(U.unlearn_edges(m, f, rest, 6, 5, steps=0)()), torch.cat(dropped()))
    torch.testing.assert_close(U.unlearn_edges(enc, f, rest, 6, 5, steps=0).E0, enc(U.edge_graph(f, 6, 5)))
    for start in (m, enc):
        first = U.unlearn_edges(start, f, rest, 6, 5, steps=0)
        out = U.unlearn_edges(start, f, rest, 6, 5, steps=20, lr=.02, loss=partial(U.request_loss, push=1.))
        assert isinstance(out, LightGCN) and score_of(out) < score_of(first)
        assert margin(U.unlearn_edges(start, f, rest, 6, 5, steps=20, lr=.02, loss=U.ascent_loss)) < margin(first)
        held = U.unlearn_edges(start, f, rest, 6, 5, steps=20, lr=1., valid=rest)
        assert loss(held) <= loss(first) # the best step is kept
    assert all(torch.equal(a, b) for a, b in zip(before, (*enc.parameters(), m.E0))) # what is given is not touched

def InfluenceEncoderOf(m): return U.InfluenceEncoder(m.E0.detach(), torch.cat(m()).detach())

def test_tuning_moves_the_mlp_too():
    f, rest = EDGES[:3], EDGES[3:]
    enc = InfluenceEncoderOf(light())
    nn.init.normal_(enc.H0)
    x = enc.influence(U.edge_graph(f, 6, 5)).detach()
    one = U.unlearn_edges(
        enc, f, rest, 6, 5, steps=1, lr=0.01, batch_size=99
    ).E0.detach()  # Adam's first step moves whatever has a gradient by lr
    with_mlp = (one - enc(U.edge_graph(f, 6, 5))).abs().max()
    assert with_mlp > .0101 and x.abs().max() > .1 # more than the embeddings alone could move

def test_losses_of_the_graph_against_the_recommenders_own():
    m = light()
    batch = tuple(torch.tensor(t) for t in ([0, 1, 2], [1, 2, 3], [4, 0, 0]))
    torch.testing.assert_close(U.pair_loss(m.E0, *m(), batch, l2=.1), bpr_loss(m, batch, .1))
    f, rest = EDGES[:3], EDGES[3:]
    far = U.unlearn_edges(m, f, rest, 6, 5, steps=60, lr=.05, loss=partial(U.request_loss, push=1.), seed=1)
    near = U.unlearn_edges(m, f, rest, 6, 5, steps=60, lr=.05, loss=partial(U.request_loss, push=1., keep=5.), seed=1)
    u, i = (torch.from_numpy(c) for c in rest.T.copy())
    V0, I0 = m()
    off = lambda x: U.keep_loss(*(V[u] @ I[i].T for V, I in (x(), (V0, I0)))).item()
    assert off(near) < off(far) # L_p holds what remains

def gif(m, f, rest, **kw): return U.graph_influence(m, f, rest, 6, 5, **kw)

@pytest.mark.parametrize("method", [partial(U.unlearn_edges, n_users=6, n_items=5), gif], ids=["unlearnrec", "gif"])
def test_edge_requests_that_cannot_be_answered(method):
    f, rest = EDGES[:3], EDGES[3:]
    m = light()
    for a, b, why in (
        (f[:0], rest, "nothing to forget"),
        (EDGES, EDGES[:0], "nothing remains"),
        (f, np.r_[rest, f[:1]], r"1 edge.*both sets, such as \(0, 0\)"),
        (f + [0, 4], rest, "item outside 0..4"),
        (f*1.5, rest, "must hold integers"),
        (f[:, :1], rest, "[Ss]hape"),
        (np.r_[f, f], rest, "repeated"),
        (f, rest[1:], "not what the model was trained on"),
        (np.array([[5, 4]]) if [5, 4] not in EDGES.tolist() else np.array([[5, 3]]), EDGES, "not what the model"),
    ):
        with pytest.raises(ValueError, match=why):
            method(m, a, b)

def test_a_model_of_other_users_is_refused_and_an_encoder_knows_its_graph():
    with pytest.raises(ValueError, match="the model has others, 11 in all"):
        U.unlearn_edges(light(), EDGES[:3], EDGES[3:], 7, 5)
    enc = InfluenceEncoderOf(light())
    U.pretrain_encoder(enc, EDGES, 6, 5, epochs=1)
    U.unlearn_edges(enc, EDGES[:3], EDGES[3:], 6, 5, steps=0)
    with pytest.raises(ValueError, match="not what the model was trained on"):
        U.unlearn_edges(enc, EDGES[:3], EDGES[4:], 6, 5, steps=0)

def pair_risk(A, E0, rows, n):
    "BPR of fixed triples over n, with dense algebra: three steps of smoothing, averaged with the start."
    E = sum(torch.linalg.matrix_power(A, k) @ E0 for k in range(4))/4
    u, i, j = rows
    return F.softplus(-(E[u]*(E[i] - E[j])).sum(1)).sum()/n

def triples(n=40):
    g = torch.Generator().manual_seed(0)
    return torch.stack([torch.randint(6, (n,), generator=g), *(6 + torch.randint(5, (2, n), generator=g))])

def test_gif_gradient_and_gauss_newton_products_against_dense_autograd():
    m, rows = light(), triples()
    g = U.Graph(EDGES, 6, 5)
    A, E0 = g.A.to_dense(), m.E0.detach()
    P = U.Pairwise(g, E0, rows, 40)
    f = lambda e: pair_risk(A, e.view(11, 4), rows, 40)
    torch.testing.assert_close(P.slope(), torch.func.grad(f)(E0.flatten()), atol=1e-6, rtol=1e-4)
    S = sum(torch.linalg.matrix_power(A, k) for k in range(4))/4
    z = lambda e: U.margins(S @ e.view(11, 4), rows)
    J = torch.func.jacrev(z)(E0.flatten())
    p = torch.sigmoid(z(E0.flatten()))
    want = J.T @ torch.diag(p*(1 - p)/40) @ J
    torch.testing.assert_close(dense(P.product, E0.flatten()), want, atol=1e-6, rtol=1e-4)

def test_gif_is_the_newton_step_on_the_graph_that_remains():
    f, rest, m = EDGES[:2], EDGES[2:], light()
    full, left = U.Graph(np.r_[rest, f], 6, 5), U.Graph(rest, 6, 5)
    out = gif(m, f, rest, damping=.1, negatives=2, tol=1e-6)
    u, i, j = U.Graph(np.r_[rest, f], 6, 5).sample(*torch.as_tensor(full.edges.repeat(2, 0).T))
    rows, E0 = torch.stack([u, 6 + i, 6 + j]), m.E0.detach()
    slope = lambda A, r: torch.func.grad(lambda e: pair_risk(A, e, r, len(u)))(E0).flatten()
    b = slope(left.A.to_dense(), rows[:, :2*len(rest)]) - slope(full.A.to_dense(), rows) # loss and smoothing change
    C = dense(U.Pairwise(full, E0, rows, len(u)).product, E0.flatten()) + .1*torch.eye(44)
    torch.testing.assert_close(out.E0.detach() - E0, -torch.linalg.solve(C, b).view(11, 4), atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(out.A.to_dense(), left.A.to_dense())
    assert score_of(out, f) < score_of(U.graph_model(left, E0), f) # and the forgotten edges fall


def cohorts():
    "The chapter's own functions that draw readers, with its smoke parameters."
    from recbook.data import root
    from functools import cache
    from recbook.world import World
    nb = json.loads((root()/"nbs/trust/02_unlearning.ipynb").read_text(encoding="utf-8"))["cells"]
    space = dict(np=np, World=World, Remembered=cache, click_prompts=U.click_prompts, for_tuning=[1000, 1001])
    wanted = {"make_world", "item_words", "described", "prompts_of", "readers_for", "cohort", "club"}
    for c in nb:
        source = "".join(c["source"])
        if c["cell_type"] == "code" and c["metadata"].get("tags") == ["parameters"]:
            exec(source, space)
        elif c["cell_type"] == "code" and not source.startswith("#|") and not source.startswith("%"):
            names = {n.name for n in ast.parse(source).body if isinstance(n, ast.FunctionDef)}
            if names & wanted:
                exec(source, space)
    return space

def test_any_seed_has_readers_and_none_of_them_is_tuned_or_practised_on():
    c = cohorts()
    users = {s: set(c["cohort"](s).user) for s in (0, 1, 4, 5, 7, 123, 999, 1002, 10**6, 1000, 1001)}
    assert all(len(u) == c["n_users"] for u in users.values())
    tuned = users.pop(1000) | users.pop(1001)
    reported = set().union(*users.values())
    practised = set(range(25*c["n_users"], 30*c["n_users"]))
    assert not reported & tuned and not reported & practised and not tuned & practised
    assert len({frozenset(u) for u in users.values()}) == len(users)  # each seed draws its own
    assert set(c["club"](5).user) <= set(range(20*c["n_users"])) and not set(c["club"](1001).user) & reported
    for s in (5, 10**6):
        assert c["cohort"](s).equals(c["cohort"](s))


def test_the_last_layers_answer_as_the_whole_model_and_unlearn_like_any_other():
    tok = byte_tokenizer()
    whole = tiny_model("llama", tok)
    rows = pd.DataFrame([(p, f"{p} {t}?") for p in WORDS.split() for t in TITLES], columns=["user", "prompt"])
    x = U.encode_prompts(tok, rows.assign(completion=np.resize([" yes", " no", " no"], len(rows))))
    top = upper_layers(whole, tok, 1, torch.float32)
    torch.testing.assert_close(U.predictions(top, x, 7), U.predictions(whole, x), atol=1e-4, rtol=1e-4)
    f, r = (U.take(x, slice(*k)) for k in ((0, 6), (6, None)))
    student = U.e2urec(top, tok, f, r, aug_steps=1, steps=1, warm_steps=1, adapt=partial(U.paper_lora, r=2))
    assert not torch.allclose(U.predictions(student, f), U.predictions(top, f))
    torch.testing.assert_close(U.predictions(top, x), U.predictions(whole, x), atol=1e-4, rtol=1e-4)
    trained = U.sft(top, x, 1)
    same = {k for k, p in trained.named_parameters() if torch.equal(p, dict(top.named_parameters())[k])}
    assert not same and all(k.startswith(("model.layers.0.", "model.norm")) for k, _ in trained.named_parameters())
    with pytest.raises(ValueError, match="n=3"):
        upper_layers(whole, tok, 3)
    with pytest.raises(ValueError, match="like a Llama"):
        upper_layers(tiny_model("gpt2", tok), tok, 1)

def test_the_last_layers_keep_a_first_mark_that_also_pads():
    tok = byte_tokenizer()
    tok.pad_token = tok.bos_token # as where one mark begins, ends and fills up
    assert tok("a").input_ids[0] == tok.pad_token_id
    whole = tiny_model("llama", tok)
    rows = pd.DataFrame(dict(prompt=["a?", "a much longer question?"], completion=[" yes", " no"]))
    x = U.encode_prompts(tok, rows)
    top = upper_layers(whole, tok, 1, torch.float32)
    torch.testing.assert_close(U.predictions(top, x), U.predictions(whole, x), atol=1e-4, rtol=1e-4)

def test_history_prompts_ask_users_with_enough_ratings_about_what_others_agree_on():
    rows = [(u, i, 5 if i < 4 else 1) for u in range(4) for i in range(8 if u else 3)]
    df = pd.DataFrame(rows, columns=["user", "item", "rating"])
    assert set(agreed_items(df, 3, 4)) == {0, 1, 2} # only these have four ratings
    low, high = agreed_items(df, 1, 3)
    assert low >= 4 and high < 4
    out = history_prompts(df, [f"T{i}" for i in range(8)], k=1, each=8, history=.5)
    assert set(out.user) == {1, 2, 3} and len(out) == 12
    assert out.prompt.str.fullmatch(r'Reader \d likes "T\d": T\d\?').all()
