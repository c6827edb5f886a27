/** A conversation as JSON: what a file holds, and what a tab keeps over a reload.
 *
 *  {"format", "version", "model": {"name", "n_codes", "codes_per_image"}, "settings", "turns"}
 *
 *  Images are kept as codes. Everything that is read is checked; problems are Errors with a sentence.
 */

import { ASSISTANT, USER, bare, isWhole } from "./conversation.js";
import { decodeImages } from "./images.js";

const FORMAT = "nanochameleon conversation";
const VERSION = 1;
const BROKE_OFF = "the answer broke off: the page was closed or loaded again";

/** A conversation as an object for JSON. */
export function written(turns, { model }, values) {
  const { name, n_codes, codes_per_image } = model;
  return {
    format: FORMAT,
    version: VERSION,
    model: { name, n_codes, codes_per_image },
    settings: values,
    turns: turns.map(writtenTurn),
  };
}

function writtenTurn(turn) {
  if (turn.role === USER) return { role: USER, segments: turn.segments.map(bare) };
  const answers = turn.answers.map(({ seed, sample, asked, mode, segments, state, end, error, isRefused }) => {
    return { seed, sample, asked, mode, segments: segments.filter(isWhole).map(bare), state, end, error, isRefused };
  });
  return { role: ASSISTANT, answers, chosen: turn.chosen };
}

/** Return {turns, values} of what `written` made. Images have no url yet: see decodeTurns. */
export function readConversation(text, settings) {
  const content = parsed(text);
  check(content?.format === FORMAT, "this file is no conversation: choose one that this page saved");
  const { version } = content;
  check(version === VERSION, `this conversation has version ${version}; this page reads version ${VERSION}`);
  const { turns } = content;
  const [other, values] = [content.model ?? {}, content.settings ?? {}];
  check(isList(turns, settings.limits.turns), "the file has no turns, or too many: it is damaged");
  check(turns.length % 2 === 0, "the last message of the file has no answer: it is damaged");
  const { model } = settings;
  const fits = other.n_codes === model.n_codes && other.codes_per_image === model.codes_per_image;
  const about = { model, fits, name: String(other.name).slice(0, 80) };
  return {
    turns: turns.map((turn, place) => readTurn(turn, place, about)),
    draft: readSegments(content.draft ?? [], "the draft is damaged", about),
    values: typeof values === "object" ? values : {},
    isOther: other.name !== model.name,
  };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch {
    throw new Error("this file is not JSON: choose one that this page saved");
  }
}

function check(isGood, sentence) {
  if (!isGood) throw new Error(sentence);
}

const isList = (value, most) => Array.isArray(value) && value.length <= most;
const isWholeNumber = (value) => Number.isSafeInteger(value) && value >= 0;

function readTurn(turn, place, about) {
  const damaged = `turn ${place + 1} of the file is damaged`;
  check(turn?.role === (place % 2 ? ASSISTANT : USER), damaged);
  if (turn.role === USER) return { role: USER, segments: readSegments(turn.segments, damaged, about) };
  const { answers, chosen } = turn;
  check(isList(answers, 1000) && isWholeNumber(chosen) && (chosen < answers.length || !answers.length), damaged);
  return { role: ASSISTANT, answers: answers.map((answer) => readAnswer(answer, damaged, about)), chosen };
}

function readAnswer(answer, damaged, about) {
  const { seed, sample, asked, mode, state, end, error } = answer ?? {};
  check(isWholeNumber(seed) && isWholeNumber(sample), damaged);
  const options = Object.entries(asked?.options ?? {}).filter(([, value]) => Number.isFinite(value));
  const isOpen = !["ended", "stopped", "failed"].includes(state);
  return {
    seed,
    sample,
    asked: { mode: String(asked?.mode), options: Object.fromEntries(options) },
    mode: String(mode ?? asked?.mode),
    segments: readSegments(answer.segments, damaged, about),
    state: isOpen ? "failed" : state,
    error: isOpen ? BROKE_OFF : typeof error === "string" ? error : undefined,
    isRefused: typeof answer.isRefused === "boolean" ? answer.isRefused : undefined,
    end: ["prompt_tokens", "new_tokens", "seconds"].every((name) => Number.isFinite(end?.[name])) ? end : undefined,
  };
}

function readSegments(segments, damaged, { model, fits, name }) {
  check(isList(segments, 10_000), damaged);
  return segments.map((segment) => {
    if (typeof segment?.text === "string") return { text: segment.text };
    check(Array.isArray(segment?.codes), damaged);
    check(fits, `the images of this conversation are codes of another model (${name}): open it with that model`);
    const isCode = (code) => isWholeNumber(code) && code < model.n_codes;
    check(segment.codes.length === model.codes_per_image && segment.codes.every(isCode), damaged);
    return { codes: segment.codes, url: null };
  });
}

/** Ask the server what the images look like that have no url. */
export async function decodeTurns(turns, model) {
  if (!model.can_draw) return;
  const all = turns.flatMap((turn) => turn.segments ?? turn.answers.flatMap((answer) => answer.segments));
  await decodeImages(all.filter((segment) => "codes" in segment));
}
