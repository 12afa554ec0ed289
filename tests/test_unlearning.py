"unlearning: invariants against independent oracles."
import numpy as np, pandas as pd
from recbook.data import Interactions
from recbook.trust.unlearning import popularity


def test_popularity_counts_clicks():
    x = Interactions(pd.DataFrame(dict(user=[0, 1, 1, 2], item=[0, 0, 2, 0])), 3, 4)
    np.testing.assert_array_equal(popularity(x), [[3, 0, 1, 0]]*3)
