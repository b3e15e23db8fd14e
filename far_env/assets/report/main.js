// Filters, theme and keys; draws everything from the results in the page.

const data = JSON.parse(byId("data").textContent);
const state = {
  workload: "",
  budget: "",
  family: "",
  tier: "",
  text: "",
  metric: 0,
  reference: data.reference,
  slots: new Map(),
};
state.sort = { key: "rank", direction: 1 };
const NOT_STATED = "\u2014";
const SLOTS = 8;

const passes = {
  workload: (name) => !state.workload || name === state.workload,
  budget: (budget) => !state.budget || budget >= data.unlimited || String(budget) === state.budget,
  policy(index) {
    const { name, family, tier, source, note } = data.policies[index];
    if (state.family && (family ?? NOT_STATED) !== state.family) return false;
    if (state.tier && (tier ?? NOT_STATED) !== state.tier) return false;
    return [name, family, source, note].some((text) => (text ?? "").toLowerCase().includes(state.text));
  },
  run: (workload, run) => passes.workload(workload) && passes.budget(run.budget) && passes.policy(run.policy),
};

const shownGroups = () => data.groups.filter((group) => passes.workload(group.workload) && passes.budget(group.budget));
const shownRows = (group) => group.rows.filter((row) => passes.policy(row.policy));

function toggle(policy) {
  if (state.slots.has(policy)) state.slots.delete(policy);
  else {
    if (state.slots.size === SLOTS) state.slots.delete(state.slots.keys().next().value);
    const used = new Set(state.slots.values());
    state.slots.set(
      policy,
      [...Array(SLOTS).keys()].find((slot) => !used.has(slot)),
    );
  }
}

const actions = {
  sort(key) {
    const first = key.startsWith("metric") || key === "difference" || key === "better" ? -1 : 1;
    state.sort = { key, direction: state.sort.key === key ? -state.sort.direction : first };
    keepFocus(renderTables);
  },
  toggle(policy) {
    toggle(policy);
    keepFocus(() => {
      renderTables();
      renderCharts();
    });
  },
  canWatch: (workload, row) =>
    data.clips.some(
      (clip) => clip.workload === workload && clip.runs.some((run) => run.policy === row.policy && run.budget === row.budget),
    ),
  watch: (workload, row) => player.watch(workload, row),
};

function keepFocus(redraw) {
  // redrawing replaces the button that was pressed: the focus goes to the one in its place
  const list = (root) => [...root.querySelectorAll("button")];
  const home = document.activeElement?.closest("#tables, .legend");
  const at = home ? list(home).indexOf(document.activeElement) : -1;
  const scrolled = [...document.querySelectorAll("#tables .scroll")].map((box) => box.scrollLeft);
  redraw();
  document.querySelectorAll("#tables .scroll").forEach((box, i) => (box.scrollLeft = scrolled[i] ?? 0));
  if (at >= 0) list(home)[at]?.focus({ preventScroll: true });
}

function renderTables() {
  const tables = shownGroups()
    .map((group) => [group, shownRows(group)])
    .filter(([, rows]) => rows.length);
  byId("tables").replaceChildren(...tables.map(([group, rows]) => rankingTable(data, state, group, rows, actions)));
  if (!tables.length) byId("tables").append(make("p", { class: "hint" }, "No policy matches the filters."));
}

function seriesOf(policy, points, flat = false) {
  const { name, full } = data.policies[policy];
  const slot = state.slots.get(policy);
  return { name, kind: full ? "full" : slot === undefined ? "quiet" : "slot", slot, flat, points };
}

function renderCharts() {
  const shown = data.policies.map((policy, index) => ({ policy, index })).filter(({ index }) => passes.policy(index));
  for (const legend of document.querySelectorAll(".legend")) {
    legend.replaceChildren(
      ...shown.map(({ policy, index }) => {
        if (policy.full) return make("span", { class: "full" }, policy.name);
        const slot = state.slots.get(index);
        const pressed = String(slot !== undefined);
        const button = make(
          "button",
          { type: "button", "aria-pressed": pressed, title: policy.name, onclick: () => actions.toggle(index) },
          make("span", {}, shortened(policy.name, 30)),
        );
        if (slot !== undefined) button.style.setProperty("--series", `var(--series-${slot})`);
        return button;
      }),
    );
  }
  drawCharts(
    "budget-charts",
    data.workloads.filter(({ name }) => passes.workload(name)).map(({ name }) => budgetChart(name)),
  );
  drawCharts("frame-charts", shownGroups().map(frameChart));
  drawCharts("gap-charts", shownGroups().map(gapChart));
}

function drawCharts(id, charts) {
  const drawn = charts.filter((chart) => chart.series.length);
  const figures = drawn.map(() => make("figure", {}));
  byId(id).replaceChildren(...figures);
  figures.forEach((figure, i) => lineChart(figure, drawn[i]));
  if (!drawn.length) byId(id).append(make("p", { class: "hint" }, "Nothing to draw for these filters."));
}

function budgetChart(workload) {
  const metric = data.metrics[state.metric];
  const groups = data.groups.filter((group) => group.workload === workload && group.budget < data.unlimited);
  const points = new Map();
  for (const group of data.groups.filter((one) => one.workload === workload)) {
    for (const row of shownRows(group)) {
      if (!hasScore(row, metric)) continue;
      const point = { x: Math.log2(row.budget), value: row.scores[metric.name] };
      if (row.budget >= data.unlimited) points.set(row.policy, [point]);
      else points.set(row.policy, [...(points.get(row.policy) ?? []), point]);
    }
  }
  const limited = groups.length > 0;
  const series = limited
    ? [...points].map(([policy, own]) => seriesOf(policy, own, 2 ** own[0].x >= data.unlimited - 0.5))
    : [];
  const ticks = groups.map((group) => ({ at: Math.log2(group.budget), label: `${group.budget}` }));
  const what = `${metric.label}${metric.unit ? ` in ${metric.unit}` : ""}, ${metric.lower ? "lower" : "higher"} is better`;
  return {
    title: workload,
    subtitle: what,
    label: `${metric.label} against budget, ${workload}`,
    series,
    bands: false,
    x: { ticks, name: "budget", label: `budget (${data.memory}, log scale)` },
    y: metric,
  };
}

function frameChart(group) {
  const { context, predict } = data.workloads.find((one) => one.name === group.workload);
  const rows = shownRows(group).filter((row) => Array.isArray(row.perFrame));
  const series = rows.map((row) =>
    seriesOf(
      row.policy,
      row.perFrame.map((value, step) => ({ x: step, value })),
    ),
  );
  const ticks = Array.from({ length: predict }, (_, step) => ({ at: step, label: `${context + step}` }));
  return {
    title: groupTitle(data, group),
    subtitle: "PSNR in dB, mean over clips",
    label: `PSNR of every predicted frame, ${groupTitle(data, group)}`,
    series,
    bands: true,
    x: { ticks, name: "frame", label: "frame" },
    y: { digits: 2, unit: "dB" },
  };
}

function gapChart(group) {
  const rows = shownRows(group).filter((row) => typeof row.byGap === "object" && Object.keys(row.byGap).length);
  const series = rows.map((row) =>
    seriesOf(
      row.policy,
      Object.entries(row.byGap).map(([bin, value]) => ({ x: Number(bin), value })),
    ),
  );
  return {
    title: groupTitle(data, group),
    subtitle: "PSNR in dB, mean over clips",
    label: `PSNR of frames by how long ago their evidence was in view, ${groupTitle(data, group)}`,
    series,
    bands: false,
    x: { ticks: group.gaps.map((label, at) => ({ at, label })), name: "gap", label: "frames since the evidence was last in view" },
    y: { digits: 2, unit: "dB" },
  };
}

function render() {
  const count = data.policies.filter((_, index) => passes.policy(index)).length;
  byId("count").textContent = `${count} of ${data.policies.length} policies`;
  renderTables();
  renderCharts();
  if (document.readyState !== "loading") player.refilter(); // else the clips are not read yet
}

function renderFixed() {
  const facts = data.workloads.map(({ name }) => data.facts[name] ?? {});
  const all = (fact) => [...new Set(facts.flatMap((own) => Object.keys(own[fact] ?? {})))].join(" and ");
  const hosts = all("host") && `host ${all("host")} (weights ${all("weights")})`;
  const parts = [
    data.workloads.map(({ name }) => name).join(", "),
    plural(data.clipCount, `${data.split} clip`),
    `noise seed ${data.seedsText} + clip number`,
    hosts,
    `${all("ode_steps")} ODE steps`,
    all("feedback") && `feedback of ${all("feedback")} frames`,
    `${all("dtype")} on ${all("device")}`,
    `commit ${all("commit")}`,
  ];
  byId("summary").textContent = parts.filter(Boolean).join(" · ");
  byId("warnings").replaceChildren(...data.warnings.map((text) => make("p", { class: "warning", role: "note" }, text)));
  const absent = Object.entries(data.unavailable).map(([name, reason]) =>
    make("p", { class: "hint" }, `No ${name.toUpperCase()} column: ${reason}`),
  );
  byId("absent").replaceChildren(...absent);
  byId("gap-measure").textContent = `Evidence: ${data.gapMeasure}.`;
  byId("facts").replaceChildren(factsTable());
}

function factsTable() {
  const lines = [
    ["clips", () => `${data.clipCount} of the ${data.split} split`],
    ["noise seeds", () => `${data.seedsText}, plus the clip's number`],
    ["frames", (one) => `${one.context} given, ${one.predict} predicted, ${one.size}×${one.size} pixels`],
    ["clip options", (one) => Object.keys(data.facts[one.name]?.clip_options ?? {}).join("; ") || "none"],
    ...["host", "weights", "ode_steps", "feedback", "dtype", "device", "machine", "commit", "versions"].map((fact) => [
      fact.replace("ode_steps", "ODE steps"),
      (one) => {
        const values = Object.entries(data.facts[one.name]?.[fact] ?? {});
        if (values.length < 2) return values[0]?.[0] ?? "not recorded";
        return make(
          "span",
          { class: "mixed" },
          values.map(([value, count]) => `${value} (${plural(count, "episode")})`).join("; "),
        );
      },
    ]),
  ];
  const head = make(
    "tr",
    {},
    make("td"),
    data.workloads.map(({ name }) => make("th", { scope: "col" }, name)),
  );
  const body = lines.map(([title, value]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, title),
      data.workloads.map((one) => make("td", {}, value(one))),
    ),
  );
  const made = make("p", { class: "hint" }, `Page made by far-env ${data.version} from ${data.folder}.`);
  return make("div", {}, make("table", {}, make("thead", {}, head), make("tbody", {}, body)), made);
}

function setUpFilters() {
  const values = (name) => [...new Set(data.policies.map((policy) => policy[name] ?? NOT_STATED))].sort();
  const choices = (list) => [["", "all"], ...list.map((value) => [value, value === NOT_STATED ? "not stated" : value])];
  const budgets = [...new Set(data.groups.map((group) => group.budget))]
    .filter((budget) => budget < data.unlimited)
    .sort((a, b) => a - b);
  const fields = {
    workload: data.workloads.map(({ name }) => name),
    budget: budgets.map(String),
    family: values("family"),
    tier: values("tier"),
  };
  const blank = () => {
    for (const [name, list] of Object.entries(fields)) setOptions(byId(`filter-${name}`), choices(list), (state[name] = ""));
    byId("filter-text").value = state.text = "";
    state.metric = 0;
    setOptions(
      byId("metric"),
      data.metrics.map((metric, i) => [i, metric.label]),
      0,
    );
    state.reference = data.reference;
    setOptions(
      byId("reference"),
      data.policies.map((policy, i) => [i, policy.name]),
      data.reference,
    );
  };
  const read = () => {
    for (const name of Object.keys(fields)) state[name] = byId(`filter-${name}`).value;
    state.text = byId("filter-text").value.trim().toLowerCase();
    state.metric = Number(byId("metric").value);
    state.reference = Number(byId("reference").value);
  };
  listenToFilters(blank, read);
}

function setUpKeys(turnTheme) {
  let inView = false;
  new IntersectionObserver(([entry]) => (inView = entry.isIntersecting)).observe(byId("player"));
  const help = () => byId("keys").showModal();
  byId("keys-button").onclick = help;
  const anywhere = { "?": help, t: turnTheme, "/": () => byId("filter-text").focus() };
  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey || byId("keys").open) return;
    const { target, key } = event;
    if (target.matches("input:not([type=range], [type=checkbox]), select, textarea")) return;
    if (key === " " && target.matches("button, summary, input")) return;
    if (target.matches("[type=range], .scroll") && /^(Arrow|Home|End)/.test(key)) return;
    const name = key.length === 1 ? key.toLowerCase() : key;
    const action = anywhere[name] ?? (inView && player.usable() ? player.key(name) : null);
    if (!action) return;
    event.preventDefault();
    action();
  });
}

const player = makePlayer(data, passes);
setUpFilters();
data.highlighted.forEach((policy, slot) => state.slots.set(policy, slot));
renderFixed();
setUpKeys(setUpTheme());
render();
document.addEventListener("DOMContentLoaded", render);
let width = window.innerWidth;
window.addEventListener("resize", () => {
  if (width === window.innerWidth) return;
  width = window.innerWidth;
  renderCharts();
  player.resize();
});
