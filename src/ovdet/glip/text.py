"""Text encoders: BERT, and the text tower of a CLIP model. Both give one state per token."""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from open_clip.text_tower import TextTower
from training.engine.errors import UserError

log = logging.getLogger(__name__)

#: bert-base-uncased.
BERT_BASE: Mapping[str, int] = {"width": 768, "layers": 12, "heads": 12, "hidden": 3072, "vocabulary": 30522}
BERT_POSITIONS = 512
_NO_TRANSFORMERS = 'the BERT text encoder needs the package transformers: pip install "transformers>=4.48"'


class BertText(nn.Module):
    """BERT without its pooler (Devlin et al. 2019), with random weights.

    Args:
        width, layers, heads, hidden, vocabulary: size of the model.
        dropout: while training.

    Raises:
        UserError: the package ``transformers`` is not installed.
    """

    def __init__(
        self, *, width: int, layers: int, heads: int, hidden: int, vocabulary: int, dropout: float = 0.1
    ) -> None:
        super().__init__()
        try:
            from transformers import BertConfig, BertModel
        except ImportError as error:
            raise UserError(_NO_TRANSFORMERS) from error
        config = BertConfig(
            vocab_size=vocabulary, hidden_size=width, num_hidden_layers=layers, num_attention_heads=heads,
            intermediate_size=hidden, max_position_embeddings=BERT_POSITIONS, hidden_dropout_prob=dropout,
            attention_probs_dropout_prob=dropout, use_cache=False,
        )  # fmt: skip
        self.model = BertModel(config, add_pooling_layer=False)
        self.width, self.vocabulary, self._recompute = width, vocabulary, False

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the layers in the backward pass."""
        if enable != self._recompute:
            self._recompute = enable
            # Renamed in transformers 5; the former name goes with 6.
            name = f"activation_checkpointing_{'enable' if enable else 'disable'}"
            name = name if hasattr(self.model, name) else name.replace("activation", "gradient")
            getattr(self.model, name)(*([{"use_reentrant": False}] if enable else []))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States ``[B, T, L]`` of ids int64 ``[B, T]``; ``mask`` bool ``[B, T]``, False for padding."""
        return self.model(input_ids=ids, attention_mask=mask.long()).last_hidden_state

    def load_pretrained(self, source: str, cache_dir: str | None = None) -> None:
        """Weights of a BERT: a folder (``model.safetensors`` or ``pytorch_model.bin``), or a name of the hub.

        Raises:
            UserError: nothing there, offline, or a BERT of another size.
        """
        file = _weights_file(source, cache_dir)
        state = _bert_state(file)
        own = self.model.state_dict()
        unfit = [k for k, v in own.items() if k not in state or state[k].shape != v.shape]
        if unfit:
            raise UserError(
                f"text.weights {source}: {len(unfit)} of {len(own)} parameters are missing or of another shape "
                f"({unfit[0]}): give the BERT that the config's [text] section describes"
            )
        self.model.load_state_dict({k: state[k] for k in own})
        log.info("text encoder: %d parameters from %s", len(own), file)


def is_hub_name(source: str) -> bool:
    """Whether a text can be a name of the hub ("bert-base-uncased", "google/bert"), and is no path."""
    return re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", source) is not None and not source.endswith((".txt", ".bin"))


def _weights_file(source: str, cache_dir: str | None) -> Path:
    names = ("model.safetensors", "pytorch_model.bin")
    path = Path(source)
    if path.is_file():
        return path
    if path.is_dir():
        for name in names:
            if (path / name).is_file():
                return path / name
        raise UserError(f"text.weights {source}: the folder holds neither {' nor '.join(names)}: put one of them there")
    if not is_hub_name(source):
        raise UserError(f"text.weights {source} does not exist: give a folder with model.safetensors, or a hub name")
    from huggingface_hub import hf_hub_download

    reason = ""
    for name in names:
        try:
            return Path(hf_hub_download(source, name, cache_dir=cache_dir))
        except Exception as error:  # the hub raises connection, authorisation and cache errors of many kinds
            reason = type(error).__name__
    raise UserError(
        f"text.weights {source} is neither a folder nor in the cache, and cannot be fetched ({reason}): download "
        f"model.safetensors and vocab.txt of {source} elsewhere, and give their folder"
    )


def _bert_state(file: Path) -> dict[str, Tensor]:
    """A BERT's parameters without ``bert.``, with today's names of norms (old files say gamma and beta)."""
    try:
        if file.suffix == ".safetensors":
            from safetensors.torch import load_file

            content: dict[str, Any] = load_file(str(file))
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:  # both readers raise a dozen kinds for damaged files
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:120]
        raise UserError(f"text.weights {file} cannot be read ({reason}): fetch it anew") from error
    state = {}
    for name, value in content.items():
        name = name.removeprefix("bert.").replace("LayerNorm.gamma", "LayerNorm.weight")
        state[name.replace("LayerNorm.beta", "LayerNorm.bias")] = value
    return state


class ClipText(nn.Module):
    """The states of a CLIP text tower before they are pooled.

    A causal tower's token knows what stands before it, so a class name never knows those after it; the text layers of
    the fusion look both ways.
    """

    def __init__(self, tower: TextTower) -> None:
        super().__init__()
        # The projection to the joint space reads pooled states alone.
        self.tower = tower
        projection = tower.text_projection
        parameters = projection.parameters() if isinstance(projection, nn.Module) else [projection]
        for parameter in parameters:
            parameter.requires_grad_(False)
        self.width, self.vocabulary = tower.width, tower.vocab_size

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute the blocks in the backward pass."""
        self.tower.set_grad_checkpointing(enable)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """States ``[B, T, L]`` of ids int64 ``[B, T]``, T within the tower's context; ``mask`` is not needed.

        A causal tower's tokens never see the padding behind them.
        """
        tower = self.tower
        x = tower.token_embedding(ids) + tower.positional_embedding[: ids.shape[1]]
        for block in tower.transformer.resblocks:
            if tower.grad_checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, tower.causal, use_reentrant=False)
            else:
                x = block(x, tower.causal)
        return tower.ln_final(x)
