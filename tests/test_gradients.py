"Gradients, Hessian and Gauss-Newton products against autograd's own functions, finite differences and dense solves."
import pytest, torch
from torch import nn
from recbook.gradients import add_, dense, flatten, ggn_vp, grad_of, hvp, params_of, per_sample_grads, solve, unflatten

ce = lambda m, b: nn.functional.cross_entropy(m(b[0]), b[1])


@pytest.fixture
def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, 4)).double()


@pytest.fixture
def data():
    g = torch.Generator().manual_seed(1)
    return torch.randn(30, 3, generator=g).double(), torch.randint(4, (30,), generator=g)


def test_choosing_parameters(net):
    assert list(params_of(net)) == [k for k, _ in net.named_parameters()]
    assert list(params_of(net, ["2.bias", "0.weight"])) == ["0.weight", "2.bias"] # the model's order
    net[0].weight.requires_grad_(False)
    assert "0.weight" not in params_of(net) and "0.weight" in params_of(net, ["0.weight"])
    with pytest.raises(ValueError, match="nope"):
        params_of(net, ["nope"])
    with pytest.raises(ValueError, match="no parameters chosen"):
        params_of(net, lambda k: False)


def test_flatten_and_back(net):
    theta = params_of(net)
    v = torch.randn(2, len(flatten(theta))).double()
    parts = unflatten(v, theta)
    assert parts["0.weight"].shape == (2, 5, 3)
    torch.testing.assert_close(flatten({k: x[1] for k, x in parts.items()}), v[1])
    with pytest.raises(ValueError, match="a vector of 3"):
        unflatten(v[0, :3], theta)
    before = flatten(theta).clone()
    add_(theta, v[0], -.5)
    torch.testing.assert_close(flatten(theta), before - .5*v[0])


@pytest.mark.parametrize("names", [None, ["2.weight"]])
@pytest.mark.parametrize("vectorize", [True, False])
def test_per_sample_gradients_equal_one_backward_each(net, data, names, vectorize):
    theta = params_of(net, names)
    G = per_sample_grads(net, ce, data, theta, chunk_size=7, vectorize=vectorize)
    assert not G.requires_grad
    for i in (0, 13, 29):
        net.zero_grad()
        ce(net, (data[0][i:i+1], data[1][i:i+1])).backward()
        torch.testing.assert_close(G[i], torch.cat([p.grad.reshape(-1) for p in theta.values()]))


def test_gradient_of_a_frozen_parameter_leaves_it_frozen(net, data):
    for p in net.parameters():
        p.requires_grad_(False)
    theta = params_of(net, ["0.bias"])
    assert grad_of(net, ce, data, theta).norm() > 0 and hvp(net, ce, data, torch.ones(5).double(), theta).norm() > 0
    assert (
        ggn_vp(
            net,
            lambda m, b: m(b[0]),
            lambda y, b: nn.functional.cross_entropy(y, b[1]),
            data,
            torch.ones(5).double(),
            theta,
        ).norm()
        > 0
    )
    assert not any(p.requires_grad for p in net.parameters())


def test_hvp_is_autograds_hessian(net, data):
    theta = params_of(net)
    v = flatten(theta).detach()
    f = lambda th: nn.functional.cross_entropy(
        torch.func.functional_call(net, unflatten(th, theta), (data[0],)), data[1]
    )
    torch.testing.assert_close(dense(lambda u: hvp(net, ce, data, u), v), torch.autograd.functional.hessian(f, v))


def test_hvp_of_a_linear_loss_is_zero():
    m = nn.Linear(3, 1, bias=False)
    assert hvp(m, lambda m, b: m(b[0]).sum(), (torch.ones(2, 3),), torch.ones(3)).abs().max() == 0


def test_gauss_newton_is_the_hessian_of_the_linearised_model(net, data):
    theta = params_of(net)
    at = flatten(theta).detach()
    y0 = net(data[0]).detach()
    f = lambda th: torch.func.functional_call(net, unflatten(th, theta), (data[0],))
    J = torch.autograd.functional.jacobian(f, at)
    linear = lambda th: nn.functional.cross_entropy(y0 + torch.einsum("nkp,p->nk", J, th - at), data[1])
    G = dense(
        lambda u: ggn_vp(net, lambda m, b: m(b[0]), lambda y, b: nn.functional.cross_entropy(y, b[1]), data, u), at
    )
    torch.testing.assert_close(G, torch.autograd.functional.hessian(linear, at))


def test_gauss_newton_of_least_squares_on_a_linear_model_is_exact():
    m = nn.Linear(3, 2).double()
    X, Y = torch.randn(9, 3).double(), torch.randn(9, 2).double()
    p = flatten(params_of(m)).detach()
    sq = lambda y, b: (y - b[1]).square().sum()/2
    out = lambda m, b: m(b[0])
    torch.testing.assert_close(
        dense(lambda u: ggn_vp(m, out, sq, (X, Y), u), p),
        dense(lambda u: hvp(m, lambda m, b: sq(out(m, b), b), (X, Y), u), p),
    )


def test_solve_agrees_with_a_dense_solver_and_refuses_what_it_cannot(net, data):
    A = torch.randn(12, 12).double()
    A = A @ A.T
    b = torch.randn(12).double()
    torch.testing.assert_close(solve(lambda v: A @ v, b, .1, tol=1e-12), torch.linalg.solve(A + .1*torch.eye(12), b))
    with pytest.raises(ValueError, match="negative curvature"):
        solve(lambda v: -(A @ v), b)
    with pytest.raises(ValueError, match="damping=-1"):
        solve(lambda v: A @ v, b, -1.)
    with pytest.raises(ValueError, match="not finite"):
        solve(lambda v: A @ v, b*float("nan"))
    with pytest.raises(RuntimeError, match="within 2"):
        solve(lambda v: A @ v, b, tol=1e-12, maxiter=2)


def test_bad_input(net, data):
    with pytest.raises(ValueError, match="empty batch"):
        per_sample_grads(net, ce, (data[0][:0], data[1][:0]))


def test_adapters_of_a_causal_lm():
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM
    torch.manual_seed(0)
    base = LlamaForCausalLM(
        LlamaConfig(vocab_size=30, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    m = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval().double()
    ids = torch.randint(30, (4, 6))
    loss = lambda m, b: nn.functional.cross_entropy(
        m(input_ids=b[0]).logits[:, :-1].flatten(0, 1), b[0][:, 1:].flatten()
    )
    theta = params_of(m)
    assert all("lora" in k for k in theta)
    G = per_sample_grads(m, loss, (ids,))
    torch.testing.assert_close(G.mean(0), grad_of(m, loss, (ids,)).detach())
    d = torch.randn(G.shape[1]).double()
    e = 1e-3 # the norms of this model compute in float32
    at = lambda: grad_of(m, loss, (ids,)).detach()
    add_(theta, d, e)
    up = at()
    add_(theta, d, -2*e)
    down = at()
    add_(theta, d, e)
    H = hvp(m, loss, (ids,), d)
    assert (H - (up-down)/(2*e)).norm() < 1e-2*H.norm()


def test_a_loss_that_fails_leaves_the_parameters_as_they_were(net, data):
    net[0].bias.requires_grad_(False)
    theta = params_of(net, ["0.bias"])
    def broken(m, b): raise KeyError("no such column")

    for f in (
        lambda: grad_of(net, broken, data, theta),
        lambda: hvp(net, broken, data, torch.ones(5).double(), theta),
        lambda: ggn_vp(net, broken, broken, data, torch.ones(5).double(), theta),
    ):
        with pytest.raises(KeyError):
            f()
        assert not net[0].bias.requires_grad


class Noisy(nn.Module):
    "A layer that is random, or looks at the other rows, whatever its mode."

    def __init__(self, how):
        super().__init__()
        self.how, self.l, self.bn = how, nn.Linear(3, 4), nn.BatchNorm1d(4, track_running_stats=how != "untracked")
    def forward(self, x):
        y, F = self.l(x), nn.functional
        return dict(
            functional=lambda: F.dropout(y, 0.5),
            tensor=lambda: torch.dropout(y, 0.5, True),
            homemade=lambda: y * torch.bernoulli(torch.full_like(y, 0.5)),
            attention=lambda: F.scaled_dot_product_attention(y[:, None], y[:, None], y[:, None], dropout_p=0.5)[:, 0],
            module=lambda: F.dropout(y, 0.5, self.training),
            batch=lambda: F.batch_norm(y, None, None, training=True),
            low=lambda: torch.batch_norm(y, None, None, None, None, True, 0.1, 1e-5, False),
            untracked=lambda: self.bn(y),
            tracked=lambda: self.bn(y),
        )[self.how]()


out = lambda m, b: m(b[0])
head = lambda y, b: nn.functional.cross_entropy(y, b[1])
USES = [
    lambda m, d: grad_of(m, ce, d),
    lambda m, d: per_sample_grads(m, ce, d),
    lambda m, d: per_sample_grads(m, ce, d, vectorize=False),
    lambda m, d: hvp(m, ce, d, torch.ones(sum(p.numel() for p in params_of(m).values()))),
    lambda m, d: ggn_vp(m, out, head, d, torch.ones(sum(p.numel() for p in params_of(m).values()))),
]


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["functional", "tensor", "homemade", "attention", "batch", "low", "untracked"])
def test_randomness_and_batch_statistics_that_stay_on_are_refused(use, how):
    m = Noisy(how)
    found = [k.training for k in m.modules()]
    with pytest.raises(ValueError, match="random|statistics|more than 1 value"):
        use(m, (torch.randn(6, 3), torch.randint(4, (6,))))
    assert [k.training for k in m.modules()] == found


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("how", ["module", "tracked"])
def test_training_mode_is_switched_off_inside_and_given_back(use, how):
    m = Noisy(how)
    m.l.eval()
    d = torch.randn(6, 3), torch.randint(4, (6,))
    mean = m.bn.running_mean.clone()
    m(d[0]) if how == "module" else None
    got = [use(m, d) for _ in range(2)]
    assert (
        torch.equal(*got)
        and [k.training for k in m.modules()] == [True, False, True]
        and torch.equal(m.bn.running_mean, mean)
    )
    torch.testing.assert_close(got[0], use(m.eval(), d))


def test_attention_dropout_of_a_language_model_is_switched_off():
    from transformers import GPT2Config, GPT2LMHeadModel
    torch.manual_seed(0)
    m = GPT2LMHeadModel(GPT2Config(vocab_size=20, n_embd=8, n_layer=1, n_head=2)).train()
    ids = torch.randint(20, (3, 5))
    loss = lambda m, b: nn.functional.cross_entropy(m(input_ids=b[0]).logits.flatten(0, 1), b[0].flatten())
    a, b = (per_sample_grads(m, loss, (ids,)) for _ in range(2))
    assert torch.equal(a, b) and m.training and m.transformer.h[0].attn.attn_dropout.training


@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1., 1e12, 1e30])
def test_solve_does_not_depend_on_units(scale):
    torch.manual_seed(0)
    A = torch.randn(8, 8).double()
    A = A @ A.T + torch.eye(8)
    b = torch.randn(8).double()
    torch.testing.assert_close(
        solve(lambda v: A @ v, b * scale, tol=1e-10), torch.linalg.solve(A, b) * scale, rtol=1e-6, atol=0
    )
    torch.testing.assert_close(
        solve(lambda v: scale * (A @ v), b, tol=1e-10), torch.linalg.solve(A, b) / scale, rtol=1e-6, atol=0
    )


def test_solve_of_nothing_and_of_what_cannot_be_solved():
    assert solve(lambda v: v, torch.zeros(3)).tolist() == [0, 0, 0]
    with pytest.raises(FloatingPointError, match="not finite"):
        solve(lambda v: v*float("nan"), torch.ones(3))
    with pytest.raises(ValueError, match="damping=nan"):
        solve(lambda v: v, torch.ones(3), float("nan"))
    torch.manual_seed(0)
    Q = torch.linalg.qr(torch.randn(40, 40))[0]
    A = Q @ torch.diag(torch.logspace(0, -12, 40)) @ Q.T # float32 cannot hold this
    with pytest.raises((RuntimeError, ValueError), match="damping"):
        solve(lambda v: A @ v, torch.randn(40))


def test_an_empty_choice_of_parameters_is_not_all(net, data):
    for f in (
        lambda: grad_of(net, ce, data, {}),
        lambda: per_sample_grads(net, ce, data, {}),
        lambda: hvp(net, ce, data, torch.ones(3), {}),
    ):
        with pytest.raises(ValueError, match="no parameters chosen"):
            f()
    with pytest.raises(ValueError, match="rows must correspond"):
        per_sample_grads(net, ce, (data[0], data[1][:3]))
    with pytest.raises(ValueError, match="chunk_size=0"):
        per_sample_grads(net, ce, data, chunk_size=0)
