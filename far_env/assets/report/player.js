// The player: two policies on one clip, truth, prediction and error side by side, and a timeline that follows.

const RAMP = errorRamp();

function makePlayer(data, passes) {
  const state = { clip: null, seed: null, frame: 0, speed: 4, loop: true, timer: null, chosen: [null, null] };
  const panels = [0, 1].map((side) => makePanel(side, (key) => choose(side, key)));
  byId("player")
    .querySelector(".panels")
    .append(...panels.map((panel) => panel.node));
  const images = new Map();
  paintRamp();

  const workloadOf = (clip) => data.workloads.find((one) => one.name === clip.workload);
  const runKey = (run) => `${run.policy}|${run.budget}`;
  const shownRuns = (clip) => clip.runs.filter((run) => passes.run(clip.workload, run));
  const clipsShown = () => data.clips.filter((clip) => shownRuns(clip).length);
  const runOf = (side) =>
    shownRuns(state.clip).find((run) => runKey(run) === state.chosen[side] && run.seed === state.seed) ?? null;
  const frameCount = () => workloadOf(state.clip).context + workloadOf(state.clip).predict;

  function refilter() {
    const clips = clipsShown();
    byId("player").hidden = !clips.length;
    byId("no-clips").hidden = clips.length > 0;
    if (!clips.length) return pause();
    if (!clips.includes(state.clip)) state.clip = clips[0];
    load();
  }

  function load() {
    const { clip } = state;
    clip.runs = part(`clip-${data.clips.indexOf(clip)}`);
    const clips = clipsShown();
    const runs = shownRuns(clip);
    const workloads = [...new Set(clips.map((one) => one.workload))];
    setOptions(
      byId("clip-workload"),
      workloads.map((name) => [name, name]),
      clip.workload,
    );
    const numbers = clips.filter((one) => one.workload === clip.workload).map((one) => [one.clip, `${one.clip}`]);
    setOptions(byId("clip-number"), numbers, clip.clip);
    const seeds = [...new Set(runs.map((run) => run.seed))];
    if (!seeds.includes(state.seed)) state.seed = seeds[0];
    setOptions(
      byId("clip-seed"),
      seeds.map((seed) => [seed, `${seed}`]),
      state.seed,
    );
    const here = runs.filter((run) => run.seed === state.seed);
    state.chosen = pickPair(data, clip, here, state.chosen, runKey);
    const budgets = [...new Set(here.map((run) => run.budget))].sort((a, b) => a - b);
    const options = budgets.map((budget) => ({
      label: budget >= data.unlimited ? "full history" : `budget ${budget}`,
      options: here.filter((run) => run.budget === budget).map((run) => [runKey(run), optionText(data, run)]),
    }));
    panels.forEach((panel, side) => setOptions(panel.select, options, state.chosen[side]));
    state.frame = Math.min(state.frame, frameCount() - 1);
    byId("scrub").max = frameCount() - 1;
    loadPanels();
  }

  function loadPanels() {
    const { clip } = state;
    const workload = workloadOf(clip);
    const runs = [0, 1].map(runOf);
    const values = runs.flatMap((run) => run?.psnr ?? []).filter((value) => value !== null);
    const range = [Math.floor(Math.min(...values)), Math.ceil(Math.max(...values))];
    panels.forEach((panel, side) => {
      const run = runs[side];
      panel.run = run;
      panel.size = workload.size;
      panel.images = null;
      panel.score.textContent = data.metrics
        .map((metric) =>
          run.metrics[metric.name] === undefined
            ? null
            : `${metric.label} ${fixed(run.metrics[metric.name], metric.digits)} ${metric.unit}`.trim(),
        )
        .filter(Boolean)
        .join(" · ");
      const label = `Timeline of ${optionText(data, run)}: which frames were kept, demoted and dropped at every step`;
      panel.timeline = makeTimeline(panel.timelineBox, run, {
        context: workload.context,
        predict: workload.predict,
        range,
        seek,
        label,
      });
      Promise.all([image(clip.truth), image(run.image)]).then((pair) => {
        if (panel.run !== run || state.clip !== clip) return;
        panel.images = pair;
        paint(panel, workload.context);
      });
    });
    show();
  }

  function image(index) {
    if (!images.has(index)) {
      const picture = new Image();
      picture.src = byId(`image-${index}`).textContent;
      images.set(
        index,
        picture.decode().then(() => picture),
      );
    }
    return images.get(index);
  }

  function paint(panel, context) {
    if (!panel.images) return;
    const [truth, predicted] = panel.images;
    const given = state.frame < context;
    drawFrame(panel.truth, truth, state.frame, panel.size);
    drawFrame(panel.predicted, given ? truth : predicted, given ? state.frame : state.frame - context, panel.size);
    drawError(panel.error, panel.truth, panel.predicted);
    panel.node.dataset.frame = state.frame;
  }

  function show() {
    const { context } = workloadOf(state.clip);
    const given = state.frame < context;
    const text = `frame ${state.frame} of ${frameCount() - 1}, ${given ? "given" : `step ${state.frame - context}`}`;
    byId("position").textContent = text;
    byId("scrub").value = state.frame;
    byId("scrub").setAttribute("aria-valuetext", text);
    for (const panel of panels) {
      paint(panel, context);
      panel.readout.textContent = panel.timeline.show(state.frame);
      const own = given ? null : panel.run.psnr?.[state.frame - context];
      panel.captions[1].textContent = given ? "given" : "prediction";
      panel.captions[2].textContent = own === null || own === undefined ? "error" : `error, ${fixed(own, 1)} dB`;
    }
  }

  function choose(side, key) {
    state.chosen[side] = key;
    loadPanels();
  }
  function seek(frame) {
    state.frame = Math.max(0, Math.min(frameCount() - 1, frame));
    show();
  }
  function step(by) {
    pause();
    seek(state.frame + by);
  }
  function advance() {
    if (state.frame < frameCount() - 1) seek(state.frame + 1);
    else if (state.loop) seek(0);
    else pause();
  }
  function play() {
    if (state.frame === frameCount() - 1) seek(0);
    setPlaying(setInterval(advance, 1000 / state.speed));
  }
  function pause() {
    setPlaying(null);
  }
  function setPlaying(timer) {
    clearInterval(state.timer);
    state.timer = timer;
    const button = byId("play");
    button.toggleAttribute("data-playing", timer !== null);
    button.setAttribute("aria-label", timer === null ? "Play" : "Pause");
    for (const panel of panels) panel.readout.setAttribute("aria-live", timer === null ? "polite" : "off");
  }
  const toggle = () => (state.timer === null ? play() : pause());
  function setSpeed(speed) {
    state.speed = Number(speed);
    byId("speed").value = speed;
    if (state.timer !== null) play();
  }
  function faster(by) {
    const speeds = [...byId("speed").options].map((option) => option.value);
    setSpeed(speeds[Math.max(0, Math.min(speeds.length - 1, speeds.indexOf(byId("speed").value) + by))]);
  }
  function goToClip(workload, number) {
    state.clip =
      clipsShown().find((one) => one.workload === workload && String(one.clip) === String(number)) ??
      clipsShown().find((one) => one.workload === workload);
    load();
  }
  function nextClip(by) {
    const clips = clipsShown();
    state.clip = clips[(clips.indexOf(state.clip) + by + clips.length) % clips.length];
    load();
  }
  function swap() {
    state.chosen.reverse();
    load();
  }
  function watch(workload, row) {
    const key = `${row.policy}|${row.budget}`;
    const clip = state.clip?.workload === workload ? state.clip : clipsShown().find((one) => one.workload === workload);
    state.clip = [clip, ...clipsShown()].find(
      (one) => one.workload === workload && one.runs.some((run) => runKey(run) === key),
    );
    const runs = state.clip.runs.filter((run) => runKey(run) === key);
    if (!runs.some((run) => run.seed === state.seed)) state.seed = runs[0].seed;
    state.chosen[1] = key;
    load();
    byId("clips").scrollIntoView({ block: "start" });
    byId("play").focus({ preventScroll: true });
  }

  byId("clip-workload").onchange = (event) => goToClip(event.target.value, state.clip.clip);
  byId("clip-number").onchange = (event) => goToClip(state.clip.workload, event.target.value);
  byId("clip-seed").onchange = (event) => {
    state.seed = Number(event.target.value);
    load();
  };
  byId("speed").onchange = (event) => setSpeed(event.target.value);
  byId("loop").onchange = (event) => (state.loop = event.target.checked);
  byId("scrub").oninput = (event) => {
    pause();
    seek(Number(event.target.value));
  };
  byId("first").onclick = () => step(-Infinity);
  byId("back").onclick = () => step(-1);
  byId("play").onclick = toggle;
  byId("forward").onclick = () => step(1);
  byId("last").onclick = () => step(Infinity);

  const keys = {
    " ": toggle,
    ArrowLeft: () => step(-1),
    ArrowRight: () => step(1),
    Home: () => step(-Infinity),
    End: () => step(Infinity),
    n: () => nextClip(1),
    p: () => nextClip(-1),
    s: swap,
    "+": () => faster(1),
    "=": () => faster(1),
    "-": () => faster(-1),
  };
  return {
    refilter,
    resize: () => state.clip && loadPanels(),
    watch,
    key: (name) => keys[name],
    usable: () => state.clip && !byId("player").hidden,
  };
}

function optionText(data, run) {
  return `${shortened(data.policies[run.policy].name, 40)}, ${run.budget >= data.unlimited ? "full history" : `budget ${run.budget}`}`;
}

function pickPair(data, clip, runs, chosen, runKey) {
  // what was chosen stays where it can; else the reference on the left and the best limited policy of its budget on the right
  const keys = new Set(runs.map(runKey));
  const limited = runs.filter((run) => run.budget < data.unlimited);
  const score = (run) => run.metrics.psnr ?? -Infinity;
  const left = keys.has(chosen[0])
    ? chosen[0]
    : runKey(limited.find((run) => run.policy === data.reference) ?? limited[0] ?? runs[0]);
  const rivals = (limited.length ? limited : runs).filter(
    (run) => runKey(run) !== left && `${run.budget}` === left.split("|")[1],
  );
  const best = [...rivals].sort((a, b) => score(b) - score(a))[0] ?? runs.find((run) => runKey(run) !== left) ?? runs[0];
  return [left, keys.has(chosen[1]) ? chosen[1] : runKey(best)];
}

function makePanel(side, onChoose) {
  const title = side === 0 ? "Left policy" : "Right policy";
  const select = make("select", { "aria-label": title, onchange: (event) => onChoose(event.target.value) });
  const canvases = ["truth", "prediction", "error"].map((name) =>
    make("canvas", { role: "img", "aria-label": `${title}, ${name}` }),
  );
  const captions = ["truth", "prediction", "error"].map((name) => make("figcaption", {}, name));
  const score = make("p", { class: "score" });
  const timelineBox = make("div", { class: "timeline" });
  const readout = make("p", { class: "readout", "aria-live": "polite" });
  const pictures = make(
    "div",
    { class: "pictures" },
    canvases.map((canvas, i) => make("figure", {}, canvas, captions[i])),
  );
  const node = make(
    "div",
    { class: "panel", role: "group", "aria-label": title },
    select,
    score,
    pictures,
    timelineBox,
    readout,
  );
  return {
    node,
    select,
    score,
    timelineBox,
    readout,
    captions,
    truth: canvases[0],
    predicted: canvases[1],
    error: canvases[2],
  };
}

const surface = (canvas) => canvas.getContext("2d", { willReadFrequently: true });

function drawFrame(canvas, strip, index, size) {
  if (canvas.width !== size) canvas.width = canvas.height = size;
  surface(canvas).drawImage(strip, index * size, 0, size, size, 0, 0, size, size);
}

function drawError(canvas, first, second) {
  const size = first.width;
  if (canvas.width !== size) canvas.width = canvas.height = size;
  const [a, b] = [first, second].map((own) => surface(own).getImageData(0, 0, size, size).data);
  const picture = new ImageData(size, size);
  for (let i = 0; i < a.length; i += 4) {
    const error = Math.abs(a[i] - b[i]) + Math.abs(a[i + 1] - b[i + 1]) + Math.abs(a[i + 2] - b[i + 2]);
    const colour = 3 * Math.min(255, Math.round((error * 4) / 3));
    picture.data.set([RAMP[colour], RAMP[colour + 1], RAMP[colour + 2], 255], i);
  }
  surface(canvas).putImageData(picture, 0, 0);
}

function paintRamp() {
  const colours = [0, 64, 128, 191, 255].map((i) => `rgb(${[...RAMP.subarray(3 * i, 3 * i + 3)].join(" ")})`);
  byId("ramp").style.background = `linear-gradient(90deg, ${colours.join(", ")})`;
}

function errorRamp() {
  // 256 colours whose lightness grows evenly, from black over violet and orange to light yellow
  const stops = [
    [0, 0, 4],
    [81, 18, 124],
    [183, 55, 121],
    [252, 137, 97],
    [252, 253, 191],
  ];
  const ramp = new Uint8ClampedArray(256 * 3);
  for (let i = 0; i < 256; i++) {
    const at = (i / 255) * (stops.length - 1);
    const low = Math.min(stops.length - 2, Math.floor(at));
    stops[low].forEach((value, channel) => (ramp[3 * i + channel] = value + (at - low) * (stops[low + 1][channel] - value)));
  }
  return ramp;
}
