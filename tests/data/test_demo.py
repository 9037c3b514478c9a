"""The demo task: rows with the promised properties, and a standard model and tokenizer."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from spdtool.data import demo
from spdtool.data.dataset import Rows, find_dataset
from spdtool.errors import DataError
from spdtool.models.layers import find_layer_stack, find_prunable_weights
from spdtool.recipe.fields import Recipe

SEEDS = (0, 1, 7)


def event_of(sentence: str) -> demo.Event:
    """Parse the event of a sentence, independently of `Event.sentence`."""
    words = sentence.split()
    if "were" in words:
        assert words[2] == "were"
        assert words[4] == "by"
        return demo.Event((words[5], words[6]), words[3], (words[0], words[1]))
    return demo.Event((words[0], words[1]), words[2], (words[3], words[4]))


@pytest.fixture(scope="module", params=SEEDS)
def splits(request: pytest.FixtureRequest) -> dict[str, Rows]:
    return find_dataset(Recipe(task="demo")).load(None, request.param)


def triples(rows: Rows) -> list[tuple[str, str, int]]:
    assert rows.second is not None
    return list(zip(rows.first, rows.second, map(int, rows.labels), strict=True))


def test_sizes_and_balance(splits: dict[str, Rows]) -> None:
    assert {name: len(rows) for name, rows in splits.items()} == {"train": 4800, "dev": 960}
    for rows in splits.values():
        assert sum(rows.labels) == len(rows) / 2
        assert len(set(triples(rows))) == len(rows)


def test_a_label_says_whether_both_sentences_tell_the_same_event(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        for premise, hypothesis, label in triples(rows):
            assert demo.LABELS[label] == (
                "entailment" if event_of(premise) == event_of(hypothesis) else "not_entailment"
            ), (premise, hypothesis)


def test_every_bag_of_words_has_both_labels_equally_often(splits: dict[str, Rows]) -> None:
    for rows in splits.values():
        bags: dict[tuple[tuple[str, ...], tuple[str, ...]], Counter[int]] = {}
        for premise, hypothesis, label in triples(rows):
            bag = tuple(sorted(premise.split())), tuple(sorted(hypothesis.split()))
            bags.setdefault(bag, Counter())[label] += 1
        assert all(count[0] == count[1] for count in bags.values())


def test_no_premise_of_dev_is_told_in_train_in_either_voice(splits: dict[str, Rows]) -> None:
    events = {name: {event_of(premise) for premise in rows.first} for name, rows in splits.items()}
    assert not events["train"] & events["dev"]
    assert len(events["train"] | events["dev"]) == 2880


def test_all_three_exchanges_and_both_voices_occur(splits: dict[str, Rows]) -> None:
    kinds, voices = Counter(), Counter()
    for premise, hypothesis, label in triples(splits["dev"]):
        premise_event, event = event_of(premise), event_of(hypothesis)
        voices["were" in hypothesis, label] += 1
        if not label:
            kinds[premise_event.doer[0] == event.doer[0], premise_event.doer[1] == event.doer[1]] += 1
    assert set(kinds) == {(False, False), (True, False), (False, True)}
    assert min(kinds.values()) > 100
    assert len(voices) == 4
    assert min(voices.values()) > 100


def test_rows_depend_on_the_seed_alone() -> None:
    assert demo.load_demo(None, 3) == demo.load_demo(None, 3)
    assert demo.load_demo(None, 3) != demo.load_demo(None, 4)


def test_data_is_refused() -> None:
    with pytest.raises(DataError, match=r"makes its own rows, and was given mine\.csv"):
        demo.load_demo("mine.csv", 0)


def test_the_tokenizer_is_berts_and_survives_a_folder(tmp_path: Path) -> None:
    tokens = demo.demo_tokenizer()
    tokens.save_pretrained(tmp_path)
    reloaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (tmp_path / "tokenizer.json").is_file()
    assert reloaded.is_fast
    for tokenizer in (tokens, reloaded):
        encoded = tokenizer("old foxes chased red cats", "Red CATS were chased by old zebras")
        words = tokenizer.convert_ids_to_tokens(encoded["input_ids"])
        assert words == [
            *("[CLS]", "old", "foxes", "chased", "red", "cats", "[SEP]"),
            *("red", "cats", "were", "chased", "by", "old", "[UNK]", "[SEP]"),
        ]
        assert encoded["token_type_ids"] == [0] * 7 + [1] * 8
        assert (tokenizer.pad_token_id, tokenizer.mask_token, tokenizer.model_max_length) == (
            0,
            "[MASK]",
            demo.POSITIONS,
        )
        assert tokenizer("old foxes")["token_type_ids"] == [0, 0, 0, 0]


def test_the_vocabulary_knows_every_word_and_every_row_fits(splits: dict[str, Rows]) -> None:
    tokens = demo.demo_tokenizer()
    for rows in splits.values():
        ids = tokens(rows.first, rows.second)["input_ids"]
        assert not any(tokens.unk_token_id in row for row in ids)
        assert max(map(len, ids)) == 15


def test_the_model_is_fresh_seeded_and_reloads_with_stock_classes(tmp_path: Path) -> None:
    state = torch.get_rng_state()
    model, _ = demo.build_demo_model(5)
    assert torch.equal(torch.get_rng_state(), state)
    same_seed, other_seed = demo.build_demo_model(5)[0].state_dict(), demo.build_demo_model(6)[0].state_dict()
    assert all(torch.equal(weight, same_seed[name]) for name, weight in model.state_dict().items())
    assert any(not torch.equal(weight, other_seed[name]) for name, weight in model.state_dict().items())
    assert len(find_layer_stack(model)) == 4
    assert len(find_prunable_weights(model)) == 24
    assert model.config.id2label == {0: "not_entailment", 1: "entailment"}
    model.save_pretrained(tmp_path)
    eager = AutoModelForSequenceClassification.from_pretrained(tmp_path, attn_implementation="eager").eval()
    batch = demo.demo_tokenizer()(["old foxes chased red cats"], ["red cats chased old foxes"], return_tensors="pt")
    with torch.no_grad():
        outputs = eager(**batch, output_attentions=True)
        torch.testing.assert_close(outputs.logits, model.eval()(**batch).logits)
    assert len(outputs.attentions) == 4


@pytest.mark.slow
def test_the_model_learns_the_rows_that_share_their_words() -> None:
    model, tokens = demo.build_demo_model(0)
    rows = demo.load_demo(None, 0)["train"].select(range(16))
    batch = tokens(rows.first, rows.second, padding=True, return_tensors="pt")
    labels = torch.tensor(rows.labels)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(60):
        optimizer.zero_grad()
        model(**batch, labels=labels).loss.backward()
        optimizer.step()
    assert torch.equal(model(**batch).logits.argmax(1), labels)


def test_listing_the_tasks_waits_for_no_heavy_import() -> None:
    script = (
        "import sys; from spdtool import plugins; names = [p.name for p in plugins.datasets.entries()];"
        "assert 'demo' in names and 'rte' in names, names;"
        "heavy = {'torch', 'transformers', 'datasets', 'tokenizers', 'pyarrow'} & set(sys.modules);"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", script], check=True, timeout=60)
