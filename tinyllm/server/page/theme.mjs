// Light, dark, or as the system has it.

import { icon } from "./dom.mjs";

const NEXT = { auto: "light", light: "dark", dark: "auto" };
const DRAWN = { auto: "auto", light: "sun", dark: "moon" };

export function startTheme(button, store) {
  let theme = store.preferences().theme;
  if (!(theme in NEXT)) theme = "auto";
  const show = () => {
    document.documentElement.dataset.theme = theme;
    button.replaceChildren(icon(DRAWN[theme]));
    const label = `Theme: ${theme === "auto" ? "as the system" : theme}`;
    button.setAttribute("aria-label", label);
    button.title = label;
  };
  button.addEventListener("click", () => {
    theme = NEXT[theme];
    store.prefer({ theme });
    show();
  });
  show();
}
