// Look at each page of the built site in Chromium: `node .ci/look.mjs SITE`. Needs the npm packages puppeteer and
// axe-core in NODE_PATH. Each page is shown at three widths, in light and dark colours. The exit status is 1 if a page
// is wider than the window, writes an error to the console, loads from another host or violates a rule of axe.
import { createServer } from "node:http";
import { createRequire } from "node:module";
import { existsSync, readdirSync, readFileSync, statSync } from "node:fs";
import { extname, join } from "node:path";

const require = createRequire(join(process.env.NODE_PATH, "_"));
const puppeteer = require("puppeteer");
const axe = readFileSync(require.resolve("axe-core/axe.min.js"), "utf8");

const site = process.argv[2];
const types = { ".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml", ".json": "application/json" };
const server = createServer((request, reply) => {
  const path = decodeURIComponent(new URL(request.url, "http://local").pathname);
  if (path === "/versions.json") return reply.end('[{"version": "now", "title": "now", "aliases": ["latest"]}]');
  let file = join(site, path.replace(/^\/now\//, ""));
  if (existsSync(file) && statSync(file).isDirectory()) file = join(file, "index.html");
  if (!existsSync(file)) return reply.writeHead(404).end();
  reply.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const origin = `http://127.0.0.1:${server.address().port}`;

const pages = readdirSync(site, { recursive: true }).filter((name) => name.endsWith("index.html")).sort();
const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
const faults = [];

// The rule about contrast takes seconds for a thousand elements. Elements with the same names and classes, up to the
// third ancestor, have the same colours, so the rule gets the first visible one of them.
function sample() {
  const first = new Map();
  for (const element of document.querySelectorAll("body *")) {
    if (![...element.childNodes].some((node) => node.nodeType === Node.TEXT_NODE && node.data.trim())) continue;
    let key = "";
    for (let each = element, depth = 0; each && depth < 4; each = each.parentElement, depth++) key += `${each.localName} ${each.className} < `;
    if (!first.has(key) && element.checkVisibility({ visibilityProperty: true, opacityProperty: true })) first.set(key, element);
  }
  return [...first.values()];
}

const CONTRAST = { runOnly: ["color-contrast"] };
const LAYOUT = { runOnly: ["scrollable-region-focusable", "target-size"], rules: { "target-size": { enabled: true } } };
const REST = { rules: { "color-contrast": { enabled: false } } };

async function violations(tab, options) {
  return await tab.evaluate(async (options, source) => {
    const where = options.runOnly?.includes("color-contrast") ? { include: new Function(`return (${source})()`)() } : document;
    const found = await globalThis.axe.run(where, { ...options, resultTypes: ["violations"], preload: false });
    return found.violations.map(({ id, nodes }) => `axe ${id}: ${nodes.length}, such as ${nodes[0].html.replace(/\s+/g, " ").slice(0, 160)}`);
  }, options, sample.toString());
}

async function look(tab, page, colours, placed) {
  await tab.goto(`${origin}/now/${page.replace(/index\.html$/, "")}`, { waitUntil: "load" });
  const shown = await tab.evaluate(() => document.body.dataset.mdColorScheme);
  if (shown !== { light: "default", dark: "slate" }[colours]) placed(`${page}, ${colours}`)(`has the colours ${shown}`);
  await tab.addStyleTag({ content: "* { transition: none !important; animation: none !important }" });
  await tab.evaluate(axe);
  for (const width of [1440, 768, 360]) {
    const fault = placed(`${page} at ${width} px, ${colours}`);
    await tab.setViewport({ width, height: 900 });
    const wide = await tab.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
    if (wide > 0) fault(`${wide} px wider than the window`);
    // Contrast depends on the colours, some rules depend on the width, and the others on neither.
    const found = width === 1440 ? await violations(tab, CONTRAST) : [];
    if (colours === "light" && width === 1440) found.push(...(await violations(tab, REST)));
    if (colours === "light" && width === 360) found.push(...(await violations(tab, LAYOUT)));
    found.forEach(fault);
  }
}

// One tab shows all pages in light colours, and the other tab in dark colours. Each tab has its own storage, because the
// theme stores the first colours that it shows, and shows them again without regard to the browser's setting.
async function worker(colours) {
  const tab = await (await browser.createBrowserContext()).newPage();
  await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: colours }, { name: "prefers-reduced-motion", value: "reduce" }]);
  let fault;
  const placed = (place) => (fault = (text) => faults.push(`${place}: ${text}`));
  tab.on("console", (line) => line.type() === "error" && fault(`console: ${line.text()}`));
  tab.on("pageerror", (error) => fault(error));
  tab.on("request", (request) => /^https?:/.test(request.url()) && !request.url().startsWith(origin) && fault(`loads ${request.url()}`));
  for (const page of pages) {
    placed(page);
    await look(tab, page, colours, placed);
  }
}
await Promise.all([worker("light"), worker("dark")]);
await browser.close();
server.close();
if (faults.length) console.log(faults.sort().join("\n"));
console.log(`${pages.length} pages, ${faults.length} faults`);
process.exit(faults.length ? 1 : 0);
