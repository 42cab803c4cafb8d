"""A hook of MkDocs: draws flowcharts, and turns links that leave docs/ into text.

The forge draws Mermaid by itself and has the files outside docs/; the site has neither.
"""

from __future__ import annotations

import posixpath
import re
from typing import Any

from docs.flowchart import to_svg

# [text](target): not an image, no title; the target is relative.
_LINK = re.compile(r"(?<!!)\[([^\]\n]+)\]\((?![a-z]+:|#|/)([^)\s]+)\)")
_MERMAID = re.compile(r"^```mermaid\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Return the page with drawn flowcharts, and with the path in the repository for each link that leaves docs/."""
    folder = posixpath.dirname(page.file.src_uri)

    def inside(match: re.Match[str]) -> str:
        text, target = match.groups()
        path = posixpath.normpath(posixpath.join("docs", folder, target.partition("#")[0]))
        if path.startswith("docs/"):
            return match[0]
        return text if path in text else f"{text} (`{path}`)"

    # In a block element, the text of which Markdown leaves alone.
    return _MERMAID.sub(lambda match: f"<div>{to_svg(match[1])}</div>", _LINK.sub(inside, markdown))
