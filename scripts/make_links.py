"""Write what README.md and the notebooks take from elsewhere: the project's address, the table.

    python scripts/make_links.py

The address stands once, in pyproject.toml's [project.urls]. In README.md, whatever is between
``<!-- links:NAME -->`` and ``<!-- /links -->`` is written by this script: ``badge`` are the badges
that open the first notebook on Binder and Colab; ``clone`` is how to get and run the project;
``notebooks`` is the table, from the notebooks themselves and notebooks/measured.csv. Each notebook
gets its own badges, and a first code cell that installs prunelib where it is missing, as on Colab.
"""

import csv
import json
import math
import re
import tomllib
from pathlib import Path
from urllib.parse import quote

import nbformat

ROOT = Path(__file__).resolve().parents[1]
# What the lessons' icons (figures/icons/NN.png) show, for those who can't see them; of one that is
# not here its lesson's title.
ICONS: dict[int, str] = {}
BOLD_QUESTION = re.compile(r"\*\*([^*]+\?)\*\*|\*\*The question\.\*\*\s+([^*]+?\?)(?=\s)")
SETUP = """\
# Where prunelib is missing, as on Colab, this installs it; elsewhere it does nothing.
import importlib.util

if importlib.util.find_spec("prunelib") is None:
    %pip install --quiet ipywidgets "prunelib @ git+{}"
"""


def owner_and_name(repository: str) -> str:
    """OWNER/REPO from the project's address."""
    found = re.fullmatch(r"https://github\.com/([^/]+/[^/]+?)(?:\.git)?/?", repository)
    if found is None:
        raise ValueError(
            f"[project.urls] Repository is {repository!r}; Binder's badge needs an address like "
            "https://github.com/OWNER/REPO"
        )
    return found[1]


def badges(repository: str, notebook: str) -> str:
    """The two links that open a notebook, given by its path in the project, on a server."""
    project = owner_and_name(repository)
    start = quote(f"lab/tree/{notebook}", safe="")
    return (
        "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
        f"(https://mybinder.org/v2/gh/{project}/HEAD?urlpath={start}) "
        "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)]"
        f"(https://colab.research.google.com/github/{project}/blob/main/{notebook})"
    )


def blocks(repository: str, first_notebook: str) -> dict[str, str]:
    """What stands in each marked place, given the project's address and the first notebook."""
    project = owner_and_name(repository)
    folder = project.partition("/")[2]
    clone = f"```sh\ngit clone https://github.com/{project} && cd {folder}\nmake run\n```"
    return {"badge": badges(repository, first_notebook), "clone": f"\n{clone}\n"}


def equip(notebook: nbformat.NotebookNode, repository: str, path: str) -> None:
    """Give a notebook, in place, its badges and its first code cell; run nothing.

    The cells after a new one count on, as if it had been run with them.
    """
    top = notebook.cells[0]
    text = re.sub(r"\n+\[!\[Open in Binder\].*$", "", top.source)
    top.source = f"{text}\n\n{badges(repository, path)}"
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    source = SETUP.format(f"https://github.com/{owner_and_name(repository)}").strip()
    if "setup" in code[0].metadata.get("tags", []):
        code[0].source = source
        return
    first = nbformat.v4.new_code_cell(source, id="setup", metadata={"tags": ["setup"]})
    notebook.cells.insert(notebook.cells.index(code[0]), first)
    for count, cell in enumerate([first, *code], 1):
        cell.execution_count = count
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = count


def title_and_question(path: Path) -> tuple[str, str]:
    """A notebook's heading, and the question in bold below it, each as one line."""
    top = "".join(json.loads(path.read_text(encoding="utf-8"))["cells"][0]["source"])
    heading = re.match(r"# (.+)", top)
    question = BOLD_QUESTION.search(top)
    if heading is None or question is None:
        raise ValueError(f"{path.name} must start with '# Title' and '**The question?**'")
    return heading[1].strip(), " ".join((question[1] or question[2]).split())


def icon(number: int, title: str, folder: Path) -> str:
    """A lesson's small picture with its alternative text; empty while it has none."""
    path = folder / f"{number:02}.png"
    if not path.exists():
        return ""
    alt = ICONS.get(number, title).replace('"', "'")
    return f'<img src="figures/icons/{path.name}" width="120" alt="{alt}">'


def duration(seconds: float) -> str:
    """A time as a reader takes it: 50 s, 2.1 min."""
    return f"{10 * math.ceil(seconds / 10)} s" if seconds < 95 else f"{seconds / 60:.1f} min"


def notebook_table(paths: list[Path], measured: Path, icons: Path) -> str:
    """The table of lessons, with the time that `measured` has for each, and of the whole."""
    text = measured.read_text() if measured.exists() else ""
    rows = {row["notebook"]: row for row in csv.DictReader(text.splitlines())}
    lines = ["| | lesson | the one question |", "| --- | --- | --- |"]
    if rows:
        lines = ["| | lesson | the one question | time |", "| --- | --- | --- | --- |"]
    for path in paths:
        title, question = title_and_question(path)
        number = int(path.name[:2])
        time = duration(float(rows[path.stem]["seconds"])) if path.stem in rows else "–"
        lesson = f"[{number}. {title}](notebooks/{path.name})"
        line = f"| {icon(number, title, icons)} | {lesson} | {question} |"
        lines.append(f"{line} {time} |" if rows else line)
    if whole := rows.get("all"):  # by the clock; and of those that ran at once
        lines += [
            "",
            f"Times are as [last measured](notebooks/{measured.name}) by `make run` on two cores, "
            "two notebooks at a time, one on each. "
            f"All took {float(whole['seconds']) / 60:.1f} minutes, and the two at once never more "
            f"than {float(whole['peak_mb']) / 1000:.1f} GB of memory.",
        ]
    return "\n".join(lines)


def rewrite(readme: str, texts: dict[str, str]) -> str:
    """The README with every marked place filled in. Raises ValueError if the badge has none."""
    if "<!-- links:badge -->" not in readme:
        raise ValueError("README.md has no <!-- links:badge --> ... <!-- /links --> for the badge")
    if strange := set(re.findall(r"<!-- links:(\w+) -->", readme)) - set(texts):
        raise ValueError(
            f"README.md has places that this script does not fill: {', '.join(sorted(strange))}. "
            "Remove their two comments, <!-- links:NAME --> and <!-- /links -->"
        )
    return re.sub(
        r"(<!-- links:(\w+) -->).*?(<!-- /links -->)",
        lambda place: place[1] + texts[place[2]] + place[3],
        readme,
        flags=re.DOTALL,
    )


def address() -> str:
    """The project's address, from the one place where it stands."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["urls"]["Repository"]


def lessons() -> list[Path]:
    """The notebooks of the series, in reading order."""
    return sorted(ROOT.glob("notebooks/[0-9][0-9]-*.ipynb"))


def equipped(path: Path) -> str:
    """The text of a notebook's file with what `equip` gives it."""
    notebook = nbformat.read(path, as_version=4)
    equip(notebook, address(), f"notebooks/{path.name}")
    return nbformat.writes(notebook) + "\n"


def current() -> dict[str, str]:
    """What the places hold for the address and the notebooks as they are now."""
    notebooks = lessons()
    first = next(iter(notebooks), ROOT / "notebooks").relative_to(ROOT).as_posix()
    texts = blocks(address(), first)
    measured, icons = ROOT / "notebooks" / "measured.csv", ROOT / "figures" / "icons"
    return {**texts, "notebooks": f"\n{notebook_table(notebooks, measured, icons)}\n"}


if __name__ == "__main__":
    texts = {path: equipped(path) for path in lessons()}
    readme = ROOT / "README.md"
    texts[readme] = rewrite(readme.read_text(encoding="utf-8"), current())
    for path, text in texts.items():
        if text != path.read_text(encoding="utf-8"):
            path.write_text(text, encoding="utf-8")
