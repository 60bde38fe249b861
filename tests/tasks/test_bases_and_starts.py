"""What a base model brings along must not leak into a run, and a start must fit its job."""

import pytest
import torch
import transformers

from fedlora.config.job import ModelSection
from fedlora.errors import ConfigError
from fedlora.models.loaded import load
from fedlora.models.loading import load_base
from tests.tasks.test_tasks import job, run

torch.set_num_threads(1)


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """A fine-tuned classifier of two classes, "pos" first."""
    folder = tmp_path_factory.mktemp("classifier")
    config = transformers.BertConfig(
        vocab_size=259, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=48, max_position_embeddings=64,
        id2label={0: "pos", 1: "neg"}, label2id={"pos": 0, "neg": 1},
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.BertForSequenceClassification(config).save_pretrained(folder)
    return folder


def head(folder, labels):
    section = ModelSection(name=str(folder), task="sequence-classification")
    return load_base(section, labels=labels, pad_id=0, seed=0).model.classifier.weight


def test_a_head_for_other_classes_is_drawn_anew(classifier):
    """The checkpoint's rows under swapped names would start with classes swapped."""
    own, swapped = head(classifier, ("pos", "neg")), head(classifier, ("neg", "pos"))
    saved = transformers.AutoModelForSequenceClassification.from_pretrained(
        classifier, dtype=torch.float32
    )
    assert torch.equal(own, saved.classifier.weight)
    assert not torch.equal(swapped, own)
    assert torch.equal(swapped, head(classifier, ("neg", "pos")))


@pytest.fixture(scope="module")
def swin(tmp_path_factory):
    """A vision model with stochastic depth, and batch norm added by no config."""
    folder = tmp_path_factory.mktemp("swin")
    config = transformers.SwinConfig(
        image_size=8, patch_size=2, embed_dim=8, depths=[1, 1], num_heads=[2, 2],
        window_size=2, drop_path_rate=0.5,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.SwinForImageClassification(config).save_pretrained(folder)
    transformers.ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(folder)
    return folder


def test_stochastic_depth_of_the_base_is_silent(swin, pictures, tmp_path):
    """The same job twice gives the same bits."""
    made = job(swin, pictures, model={"task": "image-classification"})
    first, second = (run(made, tmp_path / name)[1] for name in "ab")
    assert [e["adapter_sha256"] for e in first] == [e["adapter_sha256"] for e in second]


def test_training_leaves_batch_norm_of_the_base_alone(tmp_path, pictures):
    config = transformers.MobileViTConfig(
        image_size=32, patch_size=2, hidden_sizes=[8, 12, 16], num_attention_heads=2,
        neck_hidden_sizes=[8, 8, 8, 8, 8, 8, 16],
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        transformers.MobileViTForImageClassification(config).save_pretrained(tmp_path / "m")
    size = {"height": 32, "width": 32}
    transformers.ViTImageProcessor(size=size).save_pretrained(tmp_path / "m")
    made = job(
        tmp_path / "m",
        pictures,
        model={"task": "image-classification"},
        federation={"rounds": 1},
    )
    from fedlora.simulation.federation import Federation

    loaded = load(made)
    names = {name for name, _ in loaded.base.model.named_buffers()}
    assert any("running_mean" in name for name in names)
    before = {k: v.clone() for k, v in loaded.base.model.named_buffers()}
    federation = Federation(made, loaded)
    store = federation.start(tmp_path / "run")
    federation.run(store)
    store.close()
    for name, buffer in loaded.base.model.named_buffers():
        assert torch.equal(buffer, before[name]), name


def test_a_start_that_does_not_fit_its_job_is_refused(bert, labelled, tmp_path):
    sections = {"model": {"task": "sequence-classification"}, "federation": {"rounds": 1}}
    run(job(bert, labelled, **sections), tmp_path / "run")
    start = {"start": str(tmp_path / "run" / "adapter"), "rank": 4}
    load(job(bert, labelled, **sections, adapter=start))
    for change, word in (
        ({"method": "dora"}, 'adapter.method = "lora"'),
        ({"rank": 2}, "adapter.rank = 4"),
        ({"alpha": 1.0}, "adapter.alpha = 8"),
        ({"targets": ["query"]}, "adapter.targets"),
    ):
        with pytest.raises(ConfigError, match=word):
            load(job(bert, labelled, **sections, adapter={**start, **change}))
    swapped = {"labels": ["beta", "alpha", "gamma"]}
    with pytest.raises(ConfigError, match="same classes in the same order"):
        load(job(bert, labelled, **sections, adapter=start, data=swapped))


def test_examples_longer_than_the_model_are_refused(gpt2, questions):
    with pytest.raises(ConfigError, match="64 positions"):
        load(job(gpt2, questions, data={"max_length": 65}))


def test_a_device_that_is_not_there_is_refused(gpt2, questions):
    with pytest.raises(ConfigError, match=r"run\.device = 'meta'"):
        load(job(gpt2, questions, run={"device": "meta"}))
