// --- pairs --------------------------------------------------------------------------------------------------------
const ROWS = 25;
const AXES = ["score_margin", "before", "longer", "weight", "quality", "performance", "loss", "chosen_moved", "rejected_moved"];
const TABLE = ["outcome", "prompt", "chosen", "rejected", "score_margin", "margin", "weight", "loss", "row"];
const DETAILS = ["quality", "performance", "gate", "before", "after", "chosen_moved", "rejected_moved", "longer", "visits", "step"];
const state = {
  run: 0, across: null, bins: null, plane: {x0: null, x1: null, y0: null, y1: null}, range: {h0: null, h1: null},
  text: "", outcomes: new Set([0, 1, 2, 3]), order: "taught", descending: true, page: 0, open: new Set(),
};
const loaded = data.runs.map((run) => ({...run, size: run.outcome.length, hay: null}));
let run, shown = [], selected;

const color = (() => {
  const probe = make("i", {hidden: true});
  document.body.append(probe);
  return (name) => { probe.style.color = `var(--${name})`; return getComputedStyle(probe).color; };
})();
const varies = (column) => column !== undefined && column.some((value) => value !== column[0]);

// Few distinct scores would lie on each other: each pair is moved aside a little, always the same way.
const spread = (column) => {
  const values = [...new Set(column)].filter((value) => value !== null).sort((a, b) => a - b);
  if (values.length > 40 || values.length < 2) return 0;
  let gap = Infinity;
  for (let i = 1; i < values.length; i++) gap = Math.min(gap, values[i] - values[i - 1]);
  return Math.max(gap, (values.at(-1) - values[0]) / 40) * 0.35;
};
const chance = (i) => ((Math.imul(i + 1, 2654435761) >>> 0) / 4294967296) * 2 - 1;
const ends = (column, room) => {
  let low = Infinity, high = -Infinity;
  for (const value of column) if (value !== null) { if (value < low) low = value; if (value > high) high = value; }
  if (low === high) { low -= 1; high += 1; }
  return [low - (high - low) * 0.04 - room, high + (high - low) * 0.04 + room];
};
const ticks = (low, high, most) => {
  const rough = (high - low) / most, power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((each) => each >= rough);
  const found = [];
  for (let value = Math.ceil(low / step) * step; value <= high; value += step) found.push(Math.abs(value) < step / 1e6 ? 0 : value);
  return found;
};
const sized = (canvas) => {
  const scale = devicePixelRatio || 1, width = canvas.clientWidth, height = canvas.clientHeight;
  canvas.width = width * scale;
  canvas.height = height * scale;
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.font = "12px system-ui, sans-serif";
  return {pen, width, height};
};
const EDGE = {left: 46, right: 8, top: 8, bottom: 22};
const scaleOf = (size, x, y) => {
  const width = size.width - EDGE.left - EDGE.right, height = size.height - EDGE.top - EDGE.bottom;
  return {
    x: (value) => EDGE.left + (value - x[0]) / (x[1] - x[0]) * width,
    y: (value) => EDGE.top + (1 - (value - y[0]) / (y[1] - y[0])) * height,
    backX: (at) => x[0] + (at - EDGE.left) / width * (x[1] - x[0]),
    backY: (at) => y[0] + (1 - (at - EDGE.top) / height) * (y[1] - y[0]),
  };
};
const drawAxes = (size, scale, x, y) => {
  const {pen, width, height} = size;
  pen.strokeStyle = color("line");
  pen.fillStyle = color("soft");
  pen.textAlign = "center";
  for (const value of ticks(...x, 7)) pen.fillText(number(value), scale.x(value), height - 6);
  pen.textAlign = "right";
  for (const value of y) {
    pen.fillText(number(value), EDGE.left - 6, scale.y(value) + 4);
    pen.beginPath();
    pen.moveTo(EDGE.left, scale.y(value));
    pen.lineTo(width - EDGE.right, scale.y(value));
    pen.stroke();
  }
};

const inside = (value, low, high) => (low === null || value >= low) && (high === null || value <= high) && (value !== null || (low === null && high === null));
const haystack = () => {
  if (run.hay) return run.hay;
  const lower = data.texts.map((text) => text.toLowerCase());
  const files = run.files.map((file) => file.toLowerCase());
  const {file, row} = run.columns, names = data.pictures.map(([name]) => name.toLowerCase());
  return run.hay = {lower, place: (i) => `${files[file[i]]}:${row[i]}`, picture: (i) => run.pictures[i].map((at) => names[at]).join(" ")};
};
const select = () => {
  const {x0, x1, y0, y1} = state.plane, {h0, h1} = state.range, text = state.text.trim().toLowerCase();
  const xs = run.columns[state.across] || [], ys = run.columns.margin, hs = run.columns[state.bins] || [];
  const planed = x0 !== null || x1 !== null, ranged = h0 !== null || h1 !== null;
  let matches = null;
  if (text) {
    const {lower, place, picture} = haystack(), has = lower.map((each) => each.includes(text));
    const number = /^\d+$/.test(text) ? Number(text) : null;
    matches = (i) => has[run.prompt[i]] || has[run.chosen[i]] || has[run.rejected[i]] || run.columns.row[i] === number || place(i).endsWith(text) || picture(i).includes(text);
  }
  selected = new Uint8Array(run.size);
  const counts = [0, 0, 0, 0];
  for (let i = 0; i < run.size; i++) {
    if (planed && !inside(xs[i], x0, x1)) continue;
    if (!inside(ys[i], y0, y1) || (ranged && !inside(hs[i], h0, h1)) || (matches && !matches(i))) continue;
    counts[run.outcome[i]]++;
    if (state.outcomes.has(run.outcome[i])) selected[i] = 1;
  }
  for (const button of document.querySelectorAll(".outcome")) {
    const outcome = Number(button.dataset.outcome);
    button.setAttribute("aria-pressed", state.outcomes.has(outcome));
    button.querySelector(".n").textContent = count(counts[outcome]);
  }
  sort();
};
const moved = (i) => run.columns.after[i] - run.columns.before[i];
const ORDERS = {
  taught: () => (i) => -moved(i),
  least: () => (i) => run.columns.margin[i] - (run.columns.score_margin ? run.columns.score_margin[i] : 0),
  heavy: () => varies(run.columns.weight) ? (i) => -run.columns.weight[i] : null,
  loss: () => (i) => -run.columns.loss[i],
  file: () => (i) => run.columns.file[i] * 1e9 + run.columns.row[i],
};
// All pairs in an order are kept until another is asked for: a search then only leaves out.
const ordered = () => {
  const wanted = `${state.order} ${state.descending}`;
  if (run.order === wanted) return run.ordered;
  const all = Array.from({length: run.size}, (_, i) => i), sign = state.descending ? -1 : 1;
  if (["prompt", "chosen", "rejected"].includes(state.order)) {
    const at = run[state.order], texts = data.texts;
    all.sort((a, b) => { const one = texts[at[a]] || "", other = texts[at[b]] || ""; return one === other ? a - b : sign * (one < other ? -1 : 1); });
  } else {
    const column = state.order === "outcome" ? run.outcome : run.columns[state.order];
    const value = column ? (i) => sign * (column[i] ?? -Infinity) : ORDERS[state.order]() || (() => 0);
    const key = Float64Array.from(all, (i) => { const each = value(i); return Number.isNaN(each) ? Infinity : each; });
    all.sort((a, b) => key[a] - key[b] || a - b);
  }
  run.order = wanted;
  return run.ordered = all;
};
const sort = () => {
  shown = ordered().filter((i) => selected[i]);
  state.page = Math.min(state.page, Math.max(0, Math.ceil(shown.length / ROWS) - 1));
  drawTable();
  drawSoon();
};
// Once per frame, however fast somebody types.
let waiting = false;
const drawSoon = () => {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => { waiting = false; drawPlane(); drawBins(); });
};

// Selecting by a drag: the corners in the chart's own numbers, or null for a click, which clears.
const drags = (canvas, corners, done) => {
  let start = null;
  const at = (event) => { const frame = canvas.getBoundingClientRect(); return [event.clientX - frame.left, event.clientY - frame.top]; };
  canvas.onpointerdown = (event) => { start = at(event); canvas.setPointerCapture(event.pointerId); };
  canvas.onpointermove = (event) => { if (start) corners(start, at(event)); };
  canvas.onpointerup = (event) => {
    const end = at(event), far = Math.hypot(end[0] - start[0], end[1] - start[1]) > 5;
    if (far) corners(start, end); else corners(null);
    start = null;
    done();
  };
};
const fill = () => {
  const values = {...state.plane, ...state.range};
  for (const id of ["x0", "x1", "y0", "y1", "h0", "h1"])
    $(id).value = values[id] === null ? "" : Number(values[id].toPrecision(3));
};

let planeScale, binScale;
const drawPlane = () => {
  const size = sized($("plane")), {pen} = size, xs = run.columns[state.across], ys = run.columns.margin;
  if (!size.width || !xs) return;
  const room = spread(xs), x = ends(xs, room * 1.2), y = ends(ys, 0), scale = planeScale = scaleOf(size, x, y);
  drawAxes(size, scale, x, ticks(...y, 6));
  pen.strokeStyle = color("soft");
  pen.beginPath();
  pen.moveTo(EDGE.left, scale.y(0));
  pen.lineTo(size.width - EDGE.right, scale.y(0));
  pen.stroke();
  const side = run.size > 8000 ? 2 : run.size > 1500 ? 3 : 5;
  for (const lit of [0, 1])
    for (const [outcome, name] of [[1, "known"], [2, "not_learnt"], [0, "learnt"], [3, "unlearnt"]]) {
      pen.fillStyle = color(lit ? name : "line");
      pen.globalAlpha = lit ? 0.75 : 0.6;
      for (let i = 0; i < run.size; i++)
        if (run.outcome[i] === outcome && selected[i] === lit && xs[i] !== null)
          pen.fillRect(scale.x(xs[i] + room * chance(i)) - side / 2, scale.y(ys[i]) - side / 2, side, side);
    }
  pen.globalAlpha = 1;
  const {x0, x1, y0, y1} = state.plane;
  if ([x0, x1, y0, y1].some((value) => value !== null)) {
    const left = scale.x(x0 ?? x[0]), top = scale.y(y1 ?? y[1]);
    pen.strokeStyle = color("accent");
    pen.strokeRect(left, top, scale.x(x1 ?? x[1]) - left, scale.y(y0 ?? y[0]) - top);
  }
  $("across-name").textContent = say(`col-${state.across}`);
};
const drawBins = () => {
  const size = sized($("bins")), {pen} = size, hs = run.columns[state.bins];
  if (!size.width || !hs) return;
  const x = ends(hs, 0), all = new Array(40).fill(0), lit = new Array(40).fill(0);
  const bin = (value) => Math.min(39, Math.max(0, Math.floor((value - x[0]) / (x[1] - x[0]) * 40)));
  for (const value of hs) if (value !== null) all[bin(value)]++;
  for (const i of shown) if (hs[i] !== null) lit[bin(hs[i])]++;
  const most = Math.max(...all), scale = binScale = scaleOf(size, x, [0, most * 1.08]);
  drawAxes(size, scale, x, ticks(0, most, 3).filter(Number.isInteger));
  const width = (scale.x(x[1]) - scale.x(x[0])) / 40;
  for (const [counts, name] of [[all, "line"], [lit, "accent"]]) {
    pen.fillStyle = color(name);
    counts.forEach((n, i) => pen.fillRect(scale.x(x[0]) + i * width + 0.5, scale.y(n), width - 1, scale.y(0) - scale.y(n)));
  }
  const {h0, h1} = state.range;
  if (h0 !== null || h1 !== null) {
    pen.strokeStyle = color("accent");
    const left = scale.x(h0 ?? x[0]);
    pen.strokeRect(left, EDGE.top, scale.x(h1 ?? x[1]) - left, size.height - EDGE.top - EDGE.bottom);
  }
  $("bins-name").textContent = say(`col-${state.bins}`);
};

const text = (place, whole) => {
  if (place < 0) return make("div", {className: "cut", textContent: say("no-text")});
  const box = make("div", {textContent: data.texts[place], dir: "auto"});
  if (whole && place in data.lengths) return make("div", {}, box, make("div", {className: "cut", textContent: say("cut-here", {n: count(data.lengths[place])})}));
  return box;
};
const pictures = (i) => run.pictures[i].map((at) => {
  const [name, address] = data.pictures[at];
  return address ? make("img", {src: address, alt: name, title: name, loading: "lazy"}) : make("div", {className: "path", textContent: name});
});
const score = (value) => value === null || value === undefined ? "" : `${say("col-score")} ${number(value)}`;
const rowOf = (i) => {
  const {columns} = run, open = state.open.has(i), outcome = data.outcomes[run.outcome[i]];
  const cells = {
    outcome: () => make("td", {className: `policy ${outcome}`}, make("span", {}, make("i"), ` ${say(`outcome-${outcome}`)}`, make("br"), expand)),
    prompt: () => make("td", {className: "text"}, make("div", {}, ...pictures(i), text(run.prompt[i], open))),
    chosen: () => make("td", {className: "text"}, make("div", {}, text(run.chosen[i], open), make("small", {textContent: score(columns.chosen_score?.[i])}))),
    rejected: () => make("td", {className: "text"}, make("div", {}, text(run.rejected[i], open), make("small", {textContent: score(columns.rejected_score?.[i])}))),
    row: () => make("td", {className: "row"}, make("span", {}, make("b", {textContent: count(columns.row[i])}), make("br"), make("small", {textContent: run.files[columns.file[i]].split("/").pop(), title: run.files[columns.file[i]]}))),
  };
  const expand = make("button", {type: "button", className: "expand", textContent: say(open ? "less" : "more")});
  expand.setAttribute("aria-expanded", open);
  const toggle = () => { if (open) state.open.delete(i); else state.open.add(i); drawTable(); };
  const tr = make("tr", {className: open ? "" : "clip"}, ...headings().map((name) => {
    const cell = cells[name] ? cells[name]() : make("td", {className: "number"}, make("span", {textContent: number(columns[name][i])}));
    cell.dataset.name = say(`col-${name}`);
    return cell;
  }));
  tr.onclick = (event) => { if (event.target === expand || !String(getSelection())) toggle(); };
  if (!open) return [tr];
  const facts = DETAILS.filter((name) => columns[name]).map((name) =>
    make("div", {}, make("dt", {textContent: say(`col-${name}`)}), make("dd", {textContent: name === "gate" ? say(columns.gate[i] ? "on" : "off") : number(columns[name][i])})));
  const tokens = make("div", {}, make("dt", {textContent: say("col-tokens")}), make("dd", {textContent: `${columns.chosen_tokens[i]} / ${columns.rejected_tokens[i]}`}));
  return [tr, make("tr", {className: "more"}, make("td", {colSpan: headings().length}, make("dl", {}, ...facts, tokens)))];
};
const headings = () => TABLE.filter((name) => name === "weight" ? varies(run.columns.weight) : !["score_margin"].includes(name) || run.columns[name]);
const drawTable = () => {
  $("table").tHead.replaceChildren(make("tr", {}, ...headings().map((name) => {
    const button = make("button", {type: "button", textContent: say(`col-${name}`)});
    button.onclick = () => {
      state.descending = state.order === name ? !state.descending : true;
      state.order = name;
      drawOrders();
      sort();
    };
    const kind = {outcome: "policy", prompt: "", chosen: "", rejected: "", row: "row"}[name] ?? "number";
    const heading = make("th", {scope: "col", className: kind}, button);
    if (state.order === name) {
      heading.setAttribute("aria-sort", state.descending ? "descending" : "ascending");
      button.textContent += state.descending ? " ↓" : " ↑";
    }
    return heading;
  })));
  const rows = shown.slice(state.page * ROWS, (state.page + 1) * ROWS).flatMap(rowOf);
  const none = () => make("tr", {}, make("td", {colSpan: headings().length, textContent: say("no-match")}));
  $("table").tBodies[0].replaceChildren(...(rows.length ? rows : [none()]));
  const pages = Math.max(1, Math.ceil(shown.length / ROWS));
  $("count").textContent = say("count", {n: count(shown.length), total: count(run.size)});
  $("page").textContent = say("page", {n: count(state.page + 1), pages: count(pages)});
  $("previous").disabled = state.page === 0;
  $("next").disabled = state.page >= pages - 1;
};
const options = (select, names, label, chosen) => {
  select.replaceChildren(...names.map((name) => make("option", {value: name, textContent: say(`${label}-${name}`), selected: name === chosen})));
};
const drawOrders = () => {
  const there = Object.keys(ORDERS).filter((name) => ORDERS[name]());
  options($("order"), there.includes(state.order) ? there : [...there, "column"], "order", there.includes(state.order) ? state.order : "column");
};
const open = (number) => {
  run = loaded[number];
  const axes = AXES.filter((name) => varies(run.columns[name]));
  if (!axes.includes(state.across)) state.across = axes[0];
  if (!axes.includes(state.bins)) state.bins = axes.includes("weight") ? "weight" : axes.includes("loss") ? "loss" : axes[0];
  state.open.clear();
  drawNames();
  select();
};
const drawNames = () => {
  const axes = AXES.filter((name) => varies(run.columns[name]));
  options($("across"), axes, "col", state.across);
  options($("bins-of"), axes, "col", state.bins);
  drawOrders();
};
const clear = () => {
  state.plane = {x0: null, x1: null, y0: null, y1: null};
  state.range = {h0: null, h1: null};
  state.text = $("search").value = "";
  state.outcomes = new Set([0, 1, 2, 3]);
  state.page = 0;
  fill();
  select();
};
if ($("table")) {
  const again = () => { state.page = 0; select(); };
  if ($("run")) $("run").onchange = () => { state.plane = {x0: null, x1: null, y0: null, y1: null}; state.range = {h0: null, h1: null}; fill(); state.page = 0; open(Number($("run").value)); };
  $("across").onchange = () => { state.across = $("across").value; Object.assign(state.plane, {x0: null, x1: null}); fill(); again(); };
  $("bins-of").onchange = () => { state.bins = $("bins-of").value; state.range = {h0: null, h1: null}; fill(); again(); };
  $("order").onchange = () => { if ($("order").value !== "column") state.order = $("order").value; state.page = 0; sort(); };
  $("search").oninput = () => { state.text = $("search").value; again(); };
  $("clear").onclick = clear;
  $("previous").onclick = () => { state.page--; drawTable(); };
  $("next").onclick = () => { state.page++; drawTable(); };
  for (const button of document.querySelectorAll(".outcome"))
    button.onclick = () => {
      const outcome = Number(button.dataset.outcome);
      if (!state.outcomes.delete(outcome)) state.outcomes.add(outcome);
      again();
    };
  for (const [ids, target] of [[["x0", "x1", "y0", "y1"], () => state.plane], [["h0", "h1"], () => state.range]])
    for (const id of ids) $(id).onchange = () => { target()[id] = $(id).value === "" ? null : Number($(id).value); again(); };
  drags($("plane"), (start, end) => {
    const [xs, ys] = start ? [[start[0], end[0]].map(planeScale.backX), [start[1], end[1]].map(planeScale.backY)] : [[null, null], [null, null]];
    state.plane = {x0: start && Math.min(...xs), x1: start && Math.max(...xs), y0: start && Math.min(...ys), y1: start && Math.max(...ys)};
    drawPlane();
  }, () => { fill(); again(); });
  drags($("bins"), (start, end) => {
    const xs = start ? [start[0], end[0]].map(binScale.backX) : [null, null];
    state.range = {h0: start && Math.min(...xs), h1: start && Math.max(...xs)};
    drawBins();
  }, () => { fill(); again(); });
  open(0);
  setTimeout(haystack, 200); // the first search is then as fast as later ones
  redraws.push(() => { drawNames(); drawPlane(); drawBins(); drawTable(); });
}
if (navigator.language.toLowerCase().startsWith("zh")) speak("zh");
