/** Requests to our own server.
 *
 *  Each throws an Error with the server's sentence and its .status; 0 means that no answer came.
 */

const SILENT = "the server does not answer: if it has stopped, start it again; nothing you wrote is lost";

function failure(sentence, status) {
  return Object.assign(new Error(sentence), { status });
}

/** Explain an exception of fetch: the user stopped it, it has a sentence already, or the connection is gone. */
function explained(error) {
  return error.name === "AbortError" || "status" in error ? error : failure(SILENT, 0);
}

async function send(path, options = {}) {
  try {
    const response = await fetch(path, { cache: "no-store", ...options });
    if (!response.ok) throw failure(await refusal(response), response.status);
    return response;
  } catch (error) {
    throw explained(error);
  }
}

async function refusal(response) {
  const other = `the server answered with status ${response.status}: try again`;
  try {
    return (await response.json()).error.message || other;
  } catch {
    return other;
  }
}

async function json(response) {
  try {
    return await response.json();
  } catch (error) {
    throw explained(error);
  }
}

const asJson = (body) => ({
  method: "POST",
  headers: { "content-type": "application/json" },
  body: JSON.stringify(body),
});

export const getJson = async (path) => json(await send(path));

export const postJson = async (path, body) => json(await send(path, asJson(body)));

/** Send an image file. The server looks at its bytes, whatever type the browser gives it. */
export async function postBytes(path, blob) {
  const type = blob.type.startsWith("image/") ? blob.type : "image/unknown";
  const body = await bytesOf(blob); // else a folder would look like a server that is gone
  return json(await send(path, { method: "POST", headers: { "content-type": type }, body }));
}

async function bytesOf(blob) {
  try {
    return await blob.arrayBuffer();
  } catch {
    throw failure("this cannot be read: if it is a folder, choose the files in it", null);
  }
}

/** Yield the objects of a stream of Server-Sent Events. An event with an error throws it. */
export async function* events(path, body, signal) {
  const response = await send(path, { ...asJson(body), signal });
  const [reader, decoder] = [response.body.getReader(), new TextDecoder()];
  let held = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const blocks = (held + decoder.decode(value, { stream: true })).split("\n\n");
      held = blocks.pop();
      for (const block of blocks) yield* content(block, response.status);
    }
  } catch (error) {
    throw explained(error);
  } finally {
    reader.cancel().catch(() => {}); // the server stops, unless the connection is gone or all was read
  }
}

function* content(block, status) {
  if (!block.startsWith("data: ")) return; // a comment keeps the connection open
  const object = JSON.parse(block.slice(6));
  if (object.error) throw failure(object.error.message, status);
  yield object;
}
