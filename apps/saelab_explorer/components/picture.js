// Saves markup as a PNG. It becomes an SVG image, in which nothing runs and nothing is fetched, and then a canvas.

const SCALE = 2;
const NOT_XML = /[^\u0009\u000A\u000D\u0020-\uD7FF\uE000-\uFFFD\u{10000}-\u{10FFFF}]/gu;

function height(markup, width) {
  const frame = document.createElement("iframe");
  frame.setAttribute("sandbox", "allow-same-origin"); // to be measured; without allow-scripts nothing runs in it
  frame.style.cssText = `position: fixed; left: -10000px; width: ${width}px; height: 10px; border: 0;`;
  document.body.append(frame);
  frame.contentDocument.body.innerHTML = markup;
  frame.contentDocument.body.style.margin = "0";
  const tall = frame.contentDocument.body.scrollHeight;
  frame.remove();
  return tall;
}

async function png(markup, width) {
  const tall = height(markup, width);
  const page = new DOMParser().parseFromString(markup, "text/html");
  const inner = document.createElementNS("http://www.w3.org/1999/xhtml", "div");
  inner.append(...page.head.childNodes, ...page.body.childNodes);
  const xml = new XMLSerializer().serializeToString(inner).replace(NOT_XML, "\uFFFD");
  const svg = `<svg xmlns="http://www.w3.org/2000/svg" style="color-scheme: light" width="${width}" height="${tall}">`
    + `<foreignObject width="100%" height="100%">${xml}</foreignObject></svg>`;
  const image = new Image();
  image.src = `data:image/svg+xml;charset=utf-8,${encodeURIComponent(svg)}`;
  await image.decode();
  const canvas = document.createElement("canvas");
  canvas.width = width * SCALE;
  canvas.height = tall * SCALE;
  canvas.getContext("2d").drawImage(image, 0, 0, canvas.width, canvas.height);
  return new Promise((done, failed) => canvas.toBlob((blob) => (blob ? done(blob) : failed(new Error("empty"))), "image/png"));
}

export default function ({ data, parentElement }) {
  const button = parentElement.querySelector("button"), told = parentElement.querySelector("span");
  button.textContent = data.label;
  button.onclick = async () => {
    told.textContent = "Drawing…";
    try {
      const link = document.createElement("a");
      link.href = URL.createObjectURL(await png(data.markup, data.width));
      link.download = data.file;
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 10000);
      told.textContent = "Saved";
    } catch (error) {
      told.textContent = `This browser cannot draw it (${error.message}); save it as HTML instead.`;
    }
  };
}
