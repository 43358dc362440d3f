"""What each flag of a record means, for hover and footnotes: the paragraphs of ``docs/checks.md``."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "checks.md"
_UNKNOWN = "Raised by a sanity check that this version does not describe: treat the figure with care."


def explain(flag: str) -> str:
    """A paragraph of plain text; never empty."""
    return _sections(PAGE).get(flag, _UNKNOWN)


@cache
def _sections(page: Path) -> dict[str, str]:
    """Headings that are a name in backticks, with the text below them."""
    if not page.exists():
        return {}
    parts = re.split(r"^#{2,4} +`(\w+)`.*$", page.read_text(), flags=re.MULTILINE)[1:]
    texts = (re.split(r"^#", text, maxsplit=1, flags=re.MULTILINE)[0] for text in parts[1::2])
    plain = (" ".join(re.sub(r"[*`]", "", text).split()) for text in texts)
    return {name: text for name, text in zip(parts[::2], plain, strict=True) if text}
