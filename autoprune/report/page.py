"""Style and script of the report page. The script sets text only as text and loads nothing."""

from __future__ import annotations

PLOTS = (
    '<section class="card"><h2>The front</h2><div class="plots">'
    '<div id="plot-latency" class="plot"></div><div id="plot-size" class="plot"></div></div>'
    '<p class="sub">Hover for the recipe, click for its groups, drag to zoom, double-click to reset. '
    "Up and to the left is better.</p><noscript>The pictures need JavaScript; the table below does not.</noscript>"
    "</section>\n"
)

STYLE = """
:root{color-scheme:light dark;--bg:#f5f6f8;--card:#fff;--text:#1b2330;--sub:#5d6878;--line:#e1e5eb;
--front:#2563eb;--dense:#b45309;--baseline:#0f766e;--grey:#9ca3af;--pick:#eaf1ff;--int8:#2563eb;--float:#7c93b8;
--gone:#e7eaef}
@media (prefers-color-scheme:dark){:root{--bg:#10141a;--card:#181e27;--text:#e6eaf0;--sub:#9aa6b6;--line:#2b3441;
--front:#6ea0ff;--dense:#f0a04b;--baseline:#4fc1b2;--grey:#6b7686;--pick:#1f2c45;--int8:#6ea0ff;--float:#5b6f91;
--gone:#262e3a}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--text);
font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"Noto Sans","Liberation Sans",sans-serif}
main{max-width:1280px;margin:0 auto;padding:32px 24px 64px}
h1{font-size:28px;line-height:1.2;margin:0;overflow-wrap:anywhere}h2{font-size:18px;margin:0 0 12px}
.sub{color:var(--sub);font-size:13px;font-weight:400;margin:4px 0}header .sub{font-size:15px}
.facts{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:16px;margin:24px 0}
.fact,.card{background:var(--card);border:1px solid var(--line);border-radius:12px}
.fact{padding:14px 16px}.fact-name,.fact-note{color:var(--sub);font-size:13px;overflow-wrap:anywhere}
.fact-value{font-size:24px;font-weight:650;font-variant-numeric:tabular-nums}
.card{padding:20px 24px;margin:0 0 24px}
.plots{display:grid;grid-template-columns:1fr 1fr;gap:16px}.plot{height:430px;min-width:0}
@media (max-width:900px){.plots{grid-template-columns:1fr}}
.tools{display:flex;flex-wrap:wrap;gap:16px;align-items:center;margin-bottom:12px;font-size:14px}
input[type=search]{font:inherit;padding:6px 10px;min-width:240px;border:1px solid var(--line);border-radius:8px;
background:var(--bg);color:inherit}
.scroll{overflow-x:auto}table{border-collapse:collapse;width:100%;font-size:13px;font-variant-numeric:tabular-nums}
th,td{padding:7px 9px;text-align:right;border-bottom:1px solid var(--line);white-space:nowrap}
th{color:var(--sub);font-weight:600}th button{all:unset;cursor:pointer}th button:focus-visible{outline:2px solid var(--front)}
th:nth-child(-n+2),td:nth-child(-n+2),#points th:last-child,#points td:last-child{text-align:left}
.plain th:nth-child(2),.plain td:nth-child(2){text-align:right}.plain{width:auto}
th[aria-sort=ascending] button::after{content:" \\2191"}th[aria-sort=descending] button::after{content:" \\2193"}
#points tbody tr{cursor:pointer}#points tbody tr:hover,#points tbody tr.picked{background:var(--pick)}
#points td:nth-child(2){white-space:normal;min-width:110px}
tr[hidden]{display:none}
.tag{display:inline-block;font-size:12px;padding:0 8px;border-radius:9px;border:1px solid var(--line);color:var(--sub)}
.tag.front{color:var(--front);border-color:var(--front)}.tag.dense{color:var(--dense);border-color:var(--dense)}
.tag.baseline{color:var(--baseline);border-color:var(--baseline)}
.command{display:flex;gap:8px;align-items:center}
.command code{max-width:190px;overflow:hidden;text-overflow:ellipsis;direction:ltr;font-size:12px}
.copy{font:inherit;font-size:12px;padding:2px 10px;border:1px solid var(--line);border-radius:7px;background:var(--bg);
color:inherit;cursor:pointer}
#groups{display:grid;grid-template-columns:repeat(auto-fill,minmax(420px,1fr));gap:2px 32px;max-height:420px;overflow:auto}
@media (max-width:560px){#groups{grid-template-columns:1fr}}
.group{display:grid;grid-template-columns:minmax(0,150px) 1fr 120px;gap:10px;align-items:center;font-size:13px}
.group-name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap}
.bar{height:12px;border-radius:4px;background:var(--gone);overflow:hidden}
.kept{height:100%;background:var(--float)}.kept.int8{background:var(--int8)}
.group-text{color:var(--sub);font-variant-numeric:tabular-nums;white-space:nowrap}
.key{color:var(--sub);font-size:13px;margin:12px 0 0}
.swatch{display:inline-block;width:12px;height:12px;border-radius:3px;margin:0 5px 0 12px;vertical-align:-1px}
.swatch:first-child{margin-left:0}.swatch.int8{background:var(--int8)}.swatch.float{background:var(--float)}
.swatch.gone{background:var(--gone);border:1px solid var(--line)}
dl{margin:0;display:grid;grid-template-columns:220px 1fr;gap:8px 24px}dt{font-weight:600}dd{margin:0;overflow-wrap:anywhere}
@media (max-width:700px){dl{grid-template-columns:1fr;gap:2px}dd{margin-bottom:10px}}
details{margin-top:16px}summary{cursor:pointer;font-weight:600}
"""

SCRIPT = r"""
"use strict";
(function () {
  const data = JSON.parse(document.getElementById("data").textContent);
  const byTrial = new Map(data.points.map(p => [p.trial, p]));
  const dark = window.matchMedia("(prefers-color-scheme: dark)");
  const tone = name => getComputedStyle(document.documentElement).getPropertyValue("--" + name).trim();
  const symbols = ["square", "triangle-up", "diamond", "triangle-down", "cross", "x", "triangle-left", "triangle-right"];
  let chosen = data.chosen;

  function bars(points, value, interval) {
    return {type: "data", symmetric: false, array: points.map(p => Math.max(0, p[interval][1] - p[value])),
      arrayminus: points.map(p => Math.max(0, p[value] - p[interval][0])), thickness: 1.2, width: 3};
  }

  function trace(points, axis, name, color, symbol, size, withBars) {
    const t = {x: points.map(p => p[axis]), y: points.map(p => p.value), mode: "markers", type: "scatter", name: name,
      customdata: points.map(p => p.trial), text: points.map(p => p.hover), hovertemplate: "%{text}<extra></extra>",
      marker: {color: color, symbol: symbol, size: size}};
    if (withBars) {
      t.error_y = bars(points, "value", "value_ci");
      t.error_y.color = color;
      if (axis === "latency") { t.error_x = bars(points, "latency", "latency_ci"); t.error_x.color = color; }
    }
    return t;
  }

  function traces(axis) {
    const of = role => data.points.filter(p => p.role === role);
    const found = [];
    const grey = of("dominated"), trials = of("trial");
    if (grey.length) found.push(trace(grey, axis, "dominated", tone("grey"), "circle", 6, false));
    if (trials.length)
      found.push(trace(trials, axis, "trial of the search (search split)", tone("grey"), "circle", 5, false));
    const stairs = data.stairs[axis];
    if (stairs.length)
      found.push({x: stairs.map(s => s[0]), y: stairs.map(s => s[1]), mode: "lines", type: "scatter", hoverinfo: "skip",
        showlegend: false, line: {shape: "hv", color: tone("front"), width: 1.5}});
    const front = of("front");
    if (front.length) found.push(trace(front, axis, "front", tone("front"), "circle", 9, true));
    of("baseline").forEach((p, i) => {
      const shape = symbols[i % symbols.length] + (p.provisional ? "-open" : "");
      found.push(trace([p], axis, p.label + (p.provisional ? " (search split)" : ""), tone("baseline"), shape, 10, true));
    });
    const dense = of("dense");
    if (dense.length) found.push(trace(dense, axis, "dense", tone("dense"), "star", 16, true));
    const picked = byTrial.get(chosen);
    if (picked)
      found.push({x: [picked[axis]], y: [picked.value], mode: "markers", type: "scatter", hoverinfo: "skip",
        showlegend: false, marker: {symbol: "circle-open", size: 20, color: tone("text"), line: {width: 2}}});
    return found;
  }

  function draw(axis, title) {
    const line = {gridcolor: tone("line"), linecolor: tone("line"), zeroline: false, automargin: true};
    const place = document.getElementById("plot-" + axis);
    const y = Object.assign({title: {text: data.metric}}, line);
    if (data.range) y.range = data.range;
    Plotly.react(place, traces(axis), {
      paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)", uirevision: "same", hovermode: "closest",
      font: {color: tone("text"), family: "system-ui, sans-serif", size: 12}, margin: {l: 60, r: 12, t: 12, b: 50},
      hoverlabel: {align: "left", bgcolor: tone("card"), bordercolor: tone("grey"), font: {color: tone("text")}},
      xaxis: Object.assign({title: {text: title}}, line), yaxis: y,
      legend: {orientation: "h", y: -0.22, x: 0, yanchor: "top"}
    }, {responsive: true, displaylogo: false, showSendToCloud: false,
      modeBarButtonsToRemove: ["select2d", "lasso2d", "autoScale2d"]});
    if (!place.dataset.bound) {
      place.dataset.bound = "yes";
      place.on("plotly_click", event => { const n = event.points[0].customdata; if (n !== undefined) choose(n); });
    }
  }

  function drawAll() {
    if (typeof Plotly === "undefined") return;
    draw("latency", "latency, share of the dense network's");
    draw("size", "size of the model file, share of the dense one");
  }

  function element(name, kind, text) {
    const made = document.createElement(name);
    made.className = kind;
    if (text !== undefined) made.textContent = text;
    return made;
  }

  function choose(trial) {
    const point = byTrial.get(trial);
    if (!point) return;
    chosen = trial;
    document.getElementById("chosen-name").textContent = point.name + " #" + point.trial;
    document.getElementById("chosen-summary").textContent = point.summary;
    const list = document.getElementById("groups");
    list.replaceChildren(...point.groups.map(g => {
      const row = element("div", "group"), bar = element("div", "bar");
      const kept = g.kept === null ? 1 - g.ratio : g.kept / g.size;
      const fill = element("div", "kept" + (g.bits < 32 ? " int8" : ""));
      fill.style.width = (100 * kept).toFixed(1) + "%";
      bar.append(fill);
      const label = element("div", "group-name", g.name);
      const count = g.kept === null ? Math.round(100 * kept) + " %" : g.kept + " of " + g.size;
      label.title = g.name + ": asked to remove " + Math.round(100 * g.ratio) + " %";
      row.append(label, bar, element("div", "group-text", count + (g.bits < 16 ? ", int" + g.bits : g.bits < 32 ? ", float16" : ", float")));
      return row;
    }));
    if (!point.groups.length) list.replaceChildren(element("p", "sub", "Every group stays dense and float."));
    for (const row of rows) row.classList.toggle("picked", Number(row.dataset.trial) === trial);
    drawAll();
  }

  const table = document.getElementById("points"), body = table.tBodies[0], rows = Array.from(body.rows);
  const filter = document.getElementById("filter"), all = document.getElementById("all");

  function show() {
    const words = filter.value.toLowerCase().split(/\s+/).filter(Boolean);
    let count = 0;
    for (const row of rows) {
      const text = row.textContent.toLowerCase();
      row.hidden = (row.classList.contains("extra") && !all.checked) || !words.every(word => text.includes(word));
      if (!row.hidden) count += 1;
    }
    document.getElementById("count").textContent = count + " of " + rows.length + " shown";
  }

  Array.from(table.tHead.rows[0].cells).forEach((head, column) => {
    if (!head.dataset.sort) return;
    head.addEventListener("click", () => {
      const up = head.getAttribute("aria-sort") !== "ascending";
      for (const other of table.tHead.rows[0].cells)
        if (other.dataset.sort) other.setAttribute("aria-sort", "none");
      head.setAttribute("aria-sort", up ? "ascending" : "descending");
      const key = row => row.cells[column].dataset.key;
      const order = head.dataset.sort === "number" ? (a, b) => Number(key(a)) - Number(key(b))
        : (a, b) => key(a).localeCompare(key(b), undefined, {numeric: true});
      rows.sort((a, b) => up ? order(a, b) : order(b, a));
      body.append(...rows);
    });
  });

  async function copy(button) {
    const text = button.dataset.copy;
    let done = true;
    try {
      await navigator.clipboard.writeText(text);
    } catch (refused) {
      // Pages opened from a file may lack the clipboard; the old way works there.
      const area = document.createElement("textarea");
      area.value = text;
      document.body.append(area);
      area.select();
      done = document.execCommand("copy");
      area.remove();
    }
    button.textContent = done ? "Copied" : "Select it by hand";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }

  body.addEventListener("click", event => {
    const button = event.target.closest("button.copy");
    if (button) { copy(button); return; }
    const row = event.target.closest("tr");
    if (row) choose(Number(row.dataset.trial));
  });
  body.addEventListener("keydown", event => {
    if (event.key === "Enter" && event.target.tagName === "TR") choose(Number(event.target.dataset.trial));
  });
  filter.addEventListener("input", show);
  all.addEventListener("change", show);
  dark.addEventListener("change", drawAll);
  show();
  if (byTrial.has(chosen)) choose(chosen); else drawAll();
})();
"""
