/** Notices that the server is gone, and that it is back. */

import { getJson } from "./net.js";

const GONE = "The server does not answer. If it has stopped, start it again; what you wrote is kept.";
const SECONDS = 2; // between two looks

/** Returns lost(): call it where a request got no answer. The banner says so until the server is back. */
export function serverWatch(banner, onBack) {
  let watching = false;
  return async function lost() {
    if (watching) return;
    watching = true;
    banner.textContent = GONE;
    while (!(await answers())) await new Promise((resolve) => setTimeout(resolve, SECONDS * 1000));
    watching = false;
    banner.textContent = "";
    onBack();
  };
}

async function answers() {
  try {
    await getJson("/healthz");
    return true;
  } catch {
    return false;
  }
}
