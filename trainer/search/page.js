// The query, the filters, keyboard control, and the dialog of one sample.
import { bars, card, drawLines, drawPictures, make, models, number, picture } from "./results.js";

const FIRST = 24, FIRST_OF_TWO = 12, STEP = 48, LINES = 8, MOST = 500;
const $ = id => document.getElementById(id), root = document.documentElement, dark = matchMedia("(prefers-color-scheme: dark)");
let data = null;       // what /api/about says of the dataset
let asked = { text: "", sample: null, picture: null, filters: [] };
let count = 0, turn = 0, stopping = null;
const timers = {};
let last = null;       // the last dropped image, for the "back" button

const first = () => models.length > 1 && (asked.text || asked.picture || asked.sample !== null) ? FIRST_OF_TWO : FIRST;

async function call(path, body, signal) {
  const answer = await fetch(path, body === undefined ? { signal } : { method: "POST", body, signal });
  const found = await answer.json();
  if (!answer.ok) throw new Error(found.error);
  return found;
}
function say(text, bad = false) {
  $("status").textContent = text;
  $("status").classList.toggle("bad", bad);
}
// runs `act` after some milliseconds without another call for `what`
function later(what, milliseconds, act) {
  clearTimeout(timers[what]);
  timers[what] = setTimeout(act, milliseconds);
}
function fail(error) {
  if (error.name === "AbortError") return;
  say(error instanceof TypeError ? "no response: `ringlip search` is not running; start it again" : error.message, true);
}

// the query is in the address, so that back, forward and bookmarks work
function params(more = {}) {
  const found = new URLSearchParams(more);
  if (asked.text) found.set("text", asked.text);
  if (asked.sample !== null) found.set("sample", asked.sample);
  for (const [field, value] of asked.filters) { if (field && value.trim()) { found.append("field", field); found.append("value", value); } }
  return found;
}
function remember(push) {
  const found = params(asked.picture ? { picture: "1" } : {}), address = "#" + found;
  if (address !== (location.hash || "#")) history[push ? "pushState" : "replaceState"](null, "", address);
}
function recall() {
  const found = new URLSearchParams(location.hash.slice(1)), values = found.getAll("value");
  asked = {
    text: found.get("text") || "",
    sample: /^\d+$/.test(found.get("sample") || "") ? Number(found.get("sample")) : null,
    picture: found.has("picture") ? last : null,
    filters: found.getAll("field").map((field, place) => [field, values[place] || ""]),
  };
  $("words").value = asked.text;
  count = first();
  drawFilters();
  search();
}
function ask(change, push = true) {
  asked = { ...asked, ...change };
  if (push) $("words").value = asked.text;
  count = first();
  remember(push);
  search();
}

async function search() {
  const mine = ++turn, started = performance.now();
  if (stopping) stopping.abort();
  stopping = new AbortController();
  const signal = stopping.signal, visual = asked.picture !== null || asked.sample !== null;
  $("clear").hidden = !visual && !asked.text;
  $("asked").hidden = !visual;
  if (visual) $("asked").src = asked.picture ? asked.picture.url : `/picture?sample=${asked.sample}&side=96`;
  $("words").placeholder = visual ? "Type words to search with them instead" : "Type words, or drop or paste an image";
  $("naming").hidden = !visual;
  const one = (model, kind, wanted) =>
    call("/api/search?" + params({ model, kind, count: wanted }), asked.picture ? asked.picture.blob : "", signal);
  const numbers = models.map((_, model) => model);
  const any = visual || Boolean(asked.text);
  try {
    const found = await Promise.all((any ? numbers : [0]).map(model => one(model, "pictures", count)));
    if (mine !== turn) return;
    drawPictures($("results"), found, any ? "No image matches the filter." : "No images.");
    const of = found[0].total === data.samples ? "" : ` that match the filter`;
    const shown = found[0].results.length, total = number(found[0].total);
    say(any ? `${number(shown)} nearest of ${total} images${of} · ${Math.round(performance.now() - started)} ms`
      : `${number(shown)} of ${total} images${of}: type words or click one`);
    $("more").hidden = shown < count || shown >= MOST;
    if (!any) return;
    const lines = await Promise.all(numbers.map(model => one(model, "captions", LINES)));
    if (mine !== turn) return;
    lines.forEach((line, model) => drawLines($("results").children[model], line.results));
    if (visual) await name(signal);
  } catch (error) { if (mine === turn) fail(error); }
}

// labels
const labels = () => $("labels").value.split($("labels").value.trim().includes("\n") ? "\n" : ",").map(label => label.trim()).filter(Boolean);
async function namedBy(query, body, signal) {
  const wanted = labels();
  if (!wanted.length) return [];
  return Promise.all(models.map(async (_, model) => {
    const found = new URLSearchParams({ ...query, model, template: $("template").value });
    wanted.forEach(label => found.append("label", label));
    return bars(await call("/api/labels?" + found, body, signal), model);
  }));
}
async function name(signal) {
  const query = asked.sample === null ? {} : { sample: asked.sample };
  $("named").replaceChildren(...await namedBy(query, asked.picture ? asked.picture.blob : "", signal));
}
// one sample
const flat = (tree, prefix = "") => Object.entries(tree).flatMap(([key, value]) =>
  value && typeof value === "object" && !Array.isArray(value) ? flat(value, `${prefix}${key}.`) : [[prefix + key, value]]);
let around = [];       // the samples that the arrow keys step through
async function open(sample, list) {
  around = list;
  const dialog = $("detail"), close = make("button", { type: "button", className: "close", textContent: "×", title: "close (Esc)", ariaLabel: "close" });
  close.onclick = () => dialog.close();
  try {
    const found = await call(`/api/sample?sample=${sample}`), captions = found.captions;
    const facts = make("dl", {}, ...flat({ ...found.metadata, file: found.key }).flatMap(([key, value]) =>
      [make("dt", { textContent: key }), make("dd", { dir: "auto", textContent: typeof value === "string" ? value : JSON.stringify(value) })]));
    const go = (title, change) => make("button", { type: "button", textContent: title, onclick: () => { dialog.close(); ask(change); scrollTo(0, 0); } });
    const acts = make("div", { className: "acts" }, go("search with this image", { sample, text: "", picture: null }));
    if (captions.length) acts.append(go("search with its caption", { text: captions[0], sample: null, picture: null }));
    const near = make("div", { className: "wide columns" }), fits = make("div", { className: "wide columns" });
    dialog.replaceChildren(close, make("div", { className: "detail" }, ((image) => (image.className = "large", image.loading = "eager", image))(picture(sample, 1024, captions[0] || "")),
      make("div", {}, make("h2", { dir: "auto", textContent: captions[0] || "(no caption)" }),
        ...(captions.length > 1 ? [make("ul", { className: "others" }, ...captions.slice(1).map(text => make("li", { dir: "auto", textContent: text })))] : []),
        acts, facts), fits, near));
    dialog.dataset.sample = sample;
    if (!dialog.open) dialog.showModal();
    dialog.scrollTop = 0;
    const current = () => dialog.open && dialog.dataset.sample === String(sample);
    const neighbours = await Promise.all(models.map((_, model) => call(`/api/search?model=${model}&sample=${sample}&count=13`, "")));
    if (!current()) return;
    near.classList.toggle("two", neighbours.length > 1);
    near.replaceChildren(...neighbours.map((model, which) => make("div", {},
      make("h3", { textContent: "Nearest images" + (neighbours.length > 1 ? `, ${models[which].name}` : "") }),
      make("div", { className: "hits" }, ...model.results.filter(hit => hit.sample !== sample).slice(0, 12).map(hit => card(hit))))));
    const named = await namedBy({ sample }, "");
    if (current()) fits.replaceChildren(...named);
  } catch (error) { dialog.close(); fail(error); }
}
function siblings(element) {
  const found = [...(element.closest(".hits, .lines") || element).querySelectorAll("[data-sample]")];
  return found.map(one => Number(one.dataset.sample));
}
document.addEventListener("click", event => {
  const hit = event.target.closest("[data-sample]:not(dialog)");
  if (hit) open(Number(hit.dataset.sample), siblings(hit));
  else if (event.target === $("detail")) $("detail").close();
});
for (const [kind, on] of [["mouseover", true], ["mouseout", false]]) {
  $("results").addEventListener(kind, event => {
    const hit = event.target.closest(".hit");
    if (hit && models.length > 1) for (const other of $("results").querySelectorAll(`.hit[data-sample="${hit.dataset.sample}"]`)) other.classList.toggle("same", on);
  });
}

// keys
const DIRECTIONS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };
document.addEventListener("keydown", event => {
  const typing = event.target.matches("input, textarea, select"), dialog = $("detail");
  if (event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "/" && !typing && !dialog.open) { event.preventDefault(); $("words").focus(); $("words").select(); return; }
  if (event.key === "Escape" && event.target === $("words")) { event.preventDefault(); ask({ text: "", sample: null, picture: null }); return; }
  const way = DIRECTIONS[event.key];
  if (!way) return;
  if (dialog.open && !event.target.closest(".hit")) {
    const next = around[around.indexOf(Number(dialog.dataset.sample)) + way[0]];
    if (way[0] && next !== undefined) { event.preventDefault(); open(next, around); }
    return;
  }
  if (typing && !(event.key === "ArrowDown" && event.target === $("words"))) return;
  const from = event.target.closest("[data-sample]"), next = from ? neighbour(from, way) : $("results").querySelector("[data-sample]");
  if (next) { event.preventDefault(); next.focus(); next.scrollIntoView({ block: "nearest" }); }
  else if (from && event.key === "ArrowUp" && !dialog.open) $("words").focus();
});
function neighbour(from, [right, down]) {
  const box = from.getBoundingClientRect(), x = box.left + box.width / 2, y = box.top + box.height / 2;
  let best = null, least = Infinity;
  for (const other of (from.closest("dialog") || $("results")).querySelectorAll("[data-sample]")) {
    const its = other.getBoundingClientRect(), dx = its.left + its.width / 2 - x, dy = its.top + its.height / 2 - y;
    const along = right ? dx * right : dy * down, across = Math.abs(right ? dy : dx);
    if (other === from || along <= 4 || (right && across > box.height / 2)) continue;
    const far = along + 3 * across;
    if (far < least) { least = far; best = other; }
  }
  return best;
}

// words, images, filters
$("words").addEventListener("input", () => {
  later("words", 120, () => ask({ text: $("words").value.trim(), sample: null, picture: null }, false));
});
$("ask").addEventListener("submit", event => { event.preventDefault(); clearTimeout(timers.words); ask(asked.sample === null && !asked.picture ? { text: $("words").value.trim() } : {}); });
$("clear").onclick = () => { ask({ text: "", sample: null, picture: null }); $("words").focus(); };
$("more").onclick = () => { count = Math.min(MOST, count + STEP); search(); };
$("choose").onkeydown = event => { if (event.key === "Enter" || event.key === " ") { event.preventDefault(); $("file").click(); } };
$("file").onchange = () => { take($("file").files[0]); $("file").value = ""; };
for (const id of ["labels", "template"]) {
  $(id).addEventListener("input", () => later("labels", 250, () => name().catch(fail)));
}
function take(blob) {
  if (!blob) return;
  if (last) URL.revokeObjectURL(last.url);
  last = { blob, url: URL.createObjectURL(blob) };
  ask({ picture: last, text: "", sample: null });
}
document.addEventListener("paste", event => {
  const file = [...event.clipboardData.files].find(one => one.type.startsWith("image/"));
  if (file) { event.preventDefault(); take(file); }
});
document.addEventListener("dragstart", event => {
  const hit = event.target.closest("[data-sample]");
  if (hit) event.dataTransfer.setData("application/x-sample", hit.dataset.sample);
});
document.addEventListener("dragover", event => { event.preventDefault(); $("veil").hidden = false; });
document.addEventListener("dragleave", event => { if (!event.relatedTarget) $("veil").hidden = true; });
document.addEventListener("drop", event => {
  event.preventDefault();
  $("veil").hidden = true;
  const sample = event.dataTransfer.getData("application/x-sample"), file = event.dataTransfer.files[0];
  if (sample) ask({ sample: Number(sample), text: "", picture: null });
  else if (file) take(file);
  else say("not an image file: save it first, or copy and paste it", true);
});
function drawFilters() {
  const rows = [...asked.filters, ["", ""]];
  if (!data.fields.length) return;
  $("filters").replaceChildren(...rows.map(([field, value], place) => filter(field, value, place)));
}
function filter(field, value, place) {
  const select = make("select", { ariaLabel: "field to filter by" }, make("option", { value: "", textContent: "filter by …" }),
    ...data.fields.map(name => make("option", { value: name, textContent: name })));
  select.value = field;
  const row = make("span", { className: "filter" }, select);
  select.onchange = () => {
    const filters = [...asked.filters];
    if (select.value) filters[place] = [select.value, ""]; else filters.splice(place, 1);
    asked.filters = filters;
    drawFilters();
    if (select.value) $("filters").children[place].querySelector("input").focus();
    if (value.trim()) ask({});
  };
  if (!field) return row;
  const list = make("datalist", { id: `values-${place}` });
  const input = make("input", { value, placeholder: "value, part* or >= 0.5", ariaLabel: `value of ${field}`, autocomplete: "off", spellcheck: false, maxLength: 500 });
  input.setAttribute("list", list.id);
  const proposed = () => call(`/api/field?name=${encodeURIComponent(field)}`).then(found =>
    list.replaceChildren(...found.map(([text, times]) => make("option", { value: text, label: `${text} (${number(times)})` }))), fail);
  input.addEventListener("focus", proposed, { once: true });
  input.addEventListener("input", () => {
    later("filters", 200, () => ask({ filters: asked.filters.map((one, other) => other === place ? [field, input.value] : one) }, false));
  });
  const remove = make("button", { type: "button", textContent: "×", title: "remove this filter", ariaLabel: "remove this filter", onclick: () => {
    asked.filters = asked.filters.filter((_, other) => other !== place);
    drawFilters();
    ask({});
  } });
  row.append(input, list, remove);
  return row;
}

$("theme").onclick = () => { root.dataset.theme = (root.dataset.theme || (dark.matches ? "dark" : "light")) === "dark" ? "light" : "dark"; };
addEventListener("popstate", recall);
call("/api/about").then(found => {
  models.push(...found.models);
  data = found.data;
  const name = data.name.replace(/\/+$/, "").split("/").slice(-2).join("/");
  document.title = `${name}: search`;
  $("title").textContent = name;
  $("lead").textContent = `${number(data.samples)} images · ${models.map(model => model.name).join(" against ")}`;
  recall();
}).catch(fail);
