// Where the bits went: FP8 shares, bytes and energy by layer, and a grid of layers and kinds.

const fp8OfSites = (sites) => total(sites, (s) => s.k * s.fp8) / total(sites, (s) => s.k);

const sharesOf = {
  weights: (c, layer) => {
    const own = c.matrices.filter((m) => m.layer === layer);
    return total(own, (m) => m.fp8) / total(own, (m) => m.n * m.groups);
  },
  activations: (c, layer) => {
    const own = c.sites.filter((s) => s.layer === layer);
    return own.length ? fp8OfSites(own) : null;
  },
};

const allLayers = () => [...new Set(CHECKPOINTS.flatMap((c) => distinct(c.matrices, "layer")))];

const suffix = (c) => (SEVERAL ? `, ${c.name}` : "");
const plain = (text) => text.replace(/[<>&]/g, (c) => ({ "<": "&lt;", ">": "&gt;", "&": "&amp;" })[c]);

const bars = (name, layers, values, color, template, pattern) => ({
  type: "bar", name: plain(name), x: layers.map(plain), y: values,
  marker: { color, pattern: { shape: pattern ? "/" : "" } },
  hovertemplate: template,
});

function drawShares() {
  return figure("plot-shares", (c) => {
    const layers = allLayers();
    const data = CHECKPOINTS.flatMap((one, i) => [
      bars(`weights${suffix(one)}`, layers, layers.map((l) => sharesOf.weights(one, l)),
        SEVERAL ? c.series(i) : c.eight, "layer %{x}: %{y:.1%} of weights"),
      bars(`activations${suffix(one)}`, layers, layers.map((l) => sharesOf.activations(one, l)),
        SEVERAL ? c.series(i) : c.four, "layer %{x}: %{y:.1%} of activations", true),
    ]);
    const label = CHECKPOINTS.map((one) => {
      const shares = layers.map((l) => [l, sharesOf.weights(one, l)]).filter((e) => e[1] >= 0);
      const top = shares.reduce((a, b) => (b[1] > a[1] ? b : a));
      return `${one.name}: FP8 share of weights by layer, largest in ${layerLabel(top[0])} with ` +
        percent(top[1]);
    }).join("; ");
    return {
      data, label: `Bar chart. ${label}. The table of all matrices below has the numbers.`,
      layout: {
        barmode: "group",
        xaxis: { title: { text: "layer" }, type: "category" },
        yaxis: { title: { text: "blocks in FP8" }, tickformat: ".0%", rangemode: "tozero" },
      },
    };
  });
}

function drawBytes() {
  return figure("plot-bytes", (c) => {
    const layers = allLayers();
    const bytes = (one, layer) =>
      total(one.matrices.filter((m) => m.layer === layer), (m) => m.bytes) || null;
    return {
      data: CHECKPOINTS.map((one, i) =>
        bars(one.name, layers, layers.map((l) => bytes(one, l)),
          SEVERAL ? c.series(i) : c.four, "layer %{x}: %{y:.4s}B")),
      label: "Bar chart of stored bytes by layer. " + CHECKPOINTS.map((one) =>
        `${one.name}: ${sizeOf(total(one.matrices, (m) => m.bytes))} in ` +
        `${distinct(one.matrices, "layer").length} layers`).join("; "),
      layout: {
        barmode: "group", showlegend: SEVERAL,
        xaxis: { title: { text: "layer" }, type: "category" },
        yaxis: { title: { text: "bytes" }, tickformat: "~s" },
      },
    };
  });
}

function drawEnergy() {
  return figure("plot-energy", (c) => {
    const having = CHECKPOINTS.map((one, i) => [one, i]).filter(([one]) => one.energy);
    const layers = allLayers();
    return {
      data: having.map(([one, i]) =>
        bars(one.name, layers, layers.map((l) => one.energy.layers[l] ?? null),
          SEVERAL ? c.series(i) : c.four, "layer %{x}: %{y:.1f}% of FP8")),
      label: "Bar chart of energy by layer in percent of FP8. " + having.map(([one]) =>
        `${one.name}: ${one.energy.percent.toFixed(1)}% in all`).join("; "),
      layout: {
        barmode: "group", showlegend: SEVERAL,
        xaxis: { title: { text: "layer" }, type: "category" },
        yaxis: { title: { text: "percent of FP8" }, rangemode: "tozero" },
        shapes: [{ type: "line", xref: "paper", x0: 0, x1: 1, y0: 100, y1: 100,
          line: { color: c.soft, dash: "dot", width: 1 } }],
      },
    };
  });
}

const MEASURES = {
  bits: { title: "bits per weight", format: ".2f", range: DATA.formats.bits,
    of: (ms) => (8 * total(ms, (m) => m.bytes)) / total(ms, (m) => m.n * m.k) },
  fp8: { title: "FP8 share of weights", format: ".1%", range: [0, 1],
    of: (ms) => total(ms, (m) => m.fp8) / total(ms, (m) => m.n * m.groups) },
  activations: { title: "FP8 share of activations", format: ".1%", range: [0, 1], sites: true,
    of: fp8OfSites },
  bytes: { title: "bytes", format: ".4s", range: null, of: (ms) => total(ms, (m) => m.bytes) },
};

function drawGrid() {
  const draw = figure("plot-grid", (c) => {
    const one = CHECKPOINTS[Number(byId("grid-checkpoint")?.value ?? 0)];
    const measure = MEASURES[byId("grid-measure").value];
    const list = measure.sites ? one.sites : one.matrices;
    const layers = distinct(list, "layer");
    const kinds = distinct(list, "kind");
    const z = kinds.map((kind) => layers.map((layer) => {
      const own = list.filter((item) => item.layer === layer && item.kind === kind);
      return own.length ? measure.of(own) : null;
    }));
    const known = z.flat().filter((v) => v !== null);
    byId("plot-grid").style.height = `${Math.max(14, 5 + 1.9 * kinds.length)}rem`;
    const narrow = byId("plot-grid").clientWidth < 500;
    const last = (kind) => kind.split(".").pop();
    return {
      data: [{
        type: "heatmap", z, x: layers.map(plain),
        y: kinds.map((kind) => plain(narrow ? last(kind) : kind)),
        zmin: measure.range?.[0] ?? Math.min(...known), zmax: measure.range?.[1] ?? Math.max(...known),
        colorscale: [[0, c.four], [0.5, c.card], [1, c.eight]], xgap: 2, ygap: 2,
        colorbar: { thickness: 10, tickformat: measure.format, outlinewidth: 0 },
        hovertemplate: `layer %{x}, %{y}: %{z:${measure.format}}<extra></extra>`,
      }],
      label: `Heat map of ${measure.title} by layer and kind of matrix, ${one.name}: ` +
        `${layers.length} layers, ${kinds.length} kinds, from ${short(Math.min(...known))} to ` +
        `${short(Math.max(...known))}. The table of all matrices below has the numbers.`,
      layout: {
        xaxis: { title: { text: "layer" }, type: "category", showgrid: false },
        yaxis: { type: "category", autorange: "reversed", showgrid: false },
      },
    };
  });
  for (const id of ["grid-checkpoint", "grid-measure"]) byId(id)?.addEventListener("change", draw);
  return draw;
}
