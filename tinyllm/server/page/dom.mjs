// Elements without markup: text goes in as text, whatever it says.

/**
 * An element. Properties: `class`, `on...` for listeners, `hidden` and the like as they are, everything else (aria-*,
 * data-*, role) as an attribute; null and false leave one out.
 */
export function h(tag, properties = {}, ...kids) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else if (name === "value" || name === "checked" || name === "selected") element[name] = value;
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...kids.flat().filter((kid) => kid !== null && kid !== undefined && kid !== false));
  return element;
}

const SHAPES = {
  send: "M12 20V5m-6 6 6-6 6 6",
  stop: "M7 7h10v10H7z",
  plus: "M12 5v14M5 12h14",
  menu: "M4 7h16M4 12h16M4 17h10",
  close: "M6 6l12 12M18 6 6 18",
  sliders: "M4 8h8m4 0h4M4 16h4m4 0h8M14 8a2 2 0 1 0 4 0 2 2 0 1 0-4 0M6 16a2 2 0 1 0 4 0 2 2 0 1 0-4 0",
  heat: "M12 21c4 0 6-2.7 6-6 0-4-3-5.5-4-10-3 2-3.5 4.5-3.5 6.5C9.5 11 9 10 9 9c-2 1.7-3 3.7-3 6 0 3.3 2 6 6 6z",
  sun: "M12 8a4 4 0 1 0 0 8 4 4 0 1 0 0-8M12 3v1.5M12 19.5V21M3 12h1.5M19.5 12H21M5.6 5.6l1.1 1.1M17.3 17.3l1.1 1.1M5.6 18.4l1.1-1.1M17.3 6.7l1.1-1.1",
  moon: "M20 14.5A8.5 8.5 0 0 1 9.5 4 8.5 8.5 0 1 0 20 14.5z",
  auto: "M12 4a8 8 0 1 0 0 16 8 8 0 1 0 0-16M12 4v16M12 8l5 5M12 13l3.5 3.5M14 5.5l5 5",
  help: "M9.2 9.2a2.9 2.9 0 1 1 4.2 2.6c-.9.5-1.4 1.1-1.4 2.2M12 17.5v.01",
  copy: "M9 9h10v10H9zM15 9V5H5v10h4",
  check: "M5 12.5l4.5 4.5L19 7.5",
  edit: "M5 19l1-4L16 5l3 3L9 18zM14 7l3 3",
  again: "M19 12a7 7 0 1 1-2.1-5M17 3v4h-4",
  forward: "M5 6l6 6-6 6M13 6l6 6-6 6",
  tokens: "M4 8h6v8H4zM12 8h3v8h-3zM17 8h3v8h-3z",
  clip: "M18 11l-6.5 6.5a3.5 3.5 0 0 1-5-5L14 5a2.3 2.3 0 0 1 3.3 3.3l-7.3 7.3a1.1 1.1 0 0 1-1.6-1.6L14.5 8",
  left: "M14 7l-5 5 5 5",
  right: "M10 7l5 5-5 5",
  down: "M12 5v14m-6-6 6 6 6-6",
  bin: "M5 7h14M10 7V5h4v2M7 7l1 12h8l1-12M10.5 11v5M13.5 11v5",
  file: "M7 4h7l4 4v12H7zM14 4v4h4",
  branch: "M7 5v14M7 14c0-4 10-2 10-7M14.5 7a2.5 2.5 0 1 0 5 0 2.5 2.5 0 1 0-5 0",
};

/** A drawing that says nothing to a screen reader. */
export function icon(name) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", "0 0 24 24");
  svg.setAttribute("class", "icon");
  svg.setAttribute("aria-hidden", "true");
  const shape = document.createElementNS("http://www.w3.org/2000/svg", "path");
  shape.setAttribute("d", SHAPES[name]);
  svg.append(shape);
  return svg;
}

/** A button with a drawing, and its name for who cannot see it. */
export function iconButton(name, label, onclick, properties = {}) {
  return h("button", { type: "button", class: "icon-button", "aria-label": label, title: label, onclick, ...properties }, icon(name));
}

export const find = (selector, from = document) => from.querySelector(selector);

/** Offers a text as a file. */
export function download(name, text) {
  const url = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  h("a", { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
