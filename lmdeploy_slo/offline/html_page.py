"""What every page of a report has in common: its frame, its style sheet, and figures within the page itself.

A page has no script and loads nothing. The same figures give the same bytes.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Mapping, Sequence

import matplotlib as mpl
from matplotlib.figure import Figure


def page(title: str, subtitle: str, sections: Sequence[str], *, style: str = "", switch: str = "") -> str:
    """The whole page. sections: HTML, as `section` makes it. style, switch: more of the style sheet, and HTML between
    the head line and the sections."""
    return _TEMPLATE.format(
        title=html.escape(title),
        subtitle=html.escape(subtitle),
        style=_STYLE + style,
        switch=switch,
        sections="\n".join(sections),
    )


def section(title: str, body: str, note: str = "") -> str:
    """A heading, a remark in plain text, and HTML."""
    remark = f'<p class="note">{html.escape(note)}</p>' if note else ""
    return f"<section><h2>{html.escape(title)}</h2>{remark}{body}</section>"


def origin(command: str, settings: Mapping[str, str]) -> str:
    """What made the page, and name -> value of what that was made with, in order."""
    lines = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in settings.items())
    return f"<pre>{html.escape(command)}</pre><dl>{lines}</dl>"


def svg_figure(figure: Figure, name: str, label: str) -> str:
    """The figure as an <svg> element as wide as its place. name: unlike that of any other figure of the page."""
    text = io.StringIO()
    with mpl.rc_context({"svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return _inline_svg(text.getvalue(), name, label)


def _inline_svg(svg: str, name: str, label: str) -> str:
    """The <svg> element alone, with ids that no other figure on the page has, as wide as its place."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>\s*", "", body, flags=re.DOTALL)
    body = re.sub(r'\bid="', f'id="{name}-', body)
    body = re.sub(r'href="#', f'href="#{name}-', body)
    body = re.sub(r"url\(#", f"url(#{name}-", body)
    opening = re.search(r'viewBox="[^"]*"', body)
    assert opening is not None, "matplotlib gives every figure a viewBox"
    accessible = f'<svg class="plot" role="img" aria-label="{html.escape(label)}" {opening.group()} '
    accessible += 'xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">'
    return accessible + body[body.index(">") + 1 :]


_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f5f7fa;color:#1f2933;font:15px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif}
header{background:#102a43;color:#fff;padding:2.2rem max(1.5rem,calc(50vw - 38rem)) 2rem}
header h1{margin:0 0 .3rem;font-size:1.7rem;font-weight:650;letter-spacing:-.01em}
header p{margin:0;color:#bcccdc}
main{max-width:79rem;margin:0 auto;padding:0 1.5rem 3rem}
section{background:#fff;border:1px solid #e4e7eb;border-radius:10px;padding:1.3rem 1.6rem 1.6rem;margin-top:1.3rem}
section.first{background:none;border:0;padding:0}
h2{margin:0 0 .2rem;font-size:1.15rem;font-weight:650}
.note{margin:0 0 1rem;color:#616e7c;font-size:.92rem;max-width:62rem}
.tiles{display:flex;flex-wrap:wrap;gap:1rem}
.tile{flex:1 1 11rem;background:#fff;border:1px solid #e4e7eb;border-top:4px solid;border-radius:8px;padding:.8rem 1rem}
.tile span,.tile small{display:block;color:#616e7c}
.tile strong{font-size:1.75rem;font-weight:650;letter-spacing:-.02em}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(27rem,1fr));gap:1.5rem}
figure{margin:0}
figcaption{font-size:.92rem;color:#3e4c59;margin-bottom:.3rem}
svg.plot{width:100%;height:auto;display:block}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums;font-size:.9rem}
th,td{padding:.42rem .7rem;text-align:right;white-space:nowrap}
th{font-weight:600;color:#52606d;border-bottom:2px solid #cbd2d9;white-space:normal;vertical-align:bottom}
td.name,th.name{text-align:left}
td.name{vertical-align:top}
tr.group td{border-top:1px solid #e4e7eb}
td.best{font-weight:650;color:#0b6bcb}
pre{background:#f5f7fa;border:1px solid #e4e7eb;border-radius:6px;padding:.9rem 1.1rem;overflow-x:auto;font-size:.86rem;
white-space:pre-wrap;overflow-wrap:anywhere}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.25rem 1.6rem;margin:0;font-size:.92rem}
dt{color:#616e7c}
dd{margin:0;overflow-wrap:anywhere}
.switch{position:absolute;opacity:0;pointer-events:none}
nav{position:sticky;top:0;z-index:1;background:rgba(245,247,250,.94);border-bottom:1px solid #e4e7eb;
padding:.6rem max(1.5rem,calc(50vw - 38rem));display:flex;gap:.45rem;align-items:center}
nav span{color:#616e7c;margin-right:.4rem}
nav label{border:1px solid #cbd2d9;border-radius:999px;padding:.1rem .85rem;background:#fff;cursor:pointer}
@media print{nav{display:none}section{break-inside:avoid}body{background:#fff}}
@media (max-width:34rem){.pair{grid-template-columns:1fr}}
"""

_TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<link rel="icon" href="data:,">
<style>{style}</style>
</head>
<body>
<header><h1>{title}</h1><p>{subtitle}</p></header>
{switch}
<main>
{sections}
</main>
</body>
</html>
"""
