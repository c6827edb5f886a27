/** Gets answers from the server: one request, several samples, filled in as they come. */

import { events } from "./net.js";
import { isWhole } from "./conversation.js";

/** An answer that nothing has come for yet. */
export const newAnswer = (seed, sample, asked) => ({ seed, sample, asked, segments: [], state: "coming" });

/** Fill in `answers` from the server's events; `changed(answer)` after each. Sets every answer's state; never throws.
 *
 *  asked: {mode, options}.
 */
export async function generate(turns, asked, answers, codesPerImage, signal, changed) {
  const { seed } = answers[0];
  const body = { turns, mode: asked.mode, options: asked.options, seed, samples: answers.length, preview: true };
  try {
    for await (const event of events("/api/generate", body, signal)) {
      if (event.mode) answers.forEach((answer) => (answer.mode = event.mode)); // what auto became
      if (!("sample" in event)) continue;
      take(answers[event.sample], event, codesPerImage);
      changed(answers[event.sample]);
    }
    finish(answers, "failed", new Error("the answer broke off: send the message again"));
  } catch (error) {
    if (error.name === "AbortError") finish(answers, "stopped");
    else finish(answers, "failed", error);
  }
  answers.forEach(changed);
}

/** Add one event to an answer. */
function take(answer, event, codesPerImage) {
  const { segments } = answer;
  const last = segments.at(-1);
  if (event.text !== undefined) {
    if (last && "text" in last) last.text += event.text;
    else segments.push({ text: event.text });
  } else if (event.image_started) {
    segments.push({ codes: [], url: null, complete: false, total: codesPerImage });
  } else if (event.image) {
    if (!last || isWhole(last)) segments.push({});
    Object.assign(segments.at(-1), event.image, { total: codesPerImage });
  } else if (event.end) {
    Object.assign(answer, { end: event.end, state: "ended" });
  }
}

/** End the answers that have no end. isSilent: the server is gone. isRefused: the same message would fail again. */
function finish(answers, state, { message, status } = {}) {
  const how = { state, error: message, isSilent: status === 0, isRefused: [400, 413].includes(status) };
  for (const answer of answers.filter((answer) => answer.state === "coming")) Object.assign(answer, how);
}
