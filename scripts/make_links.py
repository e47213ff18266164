"""Write what README.md takes from elsewhere: the project's address, and the table of notebooks.

    python scripts/make_links.py

The address stands once, in pyproject.toml's [project.urls]. In README.md, whatever is between
``<!-- links:NAME -->`` and ``<!-- /links -->`` is written by this script: ``badge`` is the Binder
badge, which opens JupyterLab at the first notebook; ``clone`` is how to get and run the project;
``notebooks`` is the table, from the notebooks themselves and notebooks/measured.csv;
``benchmark`` is what `make bench` measured on the study's network.
"""

import csv
import json
import math
import re
import tomllib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]
# The figures that stand for the notebooks, and what they show, for those who can't see them.
THUMBNAILS = {
    "taylor_contours": "Rise of the loss over two weights, true and quadratic",
    "digits": "The first 20 training images",
    "saliency_pixels": "Saliency, magnitude and share of zero curvature at each pixel",
    "pruning_to_99": "Test accuracy by percent remaining, for five rankings",
    "result2": "Test accuracy by percent remaining, with and without dropout",
    "detective_index_order": "Accuracy by percent pruned: published, run again, corrected",
    "terms_by_criterion": "Share of each Taylor term in the rise of the loss",
    "retraining": "Test accuracy by percent kept, without retraining and with it",
    "shared_weights": "True curvature of shared weights against two computed ones",
    "scaling_model": "Seconds of one pass against the operations counted",
}
BOLD_QUESTION = re.compile(r"\*\*([^*]+\?)\*\*|\*\*The question\.\*\*\s+([^*]+?\?)(?=\s)")


def blocks(repository: str, first_notebook: str) -> dict[str, str]:
    """What stands in each marked place, given the project's address and the first notebook."""
    found = re.fullmatch(r"https://github\.com/([^/]+)/([^/]+?)(?:\.git)?/?", repository)
    if found is None:
        raise ValueError(
            f"[project.urls] Repository is {repository!r}; Binder's badge needs an address like "
            "https://github.com/OWNER/REPO"
        )
    owner, name = found.groups()
    start = quote(f"lab/tree/{first_notebook}", safe="")
    badge = (
        "[![Open in Binder](https://mybinder.org/badge_logo.svg)]"
        f"(https://mybinder.org/v2/gh/{owner}/{name}/HEAD?urlpath={start})"
    )
    clone = f"```sh\ngit clone https://github.com/{owner}/{name} && cd {name}\nmake run\n```"
    return {"badge": badge, "clone": f"\n{clone}\n"}


def title_and_question(path: Path) -> tuple[str, str]:
    """A notebook's heading, and the question in bold below it, each as one line."""
    top = "".join(json.loads(path.read_text())["cells"][0]["source"])
    heading = re.match(r"# (.+)", top)
    question = BOLD_QUESTION.search(top)
    if heading is None or question is None:
        raise ValueError(f"{path.name} must start with '# Title' and '**The question?**'")
    return heading[1].strip(), " ".join((question[1] or question[2]).split())


def figures_of(path: Path) -> list[str]:
    """The names under which a notebook saves its figures, in order."""
    cells = json.loads(path.read_text())["cells"]
    code = "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")
    return re.findall(r"""figures\.save\(\s*[^,]+,\s*["'](\w+)["']""", code)


def thumbnail(path: Path, title: str) -> str:
    """A small picture with its alternative text; of a new notebook, its first one."""
    saved = figures_of(path)
    if not saved:
        return ""
    name = next((name for name in saved if name in THUMBNAILS), saved[0])
    alt = THUMBNAILS.get(name, title).replace('"', "'")
    return f'<img src="figures/{name}.png" width="120" alt="{alt}">'


def notebook_table(paths: list[Path], measured: Path) -> str:
    """The table of notebooks, with the time and the memory that `measured` has for each."""
    text = measured.read_text() if measured.exists() else ""
    rows = {row["notebook"]: row for row in csv.DictReader(text.splitlines())}
    lines = ["| | notebook | the question | time | memory |", "| --- | --- | --- | --- | --- |"]
    for stem in (*(path.stem for path in paths), "all"):
        if stem not in rows:
            raise ValueError(f"{measured.name} has no row for {stem}: run `make run`")
    for path in paths:
        seconds, peak = float(rows[path.stem]["seconds"]), float(rows[path.stem]["peak_mb"])
        time = f"{10 * math.ceil(seconds / 10)} s" if seconds < 95 else f"{seconds / 60:.1f} min"
        title, question = title_and_question(path)
        number, link = int(path.name[:2]), f"notebooks/{path.name}"
        lines.append(
            f"| {thumbnail(path, title)} | [{number}. {title}]({link}) | {question} "
            f"| {time} | {peak / 1000:.1f} GB |"
        )
    whole = rows["all"]  # by the clock; and of those that ran at once
    return "\n".join(lines) + (
        f"\n\nTime and peak memory are as [last measured](notebooks/{measured.name}) by "
        "`make run`, which runs two notebooks at a time, each on half of the cores: here on one of "
        f"two. {float(whole['seconds']) / 60:.1f} minutes in all, at most "
        f"{float(whole['peak_mb']) / 1000:.1f} GB for both."
    )


def benchmark_table(measured: Path) -> str:
    """The table of diagonals, from what the benchmark wrote: the study's network."""
    lines = ["| library | method | seconds | ratio | error |", "| --- | --- | --- | --- | --- |"]
    for row in csv.DictReader(measured.read_text().splitlines()):
        if row["network"] == "study":
            cells = (row[key] for key in ("library", "method", "seconds", "ratio", "error"))
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def rewrite(readme: str, texts: dict[str, str]) -> str:
    """The README with every marked place filled in. Raises ValueError if the badge has none."""
    if "<!-- links:badge -->" not in readme:
        raise ValueError("README.md has no <!-- links:badge --> ... <!-- /links --> for the badge")
    return re.sub(
        r"(<!-- links:(\w+) -->).*?(<!-- /links -->)",
        lambda place: place[1] + texts[place[2]] + place[3],
        readme,
        flags=re.DOTALL,
    )


def current() -> dict[str, str]:
    """What the places hold for the address and the notebooks as they are now."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    notebooks = sorted(ROOT.glob("notebooks/[0-9][0-9]-*.ipynb"))
    first = next(iter(notebooks), ROOT / "notebooks").relative_to(ROOT).as_posix()
    texts = blocks(project["urls"]["Repository"], first)
    table = notebook_table(notebooks, ROOT / "notebooks" / "measured.csv")
    diagonals = benchmark_table(ROOT / "benchmarks" / "diagonal.csv")
    return {**texts, "notebooks": f"\n{table}\n", "benchmark": f"\n{diagonals}\n"}


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewrite(path.read_text(), current()))
