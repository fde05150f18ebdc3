// The Vercel AI SDK with its provider for servers of OpenAI's shape: generateText, streamText, errors, abort.

import assert from "node:assert/strict";
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";

import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, generateText, streamText } from "ai";

const [baseURL, fullURL, model, prompt, expected] = process.argv.slice(2);
const provider = (url) =>
  createOpenAICompatible({ name: "cadre", baseURL: url, apiKey: "unused", includeUsage: true });
const cadre = provider(baseURL);
const common = { temperature: 0, maxRetries: 0 };

const whole = await generateText({ model: cadre(model), prompt, ...common });
assert.equal(whole.text, expected);
assert.equal(whole.finishReason, "stop");
assert.equal(whole.usage.totalTokens, whole.usage.inputTokens + whole.usage.outputTokens);

const stream = streamText({ model: cadre(model), prompt, ...common });
const parts = [];
for await (const part of stream.textStream) parts.push(part);
assert.equal(parts.join(""), expected);
assert.ok(parts.length > 10, "the answer came in one piece");
assert.equal(await stream.finishReason, "stop");
assert.equal((await stream.usage).outputTokens, whole.usage.outputTokens);

const messages = [
  { role: "user", content: [{ type: "text", text: prompt }] },
  { role: "assistant", content: expected },
  { role: "user", content: prompt },
];
const conversation = await generateText({ model: cadre(model), system: "Be brief.", messages, ...common });
assert.ok(conversation.usage.inputTokens > whole.usage.inputTokens);

const cut = await generateText({ model: cadre(model), prompt, maxOutputTokens: 4, ...common });
assert.equal(cut.finishReason, "length");
assert.equal(cut.usage.outputTokens, 4);
const stopped = await generateText({ model: cadre(model), prompt, stopSequences: ["smallest"], ...common });
assert.equal(stopped.text, expected.split("smallest")[0]);
const seeded = await Promise.all(
  [1, 2].map(() => generateText({ model: cadre(model), prompt, temperature: 1.5, seed: 7, maxOutputTokens: 24 })),
);
assert.equal(seeded[0].text, seeded[1].text);

const text = await generateText({
  model: cadre.completionModel(model),
  prompt: "x",
  maxOutputTokens: 3,
  ...common,
});
assert.equal(text.usage.outputTokens, 3);

const refused = async (status, retryable, what) => {
  const error = await what().then(
    () => assert.fail("no error"),
    (error) => error,
  );
  assert.ok(APICallError.isInstance(error), String(error));
  assert.equal(error.statusCode, status);
  assert.equal(error.isRetryable, retryable);
  assert.ok(error.message.length > 10, error.message);
};
await refused(404, false, () => generateText({ model: cadre("gpt-4"), prompt, ...common }));
await refused(400, false, () => generateText({ model: cadre(model), prompt, topP: 7, ...common }));
await refused(429, true, () => generateText({ model: provider(fullURL)(model), prompt, ...common }));

// A page that is left: the stream is aborted after its first part.
const leave = new AbortController();
const endless = streamText({
  model: cadre(model),
  prompt,
  maxOutputTokens: 3000,
  abortSignal: leave.signal,
  providerOptions: { cadre: { ignore_eos: true } },
  ...common,
});
const kinds = [];
for await (const part of endless.fullStream) {
  kinds.push(part.type);
  if (part.type === "text-delta") leave.abort();
}
assert.equal(kinds.at(-1), "abort", kinds.slice(-5).join());

const require = createRequire(import.meta.url);
const version = JSON.parse(readFileSync(require.resolve("ai/package.json"))).version;
console.log(JSON.stringify({ ai: version, checks: "passed" }));
