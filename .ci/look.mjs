// Look at each page of the built site in Chromium: `node .ci/look.mjs SITE`. Needs the npm packages puppeteer and
// axe-core in NODE_PATH. Each page is opened at three widths, in light and dark colours. The exit status is 1 if a page
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
  let file = join(site, decodeURIComponent(new URL(request.url, "http://local").pathname));
  if (existsSync(file) && statSync(file).isDirectory()) file = join(file, "index.html");
  if (!existsSync(file)) return reply.writeHead(404).end();
  reply.writeHead(200, { "content-type": types[extname(file)] ?? "application/octet-stream" }).end(readFileSync(file));
});
await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
const origin = `http://127.0.0.1:${server.address().port}`;

const pages = readdirSync(site, { recursive: true }).filter((name) => name.endsWith("index.html")).sort();
const browser = await puppeteer.launch({ executablePath: process.env.CHROMIUM, args: ["--no-sandbox"] });
const faults = [];
for (const colours of ["light", "dark"]) {
  for (const width of [360, 768, 1440]) {
    const tab = await browser.newPage();
    await tab.setViewport({ width, height: 900 });
    await tab.emulateMediaFeatures([{ name: "prefers-color-scheme", value: colours }]);
    let place = "";
    tab.on("console", (line) => line.type() === "error" && faults.push(`${place}: console: ${line.text()}`));
    tab.on("pageerror", (error) => faults.push(`${place}: ${error}`));
    tab.on("request", (request) => /^https?:/.test(request.url()) && !request.url().startsWith(origin) && faults.push(`${place}: loads ${request.url()}`));
    for (const page of pages) {
      place = `${page} at ${width} px, ${colours}`;
      await tab.goto(`${origin}/${page.replace(/index\.html$/, "")}`, { waitUntil: "load" });
      const wide = await tab.evaluate(() => document.documentElement.scrollWidth - window.innerWidth);
      if (wide > 0) faults.push(`${place}: ${wide} px wider than the window`);
      // The rules depend on the colours, and hardly on the width.
      if (width === 768) continue;
      await tab.evaluate(axe);
      const { violations } = await tab.evaluate(() => globalThis.axe.run());
      for (const { id, nodes } of violations) faults.push(`${place}: axe ${id}: ${nodes.length}, such as ${nodes[0].html.slice(0, 160)}`);
    }
    await tab.close();
  }
}
await browser.close();
server.close();
console.log(faults.join("\n"));
console.log(`${pages.length} pages, ${faults.length} faults`);
process.exit(faults.length ? 1 : 0);
