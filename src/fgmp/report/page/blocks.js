// The block map: which blocks of a matrix are FP8, from the whole matrix down to one block.
//
// Plotly draws a heat map of at most COLUMNS x ROWS cells. Whenever the view changes, the cells are
// counted anew from the bits in view, so a matrix of millions of blocks stays fast.

const COLUMNS = 300;
const ROWS = 220;
const SMALLEST = 4;

const map = {
  checkpoint: 0, index: 0, flags: null, codes: null, scores: null,
  view: null, row: 0, block: 0, ticket: 0,
};
const matrixOf = () => CHECKPOINTS[map.checkpoint].matrices[map.index];

/** FP8 share of every cell of the map that is stored: bytes, 0 or 1 per block or 0..255 per square. */
async function loadMatrix() {
  const ticket = ++map.ticket;
  const { checkpoint, index } = map;
  const m = matrixOf();
  const [raw, codes] = await Promise.all([
    inflated(`map-${checkpoint}-${index}`), inflated(`window-${checkpoint}-${index}`),
  ]);
  if (ticket !== map.ticket) return false; // another matrix was chosen meanwhile
  if (m.tile === 1) {
    map.flags = new Uint8Array(m.n * m.groups);
    for (let i = 0; i < map.flags.length; i++) map.flags[i] = (raw[i >> 3] >> (7 - (i & 7))) & 1;
  } else {
    map.flags = raw;
  }
  map.codes = codes;
  const scores = CHECKPOINTS[checkpoint].scores?.weights[m.name]?.scores;
  map.scores = scores ? bf16Of(scores) : null;
  map.row = map.block = 0;
  showAll();
  return true;
}

function showAll() {
  const m = matrixOf();
  map.view = { x0: 0, x1: m.groups, y0: 0, y1: m.n };
}

/** A view within the matrix, at least a few blocks wide and high. */
function setView(x0, x1, y0, y1) {
  const m = matrixOf();
  const clamp = (a, b, length) => {
    const span = Math.min(length, Math.max(SMALLEST, Math.round(b - a)));
    const start = Math.min(Math.max(0, Math.round((a + b - span) / 2)), length - span);
    return [start, start + span];
  };
  const [left, right] = clamp(x0, x1, m.groups);
  const [top, bottom] = clamp(y0, y1, m.n);
  map.view = { x0: left, x1: right, y0: top, y1: bottom };
}

/** Cells of the view: FP8 share by cell, and how many rows and blocks a cell covers. */
function cellsInView() {
  const m = matrixOf();
  const { x0, x1, y0, y1 } = map.view;
  const t = m.tile;
  const step = (span, most) => Math.ceil(Math.max(1, span / most) / t) * t;
  const [w, h] = [step(x1 - x0, COLUMNS), step(y1 - y0, ROWS)];
  const [left, top] = [Math.floor(x0 / w) * w, Math.floor(y0 / h) * h];
  const columns = Math.ceil((Math.min(x1, m.groups) - left) / w);
  const rows = Math.ceil((Math.min(y1, m.n) - top) / h);
  const stride = Math.ceil(m.groups / t);
  const z = [];
  for (let i = 0; i < rows; i++) {
    const sums = new Float32Array(columns);
    const counts = new Uint32Array(columns);
    const lastRow = Math.min(top + (i + 1) * h, m.n);
    for (let row = top + i * h; row < lastRow; row += t) {
      const offset = (row / t) * stride;
      const lastBlock = Math.min(left + columns * w, m.groups);
      for (let block = left; block < lastBlock; block += t) {
        const column = ((block - left) / w) | 0;
        sums[column] += map.flags[offset + block / t];
        counts[column]++;
      }
    }
    const full = t === 1 ? 1 : 255;
    z.push(Array.from(sums, (sum, j) => sum / counts[j] / full));
  }
  return { z, w, h, left, top, columns, rows };
}

const formatAt = (row, block) => {
  const m = matrixOf();
  if (m.tile === 1) return map.flags[row * m.groups + block] ? "FP8" : "NVFP4";
  const at = windowIndex(row, block);
  return at === null ? null : map.codes[at] === DATA.formats.fp8Block ? "FP8" : "NVFP4";
};

/** Position of a block in the stored window, or null. */
function windowIndex(row, block) {
  const [rows, blocks] = matrixOf().window;
  return row < rows && block < blocks ? row * blocks + block : null;
}

function scoreAt(row, block) {
  const c = CHECKPOINTS[map.checkpoint];
  if (!map.scores) return null;
  const blocks = Math.min(c.scores.window[1], matrixOf().groups);
  const index = row * blocks + block;
  return block < blocks && index < map.scores.length ? map.scores[index] : null;
}

const range = (from, count) => (count === 1 ? `${from}` : `${from} to ${from + count - 1}`);

function hoverText(cells, i, j) {
  const m = matrixOf();
  const row = cells.top + i * cells.h;
  const block = cells.left + j * cells.w;
  const width = Math.min(cells.w, m.groups - block);
  const height = Math.min(cells.h, m.n - row);
  if (width * height > 1) {
    return `rows ${range(row, height)}<br>blocks ${range(block, width)}<br>` +
      `${percent(cells.z[i][j])} FP8`;
  }
  const lines = [`row ${row}, block ${block}`, `columns ${columnsOf(block)}`, formatAt(row, block)];
  const score = scoreAt(row, block);
  if (score !== null) lines.push(`score ${short(score)}`);
  return lines.join("<br>");
}

const columnsOf = (block) =>
  range(16 * block, Math.min(DATA.formats.block, matrixOf().k - 16 * block));

function drawMap() {
  const element = byId("plot-map");
  const draw = figure("plot-map", (c) => {
    const m = matrixOf();
    const cells = cellsInView();
    const { x0, x1, y0, y1 } = map.view;
    const text = cells.z.map((line, i) => line.map((_, j) => hoverText(cells, i, j)));
    const outline = (left, top, width, height, line) => ({
      type: "rect", x0: left - 0.5, x1: left + width - 0.5, y0: top - 0.5, y1: top + height - 0.5,
      line,
    });
    const [rows, blocks] = m.window;
    const single = cells.w * cells.h === 1;
    return {
      data: [{
        type: "heatmap", z: cells.z, zmin: 0, zmax: 1, showscale: false,
        x0: cells.left + (cells.w - 1) / 2, dx: cells.w,
        y0: cells.top + (cells.h - 1) / 2, dy: cells.h,
        xgap: single && x1 - x0 < 80 ? 1 : 0, ygap: single && y1 - y0 < 80 ? 1 : 0,
        colorscale: [[0, c.four], [1, c.eight]], text, hoverinfo: "text",
      }],
      layout: {
        margin: { l: 64, r: 8, t: 8, b: 44 },
        xaxis: { title: { text: "block of 16 columns" }, range: [x0 - 0.5, x1 - 0.5],
          showgrid: false, zeroline: false, tickformat: "d" },
        yaxis: { title: { text: "row" }, range: [y1 - 0.5, y0 - 0.5], showgrid: false,
          zeroline: false, tickformat: "d" },
        shapes: [
          outline(0, 0, blocks, rows, { color: c.ink, width: 1, dash: "dot" }),
          outline(map.block, map.row, 1, 1, { color: c.ink, width: 3 }),
        ],
        hoverlabel: { bgcolor: c.card, bordercolor: c.soft, font: { color: c.ink } },
      },
    };
  }, { doubleClick: false });
  return async () => {
    await draw();
    describeMap();
    if (!element.dataset.listening) listenToMap(element);
  };
}

let redrawMap = async () => {};

function describeMap() {
  const m = matrixOf();
  const { x0, x1, y0, y1 } = map.view;
  const whole = x1 - x0 === m.groups && y1 - y0 === m.n;
  byId("plot-map").setAttribute("aria-label",
    `Block map of ${m.name}, ${m.n} rows of ${m.groups} blocks`);
  byId("map-state").textContent =
    `${m.name}: ${m.n.toLocaleString("en")} rows of ${m.groups.toLocaleString("en")} blocks, ` +
    `${percent(m.fp8 / (m.n * m.groups))} FP8. ` +
    (whole ? "The whole matrix is shown." :
      `Shown: rows ${range(y0, y1 - y0)}, blocks ${range(x0, x1 - x0)}.`);
}

function listenToMap(element) {
  element.dataset.listening = "yes";
  element.on("plotly_relayout", (event) => {
    const x = event["xaxis.range"] ?? [event["xaxis.range[0]"], event["xaxis.range[1]"]];
    const y = event["yaxis.range"] ?? [event["yaxis.range[0]"], event["yaxis.range[1]"]];
    if (event["xaxis.autorange"] || event["yaxis.autorange"]) {
      showAll();
    } else if (x[0] !== undefined || y[0] !== undefined) {
      const v = map.view;
      const [x0, x1] = x[0] === undefined ? [v.x0, v.x1] : [x[0] + 0.5, x[1] + 0.5];
      const [y0, y1] = y[0] === undefined ? [v.y0, v.y1] :
        [Math.min(...y) + 0.5, Math.max(...y) + 0.5];
      setView(x0, x1, y0, y1);
    } else {
      return;
    }
    redrawMap();
  });
  listenToPresses(element);
  element.addEventListener("keydown", onKey);
}

/** A press chooses a block and two at one place show the whole matrix; a drag is Plotly's. */
function listenToPresses(element) {
  let [start, last] = [null, null];
  const near = (a, b) => Math.hypot(a.clientX - b.clientX, a.clientY - b.clientY) < 6;
  element.addEventListener("pointerdown", (event) => (start = event), true);
  addEventListener("pointercancel", () => (start = null), true);
  addEventListener("pointerup", (event) => {
    const pressed = start && near(start, event);
    start = null;
    if (!pressed) return;
    const twice = last && near(last, event) && event.timeStamp - last.timeStamp < 400;
    last = twice ? null : event;
    setTimeout(() => (twice ? wholeMatrix() : press(element, event))); // after Plotly's own
  }, true);
}

function press(element, { clientX, clientY }) {
  const { left, top } = element.getBoundingClientRect();
  const { xaxis, yaxis } = element._fullLayout;
  const [x, y] = [clientX - left - xaxis._offset, clientY - top - yaxis._offset];
  if (x < 0 || y < 0 || x >= xaxis._length || y >= yaxis._length) return;
  select(Math.round(yaxis.p2d(y)), Math.round(xaxis.p2d(x)));
  element.focus({ preventScroll: true });
}

function wholeMatrix() {
  showAll();
  return redrawMap();
}

function zoom(factor) {
  const { x0, x1, y0, y1 } = map.view;
  const inside = (value, low, high) => (value >= low && value < high ? value + 0.5 : (low + high) / 2);
  const [x, y] = [inside(map.block, x0, x1), inside(map.row, y0, y1)];
  const [w, h] = [(factor * (x1 - x0)) / 2, (factor * (y1 - y0)) / 2];
  setView(x - w, x + w, y - h, y + h);
  return redrawMap();
}

function onKey(event) {
  const { y0, y1 } = map.view;
  const moves = {
    ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0],
    PageUp: [y0 - y1, 0], PageDown: [y1 - y0, 0],
  };
  if (event.ctrlKey || event.altKey || event.metaKey) return;
  if (event.key in moves) {
    const [down, right] = moves[event.key];
    select(map.row + down, map.block + right);
  } else if (event.key === "+" || event.key === "=") {
    zoom(0.5);
  } else if (event.key === "-") {
    zoom(2);
  } else if (event.key === "0") {
    wholeMatrix();
  } else {
    return;
  }
  event.preventDefault();
}

/** Choose a block; the view follows if it lies outside. */
function select(row, block) {
  const m = matrixOf();
  map.row = Math.min(Math.max(0, row || 0), m.n - 1);
  map.block = Math.min(Math.max(0, block || 0), m.groups - 1);
  const { x0, x1, y0, y1 } = map.view;
  const outside = map.block < x0 || map.block >= x1 || map.row < y0 || map.row >= y1;
  if (outside) {
    const [w, h] = [(x1 - x0) / 2, (y1 - y0) / 2];
    setView(map.block + 0.5 - w, map.block + 0.5 + w, map.row + 0.5 - h, map.row + 0.5 + h);
  }
  showBlock();
  return redrawMap();
}

/** Scale and values of a stored block, or null. */
function contentAt(row, block) {
  const at = windowIndex(row, block);
  if (at === null) return null;
  const m = matrixOf();
  const f = DATA.formats;
  const [rows, blocks] = m.window;
  const scaleCode = map.codes[at];
  const start = rows * blocks + f.block * at;
  const codes = [...map.codes.subarray(start, start + Math.min(f.block, m.k - f.block * block))];
  const wide = scaleCode === f.fp8Block;
  const scale = wide ? f.fp8Factor * m.t : f.fp8[scaleCode] * m.t;
  const table = wide ? f.fp8 : f.fp4;
  return { codes, scale, values: codes.map((code) => table[code] * scale), digits: wide ? 2 : 1 };
}

const drawBlock = figureOfBlock();

function figureOfBlock() {
  let draw = null;
  return (content) => {
    byId("block-figure").hidden = !content;
    if (!content) {
      figures.delete("plot-block");
      return;
    }
    draw = figure("plot-block", (c) => ({
      data: [{
        type: "bar", x: content.values.map((_, i) => 16 * map.block + i), y: content.values,
        marker: { color: formatAt(map.row, map.block) === "FP8" ? c.eight : c.four },
        hovertemplate: "column %{x}: %{y:.4g}<extra></extra>",
      }],
      label: `Bar chart of the values of row ${map.row}, block ${map.block}; ` +
        "the table above has the numbers.",
      layout: { xaxis: { title: { text: "column" }, dtick: 1, tickformat: "d" },
        yaxis: { title: { text: "value" } } },
    }));
    draw();
  };
}

function showBlock() {
  const m = matrixOf();
  const { row, block } = map;
  byId("map-row").value = row;
  byId("map-block").value = block;
  byId("map-row").max = m.n - 1;
  byId("map-block").max = m.groups - 1;
  const content = contentAt(row, block);
  const format = formatAt(row, block);
  const score = scoreAt(row, block);
  const facts = [`${format ?? "format not stored"}, columns ${columnsOf(block)}`];
  if (content) facts.push(`scale ${short(content.scale)}`);
  if (score !== null) facts.push(`score ${short(score)} nats per token`);
  byId("block-title").textContent = `Row ${row}, block ${block}`;
  byId("block-facts").textContent = `${facts.join("; ")}.`;
  const table = byId("block-values");
  table.hidden = !content;
  const rowOf = (name, cells) => {
    const line = document.createElement("tr");
    const head = document.createElement("th");
    head.scope = "row";
    head.textContent = name;
    line.append(head, ...cells.map((text) => {
      const cell = document.createElement("td");
      cell.textContent = text;
      return cell;
    }));
    return line;
  };
  if (content) {
    table.tBodies[0].replaceChildren(
      rowOf("column", content.values.map((_, i) => 16 * block + i)),
      rowOf("value", content.values.map((v) => Number(v.toPrecision(3)).toString())),
      rowOf("code", content.codes.map((v) =>
        v.toString(16).toUpperCase().padStart(content.digits, "0"))),
    );
  }
  drawBlock(content);
  const [rows, blocks] = m.window;
  const scores = map.scores ? "scores" : "no scores";
  byId("map-stored").textContent =
    (m.tile === 1 ? "The page stores the format of every block of this matrix. " :
      `The page stores the share of FP8 in squares of ${m.tile} x ${m.tile} blocks, because the ` +
      "model is large. ") +
    `Values, scales and ${scores} are stored of rows ${range(0, rows)} and blocks ` +
    `${range(0, blocks)}, the dotted rectangle.`;
}

function fillSelect(select, options) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value)));
}

async function startMap() {
  const [layer, matrix] = [byId("map-layer"), byId("map-matrix")];
  redrawMap = drawMap();
  const open = async () => {
    map.index = Number(matrix.value);
    if (await loadMatrix()) {
      showBlock();
      await redrawMap();
    }
  };
  const fillMatrices = () => {
    const all = CHECKPOINTS[map.checkpoint].matrices;
    const previous = matrix.selectedOptions[0]?.textContent;
    const own = all.map((m, i) => [m, i]).filter(([m]) => m.layer === layer.value);
    const label = (m) => (own.filter(([o]) => o.kind === m.kind).length > 1 ? m.name : m.kind);
    fillSelect(matrix, own.map(([m, i]) => [i, label(m)]));
    const same = [...matrix.options].find((option) => option.textContent === previous);
    if (same) matrix.value = same.value;
    return open();
  };
  const fillLayers = () => {
    map.checkpoint = Number(byId("map-checkpoint")?.value ?? 0);
    const layers = distinct(CHECKPOINTS[map.checkpoint].matrices, "layer");
    fillSelect(layer, layers.map((name) => [name, name]));
    return fillMatrices();
  };
  byId("map-checkpoint")?.addEventListener("change", fillLayers);
  layer.addEventListener("change", fillMatrices);
  matrix.addEventListener("change", open);
  byId("map-in").addEventListener("click", () => zoom(0.5));
  byId("map-out").addEventListener("click", () => zoom(2));
  byId("map-all").addEventListener("click", wholeMatrix);
  for (const id of ["map-row", "map-block"]) {
    byId(id).addEventListener("change", () =>
      select(byId("map-row").valueAsNumber, byId("map-block").valueAsNumber));
  }
  await fillLayers();
}
