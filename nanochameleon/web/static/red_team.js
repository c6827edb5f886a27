/** Red teaming: each answer gets a label, and the panel logs the whole conversation.
 *
 *  What is labelled or written and not logged yet is kept in this tab over a reload; leaving asks first. A conversation
 *  has one id however often it is sent, so a lost answer of the server doubles nothing.
 */

import { getJson, postJson } from "./net.js";
import { labelView } from "./red_team_labels.js";
import { panelView } from "./red_team_panel.js";

const KEY = "nanochameleon-red-team";

export function redTeam(page, element) {
  const states = new WeakMap(); // answer -> {label, refused, isLogged}
  const sent = new WeakMap(); // first answer -> {id, content}: what was sent under which id
  const views = new WeakMap(); // element of a turn -> show
  const panel = panelView(element, { log, changed: keep });
  let kept = restored();
  let isBusy = false;
  let open = 0; // labels of the conversation that are not logged

  const turns = () => page.turns().map((turn, i) => ({ turn, i, answer: page.answer(i) }));
  const answers = () => turns().filter(({ answer }) => answer);
  const labelled = () => answers().filter(({ answer }) => states.get(answer)?.label);
  const unlogged = () => labelled().filter(({ answer }) => !states.get(answer).isLogged);

  /** Show the labels of all answers that are there. */
  function update() {
    if (isBusy) return;
    takeKept();
    if (open && !answers().length) panel.say("The labels of the conversation before are not logged: Undo brings them back.");
    for (const { i, answer } of answers()) {
      const turnElement = page.turnElement(i);
      if (!views.has(turnElement)) views.set(turnElement, labelView(turnElement, (given) => change(turnElement, given)));
      views.get(turnElement)(states.get(answer) ?? {});
    }
    keep();
  }

  function change(turnElement, given) {
    const { answer } = answers().find(({ i }) => page.turnElement(i) === turnElement) ?? {};
    if (!answer || isBusy) return;
    states.set(answer, { ...states.get(answer), ...given, isLogged: false });
    panel.say("");
    update();
  }

  /** Keep what is not logged, and say how much is labelled. */
  function keep() {
    const [all, done] = [answers(), labelled()];
    open = unlogged().length;
    panel.show(`${done.length} of ${all.length} ${all.length === 1 ? "answer" : "answers"} labelled`, all.length > 0 && !isBusy);
    const labels = all.map(({ turn, answer }) => [JSON.stringify(turn), states.get(answer) ?? {}]);
    const content = { values: panel.values(), labels, sent: sent.get(all[0]?.answer) };
    if (!isBusy && !kept) store(content);
  }

  /** Give the answers of before a reload their labels: the page has just shown them again. */
  function takeKept() {
    if (!kept) return;
    const { labels, sent: before } = kept;
    kept = null;
    answers().forEach(({ turn, answer }, n) => {
      if (labels[n]?.[0] === JSON.stringify(turn)) states.set(answer, labels[n][1]);
    });
    const [first] = answers();
    if (first && before) sent.set(first.answer, before);
  }

  /** The id of the conversation as it is; another content has another id. */
  function idOf(content) {
    const [{ answer: first }] = answers();
    if (sent.get(first)?.content !== content) sent.set(first, { id: newId(), content });
    return sent.get(first).id;
  }

  async function log() {
    const all = turns();
    const body = { id: idOf(JSON.stringify(page.turns())), ...panel.values(), turns: all.map(detailed), labels: labels() };
    keep();
    try {
      const n = await send(body);
      for (const { answer } of answers()) states.set(answer, { ...states.get(answer), isLogged: true });
      keep();
      panel.fill({ notes: "" });
      document.getElementById("new").click(); // has a way back, by which labels can still be changed
      panel.say(`Logged. The log has ${n.toLocaleString("en")} ${n === 1 ? "conversation" : "conversations"}.`);
      panel.suggest(await used());
    } catch (error) {
      panel.fail(error.message);
      if (!("status" in error)) throw error;
    }
  }

  /** Log a conversation, or where it is logged already its labels; -> how many the log has. */
  async function send(body) {
    try {
      return (await postJson("/api/red-team", body)).conversations;
    } catch (error) {
      if (error.status !== 409) throw error;
    }
    for (const [turn, label] of Object.entries(body.labels)) {
      await postJson("/api/red-team/labels", { id: body.id, annotator: body.attacker, turn: Number(turn), label });
    }
    return (await getJson("/api/red-team")).conversations;
  }

  const labels = () => Object.fromEntries(labelled().map(({ i, answer }) => [i + 1, states.get(answer).label]));

  /** A turn as the log takes it. Who has labelled an answer has also said whether it refused. */
  function detailed({ turn, answer }) {
    if (!answer) return turn;
    const { label, refused } = states.get(answer) ?? {};
    const { seed, sample, mode, asked } = answer;
    return { ...turn, seed, sample, mode: mode ?? asked.mode, options: asked.options, refused: refused ?? (label ? false : null) };
  }

  page.on("turns", update);
  page.on("busy", () => {
    isBusy = true;
    keep();
  });
  page.on("idle", () => {
    isBusy = false;
    update();
  });
  addEventListener("beforeunload", (event) => open && event.preventDefault());
  panel.fill(kept?.values ?? {});
  used().then(panel.suggest, (error) => panel.fail(error.message));
}

/** Categories and strategies of the log so far. */
async function used() {
  const { categories, strategies } = await getJson("/api/red-team");
  return { category: categories, strategy: strategies };
}

function store(content) {
  try {
    sessionStorage.setItem(KEY, JSON.stringify(content));
  } catch {
    // no room, as the page says of the conversation itself
  }
}

function restored() {
  return { labels: [], values: {}, ...JSON.parse(sessionStorage.getItem(KEY)) };
}

/** A random UUID. crypto.randomUUID is missing where a page comes from another machine by http. */
function newId() {
  const bytes = crypto.getRandomValues(new Uint8Array(16));
  bytes[6] = (bytes[6] & 0x0f) | 0x40; // version 4
  bytes[8] = (bytes[8] & 0x3f) | 0x80; // the usual variant
  const hex = Array.from(bytes, (byte) => byte.toString(16).padStart(2, "0")).join("");
  return [hex.slice(0, 8), hex.slice(8, 12), hex.slice(12, 16), hex.slice(16, 20), hex.slice(20)].join("-");
}
