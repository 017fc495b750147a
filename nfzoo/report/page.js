// The page around the plots: cards, controls, definitions.
function option(value, label, group) {
  return { value, label, group };
}

/** Offer options in a select; keep what was chosen, or take what is wanted. */
function choices(select, options, wanted = select.value) {
  const parents = new Map();
  select.replaceChildren();
  for (const { value, label, group } of options) {
    if (group !== undefined && !parents.has(group)) parents.set(group, select.appendChild(node("optgroup", { label: group })));
    (parents.get(group) || select).append(node("option", { value, textContent: label }));
  }
  if (!options.length) return;
  select.value = options.some(({ value }) => String(value) === String(wanted)) ? wanted : options[0].value;
}
const once = (options) => options.filter((a, i) => options.findIndex((b) => a.value === b.value) === i);
const chosenSignals = (kind, source, statistic) =>
  shown().map((run) => signalOf(run, kind, source)).filter((signal) => has(signal, statistic));

function chooseRuns() {
  const before = state.moments[$("moment").value], epochs = new Map(), moment = $("moment");
  const signals = shown().flatMap((run) => runs[run].signals);
  for (const signal of signals) {
    signal.steps.forEach((step, i) => epochs.set(step, Math.max(epochs.get(step) ?? 0, signal.epochs[i])));
  }
  state.moments = [...epochs].sort((a, b) => a[0] - b[0]);
  moment.max = Math.max(0, state.moments.length - 1);
  const kept = before ? state.moments.findIndex(([step]) => step >= before[0]) : -1;
  moment.value = kept < 0 ? moment.max : kept;
  moment.disabled = $("play").disabled = state.moments.length < 2;
  $("key").replaceChildren(...shown().map(legend));
  choices($("heat-run"), shown().map((run) => option(run, runs[run].title)));
  const offer = ({ kind, source, values }) => Object.keys(values).map((name) =>
    option(`${kind}|${source}|${name}`, capital(quantity(name).label), kindLabel(kind, source)));
  choices($("quantity"), once(signals.flatMap(offer)));
  const having = signals.filter(({ histograms }) => histograms.layers);
  choices($("histogram-kind"), once(having.map(({ kind, source }) => option(`${kind}|${source}`, kindLabel(kind, source)))));
  $("histogram-figure").hidden = !having.length;
  chooseMoment();
  chooseQuantity();
  chooseHistogram();
  drawOverview();
  if (!$("history-section").hidden) drawHistory();
}

function chooseMoment() {
  const [step, epoch] = state.moments[$("moment").value] || [0, 0];
  state.step = step;
  const label = step === 0 ? "at initialisation" : `epoch ${epoch} · step ${step}`;
  $("moment-label").textContent = label;
  $("moment").setAttribute("aria-valuetext", label);
}

function chooseQuantity(wanted) {
  const { kind, source, statistic } = chosen(), found = chosenSignals(kind, source, statistic);
  const measured = (signal, i) => signal.values[statistic].some((row) => row[i] !== null);
  const groups = unique(found.flatMap((signal) => signal.groups.filter((_, i) => measured(signal, i))));
  const every = PLACED.includes(kind) ? [option("stream", "Main stream"), option("", "All layers")]
    : groups.length > 1 ? [option("", "All")] : [];
  const usual = PLACED.includes(kind) ? "stream" : groups.includes("kernel") ? "kernel" : groups[0];
  const options = [...every, ...groups.map((name) => option(name, groupLabel(name)))], before = $("group").value;
  const kept = options.some(({ value }) => value === before) && $("group").options.length ? before : usual;
  choices($("group"), options, wanted ?? kept);
  const told = shown().map((run) => runs[run].definitions[statistic]).find(Boolean) || quantity(statistic).definition;
  $("definition").textContent = statistic ? `${kindLabel(kind, source)}, ${quantity(statistic).label}. ${told}` : "";
  chooseLayers();
}

function chooseLayers() {
  const { kind, source, statistic, group, text } = chosen(), found = chosenSignals(kind, source, statistic);
  const names = unique(found.flatMap((signal) => picked(signal, group, text).map((i) => signal.layers[i])));
  choices($("layer"), names.map((name) => option(name, name)));
  drawProfile();
  drawTime();
  drawHeat();
}

function chooseHistogram() {
  if ($("histogram-figure").hidden) return;
  const [kind, source] = $("histogram-kind").value.split("|");
  const names = unique(shown().flatMap((run) => Object.keys(signalOf(run, kind, source)?.histograms.layers || {})));
  choices($("histogram-layer"), names.map((name) => option(name, name)));
  drawHistogram();
}

/** Draw anew what the moment decides, once per frame however fast the slider moves. */
function moved() {
  chooseMoment();
  if (state.frame) return;
  state.frame = requestAnimationFrame(drawMoment);
}

function drawMoment() {
  state.frame = null;
  drawOverview();
  drawProfile();
  if (!$("histogram-figure").hidden) drawHistogram();
}

function play(on) {
  const moment = $("moment");
  clearTimeout(state.playing);
  state.playing = null;
  $("play").textContent = on ? "Pause" : "Play";
  if (!on) return;
  const from = moment.value === moment.max ? 0 : Number(moment.value);
  const show = (value) => {
    moment.value = value;
    moved();
    if (moment.value === moment.max) play(false);
    else state.playing = setTimeout(() => requestAnimationFrame(() => show(value + 1)), 700);
  };
  show(from);
}

// ------------------------------------------------------------------ what stands on the page
function legend(run) {
  const mark = node("span", { className: "mark", textContent: "●■◆▲✖★✚⬢"[run % 8] });
  mark.style.color = `var(--run-${run % 8})`;
  return node("span", {}, mark, runs[run].title);
}

function card(run, index) {
  const made = node("article", { className: "card" });
  made.style.setProperty("--colour", `var(--run-${index % 8})`);
  const box = node("input", { type: "checkbox", checked: true });
  box.dataset.run = index;
  box.addEventListener("change", () => {
    if (box.checked) state.shown.add(index);
    else state.shown.delete(index);
    chooseRuns();
  });
  const status = node("span", { className: `badge ${run.status}`, textContent: run.status });
  made.append(node("label", {}, box, node("h3", { textContent: run.title }), status));
  if (run.model && run.model !== run.title) made.append(node("p", { className: "model", textContent: run.model }));
  const fact = ([name, value]) => node("div", {}, node("dt", { textContent: name }), node("dd", { textContent: value }));
  made.append(node("dl", { className: "facts" }, ...run.facts.map(fact)));
  const told = run.alarms.map(({ severity, sentence }) =>
    node("li", {}, node("span", { className: `badge ${severity}`, textContent: severity }), sentence));
  const none = node("li", { className: "none", textContent: "No alarm." });
  made.append(node("ul", { className: "alarms" }, ...(told.length ? told : [none])));
  const thinned = `The page holds ${page.most_steps} of its ${run.thinned} measurements.`;
  if (run.thinned) made.append(node("p", { className: "note", textContent: thinned }));
  return made;
}

/** A small plot of the overview; null where no run has what it shows. */
function panel({ title, kind, group, statistic }) {
  const having = runs.flatMap((run) => run.signals).filter((signal) => signal.kind === kind && has(signal, statistic));
  if (!having.some((signal) => group === "stream" || signal.groups.includes(group))) return null;
  // Where a network was measured once and then watched while it learned, the latter has more to tell.
  const moments = (source) => Math.max(...having.filter((signal) => signal.source === source).map((s) => s.steps.length));
  const [source] = unique(["probe", ...having.map((signal) => signal.source)]).sort((a, b) => moments(b) - moments(a));
  const button = node("button", { type: "button", textContent: title });
  button.addEventListener("click", () => {
    $("quantity").value = `${kind}|${source}|${statistic}`;
    chooseQuantity(group);
    $("explore").scrollIntoView({ behavior: matchMedia("(prefers-reduced-motion: reduce)").matches ? "auto" : "smooth" });
  });
  const plot = node("div", { className: "plot" });
  $("overview").append(node("div", { className: "panel" }, button, plot));
  return { kind, source, statistic, group, plot };
}

function describe() {
  const count = runs.reduce((sum, run) => sum + run.alarms.length, 0);
  const alarms = count === 1 ? "one alarm" : `${count || "no"} alarms`;
  const who = runs.length === 1 ? "a network does" : `${runs.length} networks do`;
  $("summary").textContent = `What ${who} to activations, gradients and weights, measured during training; ${alarms}.`;
  for (const run of runs.filter(({ options }) => options.length)) {
    const row = ([path, value]) =>
      node("tr", {}, node("th", { scope: "row", textContent: path }), node("td", { textContent: value }));
    const table = node("table", {}, node("tbody", {}, ...run.options.map(row)));
    const summary = node("summary", { textContent: `Resolved options of ${run.title}` });
    $("options").append(node("details", {}, summary, node("div", { className: "scroll" }, table)));
  }
  const told = Object.assign({}, ...runs.map((run) => run.definitions));
  const term = (name, text) => [node("dt", { textContent: name }), node("dd", { textContent: text })];
  for (const name of unique(runs.flatMap((run) => run.signals.flatMap((signal) => Object.keys(signal.values))))) {
    const text = told[name] || quantity(name).definition || "A statistic of the run's own, which its log does not describe.";
    $("definitions").append(...term(`${capital(quantity(name).label)} (${name})`, text));
  }
  for (const [kind, { severity, bound, value, reason }] of Object.entries(page.thresholds)) {
    $("thresholds").append(...term(`${capital(kind)} (${severity})`, `${capital(value)}; bound ${bound}. Why: ${reason}.`));
  }
}

describe();
$("cards").append(...runs.map(card));
const panels = page.overview.map(panel).filter(Boolean);
$("history-section").hidden = !runs.some((run) => run.history.loss || run.history.accuracy);
$("theory-words").hidden = !runs.some((run) => run.signals.some(({ theory }) => Object.keys(theory).length));
chooseRuns();
$("moment").addEventListener("input", () => { play(false); moved(); });
$("play").addEventListener("click", () => play(state.playing === null));
$("reference").addEventListener("change", moved);
$("quantity").addEventListener("change", () => chooseQuantity());
$("group").addEventListener("change", chooseLayers);
$("filter").addEventListener("input", chooseLayers);
$("scale").addEventListener("change", () => { drawOverview(); chooseLayers(); });
$("layer").addEventListener("change", drawTime);
$("heat-run").addEventListener("change", drawHeat);
$("histogram-kind").addEventListener("change", chooseHistogram);
$("histogram-layer").addEventListener("change", drawHistogram);
$("profile").on("plotly_click", ({ points: [point] }) => {
  $("layer").value = point.customdata;
  drawTime();
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", chooseRuns);
document.body.dataset.ready = "yes";
