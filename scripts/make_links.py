"""Write README.md's links that depend on where the project lives.

    python scripts/make_links.py

The address stands once, in pyproject.toml's [project.urls]. In README.md, whatever is between
``<!-- links:NAME -->`` and ``<!-- /links -->`` is written by this script: ``badge`` is the Binder
badge, which opens JupyterLab at the first notebook; ``clone`` is how to get and run the project.
"""

import re
import tomllib
from pathlib import Path
from urllib.parse import quote

ROOT = Path(__file__).resolve().parents[1]


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
    """The blocks for the address in pyproject.toml and the notebooks as they are now."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    first = next(iter(sorted(ROOT.glob("notebooks/01-*.ipynb"))), ROOT / "notebooks")
    return blocks(project["urls"]["Repository"], first.relative_to(ROOT).as_posix())


if __name__ == "__main__":
    path = ROOT / "README.md"
    path.write_text(rewrite(path.read_text(), current()))
