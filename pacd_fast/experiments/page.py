"""A page of HTML that needs no other file and no network: text, tables, charts as SVG, images as PNG."""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Collection, Iterable, Mapping, Sequence
from html import escape
from typing import Any

import numpy as np
from torch import Tensor

from pacd_fast.data import as_float
from pacd_fast.experiments.plots import COLOURS

_STYLE = """
body{font:15px/1.45 system-ui,sans-serif;color:#1a1a1a;max-width:1180px;margin:0 auto;padding:8px 16px 40px}
h1{font-size:1.6em;margin:.6em 0 .2em}
h2{font-size:1.25em;margin:1.8em 0 .4em;border-top:1px solid #ddd;padding-top:.7em}
h3{font-size:1em;margin:1.2em 0 .3em}p,h1,h2,h3,li,figcaption{overflow-wrap:anywhere}
.scroll{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums;font-size:.93em}
th,td{padding:3px 10px;text-align:right;white-space:nowrap;border-bottom:1px solid #e4e4e4}
th:first-child,td:first-child{text-align:left;padding-left:0}
.pairs{table-layout:fixed;width:100%}.pairs td{white-space:normal;overflow-wrap:anywhere}
.pairs td+td{text-align:left}.pairs td:first-child{width:9em;vertical-align:top}
pre{font-size:.9em;margin:0}.chart{display:flex;flex-wrap:wrap;gap:4px 20px;align-items:flex-start}
.chart svg{flex:1 1 300px;max-width:640px;height:auto}.chart ul{flex:0 1 auto;list-style:none;margin:8px 0;padding:0}
.chart li svg{width:34px;height:10px;margin-right:8px}
.images{display:flex;flex-wrap:wrap;gap:10px}figure{margin:0;width:92px}figcaption{font-size:.76em;line-height:1.25}
img{width:92px;image-rendering:pixelated;display:block}.note{color:#555}
"""
_WIDTH, _HEIGHT, _LEFT, _BOTTOM = 420, 280, 46, 38
_DASHES = ("none", "6 3", "2 2")


def page(title: str, parts: Iterable[str]) -> str:
    """The whole document."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n"
        + "\n".join(parts)
        + "\n</body></html>\n"
    )


def heading(text: str, level: int = 2) -> str:
    return f"<h{level}>{escape(text)}</h{level}>"


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows by column; a column that a row does not have is a dash in it."""
    names = list(dict.fromkeys(name for row in rows for name in row))
    head = "".join(f"<th>{escape(name)}</th>" for name in names)
    lines = ("".join(f"<td>{escape(str(row.get(name, '-')))}</td>" for name in names) for row in rows)
    return f'<div class="scroll"><table><tr>{head}</tr><tr>{"</tr><tr>".join(lines)}</tr></table></div>'


def pairs(values: Mapping[str, Any]) -> str:
    """Names and what they are, a line each: long values are wrapped, so that nothing is scrolled out of sight."""
    lines = (f"<td>{escape(name)}</td><td>{escape(str(value))}</td>" for name, value in values.items())
    return f'<table class="pairs"><tr>{"</tr><tr>".join(lines)}</tr></table>'


def preformatted(text: str) -> str:
    return f'<pre class="scroll">{escape(text)}</pre>'


def images(pictures: Sequence[tuple[Tensor, str]]) -> str:
    """Images [C, H, W] (uint8, or float from 0 to 1), each with the text below it."""
    figures = (
        f'<figure><img alt="" src="{_png(picture)}"><figcaption>{escape(text)}</figcaption></figure>'
        for picture, text in pictures
    )
    return f'<div class="images">{"".join(figures)}</div>'


def chart(
    lines: Mapping[str, tuple[np.ndarray, np.ndarray]],
    x_label: str,
    y_label: str,
    *,
    right: float = 0.0,
    marks: Mapping[str, Collection[float]] | None = None,
) -> str:
    """Lines (x, y), y from 0 to 1, and vertical dotted marks by name; the legend stands beside or below, never on it.

    right: where the x axis ends at least.
    """
    marks = marks or {}
    right = (
        max(
            [
                right,
                *(float(x[-1]) for x, _ in lines.values() if len(x)),
                *(at for all_of in marks.values() for at in all_of),
            ]
        )
        or 1.0
    )

    def place(x: Any, y: Any) -> tuple[Any, Any]:
        across = _LEFT + (_WIDTH - _LEFT - 8) * (np.asarray(x) / right)
        return across.round(1), (8 + (_HEIGHT - _BOTTOM - 8) * (1 - np.asarray(y))).round(1)

    drawn = [f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" font-size="11" fill="none">']
    for tick in _ticks(right):
        x, bottom = place(tick, 0.0)
        drawn.append(f'<path d="M{x} 8V{bottom}" stroke="#e6e6e6"/>{_text(x, bottom + 14, f"{tick:g}")}')
    for tick in (0, 0.2, 0.4, 0.6, 0.8, 1):
        left, y = place(0.0, tick)
        drawn.append(f'<path d="M{left} {y}H{_WIDTH - 8}" stroke="#e6e6e6"/>{_text(left - 14, y + 4, f"{tick:g}")}')
    middle = (_HEIGHT - _BOTTOM) // 2
    drawn.append(_text((_LEFT + _WIDTH) / 2, _HEIGHT - 6, x_label))
    drawn.append(f'<g transform="translate(11 {middle}) rotate(-90)">{_text(0, 0, y_label)}</g>')
    keys = []
    for number, (name, (x, y)) in enumerate(lines.items()):
        dash = _DASHES[number // len(COLOURS) % len(_DASHES)]
        stroke = f'stroke="{COLOURS[number % len(COLOURS)]}" stroke-width="1.6"' + f' stroke-dasharray="{dash}"' * bool(
            dash
        )
        drawn.append(f'<path d="{_path(*place(x, y))}" {stroke}/>')
        keys.append((name, stroke))
    stroke = 'stroke="#666" stroke-dasharray="1 3"'
    for name, all_of in marks.items():
        drawn += (f'<path d="M{place(at, 0)[0]} 8V{place(at, 0)[1]}" {stroke}/>' for at in all_of)
        keys.append((name, stroke))
    legend = "".join(
        f'<li><svg viewBox="0 0 34 10"><path d="M0 5H34" {stroke}/></svg>{escape(name)}</li>' for name, stroke in keys
    )
    return f'<div class="chart">{"".join(drawn)}</svg><ul>{legend}</ul></div>'


def _text(x: float, y: float, text: str) -> str:
    return f'<text x="{x:g}" y="{y:g}" text-anchor="middle" fill="#333">{escape(text)}</text>'


def _path(x: np.ndarray, y: np.ndarray) -> str:
    """A polyline; points that cannot be told apart are left out, so that a million images draw as fast as a hundred."""
    new = np.ones(len(x), dtype=bool)
    new[1:] = (np.diff(x) != 0) | (np.diff(y) != 0)
    return "M" + "L".join(f"{a:g} {b:g}" for a, b in zip(x[new], y[new], strict=True))


def _ticks(right: float) -> list[float]:
    power = 10.0 ** math.floor(math.log10(right / 4))
    step = next(step * power for step in (1, 2, 2.5, 5, 10) if right / (step * power) <= 7)
    return [step * i for i in range(int(right / step + 1e-9) + 1)]


def _png(image: Tensor) -> str:
    """A data URI; grey for one channel, else the first three as colours."""
    pixels = (as_float(image).clamp(0, 1) * 255).round().byte()
    pixels = (pixels[:3] if len(pixels) >= 3 else pixels[:1]).permute(1, 2, 0).contiguous()
    height, width, channels = pixels.shape
    raw = b"".join(b"\0" + row.tobytes() for row in pixels.numpy())

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2 if channels == 3 else 0, 0, 0, 0)
    whole = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(raw, 9)) + chunk(b"IEND", b"")
    return "data:image/png;base64," + base64.b64encode(whole).decode()
