// Ranking tables: one per workload and budget, a row per policy, sortable by any column.

function rankingTable(data, state, group, rows, actions) {
  const metric = data.metrics[state.metric];
  const reference = group.rows.findIndex((row) => row.policy === state.reference);
  const tuned = data.policies.some((policy) => policy.rollouts);
  // policies that decided alike in every episode share a row: that of the first which is shown
  const once = rows.filter((row, i) => rows.findIndex((one) => one.same === row.same && one.budget === row.budget) === i);
  const ranks = new Map(ranked(once, metric).map((row, place) => [row, hasScore(row, metric) ? place + 1 : null]));
  const columns = [
    { key: "rank", title: "#", text: false, value: (row) => ranks.get(row), cell: (row) => [ranks.get(row) ?? "–"] },
    { key: "policy", title: "Policy", text: true, value: (row) => data.policies[row.policy].name.toLowerCase() },
    {
      key: "family",
      title: "Family",
      text: true,
      value: (row) => data.policies[row.policy].family ?? "",
      cell: (row) => [data.policies[row.policy].family ?? "–"],
    },
    {
      key: "tier",
      title: "Tier",
      text: true,
      value: (row) => data.policies[row.policy].tier ?? "",
      cell: (row) => [data.policies[row.policy].tier ?? "–"],
    },
    scoreColumn(metric),
    differenceColumn(data, group, metric, reference),
    betterColumn(group, metric, reference),
    { key: "whisker", title: "95 % interval", cell: (row) => [whisker(rows, row, metric, group.rows[reference])] },
    scoreColumn(metric, "iqm"),
    ...data.metrics.filter((one) => one !== metric).map((one) => scoreColumn(one)),
    { key: "ms", title: "ms/decision", value: (row) => row.ms, cell: (row) => [row.ms === null ? "–" : fixed(row.ms, 3)] },
    ...(tuned ? [rolloutsColumn(data)] : []),
    {
      key: "clips",
      title: "Clips",
      value: (row) => row.n,
      cell: (row) => [row.missing ? `${row.n} (${row.missing} missing)` : `${row.n}`],
    },
  ];
  const sort = columns.find((column) => column.key === state.sort.key && column.value) ?? columns[0];
  const shown = [...once].sort((a, b) => {
    const [u, v] = [sort.value(a), sort.value(b)];
    if (u === null || v === null) return (u === null) - (v === null);
    return (u < v ? -1 : u > v ? 1 : ranks.get(a) - ranks.get(b)) * state.sort.direction;
  });
  const head = make(
    "tr",
    {},
    columns.map((column) => headCell(column, column === sort ? state.sort.direction : 0, actions.sort)),
  );
  const body = shown.map((row) => {
    const cells = columns.map((column) => {
      if (column.key === "policy") return nameCell(data, state, group, row, actions);
      return make("td", { class: column.text ? "text tag" : null }, column.cell(row));
    });
    return make("tr", { "data-policy": data.policies[row.policy].name }, cells);
  });
  const label = groupTitle(data, group);
  const table = make(
    "table",
    { class: "scores", "aria-label": `Ranking, ${label}` },
    make("thead", {}, head),
    make("tbody", {}, body),
  );
  const first = data.firstClip ? ` from ${data.firstClip} on` : "";
  const seeds = data.seeds.length > 1 ? `, each the mean of ${data.seeds.length} noise seeds` : "";
  return make(
    "div",
    { class: "group" },
    make(
      "div",
      { class: "group-head" },
      make("h3", {}, label),
      make("span", { class: "hint" }, `${data.clipCount} ${data.split} clips${first}${seeds}`),
    ),
    make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Table of ${label}` }, table),
    make("ul", { class: "notes" }, [...familyNote(data, group, metric, reference), ...notesOf(data, rows)]),
  );
}

function rolloutsColumn(data) {
  const value = (row) => Number(data.policies[row.policy].rollouts ?? 0);
  const cell = (row) => [data.policies[row.policy].family === "learned" ? "trained" : `${value(row)}`];
  return { key: "rollouts", title: "Validation rollouts", value, cell };
}

const hasScore = (row, metric) => Array.isArray(row.scores[metric.name]);

function ranked(rows, metric) {
  const place = (row) => (hasScore(row, metric) ? (metric.lower ? 1 : -1) * row.scores[metric.name][0] : Infinity);
  return [...rows].sort((a, b) => (place(a) === place(b) ? 0 : place(a) - place(b)));
}

const groupTitle = (data, group) =>
  `${group.workload}, ${group.budget >= data.unlimited ? "full history" : `budget ${group.budget}`}`;

function scoreColumn(metric, statistic = "scores") {
  const score = (row) => row[statistic][metric.name];
  const value = (row) => (hasScore(row, metric) ? score(row)[0] : null);
  const cell = (row) => {
    if (!hasScore(row, metric)) return [make("span", { class: "plain", title: row.scores[metric.name] }, "absent")];
    return [fixed(value(row), metric.digits), make("small", {}, bounds(score(row), metric.digits))];
  };
  const isIqm = statistic === "iqm";
  return {
    key: `metric:${metric.name}${isIqm ? " IQM" : ""}`,
    title: `${metric.label}${isIqm ? " IQM" : ""}${metric.unit ? ` ${metric.unit}` : ""}${metric.lower ? " ↓" : ""}`,
    value,
    cell,
  };
}

function differenceTo(group, metric, reference, row) {
  if (reference < 0) return null;
  const place = group.rows.indexOf(row);
  if (group.rows[reference].policy === data.reference) return group.toReference[metric.name][place];
  return part(`differences-${data.groups.indexOf(group)}`)?.[metric.name][place][reference] ?? null;
}

function differenceColumn(data, group, metric, reference) {
  const name = data.policies[group.rows[reference]?.policy]?.name;
  const difference = (row) => differenceTo(group, metric, reference, row);
  const cell = (row) => {
    const interval = difference(row);
    if (!interval) return [make("span", { class: "plain" }, group.rows.indexOf(row) === reference ? "reference" : "–")];
    const certain = interval[1] > 0 || interval[2] < 0;
    const text = [signed(interval[0], metric.digits), make("small", {}, bounds(interval, metric.digits, signed))];
    return [make("span", { class: certain ? null : "plain", title: `paired over ${plural(interval[3], "clip")}` }, text)];
  };
  return {
    key: "difference",
    title: name ? `${metric.label} − ${name}` : "Difference",
    value: (row) => difference(row)?.[0] ?? null,
    cell,
  };
}

function betterColumn(group, metric, reference) {
  const better = (row) => differenceTo(group, metric, reference, row)?.slice(5) ?? null;
  const cell = (row) => (better(row) ? [fixed(better(row)[0], 2), make("small", {}, bounds(better(row), 2))] : [""]);
  return { key: "better", title: "P(better)", value: (row) => better(row)?.[0] ?? null, cell };
}

// How many comparisons the table makes, and which differences stay clear of zero by the method of Holm and Bonferroni.
function familyNote(data, group, metric, reference) {
  const once = group.rows.filter((row, i) => group.rows.findIndex((one) => one.same === row.same && one.budget === row.budget) === i);
  const compared = once
    .filter((row) => row.same !== group.rows[reference]?.same)
    .map((row) => ({ name: data.policies[row.policy].name, difference: differenceTo(group, metric, reference, row) }))
    .filter(({ difference }) => difference)
    .sort((a, b) => a.difference[4] - b.difference[4]);
  if (!compared.length) return [];
  let highest = 0;
  const clear = new Set();
  compared.forEach(({ name, difference: [, low, high, , p] }, place) => {
    highest = Math.max(highest, (compared.length - place) * p);
    if (highest <= 0.05 && (low > 0 || high < 0)) clear.add(name);
  });
  const unclear = compared.map(({ name }) => name).filter((name) => !clear.has(name));
  let which = clear.size ? [...clear].join(", ") : "none";
  if (clear.size && unclear.length < clear.size) which = unclear.length ? `all but ${unclear.join(", ")}` : "all";
  const of = `${plural(compared.length, "comparison")} with ${data.policies[group.rows[reference].policy].name}`;
  const text = `${of}; clear of zero by Holm–Bonferroni at a family-wise 5 % (sign-flip p values): ${which}.`;
  return [make("li", { class: "family" }, text)];
}

function headCell(column, direction, onSort) {
  const attributes = { scope: "col", class: column.text ? "text" : null };
  if (!column.value) return make("th", attributes, column.title);
  if (direction) attributes["aria-sort"] = direction > 0 ? "ascending" : "descending";
  const arrow = direction ? (direction > 0 ? " ▲" : " ▼") : "";
  if (column.key === "policy") attributes.class = "text name";
  return make("th", attributes, make("button", { type: "button", onclick: () => onSort(column.key) }, column.title + arrow));
}

function nameCell(data, state, group, row, actions) {
  const policy = data.policies[row.policy];
  const full = policy.full;
  const slot = state.slots.get(row.policy);
  const swatch = make("button", {
    type: "button",
    class: "swatch",
    "aria-pressed": String(full || slot !== undefined),
    "aria-label": `Show ${policy.name} in the charts`,
    disabled: full,
    onclick: () => actions.toggle(row.policy),
  });
  if (slot !== undefined) swatch.style.setProperty("--series", `var(--series-${slot})`);
  const about = [policy.name, policy.source, policy.note].filter(Boolean).join(" · ");
  const watch = actions.canWatch(group.workload, row) ? watchButton(policy, () => actions.watch(group.workload, row)) : null;
  const kind = make("span", { class: "kind" }, [policy.family, policy.tier].filter(Boolean).join(", "));
  const others = group.rows.filter((one) => one !== row && one.same === row.same && one.budget === row.budget);
  const same = others.map((one) => ` = ${data.policies[one.policy].name}`).join("");
  const label = make("span", { class: "label", title: about }, shortened(policy.name, 44), same, kind);
  return make("th", { scope: "row", class: "name" }, make("div", { class: "name-cell" }, swatch, label, watch));
}

function watchButton(policy, onclick) {
  const icon = draw("svg", { viewBox: "0 0 16 16", "aria-hidden": "true" }, draw("path", { d: "M4 2.5v11L13 8z" }));
  return make(
    "button",
    { type: "button", class: "watch", title: "Watch its clips", "aria-label": `Watch ${policy.name}`, onclick },
    icon,
  );
}

function whisker(rows, row, metric, reference) {
  if (!hasScore(row, metric)) return "";
  const all = rows.filter((one) => hasScore(one, metric)).flatMap((one) => one.scores[metric.name]);
  const [low, high] = [Math.min(...all), Math.max(...all)];
  const x = (value) => (4 + 122 * (high > low ? (value - low) / (high - low) : 0.5)).toFixed(1);
  const [mean, from, to] = row.scores[metric.name].map(x);
  const svg = draw("svg", { class: "whisker", viewBox: "0 0 130 18", "aria-hidden": "true" });
  if (reference && hasScore(reference, metric)) {
    const at = x(reference.scores[metric.name][0]);
    if (at >= 0 && at <= 130) svg.append(draw("line", { class: "reference", x1: at, x2: at, y1: 0, y2: 18 }));
  }
  svg.append(draw("line", { class: "span", x1: from, x2: to, y1: 9, y2: 9 }), draw("circle", { cx: mean, cy: 9, r: 3.2 }));
  return svg;
}

function notesOf(data, rows) {
  const notes = [];
  for (const row of rows) {
    const name = data.policies[row.policy].name;
    for (const metric of data.metrics) {
      if (!hasScore(row, metric)) notes.push(`${name} has no ${metric.label}: ${row.scores[metric.name]}.`);
    }
    if (row.missing) notes.push(`${name} lacks ${plural(row.missing, "episode")}; its mean is over ${plural(row.n, "clip")}.`);
  }
  return notes.map((note) => make("li", {}, note));
}
