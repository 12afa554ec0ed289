"""EK-FAC here and in kronfluence on the same network: scores equal, seconds as a ratio of one run. Not part of the test
run: `pytest -s tests/benchmarks/test_influence_speed.py`."""
import copy
from time import perf_counter
import numpy as np, pytest, torch
from torch import nn
from torch.utils.data import TensorDataset
from recbook.trust.influence import Task, ekfac_factors, influence, row_losses


def ours(net, train, query):
    factors = ekfac_factors(net, Task(), train, labels="data", batch_size=256)
    return influence(net, train, query, Task(), factors=factors)*len(train[0])


def theirs(net, train, query, folder):
    analyzer, arguments, task = (pytest.importorskip(f"kronfluence.{m}") for m in ("analyzer", "arguments", "task"))
    class Its(task.Task):
        def compute_train_loss(self, batch, model, sample=False): return row_losses(model(batch[0]), batch[1]).sum()
        def compute_measurement(self, batch, model): return self.compute_train_loss(batch, model)
    t = Its()
    an = analyzer.Analyzer(
        "t", analyzer.prepare_model(copy.deepcopy(net), t), t, cpu=True, output_dir=str(folder), disable_tqdm=True
    )
    an.fit_all_factors(
        "f",
        TensorDataset(*train),
        per_device_batch_size=256,
        factor_args=arguments.FactorArguments("ekfac", use_empirical_fisher=True),
    )
    an.compute_pairwise_scores(
        "s",
        "f",
        TensorDataset(*query),
        TensorDataset(*train),
        per_device_query_batch_size=256,
        per_device_train_batch_size=256,
        score_args=arguments.ScoreArguments(damping_factor=None),
    )
    return an.load_pairwise_scores("s")["all_modules"].T.numpy()


def test_ratio_to_kronfluence(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    train, query = ((torch.randn(n, 64), torch.randint(10, (n,))) for n in (4000, 100))
    t0 = perf_counter()
    a = ours(net, train, query)
    t1 = perf_counter()
    b = theirs(net, train, query, tmp_path)
    t2 = perf_counter()
    assert np.corrcoef(a.ravel(), b.ravel())[0, 1] > .999
    print(
        f"ours {t1 - t0:.2f} s, kronfluence {t2 - t1:.2f} s, ratio {(t1 - t0) / (t2 - t1):.2f}, largest difference "
        f"{np.abs(a - b).max() / np.abs(b).max():.1e}"
    )
