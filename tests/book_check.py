"""Does the prepared book hold together?

Each page goes through Pandoc as Quarto would send it: one markdown document made of the cells and their outputs.
What Quarto only warns about (or passes over in silence) comes back here as a list of problems."""
import html, json, re, subprocess
from functools import cache
from pathlib import Path
from urllib.parse import unquote
import pypandoc, yaml

CROSS = re.compile(r"^(sec|fig|tbl|eq|lst|thm|lem|cor|def|exm)-")
text = lambda x: "".join(x) if isinstance(x, list) else x or ""


def option(code, name):
    "The value of `#| name: ...` in the first lines of a cell, or None."
    m = re.search(rf"^#\|\s*{name}\s*:\s*(.*)$", code, re.M)
    return m and m[1].strip().strip("\"'")


def drawn(c): return any(k.startswith("image/") for o in c.get("outputs", []) for k in o.get("data", {}))


def output(o):
    "One output of a cell as markdown."
    d = o.get("data", {})
    if "text/markdown" in d:
        return text(d["text/markdown"])
    if "text/html" in d:
        return f"````{{=html}}\n{text(d['text/html'])}\n````"
    if any(k.startswith("image/") for k in d):
        return ""
    return f"~~~~\n{text(o.get('text') or d.get('text/plain'))}\n~~~~"


def markdown(nb):
    "The page as one markdown document, front matter left out."
    parts = []
    for c in nb["cells"]:
        src = text(c["source"])
        if c["cell_type"] == "markdown":
            parts.append(src)
        if c["cell_type"] == "code":
            if option(src, "echo") != "false":
                parts.append("`````python\n" + re.sub(r"^#\|.*\n?", "", src, flags=re.M) + "\n`````")
            parts += [output(o) for o in c.get("outputs", [])]
    return "\n\n".join(parts) + "\n"


def front(nb):
    "The page's YAML front matter."
    m = next(
        (re.search(r"---\n(.*?)\n---", text(c["source"]), re.S) for c in nb["cells"] if c["cell_type"] == "raw"), None
    )
    return yaml.safe_load(m[1]) if m else {}


def dead(inlines):
    "Is this a paragraph of one linked image, which Quarto's light box would turn into a picture without its link?"
    inner = inlines[0]["c"][1] if len(inlines) == 1 and inlines[0]["t"] == "Link" else []
    return len(inner) == 1 and inner[0]["t"] == "Image" and "nolightbox" not in inner[0]["c"][0][1]


def shown(nb):
    "What the cells of a page show, as markdown, one text an output."
    return [output(o) for c in nb["cells"] for o in c.get("outputs", [])]


def talking(nb):
    """The labels of figure cells that print, too: Quarto would make a composite figure of them and give the caption to
    the print."""
    lone = lambda o: o["output_type"] == "stream" or not any(k.startswith("image/") for k in o.get("data", {}))
    return [
        l
        for c in nb["cells"]
        if (l := option(text(c["source"]), "label") or "").startswith("fig-") and any(map(lone, c.get("outputs", [])))
    ]


class Page:
    "What Pandoc finds in one prepared notebook."
    def __init__(self, path):
        self.nb = json.loads(Path(path).read_text(encoding="utf-8"))
        self.md, self.title = markdown(self.nb), str(front(self.nb).get("title") or "")
        self.heads, self.ids, self.links, self.images, self.cites, self.math, self.faults = (
            [],
            set(),
            [],
            [],
            [],
            [],
            [],
        )
        self.visit(json.loads(pypandoc.convert_text(self.md, "json", "markdown-smart"))["blocks"])
        code = [c for c in self.nb["cells"] if c["cell_type"] == "code"]
        self.labels = [
            l for c in code if (l := option(text(c["source"]), "label")) and (drawn(c) or not l.startswith("fig-"))
        ] + re.findall(r"\{#((?:eq|tbl)-[\w-]+)", self.md)
        self.ids |= set(self.labels)

    def visit(self, x, callout=False):
        "Walk Pandoc's tree."
        if isinstance(x, list):
            for y in x:
                self.visit(y, callout)
        if not isinstance(x, dict):
            return
        kind, c = x.get("t"), x.get("c")
        if kind == "Header":
            self.ids.add(c[1][0])
            if not callout:
                self.heads.append((c[0], c[1][0]))
        if kind in ("Div", "Span", "CodeBlock", "Code"):
            self.ids.add(c[0][0])
            callout = callout or any(k.startswith("callout") for k in c[0][1])
        if kind in ("Table", "Figure"):
            self.ids.add(c[0][0])
        if kind == "Link":
            self.links.append(c[2][0])
            self.ids.add(c[0][0])
        if kind == "Image":
            self.images.append((c[2][0], bool(c[1]) or "fig-alt" in dict(c[0][2]) or "alt" in dict(c[0][2])))
        if kind == "Cite":
            self.cites += [k["citationId"] for k in c[0]]
        if kind == "Math":
            self.math.append((c[1], c[0]["t"] == "DisplayMath"))
        if kind in ("RawBlock", "RawInline"):
            self.raw(*c)
        if kind == "Str":
            self.literal(c)
        if kind == "Para" and dead(c):
            self.faults.append("a linked image alone in its paragraph: the light box takes its link")
        self.visit(c, callout)

    def raw(self, fmt, s):
        "Links, images and anchors in HTML; TeX outside dollars would vanish from the page."
        if fmt in ("tex", "latex"):
            self.faults.append(f"TeX outside $$: {s[:60]!r}")
            return
        self.links += [html.unescape(u) for u in re.findall(r"<a\b[^>]*\bhref=[\"']([^\"']*)", s)]
        self.images += [
            (u, bool(re.search(r"\balt=[\"'][^\"']", t)))
            for t in re.findall(r"<img\b[^>]*>", s)
            for u in re.findall(r"\bsrc=[\"']([^\"']*)", t)
        ]
        self.ids |= set(re.findall(r"\bid=[\"']([^\"']+)", s))

    def literal(self, s):
        "Signs that something was meant as markup and is not."
        if "$$" in s:
            self.faults.append(f"unclosed equation near {s!r}")
        if re.match(r"^#{2,6}$", s):
            self.faults.append("a heading without a blank line before it")
        if re.match(r"^\{#(?!eq-|tbl-)", s):
            self.faults.append(f"an id shown as text: {s}")

    def nesting(self):
        "Headings that skip a level, and a second H1."
        last = 1
        for level, id in self.heads:
            if level == 1:
                yield f"heading: a second H1, #{id}"
            elif level > last + 1:
                yield f"heading: level {level} below level {last}, #{id}"
            last = level

    def pictures(self):
        "Cells and images that say nothing to who cannot see them."
        for c in self.nb["cells"]:
            if drawn(c) and not option(text(c["source"]), "fig-alt"):
                yield f"alt: a picture without fig-alt: {text(c['source'])[:60]!r}"
        for src, alt in self.images:
            if not alt:
                yield f"alt: an image without a text: {src[:60]}"


@cache
def _page(path, stamp): return Page(path)

def pages(folder):
    "Every prepared page, by its place in `folder`."
    return {
        f.relative_to(folder).as_posix(): _page(f, f.stat().st_mtime_ns) for f in sorted(Path(folder).rglob("*.ipynb"))
    }


def keys(bib):
    "The keys of a BibTeX file."
    return re.findall(r"^@\w+\{([^,\s]+),", Path(bib).read_text(encoding="utf-8"), re.M)


def target(folder, at, url, book):
    "What is wrong with the internal address `url` on page `at`, or None."
    if re.match(r"^[a-z][a-z0-9+.-]*:|^//", url, re.I):
        return None
    path, _, anchor = unquote(url).partition("#")
    file = (folder/at).parent/path if path else folder/at
    if not file.is_file():
        return "no such file"
    place = file.resolve().relative_to(folder.resolve()).as_posix()
    return f"no #{anchor} there" if anchor and place in book and anchor not in book[place].ids else None


def problems(folder, bib=None):
    "Everything that leads nowhere or is missing, as `page: kind: what`; equations apart."
    folder = Path(folder)
    book, known = pages(folder), set(keys(bib or folder/"references.bib"))
    labels = {i for p in book.values() for i in p.ids if CROSS.match(i)}
    for at, p in book.items():
        found = [f"markup: {f}" for f in p.faults]
        if not p.title or "{#" in p.title:
            found.append(f"title: {p.title!r}")
        found += [f"link: {u}: {w}" for u in p.links if (w := target(folder, at, u, book))]
        found += [f"image: {u[:80]}: {w}" for u, _ in p.images if (w := target(folder, at, u, book))]
        found += [f"crossref: @{k}" for k in p.cites if CROSS.match(k) and k not in labels]
        found += [f"citation: @{k}" for k in p.cites if not CROSS.match(k) and k not in known]
        found += [f"label: {l} twice" for l in sorted({l for l in p.labels if p.labels.count(l) > 1})]
        yield from (f"{at}: {f}" for f in [*found, *p.nesting(), *p.pictures()])


KATEX = """const katex = require("katex"), all = JSON.parse(require("fs").readFileSync(0, "utf8"));
const how = {strict: "error", throwOnError: true}
const bad = all.map(([at, tex, displayMode]) => { try { katex.renderToString(tex, {displayMode, ...how}) }
catch (e) { return at + ": equation: " + e.message } }).filter(x => x); console.log(JSON.stringify(bad))"""

def equations(folder, home):
    "Equations of the book that KaTeX, installed in `home`, refuses."
    all_ = [(at, tex, display) for at, p in pages(folder).items() for tex, display in p.math]
    run = subprocess.run(
        ["node", "-e", KATEX], input=json.dumps(all_), cwd=home, capture_output=True, text=True, check=True
    )
    return json.loads(run.stdout)


def listed(yml):
    "The notebooks that `_quarto.yml` names, in order."
    def files(x):
        if isinstance(x, str):
            return [x] if x.endswith((".ipynb", ".qmd", ".md")) else []
        if isinstance(x, dict):
            return [f for k in ("part", "file", "chapters") for f in files(x.get(k))]
        return [f for y in x or [] for f in files(y)]
    return files(yaml.safe_load(Path(yml).read_text(encoding="utf-8"))["book"]["chapters"])
