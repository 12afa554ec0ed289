"A reader's own table: all faults at once, in the reader's ids, and the way back."
import numpy as np, pandas as pd, pytest
from recbook.baselines import MF
from recbook.data import Interactions
from recbook.frames import forget, from_frame, id_of, number_of, recommend
from recbook.metrics import dot

LOG = pd.DataFrame(
    [("ann", "tango", 4.0, 1), ("bob", "waltz", 5.0, 2), ("ann", "waltz", 1.0, 3), ("eve", "salsa", 2.0, 4)],
    columns=["who", "what", "stars", "at"],
)
READ = dict(user="who", item="what", rating="stars", time="at")


def spoiled(**cells):
    "LOG with some cells replaced: `column_row=value`."
    df = LOG.astype(object)
    for k, v in cells.items():
        col, row = k.rsplit("_", 1)
        df.at[int(row), col] = v
    return df


@pytest.mark.parametrize(
    "cell, says",
    [
        (dict(who_1=None), "missing user ('who') in 1 row(s)"),
        (dict(who_1="  "), "missing user ('who') in 1 row(s)"),
        (dict(what_2=" waltz"), "blanks around the item ('what')"),
        (dict(who_0=7), "cannot be compared"),
        (dict(stars_3="4,5"), "rating ('stars') is not a number"),
        (dict(stars_3=float("inf")), "rating ('stars') is infinite"),
        (dict(at_0="yesterday"), "pd.to_datetime(df['at'])"),
        (dict(at_0=None), "missing time ('at')"),
        (dict(who_2="bob"), "repeated (user, item) pairs in 2 row(s)"),
    ],
)
def test_each_fault_is_told(cell, says):
    with pytest.raises(ValueError) as e:
        from_frame(spoiled(**cell), **READ)
    assert says in str(e.value) and "Fix: " in str(e.value)


def test_all_faults_are_told_at_once_with_the_readers_rows():
    with pytest.raises(ValueError) as e:
        from_frame(spoiled(who_1=None, what_2=" waltz", stars_3="4,5", at_0="yesterday"), **READ)
    text = str(e.value)
    assert text.count("Fix: ") == 4 and "4,5" in text and "yesterday" in text and "who" in text


def test_unused_columns_are_named():
    with pytest.warns(UserWarning, match=r"not used: column\(s\) \['stars', 'at'\]"):
        from_frame(LOG, "who", "what")


@pytest.mark.parametrize("wrong", [dict(user="nobody"), dict(duplicates="some"), dict(items=[1])])
def test_wrong_arguments_are_named(wrong):
    with pytest.raises(ValueError, match="Fix: "):
        from_frame(LOG, **(READ | wrong))


def test_ids_there_and_back():
    x = from_frame(LOG, **READ)
    for of in ("users", "items"):
        ids = getattr(x, of).id
        assert (id_of(x, number_of(x, ids, of), of) == ids).all()
    with pytest.raises(ValueError, match="no item 'waltzer'. Did you mean 'waltz'"):
        number_of(x, "waltzer", "items")
    with pytest.raises(ValueError, match="no ids of their own"):
        number_of(Interactions(pd.DataFrame(dict(user=[0], item=[0])), 1, 1), "ann")
    numbers = from_frame(LOG.assign(who=[30, 10, 30, 20]), **READ)
    assert number_of(numbers, [20, 30]).tolist() == [1, 2] and id_of(numbers, 0)[0] == 10


def test_recommend_by_name():
    x = from_frame(LOG, **READ)
    score = dot(*MF(x.n_users, x.n_items)())
    full = pd.Series(np.asarray(score(number_of(x, "eve"))).ravel(), index=x.items.id).drop("salsa")
    got = recommend(score, x, "eve", k=5)
    assert got.item.tolist() == full.sort_values(ascending=False).index.tolist()
    with pytest.raises(ValueError, match="Did you mean 'eve'"):
        recommend(score, x, "evy")
    with pytest.raises(ValueError, match="belongs to other data"):
        recommend(lambda u: np.ones(2), x, "eve")


def test_forget_leaves_nothing_of_a_user():
    x = from_frame(LOG, **READ)
    left = forget(x, ["ann", "eve"])
    assert id_of(left, left.user).tolist() == ["bob"] and (left.n_users, left.n_items) == (3, 3)
    with pytest.raises(ValueError, match="no user 'nobody'"):
        forget(x, "nobody")


@pytest.mark.parametrize(
    "call, says",
    [
        (lambda x: from_frame(LOG, None, "what"), "no column"),
        (lambda x: from_frame(LOG, ["who"], "what"), "no column"),
        (lambda x: number_of(x, "ann", "user"), "must be 'users' or 'items'"),
        (lambda x: number_of(from_frame(LOG.assign(who=[1, 2, 1, 3]), **READ), "1"), "Did you mean 1?"),
        (lambda x: id_of(x, 3), "numbered 0..2"),
        (lambda x: id_of(x, -1), "numbered 0..2"),
        (lambda x: recommend(lambda u: np.full(3, np.nan), x, "ann"), "NaN"),
        (lambda x: recommend(lambda u: np.ones((2, 3)), x, ["ann", "bob"]), "no user|other data"),
    ],
)
def test_odd_input_is_named(call, says):
    with pytest.raises(ValueError, match=says):
        call(from_frame(LOG, **READ))
