"use strict";
/* Draws the report. Names and messages come from anyone's data: they only ever become text nodes and attributes. */
(async () => {
const SIGNS = {failure: "✗", lost: "?", cancelled: "◼", running: "▸", success: "✓", skipped: "⊘"};  // the worst first
const HEIGHT = 28, PRINTED = 400, FAILURES = 50, LINES = 200, BINS = 160;
const $ = (id) => document.getElementById(id), root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");

function el(tag, properties = {}, ...children) {
  const svg = ["svg", "g", "rect", "path", "text", "title", "circle", "marker"].includes(tag);
  const made = svg ? document.createElementNS("http://www.w3.org/2000/svg", tag) : document.createElement(tag);
  for (const [key, value] of Object.entries(properties)) {
    if (typeof value === "function") made.addEventListener(key, value);
    else if (key === "style") Object.assign(made.style, value);
    else if (known(value) && value !== false) made.setAttribute(key, value === true ? "" : value);
  }
  made.append(...children.flat(2).filter((child) => known(child) && child !== false));
  return made;
}

// --- texts ---------------------------------------------------------------------------------------------------------------
function known(value) { return value !== undefined && value !== null && value !== ""; }
const count = (number) => known(number) ? number.toLocaleString("en-US") : "";
const compact = new Intl.NumberFormat("en-US", {notation: "compact", maximumSignificantDigits: 3});
const short = (number) => Math.abs(number) < 1e6 ? count(Math.round(number)) : compact.format(number);
const plural = (number, noun, many = `${noun}s`) => `${count(number)} ${number === 1 ? noun : many}`;
const cut = (text, length) => text.length > length ? `${[...text].slice(0, length).join("")}…` : text;
const date = (ms) => `${new Date(ms).toISOString().replace("T", " ").slice(0, 19)} UTC`;
const sum = (values) => values.reduce((total, value) => total + (value || 0), 0);
const median = (values) => values.toSorted((a, b) => a - b)[values.length >> 1];
const worst = (outcomes) => Object.keys(SIGNS).find((outcome) => outcomes.includes(outcome)) || outcomes[0];
const sign = (outcome) => el("span", {class: "sign", "data-outcome": outcome, role: "img", "aria-label": outcome}, SIGNS[outcome] || "?");
function percent(change) {
  const points = Math.round(100 * Math.abs(change));
  return points >= 1000 ? `× ${short(change + 1)}` : `${points === 0 ? "±" : change > 0 ? "+" : "−"}${points} %`;
}
function duration(ms) {
  if (ms < 999.5) return ms ? `${ms.toFixed(ms >= 9.95 ? 0 : ms >= 0.095 ? 1 : 2)} ms` : "0";
  if (ms < 59950) return `${(ms / 1000).toFixed(ms < 9995 ? 2 : 1)} s`;
  const seconds = Math.round(ms / 1000), minutes = Math.floor(seconds / 60), two = (number) => String(number).padStart(2, "0");
  return minutes < 60 ? `${minutes} m ${two(seconds % 60)} s` : `${Math.floor(minutes / 60)} h ${two(minutes % 60)} m`;
}
function size(bytes) {
  const power = Math.min(4, Math.max(0, Math.floor(Math.log10(bytes * 1.0005) / 3))), value = bytes / 1000 ** power;
  return known(bytes) && `${value.toFixed(power === 0 || value >= 9.95 ? 0 : 1)} ${["B", "kB", "MB", "GB", "TB"][power]}`;
}

// --- the run -------------------------------------------------------------------------------------------------------------
const packed = Uint8Array.from(atob($("data").textContent), (character) => character.charCodeAt(0));
const D = await new Response(new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"))).json();
const run = {...D.run, ms: D.run.duration_ns / 1e6, began: D.run.start_ns / 1e6};
const after = (ns) => (ns - D.run.start_ns) / 1e6, critical = new Set(D.critical);
const nodes = D.nodes.map((node, row) => {
  const start = after(node.start_ns), ms = node.duration_ns / 1e6, executed = node.outcome !== "skipped";
  const before = (D.earlier.nodes[node.name] || []).filter(known), usual = before.length > 2 ? median(before) * 1000 : undefined;
  const change = usual && executed ? ms / usual - 1 : undefined, rate = known(node.rows_out) && ms ? node.rows_out / ms * 1000 : undefined;
  return {...node, row, start, ms, end: start + ms, executed, critical: critical.has(row), feeds: [], usual, change, rate};
});
nodes.forEach((node) => { node.sources = D.sources[node.row]; node.sources.forEach((source) => nodes[source].feeds.push(node.row)); });
const own = nodes.filter((node) => !node.run_id), spans = new Set(nodes.map((node) => node.span_id));
const total = nodes.reduce((latest, node) => Math.max(latest, node.end), Math.max(run.ms, 1e-3));
const notable = (node) => Math.abs(node.change) > 0.2 && Math.abs(node.ms - node.usual) > total / 100;
let chosen = -1, printing = false;
const link = (row) => el("button", {type: "button", class: "link name", click: () => choose(row)}, cut(nodes[row].name, 80));
const mono = (text) => el("span", {class: "mono"}, text), named = (text) => el("span", {class: "name"}, text);
const reason = (failure) => [el("b", {}, failure.type.split(".").pop()), failure.message && `: ${failure.message}`];
const facts = (pairs, more = "") => el("dl", {class: `facts ${more}`}, pairs
  .filter(([, value]) => known(value) && value !== false && value.length !== 0)
  .map(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]));
const cache = (node) => known(node.cache_hit) && (node.cache_hit ? "hit" : "miss");
const trace = (failure, open) => failure.stacktrace &&
  el("details", {open}, el("summary", {}, "Traceback"), el("pre", {tabindex: 0}, failure.stacktrace));

function changed(node) {
  const [kind, mark] = !notable(node) ? ["note", ""] : node.change > 0 ? ["slower", "▲ "] : ["faster", "▼ "];
  return known(node.change) && el("span", {class: kind}, ` ${mark}${percent(node.change)}`);
}
function head() {
  $("headline").append(
    el("h1", {"data-outcome": run.outcome}, sign(run.outcome), named(` ${cut(run.pipeline, 99)} `), el("b", {class: "ink"}, run.outcome)),
    el("p", {class: "note"}, `${run.service} · ${date(run.began)} · run `, mono(run.run_id)));
  const outcomes = Object.keys(SIGNS).map((name) => [name, own.filter((node) => node.outcome === name).length]).filter(([, n]) => n);
  const lookups = own.filter((node) => known(node.cache_hit)), retries = sum(own.map((node) => node.attempt - 1));
  const [onPath] = nodes.filter((node) => node.critical && !node.depth)
    .reduce(([time, until], {start, end}) => [time + Math.max(0, end - Math.max(start, until)), Math.max(until, end)], [0, 0]);
  const memory = own.reduce((most, node) => Math.max(most, node.rss || 0), 0), hits = lookups.filter((node) => node.cache_hit);
  const totals = [["Nodes", count(own.length), outcomes.map(([outcome, n]) => [" ", sign(outcome), ` ${count(n)} ${outcome}`])],
    [run.outcome === "running" ? "Took so far" : "Took", duration(run.ms), run.usual && `usually ${duration(run.usual)}`],
    critical.size && ["Critical path", plural(critical.size, "node"), `${Math.round(100 * onPath / total)} % of the time`],
    ["Rows made", short(sum(own.map((node) => node.rows_out)))],
    memory && ["Memory", size(memory), "at most"],
    lookups.length && ["Cache", `${hits.length} of ${lookups.length}`, "hits"],
    retries && ["Retries", count(retries)]];
  $("totals").append(...totals.filter(Boolean).map(([term, value, more]) =>
    el("div", {}, el("dt", {}, term), el("dd", {}, value, more && el("small", {}, more)))));
}
function failures() {
  const found = nodes.filter((node) => node.failure).map((node) => [node.failure, SIGNS[node.outcome], link(node.row), node.outcome]);
  if (run.failure && !found.some(([{type, message}]) => type === run.failure.type && message === run.failure.message))
    found.push([run.failure, SIGNS[run.outcome], el("b", {class: "name"}, run.pipeline), run.outcome]);
  if (!found.length) $("failures-title").textContent = "What went wrong on the way";
  for (const node of nodes)
    for (const {failure, number} of node.attempts)
      if (failure && number < node.attempt) found.push([failure, "↻", [link(node.row), `, attempt ${number}, tried again`], "cancelled"]);
  $("failures").hidden = !found.length;
  $("failures").lastElementChild.append(...found.slice(0, FAILURES).map(([failure, mark, who, outcome], place) =>
    el("div", {class: "failed", "data-outcome": outcome}, el("p", {}, el("span", {class: "sign"}, mark || "✗"), " ", who),
      el("p", {class: "message"}, reason(failure)), trace(failure, place === 0 && mark !== "↻"))));
  if (found.length > FAILURES) $("failures").append(el("p", {class: "note"}, `and ${count(found.length - FAILURES)} more`));
}

// --- data flow -----------------------------------------------------------------------------------------------------------
const dag = {host: $("dag").querySelector(".scroll"), boxes: [], edges: []};
function drawDag() {
  const {boxes, edges, grouped, left_out} = D.graph, upright = dag.host.clientWidth < 640;
  if (upright === dag.upright || !boxes.length) return;
  dag.upright = upright;
  const ruler = document.createElement("canvas").getContext("2d"), wide = (text) => ruler.measureText(text).width;
  ruler.font = `12.5px ${getComputedStyle(document.body).fontFamily}`;
  const told = boxes.map(([name, rows]) => boxTexts(name, rows)), placed = new dagre.graphlib.Graph();
  const linked = new Set(edges.flatMap(([from, to]) => [from, to]));
  const frames = told.map(({title, text}) => ({height: 44, width: 37 + Math.max(50, wide(title), 0.9 * wide(text))}));
  placed.setGraph({rankdir: upright ? "TB" : "LR", nodesep: 14, ranksep: upright ? 24 : 14, edgesep: 8, marginx: 4, marginy: 4});
  frames.forEach((frame, box) => { if (linked.has(box)) placed.setNode(box, frame); });
  edges.forEach(([from, to, rows]) => {
    const label = rows === null ? "" : short(rows);
    placed.setEdge(from, to, {label, labelpos: "c", height: 16, width: label && wide(label) + 4});
  });
  dagre.layout(placed);
  const {width: graph, height: depth} = linked.size ? placed.graph() : {width: 0, height: -8}, room = dag.host.clientWidth - 2;
  const width = Math.max(graph, room), scale = Math.max(upright ? 0.85 : 0.75, room / width);
  let [x, y] = [4, depth + 34];
  for (const frame of frames.filter((_, box) => !linked.has(box))) {  // what is linked to nothing stands in rows below
    if (x + frame.width > width) [x, y] = [4, y + 58];
    [frame.x, frame.y, x] = [x + frame.width / 2, y, x + frame.width + 14];
  }
  const height = frames.length > linked.size ? y + 26 : depth;
  const lines = edges.map(([from, to]) => ({...placed.edge(from, to), ends: [from, to]}));
  dag.boxes = told.map((texts, box) => drawBox(texts, frames[box], box));
  dag.edges = lines.map(({points, ends}) => el("path", {class: "edge", d: curve(points), "data-ends": ends.join(" ")}));
  const labels = lines.filter(({label}) => label).map(({x, y, label, width: w}) => [
    el("rect", {class: "plate", x: x - w / 2, y: y - 7, width: w, height: 14}), el("text", {class: "small middle", x, y: y + 4}, label)]);
  const arrow = el("marker", {id: "arrow", refX: 7, refY: 4, markerWidth: 8, markerHeight: 8, markerUnits: "userSpaceOnUse",
    orient: "auto"}, el("path", {d: "M0 0L8 4L0 8z"}));
  dag.host.replaceChildren(el("svg", {width: width * scale, height: height * scale, viewBox: `0 0 ${width} ${height}`, role: "group",
    "aria-label": `Data flow of ${plural(boxes.length, "box", "boxes")}`}, arrow, dag.edges, labels, dag.boxes));
  $("dag-note").textContent = [grouped && `${plural(nodes.length, "node")} are too many to draw one by one: a box stands for ${grouped}.`,
    left_out && `${plural(left_out, "box", "boxes")} more left out.`,
    edges.length === 0 && nodes.length > 1 && !grouped && "No data was seen to flow from node to node."].filter(Boolean).join(" ");
  markDag();
}

function curve(points) {
  const at = ({x, y}, next = {x, y}) => `${((x + next.x) / 2).toFixed(1)} ${((y + next.y) / 2).toFixed(1)} `, last = points.length - 1;
  const bends = points.slice(1, -1).map((point, i) => `Q${at(point)}${i + 2 === last ? at(points[last]) : at(point, points[i + 2])}`);
  return `M${at(points[0])}${bends.join("") || `L${at(points[last])}`}`;
}
function boxTexts(name, rows) {
  const members = rows.map((row) => nodes[row]), outcome = worst(members.map((node) => node.outcome));
  const first = members.filter((node) => node.outcome === outcome).reduce((a, b) => b.ms > a.ms ? b : a), many = members.length > 1;
  const parts = [many && `× ${count(rows.length)}`, outcome === "skipped" ? "skipped" : duration(sum(members.map((node) => node.ms))),
    first.cache_hit && !many && "cache hit", first.attempt > 1 && !many && `↻ ${first.attempt}`];
  const kind = members.some((node) => node.critical) ? "box critical" : "box";
  return {name, title: cut(name, 26), text: parts.filter(Boolean).join(" · "), outcome, first, kind};
}
function drawBox({name, title, text, outcome, first, kind}, {x, y, width, height}, box) {
  return el("g", {class: kind, "data-outcome": outcome, role: "button", tabindex: box ? -1 : 0,
    transform: `translate(${x - width / 2} ${y - height / 2})`, "aria-label": `${cut(name, 80)}, ${outcome}, ${text}`,
    click: () => choose(first.row), keydown: walk}, el("title", {}, name),
  el("rect", {class: "frame", width, height, rx: 7}), el("rect", {class: "stripe", y: 8, width: 3.5, height: height - 16, rx: 1.75}),
  el("text", {class: "sign", x: 11, y: 19}, SIGNS[outcome] || "?"), el("text", {x: 26, y: 19}, title),
  el("text", {class: "small", x: 26, y: 35}, text));
}
function walk(event) {
  const step = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key], from = event.currentTarget;
  if (!step && event.key !== "Enter" && event.key !== " ") return;
  event.preventDefault();
  if (!step) return void from.dispatchEvent(new MouseEvent("click"));
  const next = dag.boxes.at((dag.boxes.indexOf(from) + step) % dag.boxes.length);
  dag.boxes.forEach((box) => box.setAttribute("tabindex", box === next ? 0 : -1));
  next.focus();
}
function markDag() {
  const at = D.graph.boxes.findIndex(([, rows]) => rows.includes(chosen));
  dag.boxes.forEach((box, i) => box.classList.toggle("chosen", i === at));
  dag.edges.forEach((edge) => edge.classList.toggle("chosen", edge.dataset.ends.split(" ").includes(String(at))));
  const [box, host] = [dag.boxes[at] || dag.host, dag.host].map((each) => each.getBoundingClientRect());
  const off = (begin, end) => Math.min(0, box[begin] - host[begin]) + Math.max(0, box[end] - host[end]);
  dag.host.scrollBy(off("left", "right"), off("top", "bottom"));
}

// --- lists, of which only what is in sight is drawn ----------------------------------------------------------------------
function list(host, body, tag, draw, look = () => {}) {
  const self = {rows: [], cursor: 0}, heads = tag === "tr" ? 1 : 0;
  const spacer = (rows) => rows <= 0 ? [] : printing ? [el(tag, {class: "note"}, `and ${plural(rows, "more node")}`)]
    : [el(tag, {"aria-hidden": "true", style: {height: `${rows * HEIGHT}px`}})];
  self.draw = () => {
    const top = printing ? 0 : Math.floor(host.scrollTop / HEIGHT);
    const bottom = top + (printing ? PRINTED : Math.ceil(Math.max(host.clientHeight, 512) / HEIGHT)), first = Math.max(0, top - 10);
    look(self.rows.slice(top, bottom));
    const lines = self.rows.slice(first, bottom + 10).map((node, place) => {
      const line = draw(node), at = first + place;
      line.id = `${body.id}-${at}`;
      line.dataset.row = node.row;
      line.classList.toggle("chosen", node.row === chosen);
      line.classList.toggle("cursor", at === self.cursor);
      line.setAttribute("aria-selected", node.row === chosen);
      line.setAttribute(heads ? "aria-rowindex" : "aria-posinset", at + 1 + heads);
      line.setAttribute("aria-setsize", self.rows.length);
      return line;
    });
    body.replaceChildren(...spacer(first), ...lines, ...spacer(self.rows.length - first - lines.length));
    host.setAttribute("aria-activedescendant", `${body.id}-${self.cursor}`);
  };
  self.move = (cursor) => {
    self.cursor = Math.min(self.rows.length - 1, Math.max(0, cursor));
    const begin = self.cursor * HEIGHT, end = begin + HEIGHT * (1 + heads);
    if (begin < host.scrollTop) host.scrollTop = begin;
    else if (host.clientHeight && end > host.scrollTop + host.clientHeight) host.scrollTop = end - host.clientHeight;
    self.draw();
  };
  self.find = () => { const at = self.rows.findIndex((node) => node.row === chosen); self.move(at < 0 ? self.cursor : at); };
  self.show = (rows) => { Object.assign(self, {rows, cursor: 0}); host.scrollTop = 0; self.draw(); self.find(); };
  host.addEventListener("scroll", () => requestAnimationFrame(self.draw));
  host.addEventListener("click", ({target}) => { const line = target.closest("[data-row]"); if (line) choose(Number(line.dataset.row)); });
  host.addEventListener("keydown", (event) => {
    const page = Math.floor(host.clientHeight / HEIGHT) - 1, act = event.key === "Enter" || event.key === " ";
    const step = {ArrowDown: 1, ArrowUp: -1, PageDown: page, PageUp: -page, Home: -Infinity, End: Infinity}[event.key];
    if (event.target !== host || !self.rows.length || !(step || act)) return;
    event.preventDefault();
    if (act) choose(self.rows[self.cursor].row);
    else self.move(self.cursor + step);
  });
  return self;
}

// --- the waterfall -------------------------------------------------------------------------------------------------------
const sight = {from: 0, to: total};
const part = (ms) => Math.min(100, Math.max(0, 100 * (ms - sight.from) / (sight.to - sight.from)));
const lanes = list($("lanes"), $("lanes"), "div", drawLane, (rows) => {
  const fit = $("fit").checked && rows.length > 0;
  sight.from = fit ? Math.max(0, rows.reduce((first, node) => Math.min(first, node.start), total)) : 0;
  sight.to = fit ? rows.reduce((last, node) => Math.max(last, node.end), sight.from + total / 1e6) : total;
  $("axis").lastElementChild.replaceChildren(...[0, 25, 50, 75, 100].map((at) =>
    el("span", {style: {left: `${at}%`}}, duration(sight.from + (sight.to - sight.from) * at / 100))));
});
function drawLane(node) {
  const piece = (kind, outcome, start, end) => el("div", {class: kind, "data-outcome": outcome,
    style: {left: `min(${part(start)}%, 100% - 2px)`, width: `${part(end) - part(start)}%`}});
  const tries = node.attempts.map(({outcome, start_ns: at, duration_ns}) => piece("try", outcome, after(at), after(at + duration_ns)));
  const chips = [cache(node) && `cache ${cache(node)}`, node.attempt > 1 && `↻ ${node.attempt} attempts`, node.run_id && "pipeline"];
  const begin = part(node.start), end = part(node.end);
  const [where, style] = end < 74 ? ["", {left: `${end}%`}] : begin > 26 ? ["", {right: `${100 - begin}%`}]
    : ["within", {right: `${100 - end}%`}];
  const time = node.executed ? duration(node.ms) : `skipped${node.skip_reason ? `: ${cut(node.skip_reason, 90)}` : ""}`;
  const about = `${cut(node.name, 80)}, ${node.outcome}, ${time}${node.critical ? ", on the critical path" : ""}`;
  return el("div", {class: `lane ${node.critical ? "critical" : ""}`, role: "option", "data-outcome": node.outcome, "aria-label": about},
    el("div", {class: "name", title: node.name, style: {paddingLeft: `${0.3 + 0.9 * Math.min(node.depth, 8)}rem`}},
      el("i", {class: "mark"}), sign(node.outcome), cut(node.name, 120)),
    el("div", {class: "track"}, node.executed && piece("bar", node.outcome, node.start, node.end), tries,
      el("span", {class: `after ${where}`, style}, time, chips.filter(Boolean).map((chip) => el("span", {class: "chip"}, chip)))));
}

// --- the table -----------------------------------------------------------------------------------------------------------
const engines = new Set(nodes.map((node) => node.engine)).size;
const COLUMNS = [
  {label: "", title: "Outcome", wide: 30, of: (node) => Object.keys(SIGNS).indexOf(node.outcome), cell: (node) => sign(node.outcome)},
  {label: "Node", wide: 190, of: (node) => node.name, cell: (node) => cut(node.name, 120)},
  {label: "Layer", wide: 90, of: (node) => node.layer}, {label: "Engine", wide: 72, of: (node) => engines > 1 ? node.engine : ""},
  {label: "Time", wide: 72, number: true, of: (node) => node.executed ? node.ms : "", cell: (node) => duration(node.ms)},
  {label: "Earlier runs", wide: 142, number: true, of: (node) => node.change, cell: (node) => [spark(node), changed(node)]},
  {label: "Rows in", wide: 78, number: true, of: (node) => node.rows_in, cell: (node) => short(node.rows_in)},
  {label: "Rows out", wide: 78, number: true, of: (node) => node.rows_out, cell: (node) => short(node.rows_out)},
  {label: "Rows/s", wide: 74, number: true, of: (node) => node.rate, cell: (node) => short(node.rate)},
  {label: "Memory", wide: 74, number: true, of: (node) => node.executed ? node.rss : "", cell: (node) => size(node.rss)},
  {label: "Cache", wide: 58, of: (node) => cache(node) || ""},
  {label: "Tries", wide: 50, number: true, of: (node) => node.attempt > 1 ? node.attempt : ""},
].filter(({of}) => nodes.some((node) => known(of(node))));
const grid = $("nodes").querySelector(".list"), order = {};
function spark(node) {
  const values = [...(D.earlier.nodes[node.name] || []), node.executed ? node.ms / 1000 : null];
  const most = Math.max(...values.filter(known)), least = 0.7 * Math.min(...values.filter(known));
  const at = (value, i) => `${(i / (values.length - 1) * 44).toFixed(1)} ${(14 - 12 * (value - least) / (most - least || 1)).toFixed(1)}`;
  const points = values.map((value, i) => known(value) ? at(value, i) : "").filter(Boolean), [cx, cy] = (points.at(-1) || "").split(" ");
  return points.length > 1 && el("svg", {class: "spark", width: 48, height: 16, "aria-hidden": "true", "data-outcome": node.outcome},
    el("path", {d: `M${points.join("L")}`}), el("circle", {cx, cy, r: 2}));
}
const table = list(grid, $("rows"), "tr", (node) => el("tr", {role: "row"}, COLUMNS.map(({of, cell, number}) => {
  const value = of(node), title = typeof value === "string" && value;
  return el("td", {role: "gridcell", class: number && "number", title}, known(value) && (cell || of)(node));
})));
function heads() {
  return el("tr", {role: "row", "aria-rowindex": 1}, COLUMNS.map((column) => {
    const {label, title, number} = column, sorted = order.column === column && (order.down ? "descending" : "ascending");
    const sort = () => {
      Object.assign(order, {down: order.column === column ? !order.down : Boolean(number), column});
      $("heads").replaceChildren(heads());
      $("heads").querySelector("[aria-sort] button").focus();
      filter();
    };
    return el("th", {role: "columnheader", scope: "col", class: number && "number", "aria-sort": sorted},
      el("button", {type: "button", "aria-label": title, title, click: sort}, label, sorted && ` ${order.down ? "↓" : "↑"}`));
  }));
}
function filter() {
  const text = $("find").value.trim().toLowerCase(), {of} = order.column || {};
  const fits = (node) => [node.name, node.layer, node.engine, node.outcome].some((words) => words.toLowerCase().includes(text));
  const found = nodes.filter((node) => fits(node) && (node.critical || !$("only-critical").checked));
  const ordered = (a, b) => (typeof a === "number" ? a - b : a.localeCompare(b)) * (order.down ? -1 : 1);
  const compare = (a, b) => known(a) && known(b) ? ordered(a, b) : known(b) - known(a);
  $("matches").textContent = found.length < nodes.length ? `${count(found.length)} of ${plural(nodes.length, "node")}` : "";
  grid.setAttribute("aria-rowcount", found.length + 1);
  lanes.show(found);
  table.show(of ? found.toSorted((a, b) => compare(of(a), of(b))) : found);
}

// --- the chosen node, or the run -----------------------------------------------------------------------------------------
function choose(row) {
  chosen = row;
  [lanes.find, table.find, markDag, details].forEach((show) => show());
}
function details() {
  const node = nodes[chosen], attributes = Object.entries(D.attributes[node ? node.span_id : run.span_id] || {}).sort();
  $("details").classList.toggle("open", Boolean(node));
  $("details").replaceChildren(...(node ? ofNode(node) : ofRun()), attributes.length === 0 ? "" : el("details", {},
    el("summary", {}, plural(attributes.length, "span attribute")), facts(attributes, "attributes")), ...logs(node));
  $("details").scrollTop = 0;
}
function ofRun() {
  return [el("h2", {}, "This run"), facts([["pipeline", run.pipeline], ["service", run.service], ["outcome", run.outcome],
    ["began", date(run.began)], ["took", duration(run.ms)], ["run", mono(run.run_id)], ["trace", mono(run.trace_id)]]),
  el("p", {class: "note"}, nodes.length ? "Choose a node to see its facts and its logs." : "No node has been seen in it.")];
}
function ofNode(node) {
  const missing = node.depends_on.filter((name) => !node.sources.some((row) => nodes[row].name === name));
  const joined = (parts) => el("span", {class: "joined"}, parts.slice(0, 30), parts.length > 30 && `${parts.length - 30} more`);
  const given = [...node.sources.map(link), ...missing.map(named)];
  const tries = node.attempts.map((attempt) => el("div", {}, sign(attempt.outcome),
    ` ${attempt.number}: ${duration(attempt.duration_ns / 1e6)} `, attempt.failure && reason(attempt.failure)));
  const close = () => { choose(-1); $("lanes").focus({preventScroll: true}); };
  return [el("button", {id: "close", type: "button", "aria-label": "Close", click: close}, "✕"),
    el("h2", {}, sign(node.outcome), " ", named(node.name)),
    facts([["outcome", node.outcome], ["because", node.skip_reason], ["layer", node.layer], ["engine", node.engine],
      ["inner run", node.run_id && mono(node.run_id)], ["began", `${duration(Math.max(0, node.start))} into the run`],
      ["took", node.executed && `${duration(node.ms)}${node.critical ? ", on the critical path" : ""}`],
      ["usually", node.usual && [duration(node.usual), " ", spark(node), changed(node)]],
      ["rows", (known(node.rows_in) || known(node.rows_out)) && `${count(node.rows_in)} → ${count(node.rows_out)}`],
      ["rows/s", known(node.rate) && short(node.rate)], ["made", size(node.bytes_out)], ["memory", node.executed && size(node.rss)],
      ["cache", cache(node)], ["attempts", tries], ["gets from", given.length > 0 && joined(given)],
      ["feeds", node.feeds.length > 0 && joined(node.feeds.map(link))]]),
    ...(node.failure ? [el("h3", {}, "Failure"), el("p", {class: "message"}, reason(node.failure)), trace(node.failure)] : [])];
}
function logs(node) {
  const inside = ({s, n, at}) => s === node.span_id || (!spans.has(s) && n === node.name && at >= node.start - 2 && at <= node.end + 2);
  const lines = D.logs.map((line) => ({...line, at: Date.parse(line.t) - run.began})).filter((line) => !node || inside(line));
  const body = el("ol", {class: "logs"}), more = el("button", {type: "button", class: "more", click: show}, "Show more");
  function show() {
    body.append(...lines.slice(body.children.length, body.children.length + LINES).map((line) => el("li", {"data-level": line.l},
      el("span", {class: "time"}, `${line.at <= -1 ? "−" : "+"}${Math.abs(Math.trunc(line.at) / 1000).toFixed(3)} `),
      line.l !== "info" && el("b", {}, `${line.l} `), line.m,
      el("span", {class: "fields"}, Object.entries(line.f).map(([key, value]) => `  ${key}=${value}`)))));
    more.hidden = body.children.length >= lines.length;
  }
  show();
  const note = "✂ Lines were left out of this file; warnings, errors and the first lines of each node went last.";
  return [el("h3", {}, `Logs (${plural(lines.length, "line")})`), D.logs_cut ? el("p", {class: "note logs-cut"}, note) : "", body, more];
}

// --- plots ---------------------------------------------------------------------------------------------------------------
const plots = [], probe = document.body.appendChild(el("i", {hidden: true}));
const colour = (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
const maybe = (told) => (u, value) => known(value) ? told(value) : "–", ink = (name) => () => colour(name);
function plot(host, label, data, {series, y, x, range, height = 170, draw = []}) {
  const axis = {stroke: ink("muted"), grid: {stroke: ink("line"), width: 1}, ticks: {show: false}, font: "11px system-ui, sans-serif"};
  const measure = () => ({width: Math.max(200, host.clientWidth), height}), texts = (of) => (u, values) => values.map(of);
  const made = new uPlot({...measure(), hooks: {draw}, series, legend: {markers: {width: 0, fill: (u, i) => u.series[i].stroke()}},
    cursor: {y: false, drag: {x: false}, points: {size: 7}, sync: x && {key: "time"}},
    scales: {x: {time: false, range}, y: {range: (u, least, most) => [0, (most || 1) * 1.12]}},
    axes: [{...axis, show: Boolean(x), values: texts(x), space: 70, size: 28}, {...axis, values: texts(y), size: 62}]}, data, host);
  Object.assign(host, {role: "img", ariaLabel: label});
  new ResizeObserver(() => made.setSize(measure())).observe(host);
  plots.push(made);
}
function overTime() {
  const seen = nodes.filter((node) => known(node.rss) && node.executed).sort((a, b) => a.end - b.end);
  const fed = own.filter((node) => node.rows_out && node.executed), bin = total / BINS, rows = new Array(BINS).fill(0);
  for (const {start, end, rows_out} of fed) {
    const [first, last] = [start, end].map((ms) => Math.min(BINS - 1, Math.max(0, Math.floor(ms / bin))));
    for (let i = first; i <= last; i++) rows[i] += rows_out / (last - first + 1);
  }
  const common = {range: [0, total], x: duration}, series = (label, name, value, more) => [{label: "at", value: maybe(duration)},
    {label, width: 1.6, stroke: ink(name), fill: ink(`${name}-tint`), value: maybe(value), ...more}];
  if (seen.length > 1) plot($("memory"), "Memory over time", [seen.map((node) => node.end), seen.map((node) => node.rss)],
    {...common, y: size, series: series("memory", "accent", size, {points: {show: seen.length < 60, size: 5}})});
  if (fed.length) plot($("throughput"), "Rows a second over time", [rows.map((_, i) => i * bin), rows.map((made) => made / bin * 1000)],
    {...common, y: short, series: series("rows/s", "success", short, {paths: uPlot.paths.stepped({align: 1}), points: {show: false}})});
  ["memory", "throughput"].forEach((id) => { $(id).parentNode.hidden = !$(id).firstChild; });
  $("plots").hidden = !seen[1] && !fed.length;
}
function againstEarlier() {
  const runs = [...D.earlier.runs.map(([id, outcome, start, seconds]) => ({id: id.slice(0, 8), outcome, start, ms: seconds * 1000})),
    {id: "this run", outcome: run.outcome, start: run.start_ns, ms: run.ms}];
  const good = runs.slice(0, -1).filter(({outcome}) => outcome === "success").map(({ms}) => ms), at = runs.map((_, i) => i);
  const moved = nodes.filter(notable).sort((a, b) => Math.abs(b.ms - b.usual) - Math.abs(a.ms - a.usual)).slice(0, 6);
  run.usual = good.length > 2 ? median(good) : undefined;
  if (runs.length < 2) return void $("earlier-note").append("No earlier run of this pipeline is known here.");
  const usually = `${percent(run.ms / run.usual - 1)} against ${duration(run.usual)}, the median of ${good.length} earlier successes. `;
  $("earlier-note").append(run.usual ? usually : "", el("span", {class: "joined"}, moved.map((node) =>
    el("span", {}, link(node.row), changed(node), ` (${duration(node.ms)}, usually ${duration(node.usual)})`))));
  const paint = {unit: 3, values: () => runs.map(({outcome}) => colour(outcome))}, disp = {fill: paint, stroke: paint};
  const signs = (u) => runs.forEach(({outcome, ms}, i) => {
    Object.assign(u.ctx, {textAlign: "center", fillStyle: colour("text"), font: `${11 * devicePixelRatio}px sans-serif`});
    const above = u.valToPos(ms, "y", true) - 5 * devicePixelRatio;
    if (outcome !== "success") u.ctx.fillText(SIGNS[outcome] || "?", u.valToPos(i, "x", true), above);
  });
  const told = (i) => `${date(runs[i].start / 1e6)}, ${runs[i].outcome}, ${runs[i].id}`, points = {show: false};
  plot($("history"), "Durations of earlier runs and of this one", [at, runs.map(({ms}) => ms), at.map(() => run.usual)], {
    height: 150, range: [-0.6, runs.length - 0.4], y: duration, draw: [signs], series: [{label: "run", value: maybe(told)},
      {label: "took", stroke: ink("success"), value: maybe(duration), points, paths: uPlot.paths.bars({size: [0.7, 46], disp})},
      {label: "median", stroke: ink("muted"), dash: [4, 4], width: 1, points, value: () => run.usual ? duration(run.usual) : "–"}]});
}

// --- all of it -----------------------------------------------------------------------------------------------------------
function theme(scheme) {
  if (scheme !== undefined) root.style.colorScheme = scheme;
  plots.forEach((each) => each.redraw());
  [lanes, table].forEach((each) => each.draw());
}
function frame() {
  $("fit").checked = nodes.length > 100;
  ["dag", "waterfall", "nodes"].forEach((id) => { $(id).hidden = !nodes.length; });
  grid.querySelector("colgroup").append(...COLUMNS.map(({wide}) => el("col", {style: {width: `${wide}px`}})));
  grid.querySelector("table").style.minWidth = `${sum(COLUMNS.map(({wide}) => wide))}px`;
  $("heads").append(heads());
  $("legend").append(el("span", {class: "critical"}, el("i", {class: "mark"}), "critical path: what it waited for"), ...Object.keys(SIGNS)
    .filter((name) => nodes.some((node) => node.outcome === name)).map((name) => el("span", {}, sign(name), " ", name)));
}
[againstEarlier, head, failures, frame, filter, details, overTime].forEach((draw) => draw());
["find", "only-critical", "fit"].forEach((id) => $(id).addEventListener("input", filter));
document.addEventListener("keydown", ({key}) => { if (key === "Escape" && chosen >= 0) choose(-1); });
$("theme").addEventListener("click", () => theme((root.style.colorScheme || (dark.matches && "dark")) === "dark" ? "light" : "dark"));
dark.addEventListener("change", () => theme());
addEventListener("beforeprint", () => {
  [printing, root.dataset.scheme] = [true, root.style.colorScheme];
  document.querySelectorAll("details").forEach((each) => { each.open = true; });
  theme("light");
});
addEventListener("afterprint", () => { printing = false; theme(root.dataset.scheme); });
new ResizeObserver(() => setTimeout(drawDag)).observe($("dag"));
root.dataset.ready = "";
})().catch((error) => document.body.prepend(`This report cannot be drawn here: ${error}. It needs a browser of 2024 or later.`));
