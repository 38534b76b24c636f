// Draws the charts with the colours of the stylesheet, anew when the reader's colour scheme changes.
// The expressions of the charts are interpreted (ast), because the page's policy forbids code made from text.
const specs = JSON.parse(document.getElementById("charts").textContent);
const scheme = window.matchMedia("(prefers-color-scheme: dark)");

function config() {
  const style = getComputedStyle(document.documentElement);
  const colour = (name) => style.getPropertyValue(name).trim();
  const font = getComputedStyle(document.body).fontFamily;
  const text = { labelColor: colour("--soft"), titleColor: colour("--text"), labelFont: font, titleFont: font };
  return {
    background: "transparent",
    font: font,
    view: { stroke: null },
    axis: { ...text, gridColor: colour("--line"), domainColor: colour("--soft"), tickColor: colour("--soft"), labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, titlePadding: 10 },
    legend: { ...text, labelFontSize: 12, titleFontSize: 12, titleFontWeight: 500, symbolStrokeWidth: 3 },
    range: { category: [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12].map((number) => colour("--series-" + number)) },
  };
}

async function draw() {
  for (const [id, spec] of Object.entries(specs)) {
    await vegaEmbed("#" + id, spec, {
      mode: "vega-lite", renderer: "svg", ast: true, actions: false, defaultStyle: false, tooltip: { disableDefaultStyle: true }, config: config(),
    });
  }
  document.documentElement.dataset.drawn = "true";
}

scheme.addEventListener("change", draw);
draw();
