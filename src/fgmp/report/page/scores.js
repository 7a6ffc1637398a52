// Histograms of block scores, and what any other threshold would give: bits and estimated harm.

const PER_OCTAVE = 4;

/** The sum of several summaries: zeros, and counts and sums of scores by bin. */
function merged(summaries) {
  const used = summaries.filter((s) => s.counts.length);
  const zeros = total(summaries, (s) => s.zeros);
  const thresholds = new Set(summaries.map((s) => s.threshold));
  const threshold = thresholds.size === 1 ? [...thresholds][0] : null;
  if (!used.length) return { zeros, first: 0, counts: [], sums: [], threshold, thresholds };
  const first = Math.min(...used.map((s) => s.first));
  const last = Math.max(...used.map((s) => s.first + s.counts.length));
  const counts = new Float64Array(last - first);
  const sums = new Float64Array(last - first);
  for (const s of used) {
    s.counts.forEach((count, i) => (counts[s.first - first + i] += count));
    s.sums.forEach((sum, i) => (sums[s.first - first + i] += sum));
  }
  return { zeros, first, counts, sums, threshold, thresholds };
}

const edge = (k) => 2 ** (k / PER_OCTAVE);

/** FP4 blocks and the sum of their scores with the first `bins` bins in FP4. */
function below(h, bins) {
  let [count, sum] = [h.zeros, 0];
  for (let i = 0; i < bins; i++) {
    count += h.counts[i];
    sum += h.sums[i];
  }
  return { count, sum };
}

/** The same at any threshold; scores of the bin that it cuts count as evenly spread. */
function belowValue(h, threshold) {
  const at = PER_OCTAVE * Math.log2(threshold) - h.first;
  const whole = Math.min(h.counts.length, Math.max(0, Math.floor(at)));
  const result = below(h, whole);
  if (at > 0 && whole < h.counts.length) {
    const [low, high] = [edge(h.first + whole), edge(h.first + whole + 1)];
    const part = (threshold - low) / (high - low);
    result.count += part * h.counts[whole];
    result.sum += (h.counts[whole] * part * (low + threshold)) / 2;
  }
  return result;
}

function startScores() {
  if (!byId("scores-weights")) return [];
  const panels = ["weights", "activations"].map(scorePanel);
  byId("scores-checkpoint")?.addEventListener("change", () => panels.forEach((p) => p.open()));
  return panels.map((panel) => panel.open());
}

function scorePanel(side) {
  const slider = byId(`slider-${side}`);
  const put = (name, text) => (byId(`${side}-${name}`).textContent = text);
  let h = null;
  let c = null;
  const blocks = () => h.zeros + total([...h.counts], (n) => n);
  const draw = figure(`plot-scores-${side}`, (colour) => {
    const chosen = Number(slider.value);
    const x = Array.from(h.counts, (_, i) => edge(h.first + i + 0.5));
    const width = Array.from(h.counts, (_, i) => edge(h.first + i + 1) - edge(h.first + i));
    const line = (value, color, dash) => ({ type: "line", yref: "paper", y0: 0, y1: 1,
      x0: value, x1: value, line: { color, width: 2, dash } });
    const shapes = [line(edge(h.first + chosen), colour.accent, "solid")];
    if (h.threshold > 0) shapes.push(line(h.threshold, colour.ink, "dot"));
    const shares = Array.from(h.counts, (n) => n / blocks());
    return {
      data: [["NVFP4", colour.four, (i) => i < chosen], ["FP8", colour.eight, (i) => i >= chosen]]
        .map(([name, color, belongs]) => ({
          type: "bar", name, x, width, y: shares.map((s, i) => (belongs(i) ? s : 0)),
          marker: { color, line: { width: 0 } },
          hovertemplate: `score %{x:.2g}: %{y:.2%} of blocks<extra>${name}</extra>`,
        })),
      label: `Histogram of ${blocks().toLocaleString("en")} block scores of ${side}, ` +
        `${c.name}, on a logarithmic axis from ${short(x[0])} to ${short(x.at(-1))}; the table ` +
        "below the slider has the numbers at the threshold.",
      layout: {
        barmode: "stack", bargap: 0, shapes, legend: { traceorder: "normal" },
        xaxis: { type: "log", title: { text: "score, nats per token" }, exponentformat: "power" },
        yaxis: { title: { text: "blocks" }, tickformat: ".0%" },
      },
    };
  });

  const show = (prefix, threshold, fp4, harm) => {
    const [low, high] = DATA.formats.bits;
    put(`${prefix}threshold`, threshold);
    put(`${prefix}fp4`, percent(fp4));
    put(`${prefix}bits`, (low * fp4 + high * (1 - fp4)).toFixed(3));
    put(`${prefix}harm`, harm === null ? "-" : short(harm));
  };

  // Weights: a block's score counts once. Activations: blocks were counted over all tokens.
  const harmOf = (sum) => sum / 2 / (side === "weights" ? 1 : Math.max(1, c.scores.tokens));

  const showSlider = () => {
    const chosen = Number(slider.value);
    const { count, sum } = below(h, chosen);
    const threshold = short(edge(h.first + chosen));
    show("", threshold, count / blocks(), harmOf(sum));
    slider.setAttribute("aria-valuetext",
      `threshold ${threshold}, ${percent(count / blocks())} of blocks in 4 bits`);
    draw();
  };

  const showStored = () => {
    const shared = h.threshold > 0;
    const stored = shared ? belowValue(h, h.threshold) : null;
    const fp4 = stored ? stored.count / blocks() :
      side === "weights" ? 1 - total(c.matrices, (m) => m.fp8) / total(c.matrices, (m) => m.n * m.groups) :
        1 - fp8OfSites(c.sites);
    const why = h.thresholds.size > 1 ? "one per layer" : "none";
    show("stored-", shared ? short(h.threshold) : why, fp4, stored ? harmOf(stored.sum) : null);
    byId(`reset-${side}`).hidden = !shared;
  };

  const reset = () => {
    const at = h.threshold > 0 ? PER_OCTAVE * Math.log2(h.threshold) - h.first : h.counts.length / 2;
    slider.value = Math.round(Math.min(h.counts.length, Math.max(0, at)));
    showSlider();
  };

  slider.addEventListener("input", showSlider);
  byId(`reset-${side}`).addEventListener("click", reset);

  const open = () => {
    c = CHECKPOINTS[Number(byId("scores-checkpoint")?.value ?? 0)];
    const summaries = Object.values(c.scores?.[side] ?? {});
    const missing = byId(`scores-${side}-missing`);
    h = merged(summaries);
    missing.hidden = h.counts.length > 0;
    byId(`scores-${side}-body`).hidden = !missing.hidden;
    missing.textContent = c.scores ?
      `No scores of ${side} are stored: with all blocks in one format no threshold is needed.` :
      `${c.name} has no fgmp_scores.json.`;
    if (!h.counts.length) {
      figures.delete(`plot-scores-${side}`);
      return;
    }
    figures.set(`plot-scores-${side}`, draw);
    slider.max = h.counts.length;
    showStored();
    reset();
  };
  return { open };
}
