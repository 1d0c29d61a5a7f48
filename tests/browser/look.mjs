// Opens pages in Chromium, moves the mouse over everything and clicks it, and prints as JSON what each page did:
// scripts that ran, requests for anything but the page itself, dialogs, how many elements there were, its title.
//
//     node look.mjs PAGE...

import { pathToFileURL } from "node:url";

import chromium from "@sparticuz/chromium";
import puppeteer from "puppeteer-core";

chromium.setGraphicsMode = false;
const browser = await puppeteer.launch({
  args: puppeteer.defaultArgs({ args: chromium.args, headless: "shell" }),
  executablePath: await chromium.executablePath(),
  headless: "shell",
});
const results = [];
for (const path of process.argv.slice(2)) {
  const page = await browser.newPage();
  const address = pathToFileURL(path).href;
  const found = { path, ran: [], requests: [], dialogs: 0 };
  await page.exposeFunction("ran", (what) => found.ran.push(what));
  page.on("request", (request) => request.url() === address || found.requests.push(request.url().slice(0, 200)));
  page.on("dialog", (dialog) => {
    found.dialogs += 1;
    dialog.dismiss();
  });
  await page.goto(address, { waitUntil: "load" });
  Object.assign(
    found,
    await page.evaluate(async () => {
      const all = [...document.querySelectorAll("*")];
      for (const element of all) {
        for (const kind of ["mouseover", "mouseenter", "focus", "click", "load", "error", "animationend", "toggle"]) {
          element.dispatchEvent(new Event(kind, { bubbles: true }));
        }
      }
      await new Promise((resolve) => setTimeout(resolve, 500));
      return { elements: all.length, scripts: document.scripts.length, title: document.title };
    }),
  );
  results.push(found);
  await page.close();
}
await browser.close();
console.log(JSON.stringify(results));
