"use strict";
// The page: a list of attempts, and one attempt as a film strip. The address after the # says what is shown, so that
// "back" works and a step can be linked to. Texts of models and environments go into the page as textContent only.
(() => {
  const $ = (id) => document.getElementById(id);
  const run = JSON.parse($("run").textContent);
  const rows = run.rows;
  const ROW = 34; // pixels, as the style has it
  const MOST_CELLS = 4000; // tokens drawn one by one

  // -- making elements --------------------------------------------------------------------------------------------

  function element(tag, options = {}, ...children) {
    const made = document.createElement(tag);
    fill(made, options, children);
    return made;
  }

  function svg(tag, options = {}, ...children) {
    const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
    fill(made, options, children);
    return made;
  }

  function fill(made, options, children) {
    for (const [name, value] of Object.entries(options)) {
      if (value === null || value === undefined || value === false) continue;
      if (name === "on") for (const [event, act] of Object.entries(value)) made.addEventListener(event, act);
      else if (name === "style") for (const [key, its] of Object.entries(value)) made.style.setProperty(key, its);
      else made.setAttribute(name, value === true ? "" : value);
    }
    for (const child of children.flat()) if (child !== null && child !== undefined) made.append(child); // text as text
  }

  const chip = (text, kind = "") => element("span", { class: `chip ${kind}` }, text);
  const quoted = (value) => (typeof value === "string" ? value : JSON.stringify(value, null, 2));

  // -- numbers ----------------------------------------------------------------------------------------------------

  // Python's nan and infinities come as "NaN", "Infinity", "-Infinity".
  const number = (value) => (value === null || value === undefined ? null : Number(value));
  const short = (value, digits = 3) => {
    const its = number(value);
    if (its === null) return "–";
    return Number.isFinite(its) ? String(Number(its.toFixed(digits))) : String(value);
  };
  const grouped = (value) => value.toLocaleString("en-US");
  function seconds(value) {
    const its = number(value);
    if (its === null || !Number.isFinite(its)) return short(value);
    if (its < 1) return `${Math.round(its * 1000)} ms`;
    if (its < 120) return `${its.toFixed(1)} s`;
    if (its < 7200) return `${Math.floor(its / 60)} min ${Math.round(its % 60)} s`;
    return `${Math.floor(its / 3600)} h ${Math.round((its % 3600) / 60)} min`;
  }
  function moment(value) {
    const its = number(value);
    if (!its || !Number.isFinite(its) || Math.abs(its) > 8.64e12) return "–";
    return new Date(its * 1000).toISOString().replace("T", " ").replace(/\.\d+Z/, " UTC");
  }
  const sum = (values) => values.reduce((a, b) => a + b, 0);

  // -- the data ---------------------------------------------------------------------------------------------------

  const counts = (row) => row.ok && row.stands;
  const success = (row) => row.reward !== null && number(row.reward) >= run.successAt;
  const byKey = new Map();
  const keyOf = (row) => `#${encodeURIComponent(wellFormed(row.task))}/${row.rollout}/${row.round}.${row.attempt}`;
  rows.forEach((row, index) => {
    row.index = index;
    const base = keyOf(row);
    row.key = base;
    for (let again = 2; byKey.has(row.key); again++) row.key = `${base}.${again}`;
    byKey.set(row.key, row);
    row.haystack = `${row.task}\n${row.instruction}\n${row.why}\n${row.stop}`.toLowerCase();
  });

  function wellFormed(text) { // half a surrogate pair can't be part of an address
    return text.replace(/[\ud800-\udbff](?![\udc00-\udfff])|(?<![\ud800-\udbff])[\udc00-\udfff]/g, "\ufffd");
  }

  // A script of data is complete when the parser has gone beyond it: this one runs while the rest is being read.
  const held = (id) => {
    const found = $(id);
    if (found === null) return $("end") || document.readyState !== "loading" ? null : undefined;
    return found.nextSibling || document.readyState !== "loading" ? found.textContent : undefined;
  };

  let last = { index: -1, record: null };
  function recordOf(row) { // undefined: not read yet; null: not there, the file was cut
    if (served) return servedRecord(row);
    if (last.index !== row.index) {
      const text = held(`t${row.index}`);
      if (text === undefined || text === null) return text;
      try {
        last = { index: row.index, record: JSON.parse(text) };
      } catch {
        return null;
      }
    }
    return last.record;
  }

  async function fetched(row) {
    try {
      last = { index: row.number, record: await served.record(row) };
    } catch (error) {
      last = { index: row.number, record: null, why: String(error.message || error) };
    }
    if (open && open.row === row) reopen();
  }

  function servedRecord(row) {
    if (last.index === row.number) return last.record;
    last = { index: row.number, record: undefined };
    fetched(row);
    return undefined;
  }

  function sourceOf([sha256, mime]) { // [address, why there is none]
    if (Object.hasOwn(run.missing, sha256)) return [null, `image is missing: ${run.missing[sha256]}`];
    const suffix = Object.hasOwn(run.suffixes, mime) ? run.suffixes[mime] : null;
    if (served) return [served.image(`${sha256}.${suffix || "bin"}`), ""];
    if (run.folder !== null) return [`${encodeURIComponent(run.folder)}/${sha256}.${suffix || "bin"}`, ""];
    const data = held(`i${sha256}`);
    if (data === undefined) return [null, "is being read"];
    if (data === null) return [null, "image is missing: this file was cut off"];
    return [`data:${suffix ? mime : "application/octet-stream"};base64,${data}`, ""];
  }

  // -- the list ---------------------------------------------------------------------------------------------------

  const COLUMNS = [
    { name: "task", head: "Task", width: "24%", value: (row) => row.task },
    { name: "rollout", head: "Rollout", number: true, width: "70px", value: (row) => row.rollout },
    { name: "attempt", head: "Attempt", number: true, width: "76px", value: (row) => row.round * 1e6 + row.attempt },
    { name: "reward", head: "Reward", number: true, width: "90px", value: (row) => number(row.reward) },
    { name: "stop", head: "Stop reason", width: "140px", value: (row) => row.stop },
    { name: "failure", head: "Failure", width: "auto", value: (row) => (row.failure ? row.failure + row.why : null) },
    { name: "steps", head: "Steps", number: true, width: "66px", value: (row) => row.steps },
    { name: "tokens", head: "Tokens", number: true, width: "80px", value: (row) => row.tokens },
    { name: "seconds", head: "Duration", number: true, width: "92px", value: (row) => number(row.seconds) },
    { name: "started", head: "Started (UTC)", width: "176px", value: (row) => number(row.started) },
  ];
  let order = { column: null, down: false }; // as recorded, to begin with
  // What is shown, whoever has it. A row of `get` is undefined while its page is on its way.
  const local = { rows, length: rows.length, get: (at) => local.rows[at], indexOf: (row) => local.rows.indexOf(row) };
  const served = run.served ? globalThis.servedRun(run, onServed) : null;
  const shown = served
    ? Object.assign(served.attempts, { indexOf: indexServed })
    : local;
  // The same by task. Here it is made when it is looked at.
  const byTask = served ? null : globalThis.runGroups(run.successAt);
  const here = { rows: [], length: 0, head: null, get: (at) => here.rows[at] };
  const groups = served ? served.tasks : here;
  const others = served || !run.against ? null : byTask.groups(run.againstRows);
  function indexServed(row) { // by its number: pages are read anew while the run goes on
    const there = row.at >= 0 && row.at < shown.length ? shown.get(row.at) : undefined;
    return there && there.number === row.number ? row.at : -1;
  }
  let chosen = 0; // number within `shown`
  let drawn = [-1, -1];

  function buildList() {
    for (const column of COLUMNS) {
      const button = element("button", { type: "button", on: { click: () => sortBy(column) } }, column.head);
      const head = element("th", { scope: "col", class: column.number && "number", id: `h-${column.name}` }, button);
      head.style.width = column.width;
      $("heads").append(head);
    }
    const tally = (key) => {
      const found = new Map();
      for (const row of rows) found.set(row[key], (found.get(row[key]) || 0) + 1);
      return [...found].filter(([name]) => name !== null).sort((a, b) => b[1] - a[1]);
    };
    $("f-reward").append(
      option("", "any"), option("success", `success: ≥ ${run.successAt}`), option("below", `below ${run.successAt}`),
      option("none", "none"));
    options(tally("stop"), tally("failure"));
    $("filters").addEventListener("input", served ? soon : filter);
    $("filters").addEventListener("reset", () => queueMicrotask(() => setTimeout(filter)));
    $("filters").addEventListener("submit", (event) => event.preventDefault());
    $("rows").addEventListener("scroll", () => draw());
    new ResizeObserver(() => draw()).observe($("rows"));
    $("body").addEventListener("click", (event) => {
      const line = event.target.closest("tr[data-at]");
      const row = line && shown.get(Number(line.dataset.at));
      if (row && !event.target.closest("a") && !String(getSelection())) go(row.key);
    });
    $("written").textContent = served ? "" : `written ${moment(run.written)}`;
    note();
    if (served) $("f-text").placeholder = "task, stop reason, failure";
    $("f-text").title = 'words of these; "in quotes" the whole id of a task';
    buildGroups();
  }

  const option = (value, text) => element("option", { value }, text);
  function options(stops, failures) { // anew as a run goes on: what was chosen stays so
    const stop = $("f-stop").value, failure = $("f-failure").value;
    const many = ([name, count]) => option(name, `${name} (${count})`);
    $("f-stop").replaceChildren(option("", "any"), ...stops.map(many));
    $("f-failure").replaceChildren(option("", "any"), option("-", "none"), option("+", "some"), ...failures.map(many));
    $("f-stop").value = stop;
    $("f-failure").value = failure;
  }

  function note() {
    const notes = [];
    if (run.damaged.length) notes.push(`${run.damaged.length} damaged records of the run are not here; the first: ${run.damaged[0]}`);
    const missing = Object.values(run.missing);
    if (missing.length) notes.push(`${missing.length} images are missing; the first: ${missing[0]}`);
    if (run.folder !== null && !served) notes.push(`The images are in the folder ${run.folder}, which belongs to this file.`);
    $("notes").textContent = notes.join("\n");
    $("notes").hidden = !notes.length;
  }

  function sortBy(column) {
    if (order.column === column.name && order.down) order = { column: null, down: false };
    else order = { column: column.name, down: order.column === column.name };
    filter();
  }

  // What the filter says, in words that a server takes, too.
  const filterNow = () => ({
    text: $("f-text").value.trim(), stop: $("f-stop").value, reward: $("f-reward").value, failure: $("f-failure").value,
    from: $("f-from").value, to: $("f-to").value, stands: $("f-stands").checked,
  });

  let typing = 0;
  function soon() { // a server is not asked at each key
    clearTimeout(typing);
    typing = setTimeout(filter, 150);
  }

  async function filter() {
    markOrder();
    if (served) shown.version = -1;
    if (grouping()) return selectGroups();
    if (served) {
      await shown.select({ ...filterNow(), sort: order.column, down: order.down });
      await served.tally().catch(() => {});
      chosen = 0;
    } else filterHere();
    summarize();
    $("none").hidden = shown.length > 0;
    $("none").textContent = (served ? run.total : rows.length) ? "No attempt fits the filter." : "This run has no attempts yet.";
    $("rows").scrollTop = 0;
    draw(true);
  }

  function filterHere() {
    const { text, stop, reward, failure, stands, ...bounds } = filterNow();
    const whole = /^"(.+)"$/s.exec(text);
    const words = whole ? [] : text.toLowerCase().split(/\s+/).filter(Boolean);
    const from = bounds.from === "" ? null : Number(bounds.from);
    const to = bounds.to === "" ? null : Number(bounds.to);
    const fits = (row) => {
      if (whole && row.task !== whole[1]) return false;
      if (stands && !row.stands) return false;
      if (stop && row.stop !== stop) return false;
      if (failure === "-" ? row.failure : failure === "+" ? !row.failure : failure && row.failure !== failure) return false;
      if (reward === "none" ? row.reward !== null : reward && row.reward === null) return false;
      if (reward === "success" && !success(row)) return false;
      if (reward === "below" && success(row)) return false;
      if (from !== null && !(row.reward !== null && number(row.reward) >= from)) return false;
      if (to !== null && !(row.reward !== null && number(row.reward) <= to)) return false;
      return words.every((word) => row.haystack.includes(word));
    };
    const before = shown.get(chosen);
    local.rows = rows.filter(fits);
    local.length = local.rows.length;
    const column = COLUMNS.find((each) => each.name === order.column);
    if (column) local.rows.sort((a, b) => compare(column.value(a), column.value(b), order.down) || a.index - b.index);
    chosen = Math.max(0, shown.indexOf(before));
  }

  function markOrder() {
    for (const each of COLUMNS) {
      const head = $(`h-${each.name}`);
      const sorted = each.name === order.column;
      if (sorted) head.setAttribute("aria-sort", order.down ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
      head.firstChild.textContent = each.head + (sorted ? (order.down ? " ▼" : " ▲") : "");
    }
  }

  function compare(a, b, down) { // what has no value comes last, either way
    const none = (value) => value === null || Number.isNaN(value);
    if (none(a) || none(b)) return none(a) - none(b);
    const found = typeof a === "string" ? (a < b ? -1 : a > b ? 1 : 0) : a - b;
    return down ? -found : found;
  }

  function summaryHere() {
    const shown = local.rows;
    const counting = shown.filter(counts);
    const rewarded = counting.filter((row) => row.reward !== null);
    const good = rewarded.filter(success).length;
    const mean = (values) => (values.length ? sum(values) / values.length : null);
    const failed = new Map();
    for (const row of shown) {
      const name = row.failure || (row.stop === "cancelled" ? "cancelled" : null);
      if (name) failed.set(name, (failed.get(name) || 0) + 1);
    }
    return {
      attempts: shown.length, rollouts: new Set(shown.map((row) => JSON.stringify([row.task, row.rollout]))).size,
      counting: counting.length, rewarded: rewarded.length, successes: good,
      reward: mean(rewarded.map((row) => number(row.reward))), steps: mean(counting.map((row) => row.steps)),
      tokens: sum(shown.map((row) => row.tokens)), failures: [...failed].sort((a, b) => b[1] - a[1]),
    };
  }

  function summarize() {
    if (grouping() || (served && !shown.head)) return;
    const its = served ? shown.head.summary : summaryHere();
    const total = served ? shown.head.total : rows.length;
    const tile = (name, title, ...value) =>
      element("div", { class: name === "Failures" && "wide", title },
        element("dt", {}, name), element("dd", { "data-tile": name.toLowerCase() }, ...value));
    const all = its.attempts === total;
    $("summary").replaceChildren(
      tile("Attempts", "lines below", all ? grouped(total) : `${grouped(its.attempts)} of ${grouped(total)}`),
      tile("Rollouts", "different rollouts among them", grouped(its.rollouts)),
      tile("That count", "nothing failed, not cancelled, and no other attempt stands for the rollout", grouped(its.counting)),
      tile("Success", `reward of ${run.successAt} or more, among those that count and have a reward`,
        its.rewarded ? `${((100 * its.successes) / its.rewarded).toFixed(1)} % (${grouped(its.successes)}/${grouped(its.rewarded)})` : "–"),
      tile("Mean reward", "over those that count and have a reward", short(its.reward, 3)),
      tile("Steps", "mean over those that count", short(its.steps, 1)),
      tile("Tokens", "of all answers shown", grouped(its.tokens)),
      tile("Failures", "of all attempts shown, those that were retried included",
        its.failures.length ? its.failures.map(([name, many]) => chip(`${grouped(many)} ${name}`, "bad")) : "none"));
  }

  function draw(anew = false) { // only the lines in sight, between two gaps
    if ($("list").hidden) return;
    const box = $("rows");
    const extra = 12;
    const first = Math.max(0, Math.min(shown.length, Math.floor(box.scrollTop / ROW) - extra));
    const end = Math.min(shown.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + extra);
    if (!anew && drawn[0] === first && drawn[1] === end) return;
    drawn = [first, end];
    // The line with the focus goes with the others: keep the focus where it was.
    const focused = document.activeElement && document.activeElement.closest && document.activeElement.closest("#body tr");
    const at = focused ? focused.dataset.at : null;
    const gap = (lines) =>
      lines > 0 && element("tr", { class: "gap", "aria-hidden": "true", style: { height: `${lines * ROW}px` } },
        element("td", { colspan: COLUMNS.length }));
    box.querySelector("table").setAttribute("aria-rowcount", shown.length + 1);
    $("body").replaceChildren(
      ...[gap(first), ...span(first, end).map((at) => same(lines, at, [shown.get(at), at === chosen], () => line(shown.get(at), at))), gap(shown.length - end)].filter(Boolean));
    if (at !== null) focusLine(Number(at));
  }

  // A line that has not changed stays the same element: a run that goes on is drawn anew while somebody clicks on it.
  const lines = new Map(), groupLines = new Map(); // by place: [what it shows, the element]
  function same(drawn, at, shows, make) {
    const text = JSON.stringify(shows);
    const found = drawn.get(at);
    if (found && found[0] === text) return found[1];
    const made = make();
    if (drawn.size > 500) drawn.clear();
    drawn.set(at, [text, made]);
    return made;
  }

  const span = (first, end) => Array.from({ length: Math.max(0, end - first) }, (_, n) => first + n);

  function line(row, at) {
    if (row === undefined) return element("tr", { "data-at": at, class: "waiting" }, element("td", { colspan: COLUMNS.length }, "…"));
    const reward = row.reward === null ? element("span", { class: "soft" }, "–")
      : chip(short(row.reward), success(row) ? "good" : "");
    const attempt = row.round ? `${row.attempt}, round ${row.round}` : String(row.attempt);
    const cells = [
      [element("a", { href: row.key }, row.task), element("span", { class: "soft" }, `  ${row.instruction}`)],
      row.rollout, row.stands ? attempt : element("span", { title: "another attempt stands for this rollout" }, `(${attempt})`),
      reward, chip(row.stop, row.failure ? "bad" : row.ok ? "" : "warn"),
      row.failure ? element("span", { class: "why" }, row.why) : null,
      row.steps, grouped(row.tokens), seconds(row.seconds), moment(row.started).replace(" UTC", ""),
    ];
    const titles = [`${row.task}\n${row.instruction}`, null, null, null, null, row.why || null];
    return element("tr", {
      "data-at": at, "aria-rowindex": at + 2, class: [at === chosen && "chosen", !counts(row) && "aside"].filter(Boolean).join(" "),
    }, cells.map((cell, n) => element("td", { class: COLUMNS[n].number && "number", title: titles[n] }, ...[cell].flat().map((each) => (typeof each === "number" ? String(each) : each)))));
  }

  function focusLine(at) {
    const found = $("body").querySelector(`tr[data-at="${at}"] a`);
    if (found) found.focus({ preventScroll: true });
  }

  function choose(at, focus = true) {
    if (!shown.length) return;
    chosen = Math.max(0, Math.min(shown.length - 1, at));
    const box = $("rows");
    const head = $("heads").offsetHeight;
    const top = chosen * ROW;
    if (top < box.scrollTop) box.scrollTop = top;
    else if (top + ROW + head > box.scrollTop + box.clientHeight) box.scrollTop = top + ROW + head - box.clientHeight;
    draw(true);
    if (focus) focusLine(chosen);
  }

  // -- a picture and what was done on it ----------------------------------------------------------------------------

  function frame(record, imageNumber, { actions = [], executed = 0, big = false, name = "" } = {}) {
    const image = record.images[imageNumber];
    const [, , width, height] = image;
    const made = element("div", { class: `frame ${height > width ? "tall" : ""}` });
    made.style.setProperty("aspect-ratio", `${width} / ${height}`);
    if (!big && height > width) made.style.setProperty("width", `${Math.max(30, (100 * width) / height)}%`);
    const [source, why] = sourceOf(image);
    const gone = (text) => made.prepend(element("span", { class: "gone" }, text));
    if (source === null) {
      gone(why);
    } else {
      const picture = element("img", { alt: name, decoding: "async", draggable: "false" });
      if (big && width <= 400) picture.classList.add("pixels");
      picture.addEventListener("error", () => { picture.remove(); gone("image can't be shown: it is damaged, or not where the page expects it"); });
      if (big) picture.src = source;
      else later(picture, source);
      made.append(picture);
    }
    const marks = actions.map((action, n) => mark(action, n, image, { many: actions.length > 1, done: n < executed, big })).filter(Boolean);
    if (marks.length) made.append(svg("svg", { "aria-hidden": "true" }, marks));
    return made;
  }

  // Percentages: a mark stays where it belongs however large the picture is shown, and its strokes stay as wide.
  function mark(action, n, [, , width, height], { many, done, big }) {
    const { x, y, to_x: toX, to_y: toY } = action.fields;
    if (typeof x !== "number" || typeof y !== "number") return null;
    const scale = big ? 1 : 0.5;
    const percent = (value, of) => `${(100 * value) / of}%`;
    const at = (px, py, ...children) => svg("svg", { x: percent(px, width), y: percent(py, height), overflow: "visible", width: 1, height: 1 }, ...children);
    const parts = [];
    const r = 11 * scale;
    if (action.type === "drag" && typeof toX === "number" && typeof toY === "number") {
      const ends = { x1: percent(x, width), y1: percent(y, height), x2: percent(toX, width), y2: percent(toY, height) };
      parts.push(svg("line", { class: "shaft halo", ...ends }), svg("line", { class: "shaft", ...ends }));
      const angle = (Math.atan2(toY - y, toX - x) * 180) / Math.PI;
      parts.push(at(x, y, svg("circle", { class: "dot", r: 5 * scale })));
      parts.push(at(toX, toY, svg("path", { class: "head", d: "M3 0L-12 7L-8 0L-12 -7Z", transform: `rotate(${angle}) scale(${scale})` })));
    } else if (action.type === "scroll") {
      const turn = { up: 0, right: 90, down: 180, left: 270 }[action.fields.direction] || 0;
      parts.push(at(x, y,
        svg("circle", { class: "halo", r }), svg("circle", { class: "ring", r }),
        svg("path", { class: "head", d: "M0 -6L6 1H2V6H-2V1H-6Z", transform: `rotate(${turn}) scale(${scale})` })));
    } else {
      parts.push(at(x, y, svg("circle", { class: "halo", r }), svg("circle", { class: "ring", r }), svg("circle", { class: "dot", r: 3.5 * scale })));
      if (action.fields.clicks > 1) parts.push(at(x, y, svg("circle", { class: "ring", r: 15 * scale })));
    }
    if (many && big) parts.push(at(x, y, svg("text", { x: r + 4, y: -r + 2 }, String(n + 1))));
    return svg("g", { class: `mark ${done ? "" : "undone"}`, "data-mark": n }, parts);
  }

  const outside = (action, image) => {
    const beyond = (value, of) => typeof value === "number" && (value < 0 || value > of);
    const { x, y, to_x: toX, to_y: toY } = action.fields;
    return image && (beyond(x, image[2]) || beyond(toX, image[2]) || beyond(y, image[3]) || beyond(toY, image[3]));
  };

  // Pictures of the strip get their bytes when they come into sight.
  const waiting = new Map();
  const watcher = new IntersectionObserver((entries) => {
    for (const entry of entries) if (entry.isIntersecting) {
      entry.target.src = waiting.get(entry.target);
      waiting.delete(entry.target);
      watcher.unobserve(entry.target);
    }
  }, { rootMargin: "400px" });
  function later(picture, source) {
    waiting.set(picture, source);
    watcher.observe(picture);
  }

  // -- a trajectory -------------------------------------------------------------------------------------------------

  let open = null; // { row, record, step, at }; step = number of steps: the end; at: its place in the list, as told
  let actualSize = false;
  const unfolded = new Set(); // details that stay open from step to step

  function showTrajectory(row, wanted) {
    const record = recordOf(row);
    const same = open && open.row === row && open.record === record && record;
    if (!same) {
      watcher.disconnect();
      waiting.clear();
      open = { row, record, step: -1 };
      about();
      if (record) strip();
      else {
        const gone = served ? `This trajectory can't be read: ${last.why}` : "This trajectory is not in the file: it was cut off.";
        const text = record === undefined ? "This trajectory is being read …" : gone;
        $("strip").replaceChildren();
        $("stage").replaceChildren(element("p", { class: "blank" }, text));
        $("side").replaceChildren();
      }
    }
    if (record) showStep(wanted === "end" ? record.steps.length : Math.min(Number(wanted) || 0, record.steps.length));
  }

  function about() {
    const { row, record } = open;
    const at = open.at = shown.indexOf(row);
    const neighbour = (by, text, key) =>
      element("button", { type: "button", disabled: at < 0 || at + by < 0 || at + by >= shown.length, title: `${text} trajectory (${key})`, on: { click: () => move(by) } }, text);
    const failure = record && record.failure;
    const parts = [
      element("div", { class: "line" },
        element("button", { type: "button", title: "back to the list (Esc)", on: { click: () => go("") } }, "← List"),
        element("h1", {}, row.task),
        chip(`rollout ${row.rollout}`),
        row.attempt || !row.stands ? chip(`attempt ${row.attempt}`) : null,
        row.round ? chip(`round ${row.round}`) : null,
        chip(row.stop, row.failure ? "bad" : row.ok ? "" : "warn"),
        row.reward === null ? chip("no reward") : chip(`reward ${short(row.reward)}`, success(row) ? "good" : ""),
        row.ok && !row.stands ? chip("another attempt counts", "warn") : null,
        element("span", { class: "soft" },
          `${row.steps} steps · ${grouped(row.tokens)} tokens · ${seconds(row.seconds)}` +
          (record ? ` (reset ${seconds(record.resetSeconds)}, evaluate ${seconds(record.evaluateSeconds)})` : "") + ` · ${moment(row.started)}`),
        element("span", { class: "push" },
          at < 0 ? element("span", { class: "soft" }, "not in the filter") : element("span", { class: "soft" }, `${grouped(at + 1)} of ${grouped(shown.length)}`),
          neighbour(-1, "Previous", "p"), neighbour(1, "Next", "n"))),
      element("p", { class: "instruction" }, (record && record.instruction) || row.instruction),
    ];
    if (failure) {
      const where = failure.step === null ? failure.stage : `${failure.stage} of step ${failure.step}`;
      parts.push(element("div", { class: "failure", role: "note" },
        element("b", {}, `${failure.kind} failed (${where}): `), `${failure.type}: ${failure.message}`,
        failure.details ? element("details", {}, element("summary", {}, "Details"), element("pre", {}, failure.details)) : null));
    } else if (row.failure) parts.push(element("div", { class: "failure", role: "note" }, row.why));
    if (record) {
      const more = { task: record.task };
      if (Object.keys(record.info).length) more.info = record.info;
      parts.push(element("details", {}, element("summary", {}, "Task and info"), element("pre", {}, JSON.stringify(more, null, 2))));
    }
    $("about").replaceChildren(...parts);
  }

  const saying = (step) => (step.parseError !== null ? "parse error" : step.actions.map((action) => action.said).join(", ") || "no action");

  function strip() {
    const { record, row } = open;
    const item = (n, caption, wrong, picture) =>
      element("li", {}, element("button", { type: "button", class: wrong && "wrong", "data-step": n, title: caption, on: { click: () => step(n) } },
        element("span", { class: "caption" }, element("b", {}, n < record.steps.length ? String(record.steps[n].index) : "end"), element("span", {}, caption)),
        picture));
    const blank = () => element("div", { class: "blank" }, "no screenshot");
    const items = record.steps.map((its, n) => item(n, saying(its), its.parseError !== null,
      its.screenshot === null ? blank() : frame(record, its.screenshot, { actions: its.actions, executed: its.executed })));
    items.push(item(record.steps.length, row.stop, row.failure !== null, record.final === null ? blank() : frame(record, record.final)));
    $("strip").replaceChildren(...items);
  }

  function showStep(n) {
    const { record, row } = open;
    open.step = n;
    for (const button of $("strip").querySelectorAll("button")) {
      if (Number(button.dataset.step) === n) {
        button.setAttribute("aria-current", "step");
        button.scrollIntoView({ block: "nearest", inline: "nearest" });
      } else button.removeAttribute("aria-current");
    }
    const its = record.steps[n];
    const picture = its ? its.screenshot : record.final;
    const image = picture === null ? null : record.images[picture];
    const stage = [];
    if (image) {
      const made = frame(record, picture, {
        big: true, name: its ? `screenshot of step ${its.index}` : "final screenshot", actions: its ? its.actions : [], executed: its ? its.executed : 0,
      });
      made.id = "shot";
      made.title = "click: to its actual size and back (z)";
      made.addEventListener("click", resize);
      stage.push(made);
    } else stage.push(element("div", { class: "blank" }, its ? "no screenshot at this step" : "no final screenshot"));
    if (its) {
      stage.push(element("div", { class: "badges" }, its.actions.map((action, number) => {
        const done = number < its.executed;
        const notes = [done ? "" : "not executed", outside(action, image) ? "outside of the screenshot" : ""].filter(Boolean).join(", ");
        const many = its.actions.length > 1 ? `${number + 1}  ` : "";
        return element("span", { class: `badge ${done ? "" : "undone"}`, "data-action": action.type }, `${many}${action.said}${notes ? `  (${notes})` : ""}`);
      })));
      if (!image && its.text !== null) stage.push(element("pre", { class: "raw" }, its.text));
    }
    $("stage").replaceChildren(...stage);
    size();
    $("stage").scrollTop = 0;
    $("side").replaceChildren(...(its ? sideOf(its) : sideOfEnd()));
    $("side").scrollTop = 0;
    $("announce").textContent = its ? `Step ${its.index}, ${n + 1} of ${record.steps.length}: ${saying(its)}` : `End: ${row.stop}`;
    document.title = `${row.task} · ${its ? `step ${its.index}` : "end"} · ${run.title}`;
  }

  function size() { // as large as fits, small ones enlarged up to four times
    const shot = $("shot");
    if (!shot || !open || !open.record) return;
    const its = open.record.steps[open.step];
    const [, , width, height] = open.record.images[its ? its.screenshot : open.record.final];
    const box = $("stage");
    // One pane above the other, the stage is as high as what is in it.
    const stacked = getComputedStyle($("panes")).display === "flex";
    const room = Math.max(120, stacked ? innerHeight * 0.6 : box.clientHeight - 90);
    const fit = Math.min(box.clientWidth - 28, (room * width) / height, width * 4);
    shot.style.setProperty("width", `${actualSize ? width : Math.max(60, fit)}px`);
    if (actualSize) shot.style.setProperty("align-self", width > box.clientWidth - 28 ? "flex-start" : "center");
    else shot.style.removeProperty("align-self");
  }

  function resize() {
    actualSize = !actualSize;
    size();
  }

  function section(name, ...children) {
    return element("section", {}, element("h2", {}, name), ...children);
  }

  function table(...lines) {
    return element("table", {}, element("tbody", {}, lines.filter(Boolean).map(([name, value]) =>
      element("tr", {}, element("th", { scope: "row" }, name), element("td", {}, String(value))))));
  }

  // Filled when it is opened, and open at the next step too.
  function foldable(name, text, content) {
    const made = element("details", { "data-fold": name }, element("summary", {}, text));
    const show = () => {
      if (made.open && made.children.length === 1) made.append(...content());
      if (made.open) unfolded.add(name);
      else unfolded.delete(name);
    };
    made.addEventListener("toggle", show);
    if (unfolded.has(name)) {
      made.open = true;
      show();
    }
    return element("section", {}, made);
  }

  function sideOf(its) {
    const { record } = open;
    const parts = [];
    if (its.parseError !== null) parts.push(section("Parse error", element("div", { class: "wrong" }, its.parseError)));
    if (its.thought) parts.push(section("Thought", element("div", { class: "thought" }, its.thought)));
    parts.push(section("Action", its.actions.length ? its.actions.map((action) => element("div", { class: "thought" }, action.said)) : element("span", { class: "soft" }, "none")));
    parts.push(section("Answer", element("pre", { class: "raw" }, its.response || "(empty)")));
    parts.push(section("Result", table(
      ["reward", short(its.reward)],
      ["executed", `${its.executed} of ${its.actions.length}`],
      its.terminated ? ["terminated", "yes"] : null,
      its.truncated ? ["truncated", "yes"] : null,
      ["finish reason", its.finish === null ? "–" : its.finish])));
    parts.push(times(its));
    parts.push(tokens(its));
    parts.push(section("Server", table(
      ["model", its.modelName || "–"], ["epoch", its.epoch], ["attempts", its.attempts],
      ["weight version", its.weights === null ? "–" : its.weights])));
    if (its.messages.length)
      parts.push(foldable("messages", `Messages sent (${its.messages.length})`, () => its.messages.map((n) => message(record.messages[n]))));
    if (its.text !== null) parts.push(foldable("text", "Observation in words", () => [element("pre", {}, its.text)]));
    if (its.tokens.length) parts.push(foldable("ids", `Token ids of the answer (${its.tokens.length})`, () => [element("pre", {}, its.tokens.join(" "))]));
    if (Object.keys(its.info).length) parts.push(foldable("info", "Info of the environment", () => [element("pre", {}, JSON.stringify(its.info, null, 2))]));
    return parts;
  }

  function sideOfEnd() {
    const { row, record } = open;
    return [
      section("End", table(
        ["stop reason", row.stop], ["reward", short(row.reward)], ["steps", row.steps], ["tokens", grouped(row.tokens)],
        ["duration", seconds(row.seconds)], ["reset", seconds(record.resetSeconds)], ["evaluate", seconds(record.evaluateSeconds)])),
      record.failure ? section("Failure", element("div", { class: "wrong" }, `${record.failure.type}: ${record.failure.message}`)) : null,
      Object.keys(record.info).length ? section("Info", element("pre", { class: "raw" }, JSON.stringify(record.info, null, 2))) : null,
    ].filter(Boolean);
  }

  function times(its) {
    const known = ["queue", "model", "environment"].map((name) => [name, Math.max(0, number(its[name]) || 0)]);
    const total = Math.max(number(its.total) || 0, sum(known.map(([, value]) => value)));
    const all = [...known, ["rest", Math.max(0, total - sum(known.map(([, value]) => value)))]];
    return section(`Time: ${seconds(its.total)}`,
      element("div", { class: "times", role: "img", "aria-label": all.map(([name, value]) => `${name} ${seconds(value)}`).join(", ") },
        all.filter(([, value]) => value > 0).map(([name, value]) => element("i", { class: name, title: `${name} ${seconds(value)}`, style: { width: `${(100 * value) / total}%` } }))),
      element("div", { class: "legend" }, all.map(([name, value]) => element("span", {}, element("i", { class: name }), `${name} ${seconds(value)}`))),
      its.started ? element("div", { class: "soft" }, moment(its.started)) : null);
  }

  function tokens(its) {
    const lines = [["prompt", grouped(its.promptTokens)], ["answer", grouped(its.tokens.length)]];
    if (its.logprobs === null || !its.logprobs.length) {
      return section("Tokens", table(...lines, ["logprobs", its.logprobs === null ? "not recorded" : "none"]));
    }
    const values = its.logprobs.map(number);
    const known = values.filter(Number.isFinite);
    const least = known.length ? known.reduce((a, b) => Math.min(a, b)) : NaN;
    const strange = values.length - known.length;
    lines.push(["mean logprob", known.length ? short(sum(known) / known.length, 4) : "–"], ["least logprob", known.length ? short(least, 4) : "–"]);
    if (strange) lines.push(["not finite", strange]);
    if (values.length !== its.tokens.length) lines.push(["logprobs", `${values.length}, which is another number than that of the tokens`]);
    const floor = Math.min(-1, Number.isFinite(least) ? least : -1);
    const cells = values.slice(0, MOST_CELLS).map((value, n) => {
      const weight = Number.isFinite(value) ? Math.min(1, Math.max(0, -value / 5)) : 1;
      return element("i", { title: `token ${n}: id ${its.tokens[n]}, logprob ${short(its.logprobs[n], 4)}`, style: { background: `rgb(var(--heat) / ${weight.toFixed(2)})` } });
    });
    let pen = "M";
    const path = values.map((value, n) => {
      if (!Number.isFinite(value)) { pen = "M"; return ""; }
      const point = `${pen}${values.length > 1 ? (100 * n) / (values.length - 1) : 50} ${2 + (36 * value) / floor}`;
      pen = "L";
      return point;
    }).join("");
    return section("Tokens", table(...lines),
      element("div", { class: "heat", role: "img", "aria-label": `logprob of each token, the more colour the less likely; least ${short(least, 2)}` }, cells),
      values.length > MOST_CELLS ? element("div", { class: "soft" }, `the first ${grouped(MOST_CELLS)} of ${grouped(values.length)}`) : null,
      svg("svg", { class: "spark", viewBox: "0 0 100 40", preserveAspectRatio: "none", "aria-hidden": "true" },
        svg("title", {}, `logprobs from 0 (top) to ${short(floor, 2)}`), svg("path", { d: path })));
  }

  function message(its) {
    const { record } = open;
    const part = (value) => {
      if (value && typeof value === "object" && value.type === "text" && typeof value.text === "string") return element("pre", {}, value.text);
      const image = value && typeof value === "object" && value.image && value.image.$image;
      if (typeof image === "number") return element("div", {}, frame(record, image, { name: "image that was sent" }), element("span", { class: "soft" }, `${record.images[image][0].slice(0, 12)} · ${record.images[image][2]}×${record.images[image][3]}`));
      return element("pre", {}, quoted(value));
    };
    const { role, content, ...rest } = its;
    const parts = Array.isArray(content) ? content.map(part) : content === undefined || content === null ? [] : [element("pre", {}, quoted(content))];
    return element("div", { class: "message" }, element("div", { class: "role" }, quoted(role === undefined ? "no role" : role)), parts,
      Object.keys(rest).length ? element("pre", {}, JSON.stringify(rest, null, 2)) : null);
  }

  // -- moving about -------------------------------------------------------------------------------------------------

  function go(key) {
    if (location.hash !== key) location.hash = key || "#";
    route(); // at once: the next key may come before the event of the change
  }

  function step(n) {
    if (!open || !open.record) return;
    const at = Math.max(0, Math.min(open.record.steps.length, n));
    history.replaceState(null, "", `${open.row.key}/${at === open.record.steps.length ? "end" : at}`);
    showStep(at);
  }

  function move(by) {
    const at = shown.indexOf(open.row);
    const next = at < 0 ? undefined : shown.get(at + by);
    if (next) go(next.key);
  }

  function route() {
    const hash = location.hash;
    const cut = hash.lastIndexOf("/");
    const keys = served ? served.known : byKey;
    const row = keys.get(hash) || keys.get(hash.slice(0, cut));
    // Its place in the list is not known, either, while the list is still to be read: the tasks were looked at.
    if (served && hash.includes("/") && !(row && shown.version >= 0) && routeByServer(hash)) return;
    const listed = !row;
    const before = open && open.row;
    $("list").hidden = !listed;
    $("trajectory").hidden = listed;
    if (row) {
      showTrajectory(row, keys.has(hash) ? "0" : hash.slice(cut + 1));
      if (before !== row) $("stage").focus({ preventScroll: true });
      const at = shown.indexOf(row);
      if (at >= 0) chosen = at;
      return;
    }
    open = null;
    document.title = run.title;
    showViews();
    draw(true);
    if (before && !grouping()) choose(chosen);
  }

  // A link to an attempt whose page is not here. False: it leads to none.
  const nowhere = new Set();
  function routeByServer(hash) {
    const found = /^#([^/]*)\/(\d+)\/(\d+)\.(\d+)(?:\.\d+)?(?:\/[^/]*)?$/.exec(hash);
    if (!found || nowhere.has(hash)) return false;
    let task;
    try {
      task = decodeURIComponent(found[1]);
    } catch {
      return false;
    }
    const query = { ...filterNow(), sort: order.column, down: order.down };
    const listed = shown.version < 0 ? shown.select(query) : Promise.resolve();
    listed.then(() => served.row(query, task, found[2], found[3], found[4]))
      .catch(() => {}).then(() => {
        const known = served.known.has(hash) || served.known.has(hash.slice(0, hash.lastIndexOf("/")));
        if (!known || shown.version < 0) nowhere.add(hash); // not asked again
        if (location.hash === hash) route();
      });
    return true;
  }

  // -- a run that is served, and may go on, and either one by task ----------------------------------------------------------------------------

  function onServed(what, ...news) {
    if (what === "row") news[0].key = keyOf(news[0]);
    else if (what === "live") {
      const [well, why] = news;
      $("live").className = well ? "going" : "lost";
      const now = new Date().toTimeString().slice(0, 8);
      $("live").textContent = well ? `live, looked at ${now}` : `no answer since ${now}: ${why}`;
    } else if (what === "tally") {
      options(run.stops, run.failures);
      note();
    } else if (news[0] === groups) drawGroups(true);
    else {
      summarize();
      $("none").hidden = shown.length > 0;
      draw(true);
      if (open && open.at !== shown.indexOf(open.row)) about(); // opened while the list was on its way
    }
  }

  const grouping = () => location.hash === "#tasks";
  const GROUP_COLUMNS = [
    { name: "task", head: "Task", width: run.against ? "auto" : "26%" }, { name: "rollouts", head: "Rollouts", number: true, width: "80px" },
    { name: "success", head: "Success", number: true, width: "110px", title: "rollouts with a reward of a success, of those that have one" },
    { name: "passn", head: "pass@n", number: true, width: "76px", title: "whether any rollout of the group is a success" },
    { name: "reward", head: "Mean reward", number: true, width: "122px" },
    { name: "spread", head: "Spread", number: true, width: "80px", title: "standard deviation of the rewards within the group: without any, a group teaches nothing" },
    { name: "rewards", head: "Rewards", width: run.against ? "120px" : "auto", title: "one bar a rollout, by number" },
    { name: "steps", head: "Steps", number: true, width: "70px" }, { name: "tokens", head: "Tokens", number: true, width: "90px" },
    { name: "failures", head: "Failures", number: true, width: "80px" },
  ];
  if (run.against) GROUP_COLUMNS.splice(7, 0, // beside the rewards
    { name: "other", head: `Success in ${run.against}`, number: true, width: "160px" },
    { name: "others", head: "Rewards there", width: "120px" },
    { name: "change", head: "Change", number: true, width: "86px", title: `of the mean reward, from ${run.against} to this run` });
  const UNSORTED = new Set(["rewards", "other", "others"]);
  let groupOrder = { column: null, down: false };

  function buildGroups() {
    $("group-heads").closest("table").classList.toggle("compared", Boolean(run.against));
    for (const column of GROUP_COLUMNS) {
      const sort = () => {
        if (UNSORTED.has(column.name)) return;
        groupOrder = groupOrder.column !== column.name ? { column: column.name, down: false }
          : groupOrder.down ? { column: null, down: false } : { column: column.name, down: true };
        selectGroups();
      };
      const head = element("th", { scope: "col", class: column.number && "number", id: `g-${column.name}`, title: column.title },
        element("button", { type: "button", on: { click: sort } }, column.head));
      head.style.width = column.width;
      $("group-heads").append(head);
    }
    $("to-attempts").setAttribute("href", "#");
    $("to-tasks").setAttribute("href", "#tasks");
    $("groups").addEventListener("scroll", () => drawGroups());
    new ResizeObserver(() => drawGroups()).observe($("groups"));
    $("group-body").addEventListener("click", (event) => {
      const line = event.target.closest("tr[data-at]");
      if (!line || line.dataset.task === undefined || event.target.closest("a.one")) return;
      event.preventDefault();
      $("f-text").value = `"${line.dataset.task}"`;
      if (event.target.closest("a.why")) $("f-failure").value = "+";
      go("#");
      filter();
    });
  }

  function showViews() {
    $("rows").hidden = grouping();
    $("groups").hidden = !grouping();
    $("keys").hidden = grouping();
    $("to-attempts").toggleAttribute("aria-current", !grouping());
    $("to-tasks").toggleAttribute("aria-current", grouping());
    if (grouping()) selectGroups();
    else if (shown.version < 0) filter();
    else summarize();
  }

  async function selectGroups() {
    for (const each of GROUP_COLUMNS) {
      const sorted = each.name === groupOrder.column;
      if (sorted) $(`g-${each.name}`).setAttribute("aria-sort", groupOrder.down ? "descending" : "ascending");
      else $(`g-${each.name}`).removeAttribute("aria-sort");
      $(`g-${each.name}`).firstChild.textContent = each.head + (sorted ? (groupOrder.down ? " ▼" : " ▲") : "");
    }
    $("groups").scrollTop = 0;
    if (served) await groups.select({ ...filterNow(), sort: groupOrder.column, down: groupOrder.down });
    else selectGroupsHere();
  }

  function selectGroupsHere() {
    filterHere();
    let found = byTask.groups(local.rows);
    if (others) found = byTask.compared(found, others);
    const { column, down } = groupOrder;
    const places = new Map(found.map((row, at) => [row, at]));
    if (column) found.sort((a, b) => compare(a[column], b[column], down) || places.get(a) - places.get(b));
    const both = found.filter((row) => row.other);
    here.head = {
      passes: byTask.passes(both.length ? both : found), others: byTask.passes(both.map((row) => row.other)), common: both.length,
    };
    here.rows = found;
    here.length = found.length;
    drawGroups(true);
  }

  let drawnGroups = "";
  function drawGroups(anew = false) {
    if (!grouping() || !groups.head) return;
    const box = $("groups");
    const first = Math.max(0, Math.floor(box.scrollTop / ROW) - 12);
    const end = Math.min(groups.length, Math.ceil((box.scrollTop + box.clientHeight) / ROW) + 12);
    if (!anew && drawnGroups === `${first} ${end}`) return;
    drawnGroups = `${first} ${end}`;
    const gap = (lines) => lines > 0 && element("tr", { class: "gap", "aria-hidden": "true", style: { height: `${lines * ROW}px` } }, element("td", { colspan: GROUP_COLUMNS.length }));
    $("group-body").replaceChildren(
      ...[gap(first), ...span(first, end).map((at) => same(groupLines, at, [groups.get(at)], () => groupLine(groups.get(at), at))), gap(groups.length - end)].filter(Boolean));
    $("no-group").hidden = groups.length > 0;
    const tile = (name, ...value) => element("div", {}, element("dt", {}, name), element("dd", { "data-tile": name.toLowerCase() }, ...value));
    const { passes, common } = groups.head;
    const there = new Map(groups.head.others);
    const percent = (share) => `${(100 * share).toFixed(1)} %`;
    $("summary").replaceChildren(
      tile("Tasks", run.against ? `${grouped(groups.length)}, ${grouped(common)} in both` : grouped(groups.length)),
      ...passes.map(([k, share]) => tile(`pass@${k}`, percent(share),
        there.has(k) ? element("span", { class: "soft", title: `in ${run.against}, of the tasks that both have` }, `  from ${percent(there.get(k))}`) : null)));
  }

  function groupLine(row, at) {
    if (row === undefined) return element("tr", { "data-at": at, class: "waiting" }, element("td", { colspan: GROUP_COLUMNS.length }, "…"));
    const bars = (its, linked) => element("span", { class: "rewards" }, its.rewards.map((reward, n) => {
      const value = number(reward);
      const share = Math.max(0.06, Math.min(1, Number.isFinite(value) ? value : 0));
      const [rollout, round, attempt] = its.attempts[n];
      const told = `rollout ${rollout}: reward ${short(reward)}`;
      const bar = element("i", { class: value >= run.successAt && "good", title: told }, element("b", { style: { height: `${100 * share}%` } }));
      return linked ? element("a", { class: "one", href: keyOf({ task: row.task, rollout, round, attempt }), "aria-label": told }, bar) : bar;
    }));
    const successes = (its) => (its && its.rewarded ? `${Math.round(100 * its.success)} % (${its.successes}/${its.rewarded})` : "–");
    const changed = row.change ? chip(`${row.change > 0 ? "+" : ""}${short(row.change)}`, row.change > 0 ? "good" : "bad") : short(row.change === undefined ? null : row.change);
    const counting = row.counting === row.rollouts ? String(row.rollouts) : `${row.counting} of ${row.rollouts}`;
    const cells = [
      element("a", { href: "#" }, row.task), counting,
      successes(row),
      row.passn === null ? "–" : chip(row.passn ? "yes" : "no", row.passn ? "good" : ""),
      short(row.reward), short(row.spread), bars(row, true),
      ...(run.against ? [successes(row.other), row.other ? bars(row.other) : null, changed] : []),
      short(row.steps, 1), grouped(row.tokens),
      row.failures ? element("a", { class: "why", href: "#", title: "the attempts that failed" }, String(row.failures)) : "",
    ];
    return element("tr", { "data-at": at, "data-task": row.task, "aria-rowindex": at + 2 },
      cells.map((cell, n) => element("td", { class: GROUP_COLUMNS[n].number && "number", title: n === 0 ? row.task : null }, cell)));
  }

  document.addEventListener("keydown", (event) => {
    if (event.ctrlKey || event.metaKey || event.altKey) return;
    const typing = event.target.closest("input, select, textarea");
    if (typing) {
      if (event.key === "Escape") typing.blur();
      return;
    }
    if (!open && grouping()) return;
    const act = open ? inTrajectory(event.key) : inList(event.key, event.target);
    if (act) {
      event.preventDefault();
      act();
    }
  });

  function inTrajectory(key) {
    const at = open.step;
    const end = open.record ? open.record.steps.length : 0;
    return {
      ArrowRight: () => step(at + 1), ArrowDown: () => step(at + 1), j: () => step(at + 1),
      ArrowLeft: () => step(at - 1), ArrowUp: () => step(at - 1), k: () => step(at - 1),
      Home: () => step(0), End: () => step(end), n: () => move(1), p: () => move(-1), z: resize, Escape: () => go(""),
    }[key];
  }

  function inList(key, target) {
    const page = Math.max(1, Math.floor($("rows").clientHeight / ROW) - 2);
    if (key === "Enter") return target.closest("a, button") || !shown.get(chosen) ? null : () => go(shown.get(chosen).key);
    return {
      j: () => choose(chosen + 1), ArrowDown: () => choose(chosen + 1), k: () => choose(chosen - 1), ArrowUp: () => choose(chosen - 1),
      PageDown: () => choose(chosen + page), PageUp: () => choose(chosen - page), Home: () => choose(0), End: () => choose(shown.length - 1),
      "/": () => $("f-text").focus(),
    }[key];
  }

  buildList();
  $("list").hidden = false;
  filter();
  window.addEventListener("hashchange", route);
  new ResizeObserver(size).observe($("stage"));
  route();
  function reopen() { // it was opened while it was still being read
    const { row } = open;
    const hash = location.hash;
    open = null;
    showTrajectory(row, row.key === hash ? "0" : hash.slice(hash.lastIndexOf("/") + 1));
  }

  if (served) served.every(() => (grouping() ? groups.look(Math.floor($("groups").scrollTop / ROW)) : shown.look(Math.floor($("rows").scrollTop / ROW))));
  document.addEventListener("DOMContentLoaded", () => {
    document.body.dataset.read = "whole";
    if (open) reopen();
  });
})();
