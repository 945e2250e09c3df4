"use strict";
const data = JSON.parse(document.getElementById("data").textContent);
const root = document.documentElement;
const $ = (id) => document.getElementById(id);
const make = (name, properties = {}, ...children) => {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children);
  return element;
};
const say = (key, values = {}) => data.words[root.lang][key].replace(/\{(\w+)\}/g, (_, name) => values[name]);
const count = (n) => n.toLocaleString("en-US");
const number = (value) => {
  if (value === null || value === undefined || Number.isNaN(value)) return "–";
  const size = Math.abs(value);
  if (size >= 1000) return count(Math.round(value));
  return size !== 0 && size < 0.001 ? value.toExponential(1) : String(Number(value.toPrecision(3))).replace("-", "−");
};
const redraws = [];
const redraw = () => redraws.forEach((draw) => draw());

// --- language and theme -------------------------------------------------------------------------------------------
const speak = (language) => {
  root.lang = language;
  for (const element of document.querySelectorAll("[data-label]"))
    element.setAttribute("aria-label", say(element.dataset.label));
  for (const element of document.querySelectorAll("[data-hint]")) element.placeholder = say(element.dataset.hint);
  redraw();
};
$("language").onclick = () => speak(root.lang === "en" ? "zh" : "en");
const prefersDark = matchMedia("(prefers-color-scheme: dark)");
prefersDark.addEventListener("change", redraw);
$("theme").onclick = () => {
  const dark = root.dataset.theme === "auto" ? prefersDark.matches : root.dataset.theme === "dark";
  root.dataset.theme = dark ? "light" : "dark";
  redraw();
};
addEventListener("resize", redraw);
for (const button of document.querySelectorAll(".copy"))
  button.onclick = async () => {
    const code = button.previousElementSibling;
    if (!navigator.clipboard) return getSelection().selectAllChildren(code);
    await navigator.clipboard.writeText(code.textContent);
    button.textContent = say("copied");
  };

// --- numbers under the pointer in curves --------------------------------------------------------------------------
const nearest = (x, wanted) => {
  let low = 0, high = x.length - 1;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (x[middle] < wanted) low = middle + 1; else high = middle;
  }
  return low > 0 && wanted - x[low - 1] < x[low] - wanted ? low - 1 : low;
};
for (const svg of document.querySelectorAll("svg[data-chart]")) {
  const chart = data.charts[svg.dataset.chart], output = svg.nextElementSibling, box = chart.box;
  const line = document.createElementNS("http://www.w3.org/2000/svg", "line");
  line.setAttribute("class", "cursor");
  line.setAttribute("y1", box.top);
  line.setAttribute("y2", box.bottom);
  svg.onpointermove = (event) => {
    const frame = svg.getBoundingClientRect();
    const share = ((event.clientX - frame.left) / frame.width * box.width - box.left) / (box.right - box.left);
    const step = chart.x0 + Math.min(1, Math.max(0, share)) * (chart.x1 - chart.x0);
    const rows = chart.series.map((series) => {
      const at = nearest(series.x, step);
      const names = [data.names.length > 1 ? data.names[series.run] : "", series.key, series.held ? say("legend-held") : ""];
      const swatch = make("i", {className: `swatch run${series.run % 8}`});
      return make("div", {}, make("span", {}, swatch, names.filter(Boolean).join(" · ")), make("b", {textContent: number(series.held ? series.y[at] : series.smooth[at])}));
    });
    const x = box.left + (step - chart.x0) / (chart.x1 - chart.x0) * (box.right - box.left);
    line.setAttribute("x1", x);
    line.setAttribute("x2", x);
    svg.append(line);
    output.className = share > 0.5 ? "left" : "";
    output.replaceChildren(`${say("step")} ${count(Math.round(step))}`, ...rows);
    output.hidden = false;
  };
  svg.onpointerleave = () => { output.hidden = true; line.remove(); };
}
