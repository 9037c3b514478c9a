"""The gates on sentence encoders: planted faults of pooling, normalization, prompts and length are caught."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import toys

import spdtool
from spdtool.errors import GateError
from spdtool.export.gates.checked_export import export_and_check
from spdtool.export.gates.folder import check_folder
from spdtool.export.gates.reference import Reference, prepare_dev_sets
from spdtool.export.gates.sentence import check_pooled_states, check_sentence_files
from spdtool.export.target import get_target
from spdtool.models.load import load_model, load_tokenizer
from spdtool.models.sentence import sentence_settings
from spdtool.recipe.reading import request_recipe

pytestmark = pytest.mark.slow  # a model is traced
TEXTS = ["the film was good", "a very cold meal", "good", "it was a dull book and a warm film"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Reference]:
    root = tmp_path_factory.mktemp("sentence")
    teacher = toys.sentence_encoder(root / "teacher", prompts={"query": "the "}, default_prompt="query")
    (root / "texts.txt").write_text("\n".join(dict.fromkeys(toys.rows(60).first)), "utf-8")
    sets = ["neighbour_texts=12", "dev_share=0.4", "export.sentences=8", "max_length=16"]
    recipe = request_recipe(data=root / "texts.txt", teacher=teacher, sets=sets)
    reference = Reference(teacher, prepare_dev_sets(teacher, recipe), recipe)
    figures = export_and_check(get_target("onnx"), reference, root / "out", ["cpu"])
    assert figures.dev == {"score": 1.0, "neighbours": 1.0}
    return root / "out", reference


def test_the_exported_folder_gives_the_vectors_of_its_checkpoint(exported: tuple[Path, Reference]) -> None:
    folder, reference = exported
    model = spdtool.load(folder)
    tokenizer = load_tokenizer(reference.checkpoint)
    encoding = tokenizer(["the " + text for text in TEXTS], padding=True, return_tensors="pt")
    expected = load_model(reference.checkpoint)(**encoding).sentence_embedding.detach().numpy()
    vectors = np.array(model(TEXTS))
    np.testing.assert_allclose(vectors, expected, atol=1e-5)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(model(TEXTS[0]), expected[0], atol=1e-5)
    assert model.max_length == 24
    assert json.loads((folder / "config.json").read_text("utf-8"))["architectures"] == ["BertModel"]


def test_planted_faults_of_a_folder_are_caught(exported: tuple[Path, Reference]) -> None:
    folder, reference = exported
    check_sentence_files(folder, reference)
    modules = json.loads((folder / "modules.json").read_text("utf-8"))
    pooling = {"pooling_mode_cls_token": True, "word_embedding_dimension": 32}
    for name, content, message in (
        ("1_Pooling/config.json", pooling, "pooling 'cls'"),
        ("1_Pooling/config.json", {"pooling_mode_max_tokens": True}, "pools by 'max'"),
        ("modules.json", modules[:2], "normalize False"),
        ("config_sentence_transformers.json", {}, "prompt ''"),
        (
            "config_sentence_transformers.json",
            {"prompts": {"query": "a "}, "default_prompt_name": "query"},
            "prompt 'a '",
        ),
        ("sentence_bert_config.json", {"max_seq_length": 12}, "max_length 12"),
        ("modules.json", [*modules, modules[1]], "has the modules"),
    ):
        before = (folder / name).read_text("utf-8")
        (folder / name).write_text(json.dumps(content), "utf-8")
        with pytest.raises(GateError, match=message):
            check_sentence_files(folder, reference)
        (folder / name).write_text(before, "utf-8")
    check_folder(get_target("onnx"), reference, folder, "cpu")


def test_pooling_that_differs_from_a_clients_is_detected(exported: tuple[Path, Reference]) -> None:
    _, reference = exported
    settings = sentence_settings(reference.model)
    assert settings is not None
    generator = np.random.default_rng(0)
    states, mask = generator.random((3, 5, 8), np.float32), np.array([[1] * 5, [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])
    vectors = settings.pool(states, mask)
    check_pooled_states(vectors, states, mask, settings, 1e-6)
    for fault in (states[:, 0], 2 * vectors, settings.pool(states, np.ones_like(mask))):
        with pytest.raises(GateError, match="clients that pool by themselves"):
            check_pooled_states(fault, states, mask, settings, 1e-4)
