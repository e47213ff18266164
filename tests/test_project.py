"""The project's own promises: one set of versions, a Binder that builds, tidy notebooks."""

import ast
import asyncio
import importlib.util
import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
import zipfile
from pathlib import Path
from urllib.parse import unquote

import nbformat
import pytest
import rattler
import yaml
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from rattler.exceptions import InvalidMatchSpecError

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
SANITIZE = ROOT / "tests" / "nbval_sanitize.cfg"

each_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def script(name):
    """The module scripts/NAME.py."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "scripts" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def tracked():
    """The files of the repository, as a clone has them; links, which are not files, left out."""
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    paths = [ROOT / name for name in listed.split("\0") if name]
    return [path for path in paths if path.is_file() and not path.is_symlink()]


def code_cells(path):
    return [cell for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]


def texts_of(output):
    """The text that an output shows, and the mime types in which it shows more than text."""
    data = output.get("data", {})
    shown = [output.get("text", ""), *(v for k, v in data.items() if k.startswith("text/"))]
    return "".join("".join(text) for text in shown), [k for k in data if k.startswith("image/")]


# One set of versions


def locked(platform):
    """Name -> version for what the lock installs under Python 3.11 on a platform."""
    environment = {**default_environment(), "python_version": "3.11"}
    environment |= {"python_full_version": "3.11.9", "sys_platform": platform}
    environment |= {"os_name": "nt" if platform == "win32" else "posix"}
    text = (ROOT / "requirements.lock").read_text().replace("\\\n", " ")
    pins = {}
    for line in text.splitlines():
        if not line or line.startswith("#"):
            continue
        spec, *hashes = line.split(" --hash=")
        requirement = Requirement(spec.strip())
        assert hashes, f"{spec} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest.strip()) for digest in hashes)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{spec} is not pinned"
            assert requirement.name not in pins, f"{requirement.name} is there twice"
            pins[requirement.name] = pin.version
    return environment, pins


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_lock_holds_what_pyproject_asks_for(platform):
    environment, pins = locked(platform)
    extras = PROJECT["optional-dependencies"].values()
    asked = [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = requirement.name.lower().replace("_", "-")
            assert name in pins, f"{name} is not in requirements.lock: run `make lock`"
            assert requirement.specifier.contains(pins[name]), f"{requirement}, locked {pins[name]}"


def test_these_tests_run_under_the_lock():
    _, pins = locked(sys.platform)
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "nbval"):
        assert importlib.metadata.version(name) == pins[name]


def test_environment_yml_is_the_lock():
    *specs, pip = ENVIRONMENT["dependencies"]
    parsed = {str(spec.name.normalized): spec for spec in map(strict_spec, specs)}
    assert set(parsed) == {"python", "pip"}
    assert pip == {"pip": ["-r requirements.lock"]}
    # repo2docker understands this form of the version only, and takes 3.10 for any other.
    assert "python=3.11" in specs
    assert SpecifierSet(PROJECT["requires-python"]).contains("3.11")
    assert "PYTHON ?= python3.11" in (ROOT / "Makefile").read_text()


def strict_spec(spec):
    return rattler.MatchSpec(spec, strict=True)


def test_the_strict_parser_refuses():
    with pytest.raises(InvalidMatchSpecError):
        strict_spec("python=3.11=*=x")


def test_binder_builds_from_the_lock(tmp_path):
    """The Dockerfile of the real repo2docker, which builds nothing here and needs no Docker."""
    for name in ("environment.yml", "requirements.lock"):
        shutil.copy(ROOT / name, tmp_path)
    for place in ("Dockerfile", "binder", ".binder", "apt.txt", "runtime.txt", "postBuild"):
        assert not (ROOT / place).exists(), f"{place} would change what Binder builds"
    done = subprocess.run(
        [sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    dockerfile = done.stdout + done.stderr
    assert "environment.py-3.11" in unquote(dockerfile.replace("-2e", ".").replace("-2d", "-"))
    copied = dockerfile.index("COPY --chown=0:0 src/ ${REPO_DIR}/")
    installed = dockerfile.index('env update -p ${NB_PYTHON_PREFIX} --file "environment.yml"')
    assert copied < installed, "the lock is not there yet when the environment is made"


# The repository


def test_tracked_files_are_small():
    large = [
        str(path.relative_to(ROOT))
        for path in tracked()
        if path.stat().st_size >= 1_000_000 and path.parent != ROOT / "prunelib" / "mnist"
    ]
    assert not large


def test_no_file_names_a_machine_or_a_registry():
    forbidden = re.compile(
        r"(?<![\w.~}])/(work|root|home|tmp|Users)/"
        r"|\bpypi\.org|pythonhosted\.org|npmjs\.(org|com)|deb\.debian\.org"
        r"|file:/{3}|--(extra-)?index-url|--find[-]links"
    )
    found = []
    for path in tracked():
        content = path.read_bytes()
        if b"\0" in content or path.suffix == ".gz":
            continue
        found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in forbidden.finditer(content.decode())]
    assert not found


def test_readme_links_agree_with_pyproject():
    links = script("make_links")
    readme = (ROOT / "README.md").read_text()
    assert links.rewrite(readme, links.current()) == readme, "run `make links`"


def test_the_table_of_notebooks_is_made_from_them(tmp_path):
    links = script("make_links")
    path = tmp_path / "04-thing.ipynb"
    top = "# Do the thing\n\n**Who does\nwhat?** And why."
    cells = [nbformat.v4.new_markdown_cell(top), nbformat.v4.new_code_cell("figures.save(f, 'x')")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    assert links.title_and_question(path) == ("Do the thing", "Who does what?")
    assert links.figures_of(path) == ["x"]

    measured = tmp_path / "measured.csv"
    measured.write_text("notebook,seconds,peak_mb\n04-thing,41.2,512\nall,125.0,1312\n")
    _, _, row, _, text = links.notebook_table([path], measured).splitlines()
    cells = row.split(" | ")
    assert cells[1:] == ["[4. Do the thing](notebooks/04-thing.ipynb)", "Who does what?", "50 s",
                         "0.5 GB |"]  # fmt: skip
    assert "2.1 minutes in all" in text
    assert "1.3 GB" in text
    measured.write_text("notebook,seconds,peak_mb\n")
    with pytest.raises(ValueError, match="no row for 04-thing: run `make run`"):
        links.notebook_table([path], measured)


def test_the_series_keeps_its_promise_of_memory():
    runner = script("run_notebooks")
    rows = runner.read_measured()
    assert list(rows) == [*(path.stem for path in NOTEBOOKS), runner.SERIES], "run `make run`"
    # Of memory, not of time: a machine's load is in the seconds, and not in the megabytes.
    assert float(rows[runner.SERIES]["peak_mb"]) <= runner.PROMISED_MB


def test_make_run_takes_two_notebooks_at_a_time_if_they_fit(tmp_path, monkeypatch):
    """The longest first, each on cores of its own; no two that took too much memory last time."""
    runner = script("run_notebooks")
    monkeypatch.setattr(runner, "MEASURED", tmp_path / "measured.csv")
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {3, 5, 6, 9}, raising=False)
    took = {"01-short": (0.1, 900.0), "02-long": (0.3, 1200.0), "03-large": (0.2, 900.0)}
    runner.record([(stem, *measured) for stem, measured in took.items()])
    begun, running = [], set()

    async def execute(path, cores, place):
        running.add(path.stem)
        begun.append((set(running), cores))
        start = time.perf_counter()
        await asyncio.sleep(took[path.stem][0])
        running.remove(path.stem)
        if path.stem == "03-large":
            raise runner.DeadKernelError("killed")
        return runner.Measured(start, time.perf_counter(), took[path.stem][1])

    monkeypatch.setattr(runner, "execute", execute)
    paths = [tmp_path / f"{stem}.ipynb" for stem in took]
    measured, failed = asyncio.run(runner.execute_all(paths))
    # 1200 + 900 MB are too much for two at once, 900 + 900 MB are not
    assert [names for names, _ in begun] == [{"02-long"}, {"03-large"}, {"01-short", "03-large"}]
    assert begun[1][1] | begun[2][1] == {3, 5, 6, 9}
    assert len(begun[1][1]) == len(begun[2][1]) == 2
    assert failed == ["03-large"]
    *each, (name, seconds, together) = runner.table(measured)
    assert [row[0] for row in each] == ["01-short", "02-long"]
    assert (name, together) == ("all", 1200)
    assert seconds >= 0.4

    at_once = {"a": (0, 10, 500), "b": (0, 4, 700), "c": (5, 12, 800)}
    rows = runner.table({stem: runner.Measured(*of) for stem, of in at_once.items()})
    assert rows[-1] == ("all", 12, 1300)


def test_make_links_follows_the_address():
    links = script("make_links")
    readme = "<!-- links:badge -->old<!-- /links -->\n<!-- links:clone --><!-- /links -->"
    texts = links.blocks("https://github.com/someone/thing.git", "notebooks/01-a.ipynb")
    new = links.rewrite(readme, texts)
    assert "/gh/someone/thing/HEAD?urlpath=lab%2Ftree%2Fnotebooks%2F01-a.ipynb)" in new
    assert "git clone https://github.com/someone/thing && cd thing" in new
    assert "old" not in new
    assert links.rewrite(new, texts) == new
    with pytest.raises(ValueError, match="no <!-- links:badge -->"):
        links.rewrite("# Title", texts)
    with pytest.raises(ValueError, match="needs an address like"):
        links.blocks("https://example.org/thing", "notebooks/01-a.ipynb")


def relative_links(markdown):
    """The targets of links and pictures that stay inside the repository."""
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", markdown, flags=re.DOTALL | re.MULTILINE)
    targets = re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)", prose)
    return [t for t in targets if not re.match(r"[a-z][a-z0-9+.-]*:", t)]


def markdown_of(path):
    if path.suffix != ".ipynb":
        return path.read_text()
    cells = nbformat.read(path, 4).cells
    return "\n\n".join(cell.source for cell in cells if cell.cell_type == "markdown")


def anchors(path):
    """What ``#name`` can point to: names set by hand, headings as GitHub or Jupyter has them."""
    text = re.sub(r"^```.*?^```", "", markdown_of(path), flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r"<\w+ [^>]*\b(?:id|name)=\"([^\"]+)", text))
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        found.add(re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"))
        found.add(plain.replace(" ", "-"))
    return found


def broken_links(path):
    """The links in a file whose file is not there or not kept in git, or whose heading is not."""
    kept = set(tracked())
    kept |= {parent for file in kept for parent in file.parents}
    broken = []
    for link in relative_links(markdown_of(path)):
        name, _, fragment = link.partition("#")
        target = (path.parent / unquote(name)).resolve() if name else path
        if name and target not in kept:
            broken.append(link)
        elif fragment and target.suffix in (".md", ".ipynb"):
            broken += [link] * (unquote(fragment) not in anchors(target))
    return broken


def short(path):
    return path.relative_to(ROOT).as_posix()


TEXTS = [path for path in tracked() if path.suffix == ".md"]


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=short)
def test_links_lead_somewhere(path):
    assert not broken_links(path)


def test_a_broken_link_is_found(tmp_path):
    here = tmp_path / "here.md"
    place = ROOT.as_posix()
    here.write_text(
        f'# One *thing*, two\n<a id="by-hand"></a>\n[a]({place}/tests/test_project.py)\n'
        "[b](nowhere.md#x) [c](https://example.org) `[d](no.md)`\n"
        f"[e](#one-thing-two) [f](#by-hand) [g](#three) [h]({place}/CONTRIBUTING.md#licences)\n"
        f'[i]({place}/CONTRIBUTING.md#nothing) <img src="no.png">'
    )
    assert broken_links(here) == ["nowhere.md#x", "#three", f"{place}/CONTRIBUTING.md#nothing",
                                  "no.png"]  # fmt: skip


def missing_alts(markdown):
    """The pictures of a text that say nothing to a reader who does not see them."""
    images = re.findall(r"!\[\]\([^)]+\)", markdown)
    tags = re.findall(r"<img\b[^>]*>", markdown)
    return images + [tag for tag in tags if not re.search(r"alt=[\"'][^\"']+", tag)]


@pytest.mark.parametrize("path", [*TEXTS, *NOTEBOOKS], ids=short)
def test_pictures_have_alternative_text(path):
    assert not missing_alts(markdown_of(path))


def test_a_missing_alternative_text_is_found():
    text = "![](a.png) ![b](b.png) <img src='c.png'> <img src='d.png' alt=''> <img alt='e'>"
    assert missing_alts(text) == ["![](a.png)", "<img src='c.png'>", "<img src='d.png' alt=''>"]


def test_readme_shows_an_api_that_works(tmp_path):
    """The first block of Python in README.md, run in a process of its own."""
    code = re.search(r"^```python\n(.*?)^```", (ROOT / "README.md").read_text(), re.S | re.M)[1]
    names = {node.id for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Name)}
    assert {"runs", "scores", "curve", "terms"} <= names
    program = tmp_path / "readme.py"
    program.write_text(code + "\nassert 0.9 < curve.accuracy[0] <= 1\n")
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-W", "error", program], env=environment, check=True)


def test_readme_lists_every_notebook():
    listed = re.findall(r"\(notebooks/([^)#]+\.ipynb)", (ROOT / "README.md").read_text())
    assert sorted(set(listed)) == [path.name for path in NOTEBOOKS]


def test_notebooks_are_numbered_in_reading_order():
    numbers = [path.name.split("-")[0] for path in NOTEBOOKS]
    assert numbers == [f"{number:02}" for number in range(1, len(NOTEBOOKS) + 1)]


# Each notebook


@each_notebook
def test_notebook_was_executed_once_from_top_to_bottom(path):
    cells = code_cells(path)
    assert all(cell.source.strip() for cell in cells), "an empty code cell"
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))


@each_notebook
def test_notebook_stores_no_trouble(path):
    for cell in code_cells(path):
        for output in cell.outputs:
            text, _ = texts_of(output)
            where = f"after\n{cell.source}\n{text}"
            if output.output_type == "error":
                assert "raises-exception" in cell.metadata.get("tags", []), where
            assert output.get("name") != "stderr", where
            assert not re.search(r"\b\w*Warning\b: ", text), where
            assert not re.search(r"(?<![\w.])/(work|root|home|tmp|Users|srv)/", text), where


@each_notebook
def test_notebook_claims_are_compared_or_asserted(path):
    for cell in code_cells(path):
        tags = set(cell.metadata.get("tags", []))
        assert not tags & {"nbval-skip"}, f"never run by nbval:\n{cell.source}"
        assert not re.search(r"#\s*(NBVAL_|PYTEST_VALIDATE)", cell.source), "say it with a tag"
        if "nbval-ignore-output" in tags and not re.search(r"^\s*assert\b", cell.source, re.M):
            # Only what shows nothing but pictures, or a progress bar or widget, may go unasserted.
            for output in cell.outputs:
                text, pictures = texts_of(output)
                assert pictures or re.search(r"\d+%\||interactive\(|Box\(", text), cell.source


@each_notebook
def test_notebook_cells_fit_a_screen(path):
    for cell in code_cells(path):
        assert len(cell.source.splitlines()) <= 30, cell.source


@each_notebook
def test_cells_that_train_show_a_bar_that_nbval_ignores(path):
    """With an empty cache the bar stands in the output; with a full one it doesn't."""
    for cell in code_cells(path):
        if re.search(r"\btraining\.train\(", cell.source) and re.search(
            r"\b(replace|Recipe)\(", cell.source
        ):
            assert "nbval-ignore-output" in cell.metadata.get("tags", []), cell.source


@each_notebook
def test_notebook_is_tidy(path):
    notebook = nbformat.read(path, 4)
    script("run_notebooks").tidy(notebook)
    assert notebook == nbformat.read(path, 4), "run scripts/run_notebooks.py --tidy"


@each_notebook
def test_notebook_links_to_its_neighbours(path):
    """Its last paragraph: "Previous: [...](file) · Next: [...](file)", as far as they exist."""
    place = NOTEBOOKS.index(path)
    last = markdown_of(path).split("\n\n")[-1]
    found = dict(re.findall(r"(Previous|Next):[^]]+\]\(([^)]+)", last))
    around = {"Previous": place - 1, "Next": place + 1}
    expected = {word: NOTEBOOKS[i].name for word, i in around.items() if 0 <= i < len(NOTEBOOKS)}
    assert found == expected


@each_notebook
def test_notebook_has_exercises_with_folded_solutions(path):
    text = markdown_of(path)
    solutions = script("with_solutions")
    folded = solutions.FOLDED.findall(text)
    assert len(folded) >= 2
    for solution in folded:
        assert "<summary>" in solution
        assert solutions.FENCED.findall(solution), f"no Python in\n{solution}"
        # GitHub renders markdown inside <details> only after an empty line.
        assert re.match(r"<details>\s*<summary>.*?</summary>\n\n", solution, re.S), solution


def test_solutions_are_run_with_this_checkouts_prunelib(tmp_path, monkeypatch):
    """Also in a folder that was copied from another checkout, with its link."""
    solutions = script("with_solutions")
    folder = tmp_path / "build"
    folder.mkdir()
    (folder / "prunelib").symlink_to(tmp_path / "another" / "prunelib")
    monkeypatch.setattr(solutions, "ROOT", tmp_path)
    (tmp_path / "prunelib").mkdir()
    (tmp_path / "notebooks").mkdir()
    solutions.main(folder)
    assert (folder / "prunelib").resolve() == tmp_path / "prunelib"
    assert not os.path.isabs(os.readlink(folder / "prunelib"))


def test_figures_are_those_that_the_notebooks_save():
    links = script("make_links")
    saved = [name for path in NOTEBOOKS for name in links.figures_of(path)]
    assert len(saved) == len(set(saved)), "two notebooks save a figure under one name"
    kept = {path.relative_to(ROOT / "figures").as_posix() for path in tracked()
            if (ROOT / "figures") in path.parents}  # fmt: skip
    assert kept == {f"{name}.{ending}" for name in saved for ending in ("png", "csv")}


# The check of the notebooks can fail


def stored_notebook(path, source, output):
    cell = nbformat.v4.new_code_cell(source, execution_count=1)
    cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=output)]
    metadata = {"kernelspec": {"display_name": "Python 3", "name": "python3"}}
    nbformat.write(nbformat.v4.new_notebook(cells=[cell], metadata=metadata), path)


def test_nbval_compares_numbers_and_not_times(tmp_path):
    stored = {"same": "0.970 in 0.5 s\n", "other": "0.971 in 0.5 s\n", "form": "0.97 in 0.5 s\n"}
    for name, output in stored.items():
        source = "print(f'{0.97:.3f} in {0.1 + 0.2:.2f} s')"
        stored_notebook(tmp_path / f"{name}.ipynb", source, output)
    options = ["--nbval", "--nbval-sanitize-with", str(SANITIZE), "-p", "no:cacheprovider"]
    config = ["-c", str(ROOT / "pyproject.toml"), "--rootdir", str(tmp_path)]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *config, "-rA", str(tmp_path)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    lines = re.findall(r"^(PASSED|FAILED) (\w+)\.ipynb::Cell 0", done.stdout, re.M)
    found = {name: outcome for outcome, name in lines}
    assert found == {"same": "PASSED", "other": "FAILED", "form": "FAILED"}, done.stdout
    assert done.returncode == 1


def test_a_notebook_reaches_prunelib_by_the_link(tmp_path):
    """Without an installation: the kernel starts in the notebook's folder, where the link is."""
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "prunelib").mkdir()
    shutil.copy(ROOT / "prunelib" / "__init__.py", tmp_path / "prunelib")
    link = ROOT / "notebooks" / "prunelib"
    assert link.is_symlink()
    (tmp_path / "notebooks" / "prunelib").symlink_to(link.readlink())
    path = tmp_path / "notebooks" / "01-tiny.ipynb"
    stored_notebook(path, "import prunelib\nprint(prunelib.__version__)", "not this\n")

    asyncio.run(script("run_notebooks").execute(path))
    (cell,) = nbformat.read(path, 4).cells
    assert cell.outputs[0].text == importlib.import_module("prunelib").__version__ + "\n"
    assert cell.execution_count == 1
    assert cell.metadata == {}


def test_widgets_do_not_make_the_runner_miss_the_end_of_a_cell(tmp_path):
    """nbclient's own output widget talks to the kernel while it waits for it, and may hang."""
    path = tmp_path / "01-tiny.ipynb"
    cells = [
        "import ipywidgets as widgets\nshown = widgets.interactive_output(print, {})",
        "print(len(shown.outputs), 'outputs told to the kernel')",
    ]
    cells = [nbformat.v4.new_code_cell(cell, id=f"cell{i}") for i, cell in enumerate(cells)]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    asyncio.run(script("run_notebooks").execute(path))
    first, second = nbformat.read(path, 4).cells
    assert first.outputs == []
    assert second.outputs[0].text == "0 outputs told to the kernel\n"


def test_a_failing_notebook_keeps_its_outputs(tmp_path):
    path = tmp_path / "01-tiny.ipynb"
    stored_notebook(path, "1 / 0", "as it was\n")
    before = path.read_bytes()
    runner = ROOT / "scripts" / "run_notebooks.py"
    done = subprocess.run([sys.executable, runner, path], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stdout
    assert "01-tiny" in done.stderr
    assert path.read_bytes() == before


# What Binder would install (slow: minutes, and a package registry)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what is committed, and an empty environment into which only Binder's lines went."""
    place = tmp_path_factory.mktemp("binder") / "repository"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(place)], check=True)
    environment = place.parent / "environment"
    subprocess.run([sys.executable, "-m", "venv", str(environment)], check=True)
    lines = place / "pip-lines.txt"  # as conda does it: a file of pip's lines, beside the lock
    lines.write_text("\n".join(ENVIRONMENT["dependencies"][-1]["pip"]))
    python = environment / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", lines], cwd=place, check=True)
    yield place, python
    shutil.rmtree(place.parent)


@pytest.mark.slow
def test_binder_environment_runs_the_first_notebook(clone):
    place, python = clone
    subprocess.run([python, "-m", "pip", "check"], check=True)
    subprocess.run([python, "-m", "jupyterlab", "--version"], check=True)
    first = min((place / "notebooks").glob("01-*.ipynb"))
    convert = ["nbconvert", "--to", "notebook", "--execute", "--output", "executed.ipynb"]
    subprocess.run([python, "-m", "jupyter", *convert, first], cwd=place, check=True)
    assert (first.parent / "executed.ipynb").exists()


@pytest.mark.slow
def test_wheel_carries_the_data(clone):
    place, python = clone
    subprocess.run([python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheel", "."],
                   cwd=place, check=True)  # fmt: skip
    (wheel,) = (place / "wheel").glob("*.whl")
    listed = subprocess.run(
        ["git", "ls-files", "prunelib"], cwd=place, capture_output=True, text=True, check=True
    ).stdout.split()
    assert set(listed) <= set(zipfile.ZipFile(wheel).namelist())
