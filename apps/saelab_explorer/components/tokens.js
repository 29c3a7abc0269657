// Rows of tokens coloured by activation. Every text enters through textContent, so markup inside a token stays text.

const STEPS = 5;
const visible = (text) => text.replaceAll("\n", "↵").replaceAll("\t", "⇥").replaceAll("\r", "␍");

function make(tag, className, text) {
  const element = document.createElement(tag);
  if (className) element.className = className;
  if (text !== undefined) element.textContent = text;
  return element;
}

function tokenSpan(text, act, max, broken) {
  const span = make("span", "token", visible(text));
  if (act > 0) {
    span.classList.add("on", `step${Math.min(STEPS, 1 + Math.floor((act / max) * STEPS))}`);
    // a coloured token starts with its space: kept in one box, the space is not left alone at the end of a line
    if (!(broken && text.includes("\n"))) span.classList.add("whole");
  }
  return span;
}

export default function ({ data, parentElement, setTriggerValue }) {
  const root = parentElement.querySelector(".strip");
  root.replaceChildren();
  root.className = `strip ${data.size}`;
  const max = data.max > 0 ? data.max : 1;
  const tip = make("div", "tip");

  const spans = data.rows.map((row, r) => {
    const line = make("div", "row");
    if (row.value !== null) line.append(make("div", "value", row.value));
    const text = make("div", "text");
    text.setAttribute("role", "group");
    text.setAttribute("aria-label", row.note || `text ${r + 1}`);
    const own = row.tokens.map((token, i) => {
      const span = tokenSpan(token, row.acts[i], max, data.breaks);
      span.dataset.row = r;
      span.dataset.i = i;
      if (i === row.peak) {
        span.classList.add("peak");
        span.tabIndex = 0;
        span.setAttribute("role", "button");
        span.setAttribute("aria-label", `${JSON.stringify(token)}, activation ${row.acts[i].toFixed(2)}`);
      }
      if (data.chosen && data.chosen[0] === r && data.chosen[1] === i) span.classList.add("chosen");
      text.append(span);
      if (data.breaks && token.includes("\n")) text.append(document.createElement("br"));
      return span;
    });
    // the space in front of a row's first token would look like an indent
    if (row.tokens[0]?.startsWith(" ") && !own[0].classList.contains("on")) own[0].classList.add("lead");
    if (row.note) text.append(make("span", "note", row.note));
    line.append(text);
    root.append(line);
    return own;
  });
  root.append(tip);

  const under = (event) => event.target.closest?.("span.token");
  const choose = (span) => {
    root.querySelectorAll(".chosen").forEach((other) => other.classList.remove("chosen"));
    span.classList.add("chosen");
    setTriggerValue("token", { row: Number(span.dataset.row), i: Number(span.dataset.i) });
  };
  root.onclick = (event) => {
    const span = under(event);
    if (span) choose(span);
  };
  root.onkeydown = (event) => {
    const span = under(event);
    if (!span) return;
    const r = Number(span.dataset.row), i = Number(span.dataset.i);
    if (event.key === "Enter" || event.key === " ") choose(span);
    else {
      const next = { ArrowRight: spans[r][i + 1], ArrowLeft: spans[r][i - 1],
        ArrowDown: spans[r + 1]?.[Math.max(0, data.rows[r + 1].peak)], ArrowUp: spans[r - 1]?.[Math.max(0, data.rows[r - 1].peak)] }[event.key];
      if (!next) return;
      next.tabIndex = 0;
      next.focus();
    }
    event.preventDefault();
    event.stopPropagation(); // the page's own arrow keys move to another feature
  };
  root.onmousemove = (event) => {
    const span = under(event);
    tip.style.display = span ? "block" : "none";
    if (!span) return;
    const row = data.rows[Number(span.dataset.row)], i = Number(span.dataset.i);
    const extra = row.tips ? `\n${row.tips[i]}` : "";
    tip.textContent = `${JSON.stringify(row.tokens[i])}   ${row.acts[i].toFixed(2)}   position ${row.first + i}${extra}`;
    const box = tip.getBoundingClientRect();
    tip.style.left = `${Math.max(8, Math.min(event.clientX + 14, innerWidth - box.width - 12))}px`;
    tip.style.top = `${Math.min(event.clientY + 18, innerHeight - box.height - 12)}px`;
  };
  root.onmouseleave = () => { tip.style.display = "none"; };
}
