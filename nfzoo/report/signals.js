"use strict";
// What the runs measured, and small helpers. Text from the data reaches the page as text only (textContent, or `plain`
// for Plotly, which reads a little HTML).
const page = JSON.parse(document.getElementById("data").textContent);
const runs = page.runs;
const $ = (id) => document.getElementById(id);
const MARKERS = ["circle", "square", "diamond", "triangle-up", "x", "star", "cross", "hexagon"];
const state = { shown: new Set(runs.keys()), moments: [], step: 0, playing: null, frame: null };

// ------------------------------------------------------------------ small helpers
function node(tag, properties = {}, ...children) {
  const made = Object.assign(document.createElement(tag), properties);
  made.append(...children);
  return made;
}
const plain = (text) => String(text).replace(/&/g, "&amp;").replace(/</g, "&lt;").replace(/>/g, "&gt;");
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colour = (run) => style(`--run-${run % 8}`);
const unique = (values) => [...new Set(values)];
const quantity = (name) => page.quantities[name] || { label: name, definition: "", share: false };
const capital = (text) => text.charAt(0).toUpperCase() + text.slice(1);
const kindLabel = (kind, source) =>
  (page.kinds[kind] || capital(kind)) + (source === "probe" ? "" : `, mean over ${source === "live" ? "training batches" : source}`);
const groupLabel = (group) => (page.places[group] ? capital(page.places[group]) : group);
const PLACED = ["activation", "gradient"]; // kinds whose layers have a place in the network
const shown = () => [...state.shown].sort((a, b) => a - b);
const short = (name, most) => (name.length <= most ? name : `${name.slice(0, most / 2)}…${name.slice(-most / 2 + 1)}`);

// ------------------------------------------------------------------ what is measured
const signalOf = (run, kind, source) => runs[run].signals.find((s) => s.kind === kind && s.source === source);
const has = (signal, statistic) => signal && statistic in signal.values;

/** Index of a signal's last measurement up to a step; the first one where there is none. */
function at(signal, step) {
  let found = 0;
  signal.steps.forEach((s, i) => { if (s <= step) found = i; });
  return found;
}
const when = (signal, index) =>
  signal.steps[index] === 0 ? "initialisation" : `epoch ${signal.epochs[index]}, step ${signal.steps[index]}`;

/** Indices of the layers of a group whose name contains a text. The main stream: blocks, else merges, else all. */
function picked(signal, group, text = "") {
  const wanted = group !== "stream" ? group : ["block", "merge"].find((place) => signal.groups.includes(place)) ?? "";
  const named = (i) => signal.layers[i].toLowerCase().includes(text.toLowerCase());
  return [...signal.layers.keys()].filter((i) => (wanted === "" || signal.groups[i] === wanted) && named(i));
}

/** Logarithmic where positive values span a factor of 30 or more; shares never. */
function axisType(values, statistic) {
  const wanted = $("scale").value;
  if (wanted !== "auto") return wanted;
  if (quantity(statistic).share) return "linear";
  const finite = values.filter((v) => v !== null && v !== 0);
  if (!finite.length || finite.some((v) => v < 0)) return "linear";
  return finite.reduce((a, b) => Math.max(a, b)) / finite.reduce((a, b) => Math.min(a, b)) > 30 ? "log" : "linear";
}
const drawable = (values, type) => values.map((v) => (v === null || (type === "log" && v <= 0) ? null : v));

/** The runs' values of one statistic by depth at the chosen moment, and what is drawn beside them. */
function profile(kind, source, statistic, group, text) {
  const found = [];
  for (const run of shown()) {
    const signal = signalOf(run, kind, source);
    const layers = has(signal, statistic) ? picked(signal, group, text) : [];
    if (!layers.length) continue;
    const now = at(signal, state.step), take = (row) => layers.map((i) => row[i] ?? null);
    found.push({
      run, signal, layers, now,
      values: take(signal.values[statistic][now]),
      first: now > 0 && $("reference").checked ? take(signal.values[statistic][0]) : null,
      theory: signal.theory[statistic] ? take(signal.theory[statistic]) : null,
    });
  }
  return found;
}
