"""The processor: pictures to pixels, prompts to token ids, conversations to label masks.

Letters: I images, H and W pixels, B prompts, L tokens, P tokens of one image.
"""

from __future__ import annotations

import base64
import binascii
import functools
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tokenizers import AddedToken
from torch import Tensor
from transformers.feature_extraction_utils import BatchFeature
from transformers.processing_utils import ProcessorMixin

from vlmamba.models.images import ImageSource, crop_strip, pad_to_square, read_image
from vlmamba.models.loading import check_sizes
from vlmamba.models.preparation import image_processor_class, load_image_processor, load_tokenizer
from vlmamba.models.template import PLACEHOLDER, Piece, message_pieces, turn_pieces

IMAGE_MODES = ("crop", "pad")
IMAGE_PLACES = ("before", "after")
NO_LABEL = -100


class VLMambaProcessor(ProcessorMixin):
    """Image processor and tokenizer of a VL-Mamba.

    Args:
        image_processor: a CLIPImageProcessorPil or SiglipImageProcessorPil.
        tokenizer: a fast tokenizer. `<image>` is added to it if it has none, `<|padding|>` or else the end of text
            becomes its padding token, and it pads on the left, as is usual for generation.
        patch_size, vision_cls: of the vision tower; they give the number of tokens of an image.
        image_mode: "pad", to a square with the mean colour (stage 2 and all use), or "crop", the image processor's own
            resize and crop (stage 1).
        image_token: the placeholder in raw text.
        image_place: "before" or "after" the question it belongs to.
    """

    def __init__(
        self,
        image_processor: Any = None,
        tokenizer: Any = None,
        patch_size: int = 14,
        vision_cls: bool = False,
        image_mode: str = "pad",
        image_token: str = PLACEHOLDER,
        chat_template: str | None = None,
        image_place: str = "before",
    ) -> None:
        self.patch_size = patch_size
        self.vision_cls = vision_cls
        self.image_mode = _checked_mode(image_mode)
        self.image_token = image_token
        if image_place not in IMAGE_PLACES:
            raise ValueError(f"image_place {image_place!r} is unknown; expected one of {', '.join(IMAGE_PLACES)}")
        self.image_place = image_place
        _prepare(tokenizer, image_token)
        self.image_token_id: int = tokenizer.convert_tokens_to_ids(image_token)
        super().__init__(image_processor, tokenizer, chat_template=chat_template)
        height, width = self.image_size
        for name, size in (("patch_size", patch_size), ("image_size", height), ("image_size", width)):
            check_sizes({name: size}, "the processor")

    @classmethod
    def from_parts(
        cls, vision: str | Path, language: str | Path, *, vision_cls: bool = False, image_mode: str = "pad"
    ) -> VLMambaProcessor:
        """The processor for a pre-trained vision encoder and language model, a folder or Hub id each.

        A language model without a tokenizer of its own (state-spaces/mamba-*) gets GPT-NeoX's, and a warning says so.

        Raises:
            ValueError: a part that is not there, or a tokenizer that has more entries than the model has rows.
        """
        from vlmamba.models.weights import fetch, read_vision_config

        folder = fetch(vision)
        config = read_vision_config(folder)
        image_processor = load_image_processor(folder, config)
        return cls(image_processor, load_tokenizer(language), config.patch_size, vision_cls, image_mode)

    @classmethod
    def _get_arguments_from_pretrained(cls, path: Any, processor_dict: dict | None = None, **kwargs: Any) -> list[Any]:
        # transformers' AutoImageProcessor wants torchvision; ours is one of two, and its settings are in the same file.
        from transformers import PreTrainedTokenizerFast

        settings = (processor_dict or {}).get("image_processor")
        if not isinstance(settings, dict):
            raise ValueError(
                f"{path} holds no processor_config.json with an image_processor: no VL-Mamba is saved there"
            )
        return [
            image_processor_class(str(settings.get("image_processor_type")))(**settings),
            PreTrainedTokenizerFast.from_pretrained(path, **kwargs),
        ]

    # ------------------------------------------------------------------ images

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the pixels that the vision tower gets."""
        size = self.image_processor.crop_size if self.image_processor.do_center_crop else self.image_processor.size
        height, width = size.height or size.shortest_edge, size.width or size.shortest_edge
        return height, width

    @property
    def num_image_tokens(self) -> int:
        """P, tokens of one image."""
        return self._tokens_of(*self.image_size)

    def _tokens_of(self, height: int, width: int) -> int:
        return (height // self.patch_size) * (width // self.patch_size) + int(self.vision_cls)

    def image_pixels(self, source: ImageSource, mode: str | None = None) -> np.ndarray:
        """One picture as uint8 (3, H, W), resized but not yet normalised: what a training batch carries."""
        image = source if isinstance(source, Image.Image) and self._is_framed(source) else self._framed(source, mode)
        if image.size == self.image_size[::-1] == self._resized_size:  # nothing is left to do to it
            planes = bytearray().join(image.tobytes("raw", band) for band in "RGB")  # cheaper than to transpose
            return np.frombuffer(planes, np.uint8).reshape(3, image.height, image.width)
        pixels = self.image_processor(image, do_rescale=False, do_normalize=False)["pixel_values"][0]
        return np.ascontiguousarray(pixels, dtype=np.uint8)

    def _is_framed(self, image: Image.Image) -> bool:
        """Of a picture drawn in memory: whether it is a square of the right size already."""
        return (image.mode, image.info) == ("RGB", {}) and image.size == self._resized_size == image.size[::-1]

    def normalise(self, pixels_IHW: Tensor) -> Tensor:
        """uint8 pixels (I, 3, H, W) to what the vision tower expects, float32, on their device."""
        processor = self.image_processor
        mean, std = (_channels(tuple(v), pixels_IHW.device) for v in (processor.image_mean, processor.image_std))
        return (pixels_IHW.float() * processor.rescale_factor - mean) / std

    def _framed(self, source: ImageSource, mode: str | None) -> Image.Image:
        image = read_image(source)
        if _checked_mode(mode or self.image_mode) == "crop":
            return crop_strip(image) if self.image_processor.do_center_crop else self._resized(image)
        red, green, blue = (int(255 * value) for value in self.image_processor.image_mean)
        return self._resized(pad_to_square(image, (red, green, blue)))

    @property
    def _resized_size(self) -> tuple[int, int]:
        """Width and height that the image processor scales a square to, before any crop."""
        size = self.image_processor.size
        return size.width or size.shortest_edge, size.height or size.shortest_edge

    def _resized(self, image: Image.Image) -> Image.Image:
        """As the image processor would, which then finds nothing to do. On its own way to Pillow it copies a picture
        several times; for a photograph of 12 megapixels that takes as long as all the rest."""
        keeps_ratio = self.image_processor.size.width is None
        if not self.image_processor.do_resize or (keeps_ratio and image.width != image.height):
            return image
        return image.resize(self._resized_size, self.image_processor.resample)

    # ------------------------------------------------------------------ raw text

    def __call__(
        self, images: Any = None, text: Any = None, *, image_mode: str | None = None, **kwargs: Any
    ) -> BatchFeature:
        """Raw text and pictures to model inputs; each `<image>` in the text stands for one picture, in reading order.

        Args:
            images: a picture (path, bytes, PIL), a list of them, or one list per text.
            text: a prompt or a list of prompts, in whatever template the caller has written.
            image_mode: "crop" or "pad"; the processor's own otherwise.
            kwargs: as transformers' processors take them (`return_tensors`, `padding`, ...).

        Returns:
            input_ids and attention_mask (B, L), and pixel_values (I, 3, H, W) when there are pictures.

        Raises:
            ValueError: placeholders and pictures do not match in number; a picture cannot be read.
        """
        groups = _grouped(images)
        if text is not None:
            nested = isinstance(images, list | tuple) and any(isinstance(item, list | tuple) for item in images)
            self._check_counts([text] if isinstance(text, str) else list(text), groups, nested)
        flat = [self._framed(image, image_mode) for group in groups for image in group]
        return super().__call__(images=flat or None, text=text, **kwargs)

    def _check_counts(self, texts: list[str], groups: list[list[Any]], nested: bool) -> None:
        if not texts or not all(isinstance(text, str) for text in texts):
            raise ValueError(f"text must be a string or a list of strings; got {texts!r:.80}")
        marks = [text.count(self.image_token) for text in texts]
        given = [len(group) for group in groups]
        if sum(marks) != sum(given):
            raise ValueError(f"{sum(marks)} {self.image_token} placeholder(s) in the text, but {sum(given)} image(s)")
        if nested and marks != given:
            raise ValueError(f"{marks} {self.image_token} placeholders in the texts, but {given} images for them")

    def replace_image_token(self, image_inputs: dict, image_idx: int, **kwargs: Any) -> str:
        """One placeholder per patch of the picture."""
        height, width = image_inputs["pixel_values"][image_idx].shape[-2:]
        return self.image_token * self._tokens_of(height, width)

    # ------------------------------------------------------------------ chat

    def apply_chat_template(
        self,
        conversation: Any,
        chat_template: str | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        begin: bool = True,
        tokenize: bool = False,
        return_dict: bool = False,
        return_tensors: str | None = None,
        image_mode: str | None = None,
        padding: bool = True,
        processor_kwargs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> Any:
        """Chat messages in template v1 (see `vlmamba.models.template`), as token ids or as a string.

        Only image parts are images: `{"type": "image", "image": picture}`, or `path`, `base64`, `url`. Texts are
        tokenised with special tokens off, so `<image>` in a question is seven letters. A string cannot tell the two
        apart: with `tokenize=False`, text that holds a special token is refused.

        Args:
            conversation: a list of messages, or a list of such lists for a batch.
            chat_template: a Jinja template of your own; transformers renders it, with its rules.
            begin: False leaves the system sentence out, for later turns of a conversation that goes on from a state.
            tokenize: ids rather than a string.
            return_dict: input_ids, attention_mask and pixel_values rather than input_ids alone.
            processor_kwargs: `image_mode`, `padding` and `return_tensors`, as transformers' pipeline passes them. With
                it there are always pixel_values, if of no image: a pipeline batches only what has the same names.
        """
        if chat_template is not None or self.chat_template is not None:
            from jinja2 import TemplateError

            try:
                return super().apply_chat_template(
                    conversation,
                    chat_template,
                    add_generation_prompt=add_generation_prompt,
                    continue_final_message=continue_final_message,
                    tokenize=tokenize,
                    return_dict=return_dict,
                    return_tensors=return_tensors,
                    processor_kwargs=processor_kwargs,
                    **kwargs,
                )
            except TemplateError as error:
                raise ValueError(f"the chat template cannot be rendered: {error}") from error
        options: dict[str, Any] = {"image_mode": image_mode, "padding": padding, "return_tensors": return_tensors}
        given = {**(processor_kwargs or {}), **kwargs}
        if unknown := sorted(set(given) - set(options)):
            raise ValueError(
                f"apply_chat_template does not take {', '.join(unknown)}; it takes {', '.join(options)} "
                "(what is meant for generation goes into a pipeline's generate_kwargs)"
            )
        options |= given
        batched = bool(conversation) and isinstance(conversation[0], list | tuple)
        prompts = [
            message_pieces(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                begin=begin,
                image_place=self.image_place,
            )
            for messages in (conversation if batched else [conversation])
        ]
        if not tokenize:
            strings = [self._render(pieces) for pieces, _ in prompts]
            return strings if batched else strings[0]
        rows = [self._encode(pieces)[0] for pieces, _ in prompts]
        images = [_fetched(image) for _, found in prompts for image in found]
        inputs = self._inputs(rows, images, batched=batched, with_pixels=processor_kwargs is not None, **options)
        return inputs if return_dict else inputs["input_ids"]

    def encode_messages(
        self,
        messages: Sequence[dict[str, Any]],
        tokenise: Callable[[str], list[int]] | None = None,
        **options: bool,
    ) -> tuple[list[int], list[Any]]:
        """Chat messages as token ids (L,) in template v1, and their pictures as they were given, not opened.

        `tokenise` as in `encode_turns`; options as `vlmamba.models.template.message_pieces` takes them."""
        pieces, images = message_pieces(messages, image_place=self.image_place, **options)
        return self._encode(pieces, tokenise)[0], images

    def _inputs(
        self,
        rows: list[list[int]],
        images: list[Any],
        *,
        batched: bool,
        with_pixels: bool,
        image_mode: str | None,
        padding: bool,
        return_tensors: str | None,
    ) -> BatchFeature:
        if not batched and return_tensors is None:
            data: dict[str, Any] = {"input_ids": rows[0], "attention_mask": [1] * len(rows[0])}
        else:
            data = dict(self.tokenizer.pad({"input_ids": rows}, padding=padding, return_tensors=return_tensors))
        if images:
            framed = [self._framed(image, image_mode) for image in images]
            data |= self.image_processor(framed, return_tensors=return_tensors)
        elif with_pixels and return_tensors == "pt":
            data["pixel_values"] = torch.empty(0, 3, *self.image_size)
        return BatchFeature(data)

    def _render(self, pieces: list[Piece]) -> str:
        special = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        for piece in pieces:
            for token in special:
                if token in piece.text:
                    raise ValueError(
                        f"the text holds {token!r}, which in a string cannot be told from the special token; "
                        "use apply_chat_template(..., tokenize=True), which keeps it as text"
                    )
        marks = {"image": self.image_token, "end": self.tokenizer.eos_token}
        return "".join(marks.get(piece.kind, piece.text) for piece in pieces)

    # ------------------------------------------------------------------ training

    def encode_turns(
        self,
        pairs: Sequence[tuple[str, str]],
        num_images: int = 0,
        template: str = "v1",
        tokenise: Callable[[str], list[int]] | None = None,
    ) -> dict[str, list[int]]:
        """(question, answer) pairs as input_ids and labels, both of length L; the images belong to the first question.

        Labels are -100 but for the answers and their ends. Template "plain" drops the question.

        Args:
            tokenise: stands in for the tokenizer and gives what it would: one that remembers words, for many texts.

        Raises:
            ValueError: no pairs, an empty answer, several pairs for "plain", or an unknown template.
        """
        ids, labels = self._encode(turn_pieces(pairs, num_images, template, self.image_place), tokenise)
        return {"input_ids": ids, "labels": labels}

    def encode_text(self, text: str, tokenise: Callable[[str], list[int]] | None = None) -> dict[str, list[int]]:
        """A document for the language model alone, its end included, every token a label."""
        ids, labels = self._encode([Piece("text", text, learn=True), Piece("end", learn=True)], tokenise)
        return {"input_ids": ids, "labels": labels}

    def _encode(
        self, pieces: list[Piece], tokenise: Callable[[str], list[int]] | None = None
    ) -> tuple[list[int], list[int]]:
        """Token ids and labels. Neighbouring texts are tokenised as one, with special tokens off."""
        runs: list[tuple[str, str, bool]] = []
        for piece in pieces:
            kind, text, learn = piece
            if runs and kind == "text" == runs[-1][0] and learn == runs[-1][2]:
                runs[-1] = (kind, runs[-1][1] + text, learn)
            else:
                runs.append(piece)
        texts = [_well_formed(text) for kind, text, _ in runs if kind == "text"]
        known: Iterable[list[int]] = [] if tokenise is None else map(tokenise, texts)
        if tokenise is None and texts:
            known = self.tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        encoded = iter(known)
        end = [self.tokenizer.eos_token_id]
        ids: list[int] = []
        labels: list[int] = []
        for what, _, learn in runs:
            if what == "text":
                new = next(encoded)
            elif what == "image":
                new = [self.image_token_id] * self.num_image_tokens
            else:
                new = end
            ids += new
            labels += new if learn else [NO_LABEL] * len(new)
        return ids, labels


def _prepare(tokenizer: Any, image_token: str) -> None:
    """Give a tokenizer what a VL-Mamba needs of it; nothing changes on one that has been given it."""
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(f"a fast tokenizer is expected (tokenizer.json); got {type(tokenizer).__name__}")
    vocabulary = tokenizer.get_vocab()
    if image_token not in vocabulary:
        tokenizer.add_tokens([AddedToken(image_token, special=True, normalized=False)], special_tokens=True)
    if tokenizer.eos_token is None:
        if "<|endoftext|>" not in vocabulary:
            raise ValueError("the tokenizer has no end-of-text token; set its eos_token")
        tokenizer.eos_token = "<|endoftext|>"
    if tokenizer.pad_token is None:
        tokenizer.pad_token = "<|padding|>" if "<|padding|>" in vocabulary else tokenizer.eos_token
    tokenizer.padding_side = "left"
    tokenizer.model_input_names = ["input_ids", "attention_mask"]


def _well_formed(text: str) -> str:
    """The text with `?` for halves of characters, which undecodable bytes of a terminal or JSON's escapes leave."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode("utf-8")


def _checked_mode(mode: str) -> str:
    if mode not in IMAGE_MODES:
        raise ValueError(f"image_mode {mode!r} is unknown; expected one of {', '.join(IMAGE_MODES)}")
    return mode


def _grouped(images: Any) -> list[list[Any]]:
    """Pictures in groups, one per text where nested, each its own group where flat."""
    if images is None:
        return []
    if not isinstance(images, list | tuple):
        return [[images]]
    return [list(item) if isinstance(item, list | tuple) else [item] for item in images]


def _fetched(image: Any) -> Any:
    """What an image part of a message refers to: an address is opened by transformers' loader, `data:` is decoded.

    A server must not get here with an address from its clients: it fetches by its own rules first.
    """
    if image is None:
        raise ValueError('an image part without a picture; expected {"type": "image", "image": picture}')
    if not isinstance(image, str):
        return image
    if image.startswith("data:"):
        try:
            return base64.b64decode(image.partition(",")[2], validate=True)
        except binascii.Error as error:
            raise ValueError(f"a data: address that is not base64: {error}") from error
    if image.startswith(("http://", "https://")):
        from transformers.image_utils import load_image

        try:
            return load_image(image)
        except Exception as error:  # the network, the server and the picture each have errors of their own
            raise ValueError(f"{image:.200} cannot be fetched: {error}") from error
    return image


@functools.cache
def _channels(values: tuple[float, ...], device: torch.device) -> Tensor:
    """(3, 1, 1), kept: with every copy to a GPU the host would wait for all the work given to it before."""
    with torch.inference_mode(False):
        return torch.tensor(values, dtype=torch.float32, device=device).view(3, 1, 1)
