"""Links from pages to files of the repository, such as `../../recipes/train.py`, lead to the repository on the site.

The pages keep relative links, so that they also work where the repository is browsed. The address of the repository is
`repo_url` in mkdocs.yml.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from mkdocs.exceptions import PluginError

ROOT = Path(__file__).parent.parent
_LINK = re.compile(r"\]\((?P<target>\.\./[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Replace links that leave the folder of the pages.

    Raises:
        PluginError: for a link to a file that does not exist.
    """
    folder = Path(page.file.abs_src_path).parent

    def in_repository(match: re.Match[str]) -> str:
        path = Path(os.path.normpath(folder / match["target"]))
        if path.is_relative_to(config.docs_dir) or not path.is_relative_to(ROOT):
            return match[0]
        if not path.exists():
            raise PluginError(f"{page.file.src_path} links to {path.relative_to(ROOT)}, which does not exist.")
        kind = "tree" if path.is_dir() else "blob"
        return f"]({config.repo_url}/{kind}/main/{path.relative_to(ROOT)}{match['anchor'] or ''})"

    return _LINK.sub(in_repository, markdown)
