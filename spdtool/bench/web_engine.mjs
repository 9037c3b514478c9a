// A model file in onnxruntime-web (WebAssembly) under Node.js, as a program of `Engine.command`: see engines.py.
//
//     node web_engine.mjs            answers requests, lines of JSON, on standard output
//     node web_engine.mjs --version  prints the versions of onnxruntime-web and Node.js
//
// onnxruntime-web is looked for as Node.js does: in node_modules of the current folder, of those above it, and NODE_PATH.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(`${process.cwd()}/`);
const PACKAGE = "onnxruntime-web";

// What the library prints must not end up between two answers.
console.log = console.info = console.debug = console.error;

let engine, session;
const batches = new Map();

function load() {
  // Anew for each session: the number of threads of a loaded library does not change.
  for (const file of Object.keys(require.cache)) {
    if (/[\\/]node_modules[\\/]onnxruntime-/.test(file)) delete require.cache[file];
  }
  return require(PACKAGE);
}

function version(ort) {
  return `${ort.env.versions.web ?? ort.env.versions.common}, node ${process.versions.node}`;
}

async function open(request) {
  await session?.release();
  engine = request;
  batches.clear();
  const ort = load();
  engine.ort = ort;
  ort.env.wasm.numThreads = engine.threads;
  session = await ort.InferenceSession.create(readFileSync(engine.path), {
    executionProviders: ["wasm"],
    graphOptimizationLevel: engine.fused ? "all" : "basic",
  });
  return { provider: `onnxruntime-web ${version(ort)}`, nodes: null, resident: process.memoryUsage().rss };
}

// Tokens other than padding, then padding on the right. They are not those of other engines: a dense product takes as
// long whatever it multiplies.
function makeBatch({ batch, length, real }) {
  const tokens = new BigInt64Array(batch * length).fill(BigInt(engine.pad));
  const mask = new BigInt64Array(batch * length);
  let state = 1;
  for (let row = 0; row < batch; row++) {
    for (let column = 0; column < (real[row] ?? length); column++) {
      state = (state * 48271) % 2147483647; // Park and Miller's generator
      const token = state % (engine.vocabulary - 1);
      tokens[row * length + column] = BigInt(token + (token >= engine.pad ? 1 : 0));
      mask[row * length + column] = 1n;
    }
  }
  const values = { input_ids: tokens, attention_mask: mask, token_type_ids: new BigInt64Array(batch * length) };
  return Object.fromEntries(
    session.inputNames.map((name) => [name, new engine.ort.Tensor("int64", values[name], [batch, length])]),
  );
}

async function run(request) {
  const key = JSON.stringify([request.batch, request.length, request.real]);
  if (!batches.has(key)) batches.set(key, makeBatch(request)); // outside of the timed turn
  const milliseconds = [];
  let total = 0;
  while (!milliseconds.length || total < 1000 * request.turn) {
    const start = process.hrtime.bigint();
    await session.run(batches.get(key));
    milliseconds.push(Number(process.hrtime.bigint() - start) / 1e6);
    total += milliseconds.at(-1);
  }
  milliseconds.sort((first, second) => first - second);
  const middle = milliseconds.length / 2;
  const median = (milliseconds[Math.ceil(middle) - 1] + milliseconds[Math.floor(middle)]) / 2;
  return { ms: median, least: milliseconds[0], batches: milliseconds.length, device_ms: null };
}

async function answer(request) {
  if (request.open) return open(request.open);
  if (request.close) return { peak: process.resourceUsage().maxRSS * 1024 };
  return run(request);
}

if (process.argv[2] === "--version") {
  process.stdout.write(version(load()));
} else {
  for await (const line of createInterface({ input: process.stdin })) {
    let result;
    try {
      result = await answer(JSON.parse(line));
    } catch (error) {
      result = { error: String(error?.message ?? error).split("\n")[0], hint: null };
    }
    process.stdout.write(`${JSON.stringify(result)}\n`);
  }
  process.exit(); // threads of the library would keep the process
}
