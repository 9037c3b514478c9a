"""Measure the cost of the HTTP server: rows a second under load, against the bare engine on the same sentences.

    python benchmarks/serving.py                             a random model of six layers of 384; some minutes
    python benchmarks/serving.py --bundle RUN/export/bundle --texts 4 --requests 10000
    python benchmarks/serving.py --model small --rounds 1 --requests 1000

The bare engine is `spdtool.load`'s classifier over all sentences at once, sorted by length, at its best batch size and
in the better of two ways: one caller whose batches have all threads, or a caller for each thread. The load comes from a
second process on the loopback address: keep-alive connections, each sending the next request when it has its answer.
Every answer is checked against the logits of its own sentence. Rounds are interleaved; the last line is JSON.

`share` compares by the clock, the client's own work included, which takes processors from a small machine's engine.
`processor_share` is the processor time of the bare engine over that of the server for the same sentences (Linux).
Needs the extra `spdtool[serve]`.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from spdtool.export import onnx_session

# rows at once; the bare engine is measured at the best of these
BATCHES = (1, 4, 8, 16, 32)
SIZES = {
    "small": {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256},
    "minilm": {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536},
    "bert": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "intermediate_size": 3072},
}
NAME = "measured"
TOLERANCE = 1e-3  # a sentence's logits depend a little on the batch that it is computed in
SECONDS = 600  # no load lasts longer


def main() -> None:
    """Measure and print."""
    options = _options()
    if options.client:
        _client(options)
        return
    folder = options.bundle or _model(options.model, options.out)
    load_file = options.out / "load.npz"
    threads, sentences = options.threads or onnx_session.usable_cores(), _sentences(options.requests * options.texts)
    engines = {callers: _opened(folder, options, threads // callers) for callers in {1, threads}}
    classify, sample = engines[1], sentences[: max(256, len(sentences) // 20)]
    expected = classify.logits(sentences)
    settings = [(callers, size) for callers in engines for size in BATCHES]
    rates = {setting: _bare(engines[setting[0]], sample, *setting) for setting in settings}
    print(", ".join(f"{callers} x {size}: {rate:.0f}" for (callers, size), rate in rates.items()), "rows/s")
    best = max(settings, key=lambda setting: rates[setting])
    print(
        f"{len(sentences)} sentences, of {_tokens(classify, sentences)} tokens; "
        f"bare engine: {best[0]} callers, {best[1]} rows at once"
    )
    np.savez(load_file, logits=expected, sentences=np.array(sentences))
    server, port = _served(folder, options)
    rounds = []
    try:
        for number in range(options.rounds):
            before = time.process_time()
            bare = _bare(engines[best[0]], sentences, *best)
            engine_seconds, before = time.process_time() - before, _processor(server.pid)
            result = _loaded(port, load_file, options)
            result["processor_share"] = engine_seconds / (_processor(server.pid) - before)
            served = result["rows_per_second"]
            rounds.append(result | {"bare": bare, "share": served / bare})
            print(f"round {number}: bare {bare:.1f}, served {served:.1f} rows/s: {served / bare:.1%}")
            print(
                f"         by processor time {result['processor_share']:.1%}; "
                f"an answer took {result['median_ms']:.1f} ms, 95 % at most {result['p95_ms']:.1f} ms"
            )
    finally:
        server.send_signal(signal.SIGTERM)
        code = server.wait(60)
    share = float(np.median([round_result["share"] for round_result in rounds]))
    wrong, lost = (sum(round_result[name] for round_result in rounds) for name in ("wrong", "lost"))
    summary = {"share": share, "wrong": wrong, "lost": lost, "exit": code, "bare": best, "rounds": rounds}
    print(
        json.dumps(summary | {"requests": options.requests, "texts": options.texts, "connections": options.connections})
    )


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bundle", type=Path, help="exported folder; without it, a random model is made")
    parser.add_argument("--variant", help="of the bundle")
    parser.add_argument("--model", choices=sorted(SIZES), default="minilm")
    parser.add_argument("--out", type=Path, default=Path("runs/serving"))
    parser.add_argument("--requests", type=int, default=10000)
    parser.add_argument("--texts", type=int, default=1, help="texts of a request")
    parser.add_argument("--connections", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--workers", type=int, default=0)
    parser.add_argument("--max-batch", type=int, default=16)
    parser.add_argument("--client", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--load", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _model(size: str, out: Path) -> Path:
    """Export a random classifier of a size unless it exists; return its folder."""
    folder = out / size
    if not (folder / "exported/onnx/model.onnx").is_file():
        import torch
        from transformers import BertConfig, BertForSequenceClassification

        from spdtool.data import demo
        from spdtool.export.targets import Onnx
        from spdtool.models.load import save_model
        from spdtool.recipe import reading as recipe

        torch.manual_seed(0)
        tokenizer = demo.demo_tokenizer()
        shape: dict[str, Any] = SIZES[size] | {
            "vocab_size": len(tokenizer),
            "max_position_embeddings": 128,
            "initializer_range": 0.08,
        }
        model = BertForSequenceClassification(BertConfig(**shape)).eval()  # type: ignore[no-untyped-call]
        save_model(model, tokenizer, folder / "checkpoint")
        Onnx().export(
            folder / "checkpoint", folder / "exported", recipe.build_recipe(flags={"task": "demo", "device": "cpu"})
        )
    return folder / "exported"


def _opened(folder: Path, options: argparse.Namespace, threads: int) -> Any:
    import spdtool

    classify = spdtool.load(folder, variant=options.variant, threads=threads)
    classify.logits(["warm up"])
    return classify


def _sentences(count: int) -> list[str]:
    """Make sentences of 3 to 60 words of the demo's grammar, mostly short ones."""
    from spdtool.data import demo

    draw = random.Random(0)
    words = (*demo.ADJECTIVES, *demo.NOUNS, *demo.VERBS, *demo.FUNCTION_WORDS)
    return [" ".join(draw.choices(words, k=min(60, 3 + int(draw.expovariate(1 / 15))))) for _ in range(count)]


def _tokens(classify: Any, sentences: list[str]) -> str:
    lengths = sorted(len(row.ids) for row in classify.encode(sentences))
    return f"{lengths[0]} to {lengths[-1]}, half of them at most {lengths[len(lengths) // 2]},"


def _bare(classify: Any, sentences: list[str], callers: int, batch: int) -> float:
    """Measure the rows a second of the engine without a server."""
    start_time = time.perf_counter()
    rows = sorted(classify.encode(sentences), key=lambda row: -len(row.ids))
    batches = [rows[start : start + batch] for start in range(0, len(rows), batch)]
    with ThreadPoolExecutor(callers) as pool:
        for _ in pool.map(classify.compute, batches):
            pass
    return len(sentences) / (time.perf_counter() - start_time)


def _processor(pid: int) -> float:
    """Return the processor seconds of a process, which other load on the machine hardly changes."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _served(folder: Path, options: argparse.Namespace) -> tuple[subprocess.Popen[str], int]:
    words = [sys.executable, "-m", "spdtool", "serve", str(folder), "--port", "0", "--name", NAME]
    words += ["--threads", str(options.threads), "--workers", str(options.workers)]
    words += ["--max-batch", str(options.max_batch)]
    words += ["--variant", options.variant] if options.variant else []
    server = subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=os.environ | {"COLUMNS": "1000"})
    assert server.stdout is not None
    line = server.stdout.readline()
    return server, int(line.strip().rsplit(":", 1)[1])


def _loaded(port: int, load: Path, options: argparse.Namespace) -> dict[str, Any]:
    command = [sys.executable, __file__, "--client", "--port", str(port), "--load", str(load)]
    command += ["--texts", str(options.texts), "--connections", str(options.connections)]
    process = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS + 60, check=True)
    result: dict[str, Any] = json.loads(process.stdout)
    return result


def _client(options: argparse.Namespace) -> None:
    """Send the load from this process; print the measurements as JSON."""
    load = np.load(options.load)
    sentences, logits = load["sentences"].tolist(), load["logits"]
    requests = []
    for start in range(0, len(sentences), options.texts):
        texts = sentences[start : start + options.texts]
        body = json.dumps(
            {
                "inputs": [{"name": "text", "shape": [len(texts)], "datatype": "BYTES", "data": texts}],
                "outputs": [{"name": "logits"}],
            }
        ).encode()
        head = f"POST /v2/models/{NAME}/infer HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        requests.append((head.encode() + body, logits[start : start + options.texts].ravel()))
    start_time = time.perf_counter()
    wrong, waits = asyncio.run(_send(requests, options.port, options.connections))
    seconds = time.perf_counter() - start_time
    result = {"rows_per_second": len(sentences) / seconds, "wrong": wrong, "lost": len(requests) - len(waits)}
    median, p95 = np.quantile(waits, (0.5, 0.95)) * 1000
    print(json.dumps(result | {"seconds": seconds, "median_ms": median, "p95_ms": p95}))


async def _send(requests: list[tuple[bytes, np.ndarray]], port: int, connections: int) -> tuple[int, list[float]]:
    """Send all requests; return the number of wrong answers and the seconds of each answer."""
    waiting, waits = iter(requests), list[float]()
    speaking = asyncio.gather(*(_speak(waiting, port, waits) for _ in range(connections)))
    return sum(await asyncio.wait_for(speaking, SECONDS)), waits


async def _speak(waiting: Any, port: int, waits: list[float]) -> int:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    wrong = 0
    for request, expected in waiting:
        start_time = time.perf_counter()
        writer.write(request)
        head = await reader.readuntil(b"\r\n\r\n")
        length = int(head.lower().split(b"content-length:")[1].split(b"\r\n")[0])
        body = await reader.readexactly(length)
        waits.append(time.perf_counter() - start_time)
        actual = json.loads(body)["outputs"][0]["data"] if b" 200 " in head[:20] else []
        wrong += len(actual) != len(expected) or not float(np.abs(np.array(actual) - expected).max()) <= TOLERANCE
    writer.close()
    return wrong


if __name__ == "__main__":
    main()
