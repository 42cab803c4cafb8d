"""A hook of MkDocs: pages link to files outside docs/, which the forge shows and the site does not have."""

from __future__ import annotations

import posixpath
import re
from typing import Any

# [text](target): not an image, no title; the target is relative.
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?![a-z]+:|#|/)([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page with links that leave docs/ replaced by their text and the path in the repository."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if path.startswith("docs/"):
            return match[0]
        return text if path in text else f"{text} (`{path}`)"

    return _LINK.sub(inside, markdown)
