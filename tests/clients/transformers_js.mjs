// Logits of a bundle by transformers.js, offline: node transformers_js.mjs PARENT NAME DTYPE < rows.json > logits.json
// rows.json: {"texts": [...], "pairs": [...] or null}. Run where @huggingface/transformers is installed.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const require = createRequire(`${process.cwd()}/`);
const { env, pipeline } = await import(pathToFileURL(require.resolve("@huggingface/transformers")).href);
const [parent, name, dtype] = process.argv.slice(2);
env.allowRemoteModels = false;
env.localModelPath = parent;
const { texts, pairs } = JSON.parse(readFileSync(0, "utf-8"));
const classify = await pipeline("text-classification", name, { dtype, device: "cpu" });
const logits = [];
const labels = [];
for (let row = 0; row < texts.length; row++) {
  const options = { padding: true, truncation: true };
  if (pairs) options.text_pair = pairs[row];
  const output = await classify.model(classify.tokenizer(texts[row], options));
  logits.push(Array.from(output.logits.data));
  if (!pairs) labels.push((await classify(texts[row]))[0].label);
}
process.stdout.write(JSON.stringify({ version: env.version, logits, labels }));
