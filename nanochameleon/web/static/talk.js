/** What one can do in a conversation: send, stop, ask again, edit, remove, choose.
 *
 *  talk.turns is replaced, never changed in place, except by answers that come.
 */

import { generate, newAnswer } from "./answers.js";
import { ASSISTANT, USER, chosen, spoken, turnsRead } from "./conversation.js";
import { announce, closeNotice, notice } from "./notices.js";
import { following, toEnd } from "./scrolling.js";

const newSeed = () => Math.floor(Math.random() * 1_000_000); // short enough to be read out

/** changed(): the turns are others. emit("busy" | "idle"). lost(): the server is gone. */
export function makeTalk({ settings, composer, setting, changed, emit, lost, showAnswer }) {
  const talk = { turns: [], next: [], isBusy: false, send, stop, replace };
  talk.actions = { again, retry, edit, remove, choose };
  let controller = null;

  function replace(turns) {
    talk.turns = turns;
    changed();
  }

  /** Replace the turns, with a way back, by which undone() is called. */
  function replaceWithUndo(turns, sentence, undone = () => {}) {
    const before = talk.turns;
    replace(turns);
    notice(sentence, ["Undo", () => (replace(before), undone())]);
  }
  talk.replaceWithUndo = replaceWithUndo;

  async function send() {
    if (talk.isBusy || !(await composer.ready()) || talk.isBusy) return;
    const segments = composer.segments();
    if (!segments.length) return composer.focus();
    composer.fill(talk.next.splice(0, 1).map((text) => ({ text })));
    composer.focus();
    replace([...talk.turns, { role: USER, segments }, { role: ASSISTANT, answers: [], chosen: 0 }]);
    toEnd();
    await answer(fresh());
  }

  /** New answers, as the settings are. */
  function fresh(seed = setting.values().seed ?? newSeed()) {
    const { samples = 1 } = setting.values();
    const asked = { mode: setting.mode(), options: setting.options() };
    return Array.from({ length: samples }, (_, sample) => newAnswer(seed, sample, asked));
  }

  /** Fill new answers in at the end of the last turn, after `kept`. */
  async function answer(answers, kept = []) {
    closeNotice(); // its way back would take the turn away that the answer is for
    const turn = talk.turns.at(-1);
    const turns = turnsRead(talk.turns.slice(0, -1));
    Object.assign(turn, { answers: [...kept, ...answers], chosen: kept.length });
    controller = new AbortController();
    talk.isBusy = true;
    changed();
    emit("busy");
    const show = (answer) => following(() => showAnswer(turn, answer));
    await generate(turns, answers[0].asked, answers, settings.model.codes_per_image, controller.signal, show);
    talk.isBusy = false;
    changed();
    emit("idle");
    announce(spoken(chosen(turn)));
    if (answers.some((answer) => answer.isSilent)) lost();
  }

  function stop() {
    controller?.abort();
  }

  /** The last message once more, with another seed; the answers so far stay. */
  function again() {
    answer(fresh(newSeed()), talk.turns.at(-1).answers);
  }

  /** The samples of a request that failed once more, with the same seed. */
  function retry() {
    const { answers } = talk.turns.at(-1);
    const { seed, asked } = answers.find(({ state }) => state === "failed");
    const isSame = (answer) => answer.seed === seed && JSON.stringify(answer.asked) === JSON.stringify(asked);
    const again = answers.filter(isSame).map((_, sample) => newAnswer(seed, sample, asked));
    answer(again, answers.filter((answer) => !isSame(answer)));
  }

  function edit() {
    const { segments } = talk.turns.at(-2);
    replace(talk.turns.slice(0, -2));
    composer.fill([...segments, ...composer.segments()]);
    composer.focus();
  }

  function remove() {
    replaceWithUndo(talk.turns.slice(0, -2), "The message and its answers are removed.");
  }

  function choose(turn, answer) {
    turn.chosen = turn.answers.indexOf(answer);
    changed();
  }

  return talk;
}
