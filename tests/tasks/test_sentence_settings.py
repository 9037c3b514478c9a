"""Settings of sentence-transformers folders, old and new."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import toys
from safetensors.torch import load_file, save_file

from spdtool.errors import ModelError
from spdtool.models.load import load_model, load_tokenizer, save_model
from spdtool.models.sentence import pool, sentence_settings
from spdtool.tasks.sentence_settings import read_pooling_mode, read_sentence_settings


def test_poolings_of_torch_and_numpy_agree(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    states, mask = (
        generator.standard_normal((3, 6, 4)).astype(np.float32),
        np.array([[1] * 6, [1] * 3 + [0] * 3, [0] * 4 + [1] * 2]),
    )
    for pooling in ("mean", "cls", "lasttoken"):
        for normalize in (True, False):
            folder = toys.sentence_encoder(tmp_path / f"{pooling}{normalize}", pooling=pooling, normalize=normalize)
            settings = read_sentence_settings(folder)
            assert (settings.pooling, settings.normalize, settings.max_length) == (pooling, normalize, 24)
            vectors = pool(torch.tensor(states), torch.tensor(mask), settings).numpy()
            np.testing.assert_allclose(settings.pool(states, mask), vectors, atol=1e-6, err_msg=pooling)
    assert np.array_equal(vectors[1], states[1, 2])  # the last token, not the padding behind it


def test_both_forms_of_a_pooling_are_read() -> None:
    for config, mode in (
        ({"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False}, "mean"),
        ({"pooling_mode": "cls", "embedding_dimension": 8}, "cls"),
        ({"pooling_mode_lasttoken": True}, "lasttoken"),
    ):
        assert read_pooling_mode(config, "x") == mode
    for config in ({"pooling_mode": "max"}, {}, {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": True}):
        with pytest.raises(ModelError, match="pools by"):
            read_pooling_mode(config, "x")


def test_a_saved_sentence_encoder_equals_its_source(tmp_path: Path) -> None:
    source = toys.sentence_encoder(tmp_path / "source", prompts={"query": "the ", "passage": "a "})
    model, tokenizer = load_model(source), load_tokenizer(source)
    save_model(model, tokenizer, tmp_path / "copy")
    assert read_sentence_settings(tmp_path / "copy") == read_sentence_settings(source) == sentence_settings(model)
    reloaded = load_model(tmp_path / "copy")
    for name, weight in model.state_dict().items():
        assert torch.equal(weight, reloaded.state_dict()[name]), name
    assert load_tokenizer(tmp_path / "copy").model_max_length == 24
    assert tokenizer.sentence_prompts == ("the ", "a ")


def test_a_folder_that_names_the_class_of_its_pretraining_is_an_encoder(tmp_path: Path) -> None:
    folder = toys.sentence_encoder(tmp_path)
    before = load_model(folder)
    weights = load_file(folder / "model.safetensors")
    weights = {f"bert.{name}": weight for name, weight in weights.items() if "pooler" not in name}
    save_file(weights | {"cls.predictions.bias": torch.zeros(25)}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text("utf-8"))
    (folder / "config.json").write_text(json.dumps(config | {"architectures": ["BertForMaskedLM"]}), "utf-8")
    model = load_model(folder)
    assert model.config.architectures == ["BertModel"]
    tokens = torch.tensor([[2, 7, 9, 3]])
    assert torch.equal(model(tokens).sentence_embedding, before(tokens).sentence_embedding)
    assert not model.pooler.dense.weight.any()


def test_matryoshka_dimensions_come_from_the_card(tmp_path: Path) -> None:
    folder = toys.sentence_encoder(tmp_path)
    assert read_sentence_settings(folder).dimensions == ()
    (folder / "README.md").write_text('```json\n{"loss": "x", "matryoshka_dims": [\n 16, 8\n]}\n```', "utf-8")
    assert read_sentence_settings(folder).dimensions == (16, 8)


def test_an_encoder_alone_and_unknown_modules_are_refused(tmp_path: Path) -> None:
    folder = toys.sentence_encoder(tmp_path)
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    modules[2]["type"] = "sentence_transformers.models.Dense"
    (folder / "modules.json").write_text(json.dumps(modules), "utf-8")
    with pytest.raises(ModelError, match="has the modules Transformer, Pooling, Dense"):
        load_model(folder)
    (folder / "modules.json").unlink()
    with pytest.raises(ModelError, match="is no fine-tuned classifier"):
        load_model(folder)


def test_files_that_are_not_those_of_sentence_transformers_are_refused(tmp_path: Path) -> None:
    cases = (
        ("modules.json", ["Pooling"], "a module without a type and a path"),
        ("modules.json", [{"type": "x.Transformer"}, {"type": "x.Pooling"}], "a module without a type and a path"),
        ("config_sentence_transformers.json", {"prompts": ["query: "]}, "has the prompts"),
        ("config_sentence_transformers.json", {"prompts": {"query": 1}}, "has the prompts"),
        ("config_sentence_transformers.json", {"prompts": {"query": "\ud800"}}, "has the prompts"),
        ("config_sentence_transformers.json", {"truncate_dim": -1}, "has the truncate_dim -1"),
        ("sentence_bert_config.json", {"max_seq_length": 0}, "has the max_seq_length 0"),
        ("sentence_bert_config.json", {"max_seq_length": True}, "has the max_seq_length True"),
    )
    for number, (name, content, message) in enumerate(cases):
        folder = toys.sentence_encoder(tmp_path / str(number))
        (folder / name).write_text(json.dumps(content), "utf-8")
        with pytest.raises(ModelError, match=message):
            read_sentence_settings(folder)
