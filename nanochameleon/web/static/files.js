/** Keeps the conversation: as a file that is saved and opened, and in this tab over a reload. */

import { bare } from "./conversation.js";
import { make } from "./elements.js";
import { notice } from "./notices.js";
import { decodeTurns, readConversation, written } from "./saving.js";

const KEY = "nanochameleon";
const MOST = 2 ** 24; // bytes of a file

export function saveFile(turns, settings, values) {
  saveText(JSON.stringify(written(turns, settings, values)));
}

function saveText(text) {
  const href = URL.createObjectURL(new Blob([text], { type: "application/json" }));
  const date = new Date().toISOString().slice(0, 16).replace(/[-:]/g, "").replace("T", "-");
  make("a", { href, download: `conversation-${date}.json` }).click();
  setTimeout(() => URL.revokeObjectURL(href), 60_000); // the browser reads it after the click
}

/** Return {turns, values} of a file, its images decoded. Throws an Error with a sentence. */
export async function openFile(file, settings) {
  if (file.size > MOST) throw new Error(`the file ${file.name} has more than 16 MiB: a conversation is smaller`);
  const read = readConversation(await file.text(), settings);
  await decodeTurns(read.turns, settings.model);
  return read;
}

let isFull = false;

/** Keep the conversation and the draft in this tab. */
export function keep(turns, draft, settings) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify({ ...written(turns, settings, {}), draft: draft.map(bare) }));
    isFull = false;
  } catch {
    if (!isFull) notice("This browser has no room to keep the conversation over a reload: save it as a file.");
    isFull = true;
  }
}

/** Return what `keep` kept: {turns, draft}. What cannot be shown is said, and nothing is lost. */
export async function restored(settings) {
  const text = sessionStorage.getItem(KEY);
  if (!text) return { turns: [], draft: [] };
  try {
    const read = readConversation(text, settings);
    await decodeTurns([...read.turns, { segments: read.draft }], settings.model).catch(({ message }) =>
      notice(`The images are not shown: ${message}`),
    );
    return read;
  } catch (error) {
    notice(`The conversation of before is not shown: ${error.message}`, ["Save it", () => saveText(text)]);
    return { turns: [], draft: [] };
  }
}
