"The training loop: closed form, determinism, early stopping, and two processes against one."
import json, subprocess, sys
import numpy as np, pytest, torch
from torch import nn
from recbook.training import batches, eval_mode, fan_out, fit, set_seed

SCRIPT = """
import json, sys, torch
from torch import nn
from accelerate import PartialState
from recbook.training import batches, fit, set_seed
out, batch_size = sys.argv[1], int(sys.argv[2])
g = torch.Generator().manual_seed(0)
X = torch.randn(256, 6, generator=g); y = X.sum(1) + .1*torch.randn(256, generator=g)
set_seed(3); model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))
loss = lambda m, b: (m(b[0]).squeeze(1)-b[1]).pow(2).mean()
bs = batches(X, y, batch_size=batch_size, seed=1)
h = fit(model, loss, bs, epochs=4, lr=.01, device="cpu", progress=False)
if PartialState().is_main_process: json.dump(h.loss.tolist(), open(out, "w"))
"""


def test_two_processes_give_the_curve_of_one_with_the_doubled_batch(tmp_path):
    (tmp_path/"script.py").write_text(SCRIPT)
    curves = []
    for name, n, bs in [("one", 1, 64), ("two", 2, 32)]:
        launch = [
            "accelerate.commands.launch",
            *["--multi_gpu"][: n - 1],
            "--num_processes",
            str(n),
            "--num_machines",
            "1",
            "--mixed_precision",
            "no",
            "--dynamo_backend",
            "no",
            "--num_cpu_threads_per_process",
            "1",
            "--main_process_port",
            "0",
        ]
        r = subprocess.run(
            [sys.executable, "-m", *launch, str(tmp_path / "script.py"), str(tmp_path / name), str(bs)],
            capture_output=True,
            text=True,
            timeout=300,
        )
        assert r.returncode == 0, r.stderr[-2000:]
        curves.append(json.loads((tmp_path/name).read_text()))
    assert len(curves[0]) == 4 and curves[0][-1] < curves[0][0]
    assert curves[1] == pytest.approx(curves[0], rel=1e-4)


def data(n=200, p=4):
    g = torch.Generator().manual_seed(0)
    X = torch.randn(n, p, generator=g)
    return X, X @ torch.arange(1., p+1)


def mse(m, b): return (m(b[0]).squeeze(1)-b[1]).pow(2).mean()


def model(seed=0, p=4):
    set_seed(seed)
    return nn.Linear(p, 1, bias=False)


def run(m, **k): return fit(m, mse, batches(*data(), batch_size=50), lr=.1, device="cpu", progress=False, **k)


def test_finds_the_least_squares_solution():
    m = model()
    run(m, steps=400)
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
    def evaluate(m):
        seen.append(m.weight.detach().clone())
        return dict(v=next(values))
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


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(), "exactly one"),
        (dict(epochs=1, steps=1), "exactly one"),
        (dict(epochs=1, monitor="x"), "evaluate"),
        (dict(epochs=1, monitor="x", evaluate=lambda m: dict(y=1.0)), "not among"),
    ],
)
def test_bad_arguments(kw, says):
    with pytest.raises(ValueError, match=says):
        run(model(), **kw)


def test_a_diverged_run_says_so():
    with pytest.raises(FloatingPointError, match="lower the learning rate"):
        fit(model(), lambda m, b: mse(m, b)*float("inf"), batches(*data()), epochs=1, device="cpu", progress=False)


def test_rows_must_correspond_and_exist():
    with pytest.raises(ValueError, match="different lengths"):
        batches(np.arange(2), np.arange(3))
    with pytest.raises(ValueError, match="no rows"):
        batches(np.arange(0))


def test_seeds_on_two_processes_are_the_seeds_on_one():
    import os
    def weights(s):
        m = model(s)
        run(m, steps=10, seed=s)
        return os.getpid(), m.weight.detach()
    here, there = (fan_out(weights, iter(range(3)), jobs) for jobs in (1, 2))
    assert {p for p, _ in here} == {os.getpid()} and os.getpid() not in {p for p, _ in there}
    assert all(torch.allclose(a, b, atol=1e-6) for (_, a), (_, b) in zip(here, there)) and not torch.equal(
        here[0][1], here[1][1]
    )


def test_fan_out_says_what_went_wrong():
    with pytest.raises(ValueError, match="jobs=0"):
        fan_out(abs, [1], 0)
    def fail(s):
        if s == 1:
            raise FloatingPointError(f"seed {s}")
    with pytest.raises(FloatingPointError, match="seed 1"):
        fan_out(fail, range(3), 2)


def test_eval_mode_gives_every_part_its_mode_back_also_after_an_error():
    a, b = nn.Sequential(nn.Dropout(.5), nn.BatchNorm1d(3).eval()), nn.Dropout(.5).eval()
    b.train(False)
    found = [m.training for k in (a, b) for m in k.modules()]
    with eval_mode(a, b):
        assert not any(m.training for k in (a, b) for m in k.modules())
    assert [m.training for k in (a, b) for m in k.modules()] == found == [True, True, False, False]
    with pytest.raises(KeyError):
        with eval_mode(a):
            raise KeyError
    assert [m.training for m in a.modules()] == [True, True, False]


@pytest.mark.parametrize("args", [(), (None,), (nn.Linear(1, 1), len)])
def test_eval_mode_wants_modules(args):
    with pytest.raises(ValueError, match="torch modules"):
        with eval_mode(*args):
            pass


def test_a_trained_model_is_left_ready_for_scoring():
    m = nn.Sequential(nn.Dropout(.5), nn.Linear(4, 1))
    run(m, epochs=1)
    assert not any(part.training for part in m.modules()) and torch.equal(m(data()[0]), m(data()[0]))


NAN, INF = float("nan"), float("inf")
@pytest.mark.parametrize(
    "values, best",
    [
        ([0.5, NAN, 0.4, 0.3], 0),
        ([0.2, 0.5, NAN], 1),
        ([NAN, NAN, 0.1, NAN], 2),
        ([-INF, 0.1, INF, 0.2], 3),
        ([np.float32(0.1), np.float64(NAN), 2, 1], 2),
    ],
)
def test_the_best_finite_evaluation_wins(values, best):
    given, seen, m = iter(values), [], model()
    def evaluate(m):
        seen.append(m.weight.detach().clone())
        return dict(v=next(given))
    h = run(m, epochs=len(values), evaluate=evaluate, monitor="v", patience=10)
    assert len(h) == len(values) and torch.equal(m.weight, seen[best])


def test_nan_counts_as_no_improvement():
    given = iter([.1, NAN, NAN, .9])
    assert len(run(model(), epochs=4, evaluate=lambda m: dict(v=next(given)), monitor="v", patience=2)) == 3


def test_a_metric_that_is_never_finite_or_no_number_is_refused():
    with pytest.raises(FloatingPointError, match="v was never finite"):
        run(model(), epochs=2, evaluate=lambda m: dict(v=NAN), monitor="v")
    with pytest.raises(ValueError, match="v is None"):
        run(model(), epochs=2, evaluate=lambda m: dict(v=None), monitor="v")


@pytest.mark.parametrize(
    "kw, says",
    [
        (dict(epochs=0), "epochs=0"),
        (dict(steps=-1), "steps=-1"),
        (dict(epochs=2.5), "epochs=2.5"),
        (dict(epochs=NAN), "epochs=nan"),
        (dict(epochs=True), "epochs=True"),
        (dict(epochs=1, every=0), "every=0"),
        (dict(epochs=1, patience=0), "patience=0"),
    ],
)
def test_training_that_would_do_nothing_is_refused(kw, says):
    with pytest.raises(ValueError, match=says):
        run(model(), **kw)


def test_a_loader_without_batches_is_refused():
    with pytest.raises(ValueError, match="not one full batch"):
        batches(np.arange(4), batch_size=8, drop_last=True)
    assert len(batches(np.arange(8), batch_size=8, drop_last=True)) == 1
    with pytest.raises(ValueError, match="no batches"):
        fit(model(), mse, [], steps=3, device="cpu", progress=False)
    with pytest.raises(ValueError, match="batch_size=0"):
        batches(np.arange(4), batch_size=0)
