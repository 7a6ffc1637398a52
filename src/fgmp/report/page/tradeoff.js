// Bits and energy against harm: one point per model of the comparison.

const AVERAGE = (row) => (row.bits_per_weight + row.bits_per_activation) / 2;
const MEASURED = {
  kl: { title: "KL from the original, nats", of: (row) => row.kl, interval: (row) => row.kl_ci95 },
  perplexity: { title: "perplexity", of: (row) => row.perplexity, interval: (row) => row.ci95 },
};
const SYMBOLS = { original: "star", fp8: "square", nvfp4: "diamond", fgmp: "circle", uniform: "x" };

function points(colour, measure, x, include) {
  return CHECKPOINTS.flatMap((c, i) => {
    const rows = (c.rows ?? []).filter((row) => include(row) && Number.isFinite(x(c, row)) &&
      Number.isFinite(measure.of(row)));
    return rows.map((row) => {
      const interval = measure.interval(row);
      const [low, high] = Array.isArray(interval) ? interval : [null, null];
      const name = SEVERAL ? `${row.name}, ${c.name}` : row.name;
      return {
        type: "scatter", mode: "markers+text", name: plain(name), x: [x(c, row)], y: [measure.of(row)],
        text: [plain(SEVERAL && row.name !== "fgmp" ? row.name : SEVERAL ? c.name : row.name)],
        textposition: "top center", cliponaxis: false,
        error_y: low === null ? {} : { type: "data", symmetric: false, thickness: 1,
          array: [high - measure.of(row)], arrayminus: [measure.of(row) - low] },
        marker: { size: row.name === "fgmp" ? 13 : 10, symbol: SYMBOLS[row.name] ?? "triangle-up",
          color: row.name !== "fgmp" ? colour.soft : SEVERAL ? colour.series(i) : colour.eight },
        hovertemplate: "%{x:.2f}, %{y:.4g}",
      };
    });
  });
}

const listed = (data) => data.map((p) => `${p.name} ${short(p.x[0])}, ${short(p.y[0])}`).join("; ");

function drawTradeoff() {
  const draw = figure("plot-tradeoff", (c) => {
    const measure = MEASURED[byId("tradeoff-measure").value];
    const notOriginal = (row) => row.name !== "original";
    const data = points(c, measure, (_, row) => AVERAGE(row), notOriginal);
    return {
      data, label: `Scatter plot of bits per value and ${measure.title}: ${listed(data)}`,
      layout: {
        showlegend: false,
        xaxis: { title: { text: "bits per value" }, range: [4.2, 8.4] },
        yaxis: { title: { text: measure.title },
          rangemode: measure === MEASURED.kl ? "tozero" : "normal" },
      },
    };
  });
  byId("tradeoff-measure")?.addEventListener("change", draw);
  return draw;
}

function drawEnergyTradeoff() {
  return figure("plot-energy-tradeoff", (c) => {
    const energyOf = (one, row) => ({
      fp8: 100, nvfp4: one.energy?.allFp4, fgmp: one.energy?.percent,
    })[row.name];
    const data = points(c, MEASURED.kl, (one, row) => (one.energy ? energyOf(one, row) : NaN),
      (row) => ["fp8", "nvfp4", "fgmp"].includes(row.name));
    return {
      data, label: `Scatter plot of energy in percent of FP8 and KL: ${listed(data)}`,
      layout: {
        showlegend: false,
        xaxis: { title: { text: "energy, percent of FP8" } },
        yaxis: { title: { text: MEASURED.kl.title }, rangemode: "tozero" },
      },
    };
  });
}
