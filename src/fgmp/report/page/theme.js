// One look for all figures: colours come from the style sheet and follow light, dark and print.

const SERIES = ["--four", "--eight", "--series-3", "--series-4", "--series-5", "--series-6"];
const figures = new Map();

function colours() {
  const style = getComputedStyle(document.documentElement);
  const of = (name) => style.getPropertyValue(name).trim();
  return {
    ink: of("--ink"), soft: of("--soft"), line: of("--line"), page: of("--page"),
    card: of("--card"), four: of("--four"), eight: of("--eight"), accent: of("--accent"),
    series: (i) => of(SERIES[i % SERIES.length]),
  };
}

const touch = matchMedia("(pointer: coarse)");
const print = matchMedia("print");
const PAPER = 660; // pixels that fit an A4 or letter page with a browser's margins

function themed(layout, c) {
  const axis = (given = {}) => ({
    gridcolor: c.line, linecolor: c.line, zerolinecolor: c.line, automargin: true,
    ...given, title: { standoff: 8, font: { size: 13, color: c.soft }, ...given.title },
  });
  const axes = Object.fromEntries(
    Object.entries(layout).filter(([key]) => /^[xy]axis/.test(key)).map(([k, v]) => [k, axis(v)]),
  );
  return {
    margin: { l: 56, r: 16, t: 12, b: 44 },
    paper_bgcolor: "rgba(0,0,0,0)", plot_bgcolor: "rgba(0,0,0,0)",
    font: { color: c.ink, size: 13, family: getComputedStyle(document.body).fontFamily },
    hoverlabel: { bgcolor: c.card, bordercolor: c.soft, font: { color: c.ink } },
    dragmode: touch.matches ? false : "zoom",
    barcornerradius: 2,
    ...(print.matches ? { width: PAPER, autosize: false } : { autosize: true, width: undefined }),
    ...layout, ...axes,
    legend: { orientation: "h", y: 1.02, yanchor: "bottom", x: 0, ...layout.legend },
  };
}

const CONFIG = {
  displayModeBar: false,
  responsive: true,
};

/**
 * Draw a figure, and again whenever the theme changes.
 * `build` maps colours to {data, layout, label}; the label is the figure's text alternative.
 */
function figure(id, build, config = {}) {
  const element = byId(id);
  if (!element) return async () => {};
  const draw = () => {
    const c = colours();
    const { data, layout, label } = build(c);
    if (label) element.setAttribute("aria-label", label);
    return Plotly.react(element, data, themed(layout, c), { ...CONFIG, ...config });
  };
  figures.set(id, draw);
  return draw;
}

function drawAll() {
  for (const draw of figures.values()) draw();
}

function followTheme() {
  for (const query of [matchMedia("(prefers-color-scheme: dark)"), print]) {
    query.addEventListener("change", drawAll);
  }
  addEventListener("afterprint", drawAll);
}
