// The timeline of one episode: columns are steps, rows are true frame numbers, and above them the PSNR of every predicted frame.
//
// makeTimeline(box, run, {context, predict, range, seek}) → {show(frame)}; the first column is the given history.

function histories(run, context, predict) {
  // per step: the frames there when the step's frame was made, and what the decision after it did with them
  const plan = new Map(run.plan.map(([step, kept, demoted]) => [step, { kept, demoted }]));
  let before = Array.from({ length: context }, (_, i) => i);
  const steps = [];
  for (let step = 0; step < predict; step++) {
    const all = [...before, context + step];
    const decided = plan.get(step);
    const kept = decided ? decided.kept : all;
    const demoted = decided ? decided.demoted : [];
    const stay = new Set([...kept, ...demoted]);
    steps.push({ before, decided: Boolean(decided), kept, demoted, dropped: all.filter((frame) => !stay.has(frame)) });
    before = all.filter((frame) => stay.has(frame));
  }
  return steps;
}

function makeTimeline(box, run, { context, predict, range, seek, label }) {
  const steps = histories(run, context, predict);
  const frames = context + predict;
  const [left, spark, top] = [40, 44, 56];
  const width = Math.max(200, box.clientWidth);
  const cell = Math.min(48, (width - left - 6) / (predict + 1));
  const tall = Math.min(15, Math.max(1.5, 330 / frames));
  const [right, bottom] = [left + cell * (predict + 1), top + tall * frames];
  const gap = Math.min(cell, tall) >= 6 ? 1 : 0;
  const svg = draw("svg", { width: Math.ceil(right + 6), height: Math.ceil(bottom + 32), role: "img", "aria-label": label });
  const column = (step) => left + cell * (step + 1);
  const row = (frame) => top + tall * frame;

  const cursor = draw("rect", { class: "cursor", y: 0, width: cell, height: bottom });
  const line = draw("rect", { class: "cursor", x: left, width: right - left, height: Math.max(tall, 2) });
  svg.append(cursor, line);
  svg.append(...cells(steps, context, { column, row, cell, tall, gap }));
  svg.append(draw("path", { class: "given", d: `M${left - 3} ${row(0)}V${row(context) - gap}` }));
  axisLabels(svg, { context, predict, frames, column, row, cell, tall, left, bottom });
  const dots = sparkline(svg, run.psnr, range, { column, cell, spark, left, right });
  const edge = draw("rect", { class: "cursor-edge", y: 0.5, width: cell, height: bottom - 0.5 });
  svg.append(edge);

  const seekTo = (event) => {
    const at = Math.floor((event.clientX - svg.getBoundingClientRect().left - left) / cell) - 1;
    seek(context + Math.max(-1, Math.min(predict - 1, at)));
  };
  svg.addEventListener("pointerdown", (event) => {
    svg.setPointerCapture(event.pointerId);
    seekTo(event);
  });
  svg.addEventListener("pointermove", (event) => event.buttons & 1 && seekTo(event));
  box.replaceChildren(svg);

  return {
    show(frame) {
      const step = Math.max(-1, frame - context);
      for (const mark of [cursor, edge]) mark.setAttribute("x", column(step));
      line.setAttribute("y", row(frame));
      cursor.dataset.step = step;
      dots.forEach((dot, i) => dot.setAttribute("r", i === step ? 4 : 0));
      return step < 0
        ? `Frame ${frame} is given; the history starts with frames ${ranges(steps[0].before)}.`
        : sentence(steps[step], step, frame);
    },
  };
}

function sentence({ before, decided, kept, demoted, dropped }, step, frame) {
  const made = `Step ${step} made frame ${frame} from ${plural(before.length, "frame")}: ${ranges(before)}.`;
  if (!decided) return `${made} Nothing had to go.`;
  const moved = demoted.length ? ` Demoted ${ranges(demoted)}.` : "";
  return `${made} Then kept ${ranges(kept)}.${moved} Dropped ${ranges(dropped)}.`;
}

function cells(steps, context, { column, row, cell, tall, gap }) {
  const paths = { kept: "", demoted: "", dropped: "" };
  const [w, h] = [cell - gap, tall - gap];
  const box = (frame, step, wide = 1) => `M${column(step)} ${row(frame)}h${cell * wide - gap}v${h}h${-(cell * wide - gap)}z`;
  const hole = Math.min(w, h) >= 6 ? Math.min(w, h) * 0.28 : 0;
  const crossed = Math.min(w, h) >= 6;
  // without gaps, cells of one row that follow each other are one rectangle: long histories stay small pages
  const open = new Map();
  const close = (frame, until) => {
    paths.kept += box(frame, open.get(frame), until - open.get(frame));
    open.delete(frame);
  };
  const given = Array.from({ length: context }, (_, i) => i);
  [{ kept: given, demoted: [], dropped: [] }, ...steps].forEach(({ kept, demoted, dropped }, i) => {
    const step = i - 1;
    const stays = new Set(kept);
    for (const frame of [...open.keys()]) if (gap || !stays.has(frame)) close(frame, step);
    for (const frame of kept) if (!open.has(frame)) open.set(frame, step);
    for (const frame of demoted) {
      paths.demoted += box(frame, step);
      if (hole)
        paths.demoted += `M${column(step) + hole} ${row(frame) + hole}v${h - 2 * hole}h${w - 2 * hole}v${2 * hole - h}z`;
    }
    for (const frame of dropped) {
      const size = Math.min(w, h) * 0.5;
      const [cx, cy] = [column(step) + w / 2, row(frame) + h / 2];
      const [u, v] = [cx - size / 2, cy - size / 2];
      paths.dropped += crossed ? `M${u} ${v}l${size} ${size}M${u + size} ${v}l${-size} ${size}` : box(frame, step);
    }
  });
  for (const frame of [...open.keys()]) close(frame, steps.length);
  return Object.entries(paths).map(([name, d]) =>
    draw("path", { class: name === "dropped" && !crossed ? "dropped solid" : name, d }),
  );
}

function axisLabels(svg, { context, predict, frames, column, row, cell, tall, left, bottom }) {
  const every = (size, wanted) => [1, 2, 5, 10, 20, 50, 100].find((step) => step * size >= wanted) ?? 200;
  for (let frame = 0; frame < frames; frame += every(tall, 13)) {
    svg.append(draw("text", { x: left - 8, y: row(frame) + tall / 2 + 4, "text-anchor": "end" }, `${frame}`));
  }
  for (let step = 0; step < predict; step += every(cell, 22)) {
    svg.append(draw("text", { x: column(step) + cell / 2, y: bottom + 14, "text-anchor": "middle" }, `${step}`));
  }
  svg.append(
    draw(
      "text",
      { x: left - 8, y: bottom + 28, "text-anchor": "start" },
      `frame ↓  step →   (bar: the ${context} given frames)`,
    ),
  );
}

function sparkline(svg, psnr, range, { column, cell, spark, left, right }) {
  svg.append(draw("path", { class: "axis", d: `M${left} ${spark + 4}H${right}` }));
  if (!psnr) return [];
  const [low, high] = range;
  const at = (value, step) => [column(step) + cell / 2, 6 + (spark - 8) * (high > low ? (high - value) / (high - low) : 0.5)];
  const points = psnr.map((value, step) => (value === null ? null : at(value, step)));
  const d = points.map((point, i) => (point ? `${i && points[i - 1] ? "L" : "M"}${point.join(" ")}` : "")).join("");
  svg.append(draw("path", { class: "spark", d }));
  svg.append(draw("text", { x: left - 4, y: 12, "text-anchor": "end" }, fixed(high, 0)));
  svg.append(draw("text", { x: left - 4, y: spark, "text-anchor": "end" }, fixed(low, 0)));
  svg.append(draw("text", { x: left + 3, y: 12 }, cell >= 24 ? "dB" : ""));
  const dots = points.map((point) => draw("circle", { class: "spark-point", cx: point?.[0] ?? 0, cy: point?.[1] ?? 0, r: 0 }));
  svg.append(...dots);
  return dots;
}
