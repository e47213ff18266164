"""Build the series as pages to read, build/site, from the notebooks' stored outputs.

    python scripts/make_site.py

Nothing is executed but the setting of formulas (KaTeX) and the search's index (Pagefind), both
from npm, as scripts/site/package-lock.json has them: npm is needed. The pages load nothing from
other hosts, and every link between them is checked. To look at them:

    python -m http.server --directory build/site
"""

import base64
import html
import json
import re
import shutil
import string
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import make_links
import nbformat
from nbconvert.filters.markdown_mistune import IPythonRenderer, MarkdownWithMath
from PIL import Image
from pygments import highlight
from pygments.formatters import HtmlFormatter
from pygments.lexers import PythonLexer

ROOT = make_links.ROOT
PARTS = ROOT / "scripts" / "site"
SERIES = "Optimal Brain Damage in JAX"
PICTURES = (".png", ".gif", ".svg")
FILM = ROOT / "figures" / "vanishing.gif"  # in the lessons it is moved by hand


class Renderer(IPythonRenderer):
    """Markdown as GitHub and Jupyter have it; each formula is left out, for all to be set at once.

    A heading has both names that links to it may use: GitHub's and Jupyter's.
    """

    def __init__(self):
        super().__init__(escape=False)
        self.formulas = []

    def formula(self, tex, alone):
        self.formulas.append((tex.strip(), alone))
        return f"<!--formula {len(self.formulas) - 1}-->"

    def inline_math(self, body):
        return self.formula(body, False)

    def block_math(self, body):
        return self.formula(body, True)

    def latex_environment(self, name, body):
        return self.formula(f"\\begin{{{name}}}{body}\\end{{{name}}}", True)

    def heading(self, text, level, **attributes):
        plain = html.unescape(re.sub("<[^>]+>", "", text))
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        other = plain.replace(" ", "-")
        second = f'<span id="{html.escape(other)}"></span>' if other != name else ""
        anchor = f'<a class="anchor" href="#{name}" data-pagefind-ignore>¶</a>'
        return f'<h{level} id="{name}">{second}{text}{anchor}</h{level}>\n'


def page_name(path: Path) -> str | None:
    """The page that a file of the repository has become."""
    if path == ROOT / "README.md":
        return "index.html"
    if path == ROOT / "GLOSSARY.md" or path in make_links.lessons():
        return f"{path.stem.lower()}.html"
    return None


def target(link: str, folder: Path, site: Path) -> str:
    """Where a link of a file in `folder` leads on the site; a picture is copied there."""
    if re.match(r"[a-z][a-z0-9+.-]*:|#|$", link):
        return link
    name, mark, fragment = link.partition("#")
    path = (folder / unquote(name)).resolve()
    if page := page_name(path):
        return page + mark + fragment
    inside = path.relative_to(ROOT).as_posix()
    if path.suffix in PICTURES:
        (site / inside).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, site / inside)
        return inside
    kind = "tree" if path.is_dir() else "blob"
    return f"{make_links.address()}/{kind}/main/{inside}{mark}{fragment}"


def linked(body: str, folder: Path, site: Path) -> str:
    """Links that hold on the site; instead of a picture from elsewhere its words."""
    words = r'<img (?=[^>]*src="https?:)[^>]*alt="([^"]*)"[^>]*>'
    return re.sub(
        r'\b(href|src)="([^"]*)"',
        lambda a: f'{a[1]}="{html.escape(target(html.unescape(a[2]), folder, site))}"',
        re.sub(words, r"\1", body),
    )


def framed(body: str) -> str:
    """Wide tables that can be moved, pictures loaded when in sight, text found before code."""
    body = re.sub(r"(?s)<table.*?</table>", r'<div class="wide" tabindex="0">\g<0></div>', body)
    body = body.replace('class="highlight"', 'class="highlight" data-pagefind-weight="0.1"')
    return body.replace("<img ", '<img loading="lazy" ')


def film(site: Path, alt: str) -> str:
    """The film as a slider over its frames; the moving picture, where scripts do not run."""
    frames = site / "frames"
    frames.mkdir(exist_ok=True)
    with Image.open(FILM) as moving:
        for place in range(1, moving.n_frames):  # the first is to look at, out of its order
            moving.seek(place)
            moving.convert("RGB").quantize(64).save(frames / f"{place:02}.png", optimize=True)
        width, height = moving.size
    names = [f"frames/{file.name}" for file in sorted(frames.glob("*.png"))]
    size = f'width="{width}" height="{height}"'
    return (
        f"<div class=\"film\" data-frames='{json.dumps(names)}'>"
        f'<img src="{names[0]}" alt="{alt}" {size}><input type="range" value="0" min="0" '
        f'max="{len(names) - 1}" aria-label="How far the network is pruned">'
        '<p class="note">Move the handle: from all weights on the left to 1 % on the right.</p>'
        "</div>"
    )


def output(one: nbformat.NotebookNode, picture: Path) -> str:
    """A stored output; `picture` is where its picture goes, if it is one."""
    if one.output_type == "stream":
        return f"<pre>{html.escape(one.text)}</pre>"
    data = one.get("data", {})
    if "image/png" in data:
        picture.parent.mkdir(parents=True, exist_ok=True)
        picture.write_bytes(base64.b64decode(data["image/png"]))
        with Image.open(picture) as image:
            size = 'width="{}" height="{}"'.format(*image.size)
        alt = html.escape(data.get("text/plain", ""))
        return f'<p><img src="{picture.parent.name}/{picture.name}" alt="{alt}" {size}></p>'
    if "text/html" in data:
        return re.sub(r"(?s)<style.*?</style>", "", data["text/html"])
    return f"<pre>{html.escape(data.get('text/plain', one.get('evalue', '')))}</pre>"


def code(cell: nbformat.NotebookNode, pictures: Path, number: int, server: str) -> str:
    """A code cell with its outputs; what is folded in the notebook is folded here."""
    tags = cell.metadata.get("tags", [])
    if "setup" in tags:
        return ""
    source = highlight(cell.source, PythonLexer(), HtmlFormatter())
    if cell.metadata.get("jupyter", {}).get("source_hidden"):
        summary = "What the text claims, checked" if "claims" in tags else "Code"
        source = f"<details><summary>{summary}</summary>{source}</details>"
    if "slider" in tags:
        where = f'<a href="{html.escape(server)}">the lesson on a server</a>'
        return f'{source}<p class="note">With a kernel, a slider stands here: see {where}.</p>'
    shown = "".join(
        output(one, pictures / f"{number}-{place}.png") for place, one in enumerate(cell.outputs)
    )
    return source + (f'<div class="output">{shown}</div>' if shown else "")


def lesson(path: Path, markdown: MarkdownWithMath, site: Path) -> str:
    """A lesson's page, but for its formulas."""
    cells = nbformat.read(path, as_version=4).cells
    binder = make_links.badges(make_links.address(), f"notebooks/{path.name}")
    server = re.search(r"\]\((https://mybinder[^)]+)\)", binder)[1]
    parts = []
    for number, cell in enumerate(cells):
        if cell.cell_type == "markdown":
            parts.append(linked(markdown.render(cell.source), path.parent, site))
        else:
            parts.append(code(cell, site / path.stem, number, server))
    page = framed("\n".join(parts))
    return re.sub(
        rf'<img [^>]*src="figures/{FILM.name}"[^>]*>',
        lambda tag: film(site, re.search('alt="([^"]*)"', tag[0])[1]),
        page,
    )


def typeset(formulas: list[tuple[str, bool]]) -> list[str]:
    """Formulas as HTML, by KaTeX; an error in one ends the build and names it."""
    command = ["node", PARTS / "typeset.js", PARTS / "node_modules"]
    done = subprocess.run(command, input=json.dumps(formulas), stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit("A formula cannot be set: see above.")
    return json.loads(done.stdout)


class Names(HTMLParser):
    """What a page links to and loads, and the names that it has."""

    def __init__(self, text: str):
        super().__init__()
        self.links, self.loaded, self.names = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        found = dict(attributes)
        self.names += [found["id"]] if "id" in found else []
        if tag == "a" and "href" in found:
            self.links.append(found["href"])
        elif tag in ("img", "script", "link", "iframe", "source"):
            self.loaded += [found[key] for key in ("src", "href") if key in found]
        self.loaded += json.loads(found.get("data-frames", "[]"))


def broken(site: Path) -> list[str]:
    """Links that lead nowhere, and whatever is loaded from elsewhere, with the page's name."""
    pages = {path.name: Names(path.read_text(encoding="utf-8")) for path in site.glob("*.html")}
    found = []
    for name, page in pages.items():
        for link in page.links + page.loaded:
            parts = urlsplit(link)
            file = unquote(parts.path) or name
            if parts.scheme or parts.netloc:
                bad = link in page.loaded
            elif not (site / file).is_file():
                bad = True
            else:
                names = pages[file].names if file in pages else []
                bad = bool(parts.fragment) and unquote(parts.fragment) not in names
            found += [f"{name}: {link}"] * bad
    return sorted(set(found))


def build(site: Path) -> None:
    """All pages, with what they load of our own."""
    shutil.rmtree(site, ignore_errors=True)
    site.mkdir(parents=True)
    renderer = Renderer()
    markdown = MarkdownWithMath(renderer)
    lessons = make_links.lessons()
    titles = {"index.html": "The series"}
    titles |= {
        page_name(path): f"{int(path.name[:2])}. {make_links.title_and_question(path)[0]}"
        for path in lessons
    }
    titles["glossary.html"] = "Glossary"
    bodies = {}
    for path in (ROOT / "README.md", ROOT / "GLOSSARY.md"):
        text = re.sub("(?s)<!--.*?-->", "", path.read_text(encoding="utf-8"))
        bodies[page_name(path)] = framed(linked(markdown.render(text), path.parent, site))
    for path in lessons:
        bodies[page_name(path)] = lesson(path, markdown, site)
    formulas = typeset(renderer.formulas)
    page = string.Template((PARTS / "page.html").read_text(encoding="utf-8"))
    for name, body in bodies.items():
        body = re.sub("<!--formula (\\d+)-->", lambda place: formulas[int(place[1])], body)
        entries = "".join(
            f'<li><a href="{other}"{" aria-current=page" * (other == name)}>{title}</a></li>'
            for other, title in titles.items()
        )
        text = page.substitute(
            title=f"{titles[name]} · {SERIES}", series=SERIES, body=body,
            navigation=f"<ol>{entries}</ol>",
        )  # fmt: skip
        (site / name).write_text(text, encoding="utf-8")
    style = (PARTS / "style.css").read_text(encoding="utf-8")
    (site / "style.css").write_text(style + HtmlFormatter().get_style_defs(".highlight"))
    shutil.copy(PARTS / "site.js", site)


def main() -> None:
    site = ROOT / "build" / "site"
    subprocess.run(["npm", "ci", "--silent", "--no-audit", "--no-fund"], cwd=PARTS, check=True)
    build(site)
    katex = PARTS / "node_modules" / "katex" / "dist"
    shutil.copytree(katex / "fonts", site / "katex" / "fonts")
    shutil.copy(katex / "katex.min.css", site / "katex")
    search = [PARTS / "node_modules" / ".bin" / "pagefind", "--site", site, "--quiet"]
    subprocess.run(search, check=True)
    if found := broken(site):
        sys.exit("Broken, or from another host:\n" + "\n".join(found))
    size = sum(file.stat().st_size for file in site.rglob("*") if file.is_file())
    print(f"{site.relative_to(ROOT)}: {len(list(site.glob('*.html')))} pages, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
