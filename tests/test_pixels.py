"""Pixels as bytes: the same numbers, to the bit, in an eighth of the room; or none where a processor does otherwise."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, TrainingArguments
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from families import FAMILIES, QWEN_MARK, prompts
from trainers import some_groups, trainer_of
from unidpo.errors import ImageError
from unidpo.model.encode import CHATML, Encoder, plain_positions
from unidpo.model.features import image_features, without_pixels
from unidpo.model.logps import response_logps
from unidpo.model.packs import pack, pad
from unidpo.model.pixels import with_pixels
from unidpo.model.transfer import Parcel
from worlds import GOLDEN, group, tiny_policy

SEEING = [name for name, family in FAMILIES.items() if family.processor is not None]


def encoder_of(name):
    """Of a family's processor; no model is needed to look at images."""
    family = FAMILIES[name]
    tokenizer = AutoTokenizer.from_pretrained(GOLDEN / "model", extra_special_tokens=dict(family.tokens))
    tokenizer.chat_template = CHATML.replace(QWEN_MARK, family.mark)
    return Encoder(family.processor(tokenizer), plain_positions)


@pytest.mark.parametrize("name", SEEING)
def test_every_familys_pixels_are_what_its_processor_makes_of_them(name):
    plain, groups = encoder_of(name), prompts(images=True)
    bytewise = plain.in_bytes(groups)
    for one in groups:
        expected, found = plain.encode(one).vision, bytewise.encode(one).vision
        assert ("pixel_bytes" in found) is (bool(one.images) and name.startswith("Qwen"))
        found = with_pixels(found)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], tensor) for key, tensor in expected.items())
    assert bytewise.fingerprint() == plain.fingerprint()


def test_an_image_takes_an_eighth():
    plain, one = tiny_policy()[2], group(side=448)
    bytewise = plain.in_bytes([one])
    whole, small = (Parcel.of(encoder.encode(one)).buffer.nbytes for encoder in (plain, bytewise))
    assert whole / small > 7


def test_images_in_bytes_give_the_same_log_probabilities_and_features():
    model, _, plain = tiny_policy()
    groups = [group(images=2), group(images=0, seed=1), group(images=1, seed=2, side=84)]
    bytewise = plain.in_bytes(groups)
    for collate in (pack, lambda encoded: pad(encoded, pad_token_id=0)):
        expected, found = (collate([encoder.encode(one) for one in groups]) for encoder in (plain, bytewise))
        assert "pixel_values" not in found.vision
        assert without_pixels(found.vision).keys() == {"image_grid_thw"}
        if collate is not pack:
            assert torch.equal(response_logps(model, found), response_logps(model, expected))
        assert torch.equal(image_features(model, found.vision).pooled, image_features(model, expected.vision).pooled)


class OfEachImage(Qwen2VLImageProcessorPil):
    """Takes each image's own mean, which no table of bytes can know."""

    def normalize(self, image, mean, std, **kwargs):
        return super().normalize(image, mean if image.shape[-1] == 224 else image.mean() * 1.01, std, **kwargs)


class OfOnlySome(Qwen2VLImageProcessorPil):
    def _preprocess(self, images, **kwargs):
        if not kwargs["do_rescale"]:
            raise NotImplementedError
        return super()._preprocess(images, **kwargs)


@pytest.mark.parametrize("kind", [OfEachImage, OfOnlySome])
def test_a_processor_that_does_otherwise_keeps_its_own_pixels(kind):
    encoder, one = tiny_policy()[2], group(side=56)
    encoder.processor.image_processor = kind()
    bytewise = encoder.in_bytes([one])
    expected, found = encoder.encode(one).vision, bytewise.encode(one).vision
    assert torch.equal(found["pixel_values"], expected["pixel_values"])


def test_an_image_that_cannot_be_read_is_named_where_it_is_met(tmp_path):
    gone = replace(group(), images=(tmp_path / "gone.png",))
    bytewise = tiny_policy()[2].in_bytes([gone, group(seed=1)])
    assert "pixel_bytes" in bytewise.encode(group()).vision
    with pytest.raises(ImageError, match=r"gone\.png"):
        bytewise.encode(gone)


@pytest.mark.parametrize(("device", "key"), [("cpu", "pixel_values"), ("meta", "pixel_bytes")])
def test_a_trainer_has_bytes_travel_where_there_is_a_device(tmp_path, monkeypatch, device, key):
    own = TrainingArguments.device.fget
    monkeypatch.setattr(TrainingArguments, "device", property(lambda args: own(args) and torch.device(device)))
    trainer = trainer_of(tmp_path, some_groups(1))
    assert key in trainer._setup_maker.encoder.encode(some_groups(1)[0]).vision
    assert "pixel_values" in trainer.encoder.encode(some_groups(1)[0]).vision
