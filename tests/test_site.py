"""The pages to read: whole, from stored outputs alone, and with links that hold."""

import re

import make_links
import make_site
import nbformat
import pytest

FROM_NPM = {"katex/katex.min.css", "pagefind/pagefind-ui.css", "pagefind/pagefind-ui.js"}


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """All pages, with formulas as they are written: KaTeX and Pagefind come from npm."""
    place = tmp_path_factory.mktemp("site")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(make_site, "typeset", lambda formulas: [f"<i>{t}</i>" for t, _ in formulas])
        make_site.build(place)
    return place


def test_links_hold_and_nothing_comes_from_elsewhere(site):
    assert {line.split(": ")[1] for line in make_site.broken(site)} == FROM_NPM


@pytest.mark.parametrize("path", make_links.lessons(), ids=lambda path: path.stem)
def test_a_page_has_what_the_lesson_shows(site, path):
    page = (site / f"{path.stem}.html").read_text(encoding="utf-8")
    cells = nbformat.read(path, 4).cells
    shown = [cell for cell in cells if "slider" not in cell.metadata.get("tags", [])]
    stored = sum("image/png" in o.get("data", {}) for c in shown for o in c.get("outputs", []))
    assert len(re.findall(rf'src="{path.stem}/', page)) == stored > 0
    assert page.count("a slider stands here") == len(cells) - len(shown)
    assert "find_spec" not in page, "the cell for Colab"
    assert "<!--formula" not in page
    assert not re.search(r"\$\$|\]\(\.\.?/", page)


def test_a_film_is_moved_without_a_kernel(site):
    page = (site / "05-four-pruning-experiments.html").read_text(encoding="utf-8")
    (film,) = re.findall('(?s)<div class="film".*?</div>', page)
    frames = make_site.Names(film).loaded[1:]
    assert f'max="{len(frames) - 1}"' in film
    assert len({(site / frame).read_bytes() for frame in frames}) == len(frames) > 20
    assert "figures/vanishing.gif" in (site / "index.html").read_text(encoding="utf-8")


def test_what_is_broken_is_found(tmp_path):
    (tmp_path / "a.html").write_text('<h2 id="x">X</h2><a href="a.html#x"></a><a href="#x"></a>')
    (tmp_path / "b.html").write_text(
        '<a href="c.html"></a><a href="a.html#y"></a><a href="https://example.org/a"></a>'
        '<img src="no.png"><script src="https://example.org/b.js"></script>'
    )
    found = ["a.html#y", "c.html", "https://example.org/b.js", "no.png"]
    assert make_site.broken(tmp_path) == [f"b.html: {link}" for link in found]


def test_headings_have_both_names_and_formulas_keep_their_signs():
    renderer = make_site.Renderer()
    text = "## The *one* way\n\n$a_1 < *b*$ and\n\n$$c$$"
    page = make_site.MarkdownWithMath(renderer).render(text)
    assert 'id="the-one-way"' in page
    assert 'id="The-one-way"' in page
    assert renderer.formulas == [("a_1 < *b*", False), ("c", True)]
