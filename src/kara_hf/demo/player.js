// Plays recordings of `kara_hf.demo.recording`: live, while they grow, and afterwards from any moment on.
//
// A run is data: tokens, changes (what was settled and evicted, and when) and readings of the cache's report. All that is
// drawn is derived from them for one moment `seen`, the number of tokens the cache was given; nothing else is kept.

const KINDS = {
  pinned: "pinned", prompt: "prompt, whole", sealed: "survived", open: "open", recent: "recent",
  shared: "key shared", whole: "kept, as everything is", evicted: "evicted", fresh: "not in the cache yet",
};
const NAMES = Object.keys(KINDS);
const [PINNED, PROMPT, SEALED, OPEN, RECENT, SHARED, WHOLE, EVICTED, FRESH] = NAMES.keys();
const LISTS = ["tokens", "micros", "changes", "samples"];
const BLOCK = 64;  // tokens in a line group, which the browser skips while it is out of sight
const LEVELS = 8;  // shades of "how many of the chosen heads"
const FRAME = 125;  // milliseconds between two updates of the text; charts get every third
const RAMP = ["#440154", "#472d7b", "#3b528b", "#2c728e", "#21918c", "#28ae80", "#5ec962", "#addc30", "#fde725"];
const BINS = [["1", 1, 1], ["2", 2, 2], ["3–4", 3, 4], ["5–8", 5, 8], ["9–16", 9, 16], ["17–32", 17, 32],
  ["33+", 33, Infinity]];

const count = number => Math.round(number).toLocaleString("en");
const share = (part, whole) => whole ? `${Math.round(100 * part / whole)} %` : "–";
function bytes(number) {
  const units = ["B", "KiB", "MiB", "GiB"];
  let unit = 0;
  while (number >= 1024 && unit < 3) { number /= 1024; unit++; }
  return `${unit && number < 100 ? number.toFixed(1) : Math.round(number)} ${units[unit]}`;
}
function latest(list, past) {  // the last entry of those that are past, which come first; undefined without any
  let low = 0, high = list.length;
  while (low < high) {
    const middle = (low + high) >> 1;
    if (past(list[middle])) low = middle + 1; else high = middle;
  }
  return list[low - 1];
}
function make(tag, className, text, parent) {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text !== undefined) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

// -------------------------------------------------------------------------------------------------------- one run
class Run {
  constructor(head) {
    this.head = head;
    this.tokens = []; this.micros = []; this.changes = []; this.samples = [];
    this.gone = []; this.score = []; this.scored = [];  // by row and position
    this.lost = [];  // by change: tokens evicted so far, in each row, in all, and in the rows that lost least and most
    this.stops = [];  // [seen, stop]
  }

  append(part) {
    this.head = part;
    for (const name of LISTS) for (const entry of part[name]) this[name].push(entry);
    for (const change of part.changes) this.apply(change);
  }

  apply(change) {
    for (const stop of change.stops) this.stops.push([change.seen, stop]);
    const rows = this.head.rows.length;
    const before = this.lost.length ? this.lost[this.lost.length - 1].rows : new Array(rows).fill(0);
    const lost = before.slice();
    for (let row = 0; row < rows; row++) {
      this.gone[row] ??= []; this.score[row] ??= []; this.scored[row] ??= [];
      const runs = change.dropped[row];
      for (let i = 0; i < runs.length; i += 2) {
        lost[row] += runs[i + 1];
        for (let p = runs[i]; p < runs[i] + runs[i + 1]; p++) this.gone[row][p] = change.seen;
      }
      const scored = change.scored[row], scores = change.scores[row];
      for (let i = 0, n = 0; i < scored.length; i += 2) {
        for (let p = scored[i]; p < scored[i] + scored[i + 1]; p++, n++) {
          this.score[row][p] = scores[n]; this.scored[row][p] = change.seen;
        }
      }
    }
    this.lost.push({seen: change.seen, rows: lost, all: lost.reduce((a, b) => a + b, 0),
      least: Math.min(...lost), most: Math.max(...lost)});
  }

  // Tokens that the cache was given once `generated` of them were generated: the last one is not among them.
  seenAt(generated) {
    const most = Math.min(generated, this.tokens.length);
    return most ? this.head.prompt + most - 1 : 0;
  }
  alive(row, p, seen) { return p < seen && !(this.gone[row]?.[p] <= seen); }
  lostAt(seen) { return latest(this.lost, lost => lost.seen <= seen); }
  keptAt(seen) {
    const lost = this.lostAt(seen), rows = this.head.rows.length || 1;
    return lost ? {mean: seen - lost.all / rows, least: seen - lost.most, most: seen - lost.least}
      : {mean: seen, least: seen, most: seen};
  }
  keptOf(row, seen) { const lost = this.lostAt(seen); return seen - (lost ? lost.rows[row] : 0); }
  pinned(p) { return this.head.pins.some(([start, end]) => p >= start && p < end); }
  // Where the stretches end: [whole, settled, recent], and the stops of single windows.
  limits(seen) {
    const {rule, whole, recent} = this.head;
    const stops = this.stops.filter(([at]) => at <= seen).map(([, stop]) => stop);
    const last = stops.length ? stops[stops.length - 1] : 0;
    if (rule === "budget") {
      const edge = Math.max(0, seen - recent);
      return {whole: 0, settled: Math.min(last, edge), recent: edge, stops: []};
    }
    const settled = Math.max(whole, last);
    return {whole, settled, recent: Math.max(settled, seen - recent), stops};
  }
  sampleAt(seen) { return latest(this.samples, sample => sample[0] <= seen); }
  // Whether the key of a token is another layer's, in a row.
  shares(row, p, seen) {
    const {leads, near, rows} = this.head;
    const follows = leads.length > 0 && leads[row] !== rows[row][0];
    return follows && p >= near[0] && p < seen - near[1] && this.alive(row, p, seen);
  }
  keysOf(row, seen) {
    const {leads, near, rows} = this.head;
    const kept = this.keptOf(row, seen);
    return leads.length && leads[row] !== rows[row][0] ? Math.min(seen, near[0] + near[1]) : kept;
  }
  // Surviving chunks of a row: lengths.
  chunks(row, seen) {
    const {whole, settled, stops} = this.limits(seen), ends = new Set(stops), found = [];
    let length = 0;
    for (let p = whole; p < settled; p++) {
      if (length && ends.has(p)) { found.push(length); length = 0; }
      if (this.alive(row, p, seen)) length++;
      else if (length) { found.push(length); length = 0; }
    }
    if (length) found.push(length);
    return found;
  }
  have() { return Object.fromEntries(LISTS.map(name => [name, this[name].length])); }
  rate(generated) {  // of the newest 32 tokens up to there, the prompt's own step left out
    const last = Math.min(generated, this.micros.length), first = Math.max(1, last - 32);
    let sum = 0;
    for (let i = first; i < last; i++) sum += this.micros[i];
    return sum ? 1e6 * (last - first) / sum : 0;
  }
}

// ------------------------------------------------------------------------------------------------------- one text
class Pane {
  constructor(player, parent, index) {
    this.player = player; this.index = index;
    this.node = make("section", "kh-pane", undefined, parent);
    const head = make("header", "", undefined, this.node);
    this.title = make("h3", "", "", head);
    this.verdict = make("p", "kh-verdict", "", head);
    this.verdict.setAttribute("role", "status");
    this.figures = make("p", "kh-figures", "", head);
    this.text = make("div", "kh-text", undefined, this.node);
    this.text.tabIndex = 0;
    this.text.setAttribute("role", "group");
    this.text.setAttribute("aria-label", "tokens, coloured by state; arrow keys go from one to the next and tell of it");
    this.cursor = -1;  // position of the token that the keys have reached
    this.spans = []; this.shown = []; this.blocks = []; this.visible = 0;
    this.stick = true;
    this.text.addEventListener("scroll", () => {
      this.stick = this.text.scrollHeight - this.text.scrollTop - this.text.clientHeight < 40;
    }, {passive: true});
    for (const kind of ["pointerover", "click"]) {
      this.text.addEventListener(kind, event => {
        const p = event.target.position;
        if (p === undefined) player.hideTip(); else player.showTip(this, p, event.target);
      });
    }
    this.text.addEventListener("pointerleave", () => player.hideTip());
    this.text.addEventListener("keydown", event => this.press(event));
    this.text.addEventListener("blur", () => { this.point(-1); player.hideTip(); });
  }

  // The keys that go from token to token; what hovering shows is shown and spoken of each.
  press(event) {
    const last = this.visible - 1, at = this.cursor;
    const to = {ArrowRight: at + 1, ArrowLeft: at < 0 ? last : at - 1, ArrowDown: at + BLOCK, ArrowUp: at - BLOCK,
      Home: 0, End: last}[event.key];
    if (event.key === "Escape") { this.point(-1); this.player.hideTip(); }
    if (to === undefined || last < 0 || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    this.point(Math.max(0, Math.min(last, to)));
    const span = this.spans[this.cursor];
    span.scrollIntoView({block: "nearest"});
    this.player.showTip(this, this.cursor, span);
    this.player.speak();
  }

  point(p) {
    if (this.cursor >= 0) this.spans[this.cursor].removeAttribute("data-at");
    this.cursor = p;
    if (p >= 0) this.spans[p].setAttribute("data-at", "");
  }

  draw(run, generated, scope) {
    const seen = run.seenAt(generated), prompt = this.player.prompt.length;
    const total = prompt + Math.min(generated, run.tokens.length);
    this.grow(run);
    this.cut(total);
    const {whole, settled, recent, stops} = run.limits(seen), starts = new Set([whole, ...stops]);
    const rows = scope.rows(run), follows = run.head.leads.length > 0;
    const counts = new Float64Array(NAMES.length);
    const different = this.player.different;
    let held = 0, next = this.holders(run, rows, 0, seen);
    for (let p = 0; p < total; p++) {
      const before = held;
      held = next; next = this.holders(run, rows, p + 1, seen);
      let kind = p < whole ? PROMPT : p < settled ? SEALED : p < recent ? OPEN : RECENT, part = 1, bits = 0;
      if (run.pinned(p)) kind = PINNED;
      if (p >= seen) counts[kind = FRESH]++;
      else if (run.head.rule === "all") counts[kind = WHOLE]++;
      else {
        part = held / rows.length;
        let shared = 0;
        if (follows) for (const row of rows) shared += run.shares(row, p, seen) / rows.length;
        counts[kind] += part - shared; counts[SHARED] += shared; counts[EVICTED] += 1 - part;
        if (!held) { kind = EVICTED; part = 1; }
        else if (shared) { kind = SHARED; part = shared; }
        else if (kind === SEALED) {
          if (!before || starts.has(p)) bits |= 1;
          if (!next || p + 1 >= settled || starts.has(p + 1)) bits |= 2;
        }
      }
      if (p === different) bits |= 4;
      const level = Math.ceil(part * LEVELS), code = (kind << 8) | (level << 4) | bits;
      if (this.shown[p] !== code) {
        this.shown[p] = code;
        this.spans[p].className =
          `t ${NAMES[kind]} i${level}${bits & 1 ? " cs" : ""}${bits & 2 ? " ce" : ""}${bits & 4 ? " diff" : ""}`;
      }
    }
    if (this.stick) {
      this.estimate();
      this.text.scrollTop = this.text.scrollHeight;
    }
    return counts;
  }

  // Tells the browser how tall the line groups are that it skips: as tall as the last full one in sight.
  estimate() {
    const height = this.blocks[Math.floor(this.visible / BLOCK) - 1]?.clientHeight;
    if (height && Math.abs(height - (this.tall || 0)) > 12) {
      this.tall = height;
      this.text.style.setProperty("--tall", `${height}px`);
    }
  }

  holders(run, rows, p, seen) {
    if (p >= seen) return 0;
    let held = 0;
    for (const row of rows) { const gone = run.gone[row]; if (!gone || !(gone[p] <= seen)) held++; }
    return held;
  }

  grow(run) {
    const prompt = this.player.prompt, total = prompt.length + run.tokens.length;
    for (let p = this.spans.length; p < total; p++) {
      if (p % BLOCK === 0) {
        const block = make("div", "kh-block", undefined, this.text);
        make("i", "", p, block);
        this.blocks.push(block);
      }
      const text = p < prompt.length ? prompt[p] : run.tokens[p - prompt.length];
      const shown = p % BLOCK ? text : text.trimStart();  // a line begins with a word
      const span = make("span", "", shown.replaceAll("\n", "⏎\n") || "␣");
      span.position = p;
      this.blocks[this.blocks.length - 1].append(span);
      this.spans.push(span);
    }
  }

  cut(total) {  // what comes after the moment that is shown is hidden
    if (total === this.visible) return;
    for (let p = Math.min(total, this.visible); p < Math.max(total, this.visible); p++) {
      const span = this.spans[p];
      if (span) { span.hidden = p >= total; if (p >= total) this.shown[p] = -1; }
    }
    for (let b = 0; b < this.blocks.length; b++) {
      const hidden = b * BLOCK >= total;
      if (this.blocks[b].hidden !== hidden) this.blocks[b].hidden = hidden;
    }
    this.visible = total;
  }
}

// ------------------------------------------------------------------------------------------------------ the charts
class Chart {
  constructor(parent, title) {
    this.node = make("figure", "kh-chart", undefined, parent);
    const caption = make("figcaption", "", title, this.node);
    this.key = make("span", "kh-key", "", caption);
    this.canvas = make("canvas", "", undefined, this.node);
    this.canvas.setAttribute("role", "img");
  }

  begin() {
    const {canvas} = this, box = canvas.getBoundingClientRect(), ratio = devicePixelRatio || 1;
    const width = Math.max(1, Math.round(box.width)), height = Math.max(1, Math.round(box.height));
    if (canvas.width !== width * ratio || canvas.height !== height * ratio) {
      canvas.width = width * ratio; canvas.height = height * ratio;
    }
    const pen = canvas.getContext("2d");
    pen.setTransform(ratio, 0, 0, ratio, 0, 0);
    pen.clearRect(0, 0, width, height);
    pen.font = "11px system-ui, sans-serif";
    return [pen, width, height];
  }

  lines(series, {most, from, to, cursor, format, colours}) {
    const [pen, width, height] = this.begin(), left = 52, bottom = 16, top = 6, right = 6;
    const x = value => left + (width - left - right) * (to > from ? (value - from) / (to - from) : 0);
    const y = value => height - bottom - (height - bottom - top) * (most ? value / most : 0);
    pen.fillStyle = colours.faint; pen.strokeStyle = colours.grid; pen.lineWidth = 1;
    pen.textAlign = "right"; pen.textBaseline = "middle";
    for (const part of [0, 0.5, 1]) {
      pen.beginPath(); pen.moveTo(left, y(most * part)); pen.lineTo(width - right, y(most * part)); pen.stroke();
      pen.fillText(format(most * part), left - 4, y(most * part));
    }
    pen.textBaseline = "alphabetic";
    pen.textAlign = "left"; pen.fillText(count(from), left, height - 3);
    pen.textAlign = "right"; pen.fillText(count(to), width - right, height - 3);
    for (const {points, colour, dash, band} of series) {
      if (!points.length) continue;
      pen.beginPath();
      points.forEach(([at, value], i) => i ? pen.lineTo(x(at), y(value)) : pen.moveTo(x(at), y(value)));
      if (band) {
        for (let i = band.length - 1; i >= 0; i--) pen.lineTo(x(band[i][0]), y(band[i][1]));
        pen.globalAlpha = 0.25; pen.fillStyle = colour; pen.fill(); pen.globalAlpha = 1;
      } else {
        pen.strokeStyle = colour; pen.lineWidth = 2; pen.setLineDash(dash || []); pen.stroke(); pen.setLineDash([]);
      }
    }
    pen.strokeStyle = colours.text; pen.lineWidth = 1; pen.setLineDash([2, 3]);
    pen.beginPath(); pen.moveTo(x(cursor), top); pen.lineTo(x(cursor), height - bottom); pen.stroke(); pen.setLineDash([]);
  }

  bars(values, labels, {colours, colour}) {
    const [pen, width, height] = this.begin(), bottom = 16, top = 16, most = Math.max(1, ...values);
    const step = width / values.length;
    pen.textAlign = "center";
    values.forEach((value, i) => {
      const tall = (height - bottom - top) * value / most;
      pen.fillStyle = colour; pen.fillRect(i * step + step * 0.15, height - bottom - tall, step * 0.7, tall);
      pen.fillStyle = colours.text;
      if (value) pen.fillText(value < 10 ? +value.toFixed(1) : count(value), (i + 0.5) * step, height - bottom - tall - 3);
      pen.fillStyle = colours.faint; pen.fillText(labels[i], (i + 0.5) * step, height - 3);
    });
  }

  legend(entries) {
    const text = entries.map(([name, , value]) => `${name} ${value}`).join(", ");
    if (this.key.dataset.text === text) return;
    this.key.dataset.text = text;
    this.key.replaceChildren(...entries.map(([name, colour, value, dash]) => {
      const entry = make("span", "", ` ${name} ${value}`), line = make("b", dash ? "dash" : "");
      line.style.setProperty("--line", colour);
      entry.prepend(line);
      return entry;
    }));
    this.canvas.setAttribute("aria-label", text);
  }
}

// What each layer and head holds, as a table of numbers on colours.
class Heads {
  constructor(parent, title, note) {
    this.node = make("figure", "kh-heads", undefined, parent);
    make("figcaption", "", title, this.node);
    this.box = make("div", "kh-grid", undefined, this.node);
    this.note = make("p", "kh-note", note, this.node);
    this.shape = "";
  }

  draw(rows, cells, pick) {
    const layers = [...new Set(rows.map(([layer]) => layer))], heads = 1 + Math.max(0, ...rows.map(([, head]) => head));
    const shape = `${layers}/${heads}`, small = heads > 8;
    if (shape !== this.shape) {
      this.shape = shape;
      this.box.replaceChildren();
      this.box.style.gridTemplateColumns = `auto repeat(${heads}, minmax(${small ? 0 : 2.2}em, 1fr))`;
      make("span", "", "", this.box);
      for (let head = 0; head < heads; head++) make("span", "name", small ? head : `head ${head}`, this.box);
      this.cells = new Map();
      for (const layer of layers) {
        make("span", "name", `layer ${layer}`, this.box);
        for (let head = 0; head < heads; head++) {
          const cell = make("button", "cell", "", this.box);
          cell.type = "button";
          cell.onclick = () => pick(layer, head);
          this.cells.set(`${layer},${head}`, cell);
        }
      }
    }
    rows.forEach(([layer, head], row) => {
      const cell = this.cells.get(`${layer},${head}`), {text, level, about, follows} = cells(row);
      const shade = RAMP[Math.round(Math.max(0, Math.min(1, level)) * (RAMP.length - 1))];
      const shown = small ? "" : text;
      if (cell.textContent !== shown) cell.textContent = shown;
      if (cell.title !== about) { cell.title = about; cell.setAttribute("aria-label", about); }
      if (cell.dataset.shade !== shade) {
        cell.dataset.shade = shade; cell.style.background = shade;
        cell.style.color = RAMP.indexOf(shade) < 4 ? "#fff" : "#000";
      }
      cell.classList.toggle("follows", !!follows);
    });
  }
}

// ------------------------------------------------------------------------------------------------------ the player
class Player {
  // `source.poll(key, have)` and `source.page(key)` answer for a live session; without them `load` plays one that is over.
  constructor(root, source = {}) {
    this.root = root; this.source = source;
    this.key = null; this.session = null; this.runs = []; this.panes = []; this.prompt = [];
    this.at = null;  // tokens generated at the moment that is shown; null: the newest moment
    this.different = -1; this.compared = 0;  // position of the first difference; tokens known to be equal
    this.playing = 0; this.times = [];
    root.classList.add("kh");
    this.build();
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => setTimeout(() => this.paint(true)));
    new ResizeObserver(() => this.paint(true)).observe(this.charts);
    this.greet();
  }

  build() {
    const {root} = this;
    root.replaceChildren();
    this.say = make("p", "kh-say", "", root);
    const bar = make("div", "kh-bar", undefined, root);
    this.play = make("button", "kh-play", "▶ Replay", bar);
    this.play.onclick = () => this.playing ? this.halt() : this.replay();
    this.slider = make("input", "kh-slider", undefined, bar);
    Object.assign(this.slider, {type: "range", min: 0, max: 0, value: 0, step: 1});
    this.slider.setAttribute("aria-label", "Token of the run that is shown");
    this.slider.oninput = () => { this.halt(); this.seek(+this.slider.value); };
    this.moment = make("output", "kh-moment", "", bar);
    const choose = (label, onchange) => {
      const box = make("label", "kh-choose", label, bar), select = make("select", "", undefined, box);
      select.onchange = onchange;
      return select;
    };
    this.layer = choose("Layer ", () => { this.fillHeads(); this.paint(true); });
    this.head = choose("Head ", () => this.paint(true));
    this.saveJson = make("button", "", "Save JSON", bar);
    this.saveJson.onclick = () => this.save("json", JSON.stringify(this.data()));
    this.savePage = make("button", "", "Save page", bar);
    this.savePage.hidden = !this.source.page;
    this.savePage.onclick = async () => this.save("html", await this.source.page(this.key));
    this.legend = make("div", "kh-legend", undefined, root);
    const main = make("div", "kh-main", undefined, root);
    this.box = make("div", "kh-panes", undefined, main);
    this.charts = make("div", "kh-charts", undefined, main);
    this.tokensChart = new Chart(this.charts, "Tokens stored, per head");
    this.bytesChart = new Chart(this.charts, "Bytes");
    this.speedChart = new Chart(this.charts, "Tokens per second");
    this.map = new Heads(this.charts, "Tokens kept by layer and head", "");
    this.keys = new Heads(this.charts, "Keys stored by layer and head", "→: far keys are those of that layer");
    this.chunkChart = new Chart(this.charts, "Lengths of surviving chunks");
    this.tip = make("div", "kh-tip", undefined, root);
    this.tip.hidden = true;
    this.spoken = make("div", "kh-spoken", "", root);  // what a screen reader says when keys go to a token
    this.spoken.setAttribute("role", "status");
    this.entries = {};
    for (const kind of NAMES) {
      const entry = make("span", "kh-entry", undefined, this.legend);
      make("span", `t ${kind} i${LEVELS}${kind === "sealed" ? " cs ce" : ""}`, KINDS[kind], entry);
      this.entries[kind] = make("b", "", "", entry);
    }
  }

  greet() {
    this.say.textContent = "Choose a task and a method, and press Start: every token gets the colour of what the cache does " +
      "with it.";
    this.root.classList.add("empty");
  }

  // ---------------------------------------------------------------------------------------------------------- loading
  load(session) {
    this.halt();
    this.root.classList.remove("empty");
    this.session = session; this.prompt = session.prompt; this.at = null; this.different = -1; this.compared = 0;
    this.box.replaceChildren();
    this.box.classList.toggle("two", session.runs.length > 1);
    this.runs = session.runs.map(run => new Run(run));
    this.panes = session.runs.map((_, index) => new Pane(this, this.box, index));
    this.layer.replaceChildren(); this.head.replaceChildren();
    if (this.root.getBoundingClientRect().top > innerHeight / 2) this.root.scrollIntoView();  // on a phone it is far down
    this.append(session);
  }

  append(part) {
    part.runs.forEach((run, index) => this.runs[index].append(run));
    this.paused = part.paused; this.done = part.done ?? true;
    if (this.different < 0 && this.runs.length > 1) this.compare();
    if (!this.layer.options.length && this.main.head.rows.length) this.fillLayers();
    this.paint();
  }

  get main() { return this.runs[this.runs.length - 1]; }
  get generated() { return Math.max(0, ...this.runs.map(run => run.tokens.length)); }

  compare() {
    const [one, other] = this.runs.map(run => run.tokens), most = Math.min(one.length, other.length);
    for (let i = this.compared; i < most; i++) {
      if (one[i] !== other[i]) { this.different = this.prompt.length + i; return; }
    }
    this.compared = most;
  }

  data() {
    const {format, title, model, task, temperature, seed, origin, prompt} = this.session;
    const runs = this.runs.map(({head, tokens, micros, changes, samples}) => ({...head, tokens, micros, changes, samples}));
    return {format, title, model, task, temperature, seed, origin, prompt, runs};
  }

  save(kind, text) {
    const link = make("a"), type = kind === "json" ? "application/json" : "text/html";
    link.href = URL.createObjectURL(new Blob([text], {type}));
    link.download = `kara_hf-run.${kind}`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 10_000);
  }

  // Plays a live session: asks for what is new as often as it can be drawn, and no oftener.
  async follow(key) {
    this.key = key;
    let have = [];
    while (this.key === key) {
      const asked = performance.now();
      let part;
      try { part = await this.source.poll(key, have); } catch { part = undefined; }
      if (this.key !== key || part === null) return;  // another one is followed, or the server knows it no more
      if (part) {
        if (have.length) this.append(part); else this.load(part);
        this.times.push(performance.now());
        have = this.runs.map(run => run.have());
        if (part.done && part.runs.every(run => run.end)) { this.paint(true); return; }
      }
      await new Promise(resume => setTimeout(resume, Math.max(part ? 10 : 1000, FRAME - (performance.now() - asked))));
    }
  }

  // ------------------------------------------------------------------------------------------------------- the moment
  seek(generated) {
    this.at = generated >= this.generated ? null : generated;
    this.paint(true);
  }

  replay() {
    let at = this.at ?? 0, before = performance.now();
    const total = this.generated, speed = Math.max(30, total / 20);  // all of it in 20 seconds, or 30 tokens a second
    const frame = now => {
      if (!this.playing) return;
      at += speed * (now - before) / 1000; before = now;
      this.at = Math.floor(at);
      if (at >= total) { this.at = null; this.halt(); }
      this.paint(true);
      if (this.playing) this.playing = requestAnimationFrame(frame);
    };
    this.play.textContent = "⏸ Hold";
    this.playing = requestAnimationFrame(frame);
  }

  halt() {
    cancelAnimationFrame(this.playing);
    this.playing = 0;
    this.play.textContent = "▶ Replay";
  }

  fillLayers() {
    const layers = [...new Set(this.main.head.rows.map(([layer]) => layer))];
    this.layer.replaceChildren(new Option("all", ""), ...layers.map(layer => new Option(layer, layer)));
    this.fillHeads();
  }

  fillHeads() {
    const layer = this.layer.value, chosen = this.head.value;
    const heads = [...new Set(this.main.head.rows.filter(([l]) => layer === "" || l === +layer).map(([, head]) => head))];
    this.head.replaceChildren(new Option("all", ""), ...heads.map(head => new Option(head, head)));
    if (heads.includes(+chosen) && chosen !== "") this.head.value = chosen;
  }

  pick(layer, head) {
    const same = this.layer.value === String(layer) && this.head.value === String(head);
    this.layer.value = same ? "" : layer;
    this.fillHeads();
    this.head.value = same ? "" : head;
    this.paint(true);
  }

  // Rows of a run that the selectors choose.
  rows(run) {
    const layer = this.layer.value, head = this.head.value, found = [];
    run.head.rows.forEach(([l, h], row) => {
      if ((layer === "" || l === +layer) && (head === "" || h === +head)) found.push(row);
    });
    return found;
  }

  // ---------------------------------------------------------------------------------------------------------- drawing
  paint(all = false) {
    if (!this.runs.length) return;
    const generated = this.at ?? this.generated;
    this.slider.max = this.generated;
    this.slider.value = generated;
    let counts;
    this.panes.forEach((pane, index) => {
      const run = this.runs[index];
      counts = pane.draw(run, generated, this);
      this.describe(pane, run, generated);
    });
    const seen = this.main.seenAt(generated);
    const paused = this.paused && !this.done ? ", paused" : "";
    this.moment.textContent = `token ${count(generated)} of ${count(this.generated)}${paused}`;
    this.slider.setAttribute("aria-valuetext", this.moment.textContent);
    for (const [index, kind] of NAMES.entries()) {
      const number = counts[index];
      this.entries[kind].textContent = ` ${number % 1 && number < 10 ? number.toFixed(1) : count(number)}`;
      this.entries[kind].parentNode.hidden = number < 0.05;
    }
    this.tell(seen, generated);
    const now = performance.now();
    if (all || !this.drawn || now - this.drawn > 2.5 * FRAME) { this.drawn = now; this.drawCharts(seen, generated); }
  }

  describe(pane, run, generated) {
    const seen = run.seenAt(generated), kept = run.keptAt(seen), sample = run.sampleAt(seen), {end} = run.head;
    const set = (node, text) => { if (node.textContent !== text) node.textContent = text; };
    set(pane.title, run.head.title);
    pane.title.title = run.head.settings;
    const held = sample ? `${bytes(sample[2])} (${share(sample[2], sample[4])} of full)` : "–";
    const rate = run.rate(generated);
    set(pane.figures, `${count(kept.mean)} of ${count(seen)} tokens per head (${share(kept.mean, seen)}) · ${held}` +
      (rate ? ` · ${count(rate)} tokens/s` : ""));
    let verdict = "", state = "";
    if (end && this.at === null) {
      if (end.error) { verdict = end.error; state = "wrong"; }
      else if (end.reason === "stopped") verdict = "stopped";
      else if (end.score !== undefined) {
        state = end.score === 1 ? "right" : "wrong";
        const mark = state === "right" ? "✓ right" : end.score ? `✗ ${share(end.score, 1)} right` : "✗ wrong";
        verdict = `${mark}: ${end.answer || "no answer"}${state === "right" ? "" : ` (it is ${end.expected})`}`;
      } else verdict = end.reason === "limit" ? "as many tokens as allowed" : "the model ended";
    }
    const parts = verdict ? [verdict] : [];
    if (this.different >= 0 && this.different < run.head.prompt + generated) {
      parts.push(`first difference ≠ at position ${count(this.different)}`);
    } else if (this.runs.length > 1 && this.at === null && this.runs.every(each => each.head.end?.reason === "end")) {
      parts.push("no difference");
    }
    set(pane.verdict, parts.join(" · "));
    pane.verdict.className = `kh-verdict ${state}`;
  }

  tell(seen, generated) {
    const run = this.main, kept = run.keptAt(seen), sample = run.sampleAt(seen), {title, rule} = run.head;
    let text;
    if (!generated) text = "The model reads the prompt.";
    else if (rule === "all") text = `The full cache keeps all ${count(seen)} tokens.`;
    else if (run.head.leads.length && !run.lost.length) {
      text = `${title} keeps all ${count(seen)} tokens; keys of far ones are stored once for layers that attend alike.`;
    } else {
      text = `${title} holds ${count(kept.mean)} of ${count(seen)} tokens per head (${share(kept.mean, seen)}). ` +
        (this.rows(run).length > 1 ? "Struck tokens are gone from all heads, paler ones are in fewer." : "Struck tokens are gone.");
    }
    if (sample && sample[2] > sample[4]) text += " On so short a text its buffers outweigh what it saves.";
    const ends = this.runs.map(each => each.head.end);
    if (this.at === null && ends.every(end => end?.score !== undefined)) {
      const [one, other] = ends.map(end => end.score === 1);
      if (ends.length === 1) text += one ? " The answer is right." : " The answer is wrong.";
      else if (one && other) text += " The answer survives: both are right.";
      else if (one) text += " The answer is lost: the full cache had it.";
      else text += other ? " The full cache is wrong here, the compressed one right." : " Both answers are wrong.";
    }
    if (this.say.textContent !== text) this.say.textContent = text;
  }

  drawCharts(seen, generated) {
    const style = getComputedStyle(this.root), colour = name => style.getPropertyValue(name).trim();
    const colours = {text: colour("--kh-text"), faint: colour("--kh-faint"), grid: colour("--kh-grid")};
    const full = colour("--kh-full"), mine = colour("--kh-mine"), third = colour("--kh-third");
    const run = this.main, {rule, leads, rows} = run.head, last = run.seenAt(this.generated), from = run.head.prompt;
    const span = {from, to: Math.max(from + 1, last), cursor: Math.max(from, seen), colours};
    const stored = [], least = [], most = [];
    const put = at => {
      const kept = run.keptAt(at);
      stored.push([at, kept.mean]); least.push([at, kept.least]); most.push([at, kept.most]);
    };
    if (last) {
      put(from);
      for (const {seen: at} of run.lost) { if (at > from) put(at - 1); put(Math.max(at, from)); }
      put(last);
    }
    const kept = run.keptAt(seen), ragged = kept.most > kept.least;
    this.tokensChart.lines([
      {points: last ? [[from, from], [last, last]] : [], colour: full, dash: [5, 4]},
      ...(run.lost.some(lost => lost.most > lost.least) ? [{points: least, band: most, colour: mine}] : []),
      {points: stored, colour: mine},
    ], {...span, most: Math.max(1, last), format: count});
    this.tokensChart.legend([["full", full, count(seen), true],
      ["kept", mine, count(kept.mean) + (ragged ? ` (${count(kept.least)} to ${count(kept.most)})` : "")]]);

    const samples = run.samples, top = Math.max(1, ...samples.map(sample => Math.max(sample[2], sample[4])));
    const sample = run.sampleAt(seen) || [0, 0, 0, 0, 0];
    const points = index => samples.map(entry => [entry[0], entry[index]]);
    this.bytesChart.lines([
      {points: points(4), colour: full, dash: [5, 4]}, {points: points(1), colour: third, dash: [2, 2]},
      {points: points(2), colour: mine},
    ], {...span, most: top, format: bytes});
    this.bytesChart.legend([["full", full, bytes(sample[4]), true], ["resident", mine, bytes(sample[2])],
      ["keys and values kept", third, bytes(sample[1]), true]]);

    const curves = this.runs.map((each, index) => {
      const every = Math.max(1, Math.floor(each.micros.length / 200)), found = [];
      for (let i = 2; i <= each.micros.length; i += every) found.push([from + i - 1, each.rate(i)]);
      return index === this.runs.length - 1 ? {points: found, colour: mine} : {points: found, colour: full, dash: [5, 4]};
    });
    const fastest = Math.max(1, ...curves.flatMap(curve => curve.points.map(([, value]) => value)));
    this.speedChart.lines(curves, {...span, most: fastest, format: count});
    this.speedChart.legend(this.runs.map((each, index) =>
      [each.head.title, curves[index].colour, count(each.rate(generated)), index < this.runs.length - 1]));

    const sizes = rows.map((_, row) => run.keptOf(row, seen)), large = Math.max(1, ...sizes);
    const pick = (layer, head) => this.pick(layer, head);
    this.map.draw(rows, row => ({text: count(sizes[row]), level: sizes[row] / Math.max(1, seen),
      about: `layer ${rows[row][0]}, head ${rows[row][1]}: ${count(sizes[row])} of ${count(seen)} tokens`}), pick);
    const even = sizes.every(size => size === sizes[0]);
    this.map.note.textContent = even ? "All heads hold the same number. Press one to look at it alone." :
      `Heads differ: ${count(Math.min(...sizes))} to ${count(large)} tokens. Press one to look at it alone.`;
    this.keys.node.hidden = !leads.length;
    if (leads.length) {
      this.keys.draw(rows, row => {
        const [layer, head] = rows[row], follows = leads[row] !== layer, keys = run.keysOf(row, seen);
        const text = `${count(keys)}${follows ? ` →${leads[row]}` : ""}`;
        const about = `layer ${layer}, head ${head}: ${count(keys)} keys` +
          (follows ? `, the others are those of layer ${leads[row]}` : "");
        return {text, about, level: keys / Math.max(1, seen), follows};
      }, pick);
      const {block} = run.head, blocks = keys => Math.ceil(keys / block);
      const own = rows.reduce((sum, _, row) => sum + blocks(run.keysOf(row, seen)), 0);
      const all = rows.reduce((sum, _, row) => sum + blocks(run.keptOf(row, seen)), 0);
      this.keys.note.textContent = `${count(own)} key blocks of ${block} instead of ${count(all)}: ${count(all - own)} are ` +
        "shared. →: far keys are those of that layer.";
    }
    this.chunkChart.node.hidden = rule === "all" || !run.lost.length;
    if (!this.chunkChart.node.hidden) {
      const chosen = this.rows(run), heads = Math.max(1, chosen.length);
      const lengths = chosen.flatMap(row => run.chunks(row, seen)), sum = lengths.reduce((a, b) => a + b, 0);
      const heights = BINS.map(([, low, high]) => lengths.filter(length => length >= low && length <= high).length / heads);
      this.chunkChart.bars(heights, BINS.map(([name]) => name), {colours, colour: colour("--kh-sealed")});
      const mean = lengths.length ? (sum / lengths.length).toFixed(1) : "–";
      this.chunkChart.legend([["chunks per head", colour("--kh-sealed"),
        `${count(lengths.length / heads)}, of ${mean} tokens on average`]]);
    }
  }

  // ------------------------------------------------------------------------------------------------------------ a token
  showTip(pane, p, span) {
    const run = this.runs[pane.index], seen = run.seenAt(this.at ?? this.generated), rows = this.rows(run);
    const held = rows.filter(row => run.alive(row, p, seen)), lines = [];
    lines.push(`position ${count(p)}${p < run.head.prompt ? ", prompt" : `, token ${count(p - run.head.prompt + 1)} generated`}`);
    lines.push(KINDS[NAMES[pane.shown[p] >> 8]]);
    const layer = this.layer.value === "" ? "all layers" : `layer ${this.layer.value}`;
    if (p >= seen) lines.push("not in the cache yet");
    else if (rows.length) {
      lines.push(`held by ${held.length} of ${rows.length} head${rows.length > 1 ? "s" : ""} of ${layer}`);
      const scores = rows.filter(row => run.scored[row]?.[p] <= seen).map(row => run.score[row][p]);
      if (scores.length === 1) lines.push(`score ${scores[0]}`);
      else if (scores.length) {
        const mean = scores.reduce((a, b) => a + b, 0) / scores.length;
        lines.push(`scores ${Math.min(...scores)} to ${Math.max(...scores)}, mean ${mean.toPrecision(3)}`);
      }
      else if (run.head.rule !== "all") lines.push("not scored yet");
      const when = rows.map(row => run.gone[row]?.[p]).filter(at => at <= seen);
      const [first, last] = [Math.min(...when), Math.max(...when)];
      if (when.length) lines.push(`evicted when ${count(first)}${last > first ? ` to ${count(last)}` : ""} tokens were seen`);
      const shared = rows.filter(row => run.shares(row, p, seen)).length;
      if (shared) lines.push(`key shared in ${shared} of them`);
    }
    this.tip.replaceChildren(make("b", "", span.textContent.trim() || "␣"), ...lines.map(line => make("div", "", line)));
    this.tip.hidden = false;
    const box = span.getBoundingClientRect(), home = this.root.getBoundingClientRect(), tip = this.tip.getBoundingClientRect();
    const left = Math.max(4, Math.min(box.left - home.left, home.width - tip.width - 4));
    const below = box.bottom - home.top + 4, above = box.top - home.top - tip.height - 4;
    this.tip.style.left = `${left}px`;
    this.tip.style.top = `${box.bottom + tip.height + 8 > innerHeight && above > 0 ? above : below}px`;
  }

  hideTip() { this.tip.hidden = true; }
  speak() { this.spoken.textContent = [...this.tip.children].map(line => line.textContent).join(", "); }

  // What is drawn of a run at a moment, as numbers: for tests, and for whoever opens the console.
  state(index = this.runs.length - 1, generated = this.at ?? this.generated) {
    const run = this.runs[index], seen = run.seenAt(generated);
    return {seen, kept: run.head.rows.map((_, row) => run.keptOf(row, seen)), sample: run.sampleAt(seen),
      positions: row => Array.from({length: seen}, (_, p) => p).filter(p => run.alive(row, p, seen))};
  }
}
