"The training loop: closed form, determinism, early stopping, and two processes against one."
import json, subprocess, sys
import numpy as np, pytest, torch
from torch import nn
from recbook.training import batches, fan_out, fit, set_seed

SCRIPT = '''
import json, sys, torch
from torch import nn
from accelerate import PartialState
from recbook.training import batches, fit, set_seed
out, batch_size = sys.argv[1], int(sys.argv[2])
g = torch.Generator().manual_seed(0)
X = torch.randn(256, 6, generator=g); y = X.sum(1) + .1*torch.randn(256, generator=g)
set_seed(3); model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
h = fit(model, lambda m, b: (m(b[0]).squeeze(1)-b[1]).pow(2).mean(), batches(X, y, batch_size=batch_size, seed=1), epochs=4, lr=.01, device="cpu", progress=False)
if PartialState().is_main_process: json.dump(h.loss.tolist(), open(out, "w"))
'''


def test_two_processes_give_the_curve_of_one_with_the_doubled_batch(tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT)
    curves = []
    for name, n, bs in [("one", 1, 64), ("two", 2, 32)]:
        launch = ["accelerate.commands.launch", *["--multi_gpu"][:n-1], "--num_processes", str(n), "--num_machines", "1", "--mixed_precision", "no",
                  "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1", "--main_process_port", "0"]
        r = subprocess.run([sys.executable, "-m", *launch, str(tmp_path/"script.py"), str(tmp_path/name), str(bs)], capture_output=True, text=True, timeout=300)
        assert r.returncode == 0, r.stderr[-2000:]
        curves.append(json.loads((tmp_path/name).read_text()))
    assert len(curves[0]) == 4 and curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def data(n=200, p=4):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, p, generator=g)
    return X, X @ torch.arange(1., p+1)


def mse(m, b): return (m(b[0]).squeeze(1)-b[1]).pow(2).mean()


def model(seed=0, p=4): set_seed(seed); return nn.Linear(p, 1, bias=False)


def run(m, **k): return fit(m, mse, batches(*data(), batch_size=50), lr=.1, device="cpu", progress=False, **k)


def test_finds_the_least_squares_solution():
    m = model(); run(m, steps=400)
    assert m.weight.detach().squeeze().numpy() == pytest.approx([1, 2, 3, 4], abs=1e-3)


def test_same_seed_same_bits_and_steps_equal_epochs():
    a, b = model(), model()
    ha, hb = run(a, steps=20), run(b, epochs=5)
    assert torch.equal(a.weight, b.weight) and ha.loss.equals(hb.loss) and list(hb.step) == [4, 8, 12, 16, 20]


def test_a_partial_epoch_stops_at_the_step():
    assert run(model(), steps=6).step.tolist() == [4, 6]


def test_early_stopping_restores_the_best_weights():
    values = iter([.1, .5, .3, .2, .1, .0])
    seen = []
    m = model()
    def evaluate(m): seen.append(m.weight.detach().clone()); return dict(v=next(values))
    h = run(m, epochs=6, evaluate=evaluate, monitor="v", patience=2)
    assert len(h) == 4 and torch.equal(m.weight, seen[1])


def test_evaluation_every_few_epochs_and_at_the_end():
    h = run(model(), epochs=5, evaluate=lambda m: dict(v=1.), every=2)
    assert h.v.notna().tolist() == [False, True, False, True, True]


def test_max_seconds_stops_after_the_epoch():
    assert len(run(model(), epochs=50, max_seconds=0.)) == 1


def test_batches_cover_every_row_once_and_sample_is_called():
    for _ in range(2):
        got = torch.cat([b[0] for b in batches(np.arange(17), batch_size=5)])
        assert sorted(got.tolist()) == list(range(17))
    dl = batches(np.arange(6), batch_size=3, sample=lambda x: (x, -x))
    assert all(torch.equal(a, -b) for a, b in dl)
    order = [torch.cat([b[0] for b in dl]).tolist() for _ in range(2)]
    assert order[0] != order[1]


@pytest.mark.parametrize("kw, says", [(dict(), "exactly one"), (dict(epochs=1, steps=1), "exactly one"), (dict(epochs=1, monitor="x"), "evaluate"),
    (dict(epochs=1, monitor="x", evaluate=lambda m: dict(y=1.)), "not among")])
def test_bad_arguments(kw, says):
    with pytest.raises(ValueError, match=says): run(model(), **kw)


def test_a_diverged_run_says_so():
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(model(), lambda m, b: mse(m, b)*float("inf"), batches(*data()), epochs=1, device="cpu", progress=False)


def test_rows_must_correspond_and_exist():
    with pytest.raises(ValueError, match="different lengths"): batches(np.arange(2), np.arange(3))
    with pytest.raises(ValueError, match="no rows"): batches(np.arange(0))


def test_seeds_on_two_processes_are_the_seeds_on_one():
    import os
    def weights(s): m = model(s); run(m, steps=10, seed=s); return os.getpid(), m.weight.detach()
    here, there = (fan_out(weights, iter(range(3)), jobs) for jobs in (1, 2))
    assert {p for p, _ in here} == {os.getpid()} and os.getpid() not in {p for p, _ in there}
    assert all(torch.allclose(a, b, atol=1e-6) for (_, a), (_, b) in zip(here, there)) and not torch.equal(here[0][1], here[1][1])


def test_fan_out_says_what_went_wrong():
    with pytest.raises(ValueError, match="jobs=0"): fan_out(abs, [1], 0)
    def fail(s):
        if s == 1: raise FloatingPointError(f"seed {s}")
    with pytest.raises(FloatingPointError, match="seed 1"): fan_out(fail, range(3), 2)
