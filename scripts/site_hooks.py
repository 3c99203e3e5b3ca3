"""What `mkdocs build` does beside rendering: the navigation, the API page, and links that lead out of docs/."""

import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).resolve().parent.parent


def on_config(config: Any) -> Any:
    """Pages of the navigation that do not exist are left out, those that it does not name come last."""
    pages = {path.relative_to(config.docs_dir).as_posix() for path in Path(config.docs_dir).rglob("*.md")}
    for section in config.nav:
        for title, entries in section.items():
            if isinstance(entries, list):
                section[title] = [entry for entry in entries if entry in pages]
    others = sorted(pages - set(_named(config.nav)))
    config.nav = [*config.nav, {"More": others}] if others else config.nav
    return config


def _named(nav: Any) -> list[str]:
    if isinstance(nav, str):
        return [nav]
    entries = nav.values() if isinstance(nav, dict) else nav
    return [page for entry in entries for page in _named(entry)]


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """The public names where they are asked for; links out of docs/ become names, as the site has no such page.

    Raises:
        PluginError: a link leads to a file that does not exist.
    """
    if "<!-- reference -->" in markdown:
        sys.path.insert(0, str(ROOT / "scripts"))  # here, as mkdocs puts the path back after loading this file
        from site_tables import reference

        markdown = markdown.replace("<!-- reference -->", reference())
    folder = Path(page.file.abs_src_path).parent

    def name(link: re.Match[str]) -> str:
        target = (folder / link[2].partition("#")[0]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: links to {link[2]}, which does not exist")
        return f"{link[1]} (`{target.relative_to(ROOT)}`)" if "`" not in link[1] else link[1]

    return re.sub(r"(?<!!)\[([^\]]+)\]\((\.\./[^)\s]+)\)", name, markdown)
