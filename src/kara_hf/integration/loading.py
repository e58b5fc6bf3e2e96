"""A model by its name: checked, loaded, on its device, with its tokenizer."""

import sys
import textwrap
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from ..config import Pins, as_pins, parse_pins
from .chat import system_pin, text_around


class LoadedModel:
    """A causal LM in memory, with its tokenizer.

    Args:
        name: hub id or folder of a causal LM.
        device: name, or None for a GPU if there is one.
        dtype: name, or "auto" for what the model was saved in.
        trust_remote_code: whether code that comes with the model may run.

    Attributes:
        limit: positions that the model has.

    Raises:
        ValueError: the device or the model's name is not possible; nothing was loaded then.
        OSError: the model cannot be loaded.
    """

    def __init__(self, name: str, *, device: str | None = None, dtype: str = "auto", trust_remote_code: bool = False):
        self.device = find_device(device)
        local = is_folder(name)
        self.name = Path(name).name if local else name
        logging.set_verbosity_error()
        if local:  # a download shows how far it is
            logging.disable_progress_bar()
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
            model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype, trust_remote_code=trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            reason = textwrap.shorten(str(error), 240, placeholder=" ...")
            raise OSError(
                f"model={name!r} cannot be loaded; give a hub id or the folder of a causal LM ({reason})"
            ) from error
        self.model = model.to(self.device).eval()
        self.limit = getattr(model.config.get_text_config(), "max_position_embeddings", None) or sys.maxsize

    def encode(self, prompt: str, *, chat: bool, system: str | None = None) -> torch.Tensor:
        """Token ids ``[1, S]`` of a prompt, inside the model's chat template if it has one and `chat` is set, there
        behind a `system` message if one is given.

        Raises:
            ValueError: there is a system message and no template for it.
        """
        if chat and self.tokenizer.chat_template:
            options = {"add_generation_prompt": True, "return_tensors": "pt", "return_dict": True}
            encoded = self.tokenizer.apply_chat_template(_messages(prompt, system), **options)
        else:
            self._check_no_system(system is not None, f"system={system!r}")
            encoded = self.tokenizer(prompt, return_tensors="pt")
        return encoded["input_ids"].to(self.device)

    def pins(self, asked: str, prompt: str, *, chat: bool, system: str | None = None) -> Pins:
        """What is `asked` to be pinned of a prompt that is encoded so: "system", or positions as `parse_pins` reads
        them.

        Raises:
            ValueError: it is neither, or there is no system message.
        """
        if asked != "system":
            return parse_pins(asked)
        if not (chat and self.tokenizer.chat_template):
            self._check_no_system(True, f"pin={asked!r}")
        return as_pins(system_pin(self.tokenizer, _messages(prompt, system), add_generation_prompt=True))

    def _check_no_system(self, wanted: bool, asked: str) -> None:
        if wanted:
            raise ValueError(
                f"{asked} is not possible: {self.name} is asked without a chat template, so there is no system message"
            )

    def encode_text(self, text: str, *, chat: bool) -> torch.Tensor:
        """Token ids ``[1, S]`` of a text that a question will follow, in one message with it where there is a template:
        those of the message up to the end of the text.
        """
        before = self._around(chat)[0]
        encoded = self.tokenizer(before + text.strip(), return_tensors="pt", add_special_tokens=not before)
        return encoded["input_ids"].to(self.device)

    def encode_question(self, question: str, *, chat: bool) -> torch.Tensor:
        """Token ids ``[1, S]`` of a question behind what `encode_text` gave, up to where the model answers."""
        asked = f"\n\n{question.strip()}{self._around(chat)[1]}"
        return self.tokenizer(asked, return_tensors="pt", add_special_tokens=False)["input_ids"].to(self.device)

    def _around(self, chat: bool) -> tuple[str, str]:
        """What the chat template puts in front of a message and behind it; nothing without one, or without `chat`."""
        if not (chat and self.tokenizer.chat_template):
            return "", ""
        return text_around(self.tokenizer, _messages("", None), 0, add_generation_prompt=True)


def _messages(prompt: str, system: str | None) -> list[dict[str, str]]:
    """A chat of one question."""
    before = [] if system is None else [{"role": "system", "content": system}]
    return [*before, {"role": "user", "content": prompt}]


def is_folder(name: str) -> bool:
    """Whether a model's name is a folder of one; raises ValueError if it can only be a folder and is none."""
    path = Path(name)
    if path.is_dir() and not any((path / file).is_file() for file in ("config.json", "adapter_config.json")):
        raise ValueError(
            f"model={name!r} is a folder without config.json; give the folder of a saved model or a hub id"
        )
    if not path.is_dir() and (not name or name[0] in "./~" or name.count("/") > 1 or path.exists()):
        raise ValueError(f"model={name!r} is no folder; give the folder of a saved model or a hub id")
    return path.is_dir()


def find_device(name: str | None) -> torch.device:
    """The device of that name, or without a name a GPU if there is one; raises ValueError if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name is None:
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        found = ["cpu", *(f"{accelerator.type}:{i}" for i in range(torch.accelerator.device_count()) if accelerator)]
        raise ValueError(f"device={name!r} is not there; torch {torch.__version__} sees {', '.join(found)}") from error
    return device
