"""The stylesheet of the page: one column, colours for light and dark, pictures enlarged without smoothing.

Text stands out from its ground by 4.5 : 1 and lines by 3 : 1 (WCAG 2, AA); curves differ by dashes too.
"""

from __future__ import annotations

from unet_surgery.picture.palette import FONTS

__all__ = ["STYLE"]

STYLE = (
    """\
:root { --page: #ffffff; --card: #f5f7f9; --edge: #dde3e9; --text: #1b242d; --muted: #57626d; --rule: #e3e7eb;
  --tone-0: #2f6fb0; --tone-1: #b3590f; --tone-2: #2d7d46; --tone-3: #a3246f; --right: #1f7a3d; --wrong: #b3261e; }
@media screen and (prefers-color-scheme: dark) {
  :root { --page: #11161c; --card: #1a2129; --edge: #2c353f; --text: #e8edf2; --muted: #a3afbb; --rule: #2c353f;
    --tone-0: #6fb1f2; --tone-1: #f0a35e; --tone-2: #6fcf8f; --tone-3: #f08cc4; --right: #6fcf8f; --wrong: #ff8f86; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text); font: 16px/1.55 """
    + FONTS
    + """; }
main { max-width: 54rem; margin: 0 auto; padding: 2rem 1rem 4rem; }
h1 { font-size: 1.9rem; line-height: 1.2; margin: 0 0 .5rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; }
h3 { font-size: 1rem; }
.lead { color: var(--muted); font-size: 1.1rem; margin: 0; max-width: 44rem; }
p { max-width: 44rem; overflow-wrap: anywhere; white-space: pre-line; }
.note { color: var(--muted); font-size: .9rem; margin: .6rem 0 0; }
.wide { overflow-x: auto; }
.wide:focus-visible { outline: 2px solid var(--tone-0); outline-offset: 4px; }
nav ul { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.25rem; padding: 0; margin: 1.25rem 0 0; }
nav li { overflow-wrap: anywhere; }
a { color: var(--tone-0); }
caption { text-align: left; color: var(--muted); font-size: .9rem; padding-bottom: .5rem; }
.unseen { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.drawing { display: block; width: 100%; height: auto; }
section + section:not(:has(h2)) { margin-top: 1.75rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th, td { padding: .45rem .75rem; text-align: right; border-bottom: 1px solid var(--edge); }
th:first-child { text-align: left; padding-left: 0; }
td:last-child, th:last-child { padding-right: 0; }
thead th { color: var(--muted); font-weight: 600; font-size: .9rem; border-bottom-width: 2px; vertical-align: bottom; }
tbody th { font-weight: 500; }
.dense { font-size: .85rem; }
.dense tbody th { white-space: nowrap; }
.dense th, .dense td { padding-top: .15rem; padding-bottom: .15rem; font-size: .85rem; }
.grid { display: grid; gap: .6rem; align-items: center;
  grid-template-columns: minmax(8rem, 1.5fr) repeat(var(--columns), minmax(0, 1fr)); }
.head { text-align: center; font-weight: 600; font-size: .9rem; overflow-wrap: anywhere; align-self: end; }
.prompt { color: var(--muted); font-size: .95rem; line-height: 1.35; overflow-wrap: anywhere; }
.cell { text-align: center; line-height: 1.3; }
.cell img { display: block; width: 100%; height: auto; image-rendering: pixelated; border-radius: 4px;
  outline: 1px solid var(--edge); outline-offset: -1px; }
.cell img.smooth { image-rendering: auto; }
.cell .mark { font-size: .8rem; }
.right { color: var(--right); }
.wrong { color: var(--wrong); }
.gallery { display: grid; gap: 1rem .8rem; grid-template-columns: repeat(auto-fill, minmax(9rem, 1fr)); }
.gallery .cell { margin: 0; }
.gallery .prompt { margin-top: .3rem; font-size: .85rem; text-align: left; }
.legend { list-style: none; display: flex; flex-wrap: wrap; gap: .25rem 1.5rem; padding: 0; margin: 0 0 .5rem;
  font-size: .9rem; }
.key { width: 28px; height: 8px; margin-right: .5rem; vertical-align: middle; }
.chart { display: block; width: 100%; height: auto; }
.chart text { fill: var(--muted); font-size: 12px; font-variant-numeric: tabular-nums; }
.rule { stroke: var(--rule); fill: none; }
.curve { fill: none; stroke-width: 2; stroke-linejoin: round; }
.tone-0 { stroke: var(--tone-0); }
.tone-1 { stroke: var(--tone-1); stroke-dasharray: 7 3; }
.tone-2 { stroke: var(--tone-2); stroke-dasharray: 2 3; }
.tone-3 { stroke: var(--tone-3); stroke-dasharray: 10 3 2 3; }
.fill-0 { fill: var(--tone-0); }
.fill-1 { fill: var(--tone-1); }
.fill-2 { fill: var(--tone-2); }
.fill-3 { fill: var(--tone-3); }
.track { fill: var(--card); }
.whisker { stroke: var(--text); stroke-width: 2; fill: none; vector-effect: non-scaling-stroke; }
.axis { font-weight: 600; }
.spread { stroke: var(--muted); stroke-width: 1.5; }
.chart .name { fill: var(--text); }
.mark { transform-box: fill-box; transform-origin: center; }
.chart .mark text { font-size: 11px; }
.own circle { fill: var(--tone-0); }
.chart .own text { fill: var(--page); }
.others path { fill: var(--page); stroke: var(--tone-1); stroke-width: 1.5; }
.chart .others text { fill: var(--tone-1); }
.dot.own { color: var(--tone-0); }
.dot.others { color: var(--tone-1); }
.bars { display: grid; gap: .35rem .9rem; align-items: center;
  grid-template-columns: minmax(5rem, auto) minmax(6rem, 1fr) auto; }
.group { grid-column: 1 / -1; margin: .8rem 0 0; }
.bar { width: 100%; height: 1.1rem; border-radius: 3px; outline: 1px solid var(--edge); }
.value { font-variant-numeric: tabular-nums; white-space: nowrap; }
.value span { color: var(--muted); font-size: .85rem; }
@media (max-width: 40rem) {
  .grid { grid-template-columns: repeat(var(--columns), minmax(5.5rem, 1fr)); gap: .4rem; }
  .prompt { grid-column: 1 / -1; margin-top: .6rem; }
  .prompt.head { display: none; }
  .chart text { font-size: 18px; }
  .chart .name { display: none; }
  .chart .mark { transform: scale(1.6); }
  .drawing { width: 44rem; max-width: none; }
  .bars { grid-template-columns: auto minmax(0, 1fr); grid-auto-flow: dense; row-gap: .25rem; }
  .name { grid-column: 1; }
  .value { grid-column: 2; text-align: right; white-space: normal; }
  .bar { grid-column: 1 / -1; margin-bottom: .5rem; }
}
@media print {
  main { max-width: none; padding: 0; }
  nav { display: none; }
  .wide { overflow: visible; }
  h2 { break-after: avoid; }
  tr, .chart, .drawing, .cell, .bars { break-inside: avoid; }
}
"""
)
