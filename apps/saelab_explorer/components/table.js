// A table of features: real links, sortable headings, small bars and histograms. Texts enter through textContent.

const SVG = "http://www.w3.org/2000/svg";

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function spark(counts) {
  const svg = document.createElementNS(SVG, "svg");
  svg.setAttribute("viewBox", `0 0 ${counts.length} 20`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  // the logarithm keeps the few strong activations visible beside the many weak ones
  const heights = counts.map((n) => Math.log1p(n)), top = Math.max(...heights, 1e-9);
  const path = document.createElementNS(SVG, "path");
  path.setAttribute("d", heights.map((h, i) => (h ? `M${i + .08} 20V${(20 - 19 * h / top).toFixed(1)}H${i + .92}V20` : "")).join(""));
  svg.append(path);
  return svg;
}

// a token as a chip; its spaces are drawn as dots, and stay spaces for those who copy or listen
function chip(text) {
  const code = make("code");
  text.split(/( )/).forEach((part) => code.append(part === " " ? make("span", "space", " ") : part));
  return code;
}

function cell(column, value, link) {
  const td = make("td", `${column.kind} ${column.align} p${column.priority}`);
  if (value === null || value === "") return td;
  if (column.kind === "feature") td.append(link);
  else if (column.kind === "label") {
    if (!value.some(([, isToken]) => isToken)) td.classList.add("quiet");
    value.forEach(([text, isToken]) => td.append(isToken ? chip(text) : make("span", "", text), " "));
  } else if (column.kind === "tokens") value.forEach((token) => td.append(chip(token), " "));
  else if (column.kind === "spark") td.append(spark(value));
  else if (column.kind === "bar") {
    const track = make("div", "track"), fill = make("div", "fill");
    fill.style.width = `${Math.max(0, Math.min(1, value.share)) * 100}%`;
    track.append(fill);
    td.append(make("span", "number", value.text), track);
  } else td.textContent = value;
  return td;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const table = parentElement.querySelector("table");
  table.replaceChildren();
  const head = make("thead"), body = make("tbody"), titles = make("tr");
  data.columns.forEach((column) => {
    const th = make("th", `${column.kind} ${column.align} p${column.priority}`);
    th.scope = "col";
    if (column.help) th.title = column.help;
    if (column.sort) {
      const mark = data.sorted === column.sort ? " ↓" : data.sorted === `-${column.sort}` ? " ↑" : "";
      const button = make("button", mark ? "sorted" : "", column.title + mark);
      button.onclick = () => setTriggerValue("sort", mark === " ↓" ? `-${column.sort}` : column.sort);
      th.setAttribute("aria-sort", mark === " ↓" ? "descending" : mark ? "ascending" : "none");
      th.append(button);
    } else th.textContent = column.title;
    titles.append(th);
  });
  head.append(titles);

  data.rows.forEach((row) => {
    const tr = make("tr", row.feature === data.chosen ? "chosen" : "");
    const link = make("a", "", String(row.feature));
    link.href = `feature?${new URLSearchParams({ run: data.run, feature: row.feature })}`;
    const open = () => setTriggerValue("open", row.feature);
    link.onclick = (event) => {
      if (event.metaKey || event.ctrlKey || event.shiftKey) return; // the browser opens a tab of its own
      event.preventDefault();
      event.stopPropagation();
      open();
    };
    tr.onclick = data.pick ? () => setTriggerValue("pick", row.feature) : open;
    row.cells.forEach((value, i) => tr.append(cell(data.columns[i], value, link)));
    body.append(tr);
  });
  table.append(head, body);
}
