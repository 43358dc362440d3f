const content = JSON.parse(document.getElementById("content").textContent);
const { columns, rows, flags } = content;
const at = Object.fromEntries(columns.map((column, place) => [column.name, place]));
const value = (row, name) => row.c[at[name]];
const escape = (text) => String(text).replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);
for (const row of rows) for (const [place, column] of columns.entries())
  if (row.c[place] === "inf") row.c[place] = column.kind === "radius" ? Infinity : null;

// --- what all rows say stands above the table, not in it
const hidden = new Set();
const same = [];
for (const [place, column] of columns.entries()) {
  const found = new Set(rows.filter((row) => !(row.failed && column.name === "n")).map((row) => String(row.c[place] ?? "")));
  // Of robust a cell shows more than its value: unreliable, failed.
  if (column.kind === "flags" || column.name === "robust" || found.size > 1 || !rows.length) continue;
  const only = [...found][0];
  if (!["share", "number"].includes(column.kind) || only === "") hidden.add(place);
  if (hidden.has(place) && only !== "") same.push(`${column.name} ${only}`);
}
document.getElementById("same").textContent = same.length ? `In every row: ${same.join(", ")}.` : "";

// --- the table
const short = (number) => (Math.abs(number) >= 1000 || (number !== 0 && Math.abs(number) < 0.001) ? number.toExponential(1) : String(+number.toPrecision(3)));
const percent = (number) => (number === null ? "–" : number.toFixed(1));
const chip = (flag) => `<span class="flag" tabindex="0" data-tip="${escape(flags[flag] ?? "")}">${escape(flag)}</span>`;
const accuracies = ["clean bare", "clean", "robust"];
const between = (row, name) => {
  const [low, high] = name === "robust" ? [row.low, row.high] : wilson(value(row, name), value(row, "n"));
  return `[${percent(low)}, ${percent(high)}]`;
};
const figure = (row, name) => name === "robust" && row.unreliable.length ? "unreliable" : value(row, name) === null ? "–" : `${percent(value(row, name))} ${between(row, name)}`;

function shown(row, column, place) {
  const cell = row.c[place];
  if (column.kind === "flags") return row.c[place].map(chip).join("") + (row.why ? `<span data-tip="${escape(row.why)}" tabindex="0">${escape(row.why.length > 70 ? `${row.why.slice(0, 69)}…` : row.why)}</span>` : "");
  if (column.kind === "radius") return escape(row.eps);
  if (column.name === "robust" && row.failed) return `<span tabindex="0" data-tip="${escape(row.why)}">failed</span>`;
  if (column.name === "robust" && row.unreliable.length) return `<span class="unreliable" tabindex="0" data-tip="${escape(row.unreliable.map((flag) => `${flag}: ${flags[flag] ?? ""}`).join(" "))}">unreliable</span>`;
  if (cell === null) return "–";
  if (accuracies.includes(column.name)) return `${percent(cell)} <span class="interval">${between(row, column.name)}</span>`;
  if (column.kind === "share") return percent(cell);
  if (column.name === "gap") return cell.toFixed(1);
  return column.kind === "number" ? short(cell) : escape(cell);
}

const numeric = (kind) => !["word", "flags"].includes(kind);
const table = new DataTable("#cells", {
  data: rows,
  columns: columns.map((column, place) => ({
    title: `<span data-tip="${escape(column.help)}">${escape(column.name)}</span>`,
    visible: !hidden.has(place),
    className: numeric(column.kind) ? "dt-right" : ["variant", "flags"].includes(column.name) ? "dt-left wrap" : "dt-left",
    type: numeric(column.kind) ? "num" : "string",
    data: null,
    render: (_, kind, row) => {
      if (kind === "display") return shown(row, column, place);
      if (column.kind === "flags") return [...row.c[place], row.why].join(" ");
      if (kind === "filter" && column.name === "robust" && row.unreliable.length) return "unreliable";
      if (kind === "filter") return column.kind === "radius" ? row.eps : row.c[place] ?? "";
      return row.c[place] ?? (numeric(column.kind) ? -Infinity : "");
    },
  })),
  order: [],
  deferRender: true,
  autoWidth: false,
  pageLength: 25,
  lengthMenu: [10, 25, 100, 500],
  layout: { topStart: "info", topEnd: "search", bottomStart: "pageLength", bottomEnd: "paging" },
  language: { search: "Search", info: "_TOTAL_ rows, showing _START_ to _END_", infoFiltered: "of _MAX_", infoEmpty: "no row", lengthMenu: "_MENU_ a page" },
  createdRow: (element, row) => {
    element.dataset.key = row.key;
    element.classList.toggle("worst", value(row, "attack") === content.worst);
    element.classList.toggle("failed", row.failed);
  },
});

// --- a filter below each head: choices for words and radii, a comparison for numbers, a part of the text for the rest
const chosen = new Map();
function condition(place, column, text) {
  if (text === "") return null;
  if (["word", "radius"].includes(column.kind) && column.name !== "variant")
    return (row) => (column.kind === "radius" ? row.eps : String(row.c[place])) === text;
  if (!numeric(column.kind)) return (row) => [row.c[place], row.why].flat().join(" ").toLowerCase().includes(text.toLowerCase());
  const range = text.match(/^\s*(-?[\d.]+)\s*\.\.\s*(-?[\d.]+)\s*$/);
  if (range) return (row) => row.c[place] !== null && row.c[place] >= +range[1] && row.c[place] <= +range[2];
  const [, sign, number] = text.match(/^\s*(<=|>=|<|>|=)?\s*(-?[\d.]+)\s*$/) ?? [];
  if (number === undefined) return null;
  const compare = { "<": (a, b) => a < b, "<=": (a, b) => a <= b, ">": (a, b) => a > b, ">=": (a, b) => a >= b };
  return (row) => row.c[place] !== null && (compare[sign] ?? ((a, b) => Math.abs(a - b) < 0.05))(row.c[place], +number);
}
table.search.fixed("columns", (_, row) => [...chosen.values()].every((holds) => holds(row)));

const filters = document.createElement("tr");
filters.className = "filters";
for (const [place, column] of columns.entries()) {
  if (hidden.has(place)) continue;
  const head = document.createElement("th");
  const choice = ["word", "radius"].includes(column.kind) && column.name !== "variant";
  const field = document.createElement(choice ? "select" : "input");
  field.setAttribute("aria-label", `filter ${column.name}`);
  field.dataset.column = column.name;
  if (choice) {
    const ordered = column.kind === "radius" ? [...rows].sort((a, b) => a.c[place] - b.c[place]) : rows;
    const names = [...new Set(ordered.map((row) => (column.kind === "radius" ? row.eps : String(row.c[place]))))];
    if (column.kind === "word") names.sort();
    field.append(new Option("all", ""), ...names.map((name) => new Option(name === "" ? "(none)" : name, name)));
  } else field.placeholder = numeric(column.kind) ? "> = .." : "contains";
  field.addEventListener(choice ? "change" : "input", () => {
    const holds = condition(place, column, field.value);
    if (holds) chosen.set(place, holds);
    else chosen.delete(place);
    table.draw();
  });
  head.append(field);
  filters.append(head);
}
table.table().header().append(filters);

// --- a row opens: its command, its keys, its flags
const copyable = (label, text) => `<div class="copy"><code>${escape(text)}</code><button type="button" data-copy="${escape(text)}">copy ${label}</button></div>`;
function detail(row) {
  const keys = { record: row.key, ...row.stages };
  const words = row.c[at.flags].map((flag) => `<dt>${escape(flag)}</dt><dd>${escape(flags[flag] ?? "")}</dd>`).join("");
  return `<div class="detail">${row.command ? copyable("command", row.command) : ""}` +
    copyable("keys", Object.entries(keys).map(([kind, key]) => `${kind} ${key}`).join("\n")) +
    (row.why ? `<p>${escape(row.why)}</p>` : "") + (words ? `<dl>${words}</dl>` : "") + "</div>";
}
document.querySelector("#cells tbody").addEventListener("click", (event) => {
  const element = event.target.closest("tr[data-key]");
  if (!element) return;
  const row = table.row(element);
  if (row.child.isShown()) row.child.hide();
  else row.child(detail(row.data())).show();
});
document.addEventListener("click", async (event) => {
  const button = event.target.closest("button[data-copy]");
  if (!button) return;
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(button.dataset.copy);
    button.textContent = "copied";
  } catch { // a page opened from disk may not write to the clipboard: the text is selected for the user instead
    getSelection().selectAllChildren(button.previousElementSibling);
    button.textContent = document.execCommand("copy") ? "copied" : "selected, press Ctrl-C";
  }
  setTimeout(() => (button.textContent = label), 1500);
});

// --- hover
const tip = document.getElementById("tip");
let told = null;
function place() {
  const box = told.getBoundingClientRect();
  const left = Math.max(6, Math.min(box.left, innerWidth - tip.offsetWidth - 6));
  const below = box.bottom + 6 + tip.offsetHeight < innerHeight;
  tip.style.left = `${left}px`;
  tip.style.top = `${below ? box.bottom + 6 : Math.max(6, box.top - tip.offsetHeight - 6)}px`;
}
function say(event) {
  told = event.target.closest?.("[data-tip]");
  tip.hidden = !told?.dataset.tip;
  if (tip.hidden) return;
  tip.textContent = told.dataset.tip;
  place();
}
for (const kind of ["mouseover", "focusin"]) document.addEventListener(kind, say);
document.addEventListener("focusout", () => (tip.hidden = true));
addEventListener("scroll", () => tip.hidden || place(), true);

// --- the charts show what the table's filters leave
const charts = {};
async function show(name, cells, signals = {}) {
  if (!charts[name]) { // made with its first rows: a logarithmic axis cannot start from none
    const options = { mode: "vega-lite", renderer: "canvas", actions: { export: true, source: false, compiled: false, editor: false } };
    charts[name] = (await vegaEmbed(`#${name}`, { ...content.charts[name], datasets: { cells } }, options)).view;
  } else charts[name].data("cells", cells);
  for (const [signal, setting] of Object.entries(signals)) charts[name].signal(signal, setting);
  await charts[name].resize().runAsync();
}

function wilson(share, n) { // 95 %; of the clean accuracy, whose interval no record holds
  const z = 1.959964, p = share / 100;
  const middle = (p + (z * z) / (2 * n)) / (1 + (z * z) / n);
  const half = (z * Math.sqrt((p * (1 - p)) / n + (z * z) / (4 * n * n))) / (1 + (z * z) / n);
  return [100 * Math.max(0, middle - half), 100 * Math.min(1, middle + half)];
}
const settingOf = (row) => ["dataset", "classifier", "attack", "norm"].map((name) => value(row, name)).join(" · ") + (value(row, "aim") === "targeted" ? " · targeted" : "");
const several = (name) => !hidden.has(at[name]);
const named = (row) => [value(row, "defense"), value(row, "variant") && `(${value(row, "variant")})`, value(row, "access"), several("seed") && `seed ${value(row, "seed")}`].filter(Boolean).join(" ");

function lines(cells) {
  const radii = cells.map((row) => value(row, "eps")).filter((eps) => Number.isFinite(eps));
  const edge = Math.max(0, ...radii) || 1;
  const infinite = cells.some((row) => value(row, "eps") === Infinity);
  const points = [], started = new Set();
  for (const row of cells) {
    const eps = value(row, "eps"), series = named(row), path = `${series} ${row.made}`, n = value(row, "n");
    const common = { series, path, defense: value(row, "defense"), access: value(row, "access"), n };
    if (!started.has(path) && value(row, "clean") !== null) {
      started.add(path);
      const [low, high] = wilson(value(row, "clean"), n);
      points.push({ ...common, x: 0, eps: "0 (clean)", accuracy: value(row, "clean"), hollow: null, low, high, flags: "", text: figure(row, "clean") });
    }
    // An infinite eps is not joined to the line; what is unreliable leaves a gap in it.
    points.push({ ...common, path: eps === Infinity ? `${path} infinite` : path, x: eps === Infinity ? edge * 1.2 : eps, eps: row.eps, accuracy: value(row, "robust"), hollow: row.hollow, low: row.low, high: row.high, flags: value(row, "flags").join(", "), text: figure(row, "robust") });
  }
  const ticks = [0, ...new Set(radii), ...(infinite ? [edge * 1.2] : [])].sort((a, b) => a - b);
  return { points, ticks, edge: infinite ? edge : 0 };
}

const select = document.getElementById("setting");
async function drawCurves(left) {
  const settings = [...new Set(left.map(settingOf))].sort();
  const before = select.value;
  select.replaceChildren(...settings.map((name) => new Option(name, name)));
  if (settings.includes(before)) select.value = before;
  const cells = left.filter((row) => settingOf(row) === select.value);
  const { points, ticks, edge } = lines(cells);
  const norm = cells.length ? value(cells[0], "norm") : "";
  const x_title = `eps (${norm}${norm === "l0" ? ", pixels changed" : ", pixels in [0, 1]"})`;
  await show("curves", points, { edge, ticks, x_title });
  const counts = [...new Set(cells.map((row) => value(row, "n")))].join(", ");
  document.getElementById("curves-caption").textContent = cells.length ? `n = ${counts} ${content.images}; bands are 95 % Wilson intervals; eps = 0 is the clean accuracy. Threat model: ${value(cells[0], "attack")}, ${value(cells[0], "aim")}, ${norm}. ${cells.some((row) => row.unreliable.length) ? "Hollow, not joined: unreliable. " : ""}Drag to move, shift and wheel to zoom, double-click to reset.` : "No cell left by the filters.";
}

async function drawScatters(all) {
  const left = all.filter((row) => !row.unreliable.length);
  const doubtful = all.length - left.length;
  document.getElementById("left-out").textContent = doubtful ? `Left out of these charts: ${doubtful} unreliable cell${doubtful > 1 ? "s" : ""}.` : "";
  const common = (row) => ({ defense: value(row, "defense"), setting: settingOf(row), eps: row.eps, access: value(row, "access"), flags: value(row, "flags").join(", ") });
  const pairs = new Map();
  for (const row of left) {
    const key = [...["dataset", "classifier", "defense", "attack", "norm", "eps", "seed", "aim", "variant"].map((name) => value(row, name)), row.made].join("\u0000");
    pairs.set(key, { ...pairs.get(key), [value(row, "access")]: row });
  }
  const both = [...pairs.values()].filter((pair) => pair.gray_box && pair.white_box);
  await show("gray_white", both.map(({ gray_box: gray, white_box: white }) => ({
    ...common(white), gray: value(gray, "robust"), white: value(white, "robust"), gray_text: figure(gray, "robust"), white_text: figure(white, "robust"), gap: (value(gray, "robust") - value(white, "robust")).toFixed(1),
  })));
  const each = left.map((row) => ({ ...common(row), clean: value(row, "clean"), robust: value(row, "robust"), clean_text: figure(row, "clean"), robust_text: figure(row, "robust"), cost: value(row, "defense ms"), attack_ms: value(row, "attack ms"), memory: value(row, "memory MiB") }));
  await show("clean_robust", each);
  const timed = each.filter((row) => row.cost > 0);
  const sizes = timed.map((row) => row.memory).filter((memory) => memory > 0);
  const [least, most] = [Math.min(...sizes), Math.max(...sizes)];
  // By the logarithm: a small network and a search through a generator are a thousandfold apart.
  const area = (memory) => (memory > 0 ? 40 + (most > least ? (360 * Math.log(memory / least)) / Math.log(most / least) : 60) : 12);
  const unknown = sizes.length < timed.length ? " Dots: memory not recorded." : "";
  const sentence = most > least ? `The larger the mark, the more memory it takes (${short(least)} to ${short(most)} MiB, logarithmic).` : `Memory: ${short(most)} MiB.`;
  document.getElementById("cost-memory").textContent = sizes.length ? sentence + unknown : "";
  await show("cost", timed.map((row) => ({ ...row, area: sizes.length ? area(row.memory) : 55 })));
}

let waiting = 0;
function redraw() {
  clearTimeout(waiting);
  waiting = setTimeout(async () => {
    const left = table.rows({ search: "applied" }).data().toArray().filter((row) => !row.failed && (row.unreliable.length || value(row, "robust") !== null));
    await drawCurves(left);
    await drawScatters(left);
    document.body.dataset.drawn = String(left.length);
  }, 60);
}
select.addEventListener("change", redraw);
table.on("search.dt draw.dt", redraw);
redraw();
