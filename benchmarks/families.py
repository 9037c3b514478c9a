"""Run a tiny random encoder of every family from `compress` to `bench`, and write docs/reference/families.md.

    python benchmarks/families.py --no-bench                    # whether each family works, or how it is refused
    python benchmarks/families.py --layers 6 --hidden 384       # with the speed of the student; on a machine of its own
    python benchmarks/families.py --only camembert,nomic_bert   # measure these anew

The weights are random, so scores mean nothing. The table shows whether a family reaches every stage, and whether an
unsupported one is refused by the plan. Results are stored in docs/results/families.json; a stored family runs again
only if `--only` names it. Needs only spdtool.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerBase

import spdtool
from spdtool import console
from spdtool.errors import SpdError
from spdtool.run.folder import Run

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "docs/results/families.json"
PAGE = ROOT / "docs/reference/families.md"
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
GOOD, BAD = ("good", "fine", "nice", "great"), ("bad", "poor", "dull", "sad")
FILLER = ("the", "a", "film", "song", "meal", "book", "was", "is", "very", "quite", "not", "and")
WORDS = (*GOOD, *BAD, *FILLER)
POSITIONS = 66  # 64 tokens, and 2 because RoBERTa counts positions from its padding token
STAGES = ("teacher", "prune", "distill", "finetune")
# Further fields of a family's configuration, where the common ones do not make a tiny model.
FAMILIES: dict[str, dict[str, Any]] = {
    "albert": {"embedding_size": 16},
    "bert": {},
    "big_bird": {"attention_type": "original_full"},
    "camembert": {"type_vocab_size": 1},
    "canine": {},
    "convbert": {"embedding_size": 32},
    "data2vec-text": {"type_vocab_size": 1},
    "deberta": {"type_vocab_size": 0},
    "deberta-v2": {
        "relative_attention": True,
        "pos_att_type": ["p2c", "c2p"],
        "position_biased_input": False,
        "norm_rel_ebd": "layer_norm",
        "share_att_key": True,
        "position_buckets": 8,
        "type_vocab_size": 0,
    },
    "distilbert": {},
    "electra": {"embedding_size": 16},
    "ernie": {},
    "esm": {"mask_token_id": 4, "token_dropout": False, "position_embedding_type": "rotary"},
    "eurobert": {"num_key_value_heads": 2},
    "flaubert": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    "fnet": {},
    "funnel": {"block_sizes": [1, 1], "d_model": 32, "n_head": 2, "d_head": 16, "d_inner": 64},
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2},
    "gte": {},
    "ibert": {"type_vocab_size": 1},
    "jina_embeddings_v3": {},
    "layoutlm": {},
    "longformer": {"attention_window": 8},
    "megatron-bert": {},
    "mobilebert": {"embedding_size": 16, "intra_bottleneck_size": 16, "true_hidden_size": 16},
    "modernbert": {"global_attn_every_n_layers": 2, "local_attention": 8},
    "mpnet": {},
    "mra": {"block_per_row": 1},
    "nomic_bert": {},
    "nystromformer": {"segment_means_seq_len": 64, "num_landmarks": 8},
    "rembert": {"input_embedding_size": 16, "output_embedding_size": 16},
    "roberta": {"type_vocab_size": 1},
    "roberta-prelayernorm": {"type_vocab_size": 1},
    "roformer": {"embedding_size": 32},
    "squeezebert": {"embedding_size": 32, "q_groups": 1, "k_groups": 1, "v_groups": 1, "post_attention_groups": 1},
    "t5": {"d_model": 32, "d_kv": 16, "d_ff": 64, "num_heads": 2},
    "xlm": {"emb_dim": 32, "n_layers": 2, "n_heads": 2},
    "xlm-roberta": {"type_vocab_size": 1},
    "xlnet": {"d_model": 32, "n_head": 2, "d_inner": 64, "n_layer": 2},
    "yoso": {},
}


def write_rows(file: Path) -> Path:
    """Write rows of two classes; one word decides the class."""
    generator = random.Random(0)
    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.writer(stream)
        writer.writerow(("text", "label"))
        for row in range(160):
            word = generator.choice(GOOD if row % 2 else BAD)
            text = " ".join((*generator.choices(FILLER, k=generator.randint(2, 12)), word, str(row)))
            writer.writerow((text, ("bad", "good")[row % 2]))
    return file


def build_tokenizer() -> PreTrainedTokenizerBase:
    """Build a tokenizer of `WORDS` and digits."""
    from transformers import BertTokenizerFast  # type: ignore[attr-defined]  # a name that transformers 5 adds late

    vocabulary = [*SPECIAL, *WORDS, *"0123456789", *("##" + digit for digit in "0123456789")]
    core = Tokenizer(models.WordPiece({word: number for number, word in enumerate(vocabulary)}, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer: PreTrainedTokenizerBase = BertTokenizerFast(tokenizer_object=core, model_max_length=64)
    return tokenizer


def save_encoder(family: str, folder: Path, layers: int, hidden: int) -> None:
    """Save a random model of a family with its tokenizer."""
    tokenizer = build_tokenizer()
    common = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": max(2, hidden // 32),
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": POSITIONS,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    fields = FAMILIES[family]
    if "block_sizes" in fields:  # which say how many layers there are
        del common["num_hidden_layers"]
    config = AutoConfig.for_model(family, **(common | fields))
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(config)  # type: ignore[no-untyped-call]
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def run_family(family: str, folder: Path, layers: int, hidden: int, *, with_bench: bool) -> dict[str, Any]:
    """Run a family through all stages; return its row of the table."""
    start = time.monotonic()
    result: dict[str, Any] = {"layers": layers, "hidden": hidden, "speed": None}
    try:
        save_encoder(family, folder / "model", layers, hidden)
    except Exception as error:  # this script's configuration does not make one
        return result | {"outcome": "not built", "reason": f"{type(error).__name__}: {error}".split("\n")[0][:200]}
    quick = [f"{stage}.{setting}" for stage in STAGES for setting in ("max_steps=4", "batch_size=16")]
    try:
        with console.mute():
            spdtool.compress(
                data=write_rows(folder / "rows.csv"),
                model=folder / "model",
                run=folder / "run",
                sparsity=0.8,
                device="cpu",
                sets=[*quick, "prune.events=2", "export.optional=[]"],
                until="bench" if with_bench else "export",
            )
        result["outcome"], result["reason"] = "works", ""
        if with_bench:
            result["speed"] = next(iter(Run.open(folder / "run").bench_result().speeds.values())).median
    except SpdError as error:
        late = (folder / "run").exists()
        result["outcome"], result["reason"] = "fails late" if late else "refused", error.message
    except Exception as error:  # what must not be: the table shows it
        result["outcome"], result["reason"] = "traceback", f"{type(error).__name__}: {error}".split("\n")[0][:200]
    return result | {"seconds": round(time.monotonic() - start)}


def write_page(results: dict[str, dict[str, Any]]) -> None:
    """Write the table of all families."""
    lines = [
        "# Families of encoders",
        "",
        "A tiny random encoder of each family was run through every stage by `python benchmarks/families.py`. A family",
        "that is not among the tested ones goes through the same trial in your plan, with two random layers of your",
        "checkpoint's size, before anything is spent on it.",
        "",
        "| family | outcome | reason | speed |",
        "| --- | --- | --- | --- |",
    ]
    for family, result in sorted(results.items()):
        reason = result["reason"].replace("|", "\\|").replace("\n", " ")
        speed = "" if result["speed"] is None else f"{result['speed']:.2f}x"
        lines.append(f"| `{family}` | {result['outcome']} | {reason} | {speed} |")
    lines += [
        "",
        "`works`: every stage ran, and the exported file passed its gates. `refused`: by the plan, in one sentence.",
        "Speed is that of the best form of the student against the dense teacher, where it was timed.",
        "",
    ]
    PAGE.write_text("\n".join(lines), "utf-8")


def main() -> None:
    """Run the families without a result, and write results and page after each."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--only", default="", help="families to run anew, separated by commas")
    parser.add_argument("--layers", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=32)
    parser.add_argument("--no-bench", action="store_true", help="end after the export")
    options = parser.parse_args()
    results: dict[str, dict[str, Any]] = {}
    if RESULTS.exists():
        results = json.loads(RESULTS.read_text("utf-8"))
    families = options.only.split(",") if options.only else [family for family in FAMILIES if family not in results]
    for family in families:
        with tempfile.TemporaryDirectory(prefix="families-") as folder:
            result = run_family(family, Path(folder), options.layers, options.hidden, with_bench=not options.no_bench)
        results[family] = result
        print(family, json.dumps(result), flush=True)
        RESULTS.write_text(json.dumps(dict(sorted(results.items())), indent=1) + "\n", "utf-8")
        write_page(results)


if __name__ == "__main__":
    main()
