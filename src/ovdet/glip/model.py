"""GLIP: image pyramid, text states and grounding head as one module."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ovdet.glip import boxes as ops
from ovdet.glip.decode import Selection, select_detections
from ovdet.glip.head import GroundingHead, Text
from ovdet.glip.image import ImageEncoder
from ovdet.glip.losses import GroundTruth, glip_losses
from ovdet.glip.text import BertText, ClipText
from ovdet.glip.tokens import Encoded, Tokenizer, pad
from ovdet.parts.boxes import to_device

PROMPT_ROWS = 1000  # of the published table; a text uses the first of them


@dataclass
class Prompt:
    """A text with the phrases to be found in it.

    Attributes:
        encoded: its tokens.
        tokens: token positions of each phrase.
        labels: what each phrase is called in results: rows of a class list, or phrases of a caption.
        sided: whether the text speaks of left or right, and is not to be asked of a mirrored image.
    """

    encoded: Encoded
    tokens: list[list[int]]
    labels: list[int]
    sided: bool = False


class GLIP(nn.Module):
    """Grounded language-image pre-training (Li et al. 2022).

    Args:
        image: pixels to levels; text: token ids to states; head: both to logits and boxes.
        tokenizer: that belongs to ``text``.
        prompt: have a table that is added to the text states, zero at first (tuning modes ``language_prompt_v2``, v4).

    Calls are counted in :attr:`encoded_images` and :attr:`encoded_texts`: a long list of classes is many texts, but the
    image side is computed once.
    """

    def __init__(
        self,
        image: ImageEncoder,
        text: BertText | ClipText,
        head: GroundingHead,
        tokenizer: Tokenizer,
        *,
        prompt: bool = False,
    ) -> None:
        super().__init__()
        self.image, self.text, self.head, self.tokenizer = image, text, head, tokenizer
        self.prompt = nn.Parameter(torch.zeros(PROMPT_ROWS, text.width)) if prompt else None
        self.text_frozen = False
        self.encoded_images = self.encoded_texts = 0

    # -- encoders -----------------------------------------------------------------------------------------------------

    def encode_image(self, images: Tensor, sizes: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Levels ``[B, C, h_i, w_i]`` of uint8 RGB images ``[B, 3, H, W]``.

        Args:
            sizes: (height, width) of each image without its padding, which is right and at the bottom.
        """
        self.encoded_images += len(images)
        levels = self.image(self.image.normalize(images, sizes))
        if not self.head.reads_text:
            # Nothing of the text enters the tower: it belongs to the image side.
            return self.head.tower(levels, _NO_TEXT)[0]
        return levels

    def encode_text(self, texts: Sequence[Encoded]) -> Text:
        """States ``[B, T, L]`` of texts, T the longest of them.

        Raises:
            UserError: a text of more tokens than the encoder takes.
        """
        self.encoded_texts += len(texts)
        ids, mask = (to_device(t, self.head.bias0.device) for t in pad(texts, self.tokenizer))
        hidden = self.text(ids, mask)
        if self.prompt is not None:
            hidden = hidden + self.prompt[: hidden.shape[1]]
        return Text(hidden, mask)

    # -- training -----------------------------------------------------------------------------------------------------

    def forward(
        self,
        images: Tensor,
        sizes: Sequence[tuple[int, int]],
        texts: Sequence[Encoded],
        truths: Sequence[GroundTruth],
        *,
        world_size: int = 1,
    ) -> dict[str, Tensor]:
        """Losses of a batch.

        Args:
            images, sizes: see :meth:`encode_image`.
            texts: one per image.
            truths: boxes and their phrases' tokens; columns beyond the longest text of the batch are cut off.
            world_size: see :func:`ovdet.glip.losses.glip_losses`.
        """
        levels, text = self.encode_image(images, sizes), self.encode_text(texts)
        output = self._head(levels, text)
        width = text.mask.shape[1]
        cut = [GroundTruth(t.boxes, t.tokens[:, :width]) for t in truths]
        anchors = ops.make_anchors(output.grids, self.image.strides, images.device)
        # The last column of the reference's 256 stands for "nothing" and counts only in a text that fills all of them.
        full = width == self.tokenizer.limit
        return glip_losses(output, text.mask, anchors, cut, no_object=full, world_size=world_size)

    def _head(self, levels: list[Tensor], text: Text):
        return self.head(levels, text) if self.head.reads_text else self.head.predict(levels, text)

    # -- detection ----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def detect(
        self,
        levels: list[Tensor],
        text: Text,
        prompts: Sequence[Prompt],
        sizes: Sequence[tuple[int, int]],
        originals: Sequence[tuple[int, int]],
        options: Selection,
    ) -> list[dict[str, Tensor]]:
        """Detections of images that are encoded, for one prompt each.

        Args:
            levels: of B images, see :meth:`encode_image`; text: of one prompt for all, or of B.
            prompts: what ``text`` was encoded from.
            sizes: (height, width) in the input, without padding; originals: of the image file.
            options: what is kept.

        Returns:
            Per image and by falling score ``boxes`` ``[K, 4]``, xyxy in pixels of the original, ``scores`` ``[K]`` and
            ``labels`` int64 ``[K]``, of the prompt. Last pixels are scaled before one is added, as published results
            are, so a box may end up to a pixel outside of an image that is smaller than the input.
        """
        number = len(sizes)
        shared = len(prompts) == 1 and number > 1
        if shared:
            text = Text(text.hidden.expand(number, -1, -1), text.mask.expand(number, -1))
            prompts = [prompts[0]] * number
        output = self._head(levels, text)
        anchors = ops.make_anchors(output.grids, self.image.strides, output.boxes.device)
        tokens = [p.tokens for p in prompts]
        found = select_detections(output, anchors, tokens, sizes, options, own=True)
        for result, prompt, size, original in zip(found, prompts, sizes, originals, strict=True):
            labels = torch.tensor(prompt.labels, device=result["labels"].device, dtype=torch.int64)
            result["labels"] = labels[result["labels"]]
            result["boxes"] = ops.to_exclusive(ops.rescale(result["boxes"], size, original))
        return found


_NO_TEXT = Text(torch.zeros(0), torch.zeros(0, dtype=torch.bool))
