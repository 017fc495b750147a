// The plots: every function reads the controls and draws one of them anew.
const NOT_DRAWN = "not finite or not recorded";
const fold = (values, better) => values.reduce((a, b) => (better(a, b) ? a : b));
const largest = (values) => fold(values, (a, b) => a > b);
const least = (values) => fold(values, (a, b) => a < b);

function layout({ xaxis, yaxis, ...rest } = {}) {
  const axis = {
    gridcolor: style("--grid"), linecolor: style("--line"), zerolinecolor: style("--line"), automargin: true,
    tickfont: { size: 12 }, exponentformat: "power",
  };
  return {
    paper_bgcolor: style("--paper"), plot_bgcolor: style("--paper"), margin: { l: 12, r: 12, t: 22, b: 12 },
    font: { family: getComputedStyle(document.body).fontFamily, size: 13, color: style("--ink") },
    showlegend: false, hovermode: "closest", // the bar on top is the legend of all plots
    dragmode: matchMedia("(pointer: coarse)").matches ? false : "zoom", // a finger scrolls the page
    hoverlabel: {
      bgcolor: style("--paper"), bordercolor: style("--line"), font: { color: style("--ink") }, align: "left", namelength: -1,
    },
    xaxis: { ...axis, ...xaxis }, yaxis: { ...axis, ...yaxis }, ...rest,
  };
}

function draw(target, traces, extra) {
  const made = layout(extra);
  if (!traces.length) {
    const note = { text: "not recorded", showarrow: false, xref: "paper", yref: "paper", x: 0.5, y: 0.5 };
    const annotations = [{ ...note, font: { color: style("--quiet") } }];
    Object.assign(made, { annotations, shapes: [], xaxis: { visible: false }, yaxis: { visible: false } });
  }
  return Plotly.react(target, traces, made, { responsive: true, displayModeBar: false });
}

function yAxis(type, statistic, values, extra = {}) {
  if (type === "log") {
    const positive = values.filter((v) => v > 0);
    const decades = positive.length ? Math.log10(largest(positive) / least(positive)) : 0;
    return { type, ...(decades > 1.5 ? { dtick: Math.ceil(decades / 6) } : {}), ...extra };
  }
  return { type, ...(quantity(statistic).share ? { rangemode: "tozero", tickformat: ".0%" } : {}), ...extra };
}

/** The axis of layers: names where they have room, else their numbers. */
function depthAxis(lines, target, extra = {}) {
  const count = Math.max(0, ...lines.map(({ layers }) => layers.length));
  const names = unique(lines.map(({ signal, layers }) => layers.map((i) => signal.layers[i]).join("\n")));
  const axis = { showgrid: false, zeroline: false, range: [-0.5, count - 0.5], ...extra };
  if (names.length === 1 && target.clientWidth / count > 42) {
    const texts = names[0].split("\n").map((name) => plain(short(name, 22)));
    return { ...axis, tickvals: texts.map((_, i) => i), ticktext: texts, tickangle: -35, tickfont: { size: 11 } };
  }
  return { ...axis, title: { text: "layer, in order of depth" }, ...(count < 12 ? { dtick: 1 } : {}), nticks: 12 };
}

/** Lines between stages, told by the names of layers, where all runs agree on them. */
function stages(lines, long) {
  const ends = lines.map(({ signal, layers }) => {
    const of = layers.map((i) => signal.stages[i]);
    return of.flatMap((stage, i) => (i && stage !== of[i - 1] ? [[i - 0.5, stage]] : []));
  });
  if (!ends.length || ends.some((e) => JSON.stringify(e) !== JSON.stringify(ends[0]))) return { shapes: [] };
  const shapes = ends[0].map(([x]) => ({
    type: "line", xref: "x", yref: "paper", x0: x, x1: x, y0: 0, y1: 1, layer: "below",
    line: { color: style("--line"), width: 1.5 },
  }));
  const named = ends[0].length > 12 ? [] : ends[0].filter(([, stage]) => stage);
  const annotations = named.map(([x, stage]) => ({
    xref: "x", yref: "paper", x, y: 1, yanchor: "bottom", xanchor: "left", showarrow: false,
    text: plain(long ? stage.replace(/(\d+)/, " $1") : stage.replace(/\D+/, "")), font: { size: 11, color: style("--quiet") },
  }));
  return { shapes, annotations };
}

/** Measured lines, solid with markers; the first, of initialisation, dotted; the theory dashed. */
function profileTraces(lines, type, size) {
  const traces = [];
  for (const { run, signal, layers, now, values, first, theory } of lines) {
    const title = plain(runs[run].title);
    const add = (y, role, label, options) => traces.push({
      type: "scatter", mode: "lines", x: layers.map((_, i) => i), y: drawable(y, type), name: title, meta: { run, role },
      customdata: layers.map((i) => plain(signal.layers[i])), connectgaps: false, ...options,
      hovertemplate: `<b>%{customdata}</b><br>%{y:.4g}<extra>${title}<br>${label}</extra>`,
    });
    if (theory) {
      add(theory, "theory", "expected at initialisation", { line: { color: style("--quiet"), width: 1.5, dash: "dash" } });
    }
    if (first) {
      add(first, "first", when(signal, 0), { opacity: 0.65, line: { color: colour(run), width: 1.5, dash: "dot" } });
    }
    const marker = { symbol: MARKERS[run % 8], size };
    const mode = layers.length > 120 ? "lines" : "lines+markers"; // hundreds of markers hide the line, and take time
    add(values, "now", when(signal, now), { mode, line: { color: colour(run), width: 2 }, marker });
  }
  return traces;
}

const numbers = (lines) => lines.flatMap((l) => [...l.values, ...(l.first || []), ...(l.theory || [])]);

function drawOverview() {
  for (const { kind, source, statistic, group, plot } of panels) {
    const lines = profile(kind, source, statistic, group), values = numbers(lines), type = axisType(values, statistic);
    draw(plot, profileTraces(lines, type, 4), {
      ...stages(lines, false), margin: { l: 8, r: 8, t: 18, b: 8 }, yaxis: yAxis(type, statistic, values, { nticks: 5 }),
      xaxis: { showgrid: false, zeroline: false, nticks: 6, ...(values.length < 12 ? { dtick: 1 } : {}) },
    });
  }
}

const chosen = () => {
  const [kind, source, statistic] = $("quantity").value.split("|");
  return { kind, source, statistic, group: $("group").value, text: $("filter").value };
};

function drawProfile() {
  const { kind, source, statistic, group, text } = chosen();
  const lines = profile(kind, source, statistic, group, text), values = numbers(lines), type = axisType(values, statistic);
  draw($("profile"), profileTraces(lines, type, 7), {
    ...stages(lines, innerWidth > 700), xaxis: depthAxis(lines, $("profile")), yaxis: yAxis(type, statistic, values),
  });
  const missing = shown().filter((run) => !lines.some((line) => line.run === run));
  const notes = missing.map((run) => `${runs[run].title} did not record this.`);
  for (const { run, values: all } of lines) {
    const lost = all.filter((v) => v === null).length;
    const low = type === "log" ? all.filter((v) => v !== null && v <= 0).length : 0;
    if (lost) notes.push(`${runs[run].title}: ${lost} of ${all.length} layers are ${NOT_DRAWN} here.`);
    if (low) notes.push(`${runs[run].title}: ${low} of ${all.length} layers, zero or less, have no place on a logarithmic axis.`);
  }
  $("profile-note").textContent = notes.join(" ");
}

/** Epochs, where no two measurements share one; else optimizer steps. */
const byEpoch = (signals) => signals.every((signal) => unique(signal.epochs).length === signal.epochs.length);
function timeAxis(inEpochs, signals) {
  const ends = largest(signals.map(({ epochs, steps }) => largest(inEpochs ? epochs : steps)).concat(1));
  return { title: { text: inEpochs ? "epoch" : "step" }, zeroline: false, ...(ends < 12 ? { dtick: 1 } : {}) };
}

function drawTime() {
  const { kind, source, statistic } = chosen(), layer = $("layer").value;
  const having = shown().map((run) => [run, signalOf(run, kind, source)]);
  const lines = having.filter(([, signal]) => has(signal, statistic) && signal.layers.includes(layer));
  const series = lines.map(([run, s]) => [run, s, s.values[statistic].map((row) => row[s.layers.indexOf(layer)])]);
  const inEpochs = byEpoch(lines.map(([, s]) => s));
  const all = series.flatMap(([, , values]) => values), type = axisType(all, statistic);
  const traces = series.map(([run, s, values]) => ({
    type: "scatter", mode: "lines+markers", x: inEpochs ? s.epochs : s.steps, y: drawable(values, type), meta: { run },
    line: { color: colour(run), width: 2 }, marker: { symbol: MARKERS[run % 8], size: 6 },
    customdata: s.steps.map((_, i) => when(s, i)),
    hovertemplate: `%{y:.4g}<br>%{customdata}<extra>${plain(runs[run].title)}</extra>`,
  }));
  draw($("time"), traces, { xaxis: timeAxis(inEpochs, lines.map(([, s]) => s)), yaxis: yAxis(type, statistic, all) });
}

/** Ticks of a logarithmic colour bar, for values that are logarithms already. */
function powerTicks(z) {
  const finite = z.flat().filter((v) => v !== null);
  if (!finite.length) return {};
  const low = Math.floor(least(finite)), high = Math.ceil(largest(finite)), every = Math.ceil((high - low) / 6) || 1;
  const tickvals = Array.from({ length: high - low + 1 }, (_, i) => low + i).filter((v) => (v - low) % every === 0);
  return { tickvals, ticktext: tickvals.map((v) => `10<sup>${v}</sup>`.replace("-", "−")) };
}

function drawHeat() {
  const { kind, source, statistic, group, text } = chosen(), run = Number($("heat-run").value), target = $("heat");
  const signal = shown().length ? signalOf(run, kind, source) : undefined;
  const layers = has(signal, statistic) ? picked(signal, group, text) : [];
  if (!layers.length) return draw(target, [], {});
  const rows = signal.values[statistic], values = layers.map((i) => rows.map((row) => row[i]));
  const type = axisType(values.flat(), statistic);
  const z = values.map((row) => drawable(row, type).map((v) => (v === null || type !== "log" ? v : Math.log10(v))));
  const number = (value) => (value === null ? NOT_DRAWN : Number(value.toPrecision(4)));
  const told = (i, t) => [plain(signal.layers[i]), when(signal, t), number(rows[t][i])];
  const inEpochs = byEpoch([signal]), every = Math.ceil(layers.length / 24);
  const labelled = layers.map((_, i) => i).filter((i) => i % every === 0);
  const ticktext = labelled.map((i) => plain(short(signal.layers[layers[i]], 24)));
  const labels = target.clientWidth > 480 ? { tickvals: labelled, ticktext, tickfont: { size: 11 } } : { title: { text: "layer" } };
  return draw(target, [{
    type: "heatmap", x: (inEpochs ? signal.epochs : signal.steps).map(String), y: layers.map((_, i) => i), z,
    colorscale: "Cividis", customdata: layers.map((i) => rows.map((_, t) => told(i, t))), meta: { run },
    hovertemplate: "<b>%{customdata[0]}</b><br>%{customdata[2]}<br>%{customdata[1]}<extra></extra>",
    colorbar: { thickness: 12, outlinewidth: 0, ...(type === "log" ? powerTicks(z) : {}) },
  }], {
    xaxis: { title: { text: inEpochs ? "epoch" : "step" }, type: "category", showgrid: false, nticks: 12 },
    yaxis: { autorange: "reversed", showgrid: false, zeroline: false, ...labels },
  });
}

const signed = (number, text) => `${number < 0 ? "−" : ""}${text}`;
const power = (edge) => signed(edge, `10<sup>${Math.round(Math.log10(Math.abs(edge)))}</sup>`.replace(">-", ">−"));
const brief = (value) => signed(value, Number(Math.abs(value).toPrecision(2)));
function binLabel(edges, i) {
  if (i === 0) return `below ${brief(edges[0])}`;
  return i >= edges.length ? `above ${brief(edges[edges.length - 1])}` : `${brief(edges[i - 1])} to ${brief(edges[i])}`;
}

/** Ticks at powers of ten on both sides of zero, at least so many bins apart. */
function decades(edges, apart) {
  const middle = edges.length / 2, found = [[middle, "0"]];
  let last = middle;
  for (let i = middle; i < edges.length; i += 1) {
    const exponent = Math.log10(edges[i]);
    if (Math.abs(exponent - Math.round(exponent)) > 1e-6 || i + 0.5 - last < apart) continue;
    last = i + 0.5;
    found.push([last, power(edges[i])], [edges.length - last, power(-edges[i])]);
  }
  return found;
}

function drawHistogram() {
  const [kind, source] = $("histogram-kind").value.split("|"), layer = $("histogram-layer").value, traces = [];
  let edges = [], low = Infinity, high = -1;
  for (const run of shown()) {
    const found = signalOf(run, kind, source)?.histograms;
    if (!found?.layers?.[layer]) continue;
    const now = at(found, state.step);
    for (const [index, role] of now > 0 && $("reference").checked ? [[0, "first"], [now, "now"]] : [[now, "now"]]) {
      const shares = found.layers[layer][index], solid = role === "now";
      if (!shares || shares.length !== runs[run].edges.length + 1) continue;
      edges = runs[run].edges;
      const filled = [...shares.keys()].filter((i) => shares[i]);
      [low, high] = [Math.min(low, filled[0]), Math.max(high, filled[filled.length - 1])];
      traces.push({
        type: "scatter", mode: "lines", x: [...shares.keys()], y: shares, opacity: solid ? 1 : 0.7, meta: { run, role },
        line: { shape: "hvh", color: colour(run), width: solid ? 2 : 1.25, dash: solid ? "solid" : "dot" },
        customdata: [...shares.keys()].map((i) => binLabel(edges, i)),
        hovertemplate: `%{customdata}<br>%{y:.2%}<extra>${plain(runs[run].title)}<br>step ${found.steps[index]}</extra>`,
      });
    }
  }
  const ticks = edges.length ? decades(edges, ((high - low + 4) / $("histogram").clientWidth) * 48) : [];
  draw($("histogram"), traces, {
    yaxis: { title: { text: "share of values" }, tickformat: ".1~%", rangemode: "tozero" },
    xaxis: {
      title: { text: "value (logarithmic)" }, range: [low - 2, high + 2], zeroline: false,
      tickvals: ticks.map(([i]) => i), ticktext: ticks.map(([, text]) => text), tickangle: 0,
    },
  });
}

function drawHistory() {
  for (const key of ["loss", "accuracy"]) {
    const traces = [];
    for (const run of shown()) {
      const history = runs[run].history, title = plain(runs[run].title);
      for (const [name, dash, role] of [[key, "dash", "training"], [`val_${key}`, "solid", "validation"]]) {
        if (!history[name]) continue;
        traces.push({
          type: "scatter", mode: "lines+markers", x: history.epoch || history[name].map((_, i) => i + 1), y: history[name],
          line: { color: colour(run), dash, width: 2 }, marker: { size: 5, symbol: MARKERS[run % 8] }, meta: { run, role },
          hovertemplate: `%{y:.4g}<br>epoch %{x}<extra>${title}<br>${role}</extra>`,
        });
      }
    }
    const ends = largest(traces.flatMap((trace) => trace.x).concat(1));
    draw($(`history-${key}`), traces, {
      xaxis: { title: { text: "epoch" }, ...(ends < 12 ? { dtick: 1 } : {}) },
      yaxis: { tickformat: key === "accuracy" ? ".0%" : undefined },
    });
  }
}
