const root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
document.getElementById("theme").onclick = () => {
  root.dataset.theme = (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark" ? "light" : "dark";
};
function short(value) {
  if (value === null) return "none";
  const size = Math.abs(value);
  if (size >= 1e6) return (value / 1e6).toFixed(2) + "M";
  if (size >= 1e4) return Math.round(value).toLocaleString("en");
  if (size && size < 1e-3) return value.toExponential(2);
  return String(+value.toPrecision(4));
}
for (const frame of document.querySelectorAll(".frame")) {
  const chart = JSON.parse(frame.querySelector("script").textContent), marks = [];
  const clear = () => { while (marks.length) marks.pop().remove(); };
  const add = (kind, style) => {
    const mark = document.createElement("div");
    mark.className = kind; Object.assign(mark.style, style); frame.append(mark); marks.push(mark);
    return mark;
  };
  const show = event => {
    const box = frame.getBoundingClientRect(), at = (event.clientX - box.left) / box.width;
    if (at < -0.03 || at > 1.03) return clear();
    clear();
    let nearest = null;
    const found = chart.series.map(series => {
      let low = 0, high = series.at.length - 1;
      while (high - low > 1) { const middle = (low + high) >> 1; if (series.at[middle] < at) low = middle; else high = middle; }
      const index = at - series.at[low] < series.at[high] - at ? low : high;
      if (nearest === null || Math.abs(series.at[index] - at) < Math.abs(nearest - at)) nearest = series.at[index];
      return [series, index];
    });
    if (nearest === null) return;
    add("cross", { left: 100 * nearest + "%" });
    const tip = add("tip", nearest > 0.5 ? { right: 100 * (1 - nearest) + 2 + "%" } : { left: 100 * nearest + 2 + "%" });
    let title = "";
    for (const [series, index] of found) {
      if (series.height[index] !== null) {
        add("dot", { left: 100 * series.at[index] + "%", top: 100 * (1 - series.height[index]) + "%" }).style.setProperty("--s", `var(--${series.colour})`);
      }
      title = title || short(series.x[index]) + chart.x_unit + " " + chart.x;
      const row = document.createElement("div");
      const value = series.y[index], low = series.low ? short(series.low[index]) : "", high = series.high ? short(series.high[index]) : "";
      row.textContent = (chart.series.length > 1 ? series.name + "  " : "") + short(value) + (value === null ? "" : chart.unit) +
        (low === high ? "" : "  (" + low + " to " + high + ")");
      tip.append(row);
    }
    tip.prepend(title);
  };
  frame.addEventListener("pointermove", show);
  frame.addEventListener("pointerdown", show);
  frame.addEventListener("pointerleave", clear);
}
