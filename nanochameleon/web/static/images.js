/** Asks the server what codes look like. */

import { postJson } from "./net.js";

const AT_ONCE = 16; // images that one request decodes

/** Give a url to each {codes, url} that has none, a few at a time; shown(image) after each. */
export async function decodeImages(images, shown = () => {}) {
  const missing = images.filter(({ url }) => !url);
  for (let i = 0; i < missing.length; i += AT_ONCE) {
    const part = missing.slice(i, i + AT_ONCE);
    const { urls } = await postJson("/api/images/decode", { codes: part.map(({ codes }) => codes) });
    part.forEach((image, k) => shown(Object.assign(image, { url: urls[k] })));
  }
}
