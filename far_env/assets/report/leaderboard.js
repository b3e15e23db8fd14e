// The leaderboard's page: one table of all entries, sortable and filtered, and where they come from.

const data = JSON.parse(byId("data").textContent);
const state = { sort: { key: "place", direction: 1 }, inputs: "", text: "" };
const { digits, unit, label } = data.metric;
const NONE = "–";

const shown = () => data.rows.filter((row) => {
  if (state.inputs && row.inputs !== state.inputs) return false;
  return [row.name, row.author, row.policy, row.source, row.note].some((text) => text.toLowerCase().includes(state.text));
});

const withBounds = (interval, format = fixed) => [format(interval[0], digits), make("small", {}, bounds(interval, digits, format))];

function difference(interval) {
  if (!interval) return [make("span", { class: "plain" }, NONE)];
  const certain = interval[1] > 0 || interval[2] < 0;
  return [make("span", { class: certain ? null : "plain" }, withBounds(interval, signed))];
}

function nameCell(row) {
  const about = [row.policy, row.source, row.note].filter(Boolean).join(" · ");
  const name = row.link ? make("a", { href: row.link, rel: "noopener nofollow" }, row.name) : row.name;
  const kind = make("span", { class: "kind" }, [row.family, row.inputs].filter(Boolean).join(", "));
  return make("th", { scope: "row", class: "name" }, make("div", { class: "name-cell" }, make("span", { class: "label", title: about }, name, kind)));
}

function columns(rows) {
  // drawn by the report's own function, for which the mean is one metric among others
  const drawn = new Map(rows.map((row) => [row, { scores: { mean: row.mean } }]));
  const reference = data.rows.find((row) => row.name === data.reference);
  const line = reference && { scores: { mean: reference.mean } };
  return [
    { key: "place", title: "#", value: (row) => row.place, cell: (row) => [row.place ?? NONE] },
    { key: "policy", title: "Entry", text: true, value: (row) => row.name.toLowerCase() },
    { key: "family", title: "Family", text: true, value: (row) => row.family, cell: (row) => [row.family || NONE] },
    { key: "inputs", title: "Inputs", text: true, value: (row) => row.inputs, cell: (row) => [row.inputs || NONE] },
    { key: "mean", title: `${label} ${unit}, mean`, better: -1, value: (row) => row.mean[0], cell: (row) => [fixed(row.mean[0], digits)] },
    {
      key: "gain",
      title: `− ${data.reference}`,
      better: -1,
      value: (row) => row.gain?.[0] ?? null,
      cell: (row) => (row.name === data.reference ? [make("span", { class: "plain" }, "reference")] : difference(row.gain)),
    },
    {
      key: "whisker",
      title: "95 % interval",
      cell: (row) => [whisker([...drawn.values()], drawn.get(row), { name: "mean" }, line)],
    },
    ...data.cells.map((cell, at) => ({
      key: `cell:${at}`,
      title: `${cell.workload} ${cell.budget}`,
      better: -1,
      value: (row) => row.cells[at][0],
      cell: (row) => withBounds(row.cells[at]),
    })),
    {
      key: "meanPlace",
      title: "Mean place",
      value: (row) => row.meanPlace,
      cell: (row) => [row.meanPlace === null ? NONE : fixed(row.meanPlace, 1)],
    },
    { key: "author", title: "Author", text: true, value: (row) => row.author.toLowerCase(), cell: (row) => [row.author || NONE] },
  ];
}

function render() {
  const rows = shown();
  const all = columns(rows);
  const { key, direction } = state.sort;
  const sort = all.find((column) => column.key === key);
  const order = [...rows].sort((a, b) => {
    const [u, v] = [sort.value(a), sort.value(b)];
    if (u === null || v === null) return (u === null) - (v === null);
    return (u < v ? -1 : u > v ? 1 : 0) * direction;
  });
  const onSort = (chosen) => {
    const first = all.find((column) => column.key === chosen).better ?? 1;
    state.sort = { key: chosen, direction: chosen === key ? -direction : first };
    render();
    byId("table").querySelector("[aria-sort] button").focus();
  };
  const head = make("tr", {}, all.map((column) => headCell(column, column === sort ? direction : 0, onSort)));
  const body = order.map((row) =>
    make(
      "tr",
      { "data-entry": row.name },
      all.map((column) => (column.key === "policy" ? nameCell(row) : make("td", { class: column.text ? "text tag" : null }, column.cell(row)))),
    ),
  );
  const table = make("table", { class: "scores", "aria-label": "Ranking" }, make("thead", {}, head), make("tbody", {}, body));
  byId("table").replaceChildren(table);
  byId("count").textContent = `${rows.length} of ${data.rows.length} entries`;
}

function renderFacts() {
  const facts = ["Entry", "Policy", "SHA-256", "Source", "Made with"];
  const head = make("tr", {}, facts.map((title) => make("th", { scope: "col" }, title)));
  const body = data.rows.map((row) => {
    const madeWith = Object.entries(row.madeWith).map(([name, value]) => `${name} ${value}`).join(", ");
    const values = [row.policy, row.sha256 ? `${row.sha256.slice(0, 16)}…` : NONE, row.source || NONE, madeWith];
    return make("tr", {}, make("th", { scope: "row" }, row.name), values.map((value) => make("td", {}, value)));
  });
  const hosts = data.cells.map((cell) => `${cell.workload} ${cell.budget}: host ${cell.weights}, ${cell.steps} ODE steps`).join("; ");
  const note = make("p", { class: "hint" }, `${hosts}. Page made by far-env ${data.version}.`);
  byId("facts").replaceChildren(make("table", {}, make("thead", {}, head), make("tbody", {}, body)), note);
}

function setUpFilters() {
  const inputs = [...new Set(data.rows.map((row) => row.inputs).filter(Boolean))].sort();
  const blank = () => {
    Object.assign(state, { inputs: "", text: "" });
    byId("filter-text").value = "";
    setOptions(byId("filter-inputs"), [["", "all"], ...inputs.map((value) => [value, value])], "");
  };
  const read = () => {
    state.inputs = byId("filter-inputs").value;
    state.text = byId("filter-text").value.trim().toLowerCase();
  };
  listenToFilters(blank, read);
}

byId("summary").textContent = data.suite;
setUpTheme();
setUpFilters();
render();
renderFacts();
