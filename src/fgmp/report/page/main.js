// Start: sort tables first, which needs no library, then load Plotly and draw.

document.querySelectorAll("table.sortable").forEach(makeSortable);

if (!("DecompressionStream" in window)) {
  byId("old-browser").hidden = false;
  throw new Error("this browser lacks DecompressionStream");
}

const library = document.createElement("script");
library.textContent = new TextDecoder().decode(await inflated("plotly"));
document.head.append(library);

for (const draw of [drawTradeoff(), drawEnergyTradeoff(), drawShares(), drawGrid(), drawBytes(),
  drawEnergy()]) {
  await draw();
}
await startMap();
startScores();
followTheme();
document.documentElement.dataset.ready = "yes";
