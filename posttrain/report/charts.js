"use strict";
/* Line charts and histograms as SVG. Each fills its figure's .plot, and is drawn again when that changes width. */

const report = JSON.parse(document.getElementById("data").textContent);

/* An element; attributes named on… are listeners, text is always text. */
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  fill(node, attributes, children);
  return node;
}

function svg(tag, attributes = {}, ...children) {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  fill(node, attributes, children);
  return node;
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined) node.setAttribute(name, value);
  }
  node.append(...children.filter((child) => child !== null));
}

function write(value, form) {
  if (value === null || value === undefined) return "–";
  const size = Math.abs(value);
  let text;
  if (form === "percent") text = (value * 100).toFixed(size > 0 && size < 0.1 ? 1 : 0) + " %";
  else if (form === "tokens") text = size >= 100 ? Math.round(value).toLocaleString("en") : String(+value.toFixed(1));
  else if (size !== 0 && size < 1e-3) text = value.toExponential(1);
  else text = String(+value.toPrecision(form === "fine" ? 4 : 3));
  return text.replace(/-/g, "−");
}

/* Round values between which the axis is drawn. */
function ticks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= rough * 0.999);
  const first = Math.ceil(low / step - 1e-9);
  const last = Math.floor(high / step + 1e-9);
  return Array.from({ length: last - first + 1 }, (_, i) => +((first + i) * step).toPrecision(12));
}

function extent(values) {
  let low = Math.min(...values);
  let high = Math.max(...values);
  if (low >= 0 && low < 0.6 * high) low = 0;
  const pad = high === low ? Math.abs(high) * 0.1 || 1 : (high - low) * 0.06;
  return [low === 0 ? 0 : low - pad, high + pad];
}

/* The frame of a chart: an SVG with horizontal grid lines, and scales to place things in it. */
function frame(plot, height, [low, high], form) {
  const width = Math.max(plot.clientWidth, 200);
  const marks = ticks(low, high, height > 180 ? 5 : 3);
  const left = 10 + 6.6 * Math.max(...marks.map((mark) => write(mark, form).length));
  const box = { left, right: width - 14, top: 14, bottom: height - 22 };
  const y = (value) => box.bottom - ((value - low) / (high - low)) * (box.bottom - box.top);
  const root = svg("svg", { viewBox: `0 0 ${width} ${height}`, "aria-hidden": "true" });
  for (const mark of marks) {
    root.append(
      svg("line", { class: "grid", x1: left, x2: box.right, y1: y(mark), y2: y(mark) }),
      svg("text", { x: left - 8, y: y(mark) + 4, "text-anchor": "end" }, write(mark, form)),
    );
  }
  plot.replaceChildren(root);
  return { root, box, y };
}

function path(xs, ys, x, y) {
  let text = "";
  let pen = "M";
  xs.forEach((step, i) => {
    if (ys[i] === null) pen = "M";
    else {
      text += `${pen}${x(step).toFixed(1)} ${y(ys[i]).toFixed(1)}`;
      pen = "L";
    }
  });
  return text;
}

/* Draw now and whenever the width changes (drawing sets the height, which must not count). */
function redraw(plot, draw) {
  let width = plot.clientWidth;
  draw();
  new ResizeObserver(() => requestAnimationFrame(() => {
    if (plot.clientWidth === width) return;
    width = plot.clientWidth;
    draw();
  })).observe(plot);
}

const DASHES = [null, "6 3", "2 3", "2 3"];

function lineChart(figure, chart, moved) {
  const plot = figure.querySelector(".plot");
  const readout = figure.querySelector(".readout");
  const steps = [...new Set(chart.lines.flatMap((line) => line.x))].sort((a, b) => a - b);
  const values = chart.lines.map((line) => new Map(line.x.map((step, i) => [step, line.raw[i]])));
  let cursor = null;
  let marks = null;

  function draw() {
    const range = extent(chart.lines.flatMap((line) => line.raw).filter((value) => value !== null));
    const { root, box, y } = frame(plot, chart.wide ? 250 : 160, range, chart.form);
    const [first, last] = [steps[0], steps[steps.length - 1]];
    const x = (step) => (last === first ? (box.left + box.right) / 2 : box.left + ((step - first) / (last - first)) * (box.right - box.left));
    for (const step of last === first ? [first] : ticks(first, last, box.right > 700 ? 8 : 4).filter((tick) => chart.points || Number.isInteger(tick))) {
      root.append(svg("text", { x: x(step), y: box.bottom + 17, "text-anchor": "middle" }, String(step)));
    }
    chart.lines.forEach((line, i) => {
      const style = `stroke:var(--c${i % 6})`;
      const smooth = line.smooth.length ? line.smooth : line.raw;
      if (line.smooth.length) root.append(svg("path", { class: "raw", style, d: path(line.x, line.raw, x, y) }));
      root.append(svg("path", { class: "smooth", style, "stroke-dasharray": DASHES[i % 4], d: path(line.x, smooth, x, y) }));
      if (chart.points) line.x.forEach((at, j) => root.append(svg("circle", { r: 3, cx: x(at), cy: y(line.raw[j]), style: `fill:var(--c${i % 6})` })));
      else if (line.x.length === 1) root.append(svg("circle", { r: 4, cx: x(line.x[0]), cy: y(line.raw[0]), style: `fill:var(--c${i % 6})` }));
    });
    marks = { group: root.appendChild(svg("g")), box, x, y };
    show(cursor);
  }

  function key(line, i, ...parts) {
    const several = chart.lines.length > 1;
    return make("span", { class: several ? `key line${i % 4}` : "", style: `--key:var(--c${i % 6})` },
      several ? `${line.label} ` : "", ...parts);
  }

  /* Read out one step, or with null the last; of points those that are there, or with null only the lines' names. */
  function show(step) {
    cursor = step;
    const at = step ?? steps[steps.length - 1];
    const keys = chart.lines.map((line, i) => {
      if (chart.points && step === null) return key(line, i);
      if (chart.points && !values[i].has(at)) return null;
      const setting = line.settings ? ` ${line.settings[line.x.indexOf(at)]}` : "";
      return key(line, i, make("b", {}, write(values[i].get(at), chart.form)), setting);
    }).filter((entry) => entry !== null);
    const place = chart.points && step === null ? chart.unit : chart.unit ? `${at} ${chart.unit}` : `step ${at}`;
    readout.replaceChildren(...keys, make("span", {}, place));
    if (!marks) return;
    marks.group.replaceChildren();
    if (step === null) return;
    const { x, y, box } = marks;
    marks.group.append(svg("line", { class: "cursor", x1: x(step), x2: x(step), y1: box.top, y2: box.bottom }));
    values.forEach((line, i) => {
      const value = line.get(step);
      if (value !== null && value !== undefined) {
        marks.group.append(svg("circle", { class: "dot", r: 4, cx: x(step), cy: y(value), style: `fill:var(--c${i % 6})` }));
      }
    });
  }

  function nearest(target) {
    return steps.reduce((best, step) => (Math.abs(step - target) < Math.abs(best - target) ? step : best));
  }

  plot.addEventListener("pointermove", (event) => {
    const { left, width } = plot.getBoundingClientRect();
    const { box } = marks;
    const scale = plot.querySelector("svg").viewBox.baseVal.width / width;
    const share = ((event.clientX - left) * scale - box.left) / (box.right - box.left);
    moved(nearest(steps[0] + share * (steps[steps.length - 1] - steps[0])));
  });
  plot.addEventListener("pointerleave", () => moved(null));
  plot.addEventListener("blur", () => moved(null));
  plot.addEventListener("keydown", (event) => {
    const i = steps.indexOf(cursor ?? steps[steps.length - 1]);
    const to = { ArrowLeft: i - 1, ArrowRight: i + 1, Home: 0, End: steps.length - 1 }[event.key];
    if (event.key === "Escape") moved(null);
    if (to === undefined) return;
    event.preventDefault();
    moved(steps[Math.min(Math.max(to, 0), steps.length - 1)]);
  });
  redraw(plot, draw);
  return (step) => show(step === null ? null : nearest(step));
}

function histogram(figure, panel) {
  const plot = figure.querySelector(".plot");
  const readout = figure.querySelector(".readout");
  const parts = panel.shares.length;
  const bins = panel.shares[0].length;
  const kinds = parts === 1 ? ["late"] : ["early", "late"];
  const colours = { early: "var(--was)", late: "var(--accent)" };

  function show(bin) {
    const what = bin === null ? "mean" : panel.discrete ? write(panel.edges[bin], panel.form)
      : `${write(panel.edges[bin], panel.form)} to ${write(panel.edges[bin + 1], panel.form)}`;
    readout.replaceChildren(make("span", {}, what), ...kinds.map((kind, i) =>
      make("span", { class: "key box", style: `--key:${colours[kind]}` }, `${panel.labels[i]} `,
        make("b", {}, bin === null ? write(panel.means[i], panel.form) : write(panel.shares[i][bin], "percent")))));
  }

  function draw() {
    const { root, box, y } = frame(plot, 190, [0, Math.max(...panel.shares.flat()) * 1.05], "percent");
    const pitch = (box.right - box.left) / bins;
    const gap = Math.min(pitch * 0.12, 6);
    const thick = Math.min((pitch - gap) / parts, 46);
    for (let bin = 0; bin < bins; bin++) {
      const middle = box.left + (bin + 0.5) * pitch;
      kinds.forEach((kind, i) => {
        const top = y(panel.shares[i][bin]);
        root.append(svg("rect", { class: kind, rx: 1.5, x: middle + (i - parts / 2) * thick, y: top, width: Math.max(thick - 1, 1), height: box.bottom - top }));
      });
      root.append(svg("rect", { class: "hit", x: middle - pitch / 2, y: box.top, width: pitch, height: box.bottom - box.top,
        onpointerenter: () => show(bin), onpointerleave: () => show(null) }));
    }
    const every = Math.ceil(panel.edges.length / Math.max(2, Math.floor((box.right - box.left) / 56)));
    panel.edges.forEach((edge, i) => {
      if (i % every) return;
      const place = box.left + (panel.discrete ? i + 0.5 : i) * pitch;
      root.append(svg("text", { x: place, y: box.bottom + 17, "text-anchor": "middle" }, write(edge, panel.form)));
    });
    show(null);
  }
  redraw(plot, draw);
}

for (const section of document.querySelectorAll("[data-sync]")) {
  const show = [];
  const moved = (step) => show.forEach((each) => each(step));
  for (const figure of section.querySelectorAll("[data-chart]")) {
    show.push(lineChart(figure, report.charts[figure.dataset.chart], moved));
  }
}
for (const figure of document.querySelectorAll("[data-thinking]")) {
  const show = lineChart(figure, report.thinking[figure.dataset.thinking], (at) => show(at));
}
for (const figure of document.querySelectorAll("[data-calibration]")) {
  const show = lineChart(figure, report.calibration[figure.dataset.calibration], (at) => show(at));
}
for (const figure of document.querySelectorAll("[data-pareto]")) {
  const show = lineChart(figure, report.pareto[figure.dataset.pareto], (at) => show(at));
}
for (const figure of document.querySelectorAll("[data-histogram]")) {
  histogram(figure, report.histograms[figure.dataset.histogram]);
}
document.documentElement.dataset.ready = "true";
