"""Images through frames beside the plain modules, and prompts with images when nobody waits for the device."""

from __future__ import annotations

import pytest
import torch
from test_prefill import FakeGraph
from test_vlm import pixels, prompt, tiny
from torch.testing import assert_close

from vlmamba.models import MambaState, prefill_images, vlm
from vlmamba.models.prefill_images import parts_of


@pytest.fixture
def model():
    return tiny()


@pytest.fixture
def graph() -> FakeGraph:
    return FakeGraph()


def through(model, images, graph):
    return prefill_images._through_reader(model, images, model._features, graph)


def test_numbers_of_images_are_put_together():
    for images in range(1, 40):
        parts = parts_of(images)
        assert sum(parts) == images
        assert set(parts) <= {1, 2, 4, 8}
        assert parts == sorted(parts, reverse=True)
    assert parts_of(11) == [8, 2, 1]


@torch.no_grad()
def test_frames_are_the_modules(model, graph):
    for count in (3, 1, 3, 2, 11, 3):
        assert_close(through(model, pixels(count, seed=count), graph), model._features(pixels(count, seed=count)))
    assert graph.captured == 2  # of one and two images; eight came once
    first = through(model, pixels(1), graph)
    kept = first.clone()
    through(model, pixels(1, seed=7), graph)
    assert torch.equal(first, kept)
    assert_close(through(model, pixels(1, height=24), graph), model._features(pixels(1, height=24)))


@torch.no_grad()
def test_changed_weights_and_refusals(model, graph, recwarn):
    image = pixels(1)
    for _ in range(2):
        through(model, image, graph)
    reader = prefill_images._readers[model]
    model.connector.linear_in.weight.mul_(2)  # in place: the graph reads it
    assert_close(through(model, image, graph), model._features(image))
    assert prefill_images._readers[model] is reader
    model.connector.linear_in.weight.data = model.connector.linear_in.weight.data * 2
    assert_close(through(model, image, graph), model._features(image))
    assert prefill_images._readers[model] is not reader
    handle = model.vision_tower.register_forward_hook(lambda *_: None)
    for _ in range(2):
        assert_close(through(model, image, graph), model._features(image))
    assert model not in prefill_images._readers
    assert ["without a captured graph: VisionTower has hooks" in str(w.message) for w in recwarn] == [True]
    handle.remove()
    model.connector.linear_in = type("Adapted", (torch.nn.Linear,), {"__module__": "peft.tuners"})(16, 20).eval()
    parts = (model.vision_tower, model.connector)
    assert "linear_in is a Adapted" in prefill_images.refusal(parts)
    assert "training mode" in prefill_images.refusal((model.train().connector,))


@torch.no_grad()
def test_prompts_checked_late_are_the_same(model, monkeypatch):
    """As on a GPU: the layout is known only after everything was launched."""
    ids = torch.cat([prompt(3, "image", 4, 5), prompt("image", 8, 9, 2)])
    early = model(ids, pixels(2)).logits
    text = model(prompt(5, 6)).logits
    monkeypatch.setattr(vlm, "can_wait", lambda _: True)
    assert torch.equal(model(ids, pixels(2)).logits, early)
    assert torch.equal(model(prompt(5, 6)).logits, text)
    for images, message in ((1, "32 image placeholders, the 1 images give 16"), (3, "the 3 images give 48")):
        with pytest.raises(ValueError, match=message):
            model(ids, pixels(images))
    with pytest.raises(ValueError, match="16 image placeholders, but no pixel_values"):
        model(prompt("image"))


def test_gradients_reach_the_connector_as_without(model):
    """With a gradient tokens are scattered, without one gathered: the same embeddings."""
    ids, image = prompt(3, "image", 4), pixels(1)
    with torch.no_grad():
        gathered, _ = model._with_images(ids, image)
    scattered, _ = model._with_images(ids, image)
    assert_close(scattered, gathered, rtol=0, atol=0)
    scattered.sum().backward()
    assert model.connector.linear_out.weight.grad.abs().max() > 0


# On a GPU: the public path.


@pytest.mark.gpu
@torch.no_grad()
def test_image_prompts_on_the_gpu():
    """First token and answer by graphs, the same as piece by piece; a wrong number of images is still an error."""
    model = tiny().to("cuda", torch.bfloat16)
    ids, images = prompt(3, "image", 4, 5).cuda(), pixels(1).cuda().bfloat16()
    embeds = model.get_input_embeddings()(ids.masked_fill(ids == 60, 0))
    embeds[:, 1:17] = model._features(images)
    hidden = model.language_model.backbone(inputs_embeds=embeds).last_hidden_state
    expected = model.language_model.lm_head(hidden[:, -1:])[..., :60]
    for _ in range(3):
        output = model(ids, images, use_cache=True, logits_to_keep=1)
        assert_close(output.logits[..., :60], expected, rtol=3e-2, atol=3e-2)
    assert isinstance(output.cache_params, MambaState)
    with pytest.raises(ValueError, match="16 image placeholders, the 2 images give 32"):
        model(ids, torch.cat([images, images]))
    greedy = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    answers = [model.generate(ids, pixel_values=images, attention_mask=torch.ones_like(ids), **greedy) for _ in "123"]
    assert all(torch.equal(a, answers[0]) for a in answers)
