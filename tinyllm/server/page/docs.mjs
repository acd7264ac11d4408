// The page at /docs: what /openapi.json says, as tables, and a box to try each endpoint.

import { h } from "./dom.mjs";
import { key } from "./api.mjs";

/** What a schema names: the shape behind a reference. */
export function resolve(schema, api) {
  const name = schema?.$ref?.split("/").at(-1);
  return name ? api.components.schemas[name] : schema ?? {};
}

/** A schema's type in a few words. */
export function typeOf(schema, api) {
  if (schema.$ref) return schema.$ref.split("/").at(-1);
  if (schema.const !== undefined) return JSON.stringify(schema.const);
  if (schema.enum) return schema.enum.map((value) => JSON.stringify(value)).join(" | ");
  const several = schema.anyOf ?? schema.oneOf;
  if (several) return [...new Set(several.map((one) => typeOf(one, api)))].join(" | ");
  if (schema.type === "array") return `list of ${schema.items ? typeOf(schema.items, api) : "any"}`;
  if (schema.type === "object" && typeof schema.additionalProperties === "object")
    return `object of ${typeOf(schema.additionalProperties, api)}`;
  return schema.type ?? "any";
}

/** The fields of an object: name, type, whether it must be there. */
export function fieldsOf(schema, api) {
  const shape = resolve(schema, api);
  const required = new Set(shape.required ?? []);
  return Object.entries(shape.properties ?? {}).map(([name, field]) => ({
    name,
    type: typeOf(field, api),
    required: required.has(name),
  }));
}

/** The shapes that a schema refers to, itself first, each once. */
export function shapesOf(schema, api, seen = new Map()) {
  const name = schema?.$ref?.split("/").at(-1);
  if (name) {
    if (seen.has(name)) return seen;
    seen.set(name, api.components.schemas[name]);
    schema = api.components.schemas[name];
  }
  for (const part of Object.values(schema ?? {})) if (part && typeof part === "object") shapesOf(part, api, seen);
  return seen;
}

/** All endpoints: {path, method, told}. */
export function endpoints(api) {
  return Object.entries(api.paths).flatMap(([path, methods]) =>
    Object.entries(methods).map(([method, told]) => ({ path, method: method.toUpperCase(), told })),
  );
}

function table(schema, api) {
  const fields = fieldsOf(schema, api);
  if (!fields.length) return h("p", {}, h("code", {}, typeOf(schema, api)));
  const rows = fields.map(({ name, type, required }) =>
    h("tr", {}, h("td", {}, h("code", {}, name)), h("td", {}, type), h("td", {}, required ? "required" : "")),
  );
  return h("table", {}, h("tbody", {}, rows));
}

function shapes(title, schema, api) {
  const [first, ...others] = [...shapesOf(schema, api).values()];
  if (!first) return h("div", {}, h("h3", {}, title), table(schema, api));
  const parts = others.map((shape) =>
    h("div", {}, h("h3", {}, shape.title), shape.description ? h("p", { class: "hint" }, shape.description) : null, table(shape, api)),
  );
  return h(
    "details",
    {},
    h("summary", {}, title),
    h("p", { class: "hint" }, first.description ?? ""),
    table(first, api),
    parts,
  );
}

function tryBox({ path, method }, body) {
  const answer = h("pre", { class: "answer", hidden: true, tabindex: "0", "aria-label": "Answer" });
  const given = body
    ? h("textarea", { rows: "6", spellcheck: "false", "aria-label": `Body of ${path}` }, JSON.stringify(body.example ?? {}, null, 2))
    : null;
  const send = async () => {
    const headers = key.get() ? { Authorization: `Bearer ${key.get()}` } : {};
    if (given) headers["Content-Type"] = "application/json";
    answer.hidden = false;
    answer.textContent = "…";
    try {
      const found = await fetch(path, { method, headers, body: given?.value });
      const text = await found.text();
      let shown = text;
      if (found.headers.get("Content-Type")?.startsWith("application/json")) shown = JSON.stringify(JSON.parse(text), null, 2);
      answer.textContent = `${found.status}\n${shown}`;
    } catch (error) {
      answer.textContent = String(error);
    }
  };
  return h("details", {}, h("summary", {}, "Try it"), given, h("button", { type: "button", class: "plain-button", onclick: send }, "Send"), answer);
}

function section(endpoint, api) {
  const { path, method, told } = endpoint;
  const id = `${method}-${path}`;
  const body = told.requestBody?.content["application/json"];
  const found = told.responses["200"].content;
  const types = Object.keys(found);
  return h(
    "section",
    { "aria-labelledby": id },
    h("h2", { id }, h("span", { class: "method" }, method), ` ${path}`),
    h("p", {}, told.description ?? ""),
    body ? shapes("Fields of the request", body.schema, api) : null,
    shapes(`Answer (${types.join(", or a stream as ")})`, found[types[0]].schema, api),
    path.includes("{") ? null : tryBox(endpoint, body),
  );
}

async function start() {
  const field = document.getElementById("key");
  field.value = key.get();
  field.addEventListener("input", () => key.set(field.value));
  const api = await (await fetch("/openapi.json")).json();
  const all = endpoints(api);
  const links = all.map(({ path, method }) => h("li", {}, h("a", { href: `#${method}-${path}` }, `${method} ${path}`)));
  document.getElementById("list").append(...links);
  document.getElementById("endpoints").append(...all.map((endpoint) => section(endpoint, api)));
}

if (typeof document !== "undefined") start();
