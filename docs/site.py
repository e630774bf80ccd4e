"""Hooks of mkdocs: pages that come from elsewhere, and links that leave the site."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

from pbc import plugins
from pbc.util.source import summary

ROOT = Path(__file__).parent.parent
# A link of Markdown to a file, or an image: its text, the path, and the heading there.
_LINK = re.compile(r"\[([^]]*)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)")
# The page that a file of the sources is on the site.
_PAGES = {"README.md": "index.md", "CHANGELOG.md": "changelog.md"}
_GROUPS = {
    "pbc.strategies": "Strategies",
    "pbc.engines": "Engines",
    "pbc.schedulers": "Schedulers",
    "pbc.passes": "Passes",
    "pbc.rivals": "Rivals of a bench",
    "pbc.callbacks": "Callbacks",
}


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that are written elsewhere: the README, the changes, the plugins."""
    for name, page in _PAGES.items():
        files.append(File.generated(config, page, content=(ROOT / name).read_text()))
    files.append(File.generated(config, "reference/plugins.md", content=_plugins()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Keep links within the site, and name the files of the sources that others lead to.

    Raises PluginError for a link to a file that is not there.
    """
    source = page.file.src_uri
    sources = {url: name for name, url in _PAGES.items()}
    # Where the text was written, links are relative to that.
    folder = (ROOT / sources.get(source, f"docs/{source}")).parent

    def on_site(link: re.Match[str]) -> str:
        text, path, heading = link.group(1), link.group(2), link.group(3) or ""
        target = Path(os.path.normpath(folder / path))
        inside = _page_of(target)
        if inside is None:
            if not target.exists():
                raise PluginError(f"{source}: {path} is not there")
            return text if text.strip("`") == path else f"{text} (`{target.relative_to(ROOT)}`)"
        return f"[{text}]({os.path.relpath(inside, Path(source).parent)}{heading})"

    return _LINK.sub(on_site, markdown)


def _page_of(target: Path) -> str | None:
    """Return the page of a file; None where the site has none."""
    name = target.relative_to(ROOT).as_posix()
    if name in _PAGES:
        return _PAGES[name]
    return name.removeprefix("docs/") if name.startswith("docs/") else None


def _plugins() -> str:
    """Return a page with a table for each kind of plugin, read from the code that is installed."""
    lines = ["# Plugins", "", "What comes with pbc; `pbc plugins` lists others' too.", ""]
    for group, title in _GROUPS.items():
        lines += [f"## {title}", "", f"Entry points `{group}`.", "", "| name | |", "|---|---|"]
        for name, entry in plugins.entries(group).items():
            module, _, attribute = entry.value.partition(":")
            lines.append(f"| `{name}` | {summary(module, attribute)} |")
        lines.append("")
    return "\n".join(lines)
