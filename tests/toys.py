"""Toys for the tests: a tokenizer, tiny random encoders, and a data set of in-memory rows. No file, no network.

`conftest.py` offers these as fixtures; scripts that tests start as processes of their own import this file by its path.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spdtool import plugins
from spdtool.data.dataset import Dataset, Rows
from spdtool.recipe.fields import Recipe
from spdtool.recipe.reading import build_recipe
from spdtool.tasks.prepare import task_of
from spdtool.tasks.task import Task

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
GOOD = ("good", "fine", "kind", "warm")
BAD = ("bad", "cold", "rude", "dull")
FILLER = ("the", "a", "film", "book", "meal", "very", "was", "and", "quite", "so", "it", "then")
WORDS = (*SPECIAL, *GOOD, *BAD, *FILLER)
POSITIONS = 64

# Every supported family as `(further fields of its configuration, whether it knows token types, linear layers of a
# layer)`. A new architecture is one more row; `test_architectures.py` runs over all of them.
ARCHITECTURES: dict[str, tuple[dict[str, Any], bool, int]] = {
    "bert": ({}, True, 6),
    "roberta": ({"max_position_embeddings": POSITIONS + 1}, False, 6),
    "distilbert": ({"dim": 32, "hidden_dim": 64, "n_heads": 2, "n_layers": 3}, False, 6),
    "electra": ({"embedding_size": 16}, True, 6),
    "xlm-roberta": ({"max_position_embeddings": POSITIONS + 1}, False, 6),
    "mpnet": ({"max_position_embeddings": POSITIONS + 2}, False, 6),
    "deberta-v2": (
        {
            "relative_attention": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "position_buckets": 8,
            "type_vocab_size": 0,
        },
        True,
        6,
    ),
    "modernbert": ({"global_attn_every_n_layers": 2, "local_attention": 4, "mlp_dropout": 0.0}, False, 4),
}

# Tracing a family takes seconds, once for each configuration: a test that needs no other one builds this.
TRACED: dict[str, Any] = {"layers": 2, "labels": 3, "vocab_size": 160}


def classifier(
    architecture: str, *, layers: int = 3, labels: int = 2, seed: int = 0, eager: bool = True, **config: Any
) -> Any:
    """Build a tiny random classifier of a supported family, in eval mode, without dropout unless `config` has it."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    options: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": 32,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "max_position_embeddings": POSITIONS,
        "initializer_range": 0.2,
        "num_labels": labels,
        "pad_token_id": 0,
        "bos_token_id": 2,
        "cls_token_id": 2,
        "eos_token_id": 3,
        "sep_token_id": 3,
    }
    if architecture in ARCHITECTURES:
        options |= ARCHITECTURES[architecture][0]
    if "n_layers" in options:  # DistilBERT has its names for all of these
        options["n_layers"] = layers
    model_config = AutoConfig.for_model(architecture, **options | config)
    for name, value in model_config.to_dict().items():
        if "dropout" in name and isinstance(value, float) and name not in config:
            setattr(model_config, name, 0.0)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        implementation = {"attn_implementation": "eager"} if eager else {}
        return AutoModelForSequenceClassification.from_config(model_config, **implementation).eval()


def batch(rows: int = 5, length: int = 11, *, seed: int = 0, architecture: str = "bert") -> dict[str, torch.Tensor]:
    """Random token ids with right padding of various lengths (row 0 has none), and labels."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, length + 1, (rows,), generator=generator)
    lengths[0] = length
    mask = (torch.arange(length)[None] < lengths[:, None]).long()
    columns = {
        "input_ids": torch.randint(len(SPECIAL), len(WORDS), (rows, length), generator=generator) * mask,
        "attention_mask": mask,
        "labels": torch.randint(0, 2, (rows,), generator=generator),
    }
    if ARCHITECTURES[architecture][1]:
        columns["token_type_ids"] = torch.zeros_like(mask)
    return columns


def tokenizer(padding_side: str = "right", *, token_types: bool = True) -> Any:
    """Build a fast tokenizer with one token per word of `WORDS`, laid out as BERT's."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertTokenizerFast

    vocabulary = {word: index for index, word in enumerate(WORDS)}
    core = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    core.normalizer = normalizers.BertNormalizer()  # transformers 4.57 needs one
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.post_processor = processors.TemplateProcessing(
        single="[CLS]:0 $A:0 [SEP]:0",
        pair="[CLS]:0 $A:0 [SEP]:0 $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    inputs = ["input_ids", "token_type_ids", "attention_mask"] if token_types else ["input_ids", "attention_mask"]
    return BertTokenizerFast(
        tokenizer_object=core, model_max_length=POSITIONS, padding_side=padding_side, model_input_names=inputs
    )


def bert(
    layers: int = 2, *, hidden: int = 32, dropout: float = 0.0, labels: int = 2, seed: int = 0, **config: Any
) -> Any:
    """Build a tiny random BERT classifier in eval mode, without changing the global random state.

    Args:
        labels: number of labels (1: regression).
        config: further fields of BertConfig.
    """
    from transformers import BertConfig, BertForSequenceClassification

    options: dict[str, Any] = {
        "vocab_size": len(WORDS),
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 2,
        "intermediate_size": 2 * hidden,
        "max_position_embeddings": POSITIONS,
        "hidden_dropout_prob": dropout,
        "attention_probs_dropout_prob": dropout,
        "initializer_range": 0.2,
        "num_labels": labels,
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return BertForSequenceClassification(BertConfig(**options | config)).eval()


def sentence_encoder(
    folder: Path,
    *,
    pooling: str = "mean",
    normalize: bool = True,
    prompts: dict[str, str] | None = None,
    default_prompt: str | None = None,
    max_length: int = 24,
    layers: int = 2,
    seed: int = 0,
) -> Path:
    """Write a tiny random BERT as sentence-transformers saves one, in the form of its version 2."""
    from transformers import BertModel

    bert_model = bert(layers, seed=seed).bert
    assert isinstance(bert_model, BertModel)
    bert_model.save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalize else [])]
    paths = ["", "1_Pooling", "2_Normalize"]
    modules = [
        {"idx": index, "name": str(index), "path": paths[index], "type": f"sentence_transformers.models.{kind}"}
        for index, kind in enumerate(kinds)
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    modes = {"mean": "mean_tokens", "cls": "cls_token", "lasttoken": "lasttoken", "max": "max_tokens"}
    pooling_config = {f"pooling_mode_{name}": mode == pooling for mode, name in modes.items()}
    files = {
        "modules.json": modules,
        "1_Pooling/config.json": {"word_embedding_dimension": 32} | pooling_config,
        "sentence_bert_config.json": {"max_seq_length": max_length, "do_lower_case": False},
        "config_sentence_transformers.json": {"prompts": prompts or {}, "default_prompt_name": default_prompt},
    }
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content, indent=2), "utf-8")
    return folder


def rows(
    count: int, seed: int = 0, *, labels: int = 2, pairs: bool = False, shortest: int = 1, longest: int = 9
) -> Rows:
    """Sentences of various lengths whose good and bad words decide the label (labels 1: their balance, a float)."""
    generator = random.Random(seed)
    first, second, gold = [], [], []
    for index in range(count):
        label = index % max(labels, 2)
        words = generator.choices(FILLER, k=generator.randint(shortest, longest))
        words.insert(generator.randint(0, len(words)), generator.choice((BAD, GOOD, FILLER)[label % 3]))
        first.append(" ".join(words))
        second.append(" ".join(generator.choices(FILLER, k=generator.randint(1, 4))))
        gold.append(label if labels > 1 else label + generator.random())
    return Rows(first, second if pairs else None, gold)


def dataset(
    name: str = "toy",
    *,
    train: int = 48,
    dev: int = 24,
    labels: tuple[str, ...] = ("bad", "good"),
    metrics: tuple[str, ...] = (),
    pairs: bool = False,
    layers: int = 2,
    dropout: float = 0.0,
    build: bool = True,
    architecture: str | None = None,
) -> Dataset:
    """Make a data set of in-memory rows and a tiny model for it: a BERT, or another `architecture`.

    Args:
        build: False to leave the model to the recipe.
    """
    head_labels = labels or ("score",)
    count = len(head_labels)

    def build_model(seed: int) -> Any:
        names: dict[str, Any] = {"id2label": dict(enumerate(head_labels))}
        names["label2id"] = {label: index for index, label in enumerate(head_labels)}
        if architecture is not None:
            model = classifier(architecture, layers=layers, labels=count, seed=seed, eager=False, **names)
            return model, tokenizer(token_types=ARCHITECTURES[architecture][1])
        return bert(layers, dropout=dropout, labels=count, seed=seed, **names), tokenizer()

    return Dataset(
        name=name,
        kind="classification" if labels else "regression",
        text=("first", "second") if pairs else ("first",),
        labels=labels,
        metrics=metrics or (("accuracy",) if labels else ("pearson",)),
        load=lambda _data, _seed: {
            "train": rows(train, 1, labels=count, pairs=pairs),
            "dev": rows(dev, 2, labels=count, pairs=pairs),
        },
        build=build_model if build else None,
        about="in-memory rows for the tests",
    )


TAGS = ("O", "B-good", "I-good", "B-bad", "I-bad")


def tag_rows(count: int, seed: int = 0, *, longest: int = 9) -> Rows:
    """Sentences whose runs of good and of bad words are spans, with a tag for each word by its place in the text."""
    generator = random.Random(seed)
    texts, labels = [], []
    for _ in range(count):
        words = generator.choices((*GOOD, *BAD, *FILLER), k=generator.randint(2, longest))
        tagged: list[tuple[int, int, int]] = []
        start, before = 0, 0
        for word in words:
            first = 1 if word in GOOD else 3 if word in BAD else 0
            tag = first + 1 if first and before in (first, first + 1) else first
            tagged.append((start, start + len(word), tag))
            start, before = start + len(word) + 1, tag
        texts.append(" ".join(words))
        labels.append(tagged)
    return Rows(texts, None, labels)


def tagger(labels: tuple[str, ...] = TAGS, **config: Any) -> Any:
    """A tiny random BERT that labels each token, in eval mode."""
    from transformers import BertForTokenClassification

    names: dict[str, Any] = {
        "id2label": dict(enumerate(labels)),
        "label2id": {name: i for i, name in enumerate(labels)},
    }
    model_config = bert(labels=len(labels), **names, **config).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForTokenClassification(model_config).eval()


def tag_dataset(name: str = "toy-tags", *, train: int = 48, dev: int = 24) -> Dataset:
    """A data set of words with tags, and a tiny model to go with it."""
    return Dataset(
        name=name,
        kind="tokens",
        text=("words",),
        labels=TAGS,
        metrics=("span_f1",),
        load=lambda _data, _seed: {"train": tag_rows(train, 1), "dev": tag_rows(dev, 2)},
        build=lambda _seed: (tagger(), tokenizer()),
        about="in-memory rows for the tests",
    )


def question_rows(count: int, seed: int = 0, *, longest: int = 12, without: int = 0) -> Rows:
    """Questions with one good or bad word, and contexts in which that word is the answer.

    Args:
        without: every so manieth question has no answer; 0: none.
    """
    generator = random.Random(seed)
    questions, contexts, labels = [], [], []
    for index in range(count):
        words = generator.choices(FILLER, k=generator.randint(2, longest))
        answer = generator.choice((*GOOD, *BAD))
        has_answer = not without or index % without
        if has_answer:
            words.insert(generator.randint(0, len(words)), answer)
        context = " ".join(words)
        start = (" " + context + " ").find(f" {answer} ") if has_answer else -1
        questions.append(f"a {answer} film")
        contexts.append(context)
        labels.append([(start, start + len(answer))] if has_answer else [])
    return Rows(questions, contexts, labels)


def span_finder(**config: Any) -> Any:
    """A tiny random BERT that points to begin and end of an answer, in eval mode."""
    from transformers import BertForQuestionAnswering

    names: dict[str, Any] = {"id2label": {0: "start", 1: "end"}, "label2id": {"start": 0, "end": 1}}
    model_config = bert(labels=2, **names, **config).config
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return BertForQuestionAnswering(model_config).eval()


def question_dataset(name: str = "toy-questions", *, train: int = 48, dev: int = 24, without: int = 0) -> Dataset:
    """A data set of questions about contexts, and a tiny model to go with it."""
    return Dataset(
        name=name,
        kind="spans",
        text=("question", "context"),
        labels=("start", "end"),
        metrics=("exact_match", "f1"),
        load=lambda _data, _seed: {
            "train": question_rows(train, 1, without=without),
            "dev": question_rows(dev, 2, without=without),
        },
        build=lambda _seed: (span_finder(), tokenizer()),
        about="in-memory rows for the tests",
    )


def ranking_dataset(name: str = "toy-ranking", *, train: int = 24, dev: int = 16, dropout: float = 0.0) -> Dataset:
    """A data set of queries with four passages each, one of them relevant, and a tiny model to go with it."""

    def query_rows(count: int, seed: int) -> Rows:
        passages = rows(count, seed, longest=6).first
        labels = np.array([[index // 4, int(index % 4 == 1)] for index in range(count)])
        return Rows([f"the film was {FILLER[index // 4 % 12]}" for index in range(count)], passages, labels)

    return Dataset(
        name=name,
        kind="ranking",
        text=("query", "passage"),
        labels=(),
        metrics=("mrr@10", "ndcg@10", "map"),
        load=lambda _data, _seed: {"train": query_rows(train, 1), "dev": query_rows(dev, 2)},
        build=lambda seed: (bert(labels=1, dropout=dropout, seed=seed), tokenizer()),
        about="in-memory rows for the tests",
    )


def register(toy: Dataset) -> Task:
    """Register a data set under its name, in place of any earlier one, and return its task."""
    plugins.datasets.unregister(toy.name)
    plugins.datasets.register(toy.name)(toy)
    return task_of(toy)


def seal(folder: Path, **fields: Any) -> None:
    """Write the manifest of an exported folder as the export stage does, with other `fields` where they are given.

    A folder that has one keeps its other fields.
    """
    from spdtool.export.bundle import manifest

    listed = {name: digest.model_dump() for name, digest in manifest.digest_files(folder).items()}
    content: dict[str, Any] = {"format": 1, "target": "onnx", "model": "onnx/model.onnx"}
    file = folder / manifest.MANIFEST
    if file.is_file():
        content = json.loads(file.read_text("utf-8"))
    content |= {"files": listed} | fields
    file.write_text(json.dumps(manifest.seal(content)), "utf-8")


def recipe(*sets: str, name: str = "default", task: str = "toy", sparsity: float = 0.5, **flags: Any) -> Recipe:
    """Build a recipe for a toy task on the CPU: two epochs a stage, three prune events, and `--set` assignments.

    A prune event of the default recipe looks at two calibration batches: sixteen are more than a toy trains on.
    """
    quick = [f"{stage}.epochs=2" for stage in ("teacher", "prune", "distill", "finetune")]
    quick += [f"{stage}.batch_size=8" for stage in ("teacher", "prune", "distill", "finetune")]
    quick += ["teacher.accept=true"]  # a toy may learn nothing in two epochs
    quick += ["prune.events=3", "max_length=32", "export.optional=[]"]
    if name == "default":
        quick += ["prune.calibration=2"]
    return build_recipe(name, {"task": task, "sparsity": sparsity, "device": "cpu"} | flags, [*quick, *sets])
