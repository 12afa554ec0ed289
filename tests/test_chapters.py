"Every chapter runs from a clean kernel in the smoke profile, two at a time, and is well formed."
import re
import nbformat, pytest
from recbook.claims import papers
from recbook.data import root
from recbook.book import chapters, read_notebook
from recbook.records import VERDICTS
from recbook.run import run_chapters, slowest

ALL = chapters(root())
BUDGET = 180 # s: 40 s on two idle cores; here two chapters and other tests share them
TRAINING = dict(lm=600, alignment=500, unlearning=600, editing=900) # s: their language models are trained on the way


@pytest.fixture(scope="session")
def smoke(tmp_path_factory):
    done = run_chapters([c.area for c in ALL], profile="smoke", jobs=2, out=tmp_path_factory.mktemp("runs"))
    return {r.chapter.area: r for r in done}


@pytest.mark.parametrize("area", [c.area for c in ALL])
def test_runs_in_the_smoke_profile(smoke, area):
    r = smoke[area]
    assert r.ok, f"{area}: {r.error}"
    assert r.record["wall_s"] > 0 and r.record["profile"] == "smoke"


@pytest.mark.parametrize("area", [c.area for c in ALL])
def test_smoke_keeps_its_budget(smoke, area):
    took, most = smoke[area].record.get("wall_s", 0), TRAINING.get(area, BUDGET)
    lines = [f"{s:.0f} s  {name}" for s, name in slowest(read_notebook(smoke[area].notebook))]
    assert took <= most, f"{area}: {took:.0f} s, budget {most} s; its slowest cells:\n" + "\n".join(lines)


@pytest.mark.parametrize("area", [c.area for c in ALL])
def test_every_claim_of_the_area_is_measured(smoke, area):
    if area not in {p["area"] for p in papers().values()}:
        pytest.skip("a foundation has no papers")
    want = {c["id"] for p in papers(area).values() for c in p.get("claim", [])}
    assert want and want == {c["id"] for c in smoke[area].claims}
    assert all(c["verdict"] in VERDICTS for c in smoke[area].claims)


@pytest.mark.parametrize("chapter", ALL, ids=lambda c: c.area)
def test_is_well_formed(chapter):
    nb = nbformat.read(chapter.path, 4)
    md = "\n\n".join(c.source for c in nb.cells if c.cell_type == "markdown")
    assert len(re.findall(r"^# ", md, re.M)) == 1, "one H1"
    assert sum("parameters" in c.metadata.get("tags", []) for c in nb.cells) == 1
    code = [c for c in nb.cells if c.cell_type == "code"]
    assert not any(o.output_type == "error" for c in code for o in c.outputs)
    assert any(c.outputs for c in code), "no saved outputs: run it with --profile cpu --save"
    text = "".join(str(c.get("outputs", "")) + c.source for c in nb.cells)
    assert not re.search(r"/root/|/home/\w|site-packages", text), "a path of some machine"


def test_the_catalogue_lists_the_papers_with_unique_claims():
    all_papers = papers()
    assert len(all_papers) >= 136 and len({p["area"] for p in all_papers.values()}) >= 32
    ids = [c["id"] for p in all_papers.values() for c in p.get("claim", [])]
    assert len(ids) == len(set(ids))
    for p in all_papers.values():
        for c in p.get("claim", []):
            assert c["id"].startswith(p["id"]+".") and {"statement", "metric", "ours", "theirs"} <= set(c)
