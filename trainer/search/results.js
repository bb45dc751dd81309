// Draws results. All texts of the data are set through textContent or attributes, never parsed as HTML.
const colours = ["a", "b"];
export const models = []; // from /api/about

export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value; else element.setAttribute(name, value);
  }
  element.append(...children);
  return element;
}
export const number = value => value.toLocaleString("en");
const percent = share => share >= 0.095 ? Math.round(100 * share) + "%" : share >= 0.00095 ? (100 * share).toFixed(1) + "%" : "<0.1%";

// The results of each model, side by side.
export function drawPictures(results, found, empty) {
  const two = found.length > 1;
  results.classList.toggle("two", two);
  const places = found.map(model => new Map(model.results.map((hit, place) => [hit.sample, place + 1])));
  results.replaceChildren(...found.map((model, which) => {
    const column = make("div", { className: "column" });
    if (two) column.append(heading(which));
    const hits = model.results.map(hit => card(hit, two ? note(places[1 - which].get(hit.sample), 1 - which) : null));
    column.append(hits.length ? make("div", { className: "hits" }, ...hits)
      : make("p", { className: "empty", textContent: empty }));
    return column;
  }));
}
function heading(which) {
  const mark = make("i"), title = make("h2", { title: models[which].origin }, mark, models[which].name);
  mark.style.setProperty("--s", `var(--${colours[which]})`);
  return title;
}
const note = (place, other) => place ? make("em", { title: `number ${place} for ${models[other].name}` }, make("span", { textContent: "also " }), `#${place}`)
  : make("em", { className: "only", textContent: "only here", title: `not among the results of ${models[other].name}` });
export function picture(sample, side, alt = "") {
  const image = make("img", { src: `/picture?sample=${sample}&side=${side}`, alt, loading: "lazy", decoding: "async" });
  image.onload = () => image.classList.toggle("tiny", image.naturalWidth <= 96 && image.naturalHeight <= 96);
  return image;
}
function score(hit) {
  if (hit.score === undefined) return make("b");
  const found = make("b", { textContent: hit.score.toFixed(3), title: "cosine" });
  if (hit.probability !== undefined) {
    found.append(make("i", { textContent: ` · ${percent(hit.probability)}` }));
    found.title = "cosine · the model's probability that image and text match";
  }
  return found;
}
export function card(hit, extra = null) {
  const words = make("p", {}, ...(hit.score === undefined ? [] : [score(hit)]), make("span", { className: "caption", dir: "auto", textContent: hit.caption }));
  const found = make("button", { type: "button", className: "hit" }, picture(hit.sample, 256, hit.caption), ...(extra ? [extra] : []), words);
  found.dataset.sample = hit.sample;
  return found;
}
export function drawLines(column, results) {
  const lines = results.map(hit => {
    const line = make("button", { type: "button", className: "line" }, picture(hit.sample, 96),
      make("span", { className: "caption", dir: "auto", textContent: hit.caption }), score(hit));
    line.dataset.sample = hit.sample;
    return make("li", {}, line);
  });
  if (lines.length) column.append(make("div", { className: "aside" }, make("h3", { textContent: "Nearest captions" }), make("ol", { className: "lines" }, ...lines)));
}

export function bars(rows, model) {
  const both = "sigmoid" in rows[0], line = (...cells) => make("div", {}, ...cells);
  const head = line(make("span", { textContent: models.length > 1 ? models[model].name : "label" }), make("i"), make("em", { textContent: "softmax" }),
    make("em", { textContent: both ? "sigmoid" : "cosine" }));
  head.className = "head";
  return make("div", { className: "bars named" }, head, ...rows.map(row => {
    const bar = make("i");
    bar.style.setProperty("--w", 100 * row.softmax + "%");
    return line(make("span", { textContent: row.label, title: row.label, dir: "auto" }), bar, make("em", { textContent: percent(row.softmax) }),
      make("em", { textContent: both ? percent(row.sigmoid) : row.score.toFixed(3), title: `cosine ${row.score.toFixed(3)}` }));
  }));
}
