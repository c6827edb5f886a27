/** A conversation's turns, as the page keeps them and as the server reads them.
 *
 *  user:      {role, segments}
 *  assistant: {role, answers: [answer], chosen}; the chosen answer continues the conversation
 *  answer:    {seed, sample, asked: {mode, options}, mode, segments, state, end, error, isSilent, isRefused}
 *             state: coming, ended, stopped, failed; asked holds what the user set, not the model's own values
 *  segment:   {text} or {codes, url, complete}
 */

export const USER = "user";
export const ASSISTANT = "assistant";

export const isWhole = (segment) => "text" in segment || segment.complete !== false;

export const chosen = (turn) => turn.answers[turn.chosen];

/** An answer that broke off before it had content leaves no trace in what the model reads; nor does its question. */
const isVoid = (turn) =>
  turn?.role === ASSISTANT &&
  ["stopped", "failed"].includes(chosen(turn)?.state) &&
  !chosen(turn).segments.some(isWhole);

/** The turns that the model reads, each with its place in `turns`. */
function read(turns) {
  const counted = turns.map((turn, place) => ({ turn, place, next: turns[place + 1] }));
  return counted.filter(({ turn, next }) => {
    if (turn.role === USER) return !isVoid(next);
    const answer = chosen(turn);
    return answer?.state === "ended" || Boolean(answer?.segments.some(isWhole));
  });
}

/** The places in `turns` of the turns that the model reads. */
export const placesRead = (turns) => read(turns).map(({ place }) => place);

/** Turns as the server reads them. */
export function turnsRead(turns) {
  return read(turns).map(({ turn }) => ({
    role: turn.role,
    segments: (turn.role === USER ? turn.segments : chosen(turn).segments).filter(isWhole).map(bare),
  }));
}

export const bare = (segment) => ("text" in segment ? { text: segment.text } : { codes: segment.codes });

/** The words of a turn, for descriptions of images. */
export function words(segments, most = 120) {
  const all = segments.filter((segment) => "text" in segment).map((segment) => segment.text.trim());
  const joined = all.join(" ").replace(/\s+/g, " ");
  return joined.length > most ? `${joined.slice(0, most - 1)}…` : joined;
}

/** What a screen reader says of an answer. */
export function spoken({ segments, error, state }) {
  if (state !== "ended") return error ? "" : "The answer was stopped.";
  const n = segments.filter((segment) => "codes" in segment).length;
  const images = n ? [n > 1 ? `${n} images` : "an image"] : [];
  return `The answer: ${[words(segments, 2000), ...images].filter(Boolean).join("; ") || "nothing"}`;
}

/** Tokens that the conversation takes so far, or null before the first answer. */
export function tokensUsed(turns) {
  const ends = turns.filter((turn) => turn.role === ASSISTANT).map((turn) => chosen(turn)?.end);
  const end = ends.filter(Boolean).at(-1);
  return end ? end.prompt_tokens + end.new_tokens : null;
}
