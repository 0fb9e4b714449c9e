"""What reports are made of: one HTML page, all inline; nothing is loaded, nothing runs. Texts are escaped here."""

from __future__ import annotations

import base64
from collections.abc import Iterable, Sequence
from html import escape

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #222; max-width: 1180px; margin: 2em auto; padding: 0 1em; }
h1 { font-size: 1.5em; } h2 { font-size: 1.15em; margin-top: 2em; }
table { border-collapse: collapse; font-size: 13px; } .wide { overflow-x: auto; }
th, td { padding: .3em .7em; text-align: right; border-bottom: 1px solid #ddd; white-space: nowrap; }
th { border-bottom: 2px solid #888; font-weight: 600; vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 12em; overflow-wrap: anywhere; }
tr.constant td, tr.oracle td { color: #666; } tr.first td { border-top: 2px solid #bbb; }
img { max-width: 100%; height: auto; } .note { color: #555; }
.warning { background: #fff3cd; border-left: 4px solid #d39e00; padding: .5em .9em; margin: .4em 0; }
"""


def page(title: str, parts: Iterable[str]) -> str:
    """The whole page of parts that are HTML.

    It asks browsers, by a content security policy, to load and run nothing.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta http-equiv="Content-Security-Policy" '
        "content=\"default-src 'none'; img-src data:; style-src 'unsafe-inline'\">\n"
        f"<title>{escape(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(parts)
        + "\n</body>\n</html>\n"
    )


def figure(image: bytes, what: str) -> str:
    return f'<p><img alt="{escape(what)}" src="data:image/png;base64,{base64.b64encode(image).decode()}"></p>'


def lines(texts: Iterable[str]) -> str:
    return '<ul class="note">' + "".join(f"<li>{escape(line)}</li>" for line in texts) + "</ul>"


def table(head: Sequence[str], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """Rows are a class and their cells; all cells are text."""
    top = "".join(f"<th>{escape(name)}</th>" for name in head)
    body, before = [], ""
    for kind, cells in rows:
        first = " first" if before and kind != before else ""
        body.append(
            f'<tr class="{kind}{first}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>"
        )
        before = kind
    return f'<div class="wide"><table><tr>{top}</tr>{"".join(body)}</table></div>'
