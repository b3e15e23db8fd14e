// Curves with intervals as SVG.
//
// lineChart(figure, {title, subtitle, label, series, bands, x: {ticks, name, label}, y: {label, unit, digits}})
//   series: [{name, kind: "slot" | "quiet" | "full", slot, flat, points: [{x, value: [mean, low, high]}]}]
//   A flat series has one point and is drawn across the whole width. bands: intervals as areas, else as whiskers.

const MARKERS = [
  (x, y) => draw("circle", { cx: x, cy: y, r: 3.6 }),
  (x, y) => draw("rect", { x: x - 3.3, y: y - 3.3, width: 6.6, height: 6.6 }),
  (x, y) => draw("path", { d: `M${x} ${y - 4.4}l4.2 7.6h-8.4z` }),
  (x, y) => draw("path", { d: `M${x} ${y - 4.6}l4.6 4.6-4.6 4.6-4.6-4.6z` }),
];
const DASHES = ["", "7 3", "2 3", "9 3 2 3"];

function lineChart(figure, chart) {
  const plot = make("div", { class: "plot" });
  figure.replaceChildren(make("figcaption", {}, make("b", {}, chart.title), ` ${chart.subtitle}`), plot, numbersOf(chart));
  plot.append(chartImage(chart, plot.clientWidth || 480));
}

function chartImage(chart, width) {
  const drawn = [...chart.series].sort((a, b) => (b.kind === "quiet") - (a.kind === "quiet"));
  const named = drawn.filter((one) => one.kind !== "quiet");
  const labelled = width >= 460;
  const longest = Math.max(0, ...named.map((one) => Math.min(22, one.name.length)));
  const edge = { left: 46, right: labelled && named.length ? 16 + 7 * longest : 12, top: 10, bottom: 38 };
  const height = Math.round(Math.min(330, Math.max(230, width * 0.55)));
  const values = chart.series.flatMap((one) =>
    one.points.flatMap((point) => (one.kind === "quiet" ? [point.value[0]] : point.value)),
  );
  let [low, high] = [Math.min(...values), Math.max(...values)];
  const margin = 0.05 * (high - low) || Math.abs(high) * 0.05 || 1;
  [low, high] = [low - margin, high + margin];
  const ats = chart.x.ticks.map((tick) => tick.at);
  const [first, last] = [Math.min(...ats), Math.max(...ats)];
  const inset = chart.bands ? 0 : 22;
  const inner = width - edge.left - edge.right - 2 * inset;
  const x = (at) => edge.left + inset + (last > first ? ((at - first) / (last - first)) * inner : inner / 2);
  const y = (value) => edge.top + ((high - value) / (high - low)) * (height - edge.top - edge.bottom);
  const svg = draw("svg", { viewBox: `0 0 ${width} ${height}`, height, role: "img", "aria-label": chart.label });
  drawAxes(svg, chart, { width, height, edge, x, y, low, high });
  const hits = [];
  const usedDodge = named.filter((one) => !one.flat).length;
  drawn.forEach((one) => {
    const shift =
      chart.bands || one.kind === "quiet" || one.flat
        ? 0
        : 5 * (named.filter((o) => !o.flat).indexOf(one) - (usedDodge - 1) / 2);
    svg.append(drawSeries(one, chart.bands, { x: (at) => x(at) + shift, y, left: edge.left, right: width - edge.right, hits }));
  });
  if (labelled) drawEndLabels(svg, named, { y, left: width - edge.right + 8, top: edge.top, bottom: height - edge.bottom });
  followPointer(svg, hits, chart);
  return svg;
}

function drawAxes(svg, chart, { width, height, edge, x, y, low, high }) {
  const { ticks, digits } = niceTicks(low, high, 5);
  const [right, bottom] = [width - edge.right, height - edge.bottom];
  for (const tick of ticks) {
    svg.append(draw("line", { class: "grid", x1: edge.left, x2: right, y1: y(tick), y2: y(tick) }));
    svg.append(draw("text", { x: edge.left - 7, y: y(tick) + 4, "text-anchor": "end" }, fixed(tick, digits)));
  }
  svg.append(draw("line", { class: "axis", x1: edge.left, x2: right, y1: bottom, y2: bottom }));
  const every = Math.ceil(chart.x.ticks.length / Math.max(2, (right - edge.left) / 34));
  chart.x.ticks.forEach((tick, i) => {
    if (i % every === 0) svg.append(draw("text", { x: x(tick.at), y: bottom + 16, "text-anchor": "middle" }, tick.label));
  });
  svg.append(draw("text", { x: (edge.left + right) / 2, y: height - 4, "text-anchor": "middle" }, chart.x.label));
}

function drawSeries(one, bands, { x, y, left, right, hits }) {
  const group = draw("g", { class: one.kind });
  const points = one.points.map((point) => ({ at: x(point.x), value: point.value, point }));
  if (one.kind === "slot") group.style.setProperty("--series", `var(--series-${one.slot})`);
  if (one.flat) {
    const [mean, low, high] = points[0].value;
    group.append(
      draw("rect", { class: "band", x: left, width: right - left, y: y(high), height: Math.max(0, y(low) - y(high)) }),
    );
    group.append(draw("path", { class: "curve", d: `M${left} ${y(mean)}H${right}` }));
    hits.push({ group, one, at: null, y: y(mean), point: points[0].point });
    return group;
  }
  if (one.kind !== "quiet") {
    if (bands) {
      const upper = points.map((p) => `${p.at} ${y(p.value[2])}`);
      const lower = points.map((p) => `${p.at} ${y(p.value[1])}`).reverse();
      group.append(draw("path", { class: "band", d: `M${[...upper, ...lower].join("L")}z` }));
    } else {
      for (const p of points)
        group.append(draw("path", { class: "whisker-line", d: `M${p.at} ${y(p.value[1])}V${y(p.value[2])}` }));
    }
  }
  const curve = draw("path", { class: "curve", d: `M${points.map((p) => `${p.at} ${y(p.value[0])}`).join("L")}` });
  const marked = one.kind === "slot" && (!bands || points.length <= 24);
  // where markers would be too dense, dashes tell the colours apart
  if (one.kind === "slot") curve.setAttribute("stroke-dasharray", DASHES[marked ? Math.floor(one.slot / 4) : one.slot % 4]);
  group.append(curve);
  if (marked) {
    for (const p of points) group.append(fill(MARKERS[one.slot % MARKERS.length](p.at, y(p.value[0])), { class: "point" }, []));
  }
  for (const p of points) hits.push({ group, one, at: p.at, y: y(p.value[0]), point: p.point });
  return group;
}

function drawEndLabels(svg, named, { y, left, top, bottom }) {
  const labels = named.map((one) => ({ one, y: y(one.points.at(-1).value[0]) })).sort((a, b) => a.y - b.y);
  labels.forEach((label, i) => (label.y = Math.max(label.y, top + 4, i ? labels[i - 1].y + 13 : 0)));
  for (let i = labels.length - 1; i >= 0; i--) {
    labels[i].y = Math.min(labels[i].y, i === labels.length - 1 ? bottom : labels[i + 1].y - 13);
  }
  for (const label of labels) {
    const text = draw("text", { class: "end-label", x: left, y: label.y + 4 }, shortened(label.one.name, 22));
    text.style.setProperty("--series", label.one.kind === "slot" ? `var(--series-${label.one.slot})` : "var(--text)");
    svg.append(text);
  }
}

function followPointer(svg, hits, chart) {
  const quiet = () => {
    svg.querySelector(".active")?.classList.remove("active");
    tooltip.hide();
  };
  svg.addEventListener("pointerleave", quiet);
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const [px, py] = [event.clientX - box.left, event.clientY - box.top];
    let [best, least] = [null, 40];
    for (const hit of hits) {
      const distance = Math.hypot(hit.at === null ? 0 : (hit.at - px) * 1.5, hit.y - py);
      if (distance < least) [best, least] = [hit, distance];
    }
    quiet();
    if (!best) return;
    best.group.classList.add("active");
    const { digits, unit } = chart.y;
    const where = best.at === null ? "" : `${chart.x.name} ${chart.x.ticks.find((tick) => tick.at === best.point.x).label}`;
    tooltip.show(
      event,
      best.one.name,
      where,
      `${fixed(best.point.value[0], digits)} ${unit} ${bounds(best.point.value, digits)}`,
    );
  });
}

function numbersOf(chart) {
  const shown = chart.series.filter((one) => one.kind !== "quiet");
  const head = make(
    "tr",
    {},
    make("th", { scope: "col" }, chart.x.label),
    chart.x.ticks.map((tick) => make("th", { scope: "col" }, tick.label)),
  );
  const rows = shown.map((one) => {
    const cells = chart.x.ticks.map((tick) => {
      const point = one.flat ? one.points[0] : one.points.find((own) => own.x === tick.at);
      return make("td", {}, point ? fixed(point.value[0], chart.y.digits) : "–");
    });
    return make("tr", {}, make("th", { scope: "row" }, one.name), cells);
  });
  const table = make("table", {}, make("thead", {}, head), make("tbody", {}, rows));
  const box = make("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": `Numbers of ${chart.title}` }, table);
  return make("details", {}, make("summary", {}, "Means as numbers"), box);
}
