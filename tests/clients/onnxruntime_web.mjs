// Logits of an ONNX file by onnxruntime-web (WASM): node onnxruntime_web.mjs FILE < rows.json > logits.json
// rows.json: [{"input_ids": [...], "attention_mask": [...], ...}, ...]. Run where onnxruntime-web is installed.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/`);
const ort = await import(pathToFileURL(require.resolve("onnxruntime-web")).href);
ort.env.wasm.numThreads = 1;
const session = await ort.InferenceSession.create(readFileSync(process.argv[2]), { executionProviders: ["wasm"] });
const logits = [];
for (const row of JSON.parse(readFileSync(0, "utf-8"))) {
  const feeds = {};
  for (const name of session.inputNames) {
    feeds[name] = new ort.Tensor("int64", BigInt64Array.from(row[name].map(BigInt)), [1, row[name].length]);
  }
  logits.push(Array.from((await session.run(feeds)).logits.data));
}
process.stdout.write(JSON.stringify({ version: ort.env.versions.web ?? ort.env.versions.common, logits }));
