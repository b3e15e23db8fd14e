// Nodes and numbers as text. Text from the results always goes through text nodes and attributes, never through markup.

const byId = (id) => document.getElementById(id);

// What stands in an element of its own after the scripts; null while the browser has not read it.
const readParts = new Map();
function part(id) {
  if (!readParts.has(id) && byId(id)) readParts.set(id, JSON.parse(byId(id).textContent));
  return readParts.get(id) ?? null;
}

function fill(node, attributes, children) {
  for (const [name, value] of Object.entries(attributes ?? {})) {
    if (typeof value === "function") node.addEventListener(name.slice(2), value);
    else if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
}

const make = (tag, attributes, ...children) => fill(document.createElement(tag), attributes, children);
const draw = (tag, attributes, ...children) =>
  fill(document.createElementNS("http://www.w3.org/2000/svg", tag), attributes, children);

function setOptions(select, options, chosen) {
  // options: [value, text] pairs, or {label, options} for a group of them
  const option = ([value, text]) => make("option", { value }, text);
  select.replaceChildren(
    ...options.map((entry) =>
      Array.isArray(entry) ? option(entry) : make("optgroup", { label: entry.label }, entry.options.map(option)),
    ),
  );
  select.value = chosen;
}

// The form of filters: blank sets it and the state to their defaults, read takes the state from it; the page is drawn after each.
function listenToFilters(blank, read) {
  blank();
  byId("filters").addEventListener("input", () => {
    read();
    render();
  });
  byId("filters").addEventListener("submit", (event) => event.preventDefault());
  byId("filters").addEventListener("reset", (event) => {
    event.preventDefault();
    blank();
    render();
  });
}

const withMinus = (text) => text.replace("-", "\u2212");
const fixed = (value, digits) => withMinus((Math.abs(value) < 0.5 * 10 ** -digits ? 0 : value).toFixed(digits));
const signed = (value, digits) => (value >= 0.5 * 10 ** -digits ? "+" : "") + fixed(value, digits);
const bounds = (interval, digits, format = fixed) => `[${format(interval[1], digits)}, ${format(interval[2], digits)}]`;
const plural = (count, noun) => `${count} ${noun}${count === 1 ? "" : "s"}`;

// Long names differ at their ends more often than at their beginnings.
const shortened = (name, longest) =>
  name.length <= longest
    ? name
    : `${name.slice(0, Math.floor(longest / 3))}…${name.slice(Math.floor(longest / 3) + 1 - longest)}`;

function ranges(numbers) {
  // 0, 1, 2, 5 as "0–2, 5"
  const parts = [];
  for (const number of [...numbers].sort((a, b) => a - b)) {
    const last = parts.at(-1);
    if (last && last[1] === number - 1) last[1] = number;
    else parts.push([number, number]);
  }
  return parts.map(([a, b]) => (a === b ? `${a}` : b === a + 1 ? `${a}, ${b}` : `${a}–${b}`)).join(", ") || "none";
}

function niceTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 5, 10].map((factor) => factor * power).find((size) => size >= rough);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + 1e-9 * step; i++) ticks.push(i * step);
  return { ticks, digits: Math.max(0, -Math.floor(Math.log10(step) + 1e-9)) };
}

const tooltip = {
  show(event, ...lines) {
    const box = byId("tooltip");
    box.replaceChildren(make("b", {}, lines[0]), ...lines.slice(1).map((line) => make("div", {}, line)));
    box.hidden = false;
    const left = Math.min(event.clientX + 14, document.documentElement.clientWidth - box.offsetWidth - 8);
    box.style.left = `${Math.max(8, left)}px`;
    box.style.top = `${Math.max(8, event.clientY - box.offsetHeight - 12)}px`;
  },
  hide() {
    byId("tooltip").hidden = true;
  },
};
