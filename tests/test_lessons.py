"""What every lesson keeps to, and how the notebooks are run, stored and compared."""

import asyncio
import base64
import io
import os
import re
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import agreement
import compiled
import make_links
import nbformat
import numpy as np
import prose_numbers
import pytest
import run_notebooks
import with_solutions
from nbformat.v4 import new_code_cell, new_markdown_cell, new_notebook, new_output
from PIL import Image

from prunelib import figures

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def cells(path, kind):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == kind]


def markdown_of(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    return "\n\n".join(cell.source for cell in cells(path, "markdown"))


@each_notebook
def test_lesson_has_its_form(path):
    assert path.stat().st_size < 1_000_000
    own = [cell for cell in nbformat.read(path, 4).cells if cell.id != "setup"]  # make_links.py's
    assert len(own) <= 48
    make_links.title_and_question(path)
    place, last = NOTEBOOKS.index(path), markdown_of(path).split("\n\n")[-1]
    around = {"Previous": place - 1, "Next": place + 1}
    expected = {word: NOTEBOOKS[i].name for word, i in around.items() if 0 <= i < len(NOTEBOOKS)}
    assert dict(re.findall(r"(Previous|Next):[^]]+\]\(([^)]+)", last)) == expected
    folded = with_solutions.FOLDED.findall(markdown_of(path))
    assert len(folded) >= 2, "exercises with solutions"
    for solution in folded:
        assert with_solutions.FENCED.findall(solution), f"no Python in\n{solution}"
        # GitHub renders markdown inside <details> only after an empty line.
        assert re.match(r"<details>\s*<summary>.*?</summary>\n\n", solution, re.S), solution


@each_notebook
def test_lesson_shows_the_method_and_not_the_machinery(path):
    code = cells(path, "code")
    claims = [cell for cell in code if "claims" in cell.metadata.get("tags", [])]
    assert [cell.metadata.get("jupyter") for cell in claims] == [{"source_hidden": True}]
    assert re.search(r"^\s*assert\b", claims[0].source, re.M)
    lesson = [cell.source for cell in code if cell is not claims[0]]
    assert not [source for source in lesson if len(source.splitlines()) > 25]
    assert len(re.findall(r"^\s*assert\b", "\n".join(lesson), re.M)) <= 3
    modules = "|".join(path.stem for path in (ROOT / "prunelib").glob("*.py"))
    private = rf"\b(?:{modules})\._[a-z]\w*"
    hidden = rf"\bnoqa\b|\bfmt:|clear_caches|getsource|NBVAL_|{private}"
    assert not re.findall(hidden, "\n".join(cell.source for cell in code))


@each_notebook
def test_lesson_was_executed_from_top_to_bottom_without_trouble(path):
    code = cells(path, "code")
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    tidied = nbformat.read(path, 4)
    run_notebooks.tidy(tidied)
    assert tidied == nbformat.read(path, 4), "run scripts/run_notebooks.py --tidy"
    for cell in code:
        tags = cell.metadata.get("tags", [])
        assert "nbval-skip" not in tags
        for output in cell.outputs:
            data = output.get("data", {})
            text = output.get("text", "") + "".join(v for k, v in data.items() if "text/" in k)
            where = f"after\n{cell.source}\n{text}"
            assert output.output_type != "error" or "raises-exception" in tags, where
            assert output.get("name") != "stderr", where
            assert not re.search(r"\b\w*Warning\b: |Traceback ", text), where
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users|srv)/", text), where
            if any(kind.startswith("image/") for kind in data):
                alt = data.get("text/plain", "")
                assert len(alt.split()) >= 4, f"no alternative text {where}"
                assert not alt.startswith("<"), f"no alternative text {where}"


# Running them: what agrees with the committed notebook stays, and nothing is stored by halves


def notebook(*sources_and_outputs, tags=()):
    """A notebook of one code cell for each pair; only the last one has the tags."""
    made = []
    for count, (source, output) in enumerate(sources_and_outputs, 1):
        made.append(new_code_cell(source, execution_count=count, id=f"cell{count}"))
        made[-1].outputs = [output]
    made[-1].metadata = nbformat.from_dict({"tags": list(tags)} if tags else {})
    return new_notebook(cells=made, metadata=run_notebooks.METADATA)


def text(shown):
    return new_output("stream", name="stdout", text=shown)


def picture(level, alt="A curve that falls to the right"):
    png = io.BytesIO()
    Image.fromarray(np.full((20, 30), level, np.uint8)).save(png, "png")
    data = {"image/png": base64.b64encode(png.getvalue()).decode(), "text/plain": alt}
    return new_output("display_data", data=data, metadata={"image/png": {"alt": alt}})


@pytest.mark.parametrize(
    ("stored", "new", "agree"),
    [
        (text("loss 0.12345 in 3.1 s\n"), text("loss 0.12346 in 4 s\n"), True),
        (text("loss 0.1234\n"), text("loss 0.1244\n"), False),
        (text("47,410 weights"), text("47,411 weights"), False),
        (text("at 9.999e-07, -0.0"), text("at  1.000e-06, 0.0"), True),
        (text("True"), text("False"), False),
        (picture(100), picture(100), True),
        (picture(100), picture(101), False),
        (picture(100), picture(100, "Another text"), False),
        (text("x"), picture(100), False),
    ],
)
def test_outputs_agree_to_rounding(stored, new, agree):
    before, after = notebook(("f()", stored)), notebook(("f()", new))
    agreement.keep_what_agrees(after, before)
    assert after.cells[0].outputs == ([stored] if agree else [new])


def test_a_measured_output_is_stored_anew_only_after_a_change():
    def kept(first, source="time()", shown="took 4.5\n", rewritten=()):
        before = notebook(("f()", text("1.5")), ("time()", text("took 3.5\n")), tags=tags)
        after = notebook(first, (source, text(shown)), tags=tags)
        agreement.keep_what_agrees(after, before, frozenset(rewritten))
        return after.cells[1].outputs[0].text == "took 3.5\n"

    tags = [agreement.MEASURED]
    assert kept(("f()", text("1.5001")))
    assert not kept(("f()", text("1.6")))  # a result before it has changed
    assert not kept(("f() ", text("1.5")))  # the code before it has changed
    assert not kept(("f()", text("1.5")), source="time() ")
    assert not kept(("f()", text("1.5")), shown="failed 3.5\n")


def execute(path, **options):
    asyncio.run(run_notebooks.execute(path, **options))
    return nbformat.read(path, 4).cells


def test_a_run_that_agrees_changes_no_file(tmp_path):
    """Neither the notebook nor a measured figure; a figure whose table changed is stored."""
    folder, figures = tmp_path / "notebooks", tmp_path / "figures"
    folder.mkdir()
    figures.mkdir()
    (folder / "figures.py").write_text(
        "def save(fig, name, table):\n    open(f'../figures/{name}.csv', 'w').write(table)\n"
    )
    path = folder / "01-tiny.ipynb"
    code = "import figures\nfigures.save(None, 'one', 'x')\nprint(1 / 3)"
    timed = "figures.save(None, 'two', 'x')\nprint(3.5)"
    made = notebook((code, text("0.33333\n")), (timed, text("2.5\n")), tags=[agreement.MEASURED])
    nbformat.write(made, path)
    for name in ("one", "two"):
        (figures / f"{name}.csv").write_text("x" if name == "one" else "y")
    for command in (["init", "-q"], ["add", "."], ["-c", "user.name=a", "-c", "user.email=a@b",
                                                   "commit", "-qm", "a"]):  # fmt: skip
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    before = path.stat().st_mtime_ns
    execute(path)
    assert path.stat().st_mtime_ns == before
    assert (figures / "two.csv").read_text() == "y"

    (figures / "one.csv").write_text("another table")
    first, second = execute(path)
    assert first.outputs[0].text == "0.3333333333333333\n"
    assert second.outputs[0].text == "3.5\n"
    assert (figures / "two.csv").read_text() == "x"
    assert execute(path, fresh=True)[0].outputs[0].text == "0.3333333333333333\n"


def test_tidy_keeps_alternative_texts_and_says_where_a_widget_was():
    widget = {run_notebooks.WIDGET: {"model_id": "x"}, "text/plain": "interactive(children=())"}
    made = notebook(("show()", picture(100)), ("interact(f)", new_output("display_data", widget)))
    made.cells[0].metadata = nbformat.from_dict({"jupyter": {"source_hidden": True}, "editable": 1})
    run_notebooks.tidy(made)
    assert made.cells[0].outputs == [picture(100)]
    slider = "(With a kernel running: a slider.)"
    assert made.cells[1].outputs == [new_output("display_data", {"text/plain": slider})]
    assert made.cells[0].metadata == {"jupyter": {"source_hidden": True}}


def test_the_longest_start_first_each_on_cores_of_its_own(tmp_path, monkeypatch):
    monkeypatch.setattr(run_notebooks, "MEASURED", tmp_path / "measured.csv")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6, 9}, raising=False)
    took = {"01-short": 0.1, "02-long": 0.3, "03-fails": 0.2}
    run_notebooks.record([(stem, seconds, 500) for stem, seconds in took.items()])
    begun = []

    async def execute(path, cores, fresh):
        begun.append((path.stem, frozenset(cores)))
        start = time.perf_counter()
        await asyncio.sleep(took[path.stem])
        if path.stem == "03-fails":
            raise run_notebooks.DeadKernelError("killed")
        return run_notebooks.Measured(start, time.perf_counter(), 500)

    monkeypatch.setattr(run_notebooks, "execute", execute)
    paths = [tmp_path / f"{stem}.ipynb" for stem in took]
    measured, failed = asyncio.run(run_notebooks.execute_all(paths))
    assert [name for name, _ in begun] == ["02-long", "03-fails", "01-short"]
    assert begun[0][1] | begun[1][1] == {3, 5, 6, 9}
    assert len(begun[0][1]) == len(begun[1][1]) == 2
    assert failed == ["03-fails"]
    rows = run_notebooks.table(measured)
    assert [row[0] for row in rows] == ["01-short", "02-long", "all"]
    assert rows[-1][2] == 1000


def test_a_notebook_in_any_folder_finds_prunelib_and_its_widgets_end(tmp_path):
    """nbclient's own output widget talks to the kernel while it waits for it, and may hang."""
    path = tmp_path / "01-tiny.ipynb"
    shown = "import ipywidgets\nshown = ipywidgets.interactive_output(print, {})"
    code = "import prunelib\nprint(prunelib.__file__, len(shown.outputs))"
    nbformat.write(notebook((shown, text("")), (code, text(""))), path)
    first, second = execute(path)
    assert first.outputs == []
    assert second.outputs[0].text == f"{ROOT / 'prunelib' / '__init__.py'} 0\n"


def test_a_failing_notebook_keeps_its_outputs(tmp_path):
    path = tmp_path / "01-tiny.ipynb"
    nbformat.write(notebook(("1 / 0", text("as it was"))), path)
    before = path.read_bytes()
    runner = ROOT / "scripts" / "run_notebooks.py"
    done = subprocess.run([sys.executable, runner, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stdout
    assert "01-tiny" in done.stderr
    assert path.read_bytes() == before


def test_nbval_compares_numbers_and_not_times(tmp_path):
    stored = {"same": "0.970 in 0.5 s\n", "other": "0.971 in 0.5 s\n"}
    for name, shown in stored.items():
        code = "print(f'{0.97:.3f} in {0.1 + 0.2:.2f} s')"
        nbformat.write(notebook((code, text(shown))), tmp_path / f"{name}.ipynb")
    options = ["--nbval", "--nbval-sanitize-with", ROOT / "tests" / "nbval_sanitize.cfg"]
    config = ["-c", ROOT / "pyproject.toml", "--rootdir", tmp_path, "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *config, "-rA", tmp_path],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = re.findall(r"^(PASSED|FAILED) (\w+)\.ipynb::Cell 0", done.stdout, re.M)
    assert {name: outcome for outcome, name in lines} == {"same": "PASSED", "other": "FAILED"}


def test_notebooks_with_solutions_are_a_project_of_their_own(tmp_path, monkeypatch):
    """So figures.save draws there, not over ours."""
    with_solutions.main(tmp_path / "notebooks")
    with monkeypatch.context() as patched:  # were it not refused, our notebooks would be gone
        patched.setattr(with_solutions, "ROOT", tmp_path / "ours")
        with pytest.raises(ValueError, match="would overwrite this project"):
            with_solutions.main(tmp_path / "ours" / "notebooks")
    names = [path.name for path in sorted((tmp_path / "notebooks").iterdir())]
    assert names == [path.name for path in NOTEBOOKS]
    assert (tmp_path / "benchmarks" / "diagonal.csv").exists()
    monkeypatch.chdir(tmp_path / "notebooks")
    assert figures.folder() == tmp_path / "figures"


def test_compiled_programs_are_kept_unless_damaged_or_out_of_reach(tmp_path, monkeypatch):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    folder = Path(compiled.environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"])
    assert folder.parent == tmp_path / "build"
    whole = zlib.compress(b"program" * 100)
    (folder / "whole-cache").write_bytes(whole)
    (folder / "damaged-cache").write_bytes(whole[:-1])
    assert compiled.environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"] == str(folder)
    assert [path.name for path in folder.glob("*-cache")] == ["whole-cache"]
    shutil.rmtree(tmp_path / "build")
    (tmp_path / "build").write_text("no folder can be made here")
    elsewhere = compiled.environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"]
    assert Path(elsewhere).is_dir()
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", "mine")
    assert compiled.environment(tmp_path)["JAX_COMPILATION_CACHE_DIR"] == "mine"


def test_numbers_that_only_the_prose_has_are_found():
    prose = "It keeps 97.1 % (0.971 of 1), not 98.2 % or `3.3`; *2.5 times* as many."
    lesson = notebook(("print(accuracy)", text("0.97132, 2.46\n")))
    lesson.cells.append(new_markdown_cell(prose))
    (found,) = prose_numbers.unshown(lesson)
    assert found[0] == 1
    assert "98.2" in found[1]


def test_a_lesson_is_given_badges_and_a_first_cell_that_does_nothing_here():
    made = notebook(("1 + 1", new_output("execute_result", execution_count=1)), ("2", text("2\n")))
    made.cells.insert(0, new_markdown_cell("# Do the thing\n\n**What?** This."))
    address = "https://github.com/someone/thing"
    make_links.equip(made, address, "notebooks/04-thing.ipynb")
    top, setup, first, second = made.cells
    assert top.source.startswith("# Do the thing\n\n**What?** This.\n\n[![Open in Binder](")
    assert "someone/thing/HEAD?urlpath=lab%2Ftree%2Fnotebooks%2F04-thing.ipynb)" in top.source
    assert top.source.endswith("/github/someone/thing/blob/main/notebooks/04-thing.ipynb)")
    assert setup.metadata.tags == ["setup"]
    assert f'ipywidgets "prunelib @ git+{address}"' in setup.source
    assert [cell.execution_count for cell in (setup, first, second)] == [1, 2, 3]
    assert first.outputs[0].execution_count == 2
    nbformat.validate(made)

    once = nbformat.writes(made)
    setup.source = top.source.replace("someone", "another")
    make_links.equip(made, address, "notebooks/04-thing.ipynb")
    assert nbformat.writes(made) == once


def test_readme_table_and_links_are_made_from_the_lessons(tmp_path):
    top = "# Do the thing\n\n**Who does\nwhat?** And why."
    lesson = new_notebook(cells=[new_markdown_cell(top)])
    nbformat.write(lesson, tmp_path / "04-thing.ipynb")
    (tmp_path / "04.png").touch()
    (tmp_path / "measured.csv").write_text("notebook,seconds,peak_mb\n04-thing,41.2,512\n")

    def row(measured):
        table = make_links.notebook_table([tmp_path / "04-thing.ipynb"], measured, tmp_path)
        return table.splitlines()[2].split(" | ")

    picture, *rest = row(tmp_path / "measured.csv")
    assert picture == '| <img src="figures/icons/04.png" width="120" alt="Do the thing">'
    assert rest == ["[4. Do the thing](notebooks/04-thing.ipynb)", "Who does what?", "50 s |"]
    assert "–" not in row(tmp_path / "nothing.csv")[-1]  # no column for what was not measured

    readme = "<!-- links:badge -->old<!-- /links -->\n<!-- links:clone --><!-- /links -->"
    texts = make_links.blocks("https://github.com/someone/thing.git", "notebooks/01-a.ipynb")
    new = make_links.rewrite(readme, texts)
    assert "/gh/someone/thing/HEAD?urlpath=lab%2Ftree%2Fnotebooks%2F01-a.ipynb)" in new
    assert "git clone https://github.com/someone/thing && cd thing" in new
    assert "old" not in new
    assert make_links.rewrite(new, texts) == new
    with pytest.raises(ValueError, match="does not fill: table"):
        make_links.rewrite(readme + "<!-- links:table --><!-- /links -->", texts)
    with pytest.raises(ValueError, match="needs an address like"):
        make_links.blocks("https://example.org/thing", "notebooks/01-a.ipynb")
