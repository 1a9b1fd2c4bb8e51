"""The page's style sheet and its few lines of script."""

# Series colours have a contrast of at least 4.5:1 to the page in both schemes.
CSS = """
:root {
  color-scheme: light dark;
  --page: #ffffff; --card: #f6f7f9; --ink: #1b1f24; --soft: #4d5560; --grid: #d5d9df;
  --link: #0b57b0; --good: #0f6b3a; --warn: #8a4b00; --bad: #b3211b;
  --series-1: #0b5fc4; --series-2: #a84a00; --series-3: #0f6b3a; --series-4: #b3211b;
  --series-5: #7426b8; --series-6: #0b6b74; --series-7: #ab1a66; --series-8: #555d68;
}
@media (prefers-color-scheme: dark) {
  :root {
    --page: #14171b; --card: #1e2228; --ink: #e8ebef; --soft: #b3bbc6; --grid: #3b424c;
    --link: #8ab8ff; --good: #63d297; --warn: #f2b05e; --bad: #ff938c;
    --series-1: #7db2ff; --series-2: #f5a552; --series-3: #63d297; --series-4: #ff938c;
    --series-5: #cda6ff; --series-6: #5cd0da; --series-7: #ff94c6; --series-8: #b3bbc6;
  }
}
* { box-sizing: border-box; }
body {
  margin: 0 auto; max-width: 1240px; padding: 0 16px 48px; background: var(--page);
  color: var(--ink); font: 16px/1.5 system-ui, -apple-system, "Segoe UI", sans-serif;
}
h1 { font-size: 1.6rem; line-height: 1.25; margin: 24px 0 8px; overflow-wrap: anywhere; }
h2 { font-size: 1.3rem; margin: 40px 0 8px; overflow-wrap: anywhere; }
h3 { font-size: 1.05rem; margin: 28px 0 8px; }
p { max-width: 75ch; margin: 8px 0; overflow-wrap: anywhere; }
a { color: var(--link); }
nav { margin: 12px 0; } nav a { display: inline-block; margin-right: 14px; }
summary { font-weight: 600; margin: 20px 0 8px; cursor: pointer; }
.soft { color: var(--soft); }
.notes { border-left: 4px solid var(--warn); padding: 4px 12px; background: var(--card); }
.figures {
  display: grid; gap: 16px; grid-template-columns: repeat(auto-fit, minmax(min(100%, 370px), 1fr));
}
figure { margin: 0; padding: 12px; background: var(--card); border-radius: 8px; min-width: 0; }
figure.wide, figure.listed { grid-column: 1 / -1; }
@media (min-width: 1200px) { figure.listed { grid-column: span 2; } }
figure svg { display: block; width: 100%; height: auto; margin: 0 auto; }
.title { font-weight: 600; margin: 0 0 6px; }
figcaption { color: var(--soft); font-size: 0.875rem; margin-top: 8px; max-width: 75ch; }
.scroll { overflow-x: auto; max-width: 100%; }
.scroll:focus-visible { outline: 2px solid var(--link); }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 4px 10px; text-align: right; border-bottom: 1px solid var(--grid); }
th:first-child, td:first-child { text-align: left; }
td.text, th.text { text-align: left; overflow-wrap: anywhere; min-width: 8em; }
th button {
  all: unset; cursor: pointer; font-weight: 600; text-decoration: underline dotted;
}
th button:focus-visible { outline: 2px solid var(--link); }
th[aria-sort="ascending"] button::after { content: " \\2191"; }
th[aria-sort="descending"] button::after { content: " \\2193"; }
.pipeline { list-style: none; margin: 0; padding: 0; }
.pipeline > li { display: flex; flex-wrap: wrap; gap: 8px; margin-bottom: 4px; }
.pipeline > li + li::before {
  content: "\\2193"; flex: 0 0 100%; text-align: center; color: var(--soft); line-height: 1;
}
.phase { flex: 0 0 100%; font-size: 0.875rem; color: var(--soft); }
.job {
  flex: 1 1 104px; min-width: 0; padding: 6px 8px; border-radius: 6px; background: var(--page);
  border: 2px solid var(--soft); font-size: 0.8125rem; line-height: 1.35; overflow-wrap: anywhere;
}
.job b { display: block; }
.job .number { display: block; font-size: 1.05rem; font-weight: 600; }
.job.done { border-color: var(--good); }
.job.running, .job.interrupted { border-color: var(--warn); border-style: dashed; }
.job.pending, .job[class~="not"] { border-style: dotted; }
.samples { display: flex; flex-wrap: wrap; gap: 10px; list-style: none; padding: 0; margin: 8px 0; }
.samples li { width: 104px; font-size: 0.75rem; line-height: 1.3; overflow-wrap: anywhere; }
.rows {
  display: grid; gap: 4px 32px;
  grid-template-columns: repeat(auto-fit, minmax(min(100%, 410px), 1fr));
}
.samples img { display: block; image-rendering: pixelated; border-radius: 4px; }
@media print { .scroll { overflow: visible; } figure { break-inside: avoid; } }
"""

SCRIPT = """
for (const table of document.querySelectorAll('table.sortable')) {
  const body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
  heads.forEach((head, column) => head.querySelector('button').addEventListener('click', () => {
    const down = head.getAttribute('aria-sort') === 'ascending';
    heads.forEach(other => other.removeAttribute('aria-sort'));
    head.setAttribute('aria-sort', down ? 'descending' : 'ascending');
    const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
    const order = (a, b) => {
      const [x, y] = [value(a), value(b)], [p, q] = [parseFloat(x), parseFloat(y)];
      return isNaN(p) || isNaN(q) ? x.localeCompare(y) : p - q;
    };
    const rows = [...body.rows].sort(order);
    body.append(...(down ? rows.reverse() : rows));
  }));
}
"""
