// Serves the built page, opens it in a real browser and keeps a picture. Prints the titles of panels without a value.
//
// node draw.mjs DASHBOARD PROMETHEUS-URL SECONDS SCRAPE-SECONDS PICTURE
import { chromium } from 'playwright-core';
import { preview } from 'vite';

const QUIET = ['background-networking', 'component-update', 'sync'].map((what) => `--disable-${what}`);

const [dashboard, prometheus, seconds, scrape, picture] = process.argv.slice(2);
const server = await preview({ preview: { host: '127.0.0.1', port: 0 }, logLevel: 'error' });
const browser = await chromium.launch({
  executablePath: '/usr/bin/chromium', args: ['--no-sandbox', '--disable-gpu', '--no-first-run', ...QUIET],
});
const page = await browser.newPage({ viewport: { width: 1544, height: 1300 } });
await page.route('**/dashboard.json', (route) => route.fulfill({ path: dashboard }));
await page.goto(`${server.resolvedUrls.local[0]}?${new URLSearchParams({ prometheus, seconds, scrape })}`);
await page.waitForSelector('body[data-state]', { timeout: 120_000, state: 'attached' });
const state = await page.getAttribute('body', 'data-state');
const empty = await page.locator('[data-empty]').evaluateAll((panels) => panels.map((panel) => panel.dataset.empty));
await page.locator('#dashboard').screenshot({ path: picture });
await browser.close();
await server.close();
if (state !== 'drawn') {
  console.error(state);
  process.exit(1);
}
empty.forEach((title) => console.log(title));
