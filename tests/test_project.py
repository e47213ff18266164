"""The project's own promises: one set of versions, a Binder that builds, links that work."""

import ast
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from urllib.parse import unquote

import import_graph
import make_links
import pandas
import pytest
import rattler
import run_notebooks
import yaml
from agreement import saved_figures
from packaging.markers import default_environment
from packaging.requirements import Requirement
from test_lessons import NOTEBOOKS, cells, markdown_of

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())
MODULES = sorted((ROOT / "prunelib").glob("*.py"))
# Files in figures/ that no notebook saves together with a table.
OTHER_FIGURES = {"vanishing.gif", "gpu_diagonal.csv"}  # the film of 05; 14's measured table


def run(*command, **options):
    return subprocess.run(command, capture_output=True, text=True, check=True, **options)


def tracked():
    """The files of the repository, as a clone has them."""
    names = run("git", "ls-files", "-z", cwd=ROOT).stdout.split("\0")
    return [ROOT / name for name in names if name and (ROOT / name).is_file()]


# One set of versions


PYTHONS = ("3.11", "3.12", "3.13", "3.14")  # as the Makefile has them


def locked(platform, python):
    """Name -> version for what the lock installs under a Python on a platform."""
    environment = {**default_environment(), "python_version": python}
    environment |= {"python_full_version": f"{python}.2", "sys_platform": platform}
    environment |= {"os_name": "nt" if platform == "win32" else "posix"}
    pins = {}
    for line in (ROOT / "requirements.lock").read_text().replace("\\\n", " ").splitlines():
        spec, *hashes = line.split(" --hash=")
        if not line or line.startswith("#"):
            continue
        requirement = Requirement(spec.strip())
        assert hashes, f"{spec} has no hash"
        assert all(re.fullmatch(r"sha256:[0-9a-f]{64}", digest.strip()) for digest in hashes)
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==", f"{spec} is not pinned"
            assert requirement.name not in pins, f"{requirement.name} is there twice"
            pins[requirement.name] = pin.version
    return environment, pins


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_lock_holds_what_pyproject_asks_for(platform, python):
    environment, pins = locked(platform, python)
    extras = PROJECT["optional-dependencies"].values()
    asked = [*PROJECT["dependencies"], *(line for lines in extras for line in lines)]
    for requirement in map(Requirement, asked):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            name = requirement.name.lower().replace("_", "-")
            assert name in pins, f"{name} is not in requirements.lock: run `make lock`"
            assert requirement.specifier.contains(pins[name]), f"{requirement}, locked {pins[name]}"


def test_these_tests_run_under_the_lock():
    _, pins = locked(sys.platform, "{}.{}".format(*sys.version_info))
    for name in ("jax", "jaxlib", "flax", "optax", "numpy", "pandas", "nbval"):
        assert importlib.metadata.version(name) == pins[name]


def test_environment_yml_is_the_lock():
    *specs, pip = ENVIRONMENT["dependencies"]
    parsed = [rattler.MatchSpec(spec, strict=True) for spec in specs]
    assert {str(spec.name.normalized) for spec in parsed} == {"python", "pip"}
    assert pip == {"pip": ["-r requirements.lock"]}
    # repo2docker understands this form of the version only, and takes 3.10 for any other.
    assert "python=3.13" in specs
    assert PROJECT["requires-python"] == f">={PYTHONS[0]}"


def test_make_takes_a_python_that_runs_and_says_what_it_needs(tmp_path):
    """Not one that is only there, as pyenv's are while another version is chosen."""

    def tool(name, does):
        (tmp_path / name).write_text(f"#!/bin/sh\n{does}\n")
        (tmp_path / name).chmod(0o755)

    def made(*options):
        command = [shutil.which("make"), "VENV=new", "new/.locked", *options]
        environment = {"PATH": str(tmp_path)}
        return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)

    (tmp_path / "sh").symlink_to(shutil.which("sh"))
    assert "This needs Python 3.11 to 3.14" in made().stderr
    tool("python3.14", "exit 127")
    tool("python3.13", f'exec "{sys.executable}" "$@"')
    tool("python3.12", "exit 1")
    assert f'"{sys.executable}" -m venv' in made("-n").stdout
    assert '"another" -m venv' in made("-n", "PYTHON=another").stdout
    tool("uv", "echo uv 1")
    assert re.search(rf'uv venv .*--python "{sys.executable}"', made("-n").stdout)
    (tmp_path / "python3.13").unlink()
    assert re.search('uv venv .*--python "3.13"', made("-n").stdout)
    assert not (ROOT / "new").exists()


def test_binder_builds_from_the_lock(tmp_path):
    """The Dockerfile of the real repo2docker, which builds nothing here and needs no Docker."""
    for name in ("environment.yml", "requirements.lock", "postBuild"):
        shutil.copy(ROOT / name, tmp_path)
    for place in ("Dockerfile", "binder", ".binder", "apt.txt", "runtime.txt", "start"):
        assert not (ROOT / place).exists(), f"{place} would change what Binder builds"
    done = run(sys.executable, "-m", "repo2docker", "--no-build", "--debug", str(tmp_path))
    dockerfile = done.stdout + done.stderr
    assert "environment.py-3.13" in unquote(dockerfile.replace("-2e", ".").replace("-2d", "-"))
    assert "RUN ./postBuild" in dockerfile
    assert "\nset -e\n" in (ROOT / "postBuild").read_text(), "a failure must fail the build"
    copied = dockerfile.index("COPY --chown=0:0 src/ ${REPO_DIR}/")
    installed = dockerfile.index('env update -p ${NB_PYTHON_PREFIX} --file "environment.yml"')
    assert copied < installed, "the lock is not there yet when the environment is made"


# The repository


def test_modules_fit_on_a_few_screens():
    lines = {path.name: len(path.read_text().splitlines()) for path in MODULES}
    assert sum(lines.values()) <= 3280
    assert max(lines.values()) <= 400, lines


def test_prunelib_has_no_circle_of_imports():
    import_graph.layers(import_graph.graph())
    source = "from prunelib import a\ndef f():\n    import prunelib.b\n    from .c import x"
    assert import_graph.imported(source, {"a", "b", "c", "d"}) == {"a", "b", "c"}
    with pytest.raises(ValueError, match="cycle"):
        import_graph.layers({"a": {"b"}, "b": {"a"}})


def test_tracked_files_are_small_and_name_no_machine_or_registry():
    forbidden = re.compile(
        r"(?<![\w.~}])/(work|root|home|tmp|Users)/"
        r"|\bpypi\.org|pythonhosted\.org|npmjs\.(org|com)|deb\.debian\.org"
        r"|file:/{3}|--(extra-)?index-url|--find[-]links"
    )
    found = []
    for path in tracked():
        content = path.read_bytes()
        large = 1_000_000 if path.suffix != ".gif" else 3_000_000
        if len(content) >= large and path.parent.parent != ROOT / "prunelib":  # data, runs
            found.append(f"{path.relative_to(ROOT)}: {len(content)} bytes")
        if b"\0" not in content and path.suffix != ".gz":
            found += [f"{path.relative_to(ROOT)}: {m[0]}" for m in forbidden.finditer(
                content.decode())]  # fmt: skip
    assert not found


def anchors(path):
    """What ``#name`` can point to: names set by hand, headings as GitHub or Jupyter has them."""
    text = re.sub(r"^```.*?^```", "", markdown_of(path), flags=re.DOTALL | re.MULTILINE)
    found = set(re.findall(r"<\w+ [^>]*\b(?:id|name)=\"([^\"]+)", text))
    for heading in re.findall(r"^#+ +(.+?)\s*$", text, flags=re.MULTILINE):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", heading).replace("`", "").replace("*", "")
        found |= {re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-"), plain.replace(" ", "-")}
    return found


def broken_links(path):
    """The links in a file whose file is not there or not kept in git, or whose heading is not."""
    kept = set(tracked())
    kept |= {parent for file in kept for parent in file.parents}
    prose = re.sub(r"^```.*?^```|`[^`\n]*`", "", markdown_of(path), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(<?([^)\s>]+)", prose) + re.findall(r"(?:src|href)=\"([^\"]+)", prose)
    broken = []
    for link in links:
        name, _, fragment = link.partition("#")
        target = (path.parent / unquote(name)).resolve() if name else path
        if re.match(r"[a-z][a-z0-9+.-]*:", link):
            continue  # it leads out of the repository
        if name and target not in kept:
            broken.append(link)
        elif fragment and target.suffix in (".md", ".ipynb"):
            broken += [link] * (unquote(fragment) not in anchors(target))
    return broken


TEXTS = [*(path for path in tracked() if path.suffix == ".md"), *NOTEBOOKS]


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links_lead_somewhere_and_pictures_have_alternative_text(path):
    assert not broken_links(path)
    text = markdown_of(path)
    assert not re.findall(r"!\[\s*\]\([^)]+\)", text)
    tags = re.findall(r"<img\b[^>]*>", text)
    assert not [tag for tag in tags if not re.search(r"alt=[\"'][^\"']+", tag)]


def test_a_broken_link_is_found(tmp_path):
    (tmp_path / "here.md").write_text("# One *thing*\n[a](no.md) [b](#one-thing) `[c](d)` [e](#f)")
    assert broken_links(tmp_path / "here.md") == ["no.md", "#f"]


def test_readme_is_current_and_its_api_works(tmp_path):
    readme = (ROOT / "README.md").read_text()
    assert make_links.rewrite(readme, make_links.current()) == readme, "run `make links`"
    for path in NOTEBOOKS:
        assert make_links.equipped(path) == path.read_text(), f"{path.name}: run `make links`"
    code = re.search(r"^```python\n(.*?)^```", readme, re.S | re.M)[1]
    assert "prunelib" in {getattr(node, "module", "") for node in ast.walk(ast.parse(code))}
    (tmp_path / "readme.py").write_text(code)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    run(sys.executable, "-W", "error", tmp_path / "readme.py", env=environment)


def test_the_series_keeps_its_promises():
    numbers = [int(path.name.split("-")[0]) for path in NOTEBOOKS]
    assert numbers == sorted(set(numbers))
    rows = run_notebooks.read_measured()  # what `make run` measured last, if it has been run
    whole = rows.pop(run_notebooks.SERIES)
    assert float(whole["seconds"]) <= run_notebooks.PROMISED_SECONDS
    assert set(rows) == {path.stem for path in NOTEBOOKS}, "`make run`"
    slow = [name for name, row in rows.items() if float(row["seconds"]) >= 120]
    large = [name for name, row in rows.items() if float(row["peak_mb"]) >= 1000]  # Binder: 2 GB
    assert not slow + large


def test_figures_are_what_the_notebooks_save_and_their_tables_are_read_simply():
    saved = [n for path in NOTEBOOKS for cell in cells(path, "code")
             for n in saved_figures(cell.source)]  # fmt: skip
    assert len(saved) == len(set(saved)), "two cells save a figure under one name"
    kept = {path.name for path in tracked() if path.parent == ROOT / "figures"} - OTHER_FIGURES
    assert kept == {f"{name}.{ending}" for name in saved for ending in ("png", "csv")}
    for name in saved:
        table = pandas.read_csv(ROOT / "figures" / f"{name}.csv")
        assert table.size, name
        assert not [column for column in table if re.match("#|Unnamed", column)], name


# What Binder would install (slow: minutes, and a package registry)


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of what is committed, and an empty environment into which only Binder's lines went."""
    place = tmp_path_factory.mktemp("binder") / "repository"
    run("git", "clone", "--quiet", ROOT, place)
    environment = place.parent / "environment"
    run(sys.executable, "-m", "venv", environment)
    lines = place / "pip-lines.txt"  # as conda does it: a file of pip's lines, beside the lock
    lines.write_text("\n".join(ENVIRONMENT["dependencies"][-1]["pip"]))
    python = environment / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "-r", lines, cwd=place)
    path = f"{python.parent}{os.pathsep}{os.environ['PATH']}"
    run(place / "postBuild", cwd=place, env={**os.environ, "PATH": path})
    yield place, python
    shutil.rmtree(place.parent)


def execute(python, notebook):
    """Run a notebook in its folder, in an environment, as `jupyter` does it; with its outputs."""
    convert = ["nbconvert", "--to", "notebook", "--execute", "--output", "executed.ipynb"]
    run(python, "-m", "jupyter", *convert, notebook, cwd=notebook.parent)
    return (notebook.parent / "executed.ipynb").read_text()


@pytest.mark.slow
def test_binder_environment_runs_the_first_notebook(clone):
    place, python = clone
    run(python, "-m", "pip", "check")
    run(python, "-m", "jupyterlab", "--version")
    execute(python, min((place / "notebooks").glob("01-*.ipynb")))
    assert not run("git", "status", "--short", "figures", cwd=place).stdout


@pytest.mark.slow
def test_wheel_carries_the_data_and_no_tests(clone):
    place, python = clone
    run(python, "-m", "pip", "wheel", "-q", "--no-deps", "-w", "wheel", ".", cwd=place)
    (wheel,) = (place / "wheel").glob("*.whl")
    packed = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert packed == set(run("git", "ls-files", "prunelib", cwd=place).stdout.split())


@pytest.mark.slow
def test_a_lone_notebook_installs_prunelib_and_runs(clone, tmp_path):
    """As on Colab: only Jupyter is there, and one file. Git takes the clone for the address."""
    place, _ = clone
    run(sys.executable, "-m", "venv", tmp_path / "environment")
    python = tmp_path / "environment" / "bin" / "python"
    run(python, "-m", "pip", "install", "-q", "ipykernel", "nbconvert")
    (tmp_path / "alone").mkdir()
    first = min((place / "notebooks").glob("01-*.ipynb"))
    lesson = Path(shutil.copy(first, tmp_path / "alone"))
    git = {"COUNT": "1", "KEY_0": f"url.{place}.insteadOf", "VALUE_0": make_links.address()}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in git.items():
            patch.setenv(f"GIT_CONFIG_{name}", value)
        execute(python, lesson)
    where = run(python, "-c", "import prunelib; print(prunelib.__file__)", cwd=tmp_path).stdout
    assert Path(where).is_relative_to(tmp_path / "environment")
    assert list((tmp_path / "alone" / "figures").glob("*.png"))
